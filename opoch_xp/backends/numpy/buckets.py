"""Attention inside shared buckets for NumPy: tiles of sorted queries against the run of sorted keys they share.

Per table, keys and queries are sorted by code. A bucket's queries and keys are cut into tiles; tiles of like size are
gathered, padded and multiplied together, few enough to stay in cache. Keys, values and a column of ones lie side by
side, so that one gather fetches a key and one product gives the weighted values and their total; padding reads a row of
zeros. A pair that already met in an earlier table is found by comparing codes. Where no logit can pass SAFE, no running
maximum is kept. Tables follow one another; the tasks of a table touch different queries and are cut by the data alone,
so that the result does not depend on the number of threads.

Measured, one core, float32, d = 64: 1,000,000 random unit queries and keys, 16 bits x 8 tables, 241 keys read a query:
12 s, a third of it gathers. 262,144 in 64 clusters, 12 bits x 8 tables, 808 keys per query: 4.0 s.

Letters, for one head of keys with its R heads of queries: n_k keys, N = R * n_q queries, d and dv widths, T tiles of a
batch, g queries and m keys a tile.
"""

from dataclasses import dataclass

import numpy as np

from opoch_xp.backends.numpy.bucket_tables import TILE, Table, cut_tasks, runs, sort_table, stable_order
from opoch_xp.backends.numpy.mean_field import mean_field, past_mean
from opoch_xp.backends.numpy.pool import Buffers, run

Array = np.ndarray

BATCH = 1 << 19  # numbers a batch gathers and computes: 2 MB of float32
WASTE = 1 << 16  # numbers of padding that cost less than one more batch
MOST = 4096  # tiles of a batch
SAFE = 20.0  # logits up to this need no shift: float32 holds sums of exp(20) and of exp(-20) alike
SPARSE = 32  # repeated pairs are listed one by one where they are fewer than one in this many
WIDTHS = np.asarray([1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96, 128, 160, 192, 224, TILE])


@dataclass(frozen=True)
class Head:
    """One head of keys with its heads of queries, and what has been summed so far; row N and key n_k are padding."""

    q: Array  # (N, d)
    rows: Array  # (n_k + 1, d + dv + 1): key, value, one; the last is zeros
    sums: Array  # (N + 1, dv + 1): weighted values, total
    top: Array | None  # (N + 1,) running maximum, or None where no logit passes SAFE
    read: Array  # (N + 1,) int64
    scale: float


def bucket_attention(
    q: Array,
    k: Array,
    v: Array,
    query_codes: Array,
    key_codes: Array,
    *,
    causal: bool,
    scale: float,
    mask: Array | None = None,
    window: int = 0,
    max_bucket: int | None = None,
) -> tuple[Array, Array, Array]:
    """Softmax over the keys that share a code with the query in at least one table, each counted once.

    Arguments, result and edges are those of the generic twin. Cost: sorts, and the candidates of all tables with
    repeats, rounded up to tiles. Memory: a copy of keys and values, and 32 bytes a query, key and table.
    """
    batch, repeat, n_q, dim = q.shape
    n_k, tables, width = k.shape[1], key_codes.shape[1], v.shape[2]
    if 0 in (batch, repeat, n_q):
        none = np.zeros((batch, repeat, n_q), dtype=np.int64)
        return np.zeros((*none.shape, width), dtype=q.dtype), none.astype(q.dtype), none
    sums = np.zeros((batch, repeat * n_q + 1, width + 1), dtype=q.dtype)
    top = None if _bounded(q, k, scale) else np.full(sums.shape[:2], -np.inf, dtype=q.dtype)
    read = np.zeros(sums.shape[:2], dtype=np.int64)
    rows = np.zeros((batch, n_k + 1, dim + width + 1), dtype=k.dtype)
    rows[:, :-1, :dim], rows[:, :-1, dim:-1], rows[:, :-1, -1] = k, v, 1
    flat = q.reshape(batch, repeat * n_q, dim)
    heads = [Head(flat[b], rows[b], sums[b], None if top is None else top[b], read[b], scale) for b in range(batch)]
    kept = [None if mask is None else np.flatnonzero(mask[b]) for b in range(batch)]

    def table(task: tuple[int, int]) -> Table:
        b, number = task
        if number < 0:  # every head one bucket
            codes = np.zeros((repeat, n_q), dtype=np.int64), np.zeros(n_k, dtype=np.int64)
            return sort_table(*codes, kept[b], causal, recent=window)
        return sort_table(
            query_codes[b, :, number], key_codes[b, number], kept[b], causal, older=window, limit=max_bucket
        )

    numbers = range(-1 if window else 0, tables)
    found = run(table, [(b, number) for number in numbers for b in range(batch)])
    for number in range(0, len(found), batch):
        tasks = []
        for b in range(batch):
            earlier = [found[before + b].met for before in range(batch if window else 0, number, batch)]
            tasks += [(heads[b], found[number + b], earlier, *part) for part in cut_tasks(found[number + b].tiles)]
        run(_task, tasks)
    return _finish(q, heads, causal, kept, query_codes, key_codes)


