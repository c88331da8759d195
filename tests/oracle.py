"""The treecode by its definition: slow NumPy, one head, float64, one group of queries at a time.

q (n_q, d), k (n_k, d), v (n_k, e), kept (n_k,) bool. Query i stands at position i + n_k - n_q when causal. What is
decided (order of keys, groups of queries, nodes opened) comes from `cell_order`, `query_groups` and `read_trees`, so
that a test can hand the same decisions to a kernel and ask for the same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from opoch_xp.methods import Treecode

Axes = Callable[[int, int, int, int], np.ndarray]  # (seed, tier, stream, levels) -> (levels, d)


def softmax(logits: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """out (r, e) and lse (r,) of logits (r, m) over values (m, e); a row of -inf is zeros with lse -inf."""
    top = logits.max(axis=1, initial=-np.inf, keepdims=True)
    weight = np.exp(logits - np.where(np.isneginf(top), 0, top))
    total = weight.sum(1)
    seen = total > 0
    lse = np.where(seen, np.where(seen, top[:, 0], 0) + np.log(np.where(seen, total, 1)), -np.inf)
    return weight @ values / np.where(seen, total, 1)[:, None], lse


def visible(n_q: int, n_k: int, causal: bool, kept: np.ndarray | None = None) -> np.ndarray:
    """Which keys each query sees, (n_q, n_k) bool."""
    seen = np.ones((n_q, n_k), bool) if kept is None else np.tile(kept, (n_q, 1))
    return seen & (np.arange(n_k) <= np.arange(n_q)[:, None] + n_k - n_q) if causal else seen


def dense(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, causal: bool = False, scale: float | None = None,
    kept: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Exact attention with the whole matrix of logits, in float64: out (n_q, e) and lse (n_q,)."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    logits = q @ k.T * (q.shape[1] ** -0.5 if scale is None else scale)
    return softmax(np.where(visible(len(q), len(k), causal, kept), logits, -np.inf), v)


def levels_of(rows: int, size: int) -> int:
    """Halvings that bring `rows` rows into parts of at most `size`."""
    return int(np.ceil(np.log2(max(1, np.ceil(rows / size)))))


def balance(q: np.ndarray) -> np.ndarray:
    """w (d,) of queries (..., d): q / w and k * w have the same products; not finite queries count as zeros."""
    q = np.where(np.isfinite(q).all(-1, keepdims=True), q, 0).reshape(-1, q.shape[-1])
    mean = ((q / (np.abs(q).max() or 1)) ** 2).mean(0)
    return np.maximum(mean / mean.max(), 1e-4) ** 0.25 if mean.max() > 0 else np.ones(len(mean))


def known(q: np.ndarray, n_k: int, causal: bool, method: Treecode) -> np.ndarray:
    """The balance of a key head's queries (heads, n_q, d), told by the first of them; ones where none may tell it."""
    rows = min(256, q.shape[1])
    if causal and method.group == 1:
        rows = min(rows, method.block) if q.shape[1] >= n_k else 0
    return balance(q[:, :rows]) if rows else np.ones(q.shape[2])


def project(x: np.ndarray, start: np.ndarray, iterations: int, kept: np.ndarray) -> np.ndarray:
    """Projections of rows x (r, d) on the principal axis of the kept ones; the others are +inf, to sort last."""
    centred = np.where(kept[:, None], x - x[kept].sum(0) / max(1, kept.sum()), 0)
    axis = start
    for _ in range(iterations):
        axis = centred.T @ (centred @ axis)
        axis = axis / (np.abs(axis).max() or 1)
        axis = axis / (np.linalg.norm(axis) or 1)
    return np.where(kept, centred @ axis, np.inf)


def cell_order(k: np.ndarray, axes: np.ndarray, method: Treecode, kept: np.ndarray | None = None) -> np.ndarray:
    """Order of the keys of a chunk such that each run of `leaf` is a cell: median splits, level by level."""
    kept = np.ones(len(k), bool) if kept is None else kept
    nodes = [np.arange(len(k))]
    for level in range(levels_of(len(k), method.leaf)):
        ordered = [
            rows[np.argsort(project(k[rows], axes[level], method.iterations, kept[rows]), kind="stable")]
            for rows in nodes
        ]
        nodes = [half for rows in ordered for half in np.split(rows, 2)]
    return np.concatenate(nodes)


def query_groups(q: np.ndarray, axes: np.ndarray, method: Treecode) -> list[np.ndarray]:
    """Row numbers in groups close in space: a node keeps group * 2**j rows on its left, so all but one are full."""
    levels = levels_of(len(q), method.group)

    def halve(rows: np.ndarray) -> list[np.ndarray]:
        depth = levels_of(len(rows), method.group)
        if depth == 0:
            return [rows]
        along = project(q[rows], axes[levels - depth], method.iterations, np.ones(len(rows), bool))
        rows, left = rows[np.argsort(along, kind="stable")], method.group * 2 ** (depth - 1)
        return halve(rows[:left]) + halve(rows[left:])

    return halve(np.arange(len(q)))


