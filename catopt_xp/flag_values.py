"""The values of the flags: from the text that was typed to a number, a path, a shape or a schedule. Floor F5.

Each is a `type` of argparse: it returns the value or raises ArgumentTypeError, to which argparse adds the flag.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from catopt_xp.backend.machine import memory_size
from catopt_xp.optim.schedules import Scheduler, parse


def _number(text: str, kind: Callable[[str], Any], good: Callable[[Any], bool], wanted: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not good(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def count(text: str) -> int:
    """A whole number of at least 1."""
    return int(_number(text, int, lambda n: n >= 1, "a whole number of at least 1"))


def whole(text: str) -> int:
    """A whole number of at least 0."""
    return int(_number(text, int, lambda n: n >= 0, "a whole number of at least 0"))


seed = whole


def positive(text: str) -> float:
    """A finite number above 0."""
    return float(_number(text, float, lambda x: 0.0 < x < math.inf, "a number above 0"))


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    return float(_number(text, float, lambda x: 0.0 <= x < math.inf, "a number of at least 0"))


def share(text: str) -> float:
    """A number of at least 0 and below 1."""
    return float(_number(text, float, lambda x: 0.0 <= x < 1.0, "a number of at least 0 and below 1"))


def batch_size(text: str) -> int | str:
    """A whole number of at least 1, or "auto"."""
    if text == "auto":
        return text
    return int(_number(text, int, lambda n: n >= 1, "a whole number of at least 1, or auto"))


def name(text: str) -> str:
    """The name of a file or folder, which is not empty: an empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a file or folder is expected, the text is empty")
    return text


def path(text: str) -> Path:
    """A path, from a text that is not empty."""
    return Path(name(text))


def file_name(text: str) -> str:
    """A file name without a folder."""
    if text in ("", "..") or not text.isprintable() or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain file name, without a folder")
    return text


def layers(text: str) -> tuple[int, ...]:
    """Units of the hidden layers: "30,20,20"; "none" for none."""
    if text == "none":
        return ()
    return tuple(count(part) for part in text.split(","))


def counts(text: str) -> tuple[int, ...]:
    """Whole numbers of at least 1: "8,64"."""
    return tuple(count(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Names, none twice: "panels,plain"."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def shape(text: str) -> tuple[int, int]:
    """Width and height in pixels: "224x224"."""
    width, cross, height = text.partition("x")
    if not cross:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 224x224")
    return count(width), count(height)


def memory(text: str) -> int:
    """Bytes, with a unit or without: "500MB"."""
    try:
        return memory_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def schedule(text: str) -> Scheduler:
    """A learning-rate schedule, as `schedules.parse` reads it."""
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
