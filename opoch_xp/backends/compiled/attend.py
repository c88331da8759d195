"""Groups of queries against the trees of runs of chunks, compiled: see `opoch_xp.backends.generic.tree`.

A level at a time: the log masses of its candidates for every query, what of them is opened, and the rest taken into an
online softmax. The masses of one level are all that is kept: rows (nodes) by queries, in the second cache. Every node
costs two products and one exponential a query, which serves both the mass that is known of and the softmax. Cells are
read query by query: the keys of a cell are turned once, and its 16 logits are one vector. Summaries, keys and values
are read where they lie.

Letters: g queries of a group, padded to a multiple of `lanes`; m candidates; d and e the widths of keys and values.
"""

import math
from typing import Any

import numpy as np

from opoch_xp.backends.compiled import masses
from opoch_xp.backends.compiled.products import (
    ROWS,
    add_product,
    add_products,
    add_tall_products,
    dots_of_rows,
    fetch,
    mix,
    turn,
)
from opoch_xp.backends.compiled.vector import VECTOR, array_at, compiled, exponential, inlined
from opoch_xp.backends.compiled.walk import (
    READERS,
    askers,
    decide,
    grown,
    grown_list,
    left,
    load_group,
    log_masses,
    open_listed,
    open_nodes,
)

Array = Any

FEW = 4  # queries for which the keys of a cell are not worth turning
LOST = 1e-20  # a sum of weights: what fell below the smallest number is still nothing beside it


@compiled
def rescale(old: Array, top: Array, total: Array, known: Array, sums: Array, lined: Array) -> None:
    """Bring the state from maxima `old` to `top` (g,): total and known (g,), sums (e, g), lined (count, ...)."""
    changed = False
    for j in range(top.size):
        if top[j] != old[j]:
            changed = True
    if not changed:
        return
    for j in range(top.size):
        old[j] = exponential(old[j] - top[j]) if old[j] > -np.inf else old.dtype.type(0)
        total[j] *= old[j]
        known[j] *= old[j]
    for c in range(sums.shape[0]):
        for j in range(top.size):
            sums[c, j] *= old[j]
    for j in range(lined.shape[0] - 1):  # the last is nobody's
        for c in range(lined.shape[1]):
            lined[j, c] *= old[j]


@compiled
def lift(j: int, most: Any, top: Array, total: Array, known: Array, sums: Array, lined_sums: Array) -> None:
    """Bring the state of query j to a larger maximum: see `rescale`."""
    factor = exponential(top[j] - most) if top[j] > -np.inf else top.dtype.type(0)
    total[j] *= factor
    known[j] *= factor
    for c in range(sums.shape[0]):
        sums[c, j] *= factor
    for c in range(lined_sums.shape[1]):
        lined_sums[j, c] *= factor
    top[j] = most


