"""What is fuzzed: for each kind of file that the library reads, seeds that it wrote itself, a mutation, and a use."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from watched_inputs import Finding, Target, fault_of

from catopt_xp.backend.machine import memory_size
from catopt_xp.commands import flags
from catopt_xp.commands.export import read_trained
from catopt_xp.commands.flags import parse_words
from catopt_xp.commands.main import main
from catopt_xp.commands.plot import read_history, run_files
from catopt_xp.data.cache import load_rows, load_skipped
from catopt_xp.data.decoding import decode_images, photograph_size
from catopt_xp.data.load import load_data
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim import schedules
from catopt_xp.optim.rules import make_optimizer
from catopt_xp.training.checkpoint import Checkpoint, load_model, load_state_dict
from catopt_xp.training.history import History
from catopt_xp.training.loop import TrainingDiverged
from catopt_xp.training.train import train

# --- a small set and its runs -----------------------------------------------------------------------------------------


def small_set(m: int = 20) -> tuple[Any, Any]:
    """X (12, m) uint8 and Y (1, m)."""
    X = np.random.default_rng(0).integers(0, 256, (m, 12), dtype=np.uint8).T
    return X, (X[:6].mean(axis=0, keepdims=True) > 128).astype(np.int64)


def short_run(**given: Any) -> Any:
    """A quiet run of few epochs on the plain engine, which compiles nothing."""
    quiet = {"hidden": (3,), "batch_size": 8, "save_dir": None, "device": "cpu", "engine": "plain", "verbose": False}
    return train(**{"total_epoch": 2, "print_interval": 1, "progress": False, **quiet, **given})


def checkpoint_seeds(folder: Path) -> list[bytes]:
    """Checkpoints of each optimizer, one within an epoch, one with early stopping, one without a run."""
    X, Y = small_set()
    files = []
    for name in ("gd", "momentum", "rmsprop", "adam"):
        files.append(short_run(X=X, Y=Y, optimizer=name, save_dir=folder, model_name=name).checkpoint)
    stopping = {"early_stopping": 5, "dev_X": X, "dev_Y": Y, "dropout": 0.2}
    files.append(short_run(X=X, Y=Y, save_dir=folder, model_name="early", **stopping).checkpoint)

    class Stop(Exception):
        pass

    class End:
        def on_epoch(self, state: Any) -> None:
            raise Stop

    with contextlib.suppress(Stop):
        short_run(X=X, Y=Y, save_dir=folder, model_name="within", checkpoint_every_steps=2, callbacks=[End()])
    files.append(folder / "within_latest.npz")
    return [file.read_bytes() for file in files]


def run_checkpoint(data: bytes, folder: Path) -> None:
    """Reads a checkpoint in each way there is, and goes on from it."""
    file = folder / "a.npz"
    file.write_bytes(data)
    Checkpoint.read(file)
    faults: list[Exception] = []
    model = DeepNetwork([12, 3, 1], ["relu", "sigmoid"])
    X, Y = small_set()
    uses: list[Callable[[], object]] = [
        lambda: load_model(file).forward(X, train_mode=False),
        lambda: read_trained(str(file)),
        lambda: load_state_dict(model, make_optimizer("adam", model.save(), 1e-3), file),
        lambda: read_history(file).to_csv(),
        lambda: short_run(X=X, Y=Y, recover_from=file, total_epoch=3),
        lambda: short_run(X=X, Y=Y, recover_from=file, total_epoch=3, early_stopping=3, optimizer="gd"),
    ]
    for use in uses:  # what one of them refuses another may take
        try:
            use()
        except Exception as error:
            if fault_of(error, CHECKPOINT_REFUSALS) is not None:
                raise
            faults.append(error)
    if faults:
        raise faults[0]


CHECKPOINT_REFUSALS = (ValueError, TypeError, TrainingDiverged, FileNotFoundError)


def npz_seeds(folder: Path) -> list[bytes]:
    """Sets of pixels and of numbers, with a dev set and without, compressed and not."""
    X, Y = small_set()
    for name, save, arrays in (
        ("a", np.savez, {"X": X, "Y": Y}),
        ("b", np.savez_compressed, {"X": X.astype(np.float32) / 255, "Y": Y[0], "dev_X": X, "dev_Y": Y}),
        ("c", np.savez, {"X": X, "Y": np.arange(20)[None] % 3}),
    ):
        save(folder / f"{name}.npz", **arrays)
    return [(folder / f"{name}.npz").read_bytes() for name in "abc"]


def run_npz(data: bytes, folder: Path) -> None:
    """Loads a set and trains on it."""
    (folder / "a.npz").write_bytes(data)
    _use_set(folder / "a.npz")


def _use_set(file: Path) -> None:
    data = load_data(file)
    if sum(X.size for X in (data.train_X, data.dev_X) if X is not None) < 1 << 20:  # a larger one trains for long
        short_run(data=file, total_epoch=1)


def npy_seeds(folder: Path) -> list[bytes]:
    """Rows and labels, one file behind the other: how long the first one is stands before them."""
    X, Y = small_set()
    seeds = []
    for rows, labels in ((np.ascontiguousarray(X.T), Y[0]), (X.T.astype("<f4") / 255, Y), (X.T.astype(">f8"), Y)):
        parts = []
        for array in (rows, labels):
            stream = io.BytesIO()
            np.save(stream, array)
            parts.append(stream.getvalue())
        seeds.append(joined(*parts))
    return seeds


def joined(rows: bytes, labels: bytes) -> bytes:
    return len(rows).to_bytes(4, "little") + rows + labels


def mutated_pair(data: bytes, rng: random.Random) -> bytes:
    """Mutates either file of `npy_seeds`."""
    size = int.from_bytes(data[:4], "little")
    rows, labels = data[4 : 4 + size], data[4 + size :]
    if rng.random() < 0.7:
        return joined(mutations.mutated_npy(rows, rng), labels)
    return joined(rows, mutations.mutated_npy(labels, rng))


def run_npy(data: bytes, folder: Path) -> None:
    """The rows as a cached set; then with their labels as a set, in memory and streamed."""
    size = int.from_bytes(data[:4], "little")
    for name, part in (("a.npy", data[4 : 4 + size]), ("a_labels.npy", data[4 + size :]), ("a.json", data[4:])):
        (folder / name).write_bytes(part)
    notices: list[str] = []
    rows = load_rows(folder / "a.npy", (20, 12), notices)
    load_skipped(folder / "a.npy")
    if (rows is None) != bool(notices) or not all(notice.isprintable() for notice in notices):
        raise Finding(f"a cache file that cannot be used is told as {notices}")
    loaded = load_data(folder / "a.npy")
    if loaded.train_X.size < 1 << 20:
        short_run(data=folder / "a.npy", total_epoch=1)
    if loaded.train_X.dtype in (np.uint8, np.float32) and loaded.train_X.size < 1 << 20:
        limit = 2 * loaded.train_X.nbytes - 2  # of which a set takes half
        short_run(data=folder / "a.npy", total_epoch=1, batch_size=1, memory_limit=max(1, limit))


def photograph_seeds(kind: str) -> Callable[[Path], list[bytes]]:
    """JPEG or PNG files of every mode, with EXIF data, interlaced or progressive."""

    def make(folder: Path) -> list[bytes]:
        rng = np.random.default_rng(0)
        picture = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6
        text = PngInfo()
        text.add_text("Comment", "x" * 100, zip=True)
        modes = ("RGB", "L", "CMYK") if kind == "JPEG" else ("RGB", "L", "1", "P", "RGBA", "LA", "I;16")
        ways: list[dict[str, Any]] = [{}, {"exif": exif}]
        ways += [{"progressive": True}, {"quality": 5}] if kind == "JPEG" else [{"pnginfo": text}]
        seeds = []
        for mode in modes:
            for way in ways:
                stream = io.BytesIO()
                converted = picture.convert("I").convert("I;16") if mode == "I;16" else picture.convert(mode)
                converted.save(stream, kind, **way)
                seeds.append(stream.getvalue())
        return seeds

    return make


def run_photograph(data: bytes, folder: Path) -> None:
    """Decodes a photograph, and asks for its size."""
    (folder / "a.jpg").write_bytes(data)
    photograph_size(folder / "a.jpg")
    rows = decode_images([folder / "a.jpg"], (9, 7), progress=False)
    if rows.shape != (1, 9 * 7 * 3):
        raise Finding(f"decodes to {rows.shape}")


def history_seeds(folder: Path) -> list[bytes]:
    """Histories as JSON and as CSV."""
    X, Y = small_set()
    history = short_run(X=X, Y=Y, dev_X=X, dev_Y=Y, total_epoch=3, print_interval=2).history
    return [text.encode() for text in (history.to_json(), history.to_csv(), History().to_json())]


def run_history(data: bytes, folder: Path) -> None:
    """Reads a history as JSON and as CSV, and writes it again."""
    for name in ("a_history.json", "a_history.csv"):
        (folder / name).write_bytes(data)
    refused: list[Exception] = []
    for file in [*run_files(folder), folder / "a_history.csv", folder / "a_history.json"]:
        try:
            history = read_history(file)
        except ValueError as error:
            if fault_of(error, (ValueError,)) is not None:
                raise
            refused.append(error)
            continue
        history.to_csv()
        history.time_table()
        text = history.to_json()
        if History.from_json(text).to_json() != text:
            raise Finding("is another history when it is written and read")
    if len(refused) == 3:
        raise refused[0]


def plot_seeds(folder: Path) -> list[bytes]:
    """Histories, and the results of a benchmark."""
    row = {
        "batch_size": 64,
        "floor_seconds": 0.2,
        "contenders": {"plain": {"seconds_per_epoch": 0.8, "turns": [0.7, 0.9]}},
    }
    results = {
        "rows": [row, row | {"batch_size": 8}],
        "threads": 2,
        "workload": {"optimizer": "adam"},
        "machine": {"cpu": "x"},
    }
    history, _, empty = history_seeds(folder)
    benchmark = json.dumps(results).encode()
    run_plot(benchmark, folder)  # matplotlib writes to the user's folders when it first draws
    return [history, benchmark, empty]


def run_plot(data: bytes, folder: Path) -> None:
    """`catopt-xp plot` of one run and of two."""
    (folder / "a_history.json").write_bytes(data)
    file = str(folder / "a_history.json")
    status = _command(["plot", file, "--out", str(folder / "a.png")])
    if len(data) % 4 == 0:  # one is slow enough
        _command(["plot", file, file, "--dev", "--out", str(folder / "a.png")])
    if status != 0:
        raise ValueError("refused by the command")


def _command(words: list[str]) -> int:
    """The status of a command that was done, or failed with one line written for the user. Raises Finding."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(words)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else -1
    lines = [line for line in told.getvalue().split("\n")[:-1] if not line.startswith("catopt-xp: warning: ")]
    if status not in (0, 1, 2) or len(lines) != (status != 0) or "--debug shows" in told.getvalue():
        raise Finding(f"ends with status {status} and says {told.getvalue()[:300]!r}")
    if not all(line.isprintable() for line in lines):
        raise Finding(f"says {told.getvalue()[:300]!r}")
    return status


