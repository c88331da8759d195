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
from opoch_xp.backends.compiled.masses import GAIN, KNEE, LOG, SHARE, SLOPE, WIDTH
from opoch_xp.backends.compiled.products import (
    ROWS,
    add_product,
    add_products,
    dots,
    dots_of_rows,
    fetch,
    mix,
    turn,
)
from opoch_xp.backends.compiled.vector import VECTOR, array_at, compiled, exponential, inlined, lowest_bit

Array = Any

READERS = 4  # queries that read a cell at a time
FEW = 4  # queries for which the keys of a cell are not worth turning
LOST = 1e-20  # a sum of weights: what fell below the smallest number is still nothing beside it
LARGEST = 1e20  # sum of weights relative to the maximum that was estimated, far within float32
NEGLIGIBLE = 1e-9  # of a query's largest weight: a node that holds less for every query is not looked at again


@compiled
def law_constants(count: Any, table: Array) -> None:
    """The coefficients of opoch_xp.treecode.law for nodes of `count` keys, in their places of table (6,)."""
    log = math.log(max(count, 1))
    t, s, p = 1 + 0.26 * log, 1 / (1 + 0.25 * log), 1.2 + 0.4 * log
    table[LOG], table[GAIN], table[WIDTH] = log, log * (0.92 + 0.067 * log), 1 / (t * t)
    table[SLOPE], table[KNEE], table[SHARE] = s * s, p * p, p * p / max(count, 1)


