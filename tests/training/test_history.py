"""What a run leaves: its lists, to JSON and back, and its pictures."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catopt_xp.training.history import COLUMNS, STAGES, History
from catopt_xp.training.record import BY_EVALUATION

NUMBERS = st.floats(allow_nan=False)
LISTS = st.lists(NUMBERS, max_size=5)


@st.composite
def histories(draw: st.DrawFn) -> History:
    epochs = list(range(draw(st.integers(0, 5))))
    evaluated = draw(st.lists(st.sampled_from(epochs), unique=True)) if epochs else []

    def along(numbers: list[int]) -> list[float]:
        return draw(st.just([]) | st.lists(NUMBERS, min_size=len(numbers), max_size=len(numbers)))

    return History(
        epoch=epochs,
        eval_epoch=evaluated,
        learning_rate=along(epochs),
        seconds=along(epochs),
        train_loss=along(epochs),
        train_accuracy=along(evaluated),
        full_train_loss=along(evaluated),
        dev_loss=along(evaluated),
        dev_accuracy=along(evaluated),
        mini_batch_loss=draw(LISTS),
        timings=draw(st.dictionaries(st.sampled_from(STAGES), NUMBERS)),
        run=draw(st.dictionaries(st.text(), st.none() | st.text() | st.integers() | LISTS | st.booleans(), max_size=3)),
    )


def example() -> History:
    return History(epoch=[0, 1], learning_rate=[0.1, 0.1], seconds=[0.5, 0.25], train_loss=[0.7, 0.6])


@given(histories())
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


@pytest.mark.parametrize(
    ("spoiled", "told"),
    [
        ({"epoch": 5}, "epoch is not a list of whole numbers"),
        ({"epoch": [0.0, 1.0]}, "epoch is not a list of whole numbers"),
        ({"seconds": ["fast", "slow"]}, "seconds is not a list of numbers"),
        ({"train_loss": [0.7]}, "train_loss has 1 values, epoch has 2"),
        ({"eval_epoch": [0], "dev_loss": [0.7, 0.6]}, "dev_loss has 2 values, eval_epoch has 1"),
        ({"eval_epoch": [7]}, "eval_epoch has 7, epoch has not"),
        ({"timings": [1.0]}, "timings is no table of names and values"),
        ({"timings": {"read": "long"}}, "timings holds more than numbers"),
        ({"run": None}, "run is no table of names and values"),
    ],
)
def test_wrong_types_and_lengths_are_said_with_the_file(tmp_path: Path, spoiled: dict[str, Any], told: str) -> None:
    file = tmp_path / "history.json"
    file.write_text(json.dumps(dataclasses.asdict(example()) | spoiled), encoding="utf-8")
    with pytest.raises(ValueError, match=told) as caught:
        History.from_json(file)
    assert str(caught.value) == f"{file}: {told}; give a history as train wrote it"


def test_json_is_that_of_any_reader() -> None:
    read: dict[str, Any] = json.loads(example().to_json())
    assert list(read) == [field.name for field in dataclasses.fields(History)]
    assert read["train_loss"] == [0.7, 0.6]


EVALUATED: dict[str, Any] = {
    "eval_epoch": [1],
    "train_accuracy": [0.75],
    "full_train_loss": [0.625],
    "dev_loss": [0.7],
    "dev_accuracy": [0.5],
}


def test_csv_has_a_row_an_epoch_below_the_columns_names(tmp_path: Path) -> None:
    history = dataclasses.replace(example(), **EVALUATED)
    text = history.to_csv(tmp_path / "a.csv")
    assert text.splitlines() == [
        "epoch,learning_rate,seconds,train_loss,train_accuracy,full_train_loss,dev_loss,dev_accuracy",
        "0,0.1,0.5,0.7,,,,",
        "1,0.1,0.25,0.6,0.75,0.625,0.7,0.5",
    ]
    assert (tmp_path / "a.csv").read_bytes() == text.encode()
    read = pd.read_csv(tmp_path / "a.csv")
    assert read["train_loss"].tolist() == [0.7, 0.6]
    assert read["dev_loss"].isna().tolist() == [True, False]


@given(histories())
def test_csv_and_back_is_the_same_by_epoch_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, whole: History
) -> None:
    history = dataclasses.replace(whole, eval_epoch=sorted(whole.eval_epoch))
    if not any(getattr(history, name) for name in BY_EVALUATION):  # what nobody measured is no evaluation
        history.eval_epoch = []
    file = tmp_path_factory.mktemp("csv") / "a.csv"
    history.to_csv(file)
    read = History.from_csv(file)
    for name in ("eval_epoch", *COLUMNS):
        assert getattr(read, name) == getattr(history, name), name


def test_a_csv_that_grows_is_read_up_to_its_last_whole_row(tmp_path: Path) -> None:
    file, text = tmp_path / "a.csv", example().to_csv()
    head, first, _ = text.splitlines(keepends=True)
    for size in range(len(head), len(text) + 1):
        file.write_text(text[:size])
        assert History.from_csv(file).epoch == [0, 1][: text[len(head) : size].count("\n")]
    file.write_text(f"{head}{first}".replace("\n", "\r\n"), newline="")
    assert History.from_csv(file).train_loss == [0.7]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "does not begin with the line epoch,learning_rate,"),
        ("a,b\n1,2\n", "does not begin with the line epoch,learning_rate,"),
        ("HEAD\n0,1,1\n", "line 2 is no row of a history: '0,1,1'"),
        ("HEAD\n0,1,1,1,,,,\n1,1,1,fast,,,,\n", "line 3 is no row of a history: '1,1,1,fast,,,,'"),
        ("HEAD\n0,1,1,1,,,,\n1,1,,1,,,,\n", "seconds has 1 values, epoch has 2"),
    ],
)
def test_a_foreign_csv_is_said_with_its_file_and_line(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(text.replace("HEAD", ",".join(COLUMNS)))
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        History.from_csv(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_the_seconds_within_a_stage_are_added_also_when_it_fails() -> None:
    history = History()
    with history.stage("save"):
        first = time.perf_counter()
        while time.perf_counter() == first:
            pass
    spent = history.timings["save"]
    assert spent > 0.0
    with pytest.raises(OSError, match="full"), history.stage("save"):
        raise OSError("full")
    assert history.timings["save"] > spent
    assert sum(history.timings.values()) == history.timings["save"]


def test_the_time_table_has_a_line_and_a_share_for_each_stage() -> None:
    history = History(timings={"read": 1.0, "decode": 0.0, "move": 0.0, "train": 2.0, "evaluate": 1.0, "save": 0.0})
    lines = history.time_table().splitlines()
    assert lines[0] == "time by stage:"
    assert [line.split()[0] for line in lines[1:]] == list(STAGES)
    assert lines[4].split() == ["train", "2.00", "s", "50.0%"]
    assert History().time_table().count("0.0%") == len(STAGES)


def test_a_run_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert len(example().plot(tmp_path / "run.png").axes) == 8
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no epochs"):
        History().plot()
