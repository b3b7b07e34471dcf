"""Learning-rate schedules: functions ``(learning_rate_zero, epoch) -> rate``, in plain Python floats.

``learning_rate_zero`` is the rate that the optimizer was given; ``epoch`` counts from 0 and may be fractional
(a schedule followed by step is asked for epoch 3.5 in the middle of epoch 3). Every schedule here is a small
frozen dataclass: it can be called, pickled, compared, and printed. A checkpoint stores that print (`describe`),
and `parse` reads it, from a checkpoint or from the command line.

The rates are finite and not negative. An epoch that is negative or not finite is a ValueError.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
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
    """The hyperbolic (inverse time) decay ``lr = lr0 / (1 + decay_rate * epoch)``.

    Args:
        decay_rate: per epoch, finite and >= 0, else ValueError; at epoch ``1 / decay_rate`` the rate is half.

    Example:
        >>> get_hyperbola_func(0.2)
        Hyperbola(decay_rate=0.2)
        >>> get_hyperbola_func(0.2)(1e-3, 5)
        0.0005
    """

    decay_rate: float

    def __post_init__(self) -> None:
        _keep_number(self, "decay_rate", 0.0)

    def __call__(self, learning_rate_zero: float, epoch: float) -> float:
        return float(learning_rate_zero) / (1.0 + self.decay_rate * _checked_epoch(epoch))


@dataclass(frozen=True)
class Exponential:
    """The exponential decay ``lr = lr0 * base**epoch``.

    Args:
        base: the factor per epoch, in (0, 1], else ValueError.

    Example:
        >>> get_exponential_func(0.5)(0.8, 3)
        0.1
    """

    base: float

    def __post_init__(self) -> None:
        _keep_number(self, "base", 0.0, 1.0, above=True)

    def __call__(self, learning_rate_zero: float, epoch: float) -> float:
        power: float = self.base ** _checked_epoch(epoch)
        return float(learning_rate_zero) * power


@dataclass(frozen=True)
class InverseSquareRoot:
    """The inverse square root decay ``lr = k * lr0 / sqrt(max(epoch, 1))``.

    Args:
        k: a factor without unit, finite and > 0, else ValueError. The rate is ``k * lr0`` up to epoch 1.

    Example:
        >>> get_sqrt_func(1)(0.1, 4)
        0.05
    """

    k: float

    def __post_init__(self) -> None:
        _keep_number(self, "k", 0.0, above=True)

    def __call__(self, learning_rate_zero: float, epoch: float) -> float:
        return self.k * float(learning_rate_zero) / math.sqrt(max(_checked_epoch(epoch), 1.0))


@dataclass(frozen=True)
class Staircase:
    """The discrete staircase ``lr = lr0 * factor**floor(epoch / every)``.

    Args:
        factor: what the rate is multiplied by at each stair, in (0, 1], else ValueError.
        every: the length of a stair in epochs, finite and > 0, else ValueError.

    Example:
        >>> [get_staircase_func(0.5, 10)(0.8, epoch) for epoch in (0, 9.9, 10, 25)]
        [0.8, 0.8, 0.4, 0.2]
    """

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

    entries: tuple[tuple[float, float], ...]  # (epoch, learning rate), sorted by epoch; a mapping is taken too

    def __post_init__(self) -> None:
        given = self.entries.items() if isinstance(self.entries, Mapping) else self.entries
        pairs = [
            (_number("Table", "an epoch", epoch, 0.0), _number("Table", "a learning rate", rate, 0.0))
            for epoch, rate in given
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
    """The cosine decay from ``lr0`` to ``final * lr0`` at ``total_epoch``, constant from there.

    ``lr = lr0 * (final + (1 - final) * (1 + cos(pi * epoch / total_epoch)) / 2)``
    (Loshchilov & Hutter, 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts"; here without restart).

    Args:
        total_epoch: when the decay ends, in epochs, finite and > 0, else ValueError.
        final: the last rate as a share of ``lr0``, in [0, 1], else ValueError.

    Example:
        >>> [round(get_cosine_func(100)(0.1, epoch), 6) for epoch in (0, 50, 100, 200)]
        [0.1, 0.05, 0.0, 0.0]
    """

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
    """A schedule behind a linear warm-up (Goyal et al., 2017, "Accurate, Large Minibatch SGD").

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


# The chapter's name and its kin.
get_hyperbola_func = Hyperbola
get_exponential_func = Exponential
get_sqrt_func = InverseSquareRoot
get_staircase_func = Staircase
get_cosine_func = Cosine
with_warmup = WarmUp


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


_SCHEDULES: Mapping[str, Callable[..., Scheduler]] = {
    kind.__name__.lower(): kind
    for kind in (Hyperbola, Exponential, InverseSquareRoot, Staircase, Table, Cosine, WarmUp)
} | {"sqrt": InverseSquareRoot}
_CONST = "catopt_xp.schedules.const_lr"  # as files have it, wherever the function lives
_CHOICES = (
    "choose const, hyperbola(RATE), exponential(BASE), sqrt(K), staircase(FACTOR, EVERY), "
    "table({EPOCH: LR, ...}), cosine(EPOCHS[, FINAL]) or warmup(SCHEDULE, EPOCHS[, START])"
)


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
    if scheduler is const_lr:
        return _CONST
    if dataclasses.is_dataclass(scheduler):
        return repr(scheduler)
    named = scheduler if hasattr(scheduler, "__qualname__") else type(scheduler)
    return f"{named.__module__}.{named.__qualname__}"


def parse(text: str) -> Scheduler:
    """Read a schedule from a text, of a checkpoint or of the command line.

    Args:
        text: what `describe` gives, or the same with names in lower case and arguments in order: ``const``,
            ``hyperbola(0.2)``, ``exponential(0.95)``, ``sqrt(1)``, ``staircase(0.5, 10)``,
            ``table({0: 1e-3, 50: 1e-4})``, ``cosine(100)`` or ``cosine(100, 0.1)``; ``warmup(cosine(95), 5)`` or
            ``warmup(cosine(95), 5, 0.2)`` (schedule, epochs, first share).

    Raises:
        ValueError: the text is not of a schedule of this module, or a number is out of range; in one line.

    Example:
        >>> parse("warmup(cosine(95), 5)")
        WarmUp(scheduler=Cosine(total_epoch=95.0, final=0.0), warmup_epoch=5.0, start=0.0)
    """
    try:
        schedule: Scheduler = _value(ast.parse(str(text).strip(), mode="eval").body)
        if callable(schedule):
            return schedule
        raise ValueError("a value, and no schedule")
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:  # the parser's stack too
        reason = "it is not written as NAME(NUMBERS)" if isinstance(error, SyntaxError) else error
        raise ValueError(f"schedule {text!a}: {reason}; {_CHOICES}") from error


def _value(node: ast.expr) -> Any:
    """A schedule or a plain value from its source: our own classes by name, literals, and nothing else."""
    name = ast.unparse(node.func if isinstance(node, ast.Call) else node)
    if not isinstance(node, ast.Call):
        if name in ("const", "const_lr") or (name.startswith("catopt_xp.") and name.endswith(".const_lr")):
            return const_lr
        try:
            found = ast.literal_eval(node)
        except ValueError:
            raise ValueError(f"{name} is neither a number nor a schedule") from None
        if isinstance(node, ast.Dict) and len(found) < len(node.keys):
            raise ValueError("an epoch is given twice")
        return found
    if name.lower() not in _SCHEDULES:
        raise ValueError(f"{name} is not a schedule")
    kind = _SCHEDULES[name.lower()]
    arguments = [_value(x) for x in node.args], {x.arg: _value(x.value) for x in node.keywords if x.arg}
    inspect.signature(kind).bind(*arguments[0], **arguments[1])  # its TypeError says what is missing
    return kind(*arguments[0], **arguments[1])


def restore(description: str) -> Scheduler:
    """The schedule that a checkpoint describes, for a run that goes on from it.

    Raises:
        ValueError: the text is not of a schedule of this module: one's own function has to be given again.

    Example:
        >>> restore("WarmUp(scheduler=Hyperbola(decay_rate=0.2), warmup_epoch=5.0, start=0.0)")(1e-3, 10)
        0.0005
    """
    try:
        return parse(description)
    except ValueError as error:
        told = description if isinstance(description, str) and description.isprintable() else ascii(description)
        raise ValueError(f"the schedule {told} is none of the library's; pass lr_scheduler again") from error


def _number(owner: str, name: str, value: float, low: float, high: float = math.inf, above: bool = False) -> float:
    """Return ``value`` as a Python float if it is finite and in [low, high] or, ``above``, (low, high]."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
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
