"""Before anything is timed: does every contender compute the same thing? Floor F5."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from catopt_xp.bench.contenders import CONTENDERS, OurEngine
from catopt_xp.bench.workload import Workload

STEPS = 12
TOLERANCE = 1e-3  # of the loss: float32 against float64, over STEPS updates
RATES = {"gd": 0.02, "momentum": 0.1, "rmsprop": 1e-3, "adam": 1e-3}  # at which the loss moves, and does not jump


class BenchError(RuntimeError):
    """A contender that does not do the work, or work that cannot be timed; the message is one line."""


def small_workload(optimizer: str = "adam") -> Workload:
    """A workload of the same kind that takes milliseconds; its mini-batches are 40, 40 and 16 samples."""
    return Workload(n_x=3000, m=96, batch_size=40, optimizer=optimizer, learning_rate=RATES[optimizer])


def check_agreement(names: Sequence[str], threads: int, workload: Workload | None = None) -> dict[str, float]:
    """Largest relative difference of each contender's losses from the plain engine's in float64, by name.

    `names`: contenders that can run here; `threads`: as for them; `workload`: None takes `small_workload()`. Those with
    a convention of their own (PyTorch's RMSprop) are held to the plain engine in that convention. Raises BenchError
    naming the first one that differs by more than TOLERANCE.

    >>> check_agreement(["plain"], threads=1)["plain"] < 1e-4
    True
    """
    work = small_workload() if workload is None else workload
    differences = {}
    for name in names:
        contender = CONTENDERS[name](work, threads)
        contender.steps(STEPS - 5)
        contender.steps(5)  # it goes on where it ended
        reference = _reference(work, threads, contender.convention)
        losses = contender.losses()
        if losses.shape != reference.shape:
            raise BenchError(f"{name} made {losses.size} steps of {STEPS}: it is not timed")
        difference = float(np.max(np.abs(losses - reference) / reference))
        if not difference <= TOLERANCE:
            raise BenchError(
                f"{name} does not compute the same: a loss differs by {difference:.1e} of its size, at most"
                f" {TOLERANCE:g} is allowed; mend it, or leave it out"
            )
        differences[name] = difference
    return differences


def _reference(work: Workload, threads: int, convention: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    plain = OurEngine("plain", dataclasses.replace(work, dtype="float64"), threads, convention)
    plain.steps(STEPS)
    return plain.losses()
