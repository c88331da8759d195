"""The best of an index's candidates on CUDA: the launcher of search_buckets.cu.

Buckets are looked up and united by the array library, as in the generic kernels.
"""

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from opoch_xp.backends.cupy import launch
from opoch_xp.backends.cupy.launch import contiguous, number_of, on_device, run
from opoch_xp.backends.generic import search as generic
from opoch_xp.buckets import Tables

Array = Any
SEARCHERS, BATCH = 128, 128  # as in search_buckets.cu
PRODUCTS = 1 << 26  # numbers of a product with all vectors held at once: 256 MB in float32


@on_device
def search_buckets(
    q: Array,
    x: Array,
    bias: Array | None,
    tables: Tables,
    codes: Array | None,
    k: int,
    allowed: Array | None = None,
    limit: int | None = None,
) -> tuple[Array, Array]:
    """See opoch_xp.backends.generic.search.search_buckets. Sizes of buckets are read back. Where k is more than a block
    can hold (some thousands) the best are found by sorting, as there."""
    xp = array_namespace(q)
    (m, dim), n = q.shape, x.shape[0]
    shared = (2 * k + BATCH) * (8 + q.dtype.itemsize) + dim * q.dtype.itemsize
    if shared > launch.shared_limit(number_of(q)):
        return generic.search_buckets(q, x, bias, tables, codes, k, allowed, limit)
    q, x, bias, allowed = contiguous(q, x, bias, allowed)
    best, place = xp.full((m, k), -xp.inf, dtype=q.dtype), xp.full((m, k), -1, dtype=xp.int64)
    if n == 0 or m == 0:
        return place, best

    def choose(rows: slice, dense: str, offsets: Any, places: Any, scores: Any, first: int, columns: int) -> None:
        run(
            "search_buckets.cu", "best_candidates", q, (rows.stop - rows.start,), SEARCHERS,
            q[rows], x, bias, offsets, places, allowed, scores, best[rows], place[rows], np.int64(first),
            np.int64(columns), dim, k, template=(dense,), shared=shared,
        )  # fmt: skip

    if codes is None:
        step = max(1, PRODUCTS // m)
        for low in range(0, n, step):
            high = min(low + step, n)
            scores = xp.ascontiguousarray(q @ x[low:high].T)
            choose(slice(0, m), "true", None, None, scores, low, high - low)
    else:
        for low, offsets, places in generic.candidate_blocks(xp, tables, codes, limit):
            rows = slice(low, low + offsets.shape[0] - 1)
            offsets, places = contiguous(offsets, places)
            choose(rows, "false", offsets, places, None, 0, 0)
    return place, best
