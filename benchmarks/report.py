"""Write docs/results.md from the figures in benchmarks/results: nothing on that page is typed by hand."""

import json
from pathlib import Path

ROOT = Path(__file__).parent
ORDER = (
    "pretrained-8192", "pretrained-32768", "speed", "decode", "append", "offload", "pytorch", "xla", "cupy", "heads",
    "lsh", "index", "faiss", "needles", "crossover", "curve",
)  # fmt: skip
HEAD = """# Results

Measured by the scripts in `benchmarks/` (see there how to run them) and written by `benchmarks/report.py`. *Error* is
the Frobenius norm of (approximate - exact) over that of exact, on the same input as the time beside it. Times are wall
seconds; a ratio above 1 means faster than the yardstick.

![Loss added and KL divergence of a pretrained model against the time of attention](images/pretrained.svg)

SmolLM2-135M with the attention of all its layers replaced; of each method the worst of the texts, a point a setting,
what is below 0.0001 drawn there. Left and low is better. At 32,768 tokens positions are scaled beyond what the model
was trained for: its loss is no better than with a window there, and the divergence from exact is what tells. The
tables have every figure: *missed* is the mean of min(1, squared relative error) of single queries; *local*, *sinks*,
*nodes* and *keys* are the rows that a query reads.
"""


def shown(cell: float | int | str) -> str:
    """A figure with three digits, or as it is."""
    if isinstance(cell, bool | str):
        return str(cell)
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.3g}" if abs(cell) < 1000 else f"{cell:,.0f}"


def main() -> None:
    parts = [HEAD]
    for name in ORDER:
        path = ROOT / "results" / f"{name}.json"
        if not path.exists():
            continue
        table = json.loads(path.read_text())
        versions = f"Python {table['python']}, NumPy {table['numpy']}, PyTorch {table['torch']}"
        about = f"{table['machine']}, {table['threads']} threads; {versions}; {table['date']}"
        lines = [f"## {table['title']}", "", about, "", f"| {' | '.join(table['columns'])} |"]
        lines += ["|" + "---|" * len(table["columns"])]
        lines += [f"| {' | '.join(shown(cell) for cell in row)} |" for row in table["rows"]]
        parts.append("\n".join(lines) + "\n")
    (ROOT.parent / "docs" / "results.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
