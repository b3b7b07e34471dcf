"""Learning-rate schedules: values, bounds, descriptions, and the text that the command line takes."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catopt_xp.optim import schedules
from catopt_xp.optim.schedules import (
    Scheduler,
    const_lr,
    describe,
    get_cosine_func,
    get_exponential_func,
    get_hyperbola_func,
    get_sqrt_func,
    get_staircase_func,
    get_table_func,
    parse,
    restore,
    with_warmup,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "helpers" / "golden" / "schedules.json").read_text(encoding="ascii"))

positive = st.floats(1e-3, 1e3)
share = st.floats(0.0, 1.0)
factor = st.floats(1e-6, 1.0)
simple: st.SearchStrategy[Scheduler] = st.one_of(
    st.just(const_lr),
    st.builds(get_hyperbola_func, st.floats(0.0, 1e3)),
    st.builds(get_exponential_func, factor),
    st.builds(get_sqrt_func, positive),
    st.builds(get_staircase_func, factor, positive),
    st.builds(get_table_func, st.dictionaries(st.floats(0.0, 1e4), st.floats(0.0, 1.0), min_size=1)),
    st.builds(get_cosine_func, positive, share),
)
any_schedule = st.one_of(simple, st.builds(with_warmup, simple, positive, share))
rates = st.floats(1e-8, 10.0)
epochs = st.one_of(st.floats(0.0, 1e6), st.integers(0, 10**6))


def inverse_square(learning_rate_zero: float, epoch: float) -> float:
    """A schedule of a user's own."""
    return learning_rate_zero / (1.0 + epoch) ** 2


# (schedule, lr0, {epoch: rate}), each rate worked out by hand from the equation
BY_HAND: list[tuple[Scheduler, float, dict[float, float]]] = [
    (const_lr, 0.1, {0: 0.1, 7.5: 0.1, 1000: 0.1}),
    (get_hyperbola_func(0.2), 1e-3, {0: 1e-3, 5: 5e-4, 2.5: 1e-3 / 1.5, 20: 2e-4}),
    (get_hyperbola_func(0.005), 1e-5, {0: 1e-5, 90: 1e-5 / 1.45, 200: 5e-6}),
    (get_hyperbola_func(0), 0.1, {0: 0.1, 99: 0.1}),
    (get_exponential_func(0.95), 0.1, {0: 0.1, 1: 0.095, 2: 0.09025, 0.5: 0.1 * math.sqrt(0.95)}),
    (get_sqrt_func(2), 0.1, {0: 0.2, 0.5: 0.2, 1: 0.2, 4: 0.1, 16: 0.05}),
    (get_staircase_func(0.5, 10), 0.8, {0: 0.8, 9: 0.8, 9.99: 0.8, 10: 0.4, 19: 0.4, 20: 0.2}),
    (get_staircase_func(0.5, 0.1), 1.0, {0.05: 1.0, 1: 2.0**-10}),  # 1 / 0.1 is 10, 1 // 0.1 is 9
    (
        get_table_func({50: 1e-5, 10: 1e-4}),
        1e-3,
        {0: 1e-3, 9.9: 1e-3, 10: 1e-4, 49: 1e-4, 50: 1e-5, 900: 1e-5},
    ),
    (get_table_func({1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}), 1e-3, {0.5: 1e-3, 1.5: 0.1, 2.5: 0.2, 3.5: 0.3, 9: 0.4}),
    # At the ends of what their numbers may be, they are constant.
    (get_exponential_func(1), 0.1, {0: 0.1, 7: 0.1}),
    (get_staircase_func(1, 10), 0.1, {0: 0.1, 70: 0.1}),
    (get_cosine_func(10, 1), 0.1, {0: 0.1, 7: 0.1, 70: 0.1}),
    (with_warmup(const_lr, 5, 1), 0.1, {0: 0.1, 2: 0.1, 70: 0.1}),
    (get_cosine_func(100), 0.1, {0: 0.1, 50: 0.05, 100: 0.0, 150: 0.0, 100 / 3: 0.075}),
    (get_cosine_func(100, 0.1), 0.1, {0: 0.1, 50: 0.055, 100: 0.01, 101: 0.01}),
    (with_warmup(const_lr, 5), 0.1, {0: 0.0, 1: 0.02, 2.5: 0.05, 5: 0.1, 6: 0.1}),
    (with_warmup(const_lr, 4, 0.5), 0.1, {0: 0.05, 2: 0.075, 4: 0.1}),
    (with_warmup(get_cosine_func(10), 5), 0.1, {2.5: 0.05, 5: 0.1, 10: 0.05, 15: 0.0}),
    (with_warmup(get_sqrt_func(2), 5), 0.1, {0: 0.0, 4: 0.16, 5: 0.2, 9: 0.1}),
]


