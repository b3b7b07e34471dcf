"""The panel engine against the plain one, which is the definition: equal numbers, whatever the run."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

import catopt_xp
from catopt_xp import schedules
from catopt_xp.backend import Backend, NumpyBackend
from catopt_xp.callbacks import TrainState
from catopt_xp.data.order import epoch_order
from catopt_xp.engines import LEAST_EPS, PlainEngine, Settings, choose_engine, cpu, panels
from catopt_xp.engines.cpu import PanelEngine
from catopt_xp.engines.lanes import FLUSHES, flush_subnormals, restore, update
from catopt_xp.labels import check_labels
from catopt_xp.network import DeepNetwork
from catopt_xp.optim import OPTIMIZERS, Adam, BaseOptimizer
from catopt_xp.running import Interrupted, TrainingDiverged
from catopt_xp.training import TrainResult

Array = np.ndarray[Any, Any]
N_X = 2 * panels.PANEL + panels.STRIP + 5  # panels, strips and a strip that is not full
X86 = platform.machine().lower() in ("x86_64", "amd64")

# --- both engines by hand -----------------------------------------------------------------------------------


@dataclass
class Case:
    """A run to make with both engines."""

    n_x: int = N_X
    units: tuple[int, ...] = (7, 4)
    activation: str = "tanh"
    output: str = "sigmoid"
    outputs: int = 1
    dropout: float = 0.0
    m: int = 13
    batch_size: int = 5
    drop_last: bool = False
    shuffle: str = "epoch"
    samples: str = "uint8"
    dtype: str = "float64"
    optimizer: str = "adam"
    options: dict[str, Any] = field(default_factory=dict)
    rate: float = 1.0  # times what suits the rule and the number of features
    scheduler: schedules.Scheduler = schedules.const_lr
    by_step: bool = False
    epochs: int = 3
    settled: bool = False  # whether someone looks at the model after every epoch
    seed: int = 0

    def data(self) -> tuple[Array, Array]:
        """Samples (m, n_x) and targets (·, m), as a run holds them."""
        rng = np.random.default_rng(self.seed)
        X = rng.integers(0, 256, (self.m, self.n_x), dtype=np.uint8)
        softmax = self.output == "softmax"
        Y = rng.integers(0, self.outputs if softmax else 2, (1 if softmax else self.outputs, self.m))
        samples = X if self.samples == "uint8" else (X / 256 - 0.5).astype(self.dtype)
        return samples, check_labels(Y, self.output, self.outputs, self.dtype)

    def engine(self, kind: type[PlainEngine]) -> PlainEngine:
        layers = [self.n_x, *self.units, self.outputs]
        names = [*[self.activation] * len(self.units), self.output]
        model = DeepNetwork(layers, names, seed=self.seed % 2**32, dtype=self.dtype, dropout=self.dropout)
        rate = self.rate * (0.5 if self.optimizer in ("gd", "momentum") else 0.1) / self.n_x
        make = OPTIMIZERS[self.optimizer][0]
        optimizer = make(model.save(), rate, lr_scheduler=self.scheduler, **self.options)
        plan = Settings(self.batch_size, self.drop_last, schedule_by_step=self.by_step)
        return kind(model, optimizer, *self.data(), NumpyBackend(), plan)


def run(engine: PlainEngine, case: Case) -> dict[str, Array]:
    """Trains as `train` does; weights, moments and losses by name."""
    losses = []
    for epoch in range(case.epochs):
        order, following = (epoch_order(case.m, e, case.seed, case.shuffle) for e in (epoch, epoch + 1))
        engine.optimizer.epoch = epoch
        for _ in engine.steps(epoch, order, 0, following if epoch + 1 < case.epochs else None):
            pass
        engine.optimizer.increase_epoch()
        losses.append(engine.fetch_losses())
        if case.settled:
            engine.settle()
    engine.settle()
    return state(engine) | {"losses": np.concatenate(losses)}


def on(case: Case) -> dict[str, Any]:
    """Arguments of `train` for the same set and batches."""
    samples, targets = case.data()
    return {"X": samples.T, "Y": targets, "batch_size": case.batch_size, "seed": case.seed}


def state(engine: PlainEngine) -> dict[str, Array]:
    """Copies of parameters, moments, and counters."""
    arrays = {**engine.model.save(), **engine.optimizer.save()}
    return {name: np.array(value) for name, value in arrays.items() if name != "name"}


def largest_difference(here: dict[str, Array], there: dict[str, Array]) -> float:
    """Over all arrays, relative to the largest magnitude of each."""
    assert set(here) == set(there)
    worst = 0.0
    for name, expected in there.items():
        difference = float(np.abs(here[name] - expected).max())
        worst = max(worst, difference / float(np.abs(expected).max()) if difference else 0.0)
    return worst


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gd": ("gd", {}),
    "momentum": ("momentum", {}),
    "momentum, beta 0": ("momentum", {"beta": 0.0}),
    "nesterov": ("momentum", {"nesterov": True}),
    "corrected momentum": ("momentum", {"correct_param": True}),
    **{f"rmsprop {mode}": ("rmsprop", {"eps_mode": mode}) for mode in ("inside", "outside", "hat")},
    "uncorrected rmsprop": ("rmsprop", {"correct_param": False, "eps_mode": "outside"}),
    **{f"adam {mode}": ("adam", {"eps_mode": mode}) for mode in ("inside", "outside", "hat")},
    "uncorrected adam": ("adam", {"correct_param": False}),
    "adam, other betas": ("adam", {"beta1": 0.0, "beta2": 0.9}),
}
SCHEDULES: list[schedules.Scheduler] = [
    schedules.const_lr,
    schedules.get_hyperbola_func(0.5),
    schedules.get_exponential_func(0.7),
    schedules.get_sqrt_func(0.5),
    schedules.get_staircase_func(0.5, 0.5),
    schedules.get_table_func({0: 1e-4, 1: 5e-5, 1.5: 0.0}),
    schedules.get_cosine_func(2, 0.1),
    schedules.with_warmup(schedules.get_hyperbola_func(0.5), 1, 0.1),
]


@st.composite
def cases(draw: Callable[..., Any]) -> Case:
    optimizer, options = OPTIONS[draw(st.sampled_from(sorted(OPTIONS)))]
    decays = draw(st.sampled_from([{}, {"weight_decay": 0.1}, {"l2": 0.05}, {"weight_decay": 0.2, "l2": 0.01}]))
    output = draw(st.sampled_from(["sigmoid", "softmax"]))
    m = draw(st.integers(1, 14))
    return Case(
        n_x=draw(st.integers(1, 2600)),
        units=draw(st.sampled_from([(), (1,), (4,), (5, 3), (16,), (37, 2)]) | st.tuples(st.integers(1, 37))),
        activation=draw(st.sampled_from(["relu", "sigmoid", "tanh"])),
        output=output,
        outputs=draw(st.integers(2 if output == "softmax" else 1, 4)),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.4])),
        m=m,
        batch_size=draw(st.integers(1, m)),
        drop_last=draw(st.booleans()),
        shuffle=draw(st.sampled_from(["epoch", "once", "none"])),
        samples=draw(st.sampled_from(["uint8", "float64"])),
        optimizer=optimizer,
        options=options | decays,
        scheduler=draw(st.sampled_from(SCHEDULES)),
        by_step=draw(st.booleans()),
        epochs=draw(st.integers(1, 3)),
        settled=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )


@settings(max_examples=80)
@given(cases())
def test_in_float64_both_engines_have_the_same_numbers(case: Case) -> None:
    theirs, ours = run(case.engine(PlainEngine), case), run(case.engine(PanelEngine), case)
    assert largest_difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("samples", ["uint8", "float64"])
def test_batches_longer_than_a_block_of_samples_have_the_same_numbers(optimizer: str, samples: str) -> None:
    case = Case(m=150, batch_size=cpu.SAMPLES + 5, samples=samples, optimizer=optimizer, units=(9, 3))
    assert largest_difference(run(case.engine(PanelEngine), case), run(case.engine(PlainEngine), case)) < 1e-12


def test_a_set_that_may_only_be_read_has_the_same_numbers(tmp_path: Path) -> None:
    case = Case()
    engine = case.engine(PanelEngine)
    np.save(tmp_path / "samples.npy", engine.samples)
    engine.samples = np.load(tmp_path / "samples.npy", mmap_mode="r")
    assert largest_difference(run(engine, case), run(case.engine(PlainEngine), case)) < 1e-12


def test_another_order_than_was_foretold_has_the_same_numbers() -> None:
    case, results = Case(epochs=1), []
    for kind in (PlainEngine, PanelEngine):
        engine = case.engine(kind)
        for epoch in range(3):
            # The second half of an epoch, whose end foretells an order that never comes.
            order, never = (epoch_order(case.m, number) for number in (epoch, 99))
            assert list(engine.steps(epoch, order, 1, never)) == [2, 3]
        engine.settle()
        results.append(state(engine))
    assert largest_difference(*results) < 1e-12


def distance(here: dict[str, Array], there: dict[str, Array], names: list[str]) -> float:
    return float(np.sqrt(sum(np.square(here[name].astype(np.float64) - there[name]).sum() for name in names)))


@pytest.mark.parametrize("samples", ["uint8", "float32"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_in_float32_the_error_is_at_most_twice_the_plain_engine_s(optimizer: str, samples: str) -> None:
    for seed in range(4):
        case = Case(dtype="float32", samples=samples, m=40, batch_size=16, optimizer=optimizer, seed=seed)
        double = replace(case, dtype="float64", samples="uint8" if samples == "uint8" else "float64")
        exact = double.engine(PlainEngine)
        exact.model.load(case.engine(PlainEngine).model.save())  # float64 draws other initial weights
        truth, plain, ours = (
            run(exact, double),
            run(case.engine(PlainEngine), case),
            run(case.engine(PanelEngine), case),
        )
        assert {array.dtype.name for name, array in ours.items() if array.ndim} == {"float32"}
        parameters = list(exact.model.save())
        for names in (parameters, *([name] for name in truth if name not in ("steps", "epoch"))):
            largest = max(float(np.abs(truth[name]).max()) for name in names)
            few_units = 4 * np.finfo(np.float32).eps * largest
            assert distance(ours, truth, names) <= 2 * distance(plain, truth, names) + few_units, (seed, names)


# --- the same bits on any number of threads -----------------------------------------------------------------


def assert_same_bits(here: dict[str, Array], there: dict[str, Array]) -> None:
    assert set(here) == set(there)
    for name, array in here.items():
        assert np.array_equal(array, there[name]), name


WIDE = Case(n_x=20_037, units=(19, 4), dtype="float32", m=40, batch_size=16, epochs=2)


def run_on(workers: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> dict[str, Array]:
    """The run with so many workers in every pass, which all begin before one of them takes a task."""
    everyone, compiled, seen = threading.Barrier(workers, timeout=60), cpu._run_panels, set()

    def together(*arguments: Any) -> None:
        everyone.wait()
        seen.add(threading.get_ident())
        compiled(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("catopt_xp.threads.thread_count", lambda: workers)
        patch.setattr(cpu, "LEAST_WORK", 1)
        patch.setattr(cpu, "_run_panels", together)
        arrays = run(case.engine(PanelEngine), case)
    assert len(seen) >= workers
    return arrays


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_any_number_of_threads_gives_the_same_bits(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_bits(run_on(workers, WIDE, monkeypatch), run_on(1, WIDE, monkeypatch))


@pytest.mark.parametrize("length", [2, 4, 8])
def test_tasks_of_any_length_give_the_same_bits(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = run(WIDE.engine(PanelEngine), WIDE)
    monkeypatch.setattr(panels.Split, "task_length", lambda self, numbers: length)
    assert_same_bits(run_on(2, WIDE, monkeypatch), straight)


def test_a_fault_in_a_worker_is_raised_and_leaves_the_weights_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, compiled = WIDE.engine(PanelEngine), cpu._run_panels
    before = state(engine)["W0"]

    def fail_elsewhere(*arguments: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("no room for a worker")
        compiled(*arguments)

    monkeypatch.setattr("catopt_xp.threads.thread_count", lambda: 2)
    monkeypatch.setattr(cpu, "_run_panels", fail_elsewhere)
    with pytest.raises(MemoryError, match="no room for a worker"):
        run(engine, WIDE)
    engine.settle()
    assert np.array_equal(state(engine)["W0"], before)  # the first pass only multiplies


# --- training: stop and resume ------------------------------------------------------------------------------

M, BATCHES, EPOCHS = 20, 3, 3
LATEST = "model_latest.npz"
RATES = {"gd": 1e-3, "momentum": 1e-3, "rmsprop": 1e-4, "adam": 1e-4}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": name} for name in RATES},
    "dropout, schedule by step": {
        "dropout": 0.4,
        "lr_scheduler": schedules.get_hyperbola_func(0.5),
        "schedule_by": "step",
    },
    "float64, once, drop last": {"dtype": "float64", "shuffle": "once", "drop_last": True},
    "early stopping": {"early_stopping": 1},
}


def train(folder: Path | None, engine: str = "panels", **given: Any) -> TrainResult:
    """A short run on a set of more than one panel."""
    rng = np.random.default_rng(0)
    X, Y = rng.integers(0, 256, (M, 1100), dtype=np.uint8).T, rng.integers(0, 2, (1, M))
    common: dict[str, Any] = {"X": X, "Y": Y, "batch_size": 8, "total_epoch": EPOCHS, "optimizer": "adam"}
    common |= {"save_dir": folder, "engine": engine, "device": "cpu", "verbose": False, "print_interval": 1}
    if given.get("early_stopping"):
        common |= {"dev_X": X, "dev_Y": 1 - Y}
    if "recover_from" in given or "model" in given:  # how the network is built is known
        given = {k: v for k, v in given.items() if k not in ("dropout", "dtype")}
    else:
        common["hidden"] = (6, 4)
    common |= given
    common.setdefault("learning_rate", RATES.get(common["optimizer"]))
    result = catopt_xp.train(**common)
    assert result.engine == engine
    return result


def arrays_of(result: TrainResult) -> dict[str, Array]:
    """Weights, moments and counters."""
    arrays = {**result.model.save(), **result.optimizer.save()}
    return {name: np.array(value) for name, value in arrays.items()}


def assert_same_run(here: TrainResult, there: TrainResult) -> None:
    assert_same_bits(arrays_of(here), arrays_of(there))
    now, then = (
        {k: v for k, v in vars(result.history).items() if k not in ("seconds", "timings", "run")}
        for result in (here, there)
    )
    assert now == then


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Crash(Exception):
    """Stands for whatever ends a run between two steps."""


def crash() -> None:
    raise Crash


After = Callable[[int, Callable[[], None]], None]


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> After:
    """`after(n, action)` calls `action` once the engine has made n updates, before anything is saved."""
    steps = PanelEngine.steps
    monkeypatch.setattr(cpu, "self_check", lambda *arguments: None)  # its steps are not to be counted

    def install(updates: int, action: Callable[[], None]) -> None:
        count = itertools.count(1)

        def counted(engine: PanelEngine, *arguments: Any) -> Iterator[int]:
            for done in steps(engine, *arguments):
                if next(count) == updates:
                    action()
                yield done

        monkeypatch.setattr(PanelEngine, "steps", counted)

    return install


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_at_any_step_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, after: After, variant: str
) -> None:
    options = VARIANTS[variant]
    straight = train(None, **options)
    for updates in range(1, straight.optimizer.steps):
        after(updates, interrupt)
        with pytest.raises(Interrupted):
            train(tmp_path / str(updates), **options)
        after(0, crash)
        latest = tmp_path / str(updates) / LATEST
        assert_same_run(train(tmp_path / str(updates), recover_from=latest, **options), straight)


def test_a_chain_of_crashes_at_every_step_ends_with_the_same_bits(tmp_path: Path, after: After) -> None:
    straight, crashes = train(None), 0
    recover: dict[str, Any] = {}
    while True:
        after(2, crash)  # the second update of every run is lost
        try:
            finished = train(tmp_path, checkpoint_every_steps=1, **recover)
            break
        except Crash:
            crashes += 1
            recover = {"recover_from": tmp_path / LATEST}
    assert crashes == EPOCHS * BATCHES - 1
    assert_same_run(finished, straight)


@pytest.mark.parametrize(("first", "second"), [("plain", "panels"), ("panels", "plain")])
def test_a_checkpoint_of_one_engine_goes_on_with_the_other(tmp_path: Path, first: str, second: str) -> None:
    train(tmp_path, engine=first, dtype="float64", total_epoch=2)
    resumed = train(tmp_path, engine=second, recover_from=tmp_path / LATEST)
    notice = rf"the checkpoint was written with engine {first}.*: the bits that follow will differ"
    assert any(re.fullmatch(notice, said) for said in resumed.notices)
    straight = train(None, engine=first, dtype="float64")
    assert largest_difference(numbers_of(resumed), numbers_of(straight)) < 1e-12


def numbers_of(result: TrainResult) -> dict[str, Array]:
    losses = np.array(result.history.mini_batch_loss)
    return {name: array for name, array in arrays_of(result).items() if name != "name"} | {"losses": losses}


def test_a_crash_leaves_the_caller_s_model_as_trained_so_far(after: After) -> None:
    case = Case(epochs=1, m=10)
    expected = run(case.engine(PlainEngine), case)
    engine = case.engine(PanelEngine)
    after(2, crash)
    with pytest.raises(Crash):
        train(None, model=engine.model, optimizer=engine.optimizer, **on(case))
    left = state(engine)
    assert largest_difference(left, {name: expected[name] for name in left} | {"epoch": left["epoch"]}) < 1e-12


# --- training: who looks at the weights, and who changes them -----------------------------------------------


class Look:
    """A callback that looks at the weights, and does nothing else."""

    def __init__(self) -> None:
        self.seen: list[Array] = []

    def on_epoch(self, state: TrainState) -> None:
        self.seen.append(np.array(state.model.save()["W0"]))


class Halve:
    """A callback that changes the weights and a moment behind the engine's back."""

    def on_epoch(self, state: TrainState) -> None:
        state.model.save()["W0"][...] *= 0.5
        state.optimizer.save()["m/W0"][...] *= -1.0


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_evaluating_saving_and_looking_change_nothing(tmp_path: Path, optimizer: str) -> None:
    seldom = train(None, optimizer=optimizer, print_interval=100)
    often = train(None, optimizer=optimizer, print_interval=1)
    look = Look()
    watched = train(
        tmp_path,
        optimizer=optimizer,
        print_interval=100,
        callbacks=[look],
        checkpoint_every=1,
        checkpoint_every_steps=2,
    )
    for other in (often, watched):
        assert_same_bits(arrays_of(other), arrays_of(seldom))
        assert other.history.mini_batch_loss == seldom.history.mini_batch_loss
    assert np.array_equal(look.seen[-1], seldom.model.save()["W0"])
    assert not np.array_equal(look.seen[0], look.seen[1])


