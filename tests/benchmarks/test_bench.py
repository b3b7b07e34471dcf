"""The benchmark: all contenders do the same work, the floor is a number, the table is whole, the command line runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

from catopt_xp.backend.machine import thread_count
from catopt_xp.bench import table
from catopt_xp.bench.agreement import STEPS, BenchError, check_agreement, small_workload
from catopt_xp.bench.base_contender import Contender, used_threads
from catopt_xp.bench.contenders import CONTENDERS, OurEngine, available, memory_needed
from catopt_xp.bench.floor import Floor, measure_floor
from catopt_xp.bench.floor import main as floor_main
from catopt_xp.bench.workload import Workload
from catopt_xp.commands.main import main
from catopt_xp.optim.rules import OPTIMIZERS
from catopt_xp.training.plots import plot_benchmark

THREADS = thread_count()
TINY = Workload(n_x=40, m=20, batch_size=8)


# The workload.


def test_a_workload_is_a_function_of_its_numbers() -> None:
    work = Workload(n_x=1000, m=60, batch_size=16)
    pixels = work.pixels()
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert work.pixels() is pixels  # one set, whatever the batch size
    assert dataclasses.replace(work, batch_size=8).pixels() is pixels
    np.testing.assert_allclose(work.floats(), pixels / 255, rtol=1e-6)
    assert work.floats().dtype == np.float32
    assert (work.columns().shape, work.columns().dtype) == ((1000, 60), np.float64)
    np.testing.assert_array_equal(work.columns(), pixels.T / 255)
    assert sorted(set(work.targets()[0])) == [0.0, 1.0]
    assert work.targets().sum() == 30
    assert not np.array_equal(dataclasses.replace(work, seed=1).pixels(), pixels)


def test_initial_weights_are_the_same_numbers_in_every_type() -> None:
    single, double = TINY.weights(), dataclasses.replace(TINY, dtype="float64").weights()
    assert list(single) == ["W0", "W1", "W2", "W3", "b0", "b1", "b2", "b3"]
    for name, values in single.items():
        assert (values.dtype, double[name].dtype) == (np.float32, np.float64)
        np.testing.assert_array_equal(values, double[name])


def test_row_batches_go_through_the_orders_of_epoch_after_epoch() -> None:
    rows = list(itertools.islice(TINY.row_batches(), 2 * TINY.batches))
    assert [len(part) for part in rows] == [8, 8, 4, 8, 8, 4]
    np.testing.assert_array_equal(np.concatenate(rows[:3]), TINY.order(0))
    np.testing.assert_array_equal(np.concatenate(rows[3:]), TINY.order(1))


def test_the_signal_can_be_learnt() -> None:
    work = small_workload()
    engine = OurEngine("plain", work, THREADS)
    engine.steps(60 * work.batches)
    losses = engine.losses()
    assert losses[-work.batches :].mean() < 0.7 * losses[: work.batches].mean()


@pytest.mark.parametrize(
    "wrong", [{"optimizer": "nadam"}, {"n_x": 0}, {"m": 0}, {"batch_size": 0}, {"hidden": ()}, {"hidden": (3, 0)}]
)
def test_a_workload_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"unknown optimizer|at least 1"):
        Workload(**wrong)


# The contenders.


def make(name: str, work: Workload) -> Contender:
    why = available(name, work)
    if why is not None:
        pytest.skip(f"{name}: {why}")
    return CONTENDERS[name](work, THREADS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_agrees_with_the_plain_engine(name: str, optimizer: str) -> None:
    work = small_workload(optimizer)
    if (why := available(name, work)) is not None:
        pytest.skip(f"{name}: {why}")
    assert check_agreement([name], THREADS, work)[name] < 5e-4


@pytest.mark.parametrize("name", CONTENDERS)
def test_steps_go_on_where_they_ended(name: str) -> None:
    at_once, in_parts = make(name, TINY), make(name, TINY)
    at_once.steps(8)
    for count in (1, 3, 0, 4):  # an epoch has 3
        in_parts.steps(count)
    np.testing.assert_allclose(in_parts.losses(), at_once.losses(), rtol=1e-5)
    assert len(at_once.losses()) == 8
    assert all(isinstance(version, str) for version in at_once.versions().values())
    assert at_once.name == name


def test_an_unknown_contender_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown contender 'abacus'; choose panels, plain"):
        available("abacus")


def test_what_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else object())
    assert available("torch") == "torch is not installed (pip install torch)"
    assert available("sklearn", Workload(optimizer="rmsprop")) == "scikit-learn has no RMSProp"
    assert available("torch-fused", Workload(optimizer="rmsprop")) is not None
    monkeypatch.setattr("catopt_xp.bench.contenders.host_free_memory", lambda: 10**9)
    assert available("chapter", Workload()) == "it needs 3.0 GB of memory, 1.0 GB are free"
    assert available("plain", Workload()) is None
    assert memory_needed("torch", Workload(batch_size=2000)) > memory_needed("torch", Workload())


def test_threads_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in ("3", None):
        if before is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", before)
        outside = thread_count()
        with used_threads(1, ThreadpoolController()):
            assert thread_count() == 1
        assert thread_count() == outside


# Agreement.


class Wrong(OurEngine):
    """The plain engine with another learning rate."""

    def __init__(self, workload: Workload, threads: int) -> None:
        super().__init__("plain", dataclasses.replace(workload, learning_rate=1.1 * workload.rate), threads)


class Lazy(OurEngine):
    """The plain engine, leaving out every other step."""

    def __init__(self, workload: Workload, threads: int) -> None:
        super().__init__("plain", workload, threads)

    def steps(self, count: int) -> None:
        super().steps(count // 2)


@pytest.mark.parametrize(
    ("contender", "message"),
    [(Wrong, "odd does not compute the same: a loss differs by"), (Lazy, f"odd made 5 steps of {STEPS}")],
)
def test_a_contender_that_does_other_work_is_named(
    contender: Callable[[Workload, int], Contender], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONTENDERS, "odd", contender)
    with pytest.raises(BenchError, match=message):
        check_agreement(["plain", "odd"], THREADS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_losses_that_are_compared_move(optimizer: str) -> None:
    work = small_workload(optimizer)
    moving, standing = (OurEngine("plain", w, THREADS) for w in (work, dataclasses.replace(work, learning_rate=1e-12)))
    for engine in (moving, standing):
        engine.steps(STEPS)
    assert np.all(np.abs(moving.losses() / standing.losses() - 1)[1:] > 0.05)
    assert moving.losses().max() < 2.0  # and do not jump: rounding would grow without bounds


# The floor.


def test_the_floor_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("catopt_xp.bench.floor.SIDE", 200)
    floor = measure_floor(THREADS)
    assert 1e8 < floor.bandwidth < 1e13
    assert 1e8 < floor.rate < 1e15
    assert "GB/s" in str(floor)
    now = measure_floor(THREADS, in_turn=True)
    assert 1e8 < now.bandwidth < 1e13
    assert 1e8 < now.rate < 1e15
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert measure_floor(1).traffic_by == "NumPy, in-place operations"


def test_floor_is_best_and_turn_is_median(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = itertools.cycle([5.0, 1.0, 3.0, 4.0, 2.0])
    monkeypatch.setattr("catopt_xp.bench.floor._seconds", lambda work: next(seconds))
    monkeypatch.setattr("catopt_xp.bench.floor.TURN_SWEEPS", 5)
    best, now = measure_floor(1), measure_floor(1, in_turn=True)
    assert best.bandwidth == pytest.approx(3 * now.bandwidth)


def test_the_floor_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("catopt_xp.bench.floor.measure_floor", lambda threads: Floor(50e9, 100e9, threads, "a", "b"))
    floor_main()
    lines = capsys.readouterr().out.splitlines()
    assert "state traffic 50.0 GB/s (a), float32 products 100 GFLOP/s (b)" in lines[0]
    assert len(lines) == 7


def test_of_two_floors_each_speed_is_the_better_one() -> None:
    one, other = Floor(2e9, 3e9, 1, "a", "b"), Floor(1e9, 4e9, 1, "c", "d")
    assert one.better(other) == other.better(one) == Floor(2e9, 4e9, 1, "a", "d")


def test_the_floor_of_an_epoch() -> None:
    floor = Floor(bandwidth=1e9, rate=2e9, threads=1, traffic_by="", product_by="")
    work = Workload(n_x=1000, hidden=(10, 5), m=100, batch_size=30)
    products = 4 * 1000 * 10 * 100 / 2e9
    for optimizer, arrays in (("gd", 1), ("momentum", 2), ("rmsprop", 2), ("adam", 3)):
        state = 4 * 8 * arrays * 1000 * 10 / 1e9
        assert floor.seconds(dataclasses.replace(work, optimizer=optimizer)) == pytest.approx(state + products)


# The table.


@pytest.fixture
def small_floor(monkeypatch: pytest.MonkeyPatch) -> Floor:
    floor = Floor(bandwidth=50e9, rate=100e9, threads=1, traffic_by="numba", product_by="one product")
    slower = dataclasses.replace(floor, bandwidth=floor.bandwidth / 2, rate=floor.rate / 2)
    monkeypatch.setattr(table, "measure_floor", lambda threads, in_turn=False: slower if in_turn else floor)
    return floor


def test_the_table_is_complete(small_floor: Floor, tmp_path: Path) -> None:
    said: list[str] = []
    plan = table.Plan(Workload(n_x=300, m=30), 1, (4, 8, 64), ("plain", "chapter"), rounds=2, seconds=1e-3)
    file = table.write_table(table.run_table(plan, said.append), tmp_path / "new")
    results = json.loads(file.read_text())
    assert set(results) == {
        *("format", "date", "code", "machine", "versions", "threads", "workload"),
        *("rounds", "agreement", "floor", "absent", "rows"),
    }
    assert results["machine"]["cpu"]
    assert results["machine"]["processors"] >= 1
    assert results["code"]["version"] == results["versions"]["catopt_xp"]
    assert results["floor"] == dataclasses.asdict(small_floor)
    assert [row["batch_size"] for row in results["rows"]] == [4, 8, 30]  # no batch is larger than the set
    assert [row["steps"] for row in results["rows"]] == [8, 4, 1]
    for row in results["rows"]:
        assert list(row["contenders"]) == ["plain", "chapter"]
        for timed in row["contenders"].values():
            assert len(timed["turns"]) == 2
            assert min(timed["turns"]) <= timed["seconds_per_epoch"] <= max(timed["turns"])
            assert 1 <= timed["steps_timed"] <= row["steps"]
            assert timed["of_floor"] == pytest.approx(timed["seconds_per_epoch"] / row["floor_seconds"])
            assert timed["of_floor_in_turns"] == pytest.approx(timed["of_floor"] / 2)
        assert row["floor_turns"] == [pytest.approx(2 * row["floor_seconds"])] * 2
        assert row["contenders"]["plain"]["ratio"] == 1.0
    assert sum(text.startswith("batch ") for text in said) == 3


def test_a_slow_contender_makes_some_steps_that_are_scaled(monkeypatch: pytest.MonkeyPatch, small_floor: Floor) -> None:
    monkeypatch.setattr(table, "seconds_of", lambda contender, count: float(count))
    plan = table.Plan(Workload(n_x=300, m=30), 1, (1,), ("plain",), rounds=1, seconds=4.5)
    said: list[str] = []
    row = table.run_table(plan, said.append)["rows"][0]
    assert row["contenders"]["plain"]["steps_timed"] == 4
    assert row["contenders"]["plain"]["seconds_per_epoch"] == 30.0
    assert "plain ~30.000 s" in said[-1]


def test_absent_contenders_are_said_and_left_out(monkeypatch: pytest.MonkeyPatch, small_floor: Floor) -> None:
    monkeypatch.setattr(table, "available", lambda name, work=None: "no such thing" if name == "torch" else None)
    said: list[str] = []
    plan = table.Plan(Workload(n_x=300, m=30), 1, (8,), ("torch", "plain"), rounds=1, seconds=1e-3)
    results = table.run_table(plan, said.append)
    assert results["absent"] == {"torch": "no such thing"}
    assert said[0] == "torch is left out: no such thing"
    assert list(results["rows"][0]["contenders"]) == ["plain"]
    with pytest.raises(BenchError, match="no contender is left"):
        table.run_table(dataclasses.replace(plan, contenders=("torch",)), said.append)


@pytest.mark.parametrize(("load", "said"), [(9.0, True), (0.1, False)])
def test_a_busy_machine_is_said(load: float, said: bool, monkeypatch: pytest.MonkeyPatch, small_floor: Floor) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(table, "cpu_count", lambda: 2)
    lines: list[str] = []
    results = table.run_table(table.Plan(TINY, 1, (8,), ("plain",), rounds=1, seconds=1e-3), lines.append)
    assert any("other programs are at work (load 9.0)" in text for text in lines) == said
    assert results["machine"]["load"] == load


def test_a_contender_without_memory_is_left_out_of_its_row(monkeypatch: pytest.MonkeyPatch, small_floor: Floor) -> None:
    def too_large(name: str, work: Workload | None = None) -> str | None:
        return "too large" if name == "chapter" and work is not None and work.batch_size == 16 else None

    monkeypatch.setattr(table, "available", too_large)
    plan = table.Plan(Workload(n_x=300, m=30), 1, (8, 16), ("plain", "chapter"), rounds=1, seconds=1e-3)
    rows = table.run_table(plan, lambda text: None)["rows"]
    assert [list(row["contenders"]) for row in rows] == [["plain", "chapter"], ["plain"]]
    assert rows[1]["absent"] == {"chapter": "too large"}


def test_a_set_larger_than_the_memory_is_refused() -> None:
    plan = table.Plan(Workload(n_x=10**9, m=10**6), 1, (8,), ("plain",))
    with pytest.raises(ValueError, match=r"the pixels of the benchmark need .* choose a smaller --n-x or --samples"):
        table.run_table(plan, lambda text: None)


@pytest.mark.parametrize("empty", [{"batch_sizes": ()}, {"contenders": ()}])
def test_a_plan_for_nothing_is_refused(empty: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least one batch size and one contender"):
        table.Plan(TINY, 1, **empty)


def test_a_figure_needs_rows() -> None:
    with pytest.raises(ValueError, match="there are no rows"):
        plot_benchmark({})


# The command line.


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], small_floor: Floor) -> None:
    words = "bench --quick --n-x 3000 --samples 64 --batch-sizes 8,64 --contenders plain,chapter --threads 1"
    assert main([*words.split(), "--save-dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "batch     8: floor" in out
    assert "chapter" in out
    results = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [row["batch_size"] for row in results["rows"]] == [8, 64]
    assert results["threads"] == 1
    assert (tmp_path / "out" / "bench.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--contenders plain,abacus", "unknown contender 'abacus'"),
        ("--batch-sizes 8,0", "argument --batch-sizes: '0' is not a whole number"),
        ("--threads 0", "argument --threads: '0' is not a whole number"),
    ],
)
def test_bad_usage_is_one_line(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["bench", *flags.split()])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_said_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["bench", "--save-dir", str(tmp_path / "file" / "below")]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.out == ""
