"""`opoch-xp wall`: attention over a million tokens, method by method, on made and on real input."""

import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import opoch_xp
from opoch_xp import workloads
from opoch_xp.arguments import to_host
from opoch_xp.attention import attend
from opoch_xp.backends.numpy import thread_count
from opoch_xp.cli import tables
from opoch_xp.cli.rows import (
    AUDIT_ROWS,
    Input,
    Row,
    arrays_of,
    check,
    error_notes,
    kernels,
    materialised_row,
    measure_rows,
)
from opoch_xp.cli.tables import Sink, Table
from opoch_xp.data import byte_model
from opoch_xp.measure import machine
from opoch_xp.methods import LSH, Exact, Method, Treecode, method_name

TOKENS = 1_000_000
BUCKET = 16  # keys a bucket that an LSH table is sized for: 16 bits at a million tokens
HEADS_BUCKET = 32  # on the model's heads: 8 bits at 8,192 tokens
HEADS_WINDOW = 512  # recent keys that LSH reads beside its buckets on the model's heads
WINDOW = 1024  # of "window only": what the context beyond it is worth is its distance from exact

Begin = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """The options of the command; None is its default, which depends on the workload."""

    workload: str | None
    tokens: int | None
    dim: int
    heads: int | None
    causal: bool
    backend: str
    seed: int


@dataclass(frozen=True)
class Plan:
    """One table: its input's name and sizes, and the methods with the names they go by."""

    setup: Setup
    workload: str
    tokens: int
    dim: int
    heads: int | None
    methods: list[tuple[str | None, Method]]

    @property
    def bits(self) -> bool:
        """Whether the model's bits per byte are measured: it was trained causal."""
        return self.workload == "heads" and self.setup.causal

    @property
    def steps(self) -> int:
        return 2 + len(self.methods) + (1 + len(self.methods) if self.bits else 0)


def lsh(tokens: int, bucket: int, seed: int, window: int = 0) -> LSH:
    """LSH of 8 tables whose buckets hold about `bucket` keys where keys have no structure."""
    bits = min(62, max(1, round(math.log2(tokens / bucket)))) if tokens > bucket else 1
    return LSH(bits=bits, tables=8, window=window, seed=seed)


def plans(setup: Setup) -> list[Plan]:
    """The two usual tables, or the one that was asked for."""
    if setup.workload is None:
        few = min(setup.tokens or byte_model.CONTEXT, byte_model.CONTEXT)
        return [_plan(setup, "topics", setup.tokens or TOKENS, setup.dim, setup.heads), _heads_plan(setup, few, None)]
    if setup.workload == "heads":
        return [_heads_plan(setup, setup.tokens or byte_model.CONTEXT, setup.heads)]
    return [_plan(setup, setup.workload, setup.tokens or TOKENS, setup.dim, setup.heads)]


def _plan(setup: Setup, workload: str, tokens: int, dim: int, heads: int | None) -> Plan:
    methods: list[tuple[str | None, Method]] = [
        (None, lsh(tokens, BUCKET, setup.seed)),
        (None, Treecode(seed=setup.seed)),
    ]
    return Plan(setup, workload, tokens, dim, heads, methods)


def _heads_plan(setup: Setup, tokens: int, heads: int | None) -> Plan:
    dim = setup.dim if setup.workload == "heads" else byte_model.HEAD_DIM
    methods: list[tuple[str | None, Method]] = [
        (None, lsh(tokens, HEADS_BUCKET, setup.seed, HEADS_WINDOW if setup.causal else 0)),
        (None, Treecode(seed=setup.seed)),
        (None, Treecode(group=1, seed=setup.seed)),
    ]
    if setup.causal:  # in one table of 62 bits nothing but repeated keys shares a bucket
        methods.insert(0, (f"window of {WINDOW:,} only", LSH(bits=62, tables=1, window=WINDOW, seed=setup.seed)))
    return Plan(setup, "heads", tokens, dim, heads, methods)


def measure_wall(setup: Setup, sink: Sink) -> None:
    """Measure and show every table; write the figures where the sink wants them."""
    results = []
    planned = plans(setup)
    arrays_of(setup.backend, np.zeros((1, 1), np.float32))  # an unknown backend is refused before anything is made
    for plan in planned:
        with tables.progress(plan.steps) as begin:
            rows, about = measure(plan, begin)
        results.append({**about, "rows": [asdict(row) for row in rows]})
        sink.write_json(results, done=plan is planned[-1])
        sink.show(table(plan, rows, about))


