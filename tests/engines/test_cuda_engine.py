"""The GPU engine around its kernels: what it queues and waits for, stop and resume, the choice, whole training runs."""

from __future__ import annotations

import itertools
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from cuda_runs import CpuDevice, cuda_engine, planted
from marks import some
from panel_runs import Array, Case, assert_same_bits, assert_same_numbers, numbers_of, run, state, train

from catopt_xp.backend.xp import NumpyBackend
from catopt_xp.data.order import epoch_order
from catopt_xp.engines import choose
from catopt_xp.engines.choose import choose_engine
from catopt_xp.engines.cuda import engine as cuda
from catopt_xp.engines.cuda import launches
from catopt_xp.engines.cuda.engine import CoresEngine, CudaEngine
from catopt_xp.engines.cuda.launches import CHUNK_STEPS
from catopt_xp.engines.plain import PlainEngine, Settings
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim import schedules
from catopt_xp.optim.rules import OPTIMIZERS, Adam
from catopt_xp.training.callbacks import TrainState
from catopt_xp.training.loop import Interrupted, TrainingDiverged

OBSTACLE = cuda_on_cpu.obstacle()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))

# --- what is queued -----------------------------------------------------------------------------------------------

SMALL = Case(n_x=70, epochs=3)  # three steps in an epoch
LONG = Case(n_x=40, m=2 * (2 * CHUNK_STEPS + 3), batch_size=2, epochs=3)  # two chunks and three steps


def queued(case: Case, **options: Any) -> tuple[dict[str, Array], Any]:
    device = CpuDevice(**options)
    return run(case.engine(cuda_engine(device)), case), device


def test_a_step_is_two_launches_and_an_epoch_some_uploads() -> None:
    _, device = queued(SMALL)
    # One launch more makes the first product; a chunk ends with one that counts its steps.
    assert device.launches == {"middle": 9, "stream": 10, "advance": 3}
    # An epoch's rows, places, first step and numbers; a place and a step for the first product.
    assert device.uploads == 3 * 4 + 2
    assert (device.captures, device.waits) == (0, 0)


def test_whole_chunks_are_replays_of_one_graph() -> None:
    _, device = queued(LONG)
    steps = 3 * (2 * CHUNK_STEPS + 3)
    assert device.launches == {"middle": steps, "stream": steps + 1, "advance": 9}
    assert device.captures == 1
    assert device.replays == 5  # of six whole chunks: the very first loads the kernels
    assert device.uploads == 3 * (3 + 3) + 2
    assert device.waits == 3 * 2  # the host stays a chunk ahead


@pytest.mark.kernels
def test_without_graphs_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with_graphs, _ = queued(LONG)
    assert_same_numbers(with_graphs, run(LONG.engine(PlainEngine), LONG))
    monkeypatch.setattr(cuda, "CHUNK_STEPS", 0)  # no chunk is as long as a graph
    without, device = queued(LONG)
    assert device.captures == 0
    assert_same_bits(without, with_graphs)


