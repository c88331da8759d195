"""The comparison helper fails on wrong answers."""

import numpy as np
import pytest
from compare import assert_close, relative_error, rounding

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
