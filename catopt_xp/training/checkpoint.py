"""State <-> `.npz`: flat keys, JSON beside them, no pickle; written whole or not at all.

A checkpoint is an ordinary NumPy archive. Arrays stand under flat keys (`model/W0`, `optimizer/m/W0`), and
everything else in one JSON text under `meta`. Reading never unpickles, so a file can be of any origin.
"""

from __future__ import annotations

import json
import os
import platform
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from catopt_xp.backend.machine import free_room
from catopt_xp.backend.xp import Backend, asnumpy
from catopt_xp.io.archives import HostArrays, read_arrays
from catopt_xp.io.console import plain
from catopt_xp.io.files import write_whole
from catopt_xp.nn.network import BaseRegressionModel, DeepNetwork, checked_layout
from catopt_xp.nn.parameters import check_matches, common_dtype, layer_shapes
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.rules import OPTIMIZERS, make_optimizer
from catopt_xp.optim.schedules import Scheduler, const_lr, restore
from catopt_xp.training.history import History
from catopt_xp.training.record import check_history

FORMAT = "catopt_xp checkpoint"
VERSION = 1


class CheckpointError(ValueError):
    """A file that is not a whole, matching checkpoint; the message names the file and what is wrong with it.

    It is one line that can be printed, whatever the file says.
    """

    def __init__(self, message: str) -> None:
        super().__init__(plain(message))


def npz_path(filename: str | os.PathLike[str]) -> Path:
    """The file that `filename` means: with `.npz` appended when it has no such ending, as `numpy.savez` does.

    >>> npz_path("work_dirs/model_latest").name
    'model_latest.npz'
    """
    path = Path(filename)
    return path if path.suffix == ".npz" else path.with_name(path.name + ".npz")


def checkpoint_file(save_dir: str | os.PathLike[str] | None, model_name: str) -> Path | None:
    """The file of a run's latest checkpoint; None where nothing is saved. Raises ValueError for a bad name or folder.

    >>> checkpoint_file("work_dirs", "cats").name
    'cats_latest.npz'
    """
    named = isinstance(model_name, str) and model_name.isprintable() and model_name not in ("", "..")
    if not named or Path(model_name).name != model_name:
        raise ValueError(f"model_name is {model_name!r}; give a plain file name, without a folder")
    if save_dir == "":
        raise ValueError("save_dir is empty; give a folder, or None to save nothing")
    return None if save_dir is None else Path(save_dir) / f"{model_name}_latest.npz"


