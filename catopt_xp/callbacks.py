"""What is called after every epoch, and early stopping written that way. Floor F3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from catopt_xp.backend import Array, backend_of
from catopt_xp.history import History
from catopt_xp.network import BaseRegressionModel
from catopt_xp.optim import BaseOptimizer
from catopt_xp.parameters import Parameters, check_matches


@dataclass
class TrainState:
    """What a callback sees. `model` and `optimizer` are those that train, on their device; set `stop` to end it all."""

    epoch: int
    model: BaseRegressionModel
    optimizer: BaseOptimizer
    history: History
    evaluated: bool
    stop: bool = False


class Callback(Protocol):
    """Anything with `on_epoch(state)`, called after each epoch (and its evaluation, where there is one)."""

    def on_epoch(self, state: TrainState) -> None:
        """Look at the run, log it, or set `state.stop`."""


class EarlyStopping:
    """Stops when the cost has not fallen for `patience` evaluations, and keeps the weights of the best one.

    The cost is `dev_loss`, or `full_train_loss` without a dev set. Raises ValueError when `patience` is below 1.
    """

    def __init__(self, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"early_stopping is {patience}; give the evaluations to wait, at least 1")
        self.patience = patience
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


def _buffers(like: Mapping[str, Array]) -> Mapping[str, Array]:
    """Zeros of the same names, shapes, dtypes and device."""
    if isinstance(like, Parameters):
        return like.zeros_like()
    return {name: backend_of(x).xp.zeros_like(x) for name, x in like.items()}
