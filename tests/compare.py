"""Comparing arrays: a helper that asserts, and tolerances that come from the arithmetic."""

import numpy as np

DECISIONS_GIVEN = 1e-10  # two float64 evaluations of one formula on inputs of order 1, whatever the order of the sums


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: str = "result") -> None:
    """Same shape, -inf and NaN in the same places, everywhere else within `tolerance`."""
    actual, expected = (np.asarray(a, dtype=np.float64) for a in (actual, expected))
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    finite = np.isfinite(expected)
    wrong = np.where(finite, 0, ~((actual == expected) | (np.isnan(actual) & np.isnan(expected))))
    assert not wrong.any(), f"{what}: {np.argwhere(wrong)[0]} holds {actual[tuple(np.argwhere(wrong)[0])]}"
    apart = np.abs(np.where(finite, actual, 0) - np.where(finite, expected, 0))
    worst = apart.max(initial=0.0)  # NaN where actual is not a number and expected is
    assert worst <= tolerance, f"{what}: differs by {worst:.3g}, more than {tolerance:.3g}"


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
    largest = scale * np.linalg.norm(np.nan_to_num(q), axis=-1).max(initial=0) * np.linalg.norm(k, axis=-1).max()
    roundings = (2 * q.shape[-1] + 32) * (largest + np.log(k.shape[-2])) + k.shape[-2] + 64
    return float(epsilon * roundings * max(1.0, np.abs(v).max(initial=0)))
