"""What the GPU engine launches, computed without a GPU: sizes, grids, shared memory, text before `step.cu`.

Everything in a plan is a function of the network, the batch size and the types, never of the GPU at hand: sums are made
in the same order on every one.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.xp import Array, dtype_name
from catopt_xp.data.order import batches
from catopt_xp.nn.functional import pixel_scale
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.base import BaseOptimizer

Rows = NDArray[np.int64]

CORES_THREADS, TENSOR_THREADS = 128, 256  # of a block of `stream`
MIDDLE_THREADS = 576
SUMMING_THREADS = 256  # of a block of `subtotals` and `join`
D_CHUNK, Z_CHUNK = 64, 32  # samples of d, and of products, in shared memory at a time, with tensor cores
SUMS_APART = 4  # numbers between the products of two samples: a warp's stores fall on 32 banks
MIDDLE_BLOCKS = 128  # at most; a block takes more samples of a larger batch
MOST_GROUP = 32  # units of the first layer to a block: their gradients lie in registers
SUBTREE = 32  # tiles that one thread adds
CHUNK_STEPS = 32  # steps in a graph: what an interrupt waits for
MOST_SHARED = 96 * 1024  # bytes of shared memory that every GPU from sm_80 on gives a block
MOST_UNITS = 128  # of the first layer, beyond which whole products win
MOST_BATCH = 2000
WAITING = 32  # sums of a tree that wait at a time: as many as its levels
EVALUATED = 256  # samples whose products an evaluation makes at a time, where they take no more than EVALUATED_NUMBERS
EVALUATED_NUMBERS = 2**24
KINDS = {"relu": 0, "sigmoid": 1, "tanh": 2}
NONE = 3  # the last layer's activation belongs to the loss
C_TYPES = {"float32": "float", "float64": "double", "uint8": "unsigned char"}


@dataclass(frozen=True)
class CudaPlan:
    """The launches of a network's steps.

    `neuron_cnt`, `activations`: as for `DeepNetwork`; `optimizer`: the class whose rule is compiled in; `batch_size`:
    the largest batch; `dtype`: the network's, by name; `sample_dtype`: the set's; `tensor_cores`: whether products are
    made by them where they can be, of uint8 pixels and a float32 network; `aligned`: the set begins at a multiple of 8
    bytes.

    >>> from catopt_xp.optim.rules import Adam
    >>> plan = CudaPlan((150528, 30, 20, 20, 1), ("relu", "relu", "relu", "sigmoid"), Adam, 64, "float32", "uint8")
    >>> plan.tiles, plan.stream_grid, plan.middle_blocks, plan.rest
    (588, (593, 1), 64, 1091)
    """

    neuron_cnt: Sequence[int]
    activations: Sequence[str]
    optimizer: type[BaseOptimizer]
    batch_size: int
    dtype: str
    sample_dtype: str
    tensor_cores: bool = True
    aligned: bool = True

    @cached_property
    def scalars(self) -> list[str]:
        """Names of the rule's numbers, in the order of the table."""
        parameters = inspect.signature(self.optimizer.rule).parameters.values()
        return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def products(self) -> str:
        """Which source makes a tile's products: tensor or cores."""
        fit = (self.dtype, self.sample_dtype) == ("float32", "uint8")
        return "tensor" if fit and self.tensor_cores else "cores"

    @property
    def threads(self) -> int:
        """Threads of a block of `stream`."""
        return TENSOR_THREADS if self.products == "tensor" else CORES_THREADS

    @property
    def resident(self) -> int:
        """Blocks of `stream` that fit on a multiprocessor: the compiler takes no more registers than allow it."""
        return 3 if (self.products, self.dtype) == ("cores", "float32") else 2

    @property
    def tile(self) -> int:
        """Features of a block."""
        return 256 if self.dtype == "float32" else 128

    @property
    def tiles(self) -> int:
        return -(-self.neuron_cnt[0] // self.tile)

    @property
    def units(self) -> int:
        return self.neuron_cnt[1]

    @property
    def groups(self) -> int:
        """Blocks that share a tile: groups of units."""
        return -(-self.units // MOST_GROUP)

    @property
    def group(self) -> int:
        return -(-self.units // self.groups)

    @property
    def chunk(self) -> int:
        """Samples in shared memory at a time."""
        return 8 if self.batch_size <= 8 else 16

    # --- the rest of the network ------------------------------------------------------------------------------------

    @cached_property
    def widths(self) -> list[int]:
        """Outputs of each layer."""
        return list(self.neuron_cnt[1:])

    @cached_property
    def weights_at(self) -> list[int]:
        """Where W1, W2, … begin behind W0; the first number, W0's, is not used."""
        sizes = [a * b for a, b in zip(self.widths, self.widths[1:], strict=False)]
        return [0, *accumulate(sizes, initial=0)][: len(self.widths)]

    @property
    def rest_weights(self) -> int:
        return sum(a * b for a, b in zip(self.widths, self.widths[1:], strict=False))

    @cached_property
    def biases_at(self) -> list[int]:
        return list(accumulate(self.widths[:-1], initial=self.rest_weights))

    @property
    def rest(self) -> int:
        """Parameters behind W0."""
        return self.rest_weights + sum(self.widths)

    # --- launches -----------------------------------------------------------------------------------------------------

    @property
    def rest_blocks(self) -> int:
        return -(-(self.rest + 1) // self.threads)  # one thread more sums the loss

    @property
    def stream_grid(self) -> tuple[int, int]:
        return self.rest_blocks + self.tiles, self.groups

    @property
    def _group_padded(self) -> int:
        return -(-self.group // 8) * 8

    @property
    def x_shared(self) -> int:
        """Numbers of the room that d, x and the warps' sums use in turn."""
        return self.chunk * max(self.tile + 4, self.threads // 32 * self._group_padded)

    @property
    def work_shared(self) -> int:
        """Bytes of the room that d's terms and the warps' sums use in turn, with tensor cores."""
        m_tiles = -(-self.group // 16)
        terms = 2 * D_CHUNK // 16 * m_tiles * 3 * 32 * 16
        sums = self.threads // 32 * Z_CHUNK * (16 * m_tiles + SUMS_APART) * 4
        return max(terms, sums)

    @property
    def rows_shared(self) -> int:
        """Starts of rows, of a batch or of what is evaluated at a time, in shared memory, with tensor cores."""
        return max(MIDDLE_BLOCKS * self.samples, EVALUATED)

    @property
    def stream_shared(self) -> int:
        """Bytes of shared memory of a block of `stream`."""
        if self.products == "tensor":
            return self.work_shared + 2 * 8 * self.rows_shared
        return (self._group_padded * (self.tile + 4) + self.x_shared) * self.itemsize + 4 * self.chunk

    @property
    def samples(self) -> int:
        """Samples of a block of `middle`."""
        return -(-self.batch_size // MIDDLE_BLOCKS)

    @property
    def middle_blocks(self) -> int:
        return -(-self.batch_size // self.samples)

    @property
    def middle_shared(self) -> int:
        """Bytes of shared memory of a block of `middle`."""
        subtrees = -(-self.tiles // SUBTREE)
        layers = 2 * self.samples * sum(self.widths)
        return (self.rest + layers + self.samples + subtrees * self.units) * self.itemsize

    @property
    def sums_shared(self) -> int:
        """Bytes of shared memory of a block of `subtotals`."""
        return -(-self.tiles // SUBTREE) * self.units * self.itemsize

    @property
    def evaluated(self) -> int:
        """Samples whose products an evaluation makes at a time."""
        return max(1, min(EVALUATED, EVALUATED_NUMBERS // (self.tiles * self.units)))

    @property
    def d_shape(self) -> tuple[int, ...]:
        """Of what `middle` leaves for `stream`: d itself, or the terms that tensor cores take, by 16 samples."""
        if self.products == "tensor":
            return -(-self.batch_size // 16), self.groups * -(-self.group // 16), 3, 32, 4
        return self.batch_size, self.units

    @property
    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        """What lies on the GPU besides the set, the parameters and their moments, in the network's dtype."""
        return {
            "part": (self.tiles, self.batch_size, self.units),
            "d": self.d_shape,
            "gradients": (self.middle_blocks, self.rest),
            "block_losses": (self.middle_blocks,),
        }

    @property
    def buffer_bytes(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.buffer_shapes.values()) * self.itemsize

    def obstacle(self) -> str | None:
        """Why the kernels do not do this network, or None."""
        if self.units > MOST_UNITS:
            return f"the first layer has {self.units} units, more than {MOST_UNITS}, for which whole products win"
        if self.batch_size > MOST_BATCH:
            return f"batches of {self.batch_size}, more than {MOST_BATCH}, for which whole products win"
        shared = max(self.stream_shared, self.middle_shared)
        if shared > MOST_SHARED:
            return f"the network needs {shared} bytes of shared memory, a block has {MOST_SHARED}"
        return None

    # --- the source ---------------------------------------------------------------------------------------------------

    @property
    def numbers(self) -> int:
        """Numbers of a row of the table: the rule's, l2, and the factor of decoupled decay."""
        return len(self.scalars) + 2

    def prelude(self) -> str:
        """What `step.cu` needs defined: types, sizes, the rule, the rest of the network."""
        real = C_TYPES[self.dtype]
        softmax = self.activations[-1] == "softmax"
        kinds = [KINDS[name] for name in self.activations[:-1]] + [NONE]
        defines = {
            "REAL": real,
            "SAMPLE": C_TYPES[self.sample_dtype],
            "TARGET": "long long" if softmax else real,
            "SCALE": f"{real}({pixel_scale(np.dtype(self.sample_dtype))!r})",
            "THREADS": self.threads,
            "RESIDENT": self.resident,
            "MIDDLE_THREADS": MIDDLE_THREADS,
            "TILE": self.tile,
            "CHUNK": self.chunk,
            "X_SHARED": self.x_shared,
            "WORK_SHARED": self.work_shared,
            "ROWS_SHARED": self.rows_shared,
            "D_CHUNK": D_CHUNK,
            "Z_CHUNK": Z_CHUNK,
            "SUMS_APART": SUMS_APART,
            "ALIGNED": int(self.aligned and self.neuron_cnt[0] % 8 == 0),
            "UNITS": self.units,
            "GROUP": self.group,
            "MOMENTS": len(self.optimizer.moment_names),
            "NUMBERS": self.numbers,
            "SUBTREE": SUBTREE,
            "SAMPLES": self.samples,
            "LAYERS": len(self.widths),
            "LEVELS": sum(self.widths),
            "OUTPUTS": self.widths[-1],
            "SOFTMAX": int(softmax),
            "REST": self.rest,
            "REST_WEIGHTS": self.rest_weights,
            "REST_BLOCKS": self.rest_blocks,
            **{name.upper(): kind for name, kind in KINDS.items()},
            "NONE": NONE,
            "WAITING": WAITING,
            "LARGEST": "3.402823466e38f",
            "SMALLEST": "1.175494351e-38f",  # but for subnormal ones
        }
        tables = {
            "WIDTH": self.widths,
            "ACTIVATION": kinds,
            "W_AT": self.weights_at,
            "B_AT": self.biases_at,
            "LEVEL_AT": list(accumulate(self.widths[:-1], initial=0)),
        }
        lines = [f"#define {name} {value}" for name, value in defines.items()]
        lines += [f"__device__ constexpr int {name}[] = {{{', '.join(map(str, x))}}};" for name, x in tables.items()]
        return "\n".join(lines) + "\n"

    def _rule(self) -> str:
        """The optimizer's own kernel text, with its names bound; l2 and weight decay are for weights alone."""
        numbers = {name: f"numbers[{k}]" for k, name in enumerate(self.scalars)}
        moments = {name: f"moment{k}" for k, name in enumerate(self.optimizer.moment_names)}
        constants = "".join(f"const Number {name} = {value}; " for name, value in numbers.items())
        variables = "".join(f"Number {name} = {value}; " for name, value in moments.items())
        results = "".join(f" {value} = plain({name});" for name, value in moments.items())
        l2, shrink = (f"numbers[{len(self.scalars) + k}]" for k in (0, 1))
        return f"""
__device__ __forceinline__ void rule(REAL& parameter, REAL gradient, REAL& moment0, REAL& moment1,
                                     const REAL* __restrict__ numbers, bool decayed) {{
    if (decayed) {{
        if ({l2} != 0) gradient += {l2} * parameter;  // 0 times a NaN is none
        parameter *= {shrink};
    }}
    {constants}
    Number p = parameter, g = gradient; {variables}
    {self.optimizer.kernel}
    parameter = plain(p);{results}
}}
"""

    def source(self) -> str:
        """The whole text that is compiled."""
        step, products = (
            files("catopt_xp.engines.cuda").joinpath(f"{name}.cu").read_text(encoding="utf-8")
            for name in ("step", self.products)
        )
        for place, text in (("RULE", self._rule()), ("PRODUCTS", products)):
            here = step.index(f"\n{place}") + 1
            step = step[:here] + text + step[step.index("\n", here) :]
        return self.prelude() + step


def places(m: int, batch_size: int, drop_last: bool, goes_on: bool) -> NDArray[np.int32]:
    """For each step (begin, length) of its rows and of the following batch's, and a last line for a first product.

    `goes_on`: behind the epoch's rows lie those of the next one's first batch. (steps + 1, 4).

    >>> places(5, 2, False, True).tolist()
    [[0, 2, 2, 2], [2, 2, 4, 1], [4, 1, 5, 2], [0, 0, 0, 0]]
    """
    slices = batches(m, batch_size, drop_last)
    own = [(part.start, part.stop - part.start) for part in slices]
    behind = (slices[-1].stop, own[0][1]) if goes_on else (0, 0)
    lines = [(*now, *after) for now, after in zip(own, [*own[1:], behind], strict=True)]
    return np.array([*lines, (0, 0, 0, 0)], dtype=np.int32)


def chunk_end(start: int, batches: int, before: int, pause_every: int | None) -> int:
    """Where the chunk that begins at step `start` of an epoch ends: a graph's length on, or where the caller looks.

    `before`: steps of earlier epochs; `pause_every`: steps, counted from the first epoch, after which it looks.

    >>> chunk_end(0, 250, 0, None), chunk_end(224, 250, 0, None), chunk_end(3, 250, 1000, 7)
    (32, 250, 8)
    """
    end = min(batches, start + CHUNK_STEPS)
    if pause_every is not None:
        end = min(end, start + pause_every - (before + start) % pause_every)
    return end


def plan_of(
    model: DeepNetwork, optimizer: BaseOptimizer, samples: Array, batch_size: int, tensor_cores: bool = True
) -> CudaPlan:
    """The launches for these objects: arguments as for `PlainEngine`, its largest batch, and as for `CudaPlan`.

    Where `samples` have some of the network's features, the plan is for these.
    """
    neuron_cnt, activations = (samples.shape[1], *model.neuron_cnt[1:]), tuple(model.activation_func)
    kinds = model.dtype, dtype_name(samples)
    return CudaPlan(
        neuron_cnt, activations, type(optimizer), batch_size, *kinds, tensor_cores, address(samples) % 8 == 0
    )


def address(array: Array) -> int:
    """Where an array begins, on whatever device."""
    face = "__cuda_array_interface__" if hasattr(array, "__cuda_array_interface__") else "__array_interface__"
    start: int = getattr(array, face)["data"][0]
    return start
