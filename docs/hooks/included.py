"""What is written down elsewhere in the repository, put where a page says so: files, and the tables of the README."""

import re
from pathlib import Path
from typing import Any

TABLE = re.compile(r"<!-- (wall|model) -->")
FILE = re.compile(r"<!-- include: (\S+) -->")
OF_DOCS = re.compile(r"\]\((?:\.\./)?docs/")  # links that lead to the pages from outside them


def on_page_markdown(text: str, config: Any, **_: Any) -> str:
    root = Path(config.config_file_path).parent

    def included(found: re.Match[str]) -> str:
        return OF_DOCS.sub("](", (root / found[1]).read_text(encoding="utf-8"))

    text = FILE.sub(included, text)
    return TABLE.sub(lambda found: table(root / "README.md", found[1]), text)


def table(readme: Path, name: str) -> str:
    """What stands between the marks of that name."""
    text, begin, end = readme.read_text(encoding="utf-8"), f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    lines = text[text.index(begin) + len(begin) : text.index(end)].splitlines()
    return "\n".join(line if line.startswith("|") else f"{line}  " for line in lines)  # the lines of a terminal
