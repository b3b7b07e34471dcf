"""Sets that are larger than memory: their order, and that streaming changes no bit of a run."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from cuda_runs import CpuDevice, cuda_engine
from hypothesis import given
from hypothesis import strategies as st
from panel_runs import Case
from short_runs import Crash, crash, interrupt, make_run

from catopt_xp.backend.machine import memory_size, size_text
from catopt_xp.backend.ranks import Ranks
from catopt_xp.backend.xp import Backend, CupyBackend, NumpyBackend
from catopt_xp.commands.main import main
from catopt_xp.data.load import load_data
from catopt_xp.data.order import Pool, window_bounds, window_order, window_pools
from catopt_xp.data.stream import Reader, RowFile, StreamedRows, StreamedSet, find_rows
from catopt_xp.engines.cuda.engine import CudaEngine
from catopt_xp.engines.plain import PlainEngine, Settings
from catopt_xp.training.callbacks import TrainState
from catopt_xp.training.loop import Interrupted, Loop
from catopt_xp.training.train import TrainResult, train

Array = np.ndarray[Any, Any]
M, N_X, BATCH, WINDOW = 203, 19, 8, 15
LIMIT = 2 * 4 * WINDOW * N_X  # bytes: half of it holds four windows
ENGINES = ("plain", "panels")


def rows_and_labels(m: int = M, dtype: str = "uint8") -> tuple[Array, Array]:
    """(m, N_X) rows and (m,) labels: whether the first half of the features is brighter."""
    rows = np.random.default_rng(0).integers(0, 256, (m, N_X), dtype=np.uint8)
    labels = (rows[:, :9].mean(axis=1) > rows[:, 9:].mean(axis=1)).astype(np.int64)
    return (rows if dtype == "uint8" else (rows / 255).astype(dtype)), labels


def save_set(folder: Path, name: str = "big", m: int = M, dtype: str = "uint8") -> Path:
    rows, labels = rows_and_labels(m, dtype)
    np.save(folder / f"{name}.npy", rows)
    np.save(folder / f"{name}_labels.npy", labels)
    return folder / f"{name}.npy"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_set(tmp_path_factory.mktemp("rows"))


def arguments(file: Path, **given: Any) -> dict[str, Any]:
    common: dict[str, Any] = {"X": None, "Y": None, "data": file, "memory_limit": LIMIT, "batch_size": BATCH}
    common |= {"engine": "plain", "total_epoch": 3, "learning_rate": 0.01, "save_dir": None, "device": "cpu"}
    common |= {"verbose": False, "print_interval": 1} | given
    if "recover_from" not in given:
        common["hidden"] = (5, 4)
    return common


def fit(file: Path, **given: Any) -> TrainResult:
    return train(**arguments(file, **given))


def resident(file: Path, **given: Any) -> Loop:
    """The run that `fit` makes, with the whole set in memory and the order of the windows."""
    caught = make_run(**arguments(file, **given) | {"memory_limit": None})
    sets = caught.loop.sets
    assert sets.stream is None
    sets.order = replace(sets.order, window=WINDOW)
    return caught.run()


def assert_same_bits(one: TrainResult | Loop, other: TrainResult | Loop) -> None:
    """Weights, moments and history."""
    kept = [{k: v for k, v in vars(x.history).items() if k not in ("seconds", "timings", "run")} for x in (one, other)]
    assert kept[0] == kept[1]
    a, b = ((x.learner if isinstance(x, Loop) else x) for x in (one, other))
    for first, second in ((a.model.save(), b.model.save()), (a.optimizer.save(), b.optimizer.save())):
        assert set(first) == set(second)
        for name, value in first.items():
            assert np.array_equal(value, second[name]), name


# --- the order --------------------------------------------------------------------------------------------------------


@given(
    m=st.integers(1, 300),
    window=st.integers(1, 90),
    epoch=st.integers(0, 10**6),
    seed=st.integers(0, 2**64),
    shuffle=st.sampled_from(["epoch", "once", "none"]),
)
def test_an_order_of_windows_is_a_repeatable_permutation(
    m: int, window: int, epoch: int, seed: int, shuffle: str
) -> None:
    order = window_order(m, window, epoch, seed, shuffle)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(m))
    np.testing.assert_array_equal(order, window_order(m, window, epoch, seed, shuffle))
    if shuffle == "none":
        np.testing.assert_array_equal(order, np.arange(m))
    if shuffle == "once":
        np.testing.assert_array_equal(order, window_order(m, window, 0, seed, shuffle))


@given(m=st.integers(1, 300), window=st.integers(1, 90), epoch=st.integers(0, 1000))
def test_pools_are_two_whole_windows_of_nearly_one_length(m: int, window: int, epoch: int) -> None:
    pools = window_pools(m, window, epoch)
    windows = [part for pool in pools for part in pool.windows]
    lengths = [part.stop - part.start for part in windows]
    assert max(lengths) <= window
    assert max(lengths) - min(lengths) <= 1
    bounds = window_bounds(m, window)
    assert sorted((part.start, part.stop) for part in windows) == list(itertools.pairwise(bounds))
    assert [len(pool.windows) for pool in pools] == [2] * len(pools)
    np.testing.assert_array_equal(np.concatenate([pool.rows for pool in pools]), window_order(m, window, epoch))


def test_a_pool_names_its_rows_in_the_order_of_training() -> None:
    assert Pool((slice(10, 12), slice(4, 6)), np.array([3, 0, 2, 1])).rows.tolist() == [5, 10, 4, 11]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [window_order(200, 20, *which).tolist() for which in ((0, 0), (1, 0), (0, 1))]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((10, 0, 0), "window: must be a whole number from 1, got 0"),
        ((0, 3, 0), "m: must be a whole number from 1, got 0"),
        ((10, 3, -1), "epoch: must be a whole number from 0"),
        ((10, 3, 0, 0, "daily"), "shuffle: 'daily' is not known"),
    ],
)
def test_impossible_windows_are_refused(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        window_order(*given)


# --- where rows lie ---------------------------------------------------------------------------------------------------


def test_rows_are_found_in_a_file_and_in_parts_of_it(file: Path) -> None:
    rows, _ = rows_and_labels()
    mapped = np.load(file, mmap_mode="r")
    for X, expected in (
        (mapped.T, rows),
        (np.asarray(mapped).T, rows),
        (np.asarray(mapped)[7:90].T, rows[7:90]),
        (mapped[50:].T, rows[50:]),
    ):
        found = find_rows(X)
        assert found is not None
        assert (found.m, found.n_x) == expected.shape
        with found.path.open("rb") as stream:
            stream.seek(found.offset)
            np.testing.assert_array_equal(np.fromfile(stream, np.uint8, expected.size), expected.ravel())


def test_rows_behind_a_whole_page_are_found(tmp_path: Path) -> None:
    rows, _ = rows_and_labels()
    (tmp_path / "raw").write_bytes(b"x" * 9001 + rows.tobytes())
    found = find_rows(np.memmap(tmp_path / "raw", np.uint8, "r", offset=9001, shape=rows.shape)[3:].T)
    assert found is not None
    assert found.offset == 9001 + 3 * N_X


def test_what_does_not_lie_in_rows_in_a_file_is_not_found(file: Path) -> None:
    mapped = np.load(file, mmap_mode="r")
    assert find_rows(np.ones((3, 4))) is None
    assert find_rows(mapped) is None  # features would be samples
    assert find_rows(mapped[:, 2:].T) is None
    assert find_rows(np.load(file, mmap_mode="c").T) is None


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shuffle", ["epoch", "once", "none"])
def test_a_streamed_run_has_the_bits_of_one_in_memory_with_its_order(file: Path, engine: str, shuffle: str) -> None:
    streamed = fit(file, engine=engine, shuffle=shuffle)
    assert streamed.engine == engine
    assert streamed.history.run["window"] == WINDOW
    assert_same_bits(streamed, resident(file, engine=engine, shuffle=shuffle))


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 13, "drop_last": True},
        {"accumulate": 2, "optimizer_options": {"clip_norm": 0.1}},
        {"optimizer": "momentum", "dropout": 0.3},
        {"optimizer": "rmsprop", "schedule_by": "step"},
        {"batch_size": 1, "memory_limit": 8 * 4 * N_X},
    ],
    ids=["drop_last", "accumulate", "dropout", "by step", "smallest windows"],
)
def test_every_kind_of_epoch_is_streamed_alike(file: Path, options: dict[str, Any], monkeypatch: Any) -> None:
    streamed = fit(file, **options)
    monkeypatch.setattr(sys.modules[__name__], "WINDOW", streamed.history.run["window"])
    assert_same_bits(streamed, resident(file, **options))


@pytest.mark.parametrize(("engine", "dtype"), [("plain", "float64"), ("panels", "float32")])
def test_numbers_are_streamed_as_pixels_are(tmp_path: Path, engine: str, dtype: str) -> None:
    file = save_set(tmp_path, dtype=dtype)
    options = {"engine": engine, "dtype": dtype}
    streamed = fit(file, memory_limit=LIMIT * np.dtype(dtype).itemsize, **options)
    assert streamed.history.run["window"] == WINDOW
    assert_same_bits(streamed, resident(file, **options))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_slow_disk_is_waited_for(file: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Reader._read

    def slow(reader: Reader, row: int, out: Array) -> None:
        time.sleep(0.005)
        read(reader, row, out)

    monkeypatch.setattr(Reader, "_read", slow)
    streamed = fit(file, engine=engine)
    assert streamed.history.timings["wait"] > 0.05
    monkeypatch.undo()
    assert_same_bits(streamed, resident(file, engine=engine))


def test_more_samples_than_a_chunk_of_evaluation_are_evaluated_alike(tmp_path: Path) -> None:
    file = save_set(tmp_path, m=1300)
    save_set(tmp_path, "big_dev", m=1100)
    for engine in ENGINES:
        streamed = fit(file, engine=engine, total_epoch=1)
        assert streamed.history.dev_loss
        assert_same_bits(streamed, resident(file, engine=engine, total_epoch=1))


def test_arrays_over_a_memory_map_are_streamed_too(file: Path) -> None:
    rows, labels = np.load(file, mmap_mode="r"), rows_and_labels()[1]
    given = {"data": None, "X": np.asarray(rows)[3:].T, "Y": labels[3:], "dev_X": rows[:3].T, "dev_Y": labels[:3]}
    streamed = fit(file, **given)
    assert streamed.history.run["window"] is not None
    assert_same_bits(streamed, resident(file, **given))


def test_the_cache_of_drawings_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"img_shape": (8, 8), "train_size": 60, "dev_size": 9}
    load_data(None, **sizes)
    streamed = fit(tmp_path, data=None, memory_limit=8 * WINDOW * 192, **sizes)
    assert streamed.history.run["window"] == WINDOW
    assert_same_bits(streamed, resident(tmp_path, data=None, **sizes))


def test_a_set_that_fits_is_trained_in_memory(file: Path) -> None:
    sets = make_run(**arguments(file, memory_limit=2 * M * N_X)).loop.sets
    assert sets.stream is None
    assert sets.order.window is None
    assert make_run(**arguments(file, memory_limit=2 * M * N_X - 2)).loop.sets.stream is not None


def test_a_set_that_does_not_fit_the_free_memory_is_streamed_unasked(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_run(**arguments(file, memory_limit=None)).loop
    assert loop.sets.stream is None
    working = 4 * (5 * sum(x.size for x in loop.learner.model.save().values()) + 512 * N_X)
    monkeypatch.setattr("catopt_xp.backend.xp.host_free_memory", lambda: working + 3000)
    stream = make_run(**arguments(file, memory_limit=None)).loop.sets.stream
    assert stream is not None
    assert stream.window == 1024 // (4 * N_X)  # the largest power of two within half of what is free


# --- resuming, stopping, callbacks ------------------------------------------------------------------------------------


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("catopt_xp_reader")]


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.hardening)])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_crashed_after_any_step_goes_on_with_the_same_bits(
    file: Path, tmp_path: Path, engine: str, every: int, crash_after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"engine": engine, "total_epoch": 2, "checkpoint_every_steps": 1, "save_dir": tmp_path}
    whole = fit(file, **options | {"save_dir": None})
    for step in range(1, 2 * -(-M // BATCH), every):
        crash_after(step + 1, crash)
        with pytest.raises(Crash):
            fit(file, **options)
        monkeypatch.undo()
        latest = tmp_path / "model_latest.npz"
        # Another limit, and the windows stay what they were.
        rest = fit(file, **options | {"memory_limit": 3 * LIMIT // 2, "recover_from": latest, "save_dir": None})
        assert rest.history.run["window"] == WINDOW
        assert_same_bits(rest, whole)
    assert readers() == []


def test_a_streamed_run_goes_on_in_memory_with_the_same_bits(file: Path, tmp_path: Path, crash_after: Any) -> None:
    whole = fit(file)
    crash_after(40, interrupt)
    with pytest.raises(Interrupted) as stopped:
        fit(file, save_dir=tmp_path)
    assert readers() == []
    rest = fit(file, recover_from=stopped.value.checkpoint, memory_limit=None)
    assert rest.history.run["window"] == WINDOW
    assert_same_bits(rest, whole)


def test_windows_that_a_resumed_run_has_no_room_for_are_named(file: Path, tmp_path: Path) -> None:
    fit(file, total_epoch=1, save_dir=tmp_path)
    latest = tmp_path / "model_latest.npz"
    with pytest.raises(ValueError, match=rf"goes on in windows of 15 rows: give a memory_limit of {size_text(LIMIT)}"):
        fit(file, recover_from=latest, memory_limit=LIMIT - 2)
    assert fit(file, recover_from=latest, memory_limit=size_text(LIMIT)).history.run["window"] == WINDOW


def test_a_run_in_memory_goes_on_streamed_at_the_end_of_an_epoch_alone(
    file: Path, tmp_path: Path, crash_after: Any
) -> None:
    fit(file, memory_limit=None, total_epoch=1, save_dir=tmp_path)
    rest = fit(file, recover_from=tmp_path / "model_latest.npz", total_epoch=2)
    assert any("this run streams in windows of 15 rows" in notice for notice in rest.notices)
    crash_after(40, interrupt)
    with pytest.raises(Interrupted) as stopped:
        fit(file, memory_limit=None, save_dir=tmp_path)
    with pytest.raises(ValueError, match=r"within epoch 1, whose order has no windows.*give a larger memory_limit"):
        fit(file, recover_from=stopped.value.checkpoint)


def test_early_stopping_and_callbacks_work_as_ever(file: Path) -> None:
    seen: list[tuple[int, float]] = []

    class Look:
        def on_epoch(self, state: TrainState) -> None:
            seen.append((state.epoch, float(state.model.save()["W0"][0, 0])))

    given: dict[str, Any] = {"early_stopping": 1, "learning_rate": 10.0, "total_epoch": 9, "callbacks": [Look()]}
    streamed = fit(file, **given)
    ours, seen = seen, []
    assert_same_bits(streamed, resident(file, **given))
    assert seen == ours
    assert len(streamed.history.epoch) < 9
    assert readers() == []


def test_a_streamed_run_says_so_and_how_long_it_waited(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = fit(file, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert re.search(
        rf"{M} samples of {N_X} features, streamed in windows of 15 rows \(\d\.\d+kB in memory\)$", lines[1]
    )
    assert any(line.split()[0] == "wait" for line in lines if line)
    assert 0 < result.history.timings["wait"] < sum(result.history.seconds)
    total = result.history.timings["wait"] + result.history.timings["train"]
    assert total == pytest.approx(sum(result.history.seconds))


# --- what is refused, and what fails ----------------------------------------------------------------------------------


def remove_labels(file: Path) -> None:
    file.with_name("big_labels.npy").unlink()


def cut_labels(file: Path) -> None:
    np.save(file.with_name("big_labels.npy"), np.zeros(M - 1))


def text_labels(file: Path) -> None:
    np.save(file.with_name("big_labels.npy"), np.full(M, "cat"))


def one_dimension(file: Path) -> None:
    np.save(file, np.zeros(M))


def objects(file: Path) -> None:
    np.save(file, np.full((M, 2), None))


def no_array(file: Path) -> None:
    file.write_text("rows")


def integers(file: Path) -> None:
    np.save(file, rows_and_labels()[0].astype(np.int32))


def columns(file: Path) -> None:
    np.save(file, np.asfortranarray(rows_and_labels()[0]))


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (
            remove_labels,
            FileNotFoundError,
            r"big_labels\.npy: no such file, where the labels of .*big\.npy are expected",
        ),
        (cut_labels, ValueError, r"big_labels\.npy: has shape \(1, 202\); .*big\.npy has 203 rows"),
        (text_labels, ValueError, r"big_labels\.npy: must hold one array of numbers"),
        (one_dimension, ValueError, r"big\.npy: has shape \(203,\); it must be \(m, n_x\)"),
        (objects, ValueError, r"big\.npy: cannot be read as an \.npy file of numbers"),
        (no_array, ValueError, r"big\.npy: cannot be read as an \.npy file of numbers"),
        (
            integers,
            ValueError,
            "X takes 15.43kB of memory, there is room for 1.14kB, and a file of int32 in this layout",
        ),
        (columns, ValueError, "a file of uint8 in this layout is not streamed: write .* rows of uint8 or float32"),
    ],
)
def test_files_that_cannot_be_trained_have_one_clear_line(
    tmp_path: Path, spoil: Callable[[Path], None], kind: type[Exception], message: str
) -> None:
    file = save_set(tmp_path)
    spoil(file)
    with pytest.raises(kind, match=message) as caught:
        fit(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_limit_that_holds_too_few_rows_says_which_would_do(file: Path, engine: str) -> None:
    with pytest.raises(
        ValueError, match=r"windows of 5 rows are too few for batches of 8: give .* or smaller"
    ) as caught:
        fit(file, engine=engine, memory_limit=8 * 5 * N_X)
    needed = re.search(r"at least (\S+),", str(caught.value))
    assert needed is not None
    assert fit(file, engine=engine, memory_limit=needed[1], total_epoch=1).history.run["window"]


@pytest.mark.parametrize("value", ["much", "-1GB", 0, True, "1XB", ""])
def test_a_bad_limit_is_named(file: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"memory_limit: .* is no amount of memory; give bytes, or a text such as"):
        fit(file, memory_limit=value)


@given(st.integers(1, 10**15))
def test_a_size_that_is_said_is_one_that_does(size: int) -> None:
    assert size <= memory_size(size_text(size)) <= 1.1 * size + 10


def test_arrays_in_memory_cannot_be_streamed(file: Path) -> None:
    rows, labels = rows_and_labels()
    with pytest.raises(ValueError, match=r"X takes 3\.86kB of memory, there is room for 1\.14kB: give rows in a \.npy"):
        fit(file, data=None, X=rows.T, Y=labels)
    with pytest.raises(ValueError, match=r"X and dev_X take 4\.03kB of memory, there is room for"):
        fit(file, data=None, X=rows[:9].T, Y=labels[:9], dev_X=rows.T, dev_Y=labels)


def test_a_dev_set_in_memory_counts_beside_one_that_is_streamed(file: Path) -> None:
    rows, labels = rows_and_labels()
    many = np.repeat(rows, 25, axis=0)
    with pytest.raises(
        ValueError, match=r"^dev_X takes \S+ of memory, there is room for 1\.14kB: give rows in a \.npy"
    ):
        fit(file, data=None, X=np.load(file, mmap_mode="r").T, Y=labels, dev_X=many.T, dev_Y=np.repeat(labels, 25))


def test_a_measured_batch_size_needs_the_set_in_memory(tmp_path: Path) -> None:
    file = save_set(tmp_path, m=2500)
    with pytest.raises(ValueError, match=r"a set in memory, this one is streamed; give a number"):
        fit(file, batch_size="auto")


def test_labels_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    file = save_set(tmp_path)
    np.save(tmp_path / "big_labels.npy", np.full(M, 7))
    with pytest.raises(ValueError, match="Y has the label 7"):
        fit(file)


def test_ranks_and_streaming_do_not_go_together(file: Path) -> None:
    class Two:
        def Get_rank(self) -> int:
            return 0

        def Get_size(self) -> int:
            return 2

        def allgather(self, value: Any) -> list[Any]:
            return [value, value]

        Allgatherv = Alltoallv = Abort = allgather

    assert Ranks(Two()).size == 2
    with pytest.raises(ValueError, match="memory_limit is for one process, ranks hold their parts of the set whole"):
        fit(file, comm=Two())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_that_is_cut_meanwhile_ends_the_run_in_one_line(tmp_path: Path, engine: str) -> None:
    file = save_set(tmp_path)
    given = arguments(file, engine=engine, shuffle="none")
    caught = make_run(**given)
    with file.open("r+b") as stream:
        stream.truncate(128 + 150 * N_X)
    with pytest.raises(OSError, match=r"big\.npy ends at sample 150 of 203: it was cut; write it again"):
        caught.run()
    assert readers() == []


def test_numbers_that_are_not_finite_end_the_run_in_one_line(tmp_path: Path) -> None:
    file = save_set(tmp_path, dtype="float32")
    rows = np.load(file)
    rows[170, 3] = np.nan
    np.save(file, rows)
    with pytest.raises(ValueError, match=r"^X is not finite at feature 3, sample 170; replace NaN and infinity first"):
        fit(file, memory_limit=4 * LIMIT)


def test_a_disk_that_fails_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("catopt_xp.data.stream.FileIO", fail)
    with pytest.raises(OSError, match=r"big\.npy cannot be read at sample \d+ \(Input/output error\); check the disk"):
        fit(file)


def test_an_exception_in_a_callback_ends_the_reading(file: Path) -> None:
    class Fails:
        def on_epoch(self, state: TrainState) -> None:
            raise Crash

    with pytest.raises(Crash):
        fit(file, callbacks=[Fails()])
    assert readers() == []


# --- memory, devices, command line ------------------------------------------------------------------------------------

PEAK = """
import sys
from catopt_xp import train
path, limit = sys.argv[1:]
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
def run(**more):
    train(data=path, save_dir=None, verbose=False, device="cpu", engine="plain", hidden=(8,), threads=1, **more)