@compiled
def log_masses(
    rows: Array, node: Array, m: int, counts: Array, size: int, dim: int, queries: Array, squares: Array,
    mass: Array, may: Array, top: Array,
) -> None:  # fmt: skip
    """Log masses of the nodes node[:m] and of what they may hold, into `mass` and `may` (m, g); -inf for no key.

    rows (nodes, 2 d + e); counts (nodes,), or empty: all have `size` keys. queries (d, g), scaled; squares (d, g): their
    squares. top (g,) is raised to the largest mass.
    """
    padded = -(-m // ROWS) * ROWS
    for i in range(m, padded):
        node[i] = node[0]
    dots(rows, node, 0, padded, 0, dim, queries, mass)
    dots(rows, node, 0, padded, dim, dim, squares, may)
    whole, table = np.empty(6, mass.dtype), np.empty(6, mass.dtype)
    law_constants(size, whole)
    for i in range(m):
        if counts.size == 0 or counts[node[i]] == size:
            masses.law(mass, may, i, whole, top)
        elif counts[node[i]] > 0:
            law_constants(counts[node[i]], table)
            masses.law(mass, may, i, table, top)
        else:
            for j in range(mass.shape[1]):
                mass[i, j] = -np.inf
                may[i, j] = -np.inf


@compiled
def heaviest(share: Array, width: int, picked: Array) -> None:
    """Mark in `picked` the `width` largest of `share`, ties to the lower place."""
    count = share.size
    if width >= count:
        picked[:count] = True
        return
    picked[:count] = False
    if width == 0:
        return
    least = np.partition(share, count - width)[count - width]
    ties = width
    for i in range(count):
        if share[i] > least:
            picked[i] = True
            ties -= 1
    for i in range(count):
        if ties > 0 and share[i] == least and not picked[i]:
            picked[i] = True
            ties -= 1


@compiled
def load_group(
    queries: Array, finite: Array, index: Array, scale: Any, seen: Array, turned: Array, squares: Array, lined: Array,
    votes: Array, top: Array, total: Array, known: Array,
) -> None:  # fmt: skip
    """The queries of a group, index (count,) of queries (N, d), scaled: turned (d, g), lined (count, d); their squares;
    votes (g,) bool, False for queries that are not finite and for padding. The state of the softmax: nothing is taken
    in, and what was read before, seen (N,), is known."""
    votes[:] = False
    top[:] = -np.inf
    total[:] = 0
    known[:] = 0
    for j in range(index.size):
        row = index[j]
        votes[j] = finite.size == 0 or finite[row]
        if votes[j] and seen[row] > -np.inf:
            top[j] = seen[row]
            known[j] = 1
        for c in range(queries.shape[1]):
            lined[j, c] = queries[row, c] * scale
    turn(lined, 0, index.size, queries.shape[1], turned)
    turned[:, index.size :] = 0
    for c in range(turned.shape[0]):
        for j in range(turned.shape[1]):
            squares[c, j] = turned[c, j] * turned[c, j]


@compiled
def rescale(old: Array, top: Array, total: Array, known: Array, sums: Array, lined: Array) -> None:
    """Bring the state from maxima `old` to `top` (g,): total and known (g,), sums (e, g) and lined sums (count, e)."""
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
def place_of(number: Array, wanted: int) -> int:
    """Where `wanted` stands in `number`, -1 where it does not."""
    for place in range(number.size):
        if number[place] == wanted:
            return place
    return -1


@inlined
def left(mass: Array, m: int, opened: Array, heavy: Array, node: Array, total: Array) -> int:
    """Brings the rows of `mass`, and their nodes, that are not opened and hold something to the front; how many. Adds
    their weights to total (g,)."""
    live, least = 0, NEGLIGIBLE if mass.itemsize == 4 else NEGLIGIBLE * NEGLIGIBLE
    for i in range(m):
        if not opened[i] and heavy[i] >= least:
            masses.keep(mass, i, live, total)
            node[live] = node[i]
            live += 1
    return live


@inlined
def passing(may: Array, i: int, cut: Array, asks: Array, used: int) -> int:
    """The queries j for which may[i, j] passes cut[j], in their order, into asks[used:]; how many."""
    count, vector = 0, VECTOR // cut.itemsize
    for j in range(0, cut.size, vector):
        bits = masses.above(may, i, j, cut)
        while bits != 0:
            asks[used + count] = j + lowest_bit(bits)
            count += 1
            bits &= bits - 1
    return count


@compiled
def listed_readers(cells: Array, reads: Array, f: int, count: int, wanted: int, asks: Array, used: int) -> int:
    """The queries of group f, of `count`, that read a cell by the lists cells (groups, u) and reads (groups, g, u), into
    asks[used:]; how many."""
    place, asking = place_of(cells[f], wanted), 0
    for j in range(count):
        if reads[f, j, place]:
            asks[used + asking] = j
            asking += 1
    return asking


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

    cells (keys, d + e); `whole`: all its keys are kept, else kept (keys,) says which. lined (queries, d), scaled.
    keys (d, lanes), logits and weights (READERS, lanes) are scratch; same (READERS,) counts from 0. The maxima are those
    of masses that were estimated: they are raised where a key weighs far more, which is rare.
    """
    first, lanes, e = cell * leaf, logits.shape[1], lined_sums.shape[1]
    few = count <= FEW and leaf == lanes and dim % (VECTOR // lined.itemsize) == 0
    if not few:
        turn(cells, first, leaf, dim, keys)
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
            add_products(lined, asks, low, 0, dim, keys, 0, 0, logits, same, 0, 0, lanes)
        for r in range(some):
            j = asks[low + r]
            if not whole or leaf < lanes:
                for i in range(lanes):
                    if i >= leaf or not (whole or kept[first + i]):
                        logits[r, i] = -np.inf
            sum_of = masses.weigh_keys(logits, r, top[j], weights)
            if not sum_of < LARGEST:
                most = logits[r, 0]
                for i in range(1, lanes):
                    most = max(most, logits[r, i])
                lift(j, most, top, total, known, sums, lined_sums)
                sum_of = masses.weigh_keys(logits, r, most, weights)
            total[j] += sum_of
        if some == 1:
            add_product(weights, same, 0, 0, leaf, cells, first, dim, lined_sums, asks, low, 0, e)
            continue
        for r in range(some, READERS):
            for i in range(lanes):
                weights[r, i] = 0
        add_products(weights, same, 0, 0, leaf, cells, first, dim, lined_sums, asks, low, 0, e)


@compiled
def grown(array: Array, rows: int) -> Array:
    """The array, or one of at least so many rows, where what was in it is lost."""
    if array.shape[0] >= rows:
        return array
    return np.empty((max(rows, 2 * array.shape[0]), array.shape[1]), array.dtype)


@compiled
def grown_list(array: Array, size: int) -> Array:
    """The list, or one of at least so many entries, where what was in it is lost."""
    return array if array.size >= size else np.empty(max(size, 2 * array.size), array.dtype)


@compiled
def open_nodes(number: Array, opened: Array, m: int, children: int, below: Array) -> int:
    """The children of the opened nodes, numbered into `below`; how many."""
    count = 0
    for i in range(m):
        if opened[i]:
            for child in range(children):
                below[count] = number[i] * children + child
                count += 1
    return count


@compiled
def finish(
    sums: Array, lined: Array, total: Array, top: Array, index: Array, turned: Array, out: Array, lse: Array
) -> None:
    """Writes the rows `index` of out (N, e) and lse (N,), from sums (e, g) and (count, e). turned (g, e) is scratch."""
    one = sums.dtype.type(1)
    turn(sums, 0, sums.shape[0], sums.shape[1], turned)
    for j in range(index.size):
        row = index[j]
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
    levels: Array, counts: Array, chunks_held: int, nodes: Array, sizes: Array, forced: Array, thresholds: Array, most: int,
    cells: Array, kept: Array, leaf: int, dim: int, scale: Any, seen: Array, given: bool, opened_list: Array,
    widths: Array, cell_list: Array, read_list: Array, out: Array, lse: Array, read: Array,
) -> None:  # fmt: skip
    """Groups from low to high: queries (N, d), of which group f holds index[f, : held[f]], against chunks[f] chunks
    from first[f] on; seen (N,): what they have read before.

    Levels are numbered from the coarsest: levels[l], the address of the summaries of level l (chunks_held * nodes[l],
    2 d + e), nodes[l] of them a chunk, of sizes[l] keys, of which forced[l] are opened whatever they hold. counts[l],
    the address of their counts, finite (N,), kept (keys,): empty where all count. cells (keys, d + e). thresholds: of
    LevelPlan, by the number of chunks; most: of the method, 0 for no bound. If `given`, the lists are read: opened_list
    (groups, sum of widths), cell_list (groups, u) and read_list (groups, g, u), numbered from the run's first chunk, -1
    where there is none. Writes out (N, e), lse (N,) and read (groups, 4): see `Part`, and last whether the group must be
    done again, since what was estimated of its nodes is so far above what they hold that float32 lost it.
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
    lined, lined_sums = np.zeros((rows_held + 1, dim), kind), np.zeros((rows_held + 1, e), kind)
    top, old, total, known = np.empty(g, kind), np.empty(g, kind), np.empty(g, kind), np.empty(g, kind)
    whole, cut, votes = np.empty(g, kind), np.empty(g, kind), np.empty(g, np.bool_)
    asked, asks = np.empty(256, np.int64), np.empty(256, np.int64)
    keys, logits, weights = np.empty((dim, lanes), kind), np.empty((READERS, lanes), kind), np.empty((READERS, lanes), kind)
    same, none = np.arange(READERS), np.empty(0, kind)
    for f in range(low, high):
        count = held[f]
        load_group(queries, finite, index[f, :count], scale, seen, turned, squares, lined, votes, top, total, known)
        sums[:] = 0
        lined_sums[:] = 0
        voters, looked, read_keys, bounded, spot = 0, 0, 0, False, 0
        for j in range(count):
            voters += votes[j]
        threshold = thresholds[chunks[f]]
        m = chunks[f] * nodes[0]
        number = grown_list(number, m)
        for i in range(m):
            number[i] = i
        for level in range(depth):
            mass, may = grown(mass, m + ROWS), grown(may, m + ROWS)
            node, hot, heavy = grown_list(node, m + ROWS), grown_list(hot, m), grown_list(heavy, m)
            opened, forces = grown_list(opened, m), grown_list(forces, m)
            for i in range(m):
                node[i] = first[f] * nodes[level] + number[i]
            every = chunks_held * nodes[level]
            rows = array_at(levels[level], every, width, cells)
            some = array_at(counts[level], 1, every, cells)[0] if counts.size else none
            looked += m
            old[:] = top
            log_masses(rows, node, m, some, sizes[level], dim, turned, squares, mass, may, top)
            rescale(old, top, total, known, sums, lined_sums)
            for j in range(g):
                whole[j] = total[j] + known[j]
                old[j] = np.inf if j >= count else (top[j] if top[j] > -np.inf else 0)  # padding weighs nothing
            for i in range(m):
                heavy[i] = masses.weigh(mass, i, old, whole)
            for j in range(g):
                cut[j] = old[j] + math.log(whole[j]) + threshold if votes[j] else np.inf
            for i in range(m):
                hot[i] = masses.hottest(may, i, cut)
                opened[i] = hot[i] > 0
            if forced[level] > 0:
                heaviest(hot[:m], forced[level], forces)
                for i in range(m):
                    opened[i] |= forces[i] and hot[i] > -np.inf
            if given:
                listed = opened_list[f, spot : spot + widths[level]] if level + 1 < depth else cell_list[f]
                opened[:m] = False
                for wanted in listed:
                    place = place_of(number[:m], wanted) if wanted >= 0 else -1
                    if place >= 0:
                        opened[place] = True
                spot += widths[level] if level + 1 < depth else 0
            elif most > 0:
                wanted = 0
                for i in range(m):
                    wanted += opened[i]
                if wanted > most:
                    bounded = True
                    for i in range(m):
                        hot[i] = hot[i] if opened[i] else -np.inf
                    heaviest(hot[:m], most, opened)
            if level + 1 < depth:
                children = nodes[level + 1] // nodes[level]
                wanted = 0
                for i in range(m):
                    wanted += opened[i]
                below = grown_list(below, wanted * children)
                after = open_nodes(number, opened, m, children, below)
                live = left(mass, m, opened, heavy, node, total)
                mix(rows, node, 0, live, 2 * dim, e, mass[:live], sums)
                number, below = below, number
                m = after
                continue
            # the cells: read by each query for which they pass, closed for the others
            base, several = first[f] * nodes[level], 0
            for i in range(m):
                several += opened[i]
            asked, asks = grown_list(asked, 2 * several), grown_list(asks, several * (count + READERS))
            several, used = 0, 0
            for i in range(m):
                number[i] += base
                if not opened[i]:
                    continue
                if given:
                    asking = listed_readers(cell_list, read_list, f, count, number[i] - base, asks, used)
                else:
                    asking = passing(may, i, cut, asks, used)
                for j in range(used, used + asking):
                    mass[i, asks[j]] = 0
                asked[2 * several], asked[2 * several + 1] = number[i], asking
                after = used + -(-asking // READERS) * READERS
                for j in range(used + asking, after):
                    asks[j] = rows_held
                used = after
                several += 1
                read_keys += asking * leaf
            opened[:m] = False
            live = left(mass, m, opened, heavy, node, total)
            mix(rows, node, 0, live, 2 * dim, e, mass[:live], sums)
            used = 0
            for i in range(several):
                cell, asking = asked[2 * i], asked[2 * i + 1]
                after = asked[2 * i + 2] if i + 1 < several else -1
                every_key = kept.size == 0 or some[cell] == leaf
                read_cell(
                    cells, kept, every_key, cell, leaf, dim, asks, used, asking, lined, keys, logits, weights, same, top,
                    total, known, sums, lined_sums, after,
                )  # fmt: skip
                used += -(-asking // READERS) * READERS
        finish(sums, lined_sums, total, top, index[f, :count], sums_turned, out, lse)
        read[f, 0], read[f, 1], read[f, 2] = looked * voters, read_keys, voters if bounded else 0
        for j in range(count):
            if votes[j] and total[j] < LOST and top[j] > seen[index[f, j]]:
                read[f, 3] = 1
