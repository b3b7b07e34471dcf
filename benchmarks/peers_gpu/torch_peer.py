"""PyTorch on a GPU: step by step, its steps in CUDA graphs, and compiled by Inductor.

The set is on the device, as float32 or as uint8; then each batch is gathered and converted there. A graph or a compiled
program reads the rows of an epoch from one tensor, which is written before the epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.peers.rules import correction_table, updated
from benchmarks.peers.torch_peer import convention_of, torch_network, torch_optimizer
from benchmarks.peers_gpu.epochs import EpochContender
from catopt_xp.backend.machine import thread_count
from catopt_xp.commands.bench import Workload
from catopt_xp.nn.functional import pixel_scale

WORD = 8  # bytes that a gather moves at a time where rows are whole words; single bytes are slow
REHEARSALS = 2  # runs of the work before a graph is recorded
PIXEL = float(np.float32(pixel_scale(np.dtype(np.uint8))))


class _TorchEpochs(EpochContender):
    """What all three ways share: the set, and a place for rows and losses.

    `device`: "cuda" or "cpu"; `resident`: how the set lies there, "uint8" or "float32".
    """

    def __init__(self, workload: Workload, device: str, resident: str) -> None:
        super().__init__(workload, thread_count())
        torch.set_float32_matmul_precision("highest")  # no TF32
        self.device, self.convention = torch.device(device), convention_of(workload)
        pixels = torch.from_numpy(workload.pixels()).to(self.device)  # (m, n_x)
        self.samples = pixels if resident == "uint8" else pixels.to(torch.float32).mul_(PIXEL)
        whole_words = resident == "uint8" and workload.n_x % WORD == 0
        self._words = self.samples.view(torch.int64) if whole_words else self.samples
        targets = torch.from_numpy(workload.targets().astype(np.float32).reshape(-1, 1))
        self.targets = targets.to(self.device)  # (m, 1)
        self.rows = torch.zeros(workload.m, dtype=torch.int64, device=self.device)  # the rows of this epoch, in order
        self.step_losses = torch.zeros(workload.batches, device=self.device)

    def batch(self, rows: Any) -> Any:
        """The samples of some rows as float32, (n, n_x), from their numbers on the device."""
        picked = torch.index_select(self._words, 0, rows)
        return picked if self.samples.dtype == torch.float32 else picked.view(torch.uint8) * PIXEL

    def _make(self, epoch: int) -> NDArray[np.float64]:
        self.rows.copy_(torch.from_numpy(self.order(epoch)))
        self._queue()
        losses: NDArray[np.float64] = self.step_losses.cpu().numpy().astype(np.float64)  # sync
        return losses

    def _queue(self) -> None:
        """Queues the updates of an epoch, from `rows`, and its losses into `step_losses`."""
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__} | ({"torch.cuda": torch.version.cuda} if torch.version.cuda else {})


class _TorchNetwork(_TorchEpochs):
    """With PyTorch's own layers, loss and optimizer; `capturable`: for a CUDA graph."""

    def __init__(self, workload: Workload, device: str, resident: str, capturable: bool) -> None:
        super().__init__(workload, device, resident)
        self._network = torch_network(workload).to(self.device)
        fused = workload.optimizer != "rmsprop"  # PyTorch has no fused RMSprop
        self._optimizer = torch_optimizer(self._network, workload, fused, capturable)
        self._loss = nn.BCEWithLogitsLoss()

    def _step(self, rows: Any, place: Any) -> None:
        """Makes one update; `place`: (1,), where its loss goes."""
        loss = self._loss(self._network(self.batch(rows)), self.targets.index_select(0, rows))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        place.copy_(loss.detach().reshape(1))

    def _epoch(self) -> None:
        for k, part in enumerate(self.slices):
            self._step(self.rows[part], self.step_losses[k : k + 1])


class TorchEager(_TorchNetwork):
    """PyTorch step by step, with the optimizer's single-pass implementation where there is one."""

    def __init__(self, workload: Workload, device: str, resident: str) -> None:
        super().__init__(workload, device, resident, capturable=False)
        self.name = f"torch-{resident}"

    def _queue(self) -> None:
        self._epoch()


