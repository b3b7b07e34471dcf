"""The GPU engine with its kernels executed on the CPU (`cuda_on_cpu`), for the tests of engines."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from cuda_on_cpu import Library

from catopt_xp.engines.cuda import CudaEngine

Array = np.ndarray[Any, Any]


@cache
def folder() -> Path:
    """Where compiled sources lie while the tests run."""
    return Path(tempfile.mkdtemp(prefix="catopt_xp-cuda-"))


@cache
def library(source: str) -> Library:
    return Library(source, folder())


class CpuDevice:
    """A device as `CudaEngine` wants it. It runs at once what is queued, and counts it.

    `change`: what to make of the source, to plant faults; `block_order`, `thread_order`: as of `Library`.
    """

    def __init__(
        self, change: Callable[[str], str] = str, block_order: str = "forward", thread_order: str = "forward"
    ) -> None:
        self.change, self.orders = change, (block_order, thread_order)
        self.launches: dict[str, int] = {"stream": 0, "middle": 0, "advance": 0}
        self.captures = self.replays = self.waits = 0
        self._recorded: list[tuple[Any, ...]] | None = None

    def load(self, source: str) -> None:
        self.library = library(self.change(source))

    def launch(self, kernel: str, grid: Sequence[int], threads: int, arguments: Sequence[Any], shared: int) -> None:
        if self._recorded is not None:
            self._recorded.append((kernel, grid, threads, arguments, shared))
            return
        self.launches[kernel] += 1
        self.library.block_order, self.library.thread_order = self.orders
        self.library.launch(kernel, grid, (threads,), arguments, shared)

    def upload(self, array: Array, values: Array) -> None:
        assert self._recorded is None, "an upload within a capture"
        assert array.dtype == values.dtype, f"{values.dtype} into {array.dtype}"
        array[...] = values

    def capture(self, launches: Callable[[], None]) -> Callable[[], None]:
        self._recorded, self.captures = [], self.captures + 1
        launches()
        recorded, self._recorded = self._recorded, None

        def replay() -> None:
            self.replays += 1
            for launch in recorded:
                self.launch(*launch)

        return replay

    def mark(self) -> Callable[[], None]:
        def wait() -> None:
            self.waits += 1

        return wait

    def attach(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


def cuda_engine(device: CpuDevice | None = None) -> Any:
    """What makes a `CudaEngine` as `Case.engine` makes engines."""
    return partial(CudaEngine, device=device or CpuDevice())
