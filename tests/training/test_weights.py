"""Weights of samples and of classes in `train`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from short_runs import N_X, M, fit, flat, interrupt, small_set

from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.rules import GradientDescent
from catopt_xp.training import batch_size
from catopt_xp.training.loop import Interrupted

WHOLE = {"batch_size": 4 * M, "shuffle": "none", "total_epoch": 5, "dtype": "float64", "learning_rate": 0.1}
WHOLE |= {"optimizer": "gd"}


@pytest.mark.parametrize("engine", ["plain", "panels"])
def test_a_weight_counts_as_that_many_samples(engine: str) -> None:
    X, Y = small_set()
    times = np.arange(M) % 3 + 1
    weighted = fit(sample_weight=times, engine=engine, **WHOLE)
    repeated = fit(X=np.repeat(X.T, times, axis=0).T, Y=np.repeat(Y, times, axis=1), engine=engine, **WHOLE)
    assert weighted.engine == repeated.engine == engine
    assert flat(weighted.model) == pytest.approx(flat(repeated.model), rel=1e-10)
    for name in ("train_loss", "full_train_loss", "train_accuracy"):
        assert getattr(weighted.history, name) == pytest.approx(getattr(repeated.history, name), rel=1e-10)


def test_weights_change_each_batch_and_its_share_of_the_epoch() -> None:
    weights = np.ones(M)
    weights[:16] = 9.0
    result = fit(sample_weight=weights, shuffle="none", total_epoch=1)
    losses, sizes = result.history.mini_batch_loss, [144.0, 16.0, 16.0, 12.0]
    assert result.history.train_loss == pytest.approx([np.average(losses, weights=sizes)], rel=1e-6)


def test_a_dev_set_is_not_weighted() -> None:
    X, Y = small_set()
    result = fit(sample_weight=np.arange(M) + 1.0, dev_X=X, dev_Y=Y)
    accuracy, loss = result.model.evaluate(X, Y, return_loss=True)  # type: ignore[misc]
    assert (result.history.dev_accuracy[-1], result.history.dev_loss[-1]) == pytest.approx((accuracy, loss), rel=1e-6)
    assert result.history.full_train_loss[-1] != pytest.approx(loss, rel=1e-3)


def test_balanced_classes_weigh_the_same() -> None:
    _, Y = small_set()
    counts = np.bincount(Y[0])
    by_hand = (M / (2 * counts))[Y[0]]
    one, other = fit(class_weight="balanced"), fit(sample_weight=by_hand)
    assert np.array_equal(flat(one.model), flat(other.model))


def test_classes_are_weighed_by_name_or_by_number(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in ("apple", "pear"):
        (tmp_path / kind).mkdir()
        for k in range(12):
            Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(tmp_path / kind / f"{k}.png")
    given: dict[str, Any] = {"X": None, "Y": None, "data": tmp_path, "img_shape": (4, 4)}
    by_name = fit(class_weight={"pear": 5.0}, **given)
    by_number = fit(class_weight={1: 5.0}, **given)
    assert np.array_equal(flat(by_name.model), flat(by_number.model))
    assert not np.array_equal(flat(by_name.model), flat(fit(**given).model))


def test_a_run_that_goes_on_with_other_weights_says_so(tmp_path: Path) -> None:
    weights = np.arange(M) + 1.0
    first = fit(sample_weight=weights, save_dir=tmp_path)
    same = fit(sample_weight=weights, recover_from=first.checkpoint, total_epoch=4)
    other = fit(recover_from=first.checkpoint, total_epoch=4)
    told = [[notice for notice in run.notices if "weights" in notice] for run in (same, other)]
    assert [len(notices) for notices in told] == [0, 1]


def test_a_stopped_run_with_weights_has_the_same_bits(tmp_path: Path) -> None:
    weights, given = np.arange(M) + 1.0, {"save_dir": tmp_path}
    whole = fit(sample_weight=weights, total_epoch=6)
    fit(sample_weight=weights, total_epoch=3, **given)
    resumed = fit(sample_weight=weights, total_epoch=6, recover_from=tmp_path / "model_latest.npz")
    assert np.array_equal(flat(whole.model), flat(resumed.model))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sample_weight": np.ones(M - 1)}, rf"sample_weight has shape \({M - 1},\); give \({M},\)"),
        ({"sample_weight": np.full(M, np.nan)}, "sample_weight contains NaN or infinity"),
        ({"sample_weight": np.zeros(M)}, "sample_weight is zero for every sample"),
        ({"sample_weight": np.arange(M) - 1.0}, "the weight of sample 0 is -1; give weights of at least 0"),
        ({"class_weight": {0: -1.0}}, "the weight of sample [0-9]+ is -1; give weights of at least 0"),
        ({"class_weight": "even"}, "class_weight is 'even'; give None, \"balanced\" or {class: weight}"),
        ({"class_weight": {7: 1.0}}, "class_weight has weights of \\[7\\]"),
    ],
    ids=["shape", "nan", "zero", "negative", "negative class", "word", "class"],
)
def test_weights_that_cannot_be_used_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit(**given)


def test_a_streamed_set_takes_no_weights(tmp_path: Path) -> None:
    X, Y = small_set(200)
    np.save(tmp_path / "big.npy", np.ascontiguousarray(X.T))
    np.save(tmp_path / "big_labels.npy", Y.reshape(-1))
    given: dict[str, Any] = {"X": None, "Y": None, "data": tmp_path / "big.npy", "batch_size": 4}
    with pytest.raises(ValueError, match="go with a set in memory, this one is streamed: leave them out"):
        fit(sample_weight=np.ones(200), memory_limit=2 * 200 * N_X - 2, **given)


def test_gradients_of_a_weighted_step_are_weighted_means() -> None:
    X, Y = small_set()
    model = DeepNetwork([N_X, 1], ["sigmoid"], dtype="float64")
    start, weights = flat(model).copy(), np.arange(M) + 1.0
    optimizer = GradientDescent(model.save(), 1.0)
    fit(model=model, optimizer=optimizer, sample_weight=weights, batch_size=M, total_epoch=1, shuffle="none")
    Z = (start[:N_X] @ X) / 255 + start[N_X]
    d = weights * (1 / (1 + np.exp(-Z)) - Y[0]) / weights.sum()
    expected = start - np.concatenate([X @ d / 255, [d.sum()]])
    assert flat(model) == pytest.approx(expected, rel=1e-12)


def test_a_batch_size_is_measured_with_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    X, Y = small_set(2000)
    asked: list[Any] = []
    whole = batch_size.choose_engine

    def watched(*arguments: Any, weights: Any = None, **options: Any) -> Any:
        asked.append(weights)
        return whole(*arguments, weights=weights, **options)

    monkeypatch.setattr(batch_size, "choose_engine", watched)
    monkeypatch.setattr(batch_size, "MEASURED_SECONDS", 0.0)
    weights = np.arange(2000) + 1.0
    fit(X=X, Y=Y, sample_weight=weights, batch_size="auto", engine="plain", total_epoch=1)
    assert len(asked) == 4
    assert all(np.array_equal(one, weights) for one in asked)


def test_a_model_that_takes_no_weights_is_refused() -> None:
    class Plain(DeepNetwork):
        def backward(self, Y: Any) -> Any:  # type: ignore[override]
            return super().backward(Y)

    with pytest.raises(ValueError, match=r"need Plain\.backward to take weights=None, which it does not"):
        fit(model=Plain([N_X, 1], ["sigmoid"]), sample_weight=np.ones(M))


def test_within_an_epoch_the_weights_stay(
    tmp_path: Path, crash_after: Callable[[int, Callable[[], None]], None]
) -> None:
    crash_after(2, interrupt)
    with pytest.raises(Interrupted) as caught:
        fit(sample_weight=np.arange(M) + 1.0, save_dir=tmp_path, engine="plain")
    with pytest.raises(ValueError, match="which can only go on with the sample weights that it began with"):
        fit(recover_from=caught.value.checkpoint, engine="plain")
