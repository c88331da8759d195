"""`opoch-xp needle`: what random-hyperplane tables find, and at what cost, over sweeps of bits and tables."""

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np

import opoch_xp
from opoch_xp import vectors
from opoch_xp.backends.numpy import thread_count
from opoch_xp.cli import tables
from opoch_xp.cli.tables import Sink, Table
from opoch_xp.index import LSHIndex
from opoch_xp.measure import machine, timed

SIZES = (100_000, 1_000_000)
PUBLISHED = ((12, 16), (10, 20), (8, 32), (6, 50))  # bits x tables at 100,000 vectors
MORE_BITS = 4  # of the published settings at a million
NEIGHBOURS = 50  # of recall
SIMILARITY_ROWS = 32  # queries whose similarity with every vector is taken at once

Begin = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """The options of the command. sizes and settings: empty for the published ones."""

    workload: str
    sizes: tuple[int, ...]
    settings: tuple[tuple[int, int], ...]
    probes: int
    dim: int
    queries: int
    cosine: float
    seed: int

    def settings_for(self, n: int) -> tuple[tuple[int, int], ...]:
        if self.settings:
            return self.settings
        return tuple((bits + MORE_BITS * (n >= SIZES[1]), count) for bits, count in PUBLISHED)


@dataclass(frozen=True)
class Brute:
    """All queries against all vectors: seconds of one product per batch and the choice of the 50 best; of the product
    alone; and the places of those best (queries, 50)."""

    seconds: float
    product: float
    best: np.ndarray


@dataclass(frozen=True)
class Row:
    """One setting on one set of vectors; times in seconds, shares of 1, all of it measured but total_seconds."""

    bits: int
    tables: int
    probes: int
    build_seconds: float
    query_seconds: float
    total_seconds: float
    speedup: float
    extra_bytes: int | None
    candidates: float
    recall: float
    top1: float
    ratio: float
    sigmas: float
    found: float
    expected: float


def measure_needles(setup: Setup, sink: Sink) -> None:
    """Measure and show a table for every size; write the figures where the sink wants them."""
    found = results(setup)
    sink.write_json(found)
    sink.write_csv(
        [
            {**{key: result[key] for key in ("workload", "n", "dim")}, **row}
            for result in found
            for row in result["rows"]
        ]
    )
    for result in found:
        sink.show(table(result))


def results(setup: Setup) -> list[dict[str, Any]]:
    """What was measured for every size, as it goes to JSON: facts of the run, and under `rows` a row a setting."""
    sizes = setup.sizes or (SIZES if setup.workload != "embeddings" else (vectors.available_embeddings(setup.queries),))
    found = []
    with tables.progress(sum(2 + len(setup.settings_for(n)) for n in sizes)) as begin:
        for n in sizes:
            rows, about = measure(setup, n, begin)
            found.append({**about, "rows": [asdict(row) for row in rows]})
    return found


