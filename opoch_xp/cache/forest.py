"""Keys and values in a growing forest, as the treecode reads them.

A sequence of n tokens of which the first `done`, whole blocks, are in trees reads like `done` written in base `fan`: a
few chunks of each tier, largest first, and the tokens after them as they came, in the open block. A chunk of a tier
takes the place of those of the tier below when it fills: every key is held once. What earlier queries read, and is held
no more, is split anew where it is asked for.

The first tokens of a sequence, the sinks, weigh nothing in any tree: what is in trees of them is held a second time
before the open block, so that a step reads both at once.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
from array_api_compat import device, is_writeable_array

from opoch_xp.backends import generic
from opoch_xp.backends.generic.tree import rows_of
from opoch_xp.cache.arrays import bytes_of, taken, write_tokens
from opoch_xp.cache.balances import Balances
from opoch_xp.cache.exact import attend_exactly, last_seen
from opoch_xp.cache.layout import Layout, alike
from opoch_xp.cache.memory import Memory
from opoch_xp.cache.trees import Trees, chunk_size
from opoch_xp.methods import Treecode
from opoch_xp.problem import Problem, Solution
from opoch_xp.treecode.forest import (
    Sinks,
    attend_local,
    attend_tier,
    key_axes,
    local_rows,
    rows_of_parts,
    tier_runs,
    tiers,
)
from opoch_xp.treecode.tree import Tree

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

    lengths and done (batch,), host integers; sequences named together have the same of both. near: keys and values
    (batch, heads, sinks + block, ...) of the sinks that are in trees and, from the row after, of the open block.
    """

    def __init__(self, layout: Layout, method: Treecode, capacity: int | None, memory: Memory, finest: bool) -> None:
        self.layout, self.method, self.capacity, self.memory, self.finest = layout, method, capacity, memory, finest
        self.lengths = np.zeros(layout.batch, np.int64)
        self.done = np.zeros(layout.batch, np.int64)
        self.tiers: list[Trees] = []
        self._kernels = layout.kernels
        if memory.offload is not None and not memory.on_host:  # the plain kernel fetches the cells that it opens
            self._kernels = SimpleNamespace(**{**vars(layout.kernels), "tree_attention": generic.tree_attention})
        self.sinks = method.sinks if capacity is None else min(method.sinks, capacity)
        shape = (layout.batch, layout.heads, self.sinks + method.block)
        self.near = tuple(memory.zeros((*shape, width), layout.stored, False) for width in (layout.dim, layout.width))
        self.balances = Balances(layout, method, memory)
        step = method.block
        while step * method.fan <= STEP:
            step *= method.fan
        self.step = STEP // step * step if step <= STEP else step
        self._row_bytes = bytes_of(*self.near) // (layout.batch * layout.heads * (self.sinks + method.block))

    @property
    def nbytes(self) -> int:
        return sum(trees.nbytes for trees in self.tiers) + bytes_of(*self.near) + self.balances.nbytes

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
        self.balances.forget(sequences, length)

    def take_in(self, sequences: np.ndarray, q: Array, first: int) -> None:
        """Queries (b, heads, repeat, m, d) of the tokens from position `first` on: what balances are made of."""
        if first < self.balances.limit:
            self.balances.take_in(sequences, q, first)

    def forget(self, lengths: np.ndarray) -> None:
        """As if no query had been seen of the tokens after the first `lengths` of each sequence."""
        for some in alike(self.layout.everyone, lengths):
            self.balances.forget(some, int(lengths[some[0]]))

    def _become(self, sequences: np.ndarray, length: int, done: int, more: tuple[Array, Array] | None = None) -> None:
        """Bring sequences to `length` tokens of which the first `done` are in trees; `more` come after those that stay.

        Nothing of what is there changes before all trees are built.
        """
        before, stay = int(self.done[sequences[0]]), length - (0 if more is None else more[0].shape[2])
        if done == before:
            if more is not None:
                self._write(sequences, self._front(done) + stay - done, more)
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
        balance = self.balances.of(sequences) if before else self.balances.told(sequences)
        built = [
            self._built(tuple(x[:, :, first - start : last - start, :] for x in rows), tier, first, balance)
            for tier, _, first, last in plan
        ]
        # sinks more than before are among the rows: they are in trees now
        front = self._front(before), self._front(done)
        parts = [(front[0], front[0] - start, front[1] - start)] if front[0] < front[1] else []
        parts.append((front[1], done - start, length - start))
        near = [(row, self._copied(rows, low, high)) for row, low, high in parts]
        del rows  # as large as the trees, of which another copy is made now
        for tier, kept, first, last in plan:
            old_low, old_high = self._held(tier, before)
            self._trees(tier).reserve(sequences, old_high - old_low, kept + (last - first) // self._size(tier))
        for tier, kept, first, last in plan:
            self._trees(tier).add(sequences, kept, built.pop(0), (last - first) // self._size(tier))
            self.memory.release()
        for row, new in near:
            self._write(sequences, row, new)
        if done and not before:
            self.balances.fix(sequences, balance)
        self.done[sequences], self.lengths[sequences] = done, length

    def _front(self, done: int) -> int:
        """The row of `near` that the open block begins at: those before are the sinks that are in trees."""
        return min(done, self.sinks)

    def _copied(self, rows: tuple[Array, ...], start: int, stop: int) -> tuple[Array, ...]:
        return tuple(self.layout.xp.asarray(x[:, :, start:stop, :], copy=True) for x in rows)

    def _write(self, sequences: np.ndarray, row: int, rows: tuple[Array, ...]) -> None:
        """Put keys and values into `near`, from a row on."""
        (keys, values), xp = self.near, self.layout.xp
        self.near = write_tokens(xp, keys, sequences, row, rows[0]), write_tokens(xp, values, sequences, row, rows[1])

    def _trees(self, tier: int) -> Trees:
        """The trees of a tier, which come to be with its first chunk."""
        while len(self.tiers) <= tier:
            number, slots = len(self.tiers), 1
            if self.capacity is not None:
                slots = max(1, min(self.method.fan - 1, self.capacity // self._size(number)))
            self.tiers.append(
                Trees(self.layout, self.memory, self.method, number, self.layout.batch, slots, self.finest)
            )
        return self.tiers[tier]

    def _built(
        self, rows: tuple[Array, ...], tier: int, first: int, balance: Array | None, order: Array | None = None
    ) -> Tree:
        """Trees of whole chunks of a tier, k and v (b, heads, chunks * size, ...) of the tokens from `first` on;
        balance (b * heads, d), or the order in which they were split."""
        xp, size, dim = self.layout.xp, self._size(tier), self.layout.dim
        k, v = (xp.reshape(x, (-1, size, x.shape[-1])) for x in rows)
        runs, tokens = rows[0].shape[0] * self.layout.heads, rows[0].shape[2]
        mask = stretch = None
        if self.method.sinks:
            outside = np.tile(np.arange(first, first + tokens) >= self.sinks, runs).reshape(-1, size)
            mask = xp.asarray(outside, device=device(k))
        if balance is not None:
            stretch = xp.repeat(xp.astype(balance, k.dtype, copy=False), tokens // size, axis=0)
        axes = key_axes(tier, size, self.method, dim)
        return self._kernels.build_tree(k, v, axes, self.method, mask=mask, order=order, stretch=stretch)

    def parts(self, sequences: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, Array, Array]]:
        """Tokens [start, stop), chunk by chunk in their order: the number of the first, k and v (b, heads, m, ...)."""
        done = int(self.done[sequences[0]])
        shift = self._front(done) - done
        for tier, first, last in spans(self.method, int(self.lengths[sequences[0]]), done):
            begin, end = max(start, first), min(stop, last)
            if begin >= end:
                continue
            if tier is None:
                k, v = (taken(self.layout.xp, x, sequences)[:, :, begin + shift : end + shift, :] for x in self.near)
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

    def told(self, sequence: int) -> dict[str, Array]:
        """What queries of a sequence told, `asked` (heads, positions, d), and where a chunk is in a tree its `balance`
        (heads, d); what there is of them."""
        known, found = int(self.balances.known[sequence]), {}
        if known:
            found["asked"] = self.balances.asked[sequence, :, :known, :]
        if self.done[sequence]:
            found["balance"] = self.balances.balance[sequence, ...]
        return found

    def restore(
        self,
        sequence: int,
        done: int,
        pieces: Iterable[tuple[int | None, Array, Array, Array | None]],
        told: dict[str, Array],
    ) -> None:
        """Fill an empty sequence with what `spans` names, tier, k and v (1, heads, m, ...) and the order of a chunk,
        and with what `told` gave."""
        one, held = np.array([sequence]), 0
        before = None
        for tier, k, v, order in pieces:
            first = int(self.lengths[sequence])
            self.lengths[sequence] += k.shape[2]
            if tier is None:
                self._write(one, self._front(done), (k, v))
                continue
            if first < self.sinks:
                self._write(one, first, tuple(x[:, :, : self.sinks - first, :] for x in (k, v)))
            held, before = (held + 1 if tier == before else 0), tier
            self._trees(tier).reserve(one, held, held + 1)
            self._trees(tier).add(one, held, self._built((k, v), tier, first, None, order), 1)
        self.done[sequence] = done
        if "asked" in told:
            self.balances.write(one, 0, told["asked"][None, ...])
        if "balance" in told:
            self.balances.fix(one, told["balance"])
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
        xp, found = self.layout.xp, [(0, *(x[: len(sequences), :, :0, :] for x in self.near))]
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
        """Queries (b, heads, repeat, n_q, d) of the last n_q tokens, or, not causal, of any, against what is held: what
        is exact, then the tiers one after another, each told what was read before."""
        method, n, (_, _, repeat, n_q, _) = self.method, int(self.lengths[sequences[0]]), q.shape
        if not causal and n // method.block * method.block != self.done[sequences[0]]:
            self._become(sequences, n, n // method.block * method.block)  # every query sees the last block as a tree
        q = self.layout.xp.reshape(q, (-1, *q.shape[2:]))
        problem, state = self._exactly(sequences, q, causal, scale)
        balance = self.balances.of(sequences) if n_q > method.group > 1 else None  # else there is nothing to group by
        read = None
        for tier in tiers(n_q, n, causal, method):
            tree, chunk = self._chunks(sequences, tier.number, tier.low, tier.high)
            for runs in tier_runs(q.shape, n, method, tier, chunk, balance, together=True):
                state, spent = attend_tier(problem, method, tree, runs, runs.groups(problem, method), state)
                read = spent if read is None else read + spent
        local, sinks = local_rows(n_q, n, causal, method), float(np.mean(self._sinks_seen(n, n_q, causal)))
        rows, bounded = rows_of_parts(q, local, sinks, read)
        if self.memory.mapped:
            each = float(rows["keys"]) + (2 * float(rows["nodes"]) if self.finest else 0)  # a summary is wider
            self.memory.read(int(each) * q.shape[0] * repeat * n_q * self._row_bytes)
        return Solution(*state, rows, bounded)

    def _exactly(
        self, sequences: np.ndarray, q: Array, causal: bool, scale: float
    ) -> tuple[Problem, tuple[Array, Array]]:
        """What is exact: queries (b * heads, repeat, n_q, d) against their own blocks, or, not causal, the open one,
        and against the sinks before those."""
        xp, kernels, (heads, _, n_q, _) = self.layout.xp, self._kernels, q.shape
        n, done, block = int(self.lengths[sequences[0]]), int(self.done[sequences[0]]), self.method.block
        first = max(0, n - n_q) // block * block if causal else done
        near_k, near_v = (xp.reshape(taken(xp, x, sequences), (heads, -1, x.shape[-1])) for x in self.near)
        if first >= done:  # the open block, which has one shape whatever it holds, after the sinks
            problem = Problem(xp, kernels, q, near_k, near_v, None, causal, scale)
            last = last_seen(n, n_q, causal) - done + self._front(done)
            return problem, attend_exactly(xp, kernels, q, near_k, near_v, last, scale)
        k, v = (xp.reshape(x, (heads, n - first, -1)) for x in self.rows(sequences, first, n))
        problem = Problem(xp, kernels, q, k, v, None, causal, scale)
        none = Sinks(k[:, :0, :], v[:, :0, :], np.zeros((heads, 0), np.int64), np.zeros((heads, 0), bool))
        state, _ = attend_local(problem, self.method, none)
        seen = self._sinks_seen(n, n_q, causal)
        if seen.max() > 0:
            sink_k, sink_v = (x[:, : self.sinks, :] for x in (near_k, near_v))
            part = attend_exactly(xp, kernels, q, sink_k, sink_v, seen - 1, scale)
            state = kernels.merge_part(*state, *part, 0)
        return problem, state

    def _sinks_seen(self, n: int, n_q: int, causal: bool) -> np.ndarray:
        """How many sinks each query reads beside its own block, or beside the open one (n_q,)."""
        position = np.arange(n - n_q, n) if causal else np.full(n_q, n)
        return np.clip(position // self.method.block * self.method.block, 0, self.sinks)

    def _chunks(self, sequences: np.ndarray, tier: int, low: int, high: int) -> tuple[Tree, np.ndarray]:
        """Trees with the chunks [low, high) of a tier, and where chunk 0 would stand for each key head of them."""
        held_low, held_high = self._held(tier, int(self.done[sequences[0]]))
        if held_low <= low and high <= held_high:
            trees = self._trees(tier)
            return trees.tree, trees.chunks(sequences) - held_low
        size, heads = self._size(tier), len(sequences) * self.layout.heads
        rows = self.rows(sequences, low * size, high * size)
        tree = self._built(rows, tier, low * size, self.balances.of(sequences))
        return tree, np.arange(heads) * (high - low) - low

    def select(self, indices: np.ndarray, layout: Layout) -> None:
        """Keep the sequences named, in that order."""
        with self.memory.lasting():
            index = layout.xp.asarray(indices, device=layout.device)
            near = tuple(layout.xp.take(x, index, axis=0) for x in self.near)
            balances = self.balances.chosen(indices, layout)
        tiers = [trees.chosen(indices, layout) for trees in self.tiers]
        self.layout, self.near, self.balances, self.tiers = layout, near, balances, tiers  # nothing raises any more
        self.lengths, self.done = self.lengths[indices], self.done[indices]
