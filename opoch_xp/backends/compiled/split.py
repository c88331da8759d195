"""Median splits by principal axes, compiled: nodes one after another, rows read where they lie.

Letters: n rows of one task, d = dim. A node is a run of `order`, the numbers of its rows.
"""

from typing import Any

import numpy as np

from opoch_xp.backends.compiled.plain import plain
from opoch_xp.backends.compiled.vector import compiled
from opoch_xp.threads import share

Array = Any

SAMPLE = 256  # rows of a node that its axis is found from: a median split does not need it to be finer
TASK = 1 << 14  # rows of a task, about: some ms
NONE = np.zeros(0, bool)  # stands for no mask


@compiled
def _axis(
    x: Array, kept: Array, order: Array, base: int, start: Array, stretch: Array, iterations: int, sample: Array,
    axis: Array,
) -> None:  # fmt: skip
    """What rows x[base + order] are projected on, into `axis`: the principal axis of the stretched rows, of any length,
    by power iteration from `start`, stretched itself."""
    dim, size = x.shape[1], order.size
    step = max(1, size // SAMPLE)
    count = 0
    for i in range(0, step * (size // step), step):
        row = base + order[i]
        if kept.size == 0 or kept[row]:
            for c in range(dim):
                sample[count, c] = x[row, c]
            count += 1
    for c in range(dim):
        axis[c] = start[c] * stretch[c]
    if iterations == 0:
        return
    mean = sample[sample.shape[0] - 1]  # the row after the last that a sample can fill
    for c in range(dim):
        mean[c] = 0
    for i in range(count):
        for c in range(dim):
            mean[c] += sample[i, c]
    for i in range(count):
        for c in range(dim):
            sample[i, c] -= mean[c] / count
    for _ in range(iterations):
        total = mean
        for c in range(dim):
            total[c] = 0
        for i in range(count):
            row = sample[i]
            dot = row[0] * axis[0]
            for c in range(1, dim):
                dot += row[c] * axis[c]
            for c in range(dim):
                total[c] += dot * row[c]
        for c in range(dim):
            total[c] *= stretch[c] * stretch[c]
        largest = abs(total[0])
        for c in range(1, dim):
            largest = max(largest, abs(total[c]))
        if largest > 0:  # only the direction matters: this keeps it within the dtype
            for c in range(dim):
                axis[c] = total[c] / largest
        else:
            for c in range(dim):
                axis[c] = 0


@compiled
def _split(
    x: Array, kept: Array, order: Array, base: int, start: Array, stretch: Array, iterations: int, sample: Array,
    axis: Array, projections: Array, upper: Array,
) -> None:  # fmt: skip
    """Bring the lower half of a node's rows to the front of `order`; ties, and order within a half, by place."""
    dim, size = x.shape[1], order.size
    _axis(x, kept, order, base, start, stretch, iterations, sample, axis)
    for i in range(size):
        number = base + order[i]
        row = x[number]
        dot = row[0] * axis[0]
        for c in range(1, dim):
            dot += row[c] * axis[c]
        projections[i] = dot if kept.size == 0 or kept[number] else np.inf
    half = size // 2
    median = np.partition(projections[:size], half)[half]
    ties = half  # rows at the median that go to the lower half
    for i in range(size):
        ties -= projections[i] < median
    low, high = 0, 0
    for i in range(size):
        number, projection = order[i], projections[i]
        lower = projection < median
        if projection == median and ties > 0:
            lower = True
            ties -= 1
        if lower:
            order[low] = number
            low += 1
        else:
            upper[high] = number
            high += 1
    for i in range(high):
        order[low + i] = upper[i]


@compiled
def _split_nodes(
    x: Array, kept: Array, nodes: Array, low: int, high: int, each: int, n: int, axes: Array, stretch: Array,
    iterations: int,
) -> None:  # fmt: skip
    """Split the nodes from low to high, and their halves, for every start in `axes`; nodes (count, size) in place.

    `each` nodes belong to one task of n rows, which are stretched by stretch (tasks, d).
    """
    size, dim = nodes.shape[1], x.shape[1]
    sample = np.empty((2 * SAMPLE + 1, dim), x.dtype)
    axis, projections, upper = np.empty(dim, x.dtype), np.empty(size, x.dtype), np.empty(size, nodes.dtype)
    for node in range(low, high):
        order, base = nodes[node], node // each * n
        for level in range(len(axes)):
            width = size >> level
            for first in range(0, size, width):
                part = order[first : first + width]
                _split(
                    x, kept, part, base, axes[level], stretch[node // each], iterations, sample, axis, projections,
                    upper,
                )  # fmt: skip


def principal_order(
    x: Array, axes: Any, iterations: int, kept: Array | None, stretch: Array | None = None, *, workers: int
) -> Array:
    """See opoch_xp.backends.generic.tree.principal_order. An axis is found from a sample of a node's rows.

    Within a cell rows keep their order. Cost: a row and level some dot products and a read of the row.
    """
    tasks, n, dim = x.shape
    flat, starts = plain(x).reshape(-1, dim), plain(np.asarray(axes, x.dtype)).reshape(-1, dim)
    mask = NONE if kept is None else plain(kept).reshape(-1)
    factors = np.ones((tasks, dim), x.dtype) if stretch is None else plain(np.asarray(stretch, x.dtype))
    order = np.tile(np.arange(n), (tasks, 1))
    level, whole = 0, len(starts)
    while level < whole and tasks << level < 2 * workers and n >> level > TASK:  # few large nodes: one level at a time
        _each_node(flat, mask, order, starts[level : level + 1], level, factors, iterations, workers)
        level += 1
    if level < whole:
        _each_node(flat, mask, order, starts[level:], level, factors, iterations, workers)
    return order


def _each_node(
    flat: Array, mask: Array, order: Array, starts: Array, level: int, stretch: Array, iterations: int, workers: int
) -> None:
    """Split all nodes of a level for every start, over the threads."""
    tasks, n = order.shape
    nodes, size = tasks << level, n >> level
    runs = order.reshape(nodes, size)
    together = max(1, TASK // max(1, size))

    def work(first: int) -> None:
        last = min(first + together, nodes)
        _split_nodes(flat, mask, runs, first, last, 1 << level, n, starts, stretch, iterations)

    share(work, range(0, nodes, together), workers)
