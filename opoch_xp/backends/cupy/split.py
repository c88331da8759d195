"""Median splits by principal axes on CUDA: launchers of build_tree.cu."""

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from opoch_xp.backends.cupy.launch import LANES, contiguous, on_device, parts, run, widened
from opoch_xp.methods import Treecode
from opoch_xp.tree import group_count, splits

Array = Any
FILE = "build_tree.cu"
SPLIT_ROWS = 2048  # rows of a node that one block finishes
SPLIT_THREADS, SAMPLE = 256, 128  # as in build_tree.cu


def principal_order(x: Array, axes: Any, iterations: int, kept: Array | None) -> Array:
    """See opoch_xp.backends.generic.tree.principal_order. An axis is found from a sample of a node's rows; while nodes
    are larger than SPLIT_ROWS they are split level by level, each halved by the array library's stable sort."""
    xp = array_namespace(x)
    x, kept = contiguous(x, kept)
    tasks, n, dim = x.shape
    order = xp.ascontiguousarray(xp.broadcast_to(xp.arange(n, dtype=xp.int64), (tasks, n)))
    starts = xp.asarray(np.ascontiguousarray(axes, dtype=x.dtype))
    level, sample = 0, (2 * dim + 2 * SAMPLE) * x.dtype.itemsize
    while level < len(axes) and n >> level > SPLIT_ROWS:
        nodes = 1 << level
        normals, projections = xp.empty((tasks * nodes, dim), dtype=x.dtype), xp.empty((tasks, n), dtype=x.dtype)
        run(
            FILE, "node_axes", x, (tasks * nodes,), SPLIT_THREADS,
            x, kept, order, starts[level], normals, np.int64(n), np.int64(nodes), dim, iterations, shared=sample,
        )  # fmt: skip
        run(
            FILE, "project", x, (parts(tasks * n * LANES, SPLIT_THREADS),), SPLIT_THREADS,
            x, kept, order, normals, projections, np.int64(tasks * n), np.int64(n), np.int64(nodes), dim,
        )  # fmt: skip
        rank = xp.argsort(xp.reshape(projections, (tasks * nodes, -1)), axis=1, stable=True)
        order = xp.reshape(xp.take_along_axis(xp.reshape(order, rank.shape), rank, axis=1), (tasks, n))
        level += 1
    if level < len(axes):
        nodes, size = 1 << level, n >> level
        (order,) = contiguous(order)
        run(
            FILE, "split_nodes", x, (tasks * nodes,), SPLIT_THREADS,
            x, kept, order, starts[level:], np.int64(n), np.int64(nodes), size, dim, len(axes) - level, iterations,
            shared=16 * size + SPLIT_THREADS // LANES * sample,
        )  # fmt: skip
    return order


@on_device
def query_groups(queries: Array, axes: Any, method: Treecode) -> Array:
    """See opoch_xp.backends.generic.tree.query_groups."""
    xp = array_namespace(queries)
    tasks, n, dim = queries.shape
    total = group_count(n, method.group)
    size = n if total == 1 else method.group
    padded = size << splits(n, size)
    if size == 1:  # nothing is shared: any order will do
        return xp.broadcast_to(xp.arange(n, dtype=xp.int64), (tasks, n))
    queries = finite_rows(*widened(queries))[0]
    if padded == n:
        return principal_order(queries, axes, method.iterations, None)
    rows = xp.concat([queries, xp.zeros((tasks, padded - n, dim), dtype=queries.dtype)], axis=1)
    kept = xp.broadcast_to(xp.arange(padded) < n, (tasks, padded))
    return principal_order(rows, axes, method.iterations, kept)[:, : total * size]


def finite_rows(queries: Array) -> tuple[Array, Array]:
    """queries (T, n, d) with rows that are not finite zeroed, and which are finite (T, n)."""
    xp = array_namespace(queries)
    finite = xp.isfinite(xp.sum(queries * 0.0, axis=-1))
    return xp.where(finite[..., None], queries, xp.asarray(0, dtype=queries.dtype)), finite
