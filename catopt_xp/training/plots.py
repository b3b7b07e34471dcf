"""Figures of runs, comparisons, benchmarks and optimizer paths: plain dicts in, a matplotlib figure or a file out.

matplotlib is imported here alone, and only when a figure is made. Figures are made without pyplot: there is no current
figure, no window and no display. Colours are Okabe & Ito's, which colour-blind readers can tell apart. Runs differ in
line style and marker too, so that a print in grey can be read. Legends stand beside what is drawn.
"""

from __future__ import annotations

import importlib.util
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from catopt_xp.io.console import plain
from catopt_xp.io.files import write_whole
from catopt_xp.optim.averages import moving_average
from catopt_xp.training.record import BY_EPOCH, LARGEST_RATE, LONGEST_TIME, check_history

PathLike = str | os.PathLike[str]

BLUE, ORANGE, GREEN, BLACK, GREY = "#0072B2", "#D55E00", "#009E73", "#000000", "#999999"
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", BLACK)
LINE_STYLES = ("-", "--", "-.", ":")  # 4 styles and 7 colours: 28 runs before two look alike
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
HATCHES = ("", "//", "..", "xx", "\\\\", "++")
FORMATS = ("png", "pdf", "svg")
DOTS_PER_INCH = 150
SMALL = 9  # points, of legends and labels on bars
MOST_MARKERS = 30  # of a curve, beyond which they would hide it; then they stand so far apart,
MARKERS_APART = 0.1  # in diagonals of the panel,
SHIFTS = 4  # and those of so many curves beside each other, lest one that lies on another hide it
LONGEST_LINE = 110  # characters of a figure's title
LONGEST_TITLE = 3 * LONGEST_LINE
LONGEST_NAME = 24  # characters of a run's name on an axis
LETTERS_PER_INCH, LETTERS_BESIDE = 11, 7  # in a legend, and those that a label's line takes
MOST_COLUMNS = 5  # of a legend
WIDE = 300.0  # ratio of a logarithmic axis' ends from which on there is no room for more than its powers of ten
LOG_RATIO = 20.0  # numbers of several runs that differ by more stand on a logarithmic axis
# Unit -> seconds in it, and up to how many seconds it is the one to use.
UNITS = {"ms": (1e-3, 0.1), "s": (1.0, 120.0), "min": (60.0, 7200.0), "h": (3600.0, float("inf"))}


def new_figure(width: float, height: float) -> Any:
    """An empty figure, in inches, that belongs to nobody else. Raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'a figure needs matplotlib ({error}): pip install "catopt-xp[plot]"') from error
    except ValueError as error:  # a setting that it refuses
        named = [f"{name} is {value!r}" for name, value in os.environ.items() if name.startswith(("MPL", "MATPLOTLIB"))]
        raise ImportError(f"matplotlib cannot be imported ({'; '.join([str(error), *named])})") from error
    return Figure(figsize=(width, height), layout="constrained")


def finished(figure: Any, path: PathLike | None, title: str = "") -> Any:
    """The figure with its title, its empty panels named as such, and written to `path`, if there is one.

    Raises ValueError for an ending that names no format, OSError when the file cannot be written.
    """
    if title:
        figure.suptitle(textwrap.fill(literal(title[:LONGEST_TITLE]), LONGEST_LINE))
    for axes in figure.axes:
        if not axes.has_data():
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, color="dimgrey", ha="center", va="center")
            axes.set(xticks=[], yticks=[])
    if path is not None:
        target = Path(path)
        kind = target.suffix[1:].lower() or "png"
        if kind not in FORMATS:
            raise ValueError(f"{target}: a figure is not written as {kind!r}; choose {', '.join(FORMATS)}")
        write_whole(target, lambda file: figure.savefig(file, format=kind, dpi=DOTS_PER_INCH))
    return figure


def add_legend(figure: Any) -> None:
    """One legend below all panels that have none, where it covers nothing: each label once, in the order drawn.

    It has as many columns as its longest label leaves room for; one that is longer than a line is cut at its front.
    """
    found: dict[str, Any] = {}
    for axes in (axes for axes in figure.axes if axes.get_legend() is None):
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        room = int(figure.get_figwidth() * LETTERS_PER_INCH)
        labels = [short(label, room - LETTERS_BESIDE) for label in found]
        columns = room // (max(map(len, labels)) + LETTERS_BESIDE)
        ncols = min(len(labels), columns, MOST_COLUMNS)
        figure.legend(found.values(), labels, loc="outside lower center", ncols=ncols, frameon=False)


def add_labels(axes: Any, title: str, x_label: str, y_label: str, grid: bool = True) -> None:
    """Titles of a panel and of its axes, ticks at whole epochs and steps, and a faint grid."""
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if x_label in ("epoch", "step"):
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if grid:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)


def style(number: int, points: int = 0) -> dict[str, Any]:
    """Colour, line style and marker of the run with this number; of many points, some have the marker."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINE_STYLES[number % len(LINE_STYLES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markevery": every(points, number),
        "markersize": 5,
        "linewidth": 1.6,
    }


