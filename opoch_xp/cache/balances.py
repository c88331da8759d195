"""By what the dimensions of a sequence's keys are stretched where they are split: see opoch_xp.treecode.balance.

A balance is fixed when the first chunk of a sequence is split, from the queries seen until then at its first positions.
What is kept of them are root mean squares position by position, not sums: so any chunking of the same tokens gives the
same balance, bit by bit, and a crop forgets the queries of the tokens that go.
"""

from typing import Any

import numpy as np
from array_api_compat import device

from opoch_xp.cache.arrays import bytes_of, put, taken, write_tokens
from opoch_xp.cache.groups import entries
from opoch_xp.cache.layout import Layout, alike
from opoch_xp.cache.memory import Memory
from opoch_xp.methods import Treecode
from opoch_xp.treecode.balance import QUERIES, balance, mean_squares

Array = Any


def positions(method: Treecode) -> int:
    """How many of the first positions of a sequence have a say: those of its first block, up to so many."""
    return min(QUERIES, method.block)


class Balances:
    """The balances of the sequences of a cache, (batch, heads, d), of those that have a chunk in a tree.

    asked (batch, heads, positions, d): for each position the root mean square of its queries, over the query heads of a
    key head; zeros where no query was seen, which tell nothing. known (batch,), host integers: the positions before
    have had their say.
    """

    def __init__(self, layout: Layout, method: Treecode, memory: Memory) -> None:
        shape = layout.batch, layout.heads
        self.layout, self.limit = layout, positions(method)
        self.asked = memory.zeros((*shape, self.limit, layout.dim), layout.summed, False)
        self.balance = memory.zeros((*shape, layout.dim), layout.summed, False)
        self.known = np.zeros(layout.batch, np.int64)

    @property
    def nbytes(self) -> int:
        return bytes_of(self.asked, self.balance)

    def take_in(self, sequences: np.ndarray, q: Array, first: int) -> None:
        """Queries (b, heads, repeat, m, d) of the tokens from position `first` on; what is known stays as it is."""
        stop = min(first + q.shape[3], self.limit)
        for some in alike(sequences, self.known):
            start = max(first, int(self.known[some[0]]))
            if start < stop:
                rows = entries(self.layout, q, sequences, some)[:, :, :, start - first : stop - first, :]
                self.write(some, start, root_mean_squares(self.layout, rows))

    def write(self, sequences: np.ndarray, start: int, rows: Array) -> None:
        """Root mean squares (b, heads, m, d) of the positions from `start` on, which are then known."""
        self.asked = write_tokens(self.layout.xp, self.asked, sequences, start, rows)
        self.known[sequences] = start + rows.shape[2]

    def forget(self, sequences: np.ndarray, length: int) -> None:
        """As if no query had been seen of the tokens after the first `length`."""
        late = sequences[self.known[sequences] > length]
        if len(late):
            xp, (_, heads, _, dim) = self.layout.xp, self.asked.shape
            shape = len(late), heads, self.limit - length, dim
            nothing = xp.zeros(shape, dtype=self.asked.dtype, device=device(self.asked))
            self.asked = write_tokens(xp, self.asked, late, length, nothing)
            self.known[late] = length

    def told(self, sequences: np.ndarray) -> Array:
        """What the queries seen so far tell, (len(sequences) * heads, d)."""
        asked = taken(self.layout.xp, self.asked, sequences)
        asked = self.layout.xp.reshape(asked, (-1, 1, self.limit, self.layout.dim))
        return balance(mean_squares(asked)[0])

    def fix(self, sequences: np.ndarray, fixed: Array) -> None:
        """Hold balances (len(sequences) * heads, d)."""
        fixed = self.layout.xp.reshape(fixed, (len(sequences), self.layout.heads, self.layout.dim))
        self.balance = put(self.layout.xp, self.balance, sequences, fixed, 1)

    def of(self, sequences: np.ndarray) -> Array:
        """The balances that are held, (len(sequences) * heads, d)."""
        return self.layout.xp.reshape(taken(self.layout.xp, self.balance, sequences), (-1, self.layout.dim))

    def chosen(self, indices: np.ndarray, layout: Layout) -> "Balances":
        """Those of the sequences named, in that order."""
        new: Balances = object.__new__(Balances)
        new.layout, new.limit, new.known = layout, self.limit, self.known[indices]
        index = layout.xp.asarray(indices, device=layout.device)
        new.asked, new.balance = (layout.xp.take(x, index, axis=0) for x in (self.asked, self.balance))
        return new


def root_mean_squares(layout: Layout, q: Array) -> Array:
    """Of queries (b, heads, repeat, m, d), over the query heads of a key head: (b, heads, m, d). Heads whose query is
    not finite count as zeros."""
    xp = layout.xp
    q = xp.astype(q, layout.summed, copy=False)
    q = xp.where(xp.isfinite(xp.sum(q * 0.0, axis=-1, keepdims=True)), q, 0.0)
    largest = xp.max(xp.abs(q), axis=(2, 4), keepdims=True)  # squares stay within the dtype
    scaled = q / xp.where(largest > 0, largest, 1.0)
    return xp.sqrt(xp.mean(scaled * scaled, axis=2)) * largest[:, :, 0, :, :]