if limit == "0":
    run(total_epoch=0)
else:
    run(total_epoch=2, memory_limit=limit)
print(peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak of memory is read from /proc")
def test_the_peak_of_memory_keeps_to_the_limit(tmp_path: Path) -> None:
    """A set of 200 MB under a limit of 60 MB: what comes on top of an idle process is less than the limit."""
    m, n_x, limit = 10_000, 20_000, "60MB"
    rows = np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.uint8, (m, n_x))
    rows[::100] = 7
    rows.flush()
    np.save(tmp_path / "big_labels.npy", np.arange(m) % 2)
    del rows
    peaks = []
    for bound in ("0", limit):
        command = [sys.executable, "-c", PEAK, str(tmp_path / "big.npy"), bound]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stderr
        peaks.append(int(process.stdout))
    assert peaks[1] - peaks[0] < memory_size(limit)


def test_rows_reach_another_device_by_way_of_the_host(file: Path, strict_backend: Backend) -> None:
    """The upload path of a GPU, on arrays that NumPy cannot take by accident."""
    rows, labels = rows_and_labels()
    found = find_rows(np.load(file, mmap_mode="r").T)
    assert found is not None
    targets = strict_backend.asarray(labels.reshape(1, -1).astype(np.float32))
    streamed = StreamedSet(found, targets, strict_backend, WINDOW, seed=0, shuffle="epoch")
    order = streamed.order(0)

    class Engine:
        batches, reach = -(-M // BATCH), 2

        def __init__(self) -> None:
            self.slices = [slice(k, min(M, k + BATCH)) for k in range(0, M, BATCH)]

        def steps(self, epoch: int, order: Array, first: int = 0, following: Array | None = None) -> Any:
            for k in range(first, self.batches):
                places = order[self.slices[k]]
                seen.append(strict_backend.to_host(streamed.samples)[places].copy())
                told.append(strict_backend.to_host(streamed.targets)[0, places].copy())
                yield k + 1

    seen: list[Array] = []
    told: list[Array] = []
    expected = window_order(M, WINDOW, 0)
    try:
        assert list(streamed.steps(Engine(), 0, order)) == list(range(1, Engine.batches + 1))
        np.testing.assert_array_equal(np.concatenate(seen), rows[expected])
        np.testing.assert_array_equal(np.concatenate(told), labels[expected])
        chunks, _ = streamed.whole
        found_rows = [strict_backend.to_host(chunks[k : min(M, k + 64), :]).copy() for k in range(0, M, 64)]
        np.testing.assert_array_equal(np.concatenate(found_rows), rows)
    finally:
        streamed.close()


def test_cupy_gets_rows_from_pinned_memory_once_its_work_is_done(file: Path, fake_cupy: Any) -> None:
    """A stand-in: no GPU is needed to see which calls are made, in which order."""
    rows, _ = rows_and_labels()
    calls: list[str] = []

    class Device:
        def __init__(self, host: Array) -> None:
            self.host, self.shape = host, host.shape

        def __getitem__(self, key: Any) -> Device:
            return Device(self.host[key])

        def set(self, values: Array) -> None:
            assert isinstance(values.base, np.ndarray) or values.base is not None
            calls.append("set")
            self.host[...] = values

    fake_cupy.cuda.alloc_pinned_memory = lambda size: calls.append("pinned") or bytearray(size)
    backend = CupyBackend(fake_cupy)
    backend.synchronize = lambda: calls.append("sync")  # type: ignore[method-assign]
    reader = Reader(RowFile(file, 128, M, N_X, np.dtype(np.uint8)), backend, "X")
    into = Device(np.zeros((20, N_X), dtype=np.uint8))
    try:
        reader.submit(lambda: reader.fill(slice(30, 40), into, 5)).result()
    finally:
        reader.close()
    np.testing.assert_array_equal(into.host[5:15], rows[30:40])
    assert not into.host[:5].any()
    assert calls == ["sync", "pinned", "set", "sync"]


def test_while_launches_are_recorded_the_reader_leaves_the_device_alone(file: Path, fake_cupy: Any) -> None:
    backend, calls = CupyBackend(fake_cupy), []
    backend.synchronize = lambda: calls.append("sync")  # type: ignore[method-assign]
    reader = Reader(RowFile(file, 128, M, N_X, np.dtype(np.uint8)), backend, "X")
    try:
        with backend.lock:  # as `CupyDevice.capture` holds it
            waiting = reader.submit(lambda: calls.append("read"))
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.05)
            assert calls == []
        waiting.result(timeout=10)
    finally:
        reader.close()
    assert calls == ["sync", "read"]


