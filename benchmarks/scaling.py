"""Time and error against length, from asv's results: `scaling.py COMMIT FILE`, or `scaling.py COMMIT FILE FOLDER`.

asv's own page can make its vertical axis logarithmic, not its horizontal one, where a power of the length is a line.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from figures import FOLDER, Figure, applies, figures, result_file
from gate import ROUNDING
from matplotlib import pyplot
from matplotlib.axes import Axes

COLOURS = {"Exact": "#566069", "LSH": "#c2571a", "Treecode": "#0b6e99"}
MARKS = {"numpy": "o-", "torch": "s--", "jax": "^:", "cupy": "D-.", "generic": "x:"}
TIME, ERROR = "attention.Length.time_attend", "attention.Length.track_error"
Line = list[tuple[int, float]]


def lines(found: list[Figure], benchmark: str) -> dict[tuple[str, str], Line]:
    """(tokens, figure) by backend and method, of the figures that there are and are more than rounding."""
    drawn: dict[tuple[str, str], Line] = {}
    for figure in found:
        if figure.benchmark == benchmark and applies(figure.value) and figure.value > ROUNDING:
            backend, method, tokens = figure.parameters
            drawn.setdefault((backend, method), []).append((tokens, figure.value))
    return drawn


def guide(axes: Axes, line: Line, power: int) -> None:
    """A dotted line of that power of the length, through the end of a line."""
    (first, _), (last, value) = line[0], line[-1]
    start = value * (first / last) ** power
    axes.plot([first, last], [start, value], ":", color="#b4bcc2", zorder=0)
    axes.annotate("N²" if power == 2 else "N", (first, start), color="#8a939b", fontsize=9, va="top")


def draw(found: list[Figure], path: Path) -> None:
    """Two panels: time, and beside it the error of the same calls. Raises ValueError where nothing was timed."""
    times, errors = lines(found, TIME), lines(found, ERROR)
    if not times:
        raise ValueError(f"there are no figures of {TIME} to draw")
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "scaling", "font.size": 10.5})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for (backend, method), line in times.items():
        style = {"color": COLOURS[method], "label": f"{method}, {backend}", "markersize": 5}
        left.plot(*zip(*line, strict=True), MARKS[backend], **style)
        if (backend, method) in errors:  # the exact method's is rounding
            right.plot(*zip(*errors[backend, method], strict=True), MARKS[backend], **style)
    longest = {method: max((line for (_, m), line in times.items() if m == method), key=len) for method in COLOURS}
    guide(left, longest["Exact"], 2)
    guide(left, longest["Treecode"], 1)
    for axes, title, name in ((left, "Time of one call", "seconds"), (right, "Its error on the same input", "error")):
        axes.set(xscale="log", yscale="log", title=title, xlabel="tokens N", ylabel=name)
        axes.set_xscale("log", base=2)
        axes.grid(True, color="#dde2e6")
        axes.spines[["top", "right"]].set_visible(False)
    right.set_ylabel("relative error, 256 sampled rows")
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside lower center", ncols=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def main(commit: str, path: str, folder: str = str(FOLDER)) -> None:
    draw(figures(result_file(Path(folder), commit)), Path(path))


if __name__ == "__main__":
    main(*sys.argv[1:])
