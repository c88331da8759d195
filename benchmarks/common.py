"""What the benchmark scripts share: the yardstick, timing, and the table that is printed and kept."""

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

import opoch_xp as ox
from opoch_xp import workloads
from opoch_xp.attention import Attention
from opoch_xp.backends.numpy import thread_count
from opoch_xp.measure import machine, timed
from opoch_xp.methods import Method, method_name

RESULTS = Path(__file__).with_name("results")
SAMPLE = 4096  # query rows that a long exact run is extrapolated from


@dataclass(frozen=True)
class Yardstick:
    """Seconds of PyTorch's exact attention; extrapolated when timed on SAMPLE rows only."""

    seconds: float
    extrapolated: bool

    def __str__(self) -> str:
        return f"{'~' if self.extrapolated else ''}{self.seconds:.3g} s"


def median_seconds(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median wall seconds of `repeats` calls after one warm-up (none for a single call), and the last result."""
    times, result = [], None
    for number in range(repeats + (repeats > 1)):
        start = perf_counter()
        result = function()
        if number or repeats == 1:
            times.append(perf_counter() - start)
    return median(times), result


def timed_attend(
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray], causal: bool, method: Any, repeats: int
) -> tuple[float, Attention]:
    """Median seconds of a method, and its last result."""
    return median_seconds(lambda: ox.attend(*arrays, causal=causal, method=method, check=False), repeats)


def in_turn(functions: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Wall seconds of each function in each of `rounds` rounds: taken in turn, a slow spell meets them all alike."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, seconds in zip(functions, times, strict=True):
            start = perf_counter()
            function()
            seconds.append(perf_counter() - start)
    return times


def torch_exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, repeats: int = 5) -> Yardstick:
    """PyTorch's scaled_dot_product_attention, with the threads of the NumPy plugin; q, k, v (heads, n, d).

    Above 100,000 tokens: SAMPLE query rows against all keys, times n / SAMPLE, and half of that when causal.
    """
    import torch

    torch.set_num_threads(thread_count())
    attend = torch.nn.functional.scaled_dot_product_attention
    n = q.shape[1]
    arrays = [torch.from_numpy(x)[None] for x in (q, k, v)]
    if n <= 100_000:
        return Yardstick(median_seconds(lambda: attend(*arrays, is_causal=causal), repeats)[0], False)
    rows = torch.from_numpy(np.ascontiguousarray(q[:, :: n // SAMPLE][:, :SAMPLE]))[None]
    seconds, _ = median_seconds(lambda: attend(rows, *arrays[1:]), 3)
    return Yardstick(seconds * n / SAMPLE / (2 if causal else 1), True)


@dataclass(frozen=True)
class Fresh:
    """One call in a process of its own: memory is its high-water mark above its inputs, in units of their bytes."""

    seconds: float
    memory: float
    error: float
    p99: float
    pairs: float


def _run(queue: Any, workload: str, n: int, causal: bool, method: Any, rows: int) -> None:
    small = workloads.make(workload, 8192)
    ox.attention(*small, causal=causal, method=method)  # loads libraries and starts threads
    q, k, v = workloads.make(workload, n)
    result, seconds, extra = timed(lambda: ox.attend(q, k, v, causal=causal, method=method))
    found = audited(q, k, v, causal, result, rows)
    memory = (extra or 0) / (q.nbytes + k.nbytes + v.nbytes)
    queue.put(Fresh(seconds, memory, float(found.error[0]), found.per_query.p99, result.report.pairs))


def fresh(workload: str, n: int, causal: bool, method: Any, rows: int = 512) -> Fresh:
    """Time, memory and error of one call in a fresh process."""
    context = get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_run, args=(queue, workload, n, causal, method, rows))
    process.start()
    figures = queue.get()
    process.join()
    return figures


def audited(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool, result: Attention, rows: int = 512) -> ox.Audit:
    """The audit of a result at hand."""
    return ox.audit(q, k, v, causal=causal, output=result, rows=rows)


class Table:
    """Rows as they come, printed as Markdown at once and kept as JSON at the end."""

    def __init__(self, name: str, title: str, columns: list[str]) -> None:
        import torch

        self.name, self.title, self.columns, self.rows = name, title, columns, []
        self.about = {
            "machine": machine(),
            "date": date.today().isoformat(),
            "threads": thread_count(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
        }
        where = ", ".join(f"{key} {value}" for key, value in self.about.items())
        print(f"\n## {title}\n\n{where}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)

    def add(self, *cells: Any) -> None:
        cells = tuple(method_name(cell) if isinstance(cell, Method) else cell for cell in cells)
        shown = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        self.rows.append([cell if isinstance(cell, float | int) else str(cell) for cell in cells])
        print(f"| {' | '.join(shown)} |", flush=True)

    def save(self) -> None:
        RESULTS.mkdir(exist_ok=True)
        content = {"title": self.title, **self.about, "columns": self.columns, "rows": self.rows}
        (RESULTS / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n")
