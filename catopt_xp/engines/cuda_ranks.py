"""The GPU engine of a rank: its own panels on its own GPU, and the sums of all others'. Floor F3.

Between the launches of a step the sums of this rank's subtrees of tiles go to the others, by NCCL or through the host,
and the tree above them is finished by every GPU alike. So is the rest of the network. A panel is a whole number of
tiles: what `middle` sees has the bits that one GPU would have made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from catopt_xp.backend.xp import Array, Backend
from catopt_xp.engines.cuda import CudaEngine, CupyDevice, Device, Products
from catopt_xp.engines.cuda_plan import SUMMING_THREADS
from catopt_xp.engines.exchange import Exchange
from catopt_xp.engines.panels import PANEL, merges
from catopt_xp.engines.plain import Settings
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.base import BaseOptimizer


class Transport(Protocol):
    """How sums come from one GPU to all."""

    name: str

    def gather(self, own: Array, everyone: Array) -> None:
        """Queues, behind the launches so far, the copies of every rank's `own` (n, …) to `everyone` (ranks n, …)."""


class ThroughHost:
    """By MPI through the host's memory. Here alone does the device's work meet MPI, which knows no streams."""

    name = "through the host"

    def __init__(self, ranks: Exchange, backend: Backend, device: Device) -> None:
        self.ranks, self.backend, self.device = ranks, backend, device

    def gather(self, own: Array, everyone: Array) -> None:
        self.device.synchronize()  # sync: MPI reads what the launches have written
        values = self.backend.to_host(own).reshape(-1)
        gathered = self.ranks.gather(values, [values.size] * self.ranks.size)
        self.device.upload(everyone, gathered.reshape(everyone.shape))


class ByNccl:
    """By NCCL from GPU to GPU, in the engine's own stream; a communicator of the ranks at hand.

    `cupyx.distributed` makes one of all processes of MPI, or finds them by a network port: here it is as given.
    """

    name = "NCCL"

    def __init__(self, ranks: Exchange, nccl: Any, device: CupyDevice) -> None:
        self.ranks, self.nccl, self.device = ranks, nccl, device
        unique = ranks.from_first(nccl.get_unique_id() if ranks.rank == 0 else None)
        with device.backend.activate():
            self.communicator = nccl.NcclCommunicator(ranks.size, unique, ranks.rank)

    def gather(self, own: Array, everyone: Array) -> None:
        kind = self.nccl.NCCL_FLOAT32 if own.dtype == np.float32 else self.nccl.NCCL_FLOAT64
        with self.device.backend.activate():
            pointers = own.data.ptr, everyone.data.ptr
            self.communicator.allGather(*pointers, own.size, kind, self.device.stream.ptr)
        self.ranks.sent_bytes += own.nbytes


def choose_transport(ranks: Exchange, backend: Backend, device: Device) -> Transport:
    """NCCL where every rank has it."""
    nccl: Any = None
    if isinstance(device, CupyDevice):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy says in a paragraph that the library is not installed
            nccl = device.cupy.cuda.nccl
    if ranks.any(nccl is None or not nccl.available):
        return ThroughHost(ranks, backend, device)
    assert isinstance(device, CupyDevice)
    return ByNccl(ranks, nccl, device)


class _Shared(Products):
    """`Products` of several ranks: `own` (nodes, batch, units), and `everyone`'s (ranks nodes, batch, units)."""

    def __init__(self, backend: Backend, part: Array, nodes: int, ranks: int) -> None:
        super().__init__(backend, part)
        self.own = backend.zeros((nodes, *part.shape[1:]), part.dtype)
        self.everyone = backend.zeros((ranks * nodes, *part.shape[1:]), part.dtype)


