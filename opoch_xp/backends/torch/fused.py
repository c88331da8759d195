"""A group of queries against what it reads of the trees, as one Triton kernel for CUDA: the softmax of the treecode.

One program takes BLOCK_Q queries of a group through the nodes that stay closed, as pseudo-keys with the log mass of
opoch_xp.treecode.law, and through the cells that some query of the group reads: key by key for the queries that read a
cell, as a pseudo-key for the others. Rows are gathered by index inside the kernel, so that no copy of them is made, and
an online softmax keeps one tile of logits in registers. A tile of keys that none of the program's queries reads is
passed over. Sums are in float32.

Cost of a group of g queries that leaves M nodes closed and reads C cells of `leaf` keys of width d, values of width e,
in w bytes a number: g (M + C) (4 d + 2 e) + g C leaf (2 d + 2 e) operations, and w ((M + C) (2 d + e) + C leaf (d + e))
bytes once for every BLOCK_Q queries; the lists, 8 bytes an entry, and who reads which cell, a byte an entry and query.
At d = e = 64 that is 32 to 64 operations a byte in bfloat16, 4 to 8 in float32: traffic bounds it.

Not yet timed on a GPU: block sizes are a guess. `num_stages`, BLOCK_M and, in float32, three products in tf32 for one
are where to start.

Letters: F groups, g queries of each, M closed nodes, C cells that are read, D and E widths of keys and values, DP and
EP the same as powers of two of at least 16, which tl.dot needs.
Sources: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Dao et al., FlashAttention, 2022.
"""

from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from opoch_xp.backends.generic.tree import Group, Level, rows_read, walk
from opoch_xp.methods import Treecode
from opoch_xp.treecode.law import coefficients
from opoch_xp.treecode.tree import Lists, Tree

BLOCK_Q, BLOCK_M = 64, 64  # queries and rows of a tile, at the most
BLOCK_Q_SINGLE = 16  # queries in float32, whose products go through registers
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 256  # width of keys or values: above, a tile no longer fits in registers


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _online(logit, value, top, total, acc, UPCAST: tl.constexpr):
    """A tile of logits (Q, M) and values (M, EP) taken into the running maximum, sum and weighted values."""
    highest = tl.maximum(top, tl.max(logit, 1))
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp(logit - shift[:, None])
    keep = tl.exp(top - shift)
    acc = acc * keep[:, None] + _dot(weight.to(value.dtype), value, UPCAST)
    return highest, total * keep + tl.sum(weight, 1), acc


