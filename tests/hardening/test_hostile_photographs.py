"""Photographs of any origin: bombs, cut ones, other things under their names; what decodes has its right pixels."""

from __future__ import annotations

import io
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import pytest
from PIL import Image

if sys.platform == "win32":
    pytest.skip("what is watched here is not there on Windows", allow_module_level=True)

from fuzz_targets import TARGETS
from watched_inputs import examine

from catopt_xp.data import decoding
from catopt_xp.data.decoding import decode_images, photograph_size


def refused(content: bytes, tmp_path: Path) -> None:
    assert not examine(TARGETS["png"], content, tmp_path), "it was taken"


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width: int, height: int, depth: int, colour: int, data: bytes, interlaced: int = 0) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    palette = [(b"PLTE", bytes(range(256)) * 3)] if colour == 3 else []
    return mutations.png([(b"IHDR", head), *palette, (b"IDAT", data), (b"IEND", b"")])


def black(width: int, height: int, depth: int, colour: int) -> bytes:
    """A PNG of zeros, written row by row: a thousandth of its pixels' size."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row, packer = bytes(1 + (width * channels * depth + 7) // 8), zlib.compressobj()
    data = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    return png(width, height, depth, colour, data)


def picture(size: tuple[int, int] = (20, 24), mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


def decoded(content: bytes, folder: Path, shape: tuple[int, int] = (9, 7)) -> list[int]:
    (folder / "a.jpg").write_bytes(content)
    row: list[int] = decode_images([folder / "a.jpg"], shape)[0].tolist()
    return row


# ---- bombs -----------------------------------------------------------------------------------------------------------


def test_a_png_of_50000_by_50000_pixels_is_refused(tmp_path: Path) -> None:
    bomb = black(50_000, 50_000, 1, 0)
    assert len(bomb) < 1 << 19
    refused(bomb, tmp_path)
    (tmp_path / "bomb.png").write_bytes(bomb)
    assert photograph_size(tmp_path / "bomb.png") is None
    with pytest.raises(ValueError, match=r"bomb\.png: refused, too many pixels for a photograph") as caught:
        decode_images([tmp_path / "bomb.png"])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("size", [(65535, 65535), (2**31 - 1, 2**31 - 1), (0, 0), (1, 2**31 - 1), (2**31 - 1, 1)])
def test_a_head_that_promises_too_much_is_refused(size: tuple[int, int], tmp_path: Path) -> None:
    refused(png(*size, 8, 2, zlib.compress(b"\0" * 100)), tmp_path)
    jpeg = bytearray(saved(picture(), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", min(65535, size[1]), min(65535, size[0]))
    refused(bytes(jpeg), tmp_path)


# Pixels, depth and colour: those that take most memory while they are converted.
LARGEST = [(6, 8), (4, 8), (0, 16), (3, 8), (2, 16)]


@pytest.mark.parametrize("side", [2000, pytest.param(9400, marks=pytest.mark.long)])
def test_the_largest_photographs_take_no_gigabyte(side: int, tmp_path: Path, record: Callable[..., None]) -> None:
    seconds, peak = {}, {}
    for colour, depth in LARGEST:
        started, before = time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        (tmp_path / "a.png").write_bytes(black(side, side, depth, colour))
        assert decode_images([tmp_path / "a.png"], (8, 8)).shape == (1, 192)
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert more < 10 * side * side + (64 << 20), "what is converted takes memory many times over"
        name = f"colour {colour}, {depth} bits"
        seconds[name], peak[name] = round(time.time() - started, 1), round(more / 1e6)
    record(pixels=side * side, seconds=seconds, megabytes_more_than_before=peak)


MODES: list[tuple[str, dict[str, Any]]] = [
    ("RGBA", {}),
    ("LA", {}),
    ("RGB", {"transparency": (5, 6, 7)}),
    ("L", {"transparency": 9}),
    ("I;16", {}),
]
MODES += [("P", {"transparency": bytes(range(256))}), ("P", {"transparency": 3})]


@pytest.mark.parametrize(("mode", "options"), MODES, ids=[f"{mode} {list(options)}" for mode, options in MODES])
def test_strips_have_the_pixels_of_the_whole(
    mode: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = (
        picture((27, 33), "I").point(lambda v: v * 200).convert("I;16") if mode == "I;16" else picture((27, 33), mode)
    )
    content = saved(image, "PNG", **options)
    whole = decoded(content, tmp_path, (27, 33))
    for pixels in (1, 50, 27 * 33 - 1):
        monkeypatch.setattr(decoding, "STRIP", pixels)
        assert decoded(content, tmp_path, (27, 33)) == whole


def test_bombs_of_text_and_profiles_are_refused_or_left_out(tmp_path: Path) -> None:
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0\1\2\3")),
        (b"IEND", b""),
    ]
    huge = zlib.compress(b"\0" * (200 << 20))
    for name, begin in ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")):
        content = mutations.png([chunks[0], (name, begin + huge), *chunks[1:]])
        started = time.process_time()
        examine(TARGETS["png"], content, tmp_path)
        assert time.process_time() - started < 2.0


def exif(entries: list[tuple[int, int, int, int]], offset: int = 8, follows: int = 0) -> bytes:
    """EXIF data with these entries: tag, type, count, value or offset; `follows`: where the next table would be."""
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", offset) + struct.pack("<H", len(entries)) + table + struct.pack("<I", follows)


EXIF = {
    "a table that follows itself": exif([(0x0112, 3, 1, 6)], follows=8),
    "4294967295 values": exif([(0x0112, 5, 2**32 - 1, 8)]),
    "a value beyond the end": exif([(0x8769, 4, 1, 2**31), (0x0112, 3, 9, 2**31)]),
    "tables within themselves": exif([(0x8769, 4, 1, 8), (0x8825, 4, 1, 8), (0xA005, 4, 1, 8)]),
    "an offset beyond the end": exif([], offset=2**32 - 1),
    "5000 entries": exif([(0x0112, 3, 1, 6)] * 5000),
    "an orientation that is none": exif([(0x0112, 3, 1, 99)]),
    "a text as orientation": exif([(0x0112, 2, 4, 0x41414141)]),
    "no table": b"II*\0",
    "noise": bytes(range(256)),
}


@pytest.mark.parametrize("what", EXIF)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.filterwarnings("ignore:Pillow remarked")
def test_hostile_exif_is_quick_and_harmless(what: str, kind: str, tmp_path: Path) -> None:
    content = (
        saved(picture(), kind, exif=b"Exif\0\0" + EXIF[what]) if len(EXIF[what]) < 65000 else saved(picture(), kind)
    )
    started = time.process_time()
    assert examine(TARGETS["png"], content, tmp_path), "the photograph was refused"
    assert time.process_time() - started < 2.0


# ---- cut ones and other things ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_photograph_cut_at_any_byte_is_refused_or_whole(kind: str, tmp_path: Path) -> None:
    content = saved(picture((6, 5)), kind)
    whole = decoded(content, tmp_path)
    taken = 0
    for length in range(len(content)):
        if examine(TARGETS["png"], content[:length], tmp_path):
            assert decoded(content[:length], tmp_path) == whole, f"cut at {length}"
            taken += 1
    assert taken <= 20, "only what stands behind the pixels may be missing: checksums and the mark of the end"


OTHERS = {
    "nothing": b"",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "XML with entities": b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch sprung) system\n",
    "TIFF": saved(picture(), "TIFF"),
    "PDF": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\n",
    "a program": b"#!/bin/sh\nmkdir sprung\n",
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_photograph_is_refused_whatever_its_name(what: str, tmp_path: Path) -> None:
    refused(OTHERS[what], tmp_path)
    (tmp_path / "a.png").write_bytes(OTHERS[what])
    with pytest.raises(ValueError, match="not a photograph that Pillow can read; remove or replace the file"):
        decode_images([tmp_path / "a.png"])


def test_of_pictures_that_move_the_first_is_taken(tmp_path: Path) -> None:
    first, *others = (Image.new("RGB", (9, 7), (40 * k, 10, 200)) for k in range(5))
    for kind in ("PNG", "GIF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = saved(first, kind, save_all=True, append_images=others, duration=10, **options)
        assert np.abs(np.array(decoded(content, tmp_path)[:3]) - (0, 10, 200)).max() <= 8  # GIF has a palette


def test_an_interlaced_png_has_the_same_pixels(tmp_path: Path) -> None:
    pixels = np.asarray(picture((20, 24)))
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = [b"\0" + row.tobytes() for top, left, dy, dx in passes for row in pixels[top::dy, left::dx]]
    content = png(20, 24, 8, 2, zlib.compress(b"".join(rows)), interlaced=1)
    assert decoded(content, tmp_path, (20, 24)) == pixels.ravel().tolist()


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_jpeg_files_of_every_mode_and_progressive_ones(mode: str, tmp_path: Path) -> None:
    image = picture((16, 16), mode)
    for options in ({}, {"progressive": True}, {"optimize": True}):
        content = saved(image, "JPEG", quality=95, subsampling=0, **options)
        opened = Image.open(io.BytesIO(content)).convert("RGB")
        assert decoded(content, tmp_path, (16, 16)) == np.asarray(opened).ravel().tolist()
