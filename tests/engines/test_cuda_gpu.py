"""The GPU engine through CuPy: on a GPU, and here with a stand-in for CuPy whose kernels run on the CPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from cuda_runs import cases, error_ratio, planted, source_of
from cuda_stand_in import StandIn
from panel_runs import Array, Case, assert_same_bits, assert_same_numbers, run

import catopt_xp
from catopt_xp.backend.devices import DeviceError
from catopt_xp.backend.xp import Backend, CupyBackend, asnumpy, get_backend
from catopt_xp.data.order import epoch_order
from catopt_xp.engines.cuda import engine as cuda
from catopt_xp.engines.cuda.engine import CoresEngine, CudaEngine
from catopt_xp.engines.cuda.launches import CHUNK_STEPS
from catopt_xp.engines.plain import PlainEngine
from catopt_xp.nn.functional import pixel_scale
from catopt_xp.optim.rules import OPTIMIZERS

# --- the device ---------------------------------------------------------------------------------------------------


def real_gpu() -> Backend:
    """The GPU; without one, the test is skipped with the reason."""
    try:
        return get_backend("cuda", strict_device=True)
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Backend:
    """A stand-in, which shows what is asked of CuPy, in which order, and a real GPU."""
    if request.param == "cuda":
        return real_gpu()
    obstacle = cuda_on_cpu.obstacle()
    if obstacle is not None:
        pytest.skip(obstacle)
    return CupyBackend(StandIn())


def trained(case: Case, kind: type[PlainEngine], backend: Backend | None = None) -> dict[str, Array]:
    return run(case.engine(kind, backend), case)


# --- numbers ------------------------------------------------------------------------------------------------------

CASES = cases()
SOME = (
    "adam outside",
    "rmsprop, both",
    "nesterov",
    "gd, l2",
    "128 units",
    "1 layer, softmax",
    "129 of 260",
    "2049 features",
)


@pytest.mark.parametrize("name", [f"{p}: {name}" for p in ("float64, pixels", "float64, floats") for name in SOME])
def test_in_float64_the_numbers_are_those_of_the_plain_engine(gpu: Backend, name: str) -> None:
    kind, case = CASES[name]
    assert_same_numbers(trained(case, kind, gpu), trained(case, PlainEngine))


@pytest.mark.parametrize(
    "name", [f"{p}: {name}" for p in ("tensor cores", "cores, pixels", "cores, floats") for name in SOME]
)
def test_in_float32_the_error_is_at_most_twice_the_plain_engine_s(gpu: Backend, name: str) -> None:
    kind, case = CASES[name]

    def make(model: Any, optimizer: Any, samples: Any, targets: Any, backend: Any, settings: Any) -> PlainEngine:
        moved = model.to(gpu)
        arrays = (gpu.asarray(x) for x in (samples, targets))
        return kind(moved, optimizer.on(moved.save()), *arrays, gpu, settings)

    assert error_ratio(make, case) <= 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_after_a_hundred_steps_the_numbers_are_those_of_the_cpu(gpu: Backend, optimizer: str) -> None:
    """The plain engine's float32 parameters are a distance e from those of float64, this engine's at most 2e: so the
    two are at most 3e apart. In float64 every rounding is 2**29 times smaller, and so is the bound.
    """
    single = Case(n_x=520, dtype="float32", m=50, batch_size=5, epochs=10, optimizer=optimizer)
    double = replace(single, dtype="float64")
    start = dict(single.engine(PlainEngine).model.save())  # float64 draws other initial weights

    def parameters(case: Case, kind: type[PlainEngine], backend: Backend | None = None) -> Array:
        engine = case.engine(kind, backend)
        engine.model.load(start)
        numbers = run(engine, case)
        assert numbers["steps"] == 100
        return np.concatenate([numbers[name].ravel() for name in start]).astype(np.float64)

    cpu, exact = parameters(single, PlainEngine), parameters(double, PlainEngine)
    e = np.linalg.norm(cpu - exact)
    assert np.linalg.norm(parameters(single, CudaEngine, gpu) - cpu) <= 3 * e
    assert np.linalg.norm(parameters(double, CudaEngine, gpu) - exact) <= 3 * e * 2.0**-29


@pytest.mark.parametrize("kind", [CudaEngine, CoresEngine, PlainEngine])
def test_products_are_those_of_float32_not_of_tf32(gpu: Backend, kind: type[PlainEngine]) -> None:
    """TF32 keeps 10 bits of a factor: its products are off by 1e-4 or so of their size, those of float32 by 1e-7."""
    case = Case(n_x=5000, units=(30, 3), dtype="float32", m=40, batch_size=20, epochs=1)
    engine: Any = case.engine(kind, gpu)
    order = epoch_order(case.m, 0)
    if kind is PlainEngine:
        W, X = (gpu.asarray(x, dtype="float32") for x in (engine.model.save()["W0"], engine.samples[:20] / 255))
        with gpu.activate():
            product, rows = asnumpy(W @ X.T), np.arange(20)
    else:
        for _ in engine.steps(0, order, following=order):
            pass
        product, rows = engine.next_product(), order[:20]
        engine.settle()
    W64 = asnumpy(engine.model.save()["W0"]).astype(np.float64)
    truth = W64 @ (asnumpy(engine.samples)[rows] * pixel_scale(np.dtype("uint8"))).T
    assert np.abs(product - truth).max() <= 5e-6 * np.abs(truth).max()


# Quotients and roots as the optimizer's rule has them.
QUICK = """
extern "C" __global__ void quick(const float* a, const float* b, float* quotients, float* roots) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    quotients[i] = (Quick(a[i]) / Quick(b[i])).x;
    roots[i] = sqrt(Quick(a[i])).x;
}
"""


def quick(gpu: Backend, a: Array, b: Array, change: Any = str) -> tuple[Array, Array]:
    """a / b and the root of a, float32, of a multiple of 256 numbers."""
    source = change(source_of(CudaEngine, Case(dtype="float32"))) + QUICK
    with gpu.activate():
        arrays = [gpu.asarray(x.astype(np.float32)) for x in (a, b, np.zeros_like(a), np.zeros_like(a))]
        kernel = gpu.xp.RawModule(code=source, options=("--std=c++17",)).get_function("quick")
        stream = gpu.xp.cuda.Stream(non_blocking=True)
        gpu.synchronize()
        with stream:
            kernel((len(a) // 256,), (256,), tuple(arrays), shared_mem=0)
        stream.synchronize()
    return asnumpy(arrays[2]), asnumpy(arrays[3])


def units_off(found: Array, truth: Array) -> float:
    """The largest error in units of the last place."""
    return float(np.abs((found - truth) / np.spacing(np.abs(truth).astype(np.float32))).max())


@pytest.mark.parametrize(
    ("left_out", "exact"),
    [((), (True, True)), (("fmaf(rest, y, q", "(q"), (False, True)), (("fmaf(0.5f * y, rest, r", "(r"), (True, False))],
)
def test_a_rule_s_quotients_and_roots_are_right_to_the_last_place(
    gpu: Backend, left_out: tuple[str, ...], exact: tuple[bool, bool]
) -> None:
    """And without their correction they are not."""
    rng = np.random.default_rng(0)
    a, b = (np.exp(rng.uniform(-28, 28, 2**16)).astype(np.float32).astype(np.float64) for _ in range(2))
    quotients, roots = quick(gpu, a, b, planted(left_out) if left_out else str)
    off = units_off(quotients, a / b), units_off(roots, np.sqrt(a))
    assert tuple(error < 0.55 for error in off) == exact


def test_zeros_and_what_is_no_number_stay_what_they_are(gpu: Backend) -> None:
    rows = [(0, 3), (-2, 0.5), (np.inf, 2), (3, np.inf), (np.nan, 1), (1, np.nan), (0, 1e-8), (2, 0)]
    a, b = np.array(rows * 32, np.float32).T
    quotients, roots = quick(gpu, a, b)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(quotients, a / b)
        np.testing.assert_allclose(roots, np.sqrt(a), rtol=1e-7)


# --- the same bits ------------------------------------------------------------------------------------------------

# More than a chunk of steps, and one that is not whole; the graph is made in the second epoch.
LONG = Case(n_x=100, units=(5, 4), dtype="float32", m=2 * CHUNK_STEPS + 5, batch_size=1, epochs=4)
LARGE = Case(n_x=557, units=(40, 4), dtype="float32", m=120, batch_size=90, epochs=2)


@pytest.mark.parametrize("case", [LONG, LARGE, replace(LARGE, samples="float32")])
def test_two_runs_have_the_same_bits(gpu: Backend, case: Case) -> None:
    assert_same_bits(trained(case, CudaEngine, gpu), trained(case, CudaEngine, gpu))


def test_a_graph_replays_what_launches_do(gpu: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    with_graphs: Any = LONG.engine(CudaEngine, gpu)
    numbers = run(with_graphs, LONG)
    assert with_graphs._graph is not None
    monkeypatch.setattr(cuda, "CHUNK_STEPS", 0)  # no chunk is as long as a graph
    without: Any = LONG.engine(CudaEngine, gpu)
    assert_same_bits(run(without, LONG), numbers)
    assert without._graph is None


def test_looking_after_every_epoch_changes_no_bit(gpu: Backend) -> None:
    assert_same_bits(trained(replace(LONG, settled=True), CudaEngine, gpu), trained(LONG, CudaEngine, gpu))


def test_no_memory_is_taken_while_it_runs(gpu: Backend) -> None:
    engine, used = LONG.engine(CudaEngine, gpu), []
    for epoch in range(5):
        for _ in engine.steps(epoch, epoch_order(LONG.m, epoch), following=epoch_order(LONG.m, epoch + 1)):
            pass
        engine.settle()
        used.append(gpu.xp.get_default_memory_pool().used_bytes())
    assert used[0] > 0
    assert used == used[:1] * 5


# --- a real GPU alone ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training_on_a_gpu_runs_the_panel_engine(dtype: str) -> None:
    real_gpu()
    case = Case(n_x=3000, dtype=dtype, m=100, batch_size=8)
    options: dict[str, Any] = {"device": "cuda", "dtype": dtype, "save_dir": None, "verbose": False, "total_epoch": 3}
    result = catopt_xp.train(**case.set_of_train(), **options)
    assert (result.engine, result.engine_reason) == ("panels", "the fastest that can run this")
    plain = catopt_xp.train(**case.set_of_train(), **options, engine="plain")
    assert result.history.train_loss == pytest.approx(plain.history.train_loss, rel=1e-5)


# Three epochs of a small run, on tensor cores and without them.
SMALL_RUN = """
import sys
from catopt_xp.backend.xp import get_backend
from cuda_runs import PRODUCTS
from panel_runs import Case, run
for kind, dtype, samples in (PRODUCTS["tensor cores"], PRODUCTS["float64, pixels"]):
    case = Case(n_x=777, units=(33, 4), dtype=dtype, samples=samples, m=40, batch_size=17)
    run(case.engine(kind, get_backend("cuda", strict_device=True)), case)
print("done")
"""


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nvidia_s_checker_finds_nothing(tool: str) -> None:
    real_gpu()
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        pytest.skip("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    # Without CuPy's pool every array has bounds of its own.
    before = (
        f"import sys, cupy; sys.path[:0] = {[path for path in sys.path if path]!r}; cupy.cuda.set_allocator(None)\n"
    )
    command = [checker, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", before + SMALL_RUN]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done" in done.stdout
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards" in done.stdout


def test_the_checked_run_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the checker is given, here with the stand-in."""
    obstacle = cuda_on_cpu.obstacle()
    if obstacle is not None:
        pytest.skip(obstacle)
    monkeypatch.setattr("catopt_xp.backend.xp.get_backend", lambda *arguments, **options: CupyBackend(StandIn()))
    exec(SMALL_RUN, {})
    assert capsys.readouterr().out == "done\n"
