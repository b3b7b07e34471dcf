"""The ways to run an epoch of mini-batch steps, and the choice between them. Floor F3.

An engine is built for one run, on one device, and makes the steps of an epoch one after the other:

    engine, why = choose_engine("auto", model, optimizer, samples, targets, backend, settings)
    for done in engine.steps(epoch, order, first): ...   # done: batches finished so far in this epoch
    losses = engine.fetch_losses()
"""

from __future__ import annotations

from catopt_xp.backend import Array, Backend
from catopt_xp.engines.plain import PlainEngine, Settings
from catopt_xp.network import BaseRegressionModel
from catopt_xp.optim import BaseOptimizer

ENGINES = ("auto", "plain")

__all__ = ["ENGINES", "PlainEngine", "Settings", "choose_engine"]


def choose_engine(
    engine: str,
    model: BaseRegressionModel,
    optimizer: BaseOptimizer,
    samples: Array,
    targets: Array,
    backend: Backend,
    settings: Settings,
) -> tuple[PlainEngine, str]:
    """The engine for a run, and why it is that one. Arguments after `engine` (one of ENGINES) as for `PlainEngine`."""
    why = "the only one of this version" if engine == "auto" else "as asked"
    return PlainEngine(model, optimizer, samples, targets, backend, settings), why