def _bounded(q: Array, k: Array, scale: float) -> bool:
    """Whether no logit can pass SAFE, by the norms of queries and keys. False when a norm is not finite."""
    if q.size == 0 or k.size == 0:
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        squares = [float(np.einsum("...d,...d->...", x, x).max()) for x in (q, k)]
    return bool(scale * scale * squares[0] * squares[1] <= SAFE * SAFE)


def _task(task: tuple[Head, Table, list[tuple[Array, ...]], int, int]) -> None:
    """The tiles [begin, end) of a table, in batches of like size."""
    head, table, earlier, begin, end = task
    tiles, width = table.tiles, head.rows.shape[1]
    g, m = (tiles.high - tiles.low)[begin:end], (tiles.last - tiles.first)[begin:end]
    m, part = _widths(m, width + int(g.mean())), tiles.part[begin:end]
    order = np.lexsort((g, m, part))  # tiles of one part are of different queries: a batch holds no query twice
    g, m, part = g[order], m[order], part[order]
    numbers = g * m + (2 * g + m) * width  # that a tile gathers and computes
    buffer = Buffers()
    for low, high in zip(*(edge.tolist() for edge in runs(m, part)), strict=True):
        while low < high:
            cost = numbers[low : min(high, low + MOST)]
            padded = np.arange(1, len(cost) + 1) * cost  # of so many tiles, all as large as the last
            fitting = np.searchsorted(padded, BATCH, side="right")
            count = max(1, min(int(fitting), int(np.searchsorted(padded - np.cumsum(cost), WASTE, side="right"))))
            index = begin + order[low : low + count]
            _batch(head, table, earlier, index, int(g[low + count - 1]), int(m[low]), buffer)
            low += count


def _widths(m: Array, cost: int) -> Array:
    """Widths that tiles of m keys are padded to: few, but a padded key costs about `cost` numbers."""
    place = np.searchsorted(WIDTHS, m)
    counts = np.bincount(place, minlength=len(WIDTHS))
    widest = int(place.max())
    target = np.arange(len(WIDTHS))
    for small in range(widest - 1, -1, -1):
        if counts[small] * (WIDTHS[target[small + 1]] - WIDTHS[small]) * cost <= WASTE:
            target[small] = target[small + 1]
    return WIDTHS[target][place]


def _batch(
    head: Head, table: Table, earlier: list[tuple[Array, ...]], index: Array, g: int, m: int, buffer: Buffers
) -> None:
    """Add what the tiles `index` (T,), padded to g queries and m keys, give their queries to the sums."""
    tiles, dtype, dim, size = table.tiles, head.q.dtype, head.q.shape[1], len(index)
    first, last = tiles.first[index, None], tiles.last[index, None]
    at, places = tiles.low[index, None] + np.arange(g), first + np.arange(m)  # (T, g), (T, m)
    query = np.where(at < tiles.high[index, None], table.query.take(at, mode="clip"), len(head.q))
    key = np.where(places < last, table.order.take(places, mode="clip"), len(head.rows) - 1)
    rows = head.rows.take(key, axis=0, out=buffer("rows", (size, m, head.rows.shape[1]), dtype), mode="clip")
    queries = head.q.take(query, axis=0, out=buffer("queries", (size, g, dim), dtype), mode="clip")
    queries *= head.scale
    weights = np.matmul(queries, rows[:, :, :dim].swapaxes(1, 2), out=buffer("weights", (size, g, m), dtype))
    count, outside = _visible(table, at, places, first, last, head.top is not None, buffer)
    again = _met(earlier, query, key, buffer)
    fill = -np.inf
    if head.top is None:
        np.exp(weights, out=weights)
        fill = 0.0
    if again is not None:
        count = count - _drop(weights, fill, again, outside, places < last)
    if outside is not None:
        np.copyto(weights, fill, where=outside)
    sums = head.sums.take(query, axis=0, out=buffer("sums", (size, g, head.sums.shape[1]), dtype), mode="clip")
    if head.top is not None:
        old = head.top.take(query)
        top = np.maximum(old, weights.max(axis=-1))
        shift = np.where(top == -np.inf, 0, top)
        weights -= shift[:, :, None]
        np.exp(weights, out=weights)
        sums *= np.exp(old - shift)[:, :, None]
        head.top[query] = top
    sums += np.matmul(weights, rows[:, :, dim:], out=buffer("part", sums.shape, dtype))
    row = np.dtype((np.void, sums.itemsize * sums.shape[2]))  # a row as one item: assigned in half the time
    head.sums.view(row)[:, 0][query] = sums.view(row)[:, :, 0]
    head.read[query] += count


