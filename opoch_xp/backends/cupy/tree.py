"""The treecode on CUDA: launchers of build_tree.cu and tree_attention.cu.

Letters: F groups of g queries, W candidate nodes of all levels side by side, d and e the widths of keys and values.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import log
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
from opoch_xp.backends.cupy.split import finite_rows, principal_order, query_groups
from opoch_xp.methods import Treecode
from opoch_xp.tree import Lists, Tree, group_count, level_nodes

__all__ = ["build_tree", "query_groups", "tree_attention"]

Array = Any
BUILD, ATTEND = "build_tree.cu", "tree_attention.cu"
THREADS = 256  # of kernels without a tile
ELEMENTS = 1 << 26  # log masses held at a time: 256 MB in float32


@on_device
def build_tree(
    k: Array, v: Array, axes: Any, method: Treecode, *, mask: Array | None = None, order: Array | None = None
) -> Tree:
    """See opoch_xp.backends.generic.tree.build_tree."""
    xp = array_namespace(k)
    chunks, size, dim = k.shape
    width = v.shape[2]
    if k.dtype.name in HALVES:
        tree = build_tree(*widened(k, v), axes, method, mask=mask, order=order)
        return replace(tree, cells=xp.astype(tree.cells, k.dtype)) if tensor_cores(k, dim, width) else tree
    k, v, mask = contiguous(k, v, mask)
    if order is None:
        order = principal_order(k, axes, method.iterations, mask)
    (order,) = contiguous(order)
    cells = xp.empty((chunks, size, dim + width), dtype=k.dtype)
    run(
        BUILD, "gather_cells", k, (parts(cells.size, THREADS),), THREADS,
        k, v, order, cells, np.int64(chunks * size), np.int64(size), dim, width,
    )  # fmt: skip
    kept = None if mask is None else xp.take_along_axis(mask, order, axis=1)
    levels = level_nodes(size, method)
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
    axes: Any,
    method: Treecode,
    *,
    scale: float,
    groups: Array | None = None,
    lists: Lists | None = None,
) -> tuple[Array, Array]:
    """See opoch_xp.backends.generic.tree.tree_attention."""
    xp = array_namespace(queries)
    tasks, n, dim = queries.shape
    width = tree.cells.shape[2] - dim
    (queries,) = widened(queries)
    out, lse = xp.zeros((tasks, n, width), dtype=queries.dtype), xp.full((tasks, n), -xp.inf, dtype=queries.dtype)
    first, count = np.asarray(first, dtype=np.int64), np.asarray(count, dtype=np.int64)
    if not out.size or not count.any():
        return out, lse
    if groups is None:
        groups = query_groups(queries, axes, method)
    queries, finite = finite_rows(queries)
    (queries,) = contiguous(queries)
    total = group_count(n, method.group)
    base = xp.arange(tasks, dtype=xp.int64)[:, None] * n
    index = xp.reshape(xp.where(groups < n, groups + base, -1), (tasks * total, -1))
    votes = xp.take(xp.reshape(finite, (-1,)), xp.where(index < 0, 0, index)) & (index >= 0)
    index, weight = contiguous(index, xp.astype(votes, queries.dtype))
    begin, chunks = (xp.asarray(np.repeat(x, total)) for x in (first, count))
    stored = xp.astype(queries, tree.cells.dtype, copy=False)
    work = Work(queries, stored, index, weight, begin, chunks, int(count.max()))
    forest = Forest.of(tree, method, work.widest)
    step = max(1, ELEMENTS // (index.shape[1] * forest.width))
    for start in range(0, tasks * total, step):
        some = slice(start, min(start + step, tasks * total))
        chosen = None if lists is None else Lists(tuple(a[some] for a in lists.opened), lists.own[some])
        _attend(work.of(some), tree, forest, method, float(scale), chosen, out, lse)
    spoiled = ~finite
    out[spoiled], lse[spoiled] = xp.nan, xp.nan
    return out, lse


@dataclass(frozen=True)
class Work:
    """Queries (T, n, d), also as the cells are stored, in groups: index (F, g) flat rows or -1, votes (F, g), first and
    count (F,) of each group's run, `widest` of the counts."""

    queries: Array
    stored: Array
    index: Array
    votes: Array
    first: Array
    count: Array
    widest: int

    def of(self, some: slice) -> "Work":
        index, votes, first, count = (x[some] for x in (self.index, self.votes, self.first, self.count))
        return Work(self.queries, self.stored, index, votes, first, count, self.widest)


