"""`opoch-xp report`: the wall, the needles and a scaling sweep on one page, which holds all it shows."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from opoch_xp import workloads
from opoch_xp.cli import needle, tables, wall
from opoch_xp.cli.page import COLOURS, check_plots, count, figure, page_of, section, share, time_of
from opoch_xp.cli.rows import AUDIT_ROWS, Input, Row, exact_row, method_row, treecodes
from opoch_xp.cli.tables import Table
from opoch_xp.methods import Exact
from opoch_xp.tune import many_tables, tune
from opoch_xp.writing import check_target, whole_file

SMALLEST = 4096  # tokens of the sweep
WITHIN = 0.05  # error that every point of the sweep keeps
WORKLOAD = "scattered"

Begin = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """The options of the command: tokens of the wall and the most of the sweep, vectors of the needles."""

    path: Path
    tokens: int
    vectors: int
    seed: int


@dataclass(frozen=True)
class Point:
    """One size of the sweep: exact attention, and the method that `opoch_xp.tune` finds within WITHIN, if one is."""

    tokens: int
    exact: Row
    method: Row | None


def write_report(setup: Setup) -> None:
    """Measure everything and write the page, whole or not at all.

    Raises ImportError without matplotlib, FileNotFoundError or IsADirectoryError when the file cannot stand there.
    """
    check_target("FILE", setup.path)
    check_plots("report")
    plan = wall.plans(wall.Setup(WORKLOAD, setup.tokens, 64, 1, True, "numpy", setup.seed))[0]
    usual = [method for _, method in plan.methods]
    more = [method for _, method in treecodes(setup.seed) if method not in usual]
    plan = replace(plan, methods=[(None, method) for method in (*usual, *more, many_tables(setup.tokens))])
    sizes = [size for size in (SMALLEST << step for step in range(0, 40, 1)) if size <= setup.tokens]
    asked = [
        needle.Setup(name, (), (), 1, 64, min(256, setup.vectors), 0.9, setup.seed) for name in ("random", "clustered")
    ]
    settings = len(asked[0].settings_for(setup.vectors))
    with tables.progress(plan.steps + len(asked) * (2 + settings) + len(sizes)) as begin:
        rows, about = wall.measure(plan, begin)
        found = [needle.measure(one, setup.vectors, begin) for one in asked]
        points = [sweep_point(size, setup.seed, begin) for size in sizes]
    needles = [{**facts, "rows": [asdict(row) for row in measured]} for measured, facts in found]
    with whole_file(setup.path) as file:
        file.write(page(wall.table(plan, rows, about), rows, needles, points).encode())


def sweep_point(tokens: int, seed: int, begin: Begin) -> Point:
    begin(f"{tokens:,} tokens")
    given = Input(*workloads.make(WORKLOAD, tokens, seed=seed), causal=True, seed=seed)
    exact = exact_row(given)
    method, _ = tune(given.q, given.k, given.v, tol=WITHIN, rows=AUDIT_ROWS, seed=seed, causal=True)
    return Point(tokens, exact, None if isinstance(method, Exact) else method_row(given, method, exact))


def exponent(sizes: list[int], values: list[float]) -> float | None:
    """The slope of log value over log size; None for fewer than two sizes."""
    if len(sizes) < 2:
        return None
    return float(np.polyfit([log(size) for size in sizes], [log(value) for value in values], 1)[0])


def page(wall_table: Table, rows: list[Row], needles: list[dict[str, Any]], points: list[Point]) -> str:
    """The page as HTML."""
    kept = [point for point in points if point.method is not None]
    parts = [
        "<h1>Attention and retrieval by hashing and by a treecode, measured</h1>",
        section(wall_table, _error_against_time(rows)),
        *(section(needle.table(result), _recall_against_candidates(result)) for result in needles),
        section(_sweep_table(points), _time_against_tokens(points, kept) + _memory_against_tokens(points, kept)),
    ]
    return page_of("opoch-xp report", parts)


def _sweep_table(points: list[Point]) -> Table:
    cells = []
    for point in points:
        row = point.method
        exact = [tables.seconds(point.exact.seconds, point.exact.extrapolated), tables.size(point.exact.extra_bytes)]
        if row is None:
            cells.append([f"{point.tokens:,}", *exact, "none within", "", "", ""])
            continue
        speed = ("~" if row.extrapolated else "") + tables.factor(row.speedup)
        figures = [tables.seconds(row.seconds), speed, tables.size(row.extra_bytes), tables.percent(row.error)]
        cells.append([f"{point.tokens:,} · {row.method}", *exact, *figures])
    columns = ["tokens · method", "exact", "its memory", "time", "speed-up", "extra memory", "error"]
    about = [
        f"{WORKLOAD}, causal, 1 head of 64: the method that opoch_xp.tune finds for an error whose "
        f"upper bound is within {WITHIN:.0%}"
    ]
    return Table("Scaling", about, columns, cells, ["~ is extrapolated from evenly spaced query rows."])


def _error_against_time(rows: list[Row]) -> str:
    """Methods as points; the time of exact attention, whose error is 0, as a line."""
    kept = [row for row in rows if row.seconds and row.error]
    exact = next(row for row in rows if row.error == 0 and row.seconds)

    def draw(axes: Any) -> None:
        for number, row in enumerate(kept):
            colour, marker = COLOURS[number % len(COLOURS)], "os^Dv*"[number // len(COLOURS) % 6]
            axes.plot(row.seconds, row.error, marker, color=colour, label=row.method, markersize=8)
        assert exact.seconds is not None
        axes.axvline(exact.seconds, color="#8a939b", linestyle="--", label=exact.method)

    return figure("Error against time", ("time", time_of), ("error", share), draw, "xy", columns=1)


def _recall_against_candidates(result: dict[str, Any]) -> str:
    def draw(axes: Any) -> None:
        for colour, row in zip(COLOURS, result["rows"], strict=False):
            name = f"{row['bits']} x {row['tables']}"
            axes.plot(row["candidates"], row["recall"], "o", color=colour, label=name, markersize=8)
        axes.set_ylim(0, 1.05)

    title = f"Recall against candidates, {result['workload']}"
    return figure(title, ("share of all vectors that are candidates", share), ("recall@50", share), draw, "x", 4)


def _time_against_tokens(points: list[Point], kept: list[Point]) -> str:
    def draw(axes: Any) -> None:
        series = [
            ("exact", [p.tokens for p in points], [p.exact.seconds or 0.0 for p in points]),
            (f"within {WITHIN:.0%}", [p.tokens for p in kept], [(p.method and p.method.seconds) or 0.0 for p in kept]),
        ]
        for colour, (name, sizes, seconds) in zip(COLOURS, series, strict=False):
            slope = exponent(sizes, seconds)
            label = name if slope is None else f"{name}: N^{slope:.2f}"
            axes.plot(sizes, seconds, "o-", color=colour, label=label)

    return figure("Time against tokens, at fixed error", ("tokens N", count), ("time", time_of), draw, "xy")


def _memory_against_tokens(points: list[Point], kept: list[Point]) -> str:
    def draw(axes: Any) -> None:
        axes.plot(
            [p.tokens for p in points], [4 * p.tokens**2 for p in points], "--", color="#8a939b",
            label="a matrix of logits (computed)",
        )  # fmt: skip
        series = [("exact, streaming", [(p.tokens, p.exact) for p in points])]
        series.append((f"within {WITHIN:.0%}", [(p.tokens, p.method) for p in kept if p.method]))
        for colour, (name, held) in zip(COLOURS, series, strict=False):
            there = [(tokens, row.extra_bytes) for tokens, row in held if row.extra_bytes]
            axes.plot([a for a, _ in there], [b for _, b in there], "o-", color=colour, label=name)

    return figure("Extra memory against tokens", ("tokens N", count), ("extra memory", tables.size), draw, "xy", 1)
