"""The PyTorch plugin against scaled_dot_product_attention on a CPU: forward, forward and backward, memory, long input.

Both sides have the same threads and take turns; a ratio is the median over the rounds. Errors and memory come from the
same input, in a process of its own.
"""

import sys
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
from common import SAMPLE, Table, in_turn, median_seconds

import opoch_xp as ox
from opoch_xp import workloads
from opoch_xp.measure import timed

SDPA = torch.nn.functional.scaled_dot_product_attention
FINER = tuple(ox.Treecode(rtol=rtol) for rtol in (0.002,))
LONG = (ox.Treecode(rtol=0.5), ox.Treecode(rtol=0.3, branch=4, group=32))
ROUNDS = 3
MILLION = 1_048_576
SIZES = ["workload", "tokens", "heads", "causal", "pass", "method"]


def arrays(workload: str, n: int, heads: int = 1) -> list[torch.Tensor]:
    """q, k, v (1, heads, n, 64) float32."""
    return [torch.from_numpy(x)[None] for x in workloads.make(workload, n, heads=heads)]


def forward(method: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The output of a method, or of PyTorch where it is None; causal."""
    if method is None:
        return SDPA(q, k, v, is_causal=True)
    return ox.attention(q, k, v, causal=True, method=method, check=False)


def both(method: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Forward and backward."""
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.autograd.grad(forward(method, *given), given, torch.ones_like(v))


def _fresh(queue: Any, call: Callable[..., Any], workload: str, n: int, method: Any, rows: int) -> None:
    small = arrays(workload, 4096)
    call(method, *small)  # loads libraries and starts threads
    q, k, v = arrays(workload, n)
    _, seconds, extra = timed(lambda: call(method, q, k, v))
    out = ox.attend(q, k, v, causal=True, method=method, check=False)
    found = ox.audit(q, k, v, causal=True, output=out, rows=rows)
    queue.put((seconds, float(found.error.max()), found.per_query.p99, (extra or 0) / (3 * q.nbytes)))


def fresh(call: Callable[..., Any], workload: str, n: int, method: Any, rows: int) -> tuple[float, float, float, float]:
    """Seconds, error, p99 and extra memory in units of q, k, v, of one call in a fresh process."""
    context = get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_fresh, args=(queue, call, workload, n, method, rows))
    process.start()
    figures = queue.get()
    process.join()
    return figures


def compare(table: Table, n: int, heads: int, methods: tuple[Any, ...], call: Callable[..., Any], name: str) -> None:
    """Methods and yardstick in turn, on `scattered`."""
    given = arrays("scattered", n, heads)
    reference, *times = in_turn([lambda m=m: call(m, *given) for m in (None, *methods)], ROUNDS)
    table.add("scattered", n, heads, True, name, "PyTorch", median(reference), 1.0, 0.0, 0.0, "")
    for method, seconds in zip(methods, times, strict=True):
        ratio = median(a / b for a, b in zip(reference, seconds, strict=True))
        _, error, p99, memory = fresh(call, "scattered", n, method, 4096)
        table.add("scattered", n, heads, True, name, method, median(seconds), ratio, error, p99, memory)


def million(table: Table) -> None:
    """Each method in a fresh process, against PyTorch's time extrapolated from SAMPLE query rows, halved for causal."""
    q, k, v = arrays("topics", MILLION)
    rows = q[:, :, :: MILLION // SAMPLE][:, :, :SAMPLE].contiguous()
    seconds = median_seconds(partial(SDPA, rows, k, v), 3)[0] * MILLION / SAMPLE / 2
    del q, k, v, rows
    table.add("topics", MILLION, 1, True, "forward", "PyTorch (extrapolated)", seconds, 1.0, 0.0, 0.0, "")
    for method in LONG:
        taken, error, p99, memory = fresh(forward, "topics", MILLION, method, 512)
        table.add("topics", MILLION, 1, True, "forward", method, taken, seconds / taken, error, p99, memory)


def main() -> None:
    table = Table(
        "pytorch",
        "The PyTorch plugin against scaled_dot_product_attention, CPU, float32, d = 64",
        [*SIZES, "time (s)", "times faster", "error", "p99", "memory / qkv"],
    )
    methods = (ox.Exact(), ox.Treecode(), *FINER)
    for n, heads in ((8192, 8), (65_536, 1)):
        compare(table, n, heads, methods, forward, "forward")
    compare(table, 65_536, 1, methods[1:], both, "forward and backward")
    if "--short" not in sys.argv:
        million(table)
    table.save()


if __name__ == "__main__":
    main()
