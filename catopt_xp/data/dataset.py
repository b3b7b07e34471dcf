"""What every source of data answers: a `DataSet`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from catopt_xp.backend.machine import address_room, host_free_memory

ON_ERROR = ("raise", "skip")
SMALLER_PICTURES = "choose a smaller img_shape, or fewer pictures (train_size, dev_size)"


class DataArgumentError(ValueError):
    """Arguments that cannot be meant, or do not go with the data: what is to be changed is the call, not the data."""


@dataclass
class DataSet:
    """Samples and labels for training and development.

    train_X, dev_X: (n_x, m), one sample a column; uint8 means pixels 0..255. Sets of pictures are
    sample-major (`X.T` is C-contiguous) and may be read-only memory maps. The values of a picture run through
    height, width, channel (RGB).
    train_Y, dev_Y: (1, m) whole numbers. Of cats and dogs, cats are 1. dev_X and dev_Y are None where there
    is no dev set.
    classes: the name of each label, by its number; empty where the labels have no names.
    name: what the data is, for the first line of a run.
    img_shape: (width, height) in pixels, None for data that is not known to be pictures.
    timings: seconds of "read" (listing, mapping or loading files) and "decode" (decoding photographs, or
    drawing).
    notices: lines that the user should see once.
    """

    train_X: Any
    train_Y: Any
    dev_X: Any = None
    dev_Y: Any = None
    classes: tuple[str, ...] = ()
    name: str = "arrays"
    img_shape: tuple[int, int] | None = None
    timings: dict[str, float] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def checked_img_shape(img_shape: Sequence[int]) -> tuple[int, int]:
    """The shape as (width, height); raises DataArgumentError unless it is two whole numbers from 1.

    >>> checked_img_shape([224, 112])
    (224, 112)
    """
    try:
        width, height = img_shape
        whole = (int(width), int(height))
    except (TypeError, ValueError, OverflowError):
        whole = (0, 0)
    if min(whole) < 1 or whole != tuple(img_shape):
        raise DataArgumentError(f"img_shape: must be (width, height) in whole pixels from 1, got {img_shape!r}")
    return whole


def checked_size(name: str, size: Any, least: int) -> int | None:
    """The size as a plain int, or None (all); raises DataArgumentError unless it is a whole number from `least`."""
    return None if size is None else checked_whole(name, size, least, ", or None for all")


def checked_whole(name: str, value: Any, least: int, besides: str = "") -> int:
    """The number as a plain int; raises DataArgumentError, naming it, unless it is a whole number from `least`.

    >>> checked_whole("seed", 3, 0)
    3
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise DataArgumentError(f"{name}: must be a whole number from {least}{besides}, got {value!r}")
    return number


def check_on_error(on_error: str) -> None:
    """Raise DataArgumentError unless `on_error` says "raise" or "skip"."""
    if on_error not in ON_ERROR:
        raise DataArgumentError(f'on_error: {on_error!r} is not known; use "raise" or "skip"')


def check_memory(what: str, needed: int, cure: str = SMALLER_PICTURES) -> None:
    """Raise DataArgumentError where something needs more memory than there is.

    what: its name, a plural, and cure: what to do, both for the message. needed: bytes.
    """
    try:
        free = max(0, min(host_free_memory(), address_room()))
    except OSError:  # a system that does not tell: there the allocation itself fails, or does not
        return
    if needed > free:
        raise DataArgumentError(f"{what} need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; {cure}")
