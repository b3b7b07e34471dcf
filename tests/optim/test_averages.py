"""Moving averages: definitions, memory, rounding, and the accuracy of the bias correction."""

from __future__ import annotations

import math
import sys
from decimal import Decimal, localcontext
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catopt_xp.optim.averages import (
    ExponentialMovingAverage,
    MovingAverage,
    bias_correction,
    exponential_moving_average,
    moving_average,
)

numbers = st.floats(-1e6, 1e6)
betas = st.floats(0.0, 1.0, exclude_max=True)


def mean_of_window(values: list[float], last: int, window: int) -> tuple[float, float]:
    """The exact mean of the window that ends at ``last``, rounded once, and the mean of magnitudes."""
    part = values[max(0, last + 1 - window) : last + 1]
    return math.fsum(part) / len(part), math.fsum(map(abs, part)) / len(part)


@given(st.lists(numbers, max_size=60), st.integers(1, 20))
def test_moving_average_is_the_mean_of_the_window(values: list[float], window: int) -> None:
    averages = moving_average(values, window)
    assert len(averages) == len(values)
    for last, average in enumerate(averages):
        expected, magnitude = mean_of_window(values, last, window)
        assert abs(average - expected) <= window * 2.3e-16 * magnitude, f"at {last}"


def test_until_the_window_is_full_the_mean_is_of_what_has_come() -> None:
    assert moving_average([4, 6, 8, 10, 0], window=3) == [4.0, 5.0, 6.0, 8.0, 6.0]


def test_a_window_of_one_answers_the_values() -> None:
    assert moving_average([0.1, -3.0, 7.0], window=1) == [0.1, -3.0, 7.0]


def test_a_huge_value_leaves_no_trace_when_it_has_left_the_window() -> None:
    averages = moving_average([0.1, 1e300, *[0.1] * 10], window=4)
    assert averages[4] > 1e299
    assert averages[5:] == pytest.approx([0.1] * 7, rel=1e-15)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", range(6))
def test_a_loss_that_was_not_finite_is_forgotten_with_the_window(bad: float, place: int) -> None:
    values = [1.0] * 12
    values[place] = bad
    averages = moving_average(values, window=4)
    finite = [math.isfinite(average) for average in averages]
    assert finite == [not place <= last < place + 4 for last in range(12)]


def test_a_long_stream_does_not_drift() -> None:
    rng = np.random.Generator(np.random.PCG64(3))
    values = (rng.standard_normal(20_000) * 10.0 ** rng.integers(-8, 9, 20_000)).tolist()
    average = MovingAverage(100)
    worst = 0.0
    for last, x in enumerate(values):
        got = average.update(x)
        if last % 37 == 0:
            expected, magnitude = mean_of_window(values, last, 100)
            worst = max(worst, abs(got - expected) / magnitude)
    assert worst <= 1e-14, f"largest error relative to the mean magnitude: {worst:.1e}"


def test_memory_is_the_window_whatever_the_length_of_the_stream() -> None:
    average = MovingAverage(16)
    sizes = set()
    for x in range(1000):
        average.update(x)
        sizes.add(sum(sys.getsizeof(held) for held in vars(average).values() if isinstance(held, list)))
        assert sum(len(held) for held in vars(average).values() if isinstance(held, list)) <= 16
    assert len(sizes) == 1


@given(st.lists(numbers, min_size=1, max_size=40), betas)
def test_exponential_average_is_its_weighted_sum(values: list[float], beta: float) -> None:
    averages = exponential_moving_average(values, beta)
    weights = [(1 - beta) * beta**age for age in range(len(values))]
    for last, average in enumerate(averages):
        terms = [w * x for w, x in zip(weights, reversed(values[: last + 1]), strict=False)]
        magnitude = math.fsum(abs(term) for term in terms)
        assert abs(average - math.fsum(terms)) <= 1e-13 * magnitude + 1e-300


