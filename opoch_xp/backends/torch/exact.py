"""Streaming exact attention, its gradient, and merging, in PyTorch: tiles of logits that stay in the L3 cache.

A tile is (heads, rows, keys): a batched product, passes in place, a batched product. Small problems, such as the blocks
of the treecode, are taken many at a time; keys above the diagonal of a whole tile are not computed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opoch_xp.backends.torch.scratch import Scratch, softmax, weights_of

Gradients = tuple[Tensor, Tensor, Tensor]

ROWS, KEYS = 512, 1024  # of a tile: 2 MB in float32
SMALL = 128  # rows of a tile of a small problem: less of a causal triangle is wasted
ELEMENTS = {"cpu": 1 << 19}  # logits held at a time
ELSEWHERE = 1 << 26
MERGE_ROWS = 16384


@dataclass(frozen=True)
class Tile:
    """Heads [entries], rows and keys of a tile; hidden (rows, keys) is -inf for pairs that are not visible
    and 0 for others, or None: added, it is four times as fast as a filled mask."""

    entries: slice
    rows: slice
    keys: slice
    hidden: Tensor | None


def tiles(q: Tensor, n_k: int, causal: bool, positions: np.ndarray | None) -> Iterator[list[Tile]]:
    """For some heads and rows at a time, the tiles of keys that they see."""
    batch, repeat, n_q, _ = q.shape
    last = np.arange(n_q) + (n_k - n_q) if positions is None else np.asarray(positions)
    rows = SMALL if n_k <= ROWS else ROWS
    limit = ELEMENTS.get(q.device.type, ELSEWHERE)
    step = max(1, limit // max(1, repeat * min(rows, n_q) * min(n_k, KEYS)))
    for r in range(0, n_q, rows):
        span = slice(r, min(r + rows, n_q))
        seen = last[span]
        stop = max(0, min(n_k, int(seen.max()) + 1)) if causal else n_k
        found = []
        for s in range(0, stop, KEYS):
            keys = slice(s, min(s + KEYS, stop))
            hidden = None
            if causal and keys.stop - 1 > int(seen.min()):
                hides = np.where(np.arange(keys.start, keys.stop) > seen[:, None], -np.inf, 0.0)
                hidden = torch.as_tensor(hides, dtype=q.dtype).to(q.device, non_blocking=True)
            found.append((keys, hidden))
        for b in range(0, batch, step):
            yield [Tile(slice(b, min(b + step, batch)), span, keys, hidden) for keys, hidden in found]


def logits_of(tile: Tile, q: Tensor, k: Tensor, mask: Tensor | None, scratch: Scratch) -> Tensor:
    """Logits (heads, repeat * rows, keys) of a tile: q (heads, repeat * rows, d) is scaled already."""
    keys = k[tile.entries, tile.keys]
    logits = torch.bmm(q, keys.mT, out=scratch("logits", len(q), q.shape[1], keys.shape[1]))
    if tile.hidden is not None:
        logits.view(len(q), -1, *tile.hidden.shape).add_(tile.hidden)
    if mask is not None:
        logits.masked_fill_(~mask[tile.entries, None, tile.keys], -torch.inf)
    return logits


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    mask: Tensor | None = None,
    positions: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """See opoch_xp.backends.generic.exact.exact_attention."""
    batch, repeat, n_q, dim = q.shape
    out, lse = q.new_zeros(batch, repeat, n_q, v.shape[2]), q.new_full((batch, repeat, n_q), -torch.inf)
    scratch = Scratch(q)
    for row in tiles(q, k.shape[1], causal, positions) if out.numel() else ():
        parts = []
        for tile in row:
            rows = (q[tile.entries, :, tile.rows] * scale).reshape(-1, repeat * (tile.rows.stop - tile.rows.start), dim)
            logits = logits_of(tile, rows, k, mask, scratch)
            hides = mask is not None or tile.hidden is not None
            weight, level = softmax(logits, scratch("weight", *logits.shape), hides)
            parts.append((torch.bmm(weight, v[tile.entries, tile.keys]), level))
        if parts:
            whole, level = parts[0]
            for part, part_level in parts[1:]:
                _merge(whole, level, part, part_level)
            shape = out[tile.entries, :, tile.rows].shape
            out[tile.entries, :, tile.rows] = whole.view(shape)
            lse[tile.entries, :, tile.rows] = level.view(shape[:3])
    return out, lse


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge (..., n, e) and its lse (..., n, 1) into out and lse, in place."""
    total = torch.logaddexp(lse, part_lse)
    seen = total > -torch.inf
    shift = torch.where(seen | total.isnan(), total, 0.0)
    out.mul_((lse - shift).exp_()).addcmul_(part, (part_lse - shift).exp_())
    lse.copy_(total)


def merge_part(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """See opoch_xp.backends.generic.exact.merge_part; out and lse are changed in place and returned."""
    rows = part_lse.shape[2]
    step = MERGE_ROWS if out.device.type == "cpu" else max(1, rows)
    for s in range(0, rows, step):
        here, there = slice(start + s, start + min(s + step, rows)), slice(s, s + step)
        _merge(out[:, :, here], lse[:, :, here, None], part[:, :, there], part_lse[:, :, there, None])
    return out, lse


def exact_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    dout: Tensor,
    delta: Tensor,
    *,
    causal: bool,
    scale: float,
    mask: Tensor | None = None,
) -> Gradients:
    """Gradients of q (batch, repeat, n_q, d), k and v (batch, n_k, ...), through the logits of every visible pair.

    lse (batch, repeat, n_q) of the whole softmax, of which these keys may be a part; dout the gradient of its output;
    delta = dout . out - (gradient of lse). A row whose lse is not finite weighs nothing. Memory: the gradients and a
    tile. Source: Dao et al., FlashAttention, 2022.
    """
    repeat, dim = q.shape[1], q.shape[3]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    seen = torch.isfinite(lse)
    lse, delta = torch.where(seen, lse, torch.inf), torch.where(seen, delta, 0.0)
    if not bool(seen.all()) if q.device.type == "cpu" else True:
        q, dout = (torch.where(seen[..., None], x, 0.0) for x in (q, dout))
    scratch = Scratch(q)
    for row in tiles(q, k.shape[1], causal, None):
        for tile in row:
            entries, span, keys = tile.entries, tile.rows, tile.keys
            count = repeat * (span.stop - span.start)
            rows = (q[entries, :, span] * scale).reshape(-1, count, dim)
            slope = dout[entries, :, span].reshape(-1, count, dout.shape[3])
            level, rest = (x[entries, :, span].reshape(-1, count, 1) for x in (lse, delta))
            weight = weights_of(logits_of(tile, rows, k, mask, scratch), level)
            dv[entries, keys] += torch.bmm(weight.mT, slope)
            dlogit = torch.bmm(slope, v[entries, keys].mT, out=scratch("dlogit", *weight.shape))
            dlogit.sub_(rest).mul_(weight)
            dq[entries, :, span] += (
                torch.bmm(dlogit, k[entries, keys]).mul_(scale).view(-1, repeat, *q[0, 0, span].shape)
            )
            dk[entries, keys] += torch.bmm(dlogit.mT, rows)
    return dq, dk, dv
