"""JAX on a GPU: an epoch is one compiled program, a scan over its steps; the chapter's rules."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.jax_peer import after_update, batch_loss, initial_state
from benchmarks.peers.rules import correction_table
from benchmarks.peers_gpu.epochs import EpochContender
from catopt_xp.backend.machine import thread_count
from catopt_xp.commands.bench import Workload
from catopt_xp.nn.functional import pixel_scale


class JaxScan(EpochContender):
    """JAX with the set on the device as uint8 (each batch gathered and converted in the program) or float32.

    `device`: "cuda" or "cpu"; `resident`: "uint8" or "float32"; `precision`: of the products, None is JAX's default,
    which on a GPU rounds their factors to TF32. `unroll`: steps in an iteration of the loop. Parameters and moments are
    donated to each epoch's call.
    """

    def __init__(
        self, workload: Workload, device: str, resident: str, precision: str | None = "highest", unroll: int = 1
    ) -> None:
        super().__init__(workload, thread_count())
        self.name = f"jax-{'unrolled-' if unroll > 1 else ''}{resident if precision else 'tf32'}"
        place = jax.devices(device)[0]
        pixels = jax.device_put(workload.pixels(), place)  # (m, n_x)
        scale = np.float32(pixel_scale(np.dtype(np.uint8)))
        self._X = pixels if resident == "uint8" else jax.jit(lambda x: x.astype(jnp.float32) * scale)(pixels)
        self._Y = jax.device_put(workload.targets().reshape(-1).astype(np.float32), place)  # (m,)
        self._state: Any = jax.device_put(initial_state(workload)[:3], place)
        steps = partial(
            _epoch,
            layers=len(workload.hidden) + 1,
            optimizer=workload.optimizer,
            rate=workload.rate,
            precision=precision,
            unroll=unroll,
        )
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in self._numbers(0)]
        program = jax.jit(steps, donate_argnums=0)
        self._compiled = program.lower(self._state, self._X, self._Y, *shapes).compile()

    def _numbers(self, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """An epoch's rows of whole batches (steps, batch size), its other rows, and its corrections."""
        order, size, steps = self.order(epoch).astype(np.int32), self.slices[0].stop, self.workload.batches
        whole = len(order) // size * size
        table = correction_table(epoch * steps, steps, self.workload.optimizer)
        return order[:whole].reshape(-1, size), order[whole:], table

    def _make(self, epoch: int) -> NDArray[np.float64]:
        self._state, losses = self._compiled(self._state, self._X, self._Y, *self._numbers(epoch))
        jax.block_until_ready(self._state)
        return np.asarray(losses, dtype=np.float64)  # sync

    def versions(self) -> dict[str, str]:
        return {"jax": jax.__version__}


def _epoch(
    state: Any,
    X: Any,
    Y: Any,
    whole: Any,
    rest: Any,
    table: Any,
    *,
    layers: int,
    optimizer: str,
    rate: float,
    precision: Any,
    unroll: int,
) -> tuple[Any, Any]:
    """Makes one update for each row of `whole` (steps, n), and one for the samples in `rest`, if there are any."""

    def step(carried: Any, numbers: Any) -> tuple[Any, Any]:
        (parameters, first, second), (rows, divisors) = carried, numbers
        samples, targets = (array.at[rows].get(mode="promise_in_bounds") for array in (X, Y))
        loss, gradients = jax.value_and_grad(batch_loss)(parameters, samples, targets, layers, precision)
        return after_update(parameters, gradients, first, second, divisors, optimizer, rate), loss

    state, losses = jax.lax.scan(step, state, (whole, table[: len(whole)]), unroll=unroll)
    if len(rest):
        state, loss = step(state, (rest, table[-1]))
        losses = jnp.append(losses, loss)
    return state, losses


__all__ = ["JaxScan"]
