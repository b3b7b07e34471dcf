"""Commands run in forked children of a process that has everything imported: a run takes hundredths of a second.

Used by drivers that are processes of their own, with one thread: see `small_disk` and `little_memory`.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from catopt_xp.commands.main import main

NAME = "catopt-xp: "
PATIENCE = 300.0  # seconds after which a command counts as one that hangs


@dataclass
class Ended:
    """How a command ended: its exit status (negative: the signal), and what it wrote."""

    status: int
    out: str
    err: str

    def fault(self, failed: Sequence[int] = (1,)) -> str | None:
        """What is wrong with this as the end of a command that fails or not, or None: one clear line, and a status."""
        lines = self.err.splitlines()
        if self.status == 0:
            good = all(line.startswith(f"{NAME}warning: ") for line in lines)
        else:
            *before, last = lines or [""]
            good = self.status in failed and last.startswith(f"{NAME}error: ")
            good = good and all(line.startswith(f"{NAME}warning: ") for line in before)
        return None if good else f"status {self.status}, and on stderr: {self.err[-2000:]!r}"


def run_forked(words: Sequence[str], first: Callable[[], object] | None = None) -> Ended:
    """Runs a command in a child, after `first()`, which may limit it."""
    files = [os.memfd_create(name) for name in ("out", "err")]
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            for file, number in zip(files, (1, 2), strict=True):
                os.dup2(file, number)
            sys.stdout, sys.stderr = (
                io.TextIOWrapper(io.FileIO(number, "w"), encoding="utf-8", write_through=True) for number in (1, 2)
            )
            if first is not None:
                first()
            status = _status(words)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(status)
    status = _wait(child)
    texts = []
    for file in files:
        size = os.lseek(file, 0, os.SEEK_END)
        texts.append(os.pread(file, size, 0).decode(errors="replace"))
        os.close(file)
    return Ended(status, *texts)


def _status(words: Sequence[str]) -> int:
    try:
        return main(words)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 71


def _wait(child: int) -> int:
    """The exit status; a child that hangs is killed, which its status tells."""
    deadline = time.monotonic() + PATIENCE
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL
        time.sleep(0.0005)
