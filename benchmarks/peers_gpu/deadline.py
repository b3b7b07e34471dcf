"""Stages of a long measurement, one after the other within a deadline; results are never lost.

A stage fills a dictionary while it works. When it ends, fails, or runs out of time, the results are written whole with
the reason, and the next stage begins.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers_gpu.worker import OutOfTime, end_group, one_line
from catopt_xp.commands.bench import BenchError

LEAST = 3.0  # no stage begins with fewer seconds left
TAIL = 3000  # the last characters of a command's output are kept
DONE = "done"


@dataclass(frozen=True)
class Clock:
    """A limit of so many seconds from now.

    >>> 0 < Clock(10.0).left() <= 10
    True
    """

    seconds: float
    start: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds until the limit, at least 0."""
        return max(0.0, self.seconds - (time.monotonic() - self.start))


@dataclass(frozen=True)
class Stage:
    """A part of the measurement, of at most `seconds`; `work` fills the dictionary that it is given."""

    name: str
    seconds: float
    work: Callable[[Clock, dict[str, Any]], None]


def run_stages(
    stages: Sequence[Stage],
    results: dict[str, Any],
    clock: Clock,
    write: Callable[[], None],
    say: Callable[[str], None] = print,
) -> None:
    """Runs the stages that are not done in `results["stages"]`; each leaves its status, seconds, data and reason there.

    `clock`: the limit of all of them; `write`: called after each.

    >>> results = {"stages": {}}
    >>> run_stages([Stage("count", 5.0, lambda clock, data: data.update(n=3))], results, Clock(60), lambda: None)
    count: done, 0 s
    >>> results["stages"]["count"]["data"]
    {'n': 3}
    """
    kept = results["stages"]
    for stage in stages:
        if kept.get(stage.name, {}).get("status") == DONE:
            say(f"{stage.name}: done before")
            continue
        data: dict[str, Any] = {}
        entry: dict[str, Any] = {"status": "interrupted", "data": data}
        kept[stage.name] = entry
        limit = Clock(min(stage.seconds, clock.left()))
        try:
            if limit.seconds < min(LEAST, stage.seconds):
                raise OutOfTime("no time was left for it")
            stage.work(limit, data)
            entry["status"] = DONE
        except OutOfTime as error:
            entry |= {"status": "out of time", "reason": str(error)}
        except Exception as error:
            entry |= {"status": "failed", "reason": one_line(error)}
        finally:
            entry["seconds"] = time.monotonic() - limit.start
            write()
        why = f" ({entry['reason']})" if "reason" in entry else ""
        say(f"{stage.name}: {entry['status']}, {entry['seconds']:.0f} s{why}")


def run_command(
    command: Sequence[str], limit: float, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Runs a command; returns its exit status and the end of its output, both streams together.

    `limit`: seconds after which it is ended, together with what it started; `environment`: added to ours. Raises
    OutOfTime with the end of the output, BenchError where there is no such command.

    >>> run_command(["echo", "hello"], 10)
    (0, 'hello')
    """
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise BenchError(f"{command[0]} cannot be run: {error.strerror}") from error
        over = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            over = True
        finally:
            if process.poll() is None:
                end_group(process.pid)
                process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")[-TAIL:].strip()
    if over:
        last = text.splitlines()[-1] if text else "nothing"
        raise OutOfTime(f"{Path(command[0]).name} was not done in {limit:.0f} s; its last line: {last}")
    return process.returncode, text


__all__ = ["DONE", "Clock", "Stage", "run_command", "run_stages"]
