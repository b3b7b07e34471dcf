"""Who can be timed, by name, and who cannot on this machine and why.

The libraries of the peers are optional; each is imported when a contender is made of it, and not before.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.machine import host_free_memory
from catopt_xp.backend.xp import NumpyBackend
from catopt_xp.bench.base_contender import Contender, used_threads
from catopt_xp.bench.chapter_peer import ChapterPeer
from catopt_xp.bench.workload import Workload
from catopt_xp.engines.choose import choose_engine
from catopt_xp.engines.plain import Settings
from catopt_xp.optim.rules import OPTIMIZERS
from catopt_xp.version import __version__

__all__ = ["CONTENDERS", "Contender", "OurEngine", "available"]


class OurEngine(Contender):
    """An engine of this library, by name.

    `convention`: whose form of the optimizer it takes, a name of `BaseOptimizer.conventions`; the rest as for
    `Contender`. Raises ValueError where the engine cannot run this, RuntimeError where it fails its check.

    >>> ours = OurEngine("plain", Workload(n_x=12, m=10, batch_size=4), threads=1)
    >>> ours.steps(4)
    >>> ours.losses().shape
    (4,)
    """

    def __init__(self, engine: str, workload: Workload, threads: int, convention: str = "chapter") -> None:
        super().__init__(workload, threads)
        network = workload.network()
        # The beta is that of every contender; a convention's own is what its library has by default.
        beta = {"beta": 0.9} if workload.optimizer == "rmsprop" else {}
        kind = OPTIMIZERS[workload.optimizer][0]
        optimizer = kind.preset(convention, network.save(), workload.rate, **beta)
        settings = Settings(workload.batch_size)
        with used_threads(threads, self._libraries):
            self._engine, why = choose_engine(
                engine, network, optimizer, workload.pixels(), workload.targets(), NumpyBackend(), settings
            )
        self.name = self._engine.name
        if self.name != engine:
            raise RuntimeError(f"{engine} was not run: {why}")
        self._past: list[NDArray[np.floating]] = []  # losses of the epochs that are over
        self._done = 0  # batches of this one
        self._running = self._epochs()

    def _epochs(self) -> Iterator[None]:
        """Step after step, without an end."""
        for epoch in itertools.count():
            order, following = self.workload.order(epoch), self.workload.order(epoch + 1)
            for done in self._engine.steps(epoch, order, following=following):
                self._done = done
                yield
            self._past.append(self._engine.fetch_losses())
            self._done = 0

    def steps(self, count: int) -> None:
        with used_threads(self.threads, self._libraries):
            for _ in range(count):
                next(self._running)

    def losses(self) -> NDArray[np.float64]:
        now = self._engine.fetch_losses()[: self._done]
        return np.concatenate([*self._past, now]).astype(np.float64)

    def versions(self) -> dict[str, str]:
        numba = {"numba": importlib.metadata.version("numba")} if self.name == "panels" else {}
        return {"catopt_xp": __version__, "numpy": np.__version__} | numba


def _torch(workload: Workload, threads: int, fused: bool) -> Contender:
    from catopt_xp.bench import torch_peer  # needs torch, which is optional

    return torch_peer.TorchPeer(workload, threads, fused)


def _jax(workload: Workload, threads: int) -> Contender:
    from catopt_xp.bench import jax_peer  # needs jax, which is optional

    return jax_peer.JaxPeer(workload, threads)


def _sklearn(workload: Workload, threads: int) -> Contender:
    from catopt_xp.bench import sklearn_peer  # needs scikit-learn, which is optional

    return sklearn_peer.SklearnPeer(workload, threads)


CONTENDERS: dict[str, Callable[[Workload, int], Contender]] = {
    "panels": partial(OurEngine, "panels"),
    "plain": partial(OurEngine, "plain"),
    "torch-fused": partial(_torch, fused=True),
    "torch": partial(_torch, fused=False),
    "jax": _jax,
    "sklearn": _sklearn,
    "chapter": ChapterPeer,
}

LIBRARIES: Mapping[str, tuple[str, str]] = {  # module -> what installs it
    "panels": ("numba", "numba"),
    "torch-fused": ("torch", "torch"),
    "torch": ("torch", "torch"),
    "jax": ("jax", "jax"),
    "sklearn": ("sklearn", "scikit-learn"),
}
NOT_OFFERED = {
    ("sklearn", "rmsprop"): "scikit-learn has no RMSProp",
    ("torch-fused", "rmsprop"): "PyTorch has no fused RMSprop",
}


def available(name: str, workload: Workload | None = None) -> str | None:
    """None where a contender can run a workload here, or else why not, as a phrase.

    `workload`: None asks for the library alone. Raises ValueError for an unknown name.

    >>> print(available("plain"))
    None
    >>> available("sklearn", Workload(optimizer="rmsprop")) is None
    False
    """
    if name not in CONTENDERS:
        raise ValueError(f"unknown contender {name!r}; choose {', '.join(CONTENDERS)}")
    module, distribution = LIBRARIES.get(name, ("numpy", "numpy"))
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed (pip install {distribution})"
    if workload is None:
        return None
    if (name, workload.optimizer) in NOT_OFFERED:
        return NOT_OFFERED[name, workload.optimizer]
    needed, free = memory_needed(name, workload), host_free_memory()
    if needed > free:
        return f"it needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    return None


def memory_needed(name: str, workload: Workload) -> int:
    """Bytes that a contender takes besides the pixels, roughly: the set as it wants it, a batch, weights and moments.

    >>> round(memory_needed("chapter", Workload()) / 1e9, 1)
    3.0
    """
    n_x, m, batch = workload.n_x, workload.m, min(workload.batch_size, workload.m)
    state = 4 * n_x * workload.hidden[0]  # numbers: weights, gradient, two moments
    if name == "chapter":
        return 8 * (n_x * (m + 2 * batch) + 3 * state)
    if name in ("panels", "plain"):
        return 4 * 2 * state
    return 4 * (n_x * (m + 2 * batch) + 2 * state)
