"""Learning-rate schedules: functions ``(learning_rate_zero, epoch) -> rate``, in plain Python floats.

``learning_rate_zero`` is the rate that the optimizer was given; ``epoch`` counts from 0 and may be fractional
(a schedule followed by step is asked for epoch 3.5 in the middle of epoch 3). Every schedule here is a small
frozen dataclass: it can be called, pickled, compared, and printed, and a checkpoint stores that print
(`describe`) so that a resumed run can notice another schedule.

The rates are finite and not negative. An epoch that is negative or not finite is a ValueError.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Scheduler: TypeAlias = Callable[[float, float], float]


def const_lr(learning_rate_zero: float, epoch: float) -> float:
    """Return the constant learning rate: ``lr = lr0``.

    Args:
        learning_rate_zero: the optimizer's own rate, per step.
        epoch: not looked at.

    Example:
        >>> const_lr(0.001, 70)
        0.001
    """
    return float(learning_rate_zero)


@dataclass(frozen=True)
class Hyperbola:
    """``lr0 / (1 + decay_rate * epoch)``; see `get_hyperbola_func`."""

    decay_rate: float

    def __post_init__(self) -> None:
        _keep_number(self, "decay_rate", 0.0)

    def __call__(self, learning_rate_zero: float, epoch: float) -> float:
        return float(learning_rate_zero) / (1.0 + self.decay_rate * _checked_epoch(epoch))


@dataclass(frozen=True)
class Exponential:
    """``lr0 * base**epoch``; see `get_exponential_func`."""

    base: float

    def __post_init__(self) -> None:
        _keep_number(self, "base", 0.0, 1.0, above=True)

    def __call__(self, learning_rate_zero: float, epoch: float) -> float:
        power: float = self.base ** _checked_epoch(epoch)
        return float(learning_rate_zero) * power


@dataclass(frozen=True)
class InverseSquareRoot:
    """``k * lr0 / sqrt(max(epoch, 1))``; see `get_sqrt_func`."""

    k: float

    def __post_init__(self) -> None:
        _keep_number(self, "k", 0.0, above=True)

    def __call__(self, learning_rate_zero: float, epoch: float) -> float:
        return self.k * float(learning_rate_zero) / math.sqrt(max(_checked_epoch(epoch), 1.0))


@dataclass(frozen=True)
class Staircase:
    """``lr0 * factor**floor(epoch / every)``; see `get_staircase_func`."""

    factor: float
    every: float

    def __post_init__(self) -> None:
        _keep_number(self, "factor", 0.0, 1.0, above=True)
        _keep_number(self, "every", 0.0, above=True)

    def __call__(self, learning_rate_zero: float, epoch: float) -> float:
        stairs = min(_checked_epoch(epoch) / self.every, sys.float_info.max)  # infinite where stairs are very short
        return float(learning_rate_zero) * self.factor ** math.floor(stairs)


@dataclass(frozen=True)
class Table:
    """The rate of the last entry reached, before the first one ``lr0``; see `get_table_func`."""

    entries: tuple[tuple[float, float], ...]  # (epoch, learning rate), sorted by epoch

    def __post_init__(self) -> None:
        pairs = [
            (_number("Table", "an epoch", epoch, 0.0), _number("Table", "a learning rate", rate, 0.0))
            for epoch, rate in self.entries
        ]
        if not pairs:
            raise ValueError("Table: no entries; give at least one epoch with its learning rate")
        if len({epoch for epoch, _ in pairs}) < len(pairs):
            raise ValueError("Table: an epoch is given twice; give every epoch one learning rate")
        object.__setattr__(self, "entries", tuple(sorted(pairs)))  # the dataclass is frozen

    def __call__(self, learning_rate_zero: float, epoch: float) -> float:
        reached = bisect_right(self.entries, _checked_epoch(epoch), key=lambda entry: entry[0])
        return self.entries[reached - 1][1] if reached else float(learning_rate_zero)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine wave from ``lr0`` down to ``final * lr0``; see `get_cosine_func`."""

    total_epoch: float
    final: float = 0.0

    def __post_init__(self) -> None:
        _keep_number(self, "total_epoch", 0.0, above=True)
        _keep_number(self, "final", 0.0, 1.0)

    def __call__(self, learning_rate_zero: float, epoch: float) -> float:
        progress = min(_checked_epoch(epoch) / self.total_epoch, 1.0)
        wave = 0.5 * (1.0 + math.cos(math.pi * progress))  # 1 at the start, exactly 0 at the end
        return float(learning_rate_zero) * (self.final + (1.0 - self.final) * wave)