class CudaRankEngine(CudaEngine):
    """`CudaEngine` for one of several ranks; arguments as there, but for `samples`: (m, columns of this rank).

    `model` and `optimizer` are whole; between two calls of `settle`, which every rank must make, this rank's columns of
    W0 and its moments alone are cared for, in arrays of its own.
    """

    def __init__(
        self,
        ranks: Exchange,
        model: DeepNetwork,
        optimizer: BaseOptimizer,
        samples: Array,
        targets: Array,
        backend: Backend,
        settings: Settings,
        device: Device | None = None,
        transport: Callable[[Exchange, Backend, Device], Transport] = choose_transport,
    ) -> None:
        self.ranks, self._n_x = ranks, model.neuron_cnt[0]
        self._all_nodes = ranks.nodes(self._n_x)
        self._most_nodes = max(map(len, self._all_nodes))
        super().__init__(model, optimizer, samples, targets, backend, settings, device)
        whole = optimizer.flat_state()
        behind = whole[0].shape[0] - self.plan.units * self._n_x
        count = self.plan.units * self.plan.neuron_cnt[0] + behind
        self._state = [backend.zeros((count,), model.dtype) for _ in whole]
        self._packed = False
        flat = [node for nodes in self._all_nodes for node in nodes]
        places = [rank * self._most_nodes + k for rank, nodes in enumerate(self._all_nodes) for k in range(len(nodes))]
        self._joins = backend.asarray(np.array([*zip(places, merges(flat), strict=True)], dtype=np.int32))
        self.transport = transport(ranks, backend, self.device)

    # --- steps --------------------------------------------------------------------------------------------------------

    def stops(self, asked: bool) -> bool:
        return self.ranks.any(asked)

    def _room(self, part: Array) -> Products:
        return _Shared(self.backend, part, self._most_nodes, self.ranks.size)

    def _own_nodes(self) -> list[tuple[int, int]]:
        first, _ = self.ranks.panels(self._n_x)
        each, tiles = PANEL // self.plan.tile, self.plan.tiles
        starts = [((start - first) * each, count * each) for start, count in self._all_nodes[self.ranks.rank]]
        return [(start, min(count, tiles - start)) for start, count in starts]

    def _flat_state(self) -> list[Array]:
        return self._state

    def _to_add(self) -> tuple[Array, int]:
        return self._products.total, 1

    def _attach(self) -> None:
        if not self._packed:
            for whole, own in self._pairs():
                own[...] = whole
            self._packed = True
        super()._attach()

    def _first_product(self, first: int) -> None:
        super()._first_product(first)
        self._add_up(self._products, self.lengths[first])

    def _queue(self, first: int, count: int) -> None:
        """Without a graph: between two launches others have a say."""
        for ahead in range(count):
            self._middle(ahead)
            self._stream(ahead, self.samples, self._products)
            if self._lengths_behind[first + ahead]:
                self._add_up(self._products, int(self._lengths_behind[first + ahead]))
        self.device.launch("advance", (1,), 1, [self._base, np.int32(count)], 0)

    def _add_up(self, products: Products, count: int) -> None:
        assert isinstance(products, _Shared)
        self._subtotals(products, count, products.own)
        self.transport.gather(products.own, products.everyone)
        size = products.batch * self.plan.units
        arguments = [products.everyone, np.int32(size), self._joins, np.int32(len(self._joins)), products.total]
        self.device.launch("join", (-(-size // SUMMING_THREADS),), SUMMING_THREADS, arguments, 0)

    # --- the local state ----------------------------------------------------------------------------------------------

    def _pairs(self, rest_alone: bool = False) -> list[tuple[Array, Array]]:
        """What the model and the optimizer have, and the same here: this rank's columns of W0, and what lies behind."""
        share, units, found = self.ranks.share(self._n_x), self.plan.units, []
        for whole, own in zip(self.optimizer.flat_state(), self._state, strict=True):
            at, here = units * self._n_x, units * self.plan.neuron_cnt[0]
            columns = whole[:at].reshape(units, -1)[:, share], own[:here].reshape(units, -1)
            found += [(whole[at:], own[here:])] if rest_alone else [columns, (whole[at:], own[here:])]
        return found

    def _write_rest(self) -> None:
        super()._write_rest()
        for whole, own in self._pairs(rest_alone=True):
            whole[...] = own

    def settle(self) -> None:
        super().settle()
        if self._packed:
            for whole, own in self._pairs():
                whole[...] = own
            for flat in self.optimizer.flat_state():
                W = flat[: self.plan.units * self._n_x].reshape(self.plan.units, -1)
                host = np.array(self.backend.to_host(W))
                self.ranks.gather_columns(host)
                W[...] = self.backend.asarray(host)
            self._packed = False


class CoresRankEngine(CudaRankEngine):
    """The same without tensor cores."""

    tensor_cores = False


__all__ = ["ByNccl", "CoresRankEngine", "CudaRankEngine", "ThroughHost", "Transport", "choose_transport"]