@dataclass(frozen=True)
class Forest:
    """The nodes of all levels in one list: rows (R, 2 d + e) and logs (R,), ln of their keys. For each level, coarsest
    first: where it starts in the list, nodes of a chunk, children of a node of the level above, and the columns
    [low, high) of its candidates and the nodes opened, at the most."""

    rows: Array
    logs: Array
    levels: tuple[tuple[int, int, int, int, int, int], ...]
    width: int

    @staticmethod
    def of(tree: Tree, method: Treecode, widest: int) -> "Forest":
        xp = array_namespace(tree.cells)
        rows = xp.concat([xp.reshape(a, (-1, a.shape[2])) for a in tree.summaries], axis=0)
        if tree.counts is None:
            sizes = zip(tree.summaries, tree.sizes, strict=True)
            logs = [xp.full(a.shape[0] * a.shape[1], log(size), dtype=rows.dtype) for a, size in sizes]
        else:
            logs = [
                xp.where(a > 0, xp.log(xp.where(a > 0, a, xp.asarray(1, dtype=a.dtype))), -xp.inf)
                for a in (xp.reshape(count, (-1,)) for count in tree.counts)
            ]
        logs = xp.astype(xp.concat(logs), rows.dtype)
        nodes = [a.shape[1] for a in tree.summaries]
        offsets = np.cumsum([0, *(a.shape[0] * a.shape[1] for a in tree.summaries)]).tolist()
        children = [fine // coarse for fine, coarse in pairwise(nodes)] + [1]
        levels, low, candidates = [], 0, widest * nodes[-1]
        for level in range(len(nodes) - 1, -1, -1):
            opened = min(method.open if level else method.near, candidates)
            levels.append((offsets[level], nodes[level], children[level], low, low + candidates, opened))
            low, candidates = low + candidates, opened * children[level - 1]
        return Forest(rows, logs, tuple(levels), low)


def _attend(
    work: Work, tree: Tree, forest: Forest, method: Treecode, scale: float, lists: Lists | None, out: Array, lse: Array
) -> None:
    """Steps 1 to 5 for some groups, into out (T, n, e) and lse (T, n)."""
    q, index, first, count = work.queries, work.index, work.first, work.count
    xp = array_namespace(q)
    groups, g = index.shape
    dim, width, whole = tree.dim, out.shape[2], forest.width
    far = xp.full((groups, whole), -1, dtype=xp.int64)
    mass, norm = xp.empty((groups, g, whole), dtype=q.dtype), xp.full((groups, g), -xp.inf, dtype=q.dtype)
    before, amount_before, stride = None, None, 1  # the nodes opened at the level above, numbers a row
    for number, (offset, nodes, children, low, high, most) in enumerate(forest.levels):
        given = None if lists is None else xp.ascontiguousarray(lists.opened[number])
        run(
            ATTEND, "node_masses", q, (groups, parts(high - low, KEYS), parts(g, QUERIES)), TILE_THREADS,
            q, index, first, count, forest.rows, forest.logs, before, amount_before, far, mass, g,
            whole, stride, low, nodes, children, np.int64(offset), dim, width, scale,
            shared=8 * (QUERIES + 2 * KEYS) + (KEYS + dim * QUERIES + SLAB * (KEYS + 1)) * q.dtype.itemsize,
        )  # fmt: skip
        above, amount_above, stride_above = before, amount_before, stride
        stride = max(1, most) if given is None else max(1, given.shape[1])
        before = xp.empty((groups, stride), dtype=xp.int64)
        amount_before = xp.empty(groups, dtype=xp.int32)
        share = xp.empty((groups, high - low), dtype=q.dtype)
        run(
            ATTEND, "pick_nodes", q, (groups,), THREADS,
            mass, work.votes, count, above, amount_above, given, norm, share, far, before, amount_before, g, whole,
            high - low, stride, stride_above, low, nodes, children, most,
        )  # fmt: skip
    own = _own(work, forest, method, lists, far, mass, (above, amount_above, stride_above))
    columns = columns_for(width, work.stored.dtype)
    own_width = 0 if own is None else own.shape[2]
    run(
        ATTEND, "attend_lists", work.stored, (groups, parts(g, QUERIES), parts(width, columns)), TILE_THREADS,
        work.stored, index, first, forest.rows, far, mass, tree.cells, tree.kept, before, amount_before, own, out, lse,
        g, whole, stride, own_width, tree.summaries[0].shape[1], tree.leaf, dim, width, scale,
        template=(columns, "true" if own_width else "false"), shared=tile_bytes(dim, columns, work.stored.dtype),
    )  # fmt: skip


def _own(
    work: Work, forest: Forest, method: Treecode, lists: Lists | None, far: Array, mass: Array, above: Any
) -> Array | None:
    """Each query's own cells (F, g, own), whose mass is spent; None where there are none."""
    xp = array_namespace(mass)
    _, nodes, children, low, high, near = forest.levels[-1]
    groups, g, whole = mass.shape
    wanted = min(method.own, high - low - near) if lists is None else lists.own.shape[2]
    if wanted <= 0:
        return None
    given = None if lists is None else xp.ascontiguousarray(lists.own)
    own = xp.empty((groups, g, wanted), dtype=xp.int64)
    opened, amount, stride = above
    run(
        ATTEND, "own_cells", mass, (parts(groups * g * LANES, THREADS),), THREADS,
        mass, far, work.count, opened, amount, given, own, np.int64(groups * g), g, whole, stride, low, nodes, children,
        wanted,
    )  # fmt: skip
    return own
