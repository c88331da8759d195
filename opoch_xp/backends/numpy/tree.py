"""The treecode's two kernels in NumPy: one group of queries at a time, its working set in the L2 cache.

A group costs two products a level (means, variances), a gather of the opened nodes' children, one exponential, and one
product with all the values at the end. Arrays are (nodes, queries): the queries of a group are the contiguous axis.

What was tried, 64 queries against 256 nodes, d = 64, float32, one core (us): products 25 each this way round, 30 the
other; exponential 8; row maxima 6 (taken once, at the top level: later levels reuse it as the reference); the best 8
cells of each query by sorting and comparing with a threshold 27, by argpartition 79.
"""

from itertools import pairwise
from math import prod
from threading import local
from typing import Any

import numpy as np

from opoch_xp.backends.generic import tree as generic
from opoch_xp.backends.numpy.split import principal_order
from opoch_xp.backends.numpy.threads import run
from opoch_xp.methods import Treecode
from opoch_xp.tree import Lists, Tree, group_count, level_nodes, splits

CACHED = 4096  # keys summarised at a time
GROUPS = 16  # groups a thread takes at a time
OWN_ROWS = 16  # queries whose own cells are gathered at a time: 512 kB with the defaults
LOW, HIGH = 1e-20, 1e30  # sums of weights outside, relative to the top level's, are done again with a maximum


