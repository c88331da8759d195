"""Tables of buckets for NumPy: keys and queries of one head sorted by code, and the tiles they are read in.

Letters, for one head of keys with its R heads of queries: n_k keys, N = R * n_q queries.
"""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

TILE = 256  # queries and keys of the largest tile: its logits are 256 kB of float32
TASK = 1 << 24  # numbers a task reads and computes, about: 0.1 s


@dataclass(frozen=True)
class Tiles:
    """Queries [low, high) of a table's sorted queries against keys [first, last) of its sorted keys; part: how many
    tiles of the same queries came before."""

    low: Array
    high: Array
    first: Array
    last: Array
    part: Array


@dataclass(frozen=True)
class Table:
    """One table of one head, sorted by code, ties by position.

    order (kept,) keys; query (N,) queries; start, stop (N,) the runs of `order` that the sorted queries read, or None
    where a tile's queries all read all of its keys. met: what tells whether a pair met here, (query codes, key codes),
    or (start, stop, rank) by query, query and key where `max_bucket` cuts runs short.
    """

    order: Array
    query: Array
    start: Array | None
    stop: Array | None
    tiles: Tiles
    met: tuple[Array, ...]


def stable_order(codes: Array) -> Array:
    """Stable argsort of codes that are not negative: radix sort, 16 bits at a time."""
    order = np.argsort(codes.astype(np.uint16), kind="stable")  # of the low 16 bits
    largest, shift = int(codes.max(initial=0)), 16
    while largest >> shift:
        order = order[np.argsort((codes >> shift).astype(np.uint16)[order], kind="stable")]
        shift += 16
    return order


def sort_table(
    query_codes: Array,
    key_codes: Array,
    kept: Array | None,
    causal: bool,
    recent: int = 0,
    older: int = 0,
    limit: int | None = None,
) -> Table:
    """One table of one head: query_codes (R, n_q), key_codes (n_k,), kept: numbers of the kept keys.

    recent=w: only the w most recent positions; older=w: only what lies before them. limit: see `max_bucket`.
    """
    (repeat, n_q), n_k = query_codes.shape, len(key_codes)
    order = stable_order(key_codes) if kept is None else kept[stable_order(key_codes[kept])]
    key_sorted = key_codes[order]
    flat = query_codes.T.reshape(-1)  # by position, so that positions ascend within a bucket
    by_code = stable_order(flat)
    query = by_code if repeat == 1 else by_code % repeat * n_q + by_code // repeat
    query_sorted = flat[by_code]
    low, high = runs(query_sorted)
    first, last = (np.searchsorted(key_sorted, query_sorted[low], side=side) for side in ("left", "right"))
    over = limit is not None and bool((last - first).max() > limit)
    start: Array | None = None
    stop: Array | None = None
    if causal:
        position = by_code // repeat + (n_k - n_q)
        starts, stops = np.repeat(first, high - low), np.repeat(last, high - low)
        begin, end = runs(key_sorted)
        spread = np.repeat(begin, end - begin) * (n_k + 1) + order

        def upto(position: Array) -> Array:
            place = np.searchsorted(spread, starts * (n_k + 1) + np.maximum(position, -1), side="right")
            return np.minimum(place, stops)

        start, stop = starts, upto(position)
        if limit is not None:
            start = np.maximum(start, stop - limit)
        if recent:
            start = np.maximum(start, upto(position - recent))
        if older:
            stop = np.maximum(start, np.minimum(stop, upto(position - older)))
    elif over:
        last = np.where(last - first > limit, first, last)
        start, stop = np.repeat(first, high - low), np.repeat(last, high - low)
    tiles = _cut_tiles(low, high, first, last, start, stop)
    met: tuple[Array, ...]
    if over and start is not None and stop is not None:
        rank = np.full(n_k + 1, -1, dtype=np.int32)
        rank[order] = np.arange(len(order))
        met = (_by_query(start, query), _by_query(stop, query), rank)
    else:
        small = _small(max(int(key_codes.max(initial=0)), int(flat.max(initial=0))))
        # padding has codes that differ, or it would meet itself everywhere
        met = (np.append(query_codes.reshape(-1), 0).astype(small), np.append(key_codes, 1).astype(small))
    return Table(order, query, start if causal else None, stop if causal else None, tiles, met)


def _by_query(values: Array, query: Array) -> Array:
    placed = np.zeros(len(query) + 1, dtype=np.int32)
    placed[query] = values
    return placed


def _small(largest: int) -> type:
    return np.uint16 if largest < 1 << 16 else np.uint32 if largest < 1 << 32 else np.int64


def _spread(counts: Array) -> tuple[Array, Array]:
    """Owner and number of every piece, where owner i has counts[i] pieces."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def _cut_tiles(low: Array, high: Array, first: Array, last: Array, start: Array | None, stop: Array | None) -> Tiles:
    """Tiles of buckets: queries [low, high), keys [first, last), cut into even pieces of at most TILE."""
    pieces = np.where(last > first, -(-(high - low) // TILE), 0)
    owner, piece = _spread(pieces)
    size, pieces = (high - low)[owner], pieces[owner]
    low, high = low[owner] + size * piece // pieces, low[owner] + size * (piece + 1) // pieces
    first, last = first[owner], last[owner]
    if start is not None and stop is not None:  # both ascend within a bucket
        first, last = start[low], stop[high - 1]
    pieces = -(-np.maximum(last - first, 0) // TILE)
    owner, piece = _spread(pieces)
    size, pieces = (last - first)[owner], pieces[owner]
    first, last = first[owner] + size * piece // pieces, first[owner] + size * (piece + 1) // pieces
    return Tiles(low[owner], high[owner], first, last, piece)


def cut_tasks(tiles: Tiles) -> list[tuple[int, int]]:
    """Runs of tiles of about TASK numbers each. Tiles of the same queries stay in one."""
    g, m = tiles.high - tiles.low, tiles.last - tiles.first
    cost = np.cumsum(g * m + 64 * (g + m))
    task = np.maximum.accumulate(np.where(tiles.part == 0, cost, 0)) // TASK
    begin, end = runs(task)
    return list(zip(begin.tolist(), end.tolist(), strict=True))


def runs(*columns: Array) -> tuple[Array, Array]:
    """Where each run of equal rows begins and ends, the columns side by side."""
    size = len(columns[0])
    new = np.ones(size, dtype=bool)
    new[1:] = False
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    begin = np.flatnonzero(new)
    return begin, np.append(begin[1:], size)[: len(begin)]
