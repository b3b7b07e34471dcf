"""CUDA sources compiled by g++ and executed on the CPU: what tests of a kernel need where there is no GPU.

A block's threads are fibers, blocks run one after the other, in an order that the test chooses (`machine.cpp`).
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

HERE = Path(__file__).parent
ORDERS = ("forward", "backward", "shuffled")
KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(')
FLAGS = [
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wno-sign-compare",
    "-Wno-unknown-pragmas",
    "-Wno-unused",
]
SANITIZERS = ["-fsanitize=address,undefined", "-fsanitize-recover=address", "-fno-sanitize-recover=undefined", "-g"]


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
    """A compiled source. `block_order`, `thread_order`: one of ORDERS; `seed`: of the shuffled ones.

    `folder`: where compiled files lie, and are found again; `sanitize`: check bounds (see `run_sanitized`).
    """

    def __init__(self, source: str, folder: Path, sanitize: bool = False) -> None:
        self.names = KERNEL.findall(source)
        calls = "".join(
            f'extern "C" __attribute__((visibility("default"))) void call_{name}(void** arguments) '
            f"{{ cuda_on_cpu::Call<{name}>::of(arguments); }}\n"
            for name in self.names
        )
        text = f'#include "{HERE / "cuda_on_cpu.h"}"\n#line 1 "source.cu"\n{source}\n{calls}'
        told, speed = (["-DSANITIZED"], SANITIZERS) if sanitize else ([], ["-O1"])
        machine = _compiled(
            (HERE / "machine.cpp").read_text(encoding="utf-8"), folder, ["-c", "-O2", f"-I{HERE}", *told]
        )
        file = _compiled(text, folder, ["-shared", *speed, "-Wl,-Bsymbolic", str(machine)])
        self._library = ctypes.CDLL(str(file))
        self._launch = self._library.cuda_on_cpu_launch
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
            getattr(self._library, f"call_{name}"),
            _three(grid),
            _three(block),
            pointers,
            ctypes.c_size_t(shared_bytes),
            *orders,
            self.seed,
        )
        if error is not None:
            raise CudaError(f"{name}, {error.decode()}")


def _compiled(code: str, folder: Path, flags: list[str]) -> Path:
    """What g++ makes of a C++ text, made once."""
    header = (HERE / "cuda_on_cpu.h").read_text(encoding="utf-8")
    stamp = hashlib.sha256(" ".join([code, header, *FLAGS, *flags]).encode()).hexdigest()[:16]
    file = folder / f"{stamp}.o"
    if not file.exists():
        # Ranks compile the same at once: each from a file of its own.
        source, fresh = (folder / f"{stamp}.{os.getpid()}{ending}" for ending in (".cpp", ""))
        source.write_text(code, encoding="utf-8")  # NVRTC 12.4 leaves a thread with the locale "C"
        command = ["g++", *FLAGS, str(source), *flags, "-o", str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CudaError(f"g++ does not compile this:\n{done.stderr}")
        os.replace(fresh, file)
    return file


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


def run_sanitized(code: str, *arguments: str, go_on: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process in which libraries built with `sanitize=True` can be loaded.

    `go_on`: an index out of bounds is told on stderr alone, and does not end the process.
    """
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": f"detect_leaks=0:halt_on_error={int(not go_on)}:symbolize={int(not go_on)}",
        "PYTHONMALLOC": "malloc",  # every buffer with red zones of its own
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
