"""Comparing arrays: what is wrong, in words; a helper that asserts; and tolerances that come from the arithmetic."""

import numpy as np

DECISIONS_GIVEN = 1e-10  # two float64 evaluations of one formula on inputs of order 1, whatever the order of the sums
SPACING = {"float16": 2.0**-10, "bfloat16": 2.0**-7}  # from 1 to the next number


def difference(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> tuple[str, str]:
    """How `actual` departs from `expected`: its kind and the figures; both empty where nothing is wrong.

    Nothing is: the same shape, infinities and NaN in the same places, everywhere else within `tolerance`.
    """
    actual, expected = (np.asarray(a, dtype=np.float64) for a in (actual, expected))
    if actual.shape != expected.shape:
        return "has another shape", f"shape {actual.shape} instead of {expected.shape}"
    finite = np.isfinite(actual) & np.isfinite(expected)
    apart = np.where(finite, actual, 0) - np.where(finite, expected, 0)
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    wrong = np.where(finite, np.abs(apart) > tolerance, ~same)
    if not wrong.any():
        return "", ""
    place = tuple(np.argwhere(wrong)[0].tolist())
    largest = f" differ by up to {np.abs(apart).max():.3g}, more than {tolerance:.3g}" if (wrong & finite).any() else ""
    figures = f"{np.count_nonzero(wrong)} of {wrong.size} entries{largest or ' are wrong'}"
    return _kind(
        wrong, finite, apart, tolerance
    ), f"{figures}; {actual[place]:.9g} instead of {expected[place]:.9g} at {place}"


def _kind(wrong: np.ndarray, finite: np.ndarray, apart: np.ndarray, tolerance: float) -> str:
    """The kind of a difference: a bias, the end of an axis, or any other."""
    shift = apart[finite]
    if wrong.size > 1 and (wrong == finite).all() and np.ptp(shift) <= 2 * tolerance + 1e-3 * abs(shift).max():
        return f"is too {'large' if shift[0] > 0 else 'small'} by {abs(shift.mean()):.3g} everywhere: biased"
    for axis, size in enumerate(wrong.shape):
        lines = np.unique(np.nonzero(wrong)[axis])
        first = int(lines[0])
        if 4 * first >= 3 * size and len(lines) == size - first:
            return f"is wrong at the end of axis {axis} alone"
    return "is not the twin's"


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: str = "result") -> None:
    """AssertionError unless nothing is wrong, as `difference` has it."""
    kind, figures = difference(actual, expected, tolerance)
    assert not kind, f"{what}: {figures}"


def relative_error(actual: np.ndarray, exact: np.ndarray) -> float:
    """Frobenius norm of the difference over that of exact."""
    return float(np.linalg.norm(np.asarray(actual, np.float64) - exact) / np.linalg.norm(exact))


def rounding(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float | None = None, dtype: str = "float64") -> float:
    """Bound on the rounding of an attention output or lse summed in `dtype`.

    A logit errs by d roundings of its largest absolute sum, in both the logit and the maximum taken off; a sum of n_k
    weights by n_k roundings; each of at most 16 merged parts by its lse twice and a few roundings.
    """
    epsilon = float(np.finfo("float32" if dtype in ("float16", "bfloat16") else dtype).eps)
    scale = q.shape[-1] ** -0.5 if scale is None else abs(scale)
    largest = (
        scale * np.linalg.norm(np.nan_to_num(q), axis=-1).max(initial=0) * np.linalg.norm(k, axis=-1).max(initial=0)
    )
    roundings = (2 * q.shape[-1] + 32) * (largest + np.log(k.shape[-2])) + k.shape[-2] + 64
    return float(epsilon * roundings * max(1.0, np.abs(v).max(initial=0)))


def budget(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float | None = None, dtype: str = "float64") -> float:
    """`rounding`, and for 16-bit inputs that of the weights, which may be multiplied in 16 bits too."""
    return rounding(q, k, v, scale, dtype) + SPACING.get(dtype, 0.0) * float(np.abs(v).max(initial=0))
