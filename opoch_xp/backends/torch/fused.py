"""A group of queries against its gathered rows, as one Triton kernel for CUDA: step 5 of the treecode.

One program takes BLOCK_Q queries of a group through the two lists the group reads: summaries of unopened nodes, as
pseudo-keys with the random-energy logit, and the keys of its near cells. Rows are gathered by index inside the kernel,
so that no copy of them is made, and an online softmax keeps one tile of logits in registers. Sums are in float32.

Cost of a group of g queries that reads M summaries and K keys of width d, values of width e, in w bytes a number:
g (M (4 d + 2 e) + K (2 d + 2 e)) operations, and w (M (2 d + e) + K (d + e) + g d) + 4 g e bytes once for every BLOCK_Q
queries; the lists, 8 bytes an entry. At g = 16, d = e = 64 and bfloat16 that is 8 to 11 operations a byte: traffic
bounds it, the more so the smaller the group.

Not yet timed on a GPU: block sizes are a guess. `num_stages` and BLOCK_M are where to start.

Letters: F groups, g queries of each, M summaries, C near cells, D and E widths of keys and values, DP and EP the same
as powers of two of at least 16, which tl.dot needs.
Sources: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Dao et al., FlashAttention, 2022;
Derrida, Random-energy model, 1981.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_Q, BLOCK_M = 16, 64  # queries and rows of a tile
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
def _attend(
    q, rows, logs, far, cells, kept, near, out, lse, scale, g, M, C,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, LEAF: tl.constexpr, MASKED: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d, e, m = tl.arange(0, DP), tl.arange(0, EP), tl.arange(0, BLOCK_M)
    query = tl.load(q + (f * g + i[:, None]) * D + d, mask=(i[:, None] < g) & (d < D), other=0.0)
    scaled = query.to(tl.float32) * scale
    square = (scaled * scaled * 0.5).to(query.dtype)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, EP), tl.float32)
    for start in range(0, M, BLOCK_M):  # far field: nodes that are not opened
        node = tl.load(far + f * M + start + m, mask=start + m < M, other=-1)
        there = node >= 0
        row = rows + tl.where(there, node, 0)[:, None] * (2 * D + E)
        wide = there[:, None] & (d < D)
        mean = tl.load(row + d, mask=wide, other=0.0)
        var = tl.load(row + D + d, mask=wide, other=0.0)
        value = tl.load(row + 2 * D + e, mask=there[:, None] & (e < E), other=0.0)
        log = tl.load(logs + tl.where(there, node, 0), mask=there, other=float("-inf"))
        limit = tl.maximum(log, 0.0)  # no key: -inf, which the last sum restores
        root = tl.sqrt(limit)
        half = _dot(square, tl.trans(var), UPCAST)
        energy = tl.minimum(half, limit) + 2 * root * tl.maximum(tl.sqrt(half) - root, 0.0)
        logit = scale * _dot(query, tl.trans(mean), UPCAST) + energy + log[None, :]
        top, total, acc = _online(logit, value, top, total, acc, UPCAST)
    for start in range(0, C * LEAF, BLOCK_M):  # near field: cells key by key
        place = start + m
        there = place < C * LEAF
        cell = tl.load(near + f * C + place // LEAF, mask=there, other=0)
        number = cell * LEAF + place % LEAF
        row = cells + number[:, None] * (D + E)
        key = tl.load(row + d, mask=there[:, None] & (d < D), other=0.0)
        value = tl.load(row + D + e, mask=there[:, None] & (e < E), other=0.0)
        if MASKED:
            there = there & (tl.load(kept + number, mask=there, other=0) != 0)
        logit = scale * _dot(query, tl.trans(key), UPCAST)
        top, total, acc = _online(tl.where(there[None, :], logit, float("-inf")), value, top, total, acc, UPCAST)
    safe = tl.where(total > 0, total, 1.0)
    tl.store(out + (f * g + i[:, None]) * E + e, acc / safe[:, None], mask=(i[:, None] < g) & (e < E))
    tl.store(lse + f * g + i, tl.where(total > 0, top + tl.log(safe), float("-inf")), mask=i < g)


def supports(dtype: torch.dtype, dim: int, width: int) -> bool:
    """Whether the kernel takes queries and rows of this dtype, keys of `dim` and values of `width` numbers."""
    return dtype in DTYPES and 0 < dim <= LARGEST and 0 < width <= LARGEST


def block_rows(width: int) -> int:
    """Rows of a tile of keys or values of so many numbers, a power of two: what shared memory holds."""
    return BLOCK_M if width <= 128 else BLOCK_M // 2


def attend_lists(
    q: Tensor, rows: Tensor, logs: Tensor, far: Tensor, cells: Tensor, kept: Tensor | None, near: Tensor, *, leaf: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax of queries q (F, g, d) over what each group lists: out (F, g, e) and lse (F, g), float32.

    rows (nodes, 2 d + e): mean key, variance and mean value of every node, logs (nodes,) float32 the logarithm of its
    keys; far (F, M) int64: nodes to read, -1 for none. cells (keys, d + e): keys and values in cell order, kept (keys,)
    bool or None; near (F, C) int64: cells of `leaf` keys to read. q, rows and cells have one dtype, float32,
    bfloat16 or float16; all are contiguous. A query that sees nothing gets zeros and -inf. Nothing is read back to
    the host.
    """
    groups, g, dim = q.shape
    width = cells.shape[1] - dim
    out = q.new_empty(groups, g, width, dtype=torch.float32)
    lse = q.new_empty(groups, g, dtype=torch.float32)
    wide, wide_values = (max(16, triton.next_power_of_2(n)) for n in (dim, width))
    _attend[(groups, triton.cdiv(g, BLOCK_Q))](
        q, rows, logs, far, cells, cells if kept is None else kept.view(torch.uint8), near, out, lse, scale,
        g, far.shape[1], near.shape[1],
        D=dim, E=width, DP=wide, EP=wide_values, LEAF=leaf, MASKED=kept is not None,
        UPCAST=q.device.type == "cpu",  # the interpreter multiplies bfloat16 as the integers it keeps them in
        BLOCK_Q=BLOCK_Q, BLOCK_M=block_rows(max(wide, wide_values)),
    )  # fmt: skip
    return out, lse