def test_exponential_average_by_hand() -> None:
    # v1 = 0.9*0 + 0.1*10 = 1, v2 = 0.9*1 + 0.1*20 = 2.9; corrected 1/0.1 = 10, 2.9/0.19 = 15.263...
    assert exponential_moving_average([10, 20], 0.9) == pytest.approx([1.0, 2.9], rel=1e-15)
    assert exponential_moving_average([10, 20], 0.9, correct=True) == pytest.approx([10.0, 2.9 / 0.19], rel=1e-14)
    assert exponential_moving_average([5, 7], 0.0, correct=True) == [5.0, 7.0]


@given(st.floats(1e-3, 1e6), betas, st.integers(1, 50))
def test_corrected_average_of_a_constant_is_that_constant(x: float, beta: float, count: int) -> None:
    assert exponential_moving_average([x] * count, beta, correct=True) == pytest.approx([x] * count, rel=1e-12)


@given(st.lists(numbers, min_size=1, max_size=30), st.floats(0.0, 0.999))
def test_corrected_average_stays_between_the_smallest_and_the_largest(values: list[float], beta: float) -> None:
    room = 1e-9 * max(map(abs, values)) + 1e-300
    for average in exponential_moving_average(values, beta, correct=True):
        assert min(values) - room <= average <= max(values) + room


def test_window_of_the_exponential_average() -> None:
    assert ExponentialMovingAverage(0.9).window == pytest.approx(10.0)
    assert ExponentialMovingAverage(0.98).window == pytest.approx(50.0)
    assert ExponentialMovingAverage(0.0).window == 1.0


def test_value_is_the_last_average_and_refused_before_the_first() -> None:
    for average in (
        MovingAverage(3),
        ExponentialMovingAverage(0.9),
        ExponentialMovingAverage(0.9, correct=True),
    ):
        with pytest.raises(ValueError, match=r"before the first value; call update\(x\) first"):
            _ = average.value
        assert average.update(np.float64(2.5)) == average.value
        assert type(average.value) is float


@given(st.floats(0.0, 1.0, exclude_max=True), st.integers(1, 10**7))
def test_bias_correction_is_good_to_its_last_digits(beta: float, t: int) -> None:
    with localcontext(prec=400) as context:
        context.Emin = -(10**17)
        exact = 1 - Decimal(beta) ** t
    relative = abs(Decimal(bias_correction(beta, t)) - exact) / exact
    assert relative <= Decimal("6e-16"), f"relative error {float(relative):.1e}"


def test_bias_correction_near_one_where_the_plain_formula_fails() -> None:
    beta = 1 - 1e-8
    exact = float(1 - Decimal(beta) ** 3)
    assert bias_correction(beta, 3) == pytest.approx(exact, rel=4e-16)
    assert abs((1 - beta**3) / exact - 1) > 1e-10


@given(betas, st.integers(1, 1000))
def test_bias_correction_rises_to_one(beta: float, t: int) -> None:
    values = [bias_correction(beta, step) for step in (t, t + 1, t + 100, 10**9)]
    assert all(0.0 < a <= b <= 1.0 for a, b in pairwise(values))
    assert bias_correction(beta, 1) == pytest.approx(1 - beta, rel=1e-15)


@pytest.mark.parametrize("beta", [-0.1, 1.0, 1.5, math.nan])
def test_a_bad_beta_is_refused(beta: float) -> None:
    for call in (
        lambda: ExponentialMovingAverage(beta),
        lambda: exponential_moving_average([1.0], beta),
        lambda: bias_correction(beta, 1),
    ):
        with pytest.raises(ValueError, match=r"^\w+: beta must be in \[0, 1\), not .*$"):
            call()


def test_a_bad_window_or_count_is_refused() -> None:
    for call in (lambda: MovingAverage(0), lambda: moving_average([], -1), lambda: bias_correction(0.9, 0)):
        with pytest.raises(ValueError, match=r"^\w+: (window|t) must be at least 1, not -?\d$"):
            call()
    with pytest.raises(TypeError, match=r"MovingAverage: window must be an integer, not 2\.5"):
        MovingAverage(2.5)  # type: ignore[arg-type]
