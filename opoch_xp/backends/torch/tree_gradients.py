"""Gradients of the treecode: every part recomputed from q, k, v and the log-sum-exp of the whole softmax.

With the lse of the whole the parts are independent: a row with logit l and value v weighs P = exp(l - lse), and from
the gradient dout of the output, with delta = dout . out - dlse,

    dl = P (dout . v - delta),  dv = P dout.

The trees, the groups and what each group opens are found again by the same calls on the same numbers, so nothing is
kept from the forward pass. Which rows are read is piecewise constant, and has no gradient.

Letters as in `opoch_xp.backends.torch.tree`. Source: Dao et al., FlashAttention, 2022, for dl and delta.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from opoch_xp.backends.torch.exact import exact_backward
from opoch_xp.backends.torch.kernels import build_tree, chosen_lists, query_groups
from opoch_xp.backends.torch.scratch import weights_of
from opoch_xp.backends.torch.split import finite_rows
from opoch_xp.backends.torch.tree import CACHED, Batch, Groups, Level, batches, rows_of, shares
from opoch_xp.forest import first_chunks, key_axes, local_blocks, tier_keys, tier_runs, tiers
from opoch_xp.methods import Treecode
from opoch_xp.problem import Problem
from opoch_xp.tree import Lists, Tree

Gradients = tuple[Tensor, Tensor, Tensor]

HIGHEST = 80.0  # exp of more would overflow float32; the weights it meets are zero then


def forest_backward(problem: Problem, method: Treecode, lse: Tensor, dout: Tensor, delta: Tensor) -> Gradients:
    """Gradients of q, k and v, in the layout of the problem.

    lse (batch, repeat, n_q) of the whole softmax; dout (batch, repeat, n_q, e), the gradient of the output; delta
    (batch, repeat, n_q) = dout . out - (gradient of lse). Memory: the gradients, and a tier's tree twice.
    """
    dq, dk, dv = torch.zeros_like(problem.q), torch.zeros_like(problem.k), torch.zeros_like(problem.v)
    whole = lse, dout, delta
    _local_backward(problem, method, whole, (dq, dk, dv))
    xp = problem.xp
    for tier in tiers(problem.n_q, problem.n_k, problem.causal, method):
        k, v, mask = tier_keys(problem, tier)
        tree = build_tree(k, v, key_axes(tier.number, tier.size, method, k.shape[-1]), method, mask=mask)
        gradients = TreeGradients(tree)
        for runs in tier_runs(problem.q.shape, problem.n_k, method, tier, first_chunks(problem.q.shape[0], tier)):
            queries = runs.of_queries(xp, problem.q)
            parts = (runs.of_queries(xp, x) for x in whole)
            found = gradients.add(queries, runs.first, runs.count, runs.axes, method, problem.scale, *parts)
            dq[:, :, runs.rows] += found.view(dq[:, :, runs.rows].shape)
        keys = slice(tier.low * tier.size, tier.high * tier.size)
        for x, found in zip((dk, dv), gradients.of_keys(), strict=True):
            x[:, keys] += found.view(x[:, keys].shape)
    return dq, dk, dv


def _local_backward(problem: Problem, method: Treecode, whole: Gradients, into: Gradients) -> None:
    """Adds the gradients of the exact parts: see opoch_xp.forest._local_parts."""
    xp, mask, batch = problem.xp, problem.mask, problem.q.shape[0]
    dq, dk, dv = into
    if not problem.causal:
        rest = slice(problem.n_k // method.block * method.block, problem.n_k)
        if rest.start < rest.stop:
            kept = None if mask is None else mask[:, rest]
            k, v = problem.k[:, rest], problem.v[:, rest]
            found = exact_backward(problem.q, k, v, *whole, causal=False, scale=problem.scale, mask=kept)
            for x, gradient in zip((dq, dk[:, rest], dv[:, rest]), found, strict=True):
                x += gradient
        return
    for blocks in local_blocks(problem.n_q, problem.n_k, method):
        found = exact_backward(
            blocks.of_queries(xp, problem.q),
            *(blocks.of_keys(xp, x) for x in (problem.k, problem.v)),
            *(blocks.of_queries(xp, x) for x in whole),
            causal=True,
            scale=problem.scale,
            mask=None if mask is None else blocks.of_keys(xp, mask),
        )
        dq[:, :, blocks.rows] += blocks.joined(xp, found[0], batch)
        for x, gradient in zip((dk, dv), found[1:], strict=True):
            x[:, blocks.keys] += gradient.view(x[:, blocks.keys].shape)


class TreeGradients:
    """Gradients of a tree's cells and summaries, summed over the queries that read them, and then those of its keys."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.cells = torch.zeros_like(tree.cells)
        self.summaries = tuple(torch.zeros_like(a) for a in tree.summaries)

    def add(
        self,
        queries: Tensor,
        first: np.ndarray,
        count: np.ndarray,
        axes: Any,
        method: Treecode,
        scale: float,
        lse: Tensor,
        dout: Tensor,
        delta: Tensor,
    ) -> Tensor:
        """Adds what the queries (T, n, d) read, as `tree_attention` does, and returns their gradient (T, n, d).

        lse (T, n), dout (T, n, e), delta (T, n): see `forest_backward`.
        """
        tasks, n, dim = queries.shape
        given, (queries, finite) = queries, finite_rows(queries)
        groups = query_groups(queries, axes, method)
        lists = chosen_lists(given, self.tree, first, count, axes, method, scale=scale, groups=groups)
        flat = [x.reshape(tasks * n, *x.shape[2:]) for x in (queries, lse, dout, delta)]
        dq = torch.zeros_like(flat[0])
        kernel = _GroupGradients(self, method, scale)
        for batch in batches(groups, n, first, count, self.tree, method):
            votes = None if finite is None else finite.view(-1)[batch.index].to(queries.dtype)
            q, level, slope, rest = (rows_of(x, batch.index) for x in flat)
            chosen = None if lists is None else batch.of(lists)
            found = kernel.backward(q, votes, batch, chosen, level[..., None], slope, rest[..., None])
            dq.index_copy_(0, batch.index.view(-1), found.view(-1, dim))
        return dq.view(tasks, n, dim)

    def of_keys(self) -> tuple[Tensor, Tensor]:
        """Gradients of the keys (chunks, size, d) and values (chunks, size, e) that the tree was built from."""
        tree, dim = self.tree, self.tree.dim
        levels = [a.shape[1] for a in tree.summaries]
        chunks, size, width = tree.cells.shape
        together = max(1, CACHED // size) if tree.cells.device.type == "cpu" else chunks
        dk, dv = tree.cells.new_empty(chunks, size, dim), tree.cells.new_empty(chunks, size, width - dim)
        for c in range(0, chunks, together):
            some = slice(c, min(c + together, chunks))
            for level in range(len(levels) - 1, -1, -1):
                down = tree.cells if level == 0 else tree.summaries[level - 1]
                into = self.cells if level == 0 else self.summaries[level - 1]
                shape = (some.stop - c, levels[level], -1, down.shape[2])
                share = shares(level, tree.counts, tree.kept, some, down[some].view(shape).shape[:3])
                _spread(
                    self.summaries[level][some], tree.summaries[level][some], down[some].view(shape),
                    into[some].view(shape), share, dim,
                )  # fmt: skip
            places = tree.order[some, :, None]
            dk[some].scatter_(1, places.expand(-1, -1, dim), self.cells[some, :, :dim])
            dv[some].scatter_(1, places.expand(-1, -1, width - dim), self.cells[some, :, dim:])
        return dk, dv


def _spread(gradient: Tensor, summary: Tensor, below: Tensor, into: Tensor, share: Tensor | float, dim: int) -> None:
    """Adds the gradient of nodes (chunks, nodes, 2 d + e) to that of their children (chunks, nodes, children, ...)."""
    mean, var, value = (x[:, :, None] for x in gradient.split([dim, dim, gradient.shape[2] - 2 * dim], dim=2))
    spread = below[..., :dim] - summary[:, :, None, :dim]
    into[..., :dim] += (spread.mul_(2 * var) + mean) * share
    if below.shape[3] == gradient.shape[2]:
        into[..., dim : 2 * dim] += var * share
        into[..., 2 * dim :] += value * share
    else:  # the children are keys, which have no variance
        into[..., dim:] += value * share


class _GroupGradients(Groups):
    """Steps 1 to 5 backwards for a batch of groups."""

    def __init__(self, gradients: TreeGradients, method: Treecode, scale: float) -> None:
        super().__init__(gradients.tree, method, scale)
        self.into = [
            a.view(-1, children * a.shape[2]) for a, children in zip(gradients.summaries, self.children, strict=True)
        ]
        self.into_cells = gradients.cells.view(-1, self.tree.leaf * self.width)

    def backward(
        self,
        q: Tensor,
        votes: Tensor | None,
        batch: Batch,
        lists: Lists | None,
        lse: Tensor,
        dout: Tensor,
        delta: Tensor,
    ) -> Tensor:
        """Gradient of queries q (G, g, d), which open `lists` or choose by themselves; lse (G, g, 1), dout (G, g, e),
        delta (G, g, 1)."""
        scaled = q * self.scale
        seen = torch.isfinite(lse)  # a query that sees nothing, or is not finite, weighs nothing
        lse, delta = torch.where(seen, lse, torch.inf), torch.where(seen, delta, 0.0)
        dout = torch.where(seen, dout, 0.0)
        found = torch.zeros_like(scaled)
        for level in self.levels(scaled, votes, batch, lists):
            self.far_backward(scaled, level, lse, dout, delta, found)
            if level.number == 0:
                self.near_backward(scaled, level, batch, lse, dout, delta, found)
                if level.own is not None:
                    self.own_backward(scaled, level, batch, lse, dout, delta, found)
        return found.mul_(self.scale)

    def far_backward(
        self, scaled: Tensor, level: Level, lse: Tensor, dout: Tensor, delta: Tensor, found: Tensor
    ) -> None:
        """Of the nodes of one level that are not opened; adds to `found` (G, g, d)."""
        dim, rows, weight = self.tree.dim, level.rows, level.weight
        factor = (level.lse - lse).clamp_max_(HIGHEST).exp_()  # weight * factor = exp(mass - lse)
        dout = dout * factor
        into = self.scratch("gradient", *rows.shape)
        torch.bmm(weight.mT, dout, out=into[..., 2 * dim :])
        dlogit = torch.bmm(dout, rows[..., 2 * dim :].mT, out=self.scratch("dlogit", *weight.shape))
        dlogit.sub_(delta * factor).mul_(weight)
        torch.bmm(dlogit.mT, scaled, out=into[..., :dim])
        found.baddbmm_(dlogit, rows[..., :dim])
        if level.limit is not None:
            dlogit.mul_(self.slope(level.half, level.limit))
        torch.bmm(dlogit.mT, scaled.square().mul_(0.5), out=into[..., dim : 2 * dim])
        found.addcmul_(torch.bmm(dlogit, rows[..., dim : 2 * dim]), scaled)
        self.into[level.number].index_add_(0, level.family.reshape(-1), into.view(level.family.numel(), -1))

    def slope(self, half: Tensor, limit: Tensor | float) -> Tensor:
        """Derivative of the free energy by half = sigma^2 / 2: one, and sqrt(limit / half) where a node is frozen."""
        floor = limit.clamp_min(0.0) if isinstance(limit, Tensor) else torch.full_like(half[:1, :1, :1], limit)
        slope = torch.div(floor, half, out=self.scratch("frozen", *half.shape)).sqrt_().clamp_max_(1.0)
        return torch.where((half <= limit) | (half <= 0), 1.0, slope)

    def near_backward(
        self, scaled: Tensor, level: Level, batch: Batch, lse: Tensor, dout: Tensor, delta: Tensor, found: Tensor
    ) -> None:
        """Of the cells that a group reads key by key; adds to `found`."""
        dim = self.tree.dim
        cell, keys, logits = self.near_rows(scaled, level, batch)
        weight = weights_of(logits, lse)
        into = self.scratch("gradient", *keys.shape)
        torch.bmm(weight.mT, dout, out=into[..., dim:])
        dlogit = torch.bmm(dout, keys[..., dim:].mT, out=self.scratch("dlogit", *weight.shape))
        dlogit.sub_(delta).mul_(weight)
        torch.bmm(dlogit.mT, scaled, out=into[..., :dim])
        found.baddbmm_(dlogit, keys[..., :dim])
        self.into_cells.index_add_(0, cell.reshape(-1), into.view(cell.numel(), -1))

    def own_backward(
        self, scaled: Tensor, level: Level, batch: Batch, lse: Tensor, dout: Tensor, delta: Tensor, found: Tensor
    ) -> None:
        """Of each query's own cells; adds to `found`."""
        assert level.own is not None
        dim, queries, size = self.tree.dim, lse.numel(), level.own.shape[2] * self.tree.leaf
        flat, slope, found = (x.reshape(queries, 1, -1) for x in (scaled, dout, found))
        lse, delta = lse.reshape(queries, 1), delta.reshape(queries, 1)
        logits = self.scratch("logits", queries, size)
        for some, cell, keys in self.own_rows(scaled, level, batch, logits):
            weight = weights_of(logits[some], lse[some])
            into = self.scratch("own gradient", *keys.shape)
            torch.mul(weight[..., None], slope[some], out=into[..., dim:])
            products = self.scratch("products", *keys.shape[:2], keys.shape[2] - dim)
            dlogit = torch.mul(keys[..., dim:], slope[some], out=products).sum(2).sub_(delta[some]).mul_(weight)
            torch.mul(dlogit[..., None], flat[some], out=into[..., :dim])
            found[some].baddbmm_(dlogit[:, None], keys[..., :dim])
            self.into_cells.index_add_(0, cell.reshape(-1), into.view(cell.numel(), -1))
