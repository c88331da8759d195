"""Balance: products do not change when dimension i of the queries is divided by w_i and that of the keys multiplied by
it. Splits then cut along what queries care about, and queries that read the same keys come into one group.

w_i is the fourth root of the mean of q_i**2 over some queries of a key head: queries and keys then share what spread
each dimension has. It changes where trees are cut, nothing else: no estimate depends on it.
"""

from typing import Any

from array_api_compat import array_namespace

from opoch_xp.methods import Treecode

Array = Any

QUERIES = 256  # of a head, the first: they give it as well as all
SMALLEST = 1e-4  # of a mean square, over the largest


def balance(squares: Array) -> Array:
    """w (batch, d) of the mean squares (batch, d) of each key head's queries, in any unit; ones where all are 0."""
    xp = array_namespace(squares)
    largest = xp.max(squares, axis=1, keepdims=True)
    share = squares / xp.where(largest > 0, largest, 1.0)
    return xp.where(largest > 0, xp.where(share > SMALLEST, share, SMALLEST) ** 0.25, 1.0)


def mean_squares(q: Array) -> tuple[Array, Array]:
    """Mean squares (batch, d) of queries (batch, repeat, n, d) over the square of their largest entry, and that entry
    (batch, 1); queries that are not finite count as zeros."""
    xp = array_namespace(q)
    finite = xp.isfinite(xp.sum(q * 0.0, axis=-1, keepdims=True))
    q = xp.where(finite, q, 0.0)
    largest = xp.max(xp.abs(q), axis=(1, 2, 3))[:, None]
    scaled = q / xp.where(largest > 0, largest, 1.0)[:, None, None, :]
    return xp.mean(scaled * scaled, axis=(1, 2)), largest


def known_queries(n_q: int, n_k: int, causal: bool, method: Treecode) -> int:
    """How many of the first of n_q queries tell the balance.

    A group of one sees nothing of later tokens: with causal=True these are queries of the first block alone, which the
    balance does not serve, and none where the sequence began before the queries.
    """
    if causal and method.group == 1:
        return min(QUERIES, method.block, n_q) if n_q >= n_k else 0
    return min(QUERIES, n_q)


def balance_of(q: Array, n_k: int, causal: bool, method: Treecode) -> Array | None:
    """w (batch, d) for queries (batch, repeat, n_q, d); None where no query tells it, for ones."""
    rows = known_queries(q.shape[2], n_k, causal, method)
    return balance(mean_squares(q[:, :, :rows, :])[0]) if rows else None
