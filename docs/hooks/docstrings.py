"""Docstrings as Markdown: they are plain prose with `code`, lists and examples. What else Markdown would take for its
own is escaped, examples become blocks of code, and the names of arguments are set as code where they are explained."""

import re
from itertools import groupby
from typing import Any

from griffe import Extension, Object

CODE = re.compile(r"(`[^`]+`|\*\w+\*)")  # left as they are: code, and a *word* that is meant to stand out
SPECIAL = re.compile(r"([\\*_\[\]#])")


def markdown(text: str, names: list[str]) -> str:
    """The text of a docstring, common indentation removed, as Markdown; names: of the arguments or fields."""
    runs = groupby(kinds(text), lambda line: line[0])
    return "\n".join(rendered(kind, "\n".join(line for _, line in run), names) for kind, run in runs)


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


def rendered(kind: str, text: str, names: list[str]) -> str:
    if kind == "example":
        lines = text.splitlines()
        indent = min(len(line) - len(line.lstrip()) for line in lines)
        return "\n".join(["", "```pycon", *(line[indent:] for line in lines), "```", ""])
    if kind == "code":
        return text
    parts = CODE.split(named(text, names))
    for i in range(0, len(parts), 2):
        parts[i] = SPECIAL.sub(r"\\\1", parts[i].replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))
    return "".join(parts)


def named(text: str, names: list[str]) -> str:
    """The text with names as code where a colon or a shape follows them: `q` (..., n, d), `k` and `rows`: a number."""
    if not names:
        return text
    name = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    shape = r"(?= \((?:\.\.\.|\w+,|\w+\)|[\w +*]+, ))"
    text = re.sub(rf"(?<![\w`.*])({name}){shape}", r"`\1`", text)
    listed = rf"(?:^|(?<=[.;:)] )|(?<=\n))((?:{name})(?:, (?:{name}))*)(?=:(?: |\n))"
    return re.sub(listed, lambda found: re.sub(r"\w+", r"`\g<0>`", found[1]), text)


class Docstrings(Extension):
    """The extension that mkdocs.yml names."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        names = [parameter.name for parameter in obj.parameters] if obj.is_function else []
        if obj.is_class:
            names = [name for name, member in obj.members.items() if member.is_attribute]
            names += [parameter.name for parameter in obj.parameters]
        obj.docstring.value = markdown(obj.docstring.value, [name for name in names if name != "self"])
