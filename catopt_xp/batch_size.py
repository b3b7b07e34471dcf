"""Choosing a batch size: the rule of thumb, and measuring real steps. Floor F3."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import numpy as np

from catopt_xp.backend import Array, Backend
from catopt_xp.engines.plain import PlainEngine, Settings
from catopt_xp.network import BaseRegressionModel
from catopt_xp.optim import BaseOptimizer

SMALL_SET = 2000
SMALLEST, LARGEST = 64, 512
STEPS_PER_EPOCH = 30
NEARLY = 0.9  # of the best rate: the smallest batch that reaches it makes more updates in the same time
MEASURED_SECONDS = 0.5  # a candidate is measured for about so long, after one step that warms up
FLOAT_BYTES = 4


def rule_of_thumb(m: int) -> tuple[int, str]:
    """The chapter's rule: a small set whole, a larger one in powers of two from 64 to 512. Returns size and reason.

    `m`: samples. Of the powers of two, the largest one that leaves about 30 steps in an epoch.

    >>> rule_of_thumb(500)[0], rule_of_thumb(2000)[0], rule_of_thumb(100_000)[0]
    (500, 64, 512)
    """
    if m < SMALL_SET:
        return m, f"fewer than {SMALL_SET} samples are taken whole"
    size = SMALLEST
    while size < LARGEST and m / (2 * size) >= STEPS_PER_EPOCH:
        size *= 2
    return size, f"the largest power of two up to {LARGEST} with about {STEPS_PER_EPOCH} steps or more in an epoch"


@dataclass
class Measured:
    """One candidate: samples per second of real steps."""

    batch_size: int
    samples_per_second: float


def measure(
    model: BaseRegressionModel, optimizer: BaseOptimizer, samples: Array, targets: Array, backend: Backend
) -> list[Measured]:
    """Times real steps at 64, 128, 256 and 512, those that the set and the memory allow, smallest first.

    `samples`: (m, n_x) and `targets`: (·, m), on `backend`, where model and optimizer lie too. The steps are made by
    copies: neither is changed. A batch whose floats would take half of the free memory is left out.
    """
    m, n_x = samples.shape
    fitting = backend.free_memory() // (2 * FLOAT_BYTES * n_x)
    sizes = [size for size in (SMALLEST, 2 * SMALLEST, 4 * SMALLEST, LARGEST) if size <= min(m, fitting)]
    return [_measure_one(size, model, optimizer, samples, targets, backend) for size in sizes]


def _measure_one(
    size: int,
    model: BaseRegressionModel,
    optimizer: BaseOptimizer,
    samples: Array,
    targets: Array,
    backend: Backend,
) -> Measured:
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    engine = PlainEngine(twin, its_optimizer, samples, targets, backend, Settings(size, drop_last=True))
    order = np.random.Generator(np.random.PCG64(0)).permutation(samples.shape[0])
    steps, done = engine.steps(0, order), 0
    next(steps)
    backend.synchronize()  # sync
    start = time.perf_counter()
    for _ in steps:
        done += 1
        backend.synchronize()  # sync
        if time.perf_counter() - start > MEASURED_SECONDS:
            break
    if not done:  # one batch is the whole epoch: the step that warmed up is made again and timed
        next(engine.steps(0, order))
        backend.synchronize()  # sync
        done = 1
    return Measured(size, done * size / (time.perf_counter() - start))


def choose(measured: list[Measured]) -> tuple[int, str]:
    """The smallest batch within a tenth of the best rate, and the reason. Raises ValueError when there is none.

    >>> choose([Measured(64, 900.0), Measured(128, 1900.0), Measured(256, 2000.0)])[0]
    128
    """
    if not measured:
        raise ValueError("no batch size to choose from: not even 64 samples as floats fit the free memory")
    best = max(row.samples_per_second for row in measured)
    chosen = min((row for row in measured if row.samples_per_second >= NEARLY * best), key=lambda row: row.batch_size)
    rates = ", ".join(f"{row.samples_per_second:.0f}/s at {row.batch_size}" for row in measured)
    return chosen.batch_size, f"the smallest within a tenth of the best measured rate ({rates})"
