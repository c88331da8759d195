"""The treecode's two kernels for any array library: trees of equal chunks, and queries against runs of them.

Static: no boolean indexing, no data-dependent shapes. Whole numbers have the library's own dtype. T tasks, F groups, g
rows a group, m nodes, d and e the widths of keys and values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from opoch_xp.graphs import traced
from opoch_xp.methods import Treecode
from opoch_xp.treecode.law import excess, log_mass
from opoch_xp.treecode.plan import group_count, group_rows, level_plan, splits
from opoch_xp.treecode.tree import HostRows, Lists, Part, Tree

Array = Any
ELEMENTS = 2**22  # rows gathered and logits held at a time: 16 MB each in float32
GUESS = 64  # nodes of a level that a group opens, about, where nothing bounds them
MOST = 128  # nodes of a level, and cells, that a group opens where shapes must be static and the method has no bound
ALL = 2**62  # more than there are


def rows_of(xp: Any, x: Array, index: Array) -> Array:
    """x[index] along the first axis, for an index of any shape."""
    taken = xp.take(x, xp.reshape(index, (-1,)), axis=0)
    return xp.reshape(taken, (*index.shape, *x.shape[1:]))


def runs_of(xp: Any, x: Array | HostRows, index: Array, rows: int) -> Array:
    """Runs of `rows` rows of x (chunks, size, ...), (*index.shape, rows, ...), by their number."""
    if isinstance(x, HostRows):
        return x.fetch(index, rows)
    return rows_of(xp, xp.reshape(x, (-1, rows, *x.shape[2:])), index)


def principal_order(x: Array, axes: Any, iterations: int, kept: Array | None, stretch: Array | None = None) -> Array:
    """Order (T, n) of the rows of x (T, n, d) after len(axes) levels of median splits; n a multiple of 2**len(axes).

    Each node is halved at the median projection on its principal axis, found by power iteration from axes[level].
    Rows that are not `kept` weigh nothing and sort last in every split. stretch (T, d): what the dimensions of the rows
    are multiplied by before.
    """
    xp = array_namespace(x)
    tasks, n, dim = x.shape
    x = x if stretch is None else x * stretch[:, None, :]
    where = device(x)
    flat = xp.reshape(x, (tasks * n, dim))
    weight = None if kept is None else xp.reshape(xp.astype(kept, x.dtype), (tasks * n,))
    base = xp.reshape(xp.arange(tasks, device=where) * n, (tasks, 1, 1))
    order = xp.broadcast_to(xp.arange(n, device=where), (tasks, 1, n))
    for level in range(len(axes)):
        node = rows_of(xp, flat, order + base)  # (T, nodes, size, d)
        if weight is None:
            node = node - xp.mean(node, axis=2, keepdims=True)
        else:
            w = rows_of(xp, weight, order + base)[..., None]
            count = xp.sum(w, axis=2, keepdims=True)
            node = (node - xp.sum(node * w, axis=2, keepdims=True) / xp.where(count == 0, 1.0, count)) * w
        axis = xp.asarray(axes[level][:, None], dtype=x.dtype, device=where)
        axis = xp.broadcast_to(axis, (*node.shape[:2], dim, 1))
        for _ in range(iterations):
            axis = xp.matrix_transpose(node) @ (node @ axis)
            axis = axis / _positive(xp, xp.max(xp.abs(axis), axis=2, keepdims=True))
            axis = axis / _positive(xp, xp.sqrt(xp.sum(axis * axis, axis=2, keepdims=True)))
        projection = (node @ axis)[..., 0]  # (T, nodes, size)
        if weight is not None:
            projection = xp.where(w[..., 0] == 0, xp.inf, projection)
        rank = xp.argsort(projection, axis=2, stable=True)
        order = xp.reshape(xp.take_along_axis(order, rank, axis=2), (tasks, 2 * order.shape[1], -1))
    return xp.reshape(order, (tasks, n))


def _positive(xp: Any, x: Array) -> Array:
    return xp.where(x > 0, x, 1.0)


def build_tree(
    k: Array, v: Array, axes: Any, method: Treecode, *, mask: Array | None = None, order: Array | None = None,
    stretch: Array | None = None,
) -> Tree:  # fmt: skip
    """Trees of equal chunks: k (chunks, size, d), v (chunks, size, d_v), mask (chunks, size) bool, True = keep.

    axes (levels, d): where the power iterations of each level start, host floats. stretch (chunks, d): what the keys'
    dimensions are multiplied by where they are split. `order` (chunks, size), if given, is taken instead of splitting.
    Cost: size * log2(size / leaf) * iterations * d a chunk.
    """
    xp = array_namespace(k, v)
    chunks, size, dim = k.shape
    if order is None:
        order = principal_order(k, axes, method.iterations, mask, stretch)
    base = xp.arange(chunks, device=device(k))[:, None] * size
    rows = xp.concat([xp.reshape(k, (chunks * size, dim)), xp.reshape(v, (chunks * size, -1))], axis=-1)
    cells = rows_of(xp, rows, order + base)  # (chunks, size, d + d_v)
    kept = None if mask is None else rows_of(xp, xp.reshape(mask, (-1,)), order + base)

    levels = level_plan(size, method).nodes
    split = xp.reshape(cells, (chunks, levels[0], method.leaf, -1))
    keys, values = split[..., :dim], split[..., dim:]
    ones = xp.ones(split.shape[:3], dtype=k.dtype, device=device(k))
    weight = ones if kept is None else xp.reshape(xp.astype(kept, k.dtype), split.shape[:3])
    counts: list[Array] = []
    summaries: list[Array] = []
    var = xp.zeros_like(keys)
    for level, nodes in enumerate(levels):
        if level:
            children = (chunks, nodes, levels[level - 1] // nodes, -1)
            weight = xp.reshape(counts[-1], children[:3])
            below = xp.reshape(summaries[-1], children)
            keys, var, values = below[..., :dim], below[..., dim : 2 * dim], below[..., 2 * dim :]
        count = xp.sum(weight, axis=2)
        share = (weight / _positive(xp, count)[..., None])[..., None]  # (chunks, nodes, children, 1)
        mean = xp.sum(share * keys, axis=2)
        spread = keys - mean[:, :, None, :]
        var = xp.sum(share * (var + spread * spread), axis=2)
        counts.append(count)
        summaries.append(xp.concat([mean, var, xp.sum(share * values, axis=2)], axis=-1))
    sizes = tuple(size // nodes for nodes in levels)
    return Tree(cells, order, tuple(summaries), sizes, None if mask is None else tuple(counts), kept, dim)


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
    """Queries of each task against the trees of a run of chunks.

    queries (T, n, d); task t reads the chunks [first[t], first[t] + count[t]) of `tree` (host integers); no chunk:
    zeros and lse -inf. groups (T, ceil(n / group) * group): the rows of each group in turn, as `query_groups`
    gives them, numbers of n and more being padding. seen (T, n): the log of the mass that each query has read of other
    keys, -inf for none: what it may leave unread is judged by all it knows of. `lists`, if given, say what each group
    opens (groups of all tasks in turn); seen is then not looked at.
    A non-finite query spoils its own row and opens nothing for its group. Traced by JAX, it has `static_bound`.
    """
    if traced(queries, seen, *tree.summaries):
        method = static_bound(method)
    return attend_runs(queries, tree, (first, count, most_chunks(count)), groups, method, scale, seen, lists)


def tree_lists(
    queries: Array,
    tree: Tree,
    first: np.ndarray,
    count: np.ndarray,
    groups: Array,
    method: Treecode,
    *,
    scale: float,
    seen: Array,
) -> Lists:
    """What tree_attention opens: arguments as there."""
    found: list[Lists] = []
    runs = (first, count, most_chunks(count))
    attend_runs(queries, tree, runs, groups, method, scale, seen, None, _at_once, found=found)
    return found[0]


def static_bound(method: Treecode) -> Treecode:
    """The method with a bound where shapes must not depend on the numbers: its own, MOST, or none for rtol = 0."""
    if method.most is not None:
        return method
    return replace(method, most=MOST if method.rtol else ALL)


def most_chunks(count: np.ndarray) -> int:
    """The most chunks that a task reads, at least 1."""
    return max(1, int(np.max(count)))


def query_groups(queries: Array, axes: Any, method: Treecode, *, stretch: Array | None = None) -> Array:
    """Row numbers (T, ceil(n / group) * group) of queries (T, n, d) in groups that are close in space; >= n is padding.

    axes (levels, d): where the power iterations start; stretch (T, d) as in `build_tree`. Queries that are not finite
    count as zeros. The rows are padded to group * 2**levels with rows that sort last, so all groups but the last are
    full.
    """
    return grouped_rows(queries, axes, method, stretch, principal_order)


def grouped_rows(
    queries: Array, axes: Any, method: Treecode, stretch: Array | None, order_rows: Callable[..., Array]
) -> Array:
    """`query_groups`, with the backend's own `principal_order`, whose order within a group may be any."""
    xp = array_namespace(queries)
    tasks, n, dim = queries.shape
    here = device(queries)
    size, total = group_rows(n, method.group), group_count(n, method.group)
    padded = size << splits(n, size)
    if size == 1 or total == 1:  # nothing is shared, or all is: any order will do
        return xp.broadcast_to(xp.arange(n, device=here), (tasks, n))
    queries = xp.where(finite_rows(queries)[..., None], queries, 0.0)
    if padded == n:
        return order_rows(queries, axes, method.iterations, None, stretch)
    rest = xp.zeros((tasks, padded - n, dim), dtype=queries.dtype, device=here)
    kept = xp.broadcast_to(xp.arange(padded, device=here) < n, (tasks, padded))
    order = order_rows(xp.concat([queries, rest], axis=1), axes, method.iterations, kept, stretch)[:, : total * size]
    last = (total - 1) * size
    return xp.concat([order[:, :last], xp.sort(order[:, last:], axis=1)], axis=1)  # padding numbers are the largest


