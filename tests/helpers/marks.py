"""Parameters of which some run always, and the others where `-m` names their mark."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some(values: Iterable[Any], kept: Iterable[Any], mark: pytest.MarkDecorator = pytest.mark.long) -> list[Any]:
    """`values`, with `mark` on those that are not among `kept`; a tuple is the values of several parameters."""
    values, kept = list(values), list(kept)
    assert all(value in values for value in kept), f"{kept} are not all among {values}"
    return [value if value in kept else marked(value, mark) for value in values]


def marked(value: Any, mark: pytest.MarkDecorator) -> Any:
    """One parameter, or a tuple of several, behind a mark."""
    return pytest.param(*value, marks=mark) if isinstance(value, tuple) else pytest.param(value, marks=mark)
