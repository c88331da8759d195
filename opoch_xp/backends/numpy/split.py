"""Median splits in NumPy: rows into cells that are close in space, level by level, in blocks that stay in cache."""

from typing import Any

import numpy as np

from opoch_xp.backends.numpy.threads import run

SAMPLE = 256  # rows of a node that its axis is found from: a median split does not need it to be finer
CACHED = 4096  # rows: 1 MB of float32 at d = 64, an L2 cache
PARALLEL = 65536  # rows of a node from which on its halves go to different threads


def principal_order(x: np.ndarray, axes: Any, iterations: int, kept: np.ndarray | None) -> np.ndarray:
    """See opoch_xp.backends.generic.tree.principal_order. An axis is found from SAMPLE evenly spaced rows of a node."""
    tasks, n, _ = x.shape
    axes = np.asarray(axes, dtype=x.dtype)
    order = np.empty((tasks, n), np.int64)
    order[...] = np.arange(n)
    nodes = [(t, slice(0, n)) for t in range(tasks)]
    level = 0
    while level < len(axes) and n >> level > PARALLEL:
        halves = run(lambda node: _halve(x, kept, order, node, axes[level], iterations), nodes)  # noqa: B023
        nodes = [half for pair in halves for half in pair]
        level += 1
    if level < len(axes):
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
    rows = x[task].take(index, axis=0)
    alive = None if kept is None else kept[task].take(index)
    buffer = np.empty_like(rows)
    for axis in axes:
        nodes = rows.reshape(-1, size, rows.shape[1])  # (nodes, size, d)
        mask = None if alive is None else alive.reshape(-1, size)
        rank = np.argpartition(_projection(nodes, mask, axis, iterations), size // 2 - 1, axis=1)
        rank += np.arange(0, len(rows), size)[:, None]
        flat = rank.reshape(-1)
        index = index[flat]
        alive = None if alive is None else alive[flat]
        rows, buffer = np.take(rows, flat, axis=0, out=buffer, mode="clip"), rows
        size //= 2
    order[task, span] = index


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
    """Principal axes (nodes, d, 1) of sample (nodes, rows, d) by power iteration from `start` (d,)."""
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
        for length in (np.abs(axis).max(1, keepdims=True), None):
            length = np.sqrt(np.einsum("ndo,ndo->no", axis, axis))[:, None] if length is None else length
            axis = axis / np.where(length > 0, length, 1)
    return axis
