"""The answer of an evaluation: what to take for the tolerance, in words, in a line to paste, and as settings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opoch_xp.integrations.evaluation.choice import LOWEST
from opoch_xp.integrations.evaluation.compared import name_of
from opoch_xp.integrations.evaluation.results import Row, is_tree
from opoch_xp.integrations.settings import Settings
from opoch_xp.methods import Exact, method_name

EQUAL = 1.05  # ratio of distances up to which two settings count as equally good
PAYS = 1.05  # times faster that another setting must be to be worth a word
BY_HEAD = name_of(Settings({0: (Exact(),)}))
BY_FILE = 'register(settings="settings.json")'


def fastest(rows: Iterable[Row], tol: float) -> Row | None:
    """The treecode for the tolerance: of those that stay within it the fastest, and of those that are about as fast the
    most accurate; None where none does."""
    within: list[Any] = [
        row for row in rows if is_tree(row) and row.scored and row.attended and row.scored.distance <= tol
    ]
    if not within:
        return None
    most = max(row.attended.speedup for row in within)
    alike = [row for row in within if row.attended.speedup * PAYS >= most]
    found: Row = min(alike, key=lambda row: row.scored.distance)
    return found


@dataclass(frozen=True)
class Answer:
    """text: the sentences; line: Python to paste, "" where nothing is to be done; settings: what a file would hold."""

    text: str
    line: str = ""
    settings: Settings | None = None


@dataclass(frozen=True)
class Question:
    """What an evaluation knows when it answers. chosen: the name of the treecode for the tolerance, "" for none; gain:
    how many times faster an rtol for each key head was, None where that was not measured; partly: whether some layers
    stay as they are; what: the name of the distance; size: of the text, in words."""

    rows: Mapping[str, Row]
    chosen: str
    gain: float | None
    tol: float
    layers: Sequence[int]
    partly: bool
    what: str
    size: str
    compared: bool  # whether a treecode was
    stopped: str

    def answer(self) -> Answer:
        row: Any = self.rows.get(self.chosen)
        if row is None or row.attended is None:
            return Answer(self._none())
        figures = f"{self.what} {row.scored.distance:.2g}"
        speed = row.attended.speedup
        if speed <= 1.0:
            return Answer(
                f"Keep scaled_dot_product_attention for {self.size}: {row.name} stays within {self.what} {self.tol:g}"
                f" ({figures}), and takes {1 / speed:.1f} times as long."
            )
        text = (
            f"Take {row.name}: {figures} for a tolerance of {self.tol:g}, attention {speed:.1f} times faster on"
            f" {self.size}."
        )
        settings = Settings(dict.fromkeys(self.layers, (row.method,)))
        line = BY_FILE if self.partly else f"register(method=ox.{method_name(row.method)})"
        more, better = self._by_head(row)
        if better is not None:
            line, settings = BY_FILE, better
        return Answer(" ".join(filter(None, (text, more, self._others(row)))), line, settings)

    def _none(self) -> str:
        if self.stopped:
            return f"The evaluation was ended ({self.stopped}) before a setting was chosen."
        if not self.compared:
            return "No treecode was compared, so no setting was looked for."
        return (
            f"No treecode with an rtol of at least {LOWEST} stays within {self.what} {self.tol:g} on {self.size}: keep"
            " scaled_dot_product_attention."
        )

    def _by_head(self, row: Any) -> tuple[str, Settings | None]:
        """What is said of an rtol for each key head, and the settings where they are better."""
        other: Any = self.rows.get(BY_HEAD)
        if other is None or other.scored is None or self.gain is None:
            return "", None
        figures = f"{self.what} {other.scored.distance:.2g}, {self.gain:.2f} times as fast"
        if other.scored.distance <= max(row.scored.distance * EQUAL, 1e-9) and self.gain > PAYS:
            return f"An rtol for each key head is faster still ({figures}).", other.method
        return f"An rtol for each key head does not pay here ({figures}).", None

    def _others(self, row: Any) -> str:
        """Another method of the library that is within the tolerance and faster."""
        within = [
            one
            for one in self.rows.values()
            if one.method is not None and one.name not in (row.name, BY_HEAD) and one.scored and one.attended
            and one.scored.distance <= self.tol and one.attended.speedup > PAYS * row.attended.speedup
        ]  # fmt: skip
        if not within:
            return ""
        best: Any = max(within, key=lambda one: one.attended.speedup if one.attended else 0.0)
        return f"Faster, and within it too: {best.name} ({best.attended.speedup:.1f} times)."
