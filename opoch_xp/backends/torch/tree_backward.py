"""Gradients of a part of the treecode's softmax, in PyTorch: of its queries, of the tree that they read, and from that
of the tree's keys. See opoch_xp.backends.torch.tree_gradients.

Letters: T tasks, F groups of a batch, g queries of each, m candidates, u cells that some query reads, d and e the
widths of keys and values.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opoch_xp.backends.generic.tree import Level, cell_keys, walk
from opoch_xp.backends.torch.scratch import weights_of
from opoch_xp.backends.torch.tree import Batch, batches, top
from opoch_xp.methods import Treecode
from opoch_xp.treecode.law import coefficients
from opoch_xp.treecode.tree import Tree

CACHED = 16384  # keys whose gradients are brought down a tree at a time on the CPU: 8 MB with their values at d = 64


@dataclass(frozen=True)
class Whole:
    """What a part is told of the whole softmax, for each query (...,): lse (...,), inf for a query that weighs nothing;
    dout (..., e), the gradient of its output; delta (...,) = dout . out - (gradient of lse)."""

    lse: Tensor
    dout: Tensor
    delta: Tensor

    def where(self, there: Tensor) -> "Whole":
        """Where queries are not `there` (...,) they weigh nothing."""
        return Whole(
            torch.where(there, self.lse, torch.inf),
            torch.where(there[..., None], self.dout, 0.0),
            torch.where(there, self.delta, 0.0),
        )


@dataclass(frozen=True)
class TreeGradients:
    """Gradients of a tree's cells and summaries, laid out as they are, summed over the queries that read them."""

    cells: Tensor
    summaries: tuple[Tensor, ...]

    @classmethod
    def of(cls, tree: Tree) -> "TreeGradients":
        """Zeros, as of queries that read nothing."""
        return cls(torch.zeros_like(tree.cells), tuple(torch.zeros_like(a) for a in tree.summaries))


def tier_backward(
    queries: Tensor,
    tree: Tree,
    first: np.ndarray,
    count: np.ndarray,
    groups: Tensor,
    method: Treecode,
    *,
    scale: float,
    seen: Tensor,
    whole: Whole,
    into: TreeGradients,
) -> Tensor:
    """Gradient of the queries (T, n, d) of a part of the softmax; adds those of cells and summaries to `into`.

    Arguments as of opoch_xp.backends.generic.tree.tree_attention; whole: of these queries, (T, n, ...).
    """
    tasks, n, dim = queries.shape
    dq = queries.new_zeros(tasks * n + 1, dim)  # the last row is nobody's: that of padding
    flat = [x.reshape(tasks * n, *x.shape[2:]) for x in (whole.lse, whole.dout, whole.delta)]
    for batch in batches(queries, tree, first, count, groups, method, seen):
        rows = batch.rows.clamp_max(tasks * n - 1)
        some = Whole(*(x[rows] for x in flat)).where(batch.group.voters)
        found = _batch_backward(batch, tree, method, scale, some, into)
        dq.index_copy_(0, batch.rows.view(-1), found.view(-1, dim))
    return dq[:-1].view(tasks, n, dim)


def _batch_backward(
    batch: Batch, tree: Tree, method: Treecode, scale: float, whole: Whole, into: TreeGradients
) -> Tensor:
    """Gradient (F, g, d) of the queries of a batch."""
    dim, scaled = tree.dim, batch.group.q * scale
    found = torch.zeros_like(scaled)
    for level in walk(batch.group, tree, method, scale, None, top(method)):
        logits, rows = torch.where(level.closed, level.mass, -torch.inf), level.rows
        dlogit, dvalue = _softmax_backward(logits, rows[..., 2 * dim :], whole)
        dsigma2 = dlogit * _slope(level)
        mean, var = rows[..., :dim], rows[..., dim : 2 * dim]
        found += torch.bmm(dlogit, mean) + 2 * scaled * torch.bmm(dsigma2, var)
        dmean, dvar = torch.bmm(dlogit.mT, scaled), torch.bmm(dsigma2.mT, scaled.square())
        _add(into.summaries[level.number], level.node, torch.cat([dmean, dvar, dvalue], 2))
    keys, logits = cell_keys(level, tree, scaled)
    dlogit, dvalue = _softmax_backward(logits, keys[..., dim:], whole)
    found += torch.bmm(dlogit, keys[..., :dim])
    _add(into.cells, level.cells, torch.cat([torch.bmm(dlogit.mT, scaled), dvalue], 2))
    return found.mul_(scale)


