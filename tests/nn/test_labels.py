"""Weights of samples and of their classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from catopt_xp.nn.labels import sample_weights

M = 12
LABELS = np.arange(M) % 5 % 3
CASES: dict[str, tuple[Any, Any]] = {
    "balanced": ("balanced", LABELS),
    "balanced names": ("balanced", np.array(["a", "b", "c"])[LABELS]),
    "balanced labels of a sample": ("balanced", np.stack([LABELS > 0, LABELS > 1]).astype(int)),
    "a dict": ({0: 2.0, 1: 0.5, 2: 1}, LABELS),
    "a dict without a class": ({"a": 3.0, "c": 0.5}, np.array(["a", "b", "c"])[LABELS]),
    "a dict with a class that is not there": ({0: 3.0, 1: 2.0, 2: 0.5, 7: 9.0}, LABELS),
    "a dict for floats": ({0: 3.0}, (LABELS > 0).astype("float32").reshape(1, -1)),
    "a dict for each label": ([{0: 3.0, 1: 2.0}, {1: 0.5}], np.stack([LABELS > 0, LABELS > 1]).astype(int)),
}


@pytest.mark.parametrize("case", CASES)
def test_class_weights_are_those_of_scikit_learn(case: str) -> None:
    compute = pytest.importorskip("sklearn.utils.class_weight").compute_sample_weight
    given, Y = CASES[case]
    one_row = Y.ndim == 1 or len(Y) == 1
    expected = compute(given, Y.reshape(-1) if one_row else Y.T)
    weights = sample_weights(None, given, Y, M)
    assert weights is not None
    assert weights.dtype == np.float64
    assert np.array_equal(weights, expected)
    own = np.linspace(1, 2, M)
    assert np.array_equal(sample_weights(own.tolist(), given, Y, M), own * expected)


def test_without_weights_there_are_none() -> None:
    assert sample_weights(None, None, LABELS, M) is None
    assert sample_weights([1, 2], None, None, 2).tolist() == [1.0, 2.0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("sample_weight", "class_weight", "told"),
    [
        ([1, 2], None, "sample_weight has shape (2,); give (12,), a number for each sample"),
        ([[1]] * M, None, "sample_weight has shape (12, 1); give (12,), a number for each sample"),
        ([np.nan] * M, None, "sample_weight contains NaN or infinity; replace them first"),
        ([0] * M, None, "sample_weight is zero for every sample; there is nothing to learn"),
        (["a"] * M, None, "sample_weight holds <U1; give real numbers"),
        (None, "heavy", "class_weight is 'heavy'; give None, \"balanced\" or {class: weight}"),
        (None, 2, 'class_weight is 2; give None, "balanced" or {class: weight}'),
        (
            None,
            [{0: 1}, {0: 2}],
            'class_weight has 2 dicts for 1 labels of a sample; give a list of one for each, or "balanced"',
        ),
        (None, {0: 1.0, 7: 2.0}, "class_weight has weights of [7], the labels have the classes [0, 1, 2]"),
        (None, {0: np.inf}, "class_weight is {0: inf}; give finite numbers"),
        (None, {0: "a"}, "class_weight is {0: 'a'}; give finite numbers"),
    ],
)
def test_what_cannot_weigh_is_refused_in_a_line(sample_weight: Any, class_weight: Any, told: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        sample_weights(sample_weight, class_weight, LABELS, M)
    assert str(caught.value).startswith(told)
