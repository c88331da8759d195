"""Median splits in NumPy: rows into cells that are close in space, level by level, many nodes a call."""

from typing import Any

import numpy as np

from opoch_xp.backends.numpy.pool import run

SAMPLE = 256  # rows of a node that its axis is found from: a median split does not need it to be finer
CACHED = 16384  # rows split together: 4 MB of float32 at d = 64, in the L3 cache, and calls long enough for threads
PARALLEL = 65536  # rows of a node from which on its halves go to different threads


def principal_order(
    x: np.ndarray, axes: Any, iterations: int, kept: np.ndarray | None, stretch: np.ndarray | None = None
) -> np.ndarray:
    """See opoch_xp.backends.generic.tree.principal_order. An axis is found from SAMPLE evenly spaced rows of a node."""
    tasks, n, dim = x.shape
    x = x if stretch is None else x * stretch[:, None]
    axes = np.asarray(axes, dtype=x.dtype)
    order = np.empty((tasks, n), np.int64)
    order[...] = np.arange(n)
    if n <= CACHED:
        step = CACHED // n

        def whole(t: int) -> None:
            rows = x[t : t + step].reshape(-1, dim)
            alive = None if kept is None else kept[t : t + step].reshape(-1)
            index = _split_all(rows, alive, n, axes, iterations).reshape(-1, n)
            order[t : t + step] = index - np.arange(0, len(rows), n)[:, None]

        run(whole, range(0, tasks, step))
        return order
    nodes = [(t, slice(0, n)) for t in range(tasks)]
    level = 0
    while level < len(axes) and n >> level > PARALLEL:
        halves = run(lambda node: _halve(x, kept, order, node, axes[level], iterations), nodes)  # noqa: B023
        nodes = [half for pair in halves for half in pair]
        level += 1
    run(lambda node: _descend(x, kept, order, node, axes[level:], iterations), nodes)
    return order


def _descend(
    x: np.ndarray,
    kept: np.ndarray | None,
    order: np.ndarray,
    node: tuple[int, slice],
    axes: np.ndarray,
    iterations: int,
) -> None:
    """All levels of one node: halved until its rows fit in cache, then level by level over all its nodes at once."""
    task, span = node
    size = span.stop - span.start
    if size > CACHED and len(axes):
        for half in _halve(x, kept, order, node, axes[0], iterations):
            _descend(x, kept, order, half, axes[1:], iterations)
        return
    index = order[task, span]
    alive = None if kept is None else kept[task].take(index)
    order[task, span] = index[_split_all(x[task].take(index, axis=0), alive, size, axes, iterations)]


def _split_all(rows: np.ndarray, alive: np.ndarray | None, size: int, axes: np.ndarray, iterations: int) -> np.ndarray:
    """Order of rows (n, d), nodes of `size` rows one after another, after a split of every node for each of `axes`."""
    index = np.arange(len(rows))
    buffers = np.empty_like(rows), np.empty_like(rows)  # the caller's rows are never written to
    for level, axis in enumerate(axes):
        nodes = rows.reshape(-1, size, rows.shape[1])  # (nodes, size, d)
        mask = None if alive is None else alive.reshape(-1, size)
        rank = np.argpartition(_projection(nodes, mask, axis, iterations), size // 2 - 1, axis=1)
        rank += np.arange(0, len(rows), size)[:, None]
        flat = rank.reshape(-1)
        index = index.take(flat)
        alive = None if alive is None else alive.take(flat)
        rows = rows.take(flat, axis=0, out=buffers[level % 2], mode="clip")
        size //= 2
    return index


def _halve(
    x: np.ndarray,
    kept: np.ndarray | None,
    order: np.ndarray,
    node: tuple[int, slice],
    axis: np.ndarray,
    iterations: int,
) -> tuple[tuple[int, slice], tuple[int, slice]]:
    """Reorder the rows of one node so that its lower half by projection comes first; its two halves."""
    task, span = node
    index = order[task, span]
    size = len(index)
    stride = max(1, size // SAMPLE)
    some = None if kept is None else kept[task].take(index[::stride])[None]
    direction = _axis(x[task].take(index[::stride], axis=0)[None], some, axis, iterations)[0]
    projection = np.concatenate(
        [x[task].take(index[s : s + CACHED], axis=0) @ direction for s in range(0, size, CACHED)], axis=0
    )[:, 0]
    if kept is not None:
        projection[~kept[task].take(index)] = np.inf
    order[task, span] = index[np.argpartition(projection, size // 2 - 1)]
    middle = span.start + size // 2
    return (task, slice(span.start, middle)), (task, slice(middle, span.stop))


def _projection(nodes: np.ndarray, kept: np.ndarray | None, axis: np.ndarray, iterations: int) -> np.ndarray:
    """Of every row on its node's axis, (nodes, size); rows that are not kept are at infinity."""
    stride = max(1, nodes.shape[1] // SAMPLE)
    some = None if kept is None else kept[:, ::stride]
    projection = (nodes @ _axis(nodes[:, ::stride], some, axis, iterations))[..., 0]
    if kept is not None:
        projection[~kept] = np.inf
    return projection


def _axis(sample: np.ndarray, kept: np.ndarray | None, start: np.ndarray, iterations: int) -> np.ndarray:
    """Principal axes (nodes, d, 1), of any length, of sample (nodes, rows, d): power iteration from `start` (d,)."""
    axis = np.broadcast_to(start[:, None], (len(sample), len(start), 1))
    if not iterations:
        return axis
    if kept is None:
        centered = sample - sample.mean(1, keepdims=True)
    else:
        weight = kept[..., None].astype(sample.dtype)
        count = np.maximum(weight.sum(1, keepdims=True), 1)
        centered = (sample - (sample * weight).sum(1, keepdims=True) / count) * weight
    turned = centered.transpose(0, 2, 1)
    for _ in range(iterations):
        axis = turned @ (centered @ axis)
        largest = np.abs(axis).max(1, keepdims=True)  # only the direction matters: this keeps it within the dtype
        axis /= np.where(largest > 0, largest, 1)
    return axis
