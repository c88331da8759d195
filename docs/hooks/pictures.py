"""SVG pictures are put into their page, so that their letters have the colour of its text, light or dark."""

import re
from pathlib import Path
from typing import Any

IMAGE = re.compile(r'<img alt="([^"]*)" src="([^"]*images/([\w-]+\.svg))"\s*/?>')
STYLE = re.compile(r"<style>:root.*?</style>\s*", re.DOTALL)  # for readers that show the file by itself


def on_page_content(text: str, config: Any, **_: Any) -> str:
    def inline(found: re.Match[str]) -> str:
        svg = (Path(config.docs_dir) / "images" / found[3]).read_text(encoding="utf-8")
        svg = STYLE.sub("", svg[svg.index("<svg") :])
        return svg.replace("<svg ", f'<svg role="img" aria-label="{found[1]}" ', 1)

    return IMAGE.sub(inline, text)
