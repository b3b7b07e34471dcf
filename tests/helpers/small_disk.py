"""A driver: commands on a real, small, nearly full disk. A process of its own, in a mount namespace of its own.

    unshare -m python tests/helpers/small_disk.py FOLDER CASE STEP

mounts a small tmpfs on FOLDER, runs the command of CASE with every amount of free space from none to enough, in steps
of STEP pages, and prints as JSON what it found. After each, space returns, and the command is given again.
"""

from __future__ import annotations

import ctypes
import filecmp
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from forked import Ended, run_forked
from PIL import Image

from catopt_xp.commands.plot import read_benchmark
from catopt_xp.training.checkpoint import read_checkpoint
from catopt_xp.training.history import History

PAGE = 4096
DISK = 16 << 20
SIZES = ("--hidden", "6,5", "--print-interval", "1", "--device", "cpu", "--engine", "plain")
# Of a history, what no two runs have alike.
TIMES = ("seconds", "timings")


@dataclass(frozen=True)
class Case:
    """`words` of the command, in which DISK stands for the small disk and ASIDE for a large one; `before`: a command
    that leaves there what must stay whole; `again`: the command once there is space, where it is another one."""

    words: str
    before: str = ""
    again: str = ""
    may_do_without: bool = False  # whether it succeeds where there is no space at all
    draws: bool = False  # a figure takes a second: other cases run as where matplotlib is not installed


TRAIN = "train --data ASIDE/set.npz --save-dir DISK/run"
PHOTOGRAPHS = "train --data ASIDE/photographs --img-shape 24x24 --epochs 1 --save-dir ASIDE/run"
CASES = {
    "train": Case(
        f"{TRAIN} --epochs 4 --recover-from DISK/run/model_latest.npz --tensorboard DISK/events", f"{TRAIN} --epochs 2"
    ),
    "new run over another's": Case(
        f"{TRAIN} --epochs 2 --seed 3", f"{TRAIN} --epochs 2", f"{TRAIN} --epochs 2 --seed 3"
    ),
    "first run": Case(f"{TRAIN} --epochs 2"),
    "early stopping": Case(
        f"{TRAIN} --epochs 4 --early-stopping 3 --recover-from DISK/run/model_latest.npz",
        f"{TRAIN} --epochs 2 --early-stopping 3",
    ),
    "compare": Case(
        "compare decay --data ASIDE/set.npz --save-dir DISK/compare --epochs 2 --print-interval 1 --device cpu"
        " --engine plain"
    ),
    "cache of photographs": Case(PHOTOGRAPHS, may_do_without=True),
    "cache of drawings": Case(
        "train --img-shape 24x24 --train-size 8 --dev-size 4 --epochs 1 --save-dir ASIDE/run", may_do_without=True
    ),
    "onnx": Case("export ASIDE/run/model_latest.npz --out DISK/a.onnx", "export ASIDE/other.npz --out DISK/a.onnx"),
    "safetensors": Case(
        "export ASIDE/run/model_latest.npz --out DISK/a.safetensors", "export ASIDE/other.npz --out DISK/a.safetensors"
    ),
    "train and draw": Case(f"{TRAIN} --epochs 2", draws=True),
    "plot": Case(
        "plot ASIDE/run/model_history.json --mini-batch --out DISK/a.png",
        "plot ASIDE/other.npz --mini-batch --out DISK/a.png",
        draws=True,
    ),
    "plot pdf": Case(
        "plot ASIDE/run/model_history.json --out DISK/a.pdf", "plot ASIDE/other.npz --out DISK/a.pdf", draws=True
    ),
    "plot svg": Case(
        "plot ASIDE/run/model_history.json --out DISK/a.svg", "plot ASIDE/other.npz --out DISK/a.svg", draws=True
    ),
    "bench": Case("bench --n-x 300 --samples 20 --batch-sizes 8 --threads 1 --save-dir DISK/bench --quick"),
}


@dataclass
class Found:
    """What a case showed: how often it was tried, how each try ended, and what broke, in words."""

    case: str
    tried: int = 0
    needed_pages: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    broke: list[str] = field(default_factory=list)


