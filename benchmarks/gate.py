"""Compare two commits by the figures that are the same on every machine: `gate.py OLD NEW`, after asv measured both.

Times are shown by `asv compare` and judged by nobody: they depend on what else the machine does. Errors, pairs, rows
read, bytes held, recall and candidates do not, and a loss of more than a fifth in one of them ends in exit status 1.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from figures import FOLDER, Figure, applies, figures, result_file

MORE_IS_WORSE = {
    "track_error": True, "track_pairs": True, "track_rows": True, "track_bytes": True, "track_candidates": True,
    "track_recall": False,
}  # fmt: skip
MOST = 1.2  # a figure worse by more than this factor is a loss
ROUNDING = 1e-6  # figures below are rounding of float32, and count as this


@dataclass(frozen=True)
class Loss:
    """A figure that became worse; new is None where the benchmark now fails."""

    name: str
    old: float
    new: float | None

    def __str__(self) -> str:
        return f"{self.name}: {self.old:.4g} -> {'failed' if self.new is None else format(self.new, '.4g')}"


def losses(old: list[Figure], new: list[Figure]) -> tuple[list[Loss], int]:
    """What became worse, and how many figures were compared: those that both have, are judged and apply."""
    before = {figure.name: figure.value for figure in old}
    lost, compared = [], 0
    for figure in new:
        kind = figure.benchmark.rsplit(".", 1)[-1]
        value = before.get(figure.name)
        if kind not in MORE_IS_WORSE or value is None or not applies(value):
            continue
        if figure.value is not None and not applies(figure.value):
            continue
        compared += 1
        if figure.value is None or factor(value, figure.value, MORE_IS_WORSE[kind]) > MOST:
            lost.append(Loss(figure.name, value, figure.value))
    return lost, compared


def factor(old: float, new: float, more_is_worse: bool) -> float:
    """How many times worse the new figure is; 1 or less is no worse."""
    old, new = max(old, ROUNDING), max(new, ROUNDING)
    return new / old if more_is_worse else old / new


def main(old: str, new: str, folder: Path = FOLDER) -> int:
    lost, compared = losses(*(figures(result_file(folder, commit)) for commit in (old, new)))
    print(f"{compared} figures compared of {old[:8]} and {new[:8]}; {len(lost)} worse by more than {MOST - 1:.0%}")
    print(*lost, sep="\n", end="\n" if lost else "")
    return 1 if lost or not compared else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