def measure(setup: Setup, n: int, begin: Begin) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one size, and what they were measured on."""
    begin(f"making {n:,} {setup.workload} vectors")
    x, q, needles = vectors.make(setup.workload, n, setup.queries, setup.dim, setup.cosine, setup.seed)
    begin("brute force")
    brute = brute_force(x, q)
    rows = []
    for bits, count in setup.settings_for(n):
        begin(f"{bits} bits x {count} tables, {n:,} vectors")
        rows.append(
            row_of(x, q, needles, brute, LSHIndex(x.shape[1], bits, count, min(setup.probes, 2**bits), seed=setup.seed))
        )
    about = {
        "workload": setup.workload,
        "n": n,
        "dim": x.shape[1],
        "queries": setup.queries,
        "cosine": setup.cosine,
        "seed": setup.seed,
        "brute_seconds": brute.seconds / len(q),
        "product_seconds": brute.product / len(q),
        "machine": machine(),
        "threads": thread_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "opoch_xp": opoch_xp.__version__,
    }
    return rows, about


def brute_force(x: np.ndarray, q: np.ndarray) -> Brute:
    """The yardstick: products in float32 over all cores, as one matrix, and the 50 best of each query."""
    index = LSHIndex(x.shape[1], bits=0, tables=1, metric="inner")
    index.add(x)
    index.search(q[:2], NEIGHBOURS, exact=True)
    start = perf_counter()
    best = index.search(q, NEIGHBOURS, exact=True).ids
    seconds = perf_counter() - start
    step = max(1, min(len(q), (1 << 27) // len(x)))  # a product of half a GB at most
    product = np.full((step, len(x)), 0, np.float32)  # written to before, so that its memory is there
    np.matmul(q[:step], x.T, out=product[: len(q[:step])])
    start = perf_counter()
    for low in range(0, len(q), step):
        rows = q[low : low + step]
        np.matmul(rows, x.T, out=product[: len(rows)])
    return Brute(seconds, perf_counter() - start, best)


def row_of(x: np.ndarray, q: np.ndarray, needles: np.ndarray, brute: Brute, index: LSHIndex) -> Row:
    """One setting: the index is built, and asked for the 50 best of every query in one call."""
    settings, (m, n) = index.settings, (len(q), len(x))
    LSHIndex(x.shape[1], settings.bits, settings.tables).add(x[:1000])

    def build_and_search() -> tuple[float, float, np.ndarray]:
        start = perf_counter()
        index.add(x)
        built = perf_counter()
        found = index.search(q, NEIGHBOURS).ids
        return built - start, perf_counter() - built, found

    (build, query, found), _, extra = timed(build_and_search)
    wanted = brute.best[:, : min(NEIGHBOURS, n)]
    shares = np.array([len(np.intersect1d(a, b)) for a, b in zip(found, wanted, strict=True)]) / wanted.shape[1]
    share, ratio, sigmas, hits = _candidate_figures(x, q, needles, index)
    match = 1 - np.arccos(np.clip(np.sum(q * x[needles], axis=1), -1, 1)) / np.pi
    chance = 1 - (1 - match**settings.bits) ** settings.tables
    return Row(
        settings.bits,
        settings.tables,
        settings.probes,
        build_seconds=build,
        query_seconds=query / m,
        total_seconds=build + query / m * n,
        speedup=brute.seconds / query,
        extra_bytes=extra,
        candidates=share,
        recall=float(shares.mean()),
        top1=float((found[:, 0] == brute.best[:, 0]).mean()),
        ratio=ratio,
        sigmas=sigmas,
        found=hits,
        expected=float(chance.mean()),
    )


def _candidate_figures(
    x: np.ndarray, q: np.ndarray, needles: np.ndarray, index: LSHIndex
) -> tuple[float, float, float, float]:
    """Share of the vectors that are candidates; mean similarity of candidates over that of all; the same as a
    difference in standard deviations of all; share of the needles that are candidates."""
    count, near, every, squares, hits = 0, 0.0, 0.0, 0.0, 0
    for low in range(0, len(q), SIMILARITY_ROWS):
        rows = slice(low, low + SIMILARITY_ROWS)
        offsets, ids = index.candidates(q[rows])
        similarity = q[rows] @ x.T
        owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        count += len(ids)
        near += float(similarity[owner, ids].sum(dtype=np.float64))
        every += float(similarity.sum(dtype=np.float64))
        squares += float(np.vdot(similarity, similarity))
        hits += int((ids == needles[rows][owner]).sum())
    total = len(q) * len(x)
    mean, deviation = every / total, max(squares / total - (every / total) ** 2, 0.0) ** 0.5
    if count == 0 or deviation == 0:
        return count / total, float("nan"), float("nan"), hits / len(q)
    return count / total, near / count / mean, (near / count - mean) / deviation, hits / len(q)


COLUMNS = [
    "bits x tables", "build", "per query", "all N", "speed-up", "extra memory", "candidates", "recall@50", "top-1",
    "needle", "model", "sigmas", "ratio",
]  # fmt: skip


NOTES = [
    "per query: its 50 best by exact score, all queries in one call; ~ all N: build and as many queries as vectors, "
    "extrapolated.",
    "speed-up: over brute force, one product per batch on all cores and the choice of the 50 best.",
    "recall@50: share of the true 50 best that were found; top-1: the best was; needle: it was a candidate; model: the "
    "share of needles that 1 - (1 - (1 - angle / pi)**bits)**tables expects of one probe.",
    "sigmas: mean similarity of candidates above that of all vectors, in standard deviations of all; ratio: of the two "
    "means, which on centred data divides by a number near zero.",
    "extra memory: high-water mark of build and queries above the vectors.",
]


def table(result: dict[str, Any]) -> Table:
    cells = []
    for row in result["rows"]:
        probes = f", {row['probes']} probes" if row["probes"] > 1 else ""
        cells.append(
            [
                f"{row['bits']} x {row['tables']}{probes}",
                tables.seconds(row["build_seconds"]),
                tables.micro(row["query_seconds"]),
                tables.seconds(row["total_seconds"], True),
                tables.factor(row["speedup"]),
                tables.size(row["extra_bytes"]),
                *(tables.percent(row[name]) for name in ("candidates", "recall", "top1", "found", "expected")),
                "" if np.isnan(row["sigmas"]) else f"{row['sigmas']:.2f}",
                "" if np.isnan(row["ratio"]) else f"{row['ratio']:,.1f}",
            ]
        )
    needle = f"each with a needle at cosine {result['cosine']:g} among the vectors"
    product = f"one product of all with all alone {tables.micro(result['product_seconds'])}"
    about = [
        f"{result['n']:,} vectors of {result['dim']}, {result['queries']:,} queries, {needle}, seed {result['seed']}",
        f"{result['machine']}, threads: {result['threads']}; Python {result['python']}, NumPy {result['numpy']}",
        f"brute force: {tables.micro(result['brute_seconds'])} per query, {product}",
    ]
    return Table(f"Needles: {result['workload']}", about, COLUMNS, cells, NOTES)
