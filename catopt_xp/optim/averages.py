"""Moving averages of a stream of numbers (losses, gradients' norms, seconds), in plain Python floats.

Two ways to smooth a curve: the mean of the last ``window`` values, which must remember them all, and the
exponentially weighted moving average, which remembers one number and is what Momentum, RMSProp and Adam keep
of their gradients.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable


class MovingAverage:
    """Mean of the last ``window`` values of a stream: O(window) memory, O(1) time per value (amortised).

    Until the window is full, it is the mean of what has come.

    No value is ever subtracted, so rounding errors cannot pile up, and an infinity or NaN is forgotten with
    the value that brought it. One ring of ``window`` floats does it: a lap writes the new values over the
    old, slot by slot, and sums them on the way; the slots not yet reached hold suffix sums of the lap before,
    so the next one is the sum of all its values that are still in the window. At the end of each lap one
    sweep turns the new values into suffix sums.

    Args:
        window: how many values to average over, an integer >= 1.

    Raises:
        ValueError: ``window`` is below 1.
        TypeError: ``window`` is not an integer.

    Example:
        >>> average = MovingAverage(3)
        >>> [average.update(x) for x in (3.0, 5.0, 10.0, 0.0)]
        [3.0, 4.0, 6.0, 5.0]
        >>> average.value
        5.0
    """

    def __init__(self, window: int) -> None:
        self.window = _integer("MovingAverage", "window", window)
        self._ring = [0.0] * self.window
        self._position = 0  # the slot that the next value takes
        self._lap_sum = 0.0  # the sum of the slots before it
        self._count = 0  # values in the window
        self._value = 0.0

    def update(self, x: float) -> float:
        """Take the next value and return the mean of the window."""
        value = float(x)
        after = self._position + 1
        older = self._ring[after] if after < self.window else 0.0
        self._ring[self._position] = value
        self._lap_sum += value
        self._count = min(self._count + 1, self.window)
        self._value = (older + self._lap_sum) / self._count
        self._position = after
        if after == self.window:
            self._start_next_lap()
        return self._value

    def _start_next_lap(self) -> None:
        for slot in range(self.window - 2, -1, -1):
            self._ring[slot] += self._ring[slot + 1]
        self._position = 0
        self._lap_sum = 0.0

    @property
    def value(self) -> float:
        """The mean of the window; ValueError before the first value."""
        if self._count == 0:
            raise ValueError("MovingAverage: there is no mean before the first value; call update(x) first")
        return self._value


class ExponentialMovingAverage:
    """Exponentially weighted moving average ``v = beta * v + (1 - beta) * x`` from ``v = 0``.

    With ``correct`` its value is ``v / (1 - beta**t)`` after ``t`` values (Kingma & Ba, 2015, section 3),
    which takes away the pull of the zero that it starts from: the weights then sum to 1, and the first value
    answers itself.

    Args:
        beta: the share of the past, in [0, 1).
        correct: divide by ``1 - beta**t``.

    Raises:
        ValueError: ``beta`` is outside [0, 1).

    Example:
        >>> plain, corrected = ExponentialMovingAverage(0.5), ExponentialMovingAverage(0.5, correct=True)
        >>> [plain.update(x) for x in (8.0, 8.0, 4.0)]
        [4.0, 6.0, 5.0]
        >>> [round(corrected.update(x), 3) for x in (8.0, 8.0, 4.0)]
        [8.0, 8.0, 5.714]
    """

    def __init__(self, beta: float, correct: bool = False) -> None:
        self.beta = _beta("ExponentialMovingAverage", beta)
        self.correct = bool(correct)
        self._average = 0.0
        self._count = 0

    def update(self, x: float) -> float:
        """Take the next value and return the average."""
        self._average = self.beta * self._average + (1.0 - self.beta) * float(x)
        self._count += 1
        return self.value

    @property
    def value(self) -> float:
        """The average, corrected if so chosen; ValueError before the first value."""
        if self._count == 0:
            raise ValueError(
                "ExponentialMovingAverage: there is no average before the first value; call update(x) first"
            )
        return self._average / bias_correction(self.beta, self._count) if self.correct else self._average

    @property
    def window(self) -> float:
        """About how many values it averages over: ``1 / (1 - beta)``; a weight of that age is about 1/e."""
        return 1.0 / (1.0 - self.beta)


def moving_average(values: Iterable[float], window: int) -> list[float]:
    """Return the moving average at each of the values; see `MovingAverage`.

    Args:
        values: the numbers, in order.
        window: how many of them to average over, an integer >= 1.

    Returns:
        As many floats as values: the mean of the last ``window`` values up to and with each (of fewer at the
        start).

    Raises:
        ValueError: ``window`` is below 1.

    Example:
        >>> moving_average([1, 3, 5, 7], window=2)
        [1.0, 2.0, 4.0, 6.0]
    """
    average = MovingAverage(window)
    return [average.update(x) for x in values]


def exponential_moving_average(values: Iterable[float], beta: float, correct: bool = False) -> list[float]:
    """Return the exponentially weighted moving average at each of the values; see `ExponentialMovingAverage`.

    Args:
        values: the numbers, in order.
        beta: the share of the past, in [0, 1).
        correct: divide by ``1 - beta**t``.

    Returns:
        As many floats as values.

    Raises:
        ValueError: ``beta`` is outside [0, 1).

    Example:
        >>> exponential_moving_average([8, 8, 4], beta=0.5)
        [4.0, 6.0, 5.0]
    """
    average = ExponentialMovingAverage(beta, correct)
    return [average.update(x) for x in values]


def bias_correction(beta: float, t: int) -> float:
    """Return ``1 - beta**t``, the sum of an exponential moving average's weights after ``t`` values.

    Computed as ``-expm1(t * log(beta))``, since ``1 - beta**t`` as written loses digits while ``beta**t`` is
    near 1 (half of them at ``beta = 1 - 1e-8``). This is good to the last digits for every ``t`` and ``beta``.

    Args:
        beta: the share of the past, in [0, 1).
        t: the number of values so far, an integer >= 1.

    Returns:
        A float in (0, 1].

    Raises:
        ValueError: ``beta`` is outside [0, 1), or ``t`` is below 1 (the sum of no weights is no divisor).
        TypeError: ``t`` is not an integer.

    Example:
        >>> bias_correction(0.5, 3)
        0.875
    """
    power = _beta("bias_correction", beta)
    steps = _integer("bias_correction", "t", t)
    return -math.expm1(steps * math.log(power)) if power > 0.0 else 1.0


def _beta(owner: str, beta: float) -> float:
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"{owner}: beta must be in [0, 1), not {beta!r}")
    return float(beta)


def _integer(owner: str, name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{owner}: {name} must be an integer, not {value!r}") from None
    if number < 1:
        raise ValueError(f"{owner}: {name} must be at least 1, not {number}")
    return number