@triton.jit
def _nodes(
    query, square, node, rows, law, scale, d, e, D: tl.constexpr, E: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Log masses (Q, M) and mean values (M, EP) of the nodes node (M,), -1 for none."""
    there = node >= 0
    node = tl.where(there, node, 0)
    row, wide = rows + node[:, None] * (2 * D + E), there[:, None] & (d < D)
    mean = tl.load(row + d, mask=wide, other=0.0)
    var = tl.load(row + D + d, mask=wide, other=0.0)
    value = tl.load(row + 2 * D + e, mask=there[:, None] & (e < E), other=0.0)
    log = tl.load(law + node * 3, mask=there, other=float("-inf"))
    gain = tl.load(law + node * 3 + 1, mask=there, other=0.0)
    width = tl.load(law + node * 3 + 2, mask=there, other=0.0)
    sigma2 = _dot(square, tl.trans(var), UPCAST)
    more = gain[None, :] * (tl.sqrt(1 + sigma2 * width[None, :]) - 1)
    return scale * _dot(query, tl.trans(mean), UPCAST) + log[None, :] + more, value


@triton.jit
def _attend(
    q, rows, law, far, cells, kept, near, reads, out, lse, scale, g, M, C,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, LEAF: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d, e, m = tl.arange(0, DP), tl.arange(0, EP), tl.arange(0, BLOCK_M)
    query = tl.load(q + (f * g + i[:, None]) * D + d, mask=(i[:, None] < g) & (d < D), other=0.0)
    scaled = query.to(tl.float32) * scale
    square = (scaled * scaled).to(query.dtype)
    asks = reads + (f * g + i[:, None]) * C
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, EP), tl.float32)
    for start in range(0, M, BLOCK_M):  # nodes that are closed for all
        node = tl.load(far + f * M + start + m, mask=start + m < M, other=-1)
        logit, value = _nodes(query, square, node, rows, law, scale, d, e, D, E, UPCAST)
        top, total, acc = _online(logit, value, top, total, acc, UPCAST)
    for start in range(0, C, BLOCK_M):  # cells, for the queries that do not read them
        place = start + m
        cell = tl.load(near + f * C + place, mask=place < C, other=-1)
        read = tl.load(asks + place, mask=(i[:, None] < g) & (place < C), other=0)
        logit, value = _nodes(query, square, cell, rows, law, scale, d, e, D, E, UPCAST)
        top, total, acc = _online(tl.where(read == 0, logit, float("-inf")), value, top, total, acc, UPCAST)
    for start in range(0, C * LEAF, BLOCK_M):  # and key by key, for those that do
        place = start + m
        inside = place < C * LEAF
        read = tl.load(asks + place // LEAF, mask=(i[:, None] < g) & inside, other=0)
        if tl.max(tl.max(read.to(tl.int32), 1), 0) > 0:
            cell = tl.load(near + f * C + place // LEAF, mask=inside, other=-1)
            there = cell >= 0
            number = tl.where(there, cell, 0) * LEAF + place % LEAF
            row = cells + number[:, None] * (D + E)
            key = tl.load(row + d, mask=there[:, None] & (d < D), other=0.0)
            value = tl.load(row + D + e, mask=there[:, None] & (e < E), other=0.0)
            if MASKED:
                there = there & (tl.load(kept + number, mask=there, other=0) != 0)
            logit = scale * _dot(query, tl.trans(key), UPCAST)
            logit = tl.where((read != 0) & there[None, :], logit, float("-inf"))
            top, total, acc = _online(logit, value, top, total, acc, UPCAST)
    safe = tl.where(total > 0, total, 1.0)
    tl.store(out + (f * g + i[:, None]) * E + e, acc / safe[:, None], mask=(i[:, None] < g) & (e < E))
    tl.store(lse + f * g + i, tl.where(total > 0, top + tl.log(safe), float("-inf")), mask=i < g)


def supports(dtype: torch.dtype, dim: int, width: int) -> bool:
    """Whether the kernel takes queries and rows of this dtype, keys of `dim` and values of `width` numbers."""
    return dtype in DTYPES and 0 < dim <= LARGEST and 0 < width <= LARGEST


def padded(width: int) -> int:
    """The width of a tile that holds rows of so many numbers: a power of two of at least 16."""
    return max(16, triton.next_power_of_2(width))


def block_sizes(queries: int, width: int, bytes_: int) -> dict[str, int]:
    """Queries and rows of a tile, powers of two, for groups of so many queries and rows padded to `width` numbers of so
    many bytes: what shared memory and registers hold."""
    narrow = 1 if width <= 128 else 2
    most = BLOCK_Q // narrow if bytes_ == 2 else BLOCK_Q_SINGLE
    return {"BLOCK_Q": min(padded(queries), most), "BLOCK_M": BLOCK_M // narrow}


def attend_lists(
    q: Tensor, rows: Tensor, law: Tensor, far: Tensor, cells: Tensor, kept: Tensor | None, near: Tensor, reads: Tensor,
    *, leaf: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax of queries q (F, g, d) over what each group lists: out (F, g, e) and lse (F, g), float32.

    rows (nodes, 2 d + e): mean key, variance and mean value of every node, cells first; law (nodes, 3) float32: log,
    gain and width of opoch_xp.treecode.law.Coefficients. far (F, M) int64: nodes that are closed for all and hold some
    key, -1 for none. cells (keys, d + e): keys and values in cell order, kept (keys,) bool or None. near
    (F, C) int64: cells of `leaf` keys that some query reads, -1 for none; reads (F, g, C) bool: which does, the others
    taking the cell for one pseudo-key. q, rows and cells have one dtype, float32, bfloat16 or float16; all are
    contiguous. A query that sees nothing gets zeros and -inf. Nothing is read back to the host.
    """
    groups, g, dim = q.shape
    width = cells.shape[1] - dim
    out = q.new_empty(groups, g, width, dtype=torch.float32)
    lse = q.new_empty(groups, g, dtype=torch.float32)
    sizes = block_sizes(g, padded(max(dim, width)), q.element_size())
    _attend[(groups, triton.cdiv(g, sizes["BLOCK_Q"]))](
        q, rows, law, far, cells, cells if kept is None else kept.view(torch.uint8), near, reads.view(torch.uint8), out,
        lse, scale, g, far.shape[1], near.shape[1],
        D=dim, E=width, DP=padded(dim), EP=padded(width), LEAF=leaf, MASKED=kept is not None,
        UPCAST=q.device.type == "cpu",  # the interpreter multiplies bfloat16 as the integers it keeps them in
        **sizes,
    )  # fmt: skip
    return out, lse


class FusedGroups:
    """What opoch_xp.backends.generic.tree.attend_groups computes, less the lists, for groups against one tree."""

    def __init__(self, tree: Tree) -> None:
        dtype = torch.float32
        self.rows = torch.cat([a.view(-1, a.shape[2]) for a in tree.summaries])  # the nodes of all levels in one list
        sizes = [a.new_full(a.shape[:2], size, dtype=dtype) for a, size in zip(tree.summaries, tree.sizes, strict=True)]
        count = torch.cat([a.reshape(-1).to(dtype) for a in (sizes if tree.counts is None else tree.counts)])
        law = coefficients(count)
        self.law = torch.stack([law.log, law.gain, law.width], 1)
        self.offsets = np.cumsum([0, *(a.shape[0] * a.shape[1] for a in tree.summaries)]).tolist()

    def __call__(
        self, group: Group, tree: Tree, method: Treecode, scale: float, lists: Lists | None,
        top: Callable[[Tensor, int], Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """out (F, g, e), lse (F, g) and read (F, 3)."""
        levels: list[Level] = list(walk(group, tree, method, scale, lists, top))
        far = []
        for level in levels:
            closed = level.closed.all(1) & (level.count[:, 0] > 0)
            far.append(torch.where(closed, level.node + self.offsets[level.number], -1))
        cells, last = tree.cells.view(-1, tree.cells.shape[2]), levels[-1]
        kept = None if tree.kept is None else tree.kept.view(-1)
        near = torch.where(last.reads.any(1), last.cells, -1)
        out, lse = attend_lists(
            group.q.contiguous(), self.rows, self.law, torch.cat(far, 1), cells, kept, near, last.reads.contiguous(),
            leaf=tree.leaf, scale=scale,
        )  # fmt: skip
        return out, lse, rows_read(group, tree, levels)
