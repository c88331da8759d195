"""LSHIndex: equal to the definition by loops, whatever is added and removed in whatever order, for every backend."""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from itertools import combinations, pairwise
from threading import Event
from typing import Any

import numpy as np
import pytest
from conftest import Backend
from hypothesis import given
from hypothesis import strategies as st

import opoch_xp as ox
from opoch_xp.probing import flip_sets
from opoch_xp.testing import whole

pytestmark = pytest.mark.dynamic_shapes
METRICS = ["cosine", "inner", "euclidean"]


def normal(seed: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def made(backend: Backend, x: np.ndarray, ids: Any = None, planes: np.ndarray | None = None, **settings: Any) -> Any:
    """An index of the backend that holds x."""
    index = ox.LSHIndex(x.shape[1], **settings, backend=backend.name)
    if planes is not None:
        index._planes = planes
    index.add(backend.array(x), ids)
    return index


def lists(backend: Backend, found: Any) -> list[list[int]]:
    offsets, ids = backend.numpy(found.offsets), backend.numpy(found.ids)
    assert offsets[0] == 0
    assert offsets[-1] == len(ids)
    return [ids[low:high].tolist() for low, high in pairwise(offsets)]


def unit(x: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1)


def scores_of(metric: str, q: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(m, n), in float64."""
    q, x = q.astype(np.float64), x.astype(np.float64)
    if metric == "euclidean":
        return -np.linalg.norm(q[:, None] - x, axis=-1)
    return unit(q) @ unit(x).T if metric == "cosine" else q @ x.T


def probed(margins: np.ndarray, code: int, probes: int) -> list[int]:
    """The codes of the `probes` sets of flipped bits with the smallest sums of squared margins, by trying them all."""
    bits = range(len(margins))
    most = min(len(margins), probes.bit_length())  # a set of s bits comes after its 2**s - 1 subsets
    sets = [flips for size in range(most + 1) for flips in combinations(bits, size)]
    sets.sort(key=lambda flips: sum(float(margins[bit]) ** 2 for bit in flips))
    return [code ^ sum(1 << bit for bit in flips) for flips in sets[:probes]]


def runs_of(index: Any, q: np.ndarray, x: np.ndarray) -> list[list[list[int]]]:
    """By query, probe by probe and table by table: the places of x in that bucket, ascending. In loops."""
    planes, probes = index._planes.astype(np.float64), index.settings.probes
    found = []
    tables: list[dict[int, list[int]]] = []
    for normals in planes:
        buckets = defaultdict(list)
        for place, row in enumerate(x):
            buckets[sum(1 << bit for bit, plane in enumerate(normals) if plane @ row >= 0)].append(place)
        tables.append(buckets)
    for row in q.astype(np.float64):
        codes = []
        for normals in planes:
            margins = normals @ row
            codes.append(probed(np.abs(margins), sum(1 << bit for bit, m in enumerate(margins) if m >= 0), probes))
        found.append([tables[t].get(codes[t][p], []) for p in range(probes) for t in range(len(planes))])
    return found


def allowed_by(runs: list[list[int]], limit: int | None) -> list[int]:
    entries = [place for run in runs for place in run]
    return sorted(set(entries[:limit]))


@pytest.fixture(params=["usual", "small blocks", "all dense"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways a search is cut up and computed."""
    generic, numpy = (import_module(f"opoch_xp.backends.{name}.search") for name in ("generic", "numpy"))
    if request.param == "small blocks":
        monkeypatch.setattr(generic, "ENTRIES", 7)
        monkeypatch.setattr(generic, "PRODUCTS", 9)
        monkeypatch.setattr(import_module("opoch_xp.probing"), "NUMBERS", 50)
        monkeypatch.setattr(import_module("opoch_xp.index"), "GATHERED", 20)
        small = {"ENTRIES": 7, "LEAST": 3, "LOOK_UPS": 0, "GATHER": 40, "BARRED": 100, "COLUMNS": 5, "DENSE": 0.4}
        for name, value in small.items():
            monkeypatch.setattr(numpy, name, value)
    elif request.param == "all dense":
        monkeypatch.setattr(numpy, "DENSE", -1.0)
        monkeypatch.setattr(numpy, "ROOM", 0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("limit", [None, 1, 9])
@pytest.mark.parametrize(("bits", "tables", "probes"), [(0, 1, 1), (1, 2, 2), (3, 2, 1), (4, 3, 5), (20, 4, 3)])
def test_candidates_search_and_range_are_the_definition(
    backend: Backend, blocks: None, metric: str, limit: int | None, bits: int, tables: int, probes: int
) -> None:
    planes, x, q = normal(0, tables, bits, 6), normal(1, 60, 6), normal(2, 23, 6)
    settings = {"bits": bits, "tables": tables, "probes": probes, "metric": metric, "max_candidates": limit}
    ids = np.random.default_rng(3).permutation(500)[:60]
    index = made(backend, x, ids, planes, **settings)
    expected = [allowed_by(runs, limit) for runs in runs_of(index, q, x)]
    assert lists(backend, index.candidates(backend.array(q))) == [ids[places].tolist() for places in expected]
    scores, kept = scores_of(metric, q, x), np.random.default_rng(4).random(60) < 0.7
    for k, filter_ in ((1, None), (4, None), (70, None), (4, kept)):
        found = index.search(backend.array(q), k, filter=None if filter_ is None else backend.array(filter_))
        assert found.ids.dtype == backend.xp.int64
        assert found.scores.dtype == backend.xp.float32
        for row, places in enumerate(expected):
            there = [place for place in places if filter_ is None or filter_[place]]
            best = sorted(there, key=lambda place: (-scores[row, place], place))[:k]
            pad = k - len(best)
            assert backend.numpy(found.ids)[row].tolist() == ids[best].tolist() + [-1] * pad
            # cosines of unit rows of 6 numbers: a few roundings of numbers up to 1; the others up to 15
            np.testing.assert_allclose(
                backend.numpy(found.scores)[row], [*scores[row, best], *[-np.inf] * pad], rtol=0, atol=1e-5
            )
    least = float(np.median(scores)) + 1e-4
    in_range = index.range_search(backend.array(q), least)
    wanted = [[place for place in places if scores[row, place] >= least] for row, places in enumerate(expected)]
    assert lists(backend, in_range) == [ids[places].tolist() for places in wanted]
    flat = np.concatenate([scores[row, places] for row, places in enumerate(wanted)])
    np.testing.assert_allclose(backend.numpy(in_range.scores), flat, rtol=0, atol=1e-5)


def test_exact_search_reads_everything(backend: Backend, blocks: None) -> None:
    x, q = normal(0, 300, 8), normal(1, 40, 8)
    scores = scores_of("inner", q, x)
    index = made(backend, x, bits=10, tables=1, metric="inner")
    kept = np.arange(300) % 3 > 0
    for filter_ in (None, kept):
        found = index.search(
            backend.array(q), 12, exact=True, filter=None if filter_ is None else backend.array(filter_)
        )
        masked = scores if filter_ is None else np.where(filter_, scores, -np.inf)
        assert backend.numpy(found.ids).tolist() == np.argsort(-masked, axis=1)[:, :12].tolist()


def test_equal_scores_come_in_the_order_of_addition(backend: Backend, blocks: None) -> None:
    """Of whole numbers: elsewhere equal vectors may score a rounding apart, by where they stand in a product."""
    x = np.repeat(whole(0, 4, 5), 30, axis=0)
    scores = (x @ x[0]).tolist()
    for bits, tables, exact in ((0, 1, False), (0, 1, True), (2, 3, False)):
        index = made(backend, x, None, whole(1, tables, bits, 5), bits=bits, tables=tables, metric="inner")
        there = range(120) if exact else allowed_by(runs_of(index, x[:1], x)[0], None)
        best = sorted(there, key=lambda i: (-scores[i], i))[:70]
        found = index.search(backend.array(x[:1]), 70, exact=exact)
        assert backend.numpy(found.ids)[0].tolist() == best + [-1] * (70 - len(best))


def test_whole_numbers_share_buckets_bit_for_bit_with_a_dictionary_of_lists(backend: Backend) -> None:
    planes, x, q = whole(0, 5, 9, 7), whole(1, 400, 7), whole(2, 50, 7)
    index = made(backend, x, None, planes, bits=9, tables=5, metric="inner")
    expected = [allowed_by(runs, None) for runs in runs_of(index, q, x)]
    assert lists(backend, index.candidates(backend.array(q))) == expected


@given(
    steps=st.lists(st.tuples(st.sampled_from(["add", "remove", "merge"]), st.integers(0, 9)), max_size=6),
    bits=st.sampled_from([2, 12]),
    seed=st.integers(0, 99),
)
def test_any_history_equals_an_index_made_at_once(backend: Backend, steps: Any, bits: int, seed: int) -> None:
    settings = {"bits": bits, "tables": 3, "metric": "euclidean", "backend": backend.name}
    index, rng = ox.LSHIndex(4, **settings), np.random.default_rng(seed)
    held: dict[int, np.ndarray] = {}
    for what, count in steps:
        x = rng.standard_normal((count, 4)).astype(np.float32)
        if what == "remove":
            gone = rng.permutation(list(held))[:count]
            index.remove(gone.astype(np.int64))
            for number in gone.tolist():
                del held[int(number)]
        elif what == "add":
            ids = backend.numpy(index.add(backend.array(x)))
            held |= dict(zip(ids.tolist(), x, strict=True))
        else:
            other, ids = ox.LSHIndex(4, **settings), 1000 + int(rng.integers(10**9)) + np.arange(count)
            other.add(backend.array(x), ids)
            index.merge(other)
            held |= dict(zip(ids.tolist(), x, strict=True))
    assert len(index) == len(held)
    if not held:
        return
    fresh = ox.LSHIndex(4, **settings)
    fresh.add(backend.array(np.stack(list(held.values()))), list(held))
    q = backend.array(rng.standard_normal((9, 4)).astype(np.float32))
    assert lists(backend, index.candidates(q)) == lists(backend, fresh.candidates(q))
    assert backend.numpy(index.search(q, 3).ids).tolist() == backend.numpy(fresh.search(q, 3).ids).tolist()
    for name in ("codes", "order"):
        ours, theirs = (backend.numpy(getattr(i._contents.tables, name)).tolist() for i in (index, fresh))
        assert ours == theirs


def test_ids_go_on_after_the_highest_there_ever_was(backend: Backend) -> None:
    index = made(backend, normal(0, 3, 4), [7, 2, 40])
    index.remove([40])
    assert backend.numpy(index.add(backend.array(normal(1, 2, 4)))).tolist() == [41, 42]
    assert backend.numpy(index.ids).tolist() == [7, 2, 41, 42]
    index.remove(index.ids)
    assert len(index) == 0
    assert backend.numpy(index.add(backend.array(normal(1, 1, 4)))).tolist() == [43]


def test_an_empty_index_finds_nothing(backend: Backend) -> None:
    q = backend.array(normal(0, 3, 4))
    emptied = made(backend, normal(1, 5, 4))
    emptied.remove(emptied.ids)
    for index in (ox.LSHIndex(4, backend=backend.name), emptied):
        found = index.search(q, 2)
        assert backend.numpy(found.ids).tolist() == [[-1, -1]] * 3
        assert backend.numpy(found.scores).tolist() == [[-np.inf] * 2] * 3
        assert backend.numpy(index.search(q, 2, exact=True).ids).tolist() == [[-1, -1]] * 3
        assert lists(backend, index.candidates(q)) == [[]] * 3
        assert lists(backend, index.range_search(q, -1.0)) == [[]] * 3
        assert index.stats().size == 0
    assert backend.numpy(made(backend, normal(1, 5, 4)).search(q[:0, :], 2).ids).shape == (0, 2)


def test_zero_vectors_have_all_bits_set_and_score_zero(backend: Backend) -> None:
    x = normal(0, 20, 4)
    x[5] = 0
    index = made(backend, x, bits=3, tables=2)
    assert backend.numpy(index._contents.tables.codes).max() == 7
    codes = backend.numpy(ox.hash_codes(backend.array(x[5:6]), index._planes, backend=backend.name))
    assert codes.tolist() == [[7], [7]]
    found = index.search(backend.array(x[5:6]), 20, exact=True)
    assert backend.numpy(found.scores).tolist() == [[0.0] * 20]
    [neighbours] = lists(backend, index.candidates(backend.array(x[5:6])))
    assert 5 in neighbours


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_cosine_of_vectors_whose_squares_leave_float32(backend: Backend, size: float) -> None:
    x = normal(0, 50, 4)
    index, scaled = made(backend, x, bits=4), made(backend, x * np.float32(size), bits=4)
    expected, found = (i.search(backend.array(x[:9]), 3) for i in (index, scaled))
    assert backend.numpy(found.ids).tolist() == backend.numpy(expected.ids).tolist()
    np.testing.assert_allclose(backend.numpy(found.scores), backend.numpy(expected.scores), rtol=0, atol=1e-6)


def test_distances_of_near_vectors_are_computed_by_differences(backend: Backend) -> None:
    x, near = normal(0, 40, 4), np.float32(1e-4) * normal(1, 40, 4)
    found = made(backend, x, bits=0, tables=1, metric="euclidean").search(backend.array(x + near), 1)
    assert backend.numpy(found.ids)[:, 0].tolist() == list(range(40))
    expected = -np.linalg.norm((x + near) - x, axis=1)
    np.testing.assert_allclose(backend.numpy(found.scores)[:, 0], expected, rtol=1e-5)


def test_settings_that_make_no_index() -> None:
    for settings, words in (
        ({"dim": 0}, "dim must be a whole number of at least 1, got 0"),
        ({"bits": 63}, "bits must be a whole number from 0 to 62, got 63"),
        ({"tables": 0}, "tables must be"),
        ({"bits": 2, "probes": 5}, "probes must be a whole number from 1 to 4, got 5"),
        ({"metric": "dot"}, "metric must be one of cosine, inner, euclidean; got 'dot'"),
        ({"max_candidates": 0}, "max_candidates must be"),
        ({"seed": -1}, "seed must be"),
    ):
        with pytest.raises(ValueError, match=words):
            ox.LSHIndex(**{"dim": 4, **settings})


def test_bad_input_is_refused_in_the_callers_words_and_changes_nothing(backend: Backend) -> None:
    x = normal(0, 6, 4)
    index, array = made(backend, x), backend.array
    bad = x.copy()
    bad[2, 1] = np.nan
    calls: list[tuple[Any, type[Exception], str]] = [
        (lambda: index.add(array(x[:, :3])), ValueError, r"x must be \(m, dim\) with dim = 4, got shape \(6, 3\)"),
        (lambda: index.add(array(x[0])), ValueError, r"got shape \(4,\)"),
        (lambda: index.add(array(bad)), ValueError, "x must be finite; row 2 is not"),
        (
            lambda: index.add(array(x.astype("float64"))),
            TypeError,
            "x must have dtype float32, as what the index holds",
        ),
        (lambda: index.add(array(x.astype("int64"))), TypeError, "x must have dtype"),
        (lambda: index.add([[1.0]]), TypeError, "x must be an array"),
        (lambda: index.add(array(x), [1, 2]), ValueError, "ids must be one for each of the 6 vectors, got 2"),
        (lambda: index.add(array(x), range(5, 11)), ValueError, "ids must be new to the index; 5 is held already"),
        (lambda: index.add(array(x), [9, 8, 9, 8, 7, 6]), ValueError, "ids must differ; 8, 9 given more than once"),
        (lambda: index.add(array(x), [9, 8, 7, -6, 10, 11]), ValueError, "ids must be at least 0, got -6"),
        (lambda: index.add(array(x), [0.5] * 6), ValueError, "ids must be a list of whole numbers, got float64"),
        (lambda: index.remove([0, 77, 78]), ValueError, "ids must be held by the index; 77, 78 are not"),
        (lambda: index.remove([0, 0]), ValueError, "ids must differ; 0 given more than once"),
        (lambda: index.search(array(x[:, :2]), 1), ValueError, r"q must be \(m, dim\)"),
        (lambda: index.search(array(bad), 1), ValueError, "q must be finite; row 2 is not"),
        (lambda: index.search(array(x), 0), ValueError, "k must be a whole number of at least 1, got 0"),
        (
            lambda: index.search(array(x), 1, filter=array(np.ones(5, bool))),
            ValueError,
            r"filter must have shape \(6,\)",
        ),
        (lambda: index.search(array(x), 1, filter=array(np.ones(6))), TypeError, "filter must be a bool array"),
        (lambda: index.range_search(array(x), float("nan")), ValueError, "least must be a score"),
        (lambda: index.merge(ox.LSHIndex(4, bits=3)), ValueError, "other must have bits=16, got bits=3"),
        (lambda: index.merge(made(backend, x)), ValueError, "0, 1, 2 and 3 more are held already"),
        (lambda: index.tune(array(x), 7, 0.9), ValueError, "k must be a whole number from 1 to 6, got 7"),
        (lambda: index.tune(array(x), 1, 1.5), ValueError, "recall must be a share above 0 and at most 1, got 1.5"),
        (lambda: index.tune(array(x[:0]), 1, 0.5), ValueError, "queries must hold at least one query"),
        (lambda: ox.LSHIndex(4).tune(array(x), 1, 0.5), ValueError, "the index is empty"),
    ]
    before = index._contents
    for call, kind, words in calls:
        with pytest.raises(kind, match=words):
            call()
    assert index._contents is before


def test_arrays_of_another_library_are_refused(backend: Backend) -> None:
    other = normal(1, 2, 4)
    if backend.xp is not import_module("array_api_compat.numpy"):
        with pytest.raises(TypeError, match="q must be of .* as what the index holds, got numpy"):
            made(backend, normal(0, 3, 4)).search(other, 1)
    else:
        strict = import_module("array_api_strict")
        with pytest.raises(TypeError, match="q must be of numpy, as what the index holds, got array_api_strict"):
            made(backend, normal(0, 3, 4)).search(strict.asarray(other), 1)


def test_16_bits_are_widened_and_float64_stays(backend: Backend) -> None:
    x = normal(0, 30, 4)
    assert made(backend, x.astype("float64")).vectors.dtype == backend.xp.float64
    if backend.has("float16"):
        index = made(backend, x.astype("float16"))
        assert index.vectors.dtype == backend.xp.float32
        assert backend.numpy(index.search(backend.array(x[:4].astype("float16")), 1).ids)[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("bits", "probes"), [(1, 2), (4, 16), (6, 7), (9, 20), (16, 33)])
def test_flip_sets_hold_every_set_that_can_be_among_the_first(bits: int, probes: int) -> None:
    sets = flip_sets(bits, probes)
    assert len(sets) >= probes
    held = {tuple(np.flatnonzero(row).tolist()) for row in sets}
    assert len(held) == len(sets)
    rng = np.random.default_rng(0)
    for shape in (0.1, 1.0, 5.0):
        weights = np.sort(rng.gamma(shape, size=min(bits, 10)))
        flips = [c for size in range(len(weights) + 1) for c in combinations(range(len(weights)), size)]
        flips.sort(key=lambda c: sum(weights[list(c)]))
        assert set(flips[:probes]) <= held


def test_stats_count_what_is_there(backend: Backend) -> None:
    x = normal(0, 200, 4)
    index = made(backend, x, bits=5, tables=3)
    codes = backend.numpy(ox.hash_codes(backend.array(x), index._planes, backend=backend.name))
    sizes = [np.unique(row, return_counts=True)[1] for row in codes]
    every, stats = np.concatenate(sizes), index.stats()
    assert (stats.size, stats.occupied, stats.largest) == (200, len(every), every.max())
    assert sum(stats.histogram) == len(every)
    assert stats.histogram[1] == ((every >= 2) & (every < 4)).sum()
    assert stats.expected == 1 / 32
    same = [(row[:, None] == row[None, :]).sum() - 200 for row in codes]
    assert stats.observed == pytest.approx(np.mean(same) / (200 * 199))
    contents = index._contents
    arrays = (contents.x, contents.ids, contents.tables.codes, contents.tables.order, contents.tables.offsets)
    assert stats.bytes == sum(backend.numpy(array).nbytes for array in arrays if array is not None)


def test_readers_see_the_index_before_or_after_a_change(backend: Backend) -> None:
    """Batches of equal vectors, of which a query sees all or none, while one thread adds and removes them."""
    one, size = normal(0, 1, 8), 50
    index, stop = made(backend, normal(1, 100, 8), bits=6, tables=2), Event()
    q = backend.array(one)

    def read() -> set[int]:
        seen = set()
        while not stop.is_set():
            ids = backend.numpy(index.candidates(q).ids)
            seen.add(int((ids >= 1000).sum()))
            found = backend.numpy(index.search(q, size).scores)
            seen.add(int((found > 0.9999).sum()))
        return seen

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            for number in range(1, 13):
                ids = 1000 * number + np.arange(size)
                index.add(backend.array(np.repeat(one, size, axis=0)), ids)
                index.remove(ids)
        finally:
            stop.set()
        seen = set().union(*(reader.result() for reader in readers))
    assert seen <= {0, size}
    assert len(index) == 100


def test_the_index_keeps_copies(backend: Backend) -> None:
    for metric in METRICS:
        x, ids = normal(0, 40, 5), np.arange(40)
        index = ox.LSHIndex(5, bits=3, tables=4, metric=metric, backend=backend.name)
        given_x = backend.writable(x)
        returned = index.add(given_x, ids)
        for array in (given_x, returned):
            array[...] = 0
        ids[:] = 0
        assert backend.numpy(index.ids).tolist() == list(range(40))
        assert backend.numpy(index.search(backend.array(x), 1, exact=metric != "inner").ids).min() >= 0
        if metric != "cosine":
            np.testing.assert_array_equal(backend.numpy(index.vectors), x)
        if isinstance(index.vectors, np.ndarray):
            with pytest.raises(ValueError, match="read-only"):
                index.vectors[0] = 0


def test_no_queries_find_nothing(backend: Backend) -> None:
    index, none = made(backend, normal(0, 40, 5), bits=3, probes=2), backend.array(normal(1, 0, 5))
    assert lists(backend, index.candidates(none)) == []
    assert lists(backend, index.range_search(none, 0.0)) == []
    for exact in (False, True):
        found = index.search(none, 3, exact=exact)
        assert found.ids.shape == found.scores.shape == (0, 3)


def test_numbers_of_numpy_are_numbers(tmp_path: Any) -> None:
    x = normal(0, 60, 5)
    for kind in (np.int8, np.uint8, np.int16, np.uint64, np.int64):
        index = ox.LSHIndex(kind(5), bits=kind(12), tables=kind(3), probes=kind(9), max_candidates=kind(50))
        assert (
            repr(index) == "LSHIndex(dim=5, bits=12, tables=3, probes=9, metric='cosine', seed=0, "
            "max_candidates=50) of 0 vectors"
        )
        index.add(x)
        index.save(tmp_path / "index.safetensors")
        assert index.stats().expected == 2.0**-12
        near = index.search(x, kind(2))
        assert index.range_search(x[:1], near.scores[0, 0] - np.float32(1e-5)).ids.tolist() == [0]
    assert ox.suggest(np.int64(8), np.int32(1000), recall=np.float32(0.5), angle=np.int64(30)).recall >= 0.5


def test_equal_distances_come_in_the_order_of_addition(backend: Backend) -> None:
    rng = np.random.default_rng(0)
    q, away = (rng.integers(-64, 64, (n, 4)).astype(np.float32) / 64 for n in (1, 30))
    index = made(backend, np.concatenate([q + away, q - away]), bits=0, tables=1, metric="euclidean")
    found = backend.numpy(index.search(backend.array(q), 60, exact=True).ids)[0]
    length = np.linalg.norm(np.concatenate([away, away]).astype(np.float64), axis=1)
    assert found.tolist() == sorted(range(60), key=lambda i: (length[i], i))


def test_vectors_whose_scores_would_overflow_are_refused(backend: Backend) -> None:
    x = normal(0, 5, 4)
    x[3] *= 1e20
    for metric in ("inner", "euclidean"):
        with pytest.raises(ValueError, match="x must have squared lengths below 8.5e.37, .* row 3 has not"):
            made(backend, x, metric=metric)
    assert backend.numpy(made(backend, x, metric="cosine").search(backend.array(x), 1, exact=True).ids).T.tolist() == [
        [0, 1, 2, 3, 4]
    ]


def test_the_last_id_there_can_be(backend: Backend) -> None:
    index = made(backend, normal(0, 1, 4), [2**63 - 2])
    with pytest.raises(ValueError, match="ids must be given: there are none left above the highest"):
        index.add(backend.array(normal(1, 2, 4)))
    index.add(backend.array(normal(1, 1, 4)), [5])
    for ids in ([2**64], np.array([2**63], dtype=np.uint64)):
        with pytest.raises(ValueError, match=f"ids must be below 2..63, got {int(ids[0])}"):
            index.add(backend.array(normal(1, 1, 4)), ids)
    assert sorted(backend.numpy(index.ids).tolist()) == [5, 2**63 - 2]


def test_writers_wait_for_one_another(backend: Backend) -> None:
    index = ox.LSHIndex(4, bits=3, tables=2, backend=backend.name)
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda seed: backend.numpy(index.add(backend.array(normal(seed, 5, 4)))), range(20)))
    assert sorted(np.concatenate(ids).tolist()) == list(range(100))
    assert len(index) == 100


@pytest.mark.parametrize("angle", [20.0, 40.0])
def test_suggested_settings_find_what_they_promise(angle: float) -> None:
    n, dim, m = 4000, 24, 1500
    found = ox.suggest(dim, n, recall=0.8, angle=angle)
    x, other = normal(0, n, dim), normal(1, m, dim)
    q = unit(x[:m])
    across = other - (other * q).sum(1, keepdims=True) * q
    q = np.cos(np.radians(angle)) * q + np.sin(np.radians(angle)) * unit(across)
    index = ox.LSHIndex(dim, **found.settings)
    index.add(x)
    offsets, ids = index.candidates(q.astype(np.float32))
    owner = np.repeat(np.arange(m), np.diff(offsets))
    # a binomial of m queries, of correlated tables: within 5 of its standard deviations
    assert (ids == owner).sum() / m == pytest.approx(found.recall, abs=5 * np.sqrt(0.25 / m))
    assert len(ids) / m <= 1.1 * found.candidates + 1
    assert found.recall >= 0.8
    assert found.cost < 8 * n


def test_suggest_reads_everything_where_nothing_reaches_the_recall_and_refuses_nonsense() -> None:
    assert ox.suggest(8, 100, recall=0.99, angle=89).settings == {"bits": 0, "tables": 1, "probes": 1}
    for words, options in (
        ("recall must be a share above 0 and below 1, got 1", {"recall": 1}),
        ("angle must be in degrees, at least 0 and below 90, got 90", {"angle": 90}),
        ("n must be a whole number", {"n": 0}),
    ):
        with pytest.raises(ValueError, match=words):
            ox.suggest(**{"dim": 8, "n": 100, **options})


def test_tuned_settings_reach_the_recall_on_the_queries_they_were_tuned_on(backend: Backend) -> None:
    rng = np.random.default_rng(0)
    centers = 2 * rng.standard_normal((40, 16))
    x, q = ((centers[rng.integers(40, size=n)] + rng.standard_normal((n, 16))).astype(np.float32) for n in (1500, 60))
    index = made(backend, x, metric="euclidean")
    found = index.tune(backend.array(q), 10, 0.9)
    assert found.bits > 0
    tuned = index.rebuilt(**found.settings)
    truth = backend.numpy(tuned.search(backend.array(q), 10, exact=True).ids)
    ids = backend.numpy(tuned.search(backend.array(q), 10).ids)
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(ids, truth, strict=True)])
    assert recall == pytest.approx(found.recall)
    assert recall >= 0.9
    entries = [sum(map(len, runs)) for runs in runs_of(tuned, q, x)]
    assert np.mean(entries) == pytest.approx(found.candidates)  # no sample: all vectors were counted
    assert index.settings.bits == 16
    assert index.tune(backend.array(q), 10, 1.0).recall == 1.0
    capped = made(backend, x, metric="euclidean", max_candidates=200)
    found = capped.tune(backend.array(q), 10, 0.9)
    ids = backend.numpy(capped.rebuilt(**found.settings).search(backend.array(q), 10).ids)
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(ids, truth, strict=True)])
    assert recall == pytest.approx(found.recall)
    assert recall >= 0.9
    with pytest.raises(ValueError, match="no settings tried find the share 0.9 with max_candidates=5: the best"):
        made(backend, x, metric="euclidean", max_candidates=5).tune(backend.array(q), 10, 0.9)


def test_rebuilt_keeps_vectors_and_ids(backend: Backend) -> None:
    x = normal(0, 50, 4)
    index = made(backend, x, np.arange(50)[::-1] + 5)
    q = backend.array(x[:10])
    for settings in ({"bits": 3, "tables": 2}, {"probes": 4}, {"seed": 5}):
        other = index.rebuilt(**settings)
        fresh = made(backend, x, np.arange(50)[::-1] + 5, **{**settings})
        assert lists(backend, other.candidates(q)) == lists(backend, fresh.candidates(q))
