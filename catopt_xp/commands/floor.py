"""The floor: the least time that this machine needs for the memory and the arithmetic that an epoch cannot avoid.

Two speeds are measured, both with the shapes of the reference network: the bandwidth of memory that is read and written
in place, and the rate of a large float32 matrix product.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from catopt_xp.backend.threads import deal
from catopt_xp.engines.choose import numba_obstacle
from catopt_xp.engines.panels import aligned_zeros

Floats = NDArray[np.float32]
Choice = Callable[[Sequence[float]], float]  # picks one of several times of the same work

NUMBERS = 4_515_840  # weights of the reference network's first layer, 30 x 150,528
PANEL_NUMBERS = 30 * 1024  # numbers of a panel
STATE_ARRAYS = 3  # Adam's weights and two moments
READ_AND_WRITTEN = 8  # bytes for each float32 of the state
SIDE = 2000  # rows of the square matrices that are multiplied
SWEEPS, PRODUCTS = 50, 4  # repeats, of which the best one counts
TURN_SWEEPS, TURN_PRODUCTS = 9, 1  # repeats in a turn between others, of which the median counts


@dataclass(frozen=True)
class Floor:
    """Two speeds of this machine on a number of threads.

    `bandwidth`: bytes of state read and written per second; `rate`: operations of a float32 matrix product per second;
    `traffic_by`, `product_by`: how each was measured.
    """

    bandwidth: float
    rate: float
    threads: int
    traffic_by: str
    product_by: str

    def seconds(self, moved: float, operations: float) -> float:
        """The time to move `moved` bytes of state, and then to do `operations`.

        >>> Floor(bandwidth=50e9, rate=300e9, threads=2, traffic_by="", product_by="").seconds(100e9, 150e9)
        2.5
        """
        return moved / self.bandwidth + operations / self.rate

    def better(self, other: Floor) -> Floor:
        """Takes the higher of each speed from two measurements, since other programs only ever slow one down."""
        traffic, product = max(self, other, key=lambda x: x.bandwidth), max(self, other, key=lambda x: x.rate)
        return replace(traffic, rate=product.rate, product_by=product.product_by)

    def __str__(self) -> str:
        return (
            f"state traffic {self.bandwidth / 1e9:.1f} GB/s ({self.traffic_by}),"
            f" float32 products {self.rate / 1e9:.0f} GFLOP/s ({self.product_by}), threads: {self.threads}"
        )


def measure_floor(threads: int, in_turn: bool = False) -> Floor:
    """Measures both speeds on a number of threads in about two seconds.

    `in_turn`: measures in a quarter of a second what the machine reaches now, beside other programs: the median of a
    few repeats, where otherwise the best of many counts.
    """
    sweeps, products, choose = (TURN_SWEEPS, TURN_PRODUCTS, statistics.median) if in_turn else (SWEEPS, PRODUCTS, min)
    with ThreadPoolExecutor(threads) as pool, threadpool_limits(threads, user_api="blas"):
        bandwidth, traffic_by = _bandwidth(pool, threads, sweeps, choose)
        rate, product_by = _product_rate(pool, threads, products, choose)
    return Floor(bandwidth, rate, threads, traffic_by, product_by)


def _bandwidth(pool: ThreadPoolExecutor, threads: int, repeats: int, choose: Choice) -> tuple[float, str]:
    """Measures an in-place pass over three arrays, panel by panel; returns bytes per second, and what did the pass."""
    state = _state()
    compiled = numba_obstacle() is None
    sweep: Callable[..., None] = _compiled_sweep() if compiled else _numpy_sweep
    starts = range(0, NUMBERS, PANEL_NUMBERS)
    bounds = [slice(panels[0], panels[-1] + PANEL_NUMBERS) for panels in deal(starts, threads)]
    tasks = [partial(sweep, *(array[share] for array in state), np.float32(1)) for share in bounds]
    tasks[0]()  # compiles

    def pass_over_all() -> None:
        _all_at_once(pool, tasks)

    seconds = choose([_seconds(pass_over_all) for _ in range(repeats)])
    return READ_AND_WRITTEN * STATE_ARRAYS * NUMBERS / seconds, "numba" if compiled else "NumPy, in-place operations"


@functools.cache
def _state() -> list[Floats]:
    """Makes state as the panel engine has it: vectors within cache lines, arrays at different offsets in a page."""
    return [aligned_zeros(NUMBERS, np.float32, skew=k * 21 * 64) for k in range(STATE_ARRAYS)]


def _numpy_sweep(a: Floats, b: Floats, c: Floats, factor: np.float32) -> None:
    for start in range(0, len(a), PANEL_NUMBERS):
        for array in (a, b, c):
            array[start : start + PANEL_NUMBERS] *= factor


@functools.cache
def _compiled_sweep() -> Callable[..., None]:
    """Compiles `_numpy_sweep` with the three arrays in one loop, as a fused update goes over them."""
    from numba import njit

    def sweep(a: Any, b: Any, c: Any, factor: Any) -> None:
        for i in range(len(a)):
            a[i] *= factor
            b[i] *= factor
            c[i] *= factor

    compiled: Callable[..., None] = njit(sweep, nogil=True, error_model="numpy")
    return compiled


def _product_rate(pool: ThreadPoolExecutor, threads: int, repeats: int, choose: Choice) -> tuple[float, str]:
    """Measures float32 products in two ways; returns the operations per second of the faster way, and its name."""
    A, B = (np.full((SIDE, SIDE), value, dtype=np.float32) for value in (0.5, 0.25))
    results = [np.empty((SIDE, SIDE), dtype=np.float32) for _ in range(threads)]
    operations = 2 * SIDE**3

    def together() -> None:
        np.matmul(A, B, out=results[0])

    def each_its_own() -> None:
        _all_at_once(pool, [partial(np.matmul, A, B, out=C) for C in results])

    rates = {"one product over all threads": operations / choose([_seconds(together) for _ in range(repeats)])}
    with threadpool_limits(1, user_api="blas"):
        each = choose([_seconds(each_its_own) for _ in range(repeats)])
    rates["a product in each thread"] = threads * operations / each
    best = max(rates, key=lambda way: rates[way])
    return rates[best], best


def _all_at_once(pool: ThreadPoolExecutor, tasks: Sequence[Callable[[], object]]) -> None:
    others = [pool.submit(task) for task in itertools.islice(tasks, 1, None)]
    tasks[0]()
    for other in others:
        other.result()


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
