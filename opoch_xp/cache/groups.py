"""Sequences that are alike are taken together: entries of arrays chosen for a group, and outputs joined again."""

from typing import Any

import numpy as np
from array_api_compat import device

from opoch_xp.cache.layout import Columns, Layout
from opoch_xp.problem import Solution, nothing_seen

Array = Any


def entries(layout: Layout, x: Array, held: np.ndarray, wanted: np.ndarray) -> Array:
    """The entries of x, those of the sequences `held`, that belong to `wanted`, which are among them."""
    if len(held) == len(wanted):
        return x
    return layout.xp.take(x, layout.xp.asarray(np.searchsorted(held, wanted), device=device(x)), axis=0)


def of_columns(layout: Layout, x: Array, columns: Columns, axis: int) -> Array:
    """The columns of x along an axis that are kept."""
    return x if columns is None else layout.xp.take(x, layout.xp.asarray(columns, device=device(x)), axis=axis)


def joined(
    layout: Layout, solutions: list[Solution], tokens: int, columns: Columns, sequences: int, repeat: int
) -> Solution:
    """The outputs of one chunk after another as one of `tokens` columns, zeros where a column was not kept."""
    xp, heads = layout.xp, sequences * layout.heads
    read, bounded = figures([(one, one.out.shape[2] / tokens) for one in solutions])
    row = nothing_seen(xp, (heads, repeat, 1), layout.width, layout.summed, layout.device)
    nothing = {"out": row[0], "lse": row[1]}
    parts = {name: [getattr(one, name) for one in solutions] for name in nothing}
    if columns is None and solutions:
        out, lse = (xp.concat(part, axis=2) for part in parts.values())
        return Solution(out, lse, read, bounded)
    place = np.zeros(tokens, np.int64)  # of each column among those kept, after a row of nothing
    place[[] if columns is None else columns] = 1 + np.arange(sum(one.out.shape[2] for one in solutions))
    index = xp.asarray(place, device=layout.device)
    out, lse = (xp.take(xp.concat([none, *parts[name]], axis=2), index, axis=2) for name, none in nothing.items())
    return Solution(out, lse, read, bounded)


def figures(shares: list[tuple[Solution, float]]) -> tuple[dict[str, Any], Any]:
    """Rows read by part, and the share of queries that met a bound, of solutions by their share of all queries. What
    only the device knows stays there."""
    read: dict[str, Any] = {}
    bounded: Any = 0.0
    for one, share in shares:
        bounded = bounded + one.bounded * share
        for part, rows in one.rows.items():
            read[part] = read.get(part, 0.0) + rows * share
    return read, bounded


def together(layout: Layout, name: str, found: list[tuple[np.ndarray, Solution]]) -> Array:
    """out or lse of groups of sequences, (batch, heads, repeat, n_q, ...), in the order of sequences."""
    xp = layout.xp
    parts = [
        xp.reshape(x, (len(some), layout.heads, *x.shape[1:])) for some, one in found for x in (getattr(one, name),)
    ]
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(np.concatenate([some for some, _ in found]))
    return xp.take(xp.concat(parts, axis=0), xp.asarray(order, device=layout.device), axis=0)