def measure(plan: Plan, begin: Begin) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one table, and what they were measured on."""
    setup = plan.setup
    begin(f"making {plan.workload}")
    arrays = workloads.make(plan.workload, plan.tokens, plan.dim, plan.heads, setup.seed)
    backend = "generic" if setup.backend == "generic" else None
    q, k, v = arrays_of(setup.backend, *arrays)
    given = Input(q, k, v, setup.causal, backend, setup.seed)
    del arrays
    check(given)
    rows = measure_rows(given, plan.methods, begin)
    if plan.bits:
        bits = _bits(plan, backend, begin)
        rows = [_with_bits(row, value) for row, value in zip(rows, bits, strict=True)]
    about = {
        "workload": plan.workload,
        "tokens": plan.tokens,
        "dim": plan.dim,
        "heads": given.heads,
        "dtype": "float32",
        "causal": setup.causal,
        "seed": setup.seed,
        "backend": setup.backend,
        "kernels": kernels(given).name,
        "machine": machine(),
        "threads": thread_count() if setup.backend == "numpy" else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "opoch_xp": opoch_xp.__version__,
        "audit_rows": min(AUDIT_ROWS, plan.tokens),
    }
    if plan.workload == "heads":
        about["text"] = byte_model.text_hash(byte_model.text(plan.tokens, byte_model.OFFSET))
    return [materialised_row(given), *rows], about


def _with_bits(row: Row, bits: float) -> Row:
    return Row(**{**asdict(row), "bits": bits})


def _bits(plan: Plan, backend: str | None, begin: Begin) -> list[float]:
    """Bits per byte of the model on the second half of the text, its attention replaced by Exact and each method."""
    weights, tokens = byte_model.load(), byte_model.text(plan.tokens, byte_model.OFFSET)
    found = []
    for name, method in [(None, Exact()), *plan.methods]:
        begin(f"bits per byte, {name or method_name(method)}")

        def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, method: Method = method) -> np.ndarray:
            arrays = arrays_of(plan.setup.backend, q, k, v)
            return to_host(attend(*arrays, causal=True, method=method, backend=backend, check=False).out)

        logits, _ = byte_model.forward(weights, tokens, attention)
        found.append(byte_model.bits_per_byte(logits, tokens, max(1, plan.tokens // 2)))
    return found


def table(plan: Plan, rows: list[Row], about: dict[str, Any]) -> Table:
    heads = f"{about['heads']} head{'s' if about['heads'] > 1 else ''}"
    what = (
        f"{about['tokens']:,} tokens, {heads} of {about['dim']}, {about['dtype']}, "
        f"{'causal' if about['causal'] else 'not causal'}, seed {about['seed']}"
    )
    threads = f", threads: {about['threads']}" if about["threads"] else ""
    backend = about["backend"] + (f" ({about['kernels']} kernels)" if about["kernels"] != about["backend"] else "")
    where = f"{about['machine']}{threads}; Python {about['python']}, NumPy {about['numpy']}, backend {backend}"
    titles = {"heads": "The wall, real input: heads of the byte model"}
    lines = [what, where]
    if "text" in about:
        lines.append(
            f"text {about['text']} (SHA-256), from byte {byte_model.OFFSET:,} of this Python's held-out sources"
        )
    columns = ["method", "time", "speed-up", "extra memory", "error", "p99", "pairs"]
    if plan.bits:
        columns.append("bits/byte")
    cells = [_cells(row, plan.bits) for row in rows]
    title = titles.get(plan.workload, f"The wall: {plan.workload}")
    return Table(title, lines, columns, cells, _notes(plan, rows, about))


def _cells(row: Row, bits: bool) -> list[str]:
    if row.refused:
        return [row.method, "refused", "", f"needs {tables.size(row.extra_bytes)}", "", "", ""] + [""] * bits
    estimated = row.extrapolated and row.speedup == 1  # the exact row itself: its time is the extrapolated one
    cells = [
        row.method,
        tables.seconds(row.seconds, estimated),
        ("~" if row.extrapolated and not estimated else "") + tables.factor(row.speedup),
        tables.size(row.extra_bytes, estimated),
        tables.percent(row.error),
        tables.percent(row.p99),
        tables.percent(row.pairs),
    ]
    return cells + ([f"{row.bits:.4f}"] if bits and row.bits is not None else [""] * bits)


def _notes(plan: Plan, rows: list[Row], about: dict[str, Any]) -> list[str]:
    notes = error_notes(about["heads"], about["audit_rows"])
    if any(row.extrapolated for row in rows):
        notes.append("~ is extrapolated: exact attention was timed on evenly spaced query rows.")
    if plan.bits:
        first = plan.tokens // 2
        notes.append(
            f"bits/byte: the model's, on positions {first:,} to {plan.tokens - 1:,}, its attention replaced in every "
            "layer; only group=1 has no look-ahead through shared lists."
        )
    return notes
