"""Streaming exact attention and the merging of parts, for any array library of the Array API standard."""

from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

Array = Any
ELEMENTS = 2**22  # logits held at a time: 16 MB in float32
ROWS, KEYS = 512, 1024


def exact_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    scale: float,
    mask: Array | None = None,
    positions: np.ndarray | None = None,
) -> tuple[Array, Array]:
    """Softmax attention over every visible key, with a running maximum: O(rows * KEYS) memory.

    q (batch, repeat, n_q, d), k (batch, n_k, d), v (batch, n_k, d_v), mask (batch, n_k) bool. Causal: query i sees the
    keys at positions up to positions[i] (host integers), by default i + n_k - n_q.
    Returns out (batch, repeat, n_q, d_v) and lse (batch, repeat, n_q); a row that sees no key is zeros with lse -inf.
    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.
    """
    xp = array_namespace(q)
    batch, repeat, n_q, _ = q.shape
    n_k = k.shape[1]
    if batch * repeat * n_q == 0:
        here = {"device": device(q), "dtype": q.dtype}
        return xp.zeros((batch, repeat, n_q, v.shape[2]), **here), xp.zeros((batch, repeat, n_q), **here)
    last = None
    if causal:
        last = np.arange(n_q) + (n_k - n_q) if positions is None else np.asarray(positions)
    step = max(1, ELEMENTS // max(1, repeat * min(n_q, ROWS) * min(n_k, KEYS)))
    heads = []
    for b in range(0, batch, step):
        entries, rows = slice(b, min(b + step, batch)), []
        for r in range(0, n_q, ROWS):
            span = slice(r, min(r + ROWS, n_q))
            seen = None if last is None else last[span]
            kept = None if mask is None else mask[entries, :]
            rows.append(_rows(xp, q[entries, :, span, :], k[entries, :, :], v[entries, :, :], scale, kept, seen))
        heads.append([xp.concat([row[i] for row in rows], axis=2) for i in (0, 1)])
    return xp.concat([head[0] for head in heads], axis=0), xp.concat([head[1] for head in heads], axis=0)


def _rows(
    xp: Any, q: Array, k: Array, v: Array, scale: float, mask: Array | None, last: np.ndarray | None
) -> tuple[Array, Array]:
    state = nothing_seen(xp, q, v)
    stop = k.shape[1] if last is None else max(0, min(k.shape[1], int(last.max()) + 1))
    for s in range(0, stop, KEYS):
        e = min(s + KEYS, stop)
        visible = None
        if last is not None and e - 1 > int(last.min()):
            visible = xp.asarray(np.arange(s, e)[None] <= last[:, None], device=device(q))
        kept = None if mask is None else mask[:, s:e]
        state = absorb(xp, state, q, k[:, s:e, :], v[:, s:e, :], scale, visible, kept)
    return finished(xp, state)


State = tuple[Array, Array, Array]  # largest logit (batch, repeat, rows), total weight, weighted values (..., d_v)


def nothing_seen(xp: Any, q: Array, v: Array) -> State:
    """The state of rows q (batch, repeat, rows, d) before any key."""
    here = {"device": device(q), "dtype": q.dtype}
    shape = q.shape[:3]
    return xp.full(shape, -xp.inf, **here), xp.zeros(shape, **here), xp.zeros((*shape, v.shape[-1]), **here)


def absorb(
    xp: Any, state: State, q: Array, k: Array, v: Array, scale: float, visible: Array | None, kept: Array | None
) -> State:
    """The state after the keys k (batch, keys, d); visible (rows, keys) and kept (batch, keys) bool, None for all."""
    top, total, out = state
    logits = scale * (q @ xp.permute_dims(k, (0, 2, 1))[:, None, :, :])  # (batch, repeat, rows, keys)
    if visible is not None:
        logits = xp.where(visible, logits, -xp.inf)
    if kept is not None:
        logits = xp.where(kept[:, None, None, :], logits, -xp.inf)
    highest = xp.maximum(top, xp.max(logits, axis=-1))
    shift = xp.where(highest == -xp.inf, 0.0, highest)
    weight = xp.exp(logits - shift[..., None])
    keep = xp.exp(top - shift)
    return highest, total * keep + xp.sum(weight, axis=-1), out * keep[..., None] + weight @ v[:, None, :, :]


def finished(xp: Any, state: State) -> tuple[Array, Array]:
    """out and lse of a state that has seen every key."""
    top, total, out = state
    seen = total != 0
    safe = xp.where(seen, total, 1.0)
    return out / safe[..., None], xp.where(seen, top + xp.log(safe), -xp.inf)


def merge_part(out: Array, lse: Array, part: Array, part_lse: Array, start: int) -> tuple[Array, Array]:
    """Merge a part over other keys into the rows [start, start + n) of (out, lse), weighted by lse.

    out (batch, repeat, n_q, d_v), lse (batch, repeat, n_q); part and part_lse the same with n rows. Returns the new
    pair; a plugin may reuse the memory of out and lse, which the caller gives up.
    """
    xp = array_namespace(out)
    stop = start + part_lse.shape[2]
    old, old_lse = out[:, :, start:stop, :], lse[:, :, start:stop]
    top = xp.maximum(old_lse, part_lse)
    shift = xp.where(top == -xp.inf, 0.0, top)
    a, b = xp.exp(old_lse - shift), xp.exp(part_lse - shift)
    total = a + b
    seen = total != 0
    safe = xp.where(seen, total, 1.0)
    new = old * (a / safe)[..., None] + part * (b / safe)[..., None]
    new_lse = xp.where(seen, shift + xp.log(safe), -xp.inf)
    return (
        xp.concat([out[:, :, :start, :], new, out[:, :, stop:, :]], axis=2),
        xp.concat([lse[:, :, :start], new_lse, lse[:, :, stop:]], axis=2),
    )
