"""The answer of an evaluation: what to take for the tolerance, in words, in a line to paste, and as settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opoch_xp.integrations.evaluation.choice import BY_HEAD, LOWEST
from opoch_xp.integrations.evaluation.results import Row, is_tree
from opoch_xp.integrations.settings import Settings
from opoch_xp.methods import method_name

EQUAL = 1.05  # ratio of distances up to which two settings count as equally good
PAYS = 1.05  # times faster that another setting must be to be worth a word
BY_FILE = 'register(settings="settings.json")'


def fastest(seconds: Mapping[str, float], rows: Mapping[str, Row]) -> Row | None:
    """The treecode to take, of the seconds of those within the tolerance, by name: the fastest, and of those that are
    about as fast the most accurate; None where there is none. Seconds of one pass: those of others differ by as much as
    treecodes do."""
    least = min(seconds.values(), default=0.0)
    alike: list[Any] = [rows[name] for name, taken in seconds.items() if taken <= PAYS * least]
    return min(alike, key=lambda row: row.scored.distance, default=None)


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
    whole: bool  # whether it reads every key of so short a text
    stopped: str

    def answer(self) -> Answer:
        row: Any = self.rows.get(self.chosen)
        if row is None or row.attended is None:
            return Answer(" ".join(filter(None, (self._none(), self._others(1.0)))))
        figures, speed = f"{self.what} {row.scored.distance:.2g}", row.attended.speedup
        more, better = self._by_head(row)
        most = speed * self.gain if better is not None and self.gain is not None else speed
        if most <= 1.0:
            text = (
                f"Keep scaled_dot_product_attention for {self.size}: {row.name} stays within {self.what} {self.tol:g}"
                f" ({figures}), and takes {1 / speed:.1f} times as long."
            )
            return Answer(" ".join(filter(None, (text, self._others(1.0)))))
        text = (
            f"Take {row.name}: {figures} for a tolerance of {self.tol:g}, attention {speed:.1f} times as fast on"
            f" {self.size}."
        )
        line, settings = f"register(method=ox.{method_name(row.method)})", better
        if self.partly or better is not None:
            line = BY_FILE
        if settings is None:
            settings = Settings(dict.fromkeys(self.layers, (row.method,)))
        return Answer(" ".join(filter(None, (text, more, self._others(most)))), line, settings)

    def _none(self) -> str:
        if self.stopped:
            return f"The evaluation was {self.stopped} before a setting was chosen."
        if not self.compared:
            return "No treecode was compared, so no setting was looked for."
        if self.whole:
            return (
                f"Keep scaled_dot_product_attention for {self.size}: they are one block of a treecode, which reads them"
                " all. Give a longer text to see what it does there."
            )
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
        if other.scored.distance <= min(self.tol, row.scored.distance * EQUAL) and self.gain > PAYS:
            return f"An rtol for each key head is faster still ({figures}).", other.method
        return f"An rtol for each key head does not pay here ({figures}).", None

    def _others(self, speed: float) -> str:
        """Another method of the library that is within the tolerance and faster than `speed`."""
        within = [
            one
            for one in self.rows.values()
            if one.method is not None and not is_tree(one) and one.name != BY_HEAD and one.within(self.tol)
            and one.attended and one.attended.speedup > PAYS * speed
        ]  # fmt: skip
        if not within:
            return ""
        best: Any = max(within, key=lambda one: one.attended.speedup if one.attended else 0.0)
        return f"Within it too, and faster: {best.name} ({best.attended.speedup:.1f} times as fast)."
