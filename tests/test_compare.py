"""The comparison helper fails on wrong answers."""

from collections.abc import Callable

import numpy as np
import pytest

from opoch_xp.testing import assert_close, relative_error, rounding
from opoch_xp.testing.compare import difference

RIGHT = np.array([[1.0, -np.inf], [np.nan, 0.0]])


@pytest.mark.parametrize(
    "wrong",
    [
        [[1.1, -np.inf], [np.nan, 0.0]],
        [[1.0, 0.0], [np.nan, 0.0]],
        [[1.0, np.inf], [np.nan, 0.0]],
        [[1.0, -np.inf], [2.0, 0.0]],
        [[np.nan, -np.inf], [np.nan, 0.0]],
        [[-np.inf, -np.inf], [np.nan, 0.0]],
        [[1.0, -np.inf]],
    ],
    ids=["value", "finite for -inf", "sign", "value for nan", "nan for value", "-inf for value", "shape"],
)
def test_a_wrong_answer_fails(wrong: list[list[float]]) -> None:
    with pytest.raises(AssertionError, match="here"):
        assert_close(np.array(wrong), RIGHT, 0.01, "here")


def test_a_right_answer_passes() -> None:
    assert_close(RIGHT + 0.005, RIGHT, 0.01)
    assert_close(np.zeros((0, 3)), np.zeros((0, 3)), 0.0)


def test_relative_error_and_rounding_scale_as_they_should() -> None:
    x = np.random.default_rng(0).standard_normal((20, 4))
    assert relative_error(1.5 * x, x) == pytest.approx(0.5)
    assert rounding(x, x, 2 * x, dtype="float32") > 1e8 * rounding(x, x, x)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda x: x + 0.25, "is too large by 0.25 everywhere: biased"),
        (lambda x: x - 3e-7, "is too small by 3e-07 everywhere: biased"),
        (lambda x: np.concatenate([x[:17], 0 * x[17:]]), "is wrong at the end of axis 0 alone"),
        (
            lambda x: np.concatenate([x[:, :3], np.nan * x[:, 3:]], axis=1),
            "is wrong at the end of axis 1 alone",
        ),
        (lambda x: x * 1.01, "is not the twin's"),
        (lambda x: x.T, "has another shape"),
        (lambda x: x + 1e-9, ""),
    ],
)
def test_a_difference_has_a_kind(change: Callable[[np.ndarray], np.ndarray], kind: str) -> None:
    x = np.random.default_rng(0).standard_normal((20, 4))
    found, figures = difference(change(x), x, 1e-8)
    assert found.startswith(kind)
    assert bool(figures) == bool(kind)
