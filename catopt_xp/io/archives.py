"""Arrays out of `.npz` archives of any origin: each read whole, or refused in one line.

Nothing is unpickled, no name of a member is taken for a path, and no more memory is asked for than is free.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from catopt_xp.io.console import one_line, plain

LARGE = 1 << 30  # bytes in all, from which on an archive may not be packed tighter than
TIGHTEST = 100  # times: arrays are not, but zeros are, to a thousandth

HostArrays = dict[str, np.ndarray[Any, Any]]


def read_arrays(path: Path, room: int, names: Collection[str] | None = None) -> tuple[HostArrays, list[str]]:
    """Arrays of an archive by name, and the names of all that it has.

    `room`: bytes of memory that the arrays may take; `names`: the arrays that are wanted (None: all).

    Every byte that is read is checked against the archive's checksums. Raises ValueError, in one line that begins with
    what cannot be read, for a damaged, foreign or pickled file, for one with two arrays of a name, for one that unpacks
    to more than `room`, or to more than 1 GiB and 100 times its size.
    """
    part = "the archive"
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            if len(members) != len(archive.infolist()):
                raise ValueError("it has two arrays of the same name")
            wanted = {name: member for name, member in members.items() if names is None or name in names}
            _check_size(list(wanted.values()), os.path.getsize(path), room)
            arrays = {}
            for name, member in wanted.items():
                part = member.filename
                arrays[name] = _read_member(archive, member)
    except MemoryError as error:
        raise MemoryError(f"to read {path}") from error
    except Exception as error:  # zipfile, its decompressors and NumPy's parser raise almost anything at damaged bytes
        raise ValueError(f"{plain(part)} cannot be read ({one_line(error)})") from error
    return arrays, list(members)


def _check_size(members: list[zipfile.ZipInfo], file_size: int, room: int) -> None:
    """Refuses what would fill the memory. No member gives more bytes than the archive says here."""
    packed, unpacked = sum(member.compress_size for member in members), sum(member.file_size for member in members)
    if packed > file_size:
        raise ValueError("its members overlap")
    if unpacked > LARGE and unpacked > TIGHTEST * packed:
        told = f"it unpacks to {unpacked / 1e9:.1f} GB, more than {TIGHTEST} times its size"
        raise ValueError(f"{told}; save arrays like that with numpy.savez, which does not pack them")
    if unpacked > room:
        raise ValueError(f"it takes {unpacked / 1e9:.1f} GB of memory, {room / 1e9:.1f} GB are free")


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
    with archive.open(info) as member:
        try:
            array: np.ndarray[Any, Any] = np.lib.format.read_array(member, allow_pickle=False)
        except MemoryError as error:
            shape, dtype = getattr(error, "shape", ()), getattr(error, "dtype", np.dtype(np.uint8))  # NumPy's says both
            if math.prod(shape) * dtype.itemsize > info.file_size:
                raise ValueError("its header asks for more than it holds") from error
            raise
        # Read to its end, for that is where the checksum is compared.
        if member.read(1):
            raise ValueError("it is longer than its header says")
    return array
