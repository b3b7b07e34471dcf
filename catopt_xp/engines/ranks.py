"""How the first layer is dealt to ranks: each has panels that lie together, and hands on sums of whole subtrees.

Which rank has which panels follows from their numbers alone. A rank's panels are cut into the largest whole subtrees of
the tree on panel numbers (`panels.py`); from step to step it hands on one sum for each, and whoever joins them has the
bits of one process.
"""

from __future__ import annotations

from catopt_xp.engines.panels import PANEL, grain, subtrees


class PanelShares:
    """The panels, columns and subtrees of each rank, for `n_x` features.

    Attributes, of this rank: `first` and `stop`, its first panel and the next rank's; `columns`, its features;
    `most_task`, the panels of its longest task. `panels`: the number of all panels. Raises ValueError where there are
    more ranks than panels.

    >>> shares = PanelShares(9 * 1024, rank=1, size=2)
    >>> shares.first, shares.stop, shares.columns, shares.most_task
    (4, 9, slice(4096, 9216, None), 4)
    """

    def __init__(self, n_x: int, rank: int = 0, size: int = 1) -> None:
        self.n_x, self.rank, self.size = n_x, rank, size
        self.panels = -(-n_x // PANEL)
        if self.panels < size:
            told = f"{n_x} features are {self.panels} panel{'s' * (self.panels > 1)} of {PANEL}"
            raise ValueError(f"{size} ranks are too many, as {told}: start at most {self.panels}")
        self.first, self.stop = self._bounds(rank)
        self.columns = self._columns(rank)
        self.most_task = grain(self.first, self.stop, self.panels)

    def _bounds(self, rank: int) -> tuple[int, int]:
        return self.panels * rank // self.size, self.panels * (rank + 1) // self.size

    def _columns(self, rank: int) -> slice:
        first, stop = self._bounds(rank)
        return slice(first * PANEL, min(self.n_x, stop * PANEL))

    def all_columns(self) -> list[slice]:
        """The features of every rank, by rank."""
        return [self._columns(rank) for rank in range(self.size)]

    def nodes(self) -> list[list[tuple[int, int]]]:
        """The subtrees of every rank, by rank, as (first panel, panels); the last may end beyond the last panel.

        >>> PanelShares(9 * 1024).nodes()
        [[(0, 16)]]
        """
        found = []
        for rank in range(self.size):
            first, stop = self._bounds(rank)
            task = grain(first, stop, self.panels)
            found.append([(k * task, n * task) for k, n in subtrees(first // task, -(-stop // task))])
        return found
