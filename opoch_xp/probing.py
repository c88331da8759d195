"""Multi-probe: the buckets of a table in the order in which a query's neighbours are likely to be in them.

A neighbour falls into another bucket when it lies beyond a hyperplane that passes near the query. So buckets are tried
by the sum of the squared margins |r . q| of the bits they flip, smallest first. Source: Lv, Josephson, Wang, Charikar
and Li, Multi-probe LSH, 2007, section 4.4; here the sets of flipped bits that can be among the first are listed once,
for all queries, and each query sorts those.
"""

from functools import cache
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

Array = Any

NUMBERS = 1 << 22  # held at once


def probe_codes(q: Array, planes: np.ndarray, codes: Array, probes: int) -> Array:
    """The codes of the first `probes` buckets of every query in every table: its own, then the nearest others.

    q (m, dim); planes (tables, bits, dim) on the host; codes (tables, m) int64, of q. Returns (probes, tables, m)
    int64.
    Cost: bits * tables dot products a query, and a sort of a few times `probes` sums a query and table.
    """
    xp = array_namespace(q)
    if probes == 1:
        return codes[None, :, :]
    tables, bits, dim = planes.shape
    m, where = q.shape[0], device(q)
    sets = flip_sets(bits, probes)
    width = sets.shape[1]
    chosen = xp.asarray(sets, dtype=xp.int64, device=where)  # (S, width)
    sums = xp.asarray(sets.T, dtype=q.dtype, device=where)
    normals = xp.asarray(planes.reshape(-1, dim).T, dtype=q.dtype, device=where)  # (dim, tables * bits)
    step = max(1, NUMBERS // (tables * (len(sets) + probes * width + bits)))
    parts = []
    for low in range(0, m, step):
        rows = slice(low, min(low + step, m))
        margins = xp.reshape(xp.abs(q[rows, :] @ normals), (-1, tables, bits))
        order = xp.argsort(margins, axis=-1)[:, :, :width]
        margins = xp.take_along_axis(margins, order, axis=-1)
        weights = (margins * margins) @ sums  # (rows, tables, S)
        first = xp.argsort(weights, axis=-1, stable=True)[:, :, :probes]
        picked = xp.take(chosen, xp.reshape(first, (-1,)), axis=0)
        values = xp.bitwise_left_shift(xp.ones_like(order), order)  # of the sorted bits, (rows, tables, width)
        flips = xp.sum(xp.reshape(picked, (*first.shape, width)) * values[:, :, None, :], axis=-1)
        parts.append(xp.permute_dims(flips, (2, 1, 0)))
    return xp.bitwise_xor(codes[None, :, :], xp.concat(parts, axis=2) if parts else codes[None, :, :])


@cache
def flip_sets(bits: int, probes: int) -> np.ndarray:
    """Which sets of bits, numbered by margin, smallest first, can be among the `probes` sets of smallest sum.

    Returns (sets, width) int8, 1 where the set holds the bit; the empty set is first. A set is left out when `probes`
    others are smaller whatever the margins are: those that come of it by leaving bits out or taking nearer ones.
    """
    found: list[tuple[int, ...]] = [()]
    waiting: list[tuple[int, ...]] = [(0,)] if bits else []
    while waiting:
        flips = waiting.pop()
        if _not_larger(flips) > probes:
            continue
        found.append(flips)
        last = flips[-1] + 1
        if last < bits:
            waiting += [(*flips[:-1], last), (*flips, last)]
    found.sort(key=lambda flips: (len(flips), flips))
    width = 1 + max((flips[-1] for flips in found if flips), default=0)
    sets = np.zeros((len(found), width), np.int8)
    for row, flips in zip(sets, found, strict=True):
        row[list(flips)] = 1
    return sets


def _not_larger(flips: tuple[int, ...]) -> int:
    """How many sets are never larger than this one, itself and the empty set included."""
    descending = flips[::-1]

    @cache
    def ways(number: int, below: int) -> int:
        """Sets of bits under `below`, the i-th largest of them not above descending[number + i]."""
        if number == len(descending):
            return 1
        return 1 + sum(ways(number + 1, bit) for bit in range(min(below, descending[number] + 1)))

    return ways(0, flips[-1] + 1)
