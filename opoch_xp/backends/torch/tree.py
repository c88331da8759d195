"""The treecode's kernels in PyTorch: a few groups of queries at a time, every step one batched product or one pass.

On the CPU a batch of groups is small enough that its arrays stay in the L3 cache, and large enough that PyTorch's own
threads share every call; on other devices a batch is as large as ELEMENTS allows, and nothing is read back. Arrays are
(groups, nodes, queries): the queries of a group are the contiguous axis.

Letters: G groups, g queries of each, m candidate nodes, d and e the widths of keys and values.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import Any

import numpy as np
import torch

from opoch_xp.backends.torch.scratch import Scratch, weights_
from opoch_xp.backends.torch.split import finite_rows, principal_order, query_groups
from opoch_xp.methods import Treecode
from opoch_xp.tree import Lists, Tree, group_count, level_nodes, rows_read

Tensor = torch.Tensor

CACHED = 16384  # keys summarised at a time on the CPU: 8 MB with their values at d = 64
QUERIES, GROUPS = 1024, 64  # attended at a time on the CPU, at the most
ELEMENTS = 1 << 26  # numbers of the largest array elsewhere: 256 MB in float32
OWN_ROWS = 128  # queries whose own cells are read at a time: 4 MB with the defaults
RUN = 8  # nodes compared as one when the largest of many are found


def build_tree(
    k: Tensor, v: Tensor, axes: Any, method: Treecode, *, mask: Tensor | None = None, order: Tensor | None = None
) -> Tree:
    """See opoch_xp.backends.generic.tree.build_tree."""
    chunks, size, dim = k.shape
    if order is None:
        order = principal_order(k, axes, method.iterations, mask)
    levels = level_nodes(size, method)
    cells = k.new_empty(chunks, size, dim + v.shape[2])
    summaries = tuple(k.new_empty(chunks, nodes, 2 * dim + v.shape[2]) for nodes in levels)
    kept = None if mask is None else mask.gather(1, order)
    counts = None if kept is None else tuple(kept.view(chunks, nodes, -1).sum(2).to(k.dtype) for nodes in levels)
    together = max(1, CACHED // size) if k.device.type == "cpu" else chunks
    scratch = Scratch(k)
    for c in range(0, chunks, together):
        some = slice(c, min(c + together, chunks))
        rows = (order[some] + torch.arange(0, (some.stop - c) * size, size, device=k.device)[:, None]).reshape(-1)
        cells[some, :, :dim] = scratch.gather("k", k[some].reshape(-1, dim), rows).view(-1, size, dim)
        cells[some, :, dim:] = scratch.gather("v", v[some].reshape(-1, v.shape[2]), rows).view(-1, size, v.shape[2])
        for level, summary in enumerate(summaries):
            below = cells[some] if level == 0 else summaries[level - 1][some]
            below = below.view(len(below), levels[level], -1, below.shape[2])
            share = shares(level, counts, kept, some, below.shape[:3])
            width = dim if level == 0 else 2 * dim
            var = None if level == 0 else below[..., dim:width]
            _summarise(below[..., :dim], var, below[..., width:], share, summary[some])
    return Tree(cells, order, summaries, tuple(size // nodes for nodes in levels), counts, kept, dim)


def shares(
    level: int, counts: tuple[Tensor, ...] | None, kept: Tensor | None, some: slice, shape: torch.Size
) -> Tensor | float:
    """What each child weighs in its node, (chunks, nodes, children, 1): its part of the node's keys."""
    if counts is None or kept is None:
        return 1 / shape[2]
    children = kept[some].to(counts[0].dtype) if level == 0 else counts[level - 1][some]
    return (children.view(shape) / counts[level][some].clamp_min(1)[..., None])[..., None]