def _visible(
    table: Table, at: Array, places: Array, first: Array, last: Array, strict: bool, buffer: Buffers
) -> tuple[Array, Array | None]:
    """Keys each query may read, (T, g), and the pairs it may not, (T, g, m), or None.

    Padding is among the latter only if strict: the zeros it reads weigh nothing, but are a logit of 0 to the maximum.
    """
    m = places.shape[1]
    shape = (*at.shape, m)
    if table.start is None or table.stop is None:
        outside = None
        if strict and int((last - first).min()) < m:
            outside = buffer("outside", shape, bool)
            np.copyto(outside, (places >= last)[:, None, :])
        return np.broadcast_to(last - first, at.shape), outside
    start = np.maximum(table.start.take(at, mode="clip"), first) - first
    stop = np.minimum(table.stop.take(at, mode="clip"), last) - first
    count = np.maximum(stop - start, 0)
    if (count == m).all():
        return count, None
    spots = np.arange(m, dtype=np.int32)
    outside = np.greater_equal(spots, stop.astype(np.int32)[:, :, None], out=buffer("outside", shape, bool))
    if start.any():
        before = np.less(spots, start.astype(np.int32)[:, :, None], out=buffer("test", shape, bool))
        np.logical_or(outside, before, out=outside)
    return count, outside


def _met(earlier: list[tuple[Array, ...]], query: Array, key: Array, buffer: Buffers) -> Array | None:
    """The pairs that met in an earlier table, (T, g, m), or None without one."""
    shape = (*query.shape, key.shape[1])
    again, test, other = (buffer(name, shape, bool) for name in ("again", "test", "other"))
    for number, met in enumerate(earlier):
        out = test if number else again
        if len(met) == 2:
            np.equal(met[0].take(query)[:, :, None], met[1].take(key)[:, None, :], out=out)
        else:
            rank = met[2].take(key)[:, None, :]
            np.greater_equal(rank, met[0].take(query)[:, :, None], out=out)
            np.logical_and(out, np.less(rank, met[1].take(query)[:, :, None], out=other), out=out)
        if number:
            np.logical_or(again, test, out=again)
    return again if earlier else None


def _drop(weights: Array, fill: float, again: Array, outside: Array | None, real: Array) -> Array | int:
    """Write `fill` where a pair met before; returns how many of these keys each query would have read, (T, g).

    outside (T, g, m): pairs that are not to be read anyway; real (T, m): keys that are no padding.
    """
    if outside is not None:
        np.greater(again, outside, out=again)  # again and not outside
    found = np.count_nonzero(again)
    if found == 0:
        return 0
    size, g, m = again.shape
    if found * SPARSE < again.size:
        places = np.flatnonzero(again)
        weights.reshape(-1)[places] = fill
        row = places // m
        row = row[real[row // g, places % m]]
        return np.bincount(row, minlength=size * g).reshape(size, g)
    np.logical_and(again, real[:, None, :], out=again)
    np.copyto(weights, fill, where=again)
    return np.bitwise_count(np.packbits(again, axis=-1)).sum(axis=-1, dtype=np.int64)


def _finish(
    q: Array, heads: list[Head], causal: bool, kept: list[Array | None], query_codes: Array, key_codes: Array
) -> tuple[Array, Array, Array]:
    """Divide by the totals, and give the queries that read nothing a mean: out, lse and read."""
    batch, repeat, n_q, _ = q.shape
    width = heads[0].sums.shape[1] - 1
    out = np.empty((batch, repeat * n_q, width), dtype=q.dtype)
    lse = np.empty((batch, repeat * n_q), dtype=q.dtype)
    read = np.stack([head.read[:-1] for head in heads])
    for b, head in enumerate(heads):
        total = head.sums[:-1, -1]
        left = np.flatnonzero(read[b] == 0)
        total[left] = 1
        np.divide(head.sums[:-1, :-1], total[:, None], out=out[b])
        np.log(total, out=lse[b])
        if head.top is not None:
            lse[b] += head.top[:-1]
        if len(left) == 0:
            continue
        if causal:
            position = left % n_q + (len(head.rows) - 1 - n_q)
            out[b, left], lse[b, left] = past_mean(head.rows, head.q, left, position, head.scale, kept[b])
        else:
            first = _first_runs(query_codes[b, :, 0].reshape(-1)[left], key_codes[b, 0], kept[b])
            out[b, left], lse[b, left] = mean_field(head.rows, head.q, left, *first, head.scale)
    shape = (batch, repeat, n_q)
    return out.reshape(*shape, width), lse.reshape(shape), read.reshape(shape)


def _first_runs(query_codes: Array, key_codes: Array, kept: Array | None) -> tuple[Array, Array, Array]:
    """Keys sorted by code, and the run (start, stop) of each query's bucket, all keys where that is empty."""
    order = stable_order(key_codes) if kept is None else kept[stable_order(key_codes[kept])]
    codes = key_codes[order]
    start, stop = np.searchsorted(codes, query_codes), np.searchsorted(codes, query_codes, side="right")
    empty = start == stop
    start[empty], stop[empty] = 0, len(order)
    return order, start, stop
