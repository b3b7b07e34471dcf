"""What `train` prepares before the first epoch: data, network, optimizer, and their place on one device, checked."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from catopt_xp.backend.devices import fall_back
from catopt_xp.backend.ranks import Ranks
from catopt_xp.backend.xp import Backend, NumpyBackend, as_array, asnumpy, backend_of, dtype_name
from catopt_xp.data.dataset import DataSet
from catopt_xp.data.decoding import SharedDecoding
from catopt_xp.data.drawn.drawings import drawn_name
from catopt_xp.data.load import load_data
from catopt_xp.data.order import RowOrder
from catopt_xp.data.place import Sets, bytes_on_device, place, place_whole
from catopt_xp.data.resident import PIXELS_OR_NUMBERS, SampleLayout
from catopt_xp.engines.plain import Settings, Weights
from catopt_xp.engines.ranks import PanelShares
from catopt_xp.io.console import plain, warn
from catopt_xp.nn.evaluation import EVALUATION_ROWS
from catopt_xp.nn.labels import as_rows, sample_weights
from catopt_xp.nn.network import BaseRegressionModel, DeepNetwork
from catopt_xp.nn.parameters import common_dtype
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.rules import make_optimizer
from catopt_xp.optim.schedules import Scheduler, const_lr
from catopt_xp.training.batch_size import SMALL_SET, choose, measure, rule_of_thumb
from catopt_xp.training.checkpoint import Checkpoint
from catopt_xp.version import __version__

# The network that `train` builds, where nothing is said about it.
NETWORK: Mapping[str, Any] = {"hidden": (30, 20, 20), "activation": "relu", "dropout": 0.0, "dtype": "float32"}


def whole_number(name: str, value: Any, least: int, besides: str = "") -> int:
    """The number as a plain int. Raises ValueError, naming it, for what is no whole number of at least `least`.

    >>> whole_number("total_epoch", 100, 0)
    100
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value!r}; give a whole number of at least {least}{besides}")
    return int(value)


def one_of(name: str, value: str, choices: Sequence[str]) -> str:
    """The value. Raises ValueError, naming it, where it is none of the choices."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose {', '.join(choices)}")
    return value


# --- data -----------------------------------------------------------------------------------------------------------


def check_data(data: Any, X: Any, Y: Any, dev_X: Any, dev_Y: Any) -> None:
    """Raises ValueError where these arguments of `train` do not go together."""
    if X is not None and data is not None:
        raise ValueError("X and data are both given; pass one of them")
    if X is None and any(x is not None for x in (Y, dev_X, dev_Y)):
        raise ValueError("Y or dev_X is given without X; pass X too")
    if X is not None and dev_X is None and dev_Y is not None:
        raise ValueError("dev_Y is given without dev_X; pass both")


def data_source(
    data: Any, X: Any, Y: Any, dev_X: Any, dev_Y: Any, backend: Backend, checkpoint: Checkpoint | None
) -> Any:
    """What `load_data` is given: `data`, or the arrays, which `check_data` has passed.

    Raises ValueError where a run would go on with the built-in drawings because its own data were not named again.
    """
    if X is not None:
        return _array(X, "X", backend), Y, _array(dev_X, "dev_X", backend), dev_Y
    if data is None and checkpoint is not None:
        trained_on = checkpoint.described.get("data", drawn_name())
        if trained_on != drawn_name():
            told = f"{checkpoint.path} was trained on {plain(trained_on)}"
            raise ValueError(f"{told}; give data (--data), or X and Y, to go on with")
    return data


def _array(X: Any, name: str, backend: Backend) -> Any:
    """X as an array that has an `xp`: lists become NumPy's, an array of another library comes onto the device."""
    try:
        if X is None or (hasattr(X, "dtype") and backend_of(X)):
            return X
    except TypeError:
        return as_array(X, name, backend, PIXELS_OR_NUMBERS)
    return as_array(X, name, wanted=PIXELS_OR_NUMBERS)


