"""Treecode attention over a forest: which queries meet the trees of which chunks, and how the parts are merged.

Chunks come in tiers of block, block * fan, block * fan**2, ... keys. A position p sees the forest before it, which
reads like p written in base `fan`: a few chunks of each tier, together covering every complete block before p, and its
own block exactly.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import device

from opoch_xp.methods import Treecode
from opoch_xp.problem import Problem, Solution, nothing_seen
from opoch_xp.tree import Tree, rows_read, splits

Array = Any
Part = tuple[int, tuple[Array, Array]]  # first row, (out, lse)
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


def _places(piece: Piece, fan: int) -> Iterable[tuple[int, int]]:
    """How many chunks of a piece stand at each place within their parents."""
    if piece.chunks == 1:
        return ((piece.chunk % fan, 1),)
    return enumerate(np.bincount(np.arange(piece.chunk, piece.chunk + piece.chunks) % fan).tolist())


def rows_per_query(n_q: int, n_k: int, causal: bool, method: Treecode) -> dict[str, float]:
    """Rows a query reads, by part, mean over the queries: what the treecode spends, known from the shapes."""
    total = dict.fromkeys(("local", "far", "near", "own"), 0.0)
    for piece in segments(max(0, n_k - n_q), n_k, method.block) if causal else ():
        keys = min(method.block, piece.stop - piece.start // method.block * method.block)
        total["local"] += (piece.stop - piece.start) * (keys - (piece.rows - 1) / 2)
    if not causal:
        total["local"] = n_q * (n_k % method.block)
    for tier in tiers(n_q, n_k, causal, method):
        for piece in tier.pieces:
            for place, chunks in _places(piece, method.fan):
                for part, rows in rows_read(tier.size, place, method).items():
                    total[part] += piece.rows * chunks * rows
    return {part: rows / max(n_q, 1) for part, rows in total.items()}


def attend_treecode(problem: Problem, method: Treecode) -> Solution:
    """Exact attention within each query's own block, merged by lse with one part per tier of the forest."""
    n_q, n_k, state = problem.n_q, problem.n_k, attend_local(problem, method)
    for tier in tiers(n_q, n_k, problem.causal, method):
        for start, part in _tier_parts(problem, method, tier):
            state = problem.kernels.merge_part(*state, *part, start)
    return Solution(*state, rows_per_query(n_q, n_k, problem.causal, method))


def attend_local(problem: Problem, method: Treecode) -> tuple[Array, Array]:
    """out and lse of what is exact: causal, each query against its own block; else, the keys after the last block."""
    lead, width = problem.q.shape[:3], problem.v.shape[-1]
    state = nothing_seen(problem.xp, lead, width, problem.dtype, device(problem.q))
    for start, part in _local_parts(problem, method):
        state = problem.kernels.merge_part(*state, *part, start)
    return state


def _local_parts(problem: Problem, method: Treecode) -> Iterator[Part]:
    """Exact parts: causal, each query against its own block; otherwise, against the keys after the last block."""
    exact, mask, batch = problem.kernels.exact_attention, problem.mask, problem.q.shape[0]
    if not problem.causal:
        rest = slice(problem.n_k // method.block * method.block, problem.n_k)
        kept = None if mask is None else mask[:, rest]
        if rest.start < rest.stop:
            k, v = problem.k[:, rest, :], problem.v[:, rest, :]
            yield 0, exact(problem.q, k, v, causal=False, scale=problem.scale, mask=kept)
        return
    for blocks in local_blocks(problem.n_q, problem.n_k, method):
        out, lse = exact(
            blocks.of_queries(problem.xp, problem.q),
            blocks.of_keys(problem.xp, problem.k),
            blocks.of_keys(problem.xp, problem.v),
            causal=True,
            scale=problem.scale,
            mask=None if mask is None else blocks.of_keys(problem.xp, mask),
        )
        yield blocks.rows.start, (blocks.joined(problem.xp, out, batch), blocks.joined(problem.xp, lse, batch))


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


def _tier_parts(problem: Problem, method: Treecode, tier: Tier) -> Iterator[Part]:
    """Parts of one tier: the queries of each piece against the trees of the chunks they may see."""
    k, v, mask = tier_keys(problem, tier)
    tree = problem.kernels.build_tree(k, v, key_axes(tier.number, tier.size, method, k.shape[-1]), method, mask=mask)
    for runs in tier_runs(problem.q.shape, problem.n_k, method, tier, first_chunks(problem.q.shape[0], tier)):
        yield attend_tier(problem, method, tree, runs)


def attend_tier(problem: Problem, method: Treecode, tree: Tree, runs: "Runs") -> Part:
    """The part of some queries against the chunks of `tree` that they may see."""
    xp, (batch, repeat) = problem.xp, problem.q.shape[:2]
    out, lse = problem.kernels.tree_attention(
        runs.of_queries(xp, problem.q), tree, runs.first, runs.count, runs.axes, method, scale=problem.scale
    )
    shape = (batch, repeat, runs.rows.stop - runs.rows.start)
    return runs.rows.start, (xp.reshape(out, (*shape, out.shape[-1])), xp.reshape(lse, shape))


def tier_keys(problem: Problem, tier: Tier) -> tuple[Array, Array, Array | None]:
    """Keys, values and mask of a tier's chunks: (batch * chunks, size, ...)."""
    keys, shape = slice(tier.low * tier.size, tier.high * tier.size), (-1, tier.size)
    k, v, mask = problem.k[:, keys, :], problem.v[:, keys, :], problem.mask
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

    def of_queries(self, xp: Any, x: Array) -> Array:
        """The rows of x (batch, repeat, n_q, ...) as (tasks, rows of each, ...)."""
        return xp.reshape(x[:, :, self.rows, ...], (self.tasks, -1, *x.shape[3:]))


def tier_runs(
    queries: tuple[int, ...], n_k: int, method: Treecode, tier: Tier, chunk: np.ndarray, together: bool = False
) -> Iterator[Runs]:
    """The queries (batch, repeat, n_q, d) of each piece of a tier, and the chunks they may see.

    chunk (batch,): where chunk 0 of the tier would stand for each key head in the tree that is read. together: the
    query heads of a key head are one task where all their queries make one group.
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
        yield Runs(rows, len(first), first, np.tile(place % method.fan, batch * heads), axes)
