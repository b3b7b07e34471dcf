"""Shares of the first layer: which panels, which columns and which subtrees of the sums belong to each rank."""

from __future__ import annotations

from catopt_xp.engines.panels import PANEL, grain, subtrees


class PanelShares:
    """How the panels of `n_x` features are shared by `size` ranks, as seen by one of them.

    `first`, `stop`: its panels; `columns`: its features. Raises ValueError where there are more ranks than panels.

    >>> shares = PanelShares(100_000)
    >>> shares.first, shares.stop, shares.columns
    (0, 98, slice(0, 100000, None))
    """

    def __init__(self, n_x: int, rank: int = 0, size: int = 1) -> None:
        self.n_x, self.rank, self.size, self.panels = n_x, rank, size, -(-n_x // PANEL)
        if self.panels < size:
            told = f"{n_x} features are {self.panels} panel{'s' * (self.panels > 1)} of {PANEL}"
            raise ValueError(f"{size} ranks are too many, as {told}: start at most {self.panels}")
        self.first, self.stop = self._bounds(rank)
        self.columns = self.all_columns()[rank]

    def _bounds(self, rank: int) -> tuple[int, int]:
        return self.panels * rank // self.size, self.panels * (rank + 1) // self.size

    def all_columns(self) -> list[slice]:
        """The features of each rank."""
        bounds = map(self._bounds, range(self.size))
        return [slice(first * PANEL, min(self.n_x, stop * PANEL)) for first, stop in bounds]

    def nodes(self) -> list[list[tuple[int, int]]]:
        """For each rank the subtrees that its panels are, as (first, length); the last may end beyond the last panel.

        >>> PanelShares(9 * 1024).nodes()
        [[(0, 16)]]
        """
        found = []
        for first, stop in map(self._bounds, range(self.size)):
            task = grain(first, stop, self.panels)
            found.append([(k * task, n * task) for k, n in subtrees(first // task, -(-stop // task))])
        return found
