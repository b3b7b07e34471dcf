"""A run that stopped anywhere and goes on from its checkpoint ends with the bits of one that never did."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marks import some
from short_runs import Crash, crash, interrupt

from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.rules import Adam, make_optimizer
from catopt_xp.optim.schedules import get_hyperbola_func
from catopt_xp.training.callbacks import CsvLog, TrainState
from catopt_xp.training.checkpoint import CheckpointError, read_checkpoint, save_state_dict, write_checkpoint
from catopt_xp.training.history import History
from catopt_xp.training.loop import Interrupted
from catopt_xp.training.train import TrainResult, train

M, N_X, EPOCHS, BATCHES = 30, 12, 4, 4
RATES = {"gd": 0.05, "momentum": 0.05, "rmsprop": 0.01, "adam": 0.01}
Array = np.ndarray[Any, Any]


def small_set() -> tuple[Array, Array]:
    X = np.random.default_rng(0).integers(0, 256, (M, N_X), dtype=np.uint8).T
    return X, (X[:6].mean(axis=0, keepdims=True) > X[6:].mean(axis=0, keepdims=True)).astype(np.int64)


def fit(folder: Path | None, **given: Any) -> TrainResult:
    X, Y = small_set()
    common: dict[str, Any] = {"X": X, "Y": Y, "total_epoch": EPOCHS, "batch_size": 8, "save_dir": folder}
    common |= {"device": "cpu", "verbose": False, "print_interval": 2, "optimizer": "adam"}
    if given.get("model") is None and "recover_from" not in given:
        common["hidden"] = (5, 4)
    common |= given
    if isinstance(common["optimizer"], str):
        common.setdefault("learning_rate", RATES[common["optimizer"]])
    return train(**common)


def comparable(history: History) -> dict[str, Any]:
    return {k: v for k, v in vars(history).items() if k not in ("seconds", "timings", "run")}


def assert_same_bits(one: TrainResult, other: TrainResult) -> None:
    """Weights, moments, counters and history."""
    assert comparable(one.history) == comparable(other.history)
    assert len(one.history.seconds) == len(other.history.seconds)
    for a, b in ((one.model.save(), other.model.save()), (one.optimizer.save(), other.optimizer.save())):
        assert set(a) == set(b)
        for name, value in a.items():
            assert np.array_equal(value, b[name]), name


class StopAfter:
    """A callback that ends the run, or kills it from inside, after an epoch."""

    def __init__(self, epoch: int, action: Callable[[], None] | None = None) -> None:
        self.epoch, self.action = epoch, action

    def on_epoch(self, state: TrainState) -> None:
        if state.epoch == self.epoch:
            if self.action is None:
                state.stop = True
            else:
                self.action()


LATEST = "model_latest.npz"
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": name} for name in RATES},
    "nesterov": {"optimizer": "momentum", "optimizer_options": {"nesterov": True, "weight_decay": 0.1}},
    "accumulate": {"accumulate": 2, "optimizer_options": {"clip_norm": 0.1}},
    "dropout": {"dropout": 0.4},
    "early stopping": {
        "early_stopping": 2,
        "dev_X": small_set()[0],
        "dev_Y": 1 - small_set()[1],
        "print_interval": 1,
    },
    "schedule by step": {"lr_scheduler": get_hyperbola_func(0.5), "schedule_by": "step"},
    "schedule by epoch": {"lr_scheduler": get_hyperbola_func(0.5), "optimizer": "gd"},
    "shuffle once": {"shuffle": "once"},
    "drop last": {"drop_last": True},
    "float64": {"dtype": "float64"},
    "panel engine": {"engine": "panels"},
}
# The panel engine compiles each rule anew; its own tests stop it at every step with each of them.
VARIANTS = {name: {"engine": "plain"} | options for name, options in VARIANTS.items()}


def resumed_options(variant: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a resumed run is given again; how the network is built is in the checkpoint."""
    return {k: v for k, v in variant.items() if k not in ("dropout", "dtype")}


