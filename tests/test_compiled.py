"""The compiled kernels against the generic twins and against loops; skipped without Numba."""

import os
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

import opoch_xp as ox
from opoch_xp import workloads
from opoch_xp.backends import compiled, generic
from opoch_xp.backends.compiled import attend, exact, masses, products, split, tree, vector, walk
from opoch_xp.backends.compiled.plain import plain
from opoch_xp.backends.generic.tree import tree_lists
from opoch_xp.testing import assert_close, qkv
from opoch_xp.threads import share
from opoch_xp.treecode import law
from opoch_xp.treecode.forest import directions
from opoch_xp.treecode.plan import splits

TOLERANCE = {"float32": 2e-5, "float64": 1e-11}
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the generic twins on infinite queries


def normal(seed: int, *shape: int, dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def close(ours: Any, theirs: Any, dtype: str) -> None:
    assert ours.dtype == theirs.dtype == dtype
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@vector.compiled
def exponentials(x: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = vector.exponential(x[i])


def test_exponentials() -> None:
    x = np.concatenate([np.linspace(-79.9, 88, 100_001), [0, -0.0, vector.LOWEST, 1e-30]]).astype(np.float32)
    out = np.full_like(x, np.nan)
    exponentials(x, out)
    np.testing.assert_allclose(out, np.exp(x.astype(np.float64)), rtol=4e-7)
    special = np.array([-80.1, -1e30, -np.inf, np.nan], np.float32)
    exponentials(special, out[:4])
    np.testing.assert_array_equal(out[:4], [0, 0, 0, np.nan])
    double = np.linspace(-700, 700, 1001)
    exponentials(double, out := np.empty_like(double))
    np.testing.assert_allclose(out, np.exp(double), rtol=1e-14)


@dtypes
@pytest.mark.parametrize(("g", "dim", "rows"), [(1, 1, 4), (2, 7, 8), (3, 64, 72), (8, 130, 140)])
def test_products_of_rows_named_by_an_index(g: int, dim: int, rows: int, dtype: str) -> None:
    g *= vector.lanes(dtype)
    a, x = normal(0, 200, dim + 5, dtype=dtype), normal(1, dim, g, dtype=dtype)
    index = np.random.default_rng(2).integers(200, size=rows + 8)
    out = np.full((rows + 8, g), np.nan, dtype)
    products.dots(a, index, 4, 4 + rows, 2, dim, x, out)
    np.testing.assert_allclose(out[4 : 4 + rows], a[index[4 : 4 + rows], 2 : 2 + dim] @ x, rtol=1e-4, atol=1e-4)
    assert np.isnan(out[:4]).all()
    assert np.isnan(out[4 + rows :]).all()
    for count in (0, 1, rows):
        weight, sums = normal(3, count, g, dtype=dtype), normal(4, dim, g, dtype=dtype)
        expected = sums + a[index[3 : 3 + count], 5:].T @ weight
        products.mix(a, index, 3, 3 + count, 5, dim, weight, sums)
        np.testing.assert_allclose(sums, expected, rtol=1e-4, atol=1e-4)


def test_the_heaviest_come_first_ties_to_the_lower_place() -> None:
    rng = np.random.default_rng(0)
    for count, width in product((1, 2, 7, 40), (0, 1, 3, 7, 100)):
        share_of = rng.integers(0, 4, count).astype(np.float64)
        picked = np.ones(count, bool)
        walk.heaviest(share_of, width, picked)
        expected = np.zeros(count, bool)
        expected[np.argsort(-share_of, kind="stable")[:width]] = True
        np.testing.assert_array_equal(picked, expected)


@vector.compiled
def add_several(a: Any, ai: Any, x: Any, out: Any, oi: Any, count: int, columns: int) -> None:
    products.add_products(a, ai, 2, 3, count, x, 6, 2, out, oi, 1, 4, columns)


@vector.compiled
def add_one(a: Any, ai: Any, x: Any, out: Any, oi: Any, count: int, columns: int) -> None:
    products.add_product(a, ai, 2, 3, count, x, 6, 2, out, oi, 1, 4, columns)


@vector.compiled
def turned(a: Any, first: int, count: int, columns: int, out: Any) -> None:
    products.turn(a, first, count, 3, columns, out)


@vector.compiled
def dots_of_rows(a: Any, first: int, count: int, dim: int, x: Any, row: int, out: Any) -> None:
    products.dots_of_rows(a, first, count, dim, x, row, out, 1)


@dtypes
@pytest.mark.parametrize(("count", "columns"), [(16, 64), (5, 17), (16, 130), (3, 7)])
def test_products_added_to_rows_named_by_an_index(count: int, columns: int, dtype: str) -> None:
    a, x = normal(0, 9, count + 3, dtype=dtype), normal(1, 40, columns + 2, dtype=dtype)
    ai, oi = np.array([8, 8, 3, 0, 5, 1]), np.array([0, 11, 2, 7, 3, 9])
    for rows, add in ((4, add_several), (1, add_one)):
        out = normal(2, 12, columns + 5, dtype=dtype)
        expected = out.copy()
        expected[oi[1 : 1 + rows], 4 : 4 + columns] += a[ai[2 : 2 + rows], 3:] @ x[6 : 6 + count, 2:]
        add(a, ai, x, out, oi, count, columns)
        close(out, expected, dtype)


@dtypes
@pytest.mark.parametrize(("count", "columns"), [(1, 1), (7, 5), (16, 16), (16, 40), (33, 64), (64, 20)])
def test_turning(count: int, columns: int, dtype: str) -> None:
    a, out = normal(0, 80, 70, dtype=dtype), np.full((columns + 1, count + 1), np.nan, dtype)
    turned(a, 9, count, columns, out)
    np.testing.assert_array_equal(out[:columns, :count], a[9 : 9 + count, 3 : 3 + columns].T)
    assert np.isnan(out[columns]).all()
    assert np.isnan(out[:, count]).all()


@dtypes
def test_dots_of_rows(dtype: str) -> None:
    step = vector.lanes(dtype)
    for count, dim in ((step, step), (2 * step, 3 * step)):
        a, x, out = normal(0, 60, 70, dtype=dtype), normal(1, 3, dim, dtype=dtype), np.full((2, count), np.nan, dtype)
        dots_of_rows(a, 5, count, dim, x, 2, out)
        close(out[1], a[5 : 5 + count, :dim] @ x[2], dtype)


@vector.compiled
def by_the_law(mass: Any, may: Any, table: Any, top: Any, count: Any) -> None:
    walk.law_constants(count, table)
    for i in range(mass.shape[0]):
        masses.law(mass, may, i, table, top)


@dtypes
@pytest.mark.parametrize("count", [1, 3, 16, 1024])
def test_the_law(count: int, dtype: str) -> None:
    dot, sigma2 = 5 * normal(0, 6, 32, dtype=dtype), np.exp(4 * normal(1, 6, 32)).astype(dtype)
    sigma2[0, :4] = 0, 1e-38, 1e-20, 1e4
    mass, may, top = dot.copy(), sigma2.copy(), np.full(32, -3, dtype)
    by_the_law(mass, may, np.empty(6, dtype), top, count)
    right = law.log_mass(dot, sigma2, np.array(float(count), dtype))
    close(mass, right, dtype)
    np.testing.assert_array_equal(top, np.maximum(-3, mass.max(0)))
    excess = law.excess(sigma2.astype(np.float64), np.array(float(count)))
    tolerance = 2e-4 if dtype == "float32" else 1e-11  # of the logarithm
    np.testing.assert_allclose(may - mass, excess, rtol=tolerance, atol=tolerance)


@dtypes
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("workers", [1, 3])
def test_splits_halve_at_the_median(workers: int, masked: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By loops, level by level: the lower half projects lower; the same order however nodes are shared out."""
    x, axes = normal(0, 2, 96, 5, dtype=dtype), directions(0, 0, 0, 4, 5)
    kept = np.random.default_rng(1).random((2, 96)) < 0.7 if masked else None
    order = split.principal_order(x, axes, 0, kept, workers=workers)  # no iterations: the axis is the direction drawn
    for task, level in product(range(2), range(4)):
        size = 96 >> level
        for node in order[task].reshape(-1, size):
            projection = x[task, node].astype(np.float64) @ axes[level]
            if kept is not None:
                projection = np.where(kept[task, node], projection, np.inf)
            assert projection[: size // 2].max() <= projection[size // 2 :].min() + 1e-5
    iterated = split.principal_order(x, axes, 3, kept, workers=workers)
    monkeypatch.setattr(split, "TASK", 4)  # nodes are large: a level at a time
    np.testing.assert_array_equal(split.principal_order(x, axes, 3, kept, workers=5), iterated)


def test_ties_are_split_by_position() -> None:
    x = np.zeros((2, 64, 3), np.float32)
    x[0, ::3] = -0.0
    x[1] = 1.5
    order = split.principal_order(x, directions(0, 0, 0, 5, 3), 2, None, workers=1)
    np.testing.assert_array_equal(order, np.arange(64)[None].repeat(2, 0))


METHODS = [  # method, keys of a chunk, queries, d, d_v
    (ox.Treecode(rtol=0.3, block=8, leaf=2, branch=2, top=2, group=2, least=1), 8, 3, 2, 2),
    (ox.Treecode(rtol=0.1, block=16, leaf=4, branch=2, top=2, group=5, least=2), 64, 23, 3, 4),
    (ox.Treecode(rtol=0.5, block=16, leaf=1, branch=4, top=4, group=37, least=0, iterations=0), 64, 40, 18, 100),
    (ox.Treecode(rtol=0.2, block=32, leaf=16, branch=2, top=2, group=20), 64, 30, 32, 20),
    (ox.Treecode(rtol=0.05, block=12, leaf=3, branch=2, top=8, group=1), 96, 5, 8, 70),
    (ox.Treecode(rtol=0.1, block=16, leaf=2, branch=2, top=2, group=4, most=3), 64, 33, 8, 40),
    (ox.Treecode(rtol=0.0, block=16, leaf=2, branch=2, top=2, group=70), 64, 133, 8, 40),
]


@dtypes
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(("method", "size", "n", "dim", "width"), METHODS)
def test_tree(method: ox.Treecode, size: int, n: int, dim: int, width: int, dtype: str, masked: bool) -> None:
    """Given the same order, groups and lists: equal to rounding; in float64 the choices are the same too."""
    k, v = normal(0, 3, size, dim, dtype=dtype), normal(1, 3, size, width, dtype=dtype)
    mask = np.random.default_rng(5).random((3, size)) < 0.6 if masked else None
    if mask is not None:
        mask[1] = False
        k, v = k * mask[..., None], v * mask[..., None]
    axes, stretch = directions(0, 0, 0, splits(size, method.leaf), dim), np.exp(normal(9, 3, dim, dtype=dtype))
    mine = tree.build_tree(k, v, axes, method, mask=mask, order=None, stretch=stretch, workers=2)
    assert (np.sort(mine.order, axis=1) == np.arange(size)).all()
    theirs = generic.build_tree(k, v, axes, method, mask=mask, order=mine.order)
    for one, other in zip((mine.cells, *mine.summaries), (theirs.cells, *theirs.summaries), strict=True):
        close(one, other, dtype)
    if masked:
        for one, other in zip((mine.kept, *mine.counts), (theirs.kept, *theirs.counts), strict=True):
            np.testing.assert_array_equal(one, other)

    queries, query_axes = normal(6, 4, n, dim, dtype=dtype), directions(0, 0, 1, splits(n, method.group), dim)
    if n > 4:
        queries[0, 1] = np.inf
        queries[2, 2, 0] = np.nan
    groups = tree.query_groups(queries, query_axes, method, stretch=None, workers=2)
    seen = 2 * normal(7, 4, n, dtype=dtype)
    seen[:, ::3] = -np.inf
    given = (queries, theirs, np.asarray([0, 1, 0, 2]), np.asarray([3, 2, 0, 1]), groups, method)
    lists = tree_lists(*given, scale=0.8, seen=seen)
    right = generic.tree_attention(*given, scale=0.8, seen=seen, lists=lists)
    ours = tree.tree_attention(*given, scale=0.8, seen=seen, lists=lists, workers=2)
    alone = tree.tree_attention(*given, scale=0.8, seen=seen, lists=None, workers=3)
    again = tree.tree_attention(*given, scale=0.8, seen=seen, lists=None, workers=1)
    for name in ("out", "lse"):
        close(getattr(ours, name), getattr(right, name), dtype)
        np.testing.assert_array_equal(getattr(again, name), getattr(alone, name))
        if dtype == "float64":  # no rounding flips a choice
            close(getattr(alone, name), getattr(right, name), dtype)
    np.testing.assert_array_equal(ours.read[:, :2], right.read[:, :2])
    if dtype == "float64":
        np.testing.assert_array_equal(alone.read, generic.tree_attention(*given, scale=0.8, seen=seen).read)


def test_a_group_whose_nodes_hold_far_less_than_estimated_is_done_again() -> None:
    """Weights relative to an estimate that is 200 too high are nothing in float32."""
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((1, 64, 8)).astype(np.float32) for _ in range(2))
    k -= 0.9 * k.max(axis=1, keepdims=True)  # below the mean are few keys, and far
    method = ox.Treecode(rtol=1e-6, block=64, leaf=4, branch=4, top=4, group=8)
    q = (200 * np.abs(rng.standard_normal((1, 8, 8)))).astype(np.float32)
    built = generic.build_tree(k, v, directions(0, 0, 0, 4, 8), method)
    given = (q, built, np.array([0]), np.array([1]), np.arange(8)[None], method)
    seen = np.full((1, 8), -np.inf, np.float32)
    ours = tree.tree_attention(*given, scale=1.0, seen=seen, lists=None, workers=1)
    exact_out, exact_lse = generic.exact_attention(q[:, None], k, v, causal=False, scale=1.0)
    assert_close(ours.lse[0] / exact_lse[0, 0], np.ones(8), 1e-5)
    assert_close(ours.out[0], exact_out[0, 0], 1e-4)


def test_keys_that_weigh_far_more_than_their_cell_was_estimated_to() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1024, 16), np.float32) for _ in range(3))
    q[..., 0], k[..., 0] = 20, 0
    k[0, [40, 300], 0] = 20, 19.9  # logits of 400 and 398 where all others are below 20
    methods = ox.Treecode(block=128), ox.Exact()
    ours, exact = (ox.attention(q, k, v, causal=True, scale=1.0, method=method)[:, 512:] for method in methods)
    np.testing.assert_allclose(ours, exact, atol=1e-3)


@pytest.mark.parametrize("workload", ["scattered", "topics"])
def test_at_one_rtol_the_error_stays_what_it_is_whatever_the_length(workload: str) -> None:
    errors = []
    for n in (8192, 32768, 131072):
        arrays = workloads.make(workload, n)
        errors.append(ox.audit(*arrays, causal=True, method=ox.Treecode(rtol=0.1), rows=1024).error[0])
    assert max(errors) <= 3 * min(errors), errors


@dtypes
@pytest.mark.parametrize(
    ("batch", "repeat", "n_q", "n_k", "dim", "width", "causal", "masked"),
    [
        (1, 1, 3, 5, 2, 3, True, False),
        (2, 3, 33, 70, 17, 20, True, True),
        (1, 2, 40, 9, 64, 130, False, True),
        (1, 1, 170, 66, 5, 64, True, False),
        (2, 2, 300, 700, 16, 9, True, True),
    ],
)
def test_exact_attention(
    batch: int, repeat: int, n_q: int, n_k: int, dim: int, width: int, causal: bool, masked: bool, dtype: str
) -> None:
    shapes = (batch, repeat, n_q, dim), (batch, n_k, dim), (batch, n_k, width)
    q, k, v = (normal(i, *shape, dtype=dtype) for i, shape in enumerate(shapes))
    q[0, 0, 1, 0] = np.nan
    mask = np.random.default_rng(3).random((batch, n_k)) < 0.7 if masked else None
    if mask is not None:
        mask[0] = False  # a head that sees nothing
    positions = [None, np.sort(np.random.default_rng(4).integers(-1, n_k, n_q))] if causal else [None]
    for last in positions:
        given = {"causal": causal, "scale": 0.4, "mask": mask, "positions": last}
        ours, theirs = exact.exact_attention(q, k, v, workers=2, **given), generic.exact_attention(q, k, v, **given)
        close(ours[0], theirs[0], dtype)
        close(ours[1], theirs[1], dtype)


@dtypes
def test_logits_that_overflow_are_no_number(dtype: str) -> None:
    big = np.full((1, 1, 2, 1), np.finfo(dtype).max, dtype)
    out, lse = exact.exact_attention(big, big[0], big[0], causal=False, scale=1.0, mask=None, positions=None, workers=1)
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


@dtypes
def test_merging(dtype: str) -> None:
    out, part = normal(0, 2, 3, 12, 35, dtype=dtype), normal(1, 2, 3, 9, 35, dtype=dtype)
    lse, part_lse = normal(2, 2, 3, 12, dtype=dtype), normal(3, 2, 3, 9, dtype=dtype)
    lse[0, 0, :4], part_lse[0, 0, :2] = -np.inf, -np.inf
    out[0, 0, :4], part[0, 0, :2] = 0, 0
    part[0, 1, 3], part_lse[0, 1, 3] = np.nan, np.nan
    theirs = generic.merge_part(out, lse, part, part_lse, 1)
    ours = exact.merge_part(out.copy(), lse.copy(), part, part_lse, 1, 2)
    close(ours[0], theirs[0], dtype)
    close(ours[1], theirs[1], dtype)


def test_one_piece_of_machine_code_serves_arrays_of_any_order() -> None:
    q, k, v = (normal(i, 1, 40, 8, dtype="float32") for i in range(3))
    method = ox.Treecode(block=8, leaf=2, group=4)
    whole = ox.attention(q, k, v, causal=True, method=method)
    kernels = (attend.attend_groups, exact.attend_rows, tree.gather_cells)
    known = [len(kernel.signatures) for kernel in kernels]
    for array in (q, k, v):
        array.flags.writeable = False
    turned = (np.asfortranarray(array) for array in (q, k, v))
    for given in ((q, k, v), turned):
        np.testing.assert_array_equal(ox.attention(*given, causal=True, method=method), whole)
    assert [len(kernel.signatures) for kernel in kernels] == known
    assert plain(q).flags.writeable
    assert np.shares_memory(plain(q), q)


def test_tasks_are_shared_and_the_first_error_raised() -> None:
    done: list[int] = []
    share(done.append, range(50), 4)
    assert sorted(done) == list(range(50))

    def fail(task: int) -> None:
        raise ZeroDivisionError(f"task {task}")

    for workers in (1, 3):
        with pytest.raises(ZeroDivisionError, match="task"):
            share(fail, range(5), workers)


def test_the_variable_that_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in ((None, True), ("1", True), ("0", False)):
        monkeypatch.delenv(compiled.VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(compiled.VARIABLE, value)
        assert compiled.wanted() == expected
    monkeypatch.setenv(compiled.VARIABLE, "yes")
    with pytest.raises(ValueError, match="OPOCH_COMPILED must be 0 or 1, got 'yes'"):
        compiled.wanted()
    monkeypatch.setenv(compiled.VARIABLE, "1")
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="OPOCH_COMPILED=1 needs Numba"):
        compiled.wanted()


@pytest.mark.skipif(os.environ.get(compiled.VARIABLE) == "0", reason="the plugins were told to do without")
def test_the_plugin_takes_them() -> None:
    from opoch_xp.backends import numpy

    assert numpy.tree_attention.__module__ == "opoch_xp.backends.numpy.compiled"


@pytest.mark.parametrize("causal", [False, True])
def test_keys_of_few_queries_are_shared_out(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of keys, some of which a query sees nothing of, merged: the same as all at once."""
    q, k, v = (x.astype("float32") for x in qkv(0, 9, 1000, lead=(2, 2), key_lead=(2,)))
    mask = np.random.default_rng(1).random((2, 1000)) < 0.7
    positions = np.arange(0, 900, 100) if causal else None
    found = []
    for size in (64, 10**6):
        monkeypatch.setattr(exact, "RUN", size)
        found.append(
            exact.exact_attention(q, k, v, causal=causal, scale=0.5, mask=mask, positions=positions, workers=2)
        )
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, 1e-5)


def nothing(x: Any) -> None:
    x[0] = 3


@pytest.mark.parametrize("where", ["no folder", "full disk", "readable"])
def test_machine_code_that_cannot_be_kept(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning that says how to mend it, and the same results."""
    from numba.core import caching, config

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vector, "_told", [])
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))  # nothing is there from another run
    if where == "no folder":
        monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    elif where == "full disk":
        monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    x, several = np.zeros(1), []
    with warnings.catch_warnings(record=True, action="always") as told:
        for _ in range(2):
            several.append(vector.compiled(nothing))
            several[-1](x)
    assert x[0] == 3
    assert [str(warning.message).count("NUMBA_CACHE_DIR") for warning in told] == [1] * (where != "readable")


def test_machine_code_is_made_anew_when_any_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba looks at the file of the function alone; machine code holds parts of others."""
    from numba.core import config

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    taken = []
    for sources in ("one", "one", "another"):
        monkeypatch.setattr(vector._Kept, "_SOURCES", sources)
        function = vector.compiled(nothing)
        function(np.zeros(1))
        taken.append(sum(function.stats.cache_hits.values()))
    assert taken == [0, 1, 0]
