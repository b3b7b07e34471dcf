"""`kill -9` at random moments of training, saving, streaming, comparing, decoding and drawing.

After each kill what is there is whole; the same command, called again, ends with what a command that nothing killed
leaves; and nothing piles up.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from killed_runs import (
    SIGNALS_REASON,
    Server,
    age,
    assert_same_checkpoint,
    none_is_left,
    server,
    steps_done,
    temporaries,
    without_times,
    write_rows,
    write_set,
)
from PIL import Image

from catopt_xp.training.history import History

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason=SIGNALS_REASON)

LONG = 200
MANY = pytest.param(LONG, marks=pytest.mark.long)
CHAIN = 8  # kills of one run, before it may end


@dataclass(frozen=True)
class Work:
    """A command of `train`, and what its data are: (samples, features)."""

    words: str
    shape: tuple[int, int]
    streamed: bool = False


WORKS = {
    # Many short steps, each with a checkpoint.
    "training": Work("--hidden 5,4 --batch-size 8 --epochs 6 --print-interval 2 --dropout 0.2", (40, 12)),
    # 10 MB a checkpoint: nearly all the time goes into writing.
    "saving": Work("--hidden 40 --batch-size 8 --epochs 3 --print-interval 1", (24, 20_000)),
    "streaming": Work("--hidden 5 --batch-size 8 --epochs 2 --memory-limit 400KB", (240, 3000), streamed=True),
}


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def serving(one_server: Server, tmp_path: Path) -> Server:
    one_server.environment = {"CATOPT_XP_CACHE": str(tmp_path / "cache")}
    return one_server


def data_of(work: Work, folder: Path) -> Path:
    if work.streamed:
        write_rows(folder / "set.npy", *work.shape)
        return folder / "set.npy"
    write_set(folder / "set.npz", *work.shape)
    return folder / "set.npz"


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "times"),
    [("training", 6), ("saving", 1), ("streaming", 1)]
    + [pytest.param(kind, LONG, marks=pytest.mark.long) for kind in WORKS],
)
def test_training_killed_again_and_again_ends_with_the_same_bits(
    kind: str, times: int, serving: Server, tmp_path: Path, record: Callable[..., None]
) -> None:
    """Each run is killed up to eight times, going on each time from what it left, and then ends."""
    work, moments = WORKS[kind], random.Random(times)
    words = [
        "train",
        "--no-figure",
        "--data",
        str(data_of(work, tmp_path)),
        "--device",
        "cpu",
        "--engine",
        "plain",
        *work.words.split(),
    ]
    words += ["--checkpoint-every-steps", "1"]
    straight = tmp_path / "straight"
    serving.measure([*words, "--save-dir", str(straight)])
    kills, chains, half_written, stood_at = 0, 0, 0, []
    while kills < times:
        folder = tmp_path / f"run{chains}"
        command, file = [*words, "--save-dir", str(folder)], folder / "model_latest.npz"
        done = 0
        for _ in range(min(CHAIN, times - kills)):
            resume = ["--recover-from", str(file)] if file.exists() else []
            kills += serving.kill([*command, *resume], moments)
            if file.exists():
                assert steps_done(file) >= done  # whole, and nothing is lost
                done = steps_done(file)
                stood_at.append(done)
            if (folder / "model_history.csv").exists():
                History.from_csv(folder / "model_history.csv")
        left = temporaries(folder) if folder.exists() else []
        half_written += len(left)
        age(left)
        serving.finish([*command, *(["--recover-from", str(file)] if file.exists() else [])])
        assert_same_checkpoint(file, straight / file.name)
        names = {path.name for path in folder.iterdir()}
        assert names == {"model_latest.npz", "model_history.csv", "model_history.json"}
        for read, name in ((History.from_json, "model_history.json"), (History.from_csv, "model_history.csv")):
            assert without_times(vars(read(folder / name))) == without_times(vars(read(straight / name)))
        chains += 1
    if times == LONG:
        assert half_written > 0
        assert len(set(stood_at)) > 3
        record(kills=kills, runs=chains, half_written_files=half_written, places=len(set(stood_at)), broke=0)


@pytest.mark.parametrize("times", [1, MANY])
def test_a_comparison_killed_again_and_again_ends_with_the_same_results(
    times: int, serving: Server, tmp_path: Path, record: Callable[..., None]
) -> None:
    write_set(tmp_path / "set.npz", 40, 12)
    words = ["compare", "decay", "--data", str(tmp_path / "set.npz"), "--epochs", "30", "--print-interval", "2"]
    words += ["--device", "cpu", "--engine", "plain", "--save-dir"]
    straight = tmp_path / "straight"
    serving.measure([*words, str(straight)])
    moments, kills, comparisons, half_written = random.Random(times), 0, 0, 0
    while kills < times:
        folder = tmp_path / f"compared{comparisons}"
        for _ in range(min(CHAIN, times - kills)):
            kills += serving.kill([*words, str(folder)], moments)
            for file in folder.glob("*.json"):
                assert len(History.from_json(file).epoch) == 30
            for file in folder.glob("*.npz"):
                steps_done(file)
        left = temporaries(folder)
        half_written += len(left)
        age(left)
        serving.finish([*words, str(folder)])
        assert {file.name for file in folder.iterdir()} == {file.name for file in straight.iterdir()}
        for file in straight.glob("*.npz"):
            assert_same_checkpoint(folder / file.name, file)
        for file in straight.glob("*.json"):
            one, other = json.loads(file.read_text()), json.loads((folder / file.name).read_text())
            assert without_times(one) == without_times(other)
        comparisons += 1
    record(kills=kills, comparisons=comparisons, half_written_files=half_written, broke=0)


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "times"),
    [
        ("decoding", 1),
        ("drawing by two", 1),
        pytest.param("decoding", LONG, marks=pytest.mark.long),
        pytest.param("drawing", LONG, marks=pytest.mark.long),
        pytest.param("drawing by two", LONG // 4, marks=pytest.mark.long),
    ],
)
def test_a_killed_writer_of_the_cache_leaves_none_or_a_whole_one(
    kind: str, times: int, serving: Server, tmp_path: Path, record: Callable[..., None]
) -> None:
    cache, moments = tmp_path / "cache", random.Random(times)
    words = [
        "train",
        "--no-figure",
        "--epochs",
        "1",
        "--hidden",
        "2",
        "--device",
        "cpu",
        "--engine",
        "plain",
        "--img-shape",
        "48x48",
    ]
    words += ["--save-dir", str(tmp_path / "run")]
    if kind == "decoding":
        paint(tmp_path / "photographs", 150)
        words += ["--data", str(tmp_path / "photographs")]
    elif kind == "drawing":
        words += ["--train-size", "24", "--dev-size", "6"]
    else:  # in two processes of its own, which must not outlive it
        serving.environment["OMP_NUM_THREADS"] = "2"
        words += ["--train-size", "90", "--dev-size", "10"]
    serving.measure(words)
    (file,) = cache.glob("*.npy")
    expected, kills, whole, half_written = file.read_bytes(), 0, 0, 0
    while kills < times:
        file.unlink(missing_ok=True)
        kills += serving.kill(words, moments)
        if file.exists():
            assert file.read_bytes() == expected
            whole += 1
        others = set(cache.iterdir()) - {file} - set(temporaries(cache))
        assert others == set()
        half_written = max(half_written, len(temporaries(cache)))
    assert none_is_left(f"CATOPT_XP_CACHE={cache}"), "processes that draw outlive the one that was killed"
    file.unlink(missing_ok=True)
    age(temporaries(cache))
    serving.finish(words)
    assert file.read_bytes() == expected
    assert list(cache.iterdir()) == [file]
    record(kills=kills, whole_caches=whole, half_written_files=half_written, broke=0)


def paint(folder: Path, size: int) -> None:
    """So many photographs of each of two classes, larger than they are trained."""
    rng = np.random.default_rng(0)
    for part, count in (("training_set", size), ("test_set", 4)):
        for name in ("cats", "dogs"):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{name}.{number}.jpg")
