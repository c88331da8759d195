"""Candidates and nearest vectors of an index for NumPy.

Codes of few bits are looked up in a list of offsets, others by bisection. The entries of some thousand runs are laid
end to end as numbers query * n + vector, whose sort in cache brings those of a query together, each once; their vectors
are then fetched in ascending order and multiplied query by query. Where a query's buckets hold more than a DENSE share
of all vectors, one product with all of them costs less than fetching: the others are barred from it.

Letters: n vectors, m queries, d = dim, T tables, P probes, R = P * T runs a query, probe by probe.
"""

from collections.abc import Iterator

import numpy as np

from opoch_xp.backends.numpy.bucket_tables import stable_order
from opoch_xp.backends.numpy.pool import Buffers, run
from opoch_xp.buckets import Tables

Array = np.ndarray

ENTRIES = 1 << 18  # of a block: 1 MB to sort, and calls long enough for two threads to pass the interpreter's lock on
GATHER = 1 << 20  # numbers of vectors fetched at once: 4 MB of float32, so that calls are long enough for threads
ROOM = 4  # offsets are kept while they are at most so many times as long as a table
DENSE = 0.06  # share of all vectors in a query's buckets from which one product with all of them is faster
BARRED = 1 << 25  # bytes of a block's mask of what is not a candidate
TASKS = 4  # at least so many blocks of queries, for the threads, whatever their number: it must not change results
LEAST = 1 << 14  # entries of a block, or its calls are too short for threads
LOOK_UPS = 1 << 15  # bisections, from which threads share them: 1 ms
COLUMNS = 4096  # vectors of one product of a dense block
SAME = 1 << 31  # below it numbers are sorted and kept as int32


def sort_tables(codes: Array, bits: int) -> Tables:
    """Sort every table by code, ties by position. codes (T, n) of an integer dtype, from 0 to 2**bits - 1.

    Radix sort, 16 bits at a time. Memory: 4 bytes an entry (8 from 2**31 vectors on), and 2, 4 or 8 for its code.
    """
    tables, n = codes.shape
    small = np.uint16 if bits <= 16 else np.uint32 if bits <= 32 else np.int64
    ordered = np.empty((tables, n), small)
    order = np.empty((tables, n), np.int32 if n < SAME else np.int64)
    offsets = np.zeros((tables, 2**bits + 1), order.dtype) if 2**bits <= ROOM * n else None

    def sort(table: int) -> None:
        ascends = bool((codes[table, 1:] >= codes[table, :-1]).all())
        order[table] = np.arange(n) if ascends else stable_order(codes[table])
        np.take(codes[table].astype(small, copy=False), order[table], out=ordered[table])
        if offsets is not None:
            np.cumsum(np.bincount(codes[table], minlength=2**bits), out=offsets[table, 1:])

    run(sort, range(tables))
    return Tables(bits, ordered, order, offsets)


def find_candidates(tables: Tables, codes: Array, limit: int | None = None) -> tuple[Array, Array]:
    """The vectors that share a bucket with a query in at least one run, each once: see the generic twin."""
    n, m = tables.order.shape[1], codes.shape[2]
    if n == 0:
        return np.zeros(m + 1, np.int64), np.zeros(0, np.int64)
    starts, reads = _runs(tables, codes, limit)
    flat = np.ascontiguousarray(tables.order).reshape(-1)

    def block(rows: slice) -> tuple[Array, Array]:
        read = reads[rows]
        if read.sum() <= DENSE * n * len(read):
            pairs = _pairs(flat, n, starts[rows], read)
            edges = np.searchsorted(pairs, np.arange(len(read) + 1) * pairs.dtype.type(n))
            return np.diff(edges), (pairs % n).astype(np.int64)
        barred = _barred(flat, n, starts[rows], read)
        np.logical_not(barred, out=barred)
        return np.count_nonzero(barred, axis=1), np.flatnonzero(barred) % n

    found = run(block, _cut(reads, n))
    counts = np.concatenate([np.zeros(1, np.int64), *(count for count, _ in found)])
    return np.cumsum(counts), np.concatenate([np.zeros(0, np.int64), *(places for _, places in found)])


