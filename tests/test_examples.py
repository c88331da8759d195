"""The examples of the README and of the pages in docs/: every block marked `python` runs."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
PAGES = {page: text for page, text in TEXTS.items() if "```python\n" in text}
SMALLER = {"8192": "600", "8000": "500"}  # tokens and rows of the pages, and here
IMPORTED = re.compile(r"^(?:import|from) (\w+)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where one of them saves a file
    names: dict[str, object] = {}  # a block goes on where the one before it ended
    for block in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
        missing = [name for name in IMPORTED.findall(block) if find_spec(name) is None]
        if missing:
            assert os.environ.get("OPOCH_EXAMPLES") != "all", f"{page}: {', '.join(missing)} not installed"
            pytest.skip(f"{', '.join(missing)} not installed")
        for tokens, fewer in SMALLER.items():
            block = block.replace(tokens, fewer)
        exec(compile(block, page, "exec"), names)


def test_no_example_hides_behind_another_spelling() -> None:
    for page, text in TEXTS.items():
        assert not re.search(r"^ *```(?!python$) *(?:\{? ?\.?)py", text, re.MULTILINE | re.IGNORECASE), page