@dataclass(frozen=True)
class WarmUp:
    """A linear climb to the first rate of another schedule, then that schedule; see `with_warmup`."""

    scheduler: Scheduler
    warmup_epoch: float
    start: float = 0.0

    def __post_init__(self) -> None:
        if not callable(self.scheduler):
            raise TypeError(f"WarmUp: scheduler must be callable as scheduler(lr0, epoch), not {self.scheduler!r}")
        _keep_number(self, "warmup_epoch", 0.0, above=True)
        _keep_number(self, "start", 0.0, 1.0)

    def __call__(self, learning_rate_zero: float, epoch: float) -> float:
        now = _checked_epoch(epoch)
        if now >= self.warmup_epoch:
            return self.scheduler(learning_rate_zero, now - self.warmup_epoch)
        share = self.start + (1.0 - self.start) * (now / self.warmup_epoch)
        return self.scheduler(learning_rate_zero, 0.0) * share

    def __repr__(self) -> str:
        # The generated one would print a plain function with its address, which no other process shares.
        inner = describe(self.scheduler)
        return f"WarmUp(scheduler={inner}, warmup_epoch={self.warmup_epoch!r}, start={self.start!r})"


def get_hyperbola_func(decay_rate: float) -> Hyperbola:
    """Return the hyperbolic (inverse time) decay ``lr = lr0 / (1 + decay_rate * epoch)``.

    Args:
        decay_rate: per epoch, finite and >= 0, else ValueError; at epoch ``1 / decay_rate`` the rate is half.

    Example:
        >>> get_hyperbola_func(0.2)
        Hyperbola(decay_rate=0.2)
        >>> get_hyperbola_func(0.2)(1e-3, 5)
        0.0005
    """
    return Hyperbola(decay_rate)


def get_exponential_func(base: float) -> Exponential:
    """Return the exponential decay ``lr = lr0 * base**epoch``.

    Args:
        base: the factor per epoch, in (0, 1], else ValueError.

    Example:
        >>> get_exponential_func(0.5)(0.8, 3)
        0.1
    """
    return Exponential(base)


def get_sqrt_func(k: float) -> InverseSquareRoot:
    """Return the inverse square root decay ``lr = k * lr0 / sqrt(max(epoch, 1))``.

    Args:
        k: a factor without unit, finite and > 0, else ValueError. The rate is ``k * lr0`` up to epoch 1.

    Example:
        >>> get_sqrt_func(1)(0.1, 4)
        0.05
    """
    return InverseSquareRoot(k)


def get_staircase_func(factor: float, every: float) -> Staircase:
    """Return the discrete staircase ``lr = lr0 * factor**floor(epoch / every)``.

    Args:
        factor: what the rate is multiplied by at each stair, in (0, 1], else ValueError.
        every: the length of a stair in epochs, finite and > 0, else ValueError.

    Example:
        >>> [get_staircase_func(0.5, 10)(0.8, epoch) for epoch in (0, 9.9, 10, 25)]
        [0.8, 0.8, 0.4, 0.2]
    """
    return Staircase(factor, every)


def get_table_func(table: Mapping[float, float]) -> Table:
    """Return a schedule set by hand: the learning rate of the largest epoch in the table that is <= now.

    Args:
        table: epoch -> learning rate, an absolute rate and not a factor; before its first epoch the rate is
            ``lr0``. ValueError if it is empty, or a number in it is negative or not finite.

    Example:
        >>> by_hand = get_table_func({10: 1e-4, 50: 1e-5})
        >>> [by_hand(1e-3, epoch) for epoch in (0, 10, 49.5, 80)]
        [0.001, 0.0001, 0.0001, 1e-05]
    """
    return Table(tuple(table.items()))