def every(points: int, number: int = 0) -> Any:
    """Where a curve of so many points has markers, as matplotlib's `markevery` takes it; not where another has them."""
    return 1 if points <= MOST_MARKERS else (number % SHIFTS * MARKERS_APART / SHIFTS, MARKERS_APART)


def dot(values: Sequence[Any]) -> str:
    """A marker for a curve of one value, which would show nothing without."""
    return "o" if len(values) == 1 else ""


def literal(text: object) -> str:
    r"""Text of any origin as a figure shows it: without formulas between dollar signs, and without what is no letter.

    >>> print(literal("a$b$c"))
    a\$b\$c
    """
    return plain(text).replace("$", r"\$")


def short(name: str, most: int = LONGEST_NAME) -> str:
    """A name in at most so many characters, as fit beside a bar: its end, where it is too long.

    >>> short("work_dirs/photographs/adam_batch64")
    '…hotographs/adam_batch64'
    """
    return name if len(name) <= most else f"…{name[1 - most :]}"


def unit_of(seconds: float) -> tuple[str, Callable[[float], float]]:
    """The unit in which so many seconds are read best, and what turns seconds into it.

    >>> unit, convert = unit_of(600)
    >>> unit, convert(90)
    ('min', 1.5)
    """
    unit = next(unit for unit, (_, most) in UNITS.items() if seconds < most)
    return unit, lambda number: number / UNITS[unit][0]


def plain_log(axis: Any) -> None:
    """A logarithmic axis, of what is drawn already, whose ticks are ordinary numbers: 0.2, 0.5, 1, 2, 5, …"""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(base=10.0, subs=(1.0, 2.0, 5.0) if high < WIDE * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axis.set_minor_formatter(NullFormatter())


FEWEST_TO_AVERAGE = 10  # mini-batches in a moving average; an epoch's count where that is more
FEWEST_BARS = 4  # that a panel has room for, lest few bars be thick
SEEN = 0.5  # percent of a bar, above which a part of it is drawn
DARKEST = 0.45  # grey of the highest ground below optimizer paths, which must be seen on it

OUR_ENGINES = ("panels", "plain")  # in a benchmark, among other libraries


def _check_drawn(history: Mapping[str, Any], where: str) -> None:
    """`check_history`, and that times and rates are such as have an axis."""
    check_history(history, where)
    times = [*history.get("seconds", []), *history.get("timings", {}).values()]
    if not all(0 <= seconds < LONGEST_TIME for seconds in times):
        raise ValueError(f"{where}: seconds or timings hold what is no time; give a history as train wrote it")
    if any(abs(rate) > LARGEST_RATE for rate in history.get("learning_rate", [])):
        raise ValueError(f"{where}: learning_rate has a number above {LARGEST_RATE:g}, which cannot be drawn")


def plot_history(history: Mapping[str, Any], path: PathLike | None = None) -> Any:
    """Eight panels of one run: cost and accuracy by epoch and by time, learning rate, mini-batch cost, where time went.

    `history`: the fields of a `History` as a dict, or its JSON read back; lists that are empty are not drawn.
    `path`: where to save the figure, whole or not at all; its ending names the format (png, pdf, svg; png without one).

    Returns the matplotlib `Figure`. Raises ImportError without matplotlib, ValueError for a history without epochs or
    of wrong types and lengths or for an unknown ending, OSError when the file cannot be written.

    >>> run = {"epoch": [0, 1], "seconds": [0.5, 0.5], "train_loss": [0.7, 0.6], "learning_rate": [1e-3, 1e-3]}
    >>> len(plot_history(run).axes)
    8
    """
    if not history.get("epoch"):
        raise ValueError("plot_history: the history has no epochs; give that of a run that has finished at least one")
    _check_drawn(history, "plot_history")
    figure = new_figure(13.0, 10.0)
    rows = [["cost", "cost by time", "rate"], ["accuracy", "accuracy by time", "time"], ["steps", "steps", "stages"]]
    panels = figure.subplot_mosaic(rows)
    for along in ("", " by time"):
        _draw_costs(panels[f"cost{along}"], history, along)
        _draw_accuracy(panels[f"accuracy{along}"], history, along)
    _draw_rates(panels["rate"], {"": history}, lambda number, points: {"color": BLUE, "marker": dot(history["epoch"])})
    _draw_epoch_times(panels["time"], history)
    _draw_mini_batches(panels["steps"], history)
    _draw_stages(panels["stages"], history.get("timings", {}))
    add_legend(figure)
    return finished(figure, path, _run_title(history.get("run", {})))


def check_drawing(argument: str, file: Path | None) -> None:
    """Raises ValueError where a figure cannot be drawn beside `file`: nothing is saved, or matplotlib is missing."""
    if file is None:
        raise ValueError(f"{argument} draws into save_dir, which is None; give a folder")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f'{argument} needs matplotlib: pip install "catopt-xp[plot]"')


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
    figure = new_figure(9.0, 4.8)
    _draw_mini_batches(figure.subplots(), history)
    add_legend(figure)
    return finished(figure, path, _run_title(history.get("run", {})))


