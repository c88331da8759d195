"""Random hyperplanes and the sign codes they give: the index under the LSH method, usable by itself."""

from typing import Any

import numpy as np

from opoch_xp.arguments import namespace_of
from opoch_xp.backends import kernels_for
from opoch_xp.methods import check_whole

Array = Any

MOST_BITS = 62  # codes are non-negative int64 and leave one value free above them


def random_hyperplanes(dim: int, bits: int = 16, tables: int = 4, seed: int = 0) -> np.ndarray:
    """Normals of random hyperplanes through the origin, on the host: the same bits for every backend.

    Returns (tables, bits, dim) float32, standard normal, drawn from `numpy.random.default_rng(seed)` in float64. Two
    rows at angle theta get the same code in one table with probability `(1 - theta / pi) ** bits`. `bits` is 0 to 62.

    Raises ValueError when dim < 1, tables < 1, seed < 0 or bits is outside 0..62. Source: Charikar, Similarity
    estimation techniques from rounding algorithms, 2002.

    >>> random_hyperplanes(64, bits=12, tables=8).shape
    (8, 12, 64)
    """
    check_whole("dim", dim, 1)
    check_whole("bits", bits, 0, MOST_BITS)
    check_whole("tables", tables, 1)
    check_whole("seed", seed, 0)
    return np.random.default_rng(seed).standard_normal((tables, bits, dim)).astype(np.float32)


def hash_codes(x: Array, planes: np.ndarray, *, backend: str | None = None) -> Array:
    """Sign codes of rows: `code[..., t, i] = sum_b 2**b * (planes[t, b] . x[..., i, :] >= 0)`.

    x (..., n, dim), real floating, of any array library (16-bit floats are widened to float32); planes (tables, bits,
    dim) on the host, as `random_hyperplanes` gives them. Returns (..., tables, n) int64 of x's library and device.

    Zero, of either sign, counts as positive and NaN as negative. Codes of two backends can differ where a projection is
    within rounding of zero. Cost: n * tables * bits dot products and the memory of the codes.

    Raises TypeError when x or planes is not real floating; ValueError when x has fewer than two axes, planes is not
    (tables, bits, dim) with dim of x and at most 62 bits, or the backend is not installed.

    >>> import numpy as np
    >>> hash_codes(np.eye(2), np.asarray([[[1.0, 1.0], [-1.0, 1.0]]]))
    array([[1, 3]])
    """
    xp = namespace_of(x=x)
    if not xp.isdtype(x.dtype, "real floating"):
        raise TypeError(f"x must be real floating, got dtype {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"x must be (..., n, dim), got shape {tuple(x.shape)}")
    planes = np.asarray(planes)
    if planes.dtype.kind != "f":
        raise TypeError(f"planes must be real floating, got dtype {planes.dtype}")
    if planes.ndim != 3 or planes.shape[2] != x.shape[-1]:
        raise ValueError(
            f"planes must be (tables, bits, dim) with dim of x = {x.shape[-1]}, got shape {tuple(planes.shape)}"
        )
    if planes.shape[1] > MOST_BITS:
        raise ValueError(f"planes must hold at most {MOST_BITS} bits a table, got {planes.shape[1]}")
    if xp.finfo(x.dtype).bits < 32:
        x = xp.astype(x, xp.float32)
    return kernels_for(xp, backend).hash_codes(x, planes)
