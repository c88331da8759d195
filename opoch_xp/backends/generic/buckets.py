"""Attention inside shared buckets, generic twin: the specification, in Array API 2024.12. Shapes depend on the data.

All heads are one flat list of queries and one of keys; a bucket is numbered within its head, so none is shared by two
heads. In every table a query's candidates are a run of the sorted keys (`opoch_xp.buckets.Buckets`). Tiles of
neighbouring sorted queries read the run of keys that covers theirs, densely, under a mask; tables are merged by their
running maximum. Nothing is written in place, so that libraries with automatic differentiation can follow.

Letters: B batch, R repeat, N = B * n_q * R flat queries, M = B * n_k flat keys, d and dv widths of keys and values,
g queries a tile, m keys a step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import array_api_compat

from opoch_xp.buckets import Buckets

Array = Any
State = tuple[Array, Array, Array, Array]  # top (N,), total (N,), out (N, dv), read (N,)

ELEMENTS = 1 << 22  # logits, or numbers of a gather, held at once
SUM_BLOCK = 1024  # keys summed at once, so that float32 sums stay exact enough


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

    q (B, R, n_q, d), k (B, n_k, d), v (B, n_k, dv), float32 or float64; query_codes (B, R, tables, n_q), key_codes
    (B, tables, n_k) int64, not negative; mask (B, n_k) bool, True = keep. Returns out (B, R, n_q, dv), lse (B, R, n_q),
    and read (B, R, n_q) int64, the keys each query read.

    Not causal: buckets of more than `max_bucket` kept keys are skipped. A query without a candidate gets the mean
    field of its bucket in the first table, whatever its size, or of all kept keys when that is empty. Causal: query i
    stands at position i + n_k - n_q and sees the keys at positions up to its own: in each table the `max_bucket` most
    recent of its bucket, and always the kept ones of the `window` most recent positions. Without a candidate: the mean
    value of all kept keys it may see, lse from their mean key. A row that may see no key is zeros with lse -inf.

    Keys and values that are masked must be zeros: they weigh nothing, but are read.

    Cost: sorts, and the pairs of the tiles: a few times the candidates. Memory O(N + M) for each table.
    """
    xp = array_api_compat.array_namespace(q)
    batch, repeat, n_q, dim = q.shape
    n_k, width = k.shape[1], v.shape[-1]
    if 0 in (batch, repeat, n_q):
        read = xp.zeros((batch, repeat, n_q), dtype=xp.int64, device=array_api_compat.device(q))
        out = xp.zeros((batch, repeat, n_q, width), dtype=q.dtype, device=array_api_compat.device(q))
        return out, xp.astype(read, q.dtype), read
    flat = Flat(xp, (batch, repeat, n_q, n_k), array_api_compat.device(q), causal, mask)
    rows = xp.reshape(xp.permute_dims(q, (0, 2, 1, 3)), (-1, dim))  # (N, d), by position within each head
    keys, values = xp.reshape(k, (-1, dim)), xp.reshape(v, (-1, width))
    parts = (
        tiling.restored([_tiles(xp, rows, keys, values, scale, tiles) for tiles in tiling])
        for tiling in tilings(flat, query_codes, key_codes, window, max_bucket, dim + width)
    )
    return settled(flat, rows, keys, values, scale, reduce(partial(_merge, xp), parts), query_codes, key_codes)


def settled(
    flat: "Flat",
    rows: Array,
    keys: Array,
    values: Array,
    scale: float,
    state: State,
    query_codes: Array,
    key_codes: Array,
) -> tuple[Array, Array, Array]:
    """What bucket_attention returns, from the state of all pairs: queries without a candidate get their mean."""
    xp, (batch, repeat, n_q, _) = flat.xp, flat.shape
    top, total, out, read = state
    alone = read == 0
    out = out / xp.where(alone, 1.0, total)[:, None]
    lse = xp.where(alone, -xp.inf, top + xp.log(xp.where(alone, 1.0, total)))
    left = xp.nonzero(alone)[0]
    if left.shape[0]:
        if flat.causal:
            field, level = past_mean(xp, flat, rows, keys, values, scale, left)
        else:
            numbers = flat.numbers(query_codes[:, :, 0, :], key_codes[:, 0, :])
            field, level = mean_field(xp, flat, rows, keys, values, scale, left, flat.buckets(*numbers))
        place = xp.cumulative_sum(xp.astype(alone, xp.int64)) - 1
        place = xp.where(alone, place, 0)
        out = xp.where(alone[:, None], xp.take(field, place, axis=0), out)
        lse = xp.where(alone, xp.take(level, place, axis=0), lse)
    back = (0, 2, 1)
    shape = (batch, n_q, repeat)
    return (
        xp.permute_dims(xp.reshape(out, (*shape, values.shape[1])), (*back, 3)),
        xp.permute_dims(xp.reshape(lse, shape), back),
        xp.permute_dims(xp.reshape(read, shape), back),
    )


