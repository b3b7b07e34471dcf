"""A clock that is set back, or leaps a year ahead, in the middle of things: nothing negative, nothing lost."""

from __future__ import annotations

import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killed_runs import assert_same_checkpoint, write_set
from short_runs import fit

import catopt_xp
from catopt_xp.commands.main import main
from catopt_xp.data.drawn.drawings import get_drawn_set
from catopt_xp.io.console import Bar
from catopt_xp.io.files import remove_stale, write_whole
from catopt_xp.training.callbacks import TensorBoard, TrainState
from catopt_xp.training.history import History

YEAR = 365 * 86400.0
LEAPS = {"back": -YEAR, "ahead": YEAR}


class Clock:
    """The system's clock, which leaps now and then; what measures times goes by another, which nobody can set."""

    def __init__(self) -> None:
        self.right, self.offset = time.time, 0.0

    def time(self) -> float:
        return self.right() + self.offset

    def time_ns(self) -> int:
        return int(self.time() * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for name in ("time", "time_ns"):
        monkeypatch.setattr(time, name, getattr(made, name))
    monkeypatch.setattr("tqdm.std.time", made.time)  # taken by name when it was imported
    return made


@pytest.fixture(params=LEAPS)
def leap(request: pytest.FixtureRequest) -> float:
    return LEAPS[request.param]


class Leaping:
    """A callback that sets the clock after every epoch, back and forth."""

    def __init__(self, clock: Clock, leap: float) -> None:
        self.clock, self.leaps = clock, itertools.cycle([leap, 0.0, -leap / 2])

    def on_epoch(self, state: TrainState) -> None:
        self.clock.offset = next(self.leaps)


def test_a_run_has_the_same_numbers_and_no_negative_time(clock: Clock, leap: float, tmp_path: Path) -> None:
    straight = fit(total_epoch=8, save_dir=tmp_path / "straight")
    result = fit(total_epoch=8, save_dir=tmp_path / "leapt", callbacks=[Leaping(clock, leap)], checkpoint_every_steps=3)
    assert straight.checkpoint is not None
    assert result.checkpoint is not None
    assert_same_checkpoint(result.checkpoint, straight.checkpoint)
    assert all(0 <= seconds < 60 for seconds in result.history.seconds)
    assert all(0 <= seconds < 60 for seconds in result.history.timings.values())
    assert "-" not in re.sub(r"[a-z]-[a-z]", "", result.history.time_table())


@pytest.mark.parametrize("command", ["total", "iterable"])
def test_a_bar_shows_no_negative_time_and_does_not_stand_still(clock: Clock, leap: float, command: str) -> None:
    shown = io.StringIO()
    work = range(200)
    bar: Any = Bar(work, file=shown, mininterval=0.0) if command == "iterable" else Bar(total=200, file=shown)
    bar.mininterval = bar.miniters = 0
    leaps = itertools.cycle([leap, 0.0, -leap])
    for k, _ in enumerate(bar if command == "iterable" else work):
        if k % 20 == 10:
            clock.offset = next(leaps)
        if command == "total":
            bar.update()
    bar.close()
    text = shown.getvalue()
    assert text.count("\r") > 150  # redrawn all along
    assert not re.search(r"-\d|\d\d:\d\d:\d\d|days", text), text
    assert "200/200" in text


def test_only_a_killed_process_s_files_are_removed(clock: Clock, leap: float, tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    left = tmp_path / ".a.npz.0123abcd.tmp"
    left.write_bytes(b"half")
    seen: list[bool] = []

    def write(stream: Any) -> None:
        stream.write(b"content")
        stream.flush()
        (own,) = set(tmp_path.iterdir()) - {left}
        clock.offset = leap  # as if this process had not written for a year, or until in a year
        remove_stale(file)
        seen.append(own.exists())

    write_whole(file, write)
    assert file.read_bytes() == b"content"
    if os.name == "posix":
        assert seen == [True]
    assert list(tmp_path.iterdir()) == [file]  # that of the killed one went, whichever way the clock leapt


def test_the_cache_is_found_again(clock: Clock, leap: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATOPT_XP_CACHE", str(tmp_path))
    first = get_drawn_set((6, 4), 2, 1)
    clock.offset = leap
    again = get_drawn_set((6, 4), 2, 1)
    assert again.timings["decode"] == 0
    assert first.timings["decode"] > 0
    np.testing.assert_array_equal(first.train_X, again.train_X)
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interruption_names_the_checkpoint_of_this_run_and_no_other(
    clock: Clock, leap: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path / "set.npz", 20, 12)
    words = ["train", "--data", str(tmp_path / "set.npz"), "--device", "cpu", "--engine", "plain", "--epochs", "2"]
    words += ["--save-dir", str(tmp_path / "run"), "--hidden", "3"]
    right = catopt_xp.train

    def insist(**options: Any) -> None:  # a second Ctrl-C, after the clock was set
        clock.offset = leap
        right(**options)
        raise KeyboardInterrupt

    monkeypatch.setattr("catopt_xp.commands.main.train", insist)
    assert main(words) == 130
    assert f"saved {tmp_path / 'run' / 'model_latest.npz'}" in capsys.readouterr().err

    def at_once(**options: Any) -> None:
        raise KeyboardInterrupt

    os.utime(tmp_path / "run" / "model_latest.npz", (time.time() + 2 * YEAR, time.time() + 2 * YEAR))
    monkeypatch.setattr("catopt_xp.commands.main.train", at_once)
    assert main(words) == 130
    assert capsys.readouterr().err == "catopt-xp: interrupted, nothing was saved\n"


def test_a_log_for_tensorboard_is_read_in_the_order_of_its_runs(clock: Clock, leap: float, tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    def logged(epochs: int, **more: Any) -> Any:
        log = TensorBoard(tmp_path / "board")
        return fit(total_epoch=epochs, callbacks=[log, Leaping(clock, leap)], save_dir=tmp_path / "run", **more)

    result = logged(3)
    clock.offset = leap
    logged(6, recover_from=result.checkpoint, hidden=(30, 20, 20))
    files = sorted((tmp_path / "board").iterdir(), key=lambda file: file.name)
    assert len(files) == 2
    events = [[Event.FromString(record) for record in records(file)] for file in files]
    steps = [[event.step for event in found if event.HasField("summary")] for found in events]
    assert (max(steps[0]), max(steps[1])) == (3 * 4, 6 * 4)  # mini-batches; the resumed run comes last
    for found in events:  # while the file is open its times do not leap: by the order of writing, within a second
        times = [event.wall_time for event in found]
        assert max(times) - min(times) < 60


def records(file: Path) -> Iterator[bytes]:
    """The records of a TFRecord file: length, checksum, content, checksum."""
    content, at = file.read_bytes(), 0
    while at < len(content):
        length = int.from_bytes(content[at : at + 8], "little")
        yield content[at + 12 : at + 12 + length]
        at += 16 + length


def test_a_checkpoint_of_the_future_does_no_harm(leap: float, tmp_path: Path) -> None:
    """What a run finds in its folder may have been written when the clock was wrong."""
    straight = fit(total_epoch=6, save_dir=tmp_path / "straight")
    stopped = fit(total_epoch=3, save_dir=tmp_path / "run")
    for file in (tmp_path / "run").iterdir():
        os.utime(file, (time.time() + leap, time.time() + leap))
    assert stopped.checkpoint is not None
    assert straight.checkpoint is not None
    fit(total_epoch=6, save_dir=tmp_path / "run", recover_from=stopped.checkpoint, hidden=(30, 20, 20))
    assert_same_checkpoint(stopped.checkpoint, straight.checkpoint)
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["model_latest.npz"]


# --- whole processes --------------------------------------------------------------------------------------------------

# A figure takes longer than all the rest.
SITE = "import sys; sys.modules['matplotlib'] = None\n"
# The system's clock leaps at every reading of it; what measures durations is left alone.
LEAPING_SITE = """
import random, time
right, rng = time.time, random.Random({seed})
time.time = lambda: right() + rng.choice([-1, 0, 1]) * 31536000.0 * rng.random()
time.time_ns = lambda: int(time.time() * 1e9)
"""


@pytest.mark.parametrize("times", [1, pytest.param(30, marks=pytest.mark.long)])
def test_a_command_whose_clock_leaps_at_every_reading_ends_as_ever(
    times: int, tmp_path: Path, record: Callable[..., None]
) -> None:
    write_set(tmp_path / "set.npz", 40, 12)
    words = [sys.executable, "-m", "catopt_xp", "train", "--data", str(tmp_path / "set.npz"), "--device", "cpu"]
    words += ["--engine", "plain", "--hidden", "5,4", "--epochs", "12", "--progress", "--save-dir"]
    run(words, tmp_path / "straight", SITE)
    for seed in range(times):
        shown = run(words, tmp_path / str(seed), SITE + LEAPING_SITE.format(seed=seed))
        assert not re.search(r"-\d+:|-\d+\.\d+\s?s|\d\d:\d\d:\d\d", shown), shown
        assert_same_checkpoint(tmp_path / str(seed) / "model_latest.npz", tmp_path / "straight" / "model_latest.npz")
        history = History.from_json(tmp_path / str(seed) / "model_history.json")
        assert all(seconds >= 0 for seconds in [*history.seconds, *history.timings.values()])
    if times > 1:
        faketime, faked = shutil.which("faketime"), 0
        for days in [-3650, -1, 1, 400] if faketime else []:
            folder = tmp_path / f"faked{days}"
            run([str(faketime), "-f", f"{days:+d}d x5", *words], folder, SITE)
            assert_same_checkpoint(folder / "model_latest.npz", tmp_path / "straight" / "model_latest.npz")
            faked += 1
        record(leaping=times, faketime=faked if faketime else "not installed", broke=0)


def run(words: list[str], folder: Path, site: str) -> str:
    """Standard output and standard error of a command that must end well; `site`: what Python runs before it."""
    sites = folder.with_name(f"{folder.name}_site")
    sites.mkdir()
    (sites / "sitecustomize.py").write_text(site)
    path = os.pathsep.join([str(sites), str(Path(catopt_xp.__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([*words, str(folder)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
