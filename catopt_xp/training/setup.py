"""From the arguments of `train` to a model, an optimizer and sets that lie on one device, checked."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from catopt_xp.backend.ranks import Ranks
from catopt_xp.backend.xp import Backend, NumpyBackend, as_array, asnumpy, backend_of
from catopt_xp.data.dataset import DataSet
from catopt_xp.data.decoding import SharedDecoding
from catopt_xp.data.drawn.drawings import drawn_name
from catopt_xp.data.load import load_data
from catopt_xp.data.place import backend_for, choose_storage, place_sets
from catopt_xp.data.resident import PIXELS_OR_NUMBERS, ResidentSet
from catopt_xp.data.stream import StreamedSet
from catopt_xp.engines.ranks import PanelShares
from catopt_xp.io.console import plain
from catopt_xp.io.files import remove_stale, try_to_write
from catopt_xp.nn.labels import as_rows
from catopt_xp.nn.network import BaseRegressionModel, DeepNetwork
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.rules import OPTIMIZERS, make_optimizer
from catopt_xp.optim.schedules import const_lr, restore
from catopt_xp.training.batch_size import SMALL_SET, choose, measure, rule_of_thumb
from catopt_xp.training.checkpoint import Checkpoint, CheckpointError
from catopt_xp.training.plan import DEFAULTS, Plan


@dataclass
class Job:
    """Everything a run needs. `model`, `optimizer`: the caller's. `device_model`, `device_optimizer`: those that train;
    the same objects, or copies on the GPU. `train_set`, `dev_set`: on the device, or streamed onto it. `window`: the
    most rows in a window of the order; None: there are no windows."""

    plan: Plan
    backend: Backend
    model: BaseRegressionModel
    optimizer: BaseOptimizer
    device_model: BaseRegressionModel
    device_optimizer: BaseOptimizer
    train_set: ResidentSet
    dev_set: ResidentSet | None
    batch_size: int
    checkpoint: Checkpoint | None
    dataset: DataSet
    n_x: int
    window: int | None
    timings: dict[str, float]
    notices: list[str]
    ranks: Ranks


def prepare(plan: Plan, ranks: Ranks | None = None) -> Job:
    """Loads and checks everything before the first epoch: files that cannot be written, data that cannot be used.

    Several ranks call it within `ranks.agreed()`.
    """
    ranks = ranks or Ranks()
    if ranks.size > 1 and plan.memory_limit is not None:
        raise ValueError("memory_limit is for one process, ranks hold their parts of the set whole: leave it out")
    if plan.checkpoint_path is not None and ranks.rank == 0:
        try_to_write(plan.checkpoint_path)
        remove_stale(plan.checkpoint_path)
    checkpoint = None if plan.recover_from is None else Checkpoint.read(plan.recover_from)
    backend = ranks.backend(plan.device, plan.strict_device)
    _check_data_given(plan, checkpoint)
    dataset, n_x = _dataset(plan, backend, ranks)
    model = _model(plan, dataset, n_x, checkpoint)
    if ranks.size > 1 and isinstance(model, DeepNetwork) and model.neuron_cnt[0] != n_x:
        raise ValueError(f"X has {n_x} features, the network takes {model.neuron_cnt[0]}")
    optimizer = _optimizer(plan, model, checkpoint)
    notices = list(dataset.notices)
    if optimizer.epoch and checkpoint is None:
        notices.append(
            f"the optimizer stands at epoch {optimizer.epoch:g}; this run counts from 0 (recover_from goes on)"
        )
    usable = backend_for(plan, backend, model, dataset)
    if ranks.any(usable.name == "numpy") and usable.name != "numpy":
        usable = NumpyBackend("another rank cannot use its GPU for this")
    if usable.device != backend.device:
        notices.append(f"training on {usable.device}: {usable.reason}")
    with usable.activate():
        return _placed(plan, usable, model, optimizer, dataset, n_x, checkpoint, notices, ranks)


def _placed(
    plan: Plan,
    backend: Backend,
    model: BaseRegressionModel,
    optimizer: BaseOptimizer,
    dataset: DataSet,
    n_x: int,
    checkpoint: Checkpoint | None,
    notices: list[str],
    ranks: Ranks,
) -> Job:
    """Sets, model and optimizer on the device."""
    start = time.perf_counter()
    storage = choose_storage(plan, dataset, model, backend, checkpoint, ranks)
    train_set, dev_set = place_sets(storage, plan, dataset, model, backend, ranks)
    if ranks.rank == 0:
        _warn_of_one_class(backend.to_host(train_set.whole[1]))  # sync
    device_model, device_optimizer = _on_device(model, optimizer, backend)
    backend.synchronize()  # sync
    timings = {"read": 0.0, "decode": 0.0, **dataset.timings, "move": time.perf_counter() - start}
    notices += train_set.notices + ([] if dev_set is None else dev_set.notices)
    batch_size, notice = _batch_size(plan, train_set, device_model, device_optimizer, backend, checkpoint, ranks)
    return Job(
        plan=plan,
        backend=backend,
        model=model,
        optimizer=optimizer,
        device_model=device_model,
        device_optimizer=device_optimizer,
        train_set=train_set,
        dev_set=dev_set,
        batch_size=batch_size,
        checkpoint=checkpoint,
        dataset=dataset,
        n_x=n_x,
        window=storage.window,
        timings=timings,
        notices=notices + notice,
        ranks=ranks,
    )


def _warn_of_one_class(labels: np.ndarray[Any, Any]) -> None:
    """`labels`: of the training set, (·, m), checked. One sample alone may well have one label."""
    if labels.shape[1] > 1 and (labels == labels[:, :1]).all():
        label = ", ".join(f"{value:g}" for value in labels[:, 0])
        told = f"all {labels.shape[1]} samples have the label {label}, and a network learns to answer that to anything"
        warnings.warn(f"{told}; check Y, or the folders of the classes", stacklevel=5)  # where train is called


def _check_data_given(plan: Plan, checkpoint: Checkpoint | None) -> None:
    """A run does not go on with the built-in drawings because its own data were not named again."""
    if checkpoint is None or plan.X is not None or plan.data is not None:
        return
    trained_on = checkpoint.run_state().history.get("run", {}).get("data", drawn_name())
    if trained_on != drawn_name():
        raise ValueError(
            f"{checkpoint.path} was trained on {plain(trained_on)}; give data (--data), or X and Y, to go on with"
        )


def _dataset(plan: Plan, backend: Backend, ranks: Ranks) -> tuple[DataSet, int]:
    """The sets, of several ranks the columns of this one, and the number of features of the whole sets."""
    source = plan.data
    if plan.X is not None:
        source = _array(plan.X, "X", backend), plan.Y, _array(plan.dev_X, "dev_X", backend), plan.dev_Y
    sizes = (plan.train_size, plan.dev_size)
    if ranks.size == 1:
        dataset = load_data(source, plan.img_shape, *sizes, on_error=plan.on_error, progress=plan.progress)
        return dataset, _features(dataset)
    progress = plan.progress if ranks.rank == 0 else False
    decode = SharedDecoding(ranks, lambda n_x: PanelShares(n_x, ranks.rank, ranks.size).all_columns())
    with ranks.one_by_one(source is None):  # the first one draws the set, the others find it in the cache
        dataset = load_data(source, plan.img_shape, *sizes, on_error=plan.on_error, progress=progress, decode=decode)
    n_x = _features(dataset)
    shares = PanelShares(n_x, ranks.rank, ranks.size)
    if not decode.used:
        _keep_columns(dataset, shares.columns, n_x)
    return dataset, n_x


def _features(dataset: DataSet) -> int:
    """Number of features of the whole set (of photographs a rank has only its own columns); ValueError for none."""
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


def _array(X: Any, name: str, backend: Backend) -> Any:
    """X as an array that has an `xp`: lists become NumPy's, an array of another library comes onto the device."""
    try:
        if X is None or (hasattr(X, "dtype") and backend_of(X)):
            return X
    except TypeError:
        return as_array(X, name, backend, PIXELS_OR_NUMBERS)
    return as_array(X, name, wanted=PIXELS_OR_NUMBERS)


