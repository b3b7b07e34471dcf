"""What is called after every epoch: the protocol, with early stopping and checkpointing written that way. Floor F3."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from catopt_xp.backend.xp import Array, backend_of
from catopt_xp.checkpoint import npz_path
from catopt_xp.history import History
from catopt_xp.io.files import Mark, keep_copy, mark
from catopt_xp.nn.network import BaseRegressionModel
from catopt_xp.nn.parameters import Parameters, check_matches
from catopt_xp.optim.base import BaseOptimizer


def _no_run(filename: str | os.PathLike[str]) -> Path:
    raise RuntimeError(f"{filename} was not written: this TrainState belongs to no run")


@dataclass
class TrainState:
    """What a callback sees. `model` and `optimizer` are those that train, on their device; set `stop` to end it all.

    `epoch`: the one that has ended, counted from 0. `evaluated`: whether the history got its costs and accuracies.
    `last`: whether no epoch follows, as the end is reached or the run was interrupted. `steps`: updates since epoch 0.
    `save(filename)` writes a checkpoint that `recover_from` takes, and returns its path.
    """

    epoch: int
    model: BaseRegressionModel
    optimizer: BaseOptimizer
    history: History
    evaluated: bool
    stop: bool = False
    last: bool = False
    steps: int = 0
    save: Callable[[str | os.PathLike[str]], Path] = _no_run


class Callback(Protocol):
    """Anything with `on_epoch(state)`, called after each epoch (and its evaluation, where there is one).

    Where it has `on_end(state)`, that is called once more when training ends, also by an exception. One that says
    `needs_weights = False` reads the weights of evaluated epochs alone; those of others are not gathered for it, which
    saves time.
    """

    def on_epoch(self, state: TrainState) -> None:
        """Look at the run, log it, or set `state.stop`."""


class EarlyStopping:
    """Stops when the cost has not fallen for `patience` evaluations, and keeps the weights of the best one.

    The cost is `dev_loss`, or `full_train_loss` without a dev set. `train` puts the best weights back at the end, and
    keeps them in its checkpoints. Raises ValueError when `patience` is below 1.
    """

    needs_weights = False

    def __init__(self, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"early_stopping is {patience}; give the evaluations to wait, at least 1")
        self.patience = patience
        self.reset()

    def reset(self) -> None:
        """Forgets the run before."""
        self.best_loss = float("inf")
        self.best_epoch = -1
        self.waited = 0
        self.best: Mapping[str, Array] | None = None

    def on_epoch(self, state: TrainState) -> None:
        """Compares the newest evaluation with the best one."""
        if not state.evaluated:
            return
        history = state.history
        loss = (history.dev_loss or history.full_train_loss)[-1]
        if loss < self.best_loss:
            self.best_loss, self.best_epoch, self.waited = loss, state.epoch, 0
            self.keep(state.model.save())
            return
        self.waited += 1
        state.stop = state.stop or self.exhausted

    def keep(self, weights: Mapping[str, Any]) -> None:
        """Copies `weights` into the buffer of the best ones, made at the first call."""
        if self.best is None:
            self.best = _buffers(weights)
        for name, kept in self.best.items():
            kept[...] = weights[name]

    @property
    def exhausted(self) -> bool:
        """Whether the cost has not fallen for `patience` evaluations."""
        return self.waited >= self.patience

    def save(self) -> dict[str, Any]:
        """State without the weights, JSON-able."""
        return {"best_loss": self.best_loss, "best_epoch": self.best_epoch, "waited": self.waited}

    def load(self, state: Mapping[str, Any], best: Mapping[str, Any], like: Mapping[str, Array]) -> None:
        """Takes a saved state and the weights kept with it, on the device of `like`. ValueError names a bad key."""
        check_matches(best, {name: tuple(x.shape) for name, x in like.items()}, "best weights")
        self.best_loss, self.best_epoch = float(state["best_loss"]), int(state["best_epoch"])
        self.waited = int(state["waited"])
        self.best = _buffers(like)
        for name, kept in self.best.items():
            kept[...] = backend_of(kept).asarray(best[name], dtype=kept.dtype)


class Checkpointing:
    """Writes a checkpoint every `every` epochs (None: when evaluated), and when the run ends or is stopped.

    `filename`: `.npz` is appended when missing; each checkpoint replaces the one before. What another run left there is
    kept beside it as `…_previous.npz`, and so is what another run leaves there meanwhile, which `notice` is told;
    `keeps=False` leaves that to another process. With
    `every_steps`, also after so many updates and their multiples, as far as an epoch ends there; within epochs, `train`
    asks `falls_on` of its own. Raises ValueError when `every` is below 1, OSError for a file that cannot be written.
    """

    needs_weights = False

    def __init__(
        self,
        filename: str | os.PathLike[str],
        every: int | None = None,
        every_steps: int | None = None,
        notice: Callable[[str], object] = warnings.warn,
        keeps: bool = True,
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every is {every}; give the epochs between checkpoints, at least 1")
        self.path = npz_path(filename)
        self.every, self.every_steps, self.notice, self.keeps = every, every_steps, notice, keeps
        self.written: Path | None = None  # of this run
        self._left: Mark | None = None
        self._shared = False  # whether another run was seen to write there

    def on_epoch(self, state: TrainState) -> None:
        """Saves where that is due."""
        due = state.evaluated if self.every is None else (state.epoch + 1) % self.every == 0
        if due or state.last or state.stop or self.falls_on(state.steps):
            self.write(state)

    def falls_on(self, steps: int) -> bool:
        """Whether `every_steps` asks for a checkpoint after so many updates."""
        return self.every_steps is not None and steps % self.every_steps == 0

    def write(self, state: TrainState) -> None:
        """Saves now."""
        found, own = mark(self.path), self.written
        ours = found is not None and own is not None and own.exists() and own.samefile(self.path)
        changed = ours and self._left not in (None, found)
        if self.keeps and found is not None and (changed or not ours):
            previous = self.path.with_name(f"{self.path.stem.removesuffix('_latest')}_previous.npz")
            keep_copy(self.path, previous)
            if not changed:
                self.notice(f"{self.path} was of another run, which is kept as {previous}")
            elif not self._shared:
                told = f"{self.path} is written by something else too, whose last one is kept as {previous}"
                self.notice(f"{told}: give each run a save_dir or model_name of its own")
            self._shared = changed
        self.written = state.save(self.path)
        self._left = mark(self.path)


def _buffers(like: Mapping[str, Array]) -> Mapping[str, Array]:
    """Zeros of the same names, shapes, dtypes and device."""
    if isinstance(like, Parameters):
        return like.zeros_like()
    return {name: backend_of(x).xp.zeros_like(x) for name, x in like.items()}
