"""Processes with limits, commands, and stages within a deadline: the frame of the GPU benchmark."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers_gpu.deadline import Clock, Stage, run_command, run_stages
from benchmarks.peers_gpu.worker import OutOfTime, Worker, end_group
from catopt_xp.commands.bench import BenchError

# Processes. A module is an object too, and can be asked for its functions.


def module_worker(name: str, environment: Mapping[str, str] | None = None) -> Worker:
    return Worker(partial(import_module, name), environment)


def test_a_worker_answers_and_passes_errors_on() -> None:
    with module_worker("math") as worker:
        assert not worker.running
        assert worker.ask("hypot", 60, 3, 4) == 5.0
        with pytest.raises(BenchError, match="ValueError: "):
            worker.ask("sqrt", 60, -1)
        with pytest.raises(BenchError, match=r"AttributeError: .*'nothing'"):
            worker.ask("nothing", 60)
        assert worker.ask("gcd", 60, 12, 18) == 6
        assert (worker.running, worker.starts) == (True, 1)
    assert not worker.running


def test_a_worker_that_hangs_is_ended_and_made_anew() -> None:
    with module_worker("time") as worker:
        assert worker.ask("sleep", 60, 0) is None
        start = time.monotonic()
        with pytest.raises(OutOfTime, match="sleep was not done in 1 s"):
            worker.ask("sleep", 1, 600)
        assert time.monotonic() - start < 20
        assert not worker.running
        assert worker.ask("sleep", 60, 0) is None
        assert worker.starts == 2
        with pytest.raises(OutOfTime, match="no time is left"):
            worker.ask("sleep", 0, 0)
        assert worker.running  # nothing was asked of it


def test_a_worker_that_dies_is_said_with_its_last_words() -> None:
    with module_worker("os") as worker:
        worker.ask("write", 60, 1, b"out of luck\n")
        with pytest.raises(BenchError, match="_exit: the process ended, saying: out of luck"):
            worker.ask("_exit", 60, 3)
        with pytest.raises(BenchError, match="_exit: the process ended, saying nothing"):
            worker.ask("_exit", 60, 3)


def test_a_worker_has_its_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CATOPT_XP_ONE", "ours")
    monkeypatch.delenv("CATOPT_XP_TWO", raising=False)
    with module_worker("os", {"CATOPT_XP_ONE": "its", "CATOPT_XP_TWO": "too"}) as worker:
        assert worker.ask("getenv", 60, "CATOPT_XP_ONE") == "its"
        assert worker.ask("getenv", 60, "CATOPT_XP_TWO") == "too"
    assert os.environ["CATOPT_XP_ONE"] == "ours"
    assert "CATOPT_XP_TWO" not in os.environ


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system does not list its processes in /proc")
def test_what_a_command_started_ends_with_it() -> None:
    code = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    with pytest.raises(OutOfTime, match=r"was not done in 2 s; its last line: \d+") as caught:
        run_command([sys.executable, "-c", code], 2)
    pid = int(str(caught.value).rsplit(" ", 1)[1])
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
    end_group(pid)  # one that is gone is no fault


def test_a_command_has_a_status_an_output_and_an_environment(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getcwd(), os.environ['WORD']); print('no', file=sys.stderr); sys.exit(3)"
    status, text = run_command([sys.executable, "-c", code], 60, tmp_path, {"WORD": "yes"})
    assert status == 3
    assert sorted(text.splitlines()) == sorted([f"{tmp_path} yes", "no"])
    with pytest.raises(BenchError, match="no-such-command cannot be run: No such file"):
        run_command(["no-such-command"], 1)


# Stages.


def stage(name: str, work: Callable[[Clock, dict[str, Any]], None], seconds: float = 10.0) -> Stage:
    return Stage(name, seconds, work)


def finds(clock: Clock, data: dict[str, Any]) -> None:
    data["found"] = 1


def fails(clock: Clock, data: dict[str, Any]) -> None:
    data["found"] = 2
    raise ValueError("something\nwent wrong")


def is_late(clock: Clock, data: dict[str, Any]) -> None:
    data["found"] = 3
    raise OutOfTime("too late")


def test_a_failed_or_late_stage_does_not_stop_the_others() -> None:
    results: dict[str, Any] = {"stages": {}}
    written: list[dict[str, Any]] = []
    said: list[str] = []
    stages = [stage("a", fails), stage("b", is_late), stage("c", finds)]
    run_stages(stages, results, Clock(100), lambda: written.append(copy.deepcopy(results)), said.append)
    kept = results["stages"]
    assert [kept[name]["status"] for name in "abc"] == ["failed", "out of time", "done"]
    assert [kept[name]["data"] for name in "abc"] == [{"found": 2}, {"found": 3}, {"found": 1}]
    assert kept["a"]["reason"] == "ValueError: something went wrong"
    assert [len(result["stages"]) for result in written] == [1, 2, 3]  # whole after each
    assert said[1].startswith("b: out of time, 0 s (too late)")
    assert all(kept[name]["seconds"] >= 0 for name in "abc")


def test_what_is_done_is_not_done_again() -> None:
    results: dict[str, Any] = {"stages": {}}
    run_stages([stage("a", finds), stage("b", fails)], results, Clock(100), lambda: None, lambda text: None)
    said: list[str] = []
    run_stages([stage("a", fails), stage("b", finds)], results, Clock(100), lambda: None, said.append)
    assert [results["stages"][name]["status"] for name in "ab"] == ["done", "done"]
    assert said[0] == "a: done before"


def test_a_stage_gets_its_share_or_what_is_left() -> None:
    limits = []

    def looks(clock: Clock, data: dict[str, Any]) -> None:
        limits.append(clock.seconds)

    results: dict[str, Any] = {"stages": {}}
    stages = [stage("a", looks, 20), stage("b", looks, 2000), stage("c", looks, 2)]
    run_stages(stages, results, Clock(100), lambda: None, lambda text: None)
    assert limits[0] == 20
    assert 90 < limits[1] <= 100
    assert limits[2] == 2
    run_stages([stage("d", looks)], results, Clock(1.0), lambda: None, lambda text: None)
    assert results["stages"]["d"]["status"] == "out of time"
    assert results["stages"]["d"]["reason"] == "no time was left for it"
    assert len(limits) == 3


def test_an_interruption_is_kept_and_goes_on() -> None:
    def interrupted(clock: Clock, data: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    results: dict[str, Any] = {"stages": {}}
    written: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_stages([stage("a", interrupted)], results, Clock(9), lambda: written.append("x"), lambda text: None)
    assert results["stages"]["a"]["status"] == "interrupted"
    assert written == ["x"]
