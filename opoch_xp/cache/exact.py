"""Exact attention of a cache's last tokens: the query heads of a key head are rows of one product."""

from typing import Any

import numpy as np

Array = Any


def last_seen(n: int, n_q: int, causal: bool) -> np.ndarray:
    """Position of the last of n keys that each query sees (n_q,); negative where it sees none."""
    return np.arange(n - n_q, n) if causal else np.full(n_q, n - 1)


def attend_exactly(
    xp: Any, kernels: Any, q: Array, k: Array, v: Array, last: np.ndarray, scale: float
) -> tuple[Array, Array]:
    """Queries (heads, repeat, n_q, d) over keys (heads, m, d) up to last (n_q,): out (heads, repeat, n_q, d_v) and lse.

    Keys and values after those are not read: their arrays may have one shape whatever they hold.
    """
    heads, repeat, n_q, dim = q.shape
    out, lse = kernels.exact_attention(
        xp.reshape(q, (heads, 1, repeat * n_q, dim)), k, v, causal=True, scale=scale, mask=None,
        positions=np.tile(last, repeat),
    )  # fmt: skip
    return xp.reshape(out, (heads, repeat, n_q, -1)), xp.reshape(lse, (heads, repeat, n_q))
