"""Stopwatches that tell host time and device time apart; progress bars by a steady clock. Floor F0."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Any, Self


class Timer:
    """Time of a ``with`` block: ``host`` and ``device``, in seconds, not-a-number until the block has ended.

    On a CPU both are the same. On a GPU ``host`` is the time until every launch had been queued, ``device``
    the time between two CUDA events around the block: where the two are close, launching takes the time.

    >>> with Timer() as timer:
    ...     total = sum(range(1000))
    >>> timer.host > 0 and timer.device == timer.host
    True
    """

    def __init__(self) -> None:
        self.host = math.nan
        self.device = math.nan
        self._start = math.nan

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.host = self.device = time.perf_counter() - self._start


class CudaTimer(Timer):
    """The :class:`Timer` of GPU number ``index``, on the current stream; ``xp`` is CuPy.

    Leaving the block waits for the GPU. After an exception ``device`` stays not-a-number.
    """

    def __init__(self, xp: Any, index: int) -> None:
        super().__init__()
        self._xp = xp
        self._index = index
        with xp.cuda.Device(index):
            self._first = xp.cuda.Event()
            self._last = xp.cuda.Event()

    def __enter__(self) -> Self:
        with self._xp.cuda.Device(self._index):
            self._first.record()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self.device = math.nan
        if error is not None:  # a failed GPU would fail here once more and hide the first error
            return
        with self._xp.cuda.Device(self._index):
            self._last.record()
        self._last.synchronize()  # sync
        self.device = self._xp.cuda.get_elapsed_time(self._first, self._last) / 1000.0
