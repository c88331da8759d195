"""Gradients of the treecode: every part recomputed from q, k, v and the log-sum-exp of the whole softmax.

With the lse of the whole the parts are independent: a row with logit l and value v weighs P = exp(l - lse), and from
the gradient dout of the output, with delta = dout . out - dlse,

    dl = P (dout . v - delta),  dv = P dout.

Trees and groups are found again by the same calls on the same numbers, and each part is told again what its queries had
read before, so it opens what it opened. Which rows are read is piecewise constant, and has no gradient; neither has the
balance, which decides where trees are cut.

Letters: T tasks, F groups of a batch, g queries of each, m candidates, u cells that some query reads, d and e the
widths of keys and values. Source: Dao et al., FlashAttention, 2022, for dl and delta.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opoch_xp.backends.generic.tree import Level, cell_keys, walk
from opoch_xp.backends.torch.exact import exact_backward
from opoch_xp.backends.torch.scratch import weights_of
from opoch_xp.backends.torch.tree import Batch, batches, top
from opoch_xp.methods import Treecode
from opoch_xp.problem import Problem
from opoch_xp.treecode.balance import balance_of
from opoch_xp.treecode.forest import Blocks, Sinks, build_tier, exact_blocks, first_chunks, tier_runs, tiers
from opoch_xp.treecode.law import coefficients
from opoch_xp.treecode.tree import Tree

Gradients = tuple[Tensor, Tensor, Tensor]

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


def forest_backward(
    problem: Problem, method: Treecode, lse: Tensor, seen: Tensor, dout: Tensor, delta: Tensor
) -> Gradients:
    """Gradients of q, k and v, in the layout of the problem.

    lse (batch, repeat, n_q) of the whole softmax; seen (batch, repeat, n_q, tiers), what the part of each tier was told
    that its queries had read; dout (batch, repeat, n_q, e) and delta (batch, repeat, n_q) as in `Whole`. Memory: the
    gradients, and a tier's tree twice.
    """
    dq, dk, dv = torch.zeros_like(problem.q), torch.zeros_like(problem.k), torch.zeros_like(problem.v)
    whole = Whole(lse, dout, delta).where(torch.isfinite(lse))
    sinks = Sinks.of(problem, method)
    for blocks in exact_blocks(problem, method):
        _local_backward(problem, method, blocks, sinks, whole, (dq, dk, dv))
    xp, batch = problem.xp, problem.q.shape[0]
    mask, stretch = problem.mask, balance_of(problem.q, problem.n_k, problem.causal, method)
    for tier in tiers(problem.n_q, problem.n_k, problem.causal, method):
        tree = build_tier(problem, method, tier, mask, stretch)
        into, first = TreeGradients.of(tree), first_chunks(batch, tier)
        for runs in tier_runs(problem.q.shape, problem.n_k, method, tier, first, stretch):
            queries, before, *parts = (
                runs.of_queries(xp, x) for x in (problem.q, seen[..., tier.number], whole.lse, whole.dout, whole.delta)
            )
            groups = runs.groups(problem, method)
            found = tier_backward(
                queries, tree, runs.first, runs.count, groups, method, scale=problem.scale, seen=before,
                whole=Whole(*parts), into=into,
            )  # fmt: skip
            dq[:, :, runs.rows] += found.view(dq[:, :, runs.rows].shape)
        keys = slice(tier.low * tier.size, tier.high * tier.size)
        for x, found in zip((dk, dv), into.of_keys(), strict=True):
            x[:, keys] += found.view(x[:, keys].shape)
    return dq, dk, dv


def _local_backward(
    problem: Problem, method: Treecode, blocks: Blocks, sinks: Sinks, whole: Whole, into: Gradients
) -> None:
    """Adds the gradients of what the queries of some blocks read exactly: see opoch_xp.treecode.forest.attend_local."""
    xp, batch, (dq, dk, dv) = problem.xp, problem.q.shape[0], into
    queries, *parts = (blocks.of_queries(xp, x) for x in (problem.q, whole.lse, whole.dout, whole.delta))
    if blocks.keys.start < blocks.keys.stop:
        k, v = (blocks.of_keys(xp, x) for x in (problem.k, problem.v))
        mask = None if problem.mask is None else blocks.of_keys(xp, problem.mask)
        found = exact_backward(queries, k, v, *parts, causal=problem.causal, scale=problem.scale, mask=mask)
        dq[:, :, blocks.rows] += blocks.joined(xp, found[0], batch)
        for x, gradient in zip((dk, dv), found[1:], strict=True):
            x[:, blocks.keys] += gradient.view(x[:, blocks.keys].shape)
    start = blocks.keys.start + np.arange(blocks.chunks) * method.block
    if sinks.k.shape[1] and start[-1] > 0:
        k, v, there = sinks.before(xp, start)
        found = exact_backward(queries, k, v, *parts, causal=False, scale=problem.scale, mask=there)
        dq[:, :, blocks.rows] += blocks.joined(xp, found[0], batch)
        place: Any = sinks.position
        if isinstance(place, np.ndarray):  # as where no key is masked
            place = torch.from_numpy(place.copy()).to(dk.device)
        place = place[..., None]
        for x, gradient in zip((dk, dv), found[1:], strict=True):
            gradient = gradient.view(batch, blocks.chunks, *gradient.shape[1:]).sum(1)  # the same sinks for each block
            x.scatter_add_(1, place.expand_as(gradient), gradient)


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
    into: "TreeGradients",
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
    batch: Batch, tree: Tree, method: Treecode, scale: float, whole: Whole, into: "TreeGradients"
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


@dataclass(frozen=True)
class TreeGradients:
    """Gradients of a tree's cells and summaries, summed over the queries that read them, and then those of its keys."""

    tree: Tree
    cells: Tensor
    summaries: tuple[Tensor, ...]

    @classmethod
    def of(cls, tree: Tree) -> "TreeGradients":
        """Zeros, as of queries that read nothing."""
        return cls(tree, torch.zeros_like(tree.cells), tuple(torch.zeros_like(a) for a in tree.summaries))

    def of_keys(self) -> tuple[Tensor, Tensor]:
        """Gradients of the keys (chunks, size, d) and values (chunks, size, e) that the tree was built from."""
        tree, dim = self.tree, self.tree.dim
        chunks, size, width = tree.cells.shape
        together = max(1, CACHED // size) if tree.cells.device.type == "cpu" else chunks
        dk, dv = tree.cells.new_empty(chunks, size, dim), tree.cells.new_empty(chunks, size, width - dim)
        for c in range(0, chunks, together):
            some = slice(c, min(c + together, chunks))
            for level in range(len(tree.summaries) - 1, -1, -1):
                self._spread(level, some)
            places = tree.order[some, :, None]
            dk[some].scatter_(1, places.expand(-1, -1, dim), self.cells[some, :, :dim])
            dv[some].scatter_(1, places.expand(-1, -1, width - dim), self.cells[some, :, dim:])
        return dk, dv

    def _spread(self, level: int, some: slice) -> None:
        """Adds the gradient of a level's nodes, of some chunks, to that of their children: nodes, or keys."""
        tree, dim, gradient, summary = self.tree, self.tree.dim, self.summaries[level][some], self.tree.summaries[level]
        down, into = (tree.cells, self.cells) if level == 0 else (tree.summaries[level - 1], self.summaries[level - 1])
        shape = (*gradient.shape[:2], -1, down.shape[2])
        below, into = down[some].view(shape), into[some].view(shape)
        share = _shares(tree, level, some, below.shape[:3])
        mean, var, value = (x[:, :, None] for x in gradient.split([dim, dim, gradient.shape[2] - 2 * dim], dim=2))
        spread = below[..., :dim] - summary[some, :, None, :dim]
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
