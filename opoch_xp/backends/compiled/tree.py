"""The treecode's kernels on a host: summaries, and the launch of `attend`. Arrays are NumPy's; `workers` threads."""

from functools import partial
from typing import Any

import numpy as np

from opoch_xp.backends.compiled.attend import attend_groups
from opoch_xp.backends.compiled.plain import plain
from opoch_xp.backends.compiled.split import principal_order
from opoch_xp.backends.compiled.vector import compiled
from opoch_xp.backends.generic.tree import Group, grouped_rows, largest
from opoch_xp.backends.generic.tree import attend_groups as attend_groups_plainly
from opoch_xp.methods import Treecode
from opoch_xp.threads import share
from opoch_xp.treecode.plan import group_count, level_plan
from opoch_xp.treecode.tree import Lists, Part, Tree

Array = Any

KEYS = 1 << 13  # summarised by a task
QUERIES = 1 << 10  # attended by a task: some ms
NONE_KEPT = np.zeros(0, bool)
NO_LIST, NO_READS = np.zeros((0, 0), np.int64), np.zeros((0, 0, 0), bool)


def build_tree(
    k: Array, v: Array, axes: Any, method: Treecode, *, mask: Array | None, order: Array | None,
    stretch: Array | None, workers: int,
) -> Tree:  # fmt: skip
    """See opoch_xp.backends.generic.tree.build_tree."""
    chunks, size, dim = k.shape
    if order is None:
        order = principal_order(k, axes, method.iterations, mask, stretch, workers=workers)
    levels = level_plan(size, method).nodes
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


def query_groups(queries: Array, axes: Any, method: Treecode, *, stretch: Array | None, workers: int) -> Array:
    """See opoch_xp.backends.generic.tree.query_groups."""
    return grouped_rows(queries, axes, method, stretch, partial(principal_order, workers=workers))


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
    groups: Array,
    method: Treecode,
    *,
    scale: float,
    seen: Array,
    lists: Lists | None,
    workers: int,
) -> Part:
    """See opoch_xp.backends.generic.tree.tree_attention."""
    tasks, n, dim = queries.shape
    kind, width, plan = queries.dtype, tree.cells.shape[2] - tree.dim, level_plan(tree.cells.shape[1], method)
    out, lse = np.zeros((tasks * n, width), kind), np.full(tasks * n, -np.inf, kind)
    queries, finite = finite_rows(queries)
    first, count = (np.asarray(x, np.int64) for x in (first, count))
    total = group_count(n, method.group)
    size = groups.shape[1] // total
    index = (groups.reshape(tasks, total, size) + np.arange(0, tasks * n, n)[:, None, None]).reshape(-1, size)
    held = np.tile(np.minimum(size, n - np.arange(total) * size), tasks)  # padding comes last
    task = np.arange(tasks).repeat(total)
    first, count = first.repeat(total), count.repeat(total)
    coarse = [plain(a) for a in tree.summaries[::-1]]
    numbers = [] if tree.counts is None else [plain(a) for a in tree.counts[::-1]]
    addresses = np.array([a.ctypes.data for a in coarse])  # nothing is copied: a cache may hold more than is read
    counts = np.array([a.ctypes.data for a in numbers], np.int64)
    cells = plain(tree.cells).reshape(-1, tree.cells.shape[2])
    kept = NONE_KEPT if tree.kept is None else plain(tree.kept).reshape(-1)
    alive = NONE_KEPT if finite is None else plain(finite).reshape(-1)
    flat, before = plain(queries).reshape(-1, dim), plain(seen).reshape(-1)
    heavy = np.flatnonzero(count)
    if len(heavy) > 1:
        heavy = heavy[np.argsort(-count[heavy], kind="stable")]  # the longest first
    index, held, first, count = (np.ascontiguousarray(x[heavy]) for x in (index, held, first, count))
    read = np.zeros((len(heavy), 4))
    opened, cell_list, reads, widths = NO_LIST, NO_LIST, NO_READS, [0] * plan.depth
    if lists is not None:
        widths = [a.shape[1] for a in lists.opened]
        opened = np.concatenate([NO_LIST[:0].reshape(len(lists.cells), 0), *map(np.asarray, lists.opened)], axis=1)
        opened, cell_list, reads = (np.ascontiguousarray(x[heavy]) for x in (opened, lists.cells, lists.reads))
    static = [np.array(figures[::-1]) for figures in (plan.nodes, plan.sizes, plan.forced)]
    thresholds = np.array([plan.threshold(chunks, method.rtol) for chunks in range(int(count.max(initial=0)) + 1)], kind)
    step = max(1, QUERIES // size)

    def work(low: int) -> None:
        attend_groups(
            flat, alive, index, held, first, count, low, min(low + step, len(index)), addresses, counts,
            len(tree.cells), *static, thresholds, method.most or 0, cells, kept, tree.leaf, dim,
            kind.type(scale), before, lists is not None, opened, np.array(widths), cell_list, reads, out, lse, read,
        )  # fmt: skip

    share(work, range(0, len(index), step), workers)
    for f in np.flatnonzero(read[:, 3]).tolist():
        rows = index[f, : held[f]]
        given = None if lists is None else Lists(tuple(a[heavy[f : f + 1]] for a in lists.opened), cell_list[f : f + 1], reads[f : f + 1, : held[f]])
        voters = np.ones((1, len(rows)), bool) if finite is None else alive[None, rows]
        group = Group(flat[None, rows], before[None, rows], voters, first[f : f + 1], count[f : f + 1], int(count[f]))
        with np.errstate(all="ignore"):
            found = attend_groups_plainly(group, tree, method, scale, given, largest)
        out[rows], lse[rows] = found[0][0], found[1][0]
    if finite is not None:
        out[~alive], lse[~alive] = np.nan, np.nan
    spent = np.zeros((tasks, 3), kind)
    np.add.at(spent, task[heavy], read[:, :3])
    return Part(out.reshape(tasks, n, width), lse.reshape(tasks, n), spent)
