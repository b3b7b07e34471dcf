"""A fixed small job, for asking where its numbers depend on the process, the machine's state or library versions.

    python tests/helpers/fixed_job.py FOLDER [CHECKPOINTS]

writes FOLDER/numbers.npz and, for each engine, FOLDER/ENGINE.npz, a checkpoint half-way through a run; with
CHECKPOINTS, another FOLDER, it goes on from those there too. It needs no more than the package does: without numba
the panel engine is left out.
"""

from __future__ import annotations

import importlib.util
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from catopt_xp.data.drawn.drawings import get_drawn_set
from catopt_xp.data.order import epoch_order, window_pools
from catopt_xp.nn.network import DeepNetwork, dropout_masks
from catopt_xp.optim.rules import OPTIMIZERS
from catopt_xp.optim.schedules import get_cosine_func
from catopt_xp.training.train import TrainResult, train

Array = np.ndarray[Any, Any]
M, N_X, EPOCHS = 40, 4100, 4
RATES = {"gd": 1e-2, "momentum": 1e-2, "rmsprop": 1e-4, "adam": 1e-4}
ENGINES = ("plain", "panels") if importlib.util.find_spec("numba") else ("plain",)


def crc(*arrays: Any) -> int:
    """Of the arrays' bytes, one after the other."""
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).tobytes(), value)
    return value


def drawn() -> dict[str, Array]:
    """What is drawn from random numbers before anything is trained."""
    found: dict[str, Array] = {}
    for dtype in ("float32", "float64"):
        for seed in (0, 1, 2**32 - 1):
            model = DeepNetwork([N_X, 30, 20, 1], ["relu", "relu", "sigmoid"], seed=seed, dtype=dtype)
            found |= {f"weights/{dtype}/{seed}/{name}": np.array(value) for name, value in model.save().items()}
    for shuffle in ("epoch", "once", "none"):
        orders = [epoch_order(m, epoch, seed, shuffle) for m in (1, 7, 2000) for epoch in (0, 3) for seed in (0, 2**64)]
        found[f"orders/{shuffle}"] = np.concatenate(orders)
    found["orders/windows"] = np.concatenate([pool.rows for pool in window_pools(1000, 70, 2, 5)])
    masked = DeepNetwork([5, 400, 1], ["relu", "sigmoid"], seed=3, dropout=0.4)
    masked.position = (2, 1)
    found["masks"] = np.array(dropout_masks(masked, 50))[0]
    return found


def pictures() -> dict[str, Array]:
    """Pixels of the drawn set's first pictures."""
    data = get_drawn_set(train_size=12, test_size=4, img_shape=(64, 48), cache=False, progress=False)
    return {"pictures/train": np.array(data.train_X.T), "pictures/dev": np.array(data.dev_X.T)}


def small_set() -> dict[str, Any]:
    """Pixels of more than one panel and labels that can be learnt."""
    X = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (M, N_X), dtype=np.uint8)
    return {"X": X.T, "Y": (X[:, :2000].mean(axis=1) > X[:, 2000:].mean(axis=1)).astype(np.int64)[None]}


def fit(**given: Any) -> dict[str, Array]:
    """Weights, moments, counters and losses after the run."""
    common: dict[str, Any] = {"batch_size": 16, "total_epoch": EPOCHS, "save_dir": None, "device": "cpu", "seed": 1}
    common |= {"verbose": False, "lr_scheduler": get_cosine_func(EPOCHS)}
    if "recover_from" not in given:
        common |= {"hidden": (8, 5), "dropout": 0.2}
    return numbers(train(**small_set(), **(common | given)))


def numbers(result: TrainResult) -> dict[str, Array]:
    found = {f"model/{name}": np.array(value) for name, value in result.model.save().items()}
    state = result.optimizer.save()
    found |= {f"optimizer/{name}": np.array(value) for name, value in state.items() if name != "name"}
    return found | {
        "losses": np.array(result.history.mini_batch_loss),
        "evaluations": np.array(result.history.full_train_loss),
    }


def trained(engine: str, optimizer: str = "adam", dtype: str = "float32", **given: Any) -> dict[str, Array]:
    """The numbers of a run, under names that say which."""
    options: dict[str, Any] = {"engine": engine, "optimizer": optimizer, "learning_rate": RATES[optimizer]} | given
    if "recover_from" not in given:
        options["dtype"] = dtype
    return {f"{engine}/{optimizer}/{dtype}/{name}": value for name, value in fit(**options).items()}


def everything(optimizers: tuple[str, ...] = tuple(OPTIMIZERS)) -> dict[str, Array]:
    """All numbers of the job by name."""
    found = drawn() | pictures()
    for engine in ENGINES:
        for optimizer in optimizers:
            found |= trained(engine, optimizer)
        found |= trained(engine, dtype="float64")
    return found


def write(folder: Path, checkpoints: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = everything()
    for engine in ENGINES:
        half = {"total_epoch": EPOCHS // 2, "save_dir": folder, "model_name": engine}
        trained(engine, **half)
        (folder / f"{engine}_latest.npz").replace(folder / f"{engine}.npz")
        where = folder if checkpoints is None else checkpoints
        # Both runs go on to the same end; a run that was to end half-way has the schedule of the whole one.
        resumed = trained(engine, recover_from=where / f"{engine}.npz")
        found |= {f"resumed/{name}": value for name, value in resumed.items()}
    with open(folder / "numbers.npz", "wb") as file:
        np.savez(file, **found)  # type: ignore[arg-type]


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
