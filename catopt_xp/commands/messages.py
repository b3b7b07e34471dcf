"""How a command ends: errors and warnings as one line, the exit status, the command that resumes."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from catopt_xp.backend.ranks import launched
from catopt_xp.commands.flags import NAME, RENAMED, with_flags
from catopt_xp.data.dataset import DataArgumentError
from catopt_xp.io.console import ASKING_TO_END, is_to_be_ignored, plain
from catopt_xp.io.files import Mark, mark
from catopt_xp.training.loop import Interrupted

DONE, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130
LOADING = "catopt_xp.data.load"  # the module in which a run is, while its data are read, decoded or drawn


class UsageError(Exception):
    """Flags that cannot be meant; the message is one line."""


class StdoutError(Exception):
    """What is printed cannot be written, as on a full disk; the message is one line."""


@contextmanager
def usage() -> Iterator[None]:
    """What is wrong in here is wrong with the flags."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error


@contextmanager
def one_voice() -> Iterator[None]:
    """Of several processes that MPI started together the first alone speaks."""
    if launched()[1] == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def check_launch(distributed: bool) -> None:
    """Refuses what MPI started several times, and would be done as often. Raises UsageError."""
    size, _ = launched()
    if size > 1 and not distributed:
        told = f"MPI started this {size} times, and each would do all of it"
        raise UsageError(f"{told}: train --distributed shares the work; leave mpiexec out for anything else")


def end_failed(error: Exception, args: argparse.Namespace) -> int:
    """Says an error in one line on stderr, and returns the exit status that says whose it is. `args`: parsed flags."""
    arguments = [name for name in {**vars(args), **RENAMED} if "_" in name]  # others may be words of the message
    print(f"{NAME}: error: {with_flags(one_line(error), arguments)}", file=sys.stderr)
    if isinstance(error, StdoutError):
        return leave_stdout()
    return BAD_USAGE if isinstance(error, UsageError | DataArgumentError) else FAILED


def end_interrupted(
    interruption: KeyboardInterrupt, args: argparse.Namespace, before: Mark | None, prog: str, words: Sequence[str]
) -> int:
    """Says on stderr what an interruption left and how to go on, and returns the exit status.

    `args`: the parsed flags, as far as there are any. `before`: `checkpoint_mark(args)` when the command began.
    `prog`, `words`: what was typed.
    """
    for line in _about_interruption(interruption, args, before, prog, words):
        print(line, file=sys.stderr)
    return INTERRUPTED


def checkpoint_mark(args: argparse.Namespace) -> Mark | None:
    """Changes when `train` writes its checkpoint. None: there is no checkpoint, or the command has none."""
    return mark(_checkpoint(args)) if hasattr(args, "save_dir") else None


@contextmanager
def termination_as_interruption() -> Iterator[None]:
    """SIGTERM and SIGHUP end a command as Ctrl-C does, also where `train` does not look after them."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python takes no signals
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    asking = [number for number in ASKING_TO_END if number != signal.SIGINT and not is_to_be_ignored(number)]
    with _handled(asking, interrupt):
        yield


def interruption_in(error: BaseException) -> KeyboardInterrupt | None:
    """The interruption that an error is, or that it arose from: one may come where others' code cannot clean up."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, KeyboardInterrupt):
        found = found.__cause__ or found.__context__
    return None if found is None else found.with_traceback(error.__traceback__)


@contextmanager
def undisturbed(last: bool = False) -> Iterator[None]:
    """Signals that ask to end do nothing meanwhile: the end has begun, and is told. Some programs send them twice.

    `last`: nor do they afterwards.
    """
    if last:
        ignore_signals()
    if last or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _handled(ASKING_TO_END, signal.SIG_IGN):
        yield


