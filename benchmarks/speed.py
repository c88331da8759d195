"""Treecode against PyTorch's exact attention: 65,536 tokens scattered, 1,000,000 tokens in topics, one head of 64."""

from common import Table, audited, peak_memory, timed_attend, torch_exact

import opoch_xp as ox
from opoch_xp import workloads

SHORT = (
    ox.Treecode(),
    ox.Treecode(open=32, near=16, own=4),
    ox.Treecode(open=32, near=16, own=8, iterations=2),
    ox.Treecode(near=64, own=16),
)
LONG = (ox.Treecode(), ox.Treecode(own=0), ox.Treecode(open=32, near=16, own=0, iterations=2))
CASES = (
    ("scattered", 65_536, True, SHORT, 5),
    ("topics", 1_000_000, True, LONG, 1),
    ("topics", 1_000_000, False, LONG, 1),
)


def main() -> None:
    columns = [
        "workload",
        "tokens",
        "causal",
        "method",
        "time (s)",
        "times faster",
        "error",
        "p99",
        "pairs",
        "memory / qkv",
    ]
    table = Table("speed", "Treecode against PyTorch's exact attention", columns)
    for workload, n, causal, methods, repeats in CASES:
        q, k, v = workloads.make(workload, n)
        yardstick = torch_exact(q, k, v, causal)
        table.add(workload, n, causal, f"PyTorch ({yardstick})", yardstick.seconds, 1.0, 0.0, 0.0, 1.0, "")
        for method in methods if yardstick.extrapolated else (ox.Exact(), *methods):
            few = [x[:, :8192] for x in (q, k, v)]
            ox.attention(*few, causal=causal, method=method)  # warm-up
            seconds, result = timed_attend((q, k, v), causal, method, repeats)
            found, pairs = (
                audited(q, k, v, causal, result, 512 if yardstick.extrapolated else 8192),
                result.report.pairs,
            )
            del result
            memory = peak_memory(workload, n, causal, method)
            table.add(workload, n, causal, method, seconds, yardstick.seconds / seconds, float(found.error[0]),
                      found.per_query.p99, pairs, memory)  # fmt: skip
    table.save()


if __name__ == "__main__":
    main()
