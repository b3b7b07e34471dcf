"""Everyone who can be timed on a CPU, by name: this library's engines and their peers.

The peers' libraries are optional. Each is imported when a contender is made, and not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from benchmarks.peers.chapter_peer import ChapterPeer
from catopt_xp.commands.bench import OURS, Contender, Entry, Workload, state_numbers


def _torch(workload: Workload, threads: int, fused: bool) -> Contender:
    from benchmarks.peers import torch_peer  # needs torch, which is optional

    return torch_peer.TorchPeer(workload, threads, fused)


def _jax(workload: Workload, threads: int) -> Contender:
    from benchmarks.peers import jax_peer  # needs jax, which is optional

    return jax_peer.JaxPeer(workload, threads)


def _sklearn(workload: Workload, threads: int) -> Contender:
    from benchmarks.peers import sklearn_peer  # needs scikit-learn, which is optional

    return sklearn_peer.SklearnPeer(workload, threads)


def float_memory(work: Workload) -> int:
    """About how many bytes a peer takes that wants the set as float32: the set, two batches, weights and moments.

    >>> float_memory(Workload(batch_size=2000)) > float_memory(Workload())
    True
    """
    batch = min(work.batch_size, work.m)
    return 4 * (work.n_x * (work.m + 2 * batch) + 2 * state_numbers(work))


def chapter_memory(work: Workload) -> int:
    """About how many bytes the chapter's algorithm takes: everything is float64, and an update makes new arrays.

    >>> round(chapter_memory(Workload()) / 1e9, 1)
    3.0
    """
    batch = min(work.batch_size, work.m)
    return 8 * (work.n_x * (work.m + 2 * batch) + 3 * state_numbers(work))


TORCH = ("torch", "torch")

CONTENDERS: Mapping[str, Entry] = {
    **OURS,
    "torch-fused": Entry(
        partial(_torch, fused=True), float_memory, TORCH, lacks={"rmsprop": "PyTorch has no fused RMSprop"}
    ),
    "torch": Entry(partial(_torch, fused=False), float_memory, TORCH),
    "jax": Entry(_jax, float_memory, ("jax", "jax")),
    "sklearn": Entry(
        _sklearn, float_memory, ("sklearn", "scikit-learn"), lacks={"rmsprop": "scikit-learn has no RMSProp"}
    ),
    "chapter": Entry(ChapterPeer, chapter_memory),
}
QUICK = tuple(name for name in CONTENDERS if name != "chapter")  # the chapter's takes longer than all others together