def load_dataset(
    source: Any,
    img_shape: tuple[int, int] | None,
    train_size: int | None,
    dev_size: int | None,
    on_error: str,
    progress: bool | None,
    ranks: Ranks,
) -> tuple[DataSet, int]:
    """The data set, of which a rank has its own columns, and the number of features of the whole one.

    Arguments as for `train`; `source`: what `data_source` gives. Raises what `load_data` raises, and ValueError for a
    set that has no features or no samples.
    """
    sizes = train_size, dev_size
    if ranks.size == 1:
        dataset = load_data(source, img_shape, *sizes, on_error=on_error, progress=progress)
        return dataset, _features(dataset)
    progress = progress if ranks.rank == 0 else False
    decode = SharedDecoding(ranks, lambda n_x: PanelShares(n_x, ranks.rank, ranks.size).all_columns())
    with ranks.one_by_one(source is None):  # the first one draws the set, the others find it in the cache
        dataset = load_data(source, img_shape, *sizes, on_error=on_error, progress=progress, decode=decode)
    n_x = _features(dataset)
    shares = PanelShares(n_x, ranks.rank, ranks.size)
    if not decode.used:
        _keep_columns(dataset, shares.columns, n_x)
    return dataset, n_x


def _features(dataset: DataSet) -> int:
    """Number of features of the whole set (a rank may hold only its own columns). Raises ValueError for none."""
    if dataset.img_shape is None:
        shape = tuple(dataset.train_X.shape)
        if len(shape) != 2:
            raise ValueError(f"X has shape {shape}; give (n_x, m), a sample in each column")
        if 0 in shape:
            raise ValueError(f"X has shape {shape}: there is nothing to train on")
        return int(shape[0])
    return dataset.img_shape[0] * dataset.img_shape[1] * 3


def _keep_columns(dataset: DataSet, columns: slice, n_x: int) -> None:
    """Leaves of a set the columns of one rank, sample-major. Raises ValueError where a set has other features."""
    for name in ("train_X", "dev_X"):
        X = getattr(dataset, name)
        if X is not None:
            if X.shape[0] != n_x:
                raise ValueError(f"{name.removeprefix('train_')} has {X.shape[0]} features, X has {n_x}")
            setattr(dataset, name, np.ascontiguousarray(asnumpy(X).T[:, columns]).T)


# --- network and optimizer ------------------------------------------------------------------------------------------


def check_model(model: Any, hidden: Sequence[int], activation: str, dropout: float, dtype: str) -> None:
    """Raises TypeError or ValueError for a model of another kind, or what does not go with one; as for `train`."""
    given = {"hidden": _units(hidden), "activation": activation, "dropout": dropout, "dtype": dtype}
    if model is None:
        return
    if not isinstance(model, BaseRegressionModel):
        raise TypeError(f"model is a {type(model).__name__}; give a BaseRegressionModel, or None")
    for name, value in given.items():
        if value != NETWORK[name]:
            raise ValueError(f"{name} goes with the network that train builds; set it on yours")


def _units(hidden: Sequence[int]) -> tuple[int, ...]:
    return tuple(whole_number("hidden", count, 1) for count in np.atleast_1d(np.asarray(hidden)).tolist())


def network_for(
    model: BaseRegressionModel | None,
    hidden: Sequence[int],
    activation: str,
    dropout: float,
    dtype: str,
    seed: int,
    dataset: DataSet,
    n_x: int,
    checkpoint: Checkpoint | None,
) -> BaseRegressionModel:
    """The model that is given, or the checkpoint's, or a new network for the set; arguments as for `train`.

    Raises ValueError where what is given about the network does not go with the checkpoint.
    """
    if model is not None:
        return model
    units = _units(hidden)
    if checkpoint is None:
        output, outputs = _output_layer(dataset)
        names = [*[activation] * len(units), output]
        return DeepNetwork([n_x, *units, outputs], names, seed=seed, dtype=dtype, dropout=dropout)
    kept = checkpoint.build_model()
    given = {"hidden": units, "activation": activation, "dropout": dropout, "dtype": dtype}
    has = {
        "hidden": tuple(kept.neuron_cnt[1:-1]),
        "activation": ", ".join(dict.fromkeys(kept.activation_func[:-1])),
        "dropout": kept.dropout,
        "dtype": kept.dtype,
    }
    for name, value in given.items():
        if value not in (NETWORK[name], has[name]):
            told = f"{name} is {value!r}, the network of {checkpoint.path} has {has[name]!r}"
            raise ValueError(f"{told}; leave it out")
    return kept


