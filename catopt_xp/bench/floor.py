"""The floor: what an epoch would take if this machine did nothing but the unavoidable, at the speed that it can reach.

A step reads and writes the first layer's weights and moments once: so many bytes at the measured bandwidth.
An epoch multiplies each sample with the first layer twice, forward and for the gradient: so many operations at the
measured speed of a large matrix product. The two are added. Both are measured with fixed shapes, those of the
reference network. `python -m catopt_xp.bench.floor` prints them.
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

from catopt_xp.backend.machine import cpu_model, thread_count
from catopt_xp.backend.threads import deal
from catopt_xp.bench.workload import Workload
from catopt_xp.engines.choose import numba_obstacle
from catopt_xp.engines.panels import aligned_zeros
from catopt_xp.optim.rules import OPTIMIZERS

Floats = NDArray[np.float32]
Choice = Callable[[Sequence[float]], float]  # of several times of the same work

NUMBERS = 4_515_840  # of the reference network's first layer, 30 x 150,528
PANEL_NUMBERS = 30 * 1024  # worked on at a time
STATE_ARRAYS = 3  # Adam's: weights and two moments
READ_AND_WRITTEN = 8  # bytes for each float32 of the state
SIDE = 2000  # of the square matrices that are multiplied
SWEEPS, PRODUCTS = 50, 4  # repeats; the best one counts
TURN_SWEEPS, TURN_PRODUCTS = 9, 1  # in a turn between others; the median counts


@dataclass(frozen=True)
class Floor:
    """What this machine can reach on so many threads.

    `bandwidth`: bytes of state read and written per second; `rate`: float32 operations of a matrix product per second;
    `traffic_by`, `product_by`: how each was measured.
    """

    bandwidth: float
    rate: float
    threads: int
    traffic_by: str
    product_by: str

    def seconds(self, work: Workload) -> float:
        """Seconds of an epoch: `steps * state bytes / bandwidth + 4 * n_x * units * m / rate`.

        >>> floor = Floor(bandwidth=50e9, rate=300e9, threads=2, traffic_by="", product_by="")
        >>> round(floor.seconds(Workload(batch_size=64)), 3)
        0.19
        """
        return work.batches * state_bytes(work) / self.bandwidth + operations(work) / self.rate

    def better(self, other: Floor) -> Floor:
        """The better of two measurements, each speed by itself: other programs only ever slow them down."""
        traffic, product = max(self, other, key=lambda x: x.bandwidth), max(self, other, key=lambda x: x.rate)
        return replace(traffic, rate=product.rate, product_by=product.product_by)

    def __str__(self) -> str:
        return (
            f"state traffic {self.bandwidth / 1e9:.1f} GB/s ({self.traffic_by}),"
            f" float32 products {self.rate / 1e9:.0f} GFLOP/s ({self.product_by}), threads: {self.threads}"
        )


def state_bytes(work: Workload) -> int:
    """Bytes of a step: the first layer's weights and moments, read and written once.

    >>> state_bytes(Workload()) / 1e6
    108.38016
    """
    return READ_AND_WRITTEN * work.n_x * work.hidden[0] * (1 + len(OPTIMIZERS[work.optimizer][0].moment_names))


def operations(work: Workload) -> int:
    """Operations of an epoch: each sample multiplied with the first layer twice, forward and for the gradient.

    >>> operations(Workload()) / 1e9
    36.12672
    """
    return 4 * work.n_x * work.hidden[0] * work.m


def measure_floor(threads: int, in_turn: bool = False) -> Floor:
    """Measures both speeds on so many threads; about two seconds.

    `in_turn`: not what the machine can reach, but what it reaches now, which other programs may share: medians of a few
    repeats, in a quarter of a second.
    """
    sweeps, products, choose = (TURN_SWEEPS, TURN_PRODUCTS, statistics.median) if in_turn else (SWEEPS, PRODUCTS, min)
    with ThreadPoolExecutor(threads) as pool, threadpool_limits(threads, user_api="blas"):
        bandwidth, traffic_by = _bandwidth(pool, threads, sweeps, choose)
        rate, product_by = _product_rate(pool, threads, products, choose)
    return Floor(bandwidth, rate, threads, traffic_by, product_by)


def _bandwidth(pool: ThreadPoolExecutor, threads: int, repeats: int, choose: Choice) -> tuple[float, str]:
    """Bytes per second of an in-place pass over three arrays, panel by panel, and with what."""
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
    """State as the panel engine has it: no vector crosses a cache line, arrays start elsewhere within a page."""
    return [aligned_zeros(NUMBERS, np.float32, skew=k * 21 * 64) for k in range(STATE_ARRAYS)]


def _numpy_sweep(a: Floats, b: Floats, c: Floats, factor: np.float32) -> None:
    for start in range(0, len(a), PANEL_NUMBERS):
        for array in (a, b, c):
            array[start : start + PANEL_NUMBERS] *= factor


@functools.cache
def _compiled_sweep() -> Callable[..., None]:
    """As `_numpy_sweep`, the three arrays in one loop, which is how a fused update goes over them."""
    from numba import njit

    def sweep(a: Any, b: Any, c: Any, factor: Any) -> None:
        for i in range(len(a)):
            a[i] *= factor
            b[i] *= factor
            c[i] *= factor

    compiled: Callable[..., None] = njit(sweep, nogil=True, error_model="numpy")
    return compiled


def _product_rate(pool: ThreadPoolExecutor, threads: int, repeats: int, choose: Choice) -> tuple[float, str]:
    """Operations per second of float32 products, the better of two ways, and which that was."""
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


def main() -> None:
    """Prints the two speeds, and the floor of an epoch of the reference workload by batch size."""
    floor = measure_floor(thread_count())
    print(f"{cpu_model()}: {floor}")
    for size in (1, 8, 64, 128, 512, 2000):
        print(f"batch {size:5d}: {floor.seconds(Workload(batch_size=size)):.3f} s per epoch at least")


if __name__ == "__main__":
    main()
