"""Faults planted in the GPU engine's source: each one shows in the tests of the kernels, and here stands how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import CudaError, run_sanitized
from cuda_runs import CpuDevice, cuda_engine, error_ratios, planted, source_of
from panel_runs import Case, differences, run

from catopt_xp.engines.choose import BOUNDS
from catopt_xp.engines.cuda.engine import CudaEngine
from catopt_xp.engines.plain import PlainEngine

OBSTACLE = cuda_on_cpu.obstacle()
pytestmark = [pytest.mark.kernels, pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))]

Array = np.ndarray[Any, Any]

# Two groups of units, the second one shorter; a ragged tile; several chunks of samples, the last ones odd.
CORES = Case(
    n_x=300, units=(39, 4), outputs=2, m=42, batch_size=37, epochs=2, options={"weight_decay": 0.2, "l2": 0.01}
)
TENSOR = replace(CORES, n_x=600, dtype="float32", m=80, batch_size=73)
UNALIGNED = replace(TENSOR, n_x=607)
TALL = replace(CORES, n_x=128 * 40)  # more tiles than one thread adds
LARGE = replace(CORES, n_x=70, m=300, batch_size=290, epochs=1)  # more samples than are summed in registers
WHOLE = replace(LARGE, n_x=40, units=(8,), dtype="float32", m=600, batch_size=600, optimizer="momentum", options={})
LONG = replace(CORES, n_x=20, m=70, batch_size=2)  # more than a chunk of steps


@dataclass(frozen=True)
class Fault:
    """What to plant, the run that shows it, and how: "numbers" that differ, "nan", or "precision" that is lost."""

    case: Case
    old: str
    new: str
    shows: str = "numbers"
    block_order: str = "forward"


FAULTS: dict[str, Fault] = {
    # The first layer, on the ordinary cores.
    "a column too many is updated": Fault(CORES, "if (column < n_x && first", "if (column <= n_x && first"),
    "the last column is left out": Fault(CORES, "c * THREADS < n_x ? REAL(s", "c * THREADS < n_x - 1 ? REAL(s"),
    "the last sample of a chunk is left out": Fault(CORES, "inside = i < count &&", "inside = i < count - 1 &&"),
    "a unit of the next group is written": Fault(
        CORES, "i < count && u < GROUP", "i < count && u <= GROUP", "numbers", "backward"
    ),
    "d of the first chunk's samples": Fault(CORES, "d[(a + e / GROUP_PADDED)", "d[(e / GROUP_PADDED)"),
    "d of the samples in reverse": Fault(CORES, "d[(a + e / GROUP_PADDED)", "d[(a + count - 1 - e / GROUP_PADDED)"),
    "rows of the first chunk": Fault(CORES, "= rows[a + threadIdx.x]", "= rows[threadIdx.x]"),
    "a warp's sum is left out": Fault(CORES, "w + step < WARPS; w", "w + step < WARPS - 1; w"),
    "the moments change places": Fault(CORES, "rule(p, g[c][u], first, second", "rule(p, g[c][u], second, first"),
    "a moment is not kept": Fault(CORES, "if (MOMENTS > 1) moment1[at] = second;", ""),
    "a step without an update decays": Fault(
        CORES, "numbers, place.n > 0, first_unit", "numbers, true, first_unit", "nan"
    ),
    "the next batch is this one": Fault(CORES, "rows + place.next + a", "rows + place.now + a"),
    "as many products as this batch has": Fault(CORES, "a < place.following; a", "a < place.n; a"),
    "products lie as the batch is long": Fault(
        CORES, "(long long)tile * batch + a", "(long long)tile * place.following + a"
    ),
    "what waits is not there yet": Fault(
        LARGE, "add_up(whole, a > SUMMED, true, g)", "add_up(whole, true, true, g)", "nan"
    ),
    "what waits is forgotten": Fault(LARGE, "add_up(whole, true, false, g)", "add_up(whole, false, false, g)"),
    # The rule and its numbers.
    "the rate is the next number": Fault(CORES, "const Number rate = numbers[0]", "const Number rate = numbers[1]"),
    "one moment's number for the other": Fault(CORES, "Number alpha1 = numbers[2]", "Number alpha1 = numbers[4]"),
    "the decay's factor is l2": Fault(CORES, "parameter *= numbers[9]", "parameter *= numbers[8]"),
    "l2 is the rule's last number": Fault(CORES, "gradient += numbers[8] *", "gradient += numbers[7] *"),
    "rows of the table lie too near": Fault(CORES, "(long long)k * NUMBERS", "(long long)k * (NUMBERS - 1)"),
    "biases decay": Fault(CORES, "numbers, i < REST_WEIGHTS);", "numbers, i < REST);"),
    "the rest has W0's moments": Fault(CORES, "moment0 + behind", "moment0"),
    # Steps.
    "every step of a chunk is its first": Fault(LONG, "const int k = *base + ahead;", "const int k = *base;"),
    "a chunk ends a step too early": Fault(LONG, "*base += steps", "*base += steps - 1"),
    "losses of a chunk over those before": Fault(LONG, "losses + k,", "losses + ahead,"),
    # The rest of the network.
    "products without the pixels' scale": Fault(CORES, "sums[u] * SCALE +", "sums[u] +"),
    "d without the pixels' scale": Fault(CORES, "= D[e] * SCALE", "= D[e]"),
    "the last tile is left out": Fault(TALL, "first + t < tiles ?", "first + t < tiles - 1 ?"),
    "labels of the first block's samples": Fault(CORES, "rows[place.now + first + th", "rows[place.now + th"),
    "a short batch is taken for a long one": Fault(CORES, "place.n - first))", "batch - first))"),
    "a wrong derivative": Fault(CORES, "dA * (1 - a * a)", "dA * (1 - a)"),
    "weights backward as forward": Fault(
        CORES, "W_AT[k] + o * inputs + i] * after", "W_AT[k] + i * width + o] * after"
    ),
    "no gradient of biases": Fault(CORES, "before[s * inputs + i] : REAL(1))", "before[s * inputs + i] : REAL(0))"),
    "the last block's loss is left out": Fault(CORES, "b < blocks; b++) sum +=", "b < blocks - 1; b++) sum +="),
    # The first layer, on tensor cores.
    "two terms instead of three": Fault(TENSOR, "third = bf16_pair(low, high);", "third = 0;", "precision"),
    "sums go on within the tensor core": Fault(
        WHOLE, "mma(sum, terms[i], pixels(x[step]", "mma(c[mt][j], terms[i], pixels(x[step]", "precision"
    ),
    "pixels of a word in reverse": Fault(TENSOR, "0x7440 | j))", "0x7440 | (3 - j)))"),
    "the same four pixels twice": Fault(TENSOR, "starts[8 * q] + 16 * f", "starts[8 * q]"),
    "eight samples left out": Fault(TENSOR, "Starts*>(starts + 8 * q)", "Starts*>(starts)"),
    "a sample too many": Fault(TENSOR, "i < count && u < GROUP", "i <= count && u < GROUP", "nan"),
    "d of the first chunk, again": Fault(TENSOR, "d + (a / 16 + e / STEP_WORDS)", "d + (e / STEP_WORDS)"),
    "features of a tile change places": Fault(
        TENSOR, "rule(state.p[q], c[mt][q % 4][2 * half + q / 4]", "rule(state.p[q], c[mt][q % 4][2 * half + 1 - q / 4]"
    ),
    "moments of a tile change places": Fault(
        TENSOR, "state.first[q], state.second[q]", "state.second[q], state.first[q]"
    ),
    "half of the numbers are not stored": Fault(
        TENSOR, "*reinterpret_cast<Four*>(at + 16 * f) = ", "*reinterpret_cast<Four*>(at) = "
    ),
    "warps write over one another": Fault(TENSOR, "(warp * Z_CHUNK + lane % 4 * 2)", "(lane % 4 * 2)", "nan"),
    "d of one room for that of the other": Fault(TENSOR, "(D_CHUNK / 16 * STEP_WORDS) + lane", "0 + lane"),
    "d of a batch before where there is no sample": Fault(TENSOR, "(end - first) * GROUPS", "count * GROUPS"),
    "a ragged column too many": Fault(UNALIGNED, "inside[f] = int(left < 4 ?", "inside[f] = int(left < 3 ?"),
    "a ragged column too few": Fault(UNALIGNED, "if (q < inside[f]) at[", "if (q < inside[f] - 1) at["),
}


def outcome(
    case: Case, change: Callable[[str], str], block_order: str = "forward", thread_order: str = "forward"
) -> str:
    """How a changed source shows: "waits" for ever, "nan", "numbers" that differ, or not: ""."""
    engine: Any = case.engine(cuda_engine(CpuDevice(change, block_order, thread_order)))
    # Faults read and write beside what they should: there is room on either side.
    engine.samples = guarded(engine.samples)
    engine._buffers = {name: guarded(array) for name, array in engine._buffers.items()}
    try:
        ours = run(engine, case)
    except CudaError:
        return "waits"
    off = differences(ours, run(case.engine(PlainEngine), case))
    if np.isnan(list(off.values())).any():
        return "nan"
    return "numbers" if max(off.values()) > BOUNDS[case.dtype] else ""


def guarded(array: Array) -> Array:
    """The same between two rows of its largest number."""
    held = np.full((array.shape[0] + 2, *array.shape[1:]), array.max(), array.dtype)
    held[1:-1] = array
    return held[1:-1]


@pytest.mark.parametrize("case", [CORES, TENSOR, UNALIGNED, TALL, LARGE, LONG])
def test_without_a_fault_nothing_shows(case: Case) -> None:
    for order in ("forward", "shuffled"):
        assert outcome(case, str, order, order) == ""


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_shows(name: str) -> None:
    fault = FAULTS[name]
    change = planted((fault.old, fault.new))
    if fault.shows == "precision":
        assert max(error_ratios(cuda_engine(CpuDevice(change)), fault.case).values()) > 2
    else:
        assert outcome(fault.case, change, fault.block_order) == fault.shows


# --- barriers -----------------------------------------------------------------------------------------------------


def barriers(case: Case) -> list[tuple[int, str]]:
    """Where the barriers of a source are, each with the line behind it."""
    source, found = source_of(CudaEngine, case), []
    for line, text in enumerate(source.splitlines(keepends=True)):
        if "__syncthreads();" in text:
            found.append((line, text))
    return found


def without_line(line: int, source: str) -> str:
    lines = source.splitlines(keepends=True)
    assert "__syncthreads();" in lines[line]
    lines[line] = lines[line].replace("__syncthreads();", "")
    return "".join(lines)


def own_barriers() -> list[tuple[str, int]]:
    """Those of either source of products, and once those of the text that they share."""
    counts = {name: len(barriers(case)) for name, case in (("cores", CORES), ("tensor", TENSOR))}
    shared = 7  # in `tree_sum` and `middle`, behind the products
    return [("cores", k) for k in range(counts["cores"])] + [("tensor", k) for k in range(counts["tensor"] - shared)]


def test_the_barriers_are_counted() -> None:
    counts = [len(barriers(case)) for case in (CORES, TENSOR)]
    assert counts == [14, 11]
    assert [text for _, text in barriers(CORES)[-7:]] == [text for _, text in barriers(TENSOR)[-7:]]


@pytest.mark.parametrize(("products", "number"), own_barriers())
def test_every_barrier_that_is_left_out_shows(products: str, number: int) -> None:
    """With threads forward or backward, and few tiles or many: what is read too early is NaN or another number."""
    cases = [CORES, TALL] if products == "cores" else [TENSOR]
    line, _ = barriers(cases[0])[number]
    tried = [(case, order) for case in cases for order in ("forward", "backward")]
    found = (outcome(case, partial(without_line, line), thread_order=order) for case, order in tried)
    assert any(shown in ("nan", "numbers") for shown in found)


# --- bounds -------------------------------------------------------------------------------------------------------

# What is read beyond an array and has no effect shows to a sanitizer alone.
BEYOND: dict[str, Fault] = {
    name: Fault(replace(case, m=9, batch_size=9, epochs=1), old, new, "")
    for name, case, old, new in (
        ("a column too many is read", CORES, "c * THREADS < n_x ? REAL(s", "c * THREADS <= n_x ? REAL(s"),
        ("four pixels too many are read", TENSOR, "return inside > 0 ? *", "return inside > -4 ? *"),
        ("a parameter too many is read", CORES, "i < REST; i += blockDim.x", "i <= REST; i += blockDim.x"),
    )
}

SANITIZED = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from cuda_runs import CpuDevice, cuda_engine, planted
from panel_runs import run
from test_cuda_faults import BEYOND
for name, fault in BEYOND.items():
    print(f"planted: {{name}}", file=sys.stderr, flush=True)
    run(fault.case.engine(cuda_engine(CpuDevice(planted((fault.old, fault.new)), sanitize=True))), fault.case)
"""


@pytest.mark.parametrize("name", BEYOND)
def test_an_index_out_of_bounds_may_change_no_number(name: str) -> None:
    assert outcome(BEYOND[name].case, planted((BEYOND[name].old, BEYOND[name].new))) == ""


def test_to_a_sanitizer_it_shows() -> None:
    told = run_sanitized(SANITIZED, go_on=True).stderr.split("planted: ")[1:]
    assert [part.splitlines()[0] for part in told] == list(BEYOND)
    for part in told:
        assert "AddressSanitizer: heap-buffer-overflow" in part
