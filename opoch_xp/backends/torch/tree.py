"""The treecode's kernels in PyTorch, for tensors that the compiled kernels do not take: the generic steps, some groups
of queries at a time, and Triton's kernel in place of the last of them on CUDA.

Groups go by the number of chunks that they read, so that a batch wastes little on candidates that are not there. On a
CPU a batch is small enough for its arrays to stay in the L3 cache; elsewhere it is large, and one number is read back a
level and batch: how many nodes the group that opens most of them opens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opoch_xp.backends import generic
from opoch_xp.backends.generic.tree import Group, attend_groups, finite_rows, grouped_rows, largest, rows_at_once
from opoch_xp.backends.torch.split import principal_order
from opoch_xp.methods import Treecode
from opoch_xp.treecode.plan import group_count
from opoch_xp.treecode.tree import Lists, Part, Tree

ELEMENTS = {"cpu": 1 << 20}  # numbers of the largest array of a batch, about: 4 MB in float32
ELSEWHERE = 1 << 26  # 256 MB

Top = Callable[[Tensor, int], Tensor]
Attend = Callable[[Group, Tree, Treecode, float, Lists | None, Top], tuple[Tensor, Tensor, Tensor]]  # out, lse, read


def build_tree(
    k: Tensor, v: Tensor, axes: Any, method: Treecode, *, mask: Tensor | None = None, order: Tensor | None = None,
    stretch: Tensor | None = None,
) -> Tree:  # fmt: skip
    """See opoch_xp.backends.generic.tree.build_tree."""
    if order is None:
        order = principal_order(k, axes, method.iterations, mask, stretch)
    return generic.build_tree(k, v, axes, method, mask=mask, order=order)


def query_groups(queries: Tensor, axes: Any, method: Treecode, *, stretch: Tensor | None = None) -> Tensor:
    """See opoch_xp.backends.generic.tree.query_groups."""
    return grouped_rows(queries, axes, method, stretch, principal_order)


def tree_attention(
    queries: Tensor,
    tree: Tree,
    first: np.ndarray,
    count: np.ndarray,
    groups: Tensor,
    method: Treecode,
    *,
    scale: float,
    seen: Tensor,
    lists: Lists | None = None,
) -> Part:
    """See opoch_xp.backends.generic.tree.tree_attention."""
    tasks, n, _ = queries.shape
    width, attend = tree.cells.shape[2] - tree.dim, attend_for(tree)
    out = queries.new_zeros(tasks * n + 1, width)  # the last row is nobody's: what padding reads
    lse = queries.new_full((tasks * n + 1,), -torch.inf)
    read = queries.new_zeros(tasks, 3)
    for batch in batches(queries, tree, first, count, groups, method, seen):
        found = attend(batch.group, tree, method, scale, None if lists is None else batch.of(lists), top(method))
        out.index_copy_(0, batch.rows.view(-1), found[0].reshape(-1, width))
        lse.index_copy_(0, batch.rows.view(-1), found[1].reshape(-1))
        read.index_add_(0, batch.task, found[2])
    out, lse = out[:-1].view(tasks, n, width), lse[:-1].view(tasks, n)
    finite = finite_rows(queries)
    return Part(torch.where(finite[..., None], out, torch.nan), torch.where(finite, lse, torch.nan), read)


@dataclass(frozen=True)
class Batch:
    """Some groups: number (F,) of each among those of all tasks, task (F,) it belongs to; rows (F, g) of its queries
    among those of all tasks, as many as there are for padding; and what `walk` takes of it."""

    number: Tensor
    task: Tensor
    rows: Tensor
    group: Group

    def of(self, lists: Lists) -> Lists:
        """The lists of these groups, of those of all."""
        return Lists(tuple(a[self.number] for a in lists.opened), lists.cells[self.number], lists.reads[self.number])


def batches(
    queries: Tensor, tree: Tree, first: np.ndarray, count: np.ndarray, groups: Tensor, method: Treecode, seen: Tensor
) -> Iterator[Batch]:
    """The groups that have something to read, some at a time; arguments as of `tree_attention`."""
    tasks, n, dim = queries.shape
    total, here = group_count(n, method.group), queries.device
    base = torch.arange(0, tasks * n, max(n, 1), device=here)[:, None]
    rows = torch.where(groups < n, groups + base, tasks * n).reshape(tasks * total, -1)
    finite = finite_rows(queries)
    flat = torch.where(finite[..., None], queries, 0.0).reshape(tasks * n, dim)
    finite, seen = finite.reshape(-1), seen.reshape(-1)
    first, count = (np.asarray(x, np.int64).repeat(total) for x in (first, count))
    left = np.argsort(-count, kind="stable")[: np.count_nonzero(count)]
    while len(left):
        widest = int(count[left[0]])
        some = left[: _together(tree, widest, method, rows.shape[1])]
        left = left[len(some) :]
        figures = (torch.as_tensor(x).to(here, non_blocking=True) for x in (some, first[some], count[some]))
        number, start, chunks = figures
        index = rows[number]
        held = index < tasks * n
        row = torch.where(held, index, 0)
        group = Group(flat[row], seen[row], held & finite[row], start, chunks, widest)
        yield Batch(number, number // total, index, group)


def _together(tree: Tree, chunks: int, method: Treecode, rows: int) -> int:
    """How many groups of so many rows make a batch, where one reads so many chunks."""
    if method.rtol == 0 and method.most is None:  # which opens everything
        method = replace(method, most=chunks * tree.summaries[0].shape[1])
    elements = ELEMENTS.get(tree.summaries[-1].device.type, ELSEWHERE)
    return max(1, elements // (rows * rows_at_once(tree, chunks, method)))


def top(method: Treecode) -> Top:
    """`largest` of the generic kernels, which picks what a bound leaves by one order; without a bound any will do."""
    return _picked if method.most is None else largest


def _picked(x: Tensor, count: int) -> Tensor:
    return x.topk(count, dim=-1, sorted=False).indices


def attend_for(tree: Tree) -> Attend:
    """What reads a batch: Triton's kernel for CUDA tensors that it takes, the generic steps otherwise."""
    arrays = (tree.cells, *tree.summaries)
    if find_spec("triton") is None or not all(isinstance(x, Tensor) and x.is_cuda for x in arrays):
        return _attend_plainly
    from opoch_xp.backends.torch.fused import FusedGroups, supports

    kind = tree.cells.dtype, tree.dim, tree.cells.shape[2] - tree.dim
    return FusedGroups(tree) if supports(*kind) else _attend_plainly


def _attend_plainly(
    group: Group, tree: Tree, method: Treecode, scale: float, lists: Lists | None, top: Top
) -> tuple[Tensor, Tensor, Tensor]:
    return attend_groups(group, tree, method, scale, lists, top)[:3]