def plot_comparison(
    runs: Mapping[str, Mapping[str, Any]], path: PathLike | None = None, title: str = "", part: str = "train"
) -> Any:
    """Several runs on one axis: cost and accuracy by epoch and by time of training, learning rate, shares of stages.

    `runs`: name in the legend -> history, in the order drawn. `part`: "train" or "dev", the set that costs and
    accuracies are of. `title`: where none is given, what the runs have in common. An axis of times or rates is
    logarithmic when the longest is more than 20 times the shortest. `path`, returns and raises: as `plot_history`;
    ValueError too when there are no runs, one of them was never evaluated, or has no dev set where that is asked for.

    >>> run = {"epoch": [0, 1], "seconds": [1.0, 1.0], "eval_epoch": [0, 1], "full_train_loss": [0.7, 0.6]}
    >>> [axes.get_xlabel() for axes in plot_comparison({"batch 64": run}).axes]
    ['epoch', 'training time (s)', 'epoch', 'epoch', 'training time (s)', "share of the run's time (%)"]
    """
    if not runs:
        raise ValueError("plot_comparison: there are no runs; give at least one")
    if part not in PARTS:
        raise ValueError(f"plot_comparison: unknown part {part!r}; choose {', '.join(PARTS)}")
    cost, accuracy, name_of_set = PARTS[part]
    first, *others = runs.values()
    for name, history in runs.items():
        for key in (cost, "seconds"):
            if not history.get(key):
                raise ValueError(f"plot_comparison: run {name!r} has no {key}; {HINTS[key]}")
        _check_drawn(history, f"plot_comparison: run {name!r}")
    runs = {literal(name): history for name, history in runs.items()}
    figure = new_figure(13.0, 7.8)
    (*costs, rate), (*accuracies, stages) = figure.subplots(2, 3)
    for key, pair, label, scale in ((cost, costs, "Cost", 1.0), (accuracy, accuracies, "Accuracy", 100.0)):
        for axes, along in zip(pair, ("", " by time"), strict=True):
            _draw_runs(axes, runs, key, along, scale)
            unit = "cost over" if label == "Cost" else "right answers (%) of"
            x_label, what = _along(axes, list(runs.values()), along), f"{unit} the {name_of_set}"
            add_labels(axes, f"{label} by {'time' if along else 'epoch'}", x_label, what)
        pair[1].sharey(pair[0])
    _draw_rates(rate, runs, style)
    _draw_stages_of_runs(stages, runs)
    add_legend(figure)
    alike = [item for item in first.get("run", {}).items() if all(item in h.get("run", {}).items() for h in others)]
    return finished(figure, path, title or _run_title(dict(alike)))