@pytest.mark.parametrize("steps", some([1, 7, 1000], [1000], pytest.mark.kernels))
def test_chunks_of_any_length_have_the_same_bits(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = queued(LONG)
    for module in (cuda, launches):
        monkeypatch.setattr(module, "CHUNK_STEPS", steps)
    assert_same_bits(queued(LONG)[0], expected)


@pytest.mark.parametrize(
    "case", some([SMALL, LONG, replace(LONG, settled=True), replace(LONG, by_step=True)], [LONG], pytest.mark.kernels)
)
def test_the_host_reads_and_writes_nothing_before_it_has_waited(case: Case) -> None:
    """A device that does everything as late as it may gives the same bits."""
    case = replace(case, scheduler=schedules.get_hyperbola_func(0.5))
    late, device = queued(case, late=True)
    assert_same_bits(late, queued(case)[0])
    assert device.attached == (case.epochs if case.settled else 1)


def test_nothing_is_made_anew_from_epoch_to_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = LONG.engine(cuda_engine())
    arrays = [*engine._buffers.values(), engine._rows, engine._places, engine._table, engine._base]
    sizes = [(array.ctypes.data, array.nbytes) for array in arrays]
    assert sum(engine._buffers[name].nbytes for name in engine._buffers) == engine.geometry.buffer_bytes
    made: list[Any] = []
    monkeypatch.setattr(NumpyBackend, "zeros", lambda self, *given: made.append(given))
    run(engine, LONG)
    after = [*engine._buffers.values(), engine._rows, engine._places, engine._table, engine._base]
    assert [(array.ctypes.data, array.nbytes) for array in after] == sizes
    assert made == []


def test_a_pause_ends_a_chunk() -> None:
    engine: Any = LONG.engine(cuda_engine())
    engine.settings.pause_every = 25
    order = epoch_order(LONG.m, 0)
    assert list(engine.steps(0, order)) == [25, 50, 67]
    assert list(engine.steps(1, order)) == [8, 33, 58, 67]  # 75, 100 and 125 of all steps


# --- stop and go on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("products", [("float64", "uint8"), ("float32", "uint8"), ("float32", "float32")])
@pytest.mark.parametrize("stop", [1, 2])
def test_an_epoch_that_stops_and_goes_on_has_the_same_bits(products: tuple[str, str], stop: int) -> None:
    """In another engine, which has to make the product that the first one had in hand."""
    dtype, samples = products
    case = replace(SMALL, dtype=dtype, samples=samples, epochs=1, n_x=300)
    straight, first, second = (case.engine(cuda_engine()) for _ in range(3))
    first.settings.pause_every = stop
    order, following = (epoch_order(case.m, epoch) for epoch in (0, 1))
    for engine, start in ((straight, 0), (first, 0), (second, stop)):
        if engine is second:
            second.model.load(first.model.save())
            second.optimizer.load(first.optimizer.save())
        for done in engine.steps(0, order, start, following):
            if engine is first and done == stop:
                break
        engine.settle()
    assert_same_bits(state(second), state(straight))


def test_another_order_than_was_foretold_has_the_same_numbers() -> None:
    results = []
    for kind in (PlainEngine, cuda_engine()):
        engine = SMALL.engine(kind)
        for epoch in range(3):
            order, never = (epoch_order(SMALL.m, number) for number in (epoch, 99))
            assert list(engine.steps(epoch, order, 1, never))[-1] == 3
        engine.settle()
        results.append(state(engine))
    assert_same_numbers(results[1], results[0])


def test_a_schedule_that_fails_leaves_the_weights_of_whole_chunks() -> None:
    def fails(learning_rate: float, epoch: float) -> float:
        return learning_rate if epoch < 1 else -1.0

    engine = replace(SMALL, scheduler=fails).engine(cuda_engine())
    order = epoch_order(SMALL.m, 0)
    assert list(engine.steps(0, order)) == [3]
    before = state(engine)["W0"]
    engine.optimizer.epoch = 1
    with pytest.raises(ValueError, match="a learning rate is finite and not negative"):
        list(engine.steps(1, order))
    engine.settle()
    assert np.array_equal(state(engine)["W0"], before)


# --- numbers that are not finite ----------------------------------------------------------------------------------


NANS = [(s, o, a) for s in ("uint8", "float32") for o in OPTIMIZERS for a in ("relu", "sigmoid", "tanh")]
EACH_ONCE = [("uint8", "adam", "relu"), ("float32", "rmsprop", "tanh"), ("uint8", "momentum", "sigmoid")]


@pytest.mark.parametrize(("samples", "optimizer", "activation"), some(NANS, EACH_ONCE, pytest.mark.kernels))
def test_a_nan_reaches_the_same_numbers(samples: str, optimizer: str, activation: str) -> None:
    case, results = Case(n_x=600, dtype="float32", samples=samples, optimizer=optimizer, activation=activation), []
    for kind in (PlainEngine, cuda_engine()):
        engine = case.engine(kind)
        engine.model.save()["W0"][3, 500] = np.nan
        results.append(run(engine, case))
    for name, array in results[0].items():
        assert np.array_equal(np.isnan(array), np.isnan(results[1][name])), name
    assert np.isnan(results[0]["losses"]).all()


# --- which engine runs --------------------------------------------------------------------------------------------


class PretendGpu(NumpyBackend):
    """The CPU, which says that it is a GPU: arrays are NumPy's, kernels run on a `CpuDevice`."""

    def __init__(self, free: int = 2**40) -> None:
        super().__init__()
        self.name, self.free = "cupy", free

    def free_memory(self) -> int:
        return self.free


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[CpuDevice]]:
    """The devices that are made where a GPU's would be; the kernels of each are changed as `changes` says."""
    made: list[CpuDevice] = []

    def make(backend: Any) -> CpuDevice:
        made.append(CpuDevice())
        return made[-1]

    monkeypatch.setattr(cuda, "CupyDevice", make)
    choose._check.cache_clear()
    yield made
    choose._check.cache_clear()


