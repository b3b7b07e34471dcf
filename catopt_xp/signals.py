"""Ctrl-C, SIGTERM and SIGHUP as a flag, so that what goes on can end in good order. Floor F0."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

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
