"""What is written down elsewhere in the repository, put where a page says so: files, and the table of the README."""

import re
from pathlib import Path
from typing import Any

WALL = "<!-- wall -->"
BEGIN, END = "<!-- wall: begin -->", "<!-- wall: end -->"
FILE = re.compile(r"<!-- include: (\S+) -->")
OF_DOCS = re.compile(r"\]\((?:\.\./)?docs/")  # links that lead to the pages from outside them


def on_page_markdown(text: str, config: Any, **_: Any) -> str:
    root = Path(config.config_file_path).parent

    def included(found: re.Match[str]) -> str:
        return OF_DOCS.sub("](", (root / found[1]).read_text(encoding="utf-8"))

    text = FILE.sub(included, text)
    return text.replace(WALL, wall(root / "README.md")) if WALL in text else text


def wall(readme: Path) -> str:
    text = readme.read_text(encoding="utf-8")
    lines = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].splitlines()
    return "\n".join(line if line.startswith("|") else f"{line}  " for line in lines)  # the lines of a terminal
