"""Shared buckets at 1,000,000 tokens: the whole attention output; and hashing against its bare matrix product."""

import numpy as np
from common import Table, audited, median_seconds, timed_attend
from threadpoolctl import threadpool_limits

import opoch_xp as ox
from opoch_xp.backends.numpy import thread_count
from opoch_xp.methods import method_name

N = 1_000_000


def unit(rng: np.random.Generator, dim: int) -> np.ndarray:
    x = rng.standard_normal((1, N, dim), np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    return x


def main() -> None:
    rng = np.random.default_rng(0)
    table = Table("lsh", f"LSH, {N:,} random unit vectors", ["what", "time (s)", "error", "pairs or ratio"])
    q, k, v = (unit(rng, 64) for _ in range(3))
    for method in (ox.LSH(bits=16, tables=8), ox.LSH(bits=12, tables=8)):
        seconds, result = timed_attend((q, k, v), False, method, 1)
        error = float(audited(q, k, v, False, result).error[0])
        table.add(f"attention, {method_name(method)}, d = 64, not causal", seconds, error, result.report.pairs)
    for tables in (1, 8):
        planes = ox.random_hyperplanes(128, bits=16, tables=tables)
        q, k = unit(rng, 128), unit(rng, 128)
        flat = np.ascontiguousarray(planes.reshape(-1, 128).T)
        with threadpool_limits(thread_count(), user_api="blas"):
            bare, _ = median_seconds(lambda: (q[0] @ flat, k[0] @ flat), 5)  # noqa: B023
        seconds, _ = median_seconds(lambda: (ox.hash_codes(q, planes), ox.hash_codes(k, planes)), 5)  # noqa: B023
        table.add(f"two bare products, 16 bits x {tables}, d = 128", bare, "", 1.0)
        table.add(f"hashing q and k, 16 bits x {tables}, d = 128", seconds, "", seconds / bare)
    table.save()


if __name__ == "__main__":
    main()
