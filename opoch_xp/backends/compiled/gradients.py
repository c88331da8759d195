"""Gradients on a host: the launch of `backward`. Arrays are NumPy's; `workers` threads.

Queries that read the same chunks add to the gradients of the same nodes. So groups go in parts that share no chunk;
where there are fewer than PARTS of those, each is done in several, with gradients of their own that are added up,
whatever the number of threads: the result does not depend on it.
"""

from typing import Any

import numpy as np

from opoch_xp.backends.compiled.backward import blocks_backward, groups_backward, summaries_backward
from opoch_xp.backends.compiled.plain import plain
from opoch_xp.backends.compiled.tree import KEYS, Launch
from opoch_xp.backends.compiled.vector import lanes
from opoch_xp.methods import Treecode
from opoch_xp.threads import share
from opoch_xp.treecode.tree import Tree

Array = Any

PARTS = 4
ENTRIES = 1 << 19  # pairs of queries and keys that a task of blocks goes through, about
NO_MASK = np.zeros((0, 0), bool)


def tier_backward(
    queries: Array,
    tree: Tree,
    first: np.ndarray,
    count: np.ndarray,
    groups: Array,
    method: Treecode,
    *,
    scale: float,
    seen: Array,
    lse: Array,
    dout: Array,
    delta: Array,
    cells: Array,
    summaries: tuple[Array, ...],
    workers: int,
) -> Array:
    """Gradient of the queries (T, n, d) of a part of the softmax; adds those of the tree's cells and summaries to
    `cells` and `summaries`, laid out as they are.

    Arguments as of tree_attention; lse (T, n) of the whole softmax, infinite for a query that weighs nothing; dout
    (T, n, d_v) and delta (T, n): see `backward`.
    """
    dim = queries.shape[2]
    launch = Launch.of(queries, tree, first, count, groups, method, seen)
    dq = np.zeros_like(launch.queries)
    told = [plain(x).reshape(-1, *x.shape[2:]) for x in (lse, dout, delta)]
    apart = _apart(launch.first, launch.count)
    several = -(-PARTS // max(1, len(apart)))
    copies = [[np.zeros_like(x) for x in (cells, *summaries)] for _ in range(several - 1)]

    def work(task: tuple[Array, int]) -> None:
        part, number = task
        into, *levels = copies[number - 1] if number else (cells, *summaries)
        groups_backward(
            *launch.of_groups(part[number::several]), launch.levels, launch.counts, len(tree.cells), *launch.plan,
            method.most or 0, launch.cells, launch.kept, tree.leaf, dim, queries.dtype.type(scale), launch.seen, *told,
            np.array([x.ctypes.data for x in levels[::-1]], np.int64), into.reshape(-1, into.shape[2]), dq,
        )  # fmt: skip

    share(work, [(part, number) for number in range(several) for part in apart], workers)
    for copy in copies:
        for x, more in zip((cells, *summaries), copy, strict=True):
            x += more
    return dq.reshape(queries.shape)


def _apart(first: Array, count: Array) -> list[Array]:
    """Groups whose runs of chunks, count from first on, have none in common with those of other parts."""
    order = np.argsort(first, kind="stable")
    ends = np.maximum.accumulate((first + count)[order])
    cuts = np.flatnonzero(first[order][1:] >= ends[:-1]) + 1
    return [np.sort(part) for part in np.split(order, cuts) if len(part)]


def key_gradients(tree: Tree, cells: Array, summaries: tuple[Array, ...], workers: int) -> tuple[Array, Array]:
    """Gradients of the keys (chunks, size, d) and values (chunks, size, d_v) that a tree was built from, from those of
    its cells and summaries, which are lost."""
    chunks, size, width = cells.shape
    dk, dv = np.empty((chunks, size, tree.dim), cells.dtype), np.empty((chunks, size, width - tree.dim), cells.dtype)
    together = max(1, KEYS // size)

    def work(low: int) -> None:
        some = slice(low, min(low + together, chunks))
        for level in range(len(summaries) - 1, -1, -1):
            below, into = (tree.summaries, summaries) if level else ((tree.cells,), (cells,))
            number = max(0, level - 1)
            if tree.counts is None or tree.kept is None:
                weight = np.ones(below[number][some].shape[:2], cells.dtype)
            else:
                weight = tree.counts[number][some] if level else tree.kept[some].astype(cells.dtype)
            summaries_backward(
                plain(summaries[level][some]), plain(tree.summaries[level][some]), plain(below[number][some]), weight,
                tree.dim, level > 0, into[number][some],
            )  # fmt: skip
        for c in range(some.start, some.stop):
            dk[c, tree.order[c]], dv[c, tree.order[c]] = cells[c, :, : tree.dim], cells[c, :, tree.dim :]

    share(work, range(0, chunks, together), workers)
    return dk, dv


def exact_backward(
    q: Array, k: Array, v: Array, lse: Array, dout: Array, delta: Array, *, causal: bool, scale: float,
    mask: Array | None, workers: int,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradients of q (batch, repeat, n_q, d), k (batch, n_k, d) and v of exact attention, an entry of the batch a task:
    for many of few keys. lse (batch, repeat, n_q) of the whole softmax, of which these keys may be a part."""
    vector = lanes(q.dtype)
    dq, dk, dv = (
        np.zeros_like(q),
        *(np.zeros((*x.shape[:2], -(-x.shape[2] // vector) * vector), x.dtype) for x in (k, v)),
    )
    given = [plain(x) for x in (q, k, v)]
    told = [plain(x) for x in (lse, dout, delta)]
    kept = NO_MASK if mask is None else plain(mask)
    step = max(1, ENTRIES // max(1, q.shape[1] * q.shape[2] * k.shape[1]))

    def work(low: int) -> None:
        high = min(low + step, len(q))
        blocks_backward(*given, kept, *told, causal, q.dtype.type(scale), low, high, dq, dk, dv)

    share(work, range(0, len(q), step), workers)
    return dq, dk[..., : k.shape[2]], dv[..., : v.shape[2]]
