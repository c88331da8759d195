"""The table of the README, put where a page says so: it is written down once."""

from pathlib import Path
from typing import Any

MARK = "<!-- wall -->"
BEGIN, END = "<!-- wall: begin -->", "<!-- wall: end -->"


def on_page_markdown(text: str, config: Any, **_: Any) -> str:
    if MARK not in text:
        return text
    readme = (Path(config.config_file_path).parent / "README.md").read_text(encoding="utf-8")
    wall = readme[readme.index(BEGIN) + len(BEGIN) : readme.index(END)]
    lines = (line if line.startswith("|") else f"{line}  " for line in wall.splitlines())  # the lines of a terminal
    return text.replace(MARK, "\n".join(lines))