def setting(
    layers: tuple[int, ...] = (70, 6, 1), batch_size: int = 5, backend: Any = None, m: int = 13, **options: Any
) -> dict[str, Any]:
    """Arguments of `choose_engine` for a network of these layers."""
    model = DeepNetwork(layers, [*["relu"] * (len(layers) - 2), "sigmoid"], **options)
    samples, targets = np.zeros((m, layers[0]), np.uint8), np.zeros((layers[-1], m), model.dtype)
    arguments = {"model": model, "optimizer": Adam(model.save(), 1e-3), "samples": samples, "targets": targets}
    return arguments | {"backend": backend or PretendGpu(), "settings": Settings(batch_size)}


OBSTACLES: dict[str, dict[str, Any]] = {
    "dropout draws its masks on the host, batch by batch": {"dropout": 0.5},
    "the first layer has 129 units, more than 128, for which whole products win": {"layers": (70, 129, 1)},
    "batches of 2001, more than 2000, for which whole products win": {"batch_size": 2001, "m": 2001},
    "the network needs 126416 bytes of shared memory, a block has 98304": {"layers": (70, 100, 300, 1)},
    "its sums need 0 MB, cpu has 0 MB free: take smaller batches": {"backend": PretendGpu(100)},
}


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_kernels_cannot_run_goes_to_the_plain_engine(obstacle: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f'engine "panels" cannot run this: {obstacle}; leave')):
        choose_engine("panels", **setting(**OBSTACLES[obstacle]))
    engine, why = choose_engine("auto", **setting(**OBSTACLES[obstacle]))
    assert (type(engine), why) == (PlainEngine, obstacle)


@pytest.mark.parametrize("changes", [{"layers": (70, 128, 1)}, {"batch_size": 2001, "m": 2000}])
def test_at_the_very_edge_the_kernels_run(changes: dict[str, Any], devices: list[CpuDevice]) -> None:
    engine, why = choose_engine("auto", **setting(**changes))
    assert (type(engine), why) == (CudaEngine, "the fastest that can run this")
    assert engine.device is devices[-1]


def test_the_check_runs_the_kernels_once(devices: list[CpuDevice]) -> None:
    choose_engine("auto", **setting())
    assert [device.launches["middle"] for device in devices] == [3, 0]  # the check's, and the engine's own
    choose_engine("panels", **setting())
    assert [device.launches["middle"] for device in devices] == [3, 0, 0]


DIFFERS = r"the panel engine failed its check: \S.* differs by \S+ of its size, Adam, float32"
# A fault in the text of tensor cores alone, or in what they share with the others; who runs then, after which causes.
WRONG: dict[str, tuple[list[tuple[str, str]], type[PlainEngine], list[str]]] = {
    "tensor cores compute something else": ([("0x7632", "0x7623")], CoresEngine, [DIFFERS]),
    "tensor cores do not compile": (
        [("0x7632", "nothing")],
        CoresEngine,
        [r"the panel engine failed its check: CudaError, g\+\+ does not compile this: .*nothing"],
    ),
    "both compute something else": ([("sums[u] * SCALE", "sums[u]")], PlainEngine, [DIFFERS, DIFFERS]),
}


