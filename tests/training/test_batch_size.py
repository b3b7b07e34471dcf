"""The chapter's rule of thumb for the batch size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catopt_xp.backend.xp import NumpyBackend
from catopt_xp.data.resident import ResidentSet
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.rules import Adam
from catopt_xp.training.batch_size import (
    LARGEST,
    SMALL_SET,
    SMALLEST,
    STEPS_PER_EPOCH,
    Measured,
    choose,
    measure,
    rule_of_thumb,
)
from catopt_xp.training.train import train

SIZES = st.integers(1, 10**9)


@pytest.mark.parametrize(
    ("m", "size"),
    [
        (1, 1),
        (60, 60),
        (1999, 1999),
        (2000, 64),
        (3839, 64),
        (3840, 128),
        (7680, 256),
        (15359, 256),
        (15360, 512),
        (10**9, 512),
    ],
)
def test_the_chosen_size(m: int, size: int) -> None:
    assert rule_of_thumb(m)[0] == size


@given(SIZES)
def test_a_small_set_is_taken_whole_and_a_large_one_in_powers_of_two(m: int) -> None:
    size, why = rule_of_thumb(m)
    if m < SMALL_SET:
        assert size == m
        assert why == "fewer than 2000 samples are taken whole"
    else:
        assert SMALLEST <= size <= LARGEST
        assert size & (size - 1) == 0
        assert m / size >= STEPS_PER_EPOCH
        assert size == LARGEST or m / (2 * size) < STEPS_PER_EPOCH
        assert "power of two up to 512" in why


@given(st.integers(SMALL_SET, 10**7), st.integers(SMALL_SET, 10**7))
def test_more_samples_never_mean_a_smaller_batch_among_large_sets(a: int, b: int) -> None:
    assert rule_of_thumb(min(a, b))[0] <= rule_of_thumb(max(a, b))[0]


@pytest.mark.parametrize(
    ("rates", "size"),
    [([900.0, 1900.0, 2000.0], 128), ([1900.0, 1500.0, 2000.0], 64), ([1.0, 2.0, 4.0], 256), ([5.0], 64)],
)
def test_the_smallest_batch_within_a_tenth_of_the_best_rate_is_chosen(rates: list[float], size: int) -> None:
    rows = [Measured(n, rate) for n, rate in zip((64, 128, 256), rates, strict=False)]
    assert choose(rows)[0] == size


def test_nothing_measured_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^no batch size to choose from: "):
        choose([])


def test_measuring_leaves_model_and_optimizer_as_they_were() -> None:
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 256, (300, 12), dtype=np.uint8)
    targets = rng.integers(0, 2, (1, 300)).astype(np.float32)
    model = DeepNetwork([12, 4, 1], ["relu", "sigmoid"])
    optimizer = Adam(model.save(), 1e-3)
    weights = model.save().flat.copy()
    rows = measure("auto", model, optimizer, ResidentSet(samples, targets, []), NumpyBackend())
    assert [row.batch_size for row in rows] == [64, 128, 256]
    assert all(row.samples_per_second > 0 for row in rows)
    assert np.array_equal(model.save().flat, weights)
    assert (optimizer.steps, optimizer.epoch) == (0, 0)
    assert not any(np.any(x) for name, x in optimizer.save().items() if "/" in name)


def test_train_measures_a_large_set_and_keeps_the_size_when_resumed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (SMALL_SET, 6), dtype=np.uint8).T
    Y = rng.integers(0, 2, (1, SMALL_SET))
    first = train(X=X, Y=Y, batch_size="auto", total_epoch=1, save_dir=tmp_path, verbose=False)
    size = first.history.run["batch_size"]
    assert size in (64, 128, 256, 512)
    assert any(f"batch size {size}: the smallest within a tenth" in notice for notice in first.notices)
    again = train(
        X=X,
        Y=Y,
        batch_size="auto",
        total_epoch=2,
        save_dir=tmp_path,
        recover_from=first.checkpoint,
        verbose=False,
    )
    assert again.history.run["batch_size"] == size
    assert f"batch size {size}: that of the checkpoint" in again.notices