def plot_paths(panels: Sequence[Mapping[str, Any]], path: PathLike | None = None, title: str = "") -> Any:
    """Optimizer paths over surfaces, one a panel, dark where it is high; see `experiments.optimizer_paths`.

    `panels`: dicts with "title", "x" (columns,) and "y" (rows,) of the grid, "height" (rows, columns), and "paths",
    name -> points (steps + 1, 2), the first one the start. `path`, returns and raises: as `plot_history`; ValueError
    too when there are no panels.

    >>> bowl = {"title": "bowl", "x": [-1, 0, 1], "y": [-1, 0, 1], "height": [[2, 1, 2], [1, 0, 1], [2, 1, 2]]}
    >>> plot_paths([bowl | {"paths": {"Adam": [[1, 1], [0, 0]]}}]).axes[0].get_title()
    'bowl'
    """
    if not panels:
        raise ValueError("plot_paths: there are no panels; give at least one surface")
    figure = new_figure(4.6 * len(panels), 4.9)
    names = list(dict.fromkeys(name for panel in panels for name in panel["paths"]))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        x, y, height = panel["x"], panel["y"], panel["height"]
        low, high = (extreme(map(extreme, height)) for extreme in (min, max))
        lightest = {"cmap": "Greys", "vmin": low, "vmax": low + (high - low or 1.0) / DARKEST}
        axes.pcolormesh(x, y, height, shading="gouraud", rasterized=True, **lightest)
        axes.contour(x, y, height, levels=20, colors=GREY, linewidths=0.5, linestyles="solid")
        for name, points in panel["paths"].items():
            look = style(names.index(name)) | {"markevery": max(1, (len(points) - 1) // 10)}  # close where it is slow
            axes.plot(*zip(*points, strict=True), label=name, **look)
        axes.plot(*points[0], marker="o", markersize=9, color="white", markeredgecolor="black", label="start", ls="")
        axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
        add_labels(axes, panel["title"], "x", "y", grid=False)
    add_legend(figure)
    return finished(figure, path, title)


def plot_benchmark(results: Mapping[str, Any], path: PathLike | None = None) -> Any:
    """Time per epoch against batch size, a line for each contender and one for the floor, both axes logarithmic.

    Where the results have each turn, a thin bar reaches from the shortest to the longest. `results`: what
    `catopt-xp bench` measured, or its JSON read back. `path`, returns and raises: as `plot_history`; ValueError too
    when there are no rows.

    >>> row = {"batch_size": 64, "floor_seconds": 0.2, "contenders": {"plain": {"seconds_per_epoch": 0.8}}}
    >>> axes = plot_benchmark({"rows": [row]}).axes[0]
    >>> [line.get_label() for line in axes.lines]
    ['plain (ours)', 'floor of this machine']
    """
    rows = sorted(results.get("rows", []), key=lambda row: row.get("batch_size", 0))
    if not rows:
        raise ValueError("plot_benchmark: there are no rows; give the results of a benchmark")
    missing = [key for row in rows for key in ("batch_size", "floor_seconds", "contenders") if key not in row]
    if missing:
        raise ValueError(f"plot_benchmark: a row has no {missing[0]}; give the results of catopt-xp bench")
    figure = new_figure(9.0, 5.5)
    axes = figure.subplots()
    for number, name in enumerate(dict.fromkeys(name for row in rows for name in row["contenders"])):
        points = [(row["batch_size"], row["contenders"][name]) for row in rows if name in row["contenders"]]
        medians = [timed["seconds_per_epoch"] for _, timed in points]
        label = f"{name} (ours)" if name in OUR_ENGINES else literal(name)
        axes.plot([size for size, _ in points], medians, label=label, **style(number))
        for size, timed in points:
            turns = timed.get("turns") or [timed["seconds_per_epoch"]]
            axes.vlines(size, min(turns), max(turns), color=COLOURS[number % len(COLOURS)], linewidth=1.0)
    sizes = [row["batch_size"] for row in rows]
    floor = [row["floor_seconds"] for row in rows]
    axes.plot(sizes, floor, color=GREY, lw=3.0, marker=dot(sizes), label="floor of this machine")
    axes.set(xscale="log", xlim=(sizes[0] / 1.3, sizes[-1] * 1.3))
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
    plain_log(axes.yaxis)
    by_height = sorted(axes.lines, key=lambda line: -line.get_ydata()[0])
    figure.legend(handles=by_height, loc="outside right center", fontsize=SMALL, frameon=False)
    work, machine = results.get("workload", {}), results.get("machine", {})
    threads = f"{results['threads']} threads" if "threads" in results else None
    where = ", ".join(str(part) for part in (work.get("optimizer"), machine.get("cpu"), threads) if part)
    add_labels(axes, f"Time per epoch{where and f': {literal(where)}'}", "batch size (samples)", "time per epoch (s)")
    return finished(figure, path)


# --- panels -----------------------------------------------------------------------------------------------------------

# Key, colour, line, marker and label of what one run's panels show; dev last, so that it lies on top.
COSTS = (
    ("train_loss", BLUE, "-", "", "mean of the mini-batches"),
    ("full_train_loss", GREEN, "--", "o", "training set, after the epoch"),
    ("dev_loss", ORANGE, "-.", "s", "dev set"),
)
ACCURACIES = (
    ("train_accuracy", GREEN, "--", "o", "training set, after the epoch"),
    ("dev_accuracy", ORANGE, "-.", "s", "dev set"),
)
# Part of the data -> its costs, its accuracies, its name.
PARTS = {
    "train": ("full_train_loss", "train_accuracy", "training set"),
    "dev": ("dev_loss", "dev_accuracy", "dev set"),
}
HINTS = {
    "full_train_loss": "evaluate it at least once",
    "dev_loss": "give it a dev set",
    "seconds": "give a history as train wrote it",
}


def _draw_costs(axes: Any, history: Mapping[str, Any], along: str) -> None:
    _draw_lists(axes, history, COSTS, along, 1.0)
    add_labels(axes, f"Cost by {'time' if along else 'epoch'}", _along(axes, [history], along), "cost")


def _draw_accuracy(axes: Any, history: Mapping[str, Any], along: str) -> None:
    _draw_lists(axes, history, ACCURACIES, along, 100.0)
    add_labels(axes, f"Accuracy by {'time' if along else 'epoch'}", _along(axes, [history], along), "right answers (%)")


def _draw_lists(axes: Any, history: Mapping[str, Any], lists: Any, along: str, scale: float) -> None:
    """Lists of one run, over its epochs or over the time up to their ends."""
    for key, colour, line, marker, label in lists:
        epochs = history["epoch" if key in BY_EPOCH else "eval_epoch"] if history.get(key) else []
        places = _places(history, epochs, along, unit_of(sum(history.get("seconds", [])))[1])
        if places:
            values = [scale * value for value in history[key]]
            shown = {"marker": marker or dot(values), "markevery": every(len(values)), "ms": 4}
            axes.plot(places, values, color=colour, linestyle=line, label=label, **shown)


def _draw_runs(axes: Any, runs: Mapping[str, Any], key: str, along: str, scale: float) -> None:
    """One list of several runs, each in its style."""
    convert = unit_of(max(sum(history["seconds"]) for history in runs.values()))[1]
    for number, (name, history) in enumerate(runs.items()):
        if history.get(key):
            places = _places(history, history["eval_epoch"], along, convert)
            values = [scale * value for value in history[key]]
            axes.plot(places, values, label=name, **style(number, len(values)))


def _along(axes: Any, histories: Sequence[Mapping[str, Any]], along: str) -> str:
    """What stands below a panel by epoch or by time; a wide range of times becomes logarithmic."""
    if not along:
        return "epoch"
    times = [sum(history.get("seconds", [])) for history in histories]
    if max(times) > LOG_RATIO * min(times) > 0.0:
        plain_log(axes.xaxis)
    return f"training time ({unit_of(max(times))[0]})"


def _places(history: Mapping[str, Any], epochs: Any, along: str, convert: Callable[[float], float]) -> list[float]:
    """Where epochs stand: at themselves, or at the time of training up to their end, as far as that is known."""
    if not along:
        return list(epochs)
    at = dict(zip(history["epoch"], map(convert, accumulate(history.get("seconds", []))), strict=False))
    return [at[epoch] for epoch in epochs] if at else []


def _draw_rates(axes: Any, runs: Mapping[str, Any], style_of: Callable[[int, int], dict[str, Any]]) -> None:
    """The learning rate of each epoch, from zero on, or logarithmic where rates differ much."""
    rates = [rate for history in runs.values() for rate in history.get("learning_rate", [])]
    for number, (name, history) in enumerate(runs.items()):
        if history.get("learning_rate"):
            axes.plot(history["epoch"], history["learning_rate"], label=name, **style_of(number, len(history["epoch"])))
    if rates and max(rates) > LOG_RATIO * min(rates) > 0.0:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axes.set_ylim(bottom=0.0)
    add_labels(axes, "Learning rate", "epoch", "learning rate per step")


def _draw_epoch_times(axes: Any, history: Mapping[str, Any]) -> None:
    times = history.get("seconds", [])
    unit, convert = unit_of(median(times) if times else 1.0)
    if times:
        axes.plot(history["epoch"], list(map(convert, times)), color=BLUE, marker=dot(times))
        axes.set_ylim(0.0, 1.1 * convert(max(times)) or 1.0)
    add_labels(axes, "Time per epoch, training alone", "epoch", f"time per epoch ({unit})")


def _draw_mini_batches(axes: Any, history: Mapping[str, Any]) -> None:
    losses = history.get("mini_batch_loss", [])
    steps_per_epoch = len(losses) // max(1, len(history.get("epoch", [])))
    window = max(FEWEST_TO_AVERAGE, steps_per_epoch)
    steps = range(1, len(losses) + 1)
    if losses:
        axes.plot(steps, losses, color=GREY, linewidth=0.5, marker=dot(losses), ms=3, label="every mini-batch")
        axes.plot(steps, moving_average(losses, window), color=BLACK, label=f"moving average of {window} mini-batches")
    add_labels(axes, "Cost of the mini-batches", "step", "cost")


def _draw_stages(axes: Any, timings: Mapping[str, float]) -> None:
    total = sum(timings.values())
    if total:
        stages = list(timings)[::-1]  # bars are stacked upwards; the first stage shall be on top
        seconds = [timings[stage] for stage in stages]
        bars = axes.barh([short(literal(stage)) for stage in stages], seconds, color=BLUE)
        labels = [f"{s:.{2 if s < 100.0 else 0}f} s, {s / total:.0%}" for s in seconds]
        axes.bar_label(bars, labels, padding=3, fontsize=SMALL)
        axes.set_xlim(0.0, 1.45 * max(seconds))  # room for the labels
    add_labels(axes, "Where the time went", "seconds", "", grid=False)


def _draw_stages_of_runs(axes: Any, runs: Mapping[str, Any]) -> None:
    """A bar a run, the first on top, made of the shares of its stages, and how long all of them took.

    Shares, as a run may take a hundred times as long as another; those that nobody would see are left out.
    """
    stages = dict.fromkeys(stage for history in runs.values() for stage in history.get("timings", {}))
    totals = [sum(history.get("timings", {}).values()) for history in runs.values()]
    places = [-number for number in range(len(runs))]
    left = [0.0] * len(runs)
    for number, stage in enumerate(stages):
        seconds = [history.get("timings", {}).get(stage, 0.0) for history in runs.values()]
        shares = [100.0 * spent / (total or 1.0) for spent, total in zip(seconds, totals, strict=True)]
        if max(shares) > SEEN:
            look = {"color": COLOURS[number % len(COLOURS)], "hatch": HATCHES[number % len(HATCHES)]}
            axes.barh(places, shares, left=left, label=short(literal(stage)), edgecolor="white", linewidth=0.0, **look)
        left = [before + more for before, more in zip(left, shares, strict=True)]
    if any(totals):
        for place, total in zip(places, totals, strict=True):
            unit, convert = unit_of(total)
            axes.text(102.0, place, f"{convert(total):.3g} {unit}", fontsize=SMALL, va="center")
        axes.set_yticks(places, [short(name) for name in runs], fontsize=SMALL)
        axes.set(xlim=(0.0, 128.0), xticks=range(0, 101, 25))  # room for the labels
        spare = max(0, FEWEST_BARS - len(runs)) / 2
        axes.set_ylim(0.5 - len(runs) - spare, 0.5 + spare)
        shown = len(axes.containers)
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            borderaxespad=4.5,  # below ticks and label
            ncols=shown if shown <= 4 else 3,
            handlelength=1.5,
            columnspacing=1.2,
            fontsize=SMALL,
            frameon=False,
        )
    add_labels(axes, "Where the time went", "share of the run's time (%)", "", grid=False)


def _run_title(run: Mapping[str, Any]) -> str:
    """What the run was, from what its history says of it; what is not said is left out."""
    batch = f"batch size {run['batch_size']}" if "batch_size" in run else None
    engine = f"engine {run['engine']}" if "engine" in run else None
    parts = [run.get("optimizer"), batch, run.get("data"), run.get("device"), engine]
    return ", ".join(str(part) for part in parts if part)
