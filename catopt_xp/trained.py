"""A trained network from wherever it is, and what is known of what it was trained on. Floor F5."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from catopt_xp.data.dataset import checked_img_shape
from catopt_xp.estimators.parameters import HIDDEN
from catopt_xp.nn.functional import OUTPUT_ACTIVATIONS
from catopt_xp.nn.network import DeepNetwork
from catopt_xp.training.checkpoint import Checkpoint, CheckpointError
from catopt_xp.training.train import TrainResult

# What a doctored or foreign checkpoint may raise where its parts are used.
DAMAGE = (LookupError, AttributeError, TypeError, ValueError, OverflowError, MemoryError, RecursionError)


@dataclass(frozen=True)
class Trained:
    """A network, and what is known besides.

    `classes`: by label, names or, of an estimator, whatever its labels are; empty where they are not known.
    `img_shape`: (width, height) of the pictures that it takes, or None. `tells_classes`: whether it answers as
    scikit-learn's classifiers of one label do, with a probability for every class and with the class itself.
    """

    network: DeepNetwork
    classes: tuple[Any, ...] = ()
    img_shape: tuple[int, int] | None = None
    tells_classes: bool = False

    @property
    def output(self) -> str:
        """The network's last activation."""
        return self.network.activation_func[-1]

    @property
    def classifies(self) -> bool:
        """Whether it answers with probabilities, not with numbers of other kinds."""
        return OUTPUT_ACTIVATIONS[self.output].classifies


def trained_of(model: Any, classes: Sequence[str] | None = None, img_shape: Sequence[int] | None = None) -> Trained:
    """The trained network of `model`: a DeepNetwork, a TrainResult, a checkpoint's file, or a fitted estimator.

    An estimator is one of ours or of scikit-learn's: what has `coefs_` and `intercepts_`. `classes`, `img_shape`: in
    place of what is known; a Trained is taken too. Raises TypeError for another model, ValueError for an estimator that
    is not fitted or a description that does not go with the network, FileNotFoundError, CheckpointError.

    >>> trained_of(DeepNetwork([12, 1], ["sigmoid"]), classes=["dog", "cat"], img_shape=(2, 2)).classes
    ('dog', 'cat')
    """
    trained = _found(model)
    if img_shape is not None:
        trained = replace(trained, img_shape=checked_img_shape(img_shape))
    if classes is not None:
        labels = max(2, trained.network.neuron_cnt[-1]) if trained.classifies else 0
        if len(classes) != labels:
            raise ValueError(f"classes: {len(classes)} are named, the network tells {labels or 'none'}")
        trained = replace(trained, classes=tuple(map(str, classes)))
    return trained


def _found(model: Any) -> Trained:
    if isinstance(model, Trained):
        return model
    if isinstance(model, str | os.PathLike):
        network, run = read_trained(os.fspath(model))
        return Trained(network, tuple(run["classes"]), run["img_shape"])
    if isinstance(model, TrainResult):
        run = model.history.run
        shape = run.get("img_shape")
        return Trained(_known(model.model), tuple(run.get("classes") or ()), shape and checked_img_shape(shape))
    if hasattr(model, "hidden_layer_sizes"):
        return _of_estimator(model)
    return Trained(_known(model))


def _known(model: Any) -> DeepNetwork:
    """The model; one of another class may compute something else, which nothing here knows."""
    if type(model) is not DeepNetwork:
        raise TypeError(
            f"{type(model).__name__} is not known here; give a DeepNetwork, what train returned, a checkpoint's file,"
            " or a fitted MLPClassifier or MLPRegressor"
        )
    return model


def _of_estimator(estimator: Any) -> Trained:
    """From what scikit-learn makes public, so that its own estimators are taken too."""
    name = type(estimator).__name__
    if not hasattr(estimator, "coefs_"):
        raise ValueError(f"this {name} is not fitted yet; call fit first")
    weights, biases = estimator.coefs_, estimator.intercepts_  # (n_in, n_out) and (n_out,)
    output = "sigmoid" if estimator.out_activation_ == "logistic" else estimator.out_activation_
    units = [len(weights[0]), *map(len, biases)]
    names = [*[HIDDEN[estimator.activation]] * (len(units) - 2), output]
    network = DeepNetwork(units, names, seed=None, dtype=weights[0].dtype)
    arrays = {f"W{k}": np.asarray(x).T for k, x in enumerate(weights)}
    network.load(arrays | {f"b{k}": np.asarray(x).reshape(-1, 1) for k, x in enumerate(biases)})
    if not hasattr(estimator, "classes_"):
        return Trained(network)
    if len(estimator.classes_) < 2:
        raise ValueError(f"this {name} was fitted with one class, and has nothing to tell; fit it with several")
    one_label = output == "softmax" or units[-1] == 1
    return Trained(network, tuple(estimator.classes_.tolist()), tells_classes=one_label)


def read_trained(file: str) -> tuple[DeepNetwork, Mapping[str, Any]]:
    """The trained network of a checkpoint, and what it says of its data, as `trained_on` has it.

    Raises FileNotFoundError, and CheckpointError naming the file.
    """
    checkpoint = Checkpoint.read(file)
    try:
        model, trained = checkpoint.trained_model(), trained_on(checkpoint)
    except CheckpointError:
        raise
    except DAMAGE as error:
        raise _damaged(checkpoint, error) from error
    labels = max(2, model.neuron_cnt[-1])
    if trained["classes"] and len(trained["classes"]) < labels:
        raise _damaged(checkpoint, ValueError(f"{len(trained['classes'])} classes for {labels} labels"))
    return model, trained


def trained_on(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What a checkpoint says of its run: "data" (name) and "classes" (by label), may be empty; "img_shape" or None; the
    rest as it stands there. Raises CheckpointError where these are of another type."""
    run: Any = checkpoint.run_state().history.get("run", {})
    try:
        data, classes, img_shape = run.get("data") or "", run.get("classes") or [], run.get("img_shape") or None
        if not isinstance(data, str) or not isinstance(classes, list) or not all(isinstance(x, str) for x in classes):
            raise TypeError("data or classes are no names")
        shape = None if img_shape is None else checked_img_shape(img_shape)
    except DAMAGE as error:
        raise _damaged(checkpoint, error) from error
    return {**run, "data": data, "classes": classes, "img_shape": shape}


def _damaged(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    if isinstance(error, MemoryError):  # that is no fault of the file
        raise error
    told = f"its meta does not fit ({type(error).__name__}: {error})"
    return CheckpointError(f"{checkpoint.path}: {told}; the file is damaged or foreign")
