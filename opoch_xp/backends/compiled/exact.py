"""Streaming exact attention and the merging of parts, compiled.

A tile is QUERIES queries against KEYS keys: two products, an exponential a pair, and a running maximum and sum a query.
Source: Dao et al., FlashAttention, 2022.
"""

import math
from typing import Any

import numpy as np

from opoch_xp.backends.compiled.plain import plain
from opoch_xp.backends.compiled.products import ROWS, dots, mix
from opoch_xp.backends.compiled.vector import VECTOR, compiled, exponential
from opoch_xp.threads import share

Array = Any

QUERIES, KEYS = 128, 256  # of a tile: its logits are 128 kB in float32, its queries 32 kB at d = 64
TASK = 1 << 19  # pairs of a task, about: 1 ms
MERGED = 1 << 12  # rows merged by a task
FEW, RUN = 16, 1 << 14  # of fewer tiles the keys are tasks too, so many at a time, whatever the number of threads
NONE = np.zeros(0, bool)


@compiled
def attend_rows(
    q: Array, k: Array, v: Array, mask: Array, last: Array, repeat: int, scale: Any, low: int, high: int, begin: int,
    end: int, out: Array, lse: Array,
) -> None:  # fmt: skip
    """Tiles of queries from low to high: q (heads, n_q, d), k (batch * n_k, d), v (batch * n_k, e), mask (batch * n_k,)
    or empty; query i sees the keys at positions up to last[i], of those from begin to end. Head h has the keys of entry
    h // repeat.

    Tiles are numbered so that the last rows of every head, which see most keys, come first.
    """
    heads, n_q, dim = q.shape
    n_k, e = k.shape[0] * repeat // heads, v.shape[1]
    vector = VECTOR // q.itemsize
    kind, zero, one = q.dtype, q.dtype.type(0), q.dtype.type(1)
    mass = np.empty((KEYS + ROWS, QUERIES), kind)
    turned, sums, tile = np.empty((dim, QUERIES), kind), np.empty((e, QUERIES), kind), np.empty((e, QUERIES), kind)
    top, total, next_top = np.empty(QUERIES, kind), np.empty(QUERIES, kind), np.empty(QUERIES, kind)
    weight = np.empty(QUERIES, kind)
    index = np.empty(KEYS + ROWS, np.int64)
    tiles = -(-n_q // QUERIES)
    for number in range(low, high):
        head, first = number % heads, (tiles - 1 - number // heads) * QUERIES
        count = min(QUERIES, n_q - first)
        g = -(-count // vector) * vector
        base = head // repeat * n_k
        queries, acc = turned.reshape(-1)[: dim * g].reshape(dim, g), sums.reshape(-1)[: e * g].reshape(e, g)
        part = tile.reshape(-1)[: e * g].reshape(e, g)
        logits = mass.reshape(-1)[: (KEYS + ROWS) * g].reshape(KEYS + ROWS, g)
        for j in range(count):
            for c in range(dim):
                queries[c, j] = q[head, first + j, c] * scale
        for j in range(count, g):
            queries[:, j] = zero
        acc[:] = 0
        top[:] = -np.inf
        total[:] = 0
        stop, least = 0, n_k
        for j in range(count):
            stop = max(stop, min(end, last[first + j] + 1))
            least = min(least, last[first + j])
        for start in range(begin, stop, KEYS):
            held = min(KEYS, stop - start)
            padded = -(-held // ROWS) * ROWS
            for i in range(padded):
                index[i] = base + start + (i if i < held else 0)
            dots(k, index, 0, padded, 0, dim, queries, logits)
            for i in range(held):
                if mask.size and not mask[index[i]]:
                    logits[i, :] = -np.inf
                elif start + i > least:
                    for j in range(count):
                        if start + i > last[first + j]:
                            logits[i, j] = -np.inf
            for j in range(g):
                next_top[j] = top[j]
            for i in range(held):
                for j in range(g):
                    next_top[j] = max(next_top[j], logits[i, j])
            for j in range(g):
                if next_top[j] == -np.inf:
                    next_top[j] = 0
            for j in range(g):
                weight[j] = 0
            for i in range(held):
                for j in range(g):
                    logits[i, j] = exponential(logits[i, j] - next_top[j])
                for j in range(g):
                    weight[j] += logits[i, j]
            part[:] = 0
            mix(v, index, 0, held, 0, e, logits[:held], part)
            for j in range(g):  # a tile's sums are added to those before it: of many keys few bits are lost
                top[j] = exponential(top[j] - next_top[j]) if start > begin else zero
                total[j] = total[j] * top[j] + weight[j]
            for c in range(e):
                for j in range(g):
                    acc[c, j] = acc[c, j] * top[j] + part[c, j]
            for j in range(g):
                top[j] = next_top[j]
        for j in range(count):
            if total[j] == 0:
                out[head, first + j, :] = 0
                lse[head, first + j] = -np.inf
            else:
                share_of = one / total[j]
                for c in range(e):
                    out[head, first + j, c] = acc[c, j] * share_of
                lse[head, first + j] = top[j] + math.log(total[j])


def exact_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    scale: float,
    mask: Array | None,
    positions: Array | None,
    workers: int,
) -> tuple[Array, Array]:
    """See opoch_xp.backends.generic.exact.exact_attention."""
    batch, repeat, n_q, dim = q.shape
    n_k, width = k.shape[1], v.shape[2]
    if not causal:
        last = np.full(n_q, n_k - 1)
    else:
        last = np.arange(n_q) + (n_k - n_q) if positions is None else plain(np.asarray(positions, np.int64))
    rows, keys = plain(q).reshape(batch * repeat, n_q, dim), plain(k).reshape(batch * n_k, dim)
    values = plain(v).reshape(batch * n_k, width)
    kept = NONE if mask is None else plain(mask).reshape(-1)
    tiles = len(rows) * -(-n_q // QUERIES)
    step = max(1, TASK // (QUERIES * max(1, n_k)))
    runs = -(-n_k // RUN) if tiles < FEW else 1
    out, lse = np.empty((runs, len(rows), n_q, width), q.dtype), np.empty((runs, len(rows), n_q), q.dtype)

    def work(task: tuple[int, int]) -> None:
        run, low = task
        begin, end = (run * RUN, min(run * RUN + RUN, n_k)) if runs > 1 else (0, n_k)
        attend_rows(
            rows, keys, values, kept, last, repeat, q.dtype.type(scale), low, min(low + step, tiles), begin, end,
            out[run], lse[run],
        )  # fmt: skip

    share(work, [(run, low) for low in range(0, tiles, step) for run in range(runs)], workers)
    for run in range(1, runs):
        for head in range(len(rows)):
            merge_rows(out[0, head], lse[0, head], out[run, head], lse[run, head])
    return out[0].reshape(batch, repeat, n_q, width), lse[0].reshape(batch, repeat, n_q)


@compiled
def merge_rows(out: Array, lse: Array, part: Array, part_lse: Array) -> None:
    """Merge part (n, e), part_lse (n,) into out and lse, in place."""
    for i in range(lse.size):
        a, b = lse[i], part_lse[i]
        if a != a or b != b:
            out[i, :] = np.nan
            lse[i] = np.nan
            continue
        top = max(a, b)
        if top == -np.inf:
            out[i, :] = 0
            continue
        old, new = exponential(a - top), exponential(b - top)
        total = old + new
        old, new = old / total, new / total
        for c in range(out.shape[1]):
            out[i, c] = out[i, c] * old + part[i, c] * new
        lse[i] = top + math.log(total)


def merge_part(out: Array, lse: Array, part: Array, part_lse: Array, start: int, workers: int) -> tuple[Array, Array]:
    """See opoch_xp.backends.generic.exact.merge_part; out and lse are changed in place and returned."""
    rows = part_lse.shape[2]
    part, part_lse = plain(part), plain(part_lse)

    def work(task: tuple[int, int, int]) -> None:
        b, r, low = task
        here, there = slice(start + low, start + min(low + MERGED, rows)), slice(low, min(low + MERGED, rows))
        merge_rows(out[b, r, here], lse[b, r, here], part[b, r, there], part_lse[b, r, there])

    tasks = [(b, r, s) for b in range(len(lse)) for r in range(lse.shape[1]) for s in range(0, rows, MERGED)]
    share(work, tasks, workers if part_lse.size > MERGED else 1)  # a thread takes longer to start than to merge few
    return out, lse
