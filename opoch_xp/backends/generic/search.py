"""Candidates and nearest vectors of an index, generic twin: the specification, in Array API 2024.12. Shapes depend on
the data.

Letters: n vectors, m queries, d = dim, T tables, P probes, R = P * T runs a query, probe by probe.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import array_api_compat

from opoch_xp.buckets import Tables

Array = Any

ENTRIES = 1 << 20  # entries of buckets held at once
PRODUCTS = 1 << 24  # numbers of their vectors held at once


def sort_tables(codes: Array, bits: int) -> Tables:
    """Sort every table by code, ties by position. codes (T, n) of an integer dtype, from 0 to 2**bits - 1."""
    xp = array_api_compat.array_namespace(codes)
    order = xp.argsort(codes, axis=-1, stable=True)
    return Tables(bits, xp.take_along_axis(codes, order, axis=-1), xp.astype(order, xp.int64))


def find_candidates(tables: Tables, codes: Array, limit: int | None = None) -> tuple[Array, Array]:
    """The vectors that share a bucket with a query in at least one run, each once.

    codes (P, T, m) int64: run (p, t) of a query reads the bucket codes[p, t] of table t. `limit`: at most so many
    entries a query, in the order of its runs, an entry counted in every run that holds it. Returns offsets (m + 1,) and
    places (total,) int64: those of query i are places[offsets[i] : offsets[i + 1]], ascending.
    """
    xp = array_api_compat.array_namespace(codes)
    places, counts = [], []
    for _, offsets, place in candidate_blocks(xp, tables, codes, limit):
        counts.append(offsets[1:] - offsets[:-1])
        places.append(place)
    nothing = xp.zeros((0,), dtype=xp.int64, device=array_api_compat.device(codes))
    return _offsets(xp, xp.concat([nothing, *counts])), xp.concat([nothing, *places])


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
    """The k best of each query's candidates by q . x + bias, best first, ties by place.

    q (m, d), x (n, d), bias (n,) or None of one floating dtype; codes and limit as in `find_candidates`, codes None:
    every vector is a candidate; allowed (n,) bool, the vectors that may be found. Returns places (m, k) int64, -1 where
    there are fewer, and scores (m, k), -inf there. Cost: one product of d and one gathered row a candidate.
    """
    xp = array_api_compat.array_namespace(q)
    n, m, device = x.shape[0], q.shape[0], array_api_compat.device(q)
    found = [(xp.zeros((0, k), dtype=xp.int64, device=device), xp.zeros((0, k), dtype=q.dtype, device=device))]
    blocks: Iterable[tuple[int, Array, Array]]
    if codes is None:
        step = max(1, ENTRIES // max(1, n))
        blocks = (_everything(xp, low, min(low + step, m), n, device) for low in range(0, m, step))
    else:
        blocks = candidate_blocks(xp, tables, codes, limit)
    for low, offsets, place in blocks:
        rows = offsets.shape[0] - 1
        owner = xp.repeat(xp.arange(rows, dtype=xp.int64, device=device), offsets[1:] - offsets[:-1])
        if allowed is not None:
            kept = xp.nonzero(xp.take(allowed, place))[0]
            place, owner = xp.take(place, kept), xp.take(owner, kept)
            offsets = _starts(xp, owner, rows, device)
        found.append(_best(xp, _scores(xp, q[low : low + rows, :], x, bias, owner, place), offsets, owner, place, k))
    return xp.concat([places for places, _ in found]), xp.concat([scores for _, scores in found])


def bucket_runs(xp: Any, tables: Tables, codes: Array, limit: int | None) -> tuple[Array, Array]:
    """Where the runs of each query begin in their tables, and how many entries of them are read: (m, R) int64 each."""
    probes, count, _ = codes.shape
    begin, end = [], []
    for run in range(probes * count):
        table = tables.codes[run % count, :]
        wanted = xp.astype(codes[run // count, run % count, :], table.dtype)
        begin.append(xp.astype(xp.searchsorted(table, wanted, side="left"), xp.int64))
        end.append(xp.astype(xp.searchsorted(table, wanted, side="right"), xp.int64))
    start = xp.stack(begin, axis=1)
    read = xp.stack(end, axis=1) - start
    if limit is not None:
        before = xp.cumulative_sum(read, axis=1) - read
        read = (
            xp.clip(limit - before, min=0) if read.shape[0] == 0 else xp.minimum(read, xp.clip(limit - before, min=0))
        )
    return start, read


def candidate_blocks(xp: Any, tables: Tables, codes: Array, limit: int | None) -> Iterator[tuple[int, Array, Array]]:
    """(first query, offsets, places) of the candidates of some queries after another, about ENTRIES entries each."""
    start, read = bucket_runs(xp, tables, codes, limit)
    m = start.shape[0]
    if m == 0:
        return
    block = xp.cumulative_sum(xp.sum(read, axis=1)) // ENTRIES
    cuts = xp.nonzero(block[1:] != block[:-1])[0] + 1
    edges = [0, *(int(cuts[number]) for number in range(cuts.shape[0])), m]
    for low, high in pairwise(edges):
        yield low, *_union(xp, tables, start[low:high, :], read[low:high, :])


def _union(xp: Any, tables: Tables, start: Array, read: Array) -> tuple[Array, Array]:
    """offsets (rows + 1,) and places: what stands in each query's runs, each place once, ascending."""
    device = array_api_compat.device(start)
    (rows, runs), (count, n) = start.shape, tables.order.shape
    read, start = xp.reshape(read, (-1,)), xp.reshape(start, (-1,))
    number = xp.repeat(xp.arange(rows * runs, dtype=xp.int64, device=device), read)  # the run of every entry
    within = xp.arange(number.shape[0], dtype=xp.int64, device=device) - xp.take(_offsets(xp, read), number)
    flat = number % runs % count * n + xp.take(start, number) + within
    order = xp.astype(xp.take(xp.reshape(tables.order, (-1,)), flat), xp.int64)
    pairs = xp.sort(number // runs * n + order)
    if pairs.shape[0]:
        pairs = xp.concat([pairs[:1], xp.take(pairs, xp.nonzero(pairs[1:] != pairs[:-1])[0] + 1)])
    owner = pairs // max(1, n)
    return _starts(xp, owner, rows, device), pairs - owner * n


def _offsets(xp: Any, counts: Array) -> Array:
    """(size + 1,): where each of `counts` pieces laid end to end begins, and the end."""
    return xp.cumulative_sum(counts, include_initial=True, dtype=xp.int64)


def _starts(xp: Any, owner: Array, rows: int, device: Any) -> Array:
    """(rows + 1,): where each owner's entries begin in the ascending `owner`, and the end."""
    return xp.astype(xp.searchsorted(owner, xp.arange(rows + 1, dtype=xp.int64, device=device)), xp.int64)


def _everything(xp: Any, low: int, high: int, n: int, device: Any) -> tuple[int, Array, Array]:
    place = xp.arange((high - low) * n, dtype=xp.int64, device=device)
    return low, xp.arange(high - low + 1, dtype=xp.int64, device=device) * n, place % max(1, n)


def _scores(xp: Any, q: Array, x: Array, bias: Array | None, owner: Array, place: Array) -> Array:
    """q[owner] . x[place] + bias[place], some rows at a time."""
    step = max(1, PRODUCTS // q.shape[1])
    parts = [xp.zeros((0,), dtype=q.dtype, device=array_api_compat.device(q))]
    for low in range(0, place.shape[0], step):
        rows = slice(low, min(low + step, place.shape[0]))
        parts.append(xp.sum(xp.take(q, owner[rows], axis=0) * xp.take(x, place[rows], axis=0), axis=1))
    scores = xp.concat(parts)
    return scores if bias is None else scores + xp.take(bias, place)


def _best(xp: Any, scores: Array, offsets: Array, owner: Array, place: Array, k: int) -> tuple[Array, Array]:
    """The k highest scores of every owner's entries, best first, and their places."""
    if scores.shape[0] == 0:
        shape, device = (offsets.shape[0] - 1, k), array_api_compat.device(scores)
        return (
            xp.full(shape, -1, dtype=xp.int64, device=device),
            xp.full(shape, -xp.inf, dtype=scores.dtype, device=device),
        )
    order = xp.argsort(-scores, stable=True)
    order = xp.take(order, xp.argsort(xp.take(owner, order), stable=True))
    number = xp.arange(k, dtype=xp.int64, device=array_api_compat.device(scores))
    wanted = offsets[:-1, None] + number  # (rows, k)
    there = wanted < offsets[1:, None]
    best = xp.take(order, xp.reshape(xp.where(there, wanted, 0), (-1,)))
    places, values = (xp.reshape(xp.take(array, best), there.shape) for array in (place, scores))
    return xp.where(there, places, -1), xp.where(there, values, -xp.inf)