def test_a_callback_that_changes_the_weights_is_respected() -> None:
    changed = [train(None, engine=engine, dtype="float64", callbacks=[Halve()]) for engine in ("panels", "plain")]
    assert largest_difference(*map(numbers_of, changed)) < 1e-12
    assert largest_difference(numbers_of(changed[0]), numbers_of(train(None, dtype="float64"))) > 1e-3


def test_early_stopping_puts_the_best_weights_back() -> None:
    results = [
        train(None, engine=engine, dtype="float64", **VARIANTS["early stopping"]) for engine in ("panels", "plain")
    ]
    assert results[0].history.eval_epoch == results[1].history.eval_epoch
    assert largest_difference(*map(numbers_of, results)) < 1e-12


# --- numbers that are not finite ----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_learning_rate_that_explodes_ends_as_with_the_plain_engine(optimizer: str) -> None:
    told = []
    for engine in ("panels", "plain"):
        explodes = schedules.get_table_func({1: 1e36})
        with pytest.raises(TrainingDiverged) as caught:
            train(None, engine, optimizer=optimizer, lr_scheduler=explodes, print_interval=100)
        told.append(re.sub(r"is (nan|inf)", "is not finite", str(caught.value)))
    assert told[0] == told[1]
    assert told[0].startswith("the loss is not finite at epoch 1, step 1 ")


