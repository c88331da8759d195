"""Keys and values in rows, as they came: what Exact and LSH read."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from opoch_xp.cache.arrays import bytes_of, taken, write_tokens
from opoch_xp.cache.exact import attend_exactly, last_seen
from opoch_xp.cache.layout import Layout, alike
from opoch_xp.cache.memory import Memory
from opoch_xp.lsh import LEAST_BUCKET, bucket_limit
from opoch_xp.methods import LSH, Exact
from opoch_xp.problem import Problem, Solution
from opoch_xp.solve import solve

Array = Any
STEP = 1 << 16  # tokens taken at a time
FIRST = 256  # tokens that there is room for at first; the room doubles


def spans(length: int, start: int = 0) -> list[tuple[None, int, int]]:
    """Tokens, some at a time, as opoch_xp.cache.forest.spans names them."""
    return [(None, low, min(low + STEP, length)) for low in range(start, length, STEP)]


class Rows:
    """The sequences of a cache; k and v here are (some sequences, heads, tokens, ...), `sequences` their numbers.

    lengths (batch,), host integers; sequences named together have the same.
    """

    step = STEP

    def __init__(self, layout: Layout, method: Exact | LSH, capacity: int | None, memory: Memory) -> None:
        self.layout, self.capacity, self.memory = layout, capacity, memory
        self.method = method
        self.lengths = np.zeros(layout.batch, np.int64)
        self.held = self._empty(capacity or FIRST)

    def _empty(self, room: int) -> tuple[Array, ...]:
        layout = self.layout
        shape = (layout.batch, layout.heads, room)
        return tuple(self.memory.zeros((*shape, width), layout.stored, True) for width in (layout.dim, layout.width))

    @property
    def nbytes(self) -> int:
        return bytes_of(*self.held)

    def alike(self, sequences: np.ndarray) -> Iterable[np.ndarray]:
        """The sequences in groups that can be named together."""
        return alike(sequences, self.lengths)

    def append(self, sequences: np.ndarray, k: Array, v: Array) -> None:
        """Put tokens after those that are there."""
        xp, start = self.layout.xp, int(self.lengths[sequences[0]])
        room, wanted = self.held[0].shape[2], start + k.shape[2]
        if wanted > room:
            there, old = int(np.max(self.lengths)), self.held
            self.held = tuple(
                write_tokens(xp, new, self.layout.everyone, 0, x[:, :, :there, :])
                for new, x in zip(self._empty(max(wanted, 2 * room)), old, strict=True)
            )
        self.held = tuple(write_tokens(xp, x, sequences, start, new) for x, new in zip(self.held, (k, v), strict=True))
        self.lengths[sequences] = wanted

    def crop(self, sequences: np.ndarray, length: int) -> None:
        """Keep the first `length` tokens."""
        self.lengths[sequences] = length

    def take_in(self, sequences: np.ndarray, q: Array, first: int) -> None:
        """Nothing is learned from queries."""

    def told(self, sequence: int) -> dict[str, Array]:
        """What was learned from queries."""
        return {}

    def forget(self, lengths: np.ndarray) -> None:
        """Nothing was learned from queries."""

    def parts(self, sequences: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, Array, Array]]:
        """Tokens [start, stop), some at a time: the number of the first, k and v (b, heads, m, ...)."""
        for _, low, high in spans(stop, start):
            k, v = (taken(self.layout.xp, x, sequences)[:, :, low:high, :] for x in self.held)
            yield low, k, v

    def restore(self, sequence: int, done: int, pieces: Iterable[tuple[Any, Array, Array, Any]], told: Any) -> None:
        """Fill an empty sequence with what `spans` names, k and v (1, heads, m, ...)."""
        for _, k, v, _ in pieces:
            self.append(np.array([sequence]), k, v)

    def attend(self, sequences: np.ndarray, q: Array, causal: bool, scale: float) -> Solution:
        """Queries (b, heads, repeat, n_q, d) of the last n_q tokens, or, not causal, of any, against what is held."""
        xp, kernels, n = self.layout.xp, self.layout.kernels, int(self.lengths[sequences[0]])
        heads = len(sequences) * self.layout.heads
        q = xp.reshape(q, (heads, *q.shape[2:]))
        k, v = (taken(xp, x, sequences) for x in self.held)
        if isinstance(self.method, Exact):
            k, v = (xp.reshape(x, (heads, *x.shape[2:])) for x in (k, v))
            last = last_seen(n, q.shape[2], causal)
            read = {"local": float(np.mean(np.maximum(last + 1, 0)))}
            return Solution(*attend_exactly(xp, kernels, q, k, v, last, scale), read)
        k, v = (xp.reshape(x[:, :, :n, :], (heads, n, -1)) for x in (k, v))
        return solve(Problem(xp, kernels, q, k, v, None, causal, scale), self._limited(causal))

    def _limited(self, causal: bool) -> LSH:
        """The method with a largest bucket that does not grow with the tokens: no output depends on later ones."""
        assert isinstance(self.method, LSH)
        if not causal or self.method.max_bucket is not None or not self.method.bits:
            return self.method
        limit = LEAST_BUCKET if self.capacity is None else bucket_limit(self.method, self.capacity)
        return replace(self.method, max_bucket=limit)

    def select(self, indices: np.ndarray, layout: Layout) -> None:
        """Keep the sequences named, in that order."""
        with self.memory.lasting():
            index = layout.xp.asarray(indices, device=layout.device)
            self.held = tuple(layout.xp.take(x, index, axis=0) for x in self.held)
        self.layout, self.lengths = layout, self.lengths[indices]
