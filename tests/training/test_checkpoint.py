"""Checkpoint files: what goes in comes out, anything else is refused by name, and no file is ever half written."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from catopt_xp.io.files import write_whole
from catopt_xp.training.checkpoint import (
    FORMAT,
    VERSION,
    CheckpointError,
    group,
    npz_path,
    read_checkpoint,
    write_checkpoint,
)

Array = np.ndarray[Any, Any]

META = {"format": FORMAT, "version": VERSION}


def some_arrays(seed: int = 0) -> dict[str, Array]:
    rng = np.random.Generator(np.random.PCG64(seed))
    return {
        "model/W0": rng.standard_normal((20, 30)).astype(np.float32),
        "model/b0": np.zeros((20, 1)),
        "run/t": np.array(3),
    }


def meta_bytes(meta: object) -> Array:
    return np.frombuffer((meta if isinstance(meta, str) else json.dumps(meta)).encode(), dtype=np.uint8)


def same(one: Array, other: Array) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and one.tobytes() == other.tobytes()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# There and back.

DTYPES = st.one_of(
    arrays_of.boolean_dtypes(),
    arrays_of.integer_dtypes(endianness="?"),
    arrays_of.unsigned_integer_dtypes(endianness="?"),
    arrays_of.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
)
FINITE = {"allow_nan": False, "allow_infinity": False}
ARRAYS = DTYPES.flatmap(
    lambda dtype: arrays_of.arrays(
        dtype,
        arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        elements=arrays_of.from_dtype(dtype, **FINITE),  # type: ignore[arg-type]
    )
)
NAMES = st.from_regex(r"[A-Za-z]{1,8}/[A-Za-z]{1,6}[0-9]{0,2}", fullmatch=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(**FINITE) | st.text(max_size=5),  # type: ignore[arg-type]
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(arrays=st.dictionaries(NAMES, ARRAYS, max_size=4), run=JSON)
def test_any_arrays_and_meta_come_back_as_they_went(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, Array], run: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "identity.npz"
    assert write_checkpoint(path, arrays, {"run": run}) == path
    read, meta = read_checkpoint(path)
    assert list(read) == list(arrays)
    assert all(same(read[key], x) for key, x in arrays.items())
    assert meta == {**META, "run": run}


@pytest.mark.parametrize(
    "array", [np.arange(24.0).reshape(4, 6)[::2, ::-3], np.asfortranarray(np.eye(3)), np.float64(2)]
)
def test_memory_layout_and_scalars_are_no_matter(array: Array, tmp_path: Path) -> None:
    read, _ = read_checkpoint(write_checkpoint(tmp_path / "a", {"x": array}, {}))
    np.testing.assert_array_equal(read["x"], array)
    assert read["x"].flags.owndata or read["x"].base is not None


def test_equal_states_give_equal_files_and_the_ending_is_appended(tmp_path: Path) -> None:
    one, two = (write_checkpoint(tmp_path / name, some_arrays(), {"epoch": 1}) for name in ("one", "two.npz"))
    assert (one.name, two.name) == ("one.npz", "two.npz")
    assert one.read_bytes() == two.read_bytes()
    assert npz_path("model.v2") == Path("model.v2.npz")
    assert read_checkpoint(tmp_path / "one")[1] == read_checkpoint(one)[1]


def test_numpy_reads_our_files_and_we_read_numpys(tmp_path: Path) -> None:
    arrays = some_arrays()
    with np.load(write_checkpoint(tmp_path / "ours", arrays, {"epoch": 2})) as archive:
        assert all(same(archive[key], x) for key, x in arrays.items())
        assert json.loads(archive["meta"].tobytes()) == {**META, "epoch": 2}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "theirs.npz", meta=meta_bytes(META), **arrays)  # type: ignore[arg-type]
        read, meta = read_checkpoint(tmp_path / "theirs.npz")
        assert meta == META
        assert all(same(read[key], x) for key, x in arrays.items())


def test_entries_of_a_group_are_those_under_its_name() -> None:
    entries = {"model/W0": 1, "models/W0": 2, "model": 3, "best/model/W0": 4, "model/m/W0": 5}
    assert group(entries, "model") == {"W0": 1, "m/W0": 5}
    assert group(entries, "none") == {}


# Damaged and foreign files.


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "whole", some_arrays() | {"model/W1": np.ones((40, 60))}, {}).read_bytes()
    cut = tmp_path / "cut.npz"
    for length in [*range(0, len(whole), 997), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=f"{cut}: .* cannot be read .*damaged or foreign"):
            read_checkpoint(cut)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_no_flipped_bit_gives_other_values(save: Any, tmp_path: Path) -> None:
    path = tmp_path / "flipped.npz"
    arrays = {"model/W0": np.arange(6, dtype=np.float32).reshape(2, 3), "e": np.zeros((0, 2)), "meta": meta_bytes(META)}
    save(path, **arrays)
    expected, _ = read_checkpoint(path)
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            read, meta = read_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:  # the bit was one that says nothing, such as a time or an attribute
            assert meta == META
            assert list(read) == list(expected)
            assert all(same(read[key], x) for key, x in expected.items())
    assert refused > len(whole) // 2


def test_a_header_that_asks_for_less_than_is_there_is_refused(tmp_path: Path) -> None:
    # The checksum is compared at a member's end: one that is read in part (and is longer than a buffer) would pass.
    path = write_checkpoint(tmp_path / "a", {"x": np.arange(5000, dtype="<f4")}, {})
    path.write_bytes(path.read_bytes().replace(b"'<f4'", b"'<f2'"))
    with pytest.raises(CheckpointError, match=r"x\.npy cannot be read"):
        read_checkpoint(path)


def npy(array: Array) -> bytes:
    stream = BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the archive cannot be read"),
        (b"not an archive at all" * 50, "the archive cannot be read"),
        (npy(np.ones(3)), "the archive cannot be read"),
        ({"W0": np.ones(3)}, "meta is missing; it is not a checkpoint"),
        ({"meta": meta_bytes("{")}, "meta is not JSON"),
        ({"meta": np.array([255, 254], dtype=np.uint8)}, "meta is not JSON"),
        ({"meta": meta_bytes([1])}, "meta does not say 'catopt_xp checkpoint'"),
        ({"meta": meta_bytes({"format": "other", "version": 1})}, "meta does not say 'catopt_xp checkpoint'"),
        ({"meta": meta_bytes({"format": "a", "version": 1})}, "meta does not say 'catopt_xp checkpoint'"),
        ({"meta": meta_bytes({"format": FORMAT})}, "written in format version None"),
        ({"meta": meta_bytes(META | {"version": "1"})}, "written in format version 1"),
        ({"meta": meta_bytes(META | {"version": 2})}, "written in format version 2, this library reads 1"),
        ({"meta": meta_bytes(META | {"version": 0})}, "written in format version 0, this library reads 1"),
    ],
)
def test_a_foreign_file_is_refused_in_a_line_that_names_it(content: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "foreign.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_archive_of_other_things_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("meta", json.dumps(META))
    with pytest.raises(CheckpointError, match="meta cannot be read"):
        read_checkpoint(tmp_path / "a.npz")


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickled_object_is_refused_and_not_run(tmp_path: Path) -> None:
    trapped = np.array([Trap(tmp_path / "sprung"), None], dtype=object)
    np.savez(tmp_path / "object.npz", **{"meta": meta_bytes(META), "model/W0": trapped})  # type: ignore[arg-type]
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with zipfile.ZipFile(tmp_path / "member.npz", "w") as archive:
        archive.writestr("model/W0.npy", pickle.dumps(Trap(tmp_path / "sprung")))
    for name, words in (
        ("object", "Object arrays cannot be loaded"),
        ("bare", "cannot be read"),
        ("member", "W0.npy cannot"),
    ):
        with pytest.raises(CheckpointError, match=words):
            read_checkpoint(tmp_path / f"{name}.npz")
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        write_checkpoint(tmp_path / "ours", {"x": np.array([None])}, {})
    assert names_in(tmp_path) == ["bare.npz", "member.npz", "object.npz"]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {tmp_path / 'none.npz'}"):
        read_checkpoint(tmp_path / "none")


def test_whatever_a_file_says_its_refusal_is_one_line_that_can_be_printed() -> None:
    told = str(CheckpointError("two\nlines \x1b[2J and \ud800"))
    assert told.isprintable()
    assert "two" in told
    assert "lines" in told


def test_a_folder_is_named_as_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^'{tmp_path}' is a folder; give the .npz file in it$"):
        read_checkpoint(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file for a device")
def test_a_device_is_no_checkpoint() -> None:
    with pytest.raises(CheckpointError, match=f"^{os.devnull} is no file but a pipe or a device; give an .npz file$"):
        read_checkpoint(os.devnull)


# Writing.


@pytest.mark.parametrize("name", ["model/\0", "\ud800", "W\udc80", "\udfff0"])
def test_a_name_that_an_archive_cannot_hold_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=f"cannot be a name in an archive, so nothing was saved to {tmp_path / 'a.npz'}"
    ):
        write_checkpoint(tmp_path / "a", {name: np.ones(1)}, {})
    assert names_in(tmp_path) == []
    around = {"\ud7ff": np.ones(1), "\ue000": np.zeros(1)}  # the letters beside those of no encoding
    assert list(read_checkpoint(write_checkpoint(tmp_path / "a", around, {}))[0]) == list(around)


@pytest.mark.parametrize("bad", [[np.nan, 1], [np.inf, 1], [-np.inf, 1], [np.inf, -np.inf], [1e308, 1e308, np.nan]])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_that_are_not_finite_are_refused_and_the_old_file_stays(
    bad: list[float], dtype: str, tmp_path: Path
) -> None:
    if dtype == "float32" and 1e308 in bad:
        bad = [3e38, 3e38, np.nan]
    path = write_checkpoint(tmp_path / "a", some_arrays(), {"epoch": 1})
    before = path.read_bytes()
    with pytest.raises(
        FloatingPointError, match=f"model/b0 has values that are not finite, so nothing was saved to {path}"
    ):
        write_checkpoint(path, some_arrays() | {"model/b0": np.array(bad, dtype=dtype)}, {})
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["a.npz"]


def test_finite_values_are_kept_however_large(tmp_path: Path) -> None:
    large = np.array([1.7e308, 1.7e308, -1e300])
    assert same(read_checkpoint(write_checkpoint(tmp_path / "a", {"x": large}, {}))[0]["x"], large)


def test_an_array_beyond_what_plain_archives_hold_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Their limit is 2 GiB, and zipfile learns of it only once so much is written: here it is 10 kB.
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10_000)
    large = np.arange(5000.0)
    path = write_checkpoint(tmp_path / "a", {"model/W0": large, "model/W1": large}, {})
    read, _ = read_checkpoint(path)
    assert same(read["model/W0"], large)
    assert same(read["model/W1"], large)


@pytest.mark.parametrize("error", [OSError("cable pulled"), KeyboardInterrupt(), ValueError("no")])
def test_a_write_that_stops_half_way_leaves_the_old_file_and_nothing_else(error: BaseException, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a", some_arrays(), {})
    before = path.read_bytes()

    def half(file: Any) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(type(error)) as raised:
        write_whole(path, half)
    if isinstance(error, OSError):
        assert str(path) in str(raised.value)
        assert "cable pulled; choose another place" in str(raised.value)
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["a.npz"]


DISK_FULL = """
import resource, sys
import numpy as np
from catopt_xp.training.checkpoint import write_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
write_checkpoint(sys.argv[1], {"x": np.ones(100_000)}, {})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a", some_arrays(), {})
    before = path.read_bytes()
    run = subprocess.run([sys.executable, "-c", DISK_FULL, str(path)], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert last.startswith("OSError")
    assert f"could not write {path}: File too large; free space or choose another folder" in last
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["a.npz"]


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"could not write .*none.*a\.npz: No such file or directory"):
        write_checkpoint(tmp_path / "none" / "a", some_arrays(), {})


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right on Windows")
def test_a_link_stays_a_link_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    target = write_checkpoint(tmp_path / "disk" / "real", some_arrays(), {"epoch": 1})
    link = tmp_path / "latest.npz"
    link.symlink_to(target)
    assert write_checkpoint(link, some_arrays(), {"epoch": 2}) == link
    assert link.is_symlink()
    assert read_checkpoint(target)[1]["epoch"] == read_checkpoint(link)[1]["epoch"] == 2
    assert names_in(tmp_path) == ["disk", "latest.npz"]
    assert names_in(target.parent) == ["real.npz"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_of_the_umask(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        path = write_checkpoint(tmp_path / "a", some_arrays(), {})
    finally:
        assert os.umask(before) == mask
    assert path.stat().st_mode & 0o777 == mode
