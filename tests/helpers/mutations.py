"""Mutations of files that stay files: of archives with right checksums, array headers, JSON, PNG chunks, or bare bytes.

What changes bytes alone is stopped by the first checksum; these reach what lies behind it. All of them draw from the
generator that they are given, so that a seed repeats them.
"""

from __future__ import annotations

import ast
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 255, 256, -(2**31), 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**12, 10**40, 10**400),
    *(0.5, -0.5, 1.0, -0.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")),
)
TEXTS = (
    *("", ".", "..", "../../x", "/etc/passwd", "C:\\x", "a/b", "meta", "model/W0", "\0", "a\nb", "\x1b[2J", "\ud800"),
    *("é" * 300, "x" * 5000, "adam", "Adam", "relu", "float16", "object", "1e400", "None", "{", "[[[["),
)
DTYPES = (
    "|O",
    "<f2",
    "<f4",
    ">f8",
    "<c16",
    "|b1",
    "|u1",
    "<U3",
    "|S0",
    "|V0",
    "<M8[ns]",
    "<i8",
    "<f16",
    "x",
    "<U99999999",
)
TOKENS = (
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\n",
    b"\x1b[2J",
    b"-1",
    b"1e999",
    b"NaN",
    b"[" * 9,
)
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, inserted, removed, repeated, or cut off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif kind == 2:
            changed[at:at] = rng.choice(TOKENS)
        elif kind == 3:
            del changed[at : at + rng.randint(1, 8)]
        elif kind == 4:
            changed[at:at] = changed[at : at + rng.randint(1, 64)]
        elif rng.random() < 0.2:
            del changed[at:]
        else:
            token = rng.choice(TOKENS)
            changed[at : at + len(token)] = token
    return bytes(changed)


