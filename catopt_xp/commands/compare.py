"""The chapter's three comparisons (batch size, optimizers, learning-rate decay), and optimizer paths over surfaces.

A comparison is a list of `train` calls that differ in one thing and share initial weights, row orders and
data set. Each leaves `<run>.json`, its history, in one folder; what lies there finished is not trained again, and what
was interrupted goes on from its checkpoint, so a comparison can be stopped and called again at any time.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from catopt_xp.backend.xp import Backend, asnumpy, get_backend
from catopt_xp.data.dataset import DataSet
from catopt_xp.data.load import load_data
from catopt_xp.io.console import plain, warn
from catopt_xp.io.files import remove_stale
from catopt_xp.optim.rules import OPTIMIZERS, make_optimizer
from catopt_xp.optim.schedules import Scheduler, const_lr, describe, get_hyperbola_func
from catopt_xp.training.checkpoint import Checkpoint
from catopt_xp.training.history import History
from catopt_xp.training.plots import plot_comparison
from catopt_xp.training.train import train

BATCH_SIZE = 64  # of the comparisons that do not vary it
DIGEST_ROWS = 64  # samples that a set's digest looks at; at most twice as many
DECAY_RATES = (0.2, 0.005)
LABELS = {"gd": "gradient descent", "momentum": "Momentum", "rmsprop": "RMSProp", "adam": "Adam"}
TITLES = {
    "batch-size": "The batch size: gradient descent, learning rate 1e-3",
    "optimizers": "The optimizer: batch size 64",
    "decay": "Learning-rate decay: Adam, learning rate 1e-5, batch size 64",
}


@dataclass(frozen=True)
class PlannedRun:
    """One training run of a comparison; the optimizer has the chapter's learning rate for it."""

    label: str
    optimizer: str
    batch_size: int
    lr_scheduler: Scheduler = const_lr
    suffix: str = ""

    @property
    def name(self) -> str:
        """Of its files: what it is made of, so that equal runs of two comparisons share them."""
        return f"{self.optimizer}_batch{self.batch_size}{self.suffix}"


def planned_runs(kind: str, m: int, stochastic: bool = False) -> list[PlannedRun]:
    """The runs of a comparison over m samples; with `stochastic`, "batch-size" has a batch of 1 too, as the last.

    Raises ValueError for an unknown kind.

    >>> [run.name for run in planned_runs("batch-size", m=2000)]
    ['gd_batch8', 'gd_batch64', 'gd_batch128', 'gd_batch2000']
    """
    size = min(BATCH_SIZE, m)
    if kind == "batch-size":
        sizes = sorted({min(size, m) for size in (8, 64, 128, m)}) + [1] * (stochastic and m > 1)
        return [PlannedRun(f"batch {n}" + " (whole set)" * (n == m), "gd", n) for n in sizes]
    if kind == "optimizers":
        return [PlannedRun(f"{LABELS[name]} ({rate:g})", name, size) for name, (_, rate) in OPTIMIZERS.items()]
    if kind == "decay":
        decayed = [
            PlannedRun(f"decay {rate}", "adam", size, get_hyperbola_func(rate), f"_decay{rate}") for rate in DECAY_RATES
        ]
        return [PlannedRun("constant", "adam", size), *decayed]
    raise ValueError(f"unknown comparison {kind!r}; choose {', '.join(TITLES)}")


