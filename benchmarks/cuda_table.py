"""What NVRTC makes of the GPU engine's kernels for the reference network, and what their bytes would take: a table.

Registers, spilled bytes and shared memory are the compiler's word. Times are predicted, not measured: bytes over a
bandwidth, nothing for a launch, for what waits on something, or for what is computed meanwhile. It needs NVRTC and CuPy
(`pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12`), and no GPU.

    python -m benchmarks.cuda_table [--architecture 90] [--bandwidth 4.3] [--cores]
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from catopt_xp.data.order import batches
from catopt_xp.engines.cuda.launches import MIDDLE_THREADS, StepGeometry
from catopt_xp.engines.cuda.source import source
from catopt_xp.optim.rules import Adam

NEURONS, ACTIVATIONS, M = (150528, 30, 20, 20, 1), ("relu", "relu", "relu", "sigmoid"), 2000
OPTIMIZER, BATCH_SIZES = Adam, (8, 64, 128, 2000)

# What CuPy passes itself (cupy/cuda/compiler.py), what the engine asks for, and a log that counts registers.
OPTIONS = ("--std=c++17", "-ftz=true", "--device-as-default-execution-space", "--ptxas-options=-v")
LOGGED = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of a kernel: registers of a thread, bytes spilled, bytes of fixed shared memory."""

    registers: int
    spilled: int
    shared: int


def obstacle() -> str | None:
    """Why nothing can be compiled here, in a line, or None."""
    try:
        _nvrtc().getVersion()
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        return f"NVRTC cannot be used ({reason}): pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12"
    return None


def knows(architecture: int) -> bool:
    """Whether this NVRTC compiles for an architecture."""
    return architecture in _nvrtc().getSupportedArchs()


def compiled(text: str, architecture: int, *options: str) -> tuple[dict[str, Kernel], bytes]:
    """The kernels of a CUDA source by name, and its machine code, for an architecture such as 90 (sm_90).

    Raises RuntimeError with the compiler's messages where it refuses the source.
    """
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(text, "source.cu", [], [])
    try:
        nvrtc.compileProgram(program, [*OPTIONS, f"-arch=sm_{architecture}", *options])
        return logged(nvrtc.getProgramLog(program)), nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(nvrtc.getProgramLog(program)) from error
    finally:
        nvrtc.destroyProgram(program)


def logged(log: str) -> dict[str, Kernel]:
    """What a compiler's log says of each kernel."""
    found = {}
    for name, stores, loads, registers, used in LOGGED.findall(log):
        shared = re.search(r"(\d+) bytes smem", used)
        found[name] = Kernel(int(registers), int(stores) + int(loads), int(shared[1]) if shared else 0)
    return found


def _nvrtc() -> Any:
    from cupy.cuda import nvrtc

    return nvrtc


@dataclass(frozen=True)
class Traffic:
    """Bytes of the reference network's kernels in a step with so many samples, and so many in the one that follows."""

    geometry: StepGeometry
    n: int
    following: int

    @property
    def _sums(self) -> int:
        """Of a sample's products, one set a tile."""
        return self.geometry.tiles.count * self.geometry.tiles.units * self.geometry.itemsize

    @property
    def floor(self) -> int:
        """Weights and moments read and written, the pixels of both batches read."""
        tiles, arrays = self.geometry.tiles, 1 + len(OPTIMIZER.moment_names)
        pixels = (self.n + self.following) * tiles.n_x * np.dtype(self.geometry.sample_dtype).itemsize
        return 2 * arrays * tiles.n_x * tiles.units * self.geometry.itemsize + pixels

    @property
    def stream(self) -> int:
        return self.floor + self.following * self._sums

    @property
    def middle(self) -> int:
        return self.n * self._sums


def epoch(geometry: StepGeometry) -> list[Traffic]:
    """The steps of an epoch; the first batch of the next one follows on the last."""
    lengths = [part.stop - part.start for part in batches(M, geometry.batch_size)]
    return [Traffic(geometry, n, after) for n, after in zip(lengths, [*lengths[1:], lengths[0]], strict=True)]


def table(architecture: int, bandwidth: float, tensor_cores: bool = True) -> str:
    """The table in Markdown; `bandwidth`: in bytes a second."""
    lines = [
        "| batch | kernel | blocks x threads | registers | spilled | shared, KB | MB/step | us/step | ms/epoch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size in BATCH_SIZES:
        geometry = StepGeometry(NEURONS, size, "float32", "uint8", tensor_cores)
        kernels, _ = compiled(source(geometry, ACTIVATIONS, OPTIMIZER), architecture)
        stream, steps = geometry.stream, epoch(geometry)
        blocks = stream.grid[0] * stream.grid[1]
        for name, grid, shared in (
            ("stream", f"{blocks} x {stream.threads}", stream.shared),
            ("middle", f"{geometry.middle_blocks} x {MIDDLE_THREADS}", geometry.middle_shared),
        ):
            moved = [getattr(step, name) for step in steps]
            made = kernels[name]
            size_and_time = (
                f"{moved[0] / 1e6:.1f} | {moved[0] / bandwidth * 1e6:.1f} | {sum(moved) / bandwidth * 1e3:.2f}"
            )
            used = f"{made.registers} | {made.spilled} | {(shared + made.shared) / 1024:.1f}"
            lines.append(f"| {size} | {name} | {grid} | {used} | {size_and_time} |")
        floor = [step.floor for step in steps]
        told = f"{floor[0] / 1e6:.1f} | {floor[0] / bandwidth * 1e6:.1f} | {sum(floor) / bandwidth * 1e3:.2f}"
        lines.append(f"| {size} | floor | | | | | {told} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architecture", type=int, default=90, help="compute capability (default: %(default)s)")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB a second (default: %(default)s)")
    parser.add_argument("--cores", action="store_true", help="the kernels without tensor cores")
    arguments = parser.parse_args()
    missing = obstacle()
    if missing is not None:
        print(f"benchmarks/cuda_table.py: {missing}", file=sys.stderr)
        return 1
    print(table(arguments.architecture, arguments.bandwidth * 1e12, not arguments.cores))
    machine = f"sm_{arguments.architecture}, {arguments.bandwidth:g} TB/s"
    print(f"\n{machine}. Times are predicted from bytes, not measured; the floor is one pass over weights and moments.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
