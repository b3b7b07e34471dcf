"""Two and four processes that do the same at once: into one cache, into one run folder, one comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killed_runs import assert_same_checkpoint, steps_done, temporaries, without_times, write_set
from PIL import Image

import catopt_xp
from catopt_xp.training.checkpoint import read_checkpoint
from catopt_xp.training.history import History

# Each process has imported everything when it reads what to do, so that all begin within a millisecond.
SCRIPT = """
import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
import PIL.Image, PIL.PngImagePlugin
from catopt_xp import training
from catopt_xp.commands import main as cli

sys.modules["matplotlib"] = None
told = sys.stdout
for line in sys.stdin:
    words, environment = json.loads(line)
    os.environ.update(environment)
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = cli.main(words)
    print(json.dumps([status, out.getvalue(), err.getvalue()]), file=told, flush=True)
"""
QUICK = ["--device", "cpu", "--engine", "plain", "--hidden", "3", "--no-figure"]

pytestmark = pytest.mark.parametrize(
    ("size", "rounds"), [(4, 1), *[pytest.param(size, 100, marks=pytest.mark.long) for size in (2, 4)]]
)


class Crew:
    """Processes that run commands at once."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self.processes = processes

    def run(self, *commands: list[str], **environment: str) -> list[str]:
        """One command for each process, which must end well; what each printed."""
        crew = self.processes[: len(commands)]
        for process, words in zip(crew, commands, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps([words, environment]) + "\n")
        for process in crew:
            assert process.stdin is not None
            process.stdin.flush()
        printed = []
        for process in crew:
            assert process.stdout is not None
            status, out, err = json.loads(process.stdout.readline())
            assert status == 0, err
            assert all("no figure was drawn" in line for line in err.splitlines()), err
            printed.append(out)
        return printed


@contextmanager
def crew_of(size: int) -> Iterator[Crew]:
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = os.environ | one | {"PYTHONPATH": str(Path(catopt_xp.__file__).parents[1])}
    with ExitStack() as stack:
        processes = []
        for _ in range(size):
            command = [sys.executable, "-c", SCRIPT]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            processes.append(stack.enter_context(process))
        yield Crew(processes)


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with crew_of(4) as made:
        yield made


@pytest.mark.parametrize("kind", ["decode", "draw"])
def test_one_cache_is_filled_by_several_at_once(
    kind: str, size: int, rounds: int, crew: Crew, tmp_path: Path, record: Callable[..., None]
) -> None:
    words = ["train", *QUICK, "--epochs", "1", "--img-shape", "16x16", "--save-dir"]
    after = ["--train-size", "12", "--dev-size", "4"]
    if kind == "decode":
        after += ["--data", str(paint(tmp_path / "photographs"))]
    crew.run([*words, str(tmp_path / "straight"), *after], CATOPT_XP_CACHE=str(tmp_path / "first"))
    (expected,) = (tmp_path / "first").iterdir()
    for k in range(rounds):
        folder, cache = tmp_path / str(k), tmp_path / f"cache{k}"
        commands = [[*words, str(folder / str(number)), *after] for number in range(size)]
        crew.run(*commands, CATOPT_XP_CACHE=str(cache))
        (file,) = cache.iterdir()  # one, and nothing beside it
        assert (file.name, file.read_bytes()) == (expected.name, expected.read_bytes())
        for number in range(size):
            file = folder / str(number) / "model_latest.npz"
            assert_same_checkpoint(file, tmp_path / "straight" / file.name)
    record(rounds=rounds, processes=size, broke=0)


def test_several_that_train_into_one_folder_leave_whole_files_and_are_told(
    size: int, rounds: int, crew: Crew, tmp_path: Path, record: Callable[..., None]
) -> None:
    """Each has a seed of its own, so that it is known whose a file is."""
    write_set(tmp_path / "set.npz", 40, 12)
    words = ["train", *QUICK, "--data", str(tmp_path / "set.npz"), "--epochs", "10", "--batch-size", "8"]
    words += ["--print-interval", "3", "--checkpoint-every-steps", "2"]
    for seed in range(size):
        crew.run([*words, "--seed", str(seed), "--save-dir", str(tmp_path / f"seed{seed}")])
    warned = 0
    for k in range(rounds):
        folder = tmp_path / str(k)
        printed = crew.run(*[[*words, "--seed", str(seed), "--save-dir", str(folder)] for seed in range(size)])
        warned += sum("is written by something else too" in out or "was of another run" in out for out in printed)
        latest, previous = folder / "model_latest.npz", folder / "model_previous.npz"
        assert_same_checkpoint(latest, tmp_path / f"seed{seed_of(latest)}" / latest.name)
        if previous.exists():
            assert steps_done(previous) > 0  # whole
        for read, name in ((History.from_json, "model_history.json"), (History.from_csv, "model_history.csv")):
            found = without_times(vars(read(folder / name)))
            whole = [without_times(vars(read(tmp_path / f"seed{seed}" / name))) for seed in range(size)]
            assert found in whole
        known = {latest.name, previous.name, "model_history.json", "model_history.csv"}
        assert {file.name for file in folder.iterdir()} <= known
    assert warned >= rounds * (size - 1)  # all but the one that came first, at least
    record(rounds=rounds, processes=size, told=warned, broke=0)


def test_several_that_compare_in_one_folder_end_with_the_same_results(
    size: int, rounds: int, crew: Crew, tmp_path: Path, record: Callable[..., None]
) -> None:
    write_set(tmp_path / "set.npz", 40, 12)
    words = ["compare", "decay", "--data", str(tmp_path / "set.npz"), "--epochs", "12", "--print-interval", "3"]
    words += ["--device", "cpu", "--engine", "plain", "--save-dir"]
    straight = tmp_path / "straight"
    crew.run([*words, str(straight)])
    for k in range(rounds):
        folder = tmp_path / str(k)
        crew.run(*[[*words, str(folder)]] * size)
        assert temporaries(folder) == []
        for file in straight.glob("*.npz"):
            assert_same_checkpoint(folder / file.name, file)
        for file in straight.glob("*.json"):
            one, other = json.loads(file.read_text()), json.loads((folder / file.name).read_text())
            assert without_times(one) == without_times(other)
    record(rounds=rounds, processes=size, broke=0)


def seed_of(checkpoint: Path) -> int:
    history: dict[str, Any] = read_checkpoint(checkpoint)[1]["run"]["history"]
    return int(history["run"]["seed"])


def paint(folder: Path) -> Path:
    """Twelve photographs of each of two classes, and four to test them."""
    rng = np.random.default_rng(0)
    for part, count in (("training_set", 12), ("test_set", 4)):
        for name in ("cats", "dogs"):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{name}.{number}.png")
    return folder
