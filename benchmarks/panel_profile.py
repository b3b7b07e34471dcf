"""Where a step of the panel engine spends its time: a pass whole, its product alone, its gradient and update alone.

The reference network on 2000 samples of noise; medians of passes over changing rows, and the floor's two speeds.

    python -m benchmarks.panel_profile [--batch-sizes 8 64 128] [--optimizers adam gd]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from catopt_xp.backend.machine import cpu_model, thread_count
from catopt_xp.backend.xp import NumpyBackend
from catopt_xp.commands.floor import measure_floor
from catopt_xp.engines.cpu.engine import PanelEngine
from catopt_xp.engines.plain import Settings
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.rules import make_optimizer

N_X, HIDDEN, M, PASSES = 224 * 224 * 3, (30, 20, 20), 2000, 30


def median_ms(work: Callable[[], object]) -> float:
    """Milliseconds of a call, after one that does not count."""
    work()
    times = []
    for _ in range(PASSES):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def profile(batch_size: int, optimizer: str) -> str:
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 256, (M, N_X), dtype=np.uint8)
    targets = rng.integers(0, 2, (1, M)).astype(np.float32)
    model = DeepNetwork([N_X, *HIDDEN, 1], ["relu", "relu", "relu", "sigmoid"])
    made = make_optimizer(optimizer, model.save(), 1e-5)
    engine = PanelEngine(model, made, samples, targets, NumpyBackend(), Settings(batch_size))
    order = rng.permutation(M)

    def epoch() -> None:
        for _ in engine.steps(0, order, following=order):
            pass

    step = median_ms(epoch) / engine.batches
    rule = engine._numbers(**made.advance()), ()
    d = np.zeros_like(engine._d[:batch_size])
    none, at = order[:0], iter(range(10**9))

    def rows() -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return order[engine.slices[next(at) % (engine.batches - 1)]]

    whole = median_ms(lambda: engine._pass(samples, rows(), d, rule, rows()))
    product = median_ms(lambda: engine._pass(samples, none, d[:0], rule, rows()))
    gradient = median_ms(lambda: engine._pass(samples, rows(), d, rule, none))
    return f"{optimizer:9} {batch_size:5} {step:8.2f} {whole:8.2f} {product:8.2f} {gradient:20.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 64, 128])
    parser.add_argument("--optimizers", nargs="+", default=["adam", "gd"])
    args = parser.parse_args()
    print(f"{cpu_model()}, {measure_floor(thread_count())}\n")
    print("optimizer batch     step     pass  product  gradient and update   (ms)")
    for batch_size in args.batch_sizes:
        for optimizer in args.optimizers:
            print(profile(batch_size, optimizer), flush=True)


if __name__ == "__main__":
    main()
