"""Shared buckets on CUDA: the launcher of bucket_attention.cu.

Buckets are sorted and searched by the array library, as in the generic kernel, whose means also serve the queries
without a candidate.
"""

from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from opoch_xp.backends.cupy.launch import (
    KEYS,
    QUERIES,
    TILE_THREADS,
    columns_for,
    contiguous,
    on_device,
    parts,
    run,
    tile_bytes,
    widened,
)
from opoch_xp.backends.generic.buckets import Flat, candidate_runs, settled

Array = Any


@on_device
def bucket_attention(
    q: Array,
    k: Array,
    v: Array,
    query_codes: Array,
    key_codes: Array,
    *,
    causal: bool,
    scale: float,
    mask: Array | None = None,
    window: int = 0,
    max_bucket: int | None = None,
) -> tuple[Array, Array, Array]:
    """See opoch_xp.backends.generic.buckets.bucket_attention. How many queries found no candidate is read back."""
    xp = array_namespace(q)
    q, k, v = widened(q, k, v)
    batch, repeat, n_q, dim = q.shape
    n_k, width = k.shape[1], v.shape[-1]
    queries, keys = batch * n_q * repeat, batch * n_k
    if not queries:
        read = xp.zeros((batch, repeat, n_q), dtype=xp.int64)
        return xp.zeros((*read.shape, width), dtype=q.dtype), xp.astype(read, q.dtype), read
    flat = Flat(xp, (batch, repeat, n_q, n_k), device(q), causal, mask)
    rows = xp.reshape(xp.permute_dims(q, (0, 2, 1, 3)), (-1, dim))
    rows, k, v = contiguous(rows, xp.reshape(k, (-1, dim)), xp.reshape(v, (-1, width)))
    out, read = xp.zeros((queries, width), dtype=q.dtype), xp.zeros(queries, dtype=xp.int64)
    found, ranks = candidate_runs(flat, query_codes, key_codes, window, max_bucket)
    starts, stops = (xp.stack([getattr(one, edge) for one in found]) for edge in ("start", "stop"))
    places = xp.stack(ranks)
    columns = columns_for(width, q.dtype)
    copies = max(1, parts(width, columns))  # one for each part of a value
    top, total = xp.full((copies, queries), -xp.inf, dtype=q.dtype), xp.zeros((copies, queries), dtype=q.dtype)
    for table, one in enumerate(found):
        at = xp.argsort(one.start * (keys + 1) + one.stop)
        run(
            "bucket_attention.cu", "attend_buckets", rows, (parts(queries, QUERIES), parts(width, columns)),
            TILE_THREADS, rows, k, v, at, *contiguous(one.order), starts, stops, places, out, top, total, read,
            np.int64(queries), np.int64(keys), table, dim, width, float(scale),
            template=(columns,), shared=tile_bytes(dim, columns, q.dtype) + 8 * (KEYS + 1) + 4 * QUERIES,
        )  # fmt: skip
    return settled(flat, rows, k, v, scale, (top[0], total[0], out, read), query_codes, key_codes)
