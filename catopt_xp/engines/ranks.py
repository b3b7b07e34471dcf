"""The panel engine of a rank: its own panels, and the sums of all others'. Floor F3.

Only `_total` differs from a process of its own: the sums of this rank's subtrees are gathered with those of the others,
and the tree above them is finished by every rank alike. So is the rest of the network.
"""

from __future__ import annotations

import numpy as np

from catopt_xp.backend.xp import Array, Backend
from catopt_xp.engines.cpu import PanelEngine
from catopt_xp.engines.exchange import Exchange
from catopt_xp.engines.panels import PANEL, Floats, grain, join_subtrees, tree_sum
from catopt_xp.engines.plain import Settings
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.base import BaseOptimizer


class RankEngine(PanelEngine):
    """`PanelEngine` for one of several ranks; arguments as there, but for `samples`: (m, columns of this rank).

    `model` and `optimizer` are whole; between two calls of `settle`, which every rank must make, this rank's columns of
    W0 and its moments alone are cared for.
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
    ) -> None:
        self.ranks, n_x = ranks, model.neuron_cnt[0]
        self._columns = ranks.share(n_x)
        self._first, stop = ranks.panels(n_x)
        self._most_task = grain(self._first, stop, -(-n_x // PANEL))
        self._nodes = ranks.nodes(n_x)
        self._asked, self._stop_agreed = False, False
        super().__init__(model, optimizer, samples, targets, backend, settings)

    def stops(self, asked: bool) -> bool:
        self._asked = self._asked or asked
        return self._stop_agreed

    def _total(self, Z: Floats, length: int) -> Floats:
        size, first = Z.shape[1], self._first // length
        own = np.empty(len(self._nodes[self.ranks.rank]) * size + 1, dtype=Z.dtype)
        for k, (start, count) in enumerate(self._nodes[self.ranks.rank]):
            tasks = Z[start // length - first : -(-(start + count) // length) - first]
            own[k * size : (k + 1) * size] = tree_sum(tasks)
        own[-1] = self._asked  # whether this rank was asked to stop travels along
        counts = [len(nodes) * size + 1 for nodes in self._nodes]
        everyone = self.ranks.gather(own, counts)
        sums: list[Floats] = []
        for part, count in zip(np.split(everyone, np.cumsum(counts)[:-1]), counts, strict=True):
            sums += list(part[: count - 1].reshape(-1, size))
            self._stop_agreed = self._stop_agreed or bool(part[-1])
        return join_subtrees([node for nodes in self._nodes for node in nodes], sums)

    def settle(self) -> None:
        settled = not self._packed
        super().settle()
        if not settled:
            for W in self._whole():
                self.ranks.gather_columns(W)


__all__ = ["RankEngine"]