class Flat:
    """Queries and keys of all heads as flat lists, and the sorting of both by bucket.

    Queries are in the order (batch, position, repeat), keys in the order (batch, position), so a stable sort leaves
    positions ascending within a bucket.
    """

    def __init__(self, xp: Any, shape: tuple[int, ...], device: Any, causal: bool, mask: Array | None) -> None:
        self.xp, self.shape, self.causal = xp, shape, causal
        batch, repeat, n_q, n_k = shape
        self.kept = None if mask is None else xp.reshape(mask, (-1,))
        self.head = xp.arange(batch, dtype=xp.int64, device=device)  # (B,)
        key = xp.broadcast_to(xp.arange(n_k, dtype=xp.int64, device=device), (batch, n_k))
        query = xp.arange(n_q, dtype=xp.int64, device=device)[None, :, None] + (n_k - n_q)
        self.key_position = xp.reshape(key, (-1,))  # (M,)
        self.position = xp.reshape(xp.broadcast_to(query, (batch, n_q, repeat)), (-1,))  # (N,), negative: sees nothing

    def one_bucket(self) -> tuple[Array, Array]:
        """Bucket numbers when a head is one bucket: of queries (N,) and of keys (M,)."""
        _, repeat, n_q, n_k = self.shape
        return self.xp.repeat(self.head, n_q * repeat), self.xp.repeat(self.head, n_k)

    def numbers(self, query_codes: Array, key_codes: Array) -> tuple[Array, Array]:
        """Dense numbers of the buckets: query_codes (B, R, n_q) to (N,), key_codes (B, n_k) to (M,)."""
        xp = self.xp
        batch, n_k = self.shape[0], self.shape[3]
        queries = xp.reshape(xp.permute_dims(query_codes, (0, 2, 1)), (batch, -1))
        codes = xp.concat([key_codes, queries], axis=1)  # (B, n_k + n_q * R)
        order = xp.argsort(codes, axis=-1)
        codes = xp.take_along_axis(codes, order, axis=-1)
        changes = xp.astype(codes[:, 1:] != codes[:, :-1], xp.int64)
        ranks = xp.concat([xp.zeros_like(codes[:, :1]), xp.cumulative_sum(changes, axis=-1)], axis=-1)
        numbers = xp.take_along_axis(ranks, xp.argsort(order, axis=-1), axis=-1)
        head = self.head[:, None] * codes.shape[1]
        return xp.reshape(numbers[:, n_k:] + head, (-1,)), xp.reshape(numbers[:, :n_k] + head, (-1,))

    def buckets(
        self, queries: Array, keys: Array, recent: int = 0, older: int = 0, limit: int | None = None
    ) -> Buckets:
        """Candidates of one table, given the bucket numbers of queries (N,) and keys (M,).

        recent=w: only the w most recent positions; older=w: only what lies before them. limit: see `max_bucket`.
        """
        xp = self.xp
        n_k = self.shape[3]
        if self.kept is not None:
            keys = xp.where(self.kept, keys, xp.max(keys) + xp.max(queries) + 1)  # a bucket that no query is in
        order = xp.argsort(keys)
        keys = xp.take(keys, order)
        if not self.causal:
            start, stop = xp.searchsorted(keys, queries), xp.searchsorted(keys, queries, side="right")
            if limit is not None:
                stop = xp.where(stop - start > limit, start, stop)
            return Buckets(order, start, stop)
        spread = keys * (n_k + 1) + xp.take(self.key_position, order) + 1  # ascends with (bucket, position)

        def upto(position: Array) -> Array:
            position = xp.where(position < 0, -1, position)
            return xp.searchsorted(spread, queries * (n_k + 1) + position + 1, side="right")

        start, stop = upto(xp.full_like(self.position, -1)), upto(self.position)
        if limit is not None:
            start = xp.maximum(start, stop - limit)
        if recent:
            start = xp.maximum(start, upto(self.position - recent))
        if older:
            stop = xp.maximum(start, xp.minimum(stop, upto(self.position - older)))
        return Buckets(order, start, stop)