def test_a_nan_among_the_weights_ends_training() -> None:
    class Spoil:
        def on_epoch(self, state: TrainState) -> None:
            state.model.save()["W0"][0, 1070] = np.nan

    for engine in ("panels", "plain"):
        with pytest.raises(TrainingDiverged, match="the loss is nan at epoch 1, step 0"):
            train(None, engine, callbacks=[Spoil()])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_nan_in_the_data_reaches_the_same_numbers(optimizer: str) -> None:
    case = Case(dtype="float32", samples="float32", optimizer=optimizer)
    results = []
    for kind in (PlainEngine, PanelEngine):
        engine = case.engine(kind)
        engine.samples[4, 2000] = np.nan
        results.append(run(engine, case))
    for name, array in results[0].items():
        assert np.array_equal(np.isnan(array), np.isnan(results[1][name])), name
    assert np.isnan(results[0]["losses"]).any()
    assert not np.isnan(results[0]["losses"]).all()


@pytest.mark.parametrize(("optimizer", "moment"), [("adam", "v"), ("rmsprop", "s")])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_where_a_second_moment_is_infinite_the_weights_stay(optimizer: str, moment: str, dtype: str) -> None:
    for kind in (PlainEngine, PanelEngine):
        case = Case(dtype=dtype, optimizer=optimizer)
        engine = case.engine(kind)
        before = state(engine)["W0"]
        engine.optimizer.save()[f"{moment}/W0"][:, :1500] = np.inf
        after = run(engine, case)
        assert np.array_equal(after["W0"][:, :1500], before[:, :1500])
        assert not np.array_equal(after["W0"][:, 1500:], before[:, 1500:])
        assert np.isinf(after[f"{moment}/W0"][:, :1500]).all()


