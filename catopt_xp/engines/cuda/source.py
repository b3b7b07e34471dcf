"""The text that a GPU compiles: `step.cu` with its sizes, the optimizer's rule, and the products of a tile.

The sizes are those of `launches.py`; the rule is the optimizer's own kernel text.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib.resources import files

import numpy as np

from catopt_xp.backend.xp import Array
from catopt_xp.engines.cuda.launches import D_CHUNK, MIDDLE_THREADS, SUBTREE, SUMS_APART, Z_CHUNK, StepGeometry
from catopt_xp.nn.functional import pixel_scale
from catopt_xp.optim.base import BaseOptimizer

WAITING = 32  # sums of a tree that wait at a time: as many as its levels
KINDS = {"relu": 0, "sigmoid": 1, "tanh": 2}
NONE = 3  # the last layer's activation belongs to the loss
C_TYPES = {"float32": "float", "float64": "double", "uint8": "unsigned char"}


def source(
    geometry: StepGeometry, activations: Sequence[str], optimizer: type[BaseOptimizer], aligned: bool = True
) -> str:
    """The whole text that is compiled.

    `activations`: as for `DeepNetwork`; `optimizer`: the class whose rule is compiled in; `aligned`: whether the set
    begins at a multiple of 8 bytes.
    """
    step, products = (
        files("catopt_xp.engines.cuda").joinpath(f"{name}.cu").read_text(encoding="utf-8")
        for name in ("step", geometry.products)
    )
    for place, text in (("RULE", _rule(optimizer)), ("PRODUCTS", products)):
        here = step.index(f"\n{place}") + 1
        step = step[:here] + text + step[step.index("\n", here) :]
    return prelude(geometry, activations, optimizer, aligned) + step


def scalars(optimizer: type[BaseOptimizer]) -> list[str]:
    """Names of a rule's numbers, in the order of the table; behind them it has l2 and the decay's factor."""
    parameters = inspect.signature(optimizer.rule).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def table_width(optimizer: type[BaseOptimizer]) -> int:
    """Numbers of a row of the table."""
    return len(scalars(optimizer)) + 2


def address(array: Array) -> int:
    """Where an array begins, on whatever device."""
    face = "__cuda_array_interface__" if hasattr(array, "__cuda_array_interface__") else "__array_interface__"
    start: int = getattr(array, face)["data"][0]
    return start


def is_aligned(samples: Array) -> bool:
    """Whether a set begins at a multiple of 8 bytes: a kernel may load its pixels by eights, not one by one."""
    return address(samples) % 8 == 0


def prelude(
    geometry: StepGeometry, activations: Sequence[str], optimizer: type[BaseOptimizer], aligned: bool = True
) -> str:
    """What `step.cu` needs defined: types, sizes, and where the upper layers lie; arguments as for `source`."""
    real, softmax = C_TYPES[geometry.dtype], activations[-1] == "softmax"
    tiles, stream, upper = geometry.tiles, geometry.stream, geometry.upper
    defines = {
        "REAL": real,
        "SAMPLE": C_TYPES[geometry.sample_dtype],
        "TARGET": "long long" if softmax else real,
        "SCALE": f"{real}({pixel_scale(np.dtype(geometry.sample_dtype))!r})",
        "THREADS": stream.threads,
        "RESIDENT": stream.resident,
        "MIDDLE_THREADS": MIDDLE_THREADS,
        "TILE": tiles.length,
        "CHUNK": stream.chunk,
        "X_SHARED": stream.x_shared,
        "WORK_SHARED": stream.work_shared,
        "ROWS_SHARED": stream.rows_shared,
        "D_CHUNK": D_CHUNK,
        "Z_CHUNK": Z_CHUNK,
        "SUMS_APART": SUMS_APART,
        "ALIGNED": int(aligned and tiles.n_x % 8 == 0),
        "UNITS": tiles.units,
        "GROUP": tiles.group,
        "MOMENTS": len(optimizer.moment_names),
        "NUMBERS": table_width(optimizer),
        "SUBTREE": SUBTREE,
        "SAMPLES": geometry.samples,
        "LAYERS": len(upper.widths),
        "LEVELS": upper.outputs,
        "OUTPUTS": upper.widths[-1],
        "SOFTMAX": int(softmax),
        "REST": upper.size,
        "REST_WEIGHTS": upper.weights,
        "REST_BLOCKS": stream.upper_blocks,
        **{name.upper(): kind for name, kind in KINDS.items()},
        "NONE": NONE,
        "WAITING": WAITING,
        "LARGEST": "3.402823466e38f",
        "SMALLEST": "1.175494351e-38f",  # but for subnormal ones
    }
    tables = {
        "WIDTH": upper.widths,
        "ACTIVATION": [*(KINDS[name] for name in activations[:-1]), NONE],
        "W_AT": upper.weights_at,
        "B_AT": upper.biases_at,
        "LEVEL_AT": upper.outputs_at,
    }
    lines = [f"#define {name} {value}" for name, value in defines.items()]
    lines += [f"__device__ constexpr int {name}[] = {{{', '.join(map(str, x))}}};" for name, x in tables.items()]
    return "\n".join(lines) + "\n"


def _rule(optimizer: type[BaseOptimizer]) -> str:
    """The optimizer's own kernel text, with its names bound; l2 and weight decay are for weights alone."""
    names = scalars(optimizer)
    moments = {name: f"moment{k}" for k, name in enumerate(optimizer.moment_names)}
    constants = "".join(f"const Number {name} = numbers[{k}]; " for k, name in enumerate(names))
    variables = "".join(f"Number {name} = {value}; " for name, value in moments.items())
    results = "".join(f" {value} = plain({name});" for name, value in moments.items())
    l2, shrink = f"numbers[{len(names)}]", f"numbers[{len(names) + 1}]"
    return f"""
__device__ __forceinline__ void rule(REAL& parameter, REAL gradient, REAL& moment0, REAL& moment1,
                                     const REAL* __restrict__ numbers, bool decayed) {{
    if (decayed) {{
        if ({l2} != 0) gradient += {l2} * parameter;  // 0 times a NaN is none
        parameter *= {shrink};
    }}
    {constants}
    Number p = parameter, g = gradient; {variables}
    {optimizer.kernel}
    parameter = plain(p);{results}
}}
"""
