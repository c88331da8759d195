"""Codes of random hyperplanes, generic twin: the specification, in plain Array API 2024.12 with static shapes.

Letters: n rows, d = dim, T tables, b bits.
"""

from typing import Any

import array_api_compat

Array = Any

PROJECTIONS = 1 << 22  # projections held at once; their bits take 8 bytes each as integers


def hash_codes(x: Array, planes: Any) -> Array:
    """Sign codes of rows: bit b of code t is [planes[t, b] . x >= 0].

    x (..., n, d) float32 or float64; planes (T, b, d) host float32 with b <= 62. Returns (..., T, n) int64.
    Cost: n * T * b dot products, and at most PROJECTIONS of them in memory.
    """
    xp = array_api_compat.array_namespace(x)
    device = array_api_compat.device(x)
    tables, bits, dim = planes.shape
    n = x.shape[-2]
    if bits == 0 or n == 0:
        return xp.zeros((*x.shape[:-2], tables, n), dtype=xp.int64, device=device)
    normals = xp.reshape(xp.asarray(planes, dtype=x.dtype, device=device), (tables * bits, dim))
    powers = xp.asarray([1 << bit for bit in range(bits)], dtype=xp.int64, device=device)
    batch = 1
    for size in x.shape[:-2]:
        batch *= size
    step = max(1, PROJECTIONS // (tables * bits * max(batch, 1)))
    codes = []
    for low in range(0, n, step):
        projections = x[..., low : min(low + step, n), :] @ xp.matrix_transpose(normals)  # (..., rows, T * b)
        signs = xp.astype(projections >= 0, xp.int64)  # -0.0 counts as positive, NaN does not
        signs = xp.reshape(signs, (*signs.shape[:-1], tables, bits))
        codes.append(xp.matrix_transpose(xp.sum(signs * powers, axis=-1)))  # (..., T, rows)
    return xp.concat(codes, axis=-1) if len(codes) > 1 else codes[0]
