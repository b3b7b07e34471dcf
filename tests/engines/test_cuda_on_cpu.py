"""The stand-in that executes CUDA sources on a CPU: it shows the faults that it is there to show."""

from __future__ import annotations

from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import CudaError, Library, run_sanitized
from cuda_runs import folder

OBSTACLE = cuda_on_cpu.obstacle()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))

Array = np.ndarray[Any, Any]
THREADS = 96

SOURCE = """
// Each thread's neighbour to the left, through shared memory.
extern "C" __global__ void left(const float* in, float* out, int barrier) {
    extern __shared__ float room[];
    room[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
    if (barrier) __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = room[(threadIdx.x + blockDim.x - 1) % blockDim.x];
}

extern "C" __global__ void __launch_bounds__(96) fixed(float* out) {
    __shared__ float room[96];
    if (threadIdx.x != 5) room[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = room[threadIdx.x];
}

// The second half of the threads reads what the first has read and overwrites.
extern "C" __global__ void turns(float* out, int barrier) {
    extern __shared__ float room[];
    room[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = room[blockDim.x - 1 - threadIdx.x];
    if (barrier) __syncthreads();
    room[threadIdx.x] = -1;
}

extern "C" __global__ void apart(int* out) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    *out = 1;
}

extern "C" __global__ void deserted(int* out, int leaves) {
    if (blockIdx.x == 1 && int(threadIdx.x) == leaves) return;
    __syncthreads();
    *out = 1;
}

extern "C" __global__ void lonely(int* out) {
    if (threadIdx.x % 2) __syncwarp();
    *out = 1;
}

extern "C" __global__ void warps(int* shuffled, int* crossed, unsigned* votes, int* any) {
    const int i = threadIdx.x;
    shuffled[i] = __shfl_sync(0xFFFFFFFFu, i, (i + 1) % 32);
    crossed[i] = __shfl_xor_sync(0xFFFFFFFFu, i, 8);
    votes[i] = __ballot_sync(0xFFFFFFFFu, i % 3 == 0);
    any[i] = __any_sync(0xFFFFFFFFu, i == 40);
}

// Half of a warp may go its own way.
extern "C" __global__ void halves(unsigned* votes) {
    if (threadIdx.x % 32 < 16)
        votes[threadIdx.x] = __ballot_sync(0xFFFFu, threadIdx.x % 2);
    else
        votes[threadIdx.x] = __ballot_sync(0xFFFF0000u, 1);
}

extern "C" __global__ void bytes(unsigned* out, unsigned x, unsigned y) {
    out[0] = __byte_perm(x, y, 0x3210);
    out[1] = __byte_perm(x, y, 0x7654);
    out[2] = __byte_perm(x, y, 0x0426);
    out[3] = __float_as_uint(1.0f);
    out[4] = __uint_as_float(0x40000000u) == 2.0f;
}

extern "C" __global__ void order(int* at, int* blocks) {
    if (threadIdx.x == 0) blocks[(*at)++] = gridDim.x * blockIdx.y + blockIdx.x;
}

extern "C" __global__ void thread_order(int* at, int* threads) { threads[(*at)++] = threadIdx.x; }

extern "C" __global__ void kinds(double* out, int i, long long l, float f, double d) {
    out[0] = i, out[1] = l, out[2] = f, out[3] = d, out[4] = exp(f) + tanh(d);
}
"""


@pytest.fixture(scope="module")
def kernels() -> Library:
    return Library(SOURCE.replace("extern __shared__ float room[];", DYNAMIC), folder())


DYNAMIC = "float* room = reinterpret_cast<float*>(cuda_on_cpu::here.shared);"


def ints(count: int = THREADS) -> Array:
    return np.zeros(count, np.int32)


# --- what shared memory shows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("thread_order", cuda_on_cpu.ORDERS)
def test_what_a_barrier_orders_is_seen_by_all(kernels: Library, thread_order: str) -> None:
    kernels.thread_order = thread_order
    values, out = np.arange(2 * THREADS, dtype=np.float32), np.zeros(2 * THREADS, np.float32)
    kernels.launch("left", (2,), (THREADS,), [values, out, 1], shared_bytes=4 * THREADS)
    assert np.array_equal(out.reshape(2, -1), np.roll(values.reshape(2, -1), 1, axis=1))


@pytest.mark.parametrize("thread_order", cuda_on_cpu.ORDERS)
def test_a_missing_barrier_shows_as_nan(kernels: Library, thread_order: str) -> None:
    """In the second block too, though the first has left its numbers in the same place."""
    kernels.thread_order = thread_order
    out = np.zeros(2 * THREADS, np.float32)
    kernels.launch("left", (2,), (THREADS,), [out, out, 0], shared_bytes=4 * THREADS)
    assert np.isnan(out.reshape(2, -1)).any(axis=1).all()


def test_fixed_shared_memory_is_poisoned_too(kernels: Library) -> None:
    kernels.thread_order = "forward"
    out = np.zeros(THREADS, np.float32)
    kernels.launch("fixed", (1,), (THREADS,), [out])
    assert np.flatnonzero(np.isnan(out)).tolist() == [5]


@pytest.mark.parametrize("thread_order", ["forward", "backward"])
def test_a_warp_runs_ahead_where_no_barrier_holds_it(kernels: Library, thread_order: str) -> None:
    """So that what is overwritten too early shows."""
    kernels.thread_order = thread_order
    for barrier in (1, 0):
        out = np.zeros(THREADS, np.float32)
        kernels.launch("turns", (1,), (THREADS,), [out, barrier], shared_bytes=4 * THREADS)
        assert np.array_equal(out, np.arange(THREADS)[::-1]) == bool(barrier)


# --- threads that wait --------------------------------------------------------------------------------------------


def test_threads_at_different_barriers_are_named(kernels: Library) -> None:
    first, second = (SOURCE[: SOURCE.index(text)].count("\n") + 2 for text in ("if (threadIdx.x < 32)", "    else\n"))
    told = rf"apart, block \(0, 0\): threads of a block wait at different barriers, line {first} and line {second}"
    with pytest.raises(CudaError, match=told):
        kernels.launch("apart", (1,), (THREADS,), [ints()])


def test_a_thread_that_left_before_a_barrier_is_missed(kernels: Library) -> None:
    told = r"deserted, block \(1, 0\): 95 threads wait at a barrier \(line \d+\), 0 for lanes .*, 1 have ended"
    with pytest.raises(CudaError, match=told):
        kernels.launch("deserted", (2,), (THREADS,), [ints(), 3])
    out = ints()
    kernels.launch("deserted", (2,), (THREADS,), [out, -1])  # and what comes after is as if nothing had been
    assert out[0] == 1


def test_a_lane_that_waits_for_others_in_vain_is_named(kernels: Library) -> None:
    with pytest.raises(CudaError, match=r"lonely, .*: 0 threads wait at a barrier .*, 48 for lanes of their warp, 48"):
        kernels.launch("lonely", (1,), (THREADS,), [ints()])


# --- what lanes show one another ----------------------------------------------------------------------------------


@pytest.mark.parametrize("thread_order", cuda_on_cpu.ORDERS)
def test_shuffles_and_votes(kernels: Library, thread_order: str) -> None:
    kernels.thread_order = thread_order
    shuffled, crossed, votes, found = ints(), ints(), np.zeros(THREADS, np.uint32), ints()
    kernels.launch("warps", (1,), (THREADS,), [shuffled, crossed, votes, found])
    lane, warp = np.arange(THREADS) % 32, np.arange(THREADS) // 32
    assert np.array_equal(shuffled, 32 * warp + (lane + 1) % 32)
    assert np.array_equal(crossed, np.arange(THREADS) ^ 8)
    expected = [sum(1 << k for k in range(32) if (32 * w + k) % 3 == 0) for w in range(3)]
    assert votes.tolist() == [expected[w] for w in warp]
    assert np.array_equal(found, warp == 1)


def test_a_mask_joins_its_lanes_alone(kernels: Library) -> None:
    votes = np.zeros(THREADS, np.uint32)
    kernels.launch("halves", (1,), (THREADS,), [votes])
    assert votes.tolist() == [*[0xAAAA] * 16, *[0xFFFF0000] * 16] * 3


def test_a_warp_that_is_not_full_votes_among_its_own(kernels: Library) -> None:
    shuffled, crossed, votes, found = ints(), ints(), np.zeros(THREADS, np.uint32), ints()
    kernels.launch("warps", (1,), (40,), [shuffled, crossed, votes, found])
    assert votes[39] == sum(1 << k for k in range(8) if (32 + k) % 3 == 0)


def test_bytes_are_permuted_as_cuda_does(kernels: Library) -> None:
    out, x, y = np.zeros(5, np.uint32), np.int32(0x33221100), np.int32(0x77665544)
    kernels.launch("bytes", (1,), (1,), [out, x, y])
    assert out.tolist() == [0x33221100, 0x77665544, 0x00442266, 0x3F800000, 1]


# --- orders and arguments -----------------------------------------------------------------------------------------


def visited(kernels: Library, name: str, grid: tuple[int, ...], threads: int) -> list[int]:
    at, seen = ints(1), ints(6)
    kernels.launch(name, grid, (threads,), [at, seen])
    assert at[0] == 6
    return [int(n) for n in seen]


@pytest.mark.parametrize(("name", "grid", "threads"), [("order", (3, 2), 2), ("thread_order", (1,), 6)])
def test_blocks_and_threads_run_in_the_order_asked_for(
    kernels: Library, name: str, grid: tuple[int, ...], threads: int
) -> None:
    which, found = "block_order" if name == "order" else "thread_order", {}
    for order in cuda_on_cpu.ORDERS:
        kernels.block_order = kernels.thread_order = "forward"
        setattr(kernels, which, order)
        found[order] = visited(kernels, name, grid, threads)
    assert found["forward"] == [0, 1, 2, 3, 4, 5]
    assert found["backward"] == [5, 4, 3, 2, 1, 0]
    assert sorted(found["shuffled"]) == found["forward"]
    assert found["shuffled"] not in (found["forward"], found["backward"])
    assert visited(kernels, name, grid, threads) == found["shuffled"]  # the same seed, the same order
    kernels.seed = 1
    assert visited(kernels, name, grid, threads) != found["shuffled"]
    kernels.seed, kernels.block_order, kernels.thread_order = 0, "forward", "forward"


def test_arguments_keep_their_types(kernels: Library) -> None:
    out = np.zeros(5)
    given = [np.int32(-3), np.int64(2**40), np.float32(0.5), np.float64(1 / 3)]
    kernels.launch("kinds", (1,), (1,), [out, *given])
    assert out[:4].tolist() == given
    assert out[4] == pytest.approx(np.exp(0.5) + np.tanh(1 / 3), rel=1e-7)


def test_what_cannot_be_launched_is_refused(kernels: Library) -> None:
    with pytest.raises(CudaError, match="nothing is no kernel of this source; it has left, fixed, "):
        kernels.launch("nothing", (1,), (1,), [])
    with pytest.raises(CudaError, match="an array that is not in C order has no one pointer"):
        kernels.launch("fixed", (1,), (1,), [np.zeros((2, 2), np.float32).T])


def test_a_source_that_does_not_compile_is_named_with_its_line() -> None:
    broken = 'extern "C" __global__ void a(int* x) {\n    *x = nothing;\n}\n'
    with pytest.raises(CudaError, match=r"g\+\+ does not compile this:(.|\n)*source\.cu:2:.*nothing"):
        Library(broken, folder())


def test_a_source_is_compiled_once() -> None:
    source = 'extern "C" __global__ void a(int* x) { *x = 1; }'
    Library(source, folder())
    before = {file: file.stat().st_mtime_ns for file in folder().glob("*.o")}
    Library(source, folder())
    assert before
    assert {file: file.stat().st_mtime_ns for file in folder().glob("*.o")} == before


# --- bounds -------------------------------------------------------------------------------------------------------

# Reads `out[at]` of an array and `room[at]` of shared memory, both of four numbers.
BOUNDS = """
import sys
from pathlib import Path
import numpy as np
from cuda_on_cpu import Library
source = '''
extern "C" __global__ void read(float* out, int at, int room_at) {
    float* room = reinterpret_cast<float*>(cuda_on_cpu::here.shared);
    room[threadIdx.x] = 1;
    __syncthreads();
    if (threadIdx.x == 0) out[0] = out[at] + room[room_at];
}
'''
out = np.ones(4, np.float32)
library = Library(source, Path(sys.argv[1]), sanitize=True)
library.launch("read", (1,), (4,), [out, int(sys.argv[2]), int(sys.argv[3])], shared_bytes=16)
print(out[0])
"""


@pytest.mark.kernels
@pytest.mark.parametrize(("at", "room_at"), [(4, 0), (-1, 0), (0, 4)])
def test_an_index_out_of_bounds_ends_a_sanitized_process(at: int, room_at: int) -> None:
    done = run_sanitized(BOUNDS, str(folder()), str(at), str(room_at))
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "source.cu:6" in done.stderr


@pytest.mark.kernels
def test_within_bounds_a_sanitized_process_ends_well() -> None:
    done = run_sanitized(BOUNDS, str(folder()), "3", "3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "2.0\n", "")