def words_seeds(folder: Path) -> list[bytes]:
    """Words of command lines, one in a line, and values of flags."""
    schedule = schedules.describe(schedules.parse("warmup(cosine(100, 0.1), 5, 0.2)"))
    texts = [
        "warmup(table({0: 1e-3, 50: 1e-4}), 5, 0.2)",
        "hyperbola(0.2)",
        "staircase(0.5, 10)",
        schedule,
        "1.5GB",
        "64x48",
        "30,20",
    ]
    texts += ["train\n--data\nx\n--hidden\n3,4\n--schedule\nsqrt(1)\n--memory-limit\n2MiB\n--model-name\na\n--seed\n1"]
    texts += [
        "predict\na.jpg\n--img-shape\n8x8\n--checkpoint\nx.npz",
        "plot\na\nb\n--out\nc.png",
        "compare\ndecay\n--seed\n3",
    ]
    return [text.encode() for text in texts]


def run_words(data: bytes, folder: Path) -> None:
    """Every value of a flag as every kind of value, and all words as a command line."""
    text = data.decode("utf-8", "surrogateescape")
    taken = 0
    for read in (schedules.parse, schedules.restore):
        with contextlib.suppress(ValueError):
            schedule, taken = read(text), taken + 1
            rates = [schedule(1e-3, epoch) for epoch in (0, 0.5, 1, 7.25, 1e6, 1e300)]
            if not all(0.0 <= rate < float("inf") for rate in rates):
                raise Finding(f"is a schedule with the rates {rates}")
    with contextlib.suppress(ValueError):
        taken += memory_size(text) > 0
    for kind in ("count", "positive", "share", "batch_size", "file_name", "layers", "shape", "memory", "schedule"):
        try:
            getattr(flags, kind)(text)
            taken += 1
        except argparse.ArgumentTypeError as error:
            if "\n" in str(error):
                raise Finding(f"{kind} says {str(error)!r}") from error
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            parse_words(text.split("\n"), "catopt-xp")
        except SystemExit as end:
            if not taken and end.code != 0:
                raise ValueError("nothing takes this") from end


TARGETS = {
    target.name: target
    for target in (
        Target("checkpoint", checkpoint_seeds, mutations.mutated_npz, run_checkpoint, CHECKPOINT_REFUSALS),
        Target("npz", npz_seeds, mutations.mutated_npz, run_npz, (ValueError, TypeError, TrainingDiverged)),
        Target("npy", npy_seeds, mutated_pair, run_npy, (ValueError, TypeError, TrainingDiverged, OSError)),
        Target("jpeg", photograph_seeds("JPEG"), mutations.mutated_jpeg, run_photograph, (ValueError,)),
        Target("png", photograph_seeds("PNG"), mutations.mutated_png, run_photograph, (ValueError,)),
        Target("history", history_seeds, mutations.mutated_json, run_history, (ValueError,)),
        Target("plot", plot_seeds, mutations.mutated_json, run_plot, (ValueError,)),
        Target("words", words_seeds, mutations.mutated_words, run_words, (ValueError,)),
    )
}


def seeds_of(target: Target) -> list[bytes]:
    """The target's seeds, made by the library in a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        return target.seeds(Path(folder))