def _output_layer(dataset: DataSet) -> tuple[str, int]:
    """A softmax over the classes when there are more than two, else one sigmoid.

    Classes without names are counted in the labels, which must use every number from 0 on: labels of 0 and 255, say,
    are a mistake, which `check_labels` names.
    """
    classes = len(dataset.classes)
    labels = np.zeros(0) if dataset.train_Y is None else as_rows(dataset.train_Y)
    if not classes:
        found = np.unique(labels)
        classes = len(found) if np.array_equal(found, np.arange(len(found))) else 0
    return ("softmax", classes) if classes > 2 else ("sigmoid", 1)


def check_optimizer(
    optimizer: BaseOptimizer | str | None, learning_rate: float | None, lr_scheduler: Scheduler | None, options: Any
) -> None:
    """Raises TypeError or ValueError where these arguments of `train` do not go together."""
    if isinstance(optimizer, BaseOptimizer):
        beside = {"learning_rate": learning_rate, "lr_scheduler": lr_scheduler, "optimizer_options": options}
        for name, value in beside.items():
            if value is not None:
                raise ValueError(f"{name} goes with an optimizer's name; set it on the optimizer you pass instead")
    elif optimizer is not None and not isinstance(optimizer, str):
        given = "a class" if isinstance(optimizer, type) else f"a {type(optimizer).__name__}"
        raise TypeError(f"optimizer is {given}; give its name, or a BaseOptimizer made of model.save()")
    if lr_scheduler is not None and not callable(lr_scheduler):
        raise TypeError(f"lr_scheduler is {lr_scheduler!r}; give a function (learning_rate, epoch) -> rate")


def optimizer_for(
    model: BaseRegressionModel,
    optimizer: BaseOptimizer | str | None,
    learning_rate: float | None,
    lr_scheduler: Scheduler | None,
    options: Mapping[str, Any] | None,
    checkpoint: Checkpoint | None,
) -> BaseOptimizer:
    """The optimizer that is given, or a new one by name, or the checkpoint's; arguments as for `train`.

    Raises ValueError for an optimizer of other arrays than the model's, and what `make_optimizer` raises.
    """
    parameters = model.save()
    if isinstance(optimizer, BaseOptimizer):
        if not _is_joined(optimizer, parameters):
            raise ValueError("the optimizer updates other arrays than the model's; make it with model.save()")
        return optimizer
    if optimizer is None and checkpoint is not None:
        return checkpoint.build_optimizer(parameters, learning_rate, lr_scheduler, options or {})
    scheduler = lr_scheduler or const_lr
    return make_optimizer(optimizer or "adam", parameters, learning_rate, lr_scheduler=scheduler, **(options or {}))


def _is_joined(optimizer: BaseOptimizer, parameters: Mapping[str, Any]) -> bool:
    """Whether an optimizer updates these arrays: one of others would train something that nobody looks at."""
    own = optimizer.param_dict
    return own is parameters or (
        set(own) == set(parameters)
        and all(own[k] is x or np.shares_memory(asnumpy(own[k]), asnumpy(x)) for k, x in parameters.items())
    )


# --- on the device --------------------------------------------------------------------------------------------------


def usable_backend(
    backend: Backend,
    device: str | Backend,
    strict_device: bool | None,
    model: BaseRegressionModel,
    dataset: DataSet,
    batch_size: int | str,
    ranks: Ranks,
) -> Backend:
    """The CPU instead of a GPU that the set does not fit, or that a model of another kind does not lie on: said."""
    cause = None if backend.name == "numpy" else _unusable(backend, model, dataset, batch_size)
    if cause is not None:
        if device != "auto":
            fall_back(f"{backend.device} cannot be used: {cause}.", strict_device)
        backend = NumpyBackend(f"{backend.device} cannot be used: {cause}")
    if ranks.any(backend.name == "numpy") and backend.name != "numpy":
        backend = NumpyBackend("another rank cannot use its GPU for this")
    return backend


