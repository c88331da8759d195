"""The site of the documentation in a browser: no page wider than a phone, no figure empty, nothing from elsewhere."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import CHROMIUM, served, told

ROOT = Path(__file__).parents[2]
FRAME = """<!doctype html><iframe id=f style="width:{width}px;height:900px;border:0"></iframe><script>
const pages = {pages}, found = {{}};
f.onload = () => {{
  const d = f.contentDocument, w = f.contentWindow;
  found[pages[0]] = [d.documentElement.scrollWidth,
    w.performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith(location.origin)),
    [...d.querySelectorAll("figure svg, math")].filter(e => e.getBoundingClientRect().height < 5).length];
  pages.shift();
  if (pages.length) f.src = pages[0];
  else fetch("/told?" + encodeURIComponent(JSON.stringify(found)));
}};
f.src = pages[0];
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, list[str]]]:
    """The folder of the built site, its address, and the paths that were asked for."""
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True)
    with served(folder) as (address, asked):
        yield folder, address, asked


@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_fits(site: tuple[Path, str, list[str]], tmp_path: Path, width: int) -> None:
    folder, address, asked = site
    asked.clear()
    pages = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.html"))]
    pages = [page for page in pages if page != "404.html" and not page.startswith("frame")]
    (folder / f"frame{width}.html").write_text(FRAME.format(width=width, pages=json.dumps(pages)))
    measured = json.loads(told(tmp_path, asked, "--window-size=1400,1000", f"{address}/frame{width}.html"))
    assert set(measured) == set(pages)
    assert {page: seen for page, seen in measured.items() if seen[0] > width or seen[1] or seen[2]} == {}
