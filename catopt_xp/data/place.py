"""Where the sets of a run lie: on the device whole, or in a file, from where they are streamed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from catopt_xp.backend.devices import fall_back
from catopt_xp.backend.machine import size_text
from catopt_xp.backend.ranks import Ranks
from catopt_xp.backend.xp import Backend, NumpyBackend, backend_of, dtype_name
from catopt_xp.data.dataset import DataSet
from catopt_xp.data.resident import ResidentSet, labels_of, make_resident
from catopt_xp.data.stream import WINDOWS, RowFile, StreamedDevSet, StreamedSet, find_rows, is_mapped
from catopt_xp.nn.evaluation import EVALUATION_ROWS
from catopt_xp.nn.labels import check_labels
from catopt_xp.nn.network import BaseRegressionModel, DeepNetwork
from catopt_xp.nn.parameters import common_dtype
from catopt_xp.training.checkpoint import Checkpoint
from catopt_xp.training.plan import Plan

FITS = 0.8  # of the free memory: what a set may take that is mapped, without being streamed
SHARE = 2  # of a memory limit the set takes this part: network, optimizer and libraries need the rest


@dataclass(frozen=True)
class Storage:
    """`window`: the most rows in a window of the order; None: rows are shuffled over the whole set.

    `train`, `dev`: the files from which sets are streamed; None: they lie in memory.
    """

    window: int | None = None
    train: RowFile | None = None
    dev: RowFile | None = None


def backend_for(plan: Plan, backend: Backend, model: BaseRegressionModel, dataset: DataSet) -> Backend:
    """The CPU instead of a GPU that the set does not fit, or that a model of another kind does not lie on: said."""
    if backend.name == "numpy":
        return backend
    dtype = _dtype(model)
    sets = [x for x in (dataset.train_X, dataset.dev_X) if x is not None and _streamable(x, dtype) is None]
    needed = sum(_stored_bytes(x, dtype) for x in sets) + _working_bytes(plan, model, dataset)
    cause = None
    if not isinstance(model, DeepNetwork) and backend_of(*model.save().values()).device != backend.device:
        cause = f"a {type(model).__name__} trains where its arrays lie; make them on {backend.device}"
    elif needed > backend.free_memory():
        cause = f"out of memory: the run needs {needed / 1e9:.2f} GB, {backend.free_memory() / 1e9:.2f} GB are free"
    if cause is None:
        return backend
    if plan.device != "auto":
        fall_back(f"{backend.device} cannot be used: {cause}.", plan.strict_device)
    return NumpyBackend(f"{backend.device} cannot be used: {cause}")


def choose_storage(
    plan: Plan,
    dataset: DataSet,
    model: BaseRegressionModel,
    backend: Backend,
    checkpoint: Checkpoint | None,
    ranks: Ranks,
) -> Storage:
    """Whether the sets are streamed: where they take more than the memory limit, or than what is free, leaves them.

    A resumed run keeps the windows that it began with. Raises ValueError where a set fits neither way.
    """
    before = None if checkpoint is None else checkpoint.run_state().history.get("run", {}).get("window")
    if ranks.size > 1:
        kinds = [dtype_name(X) for X in (dataset.train_X, dataset.dev_X) if X is not None]
        if backend.name == "cupy" and len(set(kinds)) > 1:
            raise ValueError(f"X is {kinds[0]}, dev_X {kinds[1]}: ranks on GPUs take sets of one type")
        return Storage(before)
    dtype, limited = _dtype(model), plan.memory_limit is not None
    room = plan.memory_limit // SHARE if limited else _free_bytes(plan, dataset, model, backend)
    sets = {"X": dataset.train_X} | ({} if dataset.dev_X is None else {"dev_X": dataset.dev_X})
    # A set that lies in the host's memory takes no more of it; it counts against a limit, and on a GPU.
    counted = {name: X for name, X in sets.items() if limited or backend.name != "numpy" or is_mapped(X)}
    needed = {name: _stored_bytes(X, dtype) for name, X in counted.items()}
    fits = room * (1.0 if limited else FITS)
    if sum(needed.values()) <= fits:
        return Storage(before)
    files = {name: _streamable(X, dtype) for name, X in sets.items()}
    kept = {name: size for name, size in needed.items() if files[name] is None}
    beside = sum(kept.values())
    if beside > fits:  # whatever is streamed
        largest = sets[max(kept, key=lambda name: kept[name])]
        if limited or is_mapped(largest):
            raise ValueError(_not_streamable(list(kept), largest, beside, room, dtype))
        return Storage(before)
    train, dev = files["X"] if needed.get("X", 0) > fits - beside else None, files.get("dev_X")
    if train is None:
        return Storage(before, None, dev)
    window = before
    if window is None:
        # What is free changes from run to run, and with it the order: a power of two changes rarely.
        memory = room if limited else 2 ** max(0, int(np.log2(max(1, room // SHARE))))
        window = max(1, memory // (WINDOWS * train.row_bytes))
    elif WINDOWS * window * train.row_bytes > room:
        told = size_text(SHARE * WINDOWS * window * train.row_bytes)
        raise ValueError(f"{plan.recover_from} goes on in windows of {window} rows: give a memory_limit of {told}")
    return Storage(window, train, dev)


def place_sets(
    storage: Storage, plan: Plan, dataset: DataSet, model: BaseRegressionModel, backend: Backend, ranks: Ranks
) -> tuple[ResidentSet, ResidentSet | None]:
    """The training and the dev set, checked, on the device or ready to be streamed onto it."""
    if isinstance(model, DeepNetwork):
        output, units = model.activation_func[-1], model.neuron_cnt[-1]
        n_x = model.neuron_cnt[0] if ranks.size == 1 else int(dataset.train_X.shape[0])  # a rank has some of them only
    else:
        output, units, n_x = "sigmoid", 1, None
    dtype = _dtype(model)

    def labels(X: Any, Y: Any, name: str) -> Any:
        checked = check_labels(labels_of(X, Y, n_x, name), output, units, dtype, name.replace("X", "Y"))
        return backend.asarray(checked)

    def resident(X: Any, Y: Any, name: str) -> ResidentSet:
        return make_resident(X, Y, backend, n_x=n_x, output=output, units=units, dtype=dtype, name=name)

    X, Y, dev_X, dev_Y = dataset.train_X, dataset.train_Y, dataset.dev_X, dataset.dev_Y
    if storage.train is None:
        train_set = resident(X, Y, "X")
    else:
        assert storage.window is not None
        train_set = StreamedSet(storage.train, labels(X, Y, "X"), backend, storage.window, plan.seed, plan.shuffle)
    if dev_X is None or storage.dev is None:
        return train_set, None if dev_X is None else resident(dev_X, dev_Y, "dev_X")
    return train_set, StreamedDevSet(storage.dev, labels(dev_X, dev_Y, "dev_X"), backend)


def check_pools(train_set: ResidentSet, batch_size: int, reach: int) -> None:
    """Raises ValueError where the windows in memory are too small for what a step may read."""
    if isinstance(train_set, StreamedSet):
        rows = train_set.rows_needed(batch_size, reach)
        if rows:
            row_bytes = train_set.file.row_bytes
            least = size_text(SHARE * min(WINDOWS * rows, train_set.m) * row_bytes)
            raise ValueError(
                f"windows of {train_set.window} rows are too few for batches of {batch_size}: give a memory_limit of at"
                f" least {least}, or smaller batches"
            )


def _dtype(model: BaseRegressionModel) -> str:
    return model.dtype if isinstance(model, DeepNetwork) else str(np.dtype(common_dtype(model.save())))


def _stored_bytes(X: Any, dtype: str) -> int:
    """Bytes of a set as training keeps it: pixels as they are, other numbers in the network's dtype."""
    return int(math.prod(X.shape)) * (1 if dtype_name(X) == "uint8" else np.dtype(dtype).itemsize)


