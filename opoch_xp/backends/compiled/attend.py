"""Step 1 to 5 of the treecode for a group of queries after another, compiled: see `opoch_xp.backends.generic.tree`.

A group's logits stay in the second cache: one array of rows (nodes of all levels, then keys of the near cells) by
queries. Every node costs two products, and two exponentials a query: one for the group's votes, one for the softmax,
whose maximum is known only when all is read. Summaries, keys and values are read where they lie.

Letters: g queries of a group, padded to a multiple of `lanes`; m rows of logits; d and e the widths of keys and values.
"""

import math
from typing import Any

import numpy as np

from opoch_xp.backends.compiled.vector import ROWS, VECTOR, array_at, compiled, dots, exponential, mix

Array = Any


@compiled
def log_masses(
    rows: Array, node: Array, start: int, count: int, counts: Array, log_size: Any, dim: int, queries: Array,
    squares: Array, mass: Array, half: Array,
) -> None:  # fmt: skip
    """Log masses of the nodes node[start : start + count], into the same rows of `mass`; see generic.tree.log_mass.

    rows (nodes, 2 d + e); counts (nodes,), or empty: all have the logarithm log_size. queries (d, g), scaled; squares
    (d, g): half their squares. half (count, g) is scratch: sigma^2 / 2.
    """
    padded, two, zero = -(-count // ROWS) * ROWS, mass.dtype.type(2), mass.dtype.type(0)
    for i in range(count, padded):
        node[start + i] = node[start]
    dots(rows, node, start, start + padded, 0, dim, queries, mass)
    dots(rows, node[start : start + padded], 0, padded, dim, dim, squares, half)
    for i in range(count):
        row, spread = mass[start + i], half[i]
        log = log_size
        if counts.size:
            if counts[node[start + i]] <= 0:
                row[:] = -np.inf
                continue
            log = math.log(counts[node[start + i]])
        root = math.sqrt(log)
        for j in range(row.size):  # ln n + h, and past the freezing transition ln n + 2 sqrt(h ln n) - ln n
            row[j] += log + min(spread[j], log) + two * root * max(math.sqrt(spread[j]) - root, zero)


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
        if ties > 0 and share[i] == least:
            picked[i] = True
            ties -= 1


@compiled
def shares(mass: Array, weight: Array, votes: Array, norm: Array, top: Array, factor: Array, share: Array) -> None:
    """What each node holds of the votes: share (m,) = sum of votes exp(mass - norm), mass (m, g).

    norm (g,) is raised to the log-sum-exp of this level, so that no query's votes exceed 1 in sum. weight (m, g), top
    and factor (g,) are scratch.
    """
    count, width = mass.shape
    top[:] = -np.inf
    for i in range(count):
        row = mass[i]
        for j in range(width):
            top[j] = max(top[j], row[j])
    for j in range(width):
        if top[j] == -np.inf:
            top[j] = 0
    factor[:] = 0
    for i in range(count):
        row, out = mass[i], weight[i]
        for j in range(width):
            one = exponential(row[j] - top[j])
            out[j] = one
            factor[j] += one
    for j in range(width):
        level = top[j] + math.log(factor[j]) if factor[j] > 0 else -np.inf
        norm[j] = max(norm[j], level)
        factor[j] = votes[j] * math.exp(top[j] - norm[j]) if norm[j] > -np.inf else 0
    for i in range(count):
        row = weight[i]
        total = row[0] * factor[0]
        for j in range(1, width):
            total += row[j] * factor[j]
        share[i] = total


@compiled
def own_cells(mass: Array, picked: Array, queries: int, own: int, best: Array, least: Array) -> None:
    """For every query its `own` heaviest cells that the group does not read: best (queries, own), -1 where there are
    fewer; ties to the lower place. mass (m, g); least (queries, own) is scratch."""
    best[:queries] = -1
    found = 0
    for i in range(mass.shape[0]):
        if picked[i]:
            continue
        row, last = mass[i], min(found, own - 1)
        for j in range(queries):
            value = row[j]
            if found < own or value > least[j, last]:
                place = last
                while place > 0 and value > least[j, place - 1]:
                    least[j, place], best[j, place] = least[j, place - 1], best[j, place - 1]
                    place -= 1
                least[j, place], best[j, place] = value, i
        found += 1


@compiled
def load_group(
    queries: Array, finite: Array, index: Array, scale: Any, turned: Array, squares: Array, lined: Array, votes: Array
) -> None:
    """The queries of a group, index (count,) of queries (N, d), scaled: turned (d, g), lined (count, d); half their
    squares; votes (g,), 0 for queries that are not finite and for padding."""
    half = queries.dtype.type(0.5)
    turned[:] = 0
    votes[:] = 0
    for j in range(index.size):
        row = index[j]
        votes[j] = 1 if finite.size == 0 or finite[row] else 0
        for c in range(queries.shape[1]):
            one = queries[row, c] * scale
            lined[j, c] = one
            turned[c, j] = one
    for c in range(turned.shape[0]):
        for j in range(turned.shape[1]):
            squares[c, j] = turned[c, j] * turned[c, j] * half


@compiled
def place_of(number: Array, wanted: int) -> int:
    """Where `wanted` stands in `number`, -1 where it does not."""
    for place in range(number.size):
        if number[place] == wanted:
            return place
    return -1


@compiled
def open_nodes(number: Array, picked: Array, children: int, opened: Array, given: bool, below: Array) -> int:
    """The children of the picked nodes, numbered into `below`; how many. `opened` becomes the picked, -1 after them."""
    found, count = 0, 0
    for i in range(number.size):
        if picked[i]:
            if not given:
                opened[found] = number[i]
            found += 1
            for child in range(children):
                below[count] = number[i] * children + child
                count += 1
    if not given:
        opened[found:] = -1
    return count


@compiled
def own_places(number: Array, picked: Array, own: Array, best: Array) -> None:
    """Places (queries, own) of the cells that the list `own` (queries, own) names, -1 for those the group reads."""
    for j in range(own.shape[0]):
        for o in range(own.shape[1]):
            place = place_of(number, own[j, o]) if own[j, o] >= 0 else -1
            best[j, o] = place if place >= 0 and not picked[place] else -1


@compiled
def near_keys(number: Array, picked: Array, first: int, leaf: int, node: Array) -> int:
    """The keys of the picked cells, numbered from cell `first` on, into `node`; how many. Padded to ROWS."""
    near = 0
    for i in range(number.size):
        if picked[i]:
            for key in range(leaf):
                node[near] = (first + number[i]) * leaf + key
                near += 1
    for i in range(near, -(-near // ROWS) * ROWS):
        node[i] = node[0]
    return near


@compiled
def own_logits(cells: Array, kept: Array, dim: int, leaf: int, cell: Array, lined: Array, mine: Array) -> None:
    """Logits (queries, own * leaf) of the keys of each query's own cells (queries, own), -inf where there is none."""
    for j in range(cell.shape[0]):
        for o in range(cell.shape[1]):
            for one in range(leaf):
                key = cell[j, o] * leaf + one
                if cell[j, o] < 0 or (kept.size and not kept[key]):
                    mine[j, o * leaf + one] = -np.inf
                    continue
                row, query = cells[key], lined[j]
                dot = row[0] * query[0]
                for c in range(1, dim):
                    dot += row[c] * query[c]
                mine[j, o * leaf + one] = dot


@compiled
def weigh(mass: Array, picked: Array, node: Array, top: Array, total: Array) -> int:
    """exp(mass - top) of the rows that are not picked, brought to the front with their nodes; how many. Sums them."""
    live = 0
    for i in range(mass.shape[0]):
        if picked[i]:
            continue
        row = mass[i]
        for j in range(row.size):  # in place: two rows that may be one would not become vectors
            row[j] = exponential(row[j] - top[j])
        for j in range(row.size):
            total[j] += row[j]
        if live < i:
            mass[live, :] = row
            node[live] = node[i]
        live += 1
    return live


@compiled
def finish(
    sums: Array, total: Array, top: Array, cells: Array, dim: int, leaf: int, cell: Array, mine: Array, index: Array,
    out: Array, lse: Array,
) -> None:  # fmt: skip
    """Adds the own cells to sums (e, g) and total (g,), and writes the rows `index` of out (N, e) and lse (N,)."""
    e, one_whole = sums.shape[0], sums.dtype.type(1)
    line = np.empty(e, sums.dtype)
    for j in range(index.size):
        row, all_of = index[j], total[j]
        for c in range(e):
            line[c] = sums[c, j]
        for o in range(cell.shape[1]):
            if cell[j, o] < 0:
                continue
            for one in range(leaf):
                w = exponential(mine[j, o * leaf + one] - top[j])
                values = cells[cell[j, o] * leaf + one, dim : dim + e]  # dim + c might count from the end: no vectors
                all_of += w
                for c in range(e):
                    line[c] += w * values[c]
        if all_of > 0:
            share_of = one_whole / all_of
            for c in range(e):
                out[row, c] = line[c] * share_of
            lse[row] = top[j] + math.log(all_of)
        else:
            out[row, :] = 0
            lse[row] = -np.inf


@compiled
def most_rows(chunks: Array, nodes: Array, widths: Array, leaf: int) -> tuple[int, int]:
    """Rows of logits that a group can have at the most, padding included; nodes of its largest level."""
    largest, widest = 0, 0
    for f in range(chunks.size):
        candidates, whole = chunks[f] * nodes[0], 0
        for level in range(nodes.size):
            widest = max(widest, candidates)
            whole += candidates + ROWS
            opened = min(widths[level], candidates)
            candidates = opened * (nodes[level + 1] // nodes[level]) if level + 1 < nodes.size else opened * leaf
        largest = max(largest, whole + candidates + ROWS)
    return largest, widest


@compiled
def attend_groups(
    queries: Array, finite: Array, index: Array, held: Array, first: Array, chunks: Array, low: int, high: int,
    levels: Array, counts: Array, chunks_held: int, nodes: Array, logs: Array, cells: Array, kept: Array, leaf: int,
    dim: int, widths: Array, own: int, scale: Any, given: bool, opened: Array, own_list: Array, out: Array, lse: Array,
) -> None:  # fmt: skip
    """Groups from low to high: queries (N, d), of which group f holds index[f, : held[f]], against chunks[f] chunks
    from first[f] on.

    Levels are numbered from the coarsest: levels[l], the address of the summaries of level l (chunks_held * nodes[l],
    2 d + e), nodes[l] of them a chunk, logs[l] the logarithm of their keys, widths[l] how many are opened. counts (all
    nodes, the coarsest level's first), finite (N,), kept (keys,): empty where all count. cells (keys, d + e). opened
    (groups, sum of widths) and own_list (groups, g, own): the lists, numbered from the run's first chunk, -1 where
    there is none; read if `given`, else written. Writes out (N, e) and lse (N,).
    """
    kind, e, depth, most, last = queries.dtype, cells.shape[1] - dim, nodes.size, index.shape[1], nodes.size - 1
    vector = VECTOR // queries.itemsize
    g, width = -(-most // vector) * vector, dim + cells.shape[1]
    largest, widest = most_rows(chunks[low:high], nodes, widths, leaf)
    mass, half, weight = np.empty((largest, g), kind), np.empty((widest + ROWS, g), kind), np.empty((widest, g), kind)
    node, number = np.empty(largest, np.int64), np.empty(largest, np.int64)
    picked, share = np.zeros(largest, np.bool_), np.empty(widest, kind)
    turned, squares, lined = np.empty((dim, g), kind), np.empty((dim, g), kind), np.empty((most, dim), kind)
    votes, norm, top, factor = np.empty(g, kind), np.empty(g, kind), np.empty(g, kind), np.empty(g, kind)
    best, least, mine = np.empty((most, own), np.int64), np.empty((most, own), kind), np.empty((most, own * leaf), kind)
    total, sums = np.empty(g, kind), np.empty((e, g), kind)
    begins, ends = np.empty(depth + 1, np.int64), np.empty(depth + 1, np.int64)
    for f in range(low, high):
        count, cell = held[f], best[: held[f]]
        load_group(queries, finite, index[f, :count], scale, turned, squares, lined, votes)
        norm[:] = -np.inf
        # steps 1 and 2: from the coarsest level down
        start, candidates, spot, counted = 0, chunks[f] * nodes[0], 0, 0
        for i in range(candidates):
            number[i] = i
        for level in range(depth):
            stop = start + candidates
            begins[level], ends[level] = start, stop
            for i in range(start, stop):
                node[i] = first[f] * nodes[level] + number[i]
            every = chunks_held * nodes[level]
            rows, held_keys = array_at(levels[level], every, width, cells), counts[counted : counted + every]
            counted += every
            log_masses(rows, node, start, candidates, held_keys, logs[level], dim, turned, squares, mass, half)
            some, chosen = number[start:stop], picked[start:stop]
            listed = opened[f, spot : spot + widths[level]]
            if given:
                chosen[:] = False
                for wanted in listed:
                    place = place_of(some, wanted)
                    if place >= 0:
                        chosen[place] = True
            else:
                shares(mass[start:stop], weight, votes, norm, top, factor, share)
                heaviest(share[:candidates], min(widths[level], candidates), chosen)
            spot += widths[level]
            start = stop + ROWS  # nodes are padded
            children = nodes[level + 1] // nodes[level] if level < last else 0
            candidates = open_nodes(some, chosen, children, listed, given, number[start:])
        # step 4, chosen before its logits are hidden from the rest
        bottom, stop = begins[last], ends[last]
        if own and given:
            own_places(number[bottom:stop], picked[bottom:stop], own_list[f, :count], cell)
        elif own:
            own_cells(mass[bottom:stop], picked[bottom:stop], count, own, best, least)
        # step 3: keys of the near cells, logits after those of the nodes
        base = first[f] * nodes[last]
        near = near_keys(number[bottom:stop], picked[bottom:stop], base, leaf, node[start:])
        begins[depth], ends[depth] = start, start + near
        dots(cells, node, start, start + -(-near // ROWS) * ROWS, 0, dim, turned, mass)
        for i in range(start, start + near):
            picked[i] = False
            if kept.size and not kept[node[i]]:
                mass[i, :] = -np.inf
        for j in range(count):
            for o in range(own):
                place = cell[j, o]
                if place >= 0:
                    mass[bottom + place, j] = -np.inf  # not to be read twice
                    cell[j, o] = base + number[bottom + place]
                if not given:
                    own_list[f, j, o] = cell[j, o] - base if place >= 0 else -1
        own_logits(cells, kept, dim, leaf, cell, lined, mine)
        # step 5
        top[:] = -np.inf
        for level in range(depth + 1):
            for i in range(begins[level], ends[level]):
                if not picked[i]:
                    row = mass[i]
                    for j in range(g):
                        top[j] = max(top[j], row[j])
        for j in range(count):
            for i in range(own * leaf):
                top[j] = max(top[j], mine[j, i])
        for j in range(g):
            if top[j] == -np.inf:
                top[j] = 0
        total[:] = 0
        sums[:] = 0
        for level in range(depth + 1):
            start, stop = begins[level], ends[level]
            live = start + weigh(mass[start:stop], picked[start:stop], node[start:stop], top, total)
            if level < depth:
                rows = array_at(levels[level], chunks_held * nodes[level], width, cells)
                mix(rows, node, start, live, 2 * dim, e, mass[start:live], sums)
            else:
                mix(cells, node, start, live, dim, e, mass[start:live], sums)
        finish(sums, total, top, cells, dim, leaf, cell, mine, index[f, :count], out, lse)