def _unusable(backend: Backend, model: BaseRegressionModel, dataset: DataSet, batch_size: int | str) -> str | None:
    """Why a GPU cannot be used for this model and set, or None."""
    if not isinstance(model, DeepNetwork) and backend_of(*model.save().values()).device != backend.device:
        return f"a {type(model).__name__} trains where its arrays lie; make them on {backend.device}"
    needed = bytes_on_device(dataset, dtype_of(model)) + working_bytes(model, dataset, batch_size)
    if needed > backend.free_memory():
        return f"out of memory: the run needs {needed / 1e9:.2f} GB, {backend.free_memory() / 1e9:.2f} GB are free"
    return None


def dtype_of(model: BaseRegressionModel) -> str:
    """The dtype of a model's parameters, by name."""
    return model.dtype if isinstance(model, DeepNetwork) else str(np.dtype(common_dtype(model.save())))


def working_bytes(model: BaseRegressionModel, dataset: DataSet, batch_size: int | str) -> int:
    """Bytes of parameters, gradient, two moments and a temporary; and of a batch as floats."""
    weights = sum(x.size for x in model.save().values())
    rows = max(EVALUATION_ROWS, batch_size if isinstance(batch_size, int) else 0)
    return int(5 * weights + rows * dataset.train_X.shape[0]) * np.dtype(dtype_of(model)).itemsize


def place_sets(
    dataset: DataSet,
    n_x: int,
    model: BaseRegressionModel,
    order: RowOrder,
    memory_limit: int | None,
    batch_size: int | str,
    backend: Backend,
    ranks: Ranks,
    recover_from: Any = None,
) -> Sets:
    """The sets on the device, or streamed onto it; warns where all samples have one label.

    `recover_from`: the checkpoint's file, which an error names.
    """
    own = int(dataset.train_X.shape[0])  # features: a rank has some of them only
    if isinstance(model, DeepNetwork):
        if model.neuron_cnt[0] != n_x and ranks.size > 1:
            raise ValueError(f"X has {n_x} features, the network takes {model.neuron_cnt[0]}")
        features = model.neuron_cnt[0] if ranks.size == 1 else own
        layout = SampleLayout(features, model.activation_func[-1], model.neuron_cnt[-1], model.dtype)
    else:
        layout = SampleLayout(None, "sigmoid", 1, dtype_of(model))
    if ranks.size > 1:
        kinds = [dtype_name(X) for X in (dataset.train_X, dataset.dev_X) if X is not None]
        if backend.name == "cupy" and len(set(kinds)) > 1:
            raise ValueError(f"X is {kinds[0]}, dev_X {kinds[1]}: ranks on GPUs take sets of one type")
        sets = place_whole(dataset, layout, backend, order)
    else:
        working = working_bytes(model, dataset, batch_size)
        sets = place(dataset, layout, backend, order, memory_limit, working, str(recover_from))
    if ranks.rank == 0:
        _warn_of_one_class(backend.to_host(sets.train.whole[1]))  # sync
    return sets


def _warn_of_one_class(labels: NDArray[Any]) -> None:
    """Warns where all samples have one label, `labels` (·, m); one sample alone may well have one."""
    if labels.shape[1] > 1 and (labels == labels[:, :1]).all():
        label = ", ".join(f"{value:g}" for value in labels[:, 0])
        told = f"all {labels.shape[1]} samples have the label {label}, and a network learns to answer that to anything"
        warn(f"{told}; check Y, or the folders of the classes")


@dataclass
class Learner:
    """A model with its optimizer: the caller's, and those that train. They are the same objects, or copies on a GPU."""

    model: BaseRegressionModel
    optimizer: BaseOptimizer
    on_device: tuple[BaseRegressionModel, BaseOptimizer]

    @classmethod
    def on(cls, backend: Backend, model: BaseRegressionModel, optimizer: BaseOptimizer) -> Learner:
        """The pair, and what trains on this backend."""
        if not isinstance(model, DeepNetwork) or model.backend.device == backend.device:
            return cls(model, optimizer, (model, optimizer))
        twin = model.to(backend)
        return cls(model, optimizer, (twin, optimizer.on(twin.save())))

    def copy_back(self) -> None:
        """Gives the caller's objects the values of those that trained."""
        model, optimizer = self.on_device
        if model is not self.model:
            self.model.load(model.save())
            self.optimizer.load(optimizer.save())


