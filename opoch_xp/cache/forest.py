"""Keys and values in a growing forest, as the treecode reads them.

A sequence of n tokens of which the first `done`, whole blocks, are in trees reads like `done` written in base `fan`: a
few chunks of each tier, largest first, and the tokens after them as they came, in the open block. A chunk of a tier
takes the place of those of the tier below when it fills: every key is held once. What earlier queries read, and is held
no more, is split anew where it is asked for.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
from array_api_compat import device, is_writeable_array

from opoch_xp.backends import generic
from opoch_xp.backends.generic.tree import rows_of
from opoch_xp.cache.arrays import bytes_of, taken, write_tokens
from opoch_xp.cache.exact import attend_exactly, last_seen
from opoch_xp.cache.layout import Layout, alike
from opoch_xp.cache.memory import Memory
from opoch_xp.cache.trees import Trees
from opoch_xp.forest import Part, Tier, attend_local, attend_tier, key_axes, rows_per_query, tier_runs, tiers
from opoch_xp.methods import Treecode
from opoch_xp.problem import Problem, Solution
from opoch_xp.threads import share
from opoch_xp.tree import Tree, chunk_size

Array = Any
STEP = 1 << 16  # tokens taken at a time, about


def spans(method: Treecode, length: int, done: int) -> list[tuple[int | None, int, int]]:
    """What a sequence is held in, in the order of its tokens: tier, first token and the one after the last of each
    chunk, then those of the open block, whose tier is None."""
    found: list[tuple[int | None, int, int]] = []
    tier, stop = 0, done
    while stop:
        size, parent = chunk_size(method, tier), chunk_size(method, tier + 1)
        start = done // parent * parent
        found[:0] = [(tier, low, low + size) for low in range(start, stop, size)]
        tier, stop = tier + 1, start
    return found + ([(None, done, length)] if done < length else [])


class Forest:
    """The sequences of a cache; k and v here are (some sequences, heads, tokens, ...), `sequences` their numbers.

    lengths and done (batch,), host integers; sequences named together have the same of both.
    """

    def __init__(self, layout: Layout, method: Treecode, capacity: int | None, memory: Memory, finest: bool) -> None:
        self.layout, self.method, self.capacity, self.memory, self.finest = layout, method, capacity, memory, finest
        self.lengths = np.zeros(layout.batch, np.int64)
        self.done = np.zeros(layout.batch, np.int64)
        self.tiers: list[Trees] = []
        self._kernels = layout.kernels
        if memory.offload is not None and not memory.on_host:  # the plain kernel fetches the cells that it opens
            self._kernels = SimpleNamespace(**{**vars(layout.kernels), "tree_attention": generic.tree_attention})
        shape = (layout.batch, layout.heads, method.block)
        self.open = tuple(memory.zeros((*shape, width), layout.stored, False) for width in (layout.dim, layout.width))
        step = method.block
        while step * method.fan <= STEP:
            step *= method.fan
        self.step = STEP // step * step if step <= STEP else step
        self._row_bytes = bytes_of(*self.open) // (layout.batch * layout.heads * method.block)

    @property
    def nbytes(self) -> int:
        return sum(trees.nbytes for trees in self.tiers) + bytes_of(*self.open)

    def alike(self, sequences: np.ndarray) -> Iterable[np.ndarray]:
        """The sequences in groups that can be named together."""
        return alike(sequences, self.lengths, self.done)

    def _size(self, tier: int) -> int:
        return chunk_size(self.method, tier)

    def _held(self, tier: int, done: int) -> tuple[int, int]:
        """The chunks of a tier that a forest of `done` tokens holds, from the first to before the second."""
        return done // self._size(tier + 1) * self.method.fan, done // self._size(tier)

    def append(self, sequences: np.ndarray, k: Array, v: Array) -> None:
        """Put tokens after those that are there."""
        length = int(self.lengths[sequences[0]]) + k.shape[2]
        self._become(sequences, length, (length - 1) // self.method.block * self.method.block, (k, v))

    def crop(self, sequences: np.ndarray, length: int) -> None:
        """Keep the first `length` tokens."""
        block = self.method.block
        done = min(int(self.done[sequences[0]]), max(0, length - 1) // block * block)
        self._become(sequences, length, done)

    def _become(self, sequences: np.ndarray, length: int, done: int, more: tuple[Array, Array] | None = None) -> None:
        """Bring sequences to `length` tokens of which the first `done` are in trees; `more` come after those that stay.

        Nothing of what is there changes before all trees are built.
        """
        before, stay = int(self.done[sequences[0]]), length - (0 if more is None else more[0].shape[2])
        if done == before:
            if more is not None:
                self._write(sequences, stay - done, more)
            for one in sequences.tolist():
                self.lengths[one] = length
            return
        plan, tier = [], 0  # of each tier that lacks chunks: how many stay, and the tokens of those to build
        while self._size(tier) <= done:
            (low, high), (old_low, old_high) = self._held(tier, done), self._held(tier, before)
            kept = min(high, old_high) - low if low == old_low else 0
            if low + kept < high:
                plan.append((tier, kept, (low + kept) * self._size(tier), high * self._size(tier)))
            tier += 1
        start = min([done, *(first for _, _, first, _ in plan)])
        rows = self._gathered(sequences, start, stay, more)
        built = [
            self._built(tuple(x[:, :, first - start : last - start, :] for x in rows), tier)
            for tier, _, first, last in plan
        ]
        left = tuple(self.layout.xp.asarray(x[:, :, done - start :, :], copy=True) for x in rows)
        del rows  # as large as the trees, of which another copy is made now
        for tier, kept, first, last in plan:
            old_low, old_high = self._held(tier, before)
            self._trees(tier).reserve(sequences, old_high - old_low, kept + (last - first) // self._size(tier))
        for tier, kept, first, last in plan:
            self._trees(tier).add(sequences, kept, built.pop(0), (last - first) // self._size(tier))
            self.memory.release()
        self._write(sequences, 0, left)
        self.done[sequences], self.lengths[sequences] = done, length

    def _write(self, sequences: np.ndarray, start: int, rows: tuple[Array, ...]) -> None:
        (keys, values), xp = self.open, self.layout.xp
        self.open = (
            write_tokens(xp, keys, sequences, start, rows[0]),
            write_tokens(xp, values, sequences, start, rows[1]),
        )

    def _trees(self, tier: int) -> Trees:
        """The trees of a tier, which come to be with its first chunk."""
        while len(self.tiers) <= tier:
            number, slots = len(self.tiers), 1
            if self.capacity is not None:
                slots = max(1, min(self.method.fan - 1, self.capacity // self._size(number)))
            elif self.memory.mapped:  # a file takes no more of the disk than is written
                slots = self.method.fan - 1
            self.tiers.append(
                Trees(self.layout, self.memory, self.method, number, self.layout.batch, slots, self.finest)
            )
        return self.tiers[tier]

    def _built(self, rows: tuple[Array, ...], tier: int, order: Array | None = None) -> Tree:
        """Trees of whole chunks of a tier, k and v (b, heads, chunks * size, ...)."""
        xp, size, dim = self.layout.xp, self._size(tier), self.layout.dim
        k, v = (xp.reshape(x, (-1, size, x.shape[-1])) for x in rows)
        axes = key_axes(tier, size, self.method, dim)
        return self._kernels.build_tree(k, v, axes, self.method, mask=None, order=order)

    def parts(self, sequences: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, Array, Array]]:
        """Tokens [start, stop), chunk by chunk in their order: the number of the first, k and v (b, heads, m, ...)."""
        done = int(self.done[sequences[0]])
        for tier, first, last in spans(self.method, int(self.lengths[sequences[0]]), done):
            begin, end = max(start, first), min(stop, last)
            if begin >= end:
                continue
            if tier is None:
                k, v = (taken(self.layout.xp, x, sequences)[:, :, begin - done : end - done, :] for x in self.open)
            else:
                k, v = (x[:, :, begin - first : end - first, :] for x in self._unsplit(sequences, tier, first))
                self.memory.read(bytes_of(k, v))
            yield begin, k, v

    def _unsplit(self, sequences: np.ndarray, tier: int, first: int) -> tuple[Array, Array]:
        """Keys and values (b, heads, size, ...) of the chunk whose first token is named, in the order of tokens."""
        xp, dim, trees = self.layout.xp, self.layout.dim, self.tiers[tier]
        place = self._places(sequences, tier, first)
        cells, order = (taken(xp, x, place) for x in (trees.tree.cells, trees.tree.order))
        heads, size, width = cells.shape
        inverse = xp.argsort(order, axis=1)  # of a permutation
        order = inverse + xp.arange(heads, device=device(order))[:, None] * size
        cells = rows_of(xp, xp.reshape(cells, (heads * size, width)), order)
        cells = xp.reshape(cells, (len(sequences), self.layout.heads, size, width))
        return cells[..., :dim], cells[..., dim:]

    def _places(self, sequences: np.ndarray, tier: int, first: int) -> np.ndarray:
        """Where the chunk of a tier whose first token is named stands, for every head of the sequences."""
        low, _ = self._held(tier, int(self.done[sequences[0]]))
        return self.tiers[tier].chunks(sequences) + first // self._size(tier) - low

    def order(self, sequence: int, tier: int, first: int) -> Array:
        """Where the rows of a chunk came from, (heads, size)."""
        return taken(self.layout.xp, self.tiers[tier].tree.order, self._places(np.array([sequence]), tier, first))

    def restore(
        self, sequence: int, done: int, pieces: Iterable[tuple[int | None, Array, Array, Array | None]]
    ) -> None:
        """Fill an empty sequence with what `spans` names: tier, k and v (1, heads, m, ...) and the order of a chunk."""
        one, held = np.array([sequence]), 0
        before = None
        for tier, k, v, order in pieces:
            self.lengths[sequence] += k.shape[2]
            if tier is None:
                self._write(one, 0, (k, v))
                continue
            held, before = (held + 1 if tier == before else 0), tier
            self._trees(tier).reserve(one, held, held + 1)
            self._trees(tier).add(one, held, self._built((k, v), tier, order), 1)
        self.done[sequence] = done
        self.memory.release()

    def rows(self, sequences: np.ndarray, start: int, stop: int) -> tuple[Array, ...]:
        """Tokens [start, stop), k and v (b, heads, stop - start, ...)."""
        return self._gathered(sequences, start, stop, None)

    def _gathered(
        self, sequences: np.ndarray, start: int, stop: int, more: tuple[Array, Array] | None
    ) -> tuple[Array, ...]:
        """Tokens [start, stop), k and v (b, heads, stop - start, ...), and `more` after them; from within `more` where
        start is past stop. Memory: the tokens once, and a chunk, where the library writes in place."""
        if start >= stop and more is not None:
            return tuple(x[:, :, start - stop :, :] for x in more)
        whole = stop - start + (0 if more is None else more[0].shape[2])
        xp, found = self.layout.xp, [(0, *(x[: len(sequences), :, :0, :] for x in self.open))]
        into: tuple[Array, ...] | None = None
        for first, k, v in chain(self.parts(sequences, start, stop), () if more is None else ((stop, *more),)):
            if k.shape[2] == whole:
                return k, v
            if into is None and is_writeable_array(k):
                into = tuple(
                    xp.empty((*x.shape[:2], whole, x.shape[3]), dtype=x.dtype, device=device(x)) for x in (k, v)
                )
            if into is None:
                found.append((first, k, v))
                continue
            for x, new in zip(into, (k, v), strict=True):
                x[:, :, first - start : first - start + new.shape[2], :] = new
        return into or tuple(xp.concat([part[i] for part in found], axis=2) for i in (1, 2))

    def attend(self, sequences: np.ndarray, q: Array, causal: bool, scale: float) -> Solution:
        """Queries (b, heads, repeat, n_q, d) of the last n_q tokens, or, not causal, of any, against what is held."""
        xp, block = self.layout.xp, self.method.block
        n, n_q = int(self.lengths[sequences[0]]), q.shape[3]
        if not causal and n // block * block != self.done[sequences[0]]:
            self._become(sequences, n, n // block * block)  # every query sees the last block: it is one as others are
        q = xp.reshape(q, (-1, *q.shape[2:]))
        problem, state = self._local(sequences, q, causal, scale)
        for start, part in self._tier_parts(sequences, problem, tiers(n_q, n, causal, self.method), n):
            state = problem.kernels.merge_part(*state, *part, start)
        read = rows_per_query(n_q, n, causal, self.method)
        rows = read["near"] + read["own"] + (2 * read["far"] if self.finest else 0)  # a summary is wider than a row
        self.memory.read(int(rows) * q.shape[0] * q.shape[1] * n_q * self._row_bytes)
        return Solution(*state, read)

    def _tier_parts(self, sequences: np.ndarray, problem: Problem, found: list[Tier], n: int) -> list[Part]:
        """The parts of the tiers, in their order; all at a time where a tier alone leaves threads without work."""
        calls = []
        for tier in found:
            tree, chunk = self._chunks(sequences, tier.number, tier.low, tier.high)
            runs = tier_runs(problem.q.shape, n, self.method, tier, chunk, together=True)
            calls += [partial(attend_tier, problem, self.method, tree, run) for run in runs]
        parts: list[Any] = [None] * len(calls)

        def work(number: int) -> None:
            parts[number] = calls[number]()

        threads = self._kernels.thread_count() if self.layout.host else 1
        largest_first = range(len(calls))[::-1]
        share(work, largest_first, threads if problem.q.shape[0] < threads else 1)
        return parts

    def _local(
        self, sequences: np.ndarray, q: Array, causal: bool, scale: float
    ) -> tuple[Problem, tuple[Array, Array]]:
        """What is exact: queries (b * heads, repeat, n_q, d) against their own blocks, or, not causal, the open one."""
        xp, kernels, (heads, _, n_q, _) = self.layout.xp, self._kernels, q.shape
        n, done, block = int(self.lengths[sequences[0]]), int(self.done[sequences[0]]), self.method.block
        first = max(0, n - n_q) // block * block if causal else done
        if first >= done:  # the open block has one shape whatever it holds
            k, v = (xp.reshape(taken(xp, x, sequences), (heads, block, -1)) for x in self.open)
            problem = Problem(xp, kernels, q, k, v, None, causal, scale)
            return problem, attend_exactly(xp, kernels, q, k, v, last_seen(n, n_q, causal) - done, scale)
        k, v = (xp.reshape(x, (heads, n - first, -1)) for x in self.rows(sequences, first, n))
        problem = Problem(xp, kernels, q, k, v, None, causal, scale)
        return problem, attend_local(problem, self.method)

    def _chunks(self, sequences: np.ndarray, tier: int, low: int, high: int) -> tuple[Tree, np.ndarray]:
        """Trees with the chunks [low, high) of a tier, and where chunk 0 would stand for each key head of them."""
        held_low, held_high = self._held(tier, int(self.done[sequences[0]]))
        if held_low <= low and high <= held_high:
            trees = self._trees(tier)
            return trees.tree, trees.chunks(sequences) - held_low
        size, heads = self._size(tier), len(sequences) * self.layout.heads
        tree = self._built(self.rows(sequences, low * size, high * size), tier)
        return tree, np.arange(heads) * (high - low) - low

    def select(self, indices: np.ndarray, layout: Layout) -> None:
        """Keep the sequences named, in that order."""
        with self.memory.lasting():
            index = layout.xp.asarray(indices, device=layout.device)
            rows = tuple(layout.xp.take(x, index, axis=0) for x in self.open)
        tiers = [trees.chosen(indices, layout) for trees in self.tiers]
        self.layout, self.open, self.tiers = layout, rows, tiers  # nothing raises any more
        self.lengths, self.done = self.lengths[indices], self.done[indices]