def compare(
    kind: str,
    data: Any = None,
    total_epoch: int = 100,
    save_dir: str | os.PathLike[str] = "compare",
    *,
    img_shape: tuple[int, int] | None = None,
    train_size: int | None = None,
    dev_size: int | None = None,
    on_error: str = "raise",
    device: str | Backend = "auto",
    strict_device: bool | None = None,
    engine: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    stochastic: bool = False,
    print_interval: int = 10,
    progress: bool | None = None,
    verbose: bool = True,
) -> dict[str, History]:
    """Runs one of the chapter's comparisons, or what is left of it; draws and prints the outcome.

    `kind`: "batch-size" (GradientDescent, learning rate 1e-3, at 8, 64, 128 and all m samples; with `stochastic` also
    at 1, its expected time said first), "optimizers" (GradientDescent and Momentum at 1e-3, RMSProp and Adam at 1e-5,
    batch 64) or "decay" (Adam, 1e-5, batch 64: constant, and decay rates 0.2 and 0.005). `data` and the three sizes:
    as for `train`; the set is loaded once. `save_dir`: folder of `<run>.json`, `<run>_latest.npz` and
    `<kind>.png` (drawn when matplotlib is installed; else a warning says so). The rest: as for `train`.

    Returns label -> history, in the order run. Raises ValueError when a file in `save_dir` is of a run with other
    settings or on another data set (its name in a history ends with a digest), and what `train` raises; Interrupted
    leaves a folder from which the same call goes on.

    >>> import tempfile
    >>> X = np.random.default_rng(0).integers(0, 256, (20, 12), dtype=np.uint8).T
    >>> Y = (X[:6].mean(axis=0, keepdims=True) > 128).astype(int)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     runs = compare("decay", (X, Y), total_epoch=2, save_dir=folder, verbose=False)
    >>> list(runs)
    ['constant', 'decay 0.2', 'decay 0.005']
    """
    planned_runs(kind, 1)  # an unknown kind is said before any work
    if total_epoch < 1:
        raise ValueError(f"total_epoch is {total_epoch!r}; a comparison needs a whole number of at least 1")
    if save_dir == "":
        raise ValueError("save_dir is empty; give a folder for the results")
    say = partial(print, flush=True) if verbose else _say_nothing
    backend, folder = get_backend(device, strict_device), Path(save_dir)
    say(f"comparison {kind} on {backend.device} ({backend.reason}), in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    data_set = load_data(data, img_shape, train_size, dev_size, on_error=on_error, progress=progress)
    for text in (f"the data were loaded in {sum(data_set.timings.values()):.1f} s", *map(plain, data_set.notices)):
        say(text)
    # Loading belongs to no single run. The digest is part of the name, as `train` keeps the name in every checkpoint
    # and history: without it another set of this name and shape would be given the results of this one.
    name = f"{data_set.name}, digest {data_digest(data_set)}"
    data_set = dataclasses.replace(data_set, name=name, notices=[], timings={})
    m = data_set.train_X.shape[1]
    settings = {
        "total_epoch": total_epoch,
        "print_interval": print_interval,
        "seed": seed,
        "device": backend,
        "engine": engine,
        "threads": threads,
        "progress": progress,
        "verbose": verbose,
    }
    histories: dict[str, History] = {}
    runs = planned_runs(kind, m, stochastic)
    for number, run in enumerate(runs, start=1):
        say(f"\n{kind}, run {number} of {len(runs)}: {run.label}")
        if run.batch_size == 1 and histories:
            say(_expected_time(histories, total_epoch, m))
        histories[run.label] = _read_or_train(run, folder, data_set, settings, say)
    say("\n" + final_table(histories))
    figure = folder / f"{kind}.png"
    try:
        plot_comparison({label: dataclasses.asdict(h) for label, h in histories.items()}, figure, TITLES[kind])
        say(f"figure: {figure}")
    except ImportError as error:
        warn(f"no figure was drawn: {error}")
    return histories


def _read_or_train(
    run: PlannedRun, folder: Path, data_set: DataSet, settings: Mapping[str, Any], say: Callable[[str], None]
) -> History:
    """The run's history: from its file, if it is finished; else by training, from its checkpoint, if there is one."""
    file, checkpoint = folder / f"{run.name}.json", folder / f"{run.name}_latest.npz"
    wanted = _identity(run, data_set, settings)
    remove_stale(checkpoint)  # of a finished run nothing is written any more that would do it
    if file.exists():
        history = History.from_json(file)
        _check_settings(file, history.run, wanted)
        if not (history.full_train_loss and history.train_accuracy):
            raise ValueError(f"{file} has no evaluated epoch: move it away, and the run goes on from its checkpoint")
        if len(history.epoch) == settings["total_epoch"]:
            say(f"finished already: {file}")
            return history
        if len(history.epoch) > settings["total_epoch"]:
            raise ValueError(
                f"{file} has {len(history.epoch)} epochs, {settings['total_epoch']} are asked; choose another save_dir"
            )
    if checkpoint.exists():
        _check_settings(checkpoint, Checkpoint.read(checkpoint).run_state().history.get("run", {}), wanted)
        say(f"going on from {checkpoint}")
    result = train(
        optimizer=run.optimizer,
        batch_size=run.batch_size,
        lr_scheduler=run.lr_scheduler,
        model_name=run.name,
        save_dir=folder,
        recover_from=checkpoint if checkpoint.exists() else None,
        data=data_set,
        **settings,
    )
    result.history.to_json(file)
    return result.history


def final_table(histories: Mapping[str, History]) -> str:
    """The outcome of several runs as lines of text, one a run.

    >>> run = History(epoch=[0], seconds=[2.0], full_train_loss=[0.69], train_accuracy=[0.5])
    >>> print(final_table({"batch 64": run}))
    run       epochs  seconds  first cost  last cost  accuracy  dev accuracy
    batch 64       1      2.0      0.6900     0.6900     50.0%             -
    """
    width = max(len("run"), *map(len, histories))
    lines = [f"{'run':<{width}}  epochs  seconds  first cost  last cost  accuracy  dev accuracy"]
    for label, history in histories.items():
        dev = f"{history.dev_accuracy[-1]:.1%}" if history.dev_accuracy else "-"
        first, last = history.full_train_loss[0], history.full_train_loss[-1]
        lines.append(
            f"{label:<{width}}  {len(history.epoch):>6}  {sum(history.seconds):>7.1f}"
            f"  {first:>10.4f}  {last:>9.4f}  {history.train_accuracy[-1]:>8.1%}  {dev:>12}"
        )
    return "\n".join(lines)


def data_digest(data_set: DataSet) -> str:
    """Eight hexadecimal digits that tell sets apart, from all labels and about 64 evenly spaced samples of each part.

    >>> X, Y = np.arange(6, dtype=np.uint8).reshape(2, 3), np.array([[0, 1, 1]])
    >>> data_digest(DataSet(X, Y)) == data_digest(DataSet(X.copy(order="F"), Y))
    True
    >>> data_digest(DataSet(X, Y)) == data_digest(DataSet(X, 1 - Y))
    False
    """
    digest = 0
    for X, Y in ((data_set.train_X, data_set.train_Y), (data_set.dev_X, data_set.dev_Y)):
        if X is not None:
            rows = X.T[:: max(1, X.shape[1] // DIGEST_ROWS)]  # (about 64, n_x)
            for array in (rows, Y):
                digest = zlib.crc32(np.ascontiguousarray(asnumpy(array)).tobytes(), digest)  # sync
    return f"{digest:08x}"


def _identity(run: PlannedRun, data_set: DataSet, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a history or a checkpoint that of this run, under the names that `train` keeps in `history.run`.

    The device is part of it: costs by second from two devices do not belong in one figure.
    """
    optimizer_class, learning_rate = OPTIMIZERS[run.optimizer]
    return {
        "optimizer": optimizer_class.__name__,
        "learning_rate": learning_rate,
        "lr_scheduler": describe(run.lr_scheduler),
        "batch_size": run.batch_size,
        "print_interval": settings["print_interval"],
        "seed": settings["seed"],
        "data": data_set.name,
        "m": int(data_set.train_X.shape[1]),
        "n_x": int(data_set.train_X.shape[0]),
        "device": settings["device"].device,
    }


def _check_settings(file: Path, found: Any, wanted: Mapping[str, Any]) -> None:
    """Raises ValueError naming each setting in which a file of an earlier run differs from what is asked now."""
    found = found if isinstance(found, Mapping) else {}
    options = found.get("options")  # learning rate and schedule stand among them
    said = {**found, **(options if isinstance(options, dict) else {})}
    differing = [f"{key} {said.get(key)}, not {value}" for key, value in wanted.items() if said.get(key) != value]
    if differing:
        raise ValueError(f"{file} is of a run with {'; '.join(differing)}: choose another save_dir, or move it away")


def _expected_time(histories: Mapping[str, History], total_epoch: int, m: int) -> str:
    """How long a batch size of 1 will take, from the steps of the smallest batch that was timed."""
    timed = min(histories.values(), key=lambda history: history.run["batch_size"])
    size = timed.run["batch_size"]
    seconds_per_step = statistics.median(timed.seconds) / -(-m // size)
    steps = m * total_epoch
    expected = timedelta(seconds=round(steps * seconds_per_step))  # prints as hours:minutes:seconds
    return (
        f"batch size 1 makes {steps} steps: {expected} (h:mm:ss) are expected,"
        f" at {1e3 * seconds_per_step:.2f} ms a step as with batch size {size}"
    )


def _say_nothing(text: str) -> None:
    """Stands in for `print` when nothing shall be said."""


# --- optimizer paths --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surface:
    """A function of two variables with its gradient, where paths start, and the rates that suit it.

    `height`: (x, y) -> z, elementwise; `gradient`: (x, y) -> (dz/dx, dz/dy); `learning_rates`: by optimizer, per step.
    """

    title: str
    height: Callable[[Any, Any], Any]
    gradient: Callable[[float, float], tuple[float, float]]
    start: tuple[float, float]
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    learning_rates: Mapping[str, float]


def _bump(x: Any, y: Any) -> Any:
    return np.exp(-(x * x + y * y) / 2.0)


SURFACES: Mapping[str, Surface] = {
    # Flat along the ridge y = 0, where only a tiny first y tells the two valleys apart.
    "saddle": Surface(
        "Saddle point: x²/2 - y²/2 + y⁴/4",
        lambda x, y: x**2 / 2 - y**2 / 2 + y**4 / 4,
        lambda x, y: (x, y**3 - y),
        start=(-1.6, 0.005),
        x_range=(-2.0, 1.0),
        y_range=(-0.5, 1.5),
        learning_rates={"gd": 0.1, "momentum": 0.1, "rmsprop": 0.05, "adam": 0.05},
    ),
    # Far from the middle the slope falls faster than any power: steps in proportion to it hardly move.
    "plateau": Surface(
        "Plateau: 1 - exp(-(x² + y²)/2)",
        lambda x, y: 1.0 - _bump(x, y),
        lambda x, y: (float(x * _bump(x, y)), float(y * _bump(x, y))),
        start=(-2.6, 1.8),
        x_range=(-3.2, 1.2),
        y_range=(-1.2, 2.4),
        learning_rates={"gd": 0.5, "momentum": 0.5, "rmsprop": 0.05, "adam": 0.05},
    ),
    # Twenty times as steep across as along: a rate that is safe across is slow along.
    "valley": Surface(
        "Valley: x²/20 + y²",
        lambda x, y: x**2 / 20 + y**2,
        lambda x, y: (x / 10, 2 * y),
        start=(-4.0, 1.5),
        x_range=(-4.6, 1.4),
        y_range=(-1.8, 1.9),
        learning_rates={"gd": 0.9, "momentum": 0.9, "rmsprop": 0.1, "adam": 0.1},
    ),
}


def optimizer_paths(
    surface: str,
    steps: int = 60,
    learning_rates: Mapping[str, float] | None = None,
    grid: int = 121,
) -> dict[str, Any]:
    """The path of each optimizer down a surface, in float64, and the surface itself: what `plots.plot_paths` draws.

    `surface`: saddle, plateau or valley. `learning_rates`: optimizer -> rate per step, of those to run; None takes all
    four at the surface's own rates. `grid`: points a side of the height grid.

    Returns {"title", "x" (grid,), "y" (grid,), "height" (grid, grid), "paths": name -> (steps + 1, 2)}, JSON-able.
    Raises ValueError for an unknown surface or optimizer, or a number out of range.

    >>> paths = optimizer_paths("saddle", steps=200)["paths"]
    >>> [round(abs(y), 2) for _, y in (paths["Adam"][-1], paths["RMSProp"][-1])]
    [1.0, 1.0]
    """
    if surface not in SURFACES:
        raise ValueError(f"unknown surface {surface!r}; choose {', '.join(SURFACES)}")
    if steps < 1 or grid < 2:
        raise ValueError(f"optimizer_paths: steps is {steps}, grid {grid}; give at least 1 step and a grid of 2")
    ground = SURFACES[surface]
    x, y = np.linspace(*ground.x_range, grid), np.linspace(*ground.y_range, grid)
    rates = ground.learning_rates if learning_rates is None else learning_rates
    return {
        "title": ground.title,
        "x": x.tolist(),
        "y": y.tolist(),
        "height": ground.height(x, y[:, np.newaxis]).tolist(),  # (rows of y, columns of x)
        "paths": {LABELS.get(name, name): _path(ground, name, rate, steps) for name, rate in rates.items()},
    }


def _path(ground: Surface, name: str, learning_rate: float, steps: int) -> list[list[float]]:
    point = {"W0": np.array(ground.start, dtype=np.float64)}
    optimizer = make_optimizer(name, point, learning_rate)
    path = [point["W0"].tolist()]
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.add_grad({"W0": np.array(ground.gradient(*path[-1]), dtype=np.float64)})
        optimizer.step()
        path.append(point["W0"].tolist())
    return path
