"""Predicted cost of a method from shapes alone, in dot products of streaming exact attention."""

from dataclasses import dataclass

from opoch_xp.forest import rows_per_query, tiers
from opoch_xp.methods import Exact, Treecode
from opoch_xp.tree import splits


@dataclass(frozen=True)
class Cost:
    """What a backend's treecode pays, in dot products of its own streaming exact attention; measured at d = 64.

    A query's exact part costs one each. read: a row that a group reads, near or far; own: a row of a query's own cells;
    split: a row of keys or queries taken through one level of median splits.
    """

    read: float
    own: float
    split: float


COMPILED = Cost(read=1.6, own=16.0, split=100.0)  # of the kernels of opoch_xp.backends.compiled


def visible_pairs(n_q: int, n_k: int, causal: bool) -> int:
    """Pairs of a query and a key it may see, one head."""
    if not causal:
        return n_q * n_k
    rows = min(n_q, n_k)
    return rows * n_k - rows * (rows - 1) // 2


def predicted(n_q: int, n_k: int, causal: bool, method: Exact | Treecode, cost: Cost) -> float:
    """Dot products of exact attention, one head, that the method is expected to cost as much as."""
    if isinstance(method, Exact):
        return float(visible_pairs(n_q, n_k, causal))
    rows = rows_per_query(n_q, n_k, causal, method)
    total = n_q * (rows["local"] + cost.read * (rows["far"] + rows["near"]) + cost.own * rows["own"])
    for tier in tiers(n_q, n_k, causal, method):
        total += cost.split * (tier.high - tier.low) * tier.size * splits(tier.size, method.leaf)
        for piece in tier.pieces:
            total += cost.split * (piece.stop - piece.start) * splits(piece.rows, method.group)
    return total
