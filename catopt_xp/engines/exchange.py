"""What a rank's engine knows of the other ranks. Floor F3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from catopt_xp.engines.panels import Floats


class Exchange(Protocol):
    """What a rank's engine needs of the others: `distributed.Ranks`."""

    rank: int
    size: int
    sent_bytes: int

    def share(self, n_x: int) -> slice:
        """This rank's features."""

    def panels(self, n_x: int) -> tuple[int, int]:
        """This rank's first panel, and the next one's."""

    def nodes(self, n_x: int) -> list[list[tuple[int, int]]]:
        """Each rank's subtrees."""

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""

    def from_first(self, value: Any) -> Any:
        """The first rank's value."""

    def gather(self, own: Floats, counts: Sequence[int]) -> Floats:
        """All ranks' numbers."""

    def gather_columns(self, W: Floats) -> None:
        """Fills in what other ranks care for."""


__all__ = ["Exchange"]
