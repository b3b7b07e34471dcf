"""Before anything is timed: does every contender compute the same thing?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
        reference = reference_losses(work, threads, contender.convention)
        differences[name] = difference(name, contender.losses(), reference)
    return differences


def reference_losses(
    work: Workload, threads: int, convention: str = "chapter", steps: int = STEPS
) -> NDArray[np.float64]:
    """What the others are held to: the losses of the first `steps` updates by the plain engine in float64, on a CPU.

    >>> reference_losses(small_workload(), threads=1, steps=3).shape
    (3,)
    """
    plain = OurEngine("plain", dataclasses.replace(work, dtype="float64"), threads, convention)
    plain.steps(steps)
    return plain.losses()


def difference(
    name: str, losses: NDArray[np.float64], reference: NDArray[np.float64], tolerance: float = TOLERANCE
) -> float:
    """The largest difference of a contender's losses from the reference's, relative to these.

    Raises BenchError naming the contender where it is beyond `tolerance`, or where losses are missing.

    >>> difference("panels", np.array([0.7, 0.6]), np.array([0.7, 0.6]))
    0.0
    """
    if losses.shape != reference.shape:
        raise BenchError(f"{name} made {losses.size} steps of {reference.size}: it is not timed")
    largest = float(np.max(np.abs(losses - reference) / reference))
    if not largest <= tolerance:
        raise BenchError(
            f"{name} does not compute the same: a loss differs by {largest:.1e} of its size, at most"
            f" {tolerance:g} is allowed; mend it, or leave it out"
        )
    return largest
