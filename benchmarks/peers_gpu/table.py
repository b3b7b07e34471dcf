"""The results of the GPU benchmark as rows and as text: the table for the README, and what explains it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from benchmarks.peers_gpu.contenders import COLUMNS, GPU_CONTENDERS, PEERS
from benchmarks.peers_gpu.deadline import DONE
from benchmarks.peers_gpu.floor import Ceilings
from benchmarks.peers_gpu.row import FIRST
from benchmarks.peers_gpu.stages import MACHINE
from catopt_xp.commands.bench import Workload

KINDS = ("batch", "compiled", "explored")  # first words of the names of stages that time contenders
HEADS = ("batch size", FIRST, "floor", "of the floor", *COLUMNS[1:], "best peer")
NONE = "–"

Results = Mapping[str, Any]


def rows_of(results: Results) -> list[dict[str, Any]]:
    """For each batch size the floor (None where no ceiling was measured), everyone's times, and the best peer.

    A contender's `ratio` is its time over the panel engine's in the same stage, `of_floor` its time over the floor's.
    """
    stages, fields = results["stages"], results["settings"]["workload"]
    ceilings = Ceilings.from_json(data_of(results, "ceilings"))
    rows = []
    for size in sorted({int(name.split()[1]) for name in stages if name.split()[0] in KINDS}):
        work = Workload(**{**fields, "hidden": tuple(fields["hidden"]), "batch_size": min(size, fields["m"])})
        floor = None if ceilings is None else ceilings.floor(work)
        timed: dict[str, Any] = {}
        for kind in KINDS:
            found = data_of(results, f"{kind} {size}").get("contenders", {})
            fresh = {name: x for name, x in found.items() if "seconds_per_epoch" in x and name not in timed}
            timed |= {name: dict(x) for name, x in fresh.items()}
        for x in timed.values():
            x["of_floor"] = None if floor is None else x["seconds_per_epoch"] / floor["seconds"]
        row = {"batch_size": work.batch_size, "steps": work.batches, "floor": floor, "contenders": timed}
        rows.append(row | {"best_peer": _best_peer(timed)})
    return rows


def data_of(results: Results, stage: str) -> dict[str, Any]:
    """What a stage found, also where it did not reach its end; empty where it has not begun."""
    data: dict[str, Any] = results["stages"].get(stage, {}).get("data", {})
    return data


def _best_peer(timed: Mapping[str, Any]) -> dict[str, Any] | None:
    peers = {
        name: x["ratio"]
        for name, x in timed.items()
        if "ratio" in x and GPU_CONTENDERS[name].side == PEERS and not GPU_CONTENDERS[name].rounded
    }
    if not peers:
        return None
    best = min(peers, key=lambda name: peers[name])
    return {"name": best, "ratio": peers[best]}


# --- text -------------------------------------------------------------------------------------------------------------


def report(results: Results) -> str:
    """The whole report, with the table last."""
    blocks = [_faults(results), _measured(results), _where(results), table(results).splitlines()]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def table(results: Results) -> str:
    """The table in Markdown; empty where nothing was timed."""
    rows = rows_of(results)
    if not any(row["contenders"] for row in rows):
        return ""
    cells: list[Iterable[str]] = [HEADS, ["---"] * len(HEADS), *map(_cells, rows)]
    return "\n".join([_headline(results), "", *(f"| {' | '.join(line)} |" for line in cells)])


def _headline(results: Results) -> str:
    machine, work = data_of(results, MACHINE), results["settings"]["workload"]
    versions = machine.get("versions", {})
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("cupy", "torch", "jax") if name in versions)
    layers = "-".join(map(str, (work["n_x"], *work["hidden"], 1)))
    return (
        f"Milliseconds per epoch of {layers} on {work['m']} samples, {work['optimizer']}, float32, on one"
        f" {machine.get('gpu', machine.get('device', 'unknown device'))} (CUDA {machine.get('cuda_runtime', NONE)};"
        f" {libraries}); medians of turns, in brackets the ratio to panels"
    )


def _cells(row: Mapping[str, Any]) -> Iterator[str]:
    """The cells of a batch size, in the order of HEADS."""
    timed, floor, best = row["contenders"], row["floor"], row["best_peer"]
    first = timed.get(FIRST, {})
    yield str(row["batch_size"])
    yield f"**{ms(first['seconds_per_epoch'])}**" if first else NONE
    yield ms(floor["seconds"]) if floor else NONE
    yield f"{first['of_floor']:.2f}×" if first and floor else NONE
    for column in COLUMNS[1:]:
        entries = [
            x for name, x in timed.items() if GPU_CONTENDERS[name].column == column and not GPU_CONTENDERS[name].rounded
        ]
        fastest = min(entries, key=lambda x: x["seconds_per_epoch"], default=None)
        yield NONE if fastest is None else _cell(fastest)
    yield NONE if best is None else f"{best['ratio']:.1f}× ({best['name']})"


def _cell(found: Mapping[str, Any]) -> str:
    ratio = f" ({found['ratio']:.1f}×)" if "ratio" in found else ""
    return f"{ms(found['seconds_per_epoch'])}{ratio}"


def ms(seconds: float) -> str:
    """Seconds as milliseconds, with three digits.

    >>> ms(0.012345), ms(0.1234), ms(0.00016789)
    ('12.3', '123', '0.168')
    """
    value = 1e3 * seconds
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}" if value >= 1 else f"{value:.3f}"


def us(seconds: float) -> str:
    """Seconds as microseconds, with one decimal.

    >>> us(1.234e-05)
    '12.3 us'
    """
    return f"{1e6 * seconds:.1f} us"


def _faults(results: Results) -> list[str]:
    """The stages that did not reach their end, and the contenders that were not timed."""
    lines = []
    for name, stage in results["stages"].items():
        if stage["status"] != DONE:
            lines.append(f"{name}: {stage['status']}: {stage.get('reason', 'no reason is known')}")
        for what in ("absent", "failed"):
            lines += [f"{name}: {who}: {why}" for who, why in stage["data"].get(what, {}).items()]
    return lines


def _measured(results: Results) -> list[str]:
    """The ceilings, and the times that a user waits."""
    lines, ceilings = [], data_of(results, "ceilings")
    tests = data_of(results, "tests")
    if "summary" in tests:
        lines.append(f"tests: {tests['summary']}")
    if "bandwidth" in ceilings:
        rates = ", ".join(f"{name} {rate / 1e12:.2f} TB/s" for name, rate in ceilings["bandwidth"].items())
        lines.append(f"memory: {rates}")
    products = [f"{kind} {ceilings[kind] / 1e12:.0f} TFLOP/s" for kind in ("float32", "float16") if kind in ceilings]
    lines += [f"products: {', '.join(products)}"] if products else []
    for name, laps in data_of(results, "start-up").items():
        told = ", ".join(f"{lap} {seconds:.2f}" for lap, seconds in laps.items())
        lines.append(f"first epochs, cache {name}: {sum(laps.values()):.2f} s ({told})")
    trained = data_of(results, "train")
    if trained:
        stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in trained["stages"].items())
        lines.append(
            f"train(), {trained['epochs']} epochs on {trained['device']}, {trained['engine']}: {trained['wall']:.2f} s"
            f" ({stages}); an epoch {ms(trained['epoch'])} ms"
        )
    return lines


def _where(results: Results) -> list[str]:
    """Where the time of the panel engine's steps goes."""
    lines, launches = [], data_of(results, "kernels").get("launches")
    if launches is not None:
        lines.append(
            f"a launch: host {us(launches['host'])}, GPU {us(launches['device'])}, in a graph {us(launches['node'])}"
        )
    for size, epoch in data_of(results, "kernels").get("plain", {}).items():
        lines.append(
            f"plain, batch {size}: an epoch is queued in {ms(epoch['host'])} ms, done in {ms(epoch['device'])}"
        )
    bandwidth = data_of(results, "ceilings").get("bandwidth", {})
    ceiling = max((bandwidth[way] for way in ("copy", "in_place") if way in bandwidth), default=None)
    for stage in ("kernels", "sizes"):
        lines += [_step_line(step, ceiling) for step in data_of(results, stage).get("steps", [])]
    return lines


def _step_line(step: Mapping[str, Any], ceiling: float | None) -> str:
    kernels = ", ".join(f"{name} {us(kernel['seconds'])}" for name, kernel in step["kernels"].items())
    share = "" if ceiling is None else f" ({step['stream_bandwidth'] / ceiling:.0%} of the ceiling)"
    epoch, memory = step["epoch"], [f"{state['used'] / 1e6:.1f}" for state in step["memory"]]
    return (
        f"{step['name']}, batch {step['batch_size']}, {step['n_x']} features: step {us(step['step'])} ({kernels});"
        f" stream {step['stream_bandwidth'] / 1e12:.2f} TB/s{share}; epoch wall {ms(epoch['wall'])} ms,"
        f" GPU {ms(epoch['device'])}, host queues {ms(epoch['host_queue'])}, waits {ms(epoch['host_wait'])};"
        f" MB in use {' -> '.join(memory)}"
    )


__all__ = ["data_of", "ms", "report", "rows_of", "table", "us"]
