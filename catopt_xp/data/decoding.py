"""Photographs from files to uint8 pixels, in parallel."""

from __future__ import annotations

import errno
import itertools
import os
import struct
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.machine import thread_count
from catopt_xp.backend.ranks import Ranks
from catopt_xp.data.dataset import DataArgumentError, check_memory, check_on_error, checked_img_shape
from catopt_xp.io.console import Bar, one_line, plain, warn

if TYPE_CHECKING:
    from PIL import Image

FORMATS = (
    "JPEG",
    "PNG",
    "GIF",
    "BMP",
    "WEBP",
)  # by content: collections hold such pictures under the name .jpg
# Eighths of img_shape that a reduced JPEG must still have. At 7 the mean error is below that of taking two neighbours
# out of a whole one, which is what the chapter's resize does: 3.0 against 3.7 levels, from 500x400 to 224x224.
REDUCED = 7
TOLD = 20  # skipped photographs that a warning names
RUN = 8  # photographs that a thread takes at a time: one by one, waking the thread that counts costs a tenth
STRIP = 1 << 20  # pixels of a picture that are converted at a time, where they take more memory meanwhile
_ORIENTATION = 0x0112  # the EXIF tag
_LYING = ("ROTATE_90", "ROTATE_270", "TRANSPOSE", "TRANSVERSE")  # turns that swap width and height


def decode_images(
    files: Sequence[str | os.PathLike[str]],
    img_shape: tuple[int, int] = (224, 224),
    on_error: str = "raise",
    progress: bool | None = None,
) -> NDArray[np.uint8]:
    """Decode photographs into one array.

    files: JPEG or PNG files of any size and mode. img_shape: (width, height) in pixels, to which each is
    resized.
    on_error: "raise" stops at the first file that cannot be decoded; "skip" leaves such files out, with a
    warning naming them (20 at most).
    progress: show a bar; None: when stderr is a terminal.
    Returns uint8 pixels (m, n_x), a row for each photograph, its values through height, width, channel (RGB).
    Raises ValueError or FileNotFoundError, naming the file, where one cannot be decoded; ValueError where none
    is left, for another `on_error` or a wrong shape; OSError or MemoryError, skipping or not, where the machine
    fails and not the photograph.

    >>> import tempfile, pathlib
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder) / "red.png"
    ...     Image.new("RGB", (8, 8), (255, 0, 0)).save(file)
    ...     decode_images([file], img_shape=(2, 1)).tolist()
    [[255, 0, 0, 255, 0, 0]]
    """
    if "" in files:  # which Path would take for the current folder
        raise DataArgumentError("files: an empty name, where the file of a photograph is expected")
    rows, broken = decode_files([Path(file) for file in files], checked_img_shape(img_shape), on_error, progress)
    check_some_decoded([Path(file) for file in files], broken)
    warn_of_skipped(broken)
    return rows


def decode_files(
    files: Sequence[Path], img_shape: tuple[int, int], on_error: str, progress: bool | None = None
) -> tuple[NDArray[np.uint8], dict[int, str]]:
    """As `decode_images`, but says nothing of skipped files.

    Returns the rows of the files that decode, and for each other file its place in `files` and what is wrong
    with it.
    """
    from PIL import Image

    check_on_error(on_error)
    n_x = img_shape[0] * img_shape[1] * 3
    what = "1 photograph" if len(files) == 1 else f"{len(files)} photographs"
    check_memory(f"the {img_shape[0]}x{img_shape[1]} pixels of {what}", len(files) * n_x)
    rows = np.empty((len(files), n_x), dtype=np.uint8)
    broken: dict[int, str] = {}

    def decode_run(first: int) -> list[Exception | None]:
        errors: list[Exception | None] = []
        for k in range(first, min(first + RUN, len(files))):
            try:
                rows[k] = decode_image(files[k], img_shape).reshape(-1)
                errors.append(None)
            except (ValueError, FileNotFoundError) as error:  # the photograph's fault; any other is the machine's
                errors.append(error)
        return errors

    # Warning filters belong to the whole process, so they are set here once and not in the threads.
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        pool = ThreadPoolExecutor(thread_count())  # Pillow decodes and resizes without the interpreter's lock
        try:
            errors = itertools.chain.from_iterable(pool.map(decode_run, range(0, len(files), RUN)))
            hidden = None if progress is None else not progress  # None: no bar unless stderr is a terminal
            bar = Bar(errors, total=len(files), desc="decoding", unit="photograph", leave=False, disable=hidden)
            for k, error in enumerate(bar):
                if error is not None:
                    if on_error == "raise":
                        raise error
                    broken[k] = one_line(error)
        finally:
            pool.shutdown(cancel_futures=True)
    if remarks:
        warn(
            f"Pillow remarked on {len(remarks)} of the photographs, which decoded all the same; "
            f"the first remark: {one_line(remarks[0].message)}"
        )
    return (np.delete(rows, list(broken), axis=0) if broken else rows), broken


