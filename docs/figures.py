"""The figures of the pages, computed by the library and drawn to docs/images: `python docs/figures.py`.

Nothing in them is drawn by hand: each function below computes what it plots, or reads what a benchmark measured. The
letters are text, in the colour of the page (`currentColor`); read by themselves, the files follow the reader's light or
dark setting.
"""

import io
import json
import sys
from collections.abc import Callable, Iterator
from math import log
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np

import opoch_xp as ox
from opoch_xp import workloads
from opoch_xp.backends.generic.tree import build_tree
from opoch_xp.treecode.forest import KEYS, directions, tiers
from opoch_xp.treecode.law import coefficients_of, log_deviation, log_gain
from opoch_xp.treecode.plan import splits

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Polygon, Rectangle

IMAGES = Path(__file__).with_name("images")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
# legible on white and on dark grey
BLUE, SKY, ORANGE, GREEN, PURPLE, GREY = "#2f83b0", "#7fb8d8", "#d9702e", "#5c9a3f", "#9a66b8", "#8a939b"
LETTERS = "#010203"  # stands for the colour of the text
ALONE = "<style>:root{color:#222}@media(prefers-color-scheme:dark){:root{color:#ddd}}</style>"
RC = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10.5, "text.color": LETTERS,
    "axes.edgecolor": GREY, "axes.labelcolor": LETTERS, "xtick.color": LETTERS, "ytick.color": LETTERS,
    "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "figure.facecolor": "none",
    "legend.frameon": False, "legend.fontsize": 9.5, "grid.color": GREY, "grid.alpha": 0.25,
}  # fmt: skip


def collisions() -> Any:
    """Chance that two vectors share a bucket, by their angle: the formula, and codes of 4,000 pairs at each angle."""
    figure, axes = pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")
    theta = np.linspace(0, 90, 181)
    rng = np.random.default_rng(0)
    angles = np.arange(0, 91, 10)
    x, across = rng.standard_normal((2, 4000, 64))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    across -= (across * x).sum(1, keepdims=True) * x
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    for colour, (bits, tables) in zip((GREY, BLUE, ORANGE, GREEN), ((1, 1), (8, 1), (8, 8), (16, 8)), strict=True):
        chance = 1 - (1 - (1 - theta / 180) ** bits) ** tables
        planes = ox.random_hyperplanes(64, bits, tables, seed=1)
        codes = ox.hash_codes(x, planes)
        found = []
        for angle in np.radians(angles):
            shared = codes == ox.hash_codes(np.cos(angle) * x + np.sin(angle) * across, planes)
            found.append(shared.any(0).mean())
        axes.plot(theta, chance, color=colour, label=f"{bits} bit{'s' * (bits > 1)} × {tables}")
        axes.plot(angles, found, "o", color=colour, markersize=4.5)
    axes.set(xlabel="angle between the two vectors, degrees", ylabel="chance to share a bucket", xlim=(0, 90))
    axes.set_xticks(range(0, 91, 15))
    axes.grid(True)
    figure.legend(loc="outside lower left", ncols=4)
    return figure


