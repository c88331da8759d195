"""`opoch-xp report`: the wall, the needles and a scaling sweep on one page, which holds all it shows."""

import html
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from opoch_xp import workloads
from opoch_xp.cli import needle, tables, wall
from opoch_xp.cli.rows import AUDIT_ROWS, Input, Row, exact_row, method_row, treecodes
from opoch_xp.cli.tables import Table
from opoch_xp.methods import Exact
from opoch_xp.tune import many_tables, tune
from opoch_xp.writing import check_target, whole_file

SMALLEST = 4096  # tokens of the sweep
WITHIN = 0.05  # error that every point of the sweep keeps
WORKLOAD = "scattered"
FIGURE, LEGEND_ROW = (4.6, 2.8), 0.2  # inches, of letters of 10.5 points: readable on a phone too
DECADES = 50.0  # ratio of the ends of an axis, from which powers of ten mark it
COLOURS = ("#0b6e99", "#c2571a", "#4c7a34", "#7a4b94", "#8a6d00", "#a03050")

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
    if find_spec("matplotlib") is None:
        raise ImportError('the plots need matplotlib: pip install "opoch-xp[report]"')
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
        _section(wall_table, _error_against_time(rows)),
        *(_section(needle.table(result), _recall_against_candidates(result)) for result in needles),
        _section(_sweep_table(points), _time_against_tokens(points, kept) + _memory_against_tokens(points, kept)),
    ]
    return PAGE.format(title="opoch-xp report", style=STYLE, body="\n".join(parts))


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2226; background: #fff }
body { margin: 0 auto; padding: 1.2rem; max-width: 74rem }
h1 { font-size: 1.5rem; line-height: 1.25 } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem }
p { margin: .2rem 0; max-width: 60rem } .about, .note { color: #566069; font-size: .9rem }
.wide { overflow-x: auto; margin: .8rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { padding: .3rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #dde2e6 }
th:first-child, td:first-child { text-align: left } th { color: #566069; font-weight: 600 }
@media (max-width: 40rem) {
  th, td { padding: .3rem .45rem } th:first-child, td:first-child { white-space: normal; min-width: 7.5rem }
}
figure { margin: 1rem 0 } figure svg { width: 100%; max-width: 40rem; height: auto }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""


def _section(table: Table, figures: str) -> str:
    def cells(row: Any, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    about = "".join(f'<p class="about">{html.escape(line)}</p>' for line in table.about)
    notes = "".join(f'<p class="note">{html.escape(line)}</p>' for line in table.notes)
    body = "".join(cells(row, "td") for row in table.rows)
    grid = f'<div class="wide" tabindex="0"><table>{cells(table.columns, "th")}{body}</table></div>'
    return f"<h2>{html.escape(table.title)}</h2>{about}{grid}{notes}{figures}"


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


def _figure(
    title: str,
    x: tuple[str, Callable[[float], str]],
    y: tuple[str, Callable[[float], str]],
    draw: Callable[[Any], None],
    log_axes: str,
    columns: int = 2,
) -> str:
    """One plot as inline SVG, its letters as text; x and y: name of an axis, and how its numbers are written."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    with pyplot.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10.5, "font.family": "sans-serif"}
    ):
        figure, axes = pyplot.subplots(figsize=FIGURE, layout="constrained")
        axes.margins(0.1)
        draw(axes)
        axes.set(xlabel=x[0], ylabel=y[0])
        axes.set_title(title, loc="left")
        for name, axis, write in (("x", axes.xaxis, x[1]), ("y", axes.yaxis, y[1])):
            if name in log_axes:
                getattr(axes, f"set_{name}scale")("log")
                low, high = axis.get_view_interval()
                close = high < DECADES * low  # then powers of ten are too few
                axis.set_major_locator(LogLocator(subs=(1, 2, 5) if close else (1,), numticks=8))
                axis.set_minor_formatter(NullFormatter())
            else:
                axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter(FuncFormatter(partial(_written, write)))
        axes.grid(True, which="major", color="#dde2e6")
        axes.spines[["top", "right"]].set_visible(False)
        rows = -(-len(axes.get_legend_handles_labels()[0]) // columns)
        figure.set_figheight(FIGURE[1] + LEGEND_ROW * rows)
        figure.legend(frameon=False, fontsize=9, loc="outside lower left", ncols=columns)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    svg = text.getvalue()
    return f'<figure role="img" aria-label="{html.escape(title)}">{svg[svg.index("<svg") :]}</figure>'


def _written(write: Callable[[float], str], value: float, _: int) -> str:
    return write(value)


def _time(value: float) -> str:
    """20 ms; 5 s."""
    return f"{value:g} s" if value >= 1 else f"{1000 * value:g} ms"


def _share(value: float) -> str:
    return f"{100 * value:g}%"


def _count(value: float) -> str:
    """1,000; 65k; 1M."""
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e4 else f"{value:,.0f}"


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

    return _figure("Error against time", ("time", _time), ("error", _share), draw, "xy", columns=1)


def _recall_against_candidates(result: dict[str, Any]) -> str:
    def draw(axes: Any) -> None:
        for colour, row in zip(COLOURS, result["rows"], strict=False):
            name = f"{row['bits']} x {row['tables']}"
            axes.plot(row["candidates"], row["recall"], "o", color=colour, label=name, markersize=8)
        axes.set_ylim(0, 1.05)

    title = f"Recall against candidates, {result['workload']}"
    return _figure(title, ("share of all vectors that are candidates", _share), ("recall@50", _share), draw, "x", 4)


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

    return _figure("Time against tokens, at fixed error", ("tokens N", _count), ("time", _time), draw, "xy")


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

    return _figure("Extra memory against tokens", ("tokens N", _count), ("extra memory", tables.size), draw, "xy", 1)
