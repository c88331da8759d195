"""Decoding over a KVCache: a step against exact attention by BLAS, what a token costs to append, memory offloaded.

8 query heads on one key head of 64, keys on 1,024 topics in runs of 32 to 512 tokens, each query on a topic of its own.
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from time import perf_counter, sleep
from typing import Any

import numpy as np
from common import Table

import opoch_xp as ox
from opoch_xp import workloads
from opoch_xp.cli.product import Product
from opoch_xp.measure import most_resident, resident

DIM, HEADS = 64, 8
ONE_MILLION = 1_000_000
LENGTHS = (65_536, 262_144, 1_048_576)
PLACES = 16  # spread over the second half of a length
REST = 0.2  # seconds before a method's steps: after a product, threads of BLAS spin for a while on cores in need
PIECE = 65_536  # tokens appended at a time
MAPPED = 4_000_000  # tokens of the cache in files
METHODS = (
    ox.Treecode(group=8, rtol=0.3, branch=4),
    ox.Treecode(group=8, rtol=0.2),
    ox.Treecode(group=8),
)


@dataclass
class Measured:
    """Times of steps by place, in a row and after other memory was read; errors of steps and of queries; rows read."""

    times: list[list[float]] = field(default_factory=list)
    cold: list[list[float]] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    single: list[float] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)

    def compare(self, outs: list[np.ndarray], exact: list[np.ndarray]) -> None:
        for out, right in zip(outs, exact, strict=True):
            wrong = out.astype(np.float64) - right
            self.errors.append(float(np.linalg.norm(wrong) / np.linalg.norm(right)))
            self.single += (np.linalg.norm(wrong, axis=-1) / np.linalg.norm(right, axis=-1)).ravel().tolist()


def seconds(times: list[list[float]]) -> float:
    """Of a step: the median at each place, their mean over the places."""
    return mean(map(median, times))


def filled(stream: workloads.Stream, caches: list[Any], start: int, stop: int) -> None:
    for low in range(start, stop, PIECE):
        k, v = stream.tokens(min(PIECE, stop - low))
        for cache in caches:
            cache.append(k, v)


def measured(
    tokens: int, places: list[int], method: Any, times: int, found: tuple[Measured, Measured], seed: int
) -> None:
    """BLAS and the method in turn at every place, the only caches in memory: steps in a row, each a token appended and
    attended, the first of which does not count; then steps after as much other memory was read as BLAS reads."""
    stream, capacity = workloads.Stream(DIM, seed=seed), tokens + len(places) * (2 * times + 1)
    caches: list[Any] = [Product(capacity), ox.KVCache(method, capacity)]
    other = np.ones(2 * DIM * tokens, np.float32)
    for place in places:
        filled(stream, caches, len(caches[0]), place)
        steps = [(*stream.tokens(1), stream.queries(HEADS)) for _ in range(1 + 2 * times)]
        exact: list[np.ndarray] = []
        for cache, one in zip(caches, found, strict=True):
            spent, outs = [], []
            sleep(REST)
            for number, (k, v, q) in enumerate(steps):
                if number > times:
                    other.sum()
                start = perf_counter()
                cache.append(k, v)
                result = cache.attend(q)
                spent.append(perf_counter() - start)
                outs.append(result.out)
                one.rows.append(sum(result.report.rows.values()))
            exact = exact or [out.astype(np.float64) for out in outs]
            one.times.append(spent[1 : times + 1])
            one.cold.append(spent[times + 1 :])
            one.compare(outs, exact)


def spread(tokens: int) -> list[int]:
    """Places in the second half of a length, one in each part of it, drawn."""
    rng, half = np.random.default_rng(0), tokens // 2
    return [half + int((number + rng.random()) * half / PLACES) for number in range(PLACES)]


def steps() -> None:
    table = Table(
        "decode",
        "A step of decoding over a KVCache, 8 query heads on 1 key head of 64, keys in runs of 32 to 512 tokens",
        ["tokens", "method", "step (ms)", "times faster", "cold (ms)", "times faster", "error", "p99", "rows read"],
    )
    cases = [(f"{ONE_MILLION:,}, 2 seeds", ONE_MILLION, [ONE_MILLION], 31, range(2))]
    cases += [(f"{n // 2:,} to {n:,}", n, spread(n), 7, range(1)) for n in LENGTHS]
    for name, tokens, places, times, seeds in cases:
        for method in (ox.Exact(), *METHODS):
            exact, one = found = Measured(), Measured()
            for seed in seeds:
                measured(tokens, places, method, times, found, seed)
            whole, cold = seconds(exact.times), seconds(exact.cold)
            table.add(name, "exact, BLAS", 1e3 * whole, 1.0, 1e3 * cold, 1.0, 0.0, 0.0, int(mean(exact.rows)))
            a, b, p99 = seconds(one.times), seconds(one.cold), float(np.percentile(one.single, 99))
            figures = (1e3 * a, whole / a, 1e3 * b, cold / b, mean(one.errors), p99, int(mean(one.rows)))
            table.add(name, method, *figures)
    table.save()


def appended() -> None:
    """A token at a time and in pieces, to 1,048,576 and one more; what the token after a full chunk waits for."""
    table = Table(
        "append",
        "Appending to a KVCache, one key head of 64",
        ["method", "how", "tokens", "us a token", "longest wait (ms)", "of"],
    )
    tokens = LENGTHS[-1] + 1
    k, v = workloads.Stream(DIM).tokens(tokens)
    for method in (ox.Treecode(), ox.Treecode(leaf=8), ox.Exact()):
        token_by_token(method, k, v)  # memory that no process had before is slow to come by on a virtual machine
        waits = token_by_token(method, k, v)
        total = waits.sum()
        table.add(method, "a token at a time", tokens, 1e6 * total / tokens, 1e3 * waits.max(), "any token")
        for tier, size in enumerate(sizes(method, tokens)):
            after = np.arange(size, tokens, size)
            after = after[after % (size * method.fan) != 0] if size * method.fan < tokens else after
            table.add(
                method, f"after tier {tier}, {size:,}", len(after), "", 1e3 * float(np.median(waits[after])), "median"
            )
        cache = ox.KVCache(method, tokens)
        start = perf_counter()
        for low in range(0, tokens, PIECE):
            cache.append(k[:, low : low + PIECE], v[:, low : low + PIECE])
        table.add(method, f"{PIECE:,} at a time", tokens, 1e6 * (perf_counter() - start) / tokens, "", "")
    table.save()


def sizes(method: Any, tokens: int) -> Iterator[int]:
    """Keys of a chunk of every tier that fills."""
    size = method.block if isinstance(method, ox.Treecode) else tokens
    while size < tokens:
        yield size
        size *= method.fan


def token_by_token(method: Any, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Seconds of every append."""
    cache = ox.KVCache(method, k.shape[1])
    places = range(k.shape[1] + 1)
    tokens = [(k[:, a:b], v[:, a:b]) for a, b in pairwise(places)]
    waits = np.empty(k.shape[1])
    for number, token in enumerate(tokens):
        start = perf_counter()
        cache.append(*token)
        waits[number] = perf_counter() - start
    return waits


