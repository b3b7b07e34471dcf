"""`tune`: how fast training is at several batch sizes, measured on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from catopt_xp.backend.ranks import Ranks
from catopt_xp.backend.threads import limited_threads
from catopt_xp.backend.xp import Backend
from catopt_xp.data.order import RowOrder
from catopt_xp.engines.choose import ENGINES, choose_engine
from catopt_xp.engines.plain import Settings
from catopt_xp.io.console import plain
from catopt_xp.nn.network import BaseRegressionModel
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.schedules import Scheduler
from catopt_xp.training.batch_size import CANDIDATES, SMALL_SET, Measured, choose, measure, rule_of_thumb
from catopt_xp.training.report import Report
from catopt_xp.training.setup import (
    NETWORK,
    Learner,
    check_data,
    check_model,
    check_optimizer,
    data_source,
    load_dataset,
    network_for,
    one_of,
    optimizer_for,
    place_sets,
    usable_backend,
    whole_number,
)

BATCH_SIZE = 64  # for which the engine is chosen


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


def tune(
    batch_sizes: Sequence[int] = (),
    model: BaseRegressionModel | None = None,
    optimizer: BaseOptimizer | str | None = None,
    X: Any = None,
    Y: Any = None,
    *,
    data: Any = None,
    img_shape: tuple[int, int] | None = None,
    train_size: int | None = None,
    dev_size: int | None = None,
    on_error: str = "raise",
    device: str | Backend = "auto",
    strict_device: bool | None = None,
    engine: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    hidden: Sequence[int] = NETWORK["hidden"],
    activation: str = NETWORK["activation"],
    dropout: float = NETWORK["dropout"],
    dtype: str = NETWORK["dtype"],
    learning_rate: float | None = None,
    lr_scheduler: Scheduler | None = None,
    optimizer_options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    verbose: bool = False,
) -> Tuning:
    """Times real steps at several batch sizes and chooses one; nothing is trained, nothing is written.

    `batch_sizes`: sizes to measure besides 64, 128, 256 and 512; those beyond the set are left out. The other arguments
    are those of `train`; `verbose` prints what there is to say of the data. The choice is that of
    `train(batch_size="auto")`: a set of fewer than 2000 samples whole, else the smallest of 64 to 512 within a tenth of
    their best rate. Raises what `train` raises for bad arguments, and ValueError for a batch size that is no whole
    number of at least 1.

    >>> import numpy as np
    >>> X = np.random.default_rng(0).integers(0, 256, (200, 12), dtype=np.uint8).T
    >>> tuning = tune((16,), X=X, Y=np.arange(200).reshape(1, -1) % 2, engine="plain")
    >>> tuning.batch_size, [row.batch_size for row in tuning.measured]
    (200, [16, 64, 128, 200])
    """
    for size in batch_sizes:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"batch_sizes holds {size!r}; give whole numbers of at least 1")
    one_of("engine", engine, ENGINES)
    check_data(data, X, Y, None, None)
    check_model(model, hidden, activation, dropout, dtype)
    check_optimizer(optimizer, learning_rate, lr_scheduler, optimizer_options)
    alone, report = Ranks(), Report(verbose)
    with limited_threads(None if threads is None else whole_number("threads", threads, 1)):
        backend = alone.backend(device, strict_device)
        source = data_source(data, X, Y, None, None, backend, None)
        dataset, n_x = load_dataset(source, img_shape, train_size, dev_size, on_error, progress, alone)
        order = RowOrder(whole_number("seed", seed, 0))
        model = network_for(model, hidden, activation, dropout, dtype, order.seed, dataset, n_x, None)
        optimizer = optimizer_for(model, optimizer, learning_rate, lr_scheduler, optimizer_options, None)
        backend = usable_backend(backend, device, strict_device, model, dataset, BATCH_SIZE, alone)
        with backend.activate(), place_sets(dataset, n_x, model, order, None, BATCH_SIZE, backend, alone) as sets:
            for notice in (*dataset.notices, *sets.notices):
                report.say(f"note: {plain(notice)}")
            learner, m = Learner.on(backend, model, optimizer), sets.train.m
            thumb, why = rule_of_thumb(m)
            sizes = [*CANDIDATES, *batch_sizes, *([thumb] if m < SMALL_SET else [])]
            measured = measure(engine, *learner.on_device, sets.train, backend, sizes)
            parts = *learner.on_device, sets.train.samples, sets.train.targets
            chosen_engine, reason = choose_engine(engine, *parts, backend, Settings(BATCH_SIZE))
        if m < SMALL_SET:
            chosen = thumb
        else:
            chosen, why = choose([row for row in measured if row.batch_size in CANDIDATES])
    return Tuning(chosen, why, measured, m, f"{backend.device} ({backend.reason})", f"{chosen_engine.name} ({reason})")