def _working_bytes(plan: Plan, model: BaseRegressionModel, dataset: DataSet) -> int:
    """Bytes of parameters, gradient, two moments and a temporary; and of a batch as floats."""
    weights = sum(x.size for x in model.save().values())
    rows = max(EVALUATION_ROWS, plan.batch_size if isinstance(plan.batch_size, int) else 0)
    return int(5 * weights + rows * dataset.train_X.shape[0]) * np.dtype(_dtype(model)).itemsize


def _free_bytes(plan: Plan, dataset: DataSet, model: BaseRegressionModel, backend: Backend) -> int:
    try:
        return max(0, backend.free_memory() - _working_bytes(plan, model, dataset))
    except OSError:  # a system that does not tell: there nothing is streamed without a memory_limit
        return 1 << 62


def _streamable(X: Any, dtype: str) -> RowFile | None:
    file = find_rows(X) if isinstance(X, np.ndarray) else None
    return file if file is not None and file.dtype in (np.dtype(np.uint8), np.dtype(dtype)) else None


def _not_streamable(names: list[str], X: Any, needed: int, room: int, dtype: str) -> str:
    takes = "take" if len(names) > 1 else "takes"
    told = f"{' and '.join(names)} {takes} {size_text(needed)} of memory, there is room for {size_text(room)}"
    if not is_mapped(X):
        return f"{told}: give rows in a .npy file, which are streamed, or memory_limit={size_text(SHARE * needed)!r}"
    return f"{told}, and a file of {X.dtype} in this layout is not streamed: write (m, n_x) rows of uint8 or {dtype}"
