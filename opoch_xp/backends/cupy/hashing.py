"""Sign codes on CUDA: the launcher of hash_codes.cu."""

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from opoch_xp.backends.cupy.launch import LANES, contiguous, on_device, parts, run, widened

Array = Any
WARPS, ROWS, DEPTH = 8, 64, 32  # as in hash_codes.cu


@on_device
def hash_codes(x: Array, planes: Any) -> Array:
    """See opoch_xp.backends.generic.hashing.hash_codes."""
    xp = array_namespace(x)
    tables, bits, dim = planes.shape
    *lead, n, _ = x.shape
    if bits == 0:
        return xp.zeros((*lead, tables, n), dtype=xp.int64)
    codes = xp.empty((*lead, tables, n), dtype=xp.int64)
    (x,) = contiguous(*widened(x))
    rows = x.size // dim
    normals = xp.asarray(np.ascontiguousarray(planes, dtype=x.dtype))
    shared = (ROWS * DEPTH + DEPTH * (LANES + 1)) * x.dtype.itemsize + 4 * ROWS * parts(tables * bits, LANES)
    run(
        "hash_codes.cu", "hash_codes", x, (parts(rows, ROWS),), WARPS * LANES,
        x, normals, codes, np.int64(rows), np.int64(n), dim, tables, bits, shared=shared,
    )  # fmt: skip
    return codes
