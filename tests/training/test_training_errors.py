"""Training that cannot start, cannot go on, or cannot save: one clear line, and nothing lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catopt_xp.backend import xp as backend_module
from catopt_xp.backend.devices import DeviceError, DeviceFallbackWarning, ProbeResult
from catopt_xp.data.dataset import DataArgumentError, DataSet
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.rules import Adam, GradientDescent
from catopt_xp.training.checkpoint import load_model
from catopt_xp.training.loop import TrainingDiverged
from catopt_xp.training.train import TrainResult, train

N_X = 12
Array = np.ndarray[Any, Any]


def small_set(m: int = 40) -> tuple[Array, Array]:
    X = np.random.default_rng(0).integers(0, 256, (m, N_X), dtype=np.uint8).T
    return X, (X[:6].mean(axis=0, keepdims=True) > 128).astype(np.int64)


def fit(**given: Any) -> TrainResult:
    X, Y = small_set()
    quiet: dict[str, Any] = {
        "X": X,
        "Y": Y,
        "total_epoch": 3,
        "batch_size": 16,
        "save_dir": None,
        "device": "cpu",
    }
    return train(**(quiet | {"verbose": False, "print_interval": 1} | given))


def network() -> DeepNetwork:
    return DeepNetwork([N_X, 4, 1], ["relu", "sigmoid"])


# --- arguments ----------------------------------------------------------------------------------------------

X, Y = small_set()
NAN = np.where(np.arange(N_X * 40).reshape(N_X, 40) == 81, np.nan, 1.0)
BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"total_epoch": -1}, ValueError, "total_epoch is -1; give a whole number of at least 0"),
    ({"total_epoch": 10.0}, ValueError, "total_epoch is 10.0"),
    ({"total_epoch": True}, ValueError, "total_epoch is True"),
    ({"batch_size": 0}, ValueError, 'batch_size is 0; give a whole number of at least 1 or "auto"'),
    ({"batch_size": "big"}, ValueError, "batch_size is 'big'"),
    ({"print_interval": 0}, ValueError, "print_interval is 0"),
    ({"accumulate": 0}, ValueError, "accumulate is 0"),
    ({"seed": -1}, ValueError, "seed is -1"),
    ({"checkpoint_every": 0}, ValueError, "checkpoint_every is 0"),
    ({"checkpoint_every_steps": 1.5}, ValueError, "checkpoint_every_steps is 1.5"),
    ({"early_stopping": 0}, ValueError, "early_stopping is 0"),
    ({"shuffle": "sometimes"}, ValueError, "unknown shuffle 'sometimes'; choose epoch, once, none"),
    ({"shuffle": True}, ValueError, "unknown shuffle True; choose epoch, once, none"),
    ({"schedule_by": "batch"}, ValueError, "unknown schedule_by 'batch'; choose epoch, step"),
    ({"engine": "warp"}, ValueError, "unknown engine 'warp'; choose"),
    ({"device": "gpu"}, ValueError, "device='gpu' is not known"),
    ({"model_name": "a/b"}, ValueError, "model_name is 'a/b'; give a plain file name"),
    ({"model_name": ""}, ValueError, "model_name is ''"),
    ({"model_name": 3}, ValueError, "model_name is 3"),
    ({"data": (X, Y)}, ValueError, "X and data are both given"),
    ({"X": None}, ValueError, "Y or dev_X is given without X"),
    ({"Y": None}, ValueError, "X is given without Y"),
    ({"dev_X": X}, ValueError, "dev_X is given without dev_Y"),
    ({"dev_Y": Y}, ValueError, "dev_Y is given without dev_X"),
    ({"train_size": 5}, DataArgumentError, "train_size, dev_size: apply to pictures only"),
    ({"img_shape": (2, 3)}, DataArgumentError, "img_shape: 2x3 RGB pictures have 18 values"),
    (
        {"data": DataSet(X, Y), "X": None, "Y": None, "dev_size": 1},
        DataArgumentError,
        "train_size, dev_size: apply to pictures only",
    ),
    ({"X": X.T}, ValueError, "X has 12 samples and Y has 40; samples go in columns: pass X.T"),
    ({"X": X[:, :0], "Y": Y[:, :0]}, ValueError, "there is nothing to train on"),
    ({"X": NAN}, ValueError, "X is not finite at feature 2, sample 1"),
    ({"X": X.astype(object)}, TypeError, "X holds object"),
    ({"X": X[0]}, ValueError, "X has shape (40,); give (n_x, m)"),
    ({"Y": Y * 255}, ValueError, "Y has the label 255"),
    ({"Y": Y.astype(str)}, TypeError, "Y holds <U21; labels are numbers"),
    ({"Y": Y + 0.5}, ValueError, "Y has the label"),
    ({"dev_X": X[:5], "dev_Y": Y}, ValueError, "dev_X has 5 features, the network takes 12"),
    ({"dev_X": X, "dev_Y": Y + 1}, ValueError, "dev_Y has the label 2"),
    ({"model": DeepNetwork([5, 1], ["sigmoid"])}, ValueError, "X has 12 features, the network takes 5"),
    ({"model": "resnet"}, TypeError, "model is a str; give a BaseRegressionModel"),
    ({"model": network(), "hidden": (9,)}, ValueError, "hidden goes with the network that train builds"),
    ({"model": network(), "dropout": 0.5}, ValueError, "dropout goes with the network that train builds"),
    ({"model": network(), "dtype": "float64"}, ValueError, "dtype goes with the network that train builds"),
    ({"hidden": (0,)}, ValueError, "hidden is 0; give a whole number of at least 1"),
    ({"activation": "gelu"}, ValueError, "unknown activation 'gelu'; choose"),
    ({"dropout": 1.0}, ValueError, "dropout is 1.0"),
    ({"dtype": "float16"}, ValueError, "dtype is float16; choose float32 or float64"),
    ({"optimizer": "lion"}, ValueError, "unknown optimizer 'lion'; choose gd, momentum, rmsprop, adam"),
    ({"optimizer": 1e-3}, TypeError, "optimizer is a float; give its name"),
    ({"optimizer": Adam}, TypeError, "optimizer is a class; give its name"),
    ({"learning_rate": 0}, ValueError, "learning_rate is 0; it must be positive"),
    ({"learning_rate": float("nan")}, ValueError, "learning_rate is nan"),
    ({"optimizer_options": {"momentum": 1}}, ValueError, "no option 'momentum'"),
    ({"optimizer_options": {"beta1": 1.0}}, ValueError, "beta1 is 1.0"),
    ({"lr_scheduler": 0.2}, TypeError, "lr_scheduler is 0.2; give a function"),
    (
        {"callbacks": [print]},
        TypeError,
        "callbacks holds <built-in function print>; each must have a method on_epoch",
    ),
]


@pytest.mark.parametrize(("given", "kind", "told"), BAD_ARGUMENTS, ids=[text[:40] for *_, text in BAD_ARGUMENTS])
def test_a_bad_argument_is_named_in_one_line(given: dict[str, Any], kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=re.escape(told)) as caught:
        fit(**given)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", [{"learning_rate": 0.1}, {"lr_scheduler": max}, {"optimizer_options": {"l2": 1}}])
def test_what_an_optimizer_already_has_is_not_taken_again(setting: dict[str, Any]) -> None:
    model = network()
    with pytest.raises(ValueError, match=f"{next(iter(setting))} goes with an optimizer's name"):
        fit(model=model, optimizer=GradientDescent(model.save(), 0.1), **setting)


def test_an_optimizer_must_hold_the_model_s_arrays() -> None:
    model, copied = network(), {name: x.copy() for name, x in network().save().items()}
    for other in (network().save(), copied, {"W0": model.save()["W0"]}):
        with pytest.raises(ValueError, match=r"updates other arrays than the model's; make it with model.save\(\)"):
            fit(model=model, optimizer=Adam(other, 0.1))
    views = dict(model.save())
    before = model.parameters.flat.copy()
    fit(model=model, optimizer=Adam(views, 0.1))
    assert not np.array_equal(model.parameters.flat, before)


# --- devices ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CATOPT_XP_DEVICE", "CATOPT_XP_STRICT_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    failure = ProbeResult(False, "there is no NVIDIA driver", "install its driver")
    monkeypatch.setattr(backend_module, "probe_gpu", lambda load, index=0: failure)


def test_cuda_without_a_gpu_warns_and_trains_on_the_cpu(no_gpu: None) -> None:
    with pytest.warns(DeviceFallbackWarning, match=r"there is no NVIDIA driver.*install its driver") as caught:
        result = fit(device="cuda")
    assert caught[0].filename == __file__
    assert result.device == "cpu"
    assert result.history.run["device"] == "cpu"
    assert len(result.history.train_loss) == 3


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_strict_device_is_an_error(no_gpu: None, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "environment":
        monkeypatch.setenv("CATOPT_XP_STRICT_DEVICE", "1")
    with pytest.raises(DeviceError, match="there is no NVIDIA driver"):
        fit(device="cuda", strict_device=True if how == "argument" else None)


# --- numbers that are not finite ----------------------------------------------------------------------------


class Spoil:
    """A callback that makes a weight infinite once an epoch has ended and been evaluated."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch(self, state: Any) -> None:
        if state.epoch == self.epoch:
            state.model.save()["b1"][...] = np.inf