@inlined
def read_cell(
    cells: Array, kept: Array, whole: bool, cell: int, leaf: int, dim: int, asks: Array, used: int, count: int,
    lined: Array, keys: Array, logits: Array, weights: Array, same: Array, top: Array, total: Array, known: Array,
    sums: Array, lined_sums: Array, after: int,
) -> None:  # fmt: skip
    """Takes the keys of a cell into the softmax of the queries asks[used : used + count], which are followed by numbers
    of a row that is nobody's, to a multiple of READERS.

    cells (keys, d + e); `whole`: all its keys are kept, else kept (keys,) says which. lined (queries, d), scaled;
    lined_sums (queries, e + a vector), which ends with the sum of the weights, place by place. keys (d, lanes), logits
    and weights (READERS, lanes) are scratch; same (READERS,) counts from 0. The maxima are those of masses that were
    estimated: they are raised where a key weighs far more, which is rare.
    """
    first, lanes, e = cell * leaf, logits.shape[1], cells.shape[1] - dim
    few = count <= FEW and leaf == lanes and dim % (VECTOR // lined.itemsize) == 0
    if not few:
        turn(cells, first, leaf, 0, dim, keys)
    ahead, each = 0, max(1, -(-leaf * READERS // count))
    for low in range(used, used + count, READERS):
        some = min(READERS, used + count - low)
        if after >= 0 and ahead < leaf:
            fetch(cells, after * leaf + ahead, min(each, leaf - ahead))
            ahead += each
        if few:
            for r in range(some):
                dots_of_rows(cells, first, leaf, dim, lined, asks[low + r], logits, r)
        else:
            for r in range(READERS):
                for i in range(lanes):
                    logits[r, i] = 0
            add_tall_products(lined, asks, low, 0, dim, keys, 0, 0, logits, same, 0, 0, lanes)
        for r in range(some):
            j = asks[low + r]
            if not whole or leaf < lanes:
                for i in range(lanes):
                    if i >= leaf or not (whole or kept[first + i]):
                        logits[r, i] = -np.inf
            if masses.weigh_keys(logits, r, top[j], weights):
                most = logits[r, 0]
                for i in range(1, lanes):
                    most = max(most, logits[r, i])
                lift(j, most, top, total, known, sums, lined_sums)
                masses.weigh_keys(logits, r, most, weights)
            masses.tally(weights, r, lined_sums, j, e)
        if some == 1:
            add_product(weights, same, 0, 0, leaf, cells, first, dim, lined_sums, asks, low, 0, e)
            continue
        for r in range(some, -(-some // ROWS) * ROWS):
            for i in range(lanes):
                weights[r, i] = 0
        for r in range(0, some, ROWS):
            add_products(weights, same, r, 0, leaf, cells, first, dim, lined_sums, asks, low + r, 0, e)


@compiled
def finish(
    sums: Array, lined: Array, total: Array, top: Array, index: Array, turned: Array, out: Array, lse: Array
) -> None:
    """Writes the rows `index` of out (N, e) and lse (N,), from sums (e, g) and lined (count, e + a vector), whose last
    numbers are added to the total (g,). turned (g, e) is scratch."""
    one = sums.dtype.type(1)
    turn(sums, 0, sums.shape[0], 0, sums.shape[1], turned)
    for j in range(index.size):
        row = index[j]
        for c in range(out.shape[1], lined.shape[1]):
            total[j] += lined[j, c]
        if total[j] > 0:
            share_of = one / total[j]
            for c in range(out.shape[1]):
                out[row, c] = (turned[j, c] + lined[j, c]) * share_of
            lse[row] = top[j] + math.log(total[j])
        else:
            out[row, :] = 0
            lse[row] = -np.inf


@compiled
def attend_groups(
    queries: Array, finite: Array, index: Array, held: Array, first: Array, chunks: Array, low: int, high: int,
    levels: Array, counts: Array, chunks_held: int, nodes: Array, sizes: Array, forced: Array, thresholds: Array,
    most: int, cells: Array, kept: Array, leaf: int, dim: int, scale: Any, seen: Array, given: bool, opened_list: Array,
    widths: Array, cell_list: Array, read_list: Array, out: Array, lse: Array, read: Array,
) -> None:  # fmt: skip
    """Groups from low to high: queries (N, d), of which group f holds index[f, : held[f]], against chunks[f] chunks
    from first[f] on; seen (N,): what they have read before.

    Levels are numbered from the coarsest: levels[l], the address of the summaries of level l (chunks_held * nodes[l],
    2 d + e), nodes[l] of them a chunk, of sizes[l] keys, of which forced[l] are opened whatever they hold. counts[l],
    the address of their counts, finite (N,), kept (keys,): empty where all count. cells (keys, d + e). thresholds: of
    LevelPlan, by the number of chunks; most: of the method, 0 for no bound. If `given`, the lists are read: opened_list
    (groups, sum of widths), cell_list (groups, u) and read_list (groups, g, u), numbered from the run's first chunk, -1
    where there is none. Writes out (N, e), lse (N,) and read (groups, 4): see `Part`, and last whether the group must
    be done again, since what was estimated of its nodes is so far above what they hold that float32 lost it.
    """
    kind, e, depth = queries.dtype, cells.shape[1] - dim, nodes.size
    vector = VECTOR // queries.itemsize
    rows_held = index.shape[1]
    g, width, lanes = -(-rows_held // vector) * vector, dim + cells.shape[1], -(-leaf // vector) * vector
    mass, may = np.empty((256, g), kind), np.empty((256, g), kind)
    node, number, below = np.empty(256 + ROWS, np.int64), np.empty(256, np.int64), np.empty(256, np.int64)
    opened, forces = np.empty(256, np.bool_), np.empty(256, np.bool_)
    hot, heavy = np.empty(256, kind), np.empty(256, kind)
    turned, squares, sums = np.empty((dim, g), kind), np.empty((dim, g), kind), np.empty((e, g), kind)
    sums_turned = np.empty((g, e), kind)
    lined, lined_sums = np.zeros((rows_held + 1, dim), kind), np.zeros((rows_held + 1, e + vector), kind)
    top, old, total, known = np.empty(g, kind), np.empty(g, kind), np.empty(g, kind), np.empty(g, kind)
    cut, votes = np.empty(g, kind), np.empty(g, np.bool_)
    asked, asks = np.empty(256, np.int64), np.empty(256, np.int64)
    keys, logits = np.empty((dim, lanes), kind), np.empty((READERS, lanes), kind)
    weights = np.empty((READERS, lanes), kind)
    same, last, none = np.arange(READERS), depth - 1, np.empty(0, kind)
    nothing = np.empty((0, 0), kind)
    for f in range(low, high):
        count, m, spot = held[f], chunks[f] * nodes[0], 0
        voters = load_group(
            queries, finite, index[f, :count], scale, seen, turned, squares, lined, votes, top, total, known
        )
        sums[:] = 0
        lined_sums[:] = 0
        read[f, :] = 0
        number = grown_list(number, m)
        for i in range(m):
            number[i] = i
        for level in range(depth):
            mass, may = grown(mass, m + ROWS), grown(may, m + ROWS)
            node, hot, heavy = grown_list(node, m + ROWS), grown_list(hot, m), grown_list(heavy, m)
            opened, forces = grown_list(opened, m), grown_list(forces, m)
            base, every = first[f] * nodes[level], chunks_held * nodes[level]
            for i in range(m):
                node[i] = base + number[i]
            rows = array_at(levels[level], every, width, cells)
            some = array_at(counts[level], 1, every, cells)[0] if counts.size else none
            old[:] = top
            log_masses(rows, node, m, some, sizes[level], dim, turned, squares, mass, may, top, nothing)
            rescale(old, top, total, known, sums, lined_sums)
            bounded = decide(
                mass, may, m, top, total, known, count, votes, thresholds[chunks[f]], forced[level], most, old, cut,
                hot, heavy, opened, forces,
            )  # fmt: skip
            read[f, 0] += m * voters
            if bounded:
                read[f, 2] = voters
            if given:
                listed = cell_list[f] if level == last else opened_list[f, spot : spot + widths[level]]
                open_listed(listed, number, m, opened)
                spot += widths[level] if level < last else 0
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
                    mass, may, m, number, base, cut, opened, given, cell_list, read_list, f, count, rows_held,
                    asked, asks,
                )  # fmt: skip
                opened[:m] = False
            live = left(mass, m, opened, heavy, node, total)
            mix(rows, node, 0, live, 2 * dim, e, mass[:live], sums)
            m = after
        used = 0
        for i in range(m):
            cell, asking = asked[2 * i], asked[2 * i + 1]
            after = asked[2 * i + 2] if i + 1 < m else -1
            every_key = kept.size == 0 or some[cell] == leaf
            read_cell(
                cells, kept, every_key, cell, leaf, dim, asks, used, asking, lined, keys, logits, weights, same, top,
                total, known, sums, lined_sums, after,
            )  # fmt: skip
            used += -(-asking // READERS) * READERS
            read[f, 1] += asking * leaf
        finish(sums, lined_sums, total, top, index[f, :count], sums_turned, out, lse)
        for j in range(count):
            if votes[j] and total[j] < LOST and top[j] > seen[index[f, j]]:
                read[f, 3] = 1
