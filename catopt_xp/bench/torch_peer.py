"""PyTorch on the CPU: the set resident as float32, `nn.Linear` layers, its own optimizers. Floor F5."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from catopt_xp.bench.base_contender import Peer
from catopt_xp.bench.workload import Rows, Workload

BETA = 0.9


class TorchPeer(Peer):
    """PyTorch with an optimizer's default implementation, or with `fused` its single-pass one.

    RMSprop has eps outside the root and no bias correction: PyTorch's form, not the chapter's.
    """

    def __init__(self, workload: Workload, threads: int, fused: bool) -> None:
        super().__init__(workload, threads)
        self.name = "torch-fused" if fused else "torch"
        self.convention = "torch" if workload.optimizer == "rmsprop" else "chapter"
        self._X = torch.from_numpy(workload.floats())  # (m, n_x)
        self._Y = torch.from_numpy(workload.targets().astype("float32").reshape(-1, 1))  # (m, 1)
        # One place for every batch: new memory of this size would come from the system, step by step.
        self._batch = torch.empty(min(workload.batch_size, workload.m), workload.n_x)
        self._network = nn.Sequential()
        for k, (n_in, n_out) in enumerate(itertools.pairwise(workload.layers)):
            layer = nn.Linear(n_in, n_out)
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(workload.weights()[f"W{k}"]))
                layer.bias.copy_(torch.from_numpy(workload.weights()[f"b{k}"]).reshape(-1))
            self._network.append(layer)
            if k < len(workload.hidden):
                self._network.append(nn.ReLU())
        self._loss = nn.BCEWithLogitsLoss()
        self._optimizer = self._make_optimizer(True if fused else None)

    def _make_optimizer(self, fused: bool | None) -> torch.optim.Optimizer:
        parameters, rate = self._network.parameters(), self.workload.rate
        if self.workload.optimizer == "gd":
            return torch.optim.SGD(parameters, rate, fused=fused)
        if self.workload.optimizer == "momentum":  # a sum where the chapter has an average
            return torch.optim.SGD(parameters, rate * (1.0 - BETA), momentum=BETA, fused=fused)
        if self.workload.optimizer == "rmsprop":
            return torch.optim.RMSprop(parameters, rate, alpha=BETA, eps=1e-8)
        return torch.optim.Adam(parameters, rate, eps=1e-8, fused=fused)

    def _make(self, batches: list[Rows]) -> None:
        torch.set_num_threads(self.threads)
        for rows in batches:
            index = torch.from_numpy(rows)
            x = torch.index_select(self._X, 0, index, out=self._batch[: len(rows)])
            loss = self._loss(self._network(x), self._Y.index_select(0, index))
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
            self._losses.append(loss.item())

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}
