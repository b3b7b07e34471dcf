"""CUDA sources compiled by g++ and executed on the CPU: what tests of a kernel need where there is no GPU.

A block's threads are fibers, blocks run one after the other, in an order that the test chooses (`cuda_on_cpu.h`).
That shows wrong indices, missing barriers and sums whose order depends on who comes first; it cannot show races within
a warp, faults of the memory model, the bodies of inline PTX, or speed.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HEADER = Path(__file__).with_name("cuda_on_cpu.h")
ORDERS = ("forward", "backward", "shuffled")
CODE_KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(')
FLAGS = [
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-Wl,-Bsymbolic",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused",
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]


class CudaError(Exception):
    """A source that does not compile, or a launch whose threads wait for one another for ever."""


def obstacle() -> str | None:
    """Why nothing can be executed here, or None."""
    if shutil.which("g++") is None:
        return "g++ is not installed: CUDA sources cannot be executed on the CPU"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the fibers that stand for CUDA threads are written for x86-64, this is {platform.machine()}"
    return None


class Library:
    """A compiled source. `block_order`, `thread_order`: one of ORDERS; `seed`: of the shuffled ones."""

    def __init__(self, source: str, folder: Path, sanitize: bool = False) -> None:
        names = CODE_KERNEL.findall(source)
        table = ", ".join(f'{{"{name}", cuda_on_cpu::invoker({name})}}' for name in names)
        face = f"""
static const std::map<std::string, std::function<void(void**)>> kernels = {{{table}}};
extern "C" const char* launch_on_cpu(const char* name, const unsigned* grid, const unsigned* block, void** arguments,
                                     size_t shared_bytes, int block_order, int thread_order, unsigned seed) {{
    return cuda_on_cpu::launch(kernels.at(name), grid, block, arguments, shared_bytes, block_order, thread_order, seed);
}}
"""
        text = f'#include "{HEADER}"\n#line 1 "source.cu"\n{source}\n{face}'
        flags = FLAGS + (["-O1", *SANITIZERS] if sanitize else ["-O2"])
        stamp = hashlib.sha256((text + HEADER.read_text() + " ".join(flags)).encode()).hexdigest()[:16]
        file = folder / f"{stamp}.so"
        if not file.exists():
            code = folder / f"{stamp}.cpp"
            code.write_text(text)
            fresh = file.with_suffix(f".{os.getpid()}")
            done = subprocess.run(["g++", *flags, str(code), "-o", str(fresh)], capture_output=True, text=True)
            if done.returncode:
                raise CudaError(f"g++ does not compile this:\n{done.stderr}")
            os.replace(fresh, file)
        self.names = names
        self._launch = ctypes.CDLL(str(file)).launch_on_cpu
        self._launch.restype = ctypes.c_char_p
        self.block_order, self.thread_order, self.seed = "forward", "forward", 0

    def launch(
        self, name: str, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], shared_bytes: int = 0
    ) -> None:
        """Runs a kernel to its end. Arguments: arrays in C order (a pointer each), NumPy or Python numbers.

        Raises CudaError, naming kernel and block, where threads wait for others that never come.
        """
        if name not in self.names:
            raise CudaError(f"{name} is no kernel of this source; it has {', '.join(self.names)}")
        values = [_as_c(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        orders = (ORDERS.index(order) for order in (self.block_order, self.thread_order))
        error = self._launch(
            name.encode(), _three(grid), _three(block), pointers, ctypes.c_size_t(shared_bytes), *orders, self.seed
        )
        if error is not None:
            raise CudaError(f"{name}, {error.decode()}")


def _three(sizes: Sequence[int]) -> Any:
    return (ctypes.c_uint * 3)(*sizes, *[1] * (3 - len(sizes)))


def _as_c(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        if not argument.flags.c_contiguous:
            raise CudaError("an array that is not in C order has no one pointer")
        return ctypes.c_void_p(argument.ctypes.data)
    kinds = {"int32": ctypes.c_int, "int64": ctypes.c_longlong, "float32": ctypes.c_float, "float64": ctypes.c_double}
    if isinstance(argument, np.generic):
        return kinds[argument.dtype.name](argument.item())
    return ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_double(argument)


def run_sanitized(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process in which libraries built with `sanitize=True` can be loaded."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "PYTHONMALLOC": "malloc",  # every buffer with red zones of its own
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
