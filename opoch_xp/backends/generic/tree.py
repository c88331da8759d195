"""The treecode's two kernels for any array library: trees of equal chunks, and queries against runs of them.

Static: no boolean indexing, no data-dependent shapes. Whole numbers have the library's own dtype. T tasks, F groups, g
rows a group, m nodes, d and e the widths of keys and values.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from opoch_xp.methods import Treecode
from opoch_xp.tree import HostRows, Lists, Tree, group_count, level_nodes, rows_read, splits

Array = Any
ELEMENTS = 2**22  # rows gathered and logits held at a time: 16 MB each in float32


def rows_of(xp: Any, x: Array, index: Array) -> Array:
    """x[index] along the first axis, for an index of any shape."""
    taken = xp.take(x, xp.reshape(index, (-1,)), axis=0)
    return xp.reshape(taken, (*index.shape, *x.shape[1:]))


def runs_of(xp: Any, x: Array | HostRows, index: Array, rows: int) -> Array:
    """Runs of `rows` rows of x (chunks, size, ...), (*index.shape, rows, ...), by their number."""
    if isinstance(x, HostRows):
        return x.fetch(index, rows)
    return rows_of(xp, xp.reshape(x, (-1, rows, *x.shape[2:])), index)


def principal_order(x: Array, axes: Any, iterations: int, kept: Array | None) -> Array:
    """Order (T, n) of the rows of x (T, n, d) after len(axes) levels of median splits; n a multiple of 2**len(axes).

    Each node is halved at the median projection on its principal axis, found by power iteration from axes[level].
    Rows that are not `kept` weigh nothing and sort last in every split.
    """
    xp = array_namespace(x)
    tasks, n, dim = x.shape
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
    k: Array, v: Array, axes: Any, method: Treecode, *, mask: Array | None = None, order: Array | None = None
) -> Tree:
    """Trees of equal chunks: k (chunks, size, d), v (chunks, size, d_v), mask (chunks, size) bool, True = keep.

    axes (levels, d): where the power iterations of each level start, host floats. `order` (chunks, size), if given,
    is taken instead of splitting. Cost: size * log2(size / leaf) * iterations * d a chunk.
    """
    xp = array_namespace(k, v)
    chunks, size, dim = k.shape
    if order is None:
        order = principal_order(k, axes, method.iterations, mask)
    base = xp.arange(chunks, device=device(k))[:, None] * size
    rows = xp.concat([xp.reshape(k, (chunks * size, dim)), xp.reshape(v, (chunks * size, -1))], axis=-1)
    cells = rows_of(xp, rows, order + base)  # (chunks, size, d + d_v)
    kept = None if mask is None else rows_of(xp, xp.reshape(mask, (-1,)), order + base)

    levels = level_nodes(size, method)
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


def log_mass(dot: Array, sigma2: Array, count: Array) -> Array:
    """Estimated log of the sum of exp(scale q . k) over the `count` keys of a node.

    dot = scale q . mean; sigma2 = scale**2 sum_i q_i**2 var_i. Mean field, and the free energy of `count` Gaussian
    energies with its freezing transition: count = 0 gives -inf. Source: Derrida, Random-energy model, 1981.
    """
    xp = array_namespace(dot)
    log = xp.log(xp.where(count > 0, count, 1.0))
    frozen = 2 * log
    liquid = (sigma2 <= frozen) | (frozen == 0)  # a node of one key has no variance; one of none no gradient
    energy = xp.where(liquid, log + sigma2 / 2, xp.sqrt(xp.where(liquid, 1.0, frozen * sigma2)))
    return xp.where(count > 0, dot + energy, -xp.inf)


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
    """Queries of each task against the trees of a run of chunks: out (T, n, d_v), lse (T, n).

    queries (T, n, d); task t reads the chunks [first[t], first[t] + count[t]) of `tree` (host integers); no chunk:
    zeros and lse -inf. axes (levels, d): where the power iterations that group the queries start.
    `groups` (T, ceil(n / group) * group) int64, if given, lists the rows of each group in turn, numbers of n and more
    being padding; `lists`, if given, what each group opens (groups of all tasks in turn).
    A non-finite query spoils its own row and has no vote in its group.
    """
    run = (first, count, most_chunks(count))
    return attend_runs(queries, tree, run, axes, method, scale, groups, lists)[:2]


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
) -> Lists:
    """What tree_attention opens for the groups given: arguments as there."""
    return attend_runs(queries, tree, (first, count, most_chunks(count)), axes, method, scale, groups, None)[2]


def most_chunks(count: np.ndarray) -> int:
    """The most chunks that a task reads, at least 1."""
    return max(1, int(np.max(count)))


def query_groups(queries: Array, axes: Any, method: Treecode) -> Array:
    """Row numbers (T, ceil(n / group) * group) of queries (T, n, d) in groups that are close in space; >= n is padding.

    axes (levels, d): where the power iterations start. Queries that are not finite count as zeros. The rows are padded
    to group * 2**levels with rows that sort last, so all groups but the last are full.
    """
    xp = array_namespace(queries)
    tasks, n, dim = queries.shape
    here = device(queries)
    queries = xp.where(_finite(xp, queries)[..., None], queries, 0.0)
    total = group_count(n, method.group)
    size = n if total == 1 else method.group
    padded = size << splits(n, size)
    if size == 1:  # nothing is shared: any order will do
        return xp.broadcast_to(xp.arange(n, device=here), (tasks, n))
    if padded == n:
        return principal_order(queries, axes, method.iterations, None)
    rest = xp.zeros((tasks, padded - n, dim), dtype=queries.dtype, device=here)
    kept = xp.broadcast_to(xp.arange(padded, device=here) < n, (tasks, padded))
    order = principal_order(xp.concat([queries, rest], axis=1), axes, method.iterations, kept)
    return order[:, : total * size]


def _finite(xp: Any, queries: Array) -> Array:
    """Which of the queries (T, n, d) are finite, (T, n)."""
    return xp.isfinite(xp.sum(queries * 0.0, axis=-1))


def in_blocks(function: Callable[..., tuple[Array, ...]], arrays: tuple[Array, ...], step: int) -> tuple[Array, ...]:
    """function(*arrays) for `step` entries of their first axis at a time, the results joined: it bounds memory."""
    xp = array_namespace(arrays[0])
    stop = arrays[0].shape[0]
    parts = [function(*(a[start : min(start + step, stop), ...] for a in arrays)) for start in range(0, stop, step)]
    return tuple(xp.concat(part, axis=0) for part in zip(*parts, strict=True))


def largest(x: Array, count: int) -> Array:
    """Places of the `count` largest entries along the last axis, the largest first, ties to the lower place."""
    return array_namespace(x).argsort(-x, axis=-1, stable=True)[..., :count]


def attend_runs(
    queries: Array,
    tree: Tree,
    run: tuple[Array, Array, int],
    axes: Any,
    method: Treecode,
    scale: float,
    groups: Array | None,
    lists: Lists | None,
    loop: Callable[..., tuple[Array, ...]] = in_blocks,
    top: Callable[[Array, int], Array] = largest,
) -> tuple[Array, Array, Lists]:
    """out, lse and lists of tree_attention; run: first and count (T,), and the widest count.

    loop and top: `in_blocks` and `largest` of a library that has better ones than the Array API standard.
    """
    xp = array_namespace(queries)
    tasks, n, dim = queries.shape
    here = device(queries)
    finite = _finite(xp, queries)
    queries = xp.where(finite[..., None], queries, 0.0)
    if groups is None:
        groups = query_groups(queries, axes, method)
    total = group_count(n, method.group)
    valid = groups < n
    index = xp.where(valid, groups, 0) + xp.arange(tasks, device=here)[:, None] * n
    size = groups.shape[1] // total
    index, valid = (xp.reshape(a, (tasks * total, size)) for a in (index, valid))
    grouped = rows_of(xp, xp.reshape(queries, (tasks * n, dim)), index)  # (F, g, d)
    votes = xp.astype(valid & rows_of(xp, xp.reshape(finite, (-1,)), index), queries.dtype)
    first, count = (xp.repeat(xp.asarray(a, device=here), total) for a in run[:2])

    def some(q: Array, votes: Array, first: Array, count: Array, *given: Array) -> tuple[Array, ...]:
        chosen = Lists(given[:-1], given[-1]) if given else None
        out, lse, opened = attend_groups(q, votes, tree, (first, count, run[2]), method, scale, chosen, top)
        return out, lse, *opened.opened, opened.own

    read, width = rows_read(tree.cells.shape[1], run[2], method), tree.cells.shape[-1]
    shared, own = read["far"] + read["near"], read["own"]
    step = max(1, ELEMENTS // max(1, size * (shared + own * width) + shared * width))
    given = () if lists is None else (*lists.opened, lists.own)
    out, lse, *opened = loop(some, (grouped, votes, first, count, *given), step)
    place = xp.argsort(groups, axis=1, stable=True)[:, :n]  # padding numbers are the largest
    place = place + xp.arange(tasks, device=here)[:, None] * (total * size)
    out = rows_of(xp, xp.reshape(out, (tasks * total * size, -1)), place)
    lse = rows_of(xp, xp.reshape(lse, (-1,)), place)
    spoiled = ~finite
    chosen = Lists(tuple(opened[:-1]), opened[-1])
    return xp.where(spoiled[..., None], xp.nan, out), xp.where(spoiled, xp.nan, lse), chosen


def attend_groups(
    q: Array, votes: Array, tree: Tree, run: tuple[Any, Any, int], method: Treecode, scale: float, lists: Lists | None,
    top: Callable[[Array, int], Array] = largest,
) -> tuple[Array, Array, Lists]:  # fmt: skip
    """Steps 1 to 5 for groups q (F, g, d), voting with weight votes (F, g); run: first and count (F,), widest count."""
    first, count, widest = run
    xp = array_namespace(q)
    here, dim, leaf = device(q), tree.dim, tree.leaf
    depth = len(tree.summaries) - 1
    nodes = [a.shape[1] for a in tree.summaries]
    base = xp.asarray(first, device=here)[:, None]  # (F, 1)
    limit = xp.asarray(count, device=here)[:, None]
    candidates = xp.arange(widest * nodes[depth], device=here)[None, :]
    candidates = xp.broadcast_to(candidates, (q.shape[0], candidates.shape[1]))
    norm = xp.full((*q.shape[:2], 1), -xp.inf, dtype=q.dtype, device=here)
    square = q * q * scale**2
    logits, values, opened = [], [], []
    for level in range(depth, -1, -1):
        there = candidates < limit * nodes[level]
        node = xp.where(there, candidates + base * nodes[level], 0)
        rows = runs_of(xp, tree.summaries[level], node, 1)[..., 0, :]
        if tree.counts is None:
            size = xp.full(node.shape, float(tree.sizes[level]), dtype=q.dtype, device=here)
        else:
            size = rows_of(xp, xp.reshape(tree.counts[level], (-1,)), node)
        mean, var, value = rows[..., :dim], rows[..., dim : 2 * dim], rows[..., 2 * dim :]
        mass = log_mass(
            scale * (q @ xp.matrix_transpose(mean)),
            square @ xp.matrix_transpose(var),
            xp.where(there, size, 0.0)[:, None, :],
        )  # (F, g, m)
        norm = xp.maximum(norm, _logsumexp(xp, mass))  # no query's votes at a level exceed 1 in sum
        share = xp.exp(mass - xp.where(norm == -xp.inf, 0.0, norm))
        share = xp.sum(xp.where(votes[..., None] > 0, share, 0.0), axis=1)  # (F, m)
        width = min(method.open if level else method.near, candidates.shape[1])
        if lists is not None:
            pick = _given(xp, candidates, lists.opened[depth - level])
        else:
            pick = top(xp.where(there, share, -1.0), width)  # absent nodes last
        picked = _among(xp, pick, candidates.shape[1])
        chosen = xp.take_along_axis(candidates, pick, axis=1)
        opened.append(chosen)
        logits.append(xp.where(picked[:, None, :], -xp.inf, mass))  # far field: unopened nodes as pseudo-keys
        values.append(value)
        if level:
            children = nodes[level - 1] // nodes[level]
            below = xp.arange(children, device=here)
            candidates = xp.reshape(chosen[..., None] * children + below, (q.shape[0], -1))
    cells, cell_kept = _cells(xp, tree, chosen, base, limit)  # near field of the group
    near = scale * (q @ xp.matrix_transpose(cells[..., :dim]))
    logits.append(xp.where(cell_kept[:, None, :], near, -xp.inf))
    values.append(cells[..., dim:])

    mass = logits[depth]  # of the cells that the group did not take
    if lists is not None:
        best = _given(xp, candidates[:, None, :], lists.own)
    else:
        best = top(mass, max(0, min(method.own, mass.shape[2] - pick.shape[1])))
    own = xp.take_along_axis(xp.broadcast_to(candidates[:, None, :], mass.shape), best, axis=2)  # (F, g, own)
    logits[depth] = xp.where(_among(xp, best, mass.shape[2]), -xp.inf, mass)
    taken = xp.take_along_axis(mass, best, axis=2) > -xp.inf
    cells, cell_kept = _cells(xp, tree, own, base[..., None], limit[..., None])  # (F, g, own * leaf, d + e)
    mine = (cells[..., :dim] @ q[..., None])[..., 0] * scale
    mine = xp.where(cell_kept & xp.repeat(taken, leaf, axis=2), mine, -xp.inf)
    return *_softmax(xp, logits, values, mine, cells[..., dim:]), Lists(tuple(opened), own)


def _logsumexp(xp: Any, x: Array) -> Array:
    highest = xp.max(x, axis=-1, keepdims=True)
    shift = xp.where(highest == -xp.inf, 0.0, highest)
    total = xp.sum(xp.exp(x - shift), axis=-1, keepdims=True)
    return xp.where(highest == -xp.inf, -xp.inf, shift + xp.log(xp.where(total == 0, 1.0, total)))


def _among(xp: Any, pick: Array, width: int) -> Array:
    """Bool (..., width): which places are in pick (..., k), whose entries differ."""
    places = xp.arange(width, device=device(pick))
    return xp.any(pick[..., None, :] == places[:, None], axis=-1)


def _given(xp: Any, candidates: Array, wanted: Array) -> Array:
    """Places among the candidates (..., m) of the nodes wanted (..., k)."""
    return xp.argmax(xp.astype(candidates[..., None, :] == wanted[..., :, None], xp.int8), axis=-1)


def _cells(xp: Any, tree: Tree, cells: Array, base: Array, limit: Array) -> tuple[Array, Array]:
    """Rows (..., cells * leaf, d + e) of the run's cells, and whether each is a key that is kept."""
    per_chunk, leaf = tree.summaries[0].shape[1], tree.leaf
    there = cells < limit * per_chunk
    node = xp.where(there, cells + base * per_chunk, 0)
    rows = runs_of(xp, tree.cells, node, leaf)
    kept = xp.broadcast_to(there[..., None], rows.shape[:-1])
    if tree.kept is not None:
        kept = kept & rows_of(xp, xp.reshape(tree.kept, (-1, leaf)), node)
    lead = (*cells.shape[:-1], cells.shape[-1] * leaf)
    return xp.reshape(rows, (*lead, rows.shape[-1])), xp.reshape(kept, lead)


def _softmax(xp: Any, logits: list[Array], values: list[Array], mine: Array, own_values: Array) -> tuple[Array, Array]:
    """One softmax over shared rows, logits (F, g, m) and values (F, m, e), and own, mine (F, g, o) and (F, g, o, e)."""
    top = xp.max(xp.concat([*logits, mine], axis=2), axis=2)  # (F, g)
    shift = xp.where(top == -xp.inf, 0.0, top)[..., None]
    weight = xp.exp(mine - shift)
    total = xp.sum(weight, axis=2)
    out = (weight[..., None, :] @ own_values)[..., 0, :]
    for part, value in zip(logits, values, strict=True):
        weight = xp.exp(part - shift)
        total = total + xp.sum(weight, axis=2)
        out = out + weight @ value
    seen = total != 0
    safe = xp.where(seen, total, 1.0)
    return out / safe[..., None], xp.where(seen, shift[..., 0] + xp.log(safe), -xp.inf)
