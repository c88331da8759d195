"""Streaming exact attention and merging, in NumPy: tiles of logits that stay in the L2 cache, threads over tiles."""

import numpy as np

from opoch_xp.backends.numpy.pool import run

ROWS, KEYS = 256, 512  # a tile of 512 kB in float32
HEADS = 8  # tiles of small problems done at a time: calls long enough that threads do not wait for the interpreter
SAFE = 60.0  # exp(+-60) summed over 10**10 keys stays within float32: below it no maximum has to be tracked
MERGE_ROWS = 4096


def exact_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    causal: bool,
    scale: float,
    mask: np.ndarray | None = None,
    positions: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """See opoch_xp.backends.generic.exact.exact_attention."""
    batch, repeat, n_q, _ = q.shape
    n_k = k.shape[1]
    out = np.empty((batch, repeat, n_q, v.shape[2]), q.dtype)
    lse = np.empty((batch, repeat, n_q), q.dtype)
    last = None
    if causal:
        last = np.arange(n_q) + (n_k - n_q) if positions is None else np.asarray(positions)
    # small problems (a block of the treecode) waste less of the causal triangle with smaller tiles, several at a time
    rows, heads = (ROWS, 1) if n_k > 2 * ROWS else (ROWS // 2, HEADS)
    longest = _longest(k)

    def tile(task: tuple[int, int, int]) -> None:
        b, r, s = task
        some, span = slice(b, b + heads), slice(s, s + rows)
        seen = None if last is None else last[span]
        kept = None if mask is None else mask[some]
        scaled = q[some, r, span] * q.dtype.type(scale)
        _tile(scaled, k[some], v[some], kept, seen, longest[some].max(), out[some, r, span], lse[some, r, span])

    run(tile, [(b, r, s) for b in range(0, batch, heads) for r in range(repeat) for s in range(0, n_q, rows)])
    return out, lse


def _longest(k: np.ndarray) -> np.ndarray:
    """Largest norm of a key, per batch entry."""
    step = max(1, MERGE_ROWS // k.shape[1])
    parts = run(lambda b: np.einsum("bnd,bnd->bn", k[b : b + step], k[b : b + step]).max(1), range(0, len(k), step))
    return np.sqrt(np.concatenate([np.zeros(0, k.dtype), *parts]), dtype=np.float64)


def _tile(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, kept: np.ndarray | None, last: np.ndarray | None, longest: float,
    out: np.ndarray, lse: np.ndarray,
) -> None:  # fmt: skip
    """Rows q (b, r, d), already scaled, against all keys (b, n_k, d); writes out (b, r, d_v) and lse (b, r)."""
    stop = k.shape[1] if last is None else max(0, min(k.shape[1], int(last.max()) + 1))
    bounded = np.sqrt(np.einsum("bnd,bnd->bn", q, q).max()) * longest < SAFE  # false for NaN
    top = np.zeros(q.shape[:2], q.dtype) if bounded else np.full(q.shape[:2], -np.inf, q.dtype)
    total = np.zeros(q.shape[:2], q.dtype)
    out[...] = 0
    logits = np.empty((*q.shape[:2], min(KEYS, stop)), q.dtype)
    for s in range(0, stop, KEYS):
        e = min(s + KEYS, stop)
        tile = np.matmul(q, k[:, s:e].transpose(0, 2, 1), out=logits[..., : e - s])  # (b, r, keys)
        if last is not None and e - 1 > last.min():
            np.copyto(tile, -np.inf, where=np.arange(s, e) > last[:, None])
        if kept is not None and not kept[:, s:e].all():
            np.copyto(tile, -np.inf, where=~kept[:, None, s:e])
        if not bounded:
            highest = np.maximum(top, tile.max(2))
            shift = np.where(highest == -np.inf, 0, highest)
            keep = np.exp(top - shift)
            out *= keep[..., None]
            total *= keep
            top = highest
            tile -= shift[..., None]
        np.exp(tile, out=tile)
        total += tile.sum(2)
        out += tile @ v[:, s:e]
    seen = total != 0
    safe = np.where(seen, total, 1)
    out /= safe[..., None]
    lse[...] = np.where(seen, np.where(seen, top, 0) + np.log(safe), -np.inf)


def merge_part(
    out: np.ndarray, lse: np.ndarray, part: np.ndarray, part_lse: np.ndarray, start: int
) -> tuple[np.ndarray, np.ndarray]:
    """See opoch_xp.backends.generic.exact.merge_part; out and lse are changed in place and returned."""
    rows = part_lse.shape[2]

    def merge(task: tuple[int, int, int]) -> None:
        b, r, s = task
        e = min(s + MERGE_ROWS, rows)
        whole, whole_lse = out[b, r, start + s : start + e], lse[b, r, start + s : start + e]
        piece, piece_lse = part[b, r, s:e], part_lse[b, r, s:e]
        top = np.maximum(whole_lse, piece_lse)
        shift = np.where(top == -np.inf, 0, top)
        old, new = np.exp(whole_lse - shift), np.exp(piece_lse - shift)
        total = old + new
        seen = total != 0
        safe = np.where(seen, total, 1)
        whole *= (old / safe)[:, None]
        whole += piece * (new / safe)[:, None]
        whole_lse[...] = np.where(seen, shift + np.log(safe), -np.inf)

    tasks = [(b, r, s) for b in range(len(lse)) for r in range(lse.shape[1]) for s in range(0, rows, MERGE_ROWS)]
    run(merge, tasks)
    return out, lse
