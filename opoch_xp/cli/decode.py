"""`opoch-xp decode`: a token at a time over a long context, exact attention and the treecode side by side."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter, sleep
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_writeable_array

import opoch_xp
from opoch_xp import workloads
from opoch_xp.arguments import to_host
from opoch_xp.backends import kernels_for
from opoch_xp.backends.numpy import thread_count
from opoch_xp.cache import KVCache
from opoch_xp.cli import tables
from opoch_xp.cli.product import Product
from opoch_xp.cli.rows import arrays_of, library_of
from opoch_xp.cli.tables import Sink, Table
from opoch_xp.measure import machine
from opoch_xp.methods import Exact, Method, Treecode, method_name

Array = Any
Begin = Callable[[str], None]

TOKENS = 1_000_000
PIECE = 65_536  # tokens of the prompt that are made and appended at a time
SAMPLED = 32  # steps whose error is measured: every 8th, but so many at least
SPACING = 8
WARM = 4097  # tokens appended, and one query, before the clock starts: two blocks are split, one token is left
REST = 0.03  # seconds after a product: for so long threads of BLAS may spin, on cores that the next step is to use
PRODUCT = "Exact, BLAS"
DECODING = Treecode(group=8, rtol=0.3, branch=4)  # the query heads of a key head make one group


@dataclass(frozen=True)
class Setup:
    """The options of the command, without the model's."""

    context: int
    new: int
    heads: int
    key_heads: int
    dim: int
    backend: str
    seed: int

    def __post_init__(self) -> None:
        if self.heads % self.key_heads:
            raise ValueError(f"--heads must be a multiple of --key-heads, got {self.heads} and {self.key_heads}")

    @property
    def capacity(self) -> int:
        return self.context + self.new

    @property
    def every(self) -> int:
        return spacing(self.new)


@dataclass(frozen=True)
class Row:
    """One line of the table. seconds: median of a step, and its 99th percentile and maximum; error: mean over sampled
    steps of the Frobenius error of all heads; p99 and max of single queries; rows: read by a query, mean over steps;
    append_seconds: a token of the prompt, mean; bytes: of the arrays held."""

    method: str
    seconds: float
    p99_seconds: float
    max_seconds: float
    speedup: float
    error: float
    p99: float
    max: float
    rows: float
    append_seconds: float
    bytes: int


