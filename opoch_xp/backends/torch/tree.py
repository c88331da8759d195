"""The treecode's kernels in PyTorch: a few groups of queries at a time, every step one batched product or one pass.

On the CPU a batch of groups is small enough that its arrays stay in the L3 cache, and large enough that PyTorch's own
threads share every call; on other devices a batch is as large as ELEMENTS allows, and nothing is read back. Arrays are
(groups, queries, nodes).

Letters: G groups, g queries of each, m candidate nodes, d and e the widths of keys and values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opoch_xp.backends.torch.products import add_product, product
from opoch_xp.backends.torch.scratch import Scratch, softmax
from opoch_xp.backends.torch.split import finite_rows, principal_order, query_groups
from opoch_xp.methods import Treecode
from opoch_xp.tree import Lists, Tree, group_count, level_nodes, rows_read

CACHED = 16384  # keys summarised at a time on the CPU: 8 MB with their values at d = 64
QUERIES, GROUPS = 1024, 64  # attended at a time on the CPU, at the most
ELEMENTS = 1 << 26  # numbers of the largest array elsewhere: 256 MB in float32
OWN_ROWS = 256  # queries whose own cells are read at a time: 8 MB with the defaults


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
        part, level = kernel(rows_of(flat, batch.index), votes, batch, given)
        out.index_copy_(0, batch.index.view(-1), part.view(-1, part.shape[2]))
        lse.index_copy_(0, batch.index.view(-1), level.view(-1))
    out, lse = out.view(tasks, n, -1), lse.view(tasks, n)
    if finite is not None:
        out.masked_fill_(~finite[..., None], torch.nan)
        lse.masked_fill_(~finite, torch.nan)
    return out, lse


def chosen_lists(
    queries: Tensor,
    tree: Tree,
    first: np.ndarray,
    count: np.ndarray,
    axes: Any,
    method: Treecode,
    *,
    scale: float,
    groups: Tensor,
) -> Lists | None:
    """What a gradient must be told of the nodes that were opened: nothing, since it takes the same steps."""
    return None


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """x[index] along the first axis, for an index of any shape."""
    return x.index_select(0, index.reshape(-1)).view(*index.shape, *x.shape[1:])


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
    """Candidate nodes of one level. Groups, queries and nodes as in `Groups`.

    family (G, k): rows of `Groups.families` that hold them; candidates (G, m), numbered from the run's first chunk;
    rows (G, m, 2 d + e), their summaries; half (G, g, m) = sigma^2 / 2; limit: ln of their counts, (G, 1, m) or one for
    all, None where no node is frozen; weight (G, g, m) = exp(mass - lse), lse (G, g, 1). pick (G, k): places of the
    nodes that are opened; own (G, g, o): of each query's own cells, at the finest level; the weights of
    both are zeroed. The arrays are scratch: they last until the next level is asked for.
    """

    number: int
    family: Tensor
    candidates: Tensor
    rows: Tensor
    half: Tensor
    limit: Tensor | float | None
    weight: Tensor
    lse: Tensor
    pick: Tensor
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
        self.fused = fused_for(tree, method)
        if self.fused is not None:  # the nodes of all levels in one list
            self.rows = torch.cat([a.view(-1, a.shape[2]) for a in tree.summaries])
            logs = [torch.full_like(a[..., 0], log(size)) for a, size in zip(tree.summaries, tree.sizes, strict=True)]
            logs = logs if tree.counts is None else [count.log() for count in tree.counts]
            self.logs = torch.cat([a.reshape(-1) for a in logs]).float()
            self.offsets = np.cumsum([0, *(a.shape[0] * a.shape[1] for a in tree.summaries)]).tolist()

    def __call__(self, q: Tensor, votes: Tensor | None, batch: Batch, lists: Lists | None) -> tuple[Tensor, Tensor]:
        """Queries q (G, g, d), voting with `votes` (G, g), against their chunks: out (G, g, e), lse (G, g)."""
        dim, scaled = self.tree.dim, q * self.scale
        if self.fused is not None:
            return self.by_lists(q, scaled, votes, batch, lists)
        outs, totals, lses = [], [], []
        for level in self.levels(scaled, votes, batch, lists):
            outs.append(product(level.weight, level.rows[..., 2 * dim :]))
            totals.append(level.weight.sum(2, keepdim=True))
            lses.append(level.lse)
            parts = [self.near_part(scaled, level, batch)] if level.number == 0 else []
            if level.own is not None:
                parts.append(self.own_part(scaled, level, batch))
            for out, lse in parts:
                outs.append(out)
                totals.append(torch.ones_like(lse))
                lses.append(lse)
        return merged(outs, totals, lses)

    def by_lists(
        self, q: Tensor, scaled: Tensor, votes: Tensor | None, batch: Batch, lists: Lists | None
    ) -> tuple[Tensor, Tensor]:
        """The same through the fused kernel, which reads what the levels leave and what the groups open by itself."""
        far = []
        for level in self.levels(scaled, votes, batch, lists):
            node = level.candidates + batch.first[:, None] * self.nodes[level.number] + self.offsets[level.number]
            far.append(node.scatter(1, level.pick, -1))
        near = level.candidates.gather(1, level.pick) + batch.first[:, None] * self.nodes[0]
        assert self.fused is not None
        return self.fused(
            q.contiguous(), self.rows, self.logs, torch.cat(far, 1), self.tree.cells.view(-1, self.width),
            None if self.kept is None else self.kept.reshape(-1), near, leaf=self.tree.leaf, scale=self.scale,
        )  # fmt: skip

    def levels(self, scaled: Tensor, votes: Tensor | None, batch: Batch, lists: Lists | None) -> Iterator[Level]:
        """The levels from the coarsest on, each with its `pick`, whose weights are zeroed: what is left is far."""
        square = scaled.square().mul_(0.5)
        opened = torch.arange(batch.count, device=scaled.device).expand(len(scaled), -1)
        norm: Tensor | None = None
        for number in range(len(self.families) - 1, -1, -1):
            family = opened + batch.first[:, None] * self.nodes[number + 1]
            rows = self.scratch.gather("family", self.families[number], family)
            rows = rows.view(len(scaled), -1, self.width + self.tree.dim)  # (G, m, 2 d + e)
            below = torch.arange(self.children[number], device=scaled.device)
            candidates = (opened[:, :, None] * self.children[number] + below).reshape(len(scaled), -1)
            mass, half, limit = self.log_mass(number, rows, scaled, square, candidates, batch)
            weight, lse = softmax(mass, self.scratch("weight", *mass.shape), self.counts is not None)
            if limit is None or isinstance(limit, float):
                lse += log(self.tree.sizes[number])  # which the masses lack
            width = min(self.method.open if number else self.method.near, candidates.shape[1])
            if lists is None:
                norm = lse if norm is None else torch.maximum(norm, lse)  # no query's votes exceed 1 in sum
                vote = torch.where(norm > -torch.inf, (lse - norm).exp_(), 0.0).mT
                share = torch.bmm(vote if votes is None else vote * votes[:, None], weight)[:, 0]  # (G, m)
                pick = share.topk(width, dim=1, sorted=False).indices
            else:
                pick = _places(candidates, lists.opened[len(self.families) - 1 - number][:, :width])
            level = Level(number, family, candidates, rows, half, limit, weight, lse, pick)
            self.close(level, lists)
            yield level
            opened = candidates.gather(1, pick)

    def close(self, level: Level, lists: Lists | None) -> None:
        """Zeroes the weights of the nodes that are opened and, at the finest level, finds each query's own cells of
        those left and zeroes theirs."""
        weight = level.weight
        far = torch.ones_like(weight[:, 0]).scatter_(1, level.pick, 0.0)[:, None]  # (G, 1, m)
        own = min(self.method.own, weight.shape[2] - level.pick.shape[1])
        if level.number or not own:
            weight.mul_(far)
        elif lists is None:
            weight.mul_(far)
            left = torch.add(weight, far - 1, out=self.scratch("left", *weight.shape))  # what is read is less than all
            level.own = left.topk(own, dim=2, sorted=False).indices
            weight.scatter_(2, level.own, 0.0)
        else:
            level.own = _places(level.candidates[:, None], lists.own[:, :, :own])
            weight.mul_(far).scatter_(2, level.own, 0.0)

    def log_mass(
        self, number: int, rows: Tensor, scaled: Tensor, square: Tensor, candidates: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor | float | None]:
        """Log mass (G, g, m) of the nodes of `rows`, sigma^2 / 2, and `Level.limit`; see generic.tree.log_mass.

        ln n + min(h, ln n) + 2 sqrt(ln n) max(0, sqrt(h) - sqrt(ln n)) with h = sigma^2 / 2, which cancels nowhere;
        without the first ln n where it is the same for all nodes.
        """
        dim, shape = self.tree.dim, (*scaled.shape[:2], rows.shape[1])
        half = product(square, rows[..., dim : 2 * dim].mT, self.scratch("half", *shape))
        means, mass = rows[..., :dim].mT, self.scratch("mass", *shape)
        if self.counts is None:
            limit: Any = log(self.tree.sizes[number])
            if half.device.type == "cpu" and bool(half.max() <= limit):  # no node is frozen
                return add_product(half, scaled, means), half, None
            root: Any = limit**0.5
        else:
            count = self.counts[number][candidates + batch.first[:, None] * self.nodes[number]]
            limit = torch.where(count > 0, count.log(), -torch.inf)[:, None]  # (G, 1, m)
            root = limit.clamp_min(0.0).sqrt()
        frozen = torch.sqrt(half, out=self.scratch("frozen", *shape)).sub_(root).clamp_min_(0.0)
        if self.counts is None:
            torch.clamp_max(half, limit, out=mass).add_(frozen, alpha=2 * root)
            return add_product(mass, scaled, means), half, limit
        torch.minimum(half, root.square(), out=mass).addcmul_(frozen, root, value=2)
        return add_product(mass, scaled, means).add_(limit), half, limit

    def near_rows(self, scaled: Tensor, level: Level, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Near field of the groups: cells (G, near), their keys and values (G, m, d + e), logits (G, g, m)."""
        cell = level.candidates.gather(1, level.pick) + batch.first[:, None] * self.nodes[0]
        keys = self.scratch.gather("near", self.cells, cell).view(len(cell), -1, self.width)
        logits = self.scratch("logits", *scaled.shape[:2], keys.shape[1])
        product(scaled, keys[..., : self.tree.dim].mT, logits)
        if self.kept is not None:
            logits.masked_fill_(~self.kept[cell].view(len(cell), 1, -1), -torch.inf)
        return cell, keys, logits

    def near_part(self, scaled: Tensor, level: Level, batch: Batch) -> tuple[Tensor, Tensor]:
        """Softmax over the cells of each group: out (G, g, e), lse (G, g, 1)."""
        _, keys, logits = self.near_rows(scaled, level, batch)
        weight, lse = softmax(logits, self.scratch("near weight", *logits.shape), self.kept is not None)
        return product(weight, keys[..., self.tree.dim :]), lse

    def own_rows(
        self, scaled: Tensor, level: Level, batch: Batch, logits: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Near field of each query of its own, some queries at a time: which r of the G * g queries, cells (r, own),
        their keys and values (r, own * leaf, d + e). Their logits are written into `logits` (G * g, own * leaf)."""
        assert level.own is not None
        cell = level.candidates[:, None].expand(-1, level.own.shape[1], -1).gather(2, level.own)
        cell = (cell + batch.first[:, None, None] * self.nodes[0]).view(-1, cell.shape[2])
        flat = scaled.reshape(-1, 1, scaled.shape[2])
        step = OWN_ROWS if flat.device.type == "cpu" else len(flat)
        for s in range(0, len(flat), step):
            some = slice(s, min(s + step, len(flat)))
            keys = self.scratch.gather("own", self.cells, cell[some]).view(some.stop - s, -1, self.width)
            products = self.scratch("products", *keys.shape[:2], self.tree.dim)
            torch.mul(keys[..., : self.tree.dim], flat[some], out=products)
            torch.sum(products, 2, out=logits[some])
            if self.kept is not None:
                logits[some].masked_fill_(~self.kept[cell[some]].view(some.stop - s, -1), -torch.inf)
            yield some, cell[some], keys

    def own_part(self, scaled: Tensor, level: Level, batch: Batch) -> tuple[Tensor, Tensor]:
        """Softmax over each query's own cells: out (G, g, e), lse (G, g, 1)."""
        assert level.own is not None
        groups, queries, own = level.own.shape
        logits = self.scratch("logits", groups * queries, own * self.tree.leaf)
        weight = self.scratch("own weight", *logits.shape)
        out = scaled.new_empty(groups * queries, 1, self.width - self.tree.dim)
        for some, _, keys in self.own_rows(scaled, level, batch, logits):
            torch.softmax(logits[some], 1, out=weight[some])
            torch.bmm(weight[some, None], keys[..., self.tree.dim :], out=out[some])
        top = logits.amax(1, keepdim=True)
        lse = top - weight.amax(1, keepdim=True).log_()
        if self.kept is not None:
            unseen = top == -torch.inf
            out.masked_fill_(unseen[..., None], 0.0)
            lse.masked_fill_(unseen, -torch.inf)
        return out.view(groups, queries, -1), lse.view(groups, queries, 1)


def fused_for(tree: Tree, method: Treecode) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The fused kernel, for CUDA tensors it takes; own cells are read by the plain steps alone."""
    width = tree.cells.shape[2] - tree.dim
    if tree.cells.device.type != "cuda" or method.own or find_spec("triton") is None:
        return None
    from opoch_xp.backends.torch.fused import attend_lists, supports

    return attend_lists if supports(tree.cells.dtype, tree.dim, width) else None


def merged(outs: list[Tensor], totals: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Parts of one softmax as one: out (G, g, e) and lse (G, g).

    outs (G, g, e), sums of values by weight; totals (G, g, 1), sums of those weights; lses (G, g, 1): a weight stands
    for exp(lse) times itself.
    """
    total, lse = torch.stack(totals), torch.stack(lses)
    some = total > torch.finfo(total.dtype).tiny  # a level whose heavy nodes are all opened may have nothing left
    top = torch.where(some, lse + total.log(), -torch.inf).amax(0).clamp_min_(torch.finfo(lse.dtype).min)
    factor = torch.where(some, lse - top, -torch.inf).exp_()
    whole = (total * factor).sum(0)
    factor /= torch.where(whole > 0, whole, 1.0)
    out = outs[0].mul_(factor[0])
    for part, share in zip(outs[1:], factor[1:], strict=True):
        out.addcmul_(part, share)
    return out, (whole.log_() + top)[..., 0]


def _places(candidates: Tensor, wanted: Tensor) -> Tensor:
    """Where the nodes wanted (..., k) stand among the candidates (..., m)."""
    return (candidates[..., None, :] == wanted[..., None]).to(torch.int8).argmax(-1)
