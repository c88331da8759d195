"""The treecode's kernels on a host: summaries, and the launch of `attend`. Arrays are NumPy's; `workers` threads."""

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Launch:
    """Groups of queries that have something to read, and the trees that they read, as the kernels take them.

    queries (N, d) of all tasks in turn, alive (N,) or empty: which are finite; seen (N,); index (groups, size), of
    which held (groups,) are there; first and count (groups,) of each group's run; number (groups,) of each group among
    those of all tasks. levels and counts: the addresses of the summaries and counts of each level, coarsest first.
    `kept_alive` holds what lies there.
    """

    queries: Array
    alive: Array
    seen: Array
    index: Array
    held: Array
    first: Array
    count: Array
    number: Array
    levels: Array
    counts: Array
    plan: tuple[Array, Array, Array, Array]
    cells: Array
    kept: Array
    kept_alive: tuple[Array, ...]

    @classmethod
    def of(
        cls, queries: Array, tree: Tree, first: Any, count: Any, groups: Array, method: Treecode, seen: Array
    ) -> "Launch":
        """Arguments of tree_attention."""
        tasks, n, dim = queries.shape
        kind, plan = queries.dtype, level_plan(tree.cells.shape[1], method)
        queries, finite = finite_rows(queries)
        total = group_count(n, method.group)
        size = groups.shape[1] // total
        index = (groups.reshape(tasks, total, size) + np.arange(0, tasks * n, n)[:, None, None]).reshape(-1, size)
        held = np.tile(np.minimum(size, n - np.arange(total) * size), tasks)  # padding comes last
        first, count = (np.asarray(x, np.int64).repeat(total) for x in (first, count))
        number = np.flatnonzero(count)
        if len(number) > 1:
            number = number[np.argsort(-count[number], kind="stable")]  # the longest first
        index, held, first, count = (np.ascontiguousarray(x[number]) for x in (index, held, first, count))
        most = int(count.max(initial=0))
        thresholds = np.array([plan.threshold(chunks, method.rtol) for chunks in range(most + 1)], kind)
        nodes, sizes, forced = (np.array(figures[::-1]) for figures in (plan.nodes, plan.sizes, plan.forced))
        levels, numbers = ([plain(a) for a in (arrays or ())[::-1]] for arrays in (tree.summaries, tree.counts))
        level_at, count_at = (np.array([a.ctypes.data for a in arrays], np.int64) for arrays in (levels, numbers))
        return cls(
            plain(queries).reshape(-1, dim), NONE_KEPT if finite is None else plain(finite).reshape(-1),
            plain(seen).reshape(-1), index, held, first, count, number, level_at, count_at,
            (nodes, sizes, forced, thresholds), plain(tree.cells).reshape(-1, tree.cells.shape[2]),
            NONE_KEPT if tree.kept is None else plain(tree.kept).reshape(-1), (*levels, *numbers),
        )  # fmt: skip

    def of_groups(self, some: Array | slice) -> tuple[Array, ...]:
        """Queries, and index, held, first and count of some of the groups."""
        return self.queries, self.alive, *(x[some] for x in (self.index, self.held, self.first, self.count))


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
    kind, width = queries.dtype, tree.cells.shape[2] - tree.dim
    launch = Launch.of(queries, tree, first, count, groups, method, seen)
    out, lse = np.zeros((tasks * n, width), kind), np.full(tasks * n, -np.inf, kind)
    read = np.zeros((len(launch.number), 4))
    opened, cells, reads, widths = NO_LIST, NO_LIST, NO_READS, [0]
    if lists is not None:
        widths = [a.shape[1] for a in lists.opened] or [0]
        opened = np.concatenate([np.empty((len(lists.cells), 0), np.int64), *map(np.asarray, lists.opened)], axis=1)
        opened, cells, reads = (np.ascontiguousarray(x[launch.number]) for x in (opened, lists.cells, lists.reads))
    step, all_of = max(1, QUERIES // launch.index.shape[1]), launch.of_groups(slice(None))

    def work(low: int) -> None:
        attend_groups(
            *all_of, low, min(low + step, len(read)), launch.levels, launch.counts, len(tree.cells), *launch.plan,
            method.most or 0, launch.cells, launch.kept, tree.leaf, dim, kind.type(scale), launch.seen,
            lists is not None, opened, np.array(widths), cells, reads, out, lse, read,
        )  # fmt: skip

    share(work, range(0, len(read), step), workers)
    for f in np.flatnonzero(read[:, 3]).tolist():
        _done_again(launch, f, tree, method, scale, lists, out, lse)
    if launch.alive.size:
        out[~launch.alive], lse[~launch.alive] = np.nan, np.nan
    spent = np.zeros((tasks, 3), kind)
    np.add.at(spent, launch.number // group_count(n, method.group), read[:, :3])
    return Part(out.reshape(tasks, n, width), lse.reshape(tasks, n), spent)


def _done_again(
    launch: Launch, f: int, tree: Tree, method: Treecode, scale: float, lists: Lists | None, out: Array, lse: Array
) -> None:
    """Group f by the generic kernel: see `attend.attend_groups`."""
    rows, number = launch.index[f, : launch.held[f]], launch.number[f : f + 1]
    given = None
    if lists is not None:
        given = Lists(tuple(a[number] for a in lists.opened), lists.cells[number], lists.reads[number, : len(rows)])
    voters = np.ones((1, len(rows)), bool) if not launch.alive.size else launch.alive[None, rows]
    run = launch.first[f : f + 1], launch.count[f : f + 1], int(launch.count[f])
    with np.errstate(all="ignore"):
        group = Group(launch.queries[None, rows], launch.seen[None, rows], voters, *run)
        found = attend_groups_plainly(group, tree, method, scale, given, largest)
    out[rows], lse[rows] = found[0][0], found[1][0]
