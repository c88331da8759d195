"""Median splits by principal axes on CUDA: launchers of build_tree.cu."""

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from opoch_xp.backends.cupy.launch import LANES, contiguous, on_device, parts, run, widened
from opoch_xp.backends.generic.tree import grouped_rows
from opoch_xp.methods import Treecode

Array = Any
FILE = "build_tree.cu"
SPLIT_ROWS = 2048  # rows of a node that one block finishes
SPLIT_THREADS, SAMPLE = 256, 128  # as in build_tree.cu


def principal_order(x: Array, axes: Any, iterations: int, kept: Array | None, stretch: Array | None = None) -> Array:
    """See opoch_xp.backends.generic.tree.principal_order. An axis is found from a sample of a node's rows; while nodes
    are larger than SPLIT_ROWS they are split level by level, each halved by the array library's stable sort."""
    xp = array_namespace(x)
    stretch = None if stretch is None else xp.astype(stretch, x.dtype, copy=False)
    x, kept, stretch = contiguous(x, kept, stretch)
    tasks, n, dim = x.shape
    order = xp.ascontiguousarray(xp.broadcast_to(xp.arange(n, dtype=xp.int64), (tasks, n)))
    starts = xp.asarray(np.ascontiguousarray(axes, dtype=x.dtype))
    level, sample = 0, (2 * dim + 2 * SAMPLE) * x.dtype.itemsize
    while level < len(axes) and n >> level > SPLIT_ROWS:
        nodes = 1 << level
        normals, projections = xp.empty((tasks * nodes, dim), dtype=x.dtype), xp.empty((tasks, n), dtype=x.dtype)
        run(
            FILE, "node_axes", x, (tasks * nodes,), SPLIT_THREADS,
            x, kept, order, starts[level], stretch, normals, np.int64(n), np.int64(nodes), dim, iterations,
            shared=sample,
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
            x, kept, order, starts[level:], stretch, np.int64(n), np.int64(nodes), size, dim, len(axes) - level,
            iterations, shared=16 * size + SPLIT_THREADS // LANES * sample,
        )  # fmt: skip
    return order


@on_device
def query_groups(queries: Array, axes: Any, method: Treecode, *, stretch: Array | None = None) -> Array:
    """See opoch_xp.backends.generic.tree.query_groups."""
    (queries,) = widened(queries)
    return grouped_rows(queries, axes, method, stretch, principal_order)