def _softmax_backward(logits: Tensor, values: Tensor, whole: Whole) -> tuple[Tensor, Tensor]:
    """Gradients of logits (F, g, m), which are lost, and values (F, m, e)."""
    weight = weights_of(logits, whole.lse[..., None])
    dlogit = torch.bmm(whole.dout, values.mT).sub_(whole.delta[..., None]).mul_(weight)
    return dlogit, torch.bmm(weight.mT, whole.dout)


def _slope(level: Level) -> Tensor:
    """Derivative of the log masses of nodes by their variance sigma2 (F, g, m): see opoch_xp.treecode.law.log_gain."""
    c = coefficients(level.count)
    return 0.5 * c.gain * c.width * torch.rsqrt(1 + level.sigma2 * c.width)


def _add(into: Tensor, number: Tensor, gradient: Tensor) -> None:
    """Adds the gradient of runs of rows, number (F, k) of them, to that of all rows (chunks, rows, w)."""
    if number.numel():
        gradient = gradient.reshape(number.numel(), -1)
        into.view(-1, gradient.shape[1]).index_add_(0, number.reshape(-1), gradient)


def key_gradients(tree: Tree, found: TreeGradients) -> tuple[Tensor, Tensor]:
    """Gradients of the keys (chunks, size, d) and values (chunks, size, e) that a tree was built from, from those of
    its cells and summaries, which are lost."""
    dim = tree.dim
    chunks, size, width = tree.cells.shape
    together = max(1, CACHED // size) if tree.cells.device.type == "cpu" else chunks
    dk, dv = tree.cells.new_empty(chunks, size, dim), tree.cells.new_empty(chunks, size, width - dim)
    for c in range(0, chunks, together):
        some = slice(c, min(c + together, chunks))
        for level in range(len(tree.summaries) - 1, -1, -1):
            _spread(tree, found, level, some)
        places = tree.order[some, :, None]
        dk[some].scatter_(1, places.expand(-1, -1, dim), found.cells[some, :, :dim])
        dv[some].scatter_(1, places.expand(-1, -1, width - dim), found.cells[some, :, dim:])
    return dk, dv


def _spread(tree: Tree, found: TreeGradients, level: int, some: slice) -> None:
    """Adds the gradient of a level's nodes, of some chunks, to that of their children: nodes, or keys."""
    dim, gradient, summary = tree.dim, found.summaries[level][some], tree.summaries[level][some]
    down, into = (tree.summaries[level - 1], found.summaries[level - 1]) if level else (tree.cells, found.cells)
    shape = (*gradient.shape[:2], -1, down.shape[2])
    below, into = down[some].view(shape), into[some].view(shape)
    share = _shares(tree, level, some, below.shape[:3])
    mean, var, value = (x[:, :, None] for x in gradient.split([dim, dim, gradient.shape[2] - 2 * dim], dim=2))
    spread = below[..., :dim] - summary[:, :, None, :dim]
    into[..., :dim] += (spread.mul_(2 * var) + mean) * share
    if level:
        into[..., dim : 2 * dim] += var * share
    into[..., 2 * dim if level else dim :] += value * share


def _shares(tree: Tree, level: int, some: slice, shape: torch.Size) -> Tensor | float:
    """What each child weighs in its node, (chunks, nodes, children, 1): its part of the node's keys."""
    if tree.counts is None or tree.kept is None:
        return 1 / shape[2]
    children = tree.kept[some].to(tree.cells.dtype) if level == 0 else tree.counts[level - 1][some]
    return (children.reshape(shape) / tree.counts[level][some].clamp_min(1)[..., None])[..., None]
