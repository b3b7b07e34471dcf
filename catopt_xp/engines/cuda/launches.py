"""What the GPU engine launches, computed without a GPU: sizes, grids, shared memory, tables.

All of it follows from the network, the batch size and the types, never from the GPU at hand: sums are made in the same
order on every one. The text that is compiled for these launches is in `source.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.xp import Array, dtype_name
from catopt_xp.data.order import batches
from catopt_xp.engines.panels import padded
from catopt_xp.nn.network import DeepNetwork

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
EVALUATED = 256  # samples whose products an evaluation makes at a time, where they take no more than EVALUATED_NUMBERS
EVALUATED_NUMBERS = 2**24


@dataclass(frozen=True)
class UpperLayers:
    """The parameters behind W0, as they lie in memory: W1, W2, …, then b0, b1, ….

    `widths`: outputs of each layer, from the first one on.

    >>> upper = UpperLayers((30, 20, 20, 1))
    >>> upper.weights_at, upper.biases_at, upper.size
    ([0, 0, 600, 1000], [1020, 1050, 1070, 1090], 1091)
    """

    widths: tuple[int, ...]

    @property
    def weights(self) -> int:
        return sum(a * b for a, b in pairwise(self.widths))

    @property
    def weights_at(self) -> list[int]:
        """Where W1, W2, … begin; the first number stands for W0 and is not used."""
        sizes = [a * b for a, b in pairwise(self.widths)]
        return [0, *accumulate(sizes, initial=0)][: len(self.widths)]

    @property
    def biases_at(self) -> list[int]:
        return list(accumulate(self.widths[:-1], initial=self.weights))

    @property
    def outputs_at(self) -> list[int]:
        """Where each layer's outputs begin, among those of a sample."""
        return list(accumulate(self.widths[:-1], initial=0))

    @property
    def outputs(self) -> int:
        """Outputs of all layers."""
        return sum(self.widths)

    @property
    def size(self) -> int:
        """Weights and biases."""
        return self.weights + self.outputs


