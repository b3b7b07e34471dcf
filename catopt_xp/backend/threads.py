"""Independent tasks on all processors, with matrix products of one thread each.

Small products gain nothing from threads of their own, and lose a great deal when another program wants the processor:
every product then waits until all its threads have had their turn. So the work is cut by hand, and BLAS kept to one.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from typing import Any, TypeVar

from threadpoolctl import LibController, ThreadpoolController

from catopt_xp.backend.machine import THREADS, thread_count

MOST_THREADS = 256
Result = TypeVar("Result")
Item = TypeVar("Item")


def run_tasks(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    """Runs tasks that do not depend on one another; their results, in order.

    >>> run_tasks([lambda: 1, lambda: 2])
    [1, 2]
    """
    if len(tasks) == 1:  # nothing to share out: BLAS may use the threads
        return [tasks[0]()]
    threads = min(thread_count(), len(tasks))
    with single_threaded_products():
        if threads < 2:
            return _run_all(tasks)
        shares = deal(tasks, threads)  # the calling thread takes the first one
        # Each thread works in the caller's context: what NumPy does on an overflow is part of it.
        others = [_pool(os.getpid()).submit(copy_context().run, _run_all, share) for share in shares[1:]]
        try:
            results = _run_all(shares[0])
        finally:
            wait(others)  # whatever happens, nothing is still writing when this returns
        return [*results, *itertools.chain.from_iterable(other.result() for other in others)]


def run_workers(work: Callable[[int], None], workers: int) -> None:
    """Runs `work(0)`, `work(1)`, … at once, on as many threads as this process may use and no more.

    >>> seen = []
    >>> run_workers(seen.append, 1)
    >>> seen
    [0]
    """
    workers = 1 if workers < 2 else min(workers, thread_count())
    others = [_pool(os.getpid()).submit(work, worker) for worker in range(1, workers)]
    try:
        work(0)  # in the calling thread
    finally:
        if others:
            wait(others)
    for other in others:
        other.result()


def deal(items: Sequence[Item], parts: int) -> list[Sequence[Item]]:
    """The items in at most `parts` runs of neighbours, of equal length but for one.

    >>> deal([1, 2, 3, 4, 5], 2)
    [[1, 2], [3, 4, 5]]
    """
    parts = max(1, min(parts, len(items)))
    bounds = [len(items) * k // parts for k in range(parts + 1)]
    return [items[a:b] for a, b in itertools.pairwise(bounds)]


@contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """A `with` block in which everything here, BLAS included, uses at most `count` threads; None changes nothing.

    >>> with limited_threads(1):
    ...     thread_count()
    1
    """
    if count is None:
        yield
        return
    token = THREADS.set(count)
    try:
        in_main = threading.current_thread() is threading.main_thread()
        with _controller().limit(limits=count, user_api="blas") if in_main else nullcontext():
            yield
    finally:
        THREADS.reset(token)


def single_threaded_products() -> AbstractContextManager[Any]:
    """A `with` block in which BLAS uses one thread.

    Of the main thread alone: BLAS has one setting for the whole process, which OpenBLAS lets no other thread change,
    and which blocks of several threads would put back in the wrong order. Elsewhere the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return nullcontext()
    return _OneThread()


class _OneThread:
    """What `ThreadpoolController.limit` does, at a tenth of its time: it is entered at every step of training."""

    def __enter__(self) -> None:
        self.before = [(library, threads) for library in _blas() if (threads := library.num_threads) != 1]
        for library, _ in self.before:
            library.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        for library, threads in self.before:
            library.set_num_threads(threads)


def _run_all(tasks: Sequence[Callable[[], Result]]) -> list[Result]:
    return [task() for task in tasks]


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    # One pool for each process: threads do not survive a fork.
    # Threads start when there is work for them, so the bound is one that nobody reaches.
    return ThreadPoolExecutor(MOST_THREADS, thread_name_prefix=f"catopt_xp-{process}")


@functools.cache
def _blas() -> list[LibController]:
    return [library for library in _controller().lib_controllers if library.user_api == "blas"]


@functools.cache
def _controller() -> ThreadpoolController:
    # Looking for the loaded libraries takes milliseconds, hence the cache.
    return ThreadpoolController()
