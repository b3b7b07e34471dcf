"""Data sets: from files, folders, arrays or drawings to rows on a device, whole or streamed."""

from __future__ import annotations

from catopt_xp.data.dataset import DataSet
from catopt_xp.data.decoding import decode_images
from catopt_xp.data.drawn.drawings import get_drawn_set
from catopt_xp.data.load import load_data
from catopt_xp.data.order import batches, epoch_order
from catopt_xp.data.photographs import get_cat_set, get_photograph_set

__all__ = [
    "DataSet",
    "batches",
    "decode_images",
    "epoch_order",
    "get_cat_set",
    "get_drawn_set",
    "get_photograph_set",
    "load_data",
]