def _model(plan: Plan, dataset: DataSet, n_x: int, checkpoint: Checkpoint | None) -> BaseRegressionModel:
    if plan.model is not None:
        return plan.model
    if checkpoint is not None:
        model = checkpoint.build_model()
        _check_same_network(plan, model)
        return model
    output, units = _output_layer(dataset)
    return DeepNetwork(
        [n_x, *plan.hidden, units],
        [*[plan.activation] * len(plan.hidden), output],
        seed=plan.seed,
        dtype=plan.dtype,
        dropout=plan.dropout,
    )


def _check_same_network(plan: Plan, model: DeepNetwork) -> None:
    """What was given about the network is no other than what the checkpoint says, which is what trains."""
    has = {
        "hidden": tuple(model.neuron_cnt[1:-1]),
        "activation": ", ".join(dict.fromkeys(model.activation_func[:-1])),
        "dropout": model.dropout,
        "dtype": model.dtype,
    }
    for name, value in has.items():
        given = getattr(plan, name)
        if given not in (DEFAULTS[name], value):
            raise ValueError(f"{name} is {given!r}, the network of {plan.recover_from} has {value!r}; leave it out")


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


def _optimizer(plan: Plan, model: BaseRegressionModel, checkpoint: Checkpoint | None) -> BaseOptimizer:
    parameters = model.save()
    if isinstance(plan.optimizer, BaseOptimizer):
        _check_joined(plan.optimizer, parameters)
        return plan.optimizer
    name, learning_rate, scheduler = plan.optimizer or "adam", plan.learning_rate, plan.lr_scheduler
    options = dict(plan.optimizer_options or {})
    if plan.optimizer is not None or checkpoint is None:
        return make_optimizer(name, parameters, learning_rate, lr_scheduler=scheduler or const_lr, **options)
    saved = dict(checkpoint.meta["optimizer"])
    name, kept = str(saved.get("name")), saved.get("options", {})
    if name not in [cls.__name__ for cls, _ in OPTIMIZERS.values()]:
        raise ValueError(f"{plan.recover_from} was trained by {plain(name)}, none of the library's; pass optimizer=")
    if not isinstance(kept, dict):
        raise CheckpointError(f"{plan.recover_from}: options of its optimizer are missing; the file is damaged")
    rate, schedule = kept.get("learning_rate"), kept.get("lr_scheduler")
    learning_rate = rate if learning_rate is None else learning_rate
    scheduler = restore(schedule) if scheduler is None and schedule is not None else scheduler
    options = {k: v for k, v in kept.items() if k not in ("learning_rate", "lr_scheduler")} | options
    try:
        return make_optimizer(name, parameters, learning_rate, lr_scheduler=scheduler or const_lr, **options)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{plan.recover_from}: its optimizer cannot be made again ({error})") from error