@pytest.mark.skipif(not FLUSHES, reason="only x86 processors are told to take subnormal numbers for 0")
@pytest.mark.parametrize("optimizer", ["momentum", "rmsprop", "adam"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_moments_of_dead_units_never_stay_subnormal(optimizer: str, dtype: str) -> None:
    case = Case(dtype=dtype, optimizer=optimizer, activation="relu", epochs=20, n_x=300)
    engine = case.engine(PanelEngine)
    engine.model.save()["b0"][...] = -1e6  # no unit of the first layer is ever alive
    smallest = float(np.finfo(dtype).smallest_normal)
    names = [f"{name}/W0" for name in engine.optimizer.moment_names]
    for name in names:
        # One step from the smallest normal number; 60 steps from it; nowhere near it.
        engine.optimizer.save()[name][:, ::3] = smallest * 1.0001
        engine.optimizer.save()[name][:, 1::3] = smallest * 0.9**-30
        engine.optimizer.save()[name][:, 2::3] = 1.0
    arrays = run(engine, case)
    for name in names:
        sizes = np.abs(arrays[name])
        assert not np.count_nonzero((sizes > 0) & (sizes < smallest)), name
        assert not sizes[:, ::3].any()
        assert (sizes[:, 2::3] > 1e-3).all()


def test_the_processor_is_left_as_it_was_found() -> None:
    tiny = np.full(64, 1e-40, dtype=np.float32)
    run(WIDE.engine(PanelEngine), replace(WIDE, epochs=1))
    assert (tiny * np.float32(0.5) > 0).all()


# --- which engine runs --------------------------------------------------------------------------------------


class OwnNetwork(DeepNetwork):
    pass


class OwnAdam(Adam):
    pass


def setting(**changes: Any) -> dict[str, Any]:
    """Arguments of `choose_engine` with which the panel engine can run, but for the changes."""
    case = Case(dtype="float32", n_x=70)
    samples, targets = case.data()
    model = changes.get("model") or DeepNetwork([70, 3, 1], ["relu", "sigmoid"])
    arguments = {
        "model": model,
        "optimizer": Adam(model.save(), 1e-3),
        "samples": samples,
        "targets": targets,
        "backend": NumpyBackend(),
        "settings": Settings(5),
    }
    return arguments | {k: v(model) if callable(v) else v for k, v in changes.items()}


# Other than numba's absence and another backend, which need preparations.
OBSTACLES: dict[str, Callable[[], dict[str, Any]]] = {
    "the panel engine knows DeepNetwork, not OwnNetwork": lambda: setting(
        model=OwnNetwork([70, 3, 1], ["relu", "sigmoid"])
    ),
    "the panel engine does not know the rule of OwnAdam": lambda: setting(
        optimizer=lambda model: OwnAdam(model.save(), 1e-3)
    ),
    "the optimizer holds the parameters in a dict of its own, the panel engine needs model.save()": lambda: setting(
        optimizer=lambda model: Adam(dict(model.save()), 1e-3)
    ),
    "clip_norm needs the whole gradient, which the panel engine never forms": lambda: setting(
        optimizer=lambda model: Adam(model.save(), 1e-3, clip_norm=1.0)
    ),
    "accumulate needs the whole gradient, which the panel engine never forms": lambda: setting(
        settings=Settings(5, accumulate=2)
    ),
    "eps is below 1e-30": lambda: setting(optimizer=lambda model: Adam(model.save(), 1e-3, eps=1e-31)),
    "the set is float32, the network float64": lambda: setting(
        model=DeepNetwork([70, 3, 1], ["relu", "sigmoid"], dtype="float64"), samples=np.zeros((13, 70), np.float32)
    ),
    "the set's samples do not lie one after the other in memory": lambda: setting(
        samples=np.zeros((70, 13), np.float32).T
    ),
}


def assert_refused(arguments: dict[str, Any], obstacle: str) -> None:
    """ "panels" is refused with the reason in one line, "auto" takes the plain engine and gives the same reason."""
    with pytest.raises(ValueError, match=re.escape(f'engine "panels" cannot run this: {obstacle}')) as caught:
        choose_engine("panels", **arguments)
    assert "\n" not in str(caught.value)
    chosen, why = choose_engine("auto", **arguments)
    assert (type(chosen), why) == (PlainEngine, obstacle)


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_the_panel_engine_cannot_run_goes_to_the_plain_one_with_the_reason(obstacle: str) -> None:
    assert_refused(OBSTACLES[obstacle](), obstacle)


def test_another_device_goes_to_the_plain_engine(strict_backend: Backend) -> None:
    samples, targets = (strict_backend.asarray(x) for x in Case(dtype="float32", n_x=70).data())
    model = DeepNetwork([70, 3, 1], ["relu", "sigmoid"], device=strict_backend)
    arguments = setting(model=model, samples=samples, targets=targets, backend=strict_backend)
    assert_refused(arguments, f"the panel engine of this version runs on a CPU, not on {strict_backend.device}")


def brief() -> dict[str, Any]:
    """Arguments of one short epoch that says what runs."""
    return {"total_epoch": 1, "hidden": (6, 4), "save_dir": None, "device": "cpu"} | on(Case())


def first_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.splitlines()[0]


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "numba" else find(name, *rest))


@pytest.mark.usefixtures("without_numba")
def test_without_numba_the_first_line_says_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    told = 'pip install "catopt-xp[fast]" brings a faster one'
    assert_refused(setting(), told)
    result = catopt_xp.train(engine="auto", **brief())
    assert (result.engine, result.engine_reason) == ("plain", told)
    assert f"engine plain ({told})" in first_line(capsys)


def test_the_first_line_names_the_engine_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    train(None, total_epoch=1, verbose=True)
    assert "engine panels (as asked)" in first_line(capsys)
    train(None, engine="plain", total_epoch=1, verbose=True)
    assert "engine plain (as asked)" in first_line(capsys)
    result = catopt_xp.train(engine="auto", optimizer_options={"clip_norm": 1.0}, **brief())
    assert result.engine == "plain"
    assert "engine plain (clip_norm needs the whole gradient" in first_line(capsys)


# --- the check of a process ---------------------------------------------------------------------------------


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No earlier check is remembered, and none made here is kept."""
    cpu._check.cache_clear()
    yield
    cpu._check.cache_clear()


def altered(change: Callable[..., tuple[Any, ...]]) -> Callable[..., None]:
    """`PanelEngine._pass` with other arguments."""
    right = PanelEngine._pass
    return lambda self, *arguments: right(self, *change(*arguments))


FAULTS: dict[str, tuple[str, Any]] = {
    "a gradient twice too large": (
        "catopt_xp.engines.cpu.PanelEngine._pass",
        altered(lambda rows, dZ, numbers, following: (rows, dZ * 2, numbers, following)),
    ),
    "a rate off by a ten-thousandth": (
        "catopt_xp.engines.cpu.PanelEngine._pass",
        altered(
            lambda rows, dZ, numbers, after: (rows, dZ, numbers | {"rate": numbers.get("rate", 1) * 1.0001}, after)
        ),
    ),
    "one sample left out": (
        "catopt_xp.engines.cpu.PanelEngine._pass",
        altered(lambda rows, dZ, numbers, following: (rows[1:], dZ[:, 1:], numbers, following)),
    ),
    "panels left out of the product": ("catopt_xp.engines.cpu.tree_sum", lambda blocks: blocks[0]),
    "pixels of another scale": ("catopt_xp.engines.cpu.pixel_scale", lambda dtype: 1 / 256),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_that_differs_is_not_used(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    differs = r"the panel engine failed its check: \S.* differs by \S+ of its size, Adam, float32"
    with pytest.warns(RuntimeWarning, match=rf"^{differs}; the plain engine runs instead, slower$"):
        engine, why = choose_engine("panels", **setting())
    assert type(engine) is PlainEngine
    assert re.fullmatch(differs, why)


@pytest.mark.usefixtures("unchecked")
def test_training_goes_on_with_the_plain_engine_where_the_check_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(*FAULTS["panels left out of the product"])
    with pytest.warns(RuntimeWarning, match=r"Z0 of the next batch|W0"):
        result = catopt_xp.train(engine="auto", **brief())
    assert result.engine == "plain"
    assert "engine plain (the panel engine failed its check" in first_line(capsys)


@pytest.mark.usefixtures("unchecked")
def test_the_check_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_engine("auto", **setting())[1] == "the fastest that can run this"
    monkeypatch.setattr(*FAULTS["a gradient twice too large"])
    assert choose_engine("panels", **setting())[1] == "as asked"


# --- other processes: what is kept on disk, other processors ------------------------------------------------

# Trains a little, with the best engine there is.
PROGRAM = """
import numpy as np
from catopt_xp import train
rng = np.random.default_rng(0)
X, Y = rng.integers(0, 256, (20, 1100), dtype=np.uint8).T, rng.integers(0, 2, (1, 20))
result = train(X=X, Y=Y, total_epoch=1, device="cpu", save_dir=None, verbose=False)
print(result.engine, result.engine_reason, result.history.train_loss[0], sep="; ")
"""
TRAINED = "panels; the fastest that can run this; "


def python(program: str, **environment: str) -> str:
    """What a Python program prints in a process of its own."""
    here = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, env=here | environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the compiled code of a first process, and what that one printed."""
    folder = tmp_path_factory.mktemp("kept")
    return folder, python(PROGRAM, NUMBA_CACHE_DIR=str(folder))


def test_compiled_code_is_kept_for_the_next_process(kept: tuple[Path, str]) -> None:
    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*.nb?")}

    folder, first = kept
    before = files()
    assert first.startswith(TRAINED)
    assert {path.suffix for path in before} == {".nbi", ".nbc"}
    assert python(PROGRAM, NUMBA_CACHE_DIR=str(folder)) == first
    assert files() == before  # nothing was compiled anew


def test_without_a_folder_for_compiled_code_training_works() -> None:
    """A folder below a file can be made by nobody, root included; no other place is offered."""
    nowhere = {"NUMBA_CACHE_DIR": os.devnull + "/folder", "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    assert python(PROGRAM, **nowhere).startswith(TRAINED)


@pytest.mark.skipif(sys.platform == "win32", reason="limits on the size of files are POSIX")
def test_with_a_disk_too_full_for_compiled_code_training_works(tmp_path: Path) -> None:
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
    assert re.match("panels; |plain; ", python(full + PROGRAM, NUMBA_CACHE_DIR=str(tmp_path)))


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_with_compiled_code_that_is_damaged_training_works(tmp_path: Path, kept: tuple[Path, str], suffix: str) -> None:
    """As after a power cut: the name is there, the bytes are not."""
    shutil.copytree(kept[0], tmp_path, dirs_exist_ok=True)
    damaged = list(tmp_path.rglob(f"*.{suffix}"))
    assert damaged
    for file in damaged:
        file.write_bytes(b"")
    assert re.match("panels; |plain; ", python(PROGRAM, NUMBA_CACHE_DIR=str(tmp_path)))


def test_a_numba_that_cannot_be_imported_leaves_the_plain_engine(tmp_path: Path) -> None:
    """As one is that is older than NumPy allows: installed, and of no use."""
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text('raise ImportError("Numba needs NumPy 2.2 or less. Got 9.9.")')
    first = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    assert re.match("plain; .*Numba needs NumPy 2.2 or less", python(first + PROGRAM))


# Checks the engine with the vectors of another processor, and says how long they are.
CHECK = """
from catopt_xp.engines import cpu, lanes
from catopt_xp.network import DeepNetwork
from catopt_xp.optim import Adam, Momentum
print(lanes.VECTOR_BYTES)
for kind, samples, dtype, options in (
    (Adam, "uint8", "float32", {}),
    (Momentum, "float32", "float32", {"nesterov": True}),
    (Adam, "uint8", "float64", {"l2": 0.1, "eps_mode": "inside"}),
):
    model = DeepNetwork([4, 3, 1], ["relu", "sigmoid"], dtype=dtype)
    print(cpu.self_check(kind(model.save(), 1e-3, **options), np.zeros((1, 1), samples), dtype))
"""


@functools.cache
def flags() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.is_file() else ""


@pytest.mark.skipif(not X86, reason="the vectors of other x86 processors can be tried on one of them only")
@pytest.mark.parametrize(
    ("name", "features", "vector_bytes"),
    [("haswell", "+sse2,+avx,+avx2,+fma", 32), ("x86-64", "+sse,+sse2", 16)],
)
def test_the_vectors_of_other_processors_compute_the_same(
    tmp_path: Path, name: str, features: str, vector_bytes: int
) -> None:
    if "avx2" in features and "avx2" not in flags():
        pytest.skip("this processor has no AVX2")
    printed = python(CHECK, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features, NUMBA_CACHE_DIR=str(tmp_path))
    assert printed.split() == [str(vector_bytes), *["None"] * 3]


# --- the rules, value by value ------------------------------------------------------------------------------


def _update(p: Any, moments: Any, g: Any, numbers: Any, decay: Any) -> None:
    before = flush_subnormals()  # as the engine runs it
    update(p, moments, 0, g, 0, p.size, numbers, decay)
    restore(before)


compiled_update = njit(_update, error_model="numpy")

ORDINARY = [0.0, 1e-25, 1e-17, 1e-8, 1e-3, 1.0, 7.5, 1e4, 1e18]


Decay = tuple[float, float] | tuple[()]


def both_rules(
    name: str, dtype: str, decay: Decay, arrays: list[Array], **more: Any
) -> tuple[list[Array], list[Array]]:
    """(p, *moments) after one update by `update` and by the class's `rule`; `arrays` are (p, g, *moments)."""
    optimizer, options = OPTIONS[name][0], OPTIONS[name][1] | more
    kind = OPTIMIZERS[optimizer][0]
    made: BaseOptimizer = kind({"W0": np.zeros((1, 1), dtype)}, 1e-3, **options)
    made.steps = 3
    numbers = made.scalars()
    rows: list[list[Array]] = []
    for kernel in (True, False):
        p, g, *moments = (np.resize(x, -(-x.size // panels.STRIP) * panels.STRIP).astype(dtype) for x in arrays)
        if kernel:
            compiled_update(p, tuple(moments), g, cpu.NUMBERS[kind](**numbers), decay)
        else:
            with np.errstate(all="ignore"):
                if decay:
                    g = g + decay[0] * p
                    p *= decay[1]
                kind.rule(np, p, g, *moments, **numbers)
        rows.append([x[: arrays[0].size] for x in (p, *moments)])
    return rows[0], rows[1]


def value_table(name: str, dtype: str, values: list[float]) -> list[Array]:
    """(p, g, *moments): all combinations of values for g and the moments, and as many random ones; second moments >= 0.

    In each combination all have one sign: a rule's own sum may not cancel, which would leave its rounding alone.
    """
    moment_names = OPTIMIZERS[OPTIONS[name][0]][0].moment_names
    rng = np.random.default_rng(0)
    combined = np.array(list(itertools.product(values, repeat=1 + len(moment_names)))).T
    drawn = 10.0 ** rng.uniform(-12, 12, combined.shape)
    g, *moments = np.hstack([combined, drawn])
    sign = rng.choice([-1.0, 1.0], g.size)
    p = sign * 10.0 ** rng.uniform(-6, 3, g.size)
    second = OPTIONS[name][0] in ("rmsprop", "adam")
    if second:  # squares of what is in the table, as far as they are normal numbers
        moments[-1] = np.where(moments[-1] < 1e-17, 0.0, np.minimum(moments[-1], 1e17) ** 2)
    signed = [sign * x for x in moments[: len(moments) - second]]
    return [x.astype(dtype) for x in (p, sign * g, *signed, *moments[len(signed) :])]


DECAYS: list[Decay] = [(), (0.01, 1 - 1e-4)]


def assert_same_values(name: str, dtype: str, values: list[float], **more: Any) -> None:
    """To a few units in the last place of the larger of old and new value."""
    arrays = value_table(name, dtype, values)
    few, smallest = 8 * float(np.finfo(dtype).eps), float(np.finfo(dtype).smallest_normal)
    for decay in DECAYS:
        ours, theirs = both_rules(name, dtype, decay, arrays, **more)
        for here, there, before in zip(ours, theirs, [arrays[0], *arrays[2:]], strict=True):
            assert np.isfinite(there).all()
            scale = np.maximum(np.abs(there), np.abs(before)).astype(np.float64)
            off = np.abs(here.astype(np.float64) - there) - few * scale
            worst = int(np.argmax(off))
            assert off[worst] <= smallest, ([float(x[worst]) for x in arrays], here[worst], there[worst])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_kernel_computes_its_rule_value_by_value(name: str, dtype: str) -> None:
    assert_same_values(name, dtype, ORDINARY)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [name for name, (optimizer, _) in OPTIONS.items() if optimizer in ("rmsprop", "adam")])
def test_the_least_eps_that_the_engine_takes_is_as_good_as_any(name: str, dtype: str) -> None:
    assert_same_values(name, dtype, ORDINARY[:-1], eps=LEAST_EPS)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("values", [[0.0, 1.0, 1e4, np.nan], [0.0, 1.0, 1e25, 1e200, np.inf]], ids=["nan", "overflow"])
def test_a_kernel_has_its_rule_s_numbers_that_are_not_finite(values: list[float], name: str, dtype: str) -> None:
    with np.errstate(over="ignore"):  # float32 has no 1e200: infinity is meant there
        arrays = value_table(name, dtype, values)
    for decay in DECAYS:
        ours, theirs = both_rules(name, dtype, decay, arrays)
        for here, there in zip(ours, theirs, strict=True):
            for kind in (np.isnan, np.isposinf, np.isneginf):
                differ = np.flatnonzero(kind(here) != kind(there))
                assert not differ.size, [[float(x[i]) for x in arrays] + [here[i], there[i]] for i in differ[:3]]
            finite = np.isfinite(there)
            assert np.allclose(here[finite], there[finite], rtol=1e-5, atol=0)


def test_every_optimizer_has_a_kernel_here() -> None:
    assert set(cpu.NUMBERS) == {kind for kind, _ in OPTIMIZERS.values()}
    assert {optimizer for optimizer, _ in OPTIONS.values()} == set(OPTIMIZERS)
    for kind, numbers in cpu.NUMBERS.items():
        optimizer = kind({"W0": np.zeros((1, 1))}, 1e-3)
        assert list(optimizer.advance()) == list(numbers._fields)
