"""`train`: one call from data to a trained, saved network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catopt_xp.backend.ranks import Ranks
from catopt_xp.backend.threads import limited_threads
from catopt_xp.backend.xp import Backend
from catopt_xp.nn.network import BaseRegressionModel
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.schedules import Scheduler
from catopt_xp.training.callbacks import Callback
from catopt_xp.training.history import History
from catopt_xp.training.loop import Run
from catopt_xp.training.plan import Plan
from catopt_xp.training.setup import prepare


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
    arguments = locals()  # exactly the parameters above
    ranks = Ranks(comm)
    with ranks.agreed():
        plan = Plan(**arguments)
    plan.verbose = plan.verbose and ranks.rank == 0
    share = None if ranks.size == 1 else ranks.threads()
    with limited_threads(plan.threads or share):
        with ranks.agreed():
            job = prepare(plan, ranks)
        return _result(Run(job).train())


def _result(run: Run) -> TrainResult:
    return TrainResult(
        model=run.job.model,
        optimizer=run.job.optimizer,
        history=run.history,
        device=run.job.backend.device,
        engine=run.engine.name,
        engine_reason=run.engine_reason,
        checkpoint=run.checkpoint,
        notices=run.job.notices,
    )