def _check_joined(optimizer: BaseOptimizer, parameters: Mapping[str, Any]) -> None:
    """An optimizer of other arrays would train something that nobody looks at."""
    own = optimizer.param_dict
    joined = own is parameters or (
        set(own) == set(parameters)
        and all(own[k] is x or np.shares_memory(asnumpy(own[k]), asnumpy(x)) for k, x in parameters.items())
    )
    if not joined:
        raise ValueError("the optimizer updates other arrays than the model's; make it with model.save()")


def _on_device(
    model: BaseRegressionModel, optimizer: BaseOptimizer, backend: Backend
) -> tuple[BaseRegressionModel, BaseOptimizer]:
    if not isinstance(model, DeepNetwork) or model.backend.device == backend.device:
        return model, optimizer
    twin = model.to(backend)
    return twin, optimizer.on(twin.save())


def _batch_size(
    plan: Plan,
    train_set: ResidentSet,
    model: BaseRegressionModel,
    optimizer: BaseOptimizer,
    backend: Backend,
    checkpoint: Checkpoint | None,
    ranks: Ranks,
) -> tuple[int, list[str]]:
    m = train_set.m
    if plan.batch_size == "auto":
        if ranks.size > 1:
            raise ValueError('batch_size "auto" measures one process; give ranks a number')
        if isinstance(train_set, StreamedSet) and checkpoint is None:
            raise ValueError('batch_size "auto" measures a set in memory, this one is streamed; give a number')
        before = None if checkpoint is None else checkpoint.run_state().history.get("run", {}).get("batch_size")
        if before is not None:  # measured anew it might differ, and with it the order of the samples
            chosen, why = min(before, m), "that of the checkpoint"
        elif m < SMALL_SET:
            chosen, why = rule_of_thumb(m)
        else:
            chosen, why = choose(measure(plan.engine, model, optimizer, train_set, backend))
        return chosen, [f"batch size {chosen}: {why}"]
    wanted = int(plan.batch_size)
    if wanted > m:
        return m, [f"batch size {wanted} is more than the {m} samples there are: {m} is used"]
    return wanted, []