def candidate_runs(
    flat: Flat, query_codes: Array, key_codes: Array, window: int, max_bucket: int | None
) -> tuple[list[Buckets], list[Array]]:
    """The window, if there is one, and the tables: each query's run of keys, and the place (M,) of each key."""
    found = []
    if window:
        found.append(flat.buckets(*flat.one_bucket(), recent=window))
    for table in range(key_codes.shape[1]):
        numbers = flat.numbers(query_codes[:, :, table, :], key_codes[:, table, :])
        found.append(flat.buckets(*numbers, older=window, limit=max_bucket))
    return found, [flat.xp.argsort(one.order) for one in found]


def tilings(
    flat: Flat, query_codes: Array, key_codes: Array, window: int, max_bucket: int | None, width: int
) -> Iterator["Tiling"]:
    """The window and the tables, each as tiles of the pairs that none before it has; `width` numbers a query and a key
    have together."""
    found, ranks = candidate_runs(flat, query_codes, key_codes, window, max_bucket)
    for table, one in enumerate(found):
        yield Tiling(flat.xp, one, found[:table], ranks[:table], width)


@dataclass(frozen=True)
class Tiles:
    """A batch of tiles: queries `at` (tiles, g) against `steps` times m sorted keys from `low` (tiles,) on. `test` says
    which pairs count, given sorted places and keys, both (tiles, m)."""

    xp: Any
    order: Array
    at: Array
    low: Array
    m: int
    steps: int
    test: Callable[[Array, Array], Array]

    def pairs(self) -> Iterator[tuple[Array, Array]]:
        """Step by step: keys (tiles, m), and whether each of the queries counts them, (tiles, g, m) bool."""
        xp, here = self.xp, array_api_compat.device(self.at)
        for step in range(self.steps):
            number = xp.arange(step * self.m, (step + 1) * self.m, dtype=xp.int64, device=here)
            places = self.low[:, None] + number
            inside = xp.where(places < self.order.shape[0], places, 0)  # out of range lies outside every run
            numbers = xp.reshape(xp.take(self.order, xp.reshape(inside, (-1,))), places.shape)
            yield numbers, self.test(places, numbers)


