"""The panel engine against the plain one, which is the definition: equal numbers, whatever the run."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from marks import some
from panel_runs import (
    BATCHES,
    EPOCHS,
    OPTIONS,
    RATES,
    Array,
    Case,
    assert_same_bits,
    assert_same_numbers,
    differences,
    is_alive,
    numbers_of,
    run,
    state,
    train,
)

from catopt_xp.data.order import epoch_order
from catopt_xp.engines import choose, panels
from catopt_xp.engines.cpu import engine as cpu
from catopt_xp.engines.cpu.engine import PanelEngine
from catopt_xp.engines.plain import PlainEngine
from catopt_xp.optim import schedules
from catopt_xp.optim.rules import OPTIMIZERS
from catopt_xp.training.callbacks import TrainState
from catopt_xp.training.loop import Interrupted, TrainingDiverged
from catopt_xp.training.train import TrainResult

# --- both engines by hand -----------------------------------------------------------------------------------

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


@settings(max_examples=8)  # numba compiles each kind of case, which takes most of the time
@given(cases())
def test_in_float64_both_engines_have_the_same_numbers(case: Case) -> None:
    assume(is_alive(case.engine(PlainEngine)))
    assert_same_numbers(run(case.engine(PanelEngine), case), run(case.engine(PlainEngine), case))


EACH = [(optimizer, samples) for optimizer in OPTIMIZERS for samples in ("uint8", "float64")]


@pytest.mark.parametrize(
    ("optimizer", "samples"), some(EACH, [("gd", "uint8"), ("adam", "float64")], pytest.mark.hardening)
)
def test_batches_longer_than_a_block_of_samples_have_the_same_numbers(optimizer: str, samples: str) -> None:
    case = Case(m=150, batch_size=cpu.SAMPLES + 5, samples=samples, optimizer=optimizer, units=(9, 3))
    assert_same_numbers(run(case.engine(PanelEngine), case), run(case.engine(PlainEngine), case))


def test_a_set_that_may_only_be_read_has_the_same_numbers(tmp_path: Path) -> None:
    case = Case()
    engine = case.engine(PanelEngine)
    np.save(tmp_path / "samples.npy", engine.samples)
    engine.samples = np.load(tmp_path / "samples.npy", mmap_mode="r")
    assert_same_numbers(run(engine, case), run(case.engine(PlainEngine), case))


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
    assert_same_numbers(*results)


def distance(here: dict[str, Array], there: dict[str, Array], names: list[str]) -> float:
    return float(np.sqrt(sum(np.square(here[name].astype(np.float64) - there[name]).sum() for name in names)))


IN_FLOAT32 = [(optimizer, samples) for optimizer in OPTIMIZERS for samples in ("uint8", "float32")]
ALWAYS = [("gd", "uint8"), ("momentum", "float32"), ("rmsprop", "uint8"), ("adam", "uint8"), ("adam", "float32")]


@pytest.mark.parametrize(("optimizer", "samples"), some(IN_FLOAT32, ALWAYS, pytest.mark.hardening))
def test_in_float32_the_error_is_at_most_twice_the_plain_engine_s(optimizer: str, samples: str) -> None:
    for seed in range(4):
        case = Case(dtype="float32", samples=samples, m=40, batch_size=16, optimizer=optimizer, seed=seed)
        double = replace(case, dtype="float64", samples="uint8" if samples == "uint8" else "float64")
        exact = double.engine(PlainEngine)
        exact.model.load(case.engine(PlainEngine).model.save())  # float64 draws other initial weights
        truth = run(exact, double)
        plain, ours = (run(case.engine(kind), case) for kind in (PlainEngine, PanelEngine))
        assert {array.dtype.name for name, array in ours.items() if array.ndim} == {"float32"}
        parameters = list(exact.model.save())
        for names in (parameters, *([name] for name in truth if name not in ("steps", "epoch"))):
            largest = max(float(np.abs(truth[name]).max()) for name in names)
            few_units = 4 * np.finfo(np.float32).eps * largest
            assert distance(ours, truth, names) <= 2 * distance(plain, truth, names) + few_units, (seed, names)


# --- the same bits on any number of threads -----------------------------------------------------------------

WIDE = Case(n_x=20_037, units=(19, 4), dtype="float32", m=40, batch_size=16, epochs=2)


def run_on(workers: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> dict[str, Array]:
    """The run with so many workers in every pass, which all begin before one of them takes a task."""
    engine, everyone, seen = case.engine(PanelEngine), threading.Barrier(workers, timeout=60), set()
    compiled = engine._run_panels

    def together(*arguments: Any) -> None:
        everyone.wait()
        seen.add(threading.get_ident())
        compiled(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("catopt_xp.backend.threads.thread_count", lambda: workers)
        patch.setattr(cpu, "LEAST_WORK", 1)
        patch.setattr(engine, "_run_panels", together)
        arrays = run(engine, case)
    assert len(seen) >= workers
    return arrays


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_any_number_of_threads_gives_the_same_bits(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_bits(run_on(workers, WIDE, monkeypatch), run_on(1, WIDE, monkeypatch))


@pytest.mark.parametrize("length", [2, 4, 8])
def test_tasks_of_any_length_give_the_same_bits(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = run(WIDE.engine(PanelEngine), WIDE)
    monkeypatch.setattr(panels.Split, "task_length", lambda self, numbers, most: length)
    assert_same_bits(run_on(2, WIDE, monkeypatch), straight)


def test_a_fault_in_a_worker_is_raised_and_leaves_the_weights_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = WIDE.engine(PanelEngine)
    compiled = engine._run_panels
    before = state(engine)["W0"]

    def fail_elsewhere(*arguments: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("no room for a worker")
        compiled(*arguments)

    monkeypatch.setattr("catopt_xp.backend.threads.thread_count", lambda: 2)
    monkeypatch.setattr(engine, "_run_panels", fail_elsewhere)
    with pytest.raises(MemoryError, match="no room for a worker"):
        run(engine, WIDE)
    engine.settle()
    assert np.array_equal(state(engine)["W0"], before)  # the first pass only multiplies


# --- training: stop and resume ------------------------------------------------------------------------------

LATEST = "model_latest.npz"
EARLY_STOPPING: dict[str, Any] = {"early_stopping": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": name} for name in RATES},
    "dropout, schedule by step": {
        "dropout": 0.4,
        "lr_scheduler": schedules.get_hyperbola_func(0.5),
        "schedule_by": "step",
    },
    "float64, once, drop last": {"dtype": "float64", "shuffle": "once", "drop_last": True},
    "early stopping": EARLY_STOPPING,
}


def assert_same_run(here: TrainResult, there: TrainResult) -> None:
    assert type(here.optimizer) is type(there.optimizer)
    assert_same_bits(state(here), state(there))
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


NEVER = 0
After = Callable[[int, Callable[[], None]], None]


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> After:
    """`after(n, action)` calls `action` once the engine has made n updates, before anything is saved."""
    steps = PanelEngine.steps
    monkeypatch.setattr(choose, "self_check", lambda *arguments: None)  # its steps are not to be counted

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
    straight = train(**options)
    for updates in range(1, straight.optimizer.steps):
        folder = tmp_path / str(updates)
        after(updates, interrupt)
        with pytest.raises(Interrupted):
            train(folder, **options)
        after(NEVER, crash)
        assert_same_run(train(folder, recover_from=folder / LATEST, **options), straight)


def test_a_chain_of_crashes_at_every_step_ends_with_the_same_bits(tmp_path: Path, after: After) -> None:
    straight, crashes = train(), 0
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
    assert_same_numbers(numbers_of(resumed), numbers_of(train(engine=first, dtype="float64")))


def test_a_crash_leaves_the_caller_s_model_as_trained_so_far(after: After) -> None:
    case = Case(epochs=1, m=10)
    expected = run(case.engine(PlainEngine), case)
    engine = case.engine(PanelEngine)
    after(2, crash)
    with pytest.raises(Crash):
        train(model=engine.model, optimizer=engine.optimizer, **case.set_of_train())
    left = state(engine)
    # The epoch is not over: its count is not compared.
    assert_same_numbers(left, {name: expected[name] for name in left} | {"epoch": left["epoch"]})


# --- training: who looks at the weights, and who changes them -----------------------------------------------


@dataclass
class Callback:
    """Calls a function after each epoch."""

    on_epoch: Callable[[TrainState], None]


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_evaluating_saving_and_looking_change_nothing(tmp_path: Path, optimizer: str) -> None:
    seldom = train(optimizer=optimizer, print_interval=100)
    often = train(optimizer=optimizer, print_interval=1)
    seen: list[Array] = []
    watched = train(
        tmp_path,
        optimizer=optimizer,
        print_interval=100,
        callbacks=[Callback(lambda state: seen.append(np.array(state.model.save()["W0"])))],
        checkpoint_every=1,
        checkpoint_every_steps=2,
    )
    for other in (often, watched):
        assert_same_bits(numbers_of(other), numbers_of(seldom))
    assert np.array_equal(seen[-1], seldom.model.save()["W0"])
    assert not np.array_equal(seen[0], seen[1])


def test_a_callback_that_changes_the_weights_is_respected() -> None:
    def change(state: TrainState) -> None:
        state.model.save()["W0"][...] *= 0.5
        state.optimizer.save()["m/W0"][...] *= -1.0

    ours, theirs = (
        numbers_of(train(engine=engine, dtype="float64", callbacks=[Callback(change)]))
        for engine in ("panels", "plain")
    )
    assert_same_numbers(ours, theirs)
    assert max(differences(ours, numbers_of(train(dtype="float64"))).values()) > 1e-3


def test_early_stopping_puts_the_best_weights_back() -> None:
    ours, theirs = (train(engine=engine, dtype="float64", **EARLY_STOPPING) for engine in ("panels", "plain"))
    assert ours.history.eval_epoch == theirs.history.eval_epoch
    assert_same_numbers(numbers_of(ours), numbers_of(theirs))


# --- numbers that are not finite ----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_learning_rate_that_explodes_ends_as_with_the_plain_engine(optimizer: str) -> None:
    told = []
    for engine in ("panels", "plain"):
        explodes = schedules.get_table_func({1: 1e36})
        with pytest.raises(TrainingDiverged) as caught:
            train(engine=engine, optimizer=optimizer, lr_scheduler=explodes, print_interval=100)
        told.append(re.sub(r"is (nan|inf)", "is not finite", str(caught.value)))
    assert told[0] == told[1]
    assert told[0].startswith("the loss is not finite at epoch 1, step 1 ")


def test_a_nan_among_the_weights_ends_training() -> None:
    def spoil(state: TrainState) -> None:
        state.model.save()["W0"][0, 1070] = np.nan

    for engine in ("panels", "plain"):
        with pytest.raises(TrainingDiverged, match="the loss is nan at epoch 1, step 0"):
            train(engine=engine, callbacks=[Callback(spoil)])


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