@pytest.mark.parametrize(("schedule", "lr0", "expected"), BY_HAND, ids=[describe(row[0]) for row in BY_HAND])
def test_values_worked_out_by_hand(schedule: Scheduler, lr0: float, expected: dict[float, float]) -> None:
    for epoch, rate in expected.items():
        assert schedule(lr0, epoch) == pytest.approx(rate, rel=1e-14, abs=1e-18), f"epoch {epoch}"


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=[case["name"] for case in GOLDEN["cases"]])
def test_pytorch_agrees(case: dict[str, Any]) -> None:
    ours = [parse(case["name"])(case["learning_rate_zero"], epoch) for epoch in range(len(case["rates"]))]
    gap = max(abs(a - b) for a, b in zip(ours, case["rates"], strict=True))
    assert gap <= 1e-15, f"{case['name']}: largest difference {gap:.1e}"


@given(any_schedule, rates, epochs)
def test_every_rate_is_a_finite_python_float_and_not_negative(s: Scheduler, lr0: float, epoch: float) -> None:
    rate = s(lr0, epoch)
    assert type(rate) is float
    assert math.isfinite(rate)
    assert rate >= 0.0


@given(any_schedule, rates, epochs)
def test_numpy_numbers_give_the_same_python_float(s: Scheduler, lr0: float, epoch: float) -> None:
    rate = s(np.float64(lr0), np.float64(epoch))
    assert type(rate) is float
    assert rate == s(lr0, epoch)


@given(any_schedule, rates, epochs)
def test_a_pickled_schedule_is_equal_and_described_alike(s: Scheduler, lr0: float, epoch: float) -> None:
    copy = pickle.loads(pickle.dumps(s))
    assert copy == s
    assert describe(copy) == describe(s)
    assert copy(lr0, epoch) == s(lr0, epoch)


@given(
    st.one_of(
        st.builds(get_hyperbola_func, st.floats(0.0, 1e3)),
        st.builds(get_exponential_func, factor),
        st.builds(get_staircase_func, factor, positive),
        st.builds(get_cosine_func, positive, share),
    ),
    rates,
    st.lists(st.floats(0.0, 1e4), min_size=2),
)
def test_decay_starts_at_lr0_and_never_rises(s: Scheduler, lr0: float, times: list[float]) -> None:
    values = [s(lr0, epoch) for epoch in sorted(times)]
    assert s(lr0, 0) == pytest.approx(lr0, rel=1e-15)
    assert all(later <= earlier * (1 + 1e-15) for earlier, later in pairwise(values))


@given(simple, positive, share, rates, st.floats(0.0, 1e4))
def test_after_its_warm_up_a_schedule_counts_from_zero(
    inner: Scheduler, warmup_epoch: float, start: float, lr0: float, later: float
) -> None:
    warm = with_warmup(inner, warmup_epoch, start)
    now = warmup_epoch + later
    assert warm(lr0, now) == inner(lr0, now - warmup_epoch)
    assert warm(lr0, 0) == pytest.approx(start * inner(lr0, 0), rel=1e-15)
    just_before = math.nextafter(warmup_epoch, 0.0)
    assert warm(lr0, just_before) == pytest.approx(inner(lr0, 0), rel=1e-12)


@pytest.mark.parametrize("epoch", [-1, -1e-9, math.nan, math.inf, np.float64(math.inf)])
@pytest.mark.parametrize("schedule", [row[0] for row in BY_HAND if row[0] is not const_lr], ids=describe)
def test_an_epoch_before_the_start_or_not_finite_is_refused(schedule: Scheduler, epoch: float) -> None:
    with pytest.raises(ValueError, match=r"^epoch must be finite and not negative, not .*$"):
        schedule(0.1, epoch)


def test_far_epochs_do_not_overflow() -> None:
    assert get_exponential_func(0.5)(1.0, 1e300) == 0.0
    assert get_staircase_func(0.5, 1e-3)(1.0, 1e300) == 0.0
    assert get_hyperbola_func(1e3)(1.0, 1e308) == 0.0


