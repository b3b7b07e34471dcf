"""Every kind of CUDA source that the GPU engine writes, compiled by NVRTC without a GPU: registers, spills, names."""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from marks import some

from catopt_xp.engines.cuda.device import KERNELS
from catopt_xp.engines.cuda.launches import StepGeometry
from catopt_xp.engines.cuda.source import source
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.rules import OPTIMIZERS, Adam

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cuda_table.py"
ARCHITECTURES = (80, 90)


@cache
def script() -> ModuleType:
    """benchmarks/cuda_table.py, imported: it has the compiler."""
    specification = importlib.util.spec_from_file_location("cuda_table", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = sys.modules["cuda_table"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


OBSTACLE = script().obstacle()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))

# The network's type, the set's, and whether tensor cores may be used.
PRODUCTS: dict[str, tuple[str, str, bool]] = {
    "tensor cores": ("float32", "uint8", True),
    "cores, pixels": ("float32", "uint8", False),
    "cores, floats": ("float32", "float32", False),
    "float64, pixels": ("float64", "uint8", False),
    "float64, floats": ("float64", "float64", False),
}
REFERENCE = (150528, 30, 20, 20, 1)


class Variant(NamedTuple):
    geometry: StepGeometry
    source: str


def variant(
    products: str,
    neurons: tuple[int, ...] = REFERENCE,
    optimizer: type[BaseOptimizer] = Adam,
    batch_size: int = 64,
    activation: str = "relu",
) -> Variant:
    activations = (*[activation] * (len(neurons) - 2), "softmax" if neurons[-1] > 1 else "sigmoid")
    geometry = StepGeometry(neurons, batch_size, *PRODUCTS[products])
    return Variant(geometry, source(geometry, activations, optimizer))


# Each kind of products with each rule, and with what else changes its text: the groups of units, the samples at a time,
# the layers behind. Where the set does not begin or its rows do not lie at multiples of 8, tensor cores load by bytes.
VARIANTS: dict[str, Variant] = {
    f"{products}, {name}": variant(products, optimizer=kind)
    for products in PRODUCTS
    for name, (kind, _) in OPTIMIZERS.items()
    if name in ("gd", "adam") or products in ("tensor cores", "float64, pixels")  # the others share their text
}
VARIANTS |= {f"{products}, 128 units": variant(products, (3072, 128, 10), batch_size=8) for products in PRODUCTS}
VARIANTS |= {
    "tensor cores, unaligned": variant("tensor cores", (150529, 30, 1)),
    "tensor cores, one unit, whole set": variant("tensor cores", (784, 1), batch_size=2000),
    "tensor cores, 40 units, deep": variant("tensor cores", (784, 40, 30, 20, 10), activation="tanh"),
    "cores, pixels, 7 units": variant("cores, pixels", (784, 7, 1)),
    "float64, pixels, 7 units": variant("float64, pixels", (785, 7, 1), activation="sigmoid"),
    "float64, floats, whole set": variant("float64, floats", batch_size=2000),
}
# So many registers that a multiprocessor, which has 65536, holds the blocks that it is meant to: of `stream` two of 256
# threads, or three of 128, in float64 two; of `middle`, whose blocks are few, one of 576.
MOST_REGISTERS = {
    "tensor": 128,
    "cores, float32": 168,
    "cores, float64": 255,
    "middle": 112,
    "advance": 32,
    "sums": 128,
}


@cache
def compiled(name: str, architecture: int) -> tuple[dict[str, Any], bytes]:
    kernels, code = script().compiled(VARIANTS[name].source, architecture)
    return kernels, code


def most_registers(geometry: StepGeometry) -> dict[str, int]:
    products = "tensor" if geometry.products == "tensor" else f"cores, {geometry.dtype}"
    return {
        "stream": MOST_REGISTERS[products],
        "middle": MOST_REGISTERS["middle"],
        "advance": MOST_REGISTERS["advance"],
        "subtotals": MOST_REGISTERS["sums"],
        "join": MOST_REGISTERS["sums"],
    }


# In every run Adam's with tensor cores, for one architecture.
ALWAYS = [("tensor cores, adam", 90)]
EACH = [(name, architecture) for name in VARIANTS for architecture in ARCHITECTURES]


