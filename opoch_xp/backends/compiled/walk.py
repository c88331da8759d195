"""Walking the levels of trees with a group of queries, compiled: what the masses of a level's candidates decide. See
`opoch_xp.backends.generic.tree.walk`.

Letters: g queries of a group, padded to a multiple of `lanes`; m candidates; d the width of keys.
"""

import math
from typing import Any

import numpy as np

from opoch_xp.backends.compiled import masses
from opoch_xp.backends.compiled.masses import GAIN, KNEE, LOG, SHARE, SLOPE, WIDTH
from opoch_xp.backends.compiled.products import ROWS, TALL, dots, turn
from opoch_xp.backends.compiled.vector import VECTOR, compiled, inlined, lowest_bit

Array = Any

READERS = TALL  # queries that read a cell at a time
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
    mass: Array, may: Array, top: Array, spread: Array,
) -> None:  # fmt: skip
    """Log masses of the nodes node[:m] and of what they may hold, into `mass` and `may` (m, g); -inf for no key. The
    variances of their logits into spread (m, g), unless it is empty.

    rows (nodes, 2 d + e); counts (nodes,), or empty: all have `size` keys. queries (d, g), scaled; squares (d, g):
    their squares. top (g,) is raised to the largest mass.
    """
    padded = -(-m // ROWS) * ROWS
    for i in range(m, padded):
        node[i] = node[0]
    dots(rows, node, 0, padded, 0, dim, queries, mass)
    dots(rows, node, 0, padded, dim, dim, squares, may)
    if spread.size:
        spread[:m] = may[:m]
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
) -> int:  # fmt: skip
    """The queries of a group, index (count,) of queries (N, d), scaled: turned (d, g), lined (count, d); their squares;
    votes (g,) bool, False for queries that are not finite and for padding; returns how many have one. The state of the
    softmax: nothing is taken in, and what was read before, seen (N,), is known."""
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
    turn(lined, 0, index.size, 0, queries.shape[1], turned)
    turned[:, index.size :] = 0
    for c in range(turned.shape[0]):
        for j in range(turned.shape[1]):
            squares[c, j] = turned[c, j] * turned[c, j]
    return int(votes.sum())


@compiled
def decide(
    mass: Array, may: Array, m: int, top: Array, total: Array, known: Array, count: int, votes: Array, threshold: Any,
    forced: int, most: int, shift: Array, cut: Array, hot: Array, heavy: Array, opened: Array, forces: Array,
) -> bool:  # fmt: skip
    """What is opened of the candidates of a level: opened (m,) bool; whether `most` left something closed.

    mass and may (m, g) as `log_masses` has them; mass becomes exp(mass - shift), shift (g,) being `top`, and heavy (m,)
    its largest number of each row. total and known (g,): weights, relative to top, of what was taken in and of what was
    read before. cut (g,): what a node must pass to be opened for a query; hot (m,): by how much it does at the most.
    forces (m,) is scratch.
    """
    for j in range(top.size):
        cut[j] = total[j] + known[j]
        shift[j] = np.inf if j >= count else (top[j] if top[j] > -np.inf else 0)  # padding weighs nothing
    for i in range(m):
        heavy[i] = masses.weigh(mass, i, shift, cut)
    for j in range(top.size):
        cut[j] = shift[j] + math.log(cut[j]) + threshold if votes[j] else np.inf
    wanted = 0
    for i in range(m):
        hot[i] = masses.hottest(may, i, cut)
        opened[i] = hot[i] > 0
    if forced > 0:
        heaviest(hot[:m], forced, forces)
        for i in range(m):
            opened[i] |= forces[i] and hot[i] > -np.inf
    for i in range(m):
        wanted += opened[i]
    if most == 0 or wanted <= most:
        return False
    for i in range(m):
        hot[i] = hot[i] if opened[i] else -np.inf
    heaviest(hot[:m], most, opened)
    return True


@compiled
def place_of(number: Array, wanted: int) -> int:
    """Where `wanted` stands in `number`, -1 where it does not."""
    for place in range(number.size):
        if number[place] == wanted:
            return place
    return -1


@compiled
def open_listed(listed: Array, number: Array, m: int, opened: Array) -> None:
    """opened (m,) bool becomes what a list names of the candidates number[:m]; -1 names none."""
    for i in range(m):
        opened[i] = False
    for wanted in listed:
        place = place_of(number[:m], wanted) if wanted >= 0 else -1
        if place >= 0:
            opened[place] = True


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


@inlined
def negligible(mass: Array) -> float:
    """The weight below which a row of `mass` is left out, in its dtype."""
    return NEGLIGIBLE if mass.itemsize == 4 else NEGLIGIBLE * NEGLIGIBLE


@inlined
def left(mass: Array, m: int, opened: Array, heavy: Array, node: Array, total: Array) -> int:
    """Brings the rows of `mass`, and their nodes, that are not opened and hold something to the front; how many. Adds
    their weights to total (g,)."""
    live, least = 0, negligible(mass)
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
    """The queries of group f, of `count`, that read a cell by the lists cells (groups, u) and reads (groups, g, u),
    into asks[used:]; how many."""
    place, asking = place_of(cells[f], wanted), 0
    for j in range(count):
        if reads[f, j, place]:
            asks[used + asking] = j
            asking += 1
    return asking


@compiled
def askers(
    mass: Array, may: Array, m: int, number: Array, base: int, cut: Array, opened: Array, given: bool, cell_list: Array,
    read_list: Array, f: int, count: int, nobody: int, asked: Array, asks: Array,
) -> int:  # fmt: skip
    """Who reads which of the opened cells: how many cells there are. asked gets the row of each cell and its number of
    readers in turn, asks the readers of one cell after another, filled up with `nobody` to a multiple of READERS. Their
    masses become 0, so that what is left of a row are the queries for which the cell stays closed.

    The cells are number[:m] + base; the readers of group f, of `count` queries, are those of the lists, if `given`.
    """
    several, used = 0, 0
    for i in range(m):
        if not opened[i]:
            continue
        if given:
            asking = listed_readers(cell_list, read_list, f, count, number[i], asks, used)
        else:
            asking = passing(may, i, cut, asks, used)
        for j in range(used, used + asking):
            mass[i, asks[j]] = 0
        asked[2 * several], asked[2 * several + 1] = number[i] + base, asking
        after = used + -(-asking // READERS) * READERS
        for j in range(used + asking, after):
            asks[j] = nobody
        used = after
        several += 1
    return several


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
