"""The index against the straightforward Python of a dictionary of lists, and against faiss at equal recall.

Needs faiss-cpu (the dependency group bench). Identical candidates are asserted before anything is timed.
"""

from collections import defaultdict
from statistics import median
from time import perf_counter
from typing import Any

import faiss
import numpy as np
from common import Table, in_turn, median_seconds

import opoch_xp as ox
from opoch_xp import vectors
from opoch_xp.backends.numpy import thread_count

BITS, TABLES, DIM = 16, 16, 64
QUERIES = 10_000  # of a batch of candidates
PYTHON_QUERIES = 1000  # that the yardstick answers, one at a time
BATCH = 1000  # queries of a search
K = 10


class Lists:
    """The yardstick: one dictionary of lists a table, one vector at a time."""

    def __init__(self, planes: np.ndarray) -> None:
        self.planes, self.powers = planes, 1 << np.arange(planes.shape[1])
        self.tables: list[dict[int, list[int]]] = [defaultdict(list) for _ in planes]

    def codes(self, row: np.ndarray) -> list[int]:
        return [int(((normals @ row) >= 0) @ self.powers) for normals in self.planes]

    def add(self, x: np.ndarray) -> None:
        for number, row in enumerate(x):
            for table, code in zip(self.tables, self.codes(row), strict=True):
                table[code].append(number)

    def candidates(self, row: np.ndarray) -> set[int]:
        found: set[int] = set()
        for table, code in zip(self.tables, self.codes(row), strict=True):
            found.update(table.get(code, ()))
        return found


def different(index: Any, lists: Lists, x: np.ndarray, q: np.ndarray) -> tuple[int, int]:
    """(queries whose candidates differ, vectors and queries with a projection within rounding of 0)."""
    offsets, ids = index.candidates(q)
    wrong = sum(set(ids[offsets[i] : offsets[i + 1]].tolist()) != lists.candidates(row) for i, row in enumerate(q))
    normals, close = lists.planes.reshape(-1, x.shape[1]).T.astype(np.float64), 0
    for part in (x, q):
        limit = np.finfo(np.float32).eps * x.shape[1] * np.linalg.norm(part, axis=1)[:, None]
        close += int((np.abs(part.astype(np.float64) @ normals) < limit * np.linalg.norm(normals, axis=0)).any(1).sum())
    return wrong, close


def same_on_whole_numbers() -> None:
    rng = np.random.default_rng(0)
    x, q = (rng.integers(-4, 5, (n, DIM)).astype(np.float32) for n in (20_000, 500))
    planes = rng.integers(-4, 5, (TABLES, BITS, DIM)).astype(np.float32)
    index, lists = ox.LSHIndex(DIM, BITS, TABLES, metric="inner"), Lists(planes)
    index._planes = planes
    index.add(x)
    lists.add(x)
    assert different(index, lists, x, q)[0] == 0


def against_lists(table: Table) -> None:
    for n in (100_000, 1_000_000):
        x, q, _ = vectors.make("random", n, QUERIES, DIM)
        index = ox.LSHIndex(DIM, BITS, TABLES, metric="inner")
        lists = Lists(index._planes)
        start = perf_counter()
        lists.add(x)
        theirs = perf_counter() - start
        ours, index = median_seconds(lambda: built(x), 5)  # noqa: B023
        table.add(f"build, {n:,} vectors", theirs, ours, theirs / ours, "")
        start = perf_counter()
        for row in q[:PYTHON_QUERIES]:
            lists.candidates(row)
        theirs = (perf_counter() - start) / PYTHON_QUERIES
        ours = median_seconds(lambda: index.candidates(q), 5)[0] / QUERIES  # noqa: B023
        sample = slice(0, 20_000)
        wrong, close = different(index, lists, x[sample], q[:PYTHON_QUERIES])
        said = f"{wrong} of {PYTHON_QUERIES:,} sets differ; {close} of 21,000 rows within rounding of a hyperplane"
        table.add(f"candidates a query, {n:,} vectors", theirs, ours, theirs / ours, said)


def built(x: np.ndarray) -> Any:
    index = ox.LSHIndex(DIM, BITS, TABLES, metric="inner")
    index.add(x)
    return index


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, truth, strict=True)]))


def against_faiss(table: Table, n: int) -> None:
    """Every index answers the same batch in turn, three rounds; recall on that batch."""
    faiss.omp_set_num_threads(thread_count())
    x, q, _ = vectors.make("clustered", n, 2 * BATCH, DIM)
    q, known = q[:BATCH], q[BATCH:]  # settings are chosen on other queries
    exact = ox.LSHIndex(DIM, 0, 1)
    exact.add(x)
    truth = exact.search(q, K, exact=True).ids
    searches: dict[str, Any] = {"exact search": lambda: exact.search(q, K, exact=True).ids}
    for wanted in (0.5, 0.7, 0.9, 0.95, 0.99):
        found = exact.tune(known, K, wanted)
        index = exact.rebuilt(**found.settings)
        searches[f"LSHIndex {found.bits} x {found.tables}, {found.probes} probes"] = lambda index=index: (
            index.search(q, K).ids
        )
    for bits in (64, 128, 256, 512, 1024, 2048):
        other = faiss.IndexLSH(DIM, bits)
        other.add(x)
        searches[f"faiss IndexLSH {bits} bits"] = lambda other=other: other.search(q, K)[1]
    cells = int(4 * n**0.5)
    ivf = faiss.IndexIVFFlat(faiss.IndexFlatIP(DIM), DIM, cells, faiss.METRIC_INNER_PRODUCT)
    ivf.train(x)
    ivf.add(x)
    for probes in (1, 2, 4, 16):

        def search(probes: int = probes) -> np.ndarray:
            ivf.nprobe = probes
            return ivf.search(q, K)[1]

        searches[f"faiss IVF-Flat {cells} cells, {probes} probed"] = search
    graph = faiss.IndexHNSWFlat(DIM, 32, faiss.METRIC_INNER_PRODUCT)
    graph.add(x)
    for breadth in (16, 64, 256):

        def walk(breadth: int = breadth) -> np.ndarray:
            graph.hnsw.efSearch = breadth
            return graph.search(q, K)[1]

        searches[f"faiss HNSW 32, breadth {breadth}"] = walk
    times = in_turn(list(searches.values()), 3)
    for (name, search_), seconds in zip(searches.items(), times, strict=True):
        table.add(f"{n:,}", name, recall(search_(), truth), 1e6 * median(seconds) / BATCH)


def main() -> None:
    same_on_whole_numbers()
    title = f"Index: {BITS} bits x {TABLES} tables, d = {DIM}, against dictionaries of lists"
    table = Table("index", title, ["what", "lists (s)", "LSHIndex (s)", "times faster", "candidates"])
    against_lists(table)
    table.save()
    title = f"Search for {K} of clustered vectors, d = {DIM}, {BATCH:,} queries a batch"
    table = Table("faiss", title, ["vectors", "index", f"recall@{K}", "us a query"])
    against_faiss(table, 100_000)
    table.save()


if __name__ == "__main__":
    main()