def ignore_signals() -> None:
    """From now on: the exit status is known, and nothing is left to be interrupted but the end of the interpreter."""
    if threading.current_thread() is threading.main_thread():
        for number in ASKING_TO_END:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def _handled(numbers: Sequence[int], handler: Any) -> Iterator[None]:
    """`handler` for these signals; afterwards, unless another was set meanwhile, what there was before."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            if signal.getsignal(number) is handler:
                # A handler that was not set from Python is None here, and cannot be put back: the default is.
                signal.signal(number, signal.SIG_DFL if before is None else before)


def program_again(called: str) -> str:
    """What runs this program again: its name where the shell finds it by that, else the path that it was called by."""
    name = Path(called).name
    found = shutil.which(name)
    by_name = found is not None and os.path.exists(called) and os.path.samefile(found, called)
    return command_line([name if by_name else called])


def command_line(words: Sequence[str]) -> str:
    """Words as they are typed at a prompt, quoted where they have to be."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _about_interruption(
    interruption: KeyboardInterrupt, args: argparse.Namespace, before: Mark | None, prog: str, words: Sequence[str]
) -> list[str]:
    """Lines that say what was saved, where something was, and the exact command that goes on from there."""
    command = getattr(args, "command", None)
    if command not in ("train", "compare"):
        return [f"{NAME}: interrupted"]
    if any(frame.f_globals.get("__name__") == LOADING for frame, _ in traceback.walk_tb(interruption.__traceback__)):
        return [f"{NAME}: interrupted, nothing was trained"]
    if isinstance(interruption, Interrupted):
        saved, where = interruption.checkpoint, f" in epoch {interruption.epoch}"
    else:  # at once, at the second Ctrl-C, or between two runs of a comparison
        saved, where = _saved_since(before, args), ""
    first = f"{NAME}: interrupted{where}; saved {saved}" if saved else f"{NAME}: interrupted{where}"
    if command == "compare":  # it finds by itself what its folder holds
        return [first, f"to resume: {prog} {command_line(words)}"]
    if saved is None:
        return [f"{first}, nothing was saved"]
    words = [*_without(words, "--recover-from"), "--recover-from", str(saved)]
    ranks, _ = launched()
    started_by = f"mpiexec -n {ranks} " if ranks > 1 else ""
    return [first, f"to resume: {started_by}{prog} {command_line(words)}"]


def _saved_since(before: Mark | None, args: argparse.Namespace) -> Path | None:
    """The checkpoint of `train`, if it was written since then."""
    return _checkpoint(args) if checkpoint_mark(args) not in (None, before) else None


def _checkpoint(args: argparse.Namespace) -> Path:
    folder: Path = args.save_dir
    return folder / f"{getattr(args, 'model_name', '')}_latest.npz"


def _without(words: Sequence[str], flag: str) -> list[str]:
    """The words without a flag and its value, however they are written.

    >>> _without(["train", "--recover-from", "a", "--seed", "1", "--recover-from=b"], "--recover-from")
    ['train', '--seed', '1']
    """
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == flag:
            next(rest, None)
        elif not word.startswith(f"{flag}="):
            kept.append(word)
    return kept


def one_line(error: Exception) -> str:
    """An error as one line; the kind of error too, where its text was not written for the user."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, MemoryError):
        text = f"out of memory{f' ({error})' * bool(str(error))}: choose a smaller --img-shape, --train-size,"
        text += " --hidden or --batch-size"
    elif isinstance(error, RuntimeError) and "start new thread" in str(error):  # its words, in every Python
        text = f"out of memory for threads, or of threads ({error}): set OMP_NUM_THREADS=1, or raise ulimit -v or -u"
    else:
        text = str(error)
    ours = (
        UsageError | StdoutError | ValueError | OSError | RuntimeError | ImportError | FloatingPointError | MemoryError
    )
    told = text if isinstance(error, ours) and text else f"{type(error).__name__}: {text} (--debug shows where)"
    return plain(" ".join(told.split()))


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """In place of warnings.showwarning: one line, without the place in the source."""
    print(f"{NAME}: warning: {plain(' '.join(str(message).split()))}", file=file or sys.stderr)


class Stdout:
    """A stream whose errors say that they are of stdout; a reader that leaves stays a BrokenPipeError."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return int(self._told(self._stream.write, text))

    def flush(self) -> None:
        self._told(self._stream.flush)

    def _told(self, call: Callable[..., Any], *arguments: str) -> Any:
        try:
            return call(*arguments)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise StdoutError(f"stdout cannot be written ({error.strerror or error})") from error


def leave_stdout() -> int:
    """Nobody takes what is printed: nothing is left to say, and Python's own flush at exit must not say that either."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return FAILED
