"""What of the first layer lies on this GPU, and how sums over all of it come about.

A process alone (`State`, `Sums`) works on the optimizer's arrays and has the products of all tiles. One of several
ranks (`OwnColumns`, `JoinedSums`) has arrays of its own columns, and adds its sums to those of the others. The engine
asks either kind the same questions, and `shared` alone decides which it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from catopt_xp.backend.ranks import Ranks
from catopt_xp.backend.xp import Array, Backend
from catopt_xp.engines.cuda.device import Device
from catopt_xp.engines.cuda.launches import SUMMING_THREADS, StepGeometry
from catopt_xp.engines.cuda.transport import choose_transport
from catopt_xp.engines.panels import PANEL, merges
from catopt_xp.engines.ranks import PanelShares
from catopt_xp.optim.base import BaseOptimizer

# --- parameters and moments ---------------------------------------------------------------------------------------


class State:
    """Parameters and moments as the kernels work on them: the optimizer's own arrays."""

    def __init__(self, optimizer: BaseOptimizer) -> None:
        self.optimizer = optimizer

    def flat(self) -> list[Array]:
        """The parameters, then each moment, flat: W0 of the columns at hand, and the upper layers behind it."""
        return self.optimizer.flat_state()

    def read(self) -> None:
        """Takes over the values of the network and the optimizer, before the first step."""

    def write_upper(self) -> None:
        """Gives the network the values of the upper layers, which are the same on all ranks."""

    def write(self) -> None:
        """Gives network and optimizer all values. Every rank must call it."""


class OwnColumns(State):
    """Arrays of a rank's columns of W0 and of its moments; the optimizer's are whole.

    Between `read` and `write` a rank looks after these columns alone.
    """

    def __init__(
        self, optimizer: BaseOptimizer, backend: Backend, ranks: Ranks, shares: PanelShares, units: int
    ) -> None:
        super().__init__(optimizer)
        self.backend, self.ranks, self.shares, self.units = backend, ranks, shares, units
        whole, columns = optimizer.flat_state(), shares.columns
        others = units * (shares.n_x - (columns.stop - columns.start))
        self._own = [backend.zeros((flat.shape[0] - others,), flat.dtype) for flat in whole]
        self._in_use = False

    def flat(self) -> list[Array]:
        return self._own

    def read(self) -> None:
        if not self._in_use:
            for W, upper, own_W, own_upper in self._arrays():
                own_W[...] = W[:, self.shares.columns]
                own_upper[...] = upper
            self._in_use = True

    def write_upper(self) -> None:
        for _, upper, _, own_upper in self._arrays():
            upper[...] = own_upper

    def write(self) -> None:
        if self._in_use:
            for W, upper, own_W, own_upper in self._arrays():
                upper[...] = own_upper
                W[:, self.shares.columns] = own_W
                host = np.array(self.backend.to_host(W))
                self.ranks.gather_columns(host, self.shares.all_columns())
                W[...] = self.backend.asarray(host)
            self._in_use = False

    def _arrays(self) -> Iterator[tuple[Array, Array, Array, Array]]:
        """For the parameters and each moment: W0 and the upper layers of the optimizer, then those here."""
        columns = self.shares.columns
        at, own_at = self.units * self.shares.n_x, self.units * (columns.stop - columns.start)
        for whole, own in zip(self.optimizer.flat_state(), self._own, strict=True):
            W, own_W = whole[:at].reshape(self.units, -1), own[:own_at].reshape(self.units, -1)
            yield W, whole[at:], own_W, own[own_at:]


# --- sums of products ---------------------------------------------------------------------------------------------


@dataclass
class Room:
    """Where a launch of `stream` leaves the products of up to `batch` samples, and where they are added up.

    `part`: (tiles, batch, units); `own`: sums over the subtrees of this rank, (nodes, batch, units); `everyone`: over
    those of all ranks; `total`: over all tiles, (1, batch, units). In a process alone, the last three are one array.
    """

    part: Array
    own: Array
    everyone: Array
    total: Array

    @property
    def batch(self) -> int:
        return int(self.part.shape[1])


