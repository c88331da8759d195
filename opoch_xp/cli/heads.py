"""Maps of a model's heads: as text for a terminal, and as plots for a page."""

import html
from collections.abc import Callable
from math import log10
from typing import Any

from opoch_xp.cli.page import COLOURS, figure, inline, page_of, section
from opoch_xp.cli.tables import Table, percent

LETTERS = {"sink": "S", "local": "L", "sharp": "X", "flat": "F"}
SHADES = ".:-=+*#%@"
LOWEST = 1e-4  # error that the lightest shade stands for; the darkest is 1
SHOWN = 8  # heads listed


def compared(found: Any) -> str:
    """The method whose errors and rows are shown: the chosen one, or the last that was measured; "" for none."""
    names = list(found.heads[0].error) if found.heads else []
    return found.chosen if found.chosen in names else names[-1] if names else ""


def _grid(found: Any) -> dict[int, list[Any]]:
    layers: dict[int, list[Any]] = {}
    for head in found.heads:
        layers.setdefault(head.layer, []).append(head)
    return layers


def _shade(value: float, low: float, high: float) -> str:
    part = (log10(max(value, low)) - log10(low)) / (log10(high) - log10(low))
    return SHADES[min(len(SHADES) - 1, max(0, int(part * len(SHADES))))]


def maps(found: Any) -> str:
    """Layers by heads: the kind of each, the error in it and the rows that it reads."""
    name = compared(found)
    most, width = max(head.rows[name] for head in found.heads), max(4, max(map(len, _grid(found).values())))
    least = min(head.rows[name] for head in found.heads)
    lines = [f"layer  {'kind'.ljust(width)}  {'error'.ljust(width)}  rows".rstrip()]
    for layer, heads in _grid(found).items():
        kinds = "".join(LETTERS[head.kind] for head in heads)
        errors = "".join(_shade(head.error[name], LOWEST, 1.0) for head in heads)
        rows = "".join(_shade(head.rows[name], least, max(most, 1.01 * least)) for head in heads)
        lines.append(f"{layer:>5}  {kinds.ljust(width)}  {errors.ljust(width)}  {rows}")
    kinds = ", ".join(f"{letter} {kind}" for kind, letter in LETTERS.items())
    lines += [
        "",
        f"kind: where most of a head's softmax lies: {kinds} (the first 16 keys; the last 1,024; elsewhere on up to 64 "
        "keys, or on more).",
        f"error and rows: of {name}, from {SHADES[0]} to {SHADES[-1]}, logarithmic: error {LOWEST:.2%} to 100%, rows "
        f"{least:,.0f} to {most:,.0f}.",
        *_counts(found, name),
    ]
    return "\n".join(lines)


