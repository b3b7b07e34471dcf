"""Histories whose numbers have the right types and cannot be drawn: `plot` refuses them in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("what is watched here is not there on Windows", allow_module_level=True)

from fuzz_targets import TARGETS
from watched_inputs import examine

from catopt_xp.training.history import History
from catopt_xp.training.plots import plot_comparison, plot_history

INF, NAN = float("inf"), float("nan")
HISTORY: dict[str, Any] = {
    "epoch": [0, 1],
    "seconds": [1.0, 1.0],
    "learning_rate": [0.1, 0.1],
    "eval_epoch": [0],
    "full_train_loss": [0.7],
    "timings": {"train": 2.0},
}
TIMES: list[dict[str, Any]] = [
    *({"seconds": [1.0, time]} for time in (INF, -1.0, NAN, 1.7e308)),
    *({"timings": {"train": time}} for time in (INF, -1.0, NAN)),
]
RATES: list[dict[str, Any]] = [{"learning_rate": [0.1, rate]} for rate in (INF, 1.7e308)]


@pytest.mark.parametrize("change", [*TIMES, *RATES], ids=str)
def test_times_and_rates_that_have_no_axis_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    history = HISTORY | change
    told = "no time; give a history" if change in TIMES else "learning_rate has a number above 1e\\+300"
    with pytest.raises(ValueError, match=f"^plot_history: .*{told}"):
        plot_history(history)
    with pytest.raises(ValueError, match=f"^plot_comparison: run 'a': .*{told}"):
        plot_comparison({"a": history})
    assert not examine(TARGETS["plot"], json.dumps(history).encode(), tmp_path)
    assert History.from_json(json.dumps(history)).to_csv(), "it is read all the same"


def test_the_history_itself_is_drawn() -> None:
    assert plot_history(HISTORY).axes
