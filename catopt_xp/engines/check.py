"""The check that a fused engine passes before it runs: three small steps, held to the plain engine's. Floor F3."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.xp import Array, get_backend
from catopt_xp.engines.plain import PlainEngine, Settings
from catopt_xp.nn.functional import pixel_scale
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.optim.base import BaseOptimizer

# Two panels of the CPU and a ragged one, eight tiles of the GPU and a ragged one. A GPU loads 16 bytes at a time where
# the features allow it, and reads others one by one.
ALIGNED_FEATURES, FEATURES = 2120, 2117
BOUNDS = {"float32": 2e-5, "float64": 1e-12}
MODES = ("eps_mode", "nesterov", "correct_param", "rate_inside")  # options that choose a form of a rule


def self_check(
    make: Callable[..., Any], optimizer: BaseOptimizer, samples: Array, model: DeepNetwork, penalised: bool = False
) -> str | None:
    """What differs between an engine and the plain one on this machine, or None; milliseconds, once per process.

    `make`: the engine's class, which has `next_product` beside what `PlainEngine` has; `optimizer`: of the kind and
    options to check; `samples`: the set, of which type and alignment count; `model`: the network, of which type, device
    and whether it is of relu alone count; `penalised`: as in the run's settings. Then the rest of the network goes by
    its formulas, as it does where no kernel knows it. Three steps with moments that are not 0 (a first step of Adam is
    lr*sign(g), whatever g's scale), on a ragged panel, with batches of 5, 5 and 3 samples.
    """
    decays = bool(optimizer.l2), bool(optimizer.weight_decay)
    modes = tuple(getattr(optimizer, name, None) for name in MODES)
    writeable = getattr(samples.flags, "writeable", True)
    kinds = str(samples.dtype), writeable, model.dtype, model.backend.device
    features = FEATURES if samples.shape[1] % 8 else ALIGNED_FEATURES
    first = "relu" if set(model.activation_func[:-1]) <= {"relu"} else "tanh"
    by_formulas = penalised or model.kernel_obstacle is not None
    return _check(make, type(optimizer), decays, modes, *kinds, features, first, by_formulas)


@functools.cache
def _check(
    make: Callable[..., Any],
    kind: type[BaseOptimizer],
    decays: tuple[bool, bool],
    modes: tuple[Any, ...],
    sample_dtype: str,
    writeable: bool,
    dtype: str,
    device: str,
    features: int,
    first: str,
    by_formulas: bool,
) -> str | None:
    backend = get_backend(device)
    rng, m = np.random.Generator(np.random.PCG64(0)), 13
    X = rng.integers(0, 256, (m, features)).astype(sample_dtype)  # (m, n_x)
    if sample_dtype != "uint8":
        X /= 255
    X.setflags(write=writeable)  # to numba, an array that cannot be written is another type: one is compiled, not both
    Y = rng.integers(0, 2, (1, m)).astype(dtype)
    options = {name: mode for name, mode in zip(MODES, modes, strict=True) if mode is not None}
    options |= {"l2": 1e-2 * decays[0], "weight_decay": 1e-2 * decays[1]}
    order = np.arange(m)[::-1].copy()
    # What is not a number differs, and is found so. Some BLAS set the processor's flags over rooms that nobody reads.
    with backend.activate(), np.errstate(all="ignore"):
        samples, targets = (X, Y) if backend.name == "numpy" else (backend.asarray(X), backend.asarray(Y))
        engines: list[Any] = []
        for make_one in (PlainEngine, make):
            model = DeepNetwork([features, 7, 3, 1], [first, "relu", "sigmoid"], seed=1, dtype=dtype, device=backend)
            twin = kind(model.save(), 1e-2, **options)
            draw = np.random.Generator(np.random.PCG64(1))
            for key, moment in twin.save().items():
                if "/" in key:
                    moment[...] = backend.asarray(1e-3 * draw.random(moment.shape), dtype=dtype)
            twin.steps = 3
            engines.append(
                make_one(model, twin, samples, targets, backend, Settings(batch_size=5, penalised=by_formulas))
            )
        plain, fused = engines
        for engine in engines:
            for _ in engine.steps(0, order, following=order):
                pass
        product = fused.next_product()
        fused.settle()
    theirs, ours = (_numbers(engine) for engine in (plain, fused))
    pairs = {name: (ours[name], theirs[name]) for name in theirs}
    pairs["Z0 of the next batch"] = product, theirs["W0"] @ (X[order[:5]] * pixel_scale(X.dtype)).astype(dtype).T
    for name, (here, there) in pairs.items():
        off = float(np.abs(here - there).max() / np.abs(there).max())
        if not off <= BOUNDS[dtype]:
            return f"{name} differs by {off:.1e} of its size, {kind.__name__}, {dtype}"
    return None


def _numbers(engine: PlainEngine) -> dict[str, NDArray[Any]]:
    """Parameters, moments and the losses, by name, on the host."""
    moments = {key: x for key, x in engine.optimizer.save().items() if "/" in key}
    arrays = dict(engine.model.save()) | moments
    return {name: engine.backend.to_host(x) for name, x in arrays.items()} | {"losses": engine.fetch_losses()}


__all__ = ["self_check"]
