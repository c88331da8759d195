"""Treecode attention over a forest: which queries meet the trees of which chunks, and how the parts are merged.

Chunks come in tiers of block, block * fan, block * fan**2, ... keys. A position p sees the forest before it, which
reads like p written in base `fan`: a few chunks of each tier, together covering every complete block before p, and its
own block exactly.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from opoch_xp.methods import Treecode
from opoch_xp.problem import Problem, Solution, nothing_seen
from opoch_xp.treecode.balance import balance_of
from opoch_xp.treecode.plan import splits
from opoch_xp.treecode.tree import Tree

Array = Any
State = tuple[Array, Array]  # out and lse of what was read so far
KEYS, QUERIES = 0, 1  # streams of random directions


def directions(seed: int, tier: int, stream: int, levels: int, dim: int) -> np.ndarray:
    """Where the power iterations of each level of splits start, (levels, dim) float64; the same for every chunk."""
    if not levels:  # a step of decoding has none: a generator takes longer to make than a part to merge
        return np.zeros((0, dim))
    return np.random.default_rng((seed, tier, stream)).standard_normal((levels, dim))


@dataclass(frozen=True)
class Piece:
    """Queries [start, stop) by position, in equal parts: those of `chunks` chunks from number `chunk` on."""

    start: int
    stop: int
    chunk: int
    chunks: int

    @property
    def rows(self) -> int:
        return (self.stop - self.start) // self.chunks


@dataclass(frozen=True)
class Tier:
    """One tier of the forest: chunks of `size` keys, of which [low, high) are read, by the queries of `pieces`."""

    number: int
    size: int
    low: int
    high: int
    pieces: tuple[Piece, ...]


def segments(start: int, stop: int, size: int) -> list[Piece]:
    """Positions [start, stop) cut at multiples of `size`: at most a head, a run of whole chunks and a tail."""
    head = min(stop, -(-start // size) * size)
    full = max(head, stop // size * size)
    cuts = ((start, head, 1), (head, full, (full - head) // size), (full, stop, 1))
    return [Piece(a, b, a // size, chunks) for a, b, chunks in cuts if a < b]


def tiers(n_q: int, n_k: int, causal: bool, method: Treecode) -> list[Tier]:
    """The tiers n_q queries read: causal, earlier siblings of each query's chunk; otherwise the forest before n_k."""
    found, size, number = [], method.block, 0
    while size <= n_k and n_q:
        pieces = segments(max(0, n_k - n_q), n_k, size) if causal else [Piece(n_k - n_q, n_k, n_k // size, 1)]
        pieces = [piece for piece in pieces if any((piece.chunk + i) % method.fan for i in range(piece.chunks))]
        if pieces:
            last = pieces[-1].chunk + pieces[-1].chunks - 1  # the last chunk is read by no query
            found.append(Tier(number, size, pieces[0].chunk // method.fan * method.fan, last, tuple(pieces)))
        size, number = size * method.fan, number + 1
    return found


def local_rows(n_q: int, n_k: int, causal: bool, method: Treecode) -> float:
    """Keys of its own block that a query reads, or not causal of those after the last block; mean over the queries."""
    if not causal:
        return float(n_k % method.block)
    total = 0.0
    for piece in segments(max(0, n_k - n_q), n_k, method.block):
        keys = min(method.block, piece.stop - piece.start // method.block * method.block)
        total += (piece.stop - piece.start) * (keys - (piece.rows - 1) / 2)
    return total / max(n_q, 1)


Watch = Callable[["Tier", Tree, "Runs", Array, State], None]


def attend_treecode(problem: Problem, method: Treecode, watch: Watch | None = None) -> Solution:
    """Exact attention within each query's own block and to the sinks, then the trees of one tier after another, nearest
    first; parts are merged by lse as they come, and each is told what was read before.

    `watch` is called before each part with what goes into it: the tier, its trees, the queries, their groups, and the
    state so far, which a backend may overwrite afterwards.
    """
    n_q, n_k = problem.n_q, problem.n_k
    stretch = balance_of(problem.q, n_k, problem.causal, method)
    sinks = Sinks.of(problem, method)
    state, seen = attend_local(problem, method, sinks)
    mask, read = sinks.outside(problem), None
    for tier in tiers(n_q, n_k, problem.causal, method):
        tree = build_tier(problem, method, tier, mask, stretch)
        first = first_chunks(problem.q.shape[0], tier)
        for runs in tier_runs(problem.q.shape, n_k, method, tier, first, stretch):
            groups = runs.groups(problem, method)
            if watch is not None:
                watch(tier, tree, runs, groups, state)
            state, spent = attend_tier(problem, method, tree, runs, groups, state)
            read = spent if read is None else read + spent
    local = local_rows(n_q, n_k, problem.causal, method)
    return Solution(*state, *rows_of_parts(problem.q, local, seen, read))


def rows_of_parts(q: Array, local: float, sinks: Any, read: Array | None) -> tuple[dict[str, Any], Any]:
    """Rows that one of the queries (batch, repeat, n_q, d) reads by part, mean, and the share of them whose group met a
    bound; read (3,): of all of them, as in `Part`, None where there was no tree."""
    queries = max(1, q.shape[0] * q.shape[1] * q.shape[2])
    nodes, keys, bounded = (0.0, 0.0, 0.0) if read is None else (read[i] / queries for i in range(3))
    return {"local": local, "sinks": sinks, "nodes": nodes, "keys": keys}, bounded


@dataclass(frozen=True)
class Sinks:
    """The first kept keys of each sequence: k (batch, s, d), v (batch, s, d_v), position and there (batch, s), which
    are keys that are kept; position and there are the host's where no key is masked."""

    k: Array
    v: Array
    position: Array
    there: Array

    @classmethod
    def of(cls, problem: Problem, method: Treecode) -> "Sinks":
        xp, batch, count = problem.xp, problem.k.shape[0], min(method.sinks, problem.n_k)
        if problem.mask is None:
            position = np.broadcast_to(np.arange(count), (batch, count))
            return cls(problem.k[:, :count, :], problem.v[:, :count, :], position, np.ones((batch, count), bool))
        position = xp.argsort(xp.astype(~problem.mask, xp.int8), axis=1, stable=True)[:, :count]
        k, v = (
            xp.take_along_axis(x, xp.broadcast_to(position[..., None], (batch, count, x.shape[2])), axis=1)
            for x in (problem.k, problem.v)
        )
        return cls(k, v, position, xp.take_along_axis(problem.mask, position, axis=1))

    def outside(self, problem: Problem) -> Array | None:
        """Which keys (batch, n_k) trees hold: those that are kept, without the sinks; None: all."""
        xp, batch, n_k, count = problem.xp, problem.k.shape[0], problem.n_k, self.position.shape[1]
        if not count:
            return problem.mask
        number = xp.arange(n_k, device=device(problem.k))
        if problem.mask is None:
            return xp.broadcast_to(number >= count, (batch, n_k))
        return problem.mask & (xp.cumulative_sum(xp.astype(problem.mask, xp.int64), axis=1) > count)

    def before(self, xp: Any, start: np.ndarray) -> tuple[Array, Array, Array]:
        """k and v for the queries of runs of blocks, (batch * runs, s, ...), and which of them (batch * runs, s) are
        there and stand before start (runs,), the first position of each block."""
        batch, count = self.position.shape
        runs, here = len(start), device(self.k)
        if not isinstance(self.there, np.ndarray):
            start = xp.asarray(start, device=here)
        there = self.there[:, None, :] & (self.position[:, None, :] < start[:, None])
        k, v = (
            xp.reshape(xp.broadcast_to(x[:, None, :, :], (batch, runs, *x.shape[1:])), (batch * runs, *x.shape[1:]))
            for x in (self.k, self.v)
        )
        return k, v, xp.reshape(xp.asarray(there, device=here), (batch * runs, count))


def attend_local(problem: Problem, method: Treecode, sinks: Sinks) -> tuple[State, Any]:
    """out and lse of what is exact: each query's own block, or not causal the keys after the last block, and the sinks
    that stand before those; and how many sinks a query reads, mean."""
    lead, xp, found = problem.q.shape[:3], problem.xp, 0.0
    state = nothing_seen(xp, lead, problem.v.shape[-1], problem.dtype, device(problem.q))
    for blocks in exact_blocks(problem, method):
        if blocks.keys.start < blocks.keys.stop:
            state = _merged(problem, blocks, state, blocks.near(problem))
        start = blocks.keys.start + np.arange(blocks.chunks) * method.block
        if sinks.k.shape[1] and start[-1] > 0:
            k, v, there = sinks.before(xp, start)
            part = problem.kernels.exact_attention(
                blocks.of_queries(xp, problem.q), k, v, causal=False, scale=problem.scale, mask=there
            )
            state = _merged(problem, blocks, state, part)
            rows = (blocks.rows.stop - blocks.rows.start) / blocks.chunks
            found = found + xp.sum(xp.astype(there, problem.dtype)) * (rows / (lead[0] * problem.n_q))
    return state, found


def exact_blocks(problem: Problem, method: Treecode) -> Iterator["Blocks"]:
    """Runs of queries that read the same keys exactly: causal by block, otherwise all those after the last block."""
    if problem.causal:
        return local_blocks(problem.n_q, problem.n_k, method)
    rest = slice(problem.n_k // method.block * method.block, problem.n_k)
    return iter([Blocks(slice(0, problem.n_q), rest, 1)])


def _merged(problem: Problem, blocks: "Blocks", state: State, part: State) -> State:
    """The state with a part of the queries of some blocks, laid out as `Blocks.of_queries` has them."""
    out, lse = (blocks.joined(problem.xp, x, problem.q.shape[0]) for x in part)
    return problem.kernels.merge_part(*state, out, lse, blocks.rows.start)


@dataclass(frozen=True)
class Blocks:
    """`chunks` equal runs of queries, rows `rows`, each against the keys of its own block, `keys`."""

    rows: slice
    keys: slice
    chunks: int

    def of_queries(self, xp: Any, x: Array) -> Array:
        """The rows of x (batch, repeat, n_q, ...) as (batch * chunks, repeat, rows, ...)."""
        x = x[:, :, self.rows, ...]
        batch, repeat, _, *rest = x.shape
        x = xp.reshape(x, (batch, repeat, self.chunks, -1, *rest))
        x = xp.permute_dims(x, (0, 2, 1, *range(3, x.ndim)))
        return xp.reshape(x, (batch * self.chunks, *x.shape[2:]))

    def of_keys(self, xp: Any, x: Array) -> Array:
        """The keys of x (batch, n_k, ...) as (batch * chunks, keys, ...)."""
        return xp.reshape(x[:, self.keys, ...], (x.shape[0] * self.chunks, -1, *x.shape[2:]))

    def near(self, problem: Problem) -> State:
        """out and lse of these queries over these keys, laid out as `of_queries` has them."""
        xp = problem.xp
        return problem.kernels.exact_attention(
            self.of_queries(xp, problem.q), self.of_keys(xp, problem.k), self.of_keys(xp, problem.v),
            causal=problem.causal, scale=problem.scale,
            mask=None if problem.mask is None else self.of_keys(xp, problem.mask),
        )  # fmt: skip

    def joined(self, xp: Any, x: Array, batch: int) -> Array:
        """of_queries undone: (batch * chunks, repeat, rows, ...) as (batch, repeat, chunks * rows, ...)."""
        _, repeat, rows, *rest = x.shape
        x = xp.reshape(x, (batch, self.chunks, repeat, rows, *rest))
        x = xp.permute_dims(x, (0, 2, 1, *range(3, x.ndim)))
        return xp.reshape(x, (batch, repeat, self.chunks * rows, *rest))


def local_blocks(n_q: int, n_k: int, method: Treecode) -> Iterator[Blocks]:
    """Causal: the queries by block. A head ends with its block and a tail with the keys, so that the last query of
    every run sees the last key of its own."""
    shift = n_q - n_k  # row of the query at position 0
    for piece in segments(max(0, -shift), n_k, method.block):
        start = piece.chunk * method.block
        keys = min(method.block, piece.stop - start)
        rows = slice(piece.start + shift, piece.stop + shift)
        yield Blocks(rows, slice(start, start + piece.chunks * keys), piece.chunks)


def build_tier(problem: Problem, method: Treecode, tier: Tier, mask: Array | None, stretch: Array | None) -> Tree:
    """The trees of a tier's chunks, of the keys that `mask` (batch, n_k) keeps."""
    k, v, kept = tier_keys(problem, tier, mask)
    if stretch is not None:
        stretch = problem.xp.repeat(stretch, tier.high - tier.low, axis=0)
    axes = key_axes(tier.number, tier.size, method, k.shape[-1])
    return problem.kernels.build_tree(k, v, axes, method, mask=kept, stretch=stretch)


def attend_tier(
    problem: Problem, method: Treecode, tree: Tree, runs: "Runs", groups: Array, state: State
) -> tuple[State, Array]:
    """The state with the part of some queries against the chunks of `tree` that they may see; what was read (3,)."""
    xp, (batch, repeat) = problem.xp, problem.q.shape[:2]
    part = problem.kernels.tree_attention(
        runs.of_queries(xp, problem.q), tree, runs.first, runs.count, groups, method, scale=problem.scale,
        seen=runs.of_queries(xp, state[1]),
    )  # fmt: skip
    shape = (batch, repeat, runs.rows.stop - runs.rows.start)
    out, lse = xp.reshape(part.out, (*shape, part.out.shape[-1])), xp.reshape(part.lse, shape)
    return problem.kernels.merge_part(*state, out, lse, runs.rows.start), xp.sum(part.read, axis=0)


def tier_keys(problem: Problem, tier: Tier, mask: Array | None) -> tuple[Array, Array, Array | None]:
    """Keys, values and mask (batch, n_k) of a tier's chunks: (batch * chunks, size, ...)."""
    keys, shape = slice(tier.low * tier.size, tier.high * tier.size), (-1, tier.size)
    k, v = problem.k[:, keys, :], problem.v[:, keys, :]
    k, v = (problem.xp.reshape(x, (*shape, x.shape[-1])) for x in (k, v))
    return k, v, None if mask is None else problem.xp.reshape(mask[:, keys], shape)


def key_axes(tier: int, size: int, method: Treecode, dim: int) -> np.ndarray:
    """Where the power iterations start that split the keys of a tier, by its number and the keys of its chunks."""
    return directions(method.seed, tier, KEYS, splits(size, method.leaf), dim)


def first_chunks(batch: int, tier: Tier) -> np.ndarray:
    """Where chunk 0 of the tier would stand for each key head, in a tree of the chunks [low, high) of all heads."""
    return np.arange(batch) * (tier.high - tier.low) - tier.low


@dataclass(frozen=True)
class Runs:
    """`tasks` equal runs of queries, rows `rows` of each head, head by head; task t reads the chunks of its tier's tree
    from first[t] on, count[t] of them. axes: where the power iterations start that group the queries."""

    rows: slice
    tasks: int
    first: np.ndarray
    count: np.ndarray
    axes: np.ndarray
    stretch: Array | None

    def of_queries(self, xp: Any, x: Array) -> Array:
        """The rows of x (batch, repeat, n_q, ...) as (tasks, rows of each, ...)."""
        return xp.reshape(x[:, :, self.rows, ...], (self.tasks, -1, *x.shape[3:]))

    def groups(self, problem: Problem, method: Treecode) -> Array:
        """The rows of each task in groups that are close in space: see query_groups of opoch_xp.backends.generic."""
        queries = self.of_queries(problem.xp, problem.q)
        return problem.kernels.query_groups(queries, self.axes, method, stretch=self.stretch)


def tier_runs(
    queries: tuple[int, ...], n_k: int, method: Treecode, tier: Tier, chunk: np.ndarray, balance: Array | None,
    together: bool = False,
) -> Iterator[Runs]:  # fmt: skip
    """The queries (batch, repeat, n_q, d) of each piece of a tier, and the chunks they may see.

    chunk (batch,): where chunk 0 of the tier would stand for each key head in the tree that is read. balance
    (batch, d): what queries are divided by before they are grouped; None for ones. together: the query heads of a key
    head are one task where all their queries make one group.
    """
    batch, repeat, n_q, dim = queries
    shift = n_q - n_k
    for piece in tier.pieces:
        one = together and piece.chunks == 1 and repeat * piece.rows <= method.group
        heads, size = (1, repeat * piece.rows) if one else (repeat, piece.rows)
        place = np.arange(piece.chunk, piece.chunk + piece.chunks)
        first = (chunk.repeat(heads)[:, None] + place // method.fan * method.fan).reshape(-1)
        axes = directions(method.seed, tier.number, QUERIES, splits(size, method.group), dim)
        rows = slice(piece.start + shift, piece.stop + shift)
        stretch = None
        if balance is not None and size > method.group:
            stretch = array_namespace(balance).repeat(1 / balance, heads * piece.chunks, axis=0)
        yield Runs(rows, len(first), first, np.tile(place % method.fan, batch * heads), axes, stretch)
