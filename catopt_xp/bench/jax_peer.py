"""JAX on the CPU: the set resident as uint8, many steps in one compiled loop, the chapter's rules. Floor F5.

The loop makes as many steps as it is told, up to CHUNK, so that one compiled program does for any number of them.
"""

from __future__ import annotations

import os
from functools import partial
from itertools import groupby, islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from catopt_xp.bench.base_contender import Peer
from catopt_xp.bench.workload import Rows, Workload

CHUNK = 64  # steps in one call at most; more are no faster
BETA, BETA1, BETA2 = 0.9, 0.9, 0.999
RMSPROP_EPS, ADAM_EPS = 1e-6, 1e-8


class JaxPeer(Peer):
    """JAX with the chapter's formulas. It takes its threads once in a process, from the first workload.

    Raises RuntimeError where an earlier one in this process had other `threads`.
    """

    name = "jax"

    def __init__(self, workload: Workload, threads: int) -> None:
        super().__init__(workload, threads)
        _take_threads(threads)
        cpu = jax.devices("cpu")[0]
        self._X = jax.device_put(workload.pixels(), cpu)  # (m, n_x) uint8
        self._Y = jax.device_put(workload.targets().reshape(-1).astype(np.float32), cpu)  # (m,)
        weights = {name: np.asarray(values, np.float32) for name, values in workload.weights().items()}
        zeros = {name: np.zeros_like(values) for name, values in weights.items()}
        # Parameters, their two moving averages and the number of steps; each an array of its own, as it is given away.
        second = {name: values.copy() for name, values in zeros.items()}
        self._state: Any = jax.device_put((weights, zeros, second, np.float32(0)), cpu)
        layers = len(workload.hidden) + 1
        steps = jax.jit(
            partial(_steps, layers=layers, optimizer=workload.optimizer, rate=workload.rate), donate_argnums=0
        )
        self._compiled: dict[int, Any] = {}  # by rows of a mini-batch
        for size in {len(rows) for rows in islice(workload.row_batches(), workload.batches)}:
            rows = jax.ShapeDtypeStruct((CHUNK, size), np.int32)
            count = jax.ShapeDtypeStruct((), np.int32)
            self._compiled[size] = steps.lower(self._state, self._X, self._Y, rows, count).compile()

    def _make(self, batches: list[Rows]) -> None:
        waiting = []
        for size, equal in groupby(batches, len):
            run = np.asarray(list(equal), dtype=np.int32)  # (steps, size)
            for start in range(0, len(run), CHUNK):
                count = min(CHUNK, len(run) - start)
                rows = np.zeros((CHUNK, size), dtype=np.int32)
                rows[:count] = run[start : start + count]
                self._state, losses = self._compiled[size](self._state, self._X, self._Y, rows, np.int32(count))
                waiting.append((losses, count))
        jax.block_until_ready(self._state)
        for losses, count in waiting:
            self._losses += np.asarray(losses)[:count].tolist()

    def versions(self) -> dict[str, str]:
        return {"jax": jax.__version__}


def _take_threads(threads: int) -> None:
    """Lets JAX use so many threads, which it asks for once, when it starts."""
    if os.environ.setdefault("NPROC", str(threads)) != str(threads):
        started = os.environ["NPROC"]
        raise RuntimeError(f"JAX runs on {started} threads in this process (NPROC), {threads} are asked: start anew")


def _steps(
    state: Any, X: Any, Y: Any, rows: Any, count: Any, *, layers: int, optimizer: str, rate: float
) -> tuple[Any, Any]:
    """One update for each of the first `count` rows of `rows` (CHUNK, n); the new state, and the losses (CHUNK,)."""

    def step(k: Any, carried: tuple[Any, Any]) -> tuple[Any, Any]:
        (parameters, first, second, t), losses = carried
        loss, gradients = jax.value_and_grad(_loss)(parameters, X[rows[k]], Y[rows[k]], layers)
        t = t + 1
        new = {n: _updated(p, gradients[n], first[n], second[n], t, optimizer, rate) for n, p in parameters.items()}
        parameters, first, second = ({name: parts[i] for name, parts in new.items()} for i in range(3))
        return (parameters, first, second, t), losses.at[k].set(loss)

    looped: tuple[Any, Any] = jax.lax.fori_loop(0, count, step, (state, jnp.zeros(CHUNK, jnp.float32)))
    return looped


def _loss(parameters: Any, pixels: Any, y: Any, layers: int) -> Any:
    """The mean binary cross-entropy of a batch, pixels (n, n_x) uint8, y (n,)."""
    A = pixels.astype(jnp.float32) * np.float32(1 / 255)
    for k in range(layers):
        Z = A @ parameters[f"W{k}"].T + parameters[f"b{k}"].T  # (n, n_out)
        A = jax.nn.relu(Z)
    z = Z[:, 0]
    return jnp.mean(jnp.maximum(z, 0) - z * y + jnp.log1p(jnp.exp(-jnp.abs(z))))


def _updated(p: Any, g: Any, first: Any, second: Any, t: Any, optimizer: str, rate: float) -> tuple[Any, Any, Any]:
    """Parameter and moments after an update."""
    if optimizer == "gd":
        return p - rate * g, first, second
    if optimizer == "momentum":
        first = BETA * first + (1 - BETA) * g
        return p - rate * first, first, second
    if optimizer == "rmsprop":
        second = BETA * second + (1 - BETA) * g * g
        return p - rate * g / jnp.sqrt(second / (1 - BETA**t) + RMSPROP_EPS), first, second
    first = BETA1 * first + (1 - BETA1) * g
    second = BETA2 * second + (1 - BETA2) * g * g
    change = rate * (first / (1 - BETA1**t)) / (jnp.sqrt(second / (1 - BETA2**t)) + ADAM_EPS)
    return p - change, first, second


__all__ = ["JaxPeer"]