@dataclass(frozen=True)
class Level:
    """Nodes of a run of chunks: mean key, diagonal variance, mean value (m, .), kept keys (m,), members (m, keys)."""

    mean: np.ndarray
    var: np.ndarray
    value: np.ndarray
    count: np.ndarray
    members: np.ndarray


def level(k: np.ndarray, v: np.ndarray, kept: np.ndarray, members: np.ndarray) -> Level:
    count = kept[members].sum(1)
    weight = (kept[members] / np.maximum(count, 1)[:, None])[..., None]  # (m, keys, 1)
    mean = (weight * k[members]).sum(1)
    var = (weight * (k[members] - mean[:, None]) ** 2).sum(1)
    return Level(mean, var, (weight * v[members]).sum(1), count, members)


def trees(k: np.ndarray, v: np.ndarray, kept: np.ndarray, orders: list[np.ndarray], method: Treecode) -> list[Level]:
    """Levels of a run of equal chunks, finest first; orders: of the keys of each chunk. At most `top` nodes a chunk."""
    nodes, size, found = len(orders[0]) // method.leaf, len(orders[0]), []
    rows = np.concatenate([order + i * size for i, order in enumerate(orders)])
    while True:
        found.append(level(k, v, kept, rows.reshape(len(orders) * nodes, -1)))
        if nodes <= method.top:
            return found
        nodes = max(1, nodes // method.branch)


def log_mass(q: np.ndarray, node: Level, among: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The law of few keys, (r, m): the expected log of what the keys of each node hold of each query, and three
    standard deviations more than that, less where the keys are alike; -inf for no key."""
    count = np.maximum(node.count[among], 1)
    log, sigma2 = np.log(count), scale**2 * (q * q) @ node.var[among].T
    gain = log * (0.92 + 0.067 * log) * (np.sqrt(1 + sigma2 / (1 + 0.26 * log) ** 2) - 1)
    s, p2 = 1 / (1 + 0.25 * log), (1.2 + 0.4 * log) ** 2
    deviation = np.sqrt((s**2 * sigma2**2 + p2 * sigma2 / count) / (sigma2 + p2))
    mass = np.where(node.count[among] > 0, scale * (q @ node.mean[among].T) + log + gain, -np.inf)
    return mass, mass + 3 * deviation + np.log(np.clip(np.sqrt(sigma2), 1e-15, 1))


@dataclass(frozen=True)
class Reading:
    """What one group of queries got from a run of chunks: out, lse, the nodes opened of each level above the cells
    (coarsest first), the cells that some query reads and which reads which (r, cells), and the rows each query read,
    nodes and keys (r, 2)."""

    out: np.ndarray
    lse: np.ndarray
    opened: list[np.ndarray]
    cells: np.ndarray
    reads: np.ndarray
    rows: np.ndarray


def log_sum(parts: list[np.ndarray]) -> np.ndarray:
    """ln of the sum of exp over all columns of the parts (r, .)."""
    return softmax(np.concatenate(parts, axis=1), np.zeros((sum(part.shape[1] for part in parts), 0)))[1]


def read_trees(
    q: np.ndarray, tree: list[Level], k: np.ndarray, v: np.ndarray, kept: np.ndarray, scale: float, method: Treecode,
    seen: np.ndarray, votes: np.ndarray | None = None,
) -> Reading:  # fmt: skip
    """One group of queries q (r, d), which have read a log mass seen (r,), against the levels of a run of chunks.

    votes (r,) bool: the queries that may open something.
    """
    votes = np.ones(len(q), bool) if votes is None else votes
    candidates, logits, values, opened, rows = np.arange(len(tree[-1].count)), [seen[:, None]], [], [], 0
    small = max(1, method.block // method.top)  # keys of a node that is not large
    closed = max(128, tree[0].members.size // small)
    threshold = -np.inf if method.rtol == 0 else np.log(method.rtol / np.sqrt(closed))
    for depth in reversed(range(len(tree))):
        mass, may = log_mass(q, tree[depth], candidates, scale)
        rows += len(candidates)
        full = tree[depth].count[candidates] > 0
        with np.errstate(invalid="ignore"):  # of a query that knows of nothing
            share = may - log_sum([*logits, mass])[:, None]
        wanted = votes[:, None] & full & (share > threshold)
        heavy = np.where(full, np.where(votes[:, None], share, -np.inf).max(0, initial=-np.inf), -np.inf)
        pick = wanted.any(0)
        if depth and tree[depth].members.shape[1] > method.block // method.top:
            pick[np.argsort(-heavy, kind="stable")[: method.least]] = True
            pick &= full
        if method.most is not None:
            bound = np.argsort(np.where(pick, -heavy, np.inf), kind="stable")[: method.most]
            pick &= np.isin(np.arange(len(pick)), bound)
        if not depth:
            break
        opened.append(candidates[pick])
        logits.append(mass[:, ~pick])
        values.append(tree[depth].value[candidates[~pick]])
        children = len(tree[depth - 1].count) // len(tree[depth].count)
        candidates = (opened[-1][:, None] * children + np.arange(children)).reshape(-1)
    reads = wanted & pick
    members = tree[0].members[candidates[pick]]  # (cells, leaf)
    keys = members.reshape(-1)
    exact = np.where(np.repeat(reads[:, pick], members.shape[1], 1) & kept[keys], scale * (q @ k[keys].T), -np.inf)
    logits = [*logits[1:], np.where(reads, -np.inf, mass), exact]
    out, lse = softmax(np.concatenate(logits, 1), np.concatenate([*values, tree[0].value[candidates], v[keys]]))
    spent = np.stack([np.full(len(q), rows), reads.sum(1) * members.shape[1]], axis=1)
    return Reading(out, lse, opened, candidates[pick], reads[:, pick], spent)


def merge(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Parts (out, lse) over other keys: a softmax over their lse."""
    lse = np.stack([part[1] for part in parts], 1)
    rows = [softmax(lse[i : i + 1], np.stack([part[0][i] for part in parts])) for i in range(len(lse))]
    return np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows])


