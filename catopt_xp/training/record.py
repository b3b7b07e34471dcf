"""What a history holds: the names of its lists, and whether they fit together and can be drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LONGEST_TIME = 1e12  # seconds: no run takes longer, and their sum is finite
LARGEST_RATE = 1e300  # of learning, beyond which an axis has no room
BY_EPOCH = ("learning_rate", "seconds", "train_loss")
BY_EVALUATION = ("train_accuracy", "full_train_loss", "dev_loss", "dev_accuracy")


def check_history(history: Mapping[str, Any], where: str) -> None:
    """Raises ValueError, in one line that begins with `where`, unless a history's fields have their types and lengths.

    `history`: as for `plot_history`; what is missing is taken as empty. A list has a number for each epoch, or for each
    evaluated one, or is empty.

    >>> check_history({"epoch": [0, 1], "seconds": [0.5]}, "run.json")
    Traceback (most recent call last):
    ValueError: run.json: seconds has 1 values, epoch has 2; give a history as train wrote it
    """
    wrong = _wrong_in(history)
    if wrong is not None:
        raise ValueError(f"{where}: {wrong}; give a history as train wrote it")


def _wrong_in(history: Mapping[str, Any]) -> str | None:
    for key in ("epoch", "eval_epoch", *BY_EPOCH, *BY_EVALUATION, "mini_batch_loss"):
        kind, what = (int, "whole numbers") if key.endswith("epoch") else (int | float, "numbers")
        values = history.get(key, [])
        if not isinstance(values, list | tuple) or not all(isinstance(x, kind) and is_drawable(x) for x in values):
            return f"{key} is not a list of {what}"
    for key in ("timings", "run"):
        if not isinstance(history.get(key, {}), Mapping):
            return f"{key} is no table of names and values"
    if not all(map(is_drawable, history.get("timings", {}).values())):
        return "timings holds more than numbers"
    for along, keys in (("epoch", BY_EPOCH), ("eval_epoch", BY_EVALUATION)):
        wanted = len(history.get(along, []))
        for key in keys:
            if len(history.get(key, [])) not in (0, wanted):
                return f"{key} has {len(history[key])} values, {along} has {wanted}"
    foreign = set(history.get("eval_epoch", [])) - set(history.get("epoch", []))
    return f"eval_epoch has {min(foreign)}, epoch has not" if foreign else None


def is_drawable(x: object) -> bool:
    """Whether this is a number, and a whole one no larger than an array holds."""
    return isinstance(x, float) or (isinstance(x, int) and abs(x) < 1 << 63)
