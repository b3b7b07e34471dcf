"""Where samples come from: photographs, the built-in drawings, .npz files and arrays; and the order in which
they are trained.

Floor F2. Importing this loads no Pillow: the modules import it inside the functions that decode or draw.
"""

from __future__ import annotations

from catopt_xp.data.dataset import DataSet
from catopt_xp.data.decoding import decode_images
from catopt_xp.data.drawings import get_drawn_set
from catopt_xp.data.order import batches, epoch_order
from catopt_xp.data.photographs import get_cat_set, get_photograph_set
from catopt_xp.data.sources import load_data

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