def _counts(found: Any, name: str) -> list[str]:
    """A line a kind: how many heads, and their means."""
    lines = []
    for kind in LETTERS:
        some = [head for head in found.heads if head.kind == kind]
        if some:
            error = sum(head.error[name] for head in some) / len(some)
            rows = sum(head.rows[name] for head in some) / len(some)
            keys = sorted(head.effective_keys for head in some)[len(some) // 2]
            sigmas = sorted(head.sigma for head in some if head.sigma is not None)
            sigma = f", logits in a cell deviate by {sigmas[len(sigmas) // 2]:.1f}" if sigmas else ""
            lines.append(
                f"{kind}: {len(some)} heads, {keys:,.0f} effective keys{sigma} (medians); error {error:.2%},"
                f" {rows:,.0f} rows (means)"
            )
    return lines


def page(found: Any, parts: list[Table], answer: list[str]) -> str:
    """The page: what to take, the tables, error against time, and the maps."""
    name = compared(found)
    text = html.escape("\n".join(answer[2:]))
    code = f"<pre>{text}</pre>" if text else ""
    body = ["<h1>What it would do to your model</h1>", f"<p>{html.escape(answer[0])}</p>{code}"]
    body += [section(part, _against_time(found) if number == 0 else "") for number, part in enumerate(parts)]
    if name:
        body.append("<h2>Heads</h2>" + "".join(f"<p>{html.escape(line)}</p>" for line in _counts(found, name)))
        body.append(_map(f"Error of {name}", _grid(found), lambda head: head.error[name], "error", percent))
        body.append(_map(f"Rows read by {name}", _grid(found), lambda head: head.rows[name], "rows a query", whole))
        body.append(_map("Effective keys", _grid(found), lambda head: head.effective_keys, "keys", whole))
        body.append(section(_worst(found, name), ""))
    return page_of("opoch-xp model", body)


def whole(value: float) -> str:
    return f"{value:,.0f}"


def _worst(found: Any, name: str) -> Table:
    """The heads with the largest errors."""
    chosen = sorted(found.heads, key=lambda head: -head.error[name])[:SHOWN]
    cells = [
        [
            f"layer {head.layer}, head {head.head}", head.kind, f"{head.error[name]:.2%}", f"{head.rows[name]:,.0f}",
            f"{head.effective_keys:,.0f}", "" if head.sigma is None else f"{head.sigma:.1f}",
            *(f"{head.mass[part]:.0%}" for part in ("sinks", "64", "1,024", "further")),
        ]
        for head in chosen
    ]  # fmt: skip
    columns = ["head", "kind", "error", "rows", "effective keys", "sigma in a cell", "first 16", "last 64"]
    return Table("The heads with the largest errors", [name], [*columns, "to 1,024", "further"], cells)


def _against_time(found: Any) -> str:
    """KL, or 1 - cosine, against the attention's time over exact attention's in the same pass."""
    kept = [row for row in found.rows if row.scored and row.attended and row.scored.distance > 1e-12]
    if not kept:
        return ""
    what = "KL, nats a token" if found.language else "1 - cosine"

    def draw(axes: Any) -> None:
        for number, row in enumerate(kept):
            colour, marker = COLOURS[number % len(COLOURS)], "os^Dv*"[number // len(COLOURS) % 6]
            time = row.attended.seconds / row.attended.exact_seconds
            axes.plot(time, row.scored.distance, marker, color=colour, label=row.name, markersize=8)
        axes.axvline(1.0, color="#8a939b", linestyle="--", label=found.rows[0].name)

    def plain(value: float) -> str:
        return f"{value:g}"

    return figure(f"{what} against time", ("attention, exact = 1", plain), (what, plain), draw, "xy", columns=1)


def _map(title: str, grid: dict[int, list[Any]], value: Any, what: str, written: Callable[[float], str]) -> str:
    """Layers by heads as coloured squares, logarithmic."""
    import matplotlib
    import numpy as np

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    wide = max(map(len, grid.values()))
    values = np.full((len(grid), wide), np.nan)
    for number, heads in enumerate(grid.values()):
        values[number, : len(heads)] = [max(value(head), 1e-9) for head in heads]
    low, high = np.nanmin(values), np.nanmax(values)
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10.5}):
        plot, axes = pyplot.subplots(
            figsize=(max(4.6, 0.2 * wide + 2), max(2.2, 0.17 * len(grid) + 1)), layout="constrained"
        )
        drawn = axes.pcolormesh(values, norm=LogNorm(low, max(high, 1.01 * low)), cmap="viridis")
        axes.invert_yaxis()
        axes.set(xlabel="head", ylabel="layer")
        step = max(1, len(grid) // 10)
        axes.set_yticks(np.arange(0, len(grid), step) + 0.5, [str(layer) for layer in list(grid)[::step]])
        across = max(1, wide // 10)
        axes.set_xticks(np.arange(0, wide, across) + 0.5, [str(head) for head in range(0, wide, across)])
        axes.set_title(title, loc="left")
        bar = plot.colorbar(drawn, label=what)
        marks = np.geomspace(low, max(high, 1.01 * low), 5).tolist()
        bar.set_ticks(marks, labels=[written(mark) for mark in marks])
        bar.minorticks_off()
        return inline(plot, title)
