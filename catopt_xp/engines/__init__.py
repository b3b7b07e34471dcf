"""The ways to run an epoch of mini-batch steps, and the choice between them. Floor F3.

An engine is built for one run, on one device, and makes the steps of an epoch one after the other:

    engine, why = choose_engine("auto", model, optimizer, samples, targets, backend, settings)
    for done in engine.steps(epoch, order, first, following): ...   # done: batches finished so far in this epoch
    losses = engine.fetch_losses()
    engine.settle()   # before anyone looks at the model or the optimizer
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings

from catopt_xp.backend.machine import address_room
from catopt_xp.backend.xp import Array, Backend, dtype_name
from catopt_xp.engines.check import self_check
from catopt_xp.engines.cuda import CoresEngine, CudaEngine
from catopt_xp.engines.cuda_plan import plan_of
from catopt_xp.engines.panels import PANEL
from catopt_xp.engines.plain import PlainEngine, Settings
from catopt_xp.io.console import Signals
from catopt_xp.nn.network import BaseRegressionModel, DeepNetwork
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.rules import Adam, GradientDescent, Momentum, RMSProp

ENGINES = ("auto", "plain", "panels")
LEAST_EPS = 1e-30  # the panel engine estimates quotients, for denominators that are well above the smallest floats
# Units times batch size, for each feature and in all, from which whole products win over panels.
LARGE_PRODUCTS, LARGE = 80, 45_000
COMPILING = 512 << 20  # bytes of address space: to import numba took 150 MB, to compile up to 200 MB more
FAST = 'pip install "catopt-xp[fast]"'

__all__ = ["ENGINES", "PlainEngine", "Settings", "check_failure", "choose_engine", "panel_obstacle"]


def choose_engine(
    engine: str,
    model: BaseRegressionModel,
    optimizer: BaseOptimizer,
    samples: Array,
    targets: Array,
    backend: Backend,
    settings: Settings,
) -> tuple[PlainEngine, str]:
    """The engine for a run, and why it is that one. Arguments after `engine` (one of ENGINES) as for `PlainEngine`.

    Raises ValueError where "panels" is asked for and cannot run this. Warns (RuntimeWarning) where it was chosen and
    fails its own check; the plain engine runs then.
    """
    obstacle = "as asked" if engine == "plain" else panel_obstacle(model, optimizer, samples, backend, settings)
    if obstacle is None and engine == "auto" and backend.name == "numpy":
        obstacle = slower_with_panels(samples, model, settings)
    if engine == "panels" and obstacle is not None:
        raise ValueError(f'engine "panels" cannot run this: {obstacle}; leave engine at "auto"')
    if obstacle is None:
        assert isinstance(model, DeepNetwork)
        for make in _panel_engines(backend):
            with Signals() as signals:  # numba loses an exception that comes while it compiles
                failure = check_failure(make, model, optimizer, samples, backend, settings)
            if signals.received:
                raise KeyboardInterrupt
            if failure is None:
                why = "as asked" if engine == "panels" else "the fastest that can run this"
                return make(model, optimizer, samples, targets, backend, settings), obstacle or why
            obstacle = f"the panel engine failed its check: {failure}"
            warnings.warn(f"{obstacle}; a slower one runs instead", RuntimeWarning, stacklevel=2)
    return PlainEngine(model, optimizer, samples, targets, backend, settings), obstacle or ""


def _panel_engines(backend: Backend) -> list[type[PlainEngine]]:
    """The panel engines of a device, the fastest first."""
    if backend.name == "cupy":
        return [CudaEngine, CoresEngine]
    from catopt_xp.engines.cpu import PanelEngine  # needs numba

    return [PanelEngine]


def check_failure(
    make: type[PlainEngine],
    model: DeepNetwork,
    optimizer: BaseOptimizer,
    samples: Array,
    backend: Backend,
    settings: Settings,
) -> str | None:
    """Why the panel engine cannot be trusted on this machine, or None: its check fails, or its kernels do not run.

    On a CPU too: what compiles them is another release with each numba.
    """
    try:
        failure = self_check(make, optimizer, samples, model, settings.penalised)
    except Exception as error:
        if backend.name == "numpy" and isinstance(error, MemoryError):  # the plain engine has no more of it
            raise
        failure = f"{type(error).__name__}, {' '.join(str(error).split())}"
    return failure


def panel_obstacle(
    model: BaseRegressionModel, optimizer: BaseOptimizer, samples: Array, backend: Backend, settings: Settings
) -> str | None:
    """Why the panel engine cannot run this, or None where it can."""
    kind = type(optimizer)
    if backend.name not in ("numpy", "cupy"):
        return f"the panel engine runs on a CPU or an NVIDIA GPU, not on {backend.device}"
    if type(model) is not DeepNetwork:
        return f"the panel engine knows DeepNetwork, not {type(model).__name__}"
    if kind not in (GradientDescent, Momentum, RMSProp, Adam):
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
    return numba_obstacle() if backend.name == "numpy" else gpu_obstacle(model, optimizer, samples, backend, settings)


def gpu_obstacle(
    model: DeepNetwork, optimizer: BaseOptimizer, samples: Array, backend: Backend, settings: Settings
) -> str | None:
    """Why the kernels for a GPU cannot run this, or None where they can."""
    if settings.penalised:
        return "its kernels do not add up the squares of the weights"
    if model.kernel_obstacle is not None:
        return model.kernel_obstacle
    if model.dropout:
        return "dropout draws its masks on the host, batch by batch"
    plan = plan_of(model, optimizer, samples, min(samples.shape[0], settings.batch_size))
    obstacle = plan.obstacle()
    if obstacle is None and plan.buffer_bytes > backend.free_memory():
        needed, free = plan.buffer_bytes / 1e6, backend.free_memory() / 1e6
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


def slower_with_panels(samples: Array, model: BaseRegressionModel, settings: Settings) -> str | None:
    """Why the plain engine is the faster one, or None: a rule from measured times (benchmarks/growth.py)."""
    m, n_x = samples.shape
    units = model.save()["W0"].shape[0]
    if n_x < PANEL and isinstance(model, DeepNetwork) and (settings.penalised or model.kernel_obstacle):
        return f"the faster one for fewer than {PANEL} features with a loss like this"
    numbers = units * min(m, settings.batch_size)
    if numbers >= max(LARGE, LARGE_PRODUCTS * n_x):
        return f"the faster one for {n_x} features, which are few beside {units} units and batches of that size"
    return None
