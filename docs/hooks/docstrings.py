"""Docstrings as Markdown: they are plain prose with `code`, lists and examples. What else Markdown would read as its own
is escaped, and examples become blocks of code."""

import re
from itertools import groupby
from typing import Any

from griffe import Extension, Object

CODE = re.compile(r"(`[^`]+`|\*\w+\*)")  # left as they are: code, and a *word* that is meant to stand out
SPECIAL = re.compile(r"([\\*_\[\]<>#])")


def markdown(text: str) -> str:
    """The text of a docstring, common indentation removed, as Markdown."""
    return "\n".join(rendered(kind, [line for _, line in run]) for kind, run in groupby(kinds(text), lambda x: x[0]))


def kinds(text: str) -> list[tuple[str, str]]:
    """Every line with what it belongs to: prose, code (indented), or an example up to the next empty line."""
    found, kind = [], "prose"
    for line in text.splitlines():
        if line.lstrip().startswith(">>>"):
            kind = "example"
        elif not line.strip() or kind != "example":
            kind = "code" if line.startswith("    ") or (kind == "code" and not line.strip()) else "prose"
        found.append((kind, line))
    return found


def rendered(kind: str, lines: list[str]) -> str:
    text = "\n".join(lines)
    if kind == "example":
        indent = min(len(line) - len(line.lstrip()) for line in lines)
        return "\n".join(["", "```pycon", *(line[indent:] for line in lines), "```", ""])
    if kind == "code":
        return text
    parts = CODE.split(text)
    return "".join(part if i % 2 else SPECIAL.sub(r"\\\1", part) for i, part in enumerate(parts))


class Docstrings(Extension):
    """The extension that mkdocs.yml names."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
