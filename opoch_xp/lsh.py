"""LSH attention: center, hash, attend inside shared buckets; the driver of the kernel `bucket_attention`."""

from dataclasses import dataclass
from typing import Any

from array_api_compat import device

from opoch_xp.hashing import random_hyperplanes
from opoch_xp.methods import LSH
from opoch_xp.problem import Problem, Solution

Array = Any

CENTER_KEYS = 64  # causal: the kept keys whose mean is the center, fixed from then on
LEAST_BUCKET = 256  # keys a bucket may always hold, and how many times the even share of a bucket
EVEN_SHARES = 8
ROWS = 4096  # early queries attended at once


def bucket_limit(method: LSH, n_k: int) -> int | None:
    """Largest bucket that is read whole: the method's, or max(256, 8 * n_k / 2**bits); None is no limit (bits = 0)."""
    if method.max_bucket is not None:
        return method.max_bucket
    return max(LEAST_BUCKET, EVEN_SHARES * n_k // 2**method.bits) if method.bits else None


def attend_buckets(problem: Problem, method: LSH) -> Solution:
    """Attention over the keys that share a bucket with the query; see `opoch_xp.LSH` and the kernel `bucket_attention`.

    With `method.center` the mean of the kept keys is subtracted before hashing; causal: the mean of the first 64 kept
    keys, and queries that see no more than those are exact, so that nothing depends on later keys. Rows: "near", the
    mean number of keys read per query; "far", the share of queries that read none and got a mean.

    Raises ValueError for a window without causal. Cost: tables * bits dot products a row, and the candidates; memory
    linear in queries and keys.
    """
    problem = problem.widened()
    xp, kernels, q, k, v = problem.xp, problem.kernels, problem.q, problem.k, problem.v
    if method.window and not problem.causal:
        raise ValueError(
            f"window={method.window} needs causal=True: the most recent keys of a query are those before it"
        )
    options = {"causal": problem.causal, "scale": problem.scale, "mask": problem.mask}
    if method.bits == 0 and method.max_bucket is None:
        out, lse = kernels.exact_attention(q, k, v, **options)
        return Solution(out, lse, {"near": _visible(problem), "far": 0.0})
    first = first_keys(problem) if method.center and problem.causal else None
    k, center = centered(problem, method, first)
    planes = random_hyperplanes(k.shape[-1], method.bits, method.tables, method.seed)
    out, lse, read = kernels.bucket_attention(
        q,
        k,
        v,
        kernels.hash_codes(q, planes),
        kernels.hash_codes(k, planes),
        **options,
        window=method.window,
        max_bucket=bucket_limit(method, problem.n_k),
    )
    if center is not None:
        lse = lse + problem.scale * (q @ xp.matrix_transpose(center)[:, None, :, :])[..., 0]
    if first is not None:
        out, lse, read = _with_early(problem, first, out, lse, read)
    far = xp.sum(xp.astype((read == 0) & (lse > -xp.inf), xp.float32))
    queries = max(1, q.shape[0] * q.shape[1] * q.shape[2])
    return Solution(out, lse, {"near": xp.astype(xp.sum(read), xp.float32) / queries, "far": far / queries})


def centered(problem: Problem, method: LSH, first: "First | None") -> tuple[Array, Array | None]:
    """The keys as they are hashed, (batch, n_k, d), and the center (batch, 1, d) they lack; masked keys are zeros."""
    xp, k, mask = problem.xp, problem.k, problem.mask
    if not method.center:
        return k, None
    center = _mean(xp, k, mask) if first is None else _mean(xp, first.k, first.mask)
    return k - center if mask is None else xp.where(mask[:, :, None], k - center, 0.0), center


@dataclass(frozen=True)
class First:
    """The first kept keys of each head, which every query that sees all of them is centered by.

    k (batch, m, d), v (batch, m, d_v), mask (batch, m) or None; order (batch, m): their places,
    None for the first m; seen (batch or 1, n_q), the kept keys a query may see.
    Queries that see at most m are the first `early` rows of their head, in the head that has most of them.
    """

    k: Array
    v: Array
    mask: Array | None
    order: Array | None
    seen: Array
    early: int


def first_keys(problem: Problem) -> First:
    xp, k, v, mask = problem.xp, problem.k, problem.v, problem.mask
    n_q, n_k = problem.n_q, problem.n_k
    m = min(CENTER_KEYS, n_k)
    seen = _seen(problem)
    if mask is None:
        return First(k[:, :m, :], v[:, :m, :], None, None, seen, min(n_q, max(0, m - (n_k - n_q))))
    order = xp.argsort(xp.astype(~mask, xp.int8), axis=1)[:, :m]  # kept keys first, in the order of positions

    def first(x: Array) -> Array:
        return xp.take_along_axis(x, xp.broadcast_to(order[:, :, None], (*order.shape, x.shape[2])), axis=1)

    early = int(xp.max(xp.sum(xp.astype(seen <= m, xp.int64), axis=1))) if n_q else 0
    return First(first(k), first(v), xp.take_along_axis(mask, order, axis=1), order, seen, early)


def _with_early(problem: Problem, first: First, out: Array, lse: Array, read: Array) -> tuple[Array, Array, Array]:
    """The same with the early queries, those that see no more keys than the center was made of, exact."""
    xp, m = problem.xp, first.k.shape[1]
    number = xp.arange(m, dtype=xp.int64, device=device(out))
    outs, lses, reads = [], [], []
    for low in range(0, first.early, ROWS):
        rows = slice(low, min(low + ROWS, first.early))
        seen = xp.broadcast_to(first.seen[:, None, rows], read[:, :, rows].shape)
        logits = problem.scale * (problem.q[:, :, rows, :] @ xp.matrix_transpose(first.k)[:, None, :, :])
        logits = xp.where(number < seen[..., None], logits, -xp.inf)  # (batch, repeat, rows, m)
        top = xp.max(logits, axis=-1)
        shift = xp.where(top == -xp.inf, 0.0, top)
        weights = xp.exp(logits - shift[..., None])
        total = xp.sum(weights, axis=-1)
        some = seen > 0
        total = xp.where(some, total, 1.0)
        here = seen <= m
        part = (weights @ first.v[:, None, :, :]) / total[..., None]
        outs.append(xp.where(here[..., None], part, out[:, :, rows, :]))
        lses.append(xp.where(here, xp.where(some, shift + xp.log(total), -xp.inf), lse[:, :, rows]))
        reads.append(xp.where(here, xp.where(some, seen, 0), read[:, :, rows]))
    return (
        xp.concat([*outs, out[:, :, first.early :, :]], axis=2),
        xp.concat([*lses, lse[:, :, first.early :]], axis=2),
        xp.concat([*reads, read[:, :, first.early :]], axis=2),
    )


def _mean(xp: Any, k: Array, mask: Array | None) -> Array:
    """Mean of the kept keys, (batch, 1, d). Masked keys are zeros."""
    if mask is None:
        return xp.mean(k, axis=1, keepdims=True)
    count = xp.sum(xp.astype(mask, k.dtype), axis=1)
    return xp.sum(k, axis=1, keepdims=True) / xp.where(count > 0, count, 1.0)[:, None, None]


def _seen(problem: Problem) -> Array:
    """Kept keys each query may see, causal, (batch or 1, n_q) int64."""
    xp, n_q, n_k = problem.xp, problem.n_q, problem.n_k
    last = xp.arange(n_q, dtype=xp.int64, device=device(problem.k)) + (n_k - n_q)
    if problem.mask is None:
        return xp.where(last < 0, 0, last + 1)[None, :]
    counts = xp.cumulative_sum(xp.astype(problem.mask, xp.int64), axis=1)
    return xp.where(last < 0, 0, xp.take(counts, xp.where(last < 0, 0, last), axis=1))


def _visible(problem: Problem) -> float:
    """Mean number of keys a query may see."""
    xp, mask = problem.xp, problem.mask
    if problem.causal:
        seen = _seen(problem)
    elif mask is not None:
        seen = xp.sum(xp.astype(mask, xp.int64), axis=1)
    else:
        return float(problem.n_k)
    return float(xp.sum(seen)) / max(1, seen.shape[0] * (seen.shape[1] if problem.causal else 1))
