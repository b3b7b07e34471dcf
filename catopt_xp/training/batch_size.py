"""Choosing a batch size: the rule of thumb, and measuring real steps."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from catopt_xp.backend.xp import Backend
from catopt_xp.data.resident import ResidentSet
from catopt_xp.data.stream import StreamedSet
from catopt_xp.engines.choose import choose_engine
from catopt_xp.engines.plain import Settings, Weights
from catopt_xp.nn.network import BaseRegressionModel
from catopt_xp.optim.base import BaseOptimizer

SMALL_SET = 2000
SMALLEST, LARGEST = 64, 512
CANDIDATES = (64, 128, 256, 512)  # among them the choice is made
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
    engine: str,
    model: BaseRegressionModel,
    optimizer: BaseOptimizer,
    train_set: ResidentSet,
    backend: Backend,
    sizes: Sequence[int] = CANDIDATES,
    weights: Weights | None = None,
) -> list[Measured]:
    """Times real steps at each of `sizes` that the set and the memory allow, smallest first.

    `engine`: as for `train`; `train_set`: on `backend`, where model and optimizer lie too; `weights`: of
    its samples. The steps are made by copies: neither is changed. A batch whose floats would take half of the free
    memory is left out. Raises ValueError where the set is streamed.
    """
    if isinstance(train_set, StreamedSet):
        raise ValueError("batch sizes are measured on a set in memory, this one is streamed: give batch_size a number")
    m, n_x = train_set.samples.shape
    fitting = backend.free_memory() // (2 * FLOAT_BYTES * n_x)
    usable = [size for size in sorted(set(sizes)) if size <= min(m, fitting)]
    return [_measure_one(size, engine, model, optimizer, train_set, backend, weights) for size in usable]


def _measure_one(
    size: int,
    name: str,
    model: BaseRegressionModel,
    optimizer: BaseOptimizer,
    train_set: ResidentSet,
    backend: Backend,
    weights: Weights | None,
) -> Measured:
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    samples, settings = train_set.samples, Settings(size, drop_last=True)
    parts = twin, its_optimizer, samples, train_set.targets, backend, settings
    engine, _ = choose_engine(name, *parts, weights=weights)
    order = np.random.Generator(np.random.PCG64(0)).permutation(samples.shape[0])
    steps, done = engine.steps(0, order, following=order), 0
    warm = next(steps)
    backend.synchronize()  # sync
    start = time.perf_counter()
    for batches in steps:
        done = batches - warm
        backend.synchronize()  # sync
        if time.perf_counter() - start > MEASURED_SECONDS:
            break
    if not done:  # the whole epoch warmed up: its first steps are made again and timed
        done = next(engine.steps(0, order, following=order))
        backend.synchronize()  # sync
    return Measured(size, done * size / (time.perf_counter() - start))


def choose(measured: Sequence[Measured]) -> tuple[int, str]:
    """The smallest batch within a tenth of the best rate, and the reason. Raises ValueError when there is none.

    Larger batches are faster by little, and make fewer updates of a pass.

    >>> choose([Measured(64, 900.0), Measured(128, 1900.0), Measured(256, 2000.0)])[0]
    128
    """
    if not measured:
        raise ValueError("no batch size to choose from: not even 64 samples as floats fit the free memory")
    best = max(row.samples_per_second for row in measured)
    chosen = min((row for row in measured if row.samples_per_second >= NEARLY * best), key=lambda row: row.batch_size)
    rates = ", ".join(f"{row.samples_per_second:.0f}/s at {row.batch_size}" for row in measured)
    return chosen.batch_size, f"the smallest within a tenth of the best measured rate ({rates})"
