"""Treecode against PyTorch's exact attention: 65,536 tokens scattered, 1,000,000 tokens in topics, one head of 64."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import Table, fresh, in_turn, torch_exact

import opoch_xp as ox
from opoch_xp import workloads
from opoch_xp.backends.numpy import thread_count

SHORT, LONG = 65_536, 1_000_000
SHORT_METHODS = (ox.Exact(), ox.Treecode(), ox.Treecode(rtol=0.002), ox.Treecode(rtol=0.001))
LONG_METHODS = (ox.Treecode(rtol=0.5), ox.Treecode(rtol=0.28, branch=4, group=32), ox.Treecode())
ROUNDS = 5


def short(table: Table) -> None:
    """Methods and yardstick in turn; the ratio is the median over the rounds. Error on 8,192 sampled rows."""
    torch.set_num_threads(thread_count())
    q, k, v = workloads.make("scattered", SHORT)
    arrays = [torch.from_numpy(x)[None] for x in (q, k, v)]

    def calls(method: ox.Exact | ox.Treecode) -> Callable[[], Any]:
        return lambda: ox.attention(q, k, v, causal=True, method=method)

    yardstick = lambda: torch.nn.functional.scaled_dot_product_attention(*arrays, is_causal=True)  # noqa: E731
    reference, *times = in_turn([yardstick, *(calls(method) for method in SHORT_METHODS)], ROUNDS)
    table.add("scattered", SHORT, True, "PyTorch", median(reference), 1.0, 0.0, 0.0, 1.0, "")
    for method, seconds in zip(SHORT_METHODS, times, strict=True):
        ratio = median(a / b for a, b in zip(reference, seconds, strict=True))
        found = fresh("scattered", SHORT, True, method, rows=8192)
        figures = (median(seconds), ratio, found.error, found.p99, found.pairs, found.memory)
        table.add("scattered", SHORT, True, method, *figures)


def long(table: Table, causal: bool) -> None:
    """Each method in a fresh process, against PyTorch's time extrapolated from 4,096 query rows."""
    q, k, v = workloads.make("topics", LONG)
    yardstick = torch_exact(q, k, v, causal)
    del q, k, v
    table.add("topics", LONG, causal, f"PyTorch ({yardstick}, extrapolated)", yardstick.seconds, 1.0, 0.0, 0.0, 1.0, "")
    for method in LONG_METHODS:
        found = fresh("topics", LONG, causal, method)
        ratio = yardstick.seconds / found.seconds
        table.add(
            "topics", LONG, causal, method, found.seconds, ratio, found.error, found.p99, found.pairs, found.memory
        )


def main() -> None:
    sizes = ["workload", "tokens", "causal", "method"]
    table = Table(
        "speed",
        "Treecode against PyTorch's exact attention",
        [*sizes, "time (s)", "times faster", "error", "p99", "pairs", "memory / qkv"],
    )
    short(table)
    for causal in (True, False):
        long(table, causal)
    table.save()


if __name__ == "__main__":
    main()
