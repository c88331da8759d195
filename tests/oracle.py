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


def log_mass(q: np.ndarray, node: Level, among: np.ndarray, scale: float) -> np.ndarray:
    """Mean field plus the free energy of `count` Gaussian energies, with its freezing transition; -inf for no key."""
    log = np.log(np.maximum(node.count[among], 1))
    sigma = np.sqrt(scale**2 * (q * q) @ node.var[among].T)
    free = log + sigma**2 / 2 - np.maximum(0, sigma - np.sqrt(2 * log)) ** 2 / 2
    return np.where(node.count[among] > 0, scale * (q @ node.mean[among].T) + free, -np.inf)


@dataclass(frozen=True)
class Reading:
    """What one group of queries got from a run of chunks: out, lse, the nodes opened (coarsest first, the last the near
    cells), each query's own cells (r, own), and the rows each query read."""

    out: np.ndarray
    lse: np.ndarray
    opened: list[np.ndarray]
    own: np.ndarray
    rows: int


def read_trees(
    q: np.ndarray, tree: list[Level], k: np.ndarray, v: np.ndarray, kept: np.ndarray, scale: float, method: Treecode
) -> Reading:
    """One group of queries q (r, d) against the levels of a run of chunks over keys k."""
    candidates, norm, logits, values, opened, rows = np.arange(len(tree[-1].count)), -np.inf, [], [], [], 0
    for depth in reversed(range(len(tree))):
        mass = log_mass(q, tree[depth], candidates, scale)
        rows += len(candidates)
        norm = np.maximum(norm, softmax(mass, np.zeros((len(candidates), 0)))[1][:, None])
        share = np.exp(mass - np.where(np.isneginf(norm), 0, norm)).sum(0)
        pick = np.argsort(-share, kind="stable")[: method.open if depth else method.near]
        rest = np.setdiff1d(np.arange(len(candidates)), pick)
        opened.append(candidates[pick])
        if depth:
            logits.append(mass[:, rest])
            values.append(tree[depth].value[candidates[rest]])
            children = len(tree[depth - 1].count) // len(tree[depth].count)
            candidates = (opened[-1][:, None] * children + np.arange(children)).reshape(-1)
    shared = tree[0].members[opened[-1]].reshape(-1)
    mass, left = mass[:, rest], candidates[rest]
    best = np.argsort(-mass, axis=1, kind="stable")[:, : method.own]
    out, lse = np.empty((len(q), v.shape[1])), np.empty(len(q))
    for i in range(len(q)):
        keys = np.concatenate([shared, tree[0].members[left[best[i]]].reshape(-1)])
        far = np.delete(np.arange(len(left)), best[i])
        exact = np.where(kept[keys], scale * (k[keys] @ q[i]), -np.inf)
        row = np.concatenate([*(part[i] for part in logits), mass[i, far], exact])
        (out[i],), (lse[i],) = softmax(row[None], np.concatenate([*values, tree[0].value[left[far]], v[keys]]))
    return Reading(out, lse, opened, left[best], rows + len(shared) + best.shape[1] * method.leaf)


def merge(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Parts (out, lse) over other keys: a softmax over their lse."""
    lse = np.stack([part[1] for part in parts], 1)
    rows = [softmax(lse[i : i + 1], np.stack([part[0][i] for part in parts])) for i in range(len(lse))]
    return np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows])


def treecode(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, method: Treecode, axes: Axes, *, causal: bool = False,
    scale: float | None = None, kept: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """out (n_q, e), lse (n_q,) and the rows read by each query (n_q,)."""
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    n_q, n_k, scale = len(q), len(k), q.shape[1] ** -0.5 if scale is None else scale
    kept = np.ones(n_k, bool) if kept is None else kept
    position = np.arange(n_q) + (n_k - n_q if causal else 0)
    block = position // method.block * method.block if causal else np.full(n_q, n_k // method.block * method.block)
    local = visible(n_q, n_k, causal) & (np.arange(n_k) >= block[:, None])
    logits = np.where(local & kept, scale * (q @ k.T), -np.inf)
    parts, read = [softmax(logits, v)], local.sum(1)
    size, tier = method.block, 0
    while size <= n_k:
        out, lse = np.zeros((n_q, v.shape[1])), np.full(n_q, -np.inf)
        chunk = np.where(position >= 0, position // size, 0) if causal else np.full(n_q, n_k // size)
        order = cache_orders(k, kept, axes, tier, size, method)
        for c in np.unique(chunk):
            first, rows = c // method.fan * method.fan, np.flatnonzero((chunk == c) & (position >= 0))
            if first == c or not len(rows):
                continue
            base = first * size
            tree = trees(k[base:], v[base:], kept[base:], [order(i) for i in range(first, c)], method)
            start = axes(method.seed, tier, 1, levels_of(len(rows), method.group))
            for group in query_groups(q[rows], start, method):
                part = read_trees(q[rows[group]], tree, k[base:], v[base:], kept[base:], scale, method)
                out[rows[group]], lse[rows[group]] = part.out, part.lse
                read[rows[group]] += part.rows
        parts.append((out, lse))
        size, tier = size * method.fan, tier + 1
    return *merge(parts), read


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
    from opoch_xp.forest import directions

    return partial(directions, dim=dim)