class LockedDevice(CpuDevice):
    """A GPU's stand-in that two threads may use, and that does everything as late as it may."""

    def __init__(self) -> None:
        super().__init__(late=True)
        self.lock = threading.RLock()

    def _put(self, work: Callable[[], None]) -> None:
        with self.lock:
            super()._put(work)

    def _finish(self) -> None:
        with self.lock:
            super()._finish()

    def mark(self) -> Callable[[], None]:
        wait = super().mark()

        def locked() -> None:
            with self.lock:
                wait()

        return locked


@pytest.mark.skipif(cuda_on_cpu.obstacle() is not None, reason=str(cuda_on_cpu.obstacle()))
def test_the_engine_of_a_gpu_reads_rows_before_others_take_their_places(tmp_path: Path) -> None:
    """Its steps are queued, and done late: rows that they are to read must not be overwritten meanwhile."""
    case = Case(n_x=40, m=300, batch_size=2, epochs=3)
    rows, targets = case.data()
    np.save(tmp_path / "rows.npy", rows)
    found = find_rows(np.load(tmp_path / "rows.npy", mmap_mode="r").T)
    assert found is not None
    device = LockedDevice()
    backend = NumpyBackend()
    backend.synchronize = device.synchronize  # type: ignore[method-assign]
    streamed = StreamedSet(found, targets, backend, 40, seed=0, shuffle="epoch")
    plain = case.engine(PlainEngine)
    reference = case.engine(cuda_engine())
    settings = Settings(case.batch_size, m=case.m)
    parts = plain.model, plain.optimizer, streamed.samples, streamed.targets, backend, settings
    engine = CudaEngine(*parts, device=device)  # type: ignore[arg-type]
    assert streamed.rows_needed(case.batch_size, engine.reach) == 0
    losses: list[list[Array]] = [[], []]
    try:
        for epoch in range(case.epochs):
            goes_on = epoch + 1 < case.epochs
            orders = [streamed.order(e) if e < case.epochs else None for e in (epoch, epoch + 1)]
            for _ in streamed.steps(engine, epoch, orders[0], 0, orders[1]):  # type: ignore[arg-type]
                pass
            losses[0].append(engine.fetch_losses())
            there = [window_order(case.m, 40, e) for e in (epoch, epoch + 1)]
            for _ in reference.steps(epoch, there[0], 0, there[1] if goes_on else None):
                pass
            losses[1].append(reference.fetch_losses())
    finally:
        streamed.close()
    engine.settle()
    reference.settle()
    np.testing.assert_array_equal(losses[0], losses[1])
    for name, value in engine.model.save().items():
        np.testing.assert_array_equal(value, reference.model.save()[name])


