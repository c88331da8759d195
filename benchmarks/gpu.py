"""The CuPy plugin on a GPU, in one run: against exact attention by cuBLAS, and against PyTorch's on the same memory.

B = 1, 32 heads of 64, bfloat16, causal and not; then the hash kernel against the lesser of copying and multiplying.
Verified before it is timed; every call is warmed up and waited for. **It has not been run yet**: no GPU was at hand.
Needs cupy, ml_dtypes and a PyTorch with CUDA.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import cupy
import ml_dtypes
import torch
from common import Table

import opoch_xp as ox
from opoch_xp import workloads

HEADS, DIM, ROUNDS = 32, 64, 5
SIZES = [1 << power for power in range(12, 21)]
CUBLAS_LIMIT = 1 << 15  # tokens up to which exact attention by cuBLAS is timed in full
ROWS = 2048  # of queries whose logits cuBLAS holds at once
WITHIN = 0.10  # error above which a method's time is not worth printing
METHODS = (
    ox.Treecode(),
    ox.Treecode(rtol=0.2),
    ox.Treecode(block=512, group=16, iterations=2),
)
BYTES = 1 << 28  # of a copy


def seconds(function: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Median wall seconds of calls that are waited for, after one that is not counted."""
    times = []
    for number in range(rounds + 1):
        cupy.cuda.Device().synchronize()
        start = perf_counter()
        function()
        cupy.cuda.Device().synchronize()
        if number:
            times.append(perf_counter() - start)
    return median(times)


def by_cublas(q: Any, k: Any, v: Any, causal: bool) -> Any:
    """Exact attention of (heads, n, d) float32 arrays, ROWS queries at a time, one matrix of logits after another."""
    out = cupy.empty_like(q)
    n = q.shape[1]
    for low in range(0, n, ROWS):
        rows = slice(low, low + ROWS)
        logits = cupy.matmul(q[:, rows], k.transpose(0, 2, 1)) * q.shape[2] ** -0.5
        if causal:
            logits = cupy.where(cupy.arange(n) <= cupy.arange(low, low + logits.shape[1])[:, None], logits, -cupy.inf)
        weight = cupy.exp(logits - logits.max(-1, keepdims=True))
        out[:, rows] = cupy.matmul(weight, v) / weight.sum(-1, keepdims=True)
    return out


def attention(table: Table) -> None:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for n in SIZES:
        wide = [cupy.asarray(x) for x in workloads.make("topics", n, dim=DIM, heads=HEADS)]
        q, k, v = (x.astype(ml_dtypes.bfloat16) for x in wide)
        tensors = [torch.from_dlpack(x)[None].bfloat16() for x in wide]
        for causal in (True, False):
            reference = seconds(partial(sdpa, *tensors, is_causal=causal), 3)
            table.add(n, causal, "PyTorch SDPA, bfloat16", reference, 1.0, 0.0)
            if n <= CUBLAS_LIMIT:
                found = by_cublas(*wide, causal)
                ours = ox.attention(*wide, causal=causal, method=ox.Exact())
                assert float(abs(found - ours).max()) < 1e-3
                taken = seconds(partial(by_cublas, *wide, causal), 3)
                table.add(n, causal, "exact by cuBLAS, float32", taken, reference / taken, 0.0)
            for method in METHODS:
                found = ox.audit(q, k, v, causal=causal, method=method, rows=64)
                error = float(found.error.mean())
                if error > WITHIN:
                    table.add(n, causal, method, "error above 10%", "", error)
                    continue
                taken = seconds(partial(ox.attention, q, k, v, causal=causal, method=method, check=False), 3)
                table.add(n, causal, method, taken, reference / taken, error)


def hashing(table: Table) -> None:
    """Shares of the lesser of two bounds: reading x and writing codes at the rate of a copy; products in float32."""
    source = cupy.ones(BYTES, cupy.uint8)
    copied = 2 * BYTES / seconds(lambda: source.copy())
    a = cupy.ones((8192, 8192), cupy.float32)
    multiplied = 2 * 8192**3 / seconds(lambda: a @ a)
    x = cupy.random.standard_normal((1 << 22, DIM), dtype=cupy.float32)
    for bits, tables in ((16, 1), (12, 8), (16, 16)):
        planes = ox.random_hyperplanes(DIM, bits, tables)
        few = x[:1000]
        assert (ox.hash_codes(few, planes) == ox.hash_codes(few, planes, backend="generic")).mean() > 0.999
        taken = seconds(lambda: ox.hash_codes(x, planes))  # noqa: B023
        by_bytes = (x.nbytes + 8 * tables * len(x)) / copied
        by_products = 2 * len(x) * bits * tables * DIM / multiplied
        bound = "copying" if by_bytes > by_products else "float32 products"
        table.add(
            len(x), "", f"hash_codes, {bits} x {tables}, of {bound}", taken, max(by_bytes, by_products) / taken, ""
        )


def main() -> None:
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    columns = ["tokens", "causal", "what", "time (s)", "times faster, or share of the bound", "error"]
    table = Table("cupy", f"CuPy plugin on {name}: {HEADS} heads of {DIM}, topics", columns)
    attention(table)
    hashing(table)
    table.save()


if __name__ == "__main__":
    main()
