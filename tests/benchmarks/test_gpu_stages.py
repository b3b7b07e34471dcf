"""The GPU benchmark's stages without a GPU: rows of contenders, the table, the command."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.peers_gpu import row as gpu_row
from benchmarks.peers_gpu import stages as gpu_stages
from benchmarks.peers_gpu.contenders import GPU_CONTENDERS
from benchmarks.peers_gpu.deadline import Clock, Stage, run_command
from benchmarks.peers_gpu.row import Crew, Row
from benchmarks.peers_gpu.stages import GpuPlan, nvidia_smi, plan_stages
from benchmarks.peers_gpu.table import ms, report, rows_of, table
from benchmarks.peers_gpu.worker import OutOfTime
from catopt_xp.backend.machine import thread_count
from catopt_xp.commands.bench import BenchError, Workload, reference_losses, small_workload

SMALL = Workload(n_x=3000, m=96, learning_rate=1e-3)


# Rows of contenders, with a crew that answers from a gpu.


class ScriptedCrew:
    """Losses of the plain engine for all; `faults`: (contender, job) -> what happens instead, once for each entry."""

    device = "cpu"

    def __init__(self, work: Workload, faults: Mapping[tuple[str, str], Any] | None = None) -> None:
        self.faults = {key: list(value) for key, value in (faults or {}).items()}
        self.exact = reference_losses(work, thread_count(), "chapter", 12).tolist()
        self.workers: dict[str, Any] = {}
        self.asked: list[tuple[str, str]] = []
        self.seconds = {"panels": 0.01, "plain": 0.04, "torch-uint8": 0.02}
        self.dropped = 0

    def of(self, contender: str) -> Any:
        return self.family(GPU_CONTENDERS[contender].family)

    def family(self, name: str) -> Any:
        return self.workers.setdefault(name, SimpleNamespace(running=True, starts=1))

    def ask(self, family: str, job: str, limit: float, name: Any, *arguments: Any) -> Any:
        if job == "reference":
            name = arguments[1]
        self.asked.append((name, job))
        fault = self.faults.get((name, job), [])
        if fault and (happening := fault.pop(0)) is not None:
            if isinstance(happening, BenchError):
                worker = self.family(family)
                worker.running, worker.starts = True, worker.starts + 1  # ended, and made anew
                raise happening
            return happening
        if job in ("reference", "losses"):
            return self.exact
        return self.seconds[name] if job == "turn" else {"versions": {}}

    def drop(self, limit: float) -> None:
        self.dropped += 1


def timed_row(crew: ScriptedCrew, names: list[str], limit: float = 100.0) -> dict[str, Any]:
    data: dict[str, Any] = {}
    Row(crew, SMALL40, names, rounds=3, seconds=0.05).run(Clock(limit), data)  # type: ignore[arg-type]
    assert crew.dropped == 1
    return data


SMALL40 = small_workload()
NAMES = ["panels", "plain", "torch-uint8"]


def test_a_row_has_everyones_turns_and_ratios() -> None:
    data = timed_row(ScriptedCrew(SMALL40), NAMES)
    assert (data["batch_size"], data["steps"], data["rounds"]) == (40, 3, 3)
    found = data["contenders"]
    assert found["plain"]["turns"] == [0.04] * 3
    assert [found[name]["ratio"] for name in NAMES] == [1.0, 4.0, 2.0]
    assert [found[name]["epochs_timed"] for name in NAMES] == [5, 1, 2]
    assert all(found[name]["difference"] == 0 for name in NAMES)
    assert data["absent"] == {}


def test_one_that_computes_something_else_is_not_timed() -> None:
    crew = ScriptedCrew(SMALL40)
    crew.faults["plain", "losses"] = [(np.array(crew.exact) * 1.001).tolist()]
    data = timed_row(crew, NAMES)
    assert data["absent"] == {
        "plain": "plain does not compute the same: a loss differs by 1.0e-03 of its size, at most 0.0001 is allowed;"
        " mend it, or leave it out"
    }
    assert list(data["contenders"]) == ["panels", "torch-uint8"]


def test_one_that_rounds_on_purpose_may_differ_more() -> None:
    crew = ScriptedCrew(SMALL40)
    crew.seconds["jax-tf32"] = 0.01
    crew.faults["jax-tf32", "losses"] = [(np.array(crew.exact) * 1.001).tolist()]
    assert timed_row(crew, ["panels", "jax-tf32"])["contenders"]["jax-tf32"]["difference"] > 1e-4


def test_one_that_fails_while_others_are_timed_takes_none_with_it() -> None:
    crew = ScriptedCrew(SMALL40, {("panels", "turn"): [None, None, BenchError("illegal address")]})
    data = timed_row(crew, NAMES)
    assert data["absent"] == {"panels": "illegal address"}
    assert len(data["contenders"]["panels"]["turns"]) == 1
    assert len(data["contenders"]["plain"]["turns"]) == 3
    assert crew.asked.count(("plain", "make")) == 2  # it lay in the process that failed
    assert crew.asked.count(("torch-uint8", "make")) == 1


def test_one_that_cannot_be_made_is_absent_with_the_reason() -> None:
    crew = ScriptedCrew(SMALL40, {("torch-uint8", "make"): [OutOfTime("make was not done in 9 s")]})
    data = timed_row(crew, NAMES)
    assert data["absent"] == {"torch-uint8": "make was not done in 9 s"}
    assert data["contenders"]["plain"]["ratio"] == 4.0


def test_a_row_with_nobody_is_a_failure_that_says_why() -> None:
    crew = ScriptedCrew(SMALL40, {("panels", "make"): [BenchError("no kernel")]})
    with pytest.raises(BenchError, match="nobody was timed: panels: no kernel"):
        timed_row(crew, ["panels"])


def test_the_reference_may_come_from_the_cpu() -> None:
    crew = ScriptedCrew(SMALL40, {("cpu", "reference"): [BenchError("no memory")]})
    data = timed_row(crew, NAMES)
    assert data["reference_on_cpu"] == "no memory"
    assert crew.asked.count(("cpu", "reference")) == 2


def test_rounds_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    crew = ScriptedCrew(SMALL40)
    crew.seconds["plain"] = 80.0
    data = timed_row(crew, NAMES)
    assert data["rounds"] == 1  # a second one would take longer than is left
    monkeypatch.setattr(gpu_row, "TIMING_SHARE", 1.0)
    monkeypatch.setattr(gpu_row, "TURNS_SECONDS", 100.0)
    crew = ScriptedCrew(SMALL40)
    with pytest.raises(BenchError, match="panels: no time was left to make it"):
        timed_row(crew, NAMES)


# What the stages do.


def test_the_commit_may_be_said_where_git_does_not_tell() -> None:
    class Described(ScriptedCrew):
        def ask(self, family: str, job: str, limit: float, *arguments: Any) -> Any:
            return {"gpu": "Some GPU", "device": "cuda:0"}

    data: dict[str, Any] = {}
    plan_stages(GpuPlan(commit="abc"), Described(SMALL40))[0].work(Clock(9), data)  # type: ignore[arg-type]
    assert (data["code"]["commit"], data["gpu"], data["host"]["python"] != "") == ("abc", "Some GPU", True)
    assert "nvidia-smi" in data


def test_a_plan_has_a_stage_for_each_batch_size() -> None:
    with Crew() as crew:
        names = [stage.name for stage in plan_stages(GpuPlan(batch_sizes=(8, 64), explore=True), crew)]
        fewer = [stage.name for stage in plan_stages(GpuPlan(batch_sizes=(8,), tests=False, compiled=False), crew)]
    assert names[:4] == ["machine", "tests", "ceilings", "agreement"]
    assert {"batch 8", "batch 64", "compiled 8", "compiled 64", "explored 64", "memcheck"} <= set(names)
    assert fewer == ["machine", "ceilings", "agreement", "batch 8", "kernels", "start-up", "train"]
    assert len(set(names)) == len(names)


def test_the_gpu_tests_are_run_and_their_last_line_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def command(words: Any, limit: float, folder: Path, environment: Mapping[str, str]) -> tuple[int, str]:
        asked.append((words, environment))
        return (0, "....\n4 passed in 1s") if len(asked) == 1 else (1, "F\nE no\n== 1 failed in 1s ==")

    monkeypatch.setattr(gpu_stages, "run_command", command)
    tests = next(stage for stage in plan_stages(GpuPlan(), Crew()) if stage.name == "tests")
    data: dict[str, Any] = {}
    tests.work(Clock(9), data)
    assert data == {"status": 0, "summary": "4 passed in 1s"}
    assert asked[0][0][1:5] == ["-m", "pytest", "-m", "gpu"]
    assert (Path(asked[0][1]["PYTHONPATH"]) / "catopt_xp").is_dir()
    with pytest.raises(BenchError, match="pytest ended with 1: 1 failed in 1s"):
        tests.work(Clock(9), data)
    assert "E no" in data["output"]


def test_nvidia_smi_is_read_or_its_absence_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_stages, "run_command", lambda words, limit: (0, "A GPU, 580.1, 1980 MHz, 1, 2, 3, 4, 5"))
    read = nvidia_smi(Clock(9))
    assert isinstance(read, dict)
    assert (read["name"], read["clocks.sm"]) == ("A GPU", "1980 MHz")
    monkeypatch.setattr(gpu_stages, "run_command", lambda words, limit: (9, "no devices"))
    assert nvidia_smi(Clock(9)) == "no devices"
    monkeypatch.setattr(gpu_stages, "run_command", partial(run_command, folder=None))
    monkeypatch.setenv("PATH", "")
    assert "nvidia-smi cannot be run" in nvidia_smi(Clock(9))


class OddCrew(ScriptedCrew):
    """A crew in which `odd` has other bits in its second run."""

    odd = "plain"

    def ask(self, family: str, job: str, limit: float, name: Any, *arguments: Any) -> Any:
        losses = super().ask(family, job, limit, name, *arguments)
        if job == "losses" and name == self.odd and self.asked.count((name, "make")) == 2:
            losses = [math.nextafter(losses[0], 1.0), *losses[1:]]
        return losses


def test_two_runs_of_ours_with_other_bits_are_a_failure() -> None:
    crew = OddCrew(SMALL40)
    data: dict[str, Any] = {}
    agreement = next(stage for stage in plan_stages(GpuPlan(device="cpu"), crew) if stage.name == "agreement")  # type: ignore[arg-type]
    with pytest.raises(BenchError, match="plain: two runs differ"):
        agreement.work(Clock(9), data)
    assert data["same_bits"] == {"panels": True, "panels-cores": True, "plain": False}
    assert data["differences"]["panels"] == data["differences"]["jax-uint8"] == 0.0


# The table, from results made by hand.


def contender(ms_per_epoch: float, ratio: float) -> dict[str, Any]:
    return {"seconds_per_epoch": ms_per_epoch / 1e3, "ratio": ratio, "turns": [ms_per_epoch / 1e3]}


def done(**data: Any) -> dict[str, Any]:
    return {"status": "done", "seconds": 1.0, "data": data}


STEP = {
    "name": "panels",
    "batch_size": 8,
    "n_x": 150528,
    "kernels": {"middle": {"seconds": 4e-6}, "stream": {"seconds": 3e-5}},
    "step": 3.5e-5,
    "epoch": {"wall": 0.009, "device": 0.0088, "host_queue": 0.001, "host_wait": 0.008},
    "stream_bandwidth": 3.7e12,
    "memory": [{"epoch": 1, "used": 380e6}, {"epoch": 24, "used": 380e6}],
}
RESULTS: dict[str, Any] = {
    "settings": GpuPlan().settings(),
    "stages": {
        "machine": done(gpu="Some GPU", cuda_runtime="13.0", versions={"cupy": "14.2.0", "torch": "2.11"}),
        "tests": done(status=0, summary="12 passed in 30s"),
        "ceilings": done(bandwidth={"copy": 4.3e12, "in_place": 4e12}, float32=5e13, float16=7.5e14),
        "batch 64": done(
            contenders={
                "panels": contender(1.2, 1.0),
                "plain": contender(18.4, 15.3),
                "torch-uint8": contender(9.0, 7.5),
                "torch-float32": contender(8.4, 7.0),
                "torch-graph-uint8": contender(2.4, 2.0),
                "torch-epoch-graph-uint8": contender(2.3, 1.9),
            },
            absent={"jax-uint8": "jax is not installed"},
        ),
        "batch 8": done(contenders={"panels": contender(9.0, 1.0), "plain": {"difference": 0.0}}, absent={}),
        "compiled 64": done(
            contenders={"panels": contender(1.3, 1.0), "torch-compile-uint8": contender(2.21, 1.7)}, absent={}
        ),
        "explored 64": done(contenders={"torch-epoch-graph-tf32": contender(0.9, 0.75)}, absent={}),
        "compiled 8": {
            "status": "out of time",
            "reason": "make was not done in 77 s",
            "seconds": 110.0,
            "data": {"contenders": {}, "absent": {}},
        },
        "kernels": done(
            launches={"host": 4e-6, "device": 5e-6, "node": 1.3e-6},
            plain={"8": {"host": 0.15, "device": 0.15}},
            steps=[STEP],
            failed={"panels-cores, batch 8": "an odd error"},
        ),
        "start-up": done(cold={"device": 1.0, "engine": 3.0}, warm={"device": 1.0, "engine": 0.5}),
        "train": done(
            epochs=100, device="cuda:0", engine="panels", wall=2.5, epoch=0.00125, stages={"train": 0.2, "save": 0.1}
        ),
    },
}


def test_the_rows_have_floors_ratios_and_the_best_peer() -> None:
    rows = rows_of(RESULTS)
    assert [row["batch_size"] for row in rows] == [8, 64]
    eight, sixty_four = rows
    assert eight["floor"]["seconds"] == pytest.approx(0.006441, rel=1e-3)
    assert eight["contenders"]["panels"]["of_floor"] == pytest.approx(9.0 / 6.441, rel=1e-3)
    assert eight["best_peer"] is None
    # What rounds its factors is nobody's peer, and a stage's ratio is to its own panels.
    assert sixty_four["best_peer"] == {"name": "torch-compile-uint8", "ratio": 1.7}
    assert sixty_four["contenders"]["panels"]["seconds_per_epoch"] == 0.0012
    assert set(sixty_four["contenders"]) > {"torch-compile-uint8", "torch-epoch-graph-tf32"}


def test_the_table_is_ready_for_the_readme() -> None:
    head, empty, *lines = table(RESULTS).splitlines()
    assert head.startswith(
        "Milliseconds per epoch of 150528-30-20-20-1 on 2000 samples, adam, float32, on one Some GPU"
    )
    assert "(CUDA 13.0; cupy 14.2.0, torch 2.11)" in head
    assert empty == ""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:5] == ["batch size", "panels", "floor", "of the floor", "panels, ordinary cores"]
    assert set(cells[1]) == {"---"}
    assert cells[2][:6] == ["8", "**9.00**", "6.44", "1.40×", "–", "–"]
    row = dict(zip(cells[0], cells[3], strict=True))
    assert row["plain"] == "18.4 (15.3×)"
    assert row["PyTorch"] == "8.40 (7.0×)"  # the faster of both residencies
    assert row["PyTorch, CUDA graph"] == "2.30 (1.9×)"
    assert row["torch.compile"] == "2.21 (1.7×)"
    assert row["JAX, jit and scan"] == "–"
    assert row["best peer"] == "1.7× (torch-compile-uint8)"
    assert len({len(line) for line in cells}) == 1


def test_the_report_explains_and_names_what_is_missing() -> None:
    text = report(RESULTS)
    assert text.endswith(table(RESULTS))
    for told in (
        "compiled 8: out of time: make was not done in 77 s",
        "batch 64: jax-uint8: jax is not installed",
        "kernels: panels-cores, batch 8: an odd error",
        "tests: 12 passed in 30s",
        "memory: copy 4.30 TB/s, in_place 4.00 TB/s",
        "products: float32 50 TFLOP/s, float16 750 TFLOP/s",
        "first epochs, cache cold: 4.00 s (device 1.00, engine 3.00)",
        "train(), 100 epochs on cuda:0, panels: 2.50 s (train 0.20, save 0.10); an epoch 1.25 ms",
        "a launch: host 4.0 us, GPU 5.0 us, in a graph 1.3 us",
        "plain, batch 8: an epoch is queued in 150 ms, done in 150",
        "step 35.0 us (middle 4.0 us, stream 30.0 us); stream 3.70 TB/s (86% of the ceiling)",
        "MB in use 380.0 -> 380.0",
    ):
        assert told in text


def test_a_report_of_half_a_measurement_is_no_failure() -> None:
    results = copy.deepcopy(RESULTS)
    for name in ("machine", "ceilings", "kernels", "train", "start-up", "tests"):
        results["stages"].pop(name)
    assert all(row["floor"] is None for row in rows_of(results))
    assert "| 8 | **9.00** | – | – |" in table(results)
    assert "CUDA –" in report(results)
    assert report({"settings": RESULTS["settings"], "stages": {}}) == ""


def test_milliseconds_have_three_digits() -> None:
    assert [ms(x) for x in (1.5, 0.0999, 0.00999, 0.001, 0.000165)] == ["1500", "99.9", "9.99", "1.00", "0.165"]


# The command.


def test_a_dry_run_says_the_stages_and_the_floors(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run", "--quick", "--batch-sizes", "8,64,128,2000"]) == 0
    out = capsys.readouterr().out
    assert "batch 128      at most" in out
    assert "compiled" not in out
    assert [line.split()[-1] for line in out.splitlines()[-4:]] == ["6.441", "0.947", "0.543", "0.165"]


def test_without_a_gpu_one_line_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("python -m benchmarks.gpu: device='cuda' cannot be used: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-sizes 8,0", "argument --batch-sizes: '0' is not a whole number"),
        ("--deadline 0", "argument --deadline: '0' is not a number above 0"),
    ],
)
def test_bad_usage_is_named(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        gpu.main(flags.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_table_is_printed_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(RESULTS))
    assert gpu.main(["--table", str(file)]) == 0
    assert capsys.readouterr().out == report(RESULTS) + "\n"
    assert gpu.main(["--table", str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def stage(name: str, work: Callable[[Clock, dict[str, Any]], None]) -> Stage:
    return Stage(name, 10.0, work)


def scripted_stages(results: list[str]) -> Callable[[GpuPlan, Crew], list[Stage]]:
    """Stages that need nothing; the second one fails the first time."""

    def machine(clock: Clock, data: dict[str, Any]) -> None:
        data |= {"gpu": "Some GPU", "device": "cuda:0", "code": {"commit": results[0]}}

    def second(clock: Clock, data: dict[str, Any]) -> None:
        results.append("second")
        if len(results) == 2:
            raise BenchError("not yet")

    def third(clock: Clock, data: dict[str, Any]) -> None:
        results.append("third")

    return lambda plan, crew: [stage("machine", machine), stage("second", second), stage("third", third)]


def test_an_interrupted_measurement_is_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = ["abc"]
    monkeypatch.setattr(gpu, "plan_stages", scripted_stages(ran))
    file = tmp_path / "gpu.json"
    assert gpu.main(["--out", str(file)]) == 1
    assert json.loads(file.read_text())["stages"]["second"]["reason"] == "not yet"
    assert gpu.main(["--out", str(file), "--resume"]) == 0
    assert ran == ["abc", "second", "third", "second"]
    results = json.loads(file.read_text())
    assert {name: kept["status"] for name, kept in results["stages"].items()} == dict.fromkeys(
        ("machine", "second", "third"), "done"
    )
    assert results["date"]
    assert results["rows"] == []
    capsys.readouterr()
    assert gpu.main(["--out", str(file), "--resume", "--quick"]) == 1
    assert "was measured with other settings" in capsys.readouterr().err
    ran[0] = "def"
    assert gpu.main(["--out", str(file), "--resume"]) == 1
    assert "was measured with another code" in capsys.readouterr().err
    assert json.loads(file.read_text()) == results


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
def test_all_of_it_is_rehearsed_on_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who need no GPU are timed through every part; what needs one fails with its reason."""
    entries = {name: GPU_CONTENDERS[name] for name in ("plain", "torch-uint8", "torch-float32", "jax-uint8")}
    monkeypatch.setattr(gpu_stages, "GPU_CONTENDERS", entries)
    options = {"train_size": 4, "dev_size": 2, "img_shape": (8, 8)}
    plan = GpuPlan(SMALL, (40,), 300.0, 2, tests=False, compiled=False, device="cpu", train_options=options)
    file = tmp_path / "gpu.json"
    assert gpu.measure(plan, file, resume=False) == 1
    results = json.loads(file.read_text())
    statuses = {name: kept["status"] for name, kept in results["stages"].items()}
    failed = dict.fromkeys(("ceilings", "kernels"), "failed")
    assert statuses == dict.fromkeys(statuses, "done") | failed
    assert results["stages"]["agreement"]["data"]["same_bits"] == {"plain": True}
    (row,) = results["rows"]
    assert set(row["contenders"]) == set(entries)
    assert all(len(found["turns"]) == 2 for found in row["contenders"].values())
    out = capsys.readouterr().out
    assert "| 40 | – | – | – | – |" in out
    assert "train(), 100 epochs on cpu" in out
