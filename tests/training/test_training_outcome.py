"""How training ends, and what it leaves: weights, checkpoints, pictures and words."""

from __future__ import annotations

import inspect
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from short_runs import N_X, RATES, Array, fit, flat, make_run, small_network, small_set

from catopt_xp.backend.xp import Backend, asnumpy
from catopt_xp.nn.network import BaseRegressionModel
from catopt_xp.optim.rules import Adam
from catopt_xp.training.callbacks import TrainState
from catopt_xp.training.checkpoint import load_model, read_checkpoint
from catopt_xp.training.loop import Interrupted, Loop
from catopt_xp.training.train import TrainResult


class Recorder:
    """A callback that keeps what it was shown, and the weights at that time."""

    def __init__(self, stop_after: int | None = None, fail_after: int | None = None) -> None:
        self.states: list[TrainState] = []
        self.weights: list[Array] = []
        self.stop_after, self.fail_after = stop_after, fail_after

    def on_epoch(self, state: TrainState) -> None:
        self.states.append(state)
        self.weights.append(flat(state.model))
        state.stop = state.epoch == self.stop_after
        if state.epoch == self.fail_after:
            raise RuntimeError("a callback failed")


# --- stopping, callbacks, live views ------------------------------------------------------------------------


def test_early_stopping_ends_and_restores_the_best_weights(tmp_path: Path) -> None:
    X, Y = small_set()
    common: dict[str, Any] = {
        "dev_X": X,
        "dev_Y": 1 - Y,
        "learning_rate": 0.02,
    }  # its cost rises as training goes on
    result = fit(total_epoch=20, early_stopping=2, save_dir=tmp_path, **common)
    best = int(np.argmin(result.history.dev_loss))
    assert len(result.history.epoch) == best + 3 < 20
    assert np.array_equal(flat(result.model), flat(fit(total_epoch=best + 1, **common).model))
    assert result.checkpoint is not None
    assert np.array_equal(flat(load_model(result.checkpoint)), flat(result.model))
    again = fit(total_epoch=20, early_stopping=2, recover_from=result.checkpoint, save_dir=tmp_path, **common)
    assert again.history.epoch == result.history.epoch
    assert "early stopping ended this run" in " ".join(again.notices)
    assert np.array_equal(flat(again.model), flat(result.model))


def test_without_a_dev_set_early_stopping_looks_at_the_training_cost() -> None:
    result = fit(total_epoch=20, early_stopping=1, optimizer="gd", learning_rate=1e-30)  # no step moves a weight
    assert result.history.epoch == [0, 1]


def test_callbacks_see_every_epoch_and_can_end_the_run(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder(stop_after=3)
    result = fit(total_epoch=9, print_interval=2, callbacks=[first, second], save_dir=tmp_path, learning_rate=0.01)
    assert [state.epoch for state in first.states] == [state.epoch for state in second.states] == [0, 1, 2, 3]
    assert [state.evaluated for state in first.states] == [True, False, True, False]
    assert all(state.history is result.history and state.optimizer is result.optimizer for state in first.states)
    assert np.array_equal(first.weights[-1], flat(result.model))
    assert np.array_equal(flat(load_model(tmp_path / "model_latest.npz")), flat(result.model))


def test_parameters_taken_before_training_stay_live() -> None:
    model = small_network()
    parameters, before, seen = model.save(), flat(model), Recorder(fail_after=1)
    optimizer = Adam(parameters, 0.01)
    with pytest.raises(RuntimeError, match="a callback failed"):
        fit(model=model, optimizer=optimizer, callbacks=[seen])
    assert model.save() is parameters
    assert np.array_equal(parameters.flat, seen.weights[-1])
    assert not np.array_equal(before, parameters.flat)
    result = fit(model=model, optimizer=optimizer)
    assert (result.model, result.optimizer) == (model, optimizer)
    assert not np.array_equal(parameters.flat, seen.weights[-1])


def test_training_works_outside_the_main_thread() -> None:
    results: list[TrainResult] = []
    thread = threading.Thread(target=lambda: results.append(fit()))
    thread.start()
    thread.join()
    assert np.array_equal(flat(results[0].model), flat(fit().model))


# --- what is said and kept ----------------------------------------------------------------------------------


def test_the_first_line_names_device_and_engine_and_quiet_is_quiet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit(batch_size=99)
    assert capsys.readouterr() == ("", "")
    fit(batch_size=99, verbose=True)
    out, err = capsys.readouterr()
    assert " on cpu " in out.splitlines()[0]
    assert "engine panels" in out.splitlines()[0]
    assert out.splitlines()[1] == "data: arrays, 60 samples of 12 features"
    assert out.splitlines()[2] == "note: batch size 99 is more than the 60 samples there are: 60 is used"
    assert [line.split(":")[0] for line in out.splitlines()[3:6]] == [
        "epoch    0",
        "epoch    1",
        "epoch    2",
    ]
    assert "time by stage:" in out
    assert err == ""
    fit(progress=True)
    assert "epoch" in capsys.readouterr().err


def test_the_mini_batch_cost_is_drawn_beside_the_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    fit(save_dir=tmp_path / "new" / "folder", model_name="cats", plot_mini_batch=True)
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == ["cats_latest.npz", "cats_mini_batch.png"]


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ({}, [1, 3, 5, 7]),
        ({"print_interval": 3}, [1, 4, 7]),
        ({"checkpoint_every": 3}, [3, 6, 7]),
        ({"checkpoint_every_steps": 6, "print_interval": 50}, [1, (1, 2), 3, (4, 2), 6, 7]),
    ],
    ids=str,
)
def test_checkpoints_are_written_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], saved: list[Any]
) -> None:
    places: list[Any] = []
    save = Loop._save

    def watched(loop: Loop, filename: Path) -> Path:
        epoch, done = loop.position.epoch, loop.position.batches
        places.append((epoch, done) if done else epoch)
        return save(loop, filename)

    monkeypatch.setattr(Loop, "_save", watched)
    fit(save_dir=tmp_path, total_epoch=7, **({"print_interval": 2} | options))
    assert places == saved


