"""`tune`: how fast training is at several batch sizes, measured on this machine."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from catopt_xp.backend.threads import limited_threads
from catopt_xp.engines.choose import choose_engine
from catopt_xp.engines.plain import Settings
from catopt_xp.training.batch_size import CANDIDATES, SMALL_SET, Measured, choose, measure, rule_of_thumb
from catopt_xp.training.plan import Plan
from catopt_xp.training.setup import prepare
from catopt_xp.training.train import train


@dataclass
class Tuning:
    """What `tune` returns: `batch_size` and why, what was measured, and on which device and engine."""

    batch_size: int
    reason: str
    measured: list[Measured]
    m: int
    device: str
    engine: str

    def table(self) -> str:
        """A line for each size: samples per second, seconds per epoch, updates per epoch."""
        lines = [f"{'batch':>7} {'samples/s':>11} {'s/epoch':>9} {'updates':>8}"]
        for row in self.measured:
            seconds, updates = self.m / row.samples_per_second, -(-self.m // row.batch_size)
            chosen = "  <- chosen" if row.batch_size == self.batch_size else ""
            lines.append(f"{row.batch_size:>7} {row.samples_per_second:>11.0f} {seconds:>9.3f} {updates:>8}{chosen}")
        return "\n".join(lines)


def tune(batch_sizes: Sequence[int] = (), **arguments: Any) -> Tuning:
    """Times real steps at several batch sizes and chooses one; nothing is trained, nothing is written.

    `batch_sizes`: sizes to measure besides 64, 128, 256 and 512; those beyond the set are left out. `arguments`: those
    of `train` (data, network, optimizer, device, engine, threads). The choice is that of `train(batch_size="auto")`: a
    set of fewer than 2000 samples whole, else the smallest of 64 to 512 within a tenth of their best rate. Raises what
    `train` raises for bad arguments, and ValueError for a batch size that is no whole number of at least 1.

    >>> import numpy as np
    >>> X = np.random.default_rng(0).integers(0, 256, (200, 12), dtype=np.uint8).T
    >>> tuning = tune((16,), X=X, Y=np.arange(200).reshape(1, -1) % 2, engine="plain", verbose=False)
    >>> tuning.batch_size, [row.batch_size for row in tuning.measured]
    (200, [16, 64, 128, 200])
    """
    for size in batch_sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"batch_sizes holds {size!r}; give whole numbers of at least 1")
    given = inspect.signature(train).bind(**arguments | {"batch_size": 64, "save_dir": None})
    given.apply_defaults()
    plan = Plan(**given.arguments)
    if plan.comm is not None:
        raise ValueError("tune measures this process alone; leave comm out")
    with limited_threads(plan.threads):
        job = prepare(plan)
        m = job.train_set.m
        thumb, why = rule_of_thumb(m)
        sizes = [*CANDIDATES, *batch_sizes, *([thumb] if m < SMALL_SET else [])]
        with job.backend.activate():
            objects = (job.device_model, job.device_optimizer, job.train_set, job.backend)
            measured = measure(plan.engine, *objects, sizes)
            samples, targets = job.train_set.samples, job.train_set.targets
            engine, reason = choose_engine(plan.engine, *objects[:2], samples, targets, job.backend, Settings(64))
        if m < SMALL_SET:
            chosen = thumb
        else:
            chosen, why = choose([row for row in measured if row.batch_size in CANDIDATES])
    device = f"{job.backend.device} ({job.backend.reason})"
    return Tuning(chosen, why, measured, m, device, f"{engine.name} ({reason})")
