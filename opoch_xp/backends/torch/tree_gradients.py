"""Gradients of the treecode: every part recomputed from q, k, v and the log-sum-exp of the whole softmax.

With the lse of the whole the parts are independent: a row with logit l and value v weighs P = exp(l - lse), and from
the gradient dout of the output, with delta = dout . out - dlse,

    dl = P (dout . v - delta),  dv = P dout.

Trees and groups are found again by the same calls on the same numbers, and each part is told again what its queries had
read before, so it opens what it opened. Which rows are read is piecewise constant, and has no gradient; neither has the
balance, which decides where trees are cut. Source: Dao et al., FlashAttention, 2022, for dl and delta.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from opoch_xp.backends.torch.kernels import exact_backward, key_gradients, tier_backward
from opoch_xp.backends.torch.tree_backward import TreeGradients, Whole
from opoch_xp.methods import Treecode
from opoch_xp.problem import Problem
from opoch_xp.treecode.balance import balance_of
from opoch_xp.treecode.forest import Blocks, Sinks, build_tier, exact_blocks, first_chunks, tier_runs, tiers

Gradients = tuple[Tensor, Tensor, Tensor]


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
    mask, stretch = sinks.outside(problem), balance_of(problem.q, problem.n_k, problem.causal, method)
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
        for x, found in zip((dk, dv), key_gradients(tree, into), strict=True):
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
