"""Treecode attention over a forest: which queries meet the trees of which chunks, and how the parts are merged.

Chunks come in tiers of block, block * fan, block * fan**2, ... keys. A position p sees the forest before it, which
reads like p written in base `fan`: a few chunks of each tier, together covering every complete block before p, and its
own block exactly.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import device

from opoch_xp.methods import Treecode
from opoch_xp.problem import Problem, Solution
from opoch_xp.tree import rows_read, splits

Array = Any
Part = tuple[int, tuple[Array, Array]]  # first row, (out, lse)
KEYS, QUERIES = 0, 1  # streams of random directions


def directions(seed: int, tier: int, stream: int, levels: int, dim: int) -> np.ndarray:
    """Where the power iterations of each level of splits start, (levels, dim) float64; the same for every chunk."""
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
            places = np.bincount(np.arange(piece.chunk, piece.chunk + piece.chunks) % method.fan)
            for place, chunks in enumerate(places.tolist()):
                for part, rows in rows_read(tier.size, place, method).items():
                    total[part] += piece.rows * chunks * rows
    return {part: rows / max(n_q, 1) for part, rows in total.items()}


def attend_treecode(problem: Problem, method: Treecode) -> Solution:
    """Exact attention within each query's own block, merged by lse with one part per tier of the forest."""
    xp, n_q, n_k = problem.xp, problem.n_q, problem.n_k
    batch, repeat, _, _ = problem.q.shape
    here = {"device": device(problem.q), "dtype": problem.q.dtype}
    state = (
        xp.zeros((batch, repeat, n_q, problem.v.shape[-1]), **here),
        xp.full((batch, repeat, n_q), -xp.inf, **here),
    )
    for start, part in _local_parts(problem, method):
        state = problem.kernels.merge_part(*state, *part, start)
    for tier in tiers(n_q, n_k, problem.causal, method):
        for start, part in _tier_parts(problem, method, tier):
            state = problem.kernels.merge_part(*state, *part, start)
    return Solution(*state, rows_per_query(n_q, n_k, problem.causal, method))


def _local_parts(problem: Problem, method: Treecode) -> Iterator[Part]:
    """Exact parts: causal, each query against its own block; otherwise, against the keys after the last block."""
    xp, block, n_k = problem.xp, method.block, problem.n_k
    exact, q, k, v, mask = problem.kernels.exact_attention, problem.q, problem.k, problem.v, problem.mask
    batch, repeat, n_q, dim = q.shape
    if not problem.causal:
        rest = n_k // block * block
        kept = None if mask is None else mask[:, rest:]
        if rest < n_k:
            yield 0, exact(q, k[:, rest:, :], v[:, rest:, :], causal=False, scale=problem.scale, mask=kept)
        return
    shift = n_q - n_k  # row of the query at position 0
    for piece in segments(max(0, -shift), n_k, block):
        # a head ends with its block, a tail with the keys: bottom-right alignment is right for every piece
        keys = min(block, piece.stop - piece.chunk * block)
        span = slice(piece.chunk * block, piece.chunk * block + piece.chunks * keys)
        lead, rows = batch * piece.chunks, piece.rows
        queries = xp.reshape(
            q[:, :, piece.start + shift : piece.stop + shift, :], (batch, repeat, piece.chunks, rows, dim)
        )
        out, lse = exact(
            xp.reshape(xp.permute_dims(queries, (0, 2, 1, 3, 4)), (lead, repeat, rows, dim)),
            xp.reshape(k[:, span, :], (lead, keys, dim)),
            xp.reshape(v[:, span, :], (lead, keys, v.shape[-1])),
            causal=True,
            scale=problem.scale,
            mask=None if mask is None else xp.reshape(mask[:, span], (lead, keys)),
        )
        out = xp.permute_dims(xp.reshape(out, (batch, piece.chunks, repeat, rows, v.shape[-1])), (0, 2, 1, 3, 4))
        lse = xp.permute_dims(xp.reshape(lse, (batch, piece.chunks, repeat, rows)), (0, 2, 1, 3))
        yield piece.start + shift, _joined(xp, out, lse)


def _joined(xp: Any, out: Array, lse: Array) -> tuple[Array, Array]:
    """(batch, repeat, chunks, rows, e) and (batch, repeat, chunks, rows) with chunks and rows in one axis."""
    batch, repeat, chunks, rows, width = out.shape
    return xp.reshape(out, (batch, repeat, chunks * rows, width)), xp.reshape(lse, (batch, repeat, chunks * rows))


def _tier_parts(problem: Problem, method: Treecode, tier: Tier) -> Iterator[Part]:
    """Parts of one tier: the queries of each piece against the trees of the chunks they may see."""
    xp, size, fan = problem.xp, tier.size, method.fan
    batch, repeat, n_q, dim = problem.q.shape
    shift, built, keys = n_q - problem.n_k, tier.high - tier.low, slice(tier.low * size, tier.high * size)
    tree = problem.kernels.build_tree(
        xp.reshape(problem.k[:, keys, :], (batch * built, size, dim)),
        xp.reshape(problem.v[:, keys, :], (batch * built, size, problem.v.shape[-1])),
        directions(method.seed, tier.number, KEYS, splits(size, method.leaf), dim),
        method,
        mask=None if problem.mask is None else xp.reshape(problem.mask[:, keys], (batch * built, size)),
    )
    offset = np.arange(batch).repeat(repeat)[:, None] * built - tier.low  # of each query head's first chunk
    for piece in tier.pieces:
        place = np.arange(piece.chunk, piece.chunk + piece.chunks)
        queries = problem.q[:, :, piece.start + shift : piece.stop + shift, :]
        out, lse = problem.kernels.tree_attention(
            xp.reshape(queries, (batch * repeat * piece.chunks, piece.rows, dim)),
            tree,
            (offset + place // fan * fan).reshape(-1),
            np.tile(place % fan, batch * repeat),
            directions(method.seed, tier.number, QUERIES, splits(piece.rows, method.group), dim),
            method,
            scale=problem.scale,
        )
        lead = (batch, repeat, piece.chunks, piece.rows)
        yield piece.start + shift, _joined(xp, xp.reshape(out, (*lead, out.shape[-1])), xp.reshape(lse, lead))