class Sums:
    """Adds up the products of all tiles, which are all here.

    In a step the kernel `middle` does this itself.
    """

    in_graphs = True  # whether a graph may hold whole steps
    transport_name = ""

    def __init__(self, geometry: StepGeometry, device: Device, backend: Backend) -> None:
        self.geometry, self.device, self.backend = geometry, device, backend
        self._nodes = backend.asarray(np.array(self._subtrees(), dtype=np.int32))  # (nodes, 2)

    def _subtrees(self) -> list[tuple[int, int]]:
        """The subtrees of tiles that are added up here, as (first, length)."""
        return [(0, self.geometry.tiles.count)]

    def room(self, part: Array) -> Room:
        """The room of a launch that leaves its products in `part`."""
        total = self.backend.zeros((1, *part.shape[1:]), part.dtype)
        return Room(part, total, total, total)

    def for_middle(self, room: Room) -> tuple[Array, int]:
        """What `middle` adds up, and of how many tiles."""
        return room.part, self.geometry.tiles.count

    def after_product(self, room: Room, count: int) -> None:
        """Queues what must follow the product of the next batch, of `count` samples, before `middle`."""

    def add_up(self, room: Room, count: int) -> None:
        """Queues the sums of the first `count` samples, into `room.total`."""
        arguments = [room.part, np.int32(room.batch), self._nodes, room.own]
        grid = count, len(self._nodes)
        self.device.launch("subtotals", grid, SUMMING_THREADS, arguments, self.geometry.subtotals_shared)


class JoinedSums(Sums):
    """Adds up the products of the tiles of all ranks.

    Each rank adds up whole subtrees of the tree on tiles. Then every rank joins the sums of all, so that their bits are
    those of one process.
    """

    in_graphs = False  # between two launches the other ranks have a say

    def __init__(
        self, geometry: StepGeometry, device: Device, backend: Backend, ranks: Ranks, shares: PanelShares
    ) -> None:
        self.ranks, self.shares, nodes = ranks, shares, shares.nodes()
        super().__init__(geometry, device, backend)
        self._most_nodes = max(map(len, nodes))
        places = [rank * self._most_nodes + k for rank, own in enumerate(nodes) for k in range(len(own))]
        joined = zip(places, merges([node for own in nodes for node in own]), strict=True)
        self._joins = backend.asarray(np.array([*joined], dtype=np.int32))  # (nodes of all ranks, 2)
        self.transport = choose_transport(ranks, backend, device)
        self.transport_name = self.transport.name

    def _subtrees(self) -> list[tuple[int, int]]:
        each, tiles = PANEL // self.geometry.tiles.length, self.geometry.tiles.count
        nodes = self.shares.nodes()[self.ranks.rank]
        starts = [((start - self.shares.first) * each, count * each) for start, count in nodes]
        return [(start, min(count, tiles - start)) for start, count in starts]

    def room(self, part: Array) -> Room:
        nodes = self._most_nodes, self.ranks.size * self._most_nodes, 1
        return Room(part, *(self.backend.zeros((n, *part.shape[1:]), part.dtype) for n in nodes))

    def for_middle(self, room: Room) -> tuple[Array, int]:
        return room.total, 1

    def after_product(self, room: Room, count: int) -> None:
        if count:
            self.add_up(room, count)

    def add_up(self, room: Room, count: int) -> None:
        super().add_up(room, count)
        self.transport.gather(room.own, room.everyone)
        size = room.batch * self.geometry.tiles.units
        arguments = [room.everyone, np.int32(size), self._joins, np.int32(len(self._joins)), room.total]
        self.device.launch("join", (-(-size // SUMMING_THREADS),), SUMMING_THREADS, arguments, 0)


def shared(
    n_x: int, ranks: Ranks, optimizer: BaseOptimizer, geometry: StepGeometry, device: Device, backend: Backend
) -> tuple[State, Sums]:
    """The state and the sums of one of these ranks; `n_x`: features of all of them."""
    if ranks.size == 1:
        return State(optimizer), Sums(geometry, device, backend)
    shares = PanelShares(n_x, ranks.rank, ranks.size)
    state = OwnColumns(optimizer, backend, ranks, shares, geometry.tiles.units)
    return state, JoinedSums(geometry, device, backend, ranks, shares)
