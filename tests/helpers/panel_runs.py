"""Runs with the panel engine and with the plain one, and comparisons of their numbers, for the tests of engines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import catopt_xp
from catopt_xp.backend.xp import Backend, NumpyBackend, asnumpy
from catopt_xp.data.order import epoch_order
from catopt_xp.engines import panels
from catopt_xp.engines.plain import PlainEngine, Settings
from catopt_xp.nn.labels import check_labels
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim import schedules
from catopt_xp.optim.rules import OPTIMIZERS
from catopt_xp.training.train import TrainResult

Array = np.ndarray[Any, Any]
N_X = 2 * panels.PANEL + panels.STRIP + 5  # panels, strips and a strip that is not full

# --- both engines by hand -----------------------------------------------------------------------------------

# Each rule in each of its forms: the optimizer's name and options.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gd": ("gd", {}),
    "momentum": ("momentum", {}),
    "momentum, beta 0": ("momentum", {"beta": 0.0}),
    "nesterov": ("momentum", {"nesterov": True}),
    "velocity": ("momentum", {"rate_inside": True}),
    "velocity, nesterov": ("momentum", {"rate_inside": True, "nesterov": True}),
    "corrected momentum": ("momentum", {"correct_param": True}),
    **{f"rmsprop {mode}": ("rmsprop", {"eps_mode": mode}) for mode in ("inside", "outside", "hat")},
    "uncorrected rmsprop": ("rmsprop", {"correct_param": False, "eps_mode": "outside"}),
    **{f"adam {mode}": ("adam", {"eps_mode": mode}) for mode in ("inside", "outside", "hat")},
    "uncorrected adam": ("adam", {"correct_param": False}),
    "adam, other betas": ("adam", {"beta1": 0.0, "beta2": 0.9}),
}


@dataclass
class Case:
    """A run to make with both engines."""

    n_x: int = N_X
    units: tuple[int, ...] = (7, 4)
    activation: str = "tanh"
    output: str = "sigmoid"
    outputs: int = 1
    dropout: float = 0.0
    m: int = 13
    batch_size: int = 5
    drop_last: bool = False
    shuffle: str = "epoch"
    samples: str = "uint8"
    dtype: str = "float64"
    optimizer: str = "adam"
    options: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0  # times what suits the rule and the number of features
    scheduler: schedules.Scheduler = schedules.const_lr
    by_step: bool = False
    epochs: int = 3
    settled: bool = False  # whether someone looks at the model after every epoch
    seed: int = 0

    def data(self) -> tuple[Array, Array]:
        """Samples (m, n_x) and targets (·, m), as a run holds them."""
        rng = np.random.default_rng(self.seed)
        X = rng.integers(0, 256, (self.m, self.n_x), dtype=np.uint8)
        softmax = self.output == "softmax"
        Y = rng.integers(0, self.outputs if softmax else 2, (1 if softmax else self.outputs, self.m))
        samples = X if self.samples == "uint8" else (X / 256 - 0.5).astype(self.dtype)
        return samples, check_labels(Y, self.output, self.outputs, self.dtype)

    def set_of_train(self) -> dict[str, Any]:
        """Arguments of `train` for the same set and batches."""
        samples, targets = self.data()
        return {"X": samples.T, "Y": targets, "batch_size": self.batch_size, "seed": self.seed}

    def engine(self, kind: Callable[..., PlainEngine], backend: Backend | None = None) -> PlainEngine:
        """An engine of this kind, about to make the run; on the CPU, unless a backend is given."""
        backend = backend or NumpyBackend()
        layers, names = [self.n_x, *self.units, self.outputs], [*[self.activation] * len(self.units), self.output]
        options = {"seed": self.seed % 2**32, "dtype": self.dtype, "dropout": self.dropout}
        model = DeepNetwork(layers, names, **options, device=backend)
        rate = self.rate * (0.5 if self.optimizer in ("gd", "momentum") else 0.1) / self.n_x
        make = OPTIMIZERS[self.optimizer][0]
        optimizer = make(model.save(), rate, lr_scheduler=self.scheduler, **self.options)
        plan = Settings(self.batch_size, self.drop_last, schedule_by_step=self.by_step)
        return kind(model, optimizer, *(backend.asarray(x) for x in self.data()), backend, plan)


def run(engine: PlainEngine, case: Case) -> dict[str, Array]:
    """Trains as `train` does; weights, moments, counters and losses by name."""
    losses = []
    for epoch in range(case.epochs):
        order, following = (epoch_order(case.m, e, case.seed, case.shuffle) for e in (epoch, epoch + 1))
        engine.optimizer.epoch = epoch
        for _ in engine.steps(epoch, order, 0, following if epoch + 1 < case.epochs else None):
            pass
        engine.optimizer.increase_epoch()
        losses.append(engine.fetch_losses())
        if case.settled:
            engine.settle()
    engine.settle()
    return state(engine) | {"losses": np.concatenate(losses)}


def state(trained: PlainEngine | TrainResult) -> dict[str, Array]:
    """Copies of weights, moments and counters, by name."""
    arrays = {**trained.model.save(), **trained.optimizer.save()}
    return {name: np.array(asnumpy(value)) for name, value in arrays.items() if name != "name"}


# --- training -----------------------------------------------------------------------------------------------

M, BATCHES, EPOCHS = 20, 3, 3
RATES = {"gd": 1e-3, "momentum": 1e-3, "rmsprop": 1e-4, "adam": 1e-4}


def train(folder: Path | None = None, engine: str = "panels", **given: Any) -> TrainResult:
    """A short run on a set of more than one panel, with the engine asked for."""
    rng = np.random.default_rng(0)
    X, Y = rng.integers(0, 256, (M, 1100), dtype=np.uint8).T, rng.integers(0, 2, (1, M))
    common: dict[str, Any] = {"X": X, "Y": Y, "batch_size": 8, "total_epoch": EPOCHS, "optimizer": "adam"}
    common |= {"save_dir": folder, "engine": engine, "device": "cpu", "verbose": False, "print_interval": 1}
    if given.get("early_stopping"):
        common |= {"dev_X": X, "dev_Y": 1 - Y}
    if "recover_from" in given or "model" in given:  # how the network is built is known
        given = {k: v for k, v in given.items() if k not in ("dropout", "dtype")}
    else:
        common["hidden"] = (6, 4)
    common |= given
    common.setdefault("learning_rate", RATES.get(common["optimizer"]))
    result = catopt_xp.train(**common)
    assert engine in (result.engine, "auto"), result.engine_reason
    return result


def numbers_of(result: TrainResult) -> dict[str, Array]:
    """As `run` gives them."""
    return state(result) | {"losses": np.array(result.history.mini_batch_loss)}


def is_alive(engine: PlainEngine) -> bool:
    """Whether every layer says something of some sample, as the weights are.

    Where none does, the gradient of the last bias is a sum that may cancel, and Adam makes a step of what rounding
    leaves of it: then numbers need not be equal.
    """
    X = engine.samples.T
    model = engine.model
    assert isinstance(model, DeepNetwork)
    model.forward(X)
    trace = model._trace
    assert trace is not None
    return all(A.any() for A in trace.outputs)


# --- comparisons --------------------------------------------------------------------------------------------


def differences(here: Mapping[str, Array], there: Mapping[str, Array]) -> dict[str, float]:
    """The largest difference within each array, over the largest magnitude there.

    Of the biases over the largest of any layer: they are sums of a few steps from 0, which may cancel, and that of one
    output is a single number.
    """
    assert set(here) == set(there), set(here) ^ set(there)
    sizes: dict[str, float] = {}
    for name, expected in there.items():
        kind = _kind(name)
        sizes[kind] = max(sizes.get(kind, 0.0), float(np.abs(expected).max()))
    return {
        name: float(np.abs(here[name] - expected).max()) / (sizes[_kind(name)] or 1.0)
        for name, expected in there.items()
    }


def _kind(name: str) -> str:
    """The array's name, without the layer's number where it is one of biases."""
    return re.sub(r"\bb\d+$", "b", name)


def assert_same_numbers(here: Mapping[str, Array], there: Mapping[str, Array]) -> None:
    """Equal but for the order of sums, in float64."""
    for name, off in differences(here, there).items():
        assert off < 1e-12, f"{name} differs by {off:.1e} of its size"


def assert_same_bits(here: Mapping[str, Array], there: Mapping[str, Array]) -> None:
    assert set(here) == set(there), set(here) ^ set(there)
    for name, array in here.items():
        assert np.array_equal(array, there[name]), f"{name} has other bits"


# --- other processes ----------------------------------------------------------------------------------------


def python(program: str, **environment: str) -> str:
    """What a Python program prints in a process of its own; of numba's settings it has those given alone."""
    here = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, env=here | environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout
