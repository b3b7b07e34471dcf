"""The array backends: what each does with arrays, and whose array is whose.

The ``backend`` fixture runs on the real CuPy where there is a GPU; tests over ``fake_cupy`` run everywhere.
"""

from __future__ import annotations

import math
import time
import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catopt_xp.backend.xp import Backend, CupyBackend, NumpyBackend, asnumpy, backend_of, get_array_module


class Foreign:
    """An array of another library that offers DLPack and nothing else."""

    def __init__(self, host: Any, cuda: Any = None) -> None:
        self.host = np.asarray(host)
        if cuda is not None:
            self.cuda = cuda

    def __dlpack__(self, **options: Any) -> Any:
        return self.host.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0) if hasattr(self, "cuda") else (1, 0)


# What every backend does.


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "float64"])
def test_there_and_back(backend: Backend, dtype: str) -> None:
    host = np.arange(6, dtype=dtype).reshape(2, 3)
    there = backend.asarray(host)
    assert backend_of(there).device == backend.device
    assert get_array_module(there) is backend.xp
    assert backend.asarray(there) is there
    assert backend.asarray(there, dtype=dtype) is there
    back = backend.to_host(there)
    assert type(back) is np.ndarray
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, host)
    np.testing.assert_array_equal(asnumpy(there), host)


@pytest.mark.parametrize("dtype", ["float32", np.float32, np.dtype("float32")])
def test_types_go_by_any_name(backend: Backend, dtype: Any) -> None:
    for x in (backend.asarray([1, 2], dtype), backend.zeros((2, 3), dtype), backend.empty(4, dtype)):
        assert backend.to_host(x).dtype == np.float32
        assert x.dtype == backend.asarray([1.0], dtype).dtype
    assert backend.to_host(backend.zeros((2, 3), dtype)).tolist() == [[0.0] * 3] * 2


def test_lists_numbers_and_dlpack_are_taken(backend: Backend) -> None:
    assert backend.to_host(backend.asarray([[1, 2]])).tolist() == [[1, 2]]
    assert backend.to_host(backend.asarray(2.5, "float32")).tolist() == 2.5
    assert backend.to_host(backend.asarray(Foreign([1.0, 2.0]))).tolist() == [1.0, 2.0]


def test_matmul_writes_into_out(backend: Backend) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 5)), rng.standard_normal((5, 2))
    out = backend.zeros((3, 2), "float64")
    assert backend.matmul(backend.asarray(a), backend.asarray(b), out) is out
    np.testing.assert_allclose(backend.to_host(out), a @ b, rtol=1e-14)  # float64, sums of 5 products


@given(data=st.data())
def test_gather_is_a_window_of_the_picked_rows(backend: Backend, data: st.DataObject) -> None:
    m, n_x = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    start = data.draw(st.integers(0, n_x))
    stop = data.draw(st.integers(start, n_x))
    dtype = data.draw(st.sampled_from(["uint8", "float32", "float64"]))
    host = (
        np.random.default_rng(m * n_x)
        .integers(0, 256, (m, n_x))
        .astype(data.draw(st.sampled_from(["uint8", "float32"])))
    )
    picked = data.draw(st.lists(st.integers(0, m - 1), max_size=8))
    rows = backend.asarray(np.array(picked, dtype=data.draw(st.sampled_from(["int32", "int64"]))))
    samples = backend.asarray(host)
    for which, expected in ((rows, host[picked]), (None, host), (slice(1, 4), host[1:4])):
        answer = backend.to_host(backend.gather(samples, which, start, stop, dtype))
        assert answer.dtype == dtype
        np.testing.assert_array_equal(answer, expected[:, start:stop].astype(dtype))


def test_timer_memory_and_wait(backend: Backend) -> None:
    with backend.timer() as timer:
        backend.zeros((10, 10), "float32")
    assert 0 < timer.host < 10
    assert 0 <= timer.device < 10
    assert backend.free_memory() > 1 << 20
    backend.synchronize()
    with backend.activate():
        assert backend_of(backend.zeros(1, "float32")).device == backend.device


# NumPy.


def test_numpy_shares_memory_and_never_copies() -> None:
    host = np.arange(6.0)
    b = NumpyBackend()
    assert b.asarray(host) is host
    assert b.to_host(host) is host
    assert np.shares_memory(b.asarray(Foreign(host)), host)
    assert np.shares_memory(asnumpy(Foreign(host)), host)


def test_portable_backend_shares_host_memory(strict_backend: Backend) -> None:
    host = np.arange(6.0)
    assert np.shares_memory(strict_backend.to_host(strict_backend.asarray(host)), host)
    host.flags.writeable = False
    writable = strict_backend.asarray(host)
    writable += 1.0
    assert strict_backend.to_host(writable).tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert host[0] == 0.0
    elsewhere = strict_backend.xp.asarray([1.0, 2.0])  # the module's default device
    moved = strict_backend.asarray(elsewhere)
    assert str(moved.device) == strict_backend.device
    assert strict_backend.to_host(moved).tolist() == [1.0, 2.0]


def test_numpy_gather_copies_the_window_alone() -> None:
    samples = np.zeros((1000, 4000), np.uint8)
    rows = np.arange(0, 640, 10)
    b = NumpyBackend()
    tracemalloc.start()
    b.gather(samples, rows, 1000, 3000, np.float32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2000 * (1 + 4) + 20_000  # the picked bytes and their float32; a column slice is 2 MB


def test_numpy_matmul_has_no_temporary() -> None:
    a, b, out = np.ones((400, 8)), np.ones((8, 400)), np.empty((400, 400))
    tracemalloc.start()
    NumpyBackend().matmul(a, b, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < out.nbytes / 10
    assert np.all(out == 8.0)


def test_timer_on_the_cpu_measures_the_block() -> None:
    timer = NumpyBackend().timer()
    assert math.isnan(timer.host)
    assert math.isnan(timer.device)
    with timer:
        time.sleep(0.02)
    assert timer.device == timer.host >= 0.02


def test_only_cupy_fuses(strict_backend: Backend) -> None:
    for b in (NumpyBackend(), strict_backend):
        assert not b.fuses
        assert b.cache_bytes == 1 << 20
        with pytest.raises(NotImplementedError, match=f"the {b.name} backend has no fused kernels"):
            b.elementwise("add", "T x", "T y", "y += x")


# CuPy, over the stand-in.


def test_cupy_takes_and_gives(fake_cupy: Any) -> None:
    b = CupyBackend(fake_cupy, 1)
    assert (b.device, b.name, b.fuses, b.cache_bytes) == ("cuda:1", "cupy", True, 1 << 30)
    x = b.asarray(np.arange(3, dtype="uint8"), "float32")
    assert x.device.id == 1
    assert x.dtype == np.float32
    assert b.asarray(x) is x
    assert b.asarray(x, "float32") is x
    assert b.asarray(x, "float64").dtype == np.float64
    assert b.to_host(x).tolist() == [0.0, 1.0, 2.0]
    assert NumpyBackend().asarray(x).tolist() == asnumpy(x).tolist() == [0.0, 1.0, 2.0]
    moved = CupyBackend(fake_cupy, 0).asarray(x)
    assert moved is not x
    assert moved.device.id == 0
    assert b.zeros(2, "float32").device.id == b.empty(2, "float32").device.id == 1
    assert fake_cupy.current == [0]  # whatever was activated was given back


def test_cupy_takes_device_memory_of_others_without_a_trip_to_the_host(fake_cupy: Any) -> None:
    b = CupyBackend(fake_cupy)
    x = b.asarray([1.0, 2.0])
    by_dlpack = Foreign([math.nan], cuda=x)
    by_interface = SimpleNamespace(cuda=x, __cuda_array_interface__={"version": 3})
    for other in (by_dlpack, by_interface):
        assert b.asarray(other) is x
        assert asnumpy(other).tolist() == [1.0, 2.0]
        assert CupyBackend(fake_cupy, 1).asarray(other).device.id == 1


def test_cupy_gather_is_one_kernel_made_once(fake_cupy: Any) -> None:
    b = CupyBackend(fake_cupy, 1)
    host = np.arange(60, dtype=np.uint8).reshape(5, 12)
    samples = b.asarray(host)
    for rows in ([4, 0, 4], [2], []):
        answer = b.gather(samples, b.asarray(np.array(rows, dtype=np.int32)), 3, 10, "float32")
        assert answer.device.id == 1
        assert answer.dtype == np.float32
        np.testing.assert_array_equal(answer.host, host[rows, 3:10])
    assert fake_cupy.launched == ["catopt_xp_gather"] * 3
    assert fake_cupy.made == ["catopt_xp_gather"]
    np.testing.assert_array_equal(b.gather(samples, None, 2, 4, "float32").host, host[:, 2:4])
    np.testing.assert_array_equal(b.gather(samples, slice(1, 3), 2, 4, "uint8").host, host[1:3, 2:4])


def test_cupy_kernels_are_made_once_for_each_set_of_arguments(fake_cupy: Any) -> None:
    b = CupyBackend(fake_cupy)
    kernel = b.elementwise("twice", "T x", "T y", "y = x + x")
    assert b.elementwise("twice", "T x", "T y", "y = x + x") is kernel
    assert b.elementwise("thrice", "T x", "T y", "y = x + x + x") is not kernel
    x, y = b.asarray([1.0, 2.0]), b.zeros(2, "float64")
    kernel(x, y)
    assert y.host.tolist() == [2.0, 4.0]


def test_cupy_matmul_memory_timer_and_wait(fake_cupy: Any) -> None:
    b = CupyBackend(fake_cupy, 1)
    out = b.zeros((2, 2), "float64")
    assert b.matmul(b.asarray(np.eye(2)), b.asarray([[1.0, 2.0], [3.0, 4.0]]), out) is out
    assert out.host.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert b.free_memory() == 1000 + 24
    b.synchronize()
    assert fake_cupy.waits == [1]
    with b.timer() as timer:
        time.sleep(0.01)
    assert timer.host >= 0.01
    assert timer.device >= 0.01
    assert len(fake_cupy.waits) == 2


def test_cupy_timer_does_not_hide_a_failure(fake_cupy: Any) -> None:
    timer = CupyBackend(fake_cupy).timer()
    with pytest.raises(ZeroDivisionError), timer:
        _ = 1 / 0
    assert timer.host > 0
    assert math.isnan(timer.device)
    assert fake_cupy.waits == []


# Whose arrays.


def test_lists_numbers_and_none_mean_numpy() -> None:
    for arrays in ((), ([1, 2],), (None, 1, 2.0, np.float32(3)), ([1], np.zeros(2))):
        assert backend_of(*arrays).xp is np
        assert get_array_module(*arrays) is np


def test_arrays_say_where_they_live(fake_cupy: Any, strict_backend: Backend) -> None:
    on_gpu = CupyBackend(fake_cupy, 1).asarray([1.0])
    found = backend_of(None, on_gpu, 2.0, [3.0])
    assert (found.xp, found.device) == (fake_cupy, "cuda:1")
    found = backend_of(strict_backend.asarray([1.0]))
    assert (found.xp, found.device) == (strict_backend.xp, strict_backend.device)
    assert found.to_host(found.zeros(2, "float32")).tolist() == [0.0, 0.0]


def test_a_mix_of_devices_is_refused_in_one_line(fake_cupy: Any, strict_backend: Backend) -> None:
    host, gpu0, gpu1 = (
        np.zeros(1),
        CupyBackend(fake_cupy, 0).asarray([1.0]),
        CupyBackend(fake_cupy, 1).asarray([1.0]),
    )
    with pytest.raises(TypeError) as error:
        backend_of(None, host, gpu0)
    assert str(error.value) == (
        "arrays of different devices: argument 2 on cpu (numpy), argument 3 on cuda:0 (cupy); "
        "move them to one with backend.asarray(x)"
    )
    for mix in ((gpu0, gpu1), (host, strict_backend.asarray([1.0]))):
        with pytest.raises(TypeError, match="arrays of different devices"):
            get_array_module(*mix)


def test_an_array_without_a_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"argument 1 is a .*Foreign, which has no xp: convert it"):
        backend_of(Foreign([1.0]))
