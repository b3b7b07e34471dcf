"""Whole runs of `train` on a device that is not the CPU: the stand-in of the array API standard, or a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marks import some

from catopt_xp.backend.xp import Backend
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.training.callbacks import TrainState
from catopt_xp.training.train import TrainResult, train

OPTIMIZERS = ("gd", "momentum", "rmsprop", "adam")
OPTIONS = {"clip_norm": 1.0, "l2": 1e-3, "weight_decay": 1e-2}
RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (100, 30), dtype=np.uint8).T
Y = (X[:20].mean(axis=0, keepdims=True) > 128).astype(np.int64)


def run(device: Backend | str, optimizer: str = "adam", dtype: str = "float64", **more: Any) -> TrainResult:
    model = DeepNetwork([30, 8, 5, 1], ["relu", "tanh", "sigmoid"], dtype=dtype, dropout=0.2)
    settings = {"save_dir": None, "verbose": False, "learning_rate": 1e-2, "optimizer_options": OPTIONS} | more
    return train(model, optimizer, X, Y, 5, 16, dev_X=X[:, :20], dev_Y=Y[:, :20], device=device, **settings)


EACH = [(optimizer, dtype) for optimizer in OPTIMIZERS for dtype in ("float32", "float64")]
ALWAYS = [("momentum", "float32"), ("adam", "float32"), ("gd", "float64"), ("rmsprop", "float64")]


@pytest.mark.parametrize(("optimizer", "dtype"), some(EACH, ALWAYS, pytest.mark.hardening))
def test_a_run_on_any_device_gives_the_numbers_of_the_cpu(backend: Backend, optimizer: str, dtype: str) -> None:
    there, here = run(backend, optimizer, dtype), run("cpu", optimizer, dtype)
    bound = 1e-11 if dtype == "float64" else 2e-3  # 35 steps; RMSProp and Adam divide by small roots
    assert np.abs(there.model.save()["W0"] - here.model.save()["W0"]).max() <= bound
    assert np.allclose(there.history.full_train_loss, here.history.full_train_loss, rtol=bound, atol=bound)
    assert there.device == backend.device


def test_the_caller_s_arrays_are_the_ones_that_carry_the_trained_values(backend: Backend) -> None:
    model = DeepNetwork([30, 8, 1], ["relu", "sigmoid"])
    parameters, weights = model.save(), model.save()["W0"]
    before = weights.copy()
    result = train(model, "adam", X, Y, 2, 16, device=backend, learning_rate=1e-2, save_dir=None, verbose=False)
    assert model.save() is parameters
    assert parameters["W0"] is weights
    assert not np.array_equal(weights, before)
    assert isinstance(result.model.forward(X), np.ndarray)
    assert result.optimizer.param_dict is parameters
    assert result.optimizer.steps == 14
    assert np.any(result.optimizer.save()["m/W0"])


def test_they_carry_them_after_an_exception_too(backend: Backend) -> None:
    class Fails:
        def on_epoch(self, state: TrainState) -> None:
            if state.epoch == 1:
                raise RuntimeError("as asked")

    model = DeepNetwork([30, 8, 1], ["relu", "sigmoid"])
    before = model.save().flat.copy()
    with pytest.raises(RuntimeError, match="as asked"):
        train(model, "gd", X, Y, 5, 16, device=backend, save_dir=None, verbose=False, callbacks=[Fails()])
    assert not np.array_equal(model.save().flat, before)


def test_a_run_goes_on_from_a_checkpoint_of_another_device(backend: Backend, tmp_path: Path) -> None:
    folder = {"save_dir": tmp_path, "checkpoint_every_steps": 3}
    straight = run("cpu")
    first = train(
        DeepNetwork([30, 8, 5, 1], ["relu", "tanh", "sigmoid"], dtype="float64", dropout=0.2),
        "adam", X, Y, 2, 16, device=backend, verbose=False, learning_rate=1e-2, optimizer_options=OPTIONS, **folder,
    )  # fmt: skip
    second = run("cpu", recover_from=first.checkpoint)
    assert second.history.epoch == [0, 1, 2, 3, 4]
    assert np.abs(second.model.save()["W0"] - straight.model.save()["W0"]).max() <= 1e-11
    said = any("the bits that follow will differ" in notice for notice in second.notices)
    assert said == (backend.device != "cpu")


def test_the_host_waits_for_the_device_once_an_epoch(strict_backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[tuple[int, ...]] = []
    to_host = type(strict_backend).to_host

    def counted(self: Backend, x: Any) -> Any:
        fetched.append(tuple(x.shape))
        return to_host(self, x)

    monkeypatch.setattr(type(strict_backend), "to_host", counted)
    run(strict_backend, print_interval=1000)
    # The labels once, before training: are they all alike? Seven batches' losses in each of five epochs; right and loss
    # of each evaluated chunk after the first and last one.
    assert fetched == [(1, 100), (7,), (1, 2), (1, 2), (7,), (7,), (7,), (7,), (1, 2), (1, 2)]