def _summarise(keys: Tensor, var: Tensor | None, values: Tensor, share: Tensor | float, out: Tensor) -> None:
    """Mean, variance and mean value of children (chunks, nodes, children, ...) into `out` (chunks, nodes, 2 d + e)."""
    dim = keys.shape[3]
    mean = (keys * share).sum(2) if isinstance(share, Tensor) else keys.mean(2)
    spread = (keys - mean[:, :, None]).square_()
    if var is not None:
        spread += var
    out[..., :dim] = mean
    out[..., dim : 2 * dim] = (spread * share).sum(2) if isinstance(share, Tensor) else spread.mean(2)
    out[..., 2 * dim :] = (values * share).sum(2) if isinstance(share, Tensor) else values.mean(2)


def tree_attention(
    queries: Tensor,
    tree: Tree,
    first: np.ndarray,
    count: np.ndarray,
    axes: Any,
    method: Treecode,
    *,
    scale: float,
    groups: Tensor | None = None,
    lists: Lists | None = None,
) -> tuple[Tensor, Tensor]:
    """See opoch_xp.backends.generic.tree.tree_attention."""
    tasks, n, dim = queries.shape
    out = queries.new_zeros(tasks * n, tree.cells.shape[2] - dim)
    lse = queries.new_full((tasks * n,), -torch.inf)
    queries, finite = finite_rows(queries)
    if groups is None:
        groups = query_groups(queries, axes, method)
    kernel = Groups(tree, method, scale)
    flat = queries.reshape(tasks * n, dim)
    for batch in batches(groups, n, first, count, tree, method):
        votes = None if finite is None else finite.view(-1)[batch.index].to(queries.dtype)
        given = None if lists is None else batch.of(lists)
        found = kernel(flat[batch.index], votes, batch, given)
        out[batch.index], lse[batch.index] = found
    out, lse = out.view(tasks, n, -1), lse.view(tasks, n)
    if finite is not None:
        out.masked_fill_(~finite[..., None], torch.nan)
        lse.masked_fill_(~finite, torch.nan)
    return out, lse


@dataclass(frozen=True)
class Batch:
    """Groups with as many rows that read as many chunks: index (G, g) of their queries among those of all tasks,
    first (G,) chunk and `count` of them, number (G,) of each group."""

    index: Tensor
    first: Tensor
    count: int
    number: Tensor

    def of(self, lists: Lists) -> Lists:
        """The lists of these groups, of those of all."""
        return Lists(
            tuple(a[self.number] for a in lists.opened), lists.own[self.number][:, : self.index.shape[1]].contiguous()
        )


