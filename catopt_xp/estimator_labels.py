"""Labels of a classifier: names or numbers of classes, to what a network is trained on and back. Floor F1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

HostArray = NDArray[Any]


@dataclass
class Labels:
    """The classes of a classifier, (k,) and sorted, and whether a sample may have several (`multilabel`).

    One output with a sigmoid tells two classes (or the only one), k of them a sample's labels; a softmax of k outputs
    tells more classes.

    >>> labels = Labels(np.array(["cat", "dog", "owl"]))
    >>> labels.encode(np.array(["owl", "cat"]))
    array([[2, 0]])
    >>> labels.decode(np.array([[0.2, 0.9], [0.7, 0.1], [0.1, 0.0]]))
    array(['dog', 'cat'], dtype='<U3')
    """

    classes: HostArray
    multilabel: bool = False

    @property
    def output(self) -> str:
        """The network's last activation."""
        return "softmax" if len(self.classes) > 2 and not self.multilabel else "sigmoid"

    @property
    def units(self) -> int:
        """The network's outputs."""
        return len(self.classes) if self.multilabel or len(self.classes) > 2 else 1

    def encode(self, y: HostArray) -> HostArray:
        """Labels (m,), or (m, k) of 0 and 1, as a network takes them: (1, m) or (k, m) whole numbers."""
        return y.T if self.multilabel else np.searchsorted(self.classes, y).reshape(1, -1)

    def decode(self, probabilities: HostArray) -> Any:
        """The most probable labels, (m,) or (m, k), from a network's answer (outputs, m)."""
        if self.multilabel:
            return (probabilities.T > 0.5).astype(np.int64)
        if self.units > 1:
            return self.classes[np.argmax(probabilities, axis=0)]
        second = (probabilities[0] > 0.5) & (len(self.classes) > 1)
        return self.classes[second.astype(np.int64)]

    def probabilities(self, answer: Any, xp: Any) -> Any:
        """The probability of every class, (m, k), from a network's answer (outputs, m), in the array module xp."""
        if self.multilabel or self.units > 1:
            return answer.T
        return xp.stack([1.0 - answer[0, :], answer[0, :]], axis=1)
