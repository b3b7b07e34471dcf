"""What every source of data answers: a `DataSet`. Floor F2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


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
    """The shape as (width, height); raises ValueError unless it is two whole numbers from 1.

    >>> checked_img_shape([224, 112])
    (224, 112)
    """
    try:
        width, height = img_shape
        whole = (int(width), int(height))
    except (TypeError, ValueError):
        whole = (0, 0)
    if min(whole) < 1 or whole != tuple(img_shape):
        raise ValueError(f"img_shape: must be (width, height) in whole pixels from 1, got {img_shape!r}")
    return whole


def checked_size(name: str, size: int | None, least: int) -> None:
    """Raise ValueError unless `size` is None (all) or a whole number from `least`."""
    if size is not None and (size != int(size) or size < least):
        raise ValueError(f"{name}: must be a whole number from {least}, or None for all, got {size!r}")