def get_cosine_func(total_epoch: float, final: float = 0.0) -> Cosine:
    """Return the cosine decay from ``lr0`` to ``final * lr0`` at ``total_epoch``, constant from there.

    ``lr = lr0 * (final + (1 - final) * (1 + cos(pi * epoch / total_epoch)) / 2)``
    (Loshchilov & Hutter, 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts"; here without restart).

    Args:
        total_epoch: when the decay ends, in epochs, finite and > 0, else ValueError.
        final: the last rate as a share of ``lr0``, in [0, 1], else ValueError.

    Example:
        >>> [round(get_cosine_func(100)(0.1, epoch), 6) for epoch in (0, 50, 100, 200)]
        [0.1, 0.05, 0.0, 0.0]
    """
    return Cosine(total_epoch, final)


def with_warmup(scheduler: Scheduler, warmup_epoch: float, start: float = 0.0) -> WarmUp:
    """Return a schedule behind a linear warm-up (Goyal et al., 2017, "Accurate, Large Minibatch SGD").

    ``epoch < warmup_epoch``:  ``lr = (start + (1 - start) * epoch / warmup_epoch) * scheduler(lr0, 0)``
    ``epoch >= warmup_epoch``: ``lr = scheduler(lr0, epoch - warmup_epoch)``

    The inner schedule sees epoch 0 during the whole warm-up and starts counting after it: its epoch 0 is the
    run's epoch ``warmup_epoch``. A cosine that shall end with a run of 100 epochs after a warm-up of 5 is
    ``get_cosine_func(95)``.

    With ``start=0`` the rate at epoch 0 is zero. Followed by step that is one step; followed by epoch it is a
    whole epoch in which nothing is learned, so give a ``start`` such as ``1 / warmup_epoch`` there.

    Args:
        scheduler: any schedule ``(lr0, epoch) -> lr``; TypeError if it cannot be called.
        warmup_epoch: the length of the climb in epochs, finite and > 0, else ValueError.
        start: the first rate as a share of the inner schedule's first one, in [0, 1], else ValueError.

    Example:
        >>> warm = with_warmup(get_staircase_func(0.5, 10), 4)
        >>> [warm(0.8, epoch) for epoch in (0, 1, 4, 13, 14)]
        [0.0, 0.2, 0.8, 0.8, 0.4]
    """
    return WarmUp(scheduler, warmup_epoch, start)


def describe(scheduler: Scheduler) -> str:
    """Describe a schedule in a text that is the same in every process.

    Args:
        scheduler: any schedule.

    Returns:
        The repr of ours (and of any dataclass); ``module.name`` of a function; ``module.Class`` of another
        callable object. What a function of one's own has closed over is not seen: ``f(0.1)`` and ``f(0.2)``
        made by one factory look alike.

    Example:
        >>> describe(get_hyperbola_func(0.005))
        'Hyperbola(decay_rate=0.005)'
        >>> describe(math.fsum)
        'math.fsum'
    """
    if dataclasses.is_dataclass(scheduler):
        return repr(scheduler)
    named = scheduler if hasattr(scheduler, "__qualname__") else type(scheduler)
    return f"{named.__module__}.{named.__qualname__}"


def restore(description: str) -> Scheduler:
    """The schedule that `describe` described, for a run that goes on from a checkpoint.

    Raises:
        ValueError: the text is not of a schedule of this module: one's own function has to be given again.

    Example:
        >>> restore("WarmUp(scheduler=Hyperbola(decay_rate=0.2), warmup_epoch=5.0, start=0.0)")(1e-3, 10)
        0.0005
    """
    try:
        schedule: Scheduler = _rebuilt(ast.parse(description, mode="eval").body)
        if callable(schedule):
            return schedule
        raise ValueError("a value, and no schedule")
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:  # the parser's stack too
        told = description if isinstance(description, str) and description.isprintable() else ascii(description)
        raise ValueError(f"the schedule {told} is none of the library's; pass lr_scheduler again") from error


def _rebuilt(node: ast.expr) -> Any:
    """A schedule or a plain value from its source: our own classes by name, literals, and nothing else."""
    if ast.unparse(node) in (describe(const_lr), "const_lr"):
        return const_lr
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    ours = (Hyperbola, Exponential, InverseSquareRoot, Staircase, Table, Cosine, WarmUp)
    kind = {kind.__name__: kind for kind in ours}.get(ast.unparse(node.func))
    if kind is None:
        raise ValueError(f"{ast.unparse(node.func)} is not a schedule")
    return kind(**{keyword.arg: _rebuilt(keyword.value) for keyword in node.keywords if keyword.arg})