def test_chunks_may_be_asked_for_anew_before_the_end(file: Path, backend: Backend) -> None:
    rows, _ = rows_and_labels()
    reader = Reader(RowFile(file, 128, M, N_X, np.dtype(np.uint8)), backend, "X")
    chunks = StreamedRows(reader)
    try:
        for start in (0, 50, 0, 150):
            chunk = chunks[start : min(M, start + 50), :]
            np.testing.assert_array_equal(backend.to_host(chunk), rows[start : start + 50])
    finally:
        reader.close()


def test_the_command_line_streams(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["train", "--data", str(file), "--epochs", "1", "--save-dir", str(tmp_path), "--hidden", "5"]
    common += ["--batch-size", "8", "--device", "cpu"]
    assert main([*common, "--memory-limit", f"{LIMIT}"]) == 0
    out, err = capsys.readouterr()
    assert "streamed in windows of 15 rows" in out
    assert err == ""
    assert main(["evaluate", str(tmp_path / "model_latest.npz"), "--data", str(file)]) == 0
    assert "training set (203 samples)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([*common, "--memory-limit", "much"])
    assert ended.value.code == 2
    assert "--memory-limit: 'much' is no amount of memory" in capsys.readouterr().err
    assert main([*common, "--memory-limit", "200"]) == 1
    assert "are too few for batches of 8: give a --memory-limit of at least" in capsys.readouterr().err
