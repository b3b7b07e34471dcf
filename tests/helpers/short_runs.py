"""Short, quiet runs of `train` on a small set, for the tests of training."""

from __future__ import annotations

import os
import signal
from typing import Any, NoReturn

import numpy as np
import pytest

from catopt_xp.nn.network import BaseRegressionModel, DeepNetwork
from catopt_xp.training.loop import Loop
from catopt_xp.training.train import TrainResult, train

M, N_X = 60, 12
RATES = {"gd": 0.05, "momentum": 0.05, "rmsprop": 0.01, "adam": 0.01}
Array = np.ndarray[Any, Any]


def small_set(m: int = M, seed: int = 0) -> tuple[Array, Array]:
    """Pixels (n_x, m), sample-major, and labels: whether the first half of the features is brighter."""
    X = np.random.default_rng(seed).integers(0, 256, (m, N_X), dtype=np.uint8).T
    return X, (X[:6].mean(axis=0, keepdims=True) > X[6:].mean(axis=0, keepdims=True)).astype(np.int64)


def arguments(**given: Any) -> dict[str, Any]:
    """Those of a short, quiet run on the CPU; `given` override them."""
    X, Y = small_set()
    quiet: dict[str, Any] = {
        "X": X,
        "Y": Y,
        "total_epoch": 3,
        "batch_size": 16,
        "save_dir": None,
        "device": "cpu",
    }
    quiet |= {"verbose": False, "print_interval": 1}
    if given.get("model") is None:
        quiet["hidden"] = (6, 5)
    return quiet | given


def fit(**given: Any) -> TrainResult:
    return train(**arguments(**given))


class Caught(Exception):
    """The loop of a run before its first step, to look inside."""

    def __init__(self, loop: Loop, asked: tuple[Any, ...]) -> None:
        super().__init__("caught")
        self.loop, self.asked = loop, asked

    def run(self) -> Loop:
        """Trains, as `train` would have done."""
        self.loop.run(*self.asked)
        return self.loop


def make_run(**given: Any) -> Caught:
    """The run that `train` would start."""

    def catch(loop: Loop, *asked: Any) -> NoReturn:
        raise Caught(loop, asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "run", catch)
        with pytest.raises(Caught) as caught:
            train(**arguments(**given))
    return caught.value


def small_network(**options: Any) -> DeepNetwork:
    return DeepNetwork([N_X, 6, 5, 1], ["relu", "relu", "sigmoid"], **options)


def flat(model: BaseRegressionModel) -> Array:
    return np.concatenate([x.ravel() for x in model.save().values()])


class Crash(Exception):
    """Stands for whatever ends a process between two steps."""


def crash() -> None:
    raise Crash


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
