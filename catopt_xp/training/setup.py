"""From the arguments of `train` to a model, an optimizer and sets that lie on one device, checked."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from catopt_xp.backend.machine import memory_size
from catopt_xp.backend.ranks import Ranks, rank_backend
from catopt_xp.backend.xp import Backend, NumpyBackend, as_array, asnumpy, backend_of, get_backend
from catopt_xp.data.dataset import DataSet
from catopt_xp.data.drawn.drawings import drawn_name
from catopt_xp.data.load import load_data
from catopt_xp.data.order import SHUFFLES
from catopt_xp.data.place import backend_for, choose_storage, place_sets
from catopt_xp.data.resident import PIXELS_OR_NUMBERS, ResidentSet
from catopt_xp.data.stream import StreamedSet
from catopt_xp.engines.choose import ENGINES
from catopt_xp.io.console import plain
from catopt_xp.io.files import remove_stale, try_to_write
from catopt_xp.nn.labels import as_rows
from catopt_xp.nn.network import BaseRegressionModel, DeepNetwork
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.rules import OPTIMIZERS, make_optimizer
from catopt_xp.optim.schedules import Scheduler, const_lr, restore
from catopt_xp.training.batch_size import SMALL_SET, choose, measure, rule_of_thumb
from catopt_xp.training.callbacks import Callback, EarlyStopping
from catopt_xp.training.checkpoint import Checkpoint, CheckpointError

# Of the arguments of `train` that have no effect beside some others: what they are when nobody gave them.
DEFAULTS: Mapping[str, Any] = {
    "hidden": (30, 20, 20),
    "activation": "relu",
    "dropout": 0.0,
    "dtype": "float32",
}


@dataclass
class Plan:
    """The arguments of `train`, checked one by one. Raises ValueError naming the argument and what it takes."""

    model: BaseRegressionModel | None
    optimizer: BaseOptimizer | str | None
    X: Any
    Y: Any
    total_epoch: int
    batch_size: int | str
    model_name: str
    save_dir: str | os.PathLike[str] | None
    recover_from: str | os.PathLike[str] | None
    print_interval: int
    dev_X: Any
    dev_Y: Any
    plot_mini_batch: bool
    data: Any
    img_shape: tuple[int, int] | None
    train_size: int | None
    dev_size: int | None
    on_error: str
    device: str | Backend
    strict_device: bool | None
    engine: str
    threads: int | None
    memory_limit: Any
    seed: int
    shuffle: str
    drop_last: bool
    accumulate: int
    hidden: Sequence[int]
    activation: str
    dropout: float
    dtype: str
    learning_rate: float | None
    lr_scheduler: Scheduler | None
    schedule_by: str
    optimizer_options: Mapping[str, Any] | None
    early_stopping: int | None
    callbacks: Sequence[Callback]
    checkpoint_every: int | None
    checkpoint_every_steps: int | None
    comm: Any
    progress: bool | None
    verbose: bool

    def __post_init__(self) -> None:
        # Plain numbers: those of NumPy are no JSON, and a run would end at its first checkpoint.
        self.total_epoch = _whole("total_epoch", self.total_epoch, 0)
        self.print_interval = _whole("print_interval", self.print_interval, 1)
        self.accumulate = _whole("accumulate", self.accumulate, 1)
        self.seed = _whole("seed", self.seed, 0)
        self.drop_last = bool(self.drop_last)
        self.hidden = tuple(_whole("hidden", units, 1) for units in np.atleast_1d(np.asarray(self.hidden)).tolist())
        self.callbacks = tuple(self.callbacks or ())
        for name in ("checkpoint_every", "checkpoint_every_steps", "early_stopping", "threads"):
            if getattr(self, name) is not None:
                setattr(self, name, _whole(name, getattr(self, name), 1))
        if self.memory_limit is not None:
            try:
                self.memory_limit = memory_size(self.memory_limit)
            except ValueError as error:
                raise ValueError(f"memory_limit: {error}") from error
        if self.batch_size != "auto":
            self.batch_size = _whole("batch_size", self.batch_size, 1, ' or "auto"')
        _one_of("shuffle", self.shuffle, SHUFFLES)
        _one_of("schedule_by", self.schedule_by, ("epoch", "step"))
        _one_of("engine", self.engine, ENGINES)
        named = isinstance(self.model_name, str) and self.model_name.isprintable() and self.model_name not in ("", "..")
        if not named or Path(self.model_name).name != self.model_name:
            raise ValueError(f"model_name is {self.model_name!r}; give a plain file name, without a folder")
        if self.save_dir == "":
            raise ValueError("save_dir is empty; give a folder, or None to save nothing")
        if self.X is not None and self.data is not None:
            raise ValueError("X and data are both given; pass one of them")
        if self.X is None and any(x is not None for x in (self.Y, self.dev_X, self.dev_Y)):
            raise ValueError("Y or dev_X is given without X; pass X too")
        if self.X is not None and self.dev_X is None and self.dev_Y is not None:
            raise ValueError("dev_Y is given without dev_X; pass both")
        self._check_objects()
        if self.plot_mini_batch and self.save_dir is None:
            raise ValueError("plot_mini_batch draws into save_dir, which is None; give a folder")
        if self.plot_mini_batch and importlib.util.find_spec("matplotlib") is None:
            raise ValueError('plot_mini_batch needs matplotlib: pip install "catopt-xp[plot]"')

    def _check_objects(self) -> None:
        if self.model is not None:
            if not isinstance(self.model, BaseRegressionModel):
                raise TypeError(f"model is a {type(self.model).__name__}; give a BaseRegressionModel, or None")
            self._refuse(("hidden", "activation", "dropout", "dtype"), "the network that train builds; set it on yours")
        if isinstance(self.optimizer, BaseOptimizer):
            options = ("learning_rate", "lr_scheduler", "optimizer_options")
            self._refuse(options, "an optimizer's name; set it on the optimizer you pass instead")
        elif self.optimizer is not None and not isinstance(self.optimizer, str):
            given = "a class" if isinstance(self.optimizer, type) else f"a {type(self.optimizer).__name__}"
            raise TypeError(f"optimizer is {given}; give its name, or a BaseOptimizer made of model.save()")
        if self.lr_scheduler is not None and not callable(self.lr_scheduler):
            raise TypeError(f"lr_scheduler is {self.lr_scheduler!r}; give a function (learning_rate, epoch) -> rate")
        for callback in self.callbacks:
            if not callable(getattr(callback, "on_epoch", None)):
                raise TypeError(f"callbacks holds {callback!r}; each must have a method on_epoch(state)")
        if self.early_stopping is not None and any(isinstance(c, EarlyStopping) for c in self.callbacks):
            raise ValueError("early_stopping is given, and an EarlyStopping among the callbacks; pass one of them")

    def _refuse(self, names: Sequence[str], goes_with: str) -> None:
        """Raises ValueError for the first argument of `names` that was given but would have no effect."""
        for name in names:
            value = getattr(self, name)
            value = tuple(value) if isinstance(value, list) else value
            if value is not None and value != DEFAULTS.get(name):
                raise ValueError(f"{name} goes with {goes_with}")

    def say(self, text: str) -> None:
        """Prints a line, unless the run is not `verbose`; a progress bar stays below it."""
        if self.verbose:
            tqdm.write(text)
            sys.stdout.flush()  # a log that is read while the run goes on

    @property
    def checkpoint_path(self) -> Path | None:
        """Where the latest checkpoint goes, or None when nothing is saved."""
        return None if self.save_dir is None else Path(self.save_dir) / f"{self.model_name}_latest.npz"


def _whole(name: str, value: Any, least: int, besides: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value!r}; give a whole number of at least {least}{besides}")
    return int(value)


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose {', '.join(choices)}")


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
    """Loads and checks everything before the first epoch: files that cannot be written, data that cannot be used."""
    ranks = ranks or Ranks()
    if ranks.size > 1 and plan.memory_limit is not None:
        raise ValueError("memory_limit is for one process, ranks hold their parts of the set whole: leave it out")
    if plan.checkpoint_path is not None and ranks.rank == 0:
        try_to_write(plan.checkpoint_path)
        remove_stale(plan.checkpoint_path)
    checkpoint = None if plan.recover_from is None else Checkpoint.read(plan.recover_from)
    device = plan.device, plan.strict_device
    backend = get_backend(*device) if ranks.size == 1 else rank_backend(ranks, *device)
    _check_data_given(plan, checkpoint)
    dataset = _dataset(plan, backend, ranks)
    n_x = _features(dataset)
    if ranks.size > 1:
        _keep_columns(dataset, ranks, n_x)
    model = _model(plan, dataset, n_x, checkpoint)
    if ranks.size > 1 and isinstance(model, DeepNetwork) and model.neuron_cnt[0] != n_x:
        raise ValueError(f"X has {n_x} features, the network takes {model.neuron_cnt[0]}")
    optimizer = _optimizer(plan, model, checkpoint)
    notices = list(dataset.notices)
    if optimizer.epoch and checkpoint is None:
        notices.append(
            f"the optimizer stands at epoch {optimizer.epoch:g}; this run counts from 0 (recover_from goes on)"
        )
    with ranks.agreed():
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


def _dataset(plan: Plan, backend: Backend, ranks: Ranks) -> DataSet:
    source = plan.data
    if plan.X is not None:
        source = _array(plan.X, "X", backend), plan.Y, _array(plan.dev_X, "dev_X", backend), plan.dev_Y
    sizes = (plan.train_size, plan.dev_size)
    if ranks.size == 1:
        return load_data(source, plan.img_shape, *sizes, on_error=plan.on_error, progress=plan.progress)
    progress = plan.progress if ranks.rank == 0 else False
    with ranks.one_by_one(source is None):  # the first one draws the set, the others find it in the cache
        return load_data(source, plan.img_shape, *sizes, on_error=plan.on_error, progress=progress, decode=ranks.decode)


def _features(dataset: DataSet) -> int:
    """Those of the whole set: of photographs a rank has its own part already. Raises ValueError for none."""
    if dataset.img_shape is None:
        shape = tuple(dataset.train_X.shape)
        if len(shape) != 2:
            raise ValueError(f"X has shape {shape}; give (n_x, m), a sample in each column")
        if 0 in shape:
            raise ValueError(f"X has shape {shape}: there is nothing to train on")
        return int(shape[0])
    return dataset.img_shape[0] * dataset.img_shape[1] * 3


def _keep_columns(dataset: DataSet, ranks: Ranks, n_x: int) -> None:
    """Leaves of a set what belongs to a rank: features of all samples, sample-major. Raises ValueError."""
    share = ranks.share(n_x)
    if ranks.decodes:
        return
    for name in ("train_X", "dev_X"):
        X = getattr(dataset, name)
        if X is not None:
            if X.shape[0] != n_x:
                raise ValueError(f"{name.removeprefix('train_')} has {X.shape[0]} features, X has {n_x}")
            setattr(dataset, name, np.ascontiguousarray(asnumpy(X).T[:, share]).T)


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
