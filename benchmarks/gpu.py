"""Measures all that concerns speed on this machine's GPU, in at most nine minutes: tests, ceilings, ours, peers.

The tests marked `gpu` run first. Then the script measures the two ceilings, compares the loss curves of all contenders,
and times ours, PyTorch and JAX in turns at each batch size. Then it measures launches and kernels, which explain a
distance from the floor, and a call of `train()`. The results are written whole after every stage, and the table for the
README is printed last. The exit status is 0 where every stage was done.

    python -m benchmarks.gpu [--out gpu.json] [--quick] [--batch-sizes 8,64] [--resume] [--explore]
    python -m benchmarks.gpu --dry-run          says what would be done, and the floors; needs no GPU
    python -m benchmarks.gpu --table gpu.json   prints what was measured; needs no GPU
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.peers_gpu.deadline import DONE, Clock, run_stages
from benchmarks.peers_gpu.floor import epoch_bytes
from benchmarks.peers_gpu.row import Crew
from benchmarks.peers_gpu.stages import (
    BATCH_SIZES,
    DEADLINE,
    MACHINE,
    QUICK_BATCH_SIZES,
    QUICK_ROUNDS,
    ROUNDS,
    GpuPlan,
    plan_stages,
)
from benchmarks.peers_gpu.table import report, rows_of
from catopt_xp.commands.flags import counts, positive
from catopt_xp.io.files import write_whole

PROGRAM = "python -m benchmarks.gpu"
FORMAT = 1  # version of the file
ASSUMED = 4.3e12  # bytes per second, for the floors that --dry-run shows


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").splitlines()[0])
    flags.add_argument("--out", type=Path, default=Path("gpu.json"), help="the results (default: %(default)s)")
    flags.add_argument("--batch-sizes", type=counts, help=f"default: {','.join(map(str, BATCH_SIZES))}")
    flags.add_argument("--deadline", type=positive, default=DEADLINE / 60, help="minutes (default: %(default)g)")
    flags.add_argument("--quick", action="store_true", help="fewer batch sizes and rounds, no torch.compile")
    flags.add_argument("--skip-tests", action="store_true", help="do not run the tests marked gpu first")
    flags.add_argument("--resume", action="store_true", help="go on with the stages that are not done in --out")
    flags.add_argument("--explore", action="store_true", help="besides: cache sizes, TF32 peers, compute-sanitizer")
    flags.add_argument("--commit", help="of the code, for the results, where git does not tell")
    flags.add_argument("--dry-run", action="store_true", help="say what would be done, and the floors")
    flags.add_argument("--table", type=Path, metavar="FILE", help="print the results in a file")
    return flags


def plan_from(arguments: argparse.Namespace) -> GpuPlan:
    """The plan that the flags ask for."""
    sizes = QUICK_BATCH_SIZES if arguments.quick else BATCH_SIZES
    return GpuPlan(
        batch_sizes=tuple(arguments.batch_sizes or sizes),
        deadline=60 * arguments.deadline,
        rounds=QUICK_ROUNDS if arguments.quick else ROUNDS,
        tests=not arguments.skip_tests,
        compiled=not arguments.quick,
        explore=arguments.explore,
        commit=arguments.commit,
    )


def dry_run(plan: GpuPlan) -> None:
    """Prints the stages with their shares, and the floors by bytes."""
    with Crew(plan.device) as crew:
        for stage in plan_stages(plan, crew):
            print(f"{stage.name:14} at most {stage.seconds:4.0f} s")
    print(f"all within {plan.deadline:.0f} s; floors at {ASSUMED / 1e12:g} TB/s, uint8 on the device, ms per epoch:")
    for size in sorted(plan.batch_sizes):
        print(f"batch {size:5d}: {1e3 * epoch_bytes(plan.workload(size)) / ASSUMED:.3f}")


def earlier(file: Path, plan: GpuPlan) -> dict[str, Any]:
    """The results in a file, to resume. Raises ValueError where they are of another measurement, OSError."""
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if results.get("format") != FORMAT or results.get("settings") != plan.settings():
        raise ValueError(f"{file} was measured with other settings; give another --out, or leave --resume out")
    return results


def measure(plan: GpuPlan, file: Path, resume: bool) -> int:
    """Runs the stages of a plan, and returns the exit status."""
    clock = Clock(plan.deadline)
    new: dict[str, Any] = {"format": FORMAT, "settings": plan.settings(), "stages": {}}
    results = earlier(file, plan) if resume and file.exists() else new
    before = results["stages"].pop(MACHINE, {}).get("data", {})

    def write() -> None:
        results["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        results["rows"] = rows_of(results)
        text = json.dumps(results, indent=1) + "\n"
        write_whole(file, lambda stream: stream.write(text.encode()))

    def say(text: str) -> None:
        print(f"[{plan.deadline - clock.left():4.0f} s] {text}", flush=True)

    with Crew(plan.device) as crew:
        first, *others = plan_stages(plan, crew)
        run_stages([first], results, clock, lambda: None, lambda text: None)
        machine = results["stages"][MACHINE]
        if machine["status"] != DONE:
            print(f"{PROGRAM}: {machine['reason']}", file=sys.stderr)
            return 1
        for fact in ("gpu", "device", "code"):
            if before and before.get(fact) != machine["data"].get(fact):
                raise ValueError(f"{file} was measured with another {fact}; give another --out, or leave --resume out")
        write()
        say(f"{machine['data'].get('gpu', machine['data']['device'])}, at most {plan.deadline:.0f} s")
        run_stages(others, results, clock, write, say)
    print(f"\n{report(results)}\n\nwritten: {file}")
    return 0 if all(stage["status"] == DONE for stage in results["stages"].values()) else 1


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    try:
        if arguments.table is not None:
            print(report(json.loads(arguments.table.read_text(encoding="utf-8"))))
            return 0
        plan = plan_from(arguments)
        if arguments.dry_run:
            dry_run(plan)
            return 0
        return measure(plan, arguments.out, arguments.resume)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; --resume goes on from {arguments.out}", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    # So that the processes of the benchmark are ended with this one.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
