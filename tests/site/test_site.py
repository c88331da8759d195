"""The built site, after `mkdocs build --strict`: it fetches nothing from elsewhere, no link of it is broken, and its
figures are what the library computes."""

import base64
import io
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from matplotlib.image import imread

ROOT = Path(__file__).parents[2]
SITE = ROOT / "site"
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
FETCHED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "video": "src", "use": "href"}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
PICTURE = re.compile(r'href="data:image/png;base64,([^"]*)"')
NAMED = re.compile(r'(?:id="|url\(#|href="#)\w+')  # names that matplotlib makes of what they stand for
PIXELS = 0.05  # by which a drawing may move: rounding of another machine's sums
FLIPPED = 0.01  # share of the pairs that may be read otherwise, where two nodes weigh the same to rounding
DRAW = runpy.run_path(str(ROOT / "docs" / "figures.py"))["svg"]


class Reader(HTMLParser):
    """What a page fetches, where its links lead, and the places it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("prev", "next", "canonical", "alternate"):
            self.fetched.append(given["href"])
        elif FETCHED.get(tag) in given:
            self.fetched.append(given[FETCHED[tag]])


@pytest.fixture(scope="module")
def read() -> dict[str, Reader]:
    return {page: Reader((SITE / page).read_text(encoding="utf-8")) for page in PAGES}


def test_there_is_a_site() -> None:
    assert {"index.html", "mathematics.html", "reference/attention.html"} <= set(PAGES), "run mkdocs build --strict"


def test_nothing_is_fetched_from_elsewhere(read: dict[str, Reader]) -> None:
    for page, found in read.items():
        for address in found.fetched:
            assert urlsplit(address)[:2] == ("", ""), f"{page} fetches {address}"
    for sheet in SITE.rglob("*.css"):
        for address in re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s]+)", sheet.read_text(encoding="utf-8")):
            assert address.startswith("data:") or urlsplit(address)[:2] == ("", ""), f"{sheet.name} fetches {address}"


def test_every_link_leads_somewhere(read: dict[str, Reader]) -> None:
    for page, found in read.items():
        for address in (*found.links, *found.fetched):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc or page == "404.html":  # whose links are of the server's root
                continue
            path = (SITE / page).parent / unquote(parts.path) if parts.path else SITE / page
            target = path.resolve()
            assert target.is_file(), f"{page} leads to {address}, which is not there"
            place = unquote(parts.fragment)
            if place and not place.startswith("__"):  # places of the theme's own scripts
                name = target.relative_to(SITE.resolve()).as_posix()
                assert place in read[name].places, f"{page} leads to {address}, whose place is not there"


def test_formulas_are_drawn_by_the_browser() -> None:
    text = (SITE / "mathematics.html").read_text(encoding="utf-8")
    assert text.count("<math") > 20
    assert "\\(" not in text
    assert "arithmatex" not in text


def test_every_public_name_is_in_the_reference(read: dict[str, Reader]) -> None:
    import opoch_xp

    pages = [found for page, found in read.items() if "reference/" in page]
    places = {place.rsplit(".", 1)[-1] for found in pages for place in found.places}
    assert set(opoch_xp.__all__) - {"backends"} <= places
    assert "installed" in places  # opoch_xp.backends


COMPUTED = sorted(path for path in (ROOT / "docs" / "images").glob("*.svg") if path.stem != "scaling")  # measured


@pytest.mark.parametrize("path", COMPUTED, ids=lambda path: path.stem)
def test_figures_are_those_the_library_gives(path: Path) -> None:
    drawn, kept = DRAW(path.stem), path.read_text(encoding="utf-8")
    assert len(kept) < 100_000
    for one, other in zip(PICTURE.findall(drawn), PICTURE.findall(kept), strict=True):
        pixels = [imread(io.BytesIO(base64.b64decode(unquote(text)))) for text in (one, other)]
        assert np.mean(np.any(pixels[0] != pixels[1], axis=-1)) < FLIPPED
    drawn, kept = (NAMED.sub("", PICTURE.sub("", text)) for text in (drawn, kept))
    assert NUMBER.sub("#", drawn) == NUMBER.sub("#", kept)
    numbers = (np.array(NUMBER.findall(text), float) for text in (drawn, kept))
    np.testing.assert_allclose(*numbers, rtol=0, atol=PIXELS)