class SharedDecoding:
    """`decode_files` by several ranks together: each decodes a share of the files, and has its columns of all rows.

    It is called within `ranks.agreed()`, by all ranks alike. `shares_of`: from the number of features to the columns of
    every rank. `used`: whether it has been called, and the set holds this rank's columns already.
    """

    def __init__(self, ranks: Ranks, shares_of: Callable[[int], Sequence[slice]]) -> None:
        self.ranks, self.shares_of, self.used = ranks, shares_of, False

    def __call__(
        self, files: Sequence[Path], img_shape: tuple[int, int], on_error: str, progress: bool | None = None
    ) -> tuple[NDArray[np.uint8], dict[int, str]]:
        """As `decode_files`; the rows are (m, columns of this rank), broken files are those of all ranks."""
        ranks, n_x = self.ranks, img_shape[0] * img_shape[1] * 3
        shares, self.used = self.shares_of(n_x), True
        start, stop = len(files) * ranks.rank // ranks.size, len(files) * (ranks.rank + 1) // ranks.size
        rows: NDArray[np.uint8] = np.empty((0, n_x), dtype=np.uint8)
        broken: dict[int, str] = {}
        if start < stop:
            rows, broken = decode_files(files[start:stop], img_shape, on_error, progress)
        places = ranks.everyone({start + place: text for place, text in broken.items()})
        return ranks.columns_of(rows, shares), {place: text for some in places for place, text in some.items()}


def check_some_decoded(files: Sequence[Path], broken: dict[int, str]) -> None:
    """Raises ValueError where none of the files decodes."""
    if len(broken) == len(files):
        raise ValueError(next(iter(broken.values()), "no photographs given"))


def warn_of_skipped(broken: dict[int, str]) -> None:
    """One warning that names the skipped files, the first ones where they are many."""
    if broken:
        told = "; ".join(list(broken.values())[:TOLD]) + f"; and {len(broken) - TOLD} more" * (len(broken) > TOLD)
        warn(f"skipped {len(broken)} that cannot be decoded: {told}")


def decode_image(file: Path, img_shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Decode one photograph: upright, RGB, over white where it is transparent, resized: (height, width, 3).

    A JPEG file is decoded at a half, a quarter or an eighth of its size where that leaves 7/8 of `img_shape` or more:
    which is faster. Raises ValueError, naming the file, where it cannot be decoded; OSError (of the kind
    that it was) where it cannot be read; MemoryError.
    """
    from PIL import Image, UnidentifiedImageError

    named = plain(file)
    if file.is_dir():
        raise ValueError(f"{named}: a folder, where the file of a photograph is expected")
    if file.exists() and not file.is_file():  # reading a pipe would wait for ever
        raise ValueError(f"{named}: a pipe or a device, where the file of a photograph is expected")
    try:
        with Image.open(file, formats=FORMATS) as image:
            turn = _turn(image)
            lying = turn is not None and turn.name in _LYING
            stored_shape = img_shape[::-1] if lying else img_shape
            width, height = (-(-side * REDUCED // 8) for side in stored_shape)
            image.draft(None, (width, height))  # None: keep the mode
            picture = _rgb(image)
        if picture.size != stored_shape:
            picture = picture.resize(stored_shape, Image.Resampling.BILINEAR)
        return np.asarray(picture if turn is None else picture.transpose(turn))
    except MemoryError as error:
        raise MemoryError(f"{named}: not enough memory to decode it; choose a smaller img_shape") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{named}: refused, too many pixels for a photograph ({one_line(error)})") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{named}: not a photograph that Pillow can read; remove or replace the file") from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        # The system's errors have a number, Pillow's own have none; EINVAL is a damaged offset to which it went,
        # ELOOP a link to itself.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, errno.ELOOP):
            raise type(error)(f"{named}: cannot be read ({error.strerror})") from error
        raise ValueError(f"{named}: damaged photograph ({one_line(error)}); remove or replace the file") from error


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What brings a photograph upright, by its EXIF orientation; None where nothing is to be done."""
    from PIL import Image

    try:
        orientation = int(image.getexif().get(_ORIENTATION, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error) as error:
        warn(f"unreadable EXIF data ({one_line(error)}), taken as upright")
        return None
    return {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: transparent parts over white, 16-bit grey scaled to 8 bits (Pillow cuts it off)."""
    from PIL import Image

    image.load()
    deep = image.mode.startswith("I")
    if deep or image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        picture = Image.new("RGB", image.size)
        rows = max(1, STRIP // image.width)
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(image.height, top + rows)))
            picture.paste(_grey(strip) if deep else _over_white(strip), (0, top))
        return picture
    return image if image.mode == "RGB" else image.convert("RGB")  # even from RGB to RGB is a copy


def _grey(image: Image.Image) -> Image.Image:
    from PIL import Image

    grey = np.rint(np.asarray(image, dtype=np.float64).clip(0, 65535) / 257).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def photograph_size(file: Path) -> tuple[int, int] | None:
    """Width and height of a photograph, upright, from its head alone; None where they cannot be read."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(file, formats=FORMATS) as image:
                turn = _turn(image)
                width, height = image.size
        except Exception:  # whatever is wrong with the file, decoding it raises the error that names it
            return None
    return (height, width) if turn is not None and turn.name in _LYING else (width, height)
