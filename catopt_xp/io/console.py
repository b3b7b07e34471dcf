"""What is printed and how a run is interrupted: messages of one line, progress bars, Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from types import FrameType, TracebackType
from typing import Any

from tqdm import tqdm


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line of the caller: the first one outside the package."""
    package = os.path.dirname(os.path.dirname(__file__)) + os.sep
    frame, level = sys._getframe(0), 1  # level 1 is this function
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def plain(text: object) -> str:
    r"""The text with what cannot be printed escaped: it neither breaks a line nor moves the cursor.

    >>> print(plain("two\nlines"))
    two\nlines
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def one_line(error: BaseException | str) -> str:
    """An exception's message on one line; its type where it has no message.

    >>> one_line(ValueError("two\\n  lines"))
    'two lines'
    """
    return plain(" ".join(str(error).split())) or type(error).__name__


ASKING_TO_END = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def is_to_be_ignored(number: int) -> bool:
    """Whether nohup asked for that: it lets a run outlive its terminal."""
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


class Signals:
    """Turns the first signal that asks to end into a flag, read between steps; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no signals
            for number in ASKING_TO_END:
                if is_to_be_ignored(number):
                    continue
                previous = signal.signal(number, self._receive)
                # A handler that was not set from Python is None here, and cannot be put back: the default is.
                self._previous[number] = signal.SIG_DFL if previous is None else previous
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Bar(tqdm):  # type: ignore[type-arg]
    """A progress bar whose times run on when the system's clock is set, which is the one that tqdm goes by."""

    _time = property(lambda self: time.monotonic, lambda self, clock: None)