@pytest.mark.parametrize("saved", [True, False])
def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path: Path, saved: bool) -> None:
    common: dict[str, Any] = {"save_dir": tmp_path if saved else None, "total_epoch": 5, "optimizer": "gd"}
    huge = {"lr_scheduler": lambda rate, epoch: rate if epoch < 2 else 1e36, "learning_rate": 0.01}
    with np.errstate(all="ignore"), pytest.raises(TrainingDiverged) as caught:
        fit(**common, **huge)
    told = str(caught.value)
    assert re.match(
        r"the loss is (nan|inf) at epoch 2, step [12] \(learning rate 1e\+36\): lower it, set clip_norm, or scale X; ",
        told,
    )
    assert "\n" not in told
    if not saved:
        assert told.endswith("this run has saved none yet")
        return
    good = tmp_path / "model_latest.npz"
    assert told.endswith(f"the last good checkpoint is {good}")
    assert np.isfinite(load_model(good).parameters.flat).all()
    assert fit(recover_from=good, **common).history.epoch == [0, 1, 2, 3, 4]


def test_weights_that_are_not_finite_are_not_saved_over_good_ones(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"model/b1 has values.*at epoch 2, step 0 \(learning rate 1e-05\)"):
        fit(save_dir=tmp_path, callbacks=[Spoil(1)])
    assert np.isfinite(load_model(tmp_path / "model_latest.npz").parameters.flat).all()


