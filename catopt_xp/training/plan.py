"""The arguments of `train`, checked one by one."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from catopt_xp.backend.machine import memory_size
from catopt_xp.backend.xp import Backend
from catopt_xp.data.order import SHUFFLES
from catopt_xp.engines.choose import ENGINES
from catopt_xp.nn.network import BaseRegressionModel
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.schedules import Scheduler
from catopt_xp.training.callbacks import Callback, EarlyStopping

# Of the arguments of `train` that have no effect beside some others: what they are when nobody gave them.
DEFAULTS: Mapping[str, Any] = {
    "hidden": (30, 20, 20),
    "activation": "relu",
    "dropout": 0.0,
    "dtype": "float32",
}


@dataclass
class Plan:
    """The arguments of `train`, checked one by one. Raises ValueError naming the argument and what it takes."""

    model: BaseRegressionModel | None
    optimizer: BaseOptimizer | str | None
    X: Any
    Y: Any
    total_epoch: int
    batch_size: int | str
    model_name: str
    save_dir: str | os.PathLike[str] | None
    recover_from: str | os.PathLike[str] | None
    print_interval: int
    dev_X: Any
    dev_Y: Any
    plot_mini_batch: bool
    data: Any
    img_shape: tuple[int, int] | None
    train_size: int | None
    dev_size: int | None
    on_error: str
    device: str | Backend
    strict_device: bool | None
    engine: str
    threads: int | None
    memory_limit: Any
    seed: int
    shuffle: str
    drop_last: bool
    accumulate: int
    hidden: Sequence[int]
    activation: str
    dropout: float
    dtype: str
    learning_rate: float | None
    lr_scheduler: Scheduler | None
    schedule_by: str
    optimizer_options: Mapping[str, Any] | None
    early_stopping: int | None
    callbacks: Sequence[Callback]
    checkpoint_every: int | None
    checkpoint_every_steps: int | None
    comm: Any
    progress: bool | None
    verbose: bool

    def __post_init__(self) -> None:
        # Plain numbers: those of NumPy are no JSON, and a run would end at its first checkpoint.
        self.total_epoch = _whole("total_epoch", self.total_epoch, 0)
        self.print_interval = _whole("print_interval", self.print_interval, 1)
        self.accumulate = _whole("accumulate", self.accumulate, 1)
        self.seed = _whole("seed", self.seed, 0)
        self.drop_last = bool(self.drop_last)
        self.hidden = tuple(_whole("hidden", units, 1) for units in np.atleast_1d(np.asarray(self.hidden)).tolist())
        self.callbacks = tuple(self.callbacks or ())
        for name in ("checkpoint_every", "checkpoint_every_steps", "early_stopping", "threads"):
            if getattr(self, name) is not None:
                setattr(self, name, _whole(name, getattr(self, name), 1))
        if self.memory_limit is not None:
            try:
                self.memory_limit = memory_size(self.memory_limit)
            except ValueError as error:
                raise ValueError(f"memory_limit: {error}") from error
        if self.batch_size != "auto":
            self.batch_size = _whole("batch_size", self.batch_size, 1, ' or "auto"')
        _one_of("shuffle", self.shuffle, SHUFFLES)
        _one_of("schedule_by", self.schedule_by, ("epoch", "step"))
        _one_of("engine", self.engine, ENGINES)
        named = isinstance(self.model_name, str) and self.model_name.isprintable() and self.model_name not in ("", "..")
        if not named or Path(self.model_name).name != self.model_name:
            raise ValueError(f"model_name is {self.model_name!r}; give a plain file name, without a folder")
        if self.save_dir == "":
            raise ValueError("save_dir is empty; give a folder, or None to save nothing")
        if self.X is not None and self.data is not None:
            raise ValueError("X and data are both given; pass one of them")
        if self.X is None and any(x is not None for x in (self.Y, self.dev_X, self.dev_Y)):
            raise ValueError("Y or dev_X is given without X; pass X too")
        if self.X is not None and self.dev_X is None and self.dev_Y is not None:
            raise ValueError("dev_Y is given without dev_X; pass both")
        self._check_objects()
        if self.plot_mini_batch and self.save_dir is None:
            raise ValueError("plot_mini_batch draws into save_dir, which is None; give a folder")
        if self.plot_mini_batch and importlib.util.find_spec("matplotlib") is None:
            raise ValueError('plot_mini_batch needs matplotlib: pip install "catopt-xp[plot]"')

    def _check_objects(self) -> None:
        if self.model is not None:
            if not isinstance(self.model, BaseRegressionModel):
                raise TypeError(f"model is a {type(self.model).__name__}; give a BaseRegressionModel, or None")
            self._refuse(("hidden", "activation", "dropout", "dtype"), "the network that train builds; set it on yours")
        if isinstance(self.optimizer, BaseOptimizer):
            options = ("learning_rate", "lr_scheduler", "optimizer_options")
            self._refuse(options, "an optimizer's name; set it on the optimizer you pass instead")
        elif self.optimizer is not None and not isinstance(self.optimizer, str):
            given = "a class" if isinstance(self.optimizer, type) else f"a {type(self.optimizer).__name__}"
            raise TypeError(f"optimizer is {given}; give its name, or a BaseOptimizer made of model.save()")
        if self.lr_scheduler is not None and not callable(self.lr_scheduler):
            raise TypeError(f"lr_scheduler is {self.lr_scheduler!r}; give a function (learning_rate, epoch) -> rate")
        for callback in self.callbacks:
            if not callable(getattr(callback, "on_epoch", None)):
                raise TypeError(f"callbacks holds {callback!r}; each must have a method on_epoch(state)")
        if self.early_stopping is not None and any(isinstance(c, EarlyStopping) for c in self.callbacks):
            raise ValueError("early_stopping is given, and an EarlyStopping among the callbacks; pass one of them")

    def _refuse(self, names: Sequence[str], goes_with: str) -> None:
        """Raises ValueError for the first argument of `names` that was given but would have no effect."""
        for name in names:
            value = getattr(self, name)
            value = tuple(value) if isinstance(value, list) else value
            if value is not None and value != DEFAULTS.get(name):
                raise ValueError(f"{name} goes with {goes_with}")

    def say(self, text: str) -> None:
        """Prints a line, unless the run is not `verbose`; a progress bar stays below it."""
        if self.verbose:
            tqdm.write(text)
            sys.stdout.flush()  # a log that is read while the run goes on

    @property
    def checkpoint_path(self) -> Path | None:
        """Where the latest checkpoint goes, or None when nothing is saved."""
        return None if self.save_dir is None else Path(self.save_dir) / f"{self.model_name}_latest.npz"


def _whole(name: str, value: Any, least: int, besides: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value!r}; give a whole number of at least {least}{besides}")
    return int(value)


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose {', '.join(choices)}")