def build_tree(
    k: np.ndarray,
    v: np.ndarray,
    axes: Any,
    method: Treecode,
    *,
    mask: np.ndarray | None = None,
    order: np.ndarray | None = None,
) -> Tree:
    """See opoch_xp.backends.generic.tree.build_tree."""
    if mask is not None:
        order = principal_order(k, axes, method.iterations, mask) if order is None else order
        return generic.build_tree(k, v, axes, method, mask=mask, order=order)
    chunks, size, dim = k.shape
    if order is None:
        order = principal_order(k, axes, method.iterations, None)
    levels = level_nodes(size, method)
    cells = np.empty((chunks, size, dim + v.shape[2]), k.dtype)
    summaries = tuple(np.empty((chunks, nodes, 2 * dim + v.shape[2]), k.dtype) for nodes in levels)

    def chunk(c: int) -> None:
        for s in range(0, size, CACHED):
            part = slice(s, min(s + CACHED, size))
            index = order[c, part]
            cells[c, part, :dim] = k[c].take(index, axis=0)
            cells[c, part, dim:] = v[c].take(index, axis=0)
            split = cells[c, part].reshape(-1, method.leaf, cells.shape[2])
            _summarise(split[..., :dim], None, split[..., dim:], summaries[0][c, s // method.leaf :])
        for finer, coarser in pairwise(summaries):
            below = finer[c].reshape(coarser.shape[1], -1, finer.shape[2])
            _summarise(below[..., :dim], below[..., dim : 2 * dim], below[..., 2 * dim :], coarser[c])

    run(chunk, range(chunks))
    return Tree(cells, order, summaries, tuple(size // nodes for nodes in levels), None, None, dim)


def _summarise(keys: np.ndarray, var: np.ndarray | None, values: np.ndarray, out: np.ndarray) -> None:
    """Mean, variance and mean value of children (nodes, children, ...) of equal count into rows of `out`."""
    nodes, children, dim = keys.shape
    out = out[:nodes]
    mean = np.add.reduce(keys, axis=1)
    mean *= keys.dtype.type(1 / children)
    spread = keys - mean[:, None]
    np.multiply(spread, spread, out=spread)
    if var is not None:
        spread += var
    out[:, :dim] = mean
    np.add.reduce(spread, axis=1, out=mean)
    np.multiply(mean, mean.dtype.type(1 / children), out=out[:, dim : 2 * dim])
    np.multiply(np.add.reduce(values, axis=1), keys.dtype.type(1 / children), out=out[:, 2 * dim :])


def tree_attention(
    queries: np.ndarray,
    tree: Tree,
    first: np.ndarray,
    count: np.ndarray,
    axes: Any,
    method: Treecode,
    *,
    scale: float,
    groups: np.ndarray | None = None,
    lists: Lists | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """See opoch_xp.backends.generic.tree.tree_attention."""
    tasks, n, _ = queries.shape
    out = np.zeros((tasks, n, tree.cells.shape[2] - tree.dim), queries.dtype)
    lse = np.full((tasks, n), -np.inf, queries.dtype)
    finite = np.isfinite(np.einsum("tnd->tn", queries * 0)) if not np.isfinite(queries.sum()) else None
    if finite is not None:
        queries = np.where(finite[..., None], queries, 0)
    total = group_count(n, method.group)
    size = n if total == 1 else method.group
    if groups is None:
        groups = _query_groups(queries, axes, method, size, total)
    kernel = _Group(tree, method, scale)

    def work(task: tuple[int, int]) -> None:
        t, start = task
        for number in range(start, min(start + GROUPS, total)):
            rows = groups[t, number * size : (number + 1) * size]
            rows = rows[rows < n] if number == total - 1 else rows
            votes = None if finite is None else finite[t].take(rows)
            given = None
            if lists is not None:
                place = t * total + number
                given = Lists(tuple(a[place] for a in lists.opened), lists.own[place])
            chunks = int(first[t]), int(count[t])
            out[t, rows], lse[t, rows] = kernel(queries[t].take(rows, axis=0), votes, *chunks, given)

    run(work, [(t, start) for t in range(tasks) if count[t] for start in range(0, total, GROUPS)])
    if finite is not None:
        out[~finite], lse[~finite] = np.nan, np.nan
    return out, lse


def _query_groups(queries: np.ndarray, axes: Any, method: Treecode, size: int, total: int) -> np.ndarray:
    """See opoch_xp.backends.generic.tree.query_groups."""
    tasks, n, dim = queries.shape
    padded = size << splits(n, size)
    if size == 1:  # nothing is shared: any order will do
        return np.broadcast_to(np.arange(n), (tasks, n))
    if padded == n:
        return principal_order(queries, axes, method.iterations, None)
    rows = np.zeros((tasks, padded, dim), queries.dtype)
    rows[:, :n] = queries
    kept = np.broadcast_to(np.arange(padded) < n, (tasks, padded))
    return principal_order(rows, axes, method.iterations, kept)[:, : total * size]


class _Group:
    """Steps 1 to 5 for one group of queries: a function with the tree's flat arrays and each thread's scratch."""

    def __init__(self, tree: Tree, method: Treecode, scale: float) -> None:
        self.tree, self.method, self.scale = tree, method, scale
        self.nodes = [a.shape[1] for a in tree.summaries]
        # children of one parent are one row of `families`: one gather fetches them all
        self.summaries = [a.reshape(-1, a.shape[2]) for a in tree.summaries]
        self.families = [
            a.reshape(-1, self.nodes[level] // above * a.shape[2])
            for level, (a, above) in enumerate(zip(tree.summaries, self.nodes[1:], strict=False))
        ]
        self.cells = tree.cells.reshape(-1, tree.leaf * tree.cells.shape[2])
        self.kept = None if tree.kept is None else tree.kept.reshape(-1, tree.leaf)
        self.counts = None if tree.counts is None else [a.reshape(-1) for a in tree.counts]
        self.scratch = local()

    def buffer(self, name: str, *shape: int) -> np.ndarray:
        """Uninitialised memory of this thread, kept from group to group."""
        held, size = self.scratch.__dict__, prod(shape)
        if name not in held or held[name].size < size:
            held[name] = np.empty(size, self.cells.dtype)
        return held[name][:size].reshape(shape)

    def sum(self, weight: np.ndarray) -> np.ndarray:
        """Sum over nodes of weight (m, g): as a product, which is faster than a reduction."""
        ones = self.scratch.__dict__.get("ones")
        if ones is None or len(ones) < len(weight):
            ones = self.scratch.ones = np.ones(len(weight), weight.dtype)
        return ones[: len(weight)] @ weight

    def __call__(
        self, q: np.ndarray, votes: np.ndarray | None, first: int, count: int, lists: Lists | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Queries q (g, d) against chunks [first, first + count): out (g, d_v), lse (g,)."""
        tree, dim, leaf = self.tree, self.tree.dim, self.tree.leaf
        scaled = q * q.dtype.type(self.scale)
        turned = np.ascontiguousarray(scaled.T)  # (d, g)
        square = turned * turned
        square *= q.dtype.type(0.5)
        depth = len(self.nodes) - 1
        rows = self.summaries[depth][first * self.nodes[depth] : (first + count) * self.nodes[depth]]
        candidates = np.arange(len(rows))
        total = np.zeros(len(q), q.dtype)
        out = np.zeros((len(q), tree.cells.shape[2] - dim), q.dtype)
        reference: Any = None
        largest: Any = None
        for level in range(depth, -1, -1):
            mass = self.log_mass(level, rows, turned, square, candidates + first * self.nodes[level])  # (m, g)
            if reference is None:
                reference = mass.max(0)
                reference[reference == -np.inf] = 0
            mass -= reference
            weight = np.exp(mass, out=mass)
            level_sum = self.sum(weight)
            largest = level_sum if largest is None else np.maximum(largest, level_sum)
            vote = 1 / largest if votes is None else votes / largest
            width = min(self.method.open if level else self.method.near, len(candidates))
            if lists is not None:
                pick = (candidates == lists.opened[depth - level][:, None]).argmax(1)
            else:
                share = weight @ vote
                rest = len(share) - width
                pick = np.argpartition(share, rest)[rest:] if rest else np.arange(width)
            opened = candidates[pick]
            weight[pick] = 0
            if level:
                total += self.sum(weight)
                out += weight.T @ rows[:, 2 * dim :]
                children = self.nodes[level - 1] // self.nodes[level]
                below = self.families[level - 1]
                family = self.buffer("family", len(opened), below.shape[1])
                below.take(opened + first * self.nodes[level], axis=0, mode="clip", out=family)
                rows = family.reshape(len(opened) * children, -1)
                candidates = (opened[:, None] * children + np.arange(children)).reshape(-1)
        cell = opened + first * self.nodes[0]
        near = self.buffer("near", len(cell), self.cells.shape[1])
        near = self.cells.take(cell, axis=0, mode="clip", out=near).reshape(len(cell) * leaf, -1)
        logits = np.matmul(near[:, :dim], turned, out=self.buffer("logits", len(near), len(q)))
        logits -= reference
        np.exp(logits, out=logits)
        if self.kept is not None:
            logits *= self.kept[cell].reshape(-1, 1)
        total += self.sum(logits)
        out += logits.T @ near[:, dim:]
        weight[pick] = -1  # not to be read twice
        own = min(self.method.own, len(candidates) - len(opened))
        if own:
            if lists is None:
                best = _largest(np.ascontiguousarray(weight.T), own)
            else:
                best = (candidates == lists.own[..., None]).argmax(-1)
            self.own(weight, best, candidates + first * self.nodes[0], scaled, reference, total, out)
        weight[pick] = 0
        total += self.sum(weight)
        out += weight.T @ rows[:, 2 * dim :]
        if not (total.min() > LOW and total.max() < HIGH):
            return self.again(q, votes, first, count, lists)
        out /= total[:, None]
        return out, np.log(total) + reference

    def log_mass(
        self, level: int, rows: np.ndarray, turned: np.ndarray, square: np.ndarray, node: np.ndarray
    ) -> np.ndarray:
        """Log mass (m, g) of the nodes whose summaries are `rows`; see generic.log_mass."""
        dim, shape = self.tree.dim, (len(rows), turned.shape[1])
        mass = np.matmul(rows[:, :dim], turned, out=self.buffer("mass", *shape))
        half = np.matmul(rows[:, dim : 2 * dim], square, out=self.buffer("half", *shape))  # sigma^2 / 2
        if self.counts is not None:
            half *= 2
            return generic.log_mass(mass, half, self.counts[level][node][:, None])
        log = float(np.log(self.tree.sizes[level]))
        if not half.max(initial=0) <= log:  # some nodes are frozen: energy sqrt(4 log half), not log + half
            limit = self.buffer("limit", *shape)
            limit.fill(log)
            frozen = np.maximum(half, limit, out=self.buffer("frozen", *shape))
            np.minimum(half, limit, out=half)
            np.sqrt(frozen, out=frozen)
            frozen *= 2 * log**0.5
            mass += frozen
            log -= 2 * log
        mass += half
        if log:
            mass += mass.dtype.type(log)
        return mass

    def own(
        self, weight: np.ndarray, best: np.ndarray, cell: np.ndarray, scaled: np.ndarray, reference: np.ndarray,
        total: np.ndarray, out: np.ndarray,
    ) -> None:  # fmt: skip
        """Near field of each query of its own: its `best` cells (g, own), read key by key into total and out."""
        group, own, dim, leaf = *best.shape, self.tree.dim, self.tree.leaf
        place = best * group + np.arange(group)[:, None]
        flat = weight.reshape(-1)
        flat[place] = 0
        for s in range(0, group, OWN_ROWS):
            part = slice(s, min(s + OWN_ROWS, group))
            index = cell[best[part]].reshape(-1)
            keys = self.buffer("own", len(index), self.cells.shape[1])
            keys = self.cells.take(index, axis=0, mode="clip", out=keys).reshape(part.stop - s, own * leaf, -1)
            logits = (keys[..., :dim] @ scaled[part, :, None])[..., 0]
            logits -= reference[part, None]
            np.exp(logits, out=logits)
            if self.kept is not None:
                logits *= self.kept[index].reshape(logits.shape)
            total[part] += logits.sum(1)
            out[part] += (logits[:, None] @ keys[..., dim:])[:, 0]

    def again(
        self, q: np.ndarray, votes: np.ndarray | None, first: int, count: int, lists: Lists | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The generic kernel for a group whose weights leave the range of the dtype."""
        run_of = (np.array([first]), np.array([count]), count)
        vote = np.ones(len(q), q.dtype) if votes is None else votes.astype(q.dtype)
        given = None if lists is None else Lists(tuple(a[None] for a in lists.opened), lists.own[None])
        out, lse, _ = generic.attend_groups(q[None], vote[None], self.tree, run_of, self.method, self.scale, given)
        return out[0], lse[0]


def _largest(x: np.ndarray, number: int) -> np.ndarray:
    """Places (r, number) of the largest entries of each row of x (r, m)."""
    rows, width = x.shape
    threshold = np.sort(x, axis=1)[:, width - number]
    flat = np.flatnonzero(x >= threshold[:, None])
    if len(flat) != rows * number:  # ties
        return np.argsort(-x, axis=1, kind="stable")[:, :number]
    return flat.reshape(rows, number) % width