BAD: list[tuple[Any, tuple[Any, ...]]] = [
    *[(get_hyperbola_func, (value,)) for value in (-0.1, math.nan, math.inf)],
    *[(get_exponential_func, (value,)) for value in (0, -0.5, 1.0001, math.nan)],
    *[(get_sqrt_func, (value,)) for value in (0, -1, math.nan, math.inf)],
    *[
        (get_staircase_func, values)
        for values in ((0, 10), (1.5, 10), (0.5, 0), (0.5, -1), (math.nan, 1), (0.5, math.inf))
    ],
    *[(get_table_func, (value,)) for value in ({}, {-1: 0.1}, {0: -0.1}, {math.nan: 1}, {0: math.inf})],
    *[(get_cosine_func, values) for values in ((0,), (-5,), (math.inf,), (10, -0.1), (10, 1.1), (10, math.nan))],
    *[(with_warmup, (const_lr, *values)) for values in ((0,), (-1,), (math.nan,), (5, -0.1), (5, 1.1))],
]


@pytest.mark.parametrize(("make", "arguments"), BAD)
def test_a_bad_argument_is_one_clear_line(make: Any, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"^(\w+: .* must be .*|Table: no entries; give .*)$") as caught:
        make(*arguments)
    assert "\n" not in str(caught.value)


def test_what_is_no_number_or_no_function_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"Hyperbola: decay_rate must be a number, not \[1\]"):
        get_hyperbola_func([1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"WarmUp: scheduler must be callable .* not 0\.1"):
        with_warmup(0.1, 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="an epoch is given twice"):
        schedules.Table(((1, 0.1), (1.0, 0.2)))


@pytest.mark.parametrize(
    "text", ["hyperbola(1)", "exponential(1)", "sqrt(1)", "staircase(1, 1)", "table({0: 1})", "cosine(1)"]
)
def test_a_schedule_stays_as_it_was_checked(text: str) -> None:
    for schedule in (parse(text), parse(f"warmup({text}, 5)")):
        for name in vars(schedule):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(schedule, name, -1.0)
        assert {schedule: "as a key"}[pickle.loads(pickle.dumps(schedule))] == "as a key"


def test_descriptions_are_readable_and_hold_no_address() -> None:
    assert describe(const_lr) == "catopt_xp.schedules.const_lr"  # as files have it
    assert describe(get_hyperbola_func(np.float64(0.5))) == "Hyperbola(decay_rate=0.5)"
    assert describe(get_table_func({5: 1, 0: 2})) == "Table(entries=((0.0, 2.0), (5.0, 1.0)))"
    assert describe(with_warmup(const_lr, 5)) == (
        "WarmUp(scheduler=catopt_xp.schedules.const_lr, warmup_epoch=5.0, start=0.0)"
    )
    assert describe(inverse_square).endswith("test_schedules.inverse_square")
    assert describe(functools.partial(inverse_square)) == "functools.partial"
    assert "inverse_square" in repr(with_warmup(inverse_square, 1))
    assert get_hyperbola_func(1) == get_hyperbola_func(1.0)
    assert repr(get_hyperbola_func(1)) == repr(get_hyperbola_func(np.float64(1)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("const", const_lr),
        ("hyperbola(0.2)", get_hyperbola_func(0.2)),
        ("exponential(0.95)", get_exponential_func(0.95)),
        ("sqrt(1)", get_sqrt_func(1)),
        ("staircase(0.5, 10)", get_staircase_func(0.5, 10)),
        ("table({0: 1e-3, 50: 1e-4})", get_table_func({0: 1e-3, 50: 1e-4})),
        ("table({0: 1e+1, 5: 1})", get_table_func({0: 10, 5: 1})),
        ("cosine(100)", get_cosine_func(100)),
        (" Cosine(1e+2, final=0.1) ", get_cosine_func(100, 0.1)),
        ("warmup(const, 5)", with_warmup(const_lr, 5)),
        ("warmup(cosine(100), 5)", with_warmup(get_cosine_func(100), 5)),
        ("warmup( hyperbola(0.2), 5e+0, start=0.2 )", with_warmup(get_hyperbola_func(0.2), 5, 0.2)),
        ("warmup(warmup(cosine(100), 3), 5)", with_warmup(with_warmup(get_cosine_func(100), 3), 5)),
    ],
)
def test_parse_reads_names_and_numbers(text: str, expected: Scheduler) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is not written as NAME(NUMBERS)"),
        ("hyperbola:0.2", "it is not written as NAME(NUMBERS)"),
        ("hyperbola(", "it is not written as NAME(NUMBERS)"),
        ("linear(1)", "linear is not a schedule"),
        ("hyperbola(1)(2)", "hyperbola(1) is not a schedule"),
        ("const(1)", "const is not a schedule"),
        ("hyperbola", "hyperbola is neither a number nor a schedule"),
        ("hyperbola(fast)", "fast is neither a number nor a schedule"),
        ("hyperbola(*[1])", "*[1] is neither a number nor a schedule"),
        ("0.5", "a value, and no schedule"),
        ("hyperbola()", "missing a required argument: 'decay_rate'"),
        ("hyperbola(1, 2)", "too many positional arguments"),
        ("hyperbola(rate=1)", "missing a required argument: 'decay_rate'"),
        ("cosine(1, last=0)", "got an unexpected keyword argument 'last'"),
        ("hyperbola(-1)", "decay_rate must be finite and in [0, inf), not -1.0"),
        ("hyperbola(1e999)", "decay_rate must be finite and in [0, inf), not inf"),
        (f"hyperbola({'9' * 400})", "decay_rate must be a number, not 999"),
        ("exponential(0)", "base must be finite and in (0, 1]"),
        ("table({})", "Table: no entries"),
        ("table({0: 'x'})", "a learning rate must be a number, not 'x'"),
        ("table(((0, 1), (0, 2)))", "an epoch is given twice"),
        ("table({0: 1, 0: 2})", "an epoch is given twice"),
        ("warmup(5, cosine(95))", "scheduler must be callable"),
        ("warmup(linear(1), 5)", "linear is not a schedule"),
    ],
)
def test_parse_refuses_in_one_line_that_names_the_choices(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r"^schedule ") as caught:
        parse(text)
    message = str(caught.value)
    assert message.startswith(f"schedule {text!r}: ")
    assert reason in message
    assert "\n" not in message
    assert message.count("choose const, hyperbola(RATE)") == 1