@pytest.mark.parametrize("name", some(WRONG, ["tensor cores compute something else"], pytest.mark.kernels))
def test_where_a_check_fails_a_slower_engine_runs_with_a_warning(
    name: str, devices: list[CpuDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    edits, expected, causes = WRONG[name]

    def change(source: str) -> str:
        return source if all(old not in source for old, _ in edits) else planted(*edits)(source)

    monkeypatch.setattr(cuda, "CupyDevice", lambda backend: CpuDevice(change))
    with pytest.warns(RuntimeWarning) as caught:
        engine, why = choose_engine("auto", **setting())
    assert type(engine) is expected
    assert len(caught) == len(causes)
    for cause, warning in zip(causes, caught, strict=True):
        assert re.fullmatch(f"{cause}.*; a slower one runs instead", str(warning.message))
    assert re.match(causes[-1], why)
    if expected is CoresEngine:
        assert engine.versions() == {"kernels": "cores, 256 features, 1 samples"}


@pytest.mark.kernels
@pytest.mark.usefixtures("devices")
def test_the_check_loads_as_the_features_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = ("x[4 * f + q] = four.x[q];", "x[4 * f + q] = four.x[0];")  # of the loads of 16 bytes alone
    monkeypatch.setattr(cuda, "CupyDevice", lambda backend: CpuDevice(lambda source: source.replace(*fault)))
    assert type(choose_engine("auto", **setting(layers=(70, 6, 1)))[0]) is CudaEngine
    with pytest.warns(RuntimeWarning, match=DIFFERS):
        engine, _ = choose_engine("auto", **setting(layers=(72, 6, 1)))
    assert type(engine) is CoresEngine


# --- training -----------------------------------------------------------------------------------------------------


@pytest.fixture
def training(devices: list[CpuDevice], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`train` of panel_runs on the GPU that is none, with the panel engine; a check's steps are not to be counted."""
    monkeypatch.setattr(choose, "self_check", lambda *arguments: None)
    return lambda folder=None, **given: train(folder, **{"device": PretendGpu()} | given)


VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": name} for name in OPTIMIZERS},
    "schedule by step": {"lr_scheduler": schedules.get_hyperbola_func(0.5), "schedule_by": "step"},
    "float64, once, drop last": {"dtype": "float64", "shuffle": "once", "drop_last": True},
    "batch 1": {"batch_size": 1, "total_epoch": 2},
}


@pytest.mark.kernels
def test_training_with_it_is_training_with_the_plain_engine(training: Callable[..., Any]) -> None:
    for options in VARIANTS.values():
        options = options | {"dtype": "float64"}
        result = training(**options)
        assert (result.engine, result.engine_reason) == ("panels", "as asked")
        assert_same_numbers(numbers_of(result), numbers_of(train(engine="plain", **options)))


@pytest.mark.parametrize("variant", some(VARIANTS, ["adam", "float64, once, drop last"], pytest.mark.kernels))
def test_a_run_stopped_within_an_epoch_keeps_its_bits(
    variant: str, training: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, steps = VARIANTS[variant], CudaEngine.steps
    straight = training(**options)
    for pause in (1, 2):
        count = itertools.count(1)

        def interrupted(engine: CudaEngine, *given: Any, count: Any = count) -> Iterator[int]:
            for done in steps(engine, *given):
                if next(count) == 2:
                    os.kill(os.getpid(), signal.SIGINT)
                yield done

        folder = tmp_path / str(pause)
        with monkeypatch.context() as patch:
            patch.setattr(CudaEngine, "steps", interrupted)
            with pytest.raises(Interrupted):
                training(folder, checkpoint_every_steps=pause, **options)
        resumed = training(folder, recover_from=folder / "model_latest.npz", **options)
        assert_same_bits(numbers_of(resumed), numbers_of(straight))


@pytest.mark.parametrize(("first", "second"), [("plain", "panels"), ("panels", "plain")])
def test_a_checkpoint_of_one_engine_goes_on_with_the_other(
    first: str, second: str, training: Callable[..., Any], tmp_path: Path
) -> None:
    training(tmp_path, engine=first, dtype="float64", total_epoch=2)
    resumed = training(tmp_path, engine=second, recover_from=tmp_path / "model_latest.npz")
    assert any("the bits that follow will differ" in said for said in resumed.notices)
    assert_same_numbers(numbers_of(resumed), numbers_of(train(engine="plain", dtype="float64")))


def test_a_callback_that_changes_the_weights_is_respected(training: Callable[..., Any]) -> None:
    class Change:
        def on_epoch(self, state: TrainState) -> None:
            state.model.save()["W0"][...] *= 0.5
            state.optimizer.save()["m/W0"][...] *= -1.0

    options: dict[str, Any] = {"dtype": "float64", "callbacks": [Change()]}
    assert_same_numbers(numbers_of(training(**options)), numbers_of(train(engine="plain", **options)))


@pytest.mark.parametrize("optimizer", some(OPTIMIZERS, ["adam"], pytest.mark.kernels))
def test_a_learning_rate_that_explodes_is_named_with_its_step(optimizer: str, training: Callable[..., Any]) -> None:
    explodes = schedules.get_table_func({1: 1e36})
    with pytest.raises(TrainingDiverged, match=r"the loss is (nan|inf) at epoch 1, step 1 "):
        training(optimizer=optimizer, lr_scheduler=explodes, print_interval=100)