# --- the same bits ------------------------------------------------------------------------------------------


EACH = [(variant, epoch) for variant in VARIANTS for epoch in range(EPOCHS - 1)]
ALWAYS = [(variant, k % (EPOCHS - 1)) for k, variant in enumerate(VARIANTS)]


@pytest.mark.parametrize(("variant", "epoch"), some(EACH, ALWAYS, pytest.mark.hardening))
def test_a_run_stopped_after_any_epoch_ends_with_the_same_bits(tmp_path: Path, variant: str, epoch: int) -> None:
    options = VARIANTS[variant]
    straight = fit(None, **options)
    if epoch + 1 >= len(straight.history.epoch):
        assert variant == "early stopping"
        return
    with pytest.raises(Interrupted) as caught:
        fit(tmp_path, callbacks=[StopAfter(epoch, interrupt)], **options)
    assert caught.value.checkpoint == tmp_path / LATEST
    assert_same_bits(fit(tmp_path, recover_from=tmp_path / LATEST, **resumed_options(options)), straight)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_interrupted_at_any_step_saves_and_ends_with_the_same_bits(
    tmp_path: Path, crash_after: Callable[[int, Callable[[], None]], None], variant: str
) -> None:
    options = VARIANTS[variant]
    straight = fit(None, **options)
    for update in range(1, 2 * BATCHES):
        folder = tmp_path / str(update)
        crash_after(update, interrupt)
        with pytest.raises(Interrupted) as caught:
            fit(folder, **options)
        assert str(caught.value).endswith(f"resume with recover_from={str(folder / LATEST)!r}")
        crash_after(0, crash)
        finished = fit(folder, recover_from=folder / LATEST, **resumed_options(options))
        assert_same_bits(finished, straight)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("variant", ["adam", "accumulate", "dropout", "schedule by step"])
def test_a_run_that_crashed_goes_on_from_its_last_step_checkpoint(
    tmp_path: Path, crash_after: Callable[[int, Callable[[], None]], None], variant: str, every: int
) -> None:
    options = VARIANTS[variant] | {"checkpoint_every_steps": every}
    straight = fit(None, **options)
    for update in range(every + 1, 8):
        folder = tmp_path / str(update)
        crash_after(update, crash)
        with pytest.raises(Crash):
            fit(folder, **options)
        _, meta = read_checkpoint(folder / LATEST)
        updates = meta["optimizer"]["steps"]
        assert update - every <= updates < update
        crash_after(0, crash)
        resumed = fit(folder, recover_from=folder / LATEST, **resumed_options(options))
        assert_same_bits(resumed, straight)


def test_a_chain_of_crashes_at_every_step_still_ends_with_the_same_bits(
    tmp_path: Path, crash_after: Callable[[int, Callable[[], None]], None]
) -> None:
    straight, crashes = fit(None), 0
    given: dict[str, Any] = {}
    while True:
        crash_after(2, crash)  # the second update of every run is lost
        try:
            finished = fit(tmp_path, checkpoint_every_steps=1, **given)
            break
        except Crash:
            crashes += 1
            given = {"recover_from": tmp_path / LATEST}
    assert crashes == EPOCHS * BATCHES - 1
    assert_same_bits(finished, straight)


def test_total_epoch_is_where_training_ends(tmp_path: Path) -> None:
    fit(tmp_path, total_epoch=3)
    longer = fit(tmp_path, total_epoch=5, recover_from=tmp_path / LATEST)
    assert longer.history.epoch == [0, 1, 2, 3, 4]
    assert np.array_equal(longer.model.save()["W0"], fit(None, total_epoch=5).model.save()["W0"])
    reached = fit(tmp_path, total_epoch=4, recover_from=tmp_path / LATEST)
    assert reached.history.epoch == [0, 1, 2, 3, 4]
    assert "epoch 5 of 4 is reached already: nothing is left to train" in reached.notices
    assert_same_bits(reached, longer)