@dataclass(frozen=True)
class Tiles:
    """W0 (units, n_x), cut into tiles of `length` features; several blocks share a tile if it has many units.

    >>> tiles = Tiles(n_x=1000, units=33, length=256)
    >>> tiles.count, tiles.groups, tiles.group
    (4, 2, 17)
    """

    n_x: int
    units: int
    length: int

    @property
    def count(self) -> int:
        return -(-self.n_x // self.length)

    @property
    def groups(self) -> int:
        """Blocks that share a tile; each has a group of units."""
        return -(-self.units // MOST_GROUP)

    @property
    def group(self) -> int:
        """Units of a group."""
        return -(-self.units // self.groups)

    @property
    def subtree_sums(self) -> int:
        """Sums that one sample's products of all tiles leave, SUBTREE tiles at a time."""
        return -(-self.count // SUBTREE) * self.units


@dataclass(frozen=True)
class Stream:
    """A launch of `stream`: first the blocks that update the upper layers, then those of the tiles.

    `upper`: parameters behind W0; `tensor`: whether tensor cores make the products, which changes what the shared
    memory holds.
    """

    tiles: Tiles
    upper: int
    batch_size: int
    dtype: str
    tensor: bool

    @property
    def threads(self) -> int:
        return TENSOR_THREADS if self.tensor else CORES_THREADS

    @property
    def resident(self) -> int:
        """Blocks that fit on a multiprocessor: the compiler takes no more registers than allow it."""
        return 2 if self.tensor or self.dtype == "float64" else 3

    @property
    def upper_blocks(self) -> int:
        return -(-(self.upper + 1) // self.threads)  # one thread more sums the loss

    @cached_property
    def grid(self) -> tuple[int, int]:
        return self.upper_blocks + self.tiles.count, self.tiles.groups

    @property
    def chunk(self) -> int:
        """Samples in shared memory at a time, without tensor cores."""
        return 8 if self.batch_size <= 8 else 16

    @property
    def x_shared(self) -> int:
        """Numbers of the room that d, x and the warps' sums use in turn, without tensor cores."""
        return self.chunk * max(self.tiles.length + 4, self.threads // 32 * padded(self.tiles.group, 8))

    @property
    def work_shared(self) -> int:
        """Bytes of the room that d's terms and the warps' sums use in turn, with tensor cores."""
        m_tiles = -(-self.tiles.group // 16)
        terms = 2 * D_CHUNK // 16 * m_tiles * 3 * 32 * 16
        sums = self.threads // 32 * Z_CHUNK * (16 * m_tiles + SUMS_APART) * 4
        return max(terms, sums)

    @property
    def rows_shared(self) -> int:
        """Starts of rows, of a batch or of what is evaluated at a time, in shared memory, with tensor cores."""
        return max(padded(self.batch_size, MIDDLE_BLOCKS), EVALUATED)

    @cached_property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        if self.tensor:
            return self.work_shared + 2 * 8 * self.rows_shared
        numbers = padded(self.tiles.group, 8) * (self.tiles.length + 4) + self.x_shared
        return numbers * np.dtype(self.dtype).itemsize + 4 * self.chunk

    @property
    def d_shape(self) -> tuple[int, ...]:
        """Of what `middle` leaves for `stream`: d itself, or the terms that tensor cores take, by 16 samples."""
        if self.tensor:
            return -(-self.batch_size // 16), self.tiles.groups * -(-self.tiles.group // 16), 3, 32, 4
        return self.batch_size, self.tiles.units


@dataclass(frozen=True)
class StepGeometry:
    """The launches of a network's steps, and the memory that they need.

    `neuron_cnt`: as for `DeepNetwork`; `batch_size`: the largest batch; `dtype`: the network's, by name;
    `sample_dtype`: the set's; `tensor_cores`: whether they make the products where they can, which is of uint8 pixels
    and a float32 network.

    >>> geometry = StepGeometry((150528, 30, 20, 20, 1), 64, "float32", "uint8")
    >>> geometry.tiles.count, geometry.stream.grid, geometry.middle_blocks, geometry.upper.size
    (588, (593, 1), 64, 1091)
    """

    neuron_cnt: tuple[int, ...]
    batch_size: int
    dtype: str
    sample_dtype: str
    tensor_cores: bool = True

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def products(self) -> str:
        """Which source makes a tile's products: tensor or cores."""
        fit = (self.dtype, self.sample_dtype) == ("float32", "uint8")
        return "tensor" if fit and self.tensor_cores else "cores"

    @cached_property
    def tiles(self) -> Tiles:
        n_x, units, *_ = self.neuron_cnt
        return Tiles(n_x, units, 256 if self.dtype == "float32" else 128)

    @cached_property
    def upper(self) -> UpperLayers:
        return UpperLayers(self.neuron_cnt[1:])

    @cached_property
    def stream(self) -> Stream:
        return Stream(self.tiles, self.upper.size, self.batch_size, self.dtype, self.products == "tensor")

    @property
    def samples(self) -> int:
        """Samples of a block of `middle`."""
        return -(-self.batch_size // MIDDLE_BLOCKS)

    @property
    def middle_blocks(self) -> int:
        return -(-self.batch_size // self.samples)

    @cached_property
    def middle_shared(self) -> int:
        """Bytes of shared memory of a block of `middle`."""
        layers = 2 * self.samples * self.upper.outputs
        return (self.upper.size + layers + self.samples + self.tiles.subtree_sums) * self.itemsize

    @property
    def subtotals_shared(self) -> int:
        """Bytes of shared memory of a block of `subtotals`."""
        return self.tiles.subtree_sums * self.itemsize

    @property
    def evaluated(self) -> int:
        """Samples whose products an evaluation makes at a time."""
        return max(1, min(EVALUATED, EVALUATED_NUMBERS // (self.tiles.count * self.tiles.units)))

    @property
    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        """What lies on the GPU besides the set, the parameters and their moments, in the network's dtype."""
        return {
            "part": (self.tiles.count, self.batch_size, self.tiles.units),
            "d": self.stream.d_shape,
            "gradients": (self.middle_blocks, self.upper.size),
            "block_losses": (self.middle_blocks,),
        }

    @property
    def buffer_bytes(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.buffer_shapes.values()) * self.itemsize


def geometry_of(model: DeepNetwork, samples: Array, batch_size: int, tensor_cores: bool = True) -> StepGeometry:
    """The geometry for these objects: arguments as for `PlainEngine`, its largest batch, and as for `StepGeometry`.

    Where `samples` have only some of the network's features, the geometry is for these.
    """
    neuron_cnt = samples.shape[1], *model.neuron_cnt[1:]
    return StepGeometry(neuron_cnt, batch_size, model.dtype, dtype_name(samples), tensor_cores)


def size_obstacle(geometry: StepGeometry) -> str | None:
    """Why the kernels do not do a network of these sizes, or None."""
    units, batch_size = geometry.tiles.units, geometry.batch_size
    if units > MOST_UNITS:
        return f"the first layer has {units} units, more than {MOST_UNITS}, for which whole products win"
    if batch_size > MOST_BATCH:
        return f"batches of {batch_size}, more than {MOST_BATCH}, for which whole products win"
    shared = max(geometry.stream.shared, geometry.middle_shared)
    if shared > MOST_SHARED:
        return f"the network needs {shared} bytes of shared memory, a block has {MOST_SHARED}"
    return None


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