def mutated_value(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """A JSON value with one of its parts replaced, removed, added or turned into another type."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.08:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.14:
            return value | {rng.choice(TEXTS): value[key]}
        return value | {key: mutated_value(value[key], rng, depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.15:
            return value[:at] + value[at + 1 :]
        if kind < 0.3:
            return value[:at] + [value[at]] * rng.choice((2, 3, 100)) + value[at:]
        return [*value[:at], mutated_value(value[at], rng, depth + 1), *value[at + 1 :]]
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(NUMBERS)
    if kind < 0.6:
        return rng.choice(TEXTS)
    if kind < 0.7 and isinstance(value, str):
        return mutated_bytes(value.encode("utf-8", "surrogatepass"), rng).decode("utf-8", "replace")
    others: tuple[Any, ...] = (None, True, False, [], {}, [value], {"a": value}, [[value]] * 3, [0.5] * 3, [[[[[]]]]])
    return rng.choice(others)


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    """JSON text with a mutated value; now and then nested deeper than a parser may follow, or changed byte by byte."""
    if rng.random() < 0.25:
        return mutated_bytes(data, rng)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutated_bytes(data, rng)
    for _ in range(rng.randint(1, 3)):
        value = mutated_value(value, rng)
    text = _json(value)
    if rng.random() < 0.01:
        deep = rng.choice((b"[", b'{"a":')) * 20000
        text = text.replace(b"0", deep, 1) if b"0" in text else deep
    return text


def _json(value: Any) -> bytes:
    # Python refuses to write whole numbers of more than 4300 digits; none here are that long.
    return json.dumps(value).encode()


def mutated_npy(data: bytes, rng: random.Random) -> bytes:
    """An .npy file with another header, written as one or not, or with other bytes behind it."""
    parts = _npy_parts(data)
    if parts is None or rng.random() < 0.3:
        return mutated_bytes(data, rng)
    header, body = parts
    kind = rng.random()
    if kind < 0.2:
        return npy_file(header, mutated_bytes(body, rng))
    version = rng.choice(((1, 0), (1, 0), (2, 0), (3, 0), (0, 0), (4, 9)))
    try:
        facts = ast.literal_eval(header)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return npy_file(mutated_bytes(header.encode("latin-1", "replace"), rng).decode("latin-1"), body, version)
    if kind < 0.3:
        return npy_file(mutated_bytes(header.encode(), rng).decode("latin-1"), body, version)
    if kind < 0.4 or not isinstance(facts, dict):
        expressions = ("__import__('os').mkdir('sprung')", "(" * 300, "{'descr': " * 90, "9" * 5000, "[" * 3000)
        return npy_file(rng.choice(expressions), body, version)
    found = facts.get("shape")
    shape: tuple[Any, ...] = found if isinstance(found, tuple) else ()
    shapes = [(*shape, rng.choice(NUMBERS)), tuple(rng.choice(NUMBERS) for _ in shape), shape[1:], shape[::-1]]
    changes: list[dict[Any, Any]] = [
        {"shape": rng.choice([*shapes, (), (1,) * 70, 5, None, "x", (2**62, 4), (-1, -3), (True, 2)])},
        {"descr": rng.choice([*DTYPES, [("a", "<f4"), ("b", "|O")], [("a", "<f4", (99999, 99999))], None, 7, ["x"]])},
        {"fortran_order": rng.choice([True, False, None, 2, "x"])},
        {rng.choice(TEXTS): 1},
    ]
    facts = facts | rng.choice(changes)
    if rng.random() < 0.1:
        facts.pop(rng.choice(list(facts)))
    return npy_file(repr(facts), body, version)


def _npy_parts(data: bytes) -> tuple[str, bytes] | None:
    """Header text and body of an .npy file; None for other bytes."""
    if data[:6] != b"\x93NUMPY" or len(data) < 12:
        return None
    size, start = (struct.unpack("<H", data[8:10])[0], 10) if data[6] == 1 else (struct.unpack("<I", data[8:12])[0], 12)
    return data[start : start + size].decode("latin-1"), data[start + size :]


def npy_file(header: str, body: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    """An .npy file with any text as its header."""
    text = header.encode("utf-8", "surrogatepass")
    if version[0] == 1 and len(text) < 65000:
        text += b" " * (-(len(text) + 11) % 64) + b"\n"
        return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(text)) + text + body
    text += b" " * (-(len(text) + 13) % 64) + b"\n"
    return b"\x93NUMPY" + bytes(version if version[0] > 1 else (2, 0)) + struct.pack("<I", len(text)) + text + body


def mutated_npz(data: bytes, rng: random.Random) -> bytes:
    """An archive with another member, name, order or compression, whose checksums are right again."""
    if rng.random() < 0.15:
        return mutated_bytes(data, rng)
    members = _members(data)
    if not members:
        return mutated_bytes(data, rng)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(members))
        name, content = members[at]
        kind = rng.random()
        if kind < 0.45 and any(member == "meta.npy" for member, _ in members):
            at = next(k for k, (member, _) in enumerate(members) if member == "meta.npy")
            members[at] = "meta.npy", _mutated_meta(members[at][1], rng)
        elif kind < 0.75:
            members[at] = name, mutated_npy(content, rng)
        elif kind < 0.83:
            del members[at]
        elif kind < 0.9:
            members.insert(rng.randrange(len(members) + 1), (name, rng.choice(members)[1]))
        elif kind < 0.95:
            members[at] = rng.choice([member for member, _ in members] + [f"{text}.npy" for text in TEXTS]), content
        else:
            rng.shuffle(members)
        if not members:
            break
    return archive(members, rng.choice(COMPRESSIONS) if rng.random() < 0.2 else zipfile.ZIP_STORED)


def _members(data: bytes) -> list[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            infos = file.infolist()
            if sum(info.file_size for info in infos) > 1 << 20:
                return []
            return [(info.filename, file.read(info)) for info in infos]
    except Exception:  # whatever a damaged archive raises: it is not taken apart
        return []


def _mutated_meta(content: bytes, rng: random.Random) -> bytes:
    parts = _npy_parts(content)
    if parts is None:
        return mutated_bytes(content, rng)
    text = mutated_json(parts[1], rng)
    return npy_file(repr({"descr": "|u1", "fortran_order": False, "shape": (len(text),)}), text)


def archive(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive of these members, in this order; names may be doubled, or be none that a file can have."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, content in members:
            info = zipfile.ZipInfo("x")
            info.filename = name.encode("utf-8", "replace").decode()  # past what the constructor cuts off
            info.compress_type = compression
            if info.filename not in file.NameToInfo:
                file.writestr(info, content)
                continue
            known = file.NameToInfo.pop(info.filename)  # or a warning is given for the second
            file.writestr(info, content)
            file.NameToInfo[known.filename] = known
    return stream.getvalue()


def mutated_png(data: bytes, rng: random.Random) -> bytes:
    """A PNG file with chunks changed, moved, removed or doubled, their checksums right again."""
    if rng.random() < 0.25 or data[:8] != b"\x89PNG\r\n\x1a\n":
        return mutated_bytes(data, rng)
    chunks: list[tuple[bytes, bytes]] = []
    at = 8
    while at + 8 <= len(data):
        size = struct.unpack(">I", data[at : at + 4])[0]
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    for _ in range(rng.randint(1, 3) if chunks else 0):
        at = rng.randrange(len(chunks))
        name, body = chunks[at]
        kind = rng.randrange(6)
        if kind == 0 and name == b"IHDR" and len(body) == 13:
            depth, colour = rng.choice((1, 2, 4, 8, 16, 7)), rng.choice((0, 2, 3, 4, 6, 9))
            sides = [rng.choice((0, 1, 7, 8, 64, 8192, 65535, 2**31 - 1, 2**32 - 1)) for _ in range(2)]
            body = struct.pack(">IIBBBBB", *sides, depth, colour, 0, 0, rng.randrange(3))
            chunks[at] = name, body
        elif kind == 1:
            chunks[at] = name, mutated_bytes(body, rng)
        elif kind == 2 and len(chunks) > 1:
            del chunks[at]
        elif kind == 3:
            chunks.insert(rng.randrange(len(chunks) + 1), chunks[at])
        elif kind == 4:
            extra = rng.choice(
                (b"eXIf", b"tRNS", b"PLTE", b"zTXt", b"iTXt", b"iCCP", b"acTL", b"fcTL", b"fdAT", b"tEXt")
            )
            content = rng.choice(
                (b"", b"a\0\0" + zlib.compress(b"\0" * 5000), bytes(rng.randrange(256) for _ in range(30)))
            )
            chunks.insert(min(1, len(chunks)), (extra, content))
        elif name == b"IDAT":
            chunks[at] = name, zlib.compress(mutated_bytes(b"\0" * 64, rng))
    return png(chunks)


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG file of these chunks."""
    parts = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def mutated_jpeg(data: bytes, rng: random.Random) -> bytes:
    """A JPEG file with a changed head (sizes, tables, EXIF), or with changed bytes anywhere."""
    head = bytearray(data)
    if rng.random() < 0.3 and b"\xff\xc0" in data:
        at = data.index(b"\xff\xc0")
        head[at + 5 : at + 9] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\x01\xff\xff", b"\x20\0\x20\0"))
        return bytes(head)
    if rng.random() < 0.3 and b"Exif\0\0" in data:
        at = data.index(b"Exif\0\0")
        return data[:at] + mutated_bytes(data[at : at + 80], rng) + data[at + 80 :]
    return mutated_bytes(data, rng)


def mutated_words(data: bytes, rng: random.Random) -> bytes:
    """Text as it is typed: parts replaced by numbers and signs that a parser may stumble over."""
    parts = data.decode("utf-8", "replace").split("\n")
    at = rng.randrange(len(parts))
    signs = ("e", "+", "-", ",", "=", ":", "x", "_", " ", ".", "(", "warmup(", "\0", "\x1b[0m", "٣", "MB")
    if rng.random() < 0.5:
        cut = rng.randrange(len(parts[at]) + 1)
        inserted = rng.choice((*signs, *map(str, NUMBERS), *(text[:200] for text in TEXTS)))
        parts[at] = parts[at][:cut] + inserted + parts[at][cut + rng.randrange(3) :]
    else:
        return mutated_bytes(data, rng)
    return "\n".join(parts).encode("utf-8", "surrogatepass")
