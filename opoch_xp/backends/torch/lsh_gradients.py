"""Gradients of attention inside shared buckets: the same tiles of pairs again, each part by the lse of the whole.

Centering changes no softmax, so the pairs are taken in the caller's keys; hashing has no gradient.
"""

from typing import Any

import torch
from torch import Tensor

from opoch_xp.backends.generic.buckets import Flat, mean_runs, runs_mean, tilings
from opoch_xp.backends.torch.kernels import exact_backward
from opoch_xp.backends.torch.scratch import weights_of
from opoch_xp.buckets import Buckets
from opoch_xp.hashing import random_hyperplanes
from opoch_xp.lsh import bucket_limit, centered, first_keys
from opoch_xp.methods import LSH
from opoch_xp.problem import Problem

Gradients = tuple[Tensor, Tensor, Tensor]


def lsh_backward(problem: Problem, method: LSH, lse: Tensor, dout: Tensor, delta: Tensor) -> Gradients:
    """Gradients of q, k and v in the layout of the problem; arguments as in `forest_backward`.

    Memory: the gradients and a batch of tiles. Reads the device back, as the forward pass does.
    """
    q, k, v, mask, causal, scale = problem.q, problem.k, problem.v, problem.mask, problem.causal, problem.scale
    if method.bits == 0 and method.max_bucket is None:
        return exact_backward(q, k, v, lse, dout, delta, causal=causal, scale=scale, mask=mask)
    first = first_keys(problem) if method.center and causal else None
    seen = torch.isfinite(lse)
    early = torch.zeros_like(seen) if first is None else (first.seen[:, None] <= first.k.shape[1]).expand(seen.shape)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if first is not None and first.early:
        _early_backward(problem, first, torch.where(early, lse, torch.inf), dout, delta, (dq, dk, dv))

    hashed, _ = centered(problem, method, first)
    planes = random_hyperplanes(k.shape[-1], method.bits, method.tables, method.seed)
    codes = problem.kernels.hash_codes(q, planes), problem.kernels.hash_codes(hashed, planes)
    flat = Flat(problem.xp, (*q.shape[:3], problem.n_k), q.device, causal, mask)
    rows = _Rows(problem, torch.where(seen & ~early, lse, torch.inf), dout, delta)
    read = torch.zeros(len(rows.q), dtype=torch.int64, device=q.device)
    limit = bucket_limit(method, problem.n_k)
    for tiling in tilings(flat, *codes, method.window, limit, k.shape[-1] + v.shape[-1]):
        for tiles in tiling:
            for numbers, counts in tiles.pairs():
                rows.add(tiles.at, numbers, counts)
                read.index_add_(0, tiles.at.reshape(-1), counts.sum(2).reshape(-1))
    alone = (read == 0) & torch.isfinite(rows.lse[:, 0])
    left = alone.nonzero()[:, 0]
    if len(left) and causal:
        rows.add_past(flat, left)
    elif len(left):
        rows.add_field(flat, left, flat.buckets(*flat.numbers(codes[0][:, :, 0, :], codes[1][:, 0, :])))
    found = rows.dq.view(q.shape[0], q.shape[2], q.shape[1], -1).transpose(1, 2)
    return dq + found, dk + rows.dk.view(k.shape), dv + rows.dv.view(v.shape)


