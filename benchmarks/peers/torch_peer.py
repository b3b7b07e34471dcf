"""PyTorch on the CPU: the set resident as float32, `nn.Linear` layers, its own optimizers."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from benchmarks.peers.peer import Peer, floats
from benchmarks.peers.rules import BETA
from catopt_xp.commands.bench import Rows, Workload


class TorchPeer(Peer):
    """PyTorch with an optimizer's default implementation, or with `fused` its single-pass one.

    RMSprop has eps outside the root and no bias correction: PyTorch's form, not the chapter's.
    """

    def __init__(self, workload: Workload, threads: int, fused: bool) -> None:
        super().__init__(workload, threads)
        self.name = "torch-fused" if fused else "torch"
        self.convention = convention_of(workload)
        self._X = torch.from_numpy(floats(workload))  # (m, n_x)
        self._Y = torch.from_numpy(workload.targets().astype("float32").reshape(-1, 1))  # (m, 1)
        # All batches use one buffer: new memory of this size would come from the system in every step.
        self._batch = torch.empty(min(workload.batch_size, workload.m), workload.n_x)
        self._network = torch_network(workload)
        self._loss = nn.BCEWithLogitsLoss()
        self._optimizer = torch_optimizer(self._network, workload, fused)

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


def torch_network(workload: Workload) -> Any:
    """The workload's network with its initial weights, an `nn.Sequential` that ends in logits."""
    network, weights = nn.Sequential(), workload.weights()
    for k, (n_in, n_out) in enumerate(itertools.pairwise(workload.layers)):
        layer = nn.Linear(n_in, n_out)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weights[f"W{k}"]))
            layer.bias.copy_(torch.from_numpy(weights[f"b{k}"]).reshape(-1))
        network.append(layer)
        if k < len(workload.hidden):
            network.append(nn.ReLU())
    return network


def torch_optimizer(network: Any, workload: Workload, fused: bool, capturable: bool = False) -> Any:
    """PyTorch's optimizer of a workload, in its single-pass implementation where `fused`, else in its default one.

    `capturable`: for a CUDA graph. RMSprop has no fused implementation, and always PyTorch's convention.
    """
    parameters, rate, one_pass = network.parameters(), workload.rate, True if fused else None
    if workload.optimizer == "gd":
        return torch.optim.SGD(parameters, rate, fused=one_pass)
    if workload.optimizer == "momentum":  # a sum where the chapter has an average
        return torch.optim.SGD(parameters, rate * (1.0 - BETA), momentum=BETA, fused=one_pass)
    if workload.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, rate, alpha=BETA, eps=1e-8, capturable=capturable)
    return torch.optim.Adam(parameters, rate, eps=1e-8, fused=one_pass, capturable=capturable)


def convention_of(workload: Workload) -> str:
    """Whose form of the optimizer PyTorch has: a name of `BaseOptimizer.conventions`."""
    return "torch" if workload.optimizer == "rmsprop" else "chapter"


__all__ = ["TorchPeer", "convention_of", "torch_network", "torch_optimizer"]
