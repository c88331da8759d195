"""Pages that hold all they show: tables as HTML, and plots by matplotlib as inline SVG."""

import html
import io
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from opoch_xp.cli.tables import Table

FIGURE, LEGEND_ROW = (4.6, 2.8), 0.2  # inches, of letters of 10.5 points: readable on a phone too
DECADES = 50.0  # ratio of the ends of an axis, from which powers of ten mark it
COLOURS = ("#0b6e99", "#c2571a", "#4c7a34", "#7a4b94", "#8a6d00", "#a03050")

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


def check_plots(extra: str) -> None:
    """ImportError without matplotlib, which names the extra that brings it."""
    if find_spec("matplotlib") is None:
        raise ImportError(f'the plots need matplotlib: pip install "opoch-xp[{extra}]"')


def page_of(title: str, parts: Sequence[str]) -> str:
    """A page of these parts of HTML."""
    return PAGE.format(title=html.escape(title), style=STYLE, body="\n".join(parts))


def section(table: Table, figures: str) -> str:
    def cells(row: Any, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    about = "".join(f'<p class="about">{html.escape(line)}</p>' for line in table.about)
    notes = "".join(f'<p class="note">{html.escape(line)}</p>' for line in table.notes)
    body = "".join(cells(row, "td") for row in table.rows)
    grid = f'<div class="wide" tabindex="0"><table>{cells(table.columns, "th")}{body}</table></div>'
    return f"<h2>{html.escape(table.title)}</h2>{about}{grid}{notes}{figures}"


def figure(
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
        return inline(figure, title)


def inline(plot: Any, title: str) -> str:
    """A plot of matplotlib's as inline SVG, and closed."""
    from matplotlib import pyplot

    text = io.StringIO()
    plot.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(plot)
    svg = text.getvalue()
    return f'<figure role="img" aria-label="{html.escape(title)}">{svg[svg.index("<svg") :]}</figure>'


def _written(write: Callable[[float], str], value: float, _: int) -> str:
    return write(value)


def time_of(value: float) -> str:
    """20 ms; 5 s."""
    return f"{value:g} s" if value >= 1 else f"{1000 * value:g} ms"


def share(value: float) -> str:
    return f"{100 * value:g}%"


def count(value: float) -> str:
    """1,000; 65k; 1M."""
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e4 else f"{value:,.0f}"
