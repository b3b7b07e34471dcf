"""What a run leaves: its lists, to JSON and back, and its pictures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from catopt_xp.history import STAGES, History

NUMBERS = st.floats(allow_nan=False)
LISTS = st.lists(NUMBERS, max_size=5)
EPOCHS = st.lists(st.integers(0, 10**6), max_size=5)
HISTORIES = st.builds(
    History,
    epoch=EPOCHS,
    eval_epoch=EPOCHS,
    learning_rate=LISTS,
    seconds=LISTS,
    train_loss=LISTS,
    train_accuracy=LISTS,
    full_train_loss=LISTS,
    dev_loss=LISTS,
    dev_accuracy=LISTS,
    mini_batch_loss=LISTS,
    timings=st.dictionaries(st.sampled_from(STAGES), NUMBERS),
    run=st.dictionaries(st.text(), st.none() | st.text() | st.integers() | LISTS | st.booleans(), max_size=3),
)


def example() -> History:
    return History(epoch=[0, 1], learning_rate=[0.1, 0.1], seconds=[0.5, 0.25], train_loss=[0.7, 0.6])


@given(HISTORIES)
def test_json_and_back_is_the_same_history_bit_for_bit(history: History) -> None:
    assert History.from_json(history.to_json()) == history


def test_a_new_history_is_empty_and_shares_nothing() -> None:
    first, second = History(), History()
    for field in dataclasses.fields(History):
        assert getattr(first, field.name) is not getattr(second, field.name)
    assert first.timings == dict.fromkeys(STAGES, 0.0)
    assert History.from_json("{}") == first


@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_is_written_whole_and_read_back(tmp_path: Path, kind: type) -> None:
    file = kind(tmp_path / "history.json")
    example().to_json(file)
    text = example().to_json(file)
    assert Path(file).read_text(encoding="utf-8") == text
    assert History.from_json(file) == example()
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]
    with pytest.raises(OSError, match=r"could not write .*none"):
        example().to_json(kind(tmp_path / "none" / "history.json"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"epoch": [0', r"history is not JSON"),
        ('{"epoch": [0], "loss": [1], "cost": [2]}', "history is not a history: unknown cost, loss"),
    ],
)
def test_foreign_text_is_refused_in_one_line(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        History.from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "told"), [("not JSON", "is not JSON"), ("[1, 2]", "unknown list")])
def test_a_foreign_file_is_named(tmp_path: Path, content: str, told: str) -> None:
    file = tmp_path / "history.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=told) as caught:
        History.from_json(file)
    assert str(caught.value).startswith(str(file))
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        History.from_json(tmp_path / "none.json")


def test_json_is_that_of_any_reader() -> None:
    read: dict[str, Any] = json.loads(example().to_json())
    assert list(read) == [field.name for field in dataclasses.fields(History)]
    assert read["train_loss"] == [0.7, 0.6]


def test_the_time_table_has_a_line_and_a_share_for_each_stage() -> None:
    history = History(timings={"read": 1.0, "decode": 0.0, "move": 0.0, "train": 2.0, "evaluate": 1.0, "save": 0.0})
    lines = history.time_table().splitlines()
    assert lines[0] == "time by stage:"
    assert [line.split()[0] for line in lines[1:]] == list(STAGES)
    assert lines[4].split() == ["train", "2.00", "s", "50.0%"]
    assert History().time_table().count("0.0%") == len(STAGES)


def test_a_run_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert len(example().plot(tmp_path / "run.png").axes) == 6
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no epochs"):
        History().plot()
