"""Callbacks: what they see, early stopping and checkpointing given as such, and checkpoints of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from short_runs import fit, flat, small_network, small_set

from catopt_xp.io.files import write_whole
from catopt_xp.optim.rules import Adam
from catopt_xp.training.callbacks import Checkpointing, EarlyStopping, TrainState
from catopt_xp.training.checkpoint import load_model, read_checkpoint
from catopt_xp.training.history import History


class Each:
    """A callback made of a function."""

    def __init__(self, look: Callable[[TrainState], Any]) -> None:
        self.look = look

    def on_epoch(self, state: TrainState) -> None:
        self.look(state)


def rising() -> dict[str, Any]:
    """Settings of a run whose dev cost rises as training goes on."""
    X, Y = small_set()
    return {"dev_X": X, "dev_Y": 1 - Y, "learning_rate": 0.02, "total_epoch": 20}


def resumed(file: Any, **given: Any) -> Any:
    """As `fit`, from a checkpoint that knows its network."""
    return fit(recover_from=file, hidden=(30, 20, 20), **given)


# --- what a callback sees ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("accumulate", "expected"), [(1, [4, 8, 12]), (3, [2, 4, 6])])
def test_a_state_says_the_updates_so_far_and_whether_it_is_the_last(accumulate: int, expected: list[int]) -> None:
    seen: list[tuple[int, bool]] = []
    look = Each(lambda state: seen.append((state.steps, state.last)))
    result = fit(callbacks=[look], accumulate=accumulate)
    assert seen == list(zip(expected, [False, False, True], strict=True))
    assert result.optimizer.steps == expected[-1]


def test_a_checkpoint_that_a_callback_saves_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    straight, saved = fit(total_epoch=5, dropout=0.2), []

    def look(state: TrainState) -> None:
        if state.epoch == 2:
            saved.append(state.save(tmp_path / "mine"))

    first = fit(total_epoch=4, dropout=0.2, callbacks=[Each(look)])
    assert saved == [tmp_path / "mine.npz"]
    assert first.checkpoint == saved[0]
    later = resumed(saved[0], total_epoch=5)
    assert np.array_equal(flat(later.model), flat(straight.model))
    assert later.history.mini_batch_loss == straight.history.mini_batch_loss


def test_a_checkpoint_of_one_s_own_leaves_the_run_s_as_it_is(tmp_path: Path) -> None:
    mine = Each(lambda state: state.save(tmp_path / "mine.npz"))
    result = fit(callbacks=[mine], save_dir=tmp_path / "run")
    assert result.checkpoint == tmp_path / "run" / "model_latest.npz"
    assert not any("another run" in notice for notice in result.notices)
    for file in (result.checkpoint, tmp_path / "mine.npz"):
        assert np.array_equal(flat(load_model(file)), flat(result.model))


def test_a_state_of_no_run_saves_nothing(tmp_path: Path) -> None:
    model = small_network()
    state = TrainState(0, model, Adam(model.save(), 0.1), History(), evaluated=True)
    with pytest.raises(RuntimeError, match=r"a\.npz was not written: this TrainState belongs to no run"):
        state.save(tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []


# --- early stopping ---------------------------------------------------------------------------------------------------


def test_early_stopping_among_the_callbacks_is_that_of_train(tmp_path: Path) -> None:
    given, named = EarlyStopping(2), tmp_path / "named"
    by_callback = fit(callbacks=[given], save_dir=tmp_path, **rising())
    by_name = fit(early_stopping=2, save_dir=named, **rising())
    assert len(by_callback.history.epoch) < 20
    assert by_callback.history.train_loss == by_name.history.train_loss
    assert np.array_equal(flat(by_callback.model), flat(by_name.model))
    assert given.best_loss == min(by_callback.history.dev_loss)
    assert given.best_epoch == int(np.argmin(by_callback.history.dev_loss))
    assert by_callback.checkpoint is not None
    ours, theirs = read_checkpoint(by_callback.checkpoint)[0], read_checkpoint(named / "model_latest.npz")[0]
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_early_stopping_forgets_the_run_before() -> None:
    given = EarlyStopping(2)
    first, second = (fit(callbacks=[given], **rising()) for _ in range(2))
    assert first.history.epoch == second.history.epoch
    assert np.array_equal(flat(first.model), flat(second.model))


def test_early_stopping_is_given_once() -> None:
    with pytest.raises(ValueError, match="early_stopping is given, and an EarlyStopping among the callbacks; pass one"):
        fit(early_stopping=3, callbacks=[EarlyStopping(3)])


# --- checkpointing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 3, 6]),  # when evaluated
        ({"every": 2}, [1, 3, 5, 6]),
        ({"every": 100}, [6]),
        ({"every": 100, "every_steps": 8}, [1, 3, 5, 6]),
    ],
    ids=str,
)
def test_a_checkpoint_is_written_when_it_is_due_and_at_the_end(
    tmp_path: Path, options: dict[str, Any], expected: list[int]
) -> None:
    epochs: list[int] = []

    class Watched(Checkpointing):
        def write(self, state: TrainState) -> None:
            super().write(state)
            epochs.append(state.epoch)

    checkpointing = Watched(tmp_path / "mine", **options)
    result = fit(total_epoch=7, print_interval=3, callbacks=[checkpointing])
    assert epochs == expected
    assert result.checkpoint == checkpointing.written == tmp_path / "mine.npz"
    assert np.array_equal(flat(load_model(tmp_path / "mine.npz")), flat(result.model))


def test_a_checkpoint_saves_a_run_that_a_callback_stopped(tmp_path: Path) -> None:
    def stop(state: TrainState) -> None:
        state.stop = state.epoch == 1

    checkpointing = Checkpointing(tmp_path / "mine.npz", every=100)
    fit(total_epoch=7, print_interval=100, callbacks=[Each(stop), checkpointing])
    assert read_checkpoint(tmp_path / "mine.npz")[1]["run"]["epoch"] == 2


def test_another_run_s_checkpoint_is_kept_and_reported_once(tmp_path: Path) -> None:
    file, other = tmp_path / "mine.npz", tmp_path / "other.npz"
    fit(total_epoch=1, seed=1, callbacks=[Checkpointing(other)])
    before, told = other.read_bytes(), []

    def overwrite(state: TrainState) -> None:
        if state.epoch in (1, 2):
            write_whole(file, lambda stream: stream.write(before))

    result = fit(total_epoch=5, callbacks=[Each(overwrite), Checkpointing(file, every=1, notice=told.append)])
    previous = tmp_path / "mine_previous.npz"
    assert told == [
        f"{file} is written by something else too, whose last one is kept as {previous}: "
        "give each run a save_dir or model_name of its own"
    ]
    assert previous.read_bytes() == before
    assert np.array_equal(flat(load_model(file)), flat(result.model))


def test_a_checkpoint_of_another_run_is_kept_and_that_is_said(tmp_path: Path) -> None:
    file = tmp_path / "mine.npz"
    fit(total_epoch=1, callbacks=[Checkpointing(file)])
    before, told = file.read_bytes(), []
    fit(total_epoch=2, callbacks=[Checkpointing(file, notice=told.append)])
    assert told == [f"{file} was of another run, which is kept as {tmp_path / 'mine_previous.npz'}"]
    assert (tmp_path / "mine_previous.npz").read_bytes() == before
    with pytest.warns(UserWarning, match="was of another run"):
        fit(total_epoch=1, callbacks=[Checkpointing(file)])


@pytest.mark.parametrize("every", [0, -1])
def test_an_interval_below_one_is_refused(every: int) -> None:
    with pytest.raises(ValueError, match=f"every is {every}; give the epochs between checkpoints, at least 1"):
        Checkpointing("a.npz", every=every)
