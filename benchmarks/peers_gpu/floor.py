"""What an epoch must move and multiply on a GPU, and how fast this GPU does both.

Bytes: a step reads and writes the first layer's weights and moments once, and reads its pixels twice, once for the
product and once for the gradient. Operations: each sample times the first layer, forward and for the gradient; on the
tensor cores three times as many, since a float32 number is three half-precision terms and a pixel is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from catopt_xp.backend.xp import Backend
from catopt_xp.commands.bench import Workload, operations, state_bytes
from catopt_xp.commands.floor import NUMBERS, READ_AND_WRITTEN, STATE_ARRAYS

TERMS = 3  # half-precision numbers that make up a float32 one
COPY_BYTES = 4 << 30  # bytes of the array that is copied, at most
SIDE = 8192  # rows of the square matrices that are multiplied
REPEATS = 10  # repeats, of which the best one counts


def epoch_bytes(work: Workload, sample_bytes: int = 1) -> int:
    """The fewest bytes that an epoch moves; `sample_bytes`: bytes of a pixel on the device.

    >>> [round(epoch_bytes(Workload(batch_size=size)) / 4.3e9, 2) for size in (8, 64, 128, 2000)]  # ms at 4.3 TB/s
    [6.44, 0.95, 0.54, 0.17]
    """
    return work.batches * state_bytes(work) + 2 * work.m * work.n_x * sample_bytes


def step_bytes(work: Workload, sample_bytes: int = 1) -> int:
    """The fewest bytes that a step moves, where its batch and the following one are whole.

    >>> step_bytes(Workload(batch_size=64)) / 1e6
    127.647744
    """
    return state_bytes(work) + 2 * min(work.batch_size, work.m) * work.n_x * sample_bytes


@dataclass(frozen=True)
class Ceilings:
    """The measured speeds of a GPU.

    `bandwidth`: bytes read and written per second; `float32`: operations of float32 products per second; `float16`:
    those of half-precision products with float32 sums, which are the tensor cores'.
    """

    bandwidth: float
    float32: float
    float16: float

    @classmethod
    def from_json(cls, measured: Mapping[str, Any]) -> Ceilings | None:
        """Makes them from the results of `measure_bandwidth` and `measure_products`; None where one is missing.

        >>> Ceilings.from_json({"bandwidth": {"copy": 3e12, "in_place": 2e12}}) is None
        True
        """
        try:
            bandwidth = max(measured["bandwidth"][way] for way in ("copy", "in_place"))
            return cls(bandwidth, measured["float32"], measured["float16"])
        except KeyError:
            return None

    def floor(self, work: Workload) -> dict[str, float]:
        """Seconds of an epoch by bytes, by operations of either kind, and the floor: bytes, or the faster operations.

        >>> Ceilings(4.3e12, 5e13, 7.5e14).floor(Workload(batch_size=2000))["seconds"] * 1e3  # doctest: +ELLIPSIS
        0.165...
        """
        moved, products = epoch_bytes(work) / self.bandwidth, operations(work)
        ordinary, tensor = products / self.float32, TERMS * products / self.float16
        return {
            "by_bytes": moved,
            "by_float32": ordinary,
            "by_tensor_cores": tensor,
            "seconds": max(moved, min(ordinary, tensor)),
        }


def device_seconds(backend: Backend, queue: Callable[[], None], repeats: int, stream: Any = None) -> list[float]:
    """Times the work that `queue` queues, on the GPU; returns the seconds of each repeat after one to warm up.

    `backend`: the GPU; `stream`: where the work is queued, None takes the current stream.
    """
    with backend.activate():
        cuda = backend.xp.cuda
        first, last = cuda.Event(), cuda.Event()
        queue()
        seconds = []
        for _ in range(repeats):
            first.record(stream)
            queue()
            last.record(stream)
            last.synchronize()  # sync
            seconds.append(cuda.get_elapsed_time(first, last) / 1e3)
        return seconds


def measure_bandwidth(backend: Backend) -> dict[str, float]:
    """Measures bytes read and written per second of three kinds of work.

    `copy`: a large copy; `in_place`: a pass over three large arrays, as an update makes; `in_place_state`: such a pass
    over arrays of the first layer's size, which the cache holds in part.
    """
    with backend.activate():
        size = min(COPY_BYTES, backend.free_memory() // 4) // 4  # float32 numbers
        rates = {
            "copy": _copied(backend, size),
            "in_place": _passed(backend, size // 3),
            "in_place_state": _passed(backend, NUMBERS),
        }
        backend.xp.get_default_memory_pool().free_all_blocks()
    return rates


def _copied(backend: Backend, size: int) -> float:
    xp = backend.xp
    source, target = xp.full(size, 1.5, xp.float32), xp.zeros(size, xp.float32)
    return 2 * 4 * size / min(device_seconds(backend, partial(xp.copyto, target, source), REPEATS))


def _passed(backend: Backend, size: int) -> float:
    xp = backend.xp
    state = [xp.full(size, value, xp.float32) for value in (1.5, 0.25, 0.75)]
    outputs, body = "float32 a, float32 b, float32 c", "a *= factor; b *= factor; c *= factor"
    kernel = backend.elementwise("catopt_xp_pass", "float32 factor", outputs, body)
    seconds = min(device_seconds(backend, partial(kernel, np.float32(1), *state), REPEATS))
    return READ_AND_WRITTEN * STATE_ARRAYS * size / seconds


def measure_products(backend: Backend, dtype: str) -> float:
    """Measures operations per second of a large matrix product of random numbers.

    `dtype`: float32, or float16 for the tensor cores, whose sums are float32.
    """
    xp = backend.xp
    random = np.random.Generator(np.random.PCG64(0)).random((SIDE, SIDE), dtype=np.float32) - np.float32(0.5)
    with backend.activate():
        A = xp.asarray(random).astype(dtype)
        B, C = xp.ascontiguousarray(A[::-1]), xp.empty((SIDE, SIDE), dtype)
        seconds = min(device_seconds(backend, partial(xp.matmul, A, B, out=C), REPEATS))
    return float(2 * SIDE**3 / seconds)
