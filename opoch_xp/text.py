"""Text of somebody else's, made fit to be shown."""

from collections.abc import Iterable

LONGEST = 60  # characters of a name that are shown
MOST = 8  # names that are


def printable(text: str, kept: str = "") -> str:
    """The text with what a terminal might obey as escapes, but for the characters `kept`."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def name(text: object) -> str:
    """A name as it is shown: printable, and cut where it is long."""
    shown = printable(str(text))
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."


def names(texts: Iterable[str]) -> str:
    """Names in a line: q, k, v and 29,997 more; "nothing" where there are none."""
    ordered = sorted(texts)
    shown = ", ".join(map(name, ordered[:MOST])) or "nothing"
    return shown if len(ordered) <= MOST else f"{shown} and {len(ordered) - MOST:,} more"


def first_line(error: Exception) -> str:
    """What an error says first; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