def search_buckets(
    q: Array,
    x: Array,
    bias: Array | None,
    tables: Tables,
    codes: Array | None,
    k: int,
    allowed: Array | None = None,
    limit: int | None = None,
) -> tuple[Array, Array]:
    """The k best of each query's candidates by q . x + bias, best first, ties by place: see the generic twin."""
    (m, _), n = q.shape, len(x)
    places, scores = np.full((m, k), -1, np.int64), np.full((m, k), -np.inf, q.dtype)
    if n == 0 or m == 0:
        return places, scores
    refused = None if allowed is None else ~allowed
    if codes is None:
        step = max(1, min(BARRED // n, -(-m // TASKS)))

        def all_of(rows: slice) -> None:
            block = q[rows]
            barred = None if refused is None else np.broadcast_to(refused, (len(block), n))
            _dense(block, x, bias, barred, places[rows], scores[rows])

        run(all_of, [slice(low, low + step) for low in range(0, m, step)])
        return places, scores
    starts, reads = _runs(tables, codes, limit)
    by_size = np.argsort(reads.sum(1), kind="stable")  # so that a block's queries have about equally many
    starts, reads = starts[by_size], reads[by_size]
    flat = np.ascontiguousarray(tables.order).reshape(-1)

    def block(rows: slice) -> None:
        numbers, start, read = by_size[rows], starts[rows], reads[rows]
        place, score = np.full((len(numbers), k), -1, np.int64), np.full((len(numbers), k), -np.inf, q.dtype)
        if read.sum() > DENSE * n * len(read):
            barred = _barred(flat, n, start, read)
            if refused is not None:
                barred |= refused
            _dense(q[numbers], x, bias, barred, place, score)
        else:
            pairs = _pairs(flat, n, start, read)
            if allowed is not None:
                pairs = pairs[allowed[pairs % n]]
            _sparse(q[numbers], x, bias, pairs, place, score)
        places[numbers], scores[numbers] = place, score

    run(block, _cut(reads, n))
    return places, scores


def _runs(tables: Tables, codes: Array, limit: int | None) -> tuple[Array, Array]:
    """Where the runs of each query begin in their tables, and how many entries of them are read: (m, R) each."""
    probes, count, m = codes.shape
    begin, end = (np.empty((probes, count, m), tables.order.dtype) for _ in range(2))

    def look_up(table: int) -> None:
        wanted, held = codes[:, table], tables.codes[table]
        if tables.offsets is not None:
            np.take(tables.offsets[table], wanted, out=begin[:, table])
            np.take(tables.offsets[table], wanted + 1, out=end[:, table])
            return
        wanted = wanted.astype(held.dtype)
        low = np.searchsorted(held, wanted, side="left")
        there = np.take(held, low, mode="clip") == wanted  # most buckets of many bits are empty
        begin[:, table] = end[:, table] = low
        end[:, table][there] = np.searchsorted(held, wanted[there], side="right")

    if tables.offsets is not None or probes * count * m < LOOK_UPS:
        for table in range(count):
            look_up(table)
    else:
        run(look_up, range(count))
    starts = np.ascontiguousarray(begin.reshape(probes * count, m).T)
    reads = np.ascontiguousarray((end - begin).reshape(probes * count, m).T)
    if limit is not None:
        before = np.cumsum(reads, axis=1, dtype=np.int64) - reads
        reads = np.minimum(reads, np.maximum(limit - before, 0)).astype(reads.dtype)
    return starts, reads


def _cut(reads: Array, n: int) -> Iterator[slice]:
    """Blocks of queries: at most ENTRIES entries and less than 2**31 numbers, or, where dense, BARRED bytes of mask."""
    totals = reads.sum(1, dtype=np.int64)
    low, m = 0, len(totals)
    ends = np.cumsum(totals)
    entries = min(ENTRIES, max(LEAST, int(totals.sum()) // TASKS))
    most = max(1, (SAME - 1) // max(1, n))
    dense = max(1, min(BARRED // max(1, n), -(-m // TASKS)))
    while low < m:
        before = ends[low - 1] if low else 0
        high = int(np.searchsorted(ends, before + entries, side="right"))
        if totals[low] > DENSE * n:
            high = low + dense
        high = min(max(high, low + 1), low + most, m)
        yield slice(low, high)
        low = high


def _pairs(flat: Array, n: int, start: Array, read: Array) -> Array:
    """query * n + vector of what stands in the runs, ascending, each once."""
    rows, tables = len(start), len(flat) // n
    kind = np.int32 if rows * n < SAME else np.int64
    filled = np.flatnonzero(read)
    count = read.reshape(-1)[filled]
    first = start.reshape(-1)[filled] + filled % tables * n  # in the tables laid end to end
    ends = np.cumsum(count, dtype=np.int64)
    place = np.repeat(first - (ends - count), count)
    place = np.add(place, np.arange(len(place)), out=place)
    pairs: Array = np.take(flat, place).astype(kind, copy=False)
    pairs += np.repeat((np.arange(rows) * n).astype(kind), read.sum(1))
    pairs.sort()
    new = np.ones(len(pairs), bool)
    np.not_equal(pairs[1:], pairs[:-1], out=new[1:])
    return pairs[new]


def _barred(flat: Array, n: int, start: Array, read: Array) -> Array:
    """(rows, n) bool: True where the vector stands in none of the query's runs."""
    rows, runs = start.shape
    first = start + np.arange(runs) % (len(flat) // n) * n
    barred = np.ones((rows, n), bool)
    for row in range(rows):
        for low, count in zip(first[row].tolist(), read[row].tolist(), strict=True):
            if count:
                barred[row, flat[low : low + count]] = False
    return barred


def _sparse(q: Array, x: Array, bias: Array | None, pairs: Array, places: Array, scores: Array) -> None:
    """The best of the pairs of each query, into places and scores (rows, k)."""
    (rows, dim), n = q.shape, len(x)
    edges = np.searchsorted(pairs, np.arange(rows + 1) * pairs.dtype.type(n))
    counts = np.diff(edges)
    vectors, buffers, low = pairs % n, Buffers(), 0
    while low < rows:
        width = max(1, int(counts[low:].max() if low + 1 == rows else counts[low]))
        high = min(rows, low + max(1, GATHER // (width * dim)))
        width = max(1, int(counts[low:high].max()))
        size = high - low
        there = np.arange(width) < counts[low:high, None]
        padded = np.zeros((size, width), vectors.dtype)
        padded[there] = vectors[edges[low] : edges[high]]
        fetched = buffers("fetched", (size * width, dim), x.dtype)
        np.take(x, padded.reshape(-1), axis=0, out=fetched, mode="clip")
        found = (fetched.reshape(size, width, dim) @ q[low:high, :, None])[:, :, 0]
        if bias is not None:
            found += bias[padded]
        found[~there] = -np.inf
        _keep(found, padded.astype(np.int64), places[low:high], scores[low:high])
        low = high
    places[np.isneginf(scores)] = -1


def _dense(q: Array, x: Array, bias: Array | None, barred: Array | None, places: Array, scores: Array) -> None:
    """The best of all vectors that are not barred (rows, n), into places and scores (rows, k)."""
    rows, k = places.shape
    for low in range(0, len(x), COLUMNS):
        columns = slice(low, min(low + COLUMNS, len(x)))
        found = q @ x[columns].T
        if bias is not None:
            found += bias[columns]
        if barred is not None:
            np.copyto(found, -np.inf, where=barred[:, columns])
        higher = np.flatnonzero(found > scores[:, -1:])  # few after the first products
        if len(higher) == 0:
            continue
        row, column = np.divmod(higher, found.shape[1])
        count = np.bincount(row, minlength=rows)
        there = np.arange(count.max()) < count[:, None]
        values = np.full((rows, k + count.max()), -np.inf, q.dtype)
        names = np.full(values.shape, -1, np.int64)
        values[:, :k], names[:, :k] = scores, places
        values[:, k:][there], names[:, k:][there] = found[row, column], column + low
        _keep(values, names, places, scores)


def _keep(found: Array, names: Array, places: Array, scores: Array) -> None:
    """The k highest of found (rows, width), best first, equal ones in the order of their columns, which ascend."""
    k = min(places.shape[1], found.shape[1])
    if found.shape[1] > 4 * k:  # all that reach the k-th, however many are equal to it
        least = np.partition(found, found.shape[1] - k, axis=1)[:, found.shape[1] - k, None]
        kept = found >= least
        width = int(kept.sum(1).max())
        if width < found.shape[1]:
            column = np.argsort(~kept, axis=1, kind="stable")[:, :width] if width > 2 * k else _columns(kept, width)
            found = np.where(
                np.arange(width) < kept.sum(1)[:, None], np.take_along_axis(found, column, axis=1), -np.inf
            )
            names = np.take_along_axis(names, column, axis=1)
    order = np.argsort(-found, axis=1, kind="stable")[:, :k]
    scores[:, :k] = np.take_along_axis(found, order, axis=1)
    places[:, :k] = np.take_along_axis(names, order, axis=1)


def _columns(kept: Array, width: int) -> Array:
    """The columns that are kept in each row, ascending, filled up with the first."""
    column = np.flatnonzero(kept) % kept.shape[1]
    count = kept.sum(1)
    columns = np.zeros((len(kept), width), np.int64)
    columns[np.arange(width) < count[:, None]] = column
    return columns
