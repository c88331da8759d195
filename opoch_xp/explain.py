"""Explain: what one query of a treecode read, part by part, and how much of its softmax each part holds."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from opoch_xp.arguments import prepare
from opoch_xp.audit import host_array
from opoch_xp.backends.generic.tree import tree_lists
from opoch_xp.methods import Method, Treecode
from opoch_xp.problem import Problem
from opoch_xp.solve import solve
from opoch_xp.treecode import law
from opoch_xp.treecode.forest import Runs, State, Tier
from opoch_xp.treecode.plan import level_plan
from opoch_xp.treecode.tree import Lists, Tree

Array = Any
SHOWN = 8  # entries listed by str(); the rest is counted


@dataclass(frozen=True)
class Entry:
    """What a query read as one row of its softmax: a key, or a node of the tree as one pseudo-key at its mean value.

    part: "local" (its own block, or the keys after the last block), "sinks" (the first keys), "keys" (of cells that it
    reads) or "nodes" (that were not opened); tier: number of the tier, None for local and sinks; keys: positions of the
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
    indices. method: a Treecode, by default Treecode(). The other arguments as in `attend`. Trees, groups and what was
    read before are the backend's; the lists come from the generic kernel, which a plugin may differ from where a node
    is opened or not by a rounding.

    Cost: the method on the queries of the key head, and the row's group against its trees again. Raises TypeError for a
    method that is no Treecode, IndexError for a row or head that does not exist, ValueError for a row that is not
    finite, and what attend raises.

    >>> import numpy as np, opoch_xp as ox
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 100, 8))
    >>> found = ox.explain(q, k, v, row=70, head=1, method=ox.Treecode(block=32, leaf=4, sinks=2), causal=True)
    >>> round(sum(found.share(part) for part in ("local", "sinks", "keys", "nodes")), 12)
    1.0
    """
    method = Treecode() if method is None else method
    if not isinstance(method, Treecode):
        raise TypeError(f"explain is for a Treecode: Exact and LSH read keys one by one; got method={method!r}")
    problem = prepare(q, k, v, causal=causal, scale=scale, key_mask=key_mask, backend=backend).widened()
    index = _head(head, tuple(q.shape[:-2]))
    if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < problem.n_q:
        raise IndexError(f"row must be a whole number from 0 to {problem.n_q - 1}, got {row!r}")
    number = int(np.ravel_multi_index(index, q.shape[:-2])) if index else 0
    one, repeat = _key_head(problem, number)
    query = host_array(one.q[0, repeat, row, :])
    if not np.isfinite(query).all():
        raise ValueError(f"row {row} of q must be finite: its output is not a number whatever it reads")
    position = row + problem.n_k - problem.n_q if causal else None
    found = _exact(one, method, query, position)

    def watch(tier: Tier, tree: Tree, runs: Runs, groups: Array, state: State) -> None:
        if runs.rows.start <= row < runs.rows.stop:
            found.extend(_tier(one, method, query, (repeat, row), tier, tree, runs, groups, state))

    solve(one, method, watch)
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


def _key_head(problem: Problem, head: int) -> tuple[Problem, int]:
    """The problem of the key head of a query head, batch 1, and the number of the query head among its own."""
    b, r = divmod(head, problem.q.shape[1])
    mask = None if problem.mask is None else problem.mask[b : b + 1, :]
    q, k, v = problem.q[b : b + 1, :, :, :], problem.k[b : b + 1, :, :], problem.v[b : b + 1, :, :]
    return Problem(problem.xp, problem.kernels, q, k, v, mask, problem.causal, problem.scale), r


Found = tuple[str, int | None, np.ndarray, float, np.ndarray]  # part, tier, keys, log mass, value


def _exact(one: Problem, method: Treecode, query: np.ndarray, position: int | None) -> list[Found]:
    """What is read exactly beside the trees: the kept keys of the query's own block up to its position, or, not causal,
    of those after the last block; and the sinks before them."""
    start, stop = one.n_k // method.block * method.block, one.n_k
    if position is not None:
        start, stop = max(0, position // method.block * method.block), max(0, position + 1)
    kept = np.ones(one.n_k, bool) if one.mask is None else host_array(one.mask[0, :]) > 0
    sinks = np.flatnonzero(kept)[: method.sinks]
    found: list[Found] = []
    for part, keys in (("local", start + np.flatnonzero(kept[start:stop])), ("sinks", sinks[sinks < start])):
        if position is not None and position < 0:
            break
        rows, values = (_rows(x[0, :, :], keys) for x in (one.k, one.v))
        logits = one.scale * (rows @ query)
        found += [(part, None, keys[i : i + 1], logits[i], values[i]) for i in range(len(keys))]
    return found


def _rows(array: Array, index: np.ndarray) -> np.ndarray:
    """Rows of an array (rows, width), on the host."""
    xp = array_namespace(array)
    return host_array(xp.take(array, xp.asarray(index, device=device(array)), axis=0))


def _tier(
    one: Problem, method: Treecode, query: np.ndarray, place: tuple[int, int], tier: Tier, tree: Tree,
    runs: Runs, groups: Array, state: State,
) -> Iterator[Found]:  # fmt: skip
    """What the query at `place`, query head and row, reads of one tier."""
    xp, (repeat, row) = one.xp, place
    queries, seen = runs.of_queries(xp, one.q), runs.of_queries(xp, state[1])
    number = repeat * (runs.rows.stop - runs.rows.start) + row - runs.rows.start
    task, inside = divmod(number, queries.shape[1])
    first, count = int(runs.first[task]), int(runs.count[task])
    if not count:
        return
    members = host_array(groups[task, :]).astype(np.int64)
    size = min(method.group, queries.shape[1])
    group, seat = divmod(int(np.argmax(members == inside)), size)
    rows = members[group * size : (group + 1) * size]
    rows = rows[rows < queries.shape[1]]
    index = xp.asarray(rows, device=device(queries))
    lists = tree_lists(
        xp.take(queries[task : task + 1, :, :], index, axis=1), tree, np.array([first]), np.array([count]),
        xp.asarray(np.arange(len(rows))[None], device=device(queries)), method, scale=one.scale,
        seen=xp.take(seen[task : task + 1, :], index, axis=1),
    )  # fmt: skip
    base = (first + tier.low) * tier.size  # position of the first key that the task reads: one key head
    reading = _Reading(tree, query, one.scale, tier.number, first, base - first * tier.size)
    yield from reading.all(lists, seat, count, level_plan(tier.size, method).nodes)


class _Reading:
    """Lookups in the tree of a run of chunks from number `first` on, whose chunk 0 begins at position `base`."""

    def __init__(self, tree: Tree, query: np.ndarray, scale: float, tier: int, first: int, base: int) -> None:
        self.tree, self.query, self.scale, self.tier, self.first = tree, query, scale, tier, first
        order = host_array(tree.order).astype(np.int64)
        self.positions = (base + order + np.arange(len(order))[:, None] * order.shape[1]).reshape(-1)
        self.kept = np.ones(order.size, bool) if tree.kept is None else host_array(tree.kept).reshape(-1) > 0

    def all(self, lists: Lists, seat: int, count: int, nodes: tuple[int, ...]) -> Iterator[Found]:
        """What the query at a seat of the one group of `lists` reads of `count` chunks, of nodes[level] nodes each."""
        opened = [host_array(level[0, :]).astype(np.int64) for level in lists.opened]
        cells, reads = host_array(lists.cells[0, :]).astype(np.int64), host_array(lists.reads[0, seat, :]) > 0
        opened.append(cells[reads & (cells >= 0)])
        candidates = np.arange(count * nodes[-1])
        for level, taken in zip(range(len(nodes) - 1, -1, -1), opened, strict=True):
            taken = taken[taken >= 0]
            yield from self.closed(level, np.setdiff1d(candidates, taken) + self.first * nodes[level])
            if level:
                children = nodes[level - 1] // nodes[level]
                candidates = (taken[:, None] * children + np.arange(children)).reshape(-1)
        yield from self.keys_of(opened[-1] + self.first * nodes[0])

    def keys(self, node: int, size: int) -> np.ndarray:
        """Positions of the kept keys of a node of `size` keys."""
        rows = slice(node * size, (node + 1) * size)
        return np.sort(self.positions[rows][self.kept[rows]])

    def flat(self, array: Array) -> Array:
        """An array (chunks, rows, width) as (chunks * rows, width)."""
        return array_namespace(array).reshape(array, (-1, array.shape[2]))

    def closed(self, level: int, nodes: np.ndarray) -> Iterator[Found]:
        """Nodes of a level, each as one key."""
        dim, size = self.tree.dim, self.tree.sizes[level]
        rows, keys = _rows(self.flat(self.tree.summaries[level]), nodes), [self.keys(i, size) for i in nodes.tolist()]
        sigma2 = rows[:, dim : 2 * dim] @ self.query**2 * self.scale**2
        count = np.array([float(len(found)) for found in keys])
        mass = law.log_mass(self.scale * (rows[:, :dim] @ self.query), sigma2, count)
        for i in np.flatnonzero(count):
            yield "nodes", self.tier, keys[i], mass[i], rows[i, 2 * dim :]

    def keys_of(self, cells: np.ndarray) -> Iterator[Found]:
        """The kept keys of cells, one by one."""
        index = (cells[:, None] * self.tree.leaf + np.arange(self.tree.leaf)).reshape(-1)
        index = index[self.kept[index]]
        rows = _rows(self.flat(self.tree.cells), index)
        logits = self.scale * (rows[:, : self.tree.dim] @ self.query)
        for i, place in enumerate(index):
            yield "keys", self.tier, self.positions[place : place + 1], logits[i], rows[i, self.tree.dim :]


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