def test_objects_of_the_caller_s_own_are_filled_from_the_checkpoint(tmp_path: Path) -> None:
    straight = fit(None)
    fit(tmp_path, callbacks=[StopAfter(1)])
    model = DeepNetwork([N_X, 5, 4, 1], ["relu", "relu", "sigmoid"], seed=99)
    parameters, optimizer = model.save(), Adam(model.save(), RATES["adam"])
    resumed = fit(tmp_path, model=model, optimizer=optimizer, recover_from=tmp_path / LATEST)
    assert (resumed.model, resumed.optimizer) == (model, optimizer)
    assert np.array_equal(parameters.flat, straight.model.save().flat)  # type: ignore[attr-defined]


def test_the_checkpoint_s_optimizer_goes_on_with_its_schedule(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "optimizer_options": {"beta": 0.8, "l2": 0.01},
        "learning_rate": 0.02,
        "lr_scheduler": get_hyperbola_func(0.3),
    }
    straight = fit(None, optimizer="momentum", **options)
    fit(tmp_path, optimizer="momentum", callbacks=[StopAfter(1)], **options)
    resumed = fit(tmp_path, optimizer=None, recover_from=tmp_path / LATEST)
    assert_same_bits(resumed, straight)


# --- what differs is said, or refused -----------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The checkpoint of a run that ended after epoch 1."""
    fit(tmp_path, callbacks=[StopAfter(1)])
    return tmp_path / LATEST


@pytest.fixture
def within(tmp_path: Path, crash_after: Callable[[int, Callable[[], None]], None]) -> Path:
    """The checkpoint of a run that was interrupted in the middle of epoch 1."""
    crash_after(BATCHES + 2, interrupt)
    with pytest.raises(Interrupted, match="interrupted at epoch 1, batch 2"):
        fit(tmp_path)
    crash_after(0, crash)
    return tmp_path / LATEST


@pytest.mark.parametrize("name", ["gd", "momentum", "rmsprop"])
def test_another_optimizer_starts_its_moments_anew_with_a_warning(stopped: Path, name: str) -> None:
    with pytest.warns(UserWarning, match="the state is that of Adam, this is .* step count start at zero"):
        resumed = fit(None, optimizer=name, recover_from=stopped)
    assert resumed.history.epoch == [0, 1, 2, 3]
    assert resumed.optimizer.steps == 2 * BATCHES
    now = type(resumed.optimizer).__name__
    assert f"the checkpoint was trained with optimizer Adam, this run goes on with {now}" in resumed.notices


ORDERING: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 10}, "batch_size 8"),
    ({"seed": 3}, "seed 0"),
    ({"shuffle": "once"}, "shuffle epoch"),
    ({"drop_last": True}, "drop_last False"),
    ({"accumulate": 2}, "accumulate 1"),
    ({"X": small_set()[0][:, :20], "Y": small_set()[1][:, :20]}, "m 30"),
]


@pytest.mark.parametrize(("other", "then"), ORDERING, ids=[then for _, then in ORDERING])
def test_another_order_is_said_between_epochs(stopped: Path, other: dict[str, Any], then: str) -> None:
    resumed = fit(None, recover_from=stopped, **other)
    assert f"the checkpoint was trained with {then}, this run goes on with" in " ".join(resumed.notices)
    assert resumed.history.epoch == [0, 1, 2, 3]


@pytest.mark.parametrize(("other", "then"), ORDERING, ids=[then for _, then in ORDERING])
def test_another_order_is_refused_within_an_epoch(within: Path, other: dict[str, Any], then: str) -> None:
    with pytest.raises(ValueError, match=f"within epoch 1, which can only go on as it began: give .*{then}") as caught:
        fit(None, recover_from=within, **other)
    assert "\n" not in str(caught.value)


