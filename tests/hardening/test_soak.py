"""Long use: ten thousand epochs, a thousand runs in one process. Memory stays flat, and nothing stays open.

Time is measured and recorded by the long forms; a machine that others use makes it no ground for a verdict.
"""

from __future__ import annotations

import mmap
import os
import pickle
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soak
from PIL import Image

from catopt_xp import CsvLog, JsonLog, TensorBoard, load_model
from catopt_xp.backend.devices import DeviceError
from catopt_xp.backend.xp import get_backend
from catopt_xp.data.photographs import get_photograph_set
from catopt_xp.training.callbacks import TrainState
from catopt_xp.training.train import TrainResult, train

pytestmark = pytest.mark.skipif(soak.OBSTACLE is not None, reason=str(soak.OBSTACLE))

Array = np.ndarray[Any, Any]
N_X, M, BATCH = 1040, 32, 8  # two panels, the last one ragged; four batches
ENGINES = ("plain", "panels")
KB, MB = 1000, 1_000_000
# Bytes that may stay behind each time, of objects that are traced: well below the smallest array of a run; and once,
# where the interpreter's sets of threads grow. How far memory in RAM may drift over all times of a long form:
# allocators keep pieces.
LEFT_BEHIND, ONCE, DRIFT = 200, 2 * KB, 8 * MB

long_form = pytest.mark.long


def forms(short: int, engine: str, long: int) -> list[Any]:
    """A short form with one engine, a long one with each."""
    return [(short, engine), *(pytest.param(long, each, marks=long_form) for each in ENGINES)]


