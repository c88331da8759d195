"""The page of `opoch-xp report` in a browser: everything drawn, nothing fetched, nothing wider than the page."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import CHROMIUM, look, served
from typer.testing import CliRunner

from opoch_xp.cli.app import app

FRAME = """<!doctype html><iframe id=f src=report.html style="width:{width}px;height:900px;border:0"></iframe><script>
f.onload = () => {{
  const d = f.contentDocument, bad = [];
  for (const e of d.querySelectorAll("h1,h2,p,figure,svg,.wide"))
    if (e.getBoundingClientRect().right > {width} + 1) bad.push(e.tagName + ":" + e.className);
  const drawn = [...d.querySelectorAll("svg")].filter(e => e.getBoundingClientRect().height > 100).length;
  document.title = JSON.stringify([d.documentElement.scrollWidth, drawn, bad]);
  document.body.append("measured " + document.title + " end");
}}
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, list[str]]]:
    """The folder with the page, its address, and the paths that were asked for."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    folder = tmp_path_factory.mktemp("site")
    result = CliRunner().invoke(app, ["report", str(folder / "report.html"), "--tokens", "8192", "--vectors", "3000"])
    assert result.exit_code == 0, result.output
    with served(folder) as (address, asked):
        yield folder, address, asked


@pytest.mark.parametrize("width", [1280, 375])
def test_the_page_fits_and_is_drawn(site: tuple[Path, str, list[str]], tmp_path: Path, width: int) -> None:
    folder, address, asked = site
    (folder / f"frame{width}.html").write_text(FRAME.format(width=width))
    asked.clear()
    text = look(tmp_path, "--window-size=1400,1000", "--dump-dom", f"{address}/frame{width}.html")
    found = re.search(r"measured \[(\d+),(\d+),(\[.*?\])\] end", text)
    assert found is not None, text[-2000:]
    assert int(found[1]) <= width
    assert int(found[2]) == 5
    assert found[3] == "[]"
    assert set(asked) - {"/favicon.ico"} == {f"/frame{width}.html", "/report.html"}


def test_the_page_names_no_other_place(site: tuple[Path, str, list[str]]) -> None:
    text = (site[0] / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!#)[^"]*"', text) == []
    assert "@import" not in text
    assert "<script" not in text
    for title in ("The wall: scattered", "Needles: random", "Needles: clustered", "Scaling", "Error against time"):
        assert title in text
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL).lower().replace("finance", "")
