"""The treecode's kernels in NumPy: a few groups of queries at a time, threads over batches.

A group costs two products a level (means, variances), a gather of the opened nodes' children, one exponential, and one
product with the values. Arrays are (groups, nodes, queries): the queries of a group are the contiguous axis. A batch
makes every call long enough (50 us) that handing the interpreter's lock from thread to thread does not show, and its
arrays still stay in the L3 cache: with one group a call, two threads were slower than one.

What was tried, 64 queries against 256 nodes, d = 64, float32, one core (us): products 25 each this way round, 30 the
other; exponential 10; row maxima 6 (taken once, at the top level: later levels reuse it as the reference); the best 8
cells of each query by sorting and comparing with a threshold 27, by argpartition 79.
"""

from itertools import pairwise
from threading import local
from typing import Any

import numpy as np

from opoch_xp.backends.generic import tree as generic
from opoch_xp.backends.numpy.pool import Buffers, run
from opoch_xp.backends.numpy.split import principal_order
from opoch_xp.methods import Treecode
from opoch_xp.tree import Lists, Tree, group_count, level_nodes, splits

CACHED = 8192  # keys summarised at a time: 4 MB with their values at d = 64
QUERIES = 512  # attended at a time: 10 MB of scratch a thread with the defaults
BATCH = 8  # groups attended at a time, at the most
OWN_ROWS = 64  # queries whose own cells are gathered at a time: 2 MB with the defaults
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

    together = max(1, CACHED // size)

    def chunk(c: int) -> None:
        some = slice(c, min(c + together, chunks))
        which = np.arange(some.start, some.stop)[:, None]
        for s in range(0, size, CACHED):
            part = slice(s, min(s + CACHED, size))
            index = order[some, part]
            cells[some, part, :dim] = k[which, index]
            cells[some, part, dim:] = v[which, index]
            split = cells[some, part].reshape(len(index), -1, method.leaf, cells.shape[2])
            finest = summaries[0][some, s // method.leaf : part.stop // method.leaf]
            _summarise(split[..., :dim], None, split[..., dim:], finest)
        for finer, coarser in pairwise(summaries):
            below = finer[some].reshape(-1, coarser.shape[1], finer.shape[1] // coarser.shape[1], finer.shape[2])
            _summarise(below[..., :dim], below[..., dim : 2 * dim], below[..., 2 * dim :], coarser[some])

    run(chunk, range(0, chunks, together))
    return Tree(cells, order, summaries, tuple(size // nodes for nodes in levels), None, None, dim)


def _summarise(keys: np.ndarray, var: np.ndarray | None, values: np.ndarray, out: np.ndarray) -> None:
    """Mean, variance and mean value of children (chunks, nodes, children, ...) of equal count into `out`."""
    dim, share = keys.shape[3], keys.dtype.type(1 / keys.shape[2])
    mean = np.add.reduce(keys, axis=2)
    mean *= share
    spread = keys - mean[:, :, None]
    np.multiply(spread, spread, out=spread)
    if var is not None:
        spread += var
    out[..., :dim] = mean
    np.add.reduce(spread, axis=2, out=mean)
    np.multiply(mean, share, out=out[..., dim : 2 * dim])
    np.multiply(np.add.reduce(values, axis=2), share, out=out[..., 2 * dim :])


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
    finite = _finite(queries) if not np.isfinite(queries.sum()) else None
    if finite is not None:
        queries = np.where(finite[..., None], queries, 0)
    total = group_count(n, method.group)
    size = n if total == 1 else method.group
    if groups is None:
        groups = query_groups(queries, axes, method)
    kernel = _Groups(tree, method, scale)

    def work(batch: tuple[np.ndarray, np.ndarray, int]) -> None:
        task, number, rows = batch  # (G,), (G,), rows of each group
        index = groups[task[:, None], number[:, None] * size + np.arange(rows)]  # (G, g)
        votes = None if finite is None else finite[task[:, None], index]
        given = None
        if lists is not None:
            place = task * total + number
            given = Lists(tuple(a[place] for a in lists.opened), lists.own[place, :rows])
        found = kernel(queries[task[:, None], index], votes, first[task], int(count[task[0]]), given)
        out[task[:, None], index], lse[task[:, None], index] = found

    run(work, _batches(np.asarray(count), n, size, total))
    if finite is not None:
        out[~finite], lse[~finite] = np.nan, np.nan
    return out, lse


def _batches(count: np.ndarray, n: int, size: int, total: int) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Groups of as many rows that read as many chunks, a few at a time: (tasks, numbers of groups, rows of each)."""
    full, batches = n // size, []
    for chunks in np.unique(count[count > 0]):
        tasks = np.flatnonzero(count == chunks)
        for numbers, rows in ((np.arange(full), size), (np.arange(full, total), n - full * size)):
            task, number = np.repeat(tasks, len(numbers)), np.tile(numbers, len(tasks))
            step = max(1, min(BATCH, QUERIES // max(rows, 1)))
            batches += [(task[s : s + step], number[s : s + step], rows) for s in range(0, len(task), step)]
    return batches


def query_groups(queries: np.ndarray, axes: Any, method: Treecode) -> np.ndarray:
    """See opoch_xp.backends.generic.tree.query_groups."""
    tasks, n, dim = queries.shape
    total = group_count(n, method.group)
    size = n if total == 1 else method.group
    padded = size << splits(n, size)
    if size == 1:  # nothing is shared: any order will do
        return np.broadcast_to(np.arange(n), (tasks, n))
    if not np.isfinite(queries.sum()):
        queries = np.where(_finite(queries)[..., None], queries, 0)
    if padded == n:
        return principal_order(queries, axes, method.iterations, None)
    rows = np.zeros((tasks, padded, dim), queries.dtype)
    rows[:, :n] = queries
    kept = np.broadcast_to(np.arange(padded) < n, (tasks, padded))
    order = principal_order(rows, axes, method.iterations, kept)[:, : total * size]
    order[:, -size:].sort(1)  # padding last: its numbers are the largest
    return order


def _finite(queries: np.ndarray) -> np.ndarray:
    """Which of the queries (T, n, d) are finite, (T, n)."""
    return np.isfinite(np.einsum("tnd->tn", queries * 0))


class _Groups:
    """Steps 1 to 5 for a batch of groups: a function with the tree's flat arrays and each thread's scratch at hand.

    Letters: G groups, g queries of each, m candidate nodes, d and e the widths of keys and values.
    """

    def __init__(self, tree: Tree, method: Treecode, scale: float) -> None:
        self.tree, self.method, self.scale = tree, method, scale
        self.nodes = [a.shape[1] for a in tree.summaries] + [
            1
        ]  # per chunk; the chunk itself is the last level's parent
        # children of one parent are one row of `families`: one gather fetches them all
        self.children = [fine // coarse for fine, coarse in pairwise(self.nodes)]
        self.families = [
            a.reshape(-1, children * a.shape[2]) for a, children in zip(tree.summaries, self.children, strict=True)
        ]
        self.width = tree.cells.shape[2]  # d + e
        self.cells = tree.cells.reshape(-1, tree.leaf * self.width)
        self.kept = None if tree.kept is None else tree.kept.reshape(-1, tree.leaf)
        self.counts = None if tree.counts is None else [a.reshape(-1) for a in tree.counts]
        self.scratch = local()

    def buffer(self, name: str, *shape: int) -> np.ndarray:
        """Uninitialised memory of this thread, kept from batch to batch."""
        if not hasattr(self.scratch, "buffers"):
            self.scratch.buffers = Buffers()
        return self.scratch.buffers(name, shape, self.cells.dtype)

    def gather(self, name: str, rows: np.ndarray, index: np.ndarray, width: int) -> np.ndarray:
        """rows[index] for index (G, k), each row cut into pieces of `width`: (G, k * pieces, width)."""
        taken = self.buffer(name, index.size, rows.shape[1])
        rows.take(index.reshape(-1), axis=0, mode="clip", out=taken)
        return taken.reshape(len(index), index.shape[1] * (rows.shape[1] // width), width)

    def __call__(
        self, q: np.ndarray, votes: np.ndarray | None, first: np.ndarray, count: int, lists: Lists | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Queries q (G, g, d) against the chunks [first, first + count): out (G, g, e), lse (G, g)."""
        dim, which = self.tree.dim, np.arange(len(q))[:, None]
        scaled = q * q.dtype.type(self.scale)
        turned = np.ascontiguousarray(scaled.transpose(0, 2, 1))  # (G, d, g)
        square = turned * turned
        square *= q.dtype.type(0.5)
        total = np.zeros((len(q), 1, q.shape[1]), q.dtype)
        out = np.zeros((*q.shape[:2], self.tree.cells.shape[2] - dim), q.dtype)
        opened = np.broadcast_to(np.arange(count), (len(q), count))  # numbered from the run's first chunk
        reference: Any = None
        largest: Any = None
        for level in range(len(self.families) - 1, -1, -1):
            base = first[:, None] * self.nodes[level + 1]
            rows = self.gather("family", self.families[level], opened + base, self.width + dim)  # (G, m, 2 * d + e)
            children = self.children[level]
            candidates = (opened[:, :, None] * children + np.arange(children)).reshape(len(q), -1)
            mass = self.log_mass(level, rows, turned, square, candidates + first[:, None] * self.nodes[level])
            if reference is None:
                reference = mass.max(1, keepdims=True)  # (G, 1, g)
                reference[reference == -np.inf] = 0
            mass -= reference
            weight = np.exp(mass, out=mass)
            level_sum = self.sum(weight)
            largest = level_sum if largest is None else np.maximum(largest, level_sum)
            if lists is None:
                vote = 1 / largest if votes is None else votes[:, None] / largest
                pick = _heaviest(
                    (weight @ vote.transpose(0, 2, 1))[..., 0], self.method.open if level else self.method.near
                )
            else:
                pick = _places(candidates, lists.opened[len(self.families) - 1 - level])
            opened = candidates[which, pick]
            weight[which, pick] = 0  # what is left is the far field: unopened nodes as pseudo-keys
            if level:
                total += self.sum(weight)
                out += weight.transpose(0, 2, 1) @ rows[..., 2 * dim :]
        self.near(opened + first[:, None] * self.nodes[0], turned, reference, total, out)
        own = min(self.method.own, candidates.shape[1] - opened.shape[1])
        if own:
            weight[which, pick] = -1  # not to be read twice
            best = _largest(weight, own) if lists is None else _places(candidates[:, None], lists.own)
            self.own(weight, best, candidates + first[:, None] * self.nodes[0], scaled, reference, total, out)
            weight[which, pick] = 0
        total += self.sum(weight)
        out += weight.transpose(0, 2, 1) @ rows[..., 2 * dim :]
        with np.errstate(all="ignore"):
            out /= total.transpose(0, 2, 1)
            lse = (np.log(total) + reference)[:, 0]
        for group in np.flatnonzero(~((total > LOW) & (total < HIGH)).all((1, 2))).tolist():
            out[group], lse[group] = self.again(group, q, votes, first, count, lists)
        return out, lse

    def sum(self, weight: np.ndarray) -> np.ndarray:
        """Sum over nodes of weight (G, m, g), (G, 1, g): as a product, which is faster than a reduction."""
        ones = self.scratch.__dict__.get("ones")
        if ones is None or ones.shape[1] < weight.shape[1]:
            ones = self.scratch.ones = np.ones((1, weight.shape[1]), weight.dtype)
        return ones[:, : weight.shape[1]] @ weight

    def log_mass(
        self, level: int, rows: np.ndarray, turned: np.ndarray, square: np.ndarray, node: np.ndarray
    ) -> np.ndarray:
        """Log mass (G, m, g) of the nodes whose summaries are `rows` (G, m, 2 * d + e); see generic.log_mass."""
        dim, shape = self.tree.dim, (*rows.shape[:2], turned.shape[2])
        mass = np.matmul(rows[..., :dim], turned, out=self.buffer("mass", *shape))
        half = np.matmul(rows[..., dim : 2 * dim], square, out=self.buffer("half", *shape))  # sigma^2 / 2
        if self.counts is not None:
            half *= 2
            return generic.log_mass(mass, half, self.counts[level][node][..., None])
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

    def near(
        self, cell: np.ndarray, turned: np.ndarray, reference: np.ndarray, total: np.ndarray, out: np.ndarray
    ) -> None:
        """Near field of the groups: cells (G, near), read key by key into total and out."""
        dim = self.tree.dim
        keys = self.gather("near", self.cells, cell, self.width)  # (G, near * leaf, d + e)
        logits = np.matmul(keys[..., :dim], turned, out=self.buffer("mass near", *keys.shape[:2], turned.shape[2]))
        logits -= reference
        np.exp(logits, out=logits)
        if self.kept is not None:
            logits *= self.kept[cell].reshape(len(cell), -1, 1)
        total += self.sum(logits)
        out += logits.transpose(0, 2, 1) @ keys[..., dim:]

    def own(
        self, weight: np.ndarray, best: np.ndarray, cell: np.ndarray, scaled: np.ndarray, reference: np.ndarray,
        total: np.ndarray, out: np.ndarray,
    ) -> None:  # fmt: skip
        """Near field of each query of its own: its `best` cells (G, g, own), read key by key into total and out."""
        groups, queries, own = best.shape
        dim = self.tree.dim
        which = np.arange(groups)[:, None, None]
        weight[which, best, np.arange(queries)[:, None]] = 0
        index = cell[which, best].reshape(-1, own)  # (G * g, own)
        flat, reference = scaled.reshape(len(index), dim), np.broadcast_to(reference, total.shape).reshape(-1, 1)
        total, out = total.reshape(-1), out.reshape(len(index), -1)  # views
        for s in range(0, len(index), OWN_ROWS):
            part = slice(s, s + OWN_ROWS)
            keys = self.gather("own", self.cells, index[part], self.width)  # (rows, own * leaf, d + e)
            logits = (keys[..., :dim] @ flat[part, :, None])[..., 0]
            logits -= reference[part]
            np.exp(logits, out=logits)
            if self.kept is not None:
                logits *= self.kept[index[part]].reshape(logits.shape)
            total[part] += logits.sum(1)
            out[part] += (logits[:, None] @ keys[..., dim:])[:, 0]

    def again(
        self, group: int, q: np.ndarray, votes: np.ndarray | None, first: np.ndarray, count: int, lists: Lists | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The generic kernel for a group whose weights leave the range of the dtype."""
        one = slice(group, group + 1)
        vote = np.ones(q[one].shape[:2], q.dtype) if votes is None else votes[one].astype(q.dtype)
        given = None if lists is None else Lists(tuple(a[one] for a in lists.opened), lists.own[one])
        run_of = (first[one], np.array([count]), count)
        out, lse, _ = generic.attend_groups(q[one], vote, self.tree, run_of, self.method, self.scale, given)
        return out[0], lse[0]


def _heaviest(share: np.ndarray, number: int) -> np.ndarray:
    """Places (G, number) of the largest entries of each row of share (G, m), all of them where there are no more."""
    rest = share.shape[1] - number
    if rest <= 0:
        return np.broadcast_to(np.arange(share.shape[1]), share.shape)
    return np.argpartition(share, max(0, rest - 1), axis=1)[:, rest:]


def _places(candidates: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where the nodes wanted (..., k) stand among the candidates (..., m)."""
    return (candidates[..., None, :] == wanted[..., None]).argmax(-1)


def _largest(weight: np.ndarray, number: int) -> np.ndarray:
    """Places (G, g, number) of the largest weights (G, m, g) of each query."""
    x = np.ascontiguousarray(weight.transpose(0, 2, 1))  # (G, g, m)
    width = x.shape[2]
    threshold = np.sort(x, axis=2)[..., width - number, None]
    flat = np.flatnonzero(x >= threshold)
    if len(flat) != x.size // width * number:  # ties
        return np.argsort(-x, axis=2, kind="stable")[..., :number]
    return flat.reshape(*x.shape[:2], number) % width