def small_set(m: int = M, seed: int = 0) -> tuple[Array, Array]:
    """Pixels (n_x, m), sample-major, and labels: whether the first half is brighter."""
    X = np.random.default_rng(seed).integers(0, 256, (m, N_X), dtype=np.uint8).T
    return X, (X[: N_X // 2].mean(axis=0, keepdims=True) > X[N_X // 2 :].mean(axis=0, keepdims=True)).astype(np.int64)


def fit(folder: Path, **given: Any) -> TrainResult:
    """A run with all that a run may have: a dev set, checkpoints, logs, early stopping."""
    (X, Y), (dev_X, dev_Y) = small_set(), small_set(16, seed=1)
    logs: list[Any] = [CsvLog(folder / "log.csv"), JsonLog(folder / "log.json"), TensorBoard(folder / "events")]
    common: dict[str, Any] = {"X": X, "Y": Y, "dev_X": dev_X, "dev_Y": dev_Y, "batch_size": BATCH, "hidden": (6, 5)}
    common |= {"save_dir": folder, "print_interval": 5, "early_stopping": 10**6, "verbose": False, "device": "cpu"}
    common |= {"learning_rate": 1e-6, "threads": 2, "callbacks": logs} | given
    return train(**common)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which temporary files and the cache lie too: what is left behind anywhere is seen in it."""
    soak.own_temporary_folder(monkeypatch, tmp_path / "temporary")
    monkeypatch.setenv("CATOPT_XP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def assert_flat(found: soak.Soaked, times: int, left_behind: float = LEFT_BEHIND) -> None:
    assert found.beyond == []
    assert found.traced <= left_behind + ONCE / times, "\n".join(found.places)
    if times >= 100:
        assert soak.slope(found.pace.resident, found.pace.apart) * times <= DRIFT, found.pace.resident


# --- one long run -----------------------------------------------------------------------------------------------------


class Watch:
    """Looks at the run as it goes: the pace of epochs, what is held, the bytes of the history.

    Epochs that are evaluated and saved are kept apart from the others. `start`: the epoch from which on memory counts.
    """

    needs_weights = False

    def __init__(self, folder: Path, start: int, trace: soak.Traced | None = None) -> None:
        self.folder, self.start, self.trace = folder, start, trace
        self.plain, self.saved = soak.Pace(100), soak.Pace(20)
        self.grown, self.explained = 0, 0
        self.last = time.perf_counter()

    def on_epoch(self, state: TrainState) -> None:
        if self.trace is None:  # looking takes memory too
            (self.saved if state.evaluated else self.plain).add(time.perf_counter() - self.last)
        if state.epoch == self.start:
            self.before = soak.Holdings.now(self.folder)
            self.known = soak.object_bytes(vars(state.history))
            if self.trace is not None:
                self.trace.begin()
        if state.last:
            self.beyond = soak.Holdings.now(self.folder).beyond(self.before)
            self.explained = soak.object_bytes(vars(state.history)) - self.known
            if self.trace is not None:
                self.grown = self.trace.grown()
        self.last = time.perf_counter()


@pytest.mark.parametrize(("epochs", "engine"), forms(60, "panels", 10_000))
def test_a_long_run_holds_no_more_at_its_end_than_at_its_beginning(
    folder: Path, engine: str, epochs: int, record: Callable[..., None]
) -> None:
    run_long(folder, epochs, record, engine=engine)


@pytest.mark.gpu
@long_form
def test_a_long_run_on_a_gpu_holds_no_more_at_its_end(folder: Path, record: Callable[..., None]) -> None:
    try:
        backend = get_backend("cuda", strict_device=True)
    except DeviceError as error:
        pytest.skip(str(error))
    fit(folder / "warm", device=backend, total_epoch=20)  # kernels, and CuPy's pool
    before = backend.free_memory()
    run_long(folder, 10_000, record, device=backend)
    assert before - backend.free_memory() <= DRIFT


def logged_fit(folder: Path, watch: Watch, **options: Any) -> TrainResult:
    logs: list[Any] = [CsvLog(folder / "log.csv"), JsonLog(folder / "log.json"), TensorBoard(folder / "events")]
    return fit(folder, **options, callbacks=[*logs, watch])


def run_long(folder: Path, epochs: int, record: Callable[..., None], **how: Any) -> None:
    """A run of so many epochs with everything, and a tenth as long one that is traced; asserts, and records."""
    fit(folder / "run", total_epoch=11, **how)  # fills caches
    watch = Watch(folder, start=max(11, epochs // 10))  # its checkpoint is there
    shutil.rmtree(folder / "run")
    options = {"total_epoch": epochs, "checkpoint_every": 10, "print_interval": 10} | how
    result = logged_fit(folder / "run", watch, **options)
    assert result.history.epoch == list(range(epochs))
    assert load_model(folder / "run" / "model_latest.npz").neuron_cnt[0] == N_X
    traced_epochs = max(60, epochs // 10)
    with soak.Traced() as trace:
        inner = Watch(folder, traced_epochs // 3, trace)
        logged_fit(folder / "traced", inner, **options | {"total_epoch": traced_epochs})
    counted = traced_epochs - inner.start - 1
    unexplained = (inner.grown - inner.explained) / counted
    if epochs >= 1000:
        pace = watch.plain
        told = {"epochs": epochs, "engine": result.engine, "device": result.device, "left_behind": watch.beyond}
        told |= {"history_bytes_per_epoch": round(inner.explained / counted, 1)}
        told |= {"traced_bytes_per_epoch_beside_history": round(unexplained, 1), "epochs_not_evaluated": pace.told()}
        record(**told, epochs_evaluated_and_saved=watch.saved.told())
        settled = pace.resident[len(pace.resident) // soak.TENTH :]
        grown = soak.slope(settled, pace.apart) * len(pace.seconds)
        assert grown - soak.object_bytes(vars(result.history)) <= DRIFT, pace.resident
    assert watch.beyond == []
    assert inner.beyond == []
    assert unexplained <= LEFT_BEHIND, "\n".join(inner.trace.places if inner.trace else [])


# --- many calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "engine"), forms(4, "plain", 500))
def test_many_runs_in_one_process_leave_nothing_behind(
    folder: Path, engine: str, times: int, record: Callable[..., None]
) -> None:
    def work() -> None:
        where = folder / "run"
        result = fit(where, engine=engine, total_epoch=2)
        fit(where, engine=engine, total_epoch=3, recover_from=result.checkpoint)
        assert load_model(where / "model_latest.npz").neuron_cnt[0] == N_X
        shutil.rmtree(where)  # each run has a file of events of its own

    found = soak.soak(work, times, folder)
    record(**found.told(times), calls_of_train=2 * times, engine=engine)
    assert_flat(found, times)


@pytest.mark.parametrize(("times", "engine"), forms(3, "panels", 300))
def test_many_streamed_runs_leave_nothing_behind(
    folder: Path, engine: str, times: int, record: Callable[..., None]
) -> None:
    rows, labels = small_set(4 * M)
    for name in ("big", "big_dev"):
        np.save(folder / f"{name}.npy", rows.T)
        np.save(folder / f"{name}_labels.npy", labels[0])
    limit = 2 * 4 * 20 * N_X  # half of it holds four windows of 20 rows

    def work() -> None:
        given: dict[str, Any] = {"X": None, "Y": None, "dev_X": None, "dev_Y": None, "data": folder / "big.npy"}
        result = fit(folder / "run", **given, memory_limit=limit, engine=engine, total_epoch=4)
        assert result.history.run["window"] is not None
        shutil.rmtree(folder / "run")

    found = soak.soak(work, times, folder)
    record(**found.told(times), epochs=4 * times, engine=engine)
    assert_flat(found, times)


@pytest.mark.parametrize("times", [6, pytest.param(250, marks=long_form)])
def test_many_fits_of_estimators_leave_nothing_behind(folder: Path, times: int, record: Callable[..., None]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from catopt_xp.estimators.mlp import MLPClassifier, MLPRegressor

    X = np.random.default_rng(0).standard_normal((60, 8))
    y = (X[:, 0] > 0).astype(int)
    solvers = count()
    incremental = MLPClassifier((6,), random_state=0, device="cpu")

    def work() -> None:
        solver = ("adam", "sgd", "lbfgs")[next(solvers) % 3]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few iterations do not converge
            options: dict[str, Any] = {"solver": solver, "max_iter": 4, "random_state": 0, "device": "cpu"}
            model = MLPClassifier((6,), **options).fit(X, y)
            MLPRegressor("squared_error", (6,), **options, early_stopping=solver != "lbfgs").fit(X, X[:, 1])
        assert np.array_equal(pickle.loads(pickle.dumps(model)).predict(X), model.predict(X))
        for _ in range(5):
            incremental.partial_fit(X, y, classes=[0, 1])

    # Three solvers in turn; the loss curve of `incremental` grows by five numbers each time.
    found = soak.soak(work, times, folder, warm=3, traced=6)
    record(**found.told(times), fits=2 * times, partial_fits=5 * times)
    assert_flat(found, times, LEFT_BEHIND + 5 * 40)


@pytest.mark.parametrize("times", [4, pytest.param(200, marks=long_form)])
def test_many_decodings_leave_nothing_behind(folder: Path, times: int, record: Callable[..., None]) -> None:
    photographs = folder / "photographs"
    rng = np.random.default_rng(0)
    for kind in ("cats", "dogs"):
        (photographs / kind).mkdir(parents=True)
        for k in range(8):
            pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(photographs / kind / f"{k}.{('jpg', 'png')[k % 2]}")
    (photographs / "cats" / "broken.jpg").write_bytes((photographs / "cats" / "0.jpg").read_bytes()[:300])

    def work() -> None:
        for _ in range(2):  # decoded and stored, then from the cache
            with pytest.warns(UserWarning, match=r"broken\.jpg"):
                dataset = get_photograph_set(photographs, (20, 16), on_error="skip")
            assert dataset.train_X.shape[0] == 20 * 16 * 3
        shutil.rmtree(folder / "cache")

    found = soak.soak(work, times, folder)
    record(**found.told(times), photographs=34 * times)
    assert_flat(found, times)


# --- the watch itself -------------------------------------------------------------------------------------------------


def test_each_kind_of_leak_is_seen(folder: Path) -> None:
    kept: list[Any] = []
    go = threading.Event()
    (folder / "mapped").write_bytes(bytes(mmap.PAGESIZE))

    def handle() -> None:
        kept.append(open(os.devnull, "rb"))  # noqa: SIM115

    def mapped() -> None:
        with open(folder / "mapped", "rb") as file:
            kept.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))

    def thread() -> None:
        kept.append(threading.Thread(target=go.wait, args=(60,), name="left over"))
        kept[-1].start()

    def file() -> None:
        number, _ = tempfile.mkstemp()
        os.close(number)

    try:
        for leak, shown in ((handle, "handles"), (mapped, "maps"), (thread, "threads"), (file, "files")):
            found = soak.soak(leak, 3, folder, warm=1, traced=1)
            assert [line for line in found.beyond if shown in line], leak
            with pytest.raises(AssertionError):
                assert_flat(found, 3)
        found = soak.soak(lambda: kept.append(np.zeros(200)), 3, folder)
        assert found.beyond == []
        assert 1600 <= found.traced <= 2000
        assert any(Path(__file__).name in place for place in found.places)
        with pytest.raises(AssertionError, match=r"test_soak\.py"):
            assert_flat(found, 3)
        found = soak.soak(lambda: kept.append(bytearray(os.urandom(200 * KB))), 100, folder)
        with pytest.raises(AssertionError):
            assert_flat(found, 100, left_behind=MB)  # by what lies in RAM alone
    finally:
        go.set()
        for x in kept:
            if isinstance(x, threading.Thread):
                x.join()
            elif hasattr(x, "close"):
                x.close()


def test_growing_slower_is_measured() -> None:
    assert soak.tenths_ratio([1.0] * 90 + [2.0] * 10) == pytest.approx(2.0)
    assert soak.slope([10, 20, 30], apart=5) == pytest.approx(2.0)
    assert soak.object_bytes({"a": [1.5, 2.5]}) == sum(map(sys.getsizeof, ({"a": 0}, [1.5, 2.5], 1.5, 2.5)))
