"""The choice of the engine for a run, and the check that a fused engine passes before it runs."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.machine import address_room
from catopt_xp.backend.ranks import Ranks
from catopt_xp.backend.xp import Array, Backend, dtype_name, get_backend
from catopt_xp.engines.cuda.engine import CoresEngine, CudaEngine
from catopt_xp.engines.cuda.launches import geometry_of, size_obstacle
from catopt_xp.engines.panels import PANEL
from catopt_xp.engines.plain import PlainEngine, Settings, Weights
from catopt_xp.io.console import Signals, warn
from catopt_xp.nn.functional import pixel_scale
from catopt_xp.nn.network import BaseRegressionModel, DeepNetwork
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.rules import OPTIMIZERS

ENGINES = ("auto", "plain", "panels")
LEAST_EPS = 1e-30  # the panel engine estimates quotients, for denominators that are well above the smallest floats
# Units times batch size, for each feature and in all, from which whole products win over panels.
LARGE_PRODUCTS, LARGE = 80, 45_000
COMPILING = 512 << 20  # bytes of address space: to import numba took 150 MB, to compile up to 200 MB more
FAST = 'pip install "catopt-xp[fast]"'
# Two panels of the CPU and a ragged one, eight tiles of the GPU and a ragged one. A GPU loads 16 bytes at a time where
# the features allow it, and reads others one by one.
ALIGNED_FEATURES, FEATURES = 2120, 2117
BOUNDS = {"float32": 2e-5, "float64": 1e-12}
MODES = ("eps_mode", "nesterov", "correct_param", "rate_inside")  # options that choose a form of a rule


def self_check(
    make: Callable[..., Any], optimizer: BaseOptimizer, samples: Array, model: DeepNetwork, by_formulas: bool = False
) -> str | None:
    """What differs between an engine and the plain one on this machine, or None; milliseconds, once per process.

    `make`: the engine's class, which has `next_product` beside what `PlainEngine` has; `optimizer`: of the kind and
    options to check; `samples`: the set; `model`: the network; `by_formulas`: whether the rest
    of the network goes by its formulas, as it does where no kernel knows it. The answer is kept, keyed by the kind of
    optimizer and its options, the set's type and alignment, the network's dtype and device, and whether every hidden
    layer is relu. The check makes three steps with moments that are not 0 (a first step of Adam is lr*sign(g), whatever
    g's scale), on a ragged panel, with batches of 5, 5 and 3 samples.
    """
    decays = bool(optimizer.l2), bool(optimizer.weight_decay)
    modes = tuple(getattr(optimizer, name, None) for name in MODES)
    writeable = getattr(samples.flags, "writeable", True)
    kinds = str(samples.dtype), writeable, model.dtype, model.backend.device
    features = FEATURES if samples.shape[1] % 8 else ALIGNED_FEATURES
    first = "relu" if set(model.activation_func[:-1]) <= {"relu"} else "tanh"
    by_formulas = by_formulas or model.kernel_obstacle is not None
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
                make_one(model, twin, samples, targets, backend, Settings(batch_size=5, squares=by_formulas))
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


def choose_engine(
    engine: str,
    model: BaseRegressionModel,
    optimizer: BaseOptimizer,
    samples: Array,
    targets: Array,
    backend: Backend,
    settings: Settings,
    *,
    weights: Weights | None = None,
    ranks: Ranks | None = None,
) -> tuple[PlainEngine, str]:
    """The engine for a run, and why it is that one. Arguments after `engine` (one of ENGINES) as for `PlainEngine`.

    Raises ValueError where "panels" is asked for and cannot run this, or several ranks, which need it, cannot. Where
    the panel engine was chosen and fails its own check, one process warns (RuntimeWarning) and takes the plain engine,
    and ranks raise RuntimeError, or RankError if another rank's check failed.
    """
    ranks, weighted = ranks or Ranks(), weights is not None
    looked_at = model, optimizer, samples, backend, settings
    with ranks.agreed():
        obstacle = "as asked" if engine == "plain" else panel_obstacle(*looked_at, weighted)
        if ranks.size > 1:
            _check_for_ranks(engine, obstacle, backend)
        elif engine == "panels" and obstacle is not None:
            raise ValueError(f'engine "panels" cannot run this: {obstacle}; leave engine at "auto"')
        elif engine == "auto" and obstacle is None and backend.name == "numpy":
            obstacle = slower_with_panels(samples, model, settings, weighted)
        if obstacle is None:
            assert isinstance(model, DeepNetwork)
            make, obstacle = _first_that_passes(model, optimizer, samples, backend, settings, weighted, ranks)
            if make is not None:
                parts = model, optimizer, samples, targets, backend, settings
                made = make(*parts, weights=weights, ranks=ranks)
                return made, _why(engine, made, ranks, obstacle)
        return PlainEngine(model, optimizer, samples, targets, backend, settings, weights=weights), obstacle or ""


def _check_for_ranks(engine: str, obstacle: str | None, backend: Backend) -> None:
    """Raises ValueError where ranks cannot train with the panel engine."""
    if engine == "plain":
        raise ValueError('ranks train with the panel engine, "plain" is asked for: leave engine at "auto"')
    if obstacle is not None:
        cure = ': take device "cpu"' if backend.name == "cupy" else ""
        raise ValueError(f"ranks train with the panel engine, which cannot run this: {obstacle}{cure}")


def _panel_engines(backend: Backend) -> list[type[PlainEngine]]:
    """The panel engines of a device, the fastest first."""
    if backend.name == "cupy":
        return [CudaEngine, CoresEngine]
    from catopt_xp.engines.cpu.engine import PanelEngine  # needs numba

    return [PanelEngine]


def _first_that_passes(
    model: DeepNetwork,
    optimizer: BaseOptimizer,
    samples: Array,
    backend: Backend,
    settings: Settings,
    weighted: bool,
    ranks: Ranks,
) -> tuple[type[PlainEngine] | None, str | None]:
    """The fastest panel engine that passes its check on every rank, or None; and how the last faster one failed.

    One process warns of a failure. Ranks raise RuntimeError, or RankError, where no engine passes on all of them.
    """
    told: str | None = None
    failure: str | None = None
    for make in _panel_engines(backend):
        with Signals() as signals:  # numba loses an exception that comes while it compiles
            failure = check_failure(make, model, optimizer, samples, backend, settings, weighted)
        if signals.received:
            raise KeyboardInterrupt
        if not ranks.any(failure is not None):
            return make, told
        if ranks.size == 1:
            told = f"the panel engine failed its check: {failure}"
            warn(f"{told}; a slower one runs instead", RuntimeWarning)
    with ranks.agreed():  # the ranks whose check has passed are told of the failure by the others
        if ranks.size > 1 and failure is not None:
            raise RuntimeError(f"the panel engine failed its check on rank {ranks.rank}: {failure}")
    return None, told


def _why(engine: str, made: Any, ranks: Ranks, failed: str | None) -> str:
    """Why this panel engine was chosen; `failed`: how a faster one failed its check, or None."""
    if ranks.size == 1:
        return failed or ("as asked" if engine == "panels" else "the fastest that can run this")
    on_gpus = f", on a GPU of its own; sums {made.sums.transport_name}" if made.backend.name == "cupy" else ""
    return f"each of {ranks.size} ranks its panels{on_gpus}"


def check_failure(
    make: type[PlainEngine],
    model: DeepNetwork,
    optimizer: BaseOptimizer,
    samples: Array,
    backend: Backend,
    settings: Settings,
    weighted: bool = False,
) -> str | None:
    """Why the panel engine cannot be trusted on this machine, or None: its check fails, or its kernels do not run.

    numba's code generator changes with every release, so this is checked on a CPU too.
    """
    try:
        failure = self_check(make, optimizer, samples, model, settings.squares or weighted)
    except Exception as error:
        if backend.name == "numpy" and isinstance(error, MemoryError):  # the plain engine has no more of it
            raise
        failure = f"{type(error).__name__}, {' '.join(str(error).split())}"
    return failure


def panel_obstacle(
    model: BaseRegressionModel,
    optimizer: BaseOptimizer,
    samples: Array,
    backend: Backend,
    settings: Settings,
    weighted: bool = False,
) -> str | None:
    """Why the panel engine cannot run this, or None where it can; `weighted`: whether samples have weights."""
    kind = type(optimizer)
    if backend.name not in ("numpy", "cupy"):
        return f"the panel engine runs on a CPU or an NVIDIA GPU, not on {backend.device}"
    if type(model) is not DeepNetwork:
        return f"the panel engine knows DeepNetwork, not {type(model).__name__}"
    if kind not in [known for known, _ in OPTIMIZERS.values()]:
        return f"the panel engine does not know the rule of {kind.__name__}"
    if optimizer.param_dict is not model.save():
        return "the optimizer holds the parameters in a dict of its own, the panel engine needs model.save()"
    if optimizer.clip_norm is not None:
        return "clip_norm needs the whole gradient, which the panel engine never forms"
    if settings.accumulate != 1:
        return "accumulate needs the whole gradient, which the panel engine never forms"
    if 0 < getattr(optimizer, "eps", 1.0) < LEAST_EPS:
        return f"eps is below {LEAST_EPS:g}"
    if dtype_name(samples) not in ("uint8", model.dtype):
        return f"the set is {dtype_name(samples)}, the network {model.dtype}"
    flags = samples.flags
    if not (flags.c_contiguous and getattr(flags, "aligned", True) and getattr(samples.dtype, "isnative", True)):
        return "the set's samples do not lie one after the other in memory, aligned and in this machine's byte order"
    if backend.name == "numpy":
        return numba_obstacle()
    return gpu_obstacle(model, optimizer, samples, backend, settings, weighted)


def gpu_obstacle(
    model: DeepNetwork,
    optimizer: BaseOptimizer,
    samples: Array,
    backend: Backend,
    settings: Settings,
    weighted: bool = False,
) -> str | None:
    """Why the kernels for a GPU cannot run this, or None where they can."""
    if settings.squares:
        return "its kernels do not add up the squares of the weights"
    if weighted:
        return "its kernels know no weights of samples"
    if model.kernel_obstacle is not None:
        return model.kernel_obstacle
    if model.dropout:
        return "dropout draws its masks on the host, batch by batch"
    geometry = geometry_of(model, samples, min(samples.shape[0], settings.batch_size))
    obstacle = size_obstacle(geometry)
    if obstacle is None and geometry.buffer_bytes > backend.free_memory():
        needed, free = geometry.buffer_bytes / 1e6, backend.free_memory() / 1e6
        obstacle = f"its sums need {needed:.0f} MB, {backend.device} has {free:.0f} MB free: take smaller batches"
    return obstacle


def numba_obstacle() -> str | None:
    """What stands against numba here: it is absent, or it cannot be imported."""
    if importlib.util.find_spec("numba") is None:
        return f"{FAST} brings a faster one"
    room = address_room()
    if room < COMPILING:  # the compiler ends the process where it gets no memory, and OpenBLAS waits for it
        needed, left = COMPILING >> 20, max(0, int(room)) >> 20
        return f"out of memory for it: numba may take {needed} MiB, and the limit (ulimit -v) leaves {left} MiB"
    try:
        numba = importlib.import_module("numba")
    except Exception as error:  # such as a NumPy that is newer than this numba knows, or a setting that it refuses
        settings = [f"{name} is {value!r}" for name, value in os.environ.items() if name.startswith("NUMBA_")]
        told = "; ".join([str(error), *settings])
        return f"numba cannot be imported ({told}); {FAST} brings one that can, and with it a faster engine"
    return "NUMBA_DISABLE_JIT is set" if numba.config.DISABLE_JIT else None


def slower_with_panels(
    samples: Array, model: BaseRegressionModel, settings: Settings, weighted: bool = False
) -> str | None:
    """Why the plain engine is the faster one, or None: a rule from measured times (benchmarks/growth.py)."""
    m, n_x = samples.shape
    units = model.save()["W0"].shape[0]
    if n_x < PANEL and isinstance(model, DeepNetwork) and (settings.squares or weighted or model.kernel_obstacle):
        return f"the faster one for fewer than {PANEL} features with a loss like this"
    numbers = units * min(m, settings.batch_size)
    if numbers >= max(LARGE, LARGE_PRODUCTS * n_x):
        return f"the faster one for {n_x} features, which are few beside {units} units and batches of that size"
    return None
