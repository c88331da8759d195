"""Gradients of the treecode's parts, compiled: of groups of queries against trees, and of queries against own blocks.

With the log-sum-exp of the whole softmax a row with logit l and value v weighs P = exp(l - lse), and from the gradient
dout of the output, with delta = dout . out - dlse,

    dl = P (dout . v - delta),  dv = P dout.

A walk decides what it decided in the forward pass, since it is told what was read before; what it leaves closed and the
keys that it reads are then rows like others. Source: Dao et al., FlashAttention, 2022, for dl and delta.

Letters as in `attend`.
"""

from typing import Any

import numpy as np

from opoch_xp.backends.compiled import masses
from opoch_xp.backends.compiled.products import ROWS, add_product, add_products, add_tall_products, dots, mix, turn
from opoch_xp.backends.compiled.vector import HIGHEST, VECTOR, array_at, compiled, exponential
from opoch_xp.backends.compiled.walk import (
    READERS,
    askers,
    decide,
    grown,
    grown_list,
    law_constants,
    left,
    load_group,
    log_masses,
    negligible,
    open_nodes,
)

Array = Any

TILE = 128  # queries and keys of a tile of an own block
NO_LIST, NO_READS = np.zeros((0, 0), np.int64), np.zeros((0, 0, 0), np.bool_)


@compiled
def raise_top(old: Array, top: Array, total: Array, known: Array) -> None:
    """Bring the state of a walk from maxima `old` to `top` (g,)."""
    for j in range(top.size):
        if top[j] != old[j]:
            factor = exponential(old[j] - top[j]) if old[j] > -np.inf else old.dtype.type(0)
            total[j] *= factor
            known[j] *= factor


@compiled
def load_gradient(
    index: Array, lse: Array, dout: Array, delta: Array, votes: Array, whole: Array, rest: Array, lined: Array,
    turned: Array,
) -> None:  # fmt: skip
    """Of a group's queries, rows `index`: whole (g,) their lse and rest (g,) their delta, lined (count, e) and turned
    (e, g) their dout. A query that sees nothing, or is not finite, weighs nothing: its lse is infinite."""
    for j in range(whole.size):
        whole[j], rest[j] = np.inf, 0
    for j in range(index.size):
        row = index[j]
        seen = votes[j] and abs(lse[row]) < np.inf
        if seen:
            whole[j], rest[j] = lse[row], delta[row]
        for c in range(dout.shape[1]):
            lined[j, c] = dout[row, c] if seen else 0
    turn(lined, 0, index.size, 0, dout.shape[1], turned)
    turned[:, index.size :] = 0


