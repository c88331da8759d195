"""TeX becomes MathML while the site is built: browsers draw it by themselves, so no script is needed."""

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
NAMES = re.compile(r"<mi>(ln|log|exp|cos|max|min)</mi>(?!<mo stretchy|<mo>&#x00028;)")
BRACKETS = re.compile(r'<mo stretchy="true"( fence="true" minsize="[^"]*" maxsize="[^"]*")>')


def on_page_content(text: str, page: Any, **_: Any) -> str:
    """Replace every formula of a page; one that cannot be converted stops the build."""

    def mathml(found: re.Match[str]) -> str:
        tex = html.unescape(found[3]).strip()
        try:
            formula = convert(tex, display="block" if found[2] == "[" else "inline")
        except Exception as error:  # the converter has no exception of its own for what it cannot read
            raise PluginError(f"{page.file.src_path}: {tex}: {error!r}") from error
        unknown = re.findall(r"\\\w+", formula)
        if unknown:
            raise PluginError(f"{page.file.src_path}: {tex}: unknown {', '.join(unknown)}")
        formula = NAMES.sub(r'<mi>\1</mi><mspace width="0.167em"/>', formula)  # ln n, not lnn
        return f'<{found[1]} class="formula">{formula}</{found[1]}>'

    return FORMULA.sub(mathml, text)
