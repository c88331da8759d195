"""The treecode's kernels on a host: summaries, and the launch of `attend`. Arrays are NumPy's; `workers` threads."""

from itertools import accumulate
from math import log
from typing import Any

import numpy as np

from opoch_xp.backends.compiled.attend import attend_groups
from opoch_xp.backends.compiled.plain import plain
from opoch_xp.backends.compiled.split import principal_order
from opoch_xp.backends.compiled.vector import compiled
from opoch_xp.methods import Treecode
from opoch_xp.threads import share
from opoch_xp.tree import Lists, Tree, group_count, level_nodes, splits

Array = Any

KEYS = 1 << 13  # summarised by a task
QUERIES = 1 << 10  # attended by a task: some ms
NONE, NONE_KEPT = np.zeros(0), np.zeros(0, bool)


def build_tree(
    k: Array, v: Array, axes: Any, method: Treecode, *, mask: Array | None, order: Array | None, workers: int
) -> Tree:
    """See opoch_xp.backends.generic.tree.build_tree."""
    chunks, size, dim = k.shape
    if order is None:
        order = principal_order(k, axes, method.iterations, mask, workers)
    levels = level_nodes(size, method)
    cells = np.empty((chunks, size, dim + v.shape[2]), k.dtype)
    summaries = tuple(np.empty((chunks, nodes, 2 * dim + v.shape[2]), k.dtype) for nodes in levels)
    kept = None if mask is None else np.take_along_axis(mask, order, axis=1)
    counts = None
    if kept is not None:
        counts = tuple(kept.reshape(chunks, nodes, -1).sum(2).astype(k.dtype) for nodes in levels)
    flat, order = (plain(k).reshape(chunks * size, dim), plain(v).reshape(chunks * size, v.shape[2])), plain(order)
    together = max(1, KEYS // size)

    def work(low: int) -> None:
        high = min(low + together, chunks)
        gather_cells(*flat, order[low:high], low * size, cells[low:high])
        below: Array = cells[low:high]
        weight = np.ones((high - low, size), k.dtype) if kept is None else kept[low:high].astype(k.dtype)
        for level, summary in enumerate(summaries):
            summarise(below, weight, dim, level > 0, summary[low:high])
            below = summary[low:high]
            weight = np.ones(below.shape[:2], k.dtype) if counts is None else counts[level][low:high]

    share(work, range(0, chunks, together), workers)
    return Tree(cells, order, summaries, tuple(size // nodes for nodes in levels), counts, kept, dim)


@compiled
def gather_cells(k: Array, v: Array, order: Array, base: int, cells: Array) -> None:
    """cells[c, i] = key and value of row base + c * size + order[c, i]."""
    chunks, size = order.shape
    dim, width = k.shape[1], v.shape[1]
    for c in range(chunks):
        for i in range(size):
            row = base + c * size + order[c, i]
            key, value = cells[c, i, :dim], cells[c, i, dim:]
            for x in range(dim):
                key[x] = k[row, x]
            for x in range(width):
                value[x] = v[row, x]


@compiled
def summarise(below: Array, weight: Array, dim: int, spread: bool, out: Array) -> None:
    """Mean, variance and mean value of children, `weight` (chunks, children) keys each, into out (chunks, nodes, ...).

    below (chunks, children, d + e), or (chunks, children, 2 d + e) where `spread`: with variances of their own.
    """
    chunks, nodes, width = out.shape
    children = below.shape[1] // nodes
    values = 2 * dim if spread else dim
    one = out.dtype.type(1)
    for c in range(chunks):
        for node in range(nodes):
            mean, var, value = out[c, node, :dim], out[c, node, dim : 2 * dim], out[c, node, 2 * dim :]
            first = node * children
            total = weight[c, first]
            for i in range(first + 1, first + children):
                total += weight[c, i]
            share_of = one / total if total > 0 else one
            out[c, node] = 0
            for i in range(first, first + children):
                part, key, more = weight[c, i] * share_of, below[c, i, :dim], below[c, i, values:]
                for x in range(dim):
                    mean[x] += part * key[x]
                for x in range(width - 2 * dim):
                    value[x] += part * more[x]
            for i in range(first, first + children):
                part, key, within = weight[c, i] * share_of, below[c, i, :dim], below[c, i, dim : 2 * dim]
                for x in range(dim):
                    difference = key[x] - mean[x]
                    var[x] += part * (difference * difference)
                if spread:
                    for x in range(dim):
                        var[x] += part * within[x]


def query_groups(queries: Array, axes: Any, method: Treecode, workers: int) -> Array:
    """See opoch_xp.backends.generic.tree.query_groups."""
    tasks, n, dim = queries.shape
    total = group_count(n, method.group)
    size = n if total == 1 else method.group
    padded = size << splits(n, size)
    if size == 1:  # nothing is shared: any order will do
        return np.broadcast_to(np.arange(n), (tasks, n))
    queries, _ = finite_rows(queries)
    if padded == n:
        return principal_order(queries, axes, method.iterations, None, workers)
    rows = np.zeros((tasks, padded, dim), queries.dtype)
    rows[:, :n] = queries
    kept = np.broadcast_to(np.arange(padded) < n, (tasks, padded))
    order = principal_order(rows, axes, method.iterations, kept, workers)[:, : total * size]
    order[:, -size:].sort(1)  # padding last: its numbers are the largest
    return order


def finite_rows(queries: Array) -> tuple[Array, Array | None]:
    """queries (T, n, d) with rows that are not finite zeroed, and which are finite (T, n); None: all."""
    if np.isfinite(queries.sum()):
        return queries, None
    with np.errstate(invalid="ignore"):
        finite = np.isfinite((queries * 0).sum(-1))
    return np.where(finite[..., None], queries, 0), finite


def tree_attention(
    queries: Array,
    tree: Tree,
    first: np.ndarray,
    count: np.ndarray,
    axes: Any,
    method: Treecode,
    *,
    scale: float,
    groups: Array | None,
    lists: Lists | None,
    workers: int,
) -> tuple[Array, Array]:
    """See opoch_xp.backends.generic.tree.tree_attention."""
    tasks, n, _ = queries.shape
    out, lse, *_ = _attend(queries, tree, first, count, axes, method, scale, groups, lists, workers)
    return out.reshape(tasks, n, -1), lse.reshape(tasks, n)


def tree_lists(
    queries: Array,
    tree: Tree,
    first: np.ndarray,
    count: np.ndarray,
    axes: Any,
    method: Treecode,
    *,
    scale: float,
    groups: Array,
    workers: int,
) -> Lists:
    """What `tree_attention` opens for the groups given; -1 where a group opens fewer nodes than another."""
    _, _, opened, widths, own = _attend(queries, tree, first, count, axes, method, scale, groups, None, workers)
    return Lists(tuple(np.split(opened, list(accumulate(widths))[:-1], axis=1)), own)


def _attend(
    queries: Array, tree: Tree, first: Any, count: Any, axes: Any, method: Treecode, scale: float,
    groups: Array | None, lists: Lists | None, workers: int,
) -> tuple[Array, Array, Array, list[int], Array]:  # fmt: skip
    """out (T * n, e), lse (T * n,); the nodes that every group opened, so many of each level, and the own cells."""
    tasks, n, dim = queries.shape
    kind, width = queries.dtype, tree.cells.shape[2] - tree.dim
    out, lse = np.zeros((tasks * n, width), kind), np.full(tasks * n, -np.inf, kind)
    queries, finite = finite_rows(queries)
    first, count = (np.asarray(x, np.int64) for x in (first, count))
    total = group_count(n, method.group)
    if total == 1 and groups is None:  # of one group any order will do
        index, held = np.arange(tasks * n).reshape(tasks, n), np.full(tasks, n)
    else:
        groups = query_groups(queries, axes, method, workers) if groups is None else groups
        size = groups.shape[1] // total
        index = (groups.reshape(tasks, total, size) + np.arange(0, tasks * n, n)[:, None, None]).reshape(-1, size)
        held = np.tile(np.minimum(size, n - np.arange(total) * size), tasks)  # padding comes last
        first, count = first.repeat(total), count.repeat(total)
    size = index.shape[1]
    coarse = [plain(a) for a in tree.summaries[::-1]]
    addresses = np.array([a.ctypes.data for a in coarse])  # nothing is copied: a cache may hold more than is read
    nodes = [a.shape[1] for a in coarse]
    none = NONE.astype(kind)
    counts = none if tree.counts is None else np.concatenate([a.reshape(-1) for a in tree.counts[::-1]])
    widths, own = _widths(nodes, int(count.max(initial=0)), method)
    if lists is None:
        opened, own_list = np.full((len(index), sum(widths)), -1), np.full((len(index), size, own), -1)
    else:
        opened = np.concatenate([np.asarray(a) for a in lists.opened], axis=1)
        widths, own, own_list = [a.shape[1] for a in lists.opened], lists.own.shape[2], lists.own
    cells = plain(tree.cells).reshape(-1, tree.cells.shape[2])
    kept = NONE_KEPT if tree.kept is None else plain(tree.kept).reshape(-1)
    alive = NONE_KEPT if finite is None else plain(finite).reshape(-1)
    flat = plain(queries).reshape(-1, dim)
    heavy = np.flatnonzero(count)
    if len(heavy) > 1:
        heavy = heavy[np.argsort(-count[heavy], kind="stable")]  # the longest first
    index, held, first, count = (np.ascontiguousarray(x[heavy]) for x in (index, held, first, count))
    chosen, chosen_own = np.ascontiguousarray(opened[heavy]), np.ascontiguousarray(own_list[heavy])
    logs = np.array([log(number) for number in tree.sizes[::-1]], kind)
    levels, wide = np.array(nodes), np.array(widths)
    step = max(1, QUERIES // size)

    def work(low: int) -> None:
        attend_groups(
            flat, alive, index, held, first, count, low, min(low + step, len(index)), addresses, counts,
            len(tree.cells), levels, logs, cells, kept, tree.leaf, dim, wide, own, kind.type(scale),
            lists is not None, chosen, chosen_own, out, lse,
        )  # fmt: skip

    share(work, range(0, len(index), step), workers)
    if lists is None:
        opened[heavy], own_list[heavy] = chosen, chosen_own
    if finite is not None:
        out[~alive], lse[~alive] = np.nan, np.nan
    return out, lse, opened, widths, own_list


def _widths(nodes: list[int], chunks: int, method: Treecode) -> tuple[list[int], int]:
    """How many nodes of each level, coarsest first, a group opens of so many chunks, and the own cells of a query."""
    widths, candidates = [], chunks * nodes[0]
    for level in range(len(nodes)):
        last = level + 1 == len(nodes)
        widths.append(min(method.near if last else method.open, candidates))
        if not last:
            candidates = widths[-1] * (nodes[level + 1] // nodes[level])
    return widths, max(0, min(method.own, candidates - widths[-1]))
