"""How the time of an epoch grows with features, samples, units of the first layer and batch size, in both engines.

Each line of the table is a network [n_x, H, 20, 20, 1] under Adam on m samples of uint8 noise; steps of both engines
are timed in turn and scaled to an epoch. The last columns say which engine `auto` takes, and how much longer it needs
than the faster of the two (1.00: it was right).

    python -m benchmarks.growth [--rounds 5] [--json FILE] [--plot FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import catopt_xp
from catopt_xp.backend.machine import cpu_model, thread_count
from catopt_xp.data.order import epoch_order
from catopt_xp.engines.choose import choose_engine
from catopt_xp.engines.plain import PlainEngine, Settings
from catopt_xp.io.files import write_whole

N_X, M, UNITS, BATCH = 224 * 224 * 3, 2000, 30, 64
SECONDS = 0.25  # of steps in a round, at least one
# One thing varies at a time from the reference workload; then corners where the choice of an engine is in doubt.
LINES = {
    "features": [(n_x, M, UNITS, BATCH) for n_x in (3072, 12288, 49152, 150528, 602112)],
    "samples": [(N_X, m, UNITS, BATCH) for m in (500, 2000, 8000, 16000)],
    "units": [(N_X, M, units, BATCH) for units in (8, 16, 30, 64, 128, 256)],
    "batch size": [(N_X, M, UNITS, batch) for batch in (1, 8, 64, 128, 512, 2000)],
    "corners": [
        (n_x, M, units, batch)
        for n_x in (64, 256, 784, 3072, 12288)
        for units in (8, 64, 256)
        for batch in (8, 64, 512, 2000)
    ]
    + [(N_X, M, units, batch) for units in (8, 256) for batch in (8, 512, 2000)]
    + [(784, M, units, batch) for units in (30, 128) for batch in (64, 512, 2000)]
    + [(3072, M, 128, batch) for batch in (64, 512, 2000)],
}


@dataclass
class Line:
    """One line of the table; seconds are of an epoch."""

    varies: str
    n_x: int
    m: int
    units: int
    batch_size: int
    plain: float
    panels: float
    auto: str
    auto_over_best: float


def build(name: str, X: np.ndarray, units: int, batch: int) -> PlainEngine:
    """An engine by name on the network of a line."""
    model = catopt_xp.DeepNetwork([X.shape[1], units, 20, 20, 1], ["relu", "relu", "relu", "sigmoid"])
    optimizer = catopt_xp.Adam(model.save(), 1e-5)
    targets = (np.arange(len(X)) % 2).astype(np.float32).reshape(1, -1)
    backend = catopt_xp.get_backend("cpu")
    return choose_engine(name, model, optimizer, X, targets, backend, Settings(batch))[0]


class Stepper:
    """Makes steps of an engine, epoch after epoch, and times them."""

    def __init__(self, engine: PlainEngine, m: int) -> None:
        self.engine, self.m, self.epoch = engine, m, 0
        self.steps = self._steps()
        next(self.steps)

    def _steps(self) -> Iterator[int]:
        while True:
            orders = [epoch_order(self.m, epoch) for epoch in (self.epoch, self.epoch + 1)]
            yield from self.engine.steps(self.epoch, orders[0], 0, orders[1])
            self.epoch += 1

    def seconds(self) -> float:
        """Seconds of a step, the mean over steps of at least SECONDS."""
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS:
            next(self.steps)
            count += 1
        return (time.perf_counter() - start) / count


def measure(varies: str, pixels: np.ndarray, shape: tuple[int, int, int, int], rounds: int) -> Line:
    """Both engines at one shape, in turn."""
    n_x, m, units, batch = shape
    X = pixels[: m * n_x].reshape(m, n_x)
    steppers = {name: Stepper(build(name, X, units, batch), m) for name in ("plain", "panels")}
    times: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(rounds):
        for name, stepper in steppers.items():
            times[name].append(stepper.seconds() * -(-m // batch))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    auto = build("auto", X, units, batch).name
    over_best = seconds[auto] / min(seconds.values())
    return Line(varies, *shape, seconds["plain"], seconds["panels"], auto, over_best)


def draw(lines: list[Line], file: Path) -> None:
    """Seconds per epoch against each thing that varies."""
    from matplotlib.figure import Figure

    axes_of = {"features": "n_x", "samples": "m", "units": "units", "batch size": "batch_size"}
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axis, (varies, name) in zip(figure.subplots(1, 4, sharey=True), axes_of.items(), strict=True):
        chosen = [line for line in lines if line.varies == varies]
        for engine in ("plain", "panels"):
            axis.loglog([getattr(x, name) for x in chosen], [getattr(x, engine) for x in chosen], "o-", label=engine)
        axis.set_xlabel(varies)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds per epoch")
    figure.axes[0].legend()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lines", default=",".join(LINES), help="which, by comma")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    shapes = [(varies, shape) for varies in args.lines.split(",") for shape in LINES[varies]]
    size = max(shape[0] * shape[1] for _, shape in shapes)
    pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    threads = thread_count()
    print(f"{cpu_model()}, {threads} threads; seconds per epoch, medians of {args.rounds} rounds in turn")
    print(f"{'varies':<11}{'n_x':>8}{'m':>7}{'H':>5}{'batch':>7}{'plain':>9}{'panels':>9}{'ratio':>7}  auto")
    lines = []
    for varies, shape in shapes:
        line = measure(varies, pixels, shape, args.rounds)
        lines.append(line)
        numbers = f"{line.plain:>9.3f}{line.panels:>9.3f}{line.plain / line.panels:>7.2f}"
        n_x, m, units, batch = shape
        told = f"{line.auto} {line.auto_over_best:.2f}"
        print(f"{varies:<11}{n_x:>8}{m:>7}{units:>5}{batch:>7}{numbers}  {told}", flush=True)
    if args.json:
        facts: dict[str, Any] = {"cpu": cpu_model(), "processors": os.cpu_count(), "threads": threads}
        facts |= {"version": catopt_xp.__version__, "numpy": np.__version__, "rounds": args.rounds}
        facts["lines"] = [asdict(line) for line in lines]
        text = json.dumps(facts, indent=1) + "\n"
        write_whole(args.json, lambda file: file.write(text.encode()))
    if args.plot:
        draw(lines, args.plot)


if __name__ == "__main__":
    main()
