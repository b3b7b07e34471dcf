"""Everyone who is timed on a GPU, by name: our engines, and PyTorch and JAX with the set resident as uint8 or float32.

Each trains whole epochs of the same rows in the same order from the same weights, and brings the losses to the host
after each epoch. All multiply in float32, but for entries marked `rounded`: they round factors to TF32, and their times
are not compared with the others.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers_gpu.epochs import EpochContender
from catopt_xp.backend.machine import thread_count
from catopt_xp.backend.xp import Backend, get_backend
from catopt_xp.commands.bench import Contender, Workload
from catopt_xp.engines.choose import panel_obstacle
from catopt_xp.engines.cuda.engine import CoresEngine, CudaEngine
from catopt_xp.engines.plain import PlainEngine, Settings
from catopt_xp.optim.rules import OPTIMIZERS
from catopt_xp.version import __version__

OURS, PEERS = "ours", "peers"


class EngineEpochs(EpochContender):
    """An engine of this library on any device.

    `make`: the engine's class, or a function with its arguments; `backend`: the device; `convention`: as for
    `OurEngine`. Raises RuntimeError naming what the panel engine cannot do, where `make` is one of its classes.

    >>> ours = EngineEpochs(PlainEngine, Workload(n_x=12, m=10, batch_size=4), get_backend("cpu"))
    >>> ours.steps(6)
    >>> ours.losses().shape
    (6,)
    """

    def __init__(
        self, make: Callable[..., Any], workload: Workload, backend: Backend, convention: str = "chapter"
    ) -> None:
        super().__init__(workload, thread_count())
        self.backend, self.convention = backend, convention
        network = workload.network().to(backend)
        beta = {"beta": 0.9} if workload.optimizer == "rmsprop" else {}  # all contenders have this one
        kind = OPTIMIZERS[workload.optimizer][0]
        optimizer = kind.preset(convention, network.save(), workload.rate, **beta)
        samples, targets = backend.asarray(workload.pixels()), backend.asarray(workload.targets())
        settings = Settings(workload.batch_size)
        if make in (CudaEngine, CoresEngine):
            obstacle = panel_obstacle(network, optimizer, samples, backend, settings)
            if obstacle is not None:
                raise RuntimeError(f"the panel engine cannot run this: {obstacle}")
        with backend.activate():
            self.engine: PlainEngine = make(network, optimizer, samples, targets, backend, settings)
        self.name = self.engine.name

    def queue(self, epoch: int) -> None:
        """Queues the updates of an epoch; an engine that works ahead may wait for some of them."""
        for _ in self.engine.steps(epoch, self.order(epoch), following=self.order(epoch + 1)):
            pass

    def _make(self, epoch: int) -> NDArray[np.float64]:
        with self.backend.activate():
            self.queue(epoch)
            return self.engine.fetch_losses().astype(np.float64)

    def versions(self) -> dict[str, str]:
        return {"catopt_xp": __version__, **self.backend.versions(), **self.engine.versions()}


@dataclass(frozen=True)
class Entry:
    """How to make a contender, and where its time goes.

    `family`: the process that holds it; families are apart, so that one that hangs does not stop the others; `column`:
    its column of the table, which shows the fastest of several; `make`: takes a workload and a device ("cuda" or
    "cpu"); `library`: what it needs; `side`: OURS or PEERS; `explored`: it is timed only on request; `rounded`: its
    products are coarser.
    """

    family: str
    column: str
    make: Callable[[Workload, str], Contender]
    library: str
    side: str = PEERS
    explored: bool = False
    rounded: bool = False


def _ours(workload: Workload, device: str, kind: type[PlainEngine]) -> Contender:
    return EngineEpochs(kind, workload, get_backend(device, strict_device=True))


def _torch_eager(workload: Workload, device: str, resident: str) -> Contender:
    from benchmarks.peers_gpu import torch_peer  # needs torch, which is optional

    return torch_peer.TorchEager(workload, device, resident)


def _torch_graph(workload: Workload, device: str, **options: Any) -> Contender:
    from benchmarks.peers_gpu import torch_peer  # needs torch, which is optional

    return torch_peer.TorchGraph(workload, device, **options)


def _torch_compile(workload: Workload, device: str, resident: str) -> Contender:
    from benchmarks.peers_gpu import torch_peer  # needs torch, which is optional

    return torch_peer.TorchCompiled(workload, device, resident)


def _jax(workload: Workload, device: str, **options: Any) -> Contender:
    from benchmarks.peers_gpu import jax_peer  # needs jax, which is optional

    return jax_peer.JaxScan(workload, device, **options)


def _entries() -> Mapping[str, Entry]:
    cupy = partial(Entry, "ours", library="cupy", side=OURS)
    torch = partial(Entry, "torch", library="torch")
    compiled = partial(Entry, "torch.compile", "torch.compile", library="torch")
    jax = partial(Entry, "jax", "JAX, jit and scan", library="jax")
    eager, graph = "PyTorch", "PyTorch, CUDA graph"
    return {
        "panels": cupy("panels", partial(_ours, kind=CudaEngine)),
        "panels-cores": cupy("panels, ordinary cores", partial(_ours, kind=CoresEngine)),
        "plain": cupy("plain", partial(_ours, kind=PlainEngine)),
        "torch-uint8": torch(eager, partial(_torch_eager, resident="uint8")),
        "torch-float32": torch(eager, partial(_torch_eager, resident="float32")),
        "torch-graph-uint8": torch(graph, partial(_torch_graph, resident="uint8")),
        "torch-graph-float32": torch(graph, partial(_torch_graph, resident="float32")),
        "torch-epoch-graph-uint8": torch(graph, partial(_torch_graph, resident="uint8", whole_epoch=True)),
        "torch-epoch-graph-float32": torch(
            graph, partial(_torch_graph, resident="float32", whole_epoch=True), explored=True
        ),
        "torch-compile-uint8": compiled(partial(_torch_compile, resident="uint8")),
        "torch-compile-float32": compiled(partial(_torch_compile, resident="float32"), explored=True),
        "jax-uint8": jax(partial(_jax, resident="uint8")),
        "jax-float32": jax(partial(_jax, resident="float32")),
        "jax-unrolled-uint8": jax(partial(_jax, resident="uint8", unroll=8), explored=True),
        "torch-epoch-graph-tf32": torch(
            graph, partial(_torch_graph, resident="uint8", whole_epoch=True, tf32=True), explored=True, rounded=True
        ),
        "jax-tf32": jax(partial(_jax, resident="uint8", precision=None), explored=True, rounded=True),
    }


GPU_CONTENDERS: Mapping[str, Entry] = _entries()
COLUMNS: tuple[str, ...] = tuple(dict.fromkeys(entry.column for entry in GPU_CONTENDERS.values()))


def missing_library(name: str) -> str | None:
    """The library that a contender needs and that is not installed, as a phrase, or None.

    >>> missing_library("plain") in (None, "cupy is not installed")
    True
    """
    library = GPU_CONTENDERS[name].library
    return None if importlib.util.find_spec(library) else f"{library} is not installed"


__all__ = ["COLUMNS", "GPU_CONTENDERS", "OURS", "PEERS", "EngineEpochs", "missing_library"]