def cells() -> Any:
    """256 keys in the plane, split into cells of 16 at the medians of principal axes, four cells to a parent."""
    rng = np.random.default_rng(0)
    centers = rng.uniform(-1, 1, (8, 2)) * (3.4, 1.6)
    k = centers[rng.integers(8, size=256)] + rng.standard_normal((256, 2)) * (0.8, 0.45)
    method = ox.Treecode(block=256, leaf=16, branch=4, top=4)
    axes_of = directions(0, 0, KEYS, splits(256, 16), 2)
    tree = build_tree(k[None], np.zeros((1, 256, 1)), axes_of, method)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for size, width, fill in ((64, 1.6, 0.0), (16, 0.0, 0.28)):
        for node in range(256 // size):
            corners = hull(tree.cells[0, node * size : (node + 1) * size, :2])
            colour = (BLUE, ORANGE, GREEN, PURPLE)[node * size // 64]
            axes.add_patch(Polygon(corners, facecolor=(*to_rgb(colour), fill), edgecolor=colour, linewidth=width))
    for node in range(4):
        part = tree.cells[0, node * 64 : (node + 1) * 64, :2]
        axes.plot(*part.T, "o", color=(BLUE, ORANGE, GREEN, PURPLE)[node], markersize=2.6)
    axes.plot(*tree.summaries[0][0, :, :2].T, "+", color=LETTERS, markersize=9, label="mean key of a cell")
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    figure.legend(loc="outside lower left")
    return figure


def hull(points: np.ndarray) -> np.ndarray:
    """Corners of the convex hull of points (n, 2), in turn (Andrew's monotone chain)."""

    def chain(ordered: list[tuple[float, float]]) -> list[tuple[float, float]]:
        found: list[tuple[float, float]] = []
        for x, y in ordered:
            while len(found) > 1:
                (a, b), (c, d) = found[-2:]
                if (c - a) * (y - b) - (d - b) * (x - a) > 0:
                    break
                found.pop()
            found.append((x, y))
        return found[:-1]

    ordered = sorted((float(x), float(y)) for x, y in points)
    return np.array(chain(ordered) + chain(ordered[::-1]))


TOY = ox.Treecode(rtol=0.5, sinks=4, block=16, fan=4, leaf=4, branch=2, top=4, group=8, least=2)
TOKENS, POSITION = 256, 231


def forest() -> Any:
    """The chunks that the query at one position reads, tier by tier: its position written in base `fan`."""
    figure, axes = pyplot.subplots(figsize=(6.4, 2.0), layout="constrained")
    n = POSITION + 1
    found = {tier.number: tier for tier in tiers(1, n, True, TOY)}  # of the last query alone
    rows = ["own block, exact"]
    start = POSITION // TOY.block * TOY.block
    axes.add_patch(Rectangle((start, -0.4), n - start, 0.8, facecolor=GREY))
    for number, colour in ((0, SKY), (1, BLUE)):
        size = TOY.block * TOY.fan**number
        rows.append(f"chunks of {size} keys")
        tier = found.get(number)
        for chunk in range(TOKENS // size):
            read = tier is not None and tier.low <= chunk < tier.high
            box = Rectangle((chunk * size, number + 0.6), size, 0.8, edgecolor=GREY, linewidth=0.8)
            box.set_facecolor(colour if read else "none")
            axes.add_patch(box)
    axes.axvline(POSITION, color=LETTERS, linewidth=1, linestyle=":")
    axes.set(xlim=(0, TOKENS), ylim=(len(rows) - 0.4, -0.6))
    axes.set(xlabel=f"position of the key; the query stands at {POSITION}")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(0, TOKENS + 1, 32))
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


PARTS = (
    ("own block, key by key", GREY), ("first keys", PURPLE), ("keys of cells that were opened", ORANGE),
    ("nodes of chunks of 16", SKY), ("nodes of chunks of 64", BLUE),
)  # fmt: skip


def pairs() -> Any:
    """How each query of a causal treecode reads each key: `opoch_xp.explain` for every row."""
    q, k, v = (x[0].astype(np.float64) for x in workloads.make("scattered", TOKENS, dim=8))
    picture = np.zeros((TOKENS, TOKENS, 4))
    for row in range(TOKENS):
        for entry in ox.explain(q, k, v, row=row, method=TOY, causal=True).entries:
            place = {"local": 0, "sinks": 1, "keys": 2}.get(entry.part, 3 + (entry.tier or 0))
            picture[row, entry.keys] = (*to_rgb(PARTS[place][1]), 1)
    figure, axes = pyplot.subplots(figsize=(6.4, 5.2), layout="constrained")
    axes.imshow(picture, interpolation="none", aspect="equal", extent=(0, TOKENS, TOKENS, 0))
    axes.set(xlabel="position of the key", ylabel="position of the query")
    axes.set_xticks(range(0, TOKENS + 1, 64))
    axes.set_yticks(range(0, TOKENS + 1, 64))
    handles = [Patch(color=colour, label=name) for name, colour in PARTS]
    figure.legend(handles=handles, loc="outside lower left", ncols=2)
    return figure


def masses() -> Any:
    """The log mass of 16 keys whose logits are normal numbers, against estimates of it from their count, mean and
    variance; the truth is the log of the sum itself, for 2,000 draws."""
    n = 16
    sigma = np.linspace(0, 7, 141)
    logits = np.random.default_rng(0).standard_normal((2000, n))
    truth = np.array([np.log(np.exp(s * logits).sum(1)) for s in sigma]) - log(n)
    law = coefficients_of(n)
    estimate, deviation = log_gain(sigma**2, law), log_deviation(sigma**2, law)
    freezing = (2 * log(n)) ** 0.5
    limit = np.where(sigma < freezing, sigma**2 / 2, sigma * freezing - log(n))  # of many keys: Derrida, 1981
    figure, axes = pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")
    low, middle, high = np.percentile(truth, (5, 50, 95), axis=1)
    axes.fill_between(sigma, low, high, color=GREY, alpha=0.3, linewidth=0, label="true, 5th to 95th percentile")
    axes.plot(sigma, middle, color=GREY, linewidth=2, label="true, median")
    axes.plot(sigma, 0 * sigma, color=GREEN, label="mean field")
    axes.plot(sigma, sigma**2 / 2, color=ORANGE, label="second order")
    axes.plot(sigma, limit, color=PURPLE, label="random-energy model")
    axes.plot(sigma, estimate, color=BLUE, linewidth=2, label="law of few keys")
    axes.plot(sigma, estimate + 3 * deviation, color=BLUE, linewidth=1, linestyle="--", label="and three deviations")
    axes.set(xlabel="σ, standard deviation of the logits in the node", ylabel="log mass − (mean logit + ln n)")
    axes.set(xlim=(0, 7), ylim=(-1, 16))
    axes.grid(True)
    axes.legend(loc="upper left")
    return figure


def selection() -> Any:
    """The error of keeping the heaviest keys alone, of shared buckets, and of a treecode that reads as many rows, from
    flat to peaked attention; keys without structure, and keys in 64 clusters."""
    n, dim = 4096, 16
    method = ox.Treecode(block=4096, sinks=0, leaf=8, top=16, group=16)
    sharpness = np.array([0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    figure, panels = pyplot.subplots(1, 2, figsize=(6.4, 3.3), sharey=True, layout="constrained")
    for axes, workload, title in zip(panels, ("gaussian", "scattered"), ("no structure", "64 clusters"), strict=True):
        q, k, v = (x.astype(np.float64) for x in workloads.make(workload, n, dim=dim))
        q = q[:, :256]
        norm = float(np.sqrt(np.mean(q**2) * np.mean(k**2)))  # so that logits deviate by about the sharpness
        errors: dict[str, list[float]] = {"shared buckets": [], "heaviest keys alone": [], "treecode": []}
        for sharp in sharpness:
            options = {"scale": float(sharp) * dim**-0.5 / norm, "backend": "generic"}  # the same on every machine
            exact = ox.attention(q, k, v, method=ox.Exact(), **options)[0]
            tree = ox.attend(q, k, v, method=method, **options)
            outs = (
                ox.attention(q, k, v, method=ox.LSH(bits=7, tables=8), **options)[0],
                heaviest(options["scale"] * q[0] @ k[0].T, v[0], round(tree.report.pairs * n)),
                tree.out[0],
            )
            for error, out in zip(errors.values(), outs, strict=True):
                error.append(float(np.linalg.norm(out - exact) / np.linalg.norm(exact)))
        for (name, error), colour in zip(errors.items(), (GREY, ORANGE, BLUE), strict=True):
            axes.plot(sharpness, error, "o-", color=colour, label=name, markersize=4.5)
        axes.set(xscale="log", yscale="log", xlabel="deviation of the logits", title=title)
        axes.set_xticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
        axes.grid(True)
    panels[0].set(ylabel="error", yticks=[0.01, 0.1, 1, 10], ylim=(0.001, 12))
    panels[0].set_yticklabels(["1%", "10%", "100%", "1000%"])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


def heaviest(logits: np.ndarray, v: np.ndarray, keep: int) -> np.ndarray:
    """Softmax over the `keep` keys of largest logit of each query: the best that selection can do."""
    least = np.sort(logits, axis=1)[:, -keep, None]
    weights = np.where(logits >= least, np.exp(logits - logits.max(1, keepdims=True)), 0)
    return (weights / weights.sum(1, keepdims=True)) @ v


# How the names of the methods of a line begin, what it is called, its colour and its mark.
METHODS = (
    ("Treecode", "Treecode, by rtol", BLUE, "o-"),
    ("window", "window, by size", GREY, "s--"),
    ("16 first", "16 first keys and a window, by size", GREEN, "^--"),
    ("LSH", "LSH", ORANGE, "D"),
)
FLOOR = 1e-4  # of losses and divergences: below it both are noise


def pretrained() -> Any:
    """Loss added and divergence against the time of attention: of each method the worst of the texts."""
    paths = [path for tokens in (8192, 32768) if (path := RESULTS / f"pretrained-{tokens}.json").exists()]
    panels = (
        ("loss added (nats)", "loss added, nats a token"),
        ("KL to exact", "KL divergence from exact, nats a token"),
    )
    size = (10, 3.6 * len(paths) + 0.6)
    figure, grid = pyplot.subplots(len(paths), 2, figsize=size, layout="constrained", squeeze=False)
    for path, pair in zip(paths, grid, strict=True):
        table = json.loads(path.read_text(encoding="utf-8"))
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
        for axes, (column, label) in zip(pair, panels, strict=True):
            for begins, name, colour, mark in METHODS:
                line = sorted(settings(rows, begins, column))
                axes.plot(
                    [x for x, _, _ in line], [y for _, y, _ in line], mark, color=colour, label=name, markersize=5
                )
                for x, y, method in line:
                    if method == "Treecode()":
                        axes.annotate("default", (x, y), (6, 4), textcoords="offset points", fontsize=9, color=colour)
            axes.axvline(1, color="#c04a4a", linewidth=1, label="exact attention, SDPA")
            axes.set(xscale="log", yscale="log", ylim=(FLOOR / 1.3, None), ylabel=label)
            axes.set(title=f"{int(path.stem[11:]):,} tokens", xlabel="time of attention, of exact attention's")
            axes.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2], ["1/20", "1/10", "1/5", "1/2", "1", "2"])
            axes.minorticks_off()
            axes.grid(True)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def settings(rows: list[dict[str, Any]], begins: str, column: str) -> Iterator[tuple[float, float, str]]:
    """Attention's time as a share of SDPA's, the largest of `column` over the texts, and the name, of each method."""
    for name in dict.fromkeys(row["method"] for row in rows if row["method"].startswith(begins)):
        same = [row for row in rows if row["method"] == name and row[column] != "-"]
        share = mean(1 / row["times faster than SDPA"] for row in same)
        yield share, max(FLOOR, *(row[column] for row in same)), name


FIGURES: dict[str, Callable[[], Any]] = {
    "collisions": collisions, "cells": cells, "forest": forest, "pairs": pairs, "masses": masses,
    "selection": selection, "pretrained": pretrained,
}  # fmt: skip


def svg(name: str) -> str:
    """One figure as the text of its file."""
    with pyplot.rc_context({**RC, "svg.hashsalt": name}):
        figure = FIGURES[name]()
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        pyplot.close(figure)
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(LETTERS, "currentColor")
    head, body = drawing.split(">", 1)
    return "\n".join(line.rstrip() for line in f"{head}>\n{ALONE}{body}".splitlines()) + "\n"


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for name in sys.argv[1:] or FIGURES:
        (IMAGES / f"{name}.svg").write_text(svg(name), encoding="utf-8")


if __name__ == "__main__":
    main()