@pytest.mark.parametrize(("name", "architecture"), some(EACH, ALWAYS, pytest.mark.kernels))
def test_a_variant_compiles_without_spills_within_its_registers(name: str, architecture: int) -> None:
    kernels, code = compiled(name, architecture)
    assert set(kernels) == set(KERNELS)
    for kernel, most in most_registers(VARIANTS[name].geometry).items():
        made = kernels[kernel]
        assert made.spilled == 0, f"{kernel} spills {made.spilled} bytes"
        assert 0 < made.registers <= most, f"{kernel} takes {made.registers} registers"
        assert made.shared == 0, f"{kernel} has {made.shared} bytes of shared memory that the launch does not count"
        assert f".text.{kernel}\0".encode() in code  # by this name it is found


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["tensor cores, adam", "cores, pixels, 7 units", "float64, floats, whole set"])
def test_newer_architectures_are_no_obstacle(name: str) -> None:
    if not script().knows(100):
        pytest.skip("this NVRTC does not know sm_100")
    kernels, _ = compiled(name, 100)
    assert {kernel for kernel, made in kernels.items() if made.spilled} == set()


def test_every_multiprocessor_holds_the_blocks_that_it_is_meant_to() -> None:
    for geometry, _ in VARIANTS.values():
        stream = geometry.stream
        registers = -(-most_registers(geometry)["stream"] // 8) * 8  # they are given out by eights
        assert registers * stream.threads * stream.resident <= 65536
        assert (stream.shared + 1024) * stream.resident <= 164 * 1024  # of sm_80, which keeps 1 KB a block


def test_the_variants_differ_and_cover_every_kind_of_source(capsys: pytest.CaptureFixture[str]) -> None:
    sources = {variant.source for variant in VARIANTS.values()}
    with capsys.disabled():
        print(f"\n{len(sources)} variants, compiled for sm_{' or sm_'.join(map(str, ARCHITECTURES))}")
    assert len(sources) == len(VARIANTS) == 25
    for define in ("ALIGNED", "SOFTMAX", "MOMENTS", "CHUNK", "SAMPLES", "REAL", "SAMPLE", "TARGET"):
        seen = {re.search(rf"#define {define} (.*)", source)[1] for source in sources}  # type: ignore[index]
        assert len(seen) > 1, f"all variants have {define} {seen}"


# --- the compiler's word ------------------------------------------------------------------------------------------


@pytest.mark.kernels
def test_spills_would_be_seen() -> None:
    tight = VARIANTS["cores, pixels, adam"].source.replace("#define RESIDENT 3", "#define RESIDENT 8")
    kernels, _ = script().compiled(tight, 90)
    assert kernels["stream"].spilled > 0
    source = 'extern "C" __global__ void fixed(float* x) { __shared__ float y[64]; y[0] = *x; *x = y[threadIdx.x]; }'
    kernels, _ = script().compiled(source, 90)
    assert kernels["fixed"].shared == 256


def test_what_does_not_compile_is_told_with_its_line() -> None:
    with pytest.raises(RuntimeError, match=r'source\.cu\(2\): error: identifier "nothing" is undefined'):
        script().compiled('extern "C" __global__ void a(int* x) {\n    *x = nothing;\n}\n', 90)


# --- the table ----------------------------------------------------------------------------------------------------


def test_the_table_says_what_was_compiled_and_predicts_from_bytes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script(), "BATCH_SIZES", (64,))
    monkeypatch.setattr(sys, "argv", ["cuda_table.py"])
    assert script().main() == 0
    printed = capsys.readouterr().out
    made = compiled("tensor cores, adam", 90)[0]
    assert f"| 64 | stream | 593 x 256 | {made['stream'].registers} | 0 | 40.0 | 132.2 | 30.7 | 0.98 |" in printed
    assert f"| 64 | middle | 64 x 576 | {made['middle'].registers} | 0 | 7.0 | 4.5 | 1.1 | 0.03 |" in printed
    assert "Times are predicted from bytes, not measured" in printed


@pytest.mark.parametrize(("batch_size", "milliseconds"), [(8, 6.44), (64, 0.95), (128, 0.54), (2000, 0.17)])
def test_the_floor_is_one_pass_over_weights_and_moments(batch_size: int, milliseconds: float) -> None:
    steps = script().epoch(variant("tensor cores", batch_size=batch_size).geometry)
    assert sum(step.floor for step in steps) / 4.3e9 == pytest.approx(milliseconds, abs=5e-3)
    assert sum(step.n for step in steps) == sum(step.following for step in steps) == 2000


def test_without_nvrtc_the_script_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise RuntimeError("CuPy failed to load libnvrtc.so.12:\n no such file")

    monkeypatch.setattr(script(), "_nvrtc", absent)
    monkeypatch.setattr(sys, "argv", ["cuda_table.py"])
    assert script().main() == 1
    told = (
        "benchmarks/cuda_table.py: NVRTC cannot be used (CuPy failed to load libnvrtc.so.12: no such file): pip install"
    )
    assert capsys.readouterr().err.startswith(told)
