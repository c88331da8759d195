"""Median splits by principal axes in PyTorch: rows in blocks that stay in cache, all nodes of a block at a time.

What was tried for 16,384 rows of 64 in float32, two cores, microseconds: row sums of a product (`vecdot`) 230 whatever
the size of a node, batched products with one column 720 to 1,250; the lower half of each node by `topk` and a mask 250,
by sorting 300 to 600; a gather of the rows 220.
"""

from typing import Any

import torch
from torch import Tensor

from opoch_xp.backends.torch.scratch import Scratch

SAMPLE = 128  # rows of a node that its axis is found from: a median split does not need it to be finer
CACHED = 16384  # rows split together on the CPU: 4 MB of float32 at d = 64, in the L3 cache


def principal_order(
    x: Tensor, axes: Any, iterations: int, kept: Tensor | None, stretch: Tensor | None = None
) -> Tensor:
    """See opoch_xp.backends.generic.tree.principal_order. An axis is found from SAMPLE evenly spaced rows of a node."""
    tasks, n, _ = x.shape
    x = x if stretch is None else x * stretch[:, None]
    starts = torch.as_tensor(axes, dtype=x.dtype).to(x.device, non_blocking=True)
    cached = CACHED if x.device.type == "cpu" else max(1, x[..., 0].numel())
    scratch = Scratch(x)
    if n <= cached:
        step = cached // n
        found = [
            _split_all(x[t : t + step], None if kept is None else kept[t : t + step], starts, iterations, scratch)
            for t in range(0, tasks, step)
        ]
        return torch.cat(found) if len(found) > 1 else found[0]
    order = torch.arange(n, device=x.device).repeat(tasks, 1)
    for t in range(tasks):
        _descend(x[t], None if kept is None else kept[t], order[t], starts, iterations, scratch)
    return order


def _descend(x: Tensor, kept: Tensor | None, order: Tensor, starts: Tensor, iterations: int, scratch: Scratch) -> None:
    """Order the rows x[order], x (n, d), in place: halves until they fit in cache, then a part's levels at once."""
    size = len(order)
    if size <= CACHED or not len(starts):
        rows = scratch.gather("rows", x, order)
        alive = None if kept is None else kept[order][None]
        order.copy_(order[_split_all(rows[None], alive, starts, iterations, scratch)[0]])
        return
    stride = max(1, size // SAMPLE)
    some = order[::stride]
    axis = _axis(x[some][None], None if kept is None else kept[some][None], starts[0], iterations)[0, 0]
    projection = torch.mv(x, axis)[order]
    if kept is not None:
        projection = torch.where(kept[order], projection, torch.inf)
    order.copy_(order[_halves(projection[None])[0]])
    for half in (order[: size // 2], order[size // 2 :]):
        _descend(x, kept, half, starts[1:], iterations, scratch)


def _split_all(rows: Tensor, alive: Tensor | None, starts: Tensor, iterations: int, scratch: Scratch) -> Tensor:
    """Order (nodes, size) of the rows (nodes, size, d) of each node after a split of every node for each start."""
    nodes, size, dim = rows.shape
    index = torch.arange(size, device=rows.device).expand(nodes, size)
    flat, alive = rows.reshape(-1, dim), None if alive is None else alive.reshape(-1)
    for level, start in enumerate(starts):
        width = size >> level
        node, mask = flat.view(-1, width, dim), None if alive is None else alive.view(-1, width)
        stride = max(1, width // SAMPLE)
        axis = _axis(node[:, ::stride], None if mask is None else mask[:, ::stride], start, iterations)
        projection = torch.linalg.vecdot(node, axis)
        if mask is not None:
            projection = torch.where(mask, projection, torch.inf)
        rank = _halves(projection)
        index = index.reshape(-1, width).gather(1, rank).view(nodes, size)
        if level + 1 == len(starts):
            break
        rank = (rank + torch.arange(0, len(flat), width, device=rows.device)[:, None]).reshape(-1)
        flat = scratch.gather(f"split {level % 2}", flat, rank)
        alive = None if alive is None else alive[rank]
    return index


def _halves(projection: Tensor) -> Tensor:
    """Places (nodes, size) of each row's lower half, in any order, and then of its upper half."""
    nodes, size = projection.shape
    if projection.device.type != "cpu":
        return projection.argsort(dim=1, stable=True)
    lower = projection.topk(size // 2, dim=1, largest=False, sorted=False).indices
    above = torch.ones(nodes, size, dtype=torch.bool).scatter_(1, lower, False)
    upper = above.nonzero()[:, 1].view(nodes, size - size // 2)
    return torch.cat([lower, upper], 1)


def _axis(sample: Tensor, kept: Tensor | None, start: Tensor, iterations: int) -> Tensor:
    """Principal axes (nodes, 1, d), of any length, of sample (nodes, rows, d): power iteration from `start` (d,)."""
    if not iterations:
        return start.expand(len(sample), 1, -1)
    if kept is None:
        centered = sample - sample.mean(1, keepdim=True)
    else:
        weight = kept[..., None].to(sample.dtype)
        count = weight.sum(1, keepdim=True).clamp_min(1)
        centered = (sample - (sample * weight).sum(1, keepdim=True) / count) * weight
    moment = torch.bmm(centered.mT, centered) if sample.shape[1] >= sample.shape[2] else None  # (nodes, d, d)
    axis = start.expand(len(sample), 1, -1)
    for _ in range(iterations):
        if moment is None:
            axis = torch.bmm(torch.bmm(axis, centered.mT), centered)
        else:
            axis = torch.linalg.vecdot(moment, axis)[:, None]
        largest = axis.abs().amax(2, keepdim=True)  # only the direction matters: this keeps it within the dtype
        axis = axis / torch.where(largest > 0, largest, 1)
    return axis
