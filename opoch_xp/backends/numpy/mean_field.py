"""Means for queries that share a bucket with no key: of a bucket or a head, or of all keys before, for NumPy.

Means and variances are summed in float64, a block at a time.

Letters: n_k keys, d and dv widths of keys and values, L queries that are left.
"""

import numpy as np

from opoch_xp.backends.numpy.pool import run

Array = np.ndarray
Field = tuple[Array, Array]  # values (L, dv), log masses (L,)

BLOCK = 4096  # rows gathered at once
RUNS = 64  # runs of a task


def mean_field(rows: Array, q: Array, left: Array, order: Array, start: Array, stop: Array, scale: float) -> Field:
    """Mean field of the keys order[start:stop], (L,) each, for the queries `left` of q (N, d): values and log masses.

    rows (n_k + 1, d + dv + 1): key, value, one. The log mass is that of n Gaussian energies with its freezing
    transition: Derrida, Random-energy model, 1981; -inf for no key.
    """
    dim = q.shape[1]
    spread = len(order) + 1
    runs, number = np.unique(start * spread + stop, return_inverse=True)
    mean = np.empty((len(runs), rows.shape[1] - 1))  # key and value
    variance = np.empty((len(runs), dim))

    def summarise(first: int) -> None:
        for place in range(first, min(first + RUNS, len(runs))):
            low, high = divmod(int(runs[place]), spread)
            mean[place] = _sum(rows, order[low:high], mean.shape[1]) / max(1, high - low)
            variance[place] = _sum(rows, order[low:high], dim, mean[place, :dim]) / max(1, high - low)

    run(summarise, range(0, len(runs), RUNS))
    log_count = np.log(np.maximum(stop - start, 1))
    values, levels = np.empty((len(left), mean.shape[1] - dim), dtype=rows.dtype), np.empty(len(left), dtype=rows.dtype)

    def level(low: int) -> None:
        here = slice(low, low + BLOCK)
        query, run_of, ln = scale * q[left[here]].astype(np.float64), number[here], log_count[here]
        sigma2 = np.einsum("ld,ld->l", query * query, variance[run_of])
        mass = np.where(sigma2 <= 2 * ln, ln + sigma2 / 2, np.sqrt(2 * ln * sigma2))
        values[here] = mean[run_of, dim:]
        levels[here] = np.where(
            stop[here] > start[here], np.einsum("ld,ld->l", query, mean[run_of, :dim]) + mass, -np.inf
        )

    run(level, range(0, len(left), BLOCK))
    return values, levels


def _sum(rows: Array, keys: Array, width: int, center: Array | None = None) -> Array:
    """Sum of the first `width` columns of the rows `keys`, or of their squared distances from the center, float64."""
    total = np.zeros(width)
    for low in range(0, len(keys), BLOCK):
        block = rows[keys[low : low + BLOCK], :width].astype(np.float64)
        if center is not None:
            block -= center
            block *= block
        total += block.sum(axis=0)
    return total


def past_mean(rows: Array, q: Array, left: Array, position: Array, scale: float, kept: Array | None) -> Field:
    """Mean value of the kept keys up to `position` (L,) for the queries `left` of q, and the log mass of their mean.

    rows (n_k + 1, d + dv + 1), masked keys zeros. Where there is no such key: zeros and -inf.
    """
    dim, n_k = q.shape[1], len(rows) - 1
    counts = np.arange(n_k + 1) if kept is None else np.searchsorted(kept, np.arange(n_k + 1))  # kept keys before
    count = counts[np.maximum(position + 1, 0)]
    values, levels = np.zeros((len(left), rows.shape[1] - 1 - dim), dtype=rows.dtype), np.empty(len(left), rows.dtype)
    levels[:] = -np.inf
    order = np.argsort(position, kind="stable")
    edges = np.searchsorted(position[order], np.arange(0, n_k + BLOCK, BLOCK))
    before = np.zeros(rows.shape[1] - 1)
    for block, low in enumerate(range(0, n_k, BLOCK)):
        data = rows[low : min(low + BLOCK, n_k), :-1]
        here = order[edges[block] : edges[block + 1]]
        if len(here):
            sums = before + np.cumsum(data, axis=0, dtype=np.float64)
            mean = sums[position[here] - low] / np.maximum(count[here], 1)[:, None]
            values[here] = mean[:, dim:]
            level = scale * np.einsum("ld,ld->l", q[left[here]], mean[:, :dim]) + np.log(np.maximum(count[here], 1))
            levels[here] = np.where(count[here] > 0, level, -np.inf)
        before += data.sum(axis=0, dtype=np.float64)
    return values, levels
