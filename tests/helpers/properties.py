"""Properties that hold for anything hypothesis draws: a short form for every run, a long one whose figures are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def times(short: int, long: int) -> pytest.MarkDecorator:
    """Parametrizes a test by `examples`: how many to draw, few in every run, many in that of the long tests."""
    many = pytest.param(long, id="long", marks=pytest.mark.long)
    return pytest.mark.parametrize("examples", [pytest.param(short, id="short"), many])


class Tally:
    """What came of the examples, by word: `tally("refused")` counts one more."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def __call__(self, word: str) -> None:
        self.found[word] += 1


def prove(holds: Any, examples: int, record: Callable[..., None], tally: Tally) -> None:
    """Runs a property, a function under `given`, so many times; records a run of many. A failure is hypothesis's."""
    settings(max_examples=examples, suppress_health_check=SLOW)(holds)()
    assert sum(tally.found.values()) >= examples // 2, f"only {dict(tally.found)} of {examples} examples told anything"
    record(tried=sum(tally.found.values()), broke=0, **tally.found)


def refusal(error: Exception, *names: str) -> str:
    """The message of a refusal, which is one line that names the argument."""
    told = str(error)
    assert "\n" not in told, told
    assert any(name in told for name in names), f"{told!r} names none of {names}"
    return told


def outcome(ask: Callable[[], Any], *names: str) -> str:
    """ "answered", or the message of a refusal that names one of the arguments."""
    try:
        ask()
    except (TypeError, ValueError) as error:
        return refusal(error, *names)
    return "answered"
