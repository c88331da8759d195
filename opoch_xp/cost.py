"""Predicted cost of a method from shapes alone, in dot products of streaming exact attention."""

from dataclasses import dataclass

from opoch_xp.methods import Exact, Treecode
from opoch_xp.treecode.forest import local_rows, tiers
from opoch_xp.treecode.plan import splits

# Rows, nodes and keys together, that a query of a pretrained model reads of n keys outside its block, with the
# defaults: FACTOR * n ** POWER. Heads of SmolLM2 read 570 of 3,600 and 1,750 of 15,900, second halves of texts; with
# COMPILED it meets the crossover that was measured on them: see docs/choosing.md.
FACTOR, POWER = 1.2, 0.75


@dataclass(frozen=True)
class Cost:
    """What a backend's treecode pays, in dot products of its own streaming exact attention; measured at d = 64.

    A query's exact part costs one each. read: a row outside its block, node or key; split: a row of keys or queries
    taken through one level of median splits.
    """

    read: float
    split: float


COMPILED = Cost(read=2.5, split=50.0)  # of the kernels of opoch_xp.backends.compiled


def visible_pairs(n_q: int, n_k: int, causal: bool) -> int:
    """Pairs of a query and a key it may see, one head."""
    if not causal:
        return n_q * n_k
    rows = min(n_q, n_k)
    return rows * n_k - rows * (rows - 1) // 2


def expected_rows(n_q: int, n_k: int, causal: bool, method: Treecode) -> float:
    """Rows that a query is expected to read outside its block, of heads as pretrained models have them."""
    outside = visible_pairs(n_q, n_k, causal) / max(n_q, 1) - local_rows(n_q, n_k, causal, method)
    return min(max(outside, 0.0), FACTOR * max(outside, 0.0) ** POWER)


def predicted(n_q: int, n_k: int, causal: bool, method: Exact | Treecode, cost: Cost) -> float:
    """Dot products of exact attention, one head, that the method is expected to cost as much as."""
    if isinstance(method, Exact):
        return float(visible_pairs(n_q, n_k, causal))
    shape = n_q, n_k, causal, method
    total = n_q * (local_rows(*shape) + cost.read * expected_rows(*shape))
    for tier in tiers(*shape):
        total += cost.split * (tier.high - tier.low) * tier.size * splits(tier.size, method.leaf)
        for piece in tier.pieces:
            total += cost.split * (piece.stop - piece.start) * splits(piece.rows, method.group)
    return total
