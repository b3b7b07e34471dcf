"""What an input does when it is read: taken, refused as documented, or a `Finding`.

A finding is another exception, a message of several lines or with signs that move a cursor, a hang, memory without
bound, a file touched outside the input's folder, an unpickled object, a started program.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import mutations
import numpy as np

SECONDS = 10.0  # of processor time, after which an input counts as one that hangs
MEMORY = 1 << 30  # bytes that an input may take
TOUCHING = (
    "os.system",
    "os.exec",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
)
WRITING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate")


class Finding(Exception):
    """What an input should not have done."""


class _Hang(BaseException):
    """Raised in the midst of an input that does not end; nothing that handles an Exception holds it up."""


@dataclass(frozen=True)
class Target:
    """`seeds(folder)`: whole files; `mutate`: as in `mutations`; `run(data, folder)`: reads and uses one input.

    `refusals`: the exceptions that are documented.
    """

    name: str
    seeds: Callable[[Path], list[bytes]]
    mutate: mutations.Mutation
    run: Callable[[bytes, Path], None]
    refusals: tuple[type[BaseException], ...] = (ValueError, FileNotFoundError)


def examine(target: Target, data: bytes, folder: Path) -> bool:
    """Whether the input was taken (True) or refused as documented (False). Raises Finding."""
    (folder / "in").mkdir(exist_ok=True)
    beside = set(os.listdir(folder))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = True
    with _watched(folder / "in"):
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                target.run(data, folder / "in")
        except Finding:
            raise
        except _Hang as hang:
            raise Finding(f"hangs at {_place(hang)}") from hang
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            fault = fault_of(error, target.refusals)
            if fault is not None:
                raise Finding(f"{fault} at {_place(error)}: {str(error)[:200]!r}") from error
            taken = False
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if (after - before) * 1024 > MEMORY:
        raise Finding(f"takes {(after - before) / 1e6:.1f} GB of memory")
    if set(os.listdir(folder)) != beside:
        raise Finding(f"left {sorted(set(os.listdir(folder)) ^ beside)} beside its folder")
    return taken


def fault_of(error: BaseException, refusals: tuple[type[BaseException], ...]) -> str | None:
    """What is wrong with this refusal, or None.

    Its type is no documented one, it was not raised on purpose (so that a TypeError of Python's own is none), or its
    message is no plain line.
    """
    kind = type(error).__name__
    *_, last = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, refusals) or not (last.line or "").startswith("raise"):
        return kind
    text = str(error)
    return None if text.isprintable() and text else f"{kind} that is no plain line"


def _place(error: BaseException) -> str:
    """The innermost line of ours that an exception came through: what tells findings apart."""
    ours = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "catopt_xp" in f.filename and "/tests/" not in f.filename
    ]
    return f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "the library's border"


# --- watching ---------------------------------------------------------------------------------------------------------

_inside: list[Path] = []  # the folder of the input that is being run
_touched: list[str] = []
_hooked: list[bool] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _inside:
        return
    if event == "open":
        name, _, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and not isinstance(name, int) and not _allowed(name):
            _touched.append(f"opened {os.fsdecode(name)} to write")
    elif event in TOUCHING or (event in WRITING and not isinstance(arguments[0], int) and not _allowed(arguments[0])):
        _touched.append(f"{event}{arguments!r}")


def _allowed(name: Any) -> bool:
    path = Path(os.path.abspath(os.fsdecode(name)))
    return path.is_relative_to(_inside[-1]) or path == Path(os.devnull)


@contextlib.contextmanager
def _watched(folder: Path) -> Iterator[None]:
    """Raises Finding for what is touched outside `folder`, and _Hang in what takes too long."""
    if not _hooked:
        sys.addaudithook(_audit)  # which cannot be taken off again: it looks away outside of here
        _hooked.append(True)

    def hang(number: int, frame: FrameType | None) -> None:
        raise _Hang

    before = signal.signal(signal.SIGVTALRM, hang)  # of processor time; fuzzers have the other one
    place = Path.cwd()
    os.chdir(folder)
    _inside.append(folder.resolve())
    _touched.clear()
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        _inside.pop()
        os.chdir(place)
        signal.signal(signal.SIGVTALRM, before)
    if _touched:
        raise Finding(f"touched: {_touched[0][:200]}")