def finite_rows(queries: Array) -> Array:
    """Which of the queries (T, n, d) are finite, (T, n)."""
    xp = array_namespace(queries)
    return xp.isfinite(xp.sum(queries * 0.0, axis=-1))


def in_blocks(function: Callable[..., tuple[Array, ...]], arrays: tuple[Array, ...], step: int) -> tuple[Array, ...]:
    """function(*arrays) for `step` entries of their first axis at a time, the results joined: it bounds memory."""
    xp = array_namespace(arrays[0])
    stop = arrays[0].shape[0]
    parts = [function(*(a[start : min(start + step, stop), ...] for a in arrays)) for start in range(0, stop, step)]
    return tuple(xp.concat(part, axis=0) for part in zip(*parts, strict=True))


def _at_once(function: Callable[..., tuple[Array, ...]], arrays: tuple[Array, ...], step: int) -> tuple[Array, ...]:
    return function(*arrays)


def largest(x: Array, count: int) -> Array:
    """Places of the `count` largest entries along the last axis, the largest first, ties to the lower place."""
    return array_namespace(x).argsort(-x, axis=-1, stable=True)[..., :count]


def attend_runs(
    queries: Array,
    tree: Tree,
    run: tuple[Array, Array, int],
    groups: Array,
    method: Treecode,
    scale: float,
    seen: Array,
    lists: Lists | None,
    loop: Callable[..., tuple[Array, ...]] = in_blocks,
    top: Callable[[Array, int], Array] = largest,
    found: list[Lists] | None = None,
) -> Part:
    """What tree_attention returns; run: first and count (T,), and the widest count.

    loop and top: `in_blocks` and `largest` of a library that has better ones than the Array API standard. What each
    block of groups opens is appended to `found`.
    """
    xp = array_namespace(queries)
    tasks, n, _ = queries.shape
    here = device(queries)
    finite = finite_rows(queries)
    queries = xp.where(finite[..., None], queries, 0.0)
    total = group_count(n, method.group)
    there = groups < n
    index = xp.where(there, groups, 0) + xp.arange(tasks, device=here)[:, None] * n
    size = groups.shape[1] // total
    index, there = (xp.reshape(a, (tasks * total, size)) for a in (index, there))
    voters = there & rows_of(xp, xp.reshape(finite, (-1,)), index)
    grouped = (rows_of(xp, xp.reshape(x, (tasks * n, *x.shape[2:])), index) for x in (queries, seen))
    first, count = (xp.repeat(xp.asarray(a, device=here), total) for a in run[:2])

    def some(q: Array, seen: Array, voters: Array, first: Array, count: Array, *given: Array) -> tuple[Array, ...]:
        group = Group(q, seen, voters, first, count, run[2])
        chosen = Lists(given[:-2], *given[-2:]) if given else None
        out, lse, read, opened = attend_groups(group, tree, method, scale, chosen, top)
        if found is not None:
            found.append(opened)
        return out, lse, read

    given = () if lists is None else (*lists.opened, lists.cells, lists.reads)
    step = max(1, ELEMENTS // (size * rows_at_once(tree, run[2], method)))
    out, lse, read = loop(some, (*grouped, voters, first, count, *given), step)
    place = xp.argsort(groups, axis=1, stable=True)[:, :n]  # padding numbers are the largest
    place = place + xp.arange(tasks, device=here)[:, None] * (total * size)
    out = rows_of(xp, xp.reshape(out, (tasks * total * size, -1)), place)
    lse = rows_of(xp, xp.reshape(lse, (-1,)), place)
    read = xp.sum(xp.reshape(read, (tasks, total, 3)), axis=1)
    return Part(xp.where(finite[..., None], out, xp.nan), xp.where(finite, lse, xp.nan), read)


def rows_at_once(tree: Tree, chunks: int, method: Treecode) -> int:
    """Nodes and keys that a group may have at hand at a time: all of the coarsest level, and a guess of what is opened;
    what `most` bounds, where it does."""
    top, width = chunks * tree.summaries[-1].shape[1], max(1, tree.cells.shape[2] // 64)
    opened = min(GUESS if method.most is None else method.most, chunks * tree.summaries[0].shape[1])
    return width * (top + opened * (method.branch + tree.leaf))


@dataclass(frozen=True)
class Group:
    """Groups of queries and the runs of chunks that they read: q (F, g, d), seen (F, g) the log mass read before,
    voters (F, g) bool, first and count (F,) of each run, the widest count."""

    q: Array
    seen: Array
    voters: Array
    first: Array
    count: Array
    widest: int


@dataclass
class Level:
    """The candidates of one level for some groups, m of them at the most.

    number: of the level; node (F, m): their rows in the tree's summaries of the level; rows (F, m, 2 d + e): those
    summaries; count (F, 1, m): their keys, 0 for a candidate that is none; mass and sigma2 (F, g, m): log mass, and
    variance of the logits. closed (F, g, m) bool: where a candidate stands for its keys; opened (F, k): what is not,
    for some query, as in `Lists`; nodes (F,): how many there are, bounded (F,): whether `most` left something closed.

    Of level 0 also, for the cells (F, u) that some query reads: cells, their rows; reads (F, g, u) bool, by whom.
    """

    number: int
    node: Array
    rows: Array
    count: Array
    mass: Array
    sigma2: Array
    closed: Array = None
    opened: Array = None
    nodes: Array = None
    bounded: Array = None
    cells: Array = None
    reads: Array = None


@dataclass
class State:
    """A softmax over what was taken in so far: the largest logit and the sum of weights (F, g), and weighted values
    (F, g, e)."""

    top: Array
    total: Array
    out: Array

    def take(self, xp: Any, logits: Array, values: Array) -> None:
        """Rows with logits (F, g, m) and values (F, m, e)."""
        if logits.shape[2] == 0:
            return
        highest = xp.maximum(self.top, xp.max(logits, axis=2))
        shift = xp.where(highest == -xp.inf, 0.0, highest)
        weight, keep = xp.exp(logits - shift[..., None]), xp.exp(self.top - shift)
        self.top, self.total = highest, self.total * keep + xp.sum(weight, axis=2)
        self.out = self.out * keep[..., None] + weight @ values

    def finished(self, xp: Any) -> tuple[Array, Array]:
        """out (F, g, e) and lse (F, g)."""
        some = self.total > 0
        safe = xp.where(some, self.total, 1.0)
        return self.out / safe[..., None], xp.where(some, self.top + xp.log(safe), -xp.inf)


def attend_groups(
    group: Group, tree: Tree, method: Treecode, scale: float, lists: Lists | None, top: Callable[[Array, int], Array]
) -> tuple[Array, Array, Array, Lists]:
    """out (F, g, e) and lse (F, g) of one softmax over what `walk` leaves closed and the keys that are read; read
    (F, 3) as in `Part`; and what is opened."""
    q, xp = group.q, array_namespace(group.q)
    lead, here = q.shape[:2], {"dtype": q.dtype, "device": device(q)}
    width = tree.cells.shape[2] - tree.dim
    state = State(xp.full(lead, -xp.inf, **here), xp.zeros(lead, **here), xp.zeros((*lead, width), **here))
    levels = []
    for level in walk(group, tree, method, scale, lists, top):
        state.take(xp, xp.where(level.closed, level.mass, -xp.inf), level.rows[..., 2 * tree.dim :])
        levels.append(level)
    keys, logits = cell_keys(levels[-1], tree, q * scale)
    state.take(xp, logits, keys[..., tree.dim :])
    opened = Lists(tuple(level.opened for level in levels[:-1]), levels[-1].opened, levels[-1].reads)
    return *state.finished(xp), rows_read(group, tree, levels), opened


def rows_read(group: Group, tree: Tree, levels: list[Level]) -> Array:
    """read (F, 3) as in `Part`, of all levels of a walk."""
    xp, dtype = array_namespace(group.q), group.q.dtype
    asking = xp.sum(xp.astype(group.voters, dtype), axis=1)
    looked, bounded = xp.zeros_like(asking), levels[0].bounded
    for level in levels:
        looked, bounded = looked + level.nodes, bounded | level.bounded
    keys = tree.leaf * xp.sum(xp.astype(levels[-1].reads & group.voters[..., None], dtype), axis=(1, 2))
    return xp.stack([asking * looked, keys, xp.where(bounded, asking, xp.zeros_like(asking))], axis=1)


def walk(
    group: Group, tree: Tree, method: Treecode, scale: float, lists: Lists | None, top: Callable[[Array, int], Array]
) -> Iterator[Level]:
    """The levels of the trees from the coarsest on, for groups of queries: what of each is opened, what stays closed.

    top: as in `attend_runs`.
    """
    q, xp = group.q, array_namespace(group.q)
    here, plan = device(q), level_plan(tree.cells.shape[1], method)
    count, voters, known = xp.asarray(group.count, device=here), group.voters[..., None], group.seen
    thresholds = [plan.threshold(chunks, method.rtol) for chunks in range(group.widest + 1)]
    threshold = xp.take(xp.asarray(thresholds, dtype=q.dtype, device=here), count)[:, None, None]
    candidates = xp.arange(group.widest * plan.nodes[-1], device=here)[None, :]
    candidates = xp.broadcast_to(candidates, (q.shape[0], candidates.shape[1]))
    there = candidates < count[:, None] * plan.nodes[-1]
    for number in range(plan.depth, -1, -1):
        level = _looked_at(xp, group, tree, number, plan.nodes[number], candidates, there, scale)
        full = level.count[:, 0, :] > 0
        whole = _log_sum(xp, known, level.mass)
        share = level.mass + excess(level.sigma2, level.count) - xp.where(whole == -xp.inf, 0.0, whole)[..., None]
        share = xp.where(voters & full[:, None, :], share, -xp.inf)  # of the query's mass, what a node may hold
        wants, heaviest = share > threshold, xp.max(share, axis=1)
        wanted = xp.any(wants, axis=1)
        if plan.forced[number]:
            wanted = wanted | (full & _among_largest(xp, heaviest, plan.forced[number], top))
        if lists is not None:
            given = lists.opened[plan.depth - number] if number else lists.cells
            wanted = xp.any(candidates[..., None] == given[:, None, :], axis=2) & there
        pick, wanted, level.bounded = _picked(xp, wanted, heaviest, method.most, top)
        taken = xp.take_along_axis(wanted, pick, axis=1)
        level.opened = xp.where(taken, xp.take_along_axis(candidates, pick, axis=1), -1)
        level.nodes = xp.sum(xp.astype(there, q.dtype), axis=1)
        if number:
            level.closed = xp.broadcast_to(~wanted[:, None, :], level.mass.shape)
            yield level
            known = _log_sum(xp, known, xp.where(level.closed, level.mass, -xp.inf))
            below = plan.children(number)
            candidates = level.opened[..., None] * below + xp.arange(below, device=here)
            candidates = xp.reshape(candidates, (q.shape[0], -1))
            there = xp.repeat(taken, below, axis=1)
            continue
        if lists is not None:
            wants = _reads_given(xp, lists, candidates)
        reads = wants & wanted[:, None, :]
        level.closed = ~reads
        reads = xp.take_along_axis(reads, xp.broadcast_to(pick[:, None, :], (*q.shape[:2], pick.shape[1])), axis=2)
        level.reads = reads & taken[:, None, :]
        level.cells = xp.where(taken, xp.take_along_axis(level.node, pick, axis=1), 0)
        yield level


def _looked_at(
    xp: Any, group: Group, tree: Tree, number: int, nodes: int, candidates: Array, there: Array, scale: float
) -> Level:
    """The candidates (F, m) of a level of `nodes` nodes a chunk, those that are there: their summaries and masses."""
    q, dim, here = group.q * scale, tree.dim, device(group.q)
    node = xp.where(there, candidates + xp.asarray(group.first, device=here)[:, None] * nodes, 0)
    rows = runs_of(xp, tree.summaries[number], node, 1)[..., 0, :]
    if tree.counts is None:
        count = xp.full(node.shape, float(tree.sizes[number]), dtype=q.dtype, device=here)
    else:
        count = rows_of(xp, xp.reshape(tree.counts[number], (-1,)), node)
    count = xp.where(there, count, 0.0)[:, None, :]
    sigma2 = (q * q) @ xp.matrix_transpose(rows[..., dim : 2 * dim])
    return Level(number, node, rows, count, log_mass(q @ xp.matrix_transpose(rows[..., :dim]), sigma2, count), sigma2)


def _reads_given(xp: Any, lists: Lists, candidates: Array) -> Array:
    """Which query reads which of the candidate cells (F, m), by the lists: (F, g, m)."""
    groups, g, cells = lists.reads.shape
    if cells == 0:
        return xp.zeros((groups, g, candidates.shape[1]), dtype=xp.bool, device=device(candidates))
    same = lists.cells[:, None, :] == candidates[..., None]  # (F, m, u)
    place = xp.broadcast_to(xp.argmax(xp.astype(same, xp.int8), axis=2)[:, None, :], (groups, g, same.shape[1]))
    return xp.take_along_axis(lists.reads, place, axis=2) & xp.any(same, axis=2)[:, None, :]


def cell_keys(level: Level, tree: Tree, q: Array) -> tuple[Array, Array]:
    """The keys (F, u * leaf, d + e) of the cells that some query reads, of level 0 of a walk, and their logits
    (F, g, u * leaf), -inf where a query does not read a key; q (F, g, d), scaled."""
    xp = array_namespace(q)
    keys = runs_of(xp, tree.cells, level.cells, tree.leaf)
    keys = xp.reshape(keys, (q.shape[0], level.cells.shape[1] * tree.leaf, tree.cells.shape[2]))
    sees = xp.repeat(level.reads, tree.leaf, axis=2)
    if tree.kept is not None:
        kept = rows_of(xp, xp.reshape(tree.kept, (-1, tree.leaf)), level.cells)
        sees = sees & xp.reshape(kept, (q.shape[0], 1, keys.shape[1]))
    return keys, xp.where(sees, q @ xp.matrix_transpose(keys[..., : tree.dim]), -xp.inf)


def _log_sum(xp: Any, known: Array, mass: Array) -> Array:
    """ln of exp(known) + the sum of exp(mass) along its last axis; known (F, g), mass (F, g, m)."""
    top = xp.maximum(known, xp.max(mass, axis=2)) if mass.shape[2] else known
    shift = xp.where(top == -xp.inf, 0.0, top)
    total = xp.exp(known - shift) + xp.sum(xp.exp(mass - shift[..., None]), axis=2)
    return xp.where(top == -xp.inf, -xp.inf, shift + xp.log(xp.where(total > 0, total, 1.0)))


def _among_largest(xp: Any, x: Array, count: int, top: Callable[[Array, int], Array]) -> Array:
    """Which entries of x (F, m) are among the `count` largest of their row, ties to the lower place.

    top may give those in any order, and any of equals: its least value tells them.
    """
    if count >= x.shape[1]:
        return xp.ones(x.shape, dtype=xp.bool, device=device(x))
    least = xp.min(xp.take_along_axis(x, top(x, count), axis=1), axis=1, keepdims=True)
    above, equal = x > least, x == least
    room = count - xp.sum(xp.astype(above, xp.int32), axis=1, keepdims=True)
    return above | (equal & (xp.cumulative_sum(xp.astype(equal, xp.int32), axis=1) <= room))


def _picked(
    xp: Any, wanted: Array, heaviest: Array, most: int | None, top: Callable[[Array, int], Array]
) -> tuple[Array, Array, Array]:
    """Places (F, k) that hold all that is wanted (F, m), then others; what is wanted and among them; and for which
    groups (F,) a bound left something out.

    k is `most`, the heaviest first. Without that bound it is what the group that wants most needs: read back.
    """
    count = xp.sum(xp.astype(wanted, xp.int32), axis=1)
    width = int(xp.max(count)) if most is None else min(most, wanted.shape[1])
    heavy = xp.where(wanted, heaviest, -xp.inf)
    pick = top(heavy, width)
    if most is not None:
        wanted = wanted & _among_largest(xp, heavy, width, top)
    return pick, wanted, count > width
