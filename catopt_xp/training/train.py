"""`train`: one call from data to a trained, saved network."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from catopt_xp.backend.machine import memory_size
from catopt_xp.backend.ranks import Ranks
from catopt_xp.backend.threads import limited_threads
from catopt_xp.backend.xp import Backend
from catopt_xp.data.order import SHUFFLES, RowOrder
from catopt_xp.engines.choose import ENGINES, choose_engine
from catopt_xp.engines.plain import Settings
from catopt_xp.io.files import remove_stale, try_to_write
from catopt_xp.nn.labels import check_class_weight
from catopt_xp.nn.network import BaseRegressionModel
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.schedules import Scheduler
from catopt_xp.training.callbacks import Callback, Checkpointing, Watchers
from catopt_xp.training.checkpoint import Checkpoint, checkpoint_file
from catopt_xp.training.history import History
from catopt_xp.training.loop import Loop
from catopt_xp.training.plots import check_drawing
from catopt_xp.training.plots import plot_mini_batch as draw_mini_batch
from catopt_xp.training.report import Report
from catopt_xp.training.setup import (
    Learner,
    batch_size_for,
    check_data,
    check_model,
    check_optimizer,
    data_source,
    describe_run,
    load_dataset,
    network_for,
    one_of,
    optimizer_for,
    place_sets,
    usable_backend,
    weights_for,
    whole_number,
)


@dataclass
class TrainResult:
    """What `train` returns.

    `device`, `engine`: what ran; `engine_reason`: why that engine; `checkpoint`: the last file written; `notices`: what
    was said besides.
    """

    model: BaseRegressionModel
    optimizer: BaseOptimizer
    history: History
    device: str
    engine: str
    engine_reason: str
    checkpoint: Path | None
    notices: list[str]


def train(
    model: BaseRegressionModel | None = None,
    optimizer: BaseOptimizer | str | None = None,
    X: Any = None,
    Y: Any = None,
    total_epoch: int = 100,
    batch_size: int | str = 64,
    model_name: str = "model",
    save_dir: str | os.PathLike[str] | None = "work_dirs",
    recover_from: str | os.PathLike[str] | None = None,
    print_interval: int = 10,
    dev_X: Any = None,
    dev_Y: Any = None,
    plot_mini_batch: bool = False,
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
    memory_limit: int | str | None = None,
    seed: int = 0,
    shuffle: str = "epoch",
    drop_last: bool = False,
    accumulate: int = 1,
    hidden: Sequence[int] = (30, 20, 20),
    activation: str = "relu",
    dropout: float = 0.0,
    dtype: str = "float32",
    sample_weight: Any = None,
    class_weight: Any = None,
    learning_rate: float | None = None,
    lr_scheduler: Scheduler | None = None,
    schedule_by: str = "epoch",
    optimizer_options: Mapping[str, Any] | None = None,
    early_stopping: int | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint_every: int | None = None,
    checkpoint_every_steps: int | None = None,
    comm: Any = None,
    progress: bool | None = None,
    verbose: bool = True,
) -> TrainResult:
    """Trains a classifier by mini-batch gradient descent; with nothing given, the reference network on the drawn set.

    What trains
        `model`: a DeepNetwork or another BaseRegressionModel; None builds `[n_x, *hidden, outputs]` with `activation`,
        `dropout`, `dtype` and `seed`. `optimizer`: an instance made of `model.save()`, or a name (gd, momentum,
        rmsprop, adam; None: adam) to which `learning_rate` (None: the chapter's for it), `lr_scheduler` (None:
        constant) and `optimizer_options` (`weight_decay`, `l2`, `clip_norm`, `beta`, `eps`, …) apply. `schedule_by`:
        "epoch", or "step" for a schedule that is asked with a fractional epoch.
    On what
        `X`: (n_x, m), uint8 pixels (seen as X/255) or numbers, with `Y`: (1, m) of 0 and 1, or class numbers for a
        softmax output; `dev_X`, `dev_Y` alike. Or `data`: a folder of photographs, an `.npz` file, rows in a `.npy`
        file with their labels in `NAME_labels.npy`, `(X, Y)`, `(X, Y, dev_X, dev_Y)`, or a DataSet; `img_shape` (width,
        height), `train_size`, `dev_size` (per class) and `on_error` ("raise" or "skip" a broken photograph) go with it.
        `sample_weight`: (m,) numbers, or None; `class_weight`: None, {class: weight}, classes by number or by name, or
        "balanced", which weighs a class by `m / (classes * its samples)`. Losses and gradients are weighted means then,
        those over the training set too; the dev set is not weighted. They go with a set in memory.
    How
        `total_epoch`: the epoch at which training ends, resumed or not. `batch_size`: 1 to m, more means m; "auto"
        measures, so that the size may differ from machine to machine. `shuffle`: "epoch" (a new order every epoch),
        "once" or "none". `drop_last`: leave out a short last batch. `accumulate`: batches per update, whose gradients
        are averaged over their samples. `seed`: of weights, orders and dropout.
        `device`, `strict_device`: as for `get_backend`. `engine`: "auto", the fastest that can run this; "plain", the
        formulas batch by batch; "panels", the fused step of a CPU (needs numba). `threads`: at most so many (None:
        OMP_NUM_THREADS or NUMBA_NUM_THREADS where they are set, else one per processor, shared among ranks).
        `memory_limit`: bytes, or a text such as "500MB", of which the set takes half at most (None: what is free); a
        set that is larger, and lies in rows in a memory-mapped file, is streamed from there in windows, and shuffled
        within pools of two windows. What is free may differ from run to run, and with it windows, order and bits; a
        limit fixes them.
        `comm`: a communicator of mpi4py, over whose processes the features are spread (None: this process alone). All
        make this call alike, with one result; the first one alone prints and writes. Callbacks are called on each rank
        that has them; `state.save` is for all ranks or none, and an exception in a callback of one rank ends all. Each
        rank trains on a GPU of its own, if all have one, else all on CPUs.
    What is kept
        `save_dir`: folder of `{model_name}_latest.npz` (None: nothing is saved), written every `checkpoint_every`
        epochs (None: when evaluated), every `checkpoint_every_steps` steps, and at the end. `recover_from`: a
        checkpoint to go on from; a model or optimizer that is not given is the checkpoint's, options and schedule
        included. `print_interval`: epochs between evaluations. `early_stopping`: evaluations without
        a lower cost (on the dev set, where there is one) after which training ends; the best weights are put back.
        `callbacks`: objects with `on_epoch(state)`: logs (`CsvLog`, `JsonLog`, `TensorBoard`), a `Checkpointing` or an
        `EarlyStopping` of your own, or anything else; see `Callback`. `plot_mini_batch`: draw the mini-batch cost into
        `save_dir`. `progress`: a bar (None: when the terminal shows one). `verbose`: print what is done.

    Returns a TrainResult; the model and any dict from `model.save()` carry the trained values, also after an
    exception. Raises ValueError or TypeError for bad input, TrainingDiverged when a loss is not finite, Interrupted
    after Ctrl-C or SIGTERM, when the run has been saved, CheckpointError and OSError for files, DeviceError for a
    strict device.

    >>> import numpy as np
    >>> X = np.random.default_rng(0).integers(0, 256, (50, 12), dtype=np.uint8).T
    >>> Y = (X[:6].mean(axis=0, keepdims=True) > 128).astype(int)
    >>> result = train(X=X, Y=Y, total_epoch=3, save_dir=None, verbose=False)
    >>> result.history.epoch, result.device
    ([0, 1, 2], 'cpu')
    """
    ranks = Ranks(comm)
    report = Report(verbose and ranks.rank == 0)
    with ranks.agreed():
        threads = None if threads is None else whole_number("threads", threads, 1)
    share = ranks.threads() if ranks.size > 1 else None  # all ranks ask, whatever they are given
    with limited_threads(threads or share):
        with ranks.agreed():  # before the first step, what stops one rank stops all
            total_epoch = whole_number("total_epoch", total_epoch, 0)
            print_interval = whole_number("print_interval", print_interval, 1)
            accumulate = whole_number("accumulate", accumulate, 1)
            batch_size = batch_size if batch_size == "auto" else whole_number("batch_size", batch_size, 1, ' or "auto"')
            order = RowOrder(whole_number("seed", seed, 0), one_of("shuffle", shuffle, SHUFFLES))
            by_step = one_of("schedule_by", schedule_by, ("epoch", "step")) == "step"
            one_of("engine", engine, ENGINES)
            check_data(data, X, Y, dev_X, dev_Y)
            check_model(model, hidden, activation, dropout, dtype)
            check_optimizer(optimizer, learning_rate, lr_scheduler, optimizer_options)
            check_class_weight(class_weight)
            every_steps = _optional("checkpoint_every_steps", checkpoint_every_steps)
            every, patience = (
                _optional("checkpoint_every", checkpoint_every),
                _optional("early_stopping", early_stopping),
            )
            room = _memory_limit(memory_limit, ranks)
            file = checkpoint_file(save_dir, model_name)
            keeps = ranks.rank == 0
            checkpointing = None if file is None else Checkpointing(file, every, every_steps, report.notice, keeps)
            watchers = Watchers(callbacks, patience, checkpointing)
            if plot_mini_batch:
                check_drawing("plot_mini_batch", file)
            if file is not None and ranks.rank == 0:
                try_to_write(file)
                remove_stale(file)

            checkpoint = None if recover_from is None else Checkpoint.read(recover_from)
            backend = ranks.backend(device, strict_device)
            source = data_source(data, X, Y, dev_X, dev_Y, backend, checkpoint)
            dataset, n_x = load_dataset(source, img_shape, train_size, dev_size, on_error, progress, ranks)
            model = network_for(model, hidden, activation, dropout, dtype, order.seed, dataset, n_x, checkpoint)
            optimizer = optimizer_for(model, optimizer, learning_rate, lr_scheduler, optimizer_options, checkpoint)
            report.notice(*dataset.notices)
            if optimizer.epoch and checkpoint is None:
                told = f"the optimizer stands at epoch {optimizer.epoch:g}"
                report.notice(f"{told}; this run counts from 0 (recover_from goes on)")
            usable = usable_backend(backend, device, strict_device, model, dataset, batch_size, ranks)
            if usable.device != backend.device:
                report.notice(f"training on {usable.device}: {usable.reason}")
            with usable.activate():
                started = time.perf_counter()
                order = replace(order, window=None if checkpoint is None else checkpoint.described.get("window"))
                sets = place_sets(dataset, n_x, model, order, room, batch_size, usable, ranks, recover_from)
                learner = Learner.on(usable, model, optimizer)
                usable.synchronize()  # sync
                moved = time.perf_counter() - started
                weights = weights_for(sample_weight, class_weight, dataset, sets, model)
                size, why = batch_size_for(batch_size, sets, weights, learner, usable, engine, checkpoint, ranks)
                report.notice(*sets.notices, *([] if why is None else [why]))
            settings = Settings(size, bool(drop_last), accumulate, by_step, every_steps, m=sets.train.m)
            parts = *learner.on_device, sets.train.samples, sets.train.targets
            chosen, reason = choose_engine(engine, *parts, usable, settings, weights=weights, ranks=ranks)
            sets.check_pools(size, chosen.reach)
            described = describe_run(learner, dataset, n_x, sets, weights, settings, usable, chosen.name)
            described |= {"total_epoch": total_epoch, "print_interval": print_interval}
            asked = [described, every, every_steps, patience, save_dir is None]
            ranks.check_same(json.dumps(asked, default=repr).encode(), "arguments")
            report.announce(usable, chosen.name, reason, dataset.name, n_x, sets, ranks.size)
            loop = Loop(chosen, sets, learner, watchers, described, report, ranks)
        loop.history.add_timings(dataset.timings | {"move": moved})
        history = loop.run(checkpoint, total_epoch, print_interval, progress)
    if plot_mini_batch and file is not None and ranks.rank == 0 and history.mini_batch_loss:
        draw_mini_batch(asdict(history), file.with_name(f"{model_name}_mini_batch.png"))
    report.say(history.time_table(resumed=checkpoint is not None))
    return TrainResult(model, optimizer, history, usable.device, chosen.name, reason, loop.checkpoint, report.notices)


def _optional(name: str, value: Any) -> int | None:
    return None if value is None else whole_number(name, value, 1)


def _memory_limit(memory_limit: int | str | None, ranks: Ranks) -> int | None:
    """Bytes. Raises ValueError for what is no size of memory, or where ranks hold their parts of the set whole."""
    if memory_limit is None:
        return None
    if ranks.size > 1:
        raise ValueError("memory_limit is for one process, ranks hold their parts of the set whole: leave it out")
    try:
        return memory_size(memory_limit)
    except ValueError as error:
        raise ValueError(f"memory_limit: {error}") from error