def test_another_schedule_or_rate_is_said(stopped: Path) -> None:
    resumed = fit(None, recover_from=stopped, lr_scheduler=get_hyperbola_func(0.2))
    assert "Hyperbola(decay_rate=0.2)" in " ".join(resumed.notices)
    assert not any("trained with" in notice for notice in fit(None, recover_from=stopped).notices)


def edited(file: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint in which `edit(arrays, meta)` has changed something."""
    arrays, meta = read_checkpoint(file)
    edit(arrays, meta)
    return write_checkpoint(file.with_name("edited.npz"), arrays, meta)


@pytest.mark.parametrize(("key", "value"), [("device", "cuda:0"), ("engine", "another"), ("numpy", "1.0")])
def test_a_checkpoint_of_another_device_or_engine_loads_with_a_notice(stopped: Path, key: str, value: str) -> None:
    other = edited(stopped, lambda arrays, meta: meta["run"]["environment"].update({key: value}))
    resumed = fit(None, recover_from=other)
    notice = f"the checkpoint was written with {key} {value}: the bits that follow will differ"
    assert notice in resumed.notices
    assert_same_bits(resumed, fit(None))


def test_a_state_dict_resumes_at_the_optimizer_s_epoch(tmp_path: Path) -> None:
    model = DeepNetwork([N_X, 5, 4, 1], ["relu", "relu", "sigmoid"])
    optimizer = make_optimizer("adam", model.save(), RATES["adam"])
    fit(None, model=model, optimizer=optimizer, total_epoch=2)
    resumed = fit(None, recover_from=save_state_dict(model, optimizer, tmp_path / "state"))
    straight = fit(None)
    assert resumed.history.epoch == [2, 3]
    assert np.array_equal(resumed.model.save()["W0"], straight.model.save()["W0"])
    assert resumed.history.mini_batch_loss == straight.history.mini_batch_loss[2 * BATCHES :]


def drop(key: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda arrays, meta: arrays.pop(key)


def reshape(key: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda arrays, meta: arrays.update({key: arrays[key][:, :1].copy()})


def put(key: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda arrays, meta: arrays.update({key: np.zeros(3, np.float32)})


def unset(*keys: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def edit(arrays: dict[str, Any], meta: dict[str, Any]) -> None:
        for key in keys[:-1]:
            meta = meta[key]
        del meta[keys[-1]]

    return edit


DAMAGE: list[tuple[Callable[[dict[str, Any], dict[str, Any]], None], str]] = [
    (drop("model/W1"), "model: W1 is missing"),
    (reshape("model/W0"), r"model: W0 has shape \(5, 1\), expected \(5, 12\)"),
    (put("model/W9"), "model: W9 is not a parameter here"),
    (drop("optimizer/m/b0"), "m/b0 is missing"),
    (reshape("optimizer/v/W0"), r"v/W0 has shape \(5, 1\)"),
    (put("optimizer/u/W0"), "u/W0 is not a parameter here"),
    (drop("run/losses"), "run/losses does not hold the losses of 2 batches"),
    (put("run/losses"), "run/losses does not hold the losses of 2 batches"),
    (unset("optimizer"), "optimizer is missing"),
    (unset("optimizer", "steps"), "steps is missing"),
    (unset("model"), "model is missing"),
    (unset("model", "neuron_cnt"), "model is not described as a DeepNetwork"),
    (unset("run", "batches"), "run is incomplete .*batches"),
    (lambda arrays, meta: meta["run"]["history"].update(colour=[1]), "history is foreign .*colour"),
]


@pytest.mark.parametrize(("edit", "told"), DAMAGE, ids=[told for _, told in DAMAGE])
def test_a_checkpoint_that_does_not_match_names_the_key(within: Path, edit: Any, told: str) -> None:
    other = edited(within, edit)
    with pytest.raises(CheckpointError, match=told) as caught:
        fit(None, recover_from=other)
    assert str(other) in str(caught.value)
    assert "\n" not in str(caught.value)


def pickled(file: Path) -> None:
    arrays: dict[str, Any] = {"model/W0": np.array([{}], dtype=object), "meta": np.zeros(1)}
    np.savez(file, **arrays)


def cut(size: int) -> Callable[[Path], None]:
    """Leaves `size` bytes of a file; a negative size takes that many from its end."""

    def spoil(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:size])

    return spoil


FILES: list[tuple[Callable[[Path], None], str]] = [
    (cut(-300), "damaged or foreign"),
    (cut(1000), "damaged or foreign"),
    (cut(0), "damaged or foreign"),
    (lambda file: np.savez(file, a=np.zeros(2)), "meta is missing"),
    (
        lambda file: np.savez(file, meta=np.frombuffer(json.dumps({"format": "x"}).encode(), np.uint8)),
        "foreign",
    ),
    (pickled, "model/W0"),
]


@pytest.mark.parametrize(
    ("spoil", "told"), FILES, ids=["cut", "cut short", "empty", "foreign", "other format", "pickled"]
)
def test_a_file_that_is_no_checkpoint_is_refused(stopped: Path, spoil: Callable[[Path], None], told: str) -> None:
    spoil(stopped)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(stopped))}.*{told}") as caught:
        fit(None, recover_from=stopped)
    assert "\n" not in str(caught.value)


def test_a_missing_checkpoint_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none.npz"))):
        fit(tmp_path, recover_from=tmp_path / "none")


def test_a_refused_checkpoint_changes_nothing_of_the_caller_s(stopped: Path) -> None:
    model = DeepNetwork([N_X, 5, 4, 1], ["relu", "relu", "sigmoid"], seed=7)
    optimizer = Adam(model.save(), 0.01)
    before = model.parameters.flat.copy()
    for edit in (drop("model/W1"), drop("optimizer/m/b0"), reshape("optimizer/v/W0")):
        with pytest.raises(CheckpointError):
            fit(None, model=model, optimizer=optimizer, recover_from=edited(stopped, edit))
        assert np.array_equal(model.parameters.flat, before)
        assert (optimizer.steps, optimizer.epoch) == (0, 0)


# --- another dev set ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("had", [True, False])
def test_a_dev_set_that_comes_or_goes_leaves_a_history_that_fits(had: bool, tmp_path: Path) -> None:
    X, Y = small_set()
    dev = {"dev_X": X[:, :9], "dev_Y": Y[:, :9]}
    first = fit(tmp_path, total_epoch=2, print_interval=1, **(dev if had else {}))
    assert first.checkpoint is not None
    log = tmp_path / "log.csv"
    options: dict[str, Any] = {"recover_from": first.checkpoint, "print_interval": 1, "callbacks": [CsvLog(log)]}
    result = fit(tmp_path, **options, **({} if had else dev))
    history = History.from_json(result.history.to_json())
    told = "has no dev set, the checkpoint had one" if had else "has a dev set, the checkpoint had none"
    assert any(told in notice for notice in result.notices)
    assert history.eval_epoch == [0, 1, 2, 3]
    assert len(history.dev_loss) == (0 if had else 4)
    assert np.isfinite(history.dev_loss[2:]).all()
    assert len(History.from_csv(log).epoch) == 4


def test_early_stopping_that_judges_by_another_cost_begins_anew(tmp_path: Path) -> None:
    X, Y = small_set()
    first = fit(tmp_path, total_epoch=2, print_interval=1, early_stopping=2, dev_X=X[:, :9], dev_Y=1 - Y[:, :9])
    result = fit(tmp_path, total_epoch=12, print_interval=1, early_stopping=2, recover_from=first.checkpoint)
    assert "early stopping begins anew, as it judges by other costs" in result.notices
    assert result.history.epoch == list(range(12))  # the training cost falls throughout
