"""What every figure is made of: its size, colours and line styles, labels and units, one legend, and its file.

Floor F1. Matplotlib is imported here alone, and only when a figure is made. Figures are made without pyplot: there is
no current figure, no window and no display. Colours are Okabe & Ito's, which colour-blind readers can tell apart; runs
differ in line style and marker too, so that a print in grey can be read. Legends stand beside what is drawn.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from catopt_xp.io.console import plain
from catopt_xp.io.files import write_whole

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
