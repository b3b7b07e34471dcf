"""Files of any origin: bombs, traps, doctored headers. Each is refused in one line, quickly, and nothing is run.

The bytes are built here. What fuzzing found is among them; `fuzz_targets.examine` watches for what must not happen.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations
import numpy as np
import pytest

if sys.platform == "win32":
    pytest.skip("what is watched here is not there on Windows", allow_module_level=True)

import fuzz_targets
from fuzz_targets import TARGETS, short_run, small_set
from watched_inputs import Finding, Target, examine

from catopt_xp.backend.machine import memory_size
from catopt_xp.commands.plot import read_benchmark
from catopt_xp.data import cache
from catopt_xp.data.load import load_data
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim import schedules
from catopt_xp.optim.rules import make_optimizer
from catopt_xp.training.checkpoint import ARCHITECTURE, CheckpointError, load_state_dict, read_checkpoint
from catopt_xp.training.plots import plot_comparison, plot_history

Content = dict[str, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint of a short run."""
    X, Y = small_set()
    file = short_run(X=X, Y=Y, save_dir=tmp_path_factory.mktemp("trained"), early_stopping=5).checkpoint
    content: bytes = file.read_bytes()
    return content


def members_of(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def text_member(text: bytes) -> bytes:
    return npy(np.frombuffer(text, dtype=np.uint8))


def with_meta(content: bytes, change: Callable[[Content], None]) -> bytes:
    members = members_of(content)
    meta = json.loads(members["meta.npy"].partition(b"\n")[2])
    change(meta)
    return mutations.archive([*(members | {"meta.npy": text_member(json.dumps(meta).encode())}).items()])


def refused(target: str, content: bytes, tmp_path: Path) -> None:
    """Says that the content is refused by whatever reads such a file, in one line, and nothing else happens."""
    assert not examine(TARGETS[target], content, tmp_path), "it was taken"


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def put(path: str, value: Any) -> Callable[[Content], None]:
    """A change of a checkpoint's meta: "run/epoch" is meta["run"]["epoch"]."""

    def change(meta: Content) -> None:
        *parents, name = path.split("/")
        for parent in parents:
            meta = meta[parent]
        meta[name] = value

    return change


INF = float("inf")
DOCTORED = [
    ("version", "\0"),
    ("model/neuron_cnt", [12, 2**40, 1]),  # a network that no memory holds
    ("model/neuron_cnt", 5),
    ("model/device", "cuda"),
    ("model/dtype", "x" * 5000),
    ("model/seed", INF),
    ("model/dropout", -1),
    ("optimizer/steps", INF),
    ("optimizer/steps", -1),
    ("optimizer/steps", 10**400),
    ("optimizer/epoch", "x"),
    ("optimizer/name", "\x1b[2J"),
    ("optimizer/options", "x"),
    ("optimizer/options/param_dict", 1),
    ("optimizer/options/lr_scheduler", "(1, 2)"),
    ("optimizer/options/lr_scheduler", "(" * 5000),
    ("optimizer/options/lr_scheduler", "__import__('os').mkdir('sprung')"),
    ("run/epoch", -(10**9)),  # which would be that many epochs to train
    ("run/epoch", INF),
    ("run/batches", 10**400),
    ("run/early_stopping", 5),
    ("run/early_stopping/best_epoch", INF),
    ("run/environment", [1]),
    ("run/history/run", 5),
    ("run/history/run/window", -5),
    ("run/history/run/model", 5),
    ("run/history/epoch", [10**400]),
    ("run/history/foreign", 1),
]


@pytest.mark.parametrize(("path", "value"), DOCTORED, ids=[f"{path}={str(value)[:20]!r}" for path, value in DOCTORED])
def test_a_doctored_description_is_refused(path: str, value: Any, trained: bytes, tmp_path: Path) -> None:
    refused("checkpoint", with_meta(trained, put(path, value)), tmp_path)


def test_the_undoctored_checkpoint_is_taken(trained: bytes, tmp_path: Path) -> None:
    assert examine(TARGETS["checkpoint"], trained, tmp_path)
    assert examine(TARGETS["checkpoint"], with_meta(trained, lambda meta: None), tmp_path)
    assert set(DeepNetwork([1, 1], ["sigmoid"], clipped_loss=True).architecture) == ARCHITECTURE


def test_arrays_that_are_no_finite_numbers_are_refused(trained: bytes, tmp_path: Path) -> None:
    for array in (np.full((3, 12), "1.0"), np.full((3, 12), 1j), np.full((3, 12), 1e300), np.full((3, 12), np.nan)):
        members = members_of(trained)
        for name in ("model/W0.npy", "best/W0.npy", "optimizer/m/W0.npy"):
            refused("checkpoint", mutations.archive([*(members | {name: npy(array)}).items()]), tmp_path)


def test_json_that_is_nested_too_deep_is_refused(trained: bytes, tmp_path: Path) -> None:
    deep = b'{"a":' * 100_000
    refused("checkpoint", mutations.archive([("meta.npy", text_member(deep))]), tmp_path)
    refused("history", deep, tmp_path)
    (tmp_path / "bench.json").write_bytes(deep)
    assert read_benchmark(tmp_path / "bench.json") is None
    (tmp_path / "set.json").write_bytes(deep)
    assert cache.load_skipped(tmp_path / "set.npy") == {}


def test_a_refused_checkpoint_changes_nothing(trained: bytes, tmp_path: Path) -> None:
    model = DeepNetwork([12, 3, 1], ["relu", "sigmoid"], seed=3)
    optimizer = make_optimizer("adam", model.save(), 1e-3)
    before = model.save().flat.copy()
    for change in (put("optimizer/steps", -1), put("optimizer/epoch", None)):
        (tmp_path / "a.npz").write_bytes(with_meta(trained, change))
        with pytest.raises(CheckpointError):
            load_state_dict(model, optimizer, tmp_path / "a.npz")
        assert (model.save().flat == before).all()
        assert optimizer.steps == optimizer.epoch == 0


# ---- archives --------------------------------------------------------------------------------------------------------


def doubled(content: bytes) -> bytes:
    """The archive with its first member listed a second time, under another name: it takes no room."""
    stream = io.BytesIO(content)
    with zipfile.ZipFile(stream, "a") as archive:
        for k in range(3000):
            info = zipfile.ZipInfo(f"optimizer/{k}.npy")
            first = archive.infolist()[0]
            for name in ("compress_type", "CRC", "compress_size", "file_size", "header_offset", "flag_bits"):
                setattr(info, name, getattr(first, name))
            archive.filelist.append(info)
        archive._didModify = True  # type: ignore[attr-defined]
    return stream.getvalue()


def claiming(content: bytes, size: int) -> bytes:
    """The archive whose first member says that it unpacks to `size` bytes."""
    at = content.index(b"PK\x01\x02")
    return content[: at + 24] + struct.pack("<I", size) + content[at + 28 :]


def linked(*names: str) -> bytes:
    """An archive of links to a file of the system."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "/etc/passwd")
    return stream.getvalue()


ZEROS = np.zeros((100, 1000), dtype=np.uint8)
X, Y = small_set()
PAIR = [("X.npy", npy(X)), ("Y.npy", npy(Y)), ("meta.npy", npy(ZEROS))]
STORED, DEFLATED, _, LZMA = (mutations.archive(PAIR, how) for how in mutations.COMPRESSIONS)


def edited(content: bytes, at: int, new: bytes, where: bytes) -> bytes:
    """The archive with other bytes at an offset from the first place where `where` stands."""
    place = content.index(where) + at
    assert content[place : place + len(new)] != new
    return content[:place] + new + content[place + len(new) :]


# What is in the archive, and the words that say so.
ARCHIVES = {
    "a member that unpacks to 3 GB": (claiming(DEFLATED, 3_000_000_000), "it unpacks to 3.0 GB, more than 100 times"),
    "two members of a name": (mutations.archive([*PAIR, PAIR[0]]), "it has two arrays of the same name"),
    "a name with and without its ending": (
        mutations.archive([*PAIR, ("X", npy(X))]),
        "it has two arrays of the same name",
    ),
    "a version that is unknown": (edited(DEFLATED, 6, b"\xff", b"PK\1\2"), "zip file version 25.5"),
    "LZMA that is damaged": (edited(LZMA, 47, b"\xff" * 8, b"PK\3\4"), "X.npy cannot be read"),
    "deflated bytes that are damaged": (edited(DEFLATED, 47, b"\xff" * 8, b"PK\3\4"), "X.npy cannot be read"),
    "a byte of another value": (edited(STORED, 300, b"\xab", b"PK\3\4"), "Bad CRC-32"),
    "a member that is no array": (mutations.archive([("X.npy", b"text"), *PAIR[1:]]), "X.npy cannot be read"),
    "links": (linked("X.npy", "Y.npy", "meta.npy"), "X.npy cannot be read"),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_a_hostile_archive_is_refused(what: str, tmp_path: Path) -> None:
    content, words = ARCHIVES[what]
    (tmp_path / "a.npz").write_bytes(content)
    for target, read in (("npz", load_data), ("checkpoint", read_checkpoint)):
        started = time.process_time()
        refused(target, content, tmp_path)
        with pytest.raises(ValueError, match="cannot be read") as caught:
            read(tmp_path / "a.npz")
        assert words in str(caught.value)
        assert time.process_time() - started < 2.0


def test_a_member_that_is_listed_many_times_is_refused(tmp_path: Path) -> None:
    content = doubled(mutations.archive([("model/W0.npy", npy(np.zeros(1 << 16, dtype=np.uint8))), *PAIR]))
    refused("checkpoint", content, tmp_path)
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(CheckpointError, match="its members overlap"):  # 200 MB out of 400 kB
        read_checkpoint(tmp_path / "a.npz")


def test_what_unpacks_to_more_than_the_free_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catopt_xp.backend.machine.host_free_memory", lambda: 1000)
    X, Y = small_set(200)
    np.savez(tmp_path / "a.npz", X=X, Y=Y)
    with pytest.raises(
        ValueError, match=r"the archive cannot be read \(it takes 0\.0 GB of memory, 0\.0 GB are free\)"
    ):
        load_data(tmp_path / "a.npz")


def test_large_sets_of_few_numbers_are_no_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catopt_xp.io.archives.LARGE", 1000)
    X, Y = np.zeros((50, 1000), dtype=np.uint8), np.arange(1000) % 2
    np.savez_compressed(tmp_path / "packed.npz", X=X, Y=Y)
    np.savez(tmp_path / "plain.npz", X=X, Y=Y)
    with pytest.raises(ValueError, match=r"more than 100 times its size; save arrays like that with numpy\.savez"):
        load_data(tmp_path / "packed.npz")
    assert load_data(tmp_path / "plain.npz").train_X.shape == (50, 1000)


NAMES = [
    "../../outside",
    "/tmp/outside",
    "C:\\outside",
    "\\\\host\\share",
    "a\nb",
    "\x1b[2J",
    "model/../W0",
    ".",
    "x" * 5000,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_member_s_name_is_no_path(name: str, trained: bytes, tmp_path: Path) -> None:
    members = members_of(trained)
    W0 = members.pop("model/W0.npy")
    refused("checkpoint", mutations.archive([(f"model/{name}.npy", W0), *members.items()]), tmp_path)
    refused("npz", mutations.archive([(f"{name}.npy", npy(ZEROS)), ("X.npy", npy(ZEROS))]), tmp_path)
    X, Y = small_set()
    sets = [(f"{name}.npy", npy(ZEROS)), ("X.npy", npy(X)), ("Y.npy", npy(Y))]
    assert examine(TARGETS["npz"], mutations.archive(sets), tmp_path), "what is not looked at does no harm"


# ---- headers of arrays -----------------------------------------------------------------------------------------------


def header(shape: object, descr: object = "|u1", fortran: object = False) -> str:
    return repr({"descr": descr, "fortran_order": fortran, "shape": shape})


HEADERS = {
    "a shape of 10**12": header((10**12,)),
    "a shape of 10**12 rows": header((10**12, 12)),
    "a shape beyond 64 bits": header((2**63, 4)),
    "a product beyond 64 bits": header((2**40, 2**40)),
    "a negative side": header((-1, 12)),
    "no tuple": header([20, 12]),
    "truth as a side": header((True, 2)),
    "70 sides": header((1,) * 70),
    "objects": header((20, 12), "|O"),
    "a structure": header((20, 12), [("a", "<f4"), ("b", "|O")]),
    "a huge structure": header((20, 12), [("a", "<f4", (99999, 99999))]),
    "texts": header((20, 12), "<U99999999"),
    "dates": header((20, 12), "<M8[ns]"),
    "complex numbers": header((20, 12), "<c16"),
    "an order that is none": header((20, 12), "|u1", "x"),
    "an expression": "__import__('os').mkdir('sprung')",
    "a call in it": "{'descr': '|u1', 'fortran_order': False, 'shape': (20, __import__('os').mkdir('sprung'))}",
    "open brackets": "(" * 300,
    "open braces": "{'descr': " * 90,
    "an open string": "{'descr': '|u1', 'fortran_order': False, 'shape': (20L, 12), '''",
    "numbers of Python 2": "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999L, 12L), }",
    "nothing": "",
    "longer than NumPy reads": header((20, 12)) + " " * 20000,
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_hostile_header_is_refused(what: str, trained: bytes, tmp_path: Path) -> None:
    X, Y = small_set()
    for version in ((1, 0), (2, 0), (3, 0), (9, 0)):
        content = mutations.npy_file(HEADERS[what], b"\0" * 240, version)
        refused("npy", fuzz_targets.joined(content, npy(Y[0])), tmp_path)
        refused("npy", fuzz_targets.joined(npy(np.ascontiguousarray(X.T)), content), tmp_path)
        refused("npz", mutations.archive([("X.npy", content), ("Y.npy", npy(Y))]), tmp_path)
        refused("checkpoint", mutations.archive([*(members_of(trained) | {"model/W0.npy": content}).items()]), tmp_path)


def test_rows_of_every_version_and_order_are_taken(tmp_path: Path) -> None:
    X, Y = small_set()
    for version in ((1, 0), (2, 0), (3, 0)):
        for fortran, rows in ((False, X.T), (True, X)):
            content = mutations.npy_file(
                header((20, 12), "|u1", fortran), np.ascontiguousarray(rows).tobytes(), version
            )
            (tmp_path / "a.npy").write_bytes(content)
            np.save(tmp_path / "a_labels.npy", Y)
            np.testing.assert_array_equal(load_data(tmp_path / "a.npy").train_X, X)


# ---- pickles ---------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling this makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("sprung",)


def test_nothing_is_ever_unpickled(trained: bytes, tmp_path: Path) -> None:
    bare, objects = pickle.dumps(Trap()), npy(np.array([[Trap()] * 2] * 2, dtype=object))
    X, Y = small_set()
    rows = npy(np.ascontiguousarray(X.T))
    for trap in (bare, objects):
        members = members_of(trained)
        for name in members:
            refused("checkpoint", mutations.archive([*(members | {name: trap}).items()]), tmp_path)
        refused("npz", mutations.archive([("X.npy", trap), ("Y.npy", npy(Y))]), tmp_path)
        refused("npz", mutations.archive([("X.npy", npy(X)), ("Y.npy", trap)]), tmp_path)
        refused("npy", fuzz_targets.joined(trap, npy(Y[0])), tmp_path)
        refused("npy", fuzz_targets.joined(rows, trap), tmp_path)
        for target in ("npz", "checkpoint", "png", "jpeg", "history", "words"):
            refused(target, trap, tmp_path)
    assert not list(tmp_path.rglob("sprung"))
    with pytest.raises(Finding, match="touched: pickle"):  # the watch that would tell
        examine(
            Target("x", lambda _: [], lambda data, _: data, lambda data, _: pickle.loads(data)),
            bare,
            tmp_path,
        )


# ---- histories, figures, texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", b"epoch\n\x80", b"[" * 100_000, b'{"epoch": [1e999]}', b'{"\\u001b[2J": 1}', b"\0" * 999],
)
def test_a_hostile_history_is_refused(content: bytes, tmp_path: Path) -> None:
    refused("history", content, tmp_path)


RUN = {"epoch": [0], "seconds": [1.0], "eval_epoch": [0], "full_train_loss": [0.7], "dev_loss": [0.7]}
TEXTS = ["$\\frac{$ $b$ \x1b[2J two\nlines \ud800 \0 %s {0} \\", "x" * 3000]


@pytest.mark.parametrize("text", TEXTS, ids=[ascii(text)[:12] for text in TEXTS])
def test_texts_of_any_origin_are_drawn_as_they_are(text: str, tmp_path: Path) -> None:
    run = RUN | {"run": {"data": text, "optimizer": text}, "timings": {text: 1.0}}
    figure = plot_history(run, tmp_path / "a.png")
    assert "$" not in figure.get_suptitle().replace("\\$", "")
    plot_comparison({text: run, "b": run}, tmp_path / "b.svg", title=text)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.svg"]


ROW = {"batch_size": 8, "floor_seconds": 0.1, "contenders": {"plain": {"seconds_per_epoch": 1.0, "turns": [0.9, 1.1]}}}
ROWS = [
    *({"batch_size": "x"}, {"batch_size": 10**400}, {"batch_size": 0}, {"floor_seconds": INF}, {"contenders": True}),
    *({"contenders": {"plain": 5}}, {"contenders": {"plain": {"seconds_per_epoch": -1.0}}}, {"floor_seconds": None}),
    {"contenders": {"plain": {"seconds_per_epoch": 1.0, "turns": ["x"]}}},
]


@pytest.mark.parametrize("change", ROWS, ids=str)
def test_hostile_results_of_a_benchmark_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps({"rows": [ROW]}))
    assert read_benchmark(file) == {"rows": [ROW]}
    file.write_text(json.dumps({"rows": [ROW | change]}))
    with pytest.raises(ValueError, match=r"bench\.json has no rows of a benchmark"):
        read_benchmark(file)


@pytest.mark.parametrize(
    "text", ["(1, 2)", "1.5", "(" * 9000, "-" * 90_000 + "1", "\0", "\x1b[2J", "Table(entries=((0, 'x'),))", "f(1)"]
)
def test_a_text_that_describes_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="none of the library's; pass lr_scheduler again") as caught:
        schedules.restore(text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["9" * 400, "1" * 30 + "TB", "99999999999999999999", "9.9e999", "-1", "0.0000001"])
def test_an_amount_of_memory_that_nobody_has_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no amount of memory"):
        memory_size(text)


@pytest.mark.parametrize("name", ["a/b", "/a", "..", "", ".", "a\0", "a\n", "\x1b[2J", "\ud800", 5, None, "a" * 255])
def test_a_model_name_that_is_no_file_name_is_refused(name: Any, tmp_path: Path) -> None:
    X, Y = small_set()
    with pytest.raises((ValueError, OSError), match="model_name"):
        short_run(X=X, Y=Y, model_name=name, save_dir=tmp_path / "runs")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
