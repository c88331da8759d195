"""`opoch-xp audit FILE`: every method on a user's own queries, keys and values."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from opoch_xp.cli import tables
from opoch_xp.cli.rows import AUDIT_ROWS, Input, Row, check, error_notes, measure_rows, treecodes
from opoch_xp.cli.tables import Sink, Table
from opoch_xp.files import load_qkv
from opoch_xp.measure import machine
from opoch_xp.methods import Exact, Method, method_name
from opoch_xp.text import name as name_of
from opoch_xp.tune import many_tables, tune


def audit_file(file: Path, tol: float, causal: bool, seed: int, sink: Sink) -> None:
    """Measure treecodes and LSH on the file, and the method that `tol` gives."""
    if not 0 < tol < 1:
        raise ValueError(f"--tol must be an error between 0 and 1, both excluded; got {tol}")
    q, k, v = load_qkv(file)
    given = Input(q, k, v, causal, seed=seed)
    check(given)
    many = many_tables(given.k.shape[-2])
    methods: list[tuple[str | None, Method]] = [(None, replace(many, tables=8)), (None, many), *treecodes()]
    with tables.progress(3 + len(methods)) as begin:
        begin(f"choosing for tol={tol}")
        chosen, _ = tune(given.q, given.k, given.v, tol=tol, causal=causal, seed=seed, rows=AUDIT_ROWS)
        if not isinstance(chosen, Exact) and chosen not in [method for _, method in methods]:
            methods.append((None, chosen))
        rows = measure_rows(given, methods, begin)
    shapes = {name: list(array.shape) for name, array in zip("qkv", (q, k, v), strict=True)}
    about = {"file": str(file), **shapes, "dtype": str(q.dtype), "causal": causal, "seed": seed, "machine": machine()}
    sink.write_json({**about, "tol": tol, "chosen": repr(chosen), "rows": [asdict(row) for row in rows]})
    sink.show(_table(file, given, rows, tol, chosen))


def _table(file: Path, given: Input, rows: list[Row], tol: float, chosen: Method) -> Table:
    name = rows[0].method if isinstance(chosen, Exact) else method_name(chosen)
    cells = [
        [
            row.method + (" <- chosen" if row.method == name else ""),
            tables.seconds(row.seconds, row is rows[0] and row.extrapolated),
            tables.factor(row.speedup),
            tables.size(row.extra_bytes),
            tables.percent(row.error),
            tables.percent(row.bound),
            tables.percent(row.p99),
            tables.percent(row.pairs),
        ]
        for row in rows
    ]
    shapes = ", ".join(
        f"{name} {tuple(array.shape)}" for name, array in zip("qkv", (given.q, given.k, given.v), strict=True)
    )
    about = [
        f"{shapes}, {given.q.dtype}, {'causal' if given.causal else 'not causal'}, seed {given.seed}",
        f"{machine()}; NumPy {np.__version__}",
    ]
    notes = [
        f"tol={tol}: {method_name(chosen)}, which opoch_xp.tune found.",
        *error_notes(given.heads, min(AUDIT_ROWS, given.q.shape[-2])),
        "bound: upper end of the error's 95% interval on the worst head, which tol is compared with.",
    ]
    within = [row for row in rows[1:] if row.bound is not None and row.bound <= tol and row.method != name]
    picked = next(row for row in rows if row.method == name)
    faster = [row for row in within if (row.seconds or 0.0) < (picked.seconds or 0.0)]
    if faster:
        best = min(faster, key=lambda row: row.seconds or 0.0)
        notes.append(f"Faster here, and within tol: {best.method}.")
    columns = ["method", "time", "speed-up", "extra memory", "error", "bound", "p99", "pairs"]
    return Table(f"Methods on {name_of(file.name)}", about, columns, cells, notes)