def batches(
    groups: Tensor, n: int, first: np.ndarray, count: np.ndarray, tree: Tree, method: Treecode
) -> Iterator[Batch]:
    """Groups (tasks, total * size) that have something to read, a few at a time."""
    first, count = np.asarray(first, dtype=np.int64), np.asarray(count)
    total = group_count(n, method.group)
    size, here = groups.shape[1] // total, groups.device
    for chunks in np.unique(count[count > 0]).tolist():
        tasks = np.flatnonzero(count == chunks)
        for low, high, rows in ((0, n // size, size), (n // size, total, n % size)):
            task, number = np.repeat(tasks, high - low), np.tile(np.arange(low, high), len(tasks))
            step = _together(rows, chunks, tree, method)
            for s in range(0, len(task), step):
                some = torch.as_tensor(np.stack([task[s : s + step], number[s : s + step]])).to(here, non_blocking=True)
                places = some[1][:, None] * size + torch.arange(rows, device=here)
                index = groups[some[0][:, None], places] + some[0][:, None] * n
                begin = torch.as_tensor(first[task[s : s + step]]).to(here, non_blocking=True)
                yield Batch(index, begin, chunks, some[0] * total + some[1])


def _together(rows: int, chunks: int, tree: Tree, method: Treecode) -> int:
    """How many groups of `rows` queries make a batch."""
    if tree.cells.device.type == "cpu":
        return max(1, min(GROUPS, QUERIES // max(1, rows)))
    read = rows_read(tree.cells.shape[1], chunks, method)
    shared, width = read["far"] + read["near"], tree.cells.shape[2] + tree.dim
    return max(1, ELEMENTS // max(1, shared * (rows + width) + rows * read["own"] * width))


@dataclass
class Level:
    """Candidate nodes of one level. Groups and nodes as in `Groups`.

    family (G, k): rows of `Groups.families` that hold them; candidates (G, m), numbered from the run's first chunk;
    rows (G, m, 2 d + e), their summaries; half (G, m, g) = sigma^2 / 2; limit: ln of their counts, (G, m, 1) or one for
    all, None where no node is frozen; weight (G, m, g) = exp(mass - top), top (G, 1, g); pick (G, k): places of the nodes that are opened;
    own (G, g, o): of each query's own cells, at the finest level.
    The arrays are scratch: they last until the next level is asked for.
    """

    number: int
    family: Tensor
    candidates: Tensor
    rows: Tensor
    half: Tensor
    limit: Tensor | float | None
    weight: Tensor
    top: Tensor
    pick: Tensor | None = None
    own: Tensor | None = None


class Groups:
    """Steps 1 to 5 for a batch of groups: a function with the tree's flat arrays and scratch memory at hand."""

    def __init__(self, tree: Tree, method: Treecode, scale: float) -> None:
        self.tree, self.method, self.scale = tree, method, scale
        self.nodes = [a.shape[1] for a in tree.summaries] + [1]  # per chunk, which is the last level's parent
        # children of one parent are one row of `families`: one gather fetches them all
        self.children = [fine // coarse for fine, coarse in pairwise(self.nodes)]
        self.families = [
            a.reshape(-1, children * a.shape[2]) for a, children in zip(tree.summaries, self.children, strict=True)
        ]
        self.width = tree.cells.shape[2]  # d + e
        self.cells = tree.cells.reshape(-1, tree.leaf * self.width)
        self.kept = None if tree.kept is None else tree.kept.reshape(-1, tree.leaf)
        self.counts = None if tree.counts is None else [a.reshape(-1) for a in tree.counts]
        self.scratch = Scratch(tree.cells)

    def __call__(self, q: Tensor, votes: Tensor | None, batch: Batch, lists: Lists | None) -> tuple[Tensor, Tensor]:
        """Queries q (G, g, d), voting with `votes` (G, g), against their chunks: out (G, g, e), lse (G, g)."""
        dim, scaled = self.tree.dim, q * self.scale
        parts = Parts()
        for level in self.levels(scaled, votes, batch, lists):
            parts.add(level.weight, level.top, level.rows[..., 2 * dim :])
            if level.number == 0:
                _, keys, logits = self.near_rows(scaled, level, batch)
                parts.add(*weights_(logits, 1), keys[..., dim:])
                if level.own is not None:
                    parts.append(*self.own_part(scaled, level, batch))
        return parts.merged()

    def levels(self, scaled: Tensor, votes: Tensor | None, batch: Batch, lists: Lists | None) -> Iterator[Level]:
        """The levels from the coarsest on, each with its `pick`, whose weights are zeroed: what is left is far."""
        turned = scaled.mT  # (G, d, g)
        square = (turned * turned).mul_(0.5)
        opened = torch.arange(batch.count, device=scaled.device).expand(len(scaled), -1)
        norm: Tensor | None = None
        for number in range(len(self.families) - 1, -1, -1):
            family = opened + batch.first[:, None] * self.nodes[number + 1]
            rows = self.scratch.gather("family", self.families[number], family)
            rows = rows.view(len(scaled), -1, self.width + self.tree.dim)  # (G, m, 2 d + e)
            below = torch.arange(self.children[number], device=scaled.device)
            candidates = (opened[:, :, None] * self.children[number] + below).reshape(len(scaled), -1)
            mass, half, limit = self.log_mass(number, rows, turned, square, candidates, batch)
            weight, top = weights_(mass, 1)
            level = Level(number, family, candidates, rows, half, limit, weight, top)
            width = min(self.method.open if number else self.method.near, candidates.shape[1])
            if lists is None:
                total = weight.sum(1, keepdim=True).log_().add_(top).clamp_min_(torch.finfo(top.dtype).min)
                norm = total if norm is None else torch.maximum(norm, total)  # no query's votes exceed 1 in sum
                vote = (top - norm).exp_() if votes is None else (top - norm).exp_() * votes[:, None]
                share = torch.bmm(weight, vote.mT)[..., 0]  # (G, m)
                level.pick = share.topk(width, dim=1, sorted=False).indices
            else:
                level.pick = _places(candidates, lists.opened[len(self.families) - 1 - number])
            weight.scatter_(1, level.pick[..., None].expand(-1, -1, weight.shape[2]), 0.0)
            if number == 0 and self.method.own:
                level.own = self.own_cells(level, lists)
            opened = candidates.gather(1, level.pick)
            yield level

    def log_mass(
        self, number: int, rows: Tensor, turned: Tensor, square: Tensor, candidates: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor | float | None]:
        """Log mass (G, m, g) of the nodes of `rows`, sigma^2 / 2, and `Level.limit`; see generic.tree.log_mass."""
        dim, shape = self.tree.dim, (*rows.shape[:2], turned.shape[2])
        half = torch.bmm(rows[..., dim : 2 * dim], square, out=self.scratch("half", *shape))
        mass = self.scratch("mass", *shape)
        if self.counts is None:
            limit: Any = log(self.tree.sizes[number])
            if half.device.type == "cpu" and bool(half.max() <= limit):  # no node is frozen
                torch.bmm(rows[..., :dim], turned, out=mass)
                mass.add_(half).add_(limit)
                return mass, half, None
        else:
            count = self.counts[number][candidates + batch.first[:, None] * self.nodes[number]]
            limit = torch.where(count > 0, count.log(), -torch.inf)[..., None]  # (G, m, 1)
        torch.bmm(rows[..., :dim], turned, out=mass)
        return mass.add_(self.energy(half, limit)), half, limit

    def energy(self, half: Tensor, limit: Any) -> Tensor:
        """Free energy of n = exp(limit) Gaussian energies, half = sigma^2 / 2; -inf for n = 0. Derrida, 1981.

        With limit = ln n: limit + half below the freezing transition half = limit, and 2 sqrt(limit half) above.
        """
        cold, warm = self.scratch("cold", *half.shape), self.scratch("warm", *half.shape)
        torch.mul(half, 4 * (limit.clamp_min(0.0) if isinstance(limit, Tensor) else limit), out=cold).sqrt_()
        torch.add(half, limit, out=warm)
        liquid = half <= limit
        if isinstance(limit, Tensor):
            liquid |= limit <= 0
        return torch.where(liquid, warm, cold, out=warm)

    def own_cells(self, level: Level, lists: Lists | None) -> Tensor | None:
        """Places (G, g, own) of each query's own cells among the nodes of the finest level, whose weights are zeroed."""
        weight = level.weight
        own = min(self.method.own, weight.shape[1] - level.pick.shape[1])
        if not own:
            return None
        if lists is None:
            weight.scatter_(1, level.pick[..., None].expand(-1, -1, weight.shape[2]), -1.0)  # not to be read again
            best = largest(weight, own, self.scratch)
            weight.clamp_min_(0.0)
        else:
            best = _places(level.candidates[:, None], lists.own)
        weight.scatter_(1, best.mT, 0.0)
        return best

    def near_rows(self, scaled: Tensor, level: Level, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Near field of the groups: cells (G, near), their keys and values (G, m, d + e), logits (G, m, g)."""
        cell = level.candidates.gather(1, level.pick) + batch.first[:, None] * self.nodes[0]
        keys = self.scratch.gather("near", self.cells, cell).view(len(cell), -1, self.width)
        logits = self.scratch("logits", *keys.shape[:2], scaled.shape[1])
        torch.bmm(keys[..., : self.tree.dim], scaled.mT, out=logits)
        if self.kept is not None:
            logits.masked_fill_(~self.kept[cell].view(len(cell), -1, 1), -torch.inf)
        return cell, keys, logits

    def own_rows(
        self, scaled: Tensor, level: Level, batch: Batch
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Near field of each query of its own, some queries at a time: which r of the G * g queries, cells (r, own),
        their keys and values (r, own * leaf, d + e), logits (r, own * leaf)."""
        if level.own is None:
            return
        cell = level.candidates[:, None].expand(-1, level.own.shape[1], -1).gather(2, level.own)
        cell = (cell + batch.first[:, None, None] * self.nodes[0]).view(-1, cell.shape[2])
        flat = scaled.reshape(-1, 1, scaled.shape[2])
        step = OWN_ROWS if flat.device.type == "cpu" else len(flat)
        for s in range(0, len(flat), step):
            some = slice(s, min(s + step, len(flat)))
            keys = self.scratch.gather("own", self.cells, cell[some]).view(some.stop - s, -1, self.width)
            products = self.scratch("products", *keys.shape[:2], self.tree.dim)
            logits = torch.mul(keys[..., : self.tree.dim], flat[some], out=products).sum(2)
            if self.kept is not None:
                logits.masked_fill_(~self.kept[cell[some]].view(logits.shape), -torch.inf)
            yield some, cell[some], keys, logits

    def own_part(self, scaled: Tensor, level: Level, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of the own cells' weights (G, 1, g), top (G, 1, g), weighted values (G, g, e)."""
        groups, queries, _ = scaled.shape
        total, top = scaled.new_empty(groups * queries), scaled.new_empty(groups * queries)
        out = scaled.new_empty(groups * queries, self.width - self.tree.dim)
        for some, _, keys, logits in self.own_rows(scaled, level, batch):
            weight, highest = weights_(logits, 1)
            top[some], total[some] = highest[:, 0], weight.sum(1)
            torch.bmm(weight[:, None], keys[..., self.tree.dim :], out=out[some, None])
        return total.view(groups, 1, queries), top.view(groups, 1, queries), out.view(groups, queries, -1)


class Parts:
    """Parts of one softmax: what each weighs, to be merged at the end. sums and tops (G, 1, g), outs (G, g, e)."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []
        self.tops: list[Tensor] = []
        self.outs: list[Tensor] = []

    def add(self, weight: Tensor, top: Tensor, values: Tensor) -> None:
        """Rows with values (G, m, e) and weights exp(logit - top), (G, m, g)."""
        self.append(weight.sum(1, keepdim=True), top, torch.bmm(weight.mT, values))

    def append(self, total: Tensor, top: Tensor, out: Tensor) -> None:
        """A part whose weights are summed already: (G, 1, g), (G, 1, g), (G, g, e)."""
        self.sums.append(total)
        self.tops.append(top)
        self.outs.append(out)

    def merged(self) -> tuple[Tensor, Tensor]:
        """out (G, g, e) and lse (G, g)."""
        tops = torch.stack(self.tops)
        highest = tops.amax(0)
        factors = (tops - highest).exp_()
        total = (torch.stack(self.sums) * factors).sum(0)
        factors /= torch.where(total > 0, total, 1.0)
        out = torch.zeros_like(self.outs[0])
        for factor, part in zip(factors, self.outs, strict=True):
            out.addcmul_(part, factor.mT)
        return out, (total.log_() + highest)[:, 0]


def largest(weight: Tensor, number: int, scratch: Scratch) -> Tensor:
    """Places (G, g, number) of the largest weights (G, m, g) of each query: among the runs of RUN with the largest."""
    turned = scratch("turned", weight.shape[0], weight.shape[2], weight.shape[1])
    turned.copy_(weight.mT)
    runs = turned.shape[2] // RUN
    if turned.shape[2] % RUN or runs <= 2 * number:
        return turned.topk(number, dim=2, sorted=False).indices
    split = turned.view(*turned.shape[:2], runs, RUN)
    some = split.amax(3).topk(number, dim=2, sorted=False).indices  # hold the largest, ties aside
    places = some[..., None] * RUN + torch.arange(RUN, device=some.device)
    places = places.view(*places.shape[:2], -1)
    return places.gather(2, turned.gather(2, places).topk(number, dim=2, sorted=False).indices)


def _places(candidates: Tensor, wanted: Tensor) -> Tensor:
    """Where the nodes wanted (..., k) stand among the candidates (..., m)."""
    return (candidates[..., None, :] == wanted[..., None]).to(torch.int8).argmax(-1)
