"""A model and its optimizer in one file: saved, loaded into live arrays, and built from the file alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catopt_xp.backend.xp import Backend
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.rules import OPTIMIZERS, Adam, Momentum, make_optimizer
from catopt_xp.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    RunState,
    load_model,
    load_state_dict,
    read_checkpoint,
    save_run,
    save_state_dict,
    write_checkpoint,
)

Array = np.ndarray[Any, Any]


def pair(name: str = "adam", seed: int = 0, **options: Any) -> tuple[DeepNetwork, BaseOptimizer]:
    model = DeepNetwork([4, 3, 2], ["tanh", "softmax"], **({"seed": seed} | options))
    return model, make_optimizer(name, model.save(), 0.05)


def learn(model: DeepNetwork, optimizer: BaseOptimizer, steps: int = 3) -> None:
    rng = np.random.Generator(np.random.PCG64(optimizer.steps))
    for _ in range(steps):
        model.forward(rng.integers(0, 256, (4, 8), dtype=np.uint8))
        model.backward(rng.integers(0, 2, (1, 8)))
        optimizer.update(model.get_grad_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loaded_into_a_fresh_pair_training_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    model, optimizer = pair(name)
    learn(model, optimizer)
    optimizer.increase_epoch()
    path = save_state_dict(model, optimizer, tmp_path / "state")
    assert path == tmp_path / "state.npz"
    fresh, fresh_optimizer = pair(name, seed=1)
    weights = fresh.save()["W0"]
    load_state_dict(fresh, fresh_optimizer, path)
    assert fresh.save()["W0"] is weights
    assert (fresh_optimizer.steps, fresh_optimizer.epoch) == (3, 1)
    learn(model, optimizer)
    learn(fresh, fresh_optimizer)
    assert np.array_equal(fresh.save().flat, model.save().flat)
    for key, x in optimizer.save().items():
        assert np.array_equal(fresh_optimizer.save()[key], x), key


def test_a_state_travels_between_devices(backend: Backend, tmp_path: Path) -> None:
    model, optimizer = pair()
    learn(model, optimizer)
    there = model.to(backend)
    moved = optimizer.on(there.save())
    path = save_state_dict(there, moved, tmp_path / "there")
    assert path.read_bytes() == save_state_dict(model, optimizer, tmp_path / "here").read_bytes()
    fresh, _ = pair(seed=1, device=backend)
    fresh_optimizer = Adam(fresh.save(), 0.05)
    load_state_dict(fresh, fresh_optimizer, path)
    np.testing.assert_array_equal(backend.to_host(fresh.save().flat), model.save().flat)
    np.testing.assert_array_equal(backend.to_host(fresh_optimizer.save()["v/W1"]), optimizer.save()["v/W1"])


def test_a_model_is_built_from_its_file_alone(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = [{}, {"dtype": "float64", "dropout": 0.25, "seed": 8}]
    for options in cases:
        model, optimizer = pair(**options)
        learn(model, optimizer)
        built = load_model(save_state_dict(model, optimizer, tmp_path / "a"))
        assert built.architecture == model.architecture
        assert built.backend.name == "numpy"
        assert np.array_equal(built.save().flat, model.save().flat)
        X = np.arange(8, dtype=np.uint8).reshape(4, 2)
        assert np.array_equal(built.forward(X, train_mode=False), model.forward(X, train_mode=False))


def test_the_best_weights_are_preferred_where_some_were_kept(tmp_path: Path) -> None:
    model, optimizer = pair()
    best = model.save().zeros_like()
    best.copy_from(model.save())
    learn(model, optimizer)
    path = save_run(model, optimizer, tmp_path / "a", RunState(epoch=3, best=best))
    assert np.array_equal(load_model(path).save().flat, best.flat)
    load_state_dict(*(fresh := pair(seed=1)), path)
    assert np.array_equal(fresh[0].save().flat, model.save().flat), "a resumed run goes on from the last weights"


def test_a_run_comes_back_as_it_was(tmp_path: Path) -> None:
    model, optimizer = pair()
    state = RunState(
        epoch=3,
        batches=2,
        seconds=1.5,
        losses=np.array([0.5, 0.25], dtype=np.float32),
        mini_batch_loss=[1.0, 0.75],
        history={"epoch": [0, 1, 2]},
        early_stopping={"best_loss": 0.5, "best_epoch": 1, "waited": 1},
        best=model.save(),
        environment={"device": "cpu"},
    )
    back = Checkpoint.read(save_run(model, optimizer, tmp_path / "a", state)).run_state()
    for name in ("epoch", "batches", "seconds", "history", "early_stopping", "environment"):
        assert getattr(back, name) == getattr(state, name), name
    assert np.array_equal(back.losses, state.losses)
    assert back.mini_batch_loss.tolist() == [1.0, 0.75]
    assert back.best is not None
    assert all(np.array_equal(back.best[name], x) for name, x in model.save().items())


def test_a_state_that_was_saved_by_hand_stands_at_the_optimizers_epoch(tmp_path: Path) -> None:
    model, optimizer = pair()
    optimizer.increase_epoch()
    run = Checkpoint.read(save_state_dict(model, optimizer, tmp_path / "a")).run_state()
    assert (run.epoch, run.batches, run.losses, run.best) == (1, 0, None, None)


def test_another_optimizer_s_state_is_skipped_with_a_warning(tmp_path: Path) -> None:
    model, optimizer = pair()
    learn(model, optimizer)
    optimizer.increase_epoch()
    path = save_state_dict(model, optimizer, tmp_path / "a")
    fresh, _ = pair(seed=1)
    other = Momentum(fresh.save(), 0.05)
    with pytest.warns(UserWarning, match="the state is that of Adam, this is Momentum"):
        load_state_dict(fresh, other, path)
    assert (other.steps, other.epoch) == (0, 1)
    assert np.array_equal(fresh.save().flat, model.save().flat)


# Files that do not fit.

Change = Callable[[dict[str, Any], dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda arrays, meta: arrays.pop("model/W1"), "model: W1 is missing"),
        (
            lambda arrays, meta: arrays.update({"model/W0": np.zeros((4, 3))}),
            r"W0 has shape \(4, 3\), expected \(3, 4\)",
        ),
        (lambda arrays, meta: arrays.update({"model/W2": np.zeros((1, 1))}), "W2 is not a parameter here"),
        (lambda arrays, meta: arrays.pop("optimizer/m/b0"), "m/b0 is missing"),
        (lambda arrays, meta: arrays.update({"optimizer/v/b0": np.zeros(3)}), r"v/b0 has shape \(3,\)"),
        (lambda arrays, meta: meta["optimizer"].pop("steps"), "steps is missing"),
        (lambda arrays, meta: meta.pop("optimizer"), "optimizer is missing from its meta"),
        (lambda arrays, meta: meta.update(model=[1]), "model is missing from its meta"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_key_and_changes_nothing(
    change: Change, words: str, tmp_path: Path
) -> None:
    source = pair()
    learn(*source)
    arrays, meta = read_checkpoint(save_state_dict(*source, tmp_path / "a"))
    change(arrays, meta)
    path = write_checkpoint(tmp_path / "changed", arrays, meta)
    model, optimizer = pair(seed=1)
    learn(model, optimizer, steps=1)
    before = [model.save().flat.copy(), optimizer.save()["m/W0"].copy(), optimizer.steps]
    with pytest.raises(CheckpointError, match=words) as error:
        load_state_dict(model, optimizer, path)
    assert str(path) in str(error.value)
    after = [model.save().flat, optimizer.save()["m/W0"], optimizer.steps]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda arrays, meta: meta.update(model={}), "model is not described as a DeepNetwork"),
        (lambda arrays, meta: meta["model"].update(layers=3), "model is not described as a DeepNetwork"),
        (lambda arrays, meta: meta["model"].update(neuron_cnt=[4, 2]), "2 layer sizes and 2 activations"),
        (lambda arrays, meta: meta["model"].update(neuron_cnt=[4, 5, 2]), r"W0 has shape \(3, 4\), expected \(5, 4\)"),
        (lambda arrays, meta: arrays.update({"best/W0": np.zeros((3, 4))}), "best: W1 is missing"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(change: Change, words: str, tmp_path: Path) -> None:
    arrays, meta = read_checkpoint(save_state_dict(*pair(), tmp_path / "a"))
    change(arrays, meta)
    with pytest.raises(CheckpointError, match=words):
        load_model(write_checkpoint(tmp_path / "changed", arrays, meta))


def test_a_run_that_is_not_whole_in_its_meta_is_refused(tmp_path: Path) -> None:
    arrays, meta = read_checkpoint(save_state_dict(*pair(), tmp_path / "a"))
    del meta["run"]["batches"]
    path = write_checkpoint(tmp_path / "changed", arrays, meta)
    with pytest.raises(CheckpointError, match=r"run is incomplete .*'batches'"):
        Checkpoint.read(path).run_state()


def test_weights_that_are_not_finite_are_not_saved_over_good_ones(tmp_path: Path) -> None:
    model, optimizer = pair()
    path = save_state_dict(model, optimizer, tmp_path / "a")
    before = path.read_bytes()
    model.save()["W1"][0, 0] = np.nan
    with pytest.raises(FloatingPointError, match="model/W1 has values that are not finite"):
        save_state_dict(model, optimizer, path)
    assert path.read_bytes() == before