def _mapped(queue: Any, method: ox.Treecode, folder: str | None, finest: bool) -> None:
    """A cache of MAPPED tokens, and steps over it: resident bytes above what the process had before, and outputs."""
    warm = ox.KVCache(method)
    stream = workloads.Stream(DIM)
    filled(stream, [warm], 0, 2 * PIECE)
    warm.attend(stream.queries(HEADS))
    del warm
    stream, before = workloads.Stream(DIM, seed=2), resident()
    cache = ox.KVCache(method, MAPPED + 1000, offload=folder, offload_finest=finest)
    start = perf_counter()
    building = 0
    for low in range(0, MAPPED, PIECE):
        cache.append(*stream.tokens(min(PIECE, MAPPED - low)))
        building = max(building, resident() - before)
    seconds = perf_counter() - start
    outputs, times, most = [], [], 0
    for _ in range(200):
        (k, v), q = stream.tokens(1), stream.queries(HEADS)
        start = perf_counter()
        cache.append(k, v)
        outputs.append(cache.attend(q).out)
        times.append(perf_counter() - start)
        most = max(most, resident() - before)
    peak = most_resident() - before
    queue.put((cache.nbytes, peak, building, most, seconds, median(times), np.stack(outputs)))


def offloaded() -> None:
    table = Table(
        "offload",
        f"{MAPPED:,} tokens in files that are mapped into memory, one key head of 64, 200 steps of 8 queries",
        [
            "method", "where", "bytes (GB)", "resident, steps", "between appends", "at the most", "us a token",
            "step (ms)", "same output",
        ],
    )  # fmt: skip
    for method in (ox.Treecode(leaf=8), ox.Treecode()):
        expected = None
        for name, mapped, finest in (
            ("memory", False, False),
            ("files", True, False),
            ("files, finest too", True, True),
        ):
            with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
                queue = get_context("spawn").Queue()
                process = get_context("spawn").Process(
                    target=_mapped, args=(queue, method, folder if mapped else None, finest)
                )
                process.start()
                size, peak, building, most, seconds, step, out = queue.get()
                process.join()
            expected = out if expected is None else expected
            same = bool(np.array_equal(out, expected))
            shares = (f"{100 * x / size:.1f}%" for x in (most, building, peak))
            table.add(method, name, size / 1e9, *shares, 1e6 * seconds / MAPPED, 1e3 * step, same)
    table.save()


PARTS = {"steps": steps, "append": appended, "offload": offloaded}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
