"""The figures of asv's result files, which are JSON: of one commit on one machine."""

import json
import math
from ast import literal_eval
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

FOLDER = Path("build/asv/results")  # where asv.conf.json keeps those of every day
KEPT = Path(__file__).with_name("results") / "asv"  # where those of releases are committed


@dataclass(frozen=True)
class Figure:
    """One figure: of which benchmark, for which parameters, e.g. ("numpy", "Exact", 1024).

    value is None where the benchmark failed and NaN where it does not apply.
    """

    benchmark: str
    parameters: tuple[Any, ...]
    value: float | None

    @property
    def name(self) -> str:
        return f"{self.benchmark}{self.parameters}" if self.parameters else self.benchmark


def figures(path: Path) -> list[Figure]:
    """All figures of a result file, in its order."""
    content = json.loads(path.read_text(encoding="utf-8"))
    columns = content["result_columns"]
    found = []
    for benchmark, row in content["results"].items():
        cells = dict(zip(columns, row, strict=False))  # a row ends with its last cell that says something
        sets = [tuple(map(_literal, chosen)) for chosen in product(*(cells.get("params") or []))]
        values = cells.get("result") or [None] * len(sets)
        found += [Figure(benchmark, *pair) for pair in zip(sets, values, strict=True)]
    return found


def result_file(folder: Path, commit: str) -> Path:
    """The newest result file of a commit, on any machine. Raises FileNotFoundError where there is none."""
    found = sorted(folder.glob(f"*/{commit[:8]}-*.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{folder} holds no results of commit {commit[:8]}")
    return found[-1]


def applies(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _literal(text: str) -> Any:
    try:
        return literal_eval(text)
    except (SyntaxError, ValueError):
        return text
