"""The GPU engine with its kernels executed on the CPU (`cuda_on_cpu`), and the variants of its source, for tests."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from cuda_on_cpu import Library
from panel_runs import OPTIONS, Case, run

from catopt_xp.engines.cuda.engine import CoresEngine, CudaEngine
from catopt_xp.engines.cuda.launches import geometry_of
from catopt_xp.engines.cuda.source import is_aligned, source
from catopt_xp.engines.plain import PlainEngine
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.rules import OPTIMIZERS

Array = np.ndarray[Any, Any]

# --- the device -----------------------------------------------------------------------------------------------


@cache
def folder() -> Path:
    """Where compiled sources lie while the tests run."""
    path = Path(tempfile.mkdtemp(prefix="catopt_xp-cuda-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def library(text: str, sanitize: bool = False) -> Library:
    return Library(text, folder(), sanitize)


class CpuDevice:
    """A device as `CudaEngine` wants it. It counts what is queued, and runs it at once, or as late as it may.

    `change`: what to make of the source, to plant faults; `block_order`, `thread_order`, `sanitize`: as of `Library`;
    `late`: what is queued waits until the host does.
    """

    def __init__(
        self,
        change: Callable[[str], str] = str,
        block_order: str = "forward",
        thread_order: str = "forward",
        late: bool = False,
        sanitize: bool = False,
    ) -> None:
        self.change, self.orders, self.late, self.sanitize = change, (block_order, thread_order), late, sanitize
        self.launches: Counter[str] = Counter()
        self.uploads = self.captures = self.replays = self.waits = self.attached = 0
        self._queue: list[Callable[[], None]] = []
        self._recorded: list[Callable[[], None]] | None = None

    def load(self, source: str) -> None:
        self.library = library(self.change(source), self.sanitize)

    def launch(self, kernel: str, grid: Sequence[int], threads: int, arguments: Sequence[Any], shared: int) -> None:
        given = (tuple(grid), (threads,), tuple(arguments), shared)
        if self._recorded is not None:
            self._recorded.append(partial(self._run, kernel, *given))
        else:
            self._put(partial(self._run, kernel, *given))

    def _run(self, kernel: str, *given: Any) -> None:
        self.launches[kernel] += 1
        self.library.block_order, self.library.thread_order = self.orders
        self.library.launch(kernel, *given)

    def _put(self, work: Callable[[], None]) -> None:
        self._queue.append(work)
        if not self.late:
            self._finish()

    def _finish(self) -> None:
        while self._queue:
            self._queue.pop(0)()

    def upload(self, array: Array, values: Array) -> None:
        assert self._recorded is None, "an upload within a capture"
        assert array.dtype == values.dtype, f"{values.dtype} into {array.dtype}"
        self.uploads += 1
        self._put(partial(np.copyto, array, values.copy()))

    def capture(self, launches: Callable[[], None]) -> Callable[[], None]:
        self._recorded, self.captures = [], self.captures + 1
        launches()
        recorded, self._recorded = self._recorded, None

        def replay() -> None:
            self.replays += 1
            for launch in recorded:
                self._put(launch)

        return replay

    def mark(self) -> Callable[[], None]:
        passed: list[bool] = []
        self._put(partial(passed.append, True))

        def wait() -> None:
            self.waits += 1
            while not passed:
                self._queue.pop(0)()

        return wait

    def attach(self) -> None:
        assert not self._queue, "someone else may have changed what the queue was made for"
        self.attached += 1

    def synchronize(self) -> None:
        self._finish()


def planted(*edits: tuple[str, str]) -> Callable[[str], str]:
    """What changes a source: each first text, which must be there, becomes the second, wherever it is."""

    def change(source: str) -> str:
        for old, new in edits:
            assert old in source, f"the source has no {old!r}"
            source = source.replace(old, new)
        return source

    return change


def cuda_engine(device: CpuDevice | None = None, kind: type[CudaEngine] = CudaEngine) -> Any:
    """What makes a `CudaEngine` as `Case.engine` makes engines."""
    return partial(kind, device=device or CpuDevice())


# --- variants of the source -----------------------------------------------------------------------------------

# Who makes a tile's products, of which types: the engine, the network's dtype, the set's.
PRODUCTS: dict[str, tuple[type[CudaEngine], str, str]] = {
    "float64, pixels": (CudaEngine, "float64", "uint8"),
    "float64, floats": (CudaEngine, "float64", "float64"),
    "tensor cores": (CudaEngine, "float32", "uint8"),
    "cores, pixels": (CoresEngine, "float32", "uint8"),
    "cores, floats": (CudaEngine, "float32", "float32"),
}
WHOLE = ("float64, pixels", "tensor cores")  # with every net below; the others share most of their text

Changes = dict[str, Any]
DECAYS: dict[str, Changes] = {
    "l2": {"l2": 0.05},
    "weight decay": {"weight_decay": 0.1},
    "both": {"weight_decay": 0.2, "l2": 0.01},
}
RULES: dict[str, Changes] = {name: {"optimizer": kind, "options": options} for name, (kind, options) in OPTIONS.items()}
RULES |= {
    f"{kind}, {name}": {"optimizer": kind, "options": options}
    for kind in OPTIMIZERS
    for name, options in DECAYS.items()
}
FEW_NETS: dict[str, Changes] = {
    "1 layer, softmax": {"units": (), "output": "softmax", "outputs": 3},
    "3 layers, relu": {"units": (9, 4), "activation": "relu", "output": "softmax", "outputs": 5},
    "30 units": {"units": (30, 3)},
    "33 units": {"units": (33,)},
    "128 units": {"units": (128, 2), "outputs": 2},
}
NETS: dict[str, Changes] = FEW_NETS | {
    "1 layer": {"units": ()},
    "2 layers, sigmoid": {"units": (5,), "activation": "sigmoid", "outputs": 4},
    "4 layers": {"units": (8, 6, 5), "outputs": 2},
    "5 layers": {"units": (6, 5, 4, 3), "activation": "relu", "output": "softmax", "outputs": 2},
    **{f"{n} units": {"units": (n, 3)} for n in (1, 2, 16, 17, 32, 64, 65, 100)},
}
FEATURES: dict[str, Changes] = {
    f"{n} features": {"n_x": n} for n in (1, 3, 8, 127, 128, 129, 255, 256, 257, 1000, 2048, 2049, 4397)
}
SIZES: dict[str, Changes] = {
    f"{n} of {m}": {"m": m, "batch_size": n}
    for n, m in (
        (1, 3),
        (2, 5),
        (7, 20),
        (8, 24),
        (9, 25),
        (16, 50),
        (17, 50),
        (33, 80),
        (65, 150),
        (128, 130),
        (129, 260),
    )
}
SIZES |= {"600 of 600": {"m": 600, "batch_size": 600, "epochs": 1, "n_x": 40}}  # where roundings would add up
SIZES |= {"drop last": {"m": 22, "batch_size": 9, "drop_last": True}, "whole set": {"m": 20, "batch_size": 20}}


def cases() -> dict[str, tuple[type[CudaEngine], Case]]:
    """Runs by name, over all variants: each product with each rule, net, number of features and batch size."""
    found = {}
    for products, (kind, dtype, samples) in PRODUCTS.items():
        # Where float32 is compared, Adam's quotients of gradients near 0 would drown all else: it has its own cases.
        rule = {"optimizer": "adam" if dtype == "float64" else "momentum"}
        nets = NETS if products in WHOLE else FEW_NETS
        for name, changes in (RULES | nets | FEATURES | SIZES).items():
            given: Changes = {"n_x": 260, "dtype": dtype, "samples": samples, "epochs": 2} | rule | changes
            found[f"{products}: {name}"] = kind, Case(**given)
    return found


def source_of(kind: type[CudaEngine], case: Case) -> str:
    """The source that `kind` compiles for a case."""
    engine = case.engine(PlainEngine)
    assert isinstance(engine.model, DeepNetwork)
    longest = min(case.m, case.batch_size)
    geometry = geometry_of(engine.model, engine.samples, longest, kind.tensor_cores)
    return source(geometry, engine.model.activation_func, type(engine.optimizer), is_aligned(engine.samples))


# --- float32 against float64 ----------------------------------------------------------------------------------


def error_ratios(kind: Callable[..., PlainEngine], case: Case, seeds: int = 2) -> dict[str, float]:
    """How far an engine's float32 numbers are from those of float64, over how far the plain engine's are.

    Of the parameters, of each of their moments and of the losses; over some seeds, and the plain engine's no nearer
    than half a unit in the last place, since a single small error is luck.
    """
    squares: dict[str, Counter[str]] = {"ours": Counter(), "plain": Counter(), "numbers": Counter()}
    for seed in range(seeds):
        this = replace(case, seed=seed)
        double = replace(this, dtype="float64", samples="uint8" if case.samples == "uint8" else "float64")
        exact = double.engine(PlainEngine)
        exact.model.load(this.engine(PlainEngine).model.save())  # float64 draws other initial weights
        truth = run(exact, double)
        for engine, who in ((kind, "ours"), (PlainEngine, "plain")):
            numbers = run(this.engine(engine), this)
            assert {array.dtype.name for array in numbers.values() if array.ndim} == {"float32"}
            for name in set(truth) - {"steps", "epoch"}:
                squares[who][_group(name)] += np.square(numbers[name].astype(np.float64) - truth[name]).sum()
        for name in set(truth) - {"steps", "epoch"}:
            squares["numbers"][_group(name)] += np.square(2.0**-24 * truth[name]).sum()
    ours = squares["ours"]
    return {name: float(np.sqrt(ours[name] / max(squares["plain"][name], squares["numbers"][name]))) for name in ours}


def error_ratio(kind: Callable[..., PlainEngine], case: Case) -> float:
    """The largest of `error_ratios`. Where two seeds leave it in doubt, 16 decide: the numbers of so small a network
    share the error of a few sums, and on which side of these a processor's own products round is luck."""
    found = max(error_ratios(kind, case).values())
    return found if found <= 2 else max(error_ratios(kind, case, seeds=16).values())


def _group(name: str) -> str:
    return name if name == "losses" else name.rpartition("/")[0] or "parameters"
