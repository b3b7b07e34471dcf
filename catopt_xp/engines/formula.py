"""The panel engine on a CPU with everything behind the first layer by the network's own formulas. Floor F3.

It runs what compiled kernels of the rest do not know: weights of samples, other outputs and losses, and a caller that
asks for the sum of the squares of the weights between two steps.
"""

from __future__ import annotations

from catopt_xp.backend import Array, Backend
from catopt_xp.engines.cpu import PanelEngine
from catopt_xp.engines.plain import Settings
from catopt_xp.network import DeepNetwork
from catopt_xp.optim import BaseOptimizer


class FormulaPanelEngine(PanelEngine):
    """`PanelEngine` for every `DeepNetwork`; arguments as there."""

    def __init__(
        self,
        model: DeepNetwork,
        optimizer: BaseOptimizer,
        samples: Array,
        targets: Array,
        backend: Backend,
        settings: Settings,
    ) -> None:
        super().__init__(model, optimizer, samples, targets, backend, settings)
        self._rest = None

    def weights(self) -> list[Array]:
        if not self._packed:
            return super().weights()
        parameters = self.network.save()
        behind = parameters["W0"].size
        return [self._state[0], parameters.flat[behind : parameters.n_weights]]  # what is packed is padded with zeros


__all__ = ["FormulaPanelEngine"]
