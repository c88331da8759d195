"""The trees of one tier of a growing forest."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np

from opoch_xp.cache.arrays import bytes_of, put, taken
from opoch_xp.cache.layout import Layout
from opoch_xp.cache.memory import Memory
from opoch_xp.methods import Treecode
from opoch_xp.treecode.plan import level_plan
from opoch_xp.treecode.tree import Tree

Array = Any


def chunk_size(method: Treecode, tier: int) -> int:
    """Keys of a chunk of a tier, by the tier's number."""
    return method.block * method.fan**tier


class Trees:
    """The chunks of one tier that a forest holds: for each sequence those whose parent is not complete.

    number and size: the tier's, and the keys of its chunks. The arrays of `tree` are (rows * heads * slots, ...): a row
    holds the chunks of a sequence, one after another for each head. Sequences share a row until one of them grows:
    row (batch,) says which row is whose. Where the method has sinks, which weigh nothing, all chunks have counts and a
    mask of keys, so that trees are of one kind whatever they hold.
    """

    def __init__(
        self, layout: Layout, memory: Memory, method: Treecode, number: int, rows: int, slots: int, finest: bool
    ) -> None:
        self.layout, self.memory, self.method = layout, memory, method
        self.number, self.size = number, chunk_size(method, number)
        self.finest = finest  # whether the summaries of cells are offloaded too
        self.rows, self.slots = rows, slots
        self.row = np.arange(rows)
        self.tree = self._empty(rows, slots)

    def _empty(self, rows: int, slots: int) -> Tree:
        layout, plan = self.layout, level_plan(self.size, self.method)
        chunks, width = rows * layout.heads * slots, layout.dim + layout.width
        zeros, counts, kept = self.memory.zeros, None, None
        if self.method.sinks:
            counts = tuple(zeros((chunks, nodes), layout.summed, False) for nodes in plan.nodes)
            kept = zeros((chunks, self.size), layout.xp.bool, False)
        return Tree(
            zeros((chunks, self.size, width), layout.stored, True),
            zeros((chunks, self.size), layout.xp.int32, True),
            tuple(
                zeros((chunks, nodes, width + layout.dim), layout.summed, self.finest and not level)
                for level, nodes in enumerate(plan.nodes)
            ),
            plan.sizes,
            counts,
            kept,
            layout.dim,
        )

    @property
    def nbytes(self) -> int:
        tree = self.tree
        hidden = () if tree.counts is None else (*tree.counts, tree.kept)
        return bytes_of(tree.cells, tree.order, *tree.summaries, *hidden)

    def chunks(self, sequences: np.ndarray) -> np.ndarray:
        """Where the first chunk of each sequence and head stands, (len(sequences) * heads,)."""
        heads = np.arange(self.layout.heads)
        return ((self.row[sequences, None] * self.layout.heads + heads) * self.slots).reshape(-1)

    def reserve(self, sequences: np.ndarray, held: int, wanted: int) -> None:
        """Room for `wanted` chunks of each head, in a row of its own for each of the sequences, which hold `held`.

        All that `add` may need memory for; nothing that is held changes.
        """
        if wanted > self.slots:
            self._resize(self.rows, min(self.method.fan - 1, max(wanted, 2 * self.slots)))
        for one in sequences.tolist():
            if np.count_nonzero(self.row == self.row[one]) > 1:
                self._part(one, held)

    def add(self, sequences: np.ndarray, kept: int, built: Tree, count: int) -> None:
        """The first `kept` chunks of the sequences stay, and `count` new ones of each head of each come after them."""
        self._put(self.chunks(sequences) + kept, built, count)

    def _put(self, starts: np.ndarray, source: Tree, count: int) -> None:
        self.tree = self._placed(self.tree, starts, source, count)

    def _placed(self, tree: Tree, starts: np.ndarray, source: Tree, count: int) -> Tree:
        """The tree with chunks of another, `count` from each of `starts` on."""

        def placed(x: Array, new: Array) -> Array:
            return put(self.layout.xp, x, starts, new, count)

        return _each(placed, tree, source)

    def of(self, chunks: np.ndarray) -> Tree:
        """Some of the chunks, by their number, in the arrays' library."""
        return _each(lambda x: taken(self.layout.xp, x, chunks), self.tree)

    def _part(self, sequence: int, kept: int) -> None:
        """Give a sequence a row of its own, with its first `kept` chunks. Nothing changes where it raises."""
        free = np.setdiff1d(np.arange(self.rows), self.row)
        if not len(free):
            self._resize(2 * self.rows, self.slots)
            free = np.setdiff1d(np.arange(self.rows), self.row)
        one = np.array([sequence])
        before = self.chunks(one)
        whole = self.of((before[:, None] + np.arange(kept)).reshape(-1)) if kept else None
        self.row[sequence] = free[0]
        if whole is not None:
            self._put(self.chunks(one), whole, kept)

    def _resize(self, rows: int, slots: int) -> None:
        runs = self.rows * self.layout.heads
        tree = self._placed(self._empty(rows, slots), np.arange(runs) * slots, self.tree, self.slots)
        self.tree, self.rows, self.slots = tree, rows, slots

    def chosen(self, indices: np.ndarray, layout: Layout) -> "Trees":
        """Those of the sequences named, in that order; rows that fewer than half of them need are given up.

        What stays shares its arrays with these, which are given up.
        """
        new = copy(self)
        new.layout, new.row = layout, self.row[indices]
        used, row = np.unique(new.row, return_inverse=True)
        if 2 * len(used) <= self.rows:
            each = self.layout.heads * self.slots
            old = self.of((used[:, None] * each + np.arange(each)).reshape(-1))
            new.rows, new.row = len(used), row.reshape(-1)
            new.tree = new._placed(new._empty(new.rows, self.slots), np.arange(new.rows) * each, old, each)
        return new


def _each(function: Callable[..., Array], tree: Tree, *others: Tree) -> Tree:
    """The tree of function(an array of `tree`, the same of each of the others)."""

    def of(*arrays: Any) -> Any:
        if isinstance(arrays[0], tuple):
            return tuple(map(function, *arrays))
        return None if arrays[0] is None else function(*arrays)

    names = ("cells", "order", "summaries", "counts", "kept")
    return replace(tree, **{name: of(*(getattr(one, name) for one in (tree, *others))) for name in names})
