"""Exact attention as anyone would write it: two matrix products and a softmax, over keys and values in two arrays."""

from itertools import pairwise
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device, is_numpy_namespace

from opoch_xp.attention import Attention, Report
from opoch_xp.cache.arrays import bytes_of
from opoch_xp.methods import Exact

Array = Any
ROWS = 256  # queries at a time


class Product:
    """What a KVCache is compared with, called as one is; for arrays that can be written to.

    window: a query reads so many of the most recent keys, its own included, and no others.

    >>> import numpy as np, opoch_xp as ox
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 50, 8))
    >>> out = Product(capacity=60).prefill(q, k, v).out
    >>> bool(np.allclose(out, ox.attention(q, k, v, causal=True, method=ox.Exact())))
    True
    """

    def __init__(self, capacity: int, window: int | None = None) -> None:
        self.capacity, self.window, self.length = capacity, window or capacity, 0
        self.held: list[Array] = []

    def __len__(self) -> int:
        return self.length

    @property
    def nbytes(self) -> int:
        return bytes_of(*self.held)

    def append(self, k: Array, v: Array) -> None:
        """Keys and values (key heads, m, d) after those that are there."""
        if not self.held:
            xp, shape = array_namespace(k), (k.shape[0], self.capacity, k.shape[2])
            self.held = [xp.zeros(shape, dtype=k.dtype, device=device(k)) for _ in range(2)]
        stop = self.length + k.shape[1]
        for held, new in zip(self.held, (k, v), strict=True):
            held[:, self.length : stop, :] = new
        self.length = stop

    def attend(self, q: Array) -> Attention:
        """Attention of queries (heads, n_q, d) of the last n_q tokens, causal."""
        xp, n_q = array_namespace(q), q.shape[1]
        first, cuts = self.length - n_q, [*range(0, n_q, ROWS), n_q]
        parts = [self._attend(q[:, low:high, :], first + high) for low, high in pairwise(cuts)]
        out, lse = parts[0] if len(parts) == 1 else (xp.concat(x, axis=1) for x in zip(*parts, strict=True))
        rows = float(np.mean(np.minimum(np.arange(first, self.length) + 1, self.window)))
        return Attention(out, lse, Report(Exact(), "two products", {"local": rows}, self.length - (n_q - 1) / 2, ()))

    def prefill(self, q: Array, k: Array, v: Array) -> Attention:
        """Append, and attend with the queries of the same tokens."""
        self.append(k, v)
        return self.attend(q)

    def _attend(self, q: Array, stop: int) -> tuple[Array, Array]:
        """Queries of the m tokens before `stop`; the query heads that share a key head are rows of one product."""
        xp, (heads, m, dim) = array_namespace(q), q.shape
        start = max(0, stop - m + 1 - self.window)
        k, v = (x[:, start:stop, :] for x in self.held)
        weight = xp.matmul(xp.reshape(q * dim**-0.5, (k.shape[0], -1, dim)), xp.matrix_transpose(k))
        if m > 1:
            back = np.arange(stop - m, stop)[:, None] - np.arange(start, stop)  # (m, keys)
            seen = xp.asarray((back >= 0) & (back < self.window), device=device(q))
            weight = xp.where(
                seen, xp.reshape(weight, (heads, m, -1)), xp.asarray(-xp.inf, dtype=q.dtype, device=device(q))
            )
            weight = xp.reshape(weight, (k.shape[0], -1, stop - start))
        top = xp.max(weight, axis=-1, keepdims=True)
        weight -= top
        weight = xp.exp(weight, out=weight) if is_numpy_namespace(xp) else xp.exp(weight)
        total = xp.sum(weight, axis=-1, keepdims=True)
        out, lse = xp.matmul(weight, v) / total, top + xp.log(total)
        return xp.reshape(out, (heads, m, -1)), xp.reshape(lse, (heads, m))