def treecode(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, method: Treecode, axes: Axes, *, causal: bool = False,
    scale: float | None = None, kept: np.ndarray | None = None, w: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:  # fmt: skip
    """out (n_q, e), lse (n_q,) and the rows read by each query (n_q,), by part; w (d,) is the balance of the key head,
    by default that of this query head alone."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    n_q, n_k, scale = len(q), len(k), q.shape[1] ** -0.5 if scale is None else scale
    kept = np.ones(n_k, bool) if kept is None else kept
    w = known(q[None], n_k, causal, method) if w is None else w
    position = np.arange(n_q) + (n_k - n_q if causal else 0)
    block = position // method.block * method.block if causal else np.full(n_q, n_k // method.block * method.block)
    local = visible(n_q, n_k, causal) & (np.arange(n_k) >= block[:, None])
    sinks = np.flatnonzero(kept)[: method.sinks]
    first = np.isin(np.arange(n_k), sinks) & (np.arange(n_k) < block[:, None]) & (position >= 0)[:, None]
    inside = kept & ~np.isin(np.arange(n_k), sinks)  # what the trees hold
    out, lse = softmax(np.where((local & kept) | first, scale * (q @ k.T), -np.inf), v)
    rows = {"local": local.sum(1), "sinks": first.sum(1), "nodes": np.zeros(n_q), "keys": np.zeros(n_q)}
    size, tier = method.block, 0
    while size <= n_k:
        chunk = np.where(position >= 0, position // size, 0) if causal else np.full(n_q, n_k // size)
        order = cache_orders(k * w, inside, axes, tier, size, method)
        for c in np.unique(chunk):
            first, members = c // method.fan * method.fan, np.flatnonzero((chunk == c) & (position >= 0))
            if first == c or not len(members):
                continue
            base = first * size
            tree = trees(k[base:], v[base:], inside[base:], [order(i) for i in range(first, c)], method)
            start = axes(method.seed, tier, 1, levels_of(len(members), method.group))
            for group in query_groups(q[members] / w, start, method):
                at = members[group]
                part = read_trees(q[at], tree, k[base:], v[base:], inside[base:], scale, method, lse[at])
                out[at], lse[at] = merge([(out[at], lse[at]), (part.out, part.lse)])
                rows["nodes"][at] += part.rows[:, 0]
                rows["keys"][at] += part.rows[:, 1]
        size, tier = size * method.fan, tier + 1
    return out, lse, rows


def cache_orders(
    k: np.ndarray, kept: np.ndarray, axes: Axes, tier: int, size: int, method: Treecode
) -> Callable[[int], np.ndarray]:
    """Order of the keys of chunk i of a tier, split once."""
    start, known = axes(method.seed, tier, 0, levels_of(size, method.leaf)), {}

    def order(i: int) -> np.ndarray:
        if i not in known:
            rows = slice(i * size, (i + 1) * size)
            known[i] = cell_order(k[rows], start, method, kept[rows])
        return known[i]

    return order


def axes_for(dim: int) -> Axes:
    """The directions that the library draws, for keys of `dim` dimensions."""
    from opoch_xp.treecode.forest import directions

    return partial(directions, dim=dim)
