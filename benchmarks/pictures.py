"""The picture that docs/results.md opens with, from the figures in benchmarks/results."""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes

RESULTS = Path(__file__).with_name("results")
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "pretrained.svg"
LENGTHS = (8192, 32768)
# How the names of the methods of a line begin, what it is called, its colour and its mark; None: all others.
LINES = (
    ("Treecode", "Treecode, by rtol", "#2f83b0", "o-"),
    ("window", "window, by size", "#8a939b", "s--"),
    ("16 first", "16 first keys and a window, by size", "#5c9a3f", "^--"),
    ("LSH", "LSH", "#d9702e", "D"),
)
PANELS = (("loss added (nats)", "loss added, nats a token"), ("KL to exact", "KL divergence from exact, nats a token"))
FLOOR = 1e-4  # below it both are noise: the axes end there
LETTERS = "#010203"  # stands for the colour of the text: see docs/figures.py
ALONE = "<style>:root{color:#222}@media(prefers-color-scheme:dark){:root{color:#ddd}}</style>"

Row = dict[str, Any]


def rows(tokens: int) -> list[Row]:
    table = json.loads((RESULTS / f"pretrained-{tokens}.json").read_text(encoding="utf-8"))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def points(found: list[Row], begins: str, column: str) -> Iterator[tuple[float, float, str]]:
    """Attention's time as a share of SDPA's, the largest of `column` over the texts, and the name, of each method."""
    time = "times faster than SDPA"
    for name in dict.fromkeys(row["method"] for row in found if row["method"].startswith(begins)):
        same = [row for row in found if row["method"] == name]
        yield mean(1 / row[time] for row in same), max(FLOOR, *(row[column] for row in same)), name


def panel(axes: Axes, found: list[Row], column: str) -> None:
    for begins, label, colour, mark in LINES:
        line = sorted(points(found, begins, column))
        axes.plot([x for x, _, _ in line], [y for _, y, _ in line], mark, color=colour, label=label, markersize=5)
        for x, y, name in line:
            if name == "Treecode()":
                axes.annotate("default", (x, y), (6, 4), textcoords="offset points", fontsize=9, color=colour)
    axes.axvline(1, color="#c04a4a", linewidth=1, label="exact attention, SDPA")
    axes.set(xscale="log", yscale="log", ylim=(FLOOR / 1.3, None))
    axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2], ["1/20", "1/10", "1/5", "1/2", "1", "2"])
    axes.minorticks_off()
    axes.grid(True, color="#8a939b", alpha=0.25)


def draw() -> None:
    pyplot.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "pretrained", "font.family": "sans-serif", "font.size": 10.5,
        "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "figure.facecolor": "none",
        "axes.edgecolor": "#8a939b", "text.color": LETTERS, "axes.labelcolor": LETTERS, "xtick.color": LETTERS,
        "ytick.color": LETTERS,
    })  # fmt: skip
    lengths = [tokens for tokens in LENGTHS if (RESULTS / f"pretrained-{tokens}.json").exists()]
    figure, panels = pyplot.subplots(
        len(lengths), 2, figsize=(10, 3.6 * len(lengths) + 0.6), layout="constrained", squeeze=False
    )
    for tokens, pair in zip(lengths, panels, strict=True):
        for axes, (column, label) in zip(pair, PANELS, strict=True):
            panel(axes, rows(tokens), column)
            axes.set(title=f"{tokens:,} tokens", ylabel=label, xlabel="time of attention, of exact attention's")
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=9, loc="outside lower center", ncols=5)
    figure.savefig(IMAGE, metadata={"Date": None, "Creator": None})
    text = IMAGE.read_text(encoding="utf-8").replace(LETTERS, "currentColor")
    IMAGE.write_text(text.replace("<defs>", f"{ALONE}<defs>", 1), encoding="utf-8")


if __name__ == "__main__":
    draw()
