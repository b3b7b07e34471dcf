"""What ranks cost and gain: measured with one, two and four of them here, and reckoned up to 1,024.

Each rank runs on one thread. A model of a step is fitted to one rank's times: the rest of the network, which every rank
computes alike, and the panels' work, by features and samples; and of an exchange to two ranks' times of that alone. The
model is checked against two and four ranks' steps, then reckons with what InfiniBand and plain Ethernet are sold for,
beside the same network trained data-parallel: a share of each batch on every rank, the whole first layer's gradient
summed by an allreduce. Needs mpi4py and an MPI library with its mpiexec.

    python -m benchmarks.scaling [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from catopt_xp.backend.machine import cpu_model, thread_count
from catopt_xp.backend.ranks import Ranks
from catopt_xp.backend.threads import limited_threads
from catopt_xp.backend.xp import NumpyBackend
from catopt_xp.engines.choose import choose_engine
from catopt_xp.engines.panels import PANEL
from catopt_xp.engines.plain import PlainEngine, Settings
from catopt_xp.engines.ranks import PanelShares
from catopt_xp.io.files import write_whole
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.rules import Adam

UNITS, HIDDEN, M = 30, (30, 20, 20), 2000
N_X, SMALL = 224 * 224 * 3, PANEL
BATCHES = (8, 64)
ROUNDS, TURNS = 5, 2
BYTES = 4  # of a float32
BLOCK_UNITS = 32  # units of a block of sums, padded
NETWORKS = {"InfiniBand, 200 Gbit/s": (2e-6, 25e9), "Ethernet, 10 Gbit/s": (30e-6, 1.25e9)}  # seconds, bytes a second
LARGE = 1024 * PANEL  # features of the reckoned set, a panel for each of 1,024 ranks
RECKONED = (1, 2, 4, 16, 64, 256, 1024)


# --- measuring, on every rank ---------------------------------------------------------------------------------------


def measure(n_x: int, batch_size: int) -> None:
    """Times epochs over noise on all ranks that were started together; the first prints JSON."""
    from mpi4py import MPI

    ranks = Ranks(MPI.COMM_WORLD)
    share = PanelShares(n_x, ranks.rank, ranks.size).columns
    rng = np.random.default_rng(ranks.rank)
    samples = rng.integers(0, 256, (M, share.stop - share.start), dtype=np.uint8)
    targets = np.random.default_rng(0).integers(0, 2, (1, M)).astype(np.float32)
    model = DeepNetwork([n_x, *HIDDEN, 1], ["relu", "relu", "relu", "sigmoid"])
    parts = model, Adam(model.save(), 1e-5), samples, targets, NumpyBackend(), Settings(batch_size)
    with limited_threads(1):
        engine, _ = choose_engine("panels", *parts, ranks=ranks)
        order = np.arange(M)
        run_epoch(engine, order)
        seconds, sent = [], ranks.sent_bytes
        for _ in range(ROUNDS):
            ranks.any(False)  # all begin together
            start = time.perf_counter()
            run_epoch(engine, order)
            seconds.append(time.perf_counter() - start)
        steps = ROUNDS * engine.batches
        sent_a_step = (ranks.sent_bytes - sent) / steps
        exchange = time_exchange(ranks, round(sent_a_step) // BYTES)
    if ranks.rank == 0:
        found = {"seconds": statistics.median(seconds), "sent_a_step": sent_a_step, "exchange": exchange}
        print(json.dumps(found | {"steps": engine.batches}))


def run_epoch(engine: PlainEngine, order: np.ndarray[Any, Any]) -> None:
    for _ in engine.steps(0, order, following=order):
        pass


def time_exchange(ranks: Ranks, count: int) -> float:
    """Seconds of one exchange of so many numbers from each rank, and nothing else."""
    if ranks.size == 1:
        return 0.0
    own, repeats = np.zeros(count, dtype=np.float32), 300
    counts = ranks.comm.allgather(count)  # type: ignore[union-attr]  # several ranks have one
    for _ in range(20):
        ranks.gather(own, counts)
    start = time.perf_counter()
    for _ in range(repeats):
        ranks.gather(own, counts)
    return (time.perf_counter() - start) / repeats


def on_ranks(count: int, n_x: int, batch_size: int) -> dict[str, Any]:
    """What `measure` finds on so many ranks."""
    mpiexec = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if mpiexec is None:
        sys.exit("scaling.py: no mpiexec beside this Python or on the path: pip install mpich mpi4py")
    words = [sys.executable, "-m", "benchmarks.scaling", "--measure", str(n_x), str(batch_size)]
    done = subprocess.run([mpiexec, "-n", str(count), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"scaling.py: {count} ranks failed: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def best_of(turns: int, *asked: int) -> dict[str, Any]:
    """The fastest of some turns: other programs only ever slow them down."""
    return min((on_ranks(*asked) for _ in range(turns)), key=lambda found: found["seconds"])


# --- the model ------------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """Seconds of a step: `rest + rest_sample * B` and, for each feature, `state + sample * B`."""

    rest: float
    rest_sample: float
    state: float
    sample: float

    @classmethod
    def fitted(cls, steps: dict[tuple[int, int], float]) -> Model:
        """To the seconds of a step of one rank, by features and batch size: two of either."""
        (b0, b1), n = BATCHES, N_X - SMALL
        slopes = [(steps[N_X, b] - steps[SMALL, b]) / n for b in BATCHES]
        sample = (slopes[1] - slopes[0]) / (b1 - b0)
        state = slopes[0] - sample * b0
        rests = [steps[SMALL, b] - SMALL * (state + sample * b) for b in BATCHES]
        rest_sample = max(0.0, (rests[1] - rests[0]) / (b1 - b0))
        return cls(max(0.0, rests[0] - rest_sample * b0), rest_sample, state, sample)

    def panels(self, n_x: int, batch_size: int, ranks: int, latency: float, bandwidth: float) -> float:
        """A step of ranks that own panels."""
        own = self.rest + self.rest_sample * batch_size + n_x / ranks * (self.state + self.sample * batch_size)
        return own + gather_seconds(ranks, block_bytes(batch_size), latency, bandwidth)

    def data_parallel(self, n_x: int, batch_size: int, ranks: int, latency: float, bandwidth: float) -> float:
        """A step of ranks that share the batch: each reads and writes the whole state, and gradients are summed."""
        here = batch_size / min(ranks, batch_size)
        own = self.rest + self.rest_sample * here + n_x * (self.state + self.sample * here)
        return own + reduce_seconds(ranks, UNITS * n_x * BYTES, latency, bandwidth)


def block_bytes(batch_size: int) -> int:
    """What a rank with a power of two of panels sends at each step: one block, and whether to stop."""
    return batch_size * BLOCK_UNITS * BYTES + BYTES


def gather_seconds(ranks: int, block: float, latency: float, bandwidth: float) -> float:
    """An allgather by doubling: log2(ranks) rounds, and everyone's blocks pass by everyone.

    >>> gather_seconds(1, 8192, 1e-6, 1e9)
    0.0
    """
    return math.ceil(math.log2(ranks)) * latency + (ranks - 1) * block / bandwidth if ranks > 1 else 0.0


def reduce_seconds(ranks: int, size: float, latency: float, bandwidth: float) -> float:
    """An allreduce as a reduce-scatter and an allgather: twice (ranks - 1)/ranks of the array.

    >>> reduce_seconds(2, 1e9, 0.0, 1e9)
    1.0
    """
    return 2 * (math.ceil(math.log2(ranks)) * latency + (ranks - 1) / ranks * size / bandwidth) if ranks > 1 else 0.0


# --- tables ---------------------------------------------------------------------------------------------------------


def check(model: Model, measured: dict[tuple[int, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Measured and reckoned seconds of an epoch of the reference network, by ranks and batch size."""
    lines = []
    for (ranks, batch_size), found in measured.items():
        step = found["seconds"] / found["steps"]
        # More ranks than processors take turns.
        turns = max(1.0, ranks / thread_count())
        own = model.panels(N_X, batch_size, ranks, 0.0, math.inf) * turns
        lines.append(
            {
                "ranks": ranks,
                "batch_size": batch_size,
                "seconds": found["seconds"],
                "reckoned": (own + found["exchange"]) * found["steps"],
                "sent_a_step": found["sent_a_step"],
                "exchange_share": found["exchange"] / step,
                "gradient_over_sent": UNITS * N_X * BYTES / found["sent_a_step"] if found["sent_a_step"] else None,
            }
        )
    one = {line["batch_size"]: line["seconds"] for line in lines if line["ranks"] == 1}
    for line in lines:
        line["speed_up"] = one[line["batch_size"]] / line["seconds"]
    return lines


