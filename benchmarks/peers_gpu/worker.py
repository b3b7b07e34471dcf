"""A process that does a benchmark's jobs, one at a time, each within a limit; a job that hangs ends it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from catopt_xp.backend.devices import DeviceError
from catopt_xp.commands.bench import BenchError

TAIL = 2000  # the last characters that a dead process printed are kept


class OutOfTime(BenchError):
    """A job was not done within its limit; its process was ended."""


class Worker:
    """Calls the methods of an object in another process, which starts on first use, and again after it has ended.

    `make`: makes the object in that process, and must be importable there. `environment`: added to ours. `starts`: how
    many processes there have been. Use it in a `with` block, which ends the process.

    >>> with Worker(dict) as worker:
    ...     worker.ask("setdefault", 60, "a", 1)
    1
    """

    def __init__(self, make: Callable[[], Any], environment: Mapping[str, str] | None = None) -> None:
        self.make, self.environment = make, dict(environment or {})
        self.starts = 0
        self._process: Any = None
        self._pipe: Any = None
        self._log: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ask(self, job: str, limit: float, *arguments: Any, **options: Any) -> Any:
        """Calls a method of the object, and returns its result; `limit`: seconds, with those of a first start.

        Raises OutOfTime where it takes longer, BenchError with one line where it raises, or where the process dies.
        """
        if limit <= 0:
            raise OutOfTime(f"{job}: no time is left")
        deadline = time.monotonic() + limit
        if self._process is None:
            self._start()
        try:
            self._pipe.send((job, arguments, options))
            if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise OutOfTime(f"{job} was not done in {limit:.0f} s")
            answer, error = self._pipe.recv()
        except (EOFError, OSError) as lost:
            words = self._last_words()
            self.close()
            raise BenchError(f"{job}: the process ended{words}") from lost
        if error is not None:
            raise BenchError(error)
        return answer

    @property
    def running(self) -> bool:
        """Whether the process runs, and so has its object still."""
        return self._process is not None

    def close(self) -> None:
        """Ends the process, and the processes that it started."""
        if self._process is None:
            return
        self._pipe.close()
        if self._process.is_alive():
            end_group(self._process.pid)
        self._process.join()
        if self._log is not None:
            self._log.unlink(missing_ok=True)
        self._process = None

    def _start(self) -> None:
        self.starts += 1
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._pipe, theirs = context.Pipe()
        handle, name = tempfile.mkstemp(prefix="catopt_xp-worker-", suffix=".log")
        os.close(handle)
        self._log = Path(name)
        before = {key: os.environ.get(key) for key in self.environment}
        os.environ.update(self.environment)
        try:
            self._process = context.Process(target=serve, args=(theirs, self.make, name))
            self._process.start()
        finally:
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value
        theirs.close()

    def _last_words(self) -> str:
        text = self._log.read_text(errors="replace")[-TAIL:].strip() if self._log is not None else ""
        return f", saying: {' | '.join(text.splitlines()[-5:])}" if text else ", saying nothing"


def end_group(pid: int) -> None:
    """Ends a process that leads a session, and whatever it started there; the process may be gone already."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it does not lead one yet, or is gone
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def serve(pipe: Connection, make: Callable[[], Any], log: str) -> None:
    """Runs in the process: answers one call after the other, until the other end is closed."""
    os.setsid()  # Ctrl-C goes to the caller, who ends this process and all that it started
    words = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(words, stream.fileno())
    answers: Any = None
    while True:
        try:
            job, arguments, options = pipe.recv()
        except EOFError:
            return
        try:
            answers = make() if answers is None else answers
            result, failure = getattr(answers, job)(*arguments, **options), None
        except Exception as error:
            result, failure = None, one_line(error)
        pipe.send((result, failure))


def one_line(error: BaseException) -> str:
    """An exception in one line, its type first where that says more than the text.

    >>> one_line(ValueError("no such\\n  thing"))
    'ValueError: no such thing'
    >>> one_line(BenchError("panels differs"))
    'panels differs'
    """
    text = " ".join(str(error).split())[:TAIL]
    return text if isinstance(error, BenchError | DeviceError) else f"{type(error).__name__}: {text}"


__all__ = ["OutOfTime", "Worker", "end_group", "one_line", "serve"]
