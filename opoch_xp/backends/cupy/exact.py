"""Exact attention and the merging of parts on CUDA: launchers of exact_attention.cu."""

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from opoch_xp.backends.cupy.launch import (
    LANES,
    QUERIES,
    TILE_THREADS,
    columns_for,
    contiguous,
    on_device,
    parts,
    run,
    tensor_cores,
    tile_bytes,
    widened,
)
from opoch_xp.problem import sum_dtype

Array = Any
FILE = "exact_attention.cu"
MERGE_THREADS = 256


@on_device
def exact_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    scale: float,
    mask: Array | None = None,
    positions: np.ndarray | None = None,
) -> tuple[Array, Array]:
    """See opoch_xp.backends.generic.exact.exact_attention."""
    xp = array_namespace(q)
    batch, repeat, n_q, dim = q.shape
    n_k, width = k.shape[1], v.shape[2]
    if not tensor_cores(q, dim, width):
        q, k, v = widened(q, k, v)
    q, k, v, mask = contiguous(q, k, v, mask)
    kind = sum_dtype(xp, q.dtype)
    last = None if positions is None or not causal else xp.asarray(np.asarray(positions, dtype=np.int64))
    out, lse = xp.empty((batch, repeat, n_q, width), dtype=kind), xp.empty((batch, repeat, n_q), dtype=kind)
    columns = columns_for(width, q.dtype)
    run(
        FILE, "exact_attention", q, (parts(n_q, QUERIES) * batch * repeat, parts(width, columns)), TILE_THREADS,
        q, k, v, mask, last, out, lse, np.int64(repeat), np.int64(n_q), np.int64(n_k), dim, width, float(scale),
        int(causal), template=(columns,), shared=tile_bytes(dim, columns, q.dtype),
    )  # fmt: skip
    return out, lse


@on_device
def merge_part(out: Array, lse: Array, part: Array, part_lse: Array, start: int) -> tuple[Array, Array]:
    """See opoch_xp.backends.generic.exact.merge_part; out and lse are changed in place and returned."""
    out, lse, part, part_lse = contiguous(out, lse, part, part_lse)
    heads, n_q, rows = out.shape[0] * out.shape[1], out.shape[2], part.shape[2]
    grid = (parts(heads * rows * LANES, MERGE_THREADS),)
    sizes = (np.int64(x) for x in (heads, n_q, rows, start))
    run(FILE, "merge_part", out, grid, MERGE_THREADS, out, lse, part, part_lse, *sizes, out.shape[3])
    return out, lse
