"""JAX on the CPU: the set resident as uint8, many steps in one compiled loop, the chapter's rules.

The loop makes a given number of steps, up to CHUNK, so that one compiled program serves any number.
"""

from __future__ import annotations

import os
from functools import partial
from itertools import groupby, islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.peer import Peer
from benchmarks.peers.rules import corrections, updated
from catopt_xp.commands.bench import Rows, Workload

CHUNK = 64  # steps in one call at most; more steps are no faster


class JaxPeer(Peer):
    """JAX with the chapter's formulas. A process sets its threads once, for the first contender.

    Raises RuntimeError where an earlier contender in this process had another number of `threads`.
    """

    name = "jax"

    def __init__(self, workload: Workload, threads: int) -> None:
        super().__init__(workload, threads)
        _take_threads(threads)
        cpu = jax.devices("cpu")[0]
        self._X = jax.device_put(workload.pixels(), cpu)  # (m, n_x) uint8
        self._Y = jax.device_put(workload.targets().reshape(-1).astype(np.float32), cpu)  # (m,)
        self._state: Any = jax.device_put(initial_state(workload), cpu)
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


def initial_state(workload: Workload) -> tuple[Any, Any, Any, np.float32]:
    """Parameters and two moving averages, by name, and the number of updates so far, on the host.

    No two share memory: all are donated to the loop that updates them.
    """
    weights = {name: np.asarray(values, np.float32) for name, values in workload.weights().items()}
    first, second = ({name: np.zeros_like(values) for name, values in weights.items()} for _ in range(2))
    return weights, first, second, np.float32(0)


def _take_threads(threads: int) -> None:
    """Sets the number of threads of JAX, which reads it once, when it starts."""
    if os.environ.setdefault("NPROC", str(threads)) != str(threads):
        started = os.environ["NPROC"]
        raise RuntimeError(f"JAX runs on {started} threads in this process (NPROC), {threads} are asked: start anew")


def _steps(
    state: Any, X: Any, Y: Any, rows: Any, count: Any, *, layers: int, optimizer: str, rate: float
) -> tuple[Any, Any]:
    """Makes an update for each of the first `count` rows of `rows` (CHUNK, n); returns state and losses (CHUNK,)."""

    def step(k: Any, carried: tuple[Any, Any]) -> tuple[Any, Any]:
        (parameters, first, second, t), losses = carried
        loss, gradients = jax.value_and_grad(batch_loss)(parameters, X[rows[k]], Y[rows[k]], layers)
        t = t + 1
        divisors = corrections(t, optimizer)
        new = after_update(parameters, gradients, first, second, divisors, optimizer, rate)
        return (*new, t), losses.at[k].set(loss)

    looped: tuple[Any, Any] = jax.lax.fori_loop(0, count, step, (state, jnp.zeros(CHUNK, jnp.float32)))
    return looped


def batch_loss(parameters: Any, samples: Any, y: Any, layers: int, precision: str | None = None) -> Any:
    """The mean binary cross-entropy of a batch, a scalar.

    `parameters`: by name; `samples`: (n, n_x), uint8 pixels or float32; `y`: (n,) of 0 and 1; `layers`: that have
    weights; `precision`: of the products, as JAX names it (None: its default).
    """
    A = samples.astype(jnp.float32)
    if samples.dtype == jnp.uint8:
        A = A * np.float32(1 / 255)
    for k in range(layers):
        Z = jnp.matmul(A, parameters[f"W{k}"].T, precision=precision) + parameters[f"b{k}"].T  # (n, n_out)
        A = jax.nn.relu(Z)
    z = Z[:, 0]
    return jnp.mean(jnp.maximum(z, 0) - z * y + jnp.log1p(jnp.exp(-jnp.abs(z))))


def after_update(
    parameters: Any, gradients: Any, first: Any, second: Any, divisors: Any, optimizer: str, rate: float
) -> tuple[Any, Any, Any]:
    """Parameters and their two moving averages, by name, after an update; as for `rules.updated`."""
    new = {
        n: updated(p, gradients[n], first[n], second[n], divisors, optimizer, rate, jnp.sqrt)
        for n, p in parameters.items()
    }
    parameters, first, second = ({name: parts[i] for name, parts in new.items()} for i in range(3))
    return parameters, first, second


__all__ = ["JaxPeer", "after_update", "batch_loss", "initial_state"]
