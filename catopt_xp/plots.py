"""Figures of runs, comparisons and optimizer paths: plain dicts in, a matplotlib figure or an image file out.

Floor F1. Matplotlib is imported here alone, and only when a figure is made. Figures are made without pyplot: there is
no current figure, no window and no display. Colours are Okabe & Ito's, which colour-blind readers can tell apart; runs
differ in line style and marker too, so that a print in grey can be read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from catopt_xp.averages import moving_average
from catopt_xp.files import write_whole

PathLike = str | os.PathLike[str]

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")  # 4 styles and 7 colours: 28 runs before two look alike
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
FORMATS = ("png", "pdf", "svg")
DOTS_PER_INCH = 150
SMALL = 9  # points, of legends and labels on bars
FEWEST_TO_AVERAGE = 10  # mini-batches in a moving average; an epoch's count where that is more
LOG_RATIO = 20.0  # runs whose times differ by more are drawn over a logarithmic time axis


BY_EPOCH = ("learning_rate", "seconds", "train_loss")
BY_EVALUATION = ("train_accuracy", "full_train_loss", "dev_loss", "dev_accuracy")


def check_history(history: Mapping[str, Any], where: str) -> None:
    """Raises ValueError, in one line that begins with `where`, unless a history's fields have their types and lengths.

    `history`: as for `plot_history`; what is missing is taken as empty. A list has a number for each epoch, or for each
    evaluated one, or is empty.

    >>> check_history({"epoch": [0, 1], "seconds": [0.5]}, "run.json")
    Traceback (most recent call last):
    ValueError: run.json: seconds has 1 values, epoch has 2; give a history as train wrote it
    """
    wrong = _wrong_in(history)
    if wrong is not None:
        raise ValueError(f"{where}: {wrong}; give a history as train wrote it")


def _wrong_in(history: Mapping[str, Any]) -> str | None:
    for key in ("epoch", "eval_epoch", *BY_EPOCH, *BY_EVALUATION, "mini_batch_loss"):
        kind, what = (int, "whole numbers") if key.endswith("epoch") else (int | float, "numbers")
        values = history.get(key, [])
        if not isinstance(values, list | tuple) or not all(isinstance(x, kind) for x in values):
            return f"{key} is not a list of {what}"
    for key in ("timings", "run"):
        if not isinstance(history.get(key, {}), Mapping):
            return f"{key} is no table of names and values"
    if not all(isinstance(seconds, int | float) for seconds in history.get("timings", {}).values()):
        return "timings holds more than numbers"
    for along, keys in (("epoch", BY_EPOCH), ("eval_epoch", BY_EVALUATION)):
        wanted = len(history.get(along, []))
        for key in keys:
            if len(history.get(key, [])) not in (0, wanted):
                return f"{key} has {len(history[key])} values, {along} has {wanted}"
    foreign = set(history.get("eval_epoch", [])) - set(history.get("epoch", []))
    return f"eval_epoch has {min(foreign)}, epoch has not" if foreign else None


def plot_history(history: Mapping[str, Any], path: PathLike | None = None) -> Any:
    """Six panels of one run: cost by epoch and by second, accuracy, mini-batch cost, learning rate, time by stage.

    `history`: the fields of a `History` as a dict, or its JSON read back; lists that are empty are not drawn.
    `path`: where to save the figure, whole or not at all; its ending names the format (png, pdf, svg; png without one).

    Returns the matplotlib `Figure`. Raises ImportError without matplotlib, ValueError for a history without epochs or
    of wrong types and lengths or for an unknown ending, OSError when the file cannot be written.

    >>> run = {"epoch": [0, 1], "seconds": [0.5, 0.5], "train_loss": [0.7, 0.6], "learning_rate": [1e-3, 1e-3]}
    >>> len(plot_history(run).axes)
    6
    """
    if not history.get("epoch"):
        raise ValueError("plot_history: the history has no epochs; give that of a run that has finished at least one")
    check_history(history, "plot_history")
    figure = _new_figure(13.0, 7.2)
    (by_epoch, by_second, accuracy), (mini_batch, rate, stages) = figure.subplots(2, 3)
    _draw_costs(by_epoch, history, lambda epochs: epochs)
    _label(by_epoch, "Cost by epoch", "epoch", "cost")
    at = _seconds_at(history)
    if at:
        _draw_costs(by_second, history, lambda epochs: [at[e] for e in epochs])
    _label(by_second, "Cost by time", "training time (s)", "cost")
    _draw_accuracy(accuracy, history)
    _draw_mini_batches(mini_batch, history)
    if history.get("learning_rate"):
        rate.plot(history["epoch"], history["learning_rate"], color=BLUE, marker=_dot(history["epoch"]))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    rate.set_ylim(bottom=0.0)
    _label(rate, "Learning rate", "epoch", "learning rate per step")
    _draw_stages(stages, history.get("timings", {}))
    title = _run_title(history.get("run", {}))
    if title:
        figure.suptitle(title)
    return _saved(figure, path)


def plot_mini_batch(history: Mapping[str, Any], path: PathLike | None = None) -> Any:
    """The cost of every mini-batch, and its moving average over an epoch (over 10 mini-batches where that is more).

    `history`, `path`, returns and raises: as `plot_history`; ValueError too when there are no mini-batch costs.

    >>> plot_mini_batch({"epoch": [0], "mini_batch_loss": [0.7, 0.8, 0.6]}).axes[0].get_xlabel()
    'step'
    """
    if not history.get("mini_batch_loss"):
        raise ValueError(
            "plot_mini_batch: the history has no mini_batch_loss; give that of a run with at least one step"
        )
    check_history(history, "plot_mini_batch")
    figure = _new_figure(9.0, 4.5)
    _draw_mini_batches(figure.subplots(), history)
    return _saved(figure, path)


def plot_comparison(runs: Mapping[str, Mapping[str, Any]], path: PathLike | None = None, title: str = "") -> Any:
    """Cost over the training set of several runs, by epoch (left) and by second of training (right).

    `runs`: name in the legend -> history, in the order drawn. The time axis is logarithmic when the longest run took
    more than 20 times as long as the shortest. `path`, returns and raises: as `plot_history`; ValueError too when there
    are no runs, or one of them was never evaluated.

    >>> run = {"epoch": [0, 1], "seconds": [1.0, 1.0], "eval_epoch": [0, 1], "full_train_loss": [0.7, 0.6]}
    >>> [axes.get_xlabel() for axes in plot_comparison({"batch 64": run}).axes]
    ['epoch', 'training time (s)']
    """
    if not runs:
        raise ValueError("plot_comparison: there are no runs; give at least one")
    for name, history in runs.items():
        if not history.get("full_train_loss"):
            raise ValueError(f"plot_comparison: run {name!r} has no full_train_loss; evaluate it at least once")
        if not history.get("seconds"):
            raise ValueError(f"plot_comparison: run {name!r} has no seconds; give a history as train wrote it")
        check_history(history, f"plot_comparison: run {name!r}")
    figure = _new_figure(11.0, 5.0)
    by_epoch, by_second = figure.subplots(1, 2, sharey=True)
    times = []
    for number, (name, history) in enumerate(runs.items()):
        style = _style(number)
        by_epoch.plot(history["eval_epoch"], history["full_train_loss"], label=name, **style)
        at = _seconds_at(history)
        by_second.plot([at[e] for e in history["eval_epoch"]], history["full_train_loss"], **style)
        times.append(sum(history["seconds"]))
    _label(by_epoch, "Cost by epoch", "epoch", "cost over the training set")
    by_second.tick_params(labelleft=True)
    _label(by_second, "Cost by time", "training time (s)", "cost over the training set")
    if max(times) > LOG_RATIO * min(times) > 0.0:
        by_second.set_xscale("log")
    if title:
        figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=min(len(runs), 5), frameon=False)
    return _saved(figure, path)


def plot_paths(panels: Sequence[Mapping[str, Any]], path: PathLike | None = None, title: str = "") -> Any:
    """Optimizer paths over contour lines, one panel a surface; see `experiments.optimizer_paths`.

    `panels`: dicts with "title", "x" (columns,) and "y" (rows,) of the grid, "height" (rows, columns), and "paths",
    name -> points (steps + 1, 2), the first one the start. `path`, returns and raises: as `plot_history`; ValueError
    too when there are no panels.

    >>> bowl = {"title": "bowl", "x": [-1, 0, 1], "y": [-1, 0, 1], "height": [[2, 1, 2], [1, 0, 1], [2, 1, 2]]}
    >>> plot_paths([bowl | {"paths": {"Adam": [[1, 1], [0, 0]]}}]).axes[0].get_title()
    'bowl'
    """
    if not panels:
        raise ValueError("plot_paths: there are no panels; give at least one surface")
    figure = _new_figure(4.6 * len(panels), 4.8)
    names = list(dict.fromkeys(name for panel in panels for name in panel["paths"]))
    handles: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.contourf(panel["x"], panel["y"], panel["height"], levels=24, cmap="Greys", alpha=0.55)
        axes.contour(
            panel["x"], panel["y"], panel["height"], levels=24, colors=GREY, linewidths=0.4, linestyles="solid"
        )
        for name, points in panel["paths"].items():
            x, y = zip(*points, strict=True)
            style = _style(names.index(name))
            handles[name] = axes.plot(x, y, markevery=max(1, len(x) // 10), **style)[0]
        axes.plot(*points[0], marker="o", markersize=9, color="white", markeredgecolor="black")
        axes.set_xlim(panel["x"][0], panel["x"][-1])
        axes.set_ylim(panel["y"][0], panel["y"][-1])
        _label(axes, panel["title"], "x", "y", grid=False)
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=len(names), frameon=False)
    if title:
        figure.suptitle(title)
    return _saved(figure, path)


def plot_benchmark(results: Mapping[str, Any], path: PathLike | None = None) -> Any:
    """Seconds per epoch against batch size, a line for each contender and one for the floor, both axes logarithmic.

    `results`: what `catopt-xp bench` measured, or its JSON read back. `path`, returns and raises: as `plot_history`;
    ValueError too when there are no rows.

    >>> row = {"batch_size": 64, "floor_seconds": 0.2, "contenders": {"plain": {"seconds_per_epoch": 0.8}}}
    >>> axes = plot_benchmark({"rows": [row]}).axes[0]
    >>> [line.get_label() for line in axes.lines]
    ['plain', 'floor']
    """
    rows = sorted(results.get("rows", []), key=lambda row: row["batch_size"])
    if not rows:
        raise ValueError("plot_benchmark: there are no rows; give the results of a benchmark")
    figure = _new_figure(8.0, 5.5)
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(name for row in rows for name in row["contenders"])):
        points = [(row["batch_size"], row["contenders"][name]) for row in rows if name in row["contenders"]]
        axes.plot(
            *zip(*((n, timed["seconds_per_epoch"]) for n, timed in points), strict=True), label=name, **_style(number)
        )
    sizes = [row["batch_size"] for row in rows]
    floors = [row["floor_seconds"] for row in rows]
    axes.plot(sizes, floors, color=GREY, linewidth=3.0, marker=_dot(sizes), label="floor")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
    axes.legend(fontsize=SMALL)
    work, machine = results.get("workload", {}), results.get("machine", {})
    parts = [
        work.get("optimizer"),
        machine.get("cpu"),
        f"{results['threads']} threads" if "threads" in results else None,
    ]
    _label(axes, ", ".join(str(part) for part in parts if part), "batch size", "seconds per epoch")
    return _saved(figure, path)


# --- panels -----------------------------------------------------------------------------------------------------------


def _draw_costs(axes: Any, history: Mapping[str, Any], place: Any) -> None:
    """The three costs over `place(epochs)`; dev last, so that it lies on top."""
    epochs, evaluated = history["epoch"], history.get("eval_epoch", [])
    if history.get("train_loss"):
        losses = history["train_loss"]
        axes.plot(place(epochs), losses, color=BLUE, marker=_dot(epochs), label="mean of the mini-batches")
    for key, colour, line, marker, label in (
        ("full_train_loss", GREEN, "--", "o", "training set, after the epoch"),
        ("dev_loss", ORANGE, "-.", "s", "dev set"),
    ):
        if history.get(key):
            axes.plot(place(evaluated), history[key], color=colour, linestyle=line, marker=marker, ms=4, label=label)
    if axes.lines:
        axes.legend(fontsize=SMALL)


def _draw_accuracy(axes: Any, history: Mapping[str, Any]) -> None:
    for key, colour, line, marker, label in (
        ("train_accuracy", GREEN, "--", "o", "training set"),
        ("dev_accuracy", ORANGE, "-.", "s", "dev set"),
    ):
        if history.get(key):
            percent = [100.0 * share for share in history[key]]
            axes.plot(history["eval_epoch"], percent, color=colour, linestyle=line, marker=marker, ms=4, label=label)
    if axes.lines:
        axes.legend(fontsize=SMALL)
    _label(axes, "Accuracy", "epoch", "right answers (%)")


def _draw_mini_batches(axes: Any, history: Mapping[str, Any]) -> None:
    losses = history.get("mini_batch_loss", [])
    steps_per_epoch = len(losses) // max(1, len(history.get("epoch", [])))
    window = max(FEWEST_TO_AVERAGE, steps_per_epoch)
    steps = range(1, len(losses) + 1)
    if losses:
        axes.plot(steps, losses, color=GREY, linewidth=0.5, marker=_dot(losses), ms=3, label="every mini-batch")
        axes.plot(steps, moving_average(losses, window), color=BLUE, label=f"moving average of {window}")
        axes.legend(fontsize=SMALL)
    _label(axes, "Cost of the mini-batches", "step", "cost")


def _draw_stages(axes: Any, timings: Mapping[str, float]) -> None:
    total = sum(timings.values()) or 1.0
    stages = list(timings)[::-1]  # bars are stacked upwards; the first stage shall be on top
    seconds = [timings[stage] for stage in stages]
    bars = axes.barh(stages, seconds, color=BLUE)
    axes.bar_label(bars, [f"{s:.2f} s, {s / total:.0%}" for s in seconds], padding=3, fontsize=SMALL)
    axes.set_xlim(0.0, 1.45 * max(seconds, default=1.0) or 1.0)  # room for the labels
    _label(axes, "Where the time went", "seconds", "", grid=False)


# --- parts ------------------------------------------------------------------------------------------------------------


def _new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches, that belongs to nobody else."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'a figure needs matplotlib ({error}): pip install "catopt-xp[plot]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def _saved(figure: Any, path: PathLike | None) -> Any:
    if path is not None:
        target = Path(path)
        kind = target.suffix[1:].lower() or "png"
        if kind not in FORMATS:
            raise ValueError(f"{target}: a figure is not written as {kind!r}; choose {', '.join(FORMATS)}")
        write_whole(target, lambda file: figure.savefig(file, format=kind, dpi=DOTS_PER_INCH))
    return figure


def _label(axes: Any, title: str, x_label: str, y_label: str, grid: bool = True) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if x_label in ("epoch", "step"):
        axes.xaxis.get_major_locator().set_params(integer=True)
    if grid:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)


def _style(number: int) -> dict[str, Any]:
    """Colour, line style and marker of the run with this number."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINE_STYLES[number % len(LINE_STYLES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 5,
        "linewidth": 1.6,
    }


def _dot(values: Sequence[Any]) -> str:
    """A marker for a curve of one value, which would show nothing without."""
    return "o" if len(values) == 1 else ""


def _seconds_at(history: Mapping[str, Any]) -> dict[int, float]:
    """Epoch -> seconds of training up to its end; empty where they were not recorded."""
    return dict(zip(history["epoch"], accumulate(history.get("seconds", [])), strict=False))


def _run_title(run: Mapping[str, Any]) -> str:
    """What the run was, from what its history says of it; what is not said is left out."""
    batch = f"batch size {run['batch_size']}" if "batch_size" in run else None
    parts = [run.get("optimizer"), batch, run.get("data"), run.get("device")]
    return ", ".join(str(part) for part in parts if part)