def batch_size_for(
    batch_size: int | str,
    sets: Sets,
    weights: Weights | None,
    learner: Learner,
    backend: Backend,
    engine: str,
    checkpoint: Checkpoint | None,
    ranks: Ranks,
) -> tuple[int, str | None]:
    """The batch size of a run, and what there is to say of it. Raises ValueError where "auto" cannot be measured."""
    m = sets.train.m
    if isinstance(batch_size, int):
        if batch_size > m:
            return m, f"batch size {batch_size} is more than the {m} samples there are: {m} is used"
        return batch_size, None
    if ranks.size > 1:
        raise ValueError('batch_size "auto" measures one process; give ranks a number')
    if sets.stream is not None and checkpoint is None:
        raise ValueError('batch_size "auto" measures a set in memory, this one is streamed; give a number')
    before = None if checkpoint is None else checkpoint.described.get("batch_size")
    if before is not None:  # measured anew it might differ, and with it the order of the samples
        chosen, why = min(before, m), "that of the checkpoint"
    elif m < SMALL_SET:
        chosen, why = rule_of_thumb(m)
    else:
        chosen, why = choose(measure(engine, *learner.on_device, sets.train, backend, weights=weights))
    return chosen, f"batch size {chosen}: {why}"


def weights_for(
    sample_weight: Any, class_weight: Any, dataset: DataSet, sets: Sets, model: BaseRegressionModel
) -> Weights | None:
    """What the samples weigh, (m,) on the host, or None where all weigh 1; arguments as for `train`.

    Raises ValueError or TypeError for what cannot be used, for a streamed set, or a model that takes no weights.
    """
    if sample_weight is None and class_weight is None:
        return None
    for name in ("backward", "loss", "evaluate_rows"):
        if "weights" not in inspect.signature(getattr(model, name)).parameters:
            kind = type(model).__name__
            raise ValueError(
                f"sample_weight and class_weight need {kind}.{name} to take weights=None, which it does not"
            )
    if sets.stream is not None:
        told = "sample_weight and class_weight go with a set in memory, this one is streamed"
        raise ValueError(f"{told}: leave them out, or give a larger memory_limit")
    if isinstance(class_weight, Mapping):
        numbers = {name: number for number, name in enumerate(dataset.classes)}
        class_weight = {numbers.get(one, one): weight for one, weight in class_weight.items()}
    weights = sample_weights(sample_weight, class_weight, as_rows(dataset.train_Y), sets.train.m)
    if weights is not None and weights.min() < 0:
        sample = int(weights.argmin())
        raise ValueError(f"the weight of sample {sample} is {weights[sample]:g}; give weights of at least 0")
    return weights


def describe_run(
    learner: Learner,
    dataset: DataSet,
    n_x: int,
    sets: Sets,
    weights: Weights | None,
    settings: Settings,
    backend: Backend,
    engine: str,
) -> dict[str, Any]:
    """How a run is described in its history and its checkpoints: what a run that goes on is compared with."""
    return {
        "version": __version__,
        "device": backend.device,
        "engine": engine,
        "optimizer": type(learner.optimizer).__name__,
        "options": learner.optimizer.options,
        "model": learner.model.architecture,
        "data": dataset.name,
        "classes": list(dataset.classes),
        "img_shape": None if dataset.img_shape is None else list(dataset.img_shape),
        "m": sets.train.m,
        "n_x": n_x,
        "window": sets.order.window,
        "weights": None if weights is None else zlib.crc32(weights.tobytes()),
        "batch_size": settings.batch_size,
        "seed": sets.order.seed,
        "shuffle": sets.order.shuffle,
        "schedule_by": "step" if settings.schedule_by_step else "epoch",
        "drop_last": settings.drop_last,
        "accumulate": settings.accumulate,
    }