class Tiling:
    """The pairs of one table as tiles of g queries: iterated, batches of tiles; `restored` puts their states back."""

    def __init__(self, xp: Any, found: Buckets, earlier: list[Buckets], ranks: list[Array], width: int) -> None:
        queries, n_keys = found.start.shape[0], found.order.shape[0]
        span = int(xp.max(found.stop - found.start))
        mean = int(xp.sum(found.stop - found.start)) // queries
        g = min(queries, max(16, min(128, mean)))
        m = min(max(1, span + g), 2 * g)
        count = -(-queries // g)
        # Sorted by where the candidates start, then stop: the tiles of a bucket stay together and cover short runs.
        order = xp.argsort(found.start * (n_keys + 1) + found.stop)
        place = xp.arange(count * g, dtype=xp.int64, device=array_api_compat.device(order))
        real = xp.reshape(place < queries, (count, g))
        index = xp.reshape(xp.take(order, xp.where(place < queries, place, queries - 1)), (count, g))
        start = xp.reshape(xp.take(found.start, xp.reshape(index, (-1,))), (count, g))
        stop = xp.reshape(xp.take(found.stop, xp.reshape(index, (-1,))), (count, g))
        stop = xp.where(real, stop, start)
        some = stop > start
        low = xp.min(xp.where(some, start, n_keys), axis=-1)  # (tiles,)
        steps = (xp.maximum(xp.max(xp.where(some, stop, 0), axis=-1) - low, xp.zeros_like(low)) + m - 1) // m
        self.xp, self.found, self.earlier, self.ranks = xp, found, earlier, ranks
        self.order, self.index, self.start, self.stop, self.low, self.steps = order, index, start, stop, low, steps
        self.by_steps = xp.argsort(steps)  # tiles of like length share a batch
        self.m, self.batch = m, max(1, ELEMENTS // (g * m + (g + m) * width))

    def __iter__(self) -> Iterator[Tiles]:
        xp, count = self.xp, self.index.shape[0]
        for first in range(0, count, self.batch):
            tiles = self.by_steps[first : min(first + self.batch, count)]
            at = xp.take(self.index, tiles, axis=0)
            bounds = (xp.take(self.start, tiles, axis=0), xp.take(self.stop, tiles, axis=0))
            test = _candidates(xp, at, bounds, self.earlier, self.ranks)
            steps = int(xp.max(xp.take(self.steps, tiles)))
            yield Tiles(xp, self.found.order, at, xp.take(self.low, tiles), self.m, steps, test)

    def restored(self, parts: list[State]) -> State:
        """The states of the queries (N, ...), from those of the tiles of each batch."""
        xp = self.xp
        unsort, back = xp.argsort(self.by_steps), xp.argsort(self.order)

        def flat(i: int) -> Array:
            one = xp.take(xp.concat([part[i] for part in parts], axis=0), unsort, axis=0)  # (tiles, g, ...)
            return xp.take(xp.reshape(one, (-1, *one.shape[2:])), back, axis=0)

        return flat(0), flat(1), flat(2), flat(3)


def _candidates(
    xp: Any, at: Array, bounds: tuple[Array, Array], earlier: list[Buckets], ranks: list[Array]
) -> Callable[[Array, Array], Array]:
    """Which pairs count, for the queries `at` (tiles, g): a function of sorted places and keys, both (tiles, m)."""
    flat = xp.reshape(at, (-1,))
    before = [
        [xp.reshape(xp.take(edge, flat), at.shape)[:, :, None] for edge in (one.start, one.stop)] for one in earlier
    ]
    start, stop = (edge[:, :, None] for edge in bounds)

    def test(places: Array, numbers: Array) -> Array:
        places = places[:, None, :]
        counts = (places >= start) & (places < stop)  # (tiles, g, m)
        for (low, high), rank in zip(before, ranks, strict=True):
            place = xp.reshape(xp.take(rank, xp.reshape(numbers, (-1,))), numbers.shape)[:, None, :]
            counts = counts & ~((place >= low) & (place < high))
        return counts

    return test


def _tiles(xp: Any, rows: Array, keys: Array, values: Array, scale: float, tiles: Tiles) -> State:
    """The states (tiles, g, ...) of the queries of some tiles."""
    at, here = tiles.at, {"dtype": rows.dtype, "device": array_api_compat.device(rows)}
    query = _rows(xp, rows, at)  # (tiles, g, d)
    top = xp.full(at.shape, -xp.inf, **here)
    total, out = xp.zeros(at.shape, **here), xp.zeros((*at.shape, values.shape[1]), **here)
    read = xp.zeros_like(at)
    for numbers, counts in tiles.pairs():
        logits = scale * (query @ xp.matrix_transpose(_rows(xp, keys, numbers)))  # (tiles, g, m)
        logits = xp.where(counts, logits, -xp.inf)
        highest = xp.maximum(top, xp.max(logits, axis=-1))
        shift = xp.where(highest == -xp.inf, 0.0, highest)
        weights, keep = xp.exp(logits - shift[:, :, None]), xp.exp(top - shift)
        out = out * keep[:, :, None] + weights @ _rows(xp, values, numbers)
        total = total * keep + xp.sum(weights, axis=-1)
        read = read + xp.sum(xp.astype(counts, xp.int64), axis=-1)
        top = highest
    return top, total, out, read


def _rows(xp: Any, x: Array, index: Array) -> Array:
    return xp.reshape(xp.take(x, xp.reshape(index, (-1,)), axis=0), (*index.shape, x.shape[1]))


def _merge(xp: Any, a: State, b: State) -> State:
    top = xp.maximum(a[0], b[0])
    shift = xp.where(top == -xp.inf, 0.0, top)
    left, right = xp.exp(a[0] - shift), xp.exp(b[0] - shift)
    return (
        top,
        a[1] * left + b[1] * right,
        a[2] * left[:, None] + b[2] * right[:, None],
        a[3] + b[3],
    )


def runs_mean(xp: Any, x: Array, order: Array, start: Array, stop: Array, center: Array | None = None) -> Array:
    """Mean of the rows x[order[start:stop]] of each run, (runs, width), or of (row - center)**2; zeros if empty."""
    device = array_api_compat.device(x)
    total = xp.zeros((start.shape[0], x.shape[1]), dtype=x.dtype, device=device)
    longest = int(xp.max(stop - start))
    m = max(1, min(longest, SUM_BLOCK, ELEMENTS // (start.shape[0] * x.shape[1])))
    for low in range(0, longest, m):
        places = start[:, None] + xp.arange(low, low + m, dtype=xp.int64, device=device)
        inside = places < stop[:, None]
        numbers = xp.take(order, xp.reshape(xp.where(inside, places, 0), (-1,)))
        part = xp.reshape(xp.take(x, numbers, axis=0), (*places.shape, x.shape[1]))
        part = part if center is None else (part - center[:, None, :]) ** 2
        total = total + xp.sum(xp.where(inside[:, :, None], part, 0.0), axis=1)
    return total / xp.astype(xp.maximum(stop - start, xp.ones_like(start)), x.dtype)[:, None]


def mean_runs(flat: Flat, left: Array, first: Buckets) -> tuple[Array, tuple[Array, Array], Array]:
    """Whose mean field the queries `left` get: keys `order`, its runs (start, stop), and the run of each query: its
    bucket in the first table, or its whole head where that is empty."""
    xp, whole = flat.xp, flat.buckets(*flat.one_bucket())
    n_keys = whole.order.shape[0]
    start, stop = xp.take(first.start, left), xp.take(first.stop, left)
    empty = start == stop
    order = xp.concat([first.order, whole.order])  # runs of buckets and, behind them, runs of whole heads
    start = xp.where(empty, xp.take(whole.start, left) + n_keys, start)
    stop = xp.where(empty, xp.take(whole.stop, left) + n_keys, stop)
    spread = 2 * n_keys + 1
    runs = xp.unique_inverse(start * spread + stop)
    return order, (runs.values // spread, runs.values % spread), xp.reshape(runs.inverse_indices, (-1,))


def mean_field(
    xp: Any, flat: Flat, rows: Array, keys: Array, values: Array, scale: float, left: Array, first: Buckets
) -> tuple[Array, Array]:
    """Mean field of the first table's bucket, or of all kept keys, for the queries `left`: values and log masses.

    The log mass of n Gaussian energies with its freezing transition: Derrida, Random-energy model, 1981.
    """
    order, ends, number = mean_runs(flat, left, first)
    mean = runs_mean(xp, keys, order, *ends)  # (runs, d)
    variance = runs_mean(xp, keys, order, *ends, center=mean)
    value = runs_mean(xp, values, order, *ends)
    query = xp.take(rows, left, axis=0)
    count = xp.take(ends[1] - ends[0], number)
    log_count = xp.log(xp.astype(xp.maximum(count, xp.ones_like(count)), keys.dtype))
    sigma2 = scale * scale * xp.sum(query * query * xp.take(variance, number, axis=0), axis=-1)
    frozen = xp.sqrt(2.0 * log_count * sigma2)
    level = scale * xp.sum(query * xp.take(mean, number, axis=0), axis=-1)
    level = level + xp.where(sigma2 <= 2.0 * log_count, log_count + 0.5 * sigma2, frozen)
    return xp.take(value, number, axis=0), xp.where(count > 0, level, -xp.inf)


def past_mean(
    xp: Any, flat: Flat, rows: Array, keys: Array, values: Array, scale: float, left: Array
) -> tuple[Array, Array]:
    """Mean value of the kept keys up to the position of each query of `left`, and the log mass of their mean key."""
    batch, n_k = flat.shape[0], flat.shape[3]
    kept = xp.ones_like(keys[:, :1]) if flat.kept is None else xp.astype(flat.kept, keys.dtype)[:, None]
    data = xp.reshape(xp.concat([keys, values, kept], axis=1), (batch, n_k, -1))
    position = xp.take(flat.position, left)
    head = xp.take(flat.one_bucket()[0], left)
    before = xp.zeros_like(data[:, 0, :])  # (B, d + dv + 1), the sums of all earlier blocks
    picked = [xp.nonzero(position < 0)[0]]
    parts = [xp.zeros((picked[0].shape[0], data.shape[2]), dtype=data.dtype, device=array_api_compat.device(data))]
    for low in range(0, n_k, SUM_BLOCK):
        sums = before[:, None, :] + xp.cumulative_sum(data[:, low : min(low + SUM_BLOCK, n_k), :], axis=1)
        before = sums[:, -1, :]
        picked.append(xp.nonzero((position >= low) & (position < low + SUM_BLOCK))[0])
        at = xp.take(head, picked[-1]) * sums.shape[1] + xp.take(position, picked[-1]) - low
        parts.append(xp.take(xp.reshape(sums, (-1, data.shape[2])), at, axis=0))
    sums = xp.take(xp.concat(parts, axis=0), xp.argsort(xp.concat(picked)), axis=0)  # back in the order of `left`
    count = sums[:, -1]
    mean = sums[:, :-1] / xp.where(count > 0, count, 1.0)[:, None]
    query = xp.take(rows, left, axis=0)
    level = scale * xp.sum(query * mean[:, : keys.shape[1]], axis=-1) + xp.log(xp.where(count > 0, count, 1.0))
    return mean[:, keys.shape[1] :], xp.where(count > 0, level, -xp.inf)
