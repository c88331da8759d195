"""The treecode on CUDA: launchers of build_tree.cu and tree_attention.cu.

Letters: F groups of g queries, M candidate nodes of a level, d and e the widths of keys and values.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from opoch_xp.backends.cupy.launch import (
    HALVES,
    KEYS,
    LANES,
    QUERIES,
    SLAB,
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
from opoch_xp.backends.cupy.split import principal_order, query_groups
from opoch_xp.backends.generic.tree import finite_rows
from opoch_xp.methods import Treecode
from opoch_xp.treecode.plan import LevelPlan, group_count, level_plan
from opoch_xp.treecode.tree import Lists, Part, Tree

__all__ = ["build_tree", "query_groups", "tree_attention"]

Array = Any
BUILD, ATTEND = "build_tree.cu", "tree_attention.cu"
THREADS = 256  # of kernels without a tile
ELEMENTS = 1 << 25  # log masses held at a time, and as many of what nodes may hold: 256 MB in float32
LAW = 6  # numbers of a Law in law.cuh


@on_device
def build_tree(
    k: Array, v: Array, axes: Any, method: Treecode, *, mask: Array | None = None, order: Array | None = None,
    stretch: Array | None = None,
) -> Tree:  # fmt: skip
    """See opoch_xp.backends.generic.tree.build_tree."""
    xp = array_namespace(k)
    chunks, size, dim = k.shape
    width = v.shape[2]
    if k.dtype.name in HALVES:
        tree = build_tree(*widened(k, v), axes, method, mask=mask, order=order, stretch=stretch)
        return replace(tree, cells=xp.astype(tree.cells, k.dtype)) if tensor_cores(k, dim, width) else tree
    k, v, mask = contiguous(k, v, mask)
    if order is None:
        order = principal_order(k, axes, method.iterations, mask, stretch)
    (order,) = contiguous(order)
    cells = xp.empty((chunks, size, dim + width), dtype=k.dtype)
    run(
        BUILD, "gather_cells", k, (parts(cells.size, THREADS),), THREADS,
        k, v, order, cells, np.int64(chunks * size), np.int64(size), dim, width,
    )  # fmt: skip
    kept = None if mask is None else xp.take_along_axis(mask, order, axis=1)
    levels = level_plan(size, method).nodes
    counts = None if kept is None else [_sums(xp, xp.astype(kept, k.dtype), nodes) for nodes in levels]
    below, weight, summaries = cells, None if kept is None else xp.astype(kept, k.dtype), []
    for level, nodes in enumerate(levels):
        summary = xp.empty((chunks, nodes, 2 * dim + width), dtype=k.dtype)
        run(
            BUILD, "summarise", k, (parts(chunks * nodes * (dim + width), THREADS),), THREADS,
            below, weight, summary, np.int64(chunks * nodes), below.shape[1] // nodes, below.shape[2], dim, width,
        )  # fmt: skip
        summaries.append(summary)
        below, weight = summary, None if counts is None else counts[level]
    sizes = tuple(size // nodes for nodes in levels)
    return Tree(cells, order, tuple(summaries), sizes, None if counts is None else tuple(counts), kept, dim)


def _sums(xp: Any, weight: Array, nodes: int) -> Array:
    """Kept keys (chunks, nodes) of weight (chunks, keys)."""
    return xp.sum(xp.reshape(weight, (weight.shape[0], nodes, -1)), axis=2)


@on_device
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
    lists: Lists | None = None,
) -> Part:
    """See opoch_xp.backends.generic.tree.tree_attention. Where nothing bounds what is opened, the most nodes that a
    group of a batch opens are read back once a level."""
    xp = array_namespace(queries)
    tasks, n, _ = queries.shape
    (queries,) = widened(queries)
    finite = finite_rows(queries)
    (queries,) = contiguous(xp.where(finite[..., None], queries, xp.asarray(0, dtype=queries.dtype)))
    plan, total = level_plan(tree.cells.shape[1], method), group_count(n, method.group)
    walk = Walk.of(queries, seen, tree, method, plan, float(scale))
    base = xp.arange(tasks, dtype=xp.int64)[:, None] * n
    index = xp.reshape(xp.where(groups < n, groups + base, -1), (tasks * total, groups.shape[1] // total))
    votes = xp.take(xp.reshape(finite, (-1,)), xp.where(index < 0, 0, index)) & (index >= 0)
    first, count = (np.asarray(x, dtype=np.int64).repeat(total) for x in (first, count))
    widest = int(count.max(initial=0))
    threshold = np.asarray([plan.threshold(chunks, method.rtol) for chunks in range(widest + 1)])[count]
    read = xp.zeros((tasks * total, 3), dtype=queries.dtype)
    index, votes = contiguous(index, votes)
    work = Work(index, votes, xp.asarray(threshold, dtype=queries.dtype), read)
    if widest:
        chunks = xp.asarray(first[:, None] + np.arange(widest))
        given = None if lists is None else Given.of(xp, lists, plan, xp.asarray(first)[:, None])
        walk.level(plan.depth, work, Opened(chunks, xp.asarray(count.astype(np.int32)), widest), given)
    out, lse = walk.finished(xp, (tasks, n))
    out, lse = xp.where(finite[..., None], out, xp.nan), xp.where(finite, lse, xp.nan)
    return Part(out, lse, xp.sum(xp.reshape(read, (tasks, total, 3)), axis=1))


@dataclass(frozen=True)
class Work:
    """Queries in groups: index (F, g) flat rows or -1, votes (F, g), threshold (F,) as `LevelPlan.threshold`, and what
    is read (F, 3), added to."""

    index: Array
    votes: Array
    threshold: Array
    read: Array

    def of(self, some: slice) -> "Work":
        return Work(self.index[some], self.votes[some], self.threshold[some], self.read[some])


@dataclass(frozen=True)
class Opened:
    """Nodes that groups open of a level, `width` at the most: rows (F, C) of its summaries, amount (F,) of them."""

    rows: Array
    amount: Array
    width: int

    def of(self, some: slice) -> "Opened":
        return Opened(self.rows[some], self.amount[some], self.width)


@dataclass(frozen=True)
class Given:
    """Lists in rows of the summaries: the nodes of each level, finest first, (F, G), -1 for none; reads (F, g, G)."""

    nodes: tuple[Array, ...]
    reads: Array

    @staticmethod
    def of(xp: Any, lists: Lists, plan: LevelPlan, first: Array) -> "Given":
        levels = zip((lists.cells, *reversed(lists.opened)), plan.nodes, strict=True)
        nodes = [xp.where(a < 0, -1, a + first * per_chunk) for a, per_chunk in levels]
        return Given(tuple(contiguous(*nodes)), *contiguous(lists.reads))

    def of_groups(self, some: slice) -> "Given":
        return Given(tuple(a[some] for a in self.nodes), self.reads[some])


@dataclass(frozen=True)
class Walk:
    """One call: queries (T, n, d), also as the cells are stored, what they read before, seen (T * n,), the trees, and
    the state of the softmax: tops and totals (parts of a value, T * n), out (T * n, e)."""

    queries: Array
    stored: Array
    seen: Array
    tree: Tree
    method: Treecode
    plan: LevelPlan
    scale: float
    columns: int
    tops: Array
    totals: Array
    out: Array

    @staticmethod
    def of(queries: Array, seen: Array, tree: Tree, method: Treecode, plan: LevelPlan, scale: float) -> "Walk":
        xp, kind = array_namespace(queries), queries.dtype
        rows, width = queries.shape[0] * queries.shape[1], tree.cells.shape[2] - tree.dim
        stored = xp.astype(queries, tree.cells.dtype, copy=False)
        columns = columns_for(width, stored.dtype)
        copies = max(1, parts(width, columns))
        (seen,) = contiguous(xp.reshape(xp.astype(seen, kind, copy=False), (-1,)))
        state = xp.full((copies, rows), -xp.inf, dtype=kind), xp.zeros((copies, rows), dtype=kind)
        out = xp.zeros((rows, width), dtype=kind)
        return Walk(queries, stored, seen, tree, method, plan, scale, columns, *state, out)

    def level(self, number: int, work: Work, above: Opened, given: Given | None) -> None:
        """The level `number` and all below it, for groups that opened `above`, some groups at a time: masses of one
        level are held, of all groups that ELEMENTS allows."""
        each = self.plan.nodes[number] if number == self.plan.depth else self.plan.children(number + 1)
        groups, g = work.index.shape
        step = max(1, ELEMENTS // (g * above.width * each))
        for start in range(0, groups, step):
            some = slice(start, min(start + step, groups))
            batch, listed = work.of(some), None if given is None else given.of_groups(some)
            opened = self.opened(number, batch, above.of(some), each, listed)
            if number and opened.width:
                self.level(number - 1, batch, opened, listed)

    def opened(self, number: int, work: Work, above: Opened, each: int, given: Given | None) -> Opened:
        """What groups open of a level; the rest of it is taken into the state, and of the cells what is read."""
        q, xp = self.queries, array_namespace(self.queries)
        (groups, g), dim, width, most = work.index.shape, q.shape[2], self.out.shape[1], self.method.most or 0
        wide, stride = above.width * each, above.rows.shape[1]
        counts = None if self.tree.counts is None else self.tree.counts[number]
        rows, counts = contiguous(self.tree.summaries[number], counts)
        node, opened = xp.empty((groups, wide), dtype=xp.int64), xp.empty((groups, wide), dtype=xp.int64)
        mass, may = xp.empty((groups, g, wide), dtype=q.dtype), xp.empty((groups, g, wide), dtype=q.dtype)
        shared = 8 * (QUERIES + 2 * KEYS) + q.dtype.itemsize * (LAW * KEYS + dim * QUERIES + SLAB * (KEYS + 1))
        run(
            ATTEND, "node_masses", q, (groups, parts(wide, KEYS), parts(g, QUERIES)), TILE_THREADS,
            q, work.index, rows, counts, above.rows, above.amount, node, mass, may, g, wide, stride, each,
            self.tree.sizes[number], dim, width, self.scale, shared=shared,
        )  # fmt: skip
        nodes = None if given is None else given.nodes[number]
        listed = 0 if nodes is None else nodes.shape[1]
        reads = None if given is None or number else given.reads
        amount, whole = xp.empty(groups, dtype=xp.int32), xp.empty((groups, g), dtype=q.dtype)
        share = xp.empty((groups, wide), dtype=q.dtype)
        run(
            ATTEND, "pick_nodes", q, (groups,), THREADS,
            work.index, work.votes, self.seen, self.tops, self.totals, work.threshold, above.amount, node, may, mass,
            nodes, reads, whole, share, opened, amount, work.read, g, wide, listed, each, self.plan.forced[number],
            most, 0 if number else self.tree.leaf, shared=4 * THREADS // LANES,
        )  # fmt: skip
        cells, kept = (None, None) if number else contiguous(self.tree.cells, self.tree.kept)
        run(
            ATTEND, "attend_lists", self.stored, (groups, parts(g, QUERIES), self.tops.shape[0]), TILE_THREADS,
            self.stored, work.index, above.amount, rows, node, mass, cells, kept, opened, amount, self.out, self.tops,
            self.totals, np.int64(self.tops.shape[1]), g, wide, each, self.tree.leaf, dim, width, self.scale,
            template=(self.columns,), shared=tile_bytes(dim, self.columns, self.stored.dtype),
        )  # fmt: skip
        if number == 0:
            return Opened(opened, amount, 0)
        if given is not None or most:
            return Opened(opened, amount, min(wide, most if given is None else listed))
        return Opened(opened, amount, int(xp.max(amount)))  # read back: it sizes the next level

    def finished(self, xp: Any, lead: tuple[int, int]) -> tuple[Array, Array]:
        """out (T, n, e) and lse (T, n); zeros and -inf for a query that saw nothing."""
        total = self.totals[0]
        some = total != 0
        safe = xp.where(some, total, xp.asarray(1, dtype=total.dtype))
        lse = xp.where(some, self.tops[0] + xp.log(safe), -xp.inf)
        return xp.reshape(self.out / safe[:, None], (*lead, self.out.shape[1])), xp.reshape(lse, lead)