def arrays_in(value: Any, seen: set[int]) -> Iterator[Array]:
    """Every array within an object, however deep."""
    if id(value) in seen or isinstance(value, type | str | SimpleNamespace) or inspect.ismodule(value):
        return
    seen.add(id(value))
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, Mapping) and not hasattr(value, "__dict__"):
        for item in value.values():
            yield from arrays_in(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from arrays_in(item, seen)
    elif hasattr(value, "__dict__"):
        yield from arrays_in(vars(value), seen)  # no copy: its id might be that of one seen before


@pytest.mark.parametrize("name", RATES)
def test_no_array_of_a_float32_run_is_float64(name: str, tmp_path: Path) -> None:
    X, Y = small_set()
    settings: dict[str, Any] = {"optimizer": name, "dropout": 0.2, "early_stopping": 9, "accumulate": 2}
    options = {"l2": 1e-3, "weight_decay": 1e-3, "clip_norm": 1.0}
    given = {"save_dir": tmp_path, "optimizer_options": options} | settings
    loop = make_run(X=X / 255.0, dev_X=X, dev_Y=Y, **given).run()
    found = list(arrays_in([loop.engine, loop.watchers.early_stopping, loop.sets.train, loop.sets.dev], set()))
    assert len(found) > 20
    assert {x.dtype.name for x in found} <= {"float32", "uint8", "int64", "bool"}
    assert loop.checkpoint is not None
    saved, _ = read_checkpoint(loop.checkpoint)
    assert {x.dtype.name for x in saved.values()} == {"float32"}


# --- models and optimizers of the user's own ----------------------------------------------------------------


class Logistic(BaseRegressionModel):
    """Logistic regression, written against the base class alone."""

    def __init__(self, n_x: int) -> None:
        self.own = {"W0": np.zeros((1, n_x), dtype=np.float32), "b0": np.zeros((1, 1), dtype=np.float32)}

    def forward(self, X: Any, train_mode: bool = True) -> Any:
        A = 1 / (1 + np.exp(-(self.own["W0"] @ X + self.own["b0"])))
        if train_mode:
            self.X, self.A = X, A
        return A

    def backward(self, Y: Any) -> None:
        dZ = (self.A - Y) / Y.shape[1]
        self.gradients = {"W0": dZ @ self.X.T, "b0": dZ.sum(axis=1, keepdims=True)}

    def get_grad_dict(self) -> dict[str, Any]:
        return self.gradients

    def save(self) -> dict[str, Any]:
        return self.own

    def load(self, state_dict: Mapping[str, Any]) -> None:
        for name, x in self.own.items():
            x[...] = state_dict[name]


@pytest.mark.parametrize("early_stopping", [None, 3])
def test_a_model_of_one_s_own_trains_saves_and_resumes(tmp_path: Path, early_stopping: int | None) -> None:
    common: dict[str, Any] = {"save_dir": tmp_path, "learning_rate": 0.05, "early_stopping": early_stopping}
    straight = fit(model=Logistic(N_X), total_epoch=10, **common)
    assert straight.history.train_accuracy[-1] > 0.7
    short = fit(model=Logistic(N_X), total_epoch=10, callbacks=[Recorder(stop_after=4)], **common)
    resumed = fit(model=Logistic(N_X), total_epoch=10, recover_from=short.checkpoint, **common)
    assert np.array_equal(flat(resumed.model), flat(straight.model))
    assert resumed.history.mini_batch_loss == straight.history.mini_batch_loss


# --- another device -----------------------------------------------------------------------------------------


def test_the_caller_s_objects_carry_the_values_of_a_run_on_any_device(backend: Backend, tmp_path: Path) -> None:
    X, Y = small_set()
    common: dict[str, Any] = {"dev_X": X, "dev_Y": Y, "early_stopping": 3, "dropout": 0.2, "accumulate": 2}
    expected = fit(learning_rate=0.01, **common)
    common.pop("dropout")
    model = small_network(dropout=0.2)
    parameters, optimizer = model.save(), Adam(model.save(), 0.01)
    result = fit(model=model, optimizer=optimizer, device=backend, save_dir=tmp_path, **common)
    assert result.device == backend.device
    assert (result.model, result.optimizer) == (model, optimizer)
    assert isinstance(parameters["W0"], np.ndarray)
    assert np.allclose(parameters.flat, flat(expected.model), atol=1e-4)
    assert (optimizer.steps, optimizer.epoch) == (6, 3)
    assert np.allclose(optimizer.save()["m/W0"], expected.optimizer.save()["m/W0"], atol=1e-4)
    assert type(result.history.train_loss[0]) is type(result.history.dev_accuracy[0]) is float
    on_cpu = fit(recover_from=result.checkpoint, total_epoch=5)
    assert len(on_cpu.history.epoch) == 5
    told = f"the checkpoint was written with device {backend.device}"
    assert any(told in notice for notice in on_cpu.notices) == (backend.name != "numpy")


@pytest.mark.parametrize("ending", ["exception", "interrupt"])
def test_they_carry_them_after_an_exception_too(backend: Backend, ending: str) -> None:
    class End:
        def on_epoch(self, state: TrainState) -> None:
            self.weights = asnumpy(state.model.save()["W0"]).copy()
            if state.epoch == 1:
                if ending == "exception":
                    raise RuntimeError("a callback failed")
                os.kill(os.getpid(), signal.SIGINT)

    model, end = small_network(), End()
    parameters, before = model.save(), model.save()["W0"].copy()
    kind = RuntimeError if ending == "exception" else Interrupted
    with pytest.raises(kind, match=r"a callback failed|interrupted at epoch 2, batch 0; nothing was saved"):
        fit(model=model, optimizer=Adam(parameters, 0.01), device=backend, callbacks=[end])
    assert np.array_equal(parameters["W0"], end.weights)
    assert not np.array_equal(parameters["W0"], before)


def test_a_second_ctrl_c_stops_at_once() -> None:
    class Insist:
        def on_epoch(self, state: TrainState) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        fit(callbacks=[Insist()])
    assert not isinstance(caught.value, Interrupted)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_new_run_keeps_the_checkpoint_of_the_one_before(tmp_path: Path) -> None:
    first = fit(save_dir=tmp_path, total_epoch=2)
    assert first.checkpoint is not None
    old = first.checkpoint.read_bytes()
    second = fit(save_dir=tmp_path, total_epoch=1)
    previous = tmp_path / "model_previous.npz"
    assert previous.read_bytes() == old
    assert f"{first.checkpoint} was of another run, which is kept as {previous}" in second.notices
    third = fit(save_dir=tmp_path, total_epoch=3, recover_from=second.checkpoint)
    assert previous.read_bytes() == old
    assert not any("another run" in notice for notice in third.notices)


@pytest.mark.parametrize("dtype", ["int64", "float32", "uint16"])
def test_pixels_that_are_not_stored_as_such_are_said(dtype: str) -> None:
    X, Y = np.arange(12, dtype=dtype).reshape(3, 4) * 20, np.array([[0, 1, 0, 1]])
    told = "X runs from 0 to 220 and is taken as it is; pixels stored as uint8 are seen as X/255"
    assert told in fit(X=X, Y=Y, dev_X=None, dev_Y=None).notices
    shares = (X / 255).astype(np.float32)
    assert not any("taken as it is" in notice for notice in fit(X=shares, Y=Y, dev_X=None, dev_Y=None).notices)


def test_lists_and_arrays_of_another_library_are_taken() -> None:
    class Other:
        """Host data that shows itself by DLPack alone."""

        def __init__(self, x: Any) -> None:
            self.x, self.dtype = x, x.dtype

        def __dlpack__(self, **options: Any) -> Any:
            return self.x.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return self.x.__dlpack_device__()

    X, Y = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4), np.array([[0, 1, 0, 1]])
    runs = [fit(X=given, Y=Y, dev_X=None, dev_Y=None) for given in (X, X.tolist(), Other(X))]
    assert len({tuple(run.history.train_loss) for run in runs}) == 1
