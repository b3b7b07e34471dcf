"""A process that is killed at any moment leaves a checkpoint from which the run ends with the same bits."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from catopt_xp.checkpoint import read_checkpoint
from catopt_xp.training import TrainResult, train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL and SIGTERM are POSIX signals")

REPOSITORY = Path(__file__).resolve().parents[1]
KILLS, EPOCHS, BATCHES = 20, 150, 4
SETTINGS: dict[str, Any] = {
    "total_epoch": EPOCHS,
    "batch_size": 8,
    "hidden": (5, 4),
    "dropout": 0.2,
    "learning_rate": 0.01,
    "device": "cpu",
    "verbose": False,
}
# What a killed process runs: the same settings, a checkpoint after every step. It lingers after each
# epoch, so that it does not end before it is killed where disks are fast.
SCRIPT = """
import sys, time
import numpy as np
from catopt_xp import train

class Linger:
    def on_epoch(self, state):
        time.sleep(0.004)

folder, settings = sys.argv[1], eval(sys.argv[2])
X = np.random.default_rng(0).integers(0, 256, (30, 12), dtype=np.uint8).T
Y = (X[:6].mean(axis=0, keepdims=True) > 128).astype(int)
train(X=X, Y=Y, save_dir=folder, checkpoint_every_steps=1, callbacks=[Linger()], **settings)
"""


def fit(**given: Any) -> TrainResult:
    X = np.random.default_rng(0).integers(0, 256, (30, 12), dtype=np.uint8).T
    Y = (X[:6].mean(axis=0, keepdims=True) > 128).astype(int)
    return train(X=X, Y=Y, **(SETTINGS | given))


def start(folder: Path) -> subprocess.Popen[str]:
    """A training process whose first checkpoint has been written."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(folder), repr(SETTINGS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    limit = time.monotonic() + 60
    while not (folder / "model_latest.npz").exists():
        if process.poll() is not None or time.monotonic() > limit:
            process.kill()
            pytest.fail(f"no checkpoint was written: {process.communicate()[1]}")
        time.sleep(0.002)
    return process


def end(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    """Sends the signal; exit status and the last line of standard error."""
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    return process.returncode, (told.splitlines() or [""])[-1]


def steps_done(file: Path) -> int:
    steps = read_checkpoint(file)[1]["optimizer"]["steps"]
    assert isinstance(steps, int)
    return steps


@pytest.fixture(scope="module")
def straight() -> TrainResult:
    return fit(save_dir=None)


def assert_same_bits(one: TrainResult, other: TrainResult) -> None:
    for a, b in ((one.model.save(), other.model.save()), (one.optimizer.save(), other.optimizer.save())):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    for name in ("epoch", "learning_rate", "train_loss", "mini_batch_loss", "eval_epoch", "full_train_loss"):
        assert getattr(one.history, name) == getattr(other.history, name), name


def kill_once(folder: Path, moment: float) -> int:
    """Trains in `folder`, killed `moment` seconds after its first checkpoint; the exit status."""
    folder.mkdir()
    process = start(folder)
    time.sleep(moment)
    return end(process, signal.SIGKILL)[0]


def test_a_killed_run_ends_with_the_same_bits_wherever_it_was_killed(tmp_path: Path, straight: TrainResult) -> None:
    """One run, killed twenty times at random moments; each time it goes on to the end from what it left."""
    moments, folders = random.Random(0), [tmp_path / str(number) for number in range(KILLS)]
    with ThreadPoolExecutor(2) as two_at_a_time:
        statuses = list(two_at_a_time.map(kill_once, folders, [moments.uniform(0, 0.25) for _ in folders]))
    assert set(statuses) == {-signal.SIGKILL}, "a run ended before it was killed; give it more epochs"
    killed_at = [steps_done(folder / "model_latest.npz") for folder in folders]
    left = [file for folder in folders for file in folder.iterdir() if file.name != "model_latest.npz"]
    print(f"killed after {sorted(killed_at)} steps; {len(left)} half-written files")
    assert len(set(killed_at)) > KILLS // 4
    assert any(steps % BATCHES for steps in killed_at)
    assert len({file.parent for file in left}) == len(left)  # at most the one that was being written
    assert all(file.suffix == ".tmp" for file in left)
    for folder in folders:
        assert_same_bits(fit(save_dir=None, recover_from=folder / "model_latest.npz"), straight)


def test_what_killed_runs_leave_does_not_pile_up(tmp_path: Path, straight: TrainResult) -> None:
    half_written = [tmp_path / f".model_latest.npz.{number}.tmp" for number in range(5)]
    for file in half_written:
        file.write_bytes(b"half a checkpoint")
        os.utime(file, (0, 0))
    end(start(tmp_path), signal.SIGKILL)
    assert not any(file.exists() for file in half_written)
    file = tmp_path / "model_latest.npz"
    assert_same_bits(fit(save_dir=tmp_path, recover_from=file), straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(
    tmp_path: Path, straight: TrainResult, number: signal.Signals
) -> None:
    status, told = end(start(tmp_path), number)
    file = tmp_path / "model_latest.npz"
    assert status not in (0, -signal.SIGTERM)  # not as if nothing had happened, and not shot down
    place = re.search(r"Interrupted: interrupted at epoch (\d+), batch (\d+); resume with (recover_from='.*')$", told)
    assert place is not None, told
    assert place[3] == f"recover_from={str(file)!r}"
    assert steps_done(file) == int(place[1]) * BATCHES + int(place[2])
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    copied = shutil.copy(file, tmp_path / "copied.npz")
    assert_same_bits(fit(save_dir=None, recover_from=copied), straight)
