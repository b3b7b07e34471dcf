"""Tasks over threads, and the one thread count that BLAS has for the whole process."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from catopt_xp.backend.machine import thread_count
from catopt_xp.backend.threads import (
    _controller,
    deal,
    limited_threads,
    run_tasks,
    run_workers,
    single_threaded_products,
)
from catopt_xp.training.train import train


def blas_threads() -> set[int]:
    # Of the libraries that NumPy came with: numba brings SciPy's, which nothing here calls, whenever it likes.
    return {pool["num_threads"] for pool in _controller().info() if pool["user_api"] == "blas"}


def test_the_block_gives_products_one_thread_and_puts_it_back() -> None:
    before = blas_threads()
    with single_threaded_products():
        assert blas_threads() == {1}
        with single_threaded_products():
            assert blas_threads() == {1}
        assert blas_threads() == {1}
    assert blas_threads() == before


def test_overlapping_blocks_restore_the_thread_count() -> None:
    before, in_block, go = blas_threads(), threading.Event(), threading.Event()

    def other() -> None:
        with single_threaded_products():
            in_block.set()
            go.wait(5)

    thread = threading.Thread(target=other)
    with single_threaded_products():
        thread.start()
        assert in_block.wait(5)
        assert blas_threads() == {1}
    go.set()
    thread.join(5)
    assert blas_threads() == before


@pytest.mark.parametrize("count", [0, 1, 2, 7, 40])
def test_results_come_in_order(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert run_tasks([lambda k=k: k * k for k in range(count)]) == [k * k for k in range(count)]  # type: ignore[misc]


@pytest.mark.parametrize("failing", [0, 3])
def test_an_error_of_any_task_comes_through_after_all_have_ended(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    done = []

    def task(k: int) -> None:
        if k == failing:
            raise RuntimeError("as asked")
        done.append(k)

    with pytest.raises(RuntimeError, match="as asked"):
        run_tasks([lambda k=k: task(k) for k in range(4)])  # type: ignore[misc]
    assert set(done) >= ({2, 3} if failing == 0 else {0, 1, 2})


def test_tasks_overflow_as_the_caller_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")

    def overflow() -> float:
        return float(np.float32(1e38) * np.float32(1e38))

    with np.errstate(over="ignore"):
        assert run_tasks([overflow, overflow]) == [np.inf, np.inf]


@pytest.mark.parametrize(("items", "parts"), [(0, 3), (1, 3), (7, 3), (3, 7)])
def test_dealing_keeps_every_item_once_and_in_order(items: int, parts: int) -> None:
    shares = deal(range(items), parts)
    assert [x for share in shares for x in share] == list(range(items))
    assert len(shares) <= max(1, parts)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_training_gives_the_same_bits_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    X = np.random.default_rng(0).integers(0, 256, (40, 20_003), dtype=np.uint8).T
    Y = np.arange(40).reshape(1, -1) % 2
    weights = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        result = train(X=X, Y=Y, batch_size=16, total_epoch=2, optimizer="adam", save_dir=None, verbose=False)
        weights.append(result.model.save()["W0"].tobytes())
    assert len(set(weights)) == 1


def test_the_environment_and_a_block_limit_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert thread_count() == 5
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    assert thread_count() == 3
    with limited_threads(None):
        assert thread_count() == 3
    with limited_threads(4):
        assert thread_count() == 4
        assert all(count <= 4 for count in blas_threads())
        with limited_threads(1):
            assert (thread_count(), blas_threads()) == (1, {1})
        assert thread_count() == 4
    assert thread_count() == 3


def test_workers_all_run_and_an_error_of_one_comes_through() -> None:
    seen: list[int] = []
    with limited_threads(3):
        run_workers(seen.append, 8)
        assert sorted(seen) == [0, 1, 2]
        with pytest.raises(ZeroDivisionError):
            run_workers(lambda worker: 1 // (worker - 2), 3)