@given(st.text(alphabet="consthyperbolawmu0123456789.,:(){}+-e ", max_size=30))
def test_parse_answers_a_schedule_or_a_value_error(text: str) -> None:
    told = ""
    rate = 0.0
    try:
        rate = parse(text)(0.1, 3)
    except ValueError as error:
        told = str(error)
    assert "choose const" in told if told else rate >= 0.0


@pytest.mark.parametrize(
    "text",
    [
        "const",
        "hyperbola(0.2)",
        "exponential(0.95)",
        "sqrt(1)",
        "staircase(0.5, 10)",
        "table({0: 1e-3, 50: 1e-4})",
        "cosine(100, 0.1)",
        "warmup(cosine(100), 5, 0.2)",
        "warmup(const, 5)",
    ],
)
def test_a_described_schedule_is_restored(text: str) -> None:
    assert restore(describe(parse(text))) == parse(describe(parse(text))) == parse(text)


@pytest.mark.parametrize("name", ["catopt_xp.schedules.const_lr", "catopt_xp.optim.schedules.const_lr", "const_lr"])
def test_files_may_name_the_constant_rate_by_any_module(name: str) -> None:
    assert restore(name) is const_lr
    assert restore(f"WarmUp(scheduler={name}, warmup_epoch=5.0, start=0.0)") == with_warmup(const_lr, 5)


@pytest.mark.parametrize(
    "text", ["math.fsum", "Hyperbola", "__import__('os').getcwd()", "Hyperbola(decay_rate=", "x + 1", "0.5", "(0.5,)"]
)
def test_another_schedule_is_not_restored_and_nothing_is_run(text: str) -> None:
    with pytest.raises(ValueError, match=r"^the schedule ") as caught:
        restore(text)
    assert str(caught.value) == f"the schedule {text} is none of the library's; pass lr_scheduler again"


def test_what_is_called_like_no_schedule_is_named_as_the_cause() -> None:
    with pytest.raises(ValueError, match=r"^the schedule ") as caught:
        restore("WarmUp(scheduler=Linear(rate=0.5), warmup_epoch=5.0, start=0.0)")
    assert "Linear is not a schedule" in str(caught.value.__cause__)


@pytest.mark.parametrize(("text", "told"), [("a\x1b[2J\n", r"'a\x1b[2J\n'"), (3, "3"), (None, "None")])
def test_a_description_that_is_no_line_of_text_is_shown_in_one(text: Any, told: str) -> None:
    with pytest.raises(ValueError, match=r"^the schedule ") as caught:
        restore(text)
    assert str(caught.value) == f"the schedule {told} is none of the library's; pass lr_scheduler again"