@compiled
def closed_backward(
    rows: Array, node: Array, live: int, counts: Array, size: int, dim: int, weight: Array, shift: Array, whole: Array,
    rest: Array, spread: Array, lined: Array, lined_squares: Array, lined_dout: Array, turned_dout: Array, slope: Array,
    ids: Array, count: int, gradient: Array, dot: Array, square: Array,
) -> None:  # fmt: skip
    """Gradients through the nodes node[:live] that stay closed: into `gradient` (nodes, 2 d + e), and for the queries
    into dot and square (d, g), the gradients of the scaled queries and of their squares.

    weight (live, g) holds exp(mass - shift), and becomes dl; spread (live, g), sigma^2; slope (live, g) is scratch.
    lined, lined_squares (count, d), lined_dout (count, e); turned_dout (e, g); ids counts from 0.
    """
    e, padded = turned_dout.shape[0], -(-live // ROWS) * ROWS
    for i in range(live, padded):
        node[i] = node[0]
    dots(rows, node, 0, padded, 2 * dim, e, turned_dout, slope)  # dout . v
    for i in range(live):
        for j in range(weight.shape[1]):  # P, in place of the weight
            weight[i, j] *= shift[j]
    add_rows(weight, live, ids, lined_dout, count, e, gradient, node, 2 * dim)
    use, some = np.empty(6, weight.dtype), np.empty(6, weight.dtype)
    law_constants(size, use)
    for i in range(live):
        table = use
        if counts.size and counts[node[i]] != size:
            law_constants(counts[node[i]], some)
            table = some
        masses.slopes(weight, slope, spread, rest, i, table)  # weight: dl; slope: dl by sigma^2
    add_rows(weight, live, ids, lined, count, dim, gradient, node, 0)
    add_rows(slope, live, ids, lined_squares, count, dim, gradient, node, dim)
    mix(rows, node, 0, live, 0, dim, weight[:live], dot)
    mix(rows, node, 0, live, dim, dim, slope[:live], square)


@compiled
def add_rows(
    a: Array, m: int, ids: Array, x: Array, count: int, columns: int, out: Array, index: Array, column: int
) -> None:
    """out[index[i], column + c] += sum over j below count of a[i, j] * x[j, c], for i below m and c below columns."""
    whole = m // ROWS * ROWS
    for i in range(0, whole, ROWS):
        add_products(a, ids, i, 0, count, x, 0, 0, out, index, i, column, columns)
    for i in range(whole, m):
        add_product(a, ids, i, 0, count, x, 0, 0, out, index, i, column, columns)


@compiled
def cell_backward(
    cells: Array, kept: Array, every_key: bool, cell: int, leaf: int, dim: int, asks: Array, used: int, count: int,
    lined: Array, lined_dout: Array, whole: Array, rest: Array, near: Array, near_dout: Array, turned: Array,
    logits: Array, slope: Array, ids: Array, gradient: Array, part: Array, found: Array,
) -> None:  # fmt: skip
    """Gradients through the keys of a cell that the queries asks[used : used + count] read: into gradient (keys, d + e)
    and, of the scaled queries, into found (count, d).

    near and near_dout (g, d and e up to whole vectors): the readers' queries and gradients side by side, zeros after
    them. turned (most of d and e, lanes), logits and slope (g, lanes), part (lanes, most of near's columns): scratch.
    """
    first, lanes, e = cell * leaf, logits.shape[1], cells.shape[1] - dim
    padded = -(-count // READERS) * READERS
    for r in range(padded):
        j = asks[used + r]  # of a row that is nobody's where there is none
        for c in range(dim):
            near[r, c] = lined[j, c]
        for c in range(e):
            near_dout[r, c] = lined_dout[j, c]
        for i in range(lanes):
            logits[r, i], slope[r, i] = 0, 0
    turn(cells, first, leaf, 0, dim, turned)
    for r in range(0, padded, READERS):
        add_tall_products(near, ids, r, 0, dim, turned, 0, 0, logits, ids, r, 0, lanes)
    turn(cells, first, leaf, dim, e, turned)
    for r in range(0, padded, READERS):
        add_tall_products(near_dout, ids, r, 0, e, turned, 0, 0, slope, ids, r, 0, lanes)
    for r in range(padded):
        j = asks[used + r]
        for i in range(lanes):
            if r >= count or i >= leaf or not (every_key or kept[first + i]):
                logits[r, i] = -np.inf
        masses.weigh_pairs(
            logits, slope, r, whole[j] if r < count else whole.dtype.type(0),
            rest[j] if r < count else rest.dtype.type(0),
        )  # fmt: skip
    key_gradients(logits, count, leaf, near_dout, ids, part, gradient, first, dim, e)
    key_gradients(slope, count, leaf, near, ids, part, gradient, first, 0, dim)
    for r in range(0, padded, ROWS):
        add_products(slope, ids, r, 0, leaf, cells, first, 0, found, asks, used + r, 0, dim)


@compiled
def key_gradients(
    weight: Array, count: int, leaf: int, near: Array, ids: Array, part: Array, gradient: Array, first: int,
    column: int, columns: int,
) -> None:  # fmt: skip
    """gradient[first + i, column + c] += sum over r below count of weight[r, i] * near[r, c], i below leaf."""
    into = part.reshape(-1)[: part.shape[0] * near.shape[1]].reshape(part.shape[0], near.shape[1])
    into[:leaf] = 0
    mix(weight, ids, 0, count, 0, leaf, near[:count], into)
    for i in range(leaf):
        for c in range(columns):
            gradient[first + i, column + c] += into[i, c]


@compiled
def groups_backward(
    queries: Array, finite: Array, index: Array, held: Array, first: Array, chunks: Array, levels: Array,
    counts: Array, chunks_held: int, nodes: Array, sizes: Array, forced: Array, thresholds: Array, most: int,
    cells: Array, kept: Array, leaf: int, dim: int, scale: Any, seen: Array, lse: Array, dout: Array,
    delta: Array, summary_gradients: Array, cell_gradients: Array, dq: Array,
) -> None:  # fmt: skip
    """Groups of queries, as in `attend.attend_groups`; lse (N,) of the whole softmax, dout (N, e), delta (N,).

    Adds to dq (N, d), to cell_gradients (keys, d + e), and to the gradients of summaries, of which
    summary_gradients[l] is the address of level l, laid out as the summaries are.
    """
    kind, e, depth = queries.dtype, cells.shape[1] - dim, nodes.size
    vector, most_held = VECTOR // queries.itemsize, index.shape[1]
    g, lanes, width = -(-most_held // vector) * vector, -(-leaf // vector) * vector, dim + cells.shape[1]
    wide, wide_e = -(-dim // vector) * vector, -(-e // vector) * vector
    mass, may = np.empty((256, g), kind), np.empty((256, g), kind)
    spread, slope = np.empty((256, g), kind), np.empty((256, g), kind)
    node, number, below = np.empty(256 + ROWS, np.int64), np.empty(256, np.int64), np.empty(256, np.int64)
    opened, forces = np.empty(256, np.bool_), np.empty(256, np.bool_)
    hot, heavy = np.empty(256, kind), np.empty(256, kind)
    turned, squares = np.empty((dim, g), kind), np.empty((dim, g), kind)
    lined, lined_squares = np.zeros((most_held + 1, dim), kind), np.zeros((most_held + 1, dim), kind)
    lined_dout, turned_dout = np.zeros((most_held + 1, e), kind), np.empty((e, g), kind)
    found, dot, square = np.empty((most_held + 1, dim), kind), np.empty((dim, g), kind), np.empty((dim, g), kind)
    top, old, total, known = np.empty(g, kind), np.empty(g, kind), np.empty(g, kind), np.empty(g, kind)
    cut, whole, rest, factor = np.empty(g, kind), np.empty(g, kind), np.empty(g, kind), np.empty(g, kind)
    votes = np.empty(g, np.bool_)
    asked, asks, ids = np.empty(256, np.int64), np.empty(256, np.int64), np.arange(g + 2 * READERS)
    near, near_dout = np.zeros((g + READERS, wide), kind), np.zeros((g + READERS, wide_e), kind)
    logits, paired = np.empty((g + READERS, lanes), kind), np.empty((g + READERS, lanes), kind)
    keys, part = np.empty((max(dim, e), lanes), kind), np.empty((lanes, max(wide, wide_e)), kind)
    last, none = depth - 1, np.empty(0, kind)
    for f in range(index.shape[0]):
        count, m = held[f], chunks[f] * nodes[0]
        load_group(queries, finite, index[f, :count], scale, seen, turned, squares, lined, votes, top, total, known)
        load_gradient(index[f, :count], lse, dout, delta, votes, whole, rest, lined_dout, turned_dout)
        for j in range(count):
            for c in range(dim):
                lined_squares[j, c] = lined[j, c] * lined[j, c]
        found[:] = 0
        dot[:] = 0
        square[:] = 0
        number = grown_list(number, m)
        for i in range(m):
            number[i] = i
        for level in range(depth):
            mass, may = grown(mass, m + ROWS), grown(may, m + ROWS)
            spread, slope = grown(spread, m + ROWS), grown(slope, m + ROWS)
            node, hot, heavy = grown_list(node, m + ROWS), grown_list(hot, m), grown_list(heavy, m)
            opened, forces = grown_list(opened, m), grown_list(forces, m)
            if ids.size < m + ROWS:
                ids = np.arange(2 * (m + ROWS))
            base, every = first[f] * nodes[level], chunks_held * nodes[level]
            for i in range(m):
                node[i] = base + number[i]
            rows = array_at(levels[level], every, width, cells)
            into = array_at(summary_gradients[level], every, width, cells)
            some = array_at(counts[level], 1, every, cells)[0] if counts.size else none
            old[:] = top
            log_masses(rows, node, m, some, sizes[level], dim, turned, squares, mass, may, top, spread)
            raise_top(old, top, total, known)
            decide(
                mass, may, m, top, total, known, count, votes, thresholds[chunks[f]], forced[level], most, old, cut,
                hot, heavy, opened, forces,
            )  # fmt: skip
            wanted = 0
            for i in range(m):
                wanted += opened[i]
            if level < last:
                children = nodes[level + 1] // nodes[level]
                below = grown_list(below, wanted * children)
                after = open_nodes(number, opened, m, children, below)
                number, below = below, number
            else:
                asked, asks = grown_list(asked, 2 * wanted), grown_list(asks, wanted * (count + READERS))
                after = askers(
                    mass, may, m, number, base, cut, opened, False, NO_LIST, NO_READS, f, count, most_held, asked, asks
                )
                opened[:m] = False
            live = left(mass, m, opened, heavy, node, total)
            live_rows(spread, m, opened, heavy)
            for j in range(g):
                factor[j] = exponential(min(old[j] - whole[j], kind.type(HIGHEST))) if j < count else 0
            closed_backward(
                rows, node, live, some, sizes[level], dim, mass, factor, whole, rest, spread, lined, lined_squares,
                lined_dout, turned_dout, slope, ids, count, into, dot, square,
            )  # fmt: skip
            m = after
        used = 0
        for i in range(m):
            cell, asking = asked[2 * i], asked[2 * i + 1]
            every_key = kept.size == 0 or some[cell] == leaf
            cell_backward(
                cells, kept, every_key, cell, leaf, dim, asks, used, asking, lined, lined_dout, whole, rest, near,
                near_dout, keys, logits, paired, ids, cell_gradients, part, found,
            )  # fmt: skip
            used += -(-asking // READERS) * READERS
        two = kind.type(2)
        for j in range(count):
            for c in range(dim):
                dq[index[f, j], c] += scale * (found[j, c] + dot[c, j] + two * lined[j, c] * square[c, j])


@compiled
def live_rows(spread: Array, m: int, opened: Array, heavy: Array) -> None:
    """Brings the rows of `spread` to the front that `left` brings there."""
    live, least = 0, negligible(spread)
    for i in range(m):
        if not opened[i] and heavy[i] >= least:
            if live < i:
                for j in range(spread.shape[1]):
                    spread[live, j] = spread[i, j]
            live += 1


@compiled
def summaries_backward(
    gradient: Array, summary: Array, below: Array, weight: Array, dim: int, spread: bool, into: Array
) -> None:
    """Adds the gradient of nodes to that of their children: see `tree.summarise`, whose arguments these are.

    gradient and summary (chunks, nodes, 2 d + e); below and into (chunks, children, d + e), or (chunks, children,
    2 d + e) where `spread`; weight (chunks, children).
    """
    chunks, nodes, width = summary.shape
    children = below.shape[1] // nodes
    values, two = 2 * dim if spread else dim, summary.dtype.type(2)
    for c in range(chunks):
        for i in range(nodes):
            first, total = i * children, weight.dtype.type(0)
            for child in range(first, first + children):
                total += weight[c, child]
            if total <= 0:
                continue
            for child in range(first, first + children):
                share_of = weight[c, child] / total
                for x in range(dim):
                    apart = below[c, child, x] - summary[c, i, x]
                    into[c, child, x] += share_of * (gradient[c, i, x] + two * apart * gradient[c, i, dim + x])
                if spread:
                    for x in range(dim):
                        into[c, child, dim + x] += share_of * gradient[c, i, dim + x]
                for x in range(width - 2 * dim):
                    into[c, child, values + x] += share_of * gradient[c, i, 2 * dim + x]


@compiled
def blocks_backward(
    q: Array, k: Array, v: Array, mask: Array, lse: Array, dout: Array, delta: Array, causal: bool, scale: Any,
    low: int, high: int, dq: Array, dk: Array, dv: Array,
) -> None:  # fmt: skip
    """Gradients of exact attention for the entries from low to high: q (batch, repeat, n_q, d), k (batch, n_k, d), v
    (batch, n_k, e), mask (batch, n_k) or empty; lse, delta (batch, repeat, n_q) and dout (batch, repeat, n_q, e).
    Causal: query i sees the keys up to i + n_k - n_q. Adds to dq, dk and dv; the rows of dk and dv are whole vectors.

    A tile is up to TILE queries against TILE keys, whose weights and slopes are made once and mixed three times.
    """
    _, repeat, n_q, dim = q.shape
    n_k, e, kind = k.shape[1], v.shape[2], q.dtype
    vector = VECTOR // q.itemsize
    g = min(TILE, -(-n_q // vector) * vector)
    lined, lined_dout = np.zeros((g, dk.shape[2]), kind), np.zeros((g, dv.shape[2]), kind)
    turned, turned_dout = np.empty((dim, g), kind), np.empty((e, g), kind)
    weight, slope = np.empty((TILE + ROWS, g), kind), np.empty((TILE + ROWS, g), kind)
    whole, rest, sums = np.empty(g, kind), np.empty(g, kind), np.empty((dim, g), kind)
    index, ids, places = np.empty(TILE + ROWS, np.int64), np.arange(TILE + ROWS), np.empty(TILE + ROWS, np.int64)
    for b in range(low, high):
        for r in range(repeat):
            for start in range(0, n_q, g):
                count = min(g, n_q - start)
                for j in range(g):
                    seen = j < count and abs(lse[b, r, start + min(j, count - 1)]) < np.inf
                    whole[j] = lse[b, r, start + j] if seen else np.inf
                    rest[j] = delta[b, r, start + j] if seen else 0
                    for c in range(dim):
                        lined[j, c] = q[b, r, start + j, c] * scale if seen else 0
                    for c in range(e):
                        lined_dout[j, c] = dout[b, r, start + j, c] if seen else 0
                turn(lined, 0, g, 0, dim, turned)
                turn(lined_dout, 0, g, 0, e, turned_dout)
                sums[:] = 0
                last = start + count - 1 + n_k - n_q if causal else n_k - 1
                for key in range(0, last + 1, TILE):
                    held = min(TILE, last + 1 - key)
                    padded = -(-held // ROWS) * ROWS
                    for i in range(padded):
                        index[i] = key + (i if i < held else 0)
                        places[i] = index[i]
                    dots(k[b], index, 0, padded, 0, dim, turned, weight)
                    dots(v[b], index, 0, padded, 0, e, turned_dout, slope)
                    hides = causal and key + held - 1 > start + n_k - n_q
                    for i in range(held):
                        if mask.size and not mask[b, key + i]:
                            weight[i, :] = -np.inf
                        elif hides:
                            for j in range(min(max(0, key + i - start - n_k + n_q), g)):
                                weight[i, j] = -np.inf
                        masses.weigh_against(weight, slope, i, whole, rest)
                    add_rows(weight, held, ids, lined_dout, count, dv.shape[2], dv[b], places, 0)
                    add_rows(slope, held, ids, lined, count, dk.shape[2], dk[b], places, 0)
                    mix(k[b], index, 0, held, 0, dim, slope[:held], sums)
                for j in range(count):
                    for c in range(dim):
                        dq[b, r, start + j, c] += scale * sums[c, j]