def test_the_last_update_of_a_run_is_looked_at_too() -> None:
    def last_step_alone(rate: float, epoch: float) -> float:
        return 1e38 if epoch > 2.5 else rate

    given: dict[str, Any] = {"optimizer": "gd", "learning_rate": 0.01, "lr_scheduler": last_step_alone}
    with (
        np.errstate(all="ignore"),
        pytest.raises(TrainingDiverged, match=r"the cost is (nan|inf) after epoch 2"),
    ):
        fit(schedule_by="step", **given)


# --- files --------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_epoch(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    epochs: list[int] = []

    class Count:
        def on_epoch(self, state: Any) -> None:
            epochs.append(state.epoch)

    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=re.escape(f"save_dir {folder} cannot be written (")) as caught:
            fit(save_dir=folder, callbacks=[Count()])
        assert str(caught.value).endswith("choose another folder or model_name")
    assert epochs == []


def test_what_a_killed_writer_left_is_cleared_once_it_is_old(tmp_path: Path) -> None:
    names = [
        ".model_latest.npz.a1.tmp",
        ".model_latest.npz.b2.tmp",
        ".other_latest.npz.c3.tmp",
        "model_latest.tmp",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    for name in (names[0], *names[2:]):
        os.utime(tmp_path / name, (0, 0))
    fit(save_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "model_latest.npz"])


FULL_DISK = """
import resource, sys
import numpy as np
from catopt_xp import train

folder = sys.argv[1]
X = np.random.default_rng(0).integers(0, 256, (40, 12), dtype=np.uint8).T
Y = (X[:6].mean(axis=0, keepdims=True) > 128).astype(int)

class Fill:
    def on_epoch(self, state):
        if state.epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

settings = {"total_epoch": 5, "print_interval": 1, "device": "cpu", "verbose": False}
train(X=X, Y=Y, save_dir=folder, callbacks=[Fill()], **settings)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is a POSIX limit")
def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint_whole(tmp_path: Path) -> None:
    repository = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": repository},
    )
    file = tmp_path / "model_latest.npz"
    assert done.returncode == 1
    assert re.match(
        rf"OSError: .*could not write {re.escape(str(file))}: File too large;", done.stderr.splitlines()[-1]
    )
    assert done.stderr.count("Exception ignored") == 0
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert fit(recover_from=file, total_epoch=5, batch_size=64).history.epoch == [0, 1, 2, 3, 4]
    assert load_model(file).neuron_cnt == [12, 30, 20, 20, 1]


@pytest.mark.parametrize("label", [0, 1])
def test_labels_of_one_class_are_warned_of_once(label: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            fit(Y=np.full_like(Y, label), total_epoch=1)
    (warning,) = caught
    assert f"all 40 samples have the label {label}, and" in str(warning.message)
    assert warning.filename == __file__  # where train was called


def test_a_single_sample_has_one_class_and_that_is_fine() -> None:
    assert fit(X=X[:, :1], Y=Y[:, :1], total_epoch=1).history.epoch == [0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": 3}, "model is a int; give a BaseRegressionModel"),
        ({"hidden": (0,)}, "hidden is 0; give a whole number of at least 1"),
        ({"data": "somewhere"}, "X and data are both given"),
        ({"X": None}, "Y or dev_X is given without X"),
        ({"dev_Y": [[1]]}, "dev_Y is given without dev_X"),
        ({"class_weight": "even"}, "class_weight is 'even'"),
        ({"checkpoint_every_steps": 0}, "checkpoint_every_steps is 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_are_refused_before_a_folder_is_made(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        fit(save_dir=tmp_path / "new", **given)
    assert not (tmp_path / "new").exists()


def test_an_epoch_that_diverges_does_not_count() -> None:
    model = DeepNetwork([N_X, 4, 1], ["relu", "sigmoid"])
    optimizer = GradientDescent(model.save(), 1e200)
    with pytest.raises(TrainingDiverged, match=r"learning rate 1e\+200"), np.errstate(all="ignore"):
        fit(model=model, optimizer=optimizer, engine="plain")
    assert optimizer.epoch == 0