def reckon(model: Model, batch_size: int = 64) -> list[dict[str, Any]]:
    """Steps and epochs of a set of 1,024 panels over up to 1,024 ranks."""
    lines = []
    for name, (latency, bandwidth) in NETWORKS.items():
        for ranks in RECKONED:
            panels = model.panels(LARGE, batch_size, ranks, latency, bandwidth)
            lines.append(
                {
                    "network": name,
                    "ranks": ranks,
                    "panels_ms": 1e3 * panels,
                    "data_parallel_ms": 1e3 * model.data_parallel(LARGE, batch_size, ranks, latency, bandwidth),
                    "received_KB": (ranks - 1) * block_bytes(batch_size) / 1e3,
                    "reduced_MB": 2 * (ranks - 1) / ranks * UNITS * LARGE * BYTES / 1e6,
                    "epoch_of_a_million_hours": panels * 1e6 / batch_size / 3600,
                    "epoch_of_a_billion_days": panels * 1e9 / batch_size / 86400,
                    "set_of_a_billion_TB_a_rank": 1e9 * LARGE / ranks / 1e12,
                }
            )
    return lines


def show(checked: list[dict[str, Any]], reckoned: list[dict[str, Any]]) -> None:
    print(f"\n{N_X} features, {M} samples, one thread a rank; seconds of an epoch, the better of {TURNS} medians\n")
    print("ranks batch  measured  reckoned  speed-up  sent/step, KB  gradient/sent  exchange")
    for line in checked:
        times = "" if line["gradient_over_sent"] is None else f"{line['gradient_over_sent']:.0f}"
        print(
            f"{line['ranks']:5} {line['batch_size']:5} {line['seconds']:9.3f} {line['reckoned']:9.3f}"
            f" {line['speed_up']:9.2f} {line['sent_a_step'] / 1e3:14.1f} {times:>14} {line['exchange_share']:9.1%}"
        )
    print(f"\nreckoned: {LARGE} features, batch 64; ms of a step\n")
    print("network                  ranks   panels  allreduce  received, KB  reduced, MB  days, 10^9 images  TB a rank")
    for line in reckoned:
        print(
            f"{line['network']:24} {line['ranks']:5} {line['panels_ms']:8.2f} {line['data_parallel_ms']:10.2f}"
            f" {line['received_KB']:13.1f} {line['reduced_MB']:12.1f} {line['epoch_of_a_billion_days']:18.1f}"
            f" {line['set_of_a_billion_TB_a_rank']:10.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--measure", type=int, nargs=2, metavar=("N_X", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return
    measured = {(ranks, batch): best_of(TURNS, ranks, N_X, batch) for batch in BATCHES for ranks in (1, 2, 4)}
    alone = {(N_X, batch): measured[1, batch] for batch in BATCHES}
    alone |= {(SMALL, batch): best_of(TURNS, 1, SMALL, batch) for batch in BATCHES}
    model = Model.fitted({key: found["seconds"] / found["steps"] for key, found in alone.items()})
    checked, reckoned = check(model, measured), reckon(model)
    show(checked, reckoned)
    if args.json:
        facts = {"cpu": cpu_model(), "processors": thread_count(), "numpy": np.__version__, "model": asdict(model)}
        text = json.dumps(facts | {"measured": checked, "reckoned": reckoned}, indent=1)
        write_whole(args.json, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