class TorchGraph(_TorchNetwork):
    """PyTorch with CUDA graphs: everything of a step in one, from the gather to the update, or an epoch in one.

    Step by step, a counter on the device says which rows are the step's, so that one graph does for all whole batches
    and a second one for a short last one. `whole_epoch`: no counter is needed then. `tf32`: products round to TF32.
    """

    def __init__(
        self, workload: Workload, device: str, resident: str, whole_epoch: bool = False, tf32: bool = False
    ) -> None:
        super().__init__(workload, device, resident, capturable=device != "cpu")
        self.name = f"torch-{'epoch-' if whole_epoch else ''}graph-{'tf32' if tf32 else resident}"
        initial = [p.detach().clone() for p in self._network.parameters()]
        if tf32:
            torch.set_float32_matmul_precision("high")  # a graph keeps what its products were recorded with
        first, last = (part.stop - part.start for part in (self.slices[0], self.slices[-1]))
        self._numbers = torch.arange(first, device=self.device)
        self._begin, self._k = (torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(2))
        if whole_epoch:
            self._replays = [self._capture(self._epoch)]
        else:
            self._replays = [self._capture(lambda: self._counted(first))] * (workload.m // first)
            if last != first:
                self._replays.append(self._capture(lambda: self._counted(last)))
        torch.set_float32_matmul_precision("highest")
        self._rewind(initial)

    def _counted(self, n: int) -> None:
        """The step that the counters point to, of `n` samples; then they point to the next one."""
        loss = torch.empty(1, device=self.device)
        self._step(self.rows.index_select(0, self._begin + self._numbers[:n]), loss)
        self.step_losses.index_copy_(0, self._k, loss)
        self._begin.add_(n)
        self._k.add_(1)

    def _capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records work without running it; what it returns queues all of it at once."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(REHEARSALS):  # libraries load their kernels, the optimizer makes its state
                self._count_anew()
                work()
        torch.cuda.current_stream().wait_stream(side)
        self._optimizer.zero_grad(set_to_none=True)  # so that gradients lie in the graph's own memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        replay: Callable[[], None] = graph.replay
        return replay

    def _rewind(self, initial: list[Any]) -> None:
        """Puts parameters and the optimizer's state back to what they were before the rehearsals."""
        with torch.no_grad():
            for p, values in zip(self._network.parameters(), initial, strict=True):
                p.copy_(values)
            for state in self._optimizer.state.values():
                for value in state.values():
                    if isinstance(value, torch.Tensor):
                        value.zero_()

    def _count_anew(self) -> None:
        self._begin.zero_()
        self._k.zero_()

    def _queue(self) -> None:
        self._count_anew()
        for replay in self._replays:
            replay()


class TorchCompiled(_TorchEpochs):
    """A whole step compiled by `torch.compile`, gather, gradients and the chapter's rule; on a GPU an epoch in a graph.

    Its mode is max-autotune without PyTorch's own CUDA graphs: those copy their inputs, here the whole set. The one
    graph of an epoch takes their place. `backend`: what compiles.
    """

    def __init__(self, workload: Workload, device: str, resident: str, backend: str = "inductor") -> None:
        super().__init__(workload, device, resident)
        self.name, self.convention = f"torch-compile-{resident}", "chapter"
        layers = len(workload.hidden) + 1
        arrays = {name: torch.from_numpy(values).to(self.device) for name, values in workload.weights().items()}
        self._names = [f"{kind}{k}" for k in range(layers) for kind in "Wb"]
        self._state = [[arrays[name].clone() for name in self._names]]
        self._state += [[torch.zeros_like(p) for p in self._state[0]] for _ in range(2)]
        # Two numbers for each step, in rows of 16 bytes: PyTorch would copy inputs of another alignment.
        self._corrections = torch.ones(workload.batches, 4, device=self.device)[:, :2]
        torch._dynamo.reset()  # compiled code of other contenders counts towards a limit
        mode = {"mode": "max-autotune-no-cudagraphs"} if backend == "inductor" else {}
        self._compiled = torch.compile(self._step, dynamic=False, fullgraph=True, backend=backend, **mode)
        initial = [p.clone() for p in self._state[0]]
        self._replay: Callable[[], None] = self._epoch
        if self.device.type == "cuda":
            self._replay = self._capture()
        with torch.no_grad():
            for p, values in zip(self._state[0], initial, strict=True):
                p.copy_(values)
            for value in (*self._state[1], *self._state[2]):
                value.zero_()

    def _step(self, parameters: Any, first: Any, second: Any, divisors: Any, X: Any, Y: Any, rows: Any) -> Any:
        """One update in place; the loss, a scalar. Lists in the order of `_names`; `divisors`: (2,)."""
        x = X.index_select(0, rows)
        x = x if x.dtype == torch.float32 else x * PIXEL
        y = Y.index_select(0, rows)

        def loss_of(p: Any) -> Any:
            A = x
            for k in range(0, len(p), 2):
                Z = A @ p[k].T + p[k + 1].T
                A = torch.relu(Z)
            return nn.functional.binary_cross_entropy_with_logits(Z, y)

        gradients, loss = torch.func.grad_and_value(loss_of)(parameters)
        for p, g, a, b in zip(parameters, gradients, first, second, strict=True):
            new = updated(p, g, a, b, divisors, self.workload.optimizer, self.workload.rate, torch.sqrt)
            for old, value in zip((p, a, b), new, strict=True):
                old.copy_(value)
        return loss

    def _epoch(self) -> None:
        for k in range(len(self.slices)):
            self.step_losses[k : k + 1].copy_(self._compiled_step(k).reshape(1))

    def _compiled_step(self, k: int) -> Any:
        rows = self.rows[self.slices[k]]
        return self._compiled(*self._state, self._corrections[k], self.samples, self.targets, rows)

    def _capture(self) -> Callable[[], None]:
        """The steps of an epoch as one graph, after a rehearsal that compiles."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for k in {0, len(self.slices) - 1}:  # one of each length
                for _ in range(REHEARSALS):
                    self._compiled_step(k)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._epoch()
        replay: Callable[[], None] = graph.replay
        return replay

    def _make(self, epoch: int) -> NDArray[np.float64]:
        steps = self.workload.batches
        self._corrections.copy_(torch.from_numpy(correction_table(epoch * steps, steps, self.workload.optimizer)))
        return super()._make(epoch)

    def _queue(self) -> None:
        self._replay()


__all__ = ["TorchCompiled", "TorchEager", "TorchGraph"]