def mount(folder: Path) -> None:
    """Puts a tmpfs of DISK bytes on a folder."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={DISK}".encode()) != 0:
        raise OSError(ctypes.get_errno(), f"tmpfs cannot be mounted: {os.strerror(ctypes.get_errno())}")


def make_data(folder: Path) -> None:
    """A small set of arrays, and one of photographs."""
    rng = np.random.Generator(np.random.PCG64(0))
    X = rng.integers(0, 256, (3072, 40), dtype=np.uint8)
    np.savez(folder / "set.npz", X=X, Y=(X[:1500].mean(axis=0, keepdims=True) > 127.5).astype(int))
    for part in ("training_set", "test_set"):
        for animal in ("cats", "dogs"):
            (folder / "photographs" / part / animal).mkdir(parents=True)
            for number in range(6):
                picture = Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8))
                picture.save(folder / "photographs" / part / animal / f"{number}.png")


def same_run(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same bits, but for the times in them."""
    (arrays, meta), (others, other_meta) = read_checkpoint(a), read_checkpoint(b)
    for one in (meta, other_meta):
        one["run"]["seconds"] = 0
        for name in TIMES:
            one["run"]["history"].pop(name)
    same = arrays.keys() == others.keys() and all(arrays[k].tobytes() == others[k].tobytes() for k in arrays)
    return same and meta == other_meta


def check_whole(file: Path) -> None:
    """Raises an exception for a file that is not whole."""
    readers: dict[str, Callable[[Path], Any]] = {
        ".npz": read_checkpoint,
        ".npy": lambda path: np.load(path, allow_pickle=False),
        ".csv": _whole_csv,
        ".json": lambda path: read_benchmark(path) or History.from_json(path),
        ".png": lambda path: Image.open(path).load(),
        ".pdf": lambda path: _ends(path, b"%%EOF\n"),
        ".svg": lambda path: _ends(path, b"</svg>\n"),
        ".onnx": _whole_onnx,
        ".safetensors": _whole_safetensors,
    }
    if ".tfevents" in file.name or file.name.startswith("events"):
        _whole_events(file)
    else:
        readers[file.suffix](file)


def _ends(file: Path, ending: bytes) -> None:
    if not file.read_bytes().endswith(ending):
        raise ValueError(f"{file} does not end with {ending!r}")


def _whole_csv(file: Path) -> None:
    _ends(file, b"\n")
    History.from_csv(file)


def _whole_onnx(file: Path) -> None:
    import onnx

    onnx.checker.check_model(onnx.load(file), full_check=True)


def _whole_safetensors(file: Path) -> None:
    from catopt_xp.commands.export import load_safetensors

    load_safetensors(file)


def _whole_events(file: Path) -> None:
    """Records, of length (8 bytes), checksum (4), content, checksum (4); readers wait for the rest of the last one."""
    content, at = file.read_bytes(), 0
    while at + 8 <= len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        if length > 1 << 20:
            raise ValueError(f"{file} has no record at {at}")
        at += 16 + length