@dataclass
class Runner:
    """One way to decode, and what was measured of it."""

    name: str
    cache: KVCache | Product
    appended: float = 0.0  # seconds of the whole prompt
    seconds: list[float] = field(default_factory=list)  # of each step
    rows: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)  # of each sampled step
    single: list[float] = field(default_factory=list)  # of each query of those

    def prompt(self, k: Array, v: Array, wait: Callable[[Array], None]) -> None:
        start = perf_counter()
        self.cache.append(k, v)
        wait(k)
        self.appended += perf_counter() - start

    def step(self, q: Array, k: Array, v: Array, wait: Callable[[Array], None]) -> Array:
        """Append a token and attend with its queries."""
        start = perf_counter()
        self.cache.append(k, v)
        found = self.cache.attend(q)
        wait(found.out)
        self.seconds.append(perf_counter() - start)
        self.rows.append(sum(found.report.rows.values()))
        return found.out

    def compare(self, out: np.ndarray, exact: np.ndarray) -> None:
        self.errors.append(float(np.linalg.norm(out - exact) / np.linalg.norm(exact)))
        single = np.linalg.norm(out - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
        self.single.extend(single.reshape(-1).tolist())

    def row(self, exact_seconds: float, context: int) -> Row:
        middle, late = (float(np.percentile(self.seconds, share)) for share in (50, 99))
        return Row(
            self.name,
            seconds=middle,
            p99_seconds=late,
            max_seconds=max(self.seconds),
            speedup=exact_seconds / middle,
            error=float(np.mean(self.errors)),
            p99=float(np.percentile(self.single, 99)),
            max=max(self.single),
            rows=float(np.mean(self.rows)),
            append_seconds=self.appended / context,
            bytes=int(self.cache.nbytes),
        )


def spacing(new: int) -> int:
    """Every how many steps the error is measured."""
    return max(1, min(SPACING, new // SAMPLED))


def methods(setup: Setup) -> list[Method]:
    """Exact, the treecode as it decodes best, and as it comes."""
    group = max(DECODING.group, setup.heads // setup.key_heads)
    return [Exact(), replace(DECODING, group=group, seed=setup.seed), Treecode(seed=setup.seed)]


def measure_decode(setup: Setup, sink: Sink) -> None:
    """Measure and show the table; write the figures where the sink wants them."""
    about = facts(setup.backend, setup.seed)  # an unknown backend is refused here
    about |= {**asdict(setup), "sampled_steps": -(-setup.new // setup.every)}
    with tables.progress(2 + -(-setup.context // PIECE) + setup.new) as begin:
        rows = measure(setup, begin)
    sink.write_json({**about, "rows": [asdict(row) for row in rows]})
    sink.show(table(rows, about, setup.every))


def facts(backend: str, seed: int) -> dict[str, Any]:
    """What a measurement depends on besides its options."""
    return {
        "dtype": "float32",
        "seed": seed,
        "backend": backend,
        "kernels": kernels_for(library_of(backend), named(backend)).name,
        "machine": machine(),
        "threads": thread_count() if backend == "numpy" else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "opoch_xp": opoch_xp.__version__,
    }


def writable(xp: Any) -> bool:
    """Whether arrays of the library can be written to, as `Product` does."""
    return bool(is_writeable_array(xp.zeros(1)))


def named(backend: str) -> str | None:
    """What to give as `backend=`: a library's own kernels are found by its arrays."""
    return "generic" if backend == "generic" else None


def measure(setup: Setup, begin: Begin) -> list[Row]:
    """The prompt goes into every cache, then tokens come one at a time, to each cache in turn."""
    stream, product = workloads.Stream(setup.dim, setup.key_heads, setup.seed), writable(library_of(setup.backend))
    begin("warming up")
    _warm_up(setup)
    runners = [
        Runner(method_name(method), KVCache(method, setup.capacity, backend=named(setup.backend)))
        for method in methods(setup)
    ]
    if product:
        runners.insert(0, Runner(PRODUCT, Product(setup.capacity)))

    def wait(array: Array) -> None:
        kernels_for(array_namespace(array), named(setup.backend)).synchronize(array)

    for start in range(0, setup.context, PIECE):
        begin(f"appending {setup.context:,} tokens")
        k, v = arrays_of(setup.backend, *stream.tokens(min(PIECE, setup.context - start)))
        for runner in runners:
            runner.prompt(k, v, wait)
    begin("the first query")
    (q,) = arrays_of(setup.backend, stream.queries(setup.heads // setup.key_heads))
    for runner in runners:
        runner.cache.attend(q)
    for step in range(setup.new):
        begin(f"token {step + 1:,} of {setup.new:,}")
        q, k, v = arrays_of(setup.backend, stream.queries(setup.heads // setup.key_heads), *stream.tokens(1))
        found = [runner.step(q, k, v, wait) for runner in runners[::-1]][::-1]
        if step % setup.every == 0:
            outs = [to_host(out).astype(np.float64) for out in found]
            for runner, out in zip(runners, outs, strict=True):
                runner.compare(out, outs[0])
        if product:
            sleep(REST)
    fastest = min(float(np.median(runner.seconds)) for runner in runners[: 1 + product])
    return [runner.row(fastest, setup.context) for runner in runners]


def _warm_up(setup: Setup) -> None:
    """Every method on a short cache: start-up and compiling are not of a token."""
    stream = workloads.Stream(setup.dim, setup.key_heads)
    q, k, v = arrays_of(setup.backend, stream.queries(setup.heads // setup.key_heads), *stream.tokens(WARM))
    for method in methods(setup):
        cache = KVCache(method, backend=named(setup.backend))
        cache.append(k, v)
        cache.attend(q)


COLUMNS = [
    "method", "time", "p99 time", "speed-up", "error", "p99 error", "max error", "rows read", "append", "memory",
]  # fmt: skip


def table(rows: Sequence[Row], about: dict[str, Any], every: int) -> Table:
    cells = [
        [
            row.method,
            tables.micro(row.seconds),
            tables.micro(row.p99_seconds),
            tables.factor(row.speedup),
            *(tables.percent(value) for value in (row.error, row.p99, row.max)),
            f"{row.rows:,.0f}",
            tables.micro(row.append_seconds),
            tables.size(row.bytes),
        ]
        for row in rows
    ]
    heads, shared = about["heads"], about["key_heads"]
    run = " to ".join(map(str, workloads.STREAM_RUN))
    what = (
        f"{about['context']:,} tokens of context and {about['new']:,} new ones, {heads} query head{'s' * (heads > 1)} "
        f"on {shared} key head{'s' * (shared > 1)} of {about['dim']}, {about['dtype']}, seed {about['seed']}"
    )
    lines = [
        what,
        f"keys on {workloads.TOPICS:,} topics in runs of {run} tokens; each query on a topic drawn anew each step",
        where(about),
    ]
    return Table("Decoding: topics", lines, COLUMNS, cells, _notes(rows, about, every))


def where(about: dict[str, Any]) -> str:
    """The machine and the versions, as a line above a table."""
    threads = f", threads: {about['threads']}" if about["threads"] else ""
    backend = about["backend"] + (f" ({about['kernels']} kernels)" if about["kernels"] != about["backend"] else "")
    return f"{about['machine']}{threads}; Python {about['python']}, NumPy {about['numpy']}, backend {backend}"


def _notes(rows: Sequence[Row], about: dict[str, Any], every: int) -> list[str]:
    exact = [row for row in rows if row.method.startswith("Exact")]
    fastest, truth = max(exact, key=lambda row: row.speedup).method, exact[0].method
    steps = "all steps" if every == 1 else f"one step in {every}"
    notes = [
        "time: of a new token, its key appended and a query a head attended, median over the steps; the rows of the "
        f"table take turns at every step. speed-up: over {fastest}{', the faster exact row' * (len(exact) > 1)}.",
        f"error: Frobenius norm over all heads of the difference from {truth} in the same step, over that of {truth}, "
        f"mean over {steps}, {about['sampled_steps']:,}; p99 and max: of single queries.",
        "rows read: by a query, mean over the steps; a summary of many keys is a row.",
        "append: of a token of the prompt, mean, splitting and summaries included, for which a new token waits where "
        "it follows a full block; queries of the prompt were not attended.",
        "memory: arrays held, room for the new tokens included.",
    ]
    return notes + [f"{PRODUCT}: q @ k.T, softmax and @ v over plain arrays."] * (len(exact) > 1)
