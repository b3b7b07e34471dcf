"""How sums of products come from one GPU to all: by NCCL, or by MPI through the host."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np

from catopt_xp.backend.ranks import Ranks
from catopt_xp.backend.xp import Array, Backend
from catopt_xp.engines.cuda.device import CupyDevice, Device


class Transport(Protocol):
    """How sums come from one GPU to all."""

    name: str

    def gather(self, own: Array, everyone: Array) -> None:
        """Queues, behind the launches so far, the copies of every rank's `own` (n, …) to `everyone` (ranks n, …)."""


class ThroughHost:
    """By MPI through the host's memory. Here alone does the device's work meet MPI, which knows no streams."""

    name = "through the host"

    def __init__(self, ranks: Ranks, backend: Backend, device: Device) -> None:
        self.ranks, self.backend, self.device = ranks, backend, device

    def gather(self, own: Array, everyone: Array) -> None:
        self.device.synchronize()  # sync: MPI reads what the launches have written
        values = self.backend.to_host(own).reshape(-1)
        gathered = self.ranks.gather(values, [values.size] * self.ranks.size)
        self.device.upload(everyone, gathered.reshape(everyone.shape))


class ByNccl:
    """By NCCL from GPU to GPU, in the engine's own stream; a communicator of the ranks at hand.

    `cupyx.distributed` makes one of all processes of MPI, or finds them by a network port: here it is as given.
    """

    name = "NCCL"

    def __init__(self, ranks: Ranks, nccl: Any, device: CupyDevice) -> None:
        self.ranks, self.nccl, self.device = ranks, nccl, device
        unique = ranks.from_first(nccl.get_unique_id() if ranks.rank == 0 else None)
        with device.backend.activate():
            self.communicator = nccl.NcclCommunicator(ranks.size, unique, ranks.rank)

    def gather(self, own: Array, everyone: Array) -> None:
        kind = self.nccl.NCCL_FLOAT32 if own.dtype == np.float32 else self.nccl.NCCL_FLOAT64
        with self.device.backend.activate():
            pointers = own.data.ptr, everyone.data.ptr
            self.communicator.allGather(*pointers, own.size, kind, self.device.stream.ptr)
        self.ranks.sent_bytes += own.nbytes


def choose_transport(ranks: Ranks, backend: Backend, device: Device) -> Transport:
    """NCCL where every rank has it."""
    nccl: Any = None
    if isinstance(device, CupyDevice):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy says in a paragraph that the library is not installed
            nccl = device.cupy.cuda.nccl
    if ranks.any(nccl is None or not nccl.available):
        return ThroughHost(ranks, backend, device)
    assert isinstance(device, CupyDevice)
    return ByNccl(ranks, nccl, device)