class _Rows:
    """All heads as flat lists, queries in the order (batch, position, repeat), and their gradients so far."""

    def __init__(self, problem: Problem, lse: Tensor, dout: Tensor, delta: Tensor) -> None:
        def flat(x: Tensor) -> Tensor:
            return x.transpose(1, 2).reshape(-1, *x.shape[3:])

        keep = torch.isfinite(lse)
        self.scale = problem.scale
        self.q = flat(torch.where(keep[..., None], problem.q, 0.0))
        self.dout = flat(torch.where(keep[..., None], dout, 0.0))
        self.lse, self.delta = flat(lse)[:, None], flat(torch.where(keep, delta, 0.0))[:, None]
        self.k, self.v = problem.k.reshape(-1, problem.k.shape[2]), problem.v.reshape(-1, problem.v.shape[2])
        self.dq, self.dk, self.dv = torch.zeros_like(self.q), torch.zeros_like(self.k), torch.zeros_like(self.v)

    def add(self, at: Tensor, numbers: Tensor, counts: Tensor) -> None:
        """Pairs of the queries `at` (tiles, g) and the keys `numbers` (tiles, m) that count (tiles, g, m)."""
        query, slope, lse, delta = (x[at] for x in (self.q, self.dout, self.lse, self.delta))
        keys, values = self.k[numbers], self.v[numbers]
        weight = torch.bmm(query * self.scale, keys.mT).masked_fill_(~counts, -torch.inf)
        weight = weights_of(weight, lse)
        dlogit = torch.bmm(slope, values.mT).sub_(delta).mul_(weight).mul_(self.scale)
        for into, index, gradient in (
            (self.dq, at, torch.bmm(dlogit, keys)),
            (self.dk, numbers, torch.bmm(dlogit.mT, query)),
            (self.dv, numbers, torch.bmm(weight.mT, slope)),
        ):
            into.index_add_(0, index.reshape(-1), gradient.view(-1, gradient.shape[2]))

    def add_field(self, flat: Flat, left: Tensor, first: Buckets) -> None:
        """Queries `left` that got the mean field of a run of keys: output its mean value, lse its log mass."""
        order, (start, stop), number = mean_runs(flat, left, first)
        mean = runs_mean(flat.xp, self.k, order, start, stop)
        var = runs_mean(flat.xp, self.k, order, start, stop, center=mean)
        value = runs_mean(flat.xp, self.v, order, start, stop)
        count = stop - start
        query, slope = self.scale * self.q[left], self.dout[left]
        dlse = (slope * value[number]).sum(1) - self.delta[left, 0]
        limit = 2 * count.clamp_min(1).to(query.dtype).log()[number]
        sigma2 = (query.square() * var[number]).sum(1)
        frozen = (sigma2 > limit) & (limit > 0)
        energy = dlse * torch.where(frozen, (limit / torch.where(frozen, sigma2, 1.0)).sqrt(), 1.0) / 2
        self.dq[left] += self.scale * (dlse[:, None] * mean[number] + 2 * energy[:, None] * query * var[number])
        dmean, dvar = torch.zeros_like(mean), torch.zeros_like(var)
        dvalue = torch.zeros_like(value)
        dmean.index_add_(0, number, dlse[:, None] * query)
        dvar.index_add_(0, number, energy[:, None] * query.square())
        dvalue.index_add_(0, number, slope)
        run = torch.repeat_interleave(count)  # of every key of every run, in turn: no more than twice the keys
        before = count.cumsum(0) - count
        keys = order[start[run] + torch.arange(len(run), device=run.device) - before[run]]
        share = 1 / count[run].to(query.dtype)[:, None]
        self.dk.index_add_(0, keys, share * (dmean[run] + 2 * (self.k[keys] - mean[run]) * dvar[run]))
        self.dv.index_add_(0, keys, share * dvalue[run])

    def add_past(self, flat: Flat, left: Tensor) -> None:
        """Queries `left` that got the mean value of the kept keys up to their position, lse from their mean key."""
        batch, n_k = flat.shape[0], flat.shape[3]
        kept = torch.ones(len(self.k), device=left.device) if flat.kept is None else flat.kept
        count = kept.view(batch, n_k).to(self.q.dtype).cumsum(1).view(-1, 1)
        place = flat.one_bucket()[0][left] * n_k + flat.position[left]  # of the last key seen; left ones see some
        total = torch.cat([self.k, self.v], 1).view(batch, n_k, -1).cumsum(1).view(len(self.k), -1)[place]
        mean, value = (total / count[place]).split([self.k.shape[1], self.v.shape[1]], 1)
        query, slope = self.scale * self.q[left], self.dout[left]
        dlse = (slope * value).sum(1, keepdim=True) - self.delta[left]
        self.dq[left] += self.scale * dlse * mean
        gradient = torch.zeros_like(torch.cat([self.k, self.v], 1))
        gradient.index_add_(0, place, torch.cat([dlse * query, slope], 1) / count[place])
        gradient = gradient.view(batch, n_k, -1).flip(1).cumsum(1).flip(1).reshape(gradient.shape)
        self.dk += gradient[:, : self.k.shape[1]]
        self.dv += gradient[:, self.k.shape[1] :]


def _early_backward(problem: Problem, first: Any, lse: Tensor, dout: Tensor, delta: Tensor, into: Gradients) -> None:
    """Adds the gradients of the queries that see only the first keys, exactly; lse is inf for all others."""
    rows, (dq, dk, dv) = slice(0, first.early), into
    number = torch.arange(first.k.shape[1], device=lse.device)
    hidden = number >= first.seen[:, None, rows, None]  # (batch or 1, 1, rows, m)
    lse = lse[:, :, rows, None]
    keep = torch.isfinite(lse)
    q, dout = (torch.where(keep, x[:, :, rows], 0.0) for x in (problem.q, dout))
    delta = torch.where(keep, delta[:, :, rows, None], 0.0)
    keys, values = first.k[:, None], first.v[:, None]
    weight = weights_of(
        (problem.scale * q @ keys.mT).masked_fill_(hidden, -torch.inf), torch.where(keep, lse, torch.inf)
    )
    dlogit = (dout @ values.mT - delta) * weight * problem.scale
    dq[:, :, rows] += dlogit @ keys
    for x, gradient in ((dk, dlogit.mT @ q), (dv, weight.mT @ dout)):
        gradient = gradient.sum(1)
        if first.order is None:
            x[:, : gradient.shape[1]] += gradient
        else:
            x.scatter_add_(1, first.order[:, :, None].expand_as(gradient), gradient)