class Driver:
    """One case, on a disk that is there already; `aside`: a folder on another disk."""

    sizes = SIZES  # of every training
    failed: Sequence[int] = (1,)  # exit statuses of a command that met its limit

    def __init__(self, case: Case, name: str, disk: Path, aside: Path) -> None:
        self.name, self.case, self.disk, self.aside = name, case, disk, aside
        self.found = Found(name)
        self.filler = disk / "filler"
        if not self.case.draws:
            sys.modules["matplotlib"] = None  # type: ignore[assignment]
        in_disk = self.name.startswith("cache")
        os.environ["CATOPT_XP_CACHE"] = str(disk / "cache" if in_disk else aside / "cache")

    def run(self, words: str, first: Callable[[], object] | None = None) -> Ended:
        more = self.sizes if words.startswith("train") else ()
        words = words.replace("DISK", str(self.disk)).replace("ASIDE", str(self.aside))
        return run_forked([*words.split(" "), *more], first)

    def done(self, words: str) -> None:
        ended = self.run(words)
        if ended.status != 0:
            raise RuntimeError(f"{words}: {ended}")

    def prepare(self) -> None:
        """What the cases start from, and what an uninterrupted run gives."""
        make_data(self.aside)
        train = TRAIN.replace("DISK", "ASIDE") + " --engine plain --hidden 6,5"
        self.done(f"{train} --epochs 3")
        shutil.copy(self.aside / "run/model_latest.npz", self.aside / "other.npz")
        self.done(f"{train} --epochs 4")
        self.clear()
        if self.case.before:
            self.done(self.case.before)
        self.start = self.aside / "start"
        shutil.copytree(self.disk, self.start)
        used = self.used()
        self.done(self.case.words)
        self.finished = self.aside / "finished"
        shutil.copytree(self.disk, self.finished)
        # Old and new are there together for a moment.
        self.found.needed_pages = (self.used() - used) // PAGE + 2 + self.largest() // PAGE

    def used(self) -> int:
        status = os.statvfs(self.disk)
        return (status.f_blocks - status.f_bfree) * status.f_frsize

    def largest(self) -> int:
        return max((file.stat().st_size for file in self.disk.rglob("*") if file.is_file()), default=0)

    def clear(self) -> None:
        for item in self.disk.iterdir():
            if item.is_dir():
                shutil.rmtree(item)
            else:
                item.unlink()

    def fill(self, pages_left: int) -> None:
        """Takes all space but so many pages."""
        status = os.statvfs(self.disk)
        size = status.f_bavail * status.f_frsize - pages_left * PAGE
        handle = os.open(self.filler, os.O_CREAT | os.O_WRONLY)
        try:
            if size > 0:
                os.posix_fallocate(handle, 0, size)
        finally:
            os.close(handle)

    def reset(self) -> None:
        """What the command starts from."""
        self.clear()
        shutil.copytree(self.start, self.disk, dirs_exist_ok=True)

    def try_with(self, pages: int) -> None:
        """The command with so much space."""
        self.reset()
        self.fill(pages)
        ended = self.run(self.case.words)
        self.filler.unlink()
        self.judge(ended, f"{pages} pages", "No space left on device")

    def judge(self, ended: Ended, limit: str, reason: str) -> None:
        """What must hold after a command that met a limit; and after the same command without one."""
        self.found.tried += 1
        self.found.ended[f"status {ended.status}"] += 1
        faults = [ended.fault(self.failed), *self._damaged()]
        if ended.status != 0:
            faults += self._changed()
            if self.case.may_do_without:
                faults.append(f"a cache that cannot be written ended the command: {ended.err}")
            last = ended.err.splitlines()[-1] if ended.err else ""
            if reason not in last:
                faults.append(f"the reason is not said: {last}")
        again = self.run(self.case.again or self.case.words)
        if again.status != 0:
            faults.append(f"without a limit: {again}")
        else:
            faults += [*self._damaged(), *self._differing()]
        self.found.broke += [f"{limit}: {fault}" for fault in faults if fault]

    def files(self) -> list[Path]:
        return sorted(file for file in self.disk.rglob("*") if file.is_file() and file != self.filler)

    def _damaged(self) -> list[str]:
        """Files that are temporary, or not whole."""
        faults = []
        for file in self.files():
            try:
                if file.suffix == ".tmp" or file.name.startswith(".tmp"):
                    raise ValueError("it is left over")
                check_whole(file)
            except Exception as error:
                faults.append(f"{file.relative_to(self.disk)}: {type(error).__name__}: {error}")
        return faults

    def _changed(self) -> list[str]:
        """Of a command that writes one file: it has the bits of before. A run's files may be those of a later epoch."""
        if self.disk.joinpath("run").exists() or self.disk.joinpath("compare").exists():
            kept = self.start / "run/model_latest.npz"
            now = [self.disk / "run" / name for name in ("model_latest.npz", "model_previous.npz")]
            if "another" in self.name and not any(x.exists() and filecmp.cmp(x, kept, shallow=False) for x in now):
                return ["the checkpoint of the run before is gone"]
            return []
        before = {file.relative_to(self.start): digest(file) for file in self.start.rglob("*") if file.is_file()}
        now_there = {file.relative_to(self.disk): digest(file) for file in self.files()}
        return [] if before == now_there else [f"files changed: {sorted(map(str, now_there))}"]

    def _differing(self) -> list[str]:
        """Checkpoints and cached sets that are not those of a run which was never stopped."""
        faults = []
        for file in self.finished.rglob("*.np[yz]"):
            now = self.disk / file.relative_to(self.finished)
            same = same_run if file.suffix == ".npz" else lambda a, b: filecmp.cmp(a, b, shallow=False)
            if not now.exists() or (file.stem != "model_previous" and not same(file, now)):
                faults.append(f"{file.name} is not that of an uninterrupted run")
        return faults


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main() -> None:
    folder, case, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    mount(folder)
    with tempfile.TemporaryDirectory() as aside:
        driver = Driver(CASES[case], case, folder, Path(aside))
        driver.prepare()
        for pages in range(0, driver.found.needed_pages + step, step):
            driver.try_with(pages)
    print(json.dumps(vars(driver.found)))


if __name__ == "__main__":
    main()
