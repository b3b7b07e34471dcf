"""The ways to run an epoch of mini-batch steps, and the choice between them. Floor F3.

An engine is built for one run, on one device, and makes the steps of an epoch one after the other:

    engine = choose_engine("auto", model, optimizer, ...)
    for done in engine.steps(epoch, order, first): ...   # done: batches finished so far in this epoch
"""

from __future__ import annotations

from catopt_xp.engines.plain import PlainEngine

ENGINES = ("auto", "plain")

__all__ = ["ENGINES", "PlainEngine", "check_engine"]


def check_engine(engine: str) -> str:
    """The engine's name if there is such an engine. Raises ValueError listing the choices.

    >>> check_engine("auto")
    'plain'
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; choose {', '.join(ENGINES)}")
    return "plain"