def write_checkpoint(filename: str | os.PathLike[str], arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
    """Writes host arrays and JSON-able `meta` as one file; returns its path.

    Raises FloatingPointError naming the first array with a NaN or an infinity, ValueError for a name that an archive
    cannot hold (nothing is written then), OSError when the file cannot be written.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = write_checkpoint(Path(folder, "a"), {"model/W0": np.ones((1, 2))}, {"epoch": 3})
    ...     arrays, meta = read_checkpoint(path)
    >>> arrays["model/W0"], meta["epoch"]
    (array([[1., 1.]]), 3)
    """
    path = npz_path(filename)
    for key, array in arrays.items():
        # An archive would cut the name at the zero, or not be written: its parameter would be lost.
        if "\0" in key or any("\ud800" <= c <= "\udfff" for c in key):
            raise ValueError(f"{key!r} cannot be a name in an archive, so nothing was saved to {path}: rename it")
        if not is_finite(array):
            raise FloatingPointError(f"{key} has values that are not finite, so nothing was saved to {path}")
    text = json.dumps({"format": FORMAT, "version": VERSION, **meta})
    # The last member, so that an archive whose directory was cut short has no meta, and is refused.
    members = {**arrays, "meta": np.frombuffer(text.encode(), dtype=np.uint8)}
    write_whole(path, lambda file: _write_archive(file, members))
    return path


def is_finite(array: np.ndarray[Any, Any]) -> bool:
    """Whether an array has neither NaN nor infinity.

    >>> is_finite(np.array([1.0, np.inf]))
    False
    """
    if array.dtype.kind != "f":
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        # A sum is finite only where every term is, and needs no array of booleans; one that overflows decides nothing.
        return bool(np.isfinite(array.sum(dtype=np.float64)) or np.isfinite(array).all())


def _write_archive(file: Any, members: Mapping[str, Any]) -> None:
    # What numpy.savez writes, without its pickling and its timestamps: equal states give equal files.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for key, array in members.items():
            with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def read_checkpoint(filename: str | os.PathLike[str]) -> tuple[HostArrays, dict[str, Any]]:
    """Arrays and meta of a checkpoint, every byte checked against the archive's checksums.

    Raises FileNotFoundError, or CheckpointError for a truncated, foreign or pickled file, naming what is wrong.
    """
    path = Path(filename)
    path = path if path.exists() else npz_path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        raise CheckpointError(f"{str(filename)!r} is a folder; give the .npz file in it")
    if not path.is_file():  # reading a pipe would wait for ever
        raise CheckpointError(f"{path} is no file but a pipe or a device; give an .npz file")
    try:
        arrays, _ = read_arrays(path, free_room())
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; the file is damaged or foreign") from error
    return arrays, _read_meta(path, arrays)


def _read_meta(path: Path, arrays: HostArrays) -> dict[str, Any]:
    if "meta" not in arrays:
        raise CheckpointError(f"{path}: meta is missing; it is not a checkpoint of catopt_xp")
    try:
        meta = json.loads(arrays.pop("meta").tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: meta is not JSON ({error}); the file is damaged or foreign") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f"{path}: meta does not say {FORMAT!r}; the file is foreign")
    if meta.get("version") != VERSION:
        raise CheckpointError(f"{path}: written in format version {meta.get('version')}, this library reads {VERSION}")
    return meta


def group(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries under `prefix/`, without it.

    >>> group({"model/W0": 1, "optimizer/m/W0": 2}, "optimizer")
    {'m/W0': 2}
    """
    return {key[len(prefix) + 1 :]: x for key, x in arrays.items() if key.startswith(prefix + "/")}


COUNTERS = ("name", "steps", "epoch")
ARCHITECTURE = frozenset({"neuron_cnt", "activation_func", "seed", "dtype", "dropout", "clipped_loss"})
MOST_EPOCHS = 1 << 53  # which nobody reaches: larger numbers are no numbers of epochs or batches


@dataclass
class RunState:
    """Where a run stands: `epoch` epochs are whole, and `batches` of the next one are done, with these `losses`.

    `seconds`: of training in the unfinished epoch. `history`: JSON-able, without the mini-batch losses, which travel
    as an array. `early_stopping` and `best`: its state and the weights it kept. `environment`: what fixes the bits.
    """

    epoch: int = 0
    batches: int = 0
    seconds: float = 0.0
    losses: Any = None
    mini_batch_loss: Any = None
    history: dict[str, Any] = field(default_factory=dict)
    early_stopping: dict[str, Any] | None = None
    best: Mapping[str, Any] | None = None
    environment: dict[str, Any] = field(default_factory=dict)


def environment(backend: Backend, engine: str, versions: Mapping[str, str] | None = None) -> dict[str, str]:
    """What has to be the same for a resumed run to have the same bits."""
    here = {"device": backend.device, "engine": engine, "machine": platform.machine()}
    return here | backend.versions() | dict(versions or {})


def changes(
    place: RunState, then: Mapping[str, Any], now: Mapping[str, Any], environment: Mapping[str, str]
) -> list[str]:
    """What differs in a run that goes on from `place`, a line each; ValueError where it cannot go on like that.

    `then`, `now`: how the run of the checkpoint and this one are described; `environment`: this one's.
    """
    ordering = ("seed", "shuffle", "batch_size", "drop_last", "accumulate", "m", "n_x")
    changed = [k for k in ordering if k in then and then[k] != now[k]]
    windowed = bool(then) and then.get("window") != now["window"]  # it began without windows
    if windowed and place.batches:
        raise ValueError(
            f"the checkpoint stands within epoch {place.epoch}, whose order has no windows, and can only go on with the"
            " set in memory: give a larger memory_limit"
        )
    if changed and place.batches:
        told = plain(", ".join(f"{k} {then[k]}" for k in changed))
        raise ValueError(
            f"the checkpoint stands within epoch {place.epoch}, which can only go on as it began: give {told}"
        )
    reweighed = "weights" in then and then["weights"] != now["weights"]
    if reweighed and place.batches:
        told = "with the sample weights that it began with" if then["weights"] else "without sample weights"
        raise ValueError(f"the checkpoint stands within epoch {place.epoch}, which can only go on {told}")
    changed += [k for k in ("optimizer", "options", "schedule_by", "data") if k in then and then[k] != now[k]]
    model_then, model_now = then.get("model", {}), now["model"]
    if model_then and model_now and model_then["activation_func"] != model_now["activation_func"]:
        kept, given = (plain(", ".join(model["activation_func"])) for model in (model_then, model_now))
        raise ValueError(f"the checkpoint's network has the activations {kept}, the model that was given has {given}")
    if model_then and model_then != model_now:  # the seed too counts: dropout masks are drawn from it
        changed.append("model")
    texts = [f"the checkpoint was trained with {k} {then[k]}, this run goes on with {now[k]}" for k in changed]
    if reweighed:
        had = "with other sample weights" if then["weights"] else "without sample weights"
        texts.append(f"the checkpoint was trained {had}")
    if windowed:
        texts.append(f"the checkpoint was trained in memory, this run streams in windows of {now['window']} rows")
    differs = [f"{k} {v}" for k, v in place.environment.items() if environment.get(k) != v]
    if differs:
        texts.append(f"the checkpoint was written with {', '.join(differs)}: the bits that follow will differ")
    return texts


def save_run(
    model: BaseRegressionModel, optimizer: BaseOptimizer, filename: str | os.PathLike[str], state: RunState
) -> Path:
    """Writes model, optimizer and run as one file, whole or not at all; returns its path.

    Raises FloatingPointError when a parameter or moment is not finite, OSError when the file cannot be written.
    """
    saved = optimizer.save()
    arrays = {f"model/{k}": asnumpy(x) for k, x in model.save().items()}  # sync
    arrays |= {f"optimizer/{k}": asnumpy(x) for k, x in saved.items() if k not in COUNTERS}  # sync
    if state.best is not None:
        arrays |= {f"best/{k}": asnumpy(x) for k, x in state.best.items()}  # sync
    for name in ("losses", "mini_batch_loss"):
        if getattr(state, name) is not None:
            arrays[f"run/{name}"] = np.asarray(getattr(state, name))
    meta = {
        "model": model.architecture,
        "optimizer": {k: saved[k] for k in COUNTERS} | {"options": optimizer.options},
        "run": {
            "epoch": state.epoch,
            "batches": state.batches,
            "seconds": state.seconds,
            "history": state.history,
            "early_stopping": state.early_stopping,
            "environment": state.environment,
        },
    }
    return write_checkpoint(filename, arrays, meta)


@dataclass
class Checkpoint:
    """A checkpoint in memory: host arrays and what was said beside them."""

    path: Path
    arrays: dict[str, Any]
    meta: dict[str, Any]

    @classmethod
    def read(cls, filename: str | os.PathLike[str]) -> Checkpoint:
        """Reads and checks a file. Raises FileNotFoundError, CheckpointError."""
        arrays, meta = read_checkpoint(filename)
        for key, kind in (("model", dict), ("optimizer", dict)):
            if not isinstance(meta.get(key), kind):
                raise CheckpointError(f"{filename}: {key} is missing from its meta; the file is damaged or foreign")
        return cls(Path(filename), arrays, meta)

    def build_model(self) -> DeepNetwork:
        """The network that was saved, with its initial weights. Raises CheckpointError when none is described, or one
        of other sizes than the weights have."""
        described = self.meta["model"]
        try:
            units, _ = checked_layout(described.get("neuron_cnt"), described.get("activation_func"))
            # Before a network of that size is made: a few bytes may describe one that no memory holds.
            check_matches(group(self.arrays, "model"), layer_shapes(units), "model")
            if not set(described) <= ARCHITECTURE:
                raise ValueError(f"unknown {', '.join(set(described) - ARCHITECTURE)}")
            return DeepNetwork(**described)
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{self.path}: model is not described as a DeepNetwork ({error})") from error

    @cached_property
    def described(self) -> dict[str, Any]:
        """How the run that wrote the file is described; empty for a file of `save_state_dict`."""
        found: dict[str, Any] = self.run_state().history.get("run", {})
        return found

    def build_optimizer(
        self,
        parameters: Mapping[str, Any],
        learning_rate: float | None,
        lr_scheduler: Scheduler | None,
        options: Mapping[str, Any],
    ) -> BaseOptimizer:
        """An optimizer of these parameters as the checkpoint's was made; what is given takes the place of its own.

        Raises ValueError where the library has no such optimizer, CheckpointError where the file is damaged.
        """
        saved = self.meta["optimizer"]
        name, kept = str(saved.get("name")), saved.get("options", {})
        if name not in [cls.__name__ for cls, _ in OPTIMIZERS.values()]:
            raise ValueError(f"{self.path} was trained by {plain(name)}, none of the library's; pass optimizer=")
        if not isinstance(kept, dict):
            raise CheckpointError(f"{self.path}: options of its optimizer are missing; the file is damaged")
        rate, schedule = kept.get("learning_rate"), kept.get("lr_scheduler")
        rate = rate if learning_rate is None else learning_rate
        scheduler = restore(schedule) if lr_scheduler is None and schedule is not None else lr_scheduler
        others = {k: v for k, v in kept.items() if k not in ("learning_rate", "lr_scheduler")} | dict(options)
        try:
            return make_optimizer(name, parameters, rate, lr_scheduler=scheduler or const_lr, **others)
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{self.path}: its optimizer cannot be made again ({error})") from error

    def trained_model(self) -> DeepNetwork:
        """The trained network, on the CPU: the best weights where early stopping kept some, else the last."""
        model = self.build_model()
        self.load_into(model, None, "best" if group(self.arrays, "best") else "model")
        return model

    def load_into(self, model: BaseRegressionModel, optimizer: BaseOptimizer | None, weights: str = "model") -> None:
        """Copies weights, and the optimizer's state where one is given, into live arrays.

        `weights`: "model", the last ones, or "best", those that early stopping kept.
        Raises CheckpointError naming the key that is missing, foreign or of another shape; nothing is changed then.
        """
        try:
            values = group(self.arrays, weights)
            check_matches(values, {k: tuple(x.shape) for k, x in model.save().items()}, weights)
            self._check_numbers(common_dtype(model.save()))
            if optimizer is not None:
                counters = {k: v for k, v in self.meta["optimizer"].items() if k in COUNTERS}
                optimizer.load(counters | group(self.arrays, "optimizer"))
            model.load(values)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def _check_numbers(self, dtype: str) -> None:
        """Raises ValueError naming an array that has anything but numbers that are finite, also as `dtype`."""
        for key, array in self.arrays.items():
            if array.dtype.kind not in "buif":
                raise ValueError(f"{key} holds {array.dtype}, and no numbers")
            with np.errstate(over="ignore"):
                narrowed = array.astype(dtype) if array.dtype.itemsize > np.dtype(dtype).itemsize else array
            if not is_finite(narrowed):
                raise ValueError(f"{key} has values that are not finite")

    def run_state(self) -> RunState:
        """The place in the run; for a file written by `save_state_dict`, the end of the optimizer's epoch."""
        run = self.meta.get("run")
        own = group(self.arrays, "run")
        try:
            if run is None:
                return RunState(epoch=_counted("epoch", self.meta["optimizer"]["epoch"]))
            batches, losses = _counted("batches", run["batches"]), own.get("losses")
            if batches and (losses is None or losses.shape != (batches,) or losses.dtype.kind != "f"):
                raise ValueError(f"run/losses does not hold the losses of {batches} batches")
            return RunState(
                epoch=_counted("epoch", run["epoch"]),
                batches=batches,
                seconds=float(run["seconds"]),
                losses=losses,
                mini_batch_loss=_losses(own.get("mini_batch_loss")),
                history=_checked_history(run["history"]),
                early_stopping=_table("early_stopping", run["early_stopping"] or {}) or None,
                best=group(self.arrays, "best") or None,
                environment=_table("environment", run["environment"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{self.path}: run is incomplete ({error!r}); the file is damaged") from error

    def history(self) -> History:
        """Of the run up to there; empty for a file written by `save_state_dict`. Raises CheckpointError."""
        place = self.run_state()
        losses = [] if place.mini_batch_loss is None else place.mini_batch_loss.tolist()
        try:
            check_history(place.history, "its history")
            return History(**place.history, mini_batch_loss=losses)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: history is foreign ({error})") from error


def _counted(name: str, number: Any) -> int:
    """A number of epochs or batches, as JSON has it. Raises ValueError."""
    if not isinstance(number, int | float) or not 0 <= number < MOST_EPOCHS:
        raise ValueError(f"{name} is {number!r}")
    return int(number)


def _table(name: str, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise TypeError(f"{name} is no table of names and values")
    return found


def _losses(found: Any) -> Any:
    if found is not None and (found.ndim != 1 or found.dtype.kind != "f"):
        raise ValueError("run/mini_batch_loss is no list of losses")
    return found


def _checked_history(found: Any) -> dict[str, Any]:
    """The history, of whose description of the run a resumed one takes what it needs."""
    history = dict(_table("history", found))
    run = _table("run", history.get("run", {}))
    model, window, batch_size = (run.get(name) for name in ("model", "window", "batch_size"))
    if model:
        checked_layout(_table("model", model)["neuron_cnt"], model["activation_func"])
    for name, number in (("window", window), ("batch_size", batch_size)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise ValueError(f"{name} is {number!r}")
    return history


def save_state_dict(model: BaseRegressionModel, optimizer: BaseOptimizer, filename: str | os.PathLike[str]) -> Path:
    """Saves a model and its optimizer as one `.npz` file, whole or not at all; returns its path.

    `filename`: `.npz` is appended when missing. Raises FloatingPointError for values that are not finite, OSError.

    >>> import tempfile, catopt_xp
    >>> model = DeepNetwork([2, 1], ["sigmoid"])
    >>> optimizer = catopt_xp.Adam(model.save(), 1e-3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_state_dict(model, optimizer, f"{folder}/state")
    ...     load_state_dict(model, optimizer, path)
    """
    saved = optimizer.save()
    return save_run(model, optimizer, filename, RunState(epoch=int(saved["epoch"])))


def load_state_dict(model: BaseRegressionModel, optimizer: BaseOptimizer, filename: str | os.PathLike[str]) -> None:
    """Copies a saved state into the live arrays of a model and an optimizer, which stay joined.

    The state of another kind of optimizer gives its epoch alone, with a warning. Raises FileNotFoundError, and
    CheckpointError naming a missing, foreign or misshapen key.
    """
    Checkpoint.read(filename).load_into(model, optimizer)


def load_model(filename: str | os.PathLike[str]) -> DeepNetwork:
    """The trained network of a checkpoint, on the CPU: the best weights where early stopping kept some, else the last.

    Raises FileNotFoundError, CheckpointError.

    >>> import tempfile, catopt_xp
    >>> model = DeepNetwork([2, 1], ["sigmoid"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_state_dict(model, catopt_xp.Adam(model.save(), 1e-3), f"{folder}/state")
    ...     bool((load_model(path).save()["W0"] == model.save()["W0"]).all())
    True
    """
    return Checkpoint.read(filename).trained_model()
