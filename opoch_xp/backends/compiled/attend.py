"""Step 1 to 5 of the treecode for a group of queries after another, compiled: see `opoch_xp.backends.generic.tree`.

A group's logits stay in the second cache: one array of rows (nodes of all levels, then keys of the near cells) by
queries. Every node costs two products, and two exponentials a query: one for the group's votes, one for the softmax,
whose maximum is known only when all is read. Summaries, keys and values are read where they lie.

Letters: g queries of a group, padded to a multiple of `lanes`; m rows of logits; d and e the widths of keys and values.
"""

import math
from typing import Any

import numpy as np

from opoch_xp.backends.compiled.vector import ROWS, VECTOR, compiled, dots, exponential, mix

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
def attend_groups(
    queries: Array, finite: Array, index: Array, held: Array, first: Array, chunks: Array, low: int, high: int,
    rows: Array, counts: Array, offsets: Array, nodes: Array, logs: Array, cells: Array, kept: Array, leaf: int,
    dim: int, widths: Array, own: int, scale: Any, given: bool, opened: Array, own_list: Array, out: Array, lse: Array,
) -> None:  # fmt: skip
    """Groups from low to high: queries (N, d), of which group f holds index[f, : held[f]], against chunks[f] chunks
    from first[f] on.

    Levels are numbered from the coarsest: offsets[l], the row of `rows` (nodes of all, 2 d + e) where level l begins,
    nodes[l] of them a chunk, logs[l] the logarithm of their keys, widths[l] how many are opened. counts (all nodes,),
    finite (N,), kept (keys,): empty where all count. cells (keys, d + e). opened (groups, sum of widths) and own_list
    (groups, g, own): the lists, numbered from the run's first chunk, -1 where there is none; read if `given`, else
    written. Writes out (N, e) and lse (N,).
    """
    e = cells.shape[1] - dim
    levels, most, last = nodes.size, index.shape[1], nodes.size - 1
    vector = VECTOR // queries.itemsize
    g = -(-most // vector) * vector
    # what a group can hold at the most
    largest, candidates, widest = 0, 0, 0
    for f in range(low, high):
        candidates, whole = chunks[f] * nodes[0], 0
        for level in range(levels):
            widest = max(widest, candidates)
            whole += candidates + ROWS
            if level < last:
                candidates = min(widths[level], candidates) * (nodes[level + 1] // nodes[level])
        largest = max(largest, whole + min(widths[last], candidates) * leaf + ROWS)
    kind, one_half = queries.dtype, queries.dtype.type(0.5)
    mass, half, weight = np.empty((largest, g), kind), np.empty((widest + ROWS, g), kind), np.empty((widest, g), kind)
    node, number = np.empty(largest, np.int64), np.empty(largest, np.int64)
    picked, share = np.zeros(largest, np.bool_), np.empty(widest, kind)
    turned, squares, lined = np.empty((dim, g), kind), np.empty((dim, g), kind), np.empty((most, dim), kind)
    votes, norm, top, factor, total = (np.empty(g, kind), np.empty(g, kind), np.empty(g, kind), np.empty(g, kind),
                                       np.empty(g, kind))  # fmt: skip
    best, least = np.empty((most, own), np.int64), np.empty((most, own), kind)
    mine = np.empty((most, own * leaf), kind)
    sums, line = np.empty((e, g), kind), np.empty(e, kind)
    starts = np.empty(levels + 1, np.int64)
    for f in range(low, high):
        count = held[f]
        turned[:] = 0
        votes[:] = 0
        for j in range(count):
            row = index[f, j]
            votes[j] = 1 if finite.size == 0 or finite[row] else 0
            for c in range(dim):
                one = queries[row, c] * scale
                lined[j, c] = one
                turned[c, j] = one
        for c in range(dim):
            for j in range(g):
                squares[c, j] = turned[c, j] * turned[c, j] * one_half
        norm[:] = -np.inf
        # steps 1 and 2: from the coarsest level down
        start, candidates, spot = 0, chunks[f] * nodes[0], 0
        for i in range(candidates):
            number[i] = i
        for level in range(levels):
            starts[level] = start
            stop = start + candidates
            base = offsets[level] + first[f] * nodes[level]
            for i in range(start, stop):
                node[i] = base + number[i]
            log_masses(rows, node, start, candidates, counts, logs[level], dim, turned, squares, mass, half)
            level_mass, level_picked = mass[start:stop], picked[start:stop]
            width = min(widths[level], candidates)
            if given:
                level_picked[:] = False
                for i in range(widths[level]):
                    wanted = opened[f, spot + i]
                    if 0 <= wanted < chunks[f] * nodes[level]:
                        for place in range(candidates):
                            if number[start + place] == wanted:
                                level_picked[place] = True
            else:
                shares(level_mass, weight, votes, norm, top, factor, share)
                heaviest(share[:candidates], width, level_picked)
            below = stop + ROWS  # `node` is padded
            next_candidates, found = 0, 0
            children = nodes[level + 1] // nodes[level] if level < last else 0
            for i in range(start, stop):
                if picked[i]:
                    if not given:
                        opened[f, spot + found] = number[i]
                    found += 1
                    for child in range(children):
                        number[below + next_candidates] = number[i] * children + child
                        next_candidates += 1
            if not given:
                opened[f, spot + found : spot + widths[level]] = -1
            spot += widths[level]
            start, candidates = below, next_candidates
        starts[levels] = start
        # step 4, chosen before the near cells hide what they hold
        bottom, stop = starts[last], start - ROWS
        if own:
            if given:
                for j in range(count):
                    for o in range(own):
                        best[j, o] = -1
                        wanted = own_list[f, j, o]
                        if 0 <= wanted < chunks[f] * nodes[last]:
                            for place in range(stop - bottom):
                                if number[bottom + place] == wanted and not picked[bottom + place]:
                                    best[j, o] = place
            else:
                own_cells(mass[bottom:stop], picked[bottom:stop], count, own, best, least)
                for j in range(count):
                    for o in range(own):
                        own_list[f, j, o] = number[bottom + best[j, o]] if best[j, o] >= 0 else -1
        # step 3: keys of the near cells, logits after those of the nodes
        near = 0
        for i in range(bottom, stop):
            if picked[i]:
                for key in range(leaf):
                    node[start + near] = (first[f] * nodes[last] + number[i]) * leaf + key
                    near += 1
        padded = -(-near // ROWS) * ROWS
        for i in range(near, padded):
            node[start + i] = node[start]
        dots(cells, node, start, start + padded, 0, dim, turned, mass)
        if kept.size:
            for i in range(start, start + near):
                if not kept[node[i]]:
                    mass[i, :] = -np.inf
        # step 4: keys of each query's own cells
        for j in range(count):
            for o in range(own):
                place = best[j, o]
                if place < 0:
                    mine[j, o * leaf : (o + 1) * leaf] = -np.inf
                    continue
                mass[bottom + place, j] = -np.inf  # not to be read twice
                key = (first[f] * nodes[last] + number[bottom + place]) * leaf
                for one in range(leaf):
                    if kept.size and not kept[key + one]:
                        mine[j, o * leaf + one] = -np.inf
                        continue
                    row, query = cells[key + one], lined[j]
                    dot = row[0] * query[0]
                    for c in range(1, dim):
                        dot += row[c] * query[c]
                    mine[j, o * leaf + one] = dot
        # step 5
        top[:] = -np.inf
        for level in range(levels + 1):
            for i in range(starts[level], starts[level + 1] - ROWS if level < levels else start + near):
                if level == levels or not picked[i]:
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
        for level in range(levels + 1):
            begin = starts[level]
            live = begin
            for i in range(begin, starts[level + 1] - ROWS if level < levels else start + near):
                if level == levels or not picked[i]:
                    row = mass[i]
                    for j in range(g):  # in place: two rows that may be one would not become vectors
                        row[j] = exponential(row[j] - top[j])
                    for j in range(g):
                        total[j] += row[j]
                    if live < i:
                        mass[live, :] = row
                    node[live] = node[i]
                    live += 1
            if level < levels:
                mix(rows, node, begin, live, 2 * dim, e, mass[begin:live], sums)
            else:
                mix(cells, node, begin, live, dim, e, mass[begin:live], sums)
        for j in range(count):
            row = index[f, j]
            for c in range(e):
                line[c] = sums[c, j]
            for o in range(own):
                if best[j, o] < 0:
                    continue
                key = (first[f] * nodes[last] + number[bottom + best[j, o]]) * leaf
                for one in range(leaf):
                    w = exponential(mine[j, o * leaf + one] - top[j])
                    total[j] += w
                    values = cells[key + one]
                    for c in range(e):
                        line[c] += w * values[dim + c]
            if total[j] > 0:
                share_of = queries.dtype.type(1) / total[j]
                for c in range(e):
                    out[row, c] = line[c] * share_of
                lse[row] = top[j] + math.log(total[j])
            else:
                out[row, :] = 0
                lse[row] = -np.inf