def parse(text: str) -> Scheduler:
    """Read a schedule from the text that the command line takes.

    Args:
        text: one of ``const``, ``hyperbola:0.2``, ``exponential:0.95``,
            ``sqrt:1``, ``staircase:0.5,10``, ``table:0=1e-3,50=1e-4``, ``cosine:100`` or ``cosine:100,0.1``;
            before any of them ``warmup:5+`` or ``warmup:5,0.2+`` (epochs, first share).

    Returns:
        The schedule.

    Raises:
        ValueError: an unknown name, a wrong count of numbers, or a number out of range; in one line.

    Example:
        >>> parse("warmup:5+cosine:100")
        WarmUp(scheduler=Cosine(total_epoch=100.0, final=0.0), warmup_epoch=5.0, start=0.0)
    """
    # A name follows the plus sign of a warm-up, a digit the plus sign of a number such as 1e+3.
    first, *after_warmup = re.split(r"\+(?=\s*[a-z])", text.strip(), maxsplit=1)
    name, _, arguments = first.strip().partition(":")
    if after_warmup and name != "warmup":
        raise ValueError(f"schedule {text!r}: only a warm-up can stand before a plus sign; {_CHOICES}")
    inner = parse(after_warmup[0]) if after_warmup else const_lr
    try:
        if name == "warmup":
            return WarmUp(inner, *_numbers(arguments, 1, 2))
        if name == "const":
            _numbers(arguments, 0, 0)
            return const_lr
        if name == "table":
            return Table(tuple(_pair(entry) for entry in arguments.split(",")))
        if name in _FACTORIES:
            factory, fewest, most = _FACTORIES[name]
            return factory(*_numbers(arguments, fewest, most))
    except ValueError as error:
        raise ValueError(f"schedule {text!r}: {error}; {_CHOICES}") from None
    raise ValueError(f"schedule {text!r}: unknown name {name!r}; {_CHOICES}")


# name -> class, fewest and most numbers
_FACTORIES: Mapping[str, tuple[Callable[..., Scheduler], int, int]] = {
    "hyperbola": (Hyperbola, 1, 1),
    "exponential": (Exponential, 1, 1),
    "sqrt": (InverseSquareRoot, 1, 1),
    "staircase": (Staircase, 2, 2),
    "cosine": (Cosine, 1, 2),
}
_CHOICES = (
    "choose const, hyperbola:RATE, exponential:BASE, sqrt:K, staircase:FACTOR,EVERY, "
    "table:EPOCH=LR[,EPOCH=LR...], cosine:EPOCHS[,FINAL], or warmup:EPOCHS[,START]+ before one of them"
)


def _numbers(arguments: str, fewest: int, most: int) -> list[float]:
    fields = arguments.split(",") if arguments else []
    if not fewest <= len(fields) <= most:
        wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
        raise ValueError(f"the count of numbers must be {wanted}, not {len(fields)}")
    return [_read(field) for field in fields]


def _pair(entry: str) -> tuple[float, float]:
    epoch, equals, rate = entry.partition("=")
    if not equals:
        raise ValueError(f"{entry!r} is not EPOCH=LR")
    return _read(epoch), _read(rate)


def _read(field: str) -> float:
    try:
        return float(field)
    except ValueError:
        raise ValueError(f"{field!r} is not a number") from None


def _number(owner: str, name: str, value: float, low: float, high: float = math.inf, above: bool = False) -> float:
    """Return ``value`` as a Python float if it is finite and in [low, high] or, ``above``, (low, high]."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{owner}: {name} must be a number, not {value!r}") from None
    if math.isfinite(number) and low <= number <= high and not (above and number == low):
        return number
    interval = f"{'(' if above else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
    raise ValueError(f"{owner}: {name} must be finite and in {interval}, not {number!r}")


def _keep_number(schedule: object, name: str, low: float, high: float = math.inf, above: bool = False) -> None:
    """Check a field of a schedule being made, and keep it as a float: 1 and numpy.float64(1) print as 1.0."""
    number = _number(type(schedule).__name__, name, getattr(schedule, name), low, high, above)
    object.__setattr__(schedule, name, number)  # the dataclass is frozen


def _checked_epoch(epoch: float) -> float:
    if not 0.0 <= epoch < math.inf:
        raise ValueError(f"epoch must be finite and not negative, not {epoch!r}")
    return float(epoch)
