"""Exact attention in JAX: the steps of the generic twin, in loops over entries, rows and keys."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opoch_xp.backends import generic
from opoch_xp.backends.generic.exact import ELEMENTS, KEYS, ROWS, absorb, finished, nothing_seen
from opoch_xp.backends.jax.loops import compiled, in_blocks

Array = Any

merge_part = compiled("start")(generic.merge_part)


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
    """See opoch_xp.backends.generic.exact.exact_attention."""
    n_q, n_k = q.shape[2], k.shape[1]
    last = np.full(n_q, n_k - 1)
    if causal:
        last = np.arange(n_q) + (n_k - n_q) if positions is None else np.asarray(positions)
    if 0 in q.shape[:3]:
        return jnp.zeros((*q.shape[:3], v.shape[2]), q.dtype), jnp.zeros(q.shape[:3], q.dtype)
    return _attend(q, k, v, jnp.ones(k.shape[:2], bool) if mask is None else mask, last, scale)


@compiled()
def _attend(q: Array, k: Array, v: Array, kept: Array, last: Array, scale: float) -> tuple[Array, Array]:
    _, repeat, n_q, _ = q.shape
    rows, keys = min(n_q, ROWS), min(k.shape[1], KEYS)
    entries = max(1, ELEMENTS // (repeat * rows * keys))

    def some(q: Array, k: Array, v: Array, kept: Array) -> tuple[Array, ...]:
        blocks = [_blocks(x, keys) for x in (k, v, kept)]
        found = in_blocks(partial(_rows, *blocks, scale=scale), (jnp.moveaxis(q, 2, 0), last), rows)
        return tuple(jnp.moveaxis(x, 0, 2) for x in found)

    out, lse = in_blocks(some, (q, k, v, kept), entries)
    return out, lse


def _blocks(x: Array, keys: int) -> Array:
    """x (batch, n_k, ...) as (blocks, batch, keys, ...), zeros after its end."""
    blocks = -(-x.shape[1] // keys)
    x = jnp.pad(x, [(0, 0), (0, blocks * keys - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(jnp.reshape(x, (x.shape[0], blocks, keys, *x.shape[2:])), 1, 0)


def _rows(k: Array, v: Array, kept: Array, q: Array, last: Array, *, scale: float) -> tuple[Array, Array]:
    """Rows q (rows, batch, repeat, d), which see the keys up to last (rows,), against the keys a block at a time."""
    q = jnp.moveaxis(q, 0, 2)
    blocks, _, keys = kept.shape

    @jax.checkpoint
    def see(state: Any, block: Any) -> tuple[Any, None]:
        k, v, kept, start = block
        visible = start + jnp.arange(keys) <= last[:, None]

        def read(state: Any) -> Any:
            return absorb(jnp, state, q, k, v, scale, visible, kept)

        return jax.lax.cond(start <= jnp.max(last), read, lambda state: state, state), None

    starts = jnp.arange(blocks) * keys
    out, lse = finished(jnp, jax.lax.scan(see, nothing_seen(jnp, q, v), (k, v, kept, starts))[0])
    return jnp.moveaxis(out, 2, 0), jnp.moveaxis(lse, 2, 0)
