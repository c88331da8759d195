"""Explain: what one query of a treecode read, part by part, and how much of its softmax each part holds."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from opoch_xp.arguments import prepare
from opoch_xp.audit import host_array
from opoch_xp.backends.generic import tree as generic
from opoch_xp.forest import KEYS, QUERIES, directions
from opoch_xp.methods import Method, Treecode
from opoch_xp.problem import Problem
from opoch_xp.tree import Tree, group_count, splits

Array = Any
SHOWN = 8  # entries listed by str(); the rest is counted


@dataclass(frozen=True)
class Entry:
    """What a query read as one row of its softmax: a key, or a node of the tree as one pseudo-key at its mean value.

    part: "local" (its own block, or the keys after the last block), "near" (a cell that its group reads), "own" (a cell
    of its own) or "far" (a node that was not opened); tier: number of the tier, None for local; keys: positions of the
    keys that it stands for; log_mass: its logit, for a node the estimated log of the sum over its keys; share: of the
    softmax; value (d_v,): the value, or mean value.
    """

    part: str
    tier: int | None
    keys: np.ndarray
    log_mass: float
    share: float
    value: np.ndarray


@dataclass(frozen=True)
class Explanation:
    """What one row of a treecode read. Host NumPy figures; the shares sum to 1 (0 for a row that sees no key).

    head: index of the query head, () for two-axis arrays; position: of the query among the keys when causal, else None;
    entries: by share, largest first; out (d_v,) and lse: the row's output, sum of share * value, and its log-sum-exp.
    """

    row: int
    head: tuple[int, ...]
    position: int | None
    method: Treecode
    entries: tuple[Entry, ...]
    out: np.ndarray
    lse: float

    def share(self, part: str) -> float:
        """Share of the softmax that one of the parts holds."""
        return sum((entry.share for entry in self.entries if entry.part == part), 0.0)

    def __str__(self) -> str:
        where = "" if self.position is None else f" at position {self.position}"
        lines = [
            f"row {self.row}{where}, head {self.head}, lse {self.lse:.4g}",
            "",
            "part    tier  rows  keys    share",
        ]
        tally: dict[tuple[str, int | None], list[Entry]] = {}
        for entry in self.entries:
            tally.setdefault((entry.part, entry.tier), []).append(entry)
        for (part, tier), found in sorted(tally.items(), key=lambda item: (item[0][1] is not None, item[0][1] or 0)):
            keys, share = sum(len(entry.keys) for entry in found), sum(entry.share for entry in found)
            lines.append(f"{part:<6}{'-' if tier is None else tier:>6}{len(found):>6}{keys:>6}{share:>9.2%}")
        lines += ["", "   share  log mass  part   keys"]
        for entry in self.entries[:SHOWN]:
            lines.append(f"{entry.share:>8.2%}{entry.log_mass:>10.3f}  {entry.part:<6} {_range(entry.keys)}")
        if len(self.entries) > SHOWN:
            lines.append(f"and {len(self.entries) - SHOWN} more")
        return "\n".join(lines)


def _range(keys: np.ndarray) -> str:
    return str(keys[0]) if len(keys) == 1 else f"{len(keys)} of {keys.min()}..{keys.max()}"


def explain(
    q: Array,
    k: Array,
    v: Array,
    *,
    row: int,
    head: int | tuple[int, ...] = 0,
    method: Method | None = None,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    backend: str | None = None,
) -> Explanation:
    """What row `row` of one head read under a Treecode: keys, cells and nodes, with their shares of the softmax.

    row: 0 to n_q - 1; head: a number, batch axes and query heads counted together in C order, or the tuple of their
    indices. method: a Treecode, by default Treecode(). The other arguments as in `attend`. Trees and groups are
    the backend's; the lists come from the generic kernel, which a plugin may differ from where two nodes weigh the same
    to rounding.

    Runs the row's own chunk of queries alone, in each tier: the others are not looked at. Cost: the trees of the chunks
    that the row reads, and its chunk against them. Raises TypeError for a method that is no Treecode, IndexError for a
    row or head that does not exist, ValueError for a row that is not finite, and what attend raises.

    >>> import numpy as np, opoch_xp as ox
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 100, 8))
    >>> found = ox.explain(q, k, v, row=70, head=1, method=ox.Treecode(block=32, leaf=4), causal=True)
    >>> round(sum(found.share(part) for part in ("local", "far", "near", "own")), 12)
    1.0
    """
    method = Treecode() if method is None else method
    if not isinstance(method, Treecode):
        raise TypeError(f"explain is for a Treecode: Exact and LSH read keys one by one; got method={method!r}")
    problem = prepare(q, k, v, causal=causal, scale=scale, key_mask=key_mask, backend=backend).widened()
    index = _head(head, tuple(q.shape[:-2]))
    if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < problem.n_q:
        raise IndexError(f"row must be a whole number from 0 to {problem.n_q - 1}, got {row!r}")
    one = _one_head(problem, int(np.ravel_multi_index(index, q.shape[:-2])) if index else 0)
    query = host_array(one.q[0, 0, row, :])
    if not np.isfinite(query).all():
        raise ValueError(f"row {row} of q must be finite: its output is not a number whatever it reads")
    position = row + problem.n_k - problem.n_q if causal else None
    found = _local(one, method, query, position)
    size, number = method.block, 0
    while size <= problem.n_k and (position is None or position >= 0):
        found += _tier(one, method, number, size, row, query)
        size, number = size * method.fan, number + 1
    return _explanation(found, row, index, position, method, problem.v.shape[-1])


def _head(head: object, lead: tuple[int, ...]) -> tuple[int, ...]:
    """Index of a head among the batch axes and heads `lead`."""
    if isinstance(head, int) and not isinstance(head, bool) and 0 <= head < prod(lead):
        return tuple(int(i) for i in np.unravel_index(head, lead)) if lead else ()
    if isinstance(head, tuple) and len(head) == len(lead):
        inside = all(isinstance(i, int) and 0 <= i < size for i, size in zip(head, lead, strict=True))
        if inside:
            return head
    raise IndexError(f"head must be a number below {prod(lead)} or indices into the axes {lead}, got {head!r}")


def _one_head(problem: Problem, head: int) -> Problem:
    """The problem of one query head, batch 1 and repeat 1."""
    b, r = divmod(head, problem.q.shape[1])
    mask = None if problem.mask is None else problem.mask[b : b + 1, :]
    q, k, v = problem.q[b : b + 1, r : r + 1, :, :], problem.k[b : b + 1, :, :], problem.v[b : b + 1, :, :]
    return Problem(problem.xp, problem.kernels, q, k, v, mask, problem.causal, problem.scale)


Found = tuple[str, int | None, np.ndarray, float, np.ndarray]  # part, tier, keys, log mass, value


def _local(one: Problem, method: Treecode, query: np.ndarray, position: int | None) -> list[Found]:
    """The kept keys of the query's own block up to its position; not causal, of those after the last block."""
    start, stop = one.n_k // method.block * method.block, one.n_k
    if position is not None:
        start, stop = max(0, position // method.block * method.block), max(0, position + 1)
    keys, values = (host_array(a[0, start:stop, :]) for a in (one.k, one.v))
    kept = np.ones(stop - start) if one.mask is None else host_array(one.mask[0, start:stop])
    logits = one.scale * (keys @ query)
    return [("local", None, np.array([start + i]), logits[i], values[i]) for i in np.flatnonzero(kept)]


def _tier(one: Problem, method: Treecode, number: int, size: int, row: int, query: np.ndarray) -> list[Found]:
    """What the query reads of one tier of chunks of `size` keys: nothing where its chunk has no earlier sibling."""
    xp, shift = one.xp, one.n_q - one.n_k
    chunk = (row - shift) // size if one.causal else one.n_k // size
    first, count = chunk // method.fan * method.fan, chunk % method.fan
    if not count:
        return []
    rows = slice(0, one.n_q)
    if one.causal:
        rows = slice(max(0, chunk * size + shift), min((chunk + 1) * size, one.n_k) + shift)
    queries, keys = one.q[0, :, rows, :], slice(first * size, chunk * size)
    axes = [
        directions(method.seed, number, stream, splits(length, cell), one.q.shape[3])
        for stream, length, cell in ((KEYS, size, method.leaf), (QUERIES, queries.shape[1], method.group))
    ]
    tree = one.kernels.build_tree(
        xp.reshape(one.k[0, keys, :], (count, size, one.k.shape[2])),
        xp.reshape(one.v[0, keys, :], (count, size, one.v.shape[2])),
        axes[0],
        method,
        mask=None if one.mask is None else xp.reshape(one.mask[0, keys], (count, size)),
    )
    groups = one.kernels.query_groups(queries, axes[1], method)
    run = np.array([0]), np.array([count])
    lists = generic.tree_lists(queries, tree, *run, axes[1], method, scale=one.scale, groups=groups)
    members = host_array(groups[0, :])
    group, place = divmod(
        int(np.argmax(members == row - rows.start)), len(members) // group_count(queries.shape[1], method.group)
    )
    opened = [host_array(level[group, :]).astype(np.int64) for level in lists.opened]
    own = np.setdiff1d(host_array(lists.own[group, place, :]), opened[-1]).astype(
        np.int64
    )  # masked cells weigh as little
    reading = _Reading(tree, query, one.scale, number, first * size)
    return [*reading.far(opened, own), *reading.cells("near", opened[-1]), *reading.cells("own", own)]


class _Reading:
    """Lookups in the tree of one run of chunks, whose first key stands at position `base`, for one query."""

    def __init__(self, tree: Tree, query: np.ndarray, scale: float, tier: int, base: int) -> None:
        self.tree, self.query, self.scale, self.tier = tree, query, scale, tier
        order = host_array(tree.order).astype(np.int64)
        self.positions = (base + order + np.arange(len(order))[:, None] * order.shape[1]).reshape(-1)
        self.kept = np.ones(order.size, bool) if tree.kept is None else host_array(tree.kept).reshape(-1) > 0

    def rows(self, array: Array, index: np.ndarray) -> np.ndarray:
        """Rows of an array (chunks, rows, width), rows of all chunks counted together, on the host."""
        xp = array_namespace(array)
        flat = xp.reshape(array, (-1, array.shape[2]))
        return host_array(xp.take(flat, xp.asarray(index, device=device(array)), axis=0))

    def keys(self, node: int, size: int) -> np.ndarray:
        """Positions of the kept keys of a node of `size` keys."""
        rows = slice(node * size, (node + 1) * size)
        return np.sort(self.positions[rows][self.kept[rows]])

    def far(self, opened: list[np.ndarray], own: np.ndarray) -> Iterator[Found]:
        """The nodes that neither the group opened nor the query reads key by key, level by level from the coarsest."""
        dim, levels = self.tree.dim, range(len(self.tree.sizes) - 1, -1, -1)
        candidates = np.arange(self.tree.summaries[-1].shape[0] * self.tree.summaries[-1].shape[1])
        for level, taken in zip(levels, opened, strict=True):
            rest = np.setdiff1d(candidates, taken if level else np.concatenate([taken, own]))
            size = self.tree.sizes[level]
            rows, keys = self.rows(self.tree.summaries[level], rest), [self.keys(node, size) for node in rest.tolist()]
            sigma2 = rows[:, dim : 2 * dim] @ self.query**2 * self.scale**2
            count = np.array([float(len(found)) for found in keys])
            mass = generic.log_mass(self.scale * (rows[:, :dim] @ self.query), sigma2, count)
            for i in np.flatnonzero(count):
                yield "far", self.tier, keys[i], mass[i], rows[i, 2 * dim :]
            if level:
                children = size // self.tree.sizes[level - 1]
                candidates = (taken[:, None] * children + np.arange(children)).reshape(-1)

    def cells(self, part: str, cells: np.ndarray) -> Iterator[Found]:
        """The kept keys of the cells, one by one."""
        index = (cells[:, None] * self.tree.leaf + np.arange(self.tree.leaf)).reshape(-1)
        index = index[self.kept[index]]
        rows = self.rows(self.tree.cells, index)
        logits = self.scale * (rows[:, : self.tree.dim] @ self.query)
        for i, place in enumerate(index):
            yield part, self.tier, self.positions[place : place + 1], logits[i], rows[i, self.tree.dim :]


def _explanation(
    found: list[Found], row: int, head: tuple[int, ...], position: int | None, method: Treecode, width: int
) -> Explanation:
    """The softmax over everything that was read."""
    mass = np.array([part[3] for part in found])
    top = mass.max(initial=-np.inf)
    lse = float(top + np.log(np.exp(mass - top).sum())) if found else -np.inf
    share = np.exp(mass - lse) if found else mass
    entries = [Entry(*part[:3], float(part[3]), float(p), part[4]) for part, p in zip(found, share, strict=True)]
    out = sum((entry.share * entry.value for entry in entries), np.zeros(width))
    return Explanation(row, head, position, method, tuple(sorted(entries, key=lambda e: -e.share)), out, lse)
