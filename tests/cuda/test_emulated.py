"""The CuPy plugin's launchers and kernels against the generic twins, emulated on the CPU; needs g++ and no GPU.

`nox -s cuda_emulate` runs it all, `nox -s cuda_races` what is marked `smallest` under ThreadSanitizer.
"""

import mmap
import os
import shutil
from dataclasses import replace
from typing import Any

import array_api_compat.numpy as namespace
import numpy as np
import pytest

if shutil.which("g++") is None:
    pytest.skip("the emulation is compiled by g++, which is not installed", allow_module_level=True)

from emulator import ARCHITECTURE, SHARED, Emulator

import opoch_xp as ox
from opoch_xp import backends, workloads
from opoch_xp.backends import cupy as plugin
from opoch_xp.backends import generic, kernels_for
from opoch_xp.backends.cupy import launch, search, split, tree
from opoch_xp.backends.cupy.launch import INSTANCES, instances
from opoch_xp.backends.generic.tree import tree_lists
from opoch_xp.testing import check_backend
from opoch_xp.treecode.forest import directions
from opoch_xp.treecode.law import excess, log_mass
from opoch_xp.treecode.plan import splits
from opoch_xp.treecode.tree import Part

RACES = os.environ.get("OPOCH_EMULATE") == "threads"
LAUNCHED: set[str] = set()
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}
SMALL = ox.Treecode(rtol=0.1, sinks=3, block=16, fan=4, leaf=4, branch=2, top=2, group=9, least=2)
smallest = pytest.mark.smallest
each_method = pytest.mark.parametrize(
    "method", [ox.Exact(), ox.LSH(bits=4, tables=3), SMALL], ids=lambda method: type(method).__name__
)


@pytest.fixture(autouse=True, params=[False, True], ids=["ascending", "descending"])
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Launches go to the emulator; every new array is NaN or nonsense until it is written."""
    if RACES and request.param:
        pytest.skip("threads of the system have no order")
    emulator = Emulator(descending=request.param, threads=RACES)
    monkeypatch.setattr(launch, "function", emulator.function)
    monkeypatch.setattr(launch, "shared_limit", lambda where: SHARED)
    monkeypatch.setattr(launch, "architecture", lambda where: ARCHITECTURE)
    empty = namespace.empty

    def filled(*args: Any, **keywords: Any) -> np.ndarray:
        array = empty(*args, **keywords)
        array.fill(np.nan if array.dtype.kind == "f" else -(2**30))
        return array

    monkeypatch.setattr(namespace, "empty", filled)
    with np.errstate(all="ignore"):
        yield emulator
    LAUNCHED.update(emulator.launched)


@pytest.fixture
def whole_plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """NumPy arrays go through the CuPy plugin."""
    monkeypatch.setattr(backends, "_module", lambda name: plugin if name == "numpy" else generic)
    monkeypatch.setattr(plugin, "synchronize", generic.synchronize)  # a host has no stream
    caches = backends._kernels, kernels_for
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def normal(seed: int, *shape: int, dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def close(ours: Any, theirs: Any, dtype: str) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "dim", "tables", "bits"),
    [
        pytest.param((3,), 2, 1, 3, marks=smallest),
        ((2, 70), 33, 3, 12),
        ((130,), 64, 2, 62),
        ((5,), 7, 4, 0),
        ((0,), 7, 4, 2),
    ],
    ids=str,
)
def test_hash_codes(shape: tuple[int, ...], dim: int, tables: int, bits: int, dtype: str) -> None:
    """On dyadic numbers, whose projections are exact, bit for bit; NaN and zeros of both signs included."""
    rng = np.random.default_rng(bits)
    x = (rng.integers(-8, 8, size=(*shape, dim)) / 4).astype(dtype)
    planes = (rng.integers(-8, 8, size=(tables, bits, dim)) / 8).astype(np.float32)
    if x.size:
        x[..., 0, :], x[..., 1, :], x[..., 2, 0] = 0.0, -0.0, np.nan
    np.testing.assert_array_equal(plugin.hash_codes(x, planes), generic.hash_codes(x, planes))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("batch", "repeat", "n_q", "n_k", "dim", "width", "causal", "masked"),
    [
        pytest.param(1, 1, 3, 5, 2, 3, True, False, marks=smallest),
        (2, 3, 33, 70, 17, 20, True, True),
        (1, 2, 40, 9, 64, 130, False, True),
        (1, 1, 70, 66, 5, 64, True, False),
    ],
)
def test_exact_attention(
    batch: int, repeat: int, n_q: int, n_k: int, dim: int, width: int, causal: bool, masked: bool, dtype: str
) -> None:
    q, k, v = normal(0, batch, repeat, n_q, dim), normal(1, batch, n_k, dim), normal(2, batch, n_k, width)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    mask = np.random.default_rng(3).random((batch, n_k)) < 0.7 if masked else None
    if mask is not None:
        mask[0] = False  # a head that sees nothing
    given = {"causal": causal, "scale": 0.4, "mask": mask}
    for ours, theirs in zip(
        plugin.exact_attention(q, k, v, **given), generic.exact_attention(q, k, v, **given), strict=True
    ):
        close(ours, theirs, dtype)
    if causal:
        last = np.sort(np.random.default_rng(4).integers(-1, n_k, n_q))
        ours = plugin.exact_attention(q, k, v, positions=last, **given)
        close(ours[0], generic.exact_attention(q, k, v, positions=last, **given)[0], dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [pytest.param(2, marks=smallest), 9])
def test_merge_part(rows: int, dtype: str) -> None:
    out, part = normal(0, 2, 3, 12, 35).astype(dtype), normal(1, 2, 3, rows, 35).astype(dtype)
    lse, part_lse = normal(2, 2, 3, 12).astype(dtype), normal(3, 2, 3, rows).astype(dtype)
    lse[0, 0, :4], part_lse[0, 0, :2] = -np.inf, -np.inf
    out[0, 0, :4], part[0, 0, :2] = 0, 0
    theirs = generic.merge_part(out, lse, part, part_lse, 1)
    ours = plugin.merge_part(out.copy(), lse.copy(), part, part_lse, 1)
    close(ours[0], theirs[0], dtype)
    close(ours[1], theirs[1], dtype)


HALF_WIDTHS = [pytest.param(8, 8, 3, marks=smallest), (40, 24, 35), (64, 64, 33), (72, 136, 40)]


def halves(dtype: str, *shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers of 16 bits."""
    kind = np.float16 if dtype == "float16" else pytest.importorskip("ml_dtypes").bfloat16
    return np.random.default_rng(seed).standard_normal(shape).astype(kind)


def close_16(ours: Any, theirs: Any, v: np.ndarray) -> None:
    """Products of 16-bit numbers are exact in float32; weights are rounded to 16 bits before they meet the values."""
    unit = 2.0**-10 if v.dtype == np.float16 else 2.0**-7
    assert ours[0].dtype == ours[1].dtype == np.float32
    np.testing.assert_allclose(ours[1], theirs[1], rtol=TOLERANCE["float32"], atol=TOLERANCE["float32"])
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=unit * float(np.abs(v.astype(np.float32)).max()))
    difference = np.linalg.norm(np.nan_to_num(ours[0] - theirs[0]))
    assert difference <= 0.5 * unit * np.linalg.norm(np.nan_to_num(theirs[0]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dim", "width", "n"), HALF_WIDTHS)
def test_exact_attention_by_tensor_cores(
    dim: int, width: int, n: int, causal: bool, dtype: str, emulated: Emulator
) -> None:
    q, k, v = (halves(dtype, *s, seed=i) for i, s in enumerate(((2, 2, n, dim), (2, n + 30, dim), (2, n + 30, width))))
    mask = np.random.default_rng(3).random((2, n + 30)) < 0.7
    given = {"causal": causal, "scale": 0.3, "mask": mask}
    theirs = generic.exact_attention(*(x.astype(np.float32) for x in (q, k, v)), **given)
    close_16(plugin.exact_attention(q, k, v, **given), theirs, v)
    assert any(f"<{launch.HALVES[dtype]}," in name for name in emulated.launched)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rtol", [0.0, 0.1])
@pytest.mark.parametrize(("dim", "width", "n"), HALF_WIDTHS)
def test_tree_by_tensor_cores(dim: int, width: int, n: int, rtol: float, dtype: str, emulated: Emulator) -> None:
    method = replace(SMALL, rtol=rtol)
    k, v = halves(dtype, 3, 64, dim), halves(dtype, 3, 64, width, seed=1)
    wide = k.astype(np.float32), v.astype(np.float32)
    axes, stretch = directions(0, 0, 0, 4, dim), halves(dtype, 3, dim, seed=3)
    mine = plugin.build_tree(k, v, axes, method, stretch=stretch)
    assert mine.cells.dtype == k.dtype
    theirs = generic.build_tree(*wide, axes, method, order=mine.order)
    np.testing.assert_array_equal(mine.cells.astype(np.float32), theirs.cells)
    queries = halves(dtype, 2, n, dim, seed=2)
    queries[0, 1, 0] = np.nan
    groups = plugin.query_groups(queries, directions(0, 0, 1, splits(n, 9), dim), method)
    given = np.asarray([0, 1]), np.asarray([3, 1]), groups, method
    more = {"scale": 0.8 / dim**0.5, "seen": normal(4, 2, n, dtype="float32")}
    lists = tree_lists(queries.astype(np.float32), theirs, *given, **more)
    right = generic.tree_attention(queries.astype(np.float32), theirs, *given, lists=lists, **more)
    ours = plugin.tree_attention(queries, mine, *given, lists=lists, **more)
    close_16((ours.out, ours.lse), (right.out, right.lse), v)
    close(ours.read, right.read, "float32")
    assert any(f"attend_lists<{launch.HALVES[dtype]}," in name for name in emulated.launched)


@pytest.mark.skipif(RACES, reason="the smallest sizes only")
@pytest.mark.parametrize(("arch", "dim"), [(75, 16), (90, 12)])
def test_16_bits_without_tensor_cores_are_widened(arch: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device before sm_80, and where rows are no whole copies of 16 bytes."""
    monkeypatch.setattr(launch, "architecture", lambda where: arch)
    q, k, v = (halves("float16", *s) for s in ((1, 1, 9, dim), (1, 20, dim), (1, 20, 16)))
    given = {"causal": True, "scale": 0.3}
    wide = [x.astype(np.float32) for x in (q, k, v)]
    ours = plugin.exact_attention(q, k, v, **given)
    close(ours[0], generic.exact_attention(*wide, **given)[0], "float32")
    method = ox.Treecode(rtol=0.0, block=4, leaf=2, top=2, group=9)
    built = plugin.build_tree(k[:, :8], v[:, :8], directions(0, 0, 0, 2, dim), method)
    assert built.cells.dtype == np.float32
    given = np.asarray([0]), np.asarray([1]), np.arange(9)[None], method
    part = plugin.tree_attention(q[0], built, *given, scale=0.3, seen=np.zeros((1, 9), np.float32))
    right = generic.exact_attention(wide[0], wide[1][:, :8], wide[2][:, :8], causal=False, scale=0.3)
    close(part.out, right[0][0], "float32")


METHODS = [  # and the keys of a chunk, queries of a task, and head sizes
    pytest.param(ox.Treecode(rtol=0.1, block=8, leaf=2, branch=2, top=2, group=2, least=1), 8, 3, 2, 2, marks=smallest),
    (replace(SMALL, rtol=0.6), 64, 23, 3, 4),
    (replace(SMALL, rtol=0.6, group=37, leaf=2, top=4, branch=4, iterations=0), 64, 40, 18, 100),
    (replace(SMALL, rtol=0.3, leaf=2, top=4, most=5), 32, 19, 6, 35),
    (replace(SMALL, rtol=0.0, most=3, least=9), 128, 8, 16, 20),  # everything is wanted
    (replace(SMALL, rtol=0.0, branch=4), 64, 33, 8, 40),
    (replace(SMALL, block=12, leaf=3, top=8, group=1), 96, 5, 8, 70),
    (replace(SMALL, block=192, leaf=96, top=1, branch=4), 192, 5, 3, 9),  # a cell is more than a tile
    (replace(SMALL, block=512, leaf=2, top=512, least=300), 2048, 3, 2, 3),  # more candidates than threads
    (replace(SMALL, block=16, leaf=2, top=8), 16, 20, 4, 5),  # the coarsest nodes are the cells
]
RUNS = np.asarray([0, 1, 0, 2]), np.asarray([3, 2, 0, 1])


def trees_of(method: ox.Treecode, size: int, dim: int, width: int, dtype: str, masked: bool) -> tuple[Any, Any]:
    """The plugin's trees of three chunks, and the twin's in the same order."""
    k, v = normal(0, 3, size, dim).astype(dtype), normal(1, 3, size, width).astype(dtype)
    mask = np.random.default_rng(5).random((3, size)) < 0.6 if masked else None
    if mask is not None:
        mask[1] = False
        k, v = k * mask[..., None], v * mask[..., None]
    axes = directions(0, 0, 0, splits(size, method.leaf), dim)
    mine = plugin.build_tree(k, v, axes, method, mask=mask, stretch=np.abs(normal(2, 3, dim)) + 0.1)
    return mine, generic.build_tree(k, v, axes, method, mask=mask, order=mine.order)


def queries_of(method: ox.Treecode, n: int, dim: int, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries of four tasks, two of them not finite; their groups, by the plugin; and what they read before."""
    queries, seen = normal(6, 4, n, dim).astype(dtype), 3 * normal(7, 4, n).astype(dtype)
    seen[:, ::3] = -np.inf
    if n > 4:
        queries[0, 1] = np.inf
        queries[2, 2, 0] = np.nan
    axes = directions(0, 0, 1, splits(n, method.group), dim)
    return queries, plugin.query_groups(queries, axes, method, stretch=np.abs(normal(8, 4, dim)) + 0.1), seen


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("method", "size", "n", "dim", "width"), METHODS)
def test_tree(method: ox.Treecode, size: int, n: int, dim: int, width: int, dtype: str, masked: bool) -> None:
    """Given the same order, groups and lists: equal to rounding; in float64 also by decisions of its own."""
    mine, theirs = trees_of(method, size, dim, width, dtype, masked)
    assert (np.sort(mine.order, axis=1) == np.arange(size)).all()
    for one, other in zip((mine.cells, *mine.summaries), (theirs.cells, *theirs.summaries), strict=True):
        close(one, other, dtype)
    if masked:
        for one, other in zip((mine.kept, *mine.counts), (theirs.kept, *theirs.counts), strict=True):
            np.testing.assert_array_equal(one, other)

    queries, groups, seen = queries_of(method, n, dim, dtype)
    np.testing.assert_array_equal(
        np.sort(np.where(groups < n, groups, n), axis=1)[:, :n], np.arange(n)[None].repeat(4, 0)
    )
    given, more = (*RUNS, groups, method), {"scale": 2 / dim**0.5, "seen": seen}
    lists = tree_lists(queries, theirs, *given, **more)
    by_lists = generic.tree_attention(queries, theirs, *given, lists=lists, **more)
    same_part(plugin.tree_attention(queries, theirs, *given, lists=lists, **more), by_lists, dtype)
    if dtype == "float64":  # no rounding flips a decision
        alone = generic.tree_attention(queries, theirs, *given, **more)
        same_part(plugin.tree_attention(queries, theirs, *given, **more), alone, dtype)
        assert alone.read[:, 2].any() == (method.most is not None)


def same_part(ours: Part, theirs: Part, dtype: str) -> None:
    close(ours.out, theirs.out, dtype)
    close(ours.lse, theirs.lse, dtype)
    assert ours.read.dtype == theirs.read.dtype
    np.testing.assert_array_equal(ours.read, theirs.read)


@pytest.mark.skipif(RACES, reason="the smallest sizes only")
@pytest.mark.parametrize("most", [None, 4], ids=["", "bounded"])
def test_batches_of_groups(most: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masses of few groups at a time, at every level anew: bit for bit the same."""
    method = replace(SMALL, most=most)
    mine, _ = trees_of(method, 64, 3, 4, "float64", True)
    queries, groups, seen = queries_of(method, 23, 3, "float64")
    given, more = (queries, mine, *RUNS, groups, method), {"scale": 1.0, "seen": seen}
    whole = plugin.tree_attention(*given, **more)
    lists = tree_lists(*given, **more)
    by_lists = plugin.tree_attention(*given, lists=lists, **more)
    for elements in (1, 3 * 9 * 6):  # one group, and three at the coarsest level
        monkeypatch.setattr(tree, "ELEMENTS", elements)
        for ours, theirs in ((whole, {}), (by_lists, {"lists": lists})):
            part = plugin.tree_attention(*given, **theirs, **more)
            for one, other in zip((ours.out, ours.lse, ours.read), (part.out, part.lse, part.read), strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("least", "most"), [(3, None), (40, None), (7, 5), (300, 290)])
def test_equal_nodes_are_opened_by_place(least: int, most: int | None) -> None:
    """Nodes of the same few keys, whole numbers whose products are exact: many weigh the same, the first are opened."""
    method = replace(SMALL, rtol=0.9, block=512, leaf=2, top=512, least=least, most=most)
    rng = np.random.default_rng(0)
    k = rng.integers(0, 3, (3, 4, 2))[rng.integers(0, 3, (3, 512))].reshape(3, 2048, 2).astype(float)
    order = np.arange(2048)[None].repeat(3, 0)
    built = generic.build_tree(k, normal(1, 3, 2048, 2), None, method, order=order)
    queries = np.asarray([[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]])
    given = np.asarray([0]), np.asarray([3]), np.arange(3)[None], method
    more = {"scale": 1.0, "seen": np.zeros((1, 3))}
    right = generic.tree_attention(queries, built, *given, **more)
    same_part(plugin.tree_attention(queries, built, *given, **more), right, "float64")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_law_of_few_keys(dtype: str) -> None:
    """Masses, and what nodes may hold, of one query and nodes of every kind: as opoch_xp.treecode.law has them."""
    counts, variances = np.asarray([0, 1, 2, 3, 16, 100, 1024, 2**20]), np.asarray([0.0, 1e-35, 1e-12, 0.03, 1, 7, 300])
    count, var = (x.reshape(-1).astype(dtype) for x in np.meshgrid(counts, variances))
    n, query = len(count), np.asarray([[2.0]], dtype)
    rows = np.stack([np.linspace(-3, 3, n), var, np.full(n, np.nan)], 1).astype(dtype)  # the value is not looked at
    node, mass, may = np.full((1, n), -5), np.full((1, 1, n), np.nan, dtype), np.full((1, 1, n), np.nan, dtype)
    zero, one, grid = np.zeros((1, 1), np.int64), np.ones(1, np.int32), (1, launch.parts(n, 64), 1)
    given = query, zero, rows, count, zero, one, node, mass, may
    launch.run("tree_attention.cu", "node_masses", query, grid, 128, *given, 1, n, 1, n, 7, 1, 1, 0.5)
    np.testing.assert_array_equal(node[0], np.arange(n))
    right = log_mass(rows[:, 0], var, count)
    np.testing.assert_allclose(mass[0, 0], right, rtol=8 * np.finfo(dtype).eps, atol=8 * np.finfo(dtype).eps)
    np.testing.assert_allclose(may[0, 0], right + excess(var, count), rtol=8 * np.finfo(dtype).eps)


def test_the_splits_are_median_splits_by_the_principal_axis() -> None:
    """On few enough rows that the axis is found from all of them: the generic twin's order, level by level, as sets."""
    method = ox.Treecode(block=64, leaf=8, iterations=30)
    k = normal(0, 2, 64, 5) * np.asarray([1.0, 5.0, 2.0, 0.3, 0.1])  # clear principal axes
    axes = directions(0, 0, 0, 3, 5)
    ours = plugin.build_tree(k, k, axes, method).order.reshape(2, 8, 8)
    theirs = generic.build_tree(k, k, axes, method).order.reshape(2, 8, 8)
    np.testing.assert_array_equal(np.sort(ours, axis=2), np.sort(theirs, axis=2))


@pytest.mark.parametrize("rows", [8, 2048], ids=["level by level", "one block"])
def test_ties_are_split_by_position(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Identical keys, zeros of both signs among them, stay in order: nodes of a block, of a warp, and of the device."""
    monkeypatch.setattr(split, "SPLIT_ROWS", rows)
    x = np.zeros((2, 64, 3))
    x[0, ::3] = -0.0
    x[1] = 1.5
    order = split.principal_order(x, directions(0, 0, 0, 5, 3), 2, None)
    np.testing.assert_array_equal(order, np.arange(64)[None].repeat(2, 0))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_large_nodes_are_split_level_by_level(monkeypatch: pytest.MonkeyPatch, masked: bool, dtype: str) -> None:
    """The same order whether a block finishes a node or the whole device halves it."""
    x, axes = normal(0, 2, 96, 33).astype(dtype), directions(0, 0, 0, 4, 33)
    kept = np.random.default_rng(1).random((2, 96)) < 0.5 if masked else None
    whole = split.principal_order(x, axes, 3, kept)
    monkeypatch.setattr(split, "SPLIT_ROWS", 24)
    np.testing.assert_array_equal(split.principal_order(x, axes, 3, kept), whole)
    monkeypatch.setattr(split, "SPLIT_ROWS", 1)
    np.testing.assert_array_equal(split.principal_order(x, axes, 3, kept), whole)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("n_q", "n_k", "width", "causal", "window", "limit", "masked"),
    [
        pytest.param(3, 4, 2, True, 0, None, False, marks=smallest),
        (40, 70, 35, False, 0, 9, True),
        (70, 70, 8, True, 5, 6, True),
        (37, 50, 130, True, 0, 4, False),
    ],
)
def test_bucket_attention(
    n_q: int, n_k: int, width: int, causal: bool, window: int, limit: int | None, masked: bool, dtype: str
) -> None:
    q, k, v = (normal(i, *s).astype(dtype) for i, s in enumerate(((2, 2, n_q, 6), (2, n_k, 6), (2, n_k, width))))
    mask = np.random.default_rng(8).random((2, n_k)) < 0.7 if masked else None
    if mask is not None:
        k, v = k * mask[..., None], v * mask[..., None]
    planes = ox.random_hyperplanes(6, bits=3, tables=3)
    codes = generic.hash_codes(q, planes), generic.hash_codes(k, planes)
    given = {"causal": causal, "scale": 0.5, "mask": mask, "window": window, "max_bucket": limit}
    ours, theirs = plugin.bucket_attention(q, k, v, *codes, **given), generic.bucket_attention(q, k, v, *codes, **given)
    close(ours[0], theirs[0], dtype)
    close(ours[1], theirs[1], dtype)
    np.testing.assert_array_equal(ours[2], theirs[2])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("n", "m", "dim", "bits", "k", "filtered", "limit"),
    [
        pytest.param(9, 2, 3, 1, 2, False, None, marks=smallest),
        (300, 7, 33, 2, 5, True, None),
        (500, 5, 64, 1, 150, True, 170),
        (40, 3, 5, 3, 60, False, None),
        (0, 3, 5, 2, 4, False, None),
        (20, 0, 5, 2, 4, False, None),
    ],
)
def test_search_buckets(
    n: int, m: int, dim: int, bits: int, k: int, filtered: bool, limit: int | None, dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On whole numbers, whose products are exact, so that ties are ties: bit for bit, in order of place."""
    rng = np.random.default_rng(n)
    q, x = (rng.integers(-2, 3, size=(rows, dim)).astype(dtype) for rows in (m, n))
    bias = rng.integers(-3, 4, size=n).astype(dtype) if filtered else None
    allowed = rng.random(n) < 0.7 if filtered else None
    planes = ox.random_hyperplanes(dim, bits, tables=3)
    tables = generic.sort_tables(generic.hash_codes(x, planes), bits)
    monkeypatch.setattr(search, "PRODUCTS", 150 * max(1, m))
    for codes in (generic.hash_codes(q, planes)[None], None):
        given = (q, x, bias, tables, codes, k, allowed, limit)
        for ours, theirs in zip(plugin.search_buckets(*given), generic.search_buckets(*given), strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.skipif(RACES, reason="the smallest sizes only")
def test_more_neighbours_than_a_block_holds_are_sorted(monkeypatch: pytest.MonkeyPatch, emulated: Emulator) -> None:
    monkeypatch.setattr(launch, "shared_limit", lambda where: 2000)
    x = normal(0, 50, 4)
    tables = generic.sort_tables(np.zeros((1, 50), np.int64), 0)
    given = (x[:3], x, None, tables, None, 40)
    np.testing.assert_array_equal(plugin.search_buckets(*given)[0], generic.search_buckets(*given)[0])
    assert not emulated.launched


@pytest.mark.skipif(RACES, reason="the smallest sizes only")
@pytest.mark.parametrize("metric", ["cosine", "inner", "euclidean"])
def test_a_whole_index(metric: str, whole_plugin: None) -> None:
    x, q = normal(0, 400, 9, dtype="float32"), normal(1, 20, 9, dtype="float32")
    found = []
    for backend in (None, "generic"):
        index = ox.LSHIndex(9, bits=4, tables=5, probes=2, metric=metric, backend=backend)
        index.add(x)
        index.remove([3, 77])
        found.append([index.search(q, 6), index.search(q, 6, exact=True), index.candidates(q)])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours.ids, theirs.ids)


@pytest.mark.skipif(RACES, reason="the smallest sizes only")
@each_method
def test_whole_calls(method: Any, whole_plugin: None) -> None:
    """attention through all of the plugin's kernels errs as much as through the generic ones, but for chance: axes come
    from a sample of the rows, and another cut of the trees moves the error of one head by a third."""
    q, k, v = workloads.make("scattered", 300, heads=8, dim=16)
    exact = ox.attention(q, k, v, causal=True, method=ox.Exact(), backend="generic")
    theirs = ox.attention(q, k, v, causal=True, method=method, backend="generic")
    ours = ox.attention(q, k, v, causal=True, method=method)
    size = np.linalg.norm(exact, axis=(1, 2))
    error, right = (np.linalg.norm(x - exact, axis=(1, 2)) / size for x in (ours, theirs))
    chance = 3 * np.std(error - right, ddof=1) / len(error) ** 0.5
    assert error.mean() <= 1.05 * right.mean() + chance + 1e-5


@pytest.mark.skipif(RACES, reason="the smallest sizes only")
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize(
    ("masked", "sinks", "most"), [(False, 3, None), (True, 3, None), (True, 0, None), (False, 5, 3)]
)
def test_whole_calls_of_the_treecode(
    causal: bool, masked: bool, sinks: int, most: int | None, whole_plugin: None, emulated: Emulator
) -> None:
    """So few rows a chunk and a task that axes are found from all of them: what the twins give, and what they read."""
    method = replace(SMALL, sinks=sinks, most=most)
    q, k, v = (x.astype(np.float64) for x in workloads.make("scattered", 250, heads=4, dim=8))
    q, k, v = q[:, 150:], k[::2], v[::2]
    q[1, 7] = np.nan
    mask = np.random.default_rng(0).random(250) < 0.8 if masked else None
    given = {"causal": causal, "method": method, "key_mask": mask, "check": False}
    ours, theirs = ox.attend(q, k, v, **given), ox.attend(q, k, v, backend="generic", **given)
    np.testing.assert_allclose(ours.out, theirs.out, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours.lse, theirs.lse, rtol=1e-9, atol=1e-9)
    assert ours.report == theirs.report
    assert "node_masses<double>" in emulated.launched


@pytest.mark.skipif(RACES, reason="the smallest sizes only")
@each_method
def test_whole_calls_in_16_bits(method: Any, whole_plugin: None, emulated: Emulator) -> None:
    """float16 in, float16 out, judged by an audit that is exact in float32."""
    q, k, v = (x.astype(np.float16) for x in workloads.make("scattered", 200, heads=2, dim=16))
    mask = np.arange(200) != 7
    wide = [x.astype(np.float32) for x in (q, k, v)]
    found = ox.audit(q, k, v, causal=True, method=method, key_mask=mask, rows=200)
    theirs = ox.audit(*wide, causal=True, method=method, key_mask=mask, rows=200, backend="generic")
    assert found.error.max() <= 1.05 * theirs.error.max() + 2.0**-10
    result = ox.attend(q, k, v, causal=True, method=method, key_mask=mask)
    assert (result.out.dtype, result.lse.dtype) == (np.float16, np.float32)
    assert any("f16" in name for name in emulated.launched) == (type(method) is not ox.LSH)


@pytest.mark.skipif(RACES, reason="the smallest sizes only")
def test_the_contract(whole_plugin: None, emulated: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel in 16, 32 and 64 bits, as every plugin is checked."""
    if emulated.descending:
        pytest.skip("once: it takes a minute or two")
    monkeypatch.setattr(plugin, "unavailable", lambda: "")
    assert check_backend("numpy").dtypes == ("float16", "float32", "float64")


def untouched(*shape: int, dtype: type = np.float32) -> np.ndarray:
    """Zeros that take memory only where they are touched."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    return np.frombuffer(memory, dtype=dtype).reshape(shape)


@pytest.mark.skipif(RACES, reason="the smallest sizes only")
def test_more_than_two_to_the_31_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block of each kernel that walks along rows, where 32-bit offsets would have wrapped around."""
    emulator = Emulator(last_block=True)
    monkeypatch.setattr(launch, "function", emulator.function)
    n, d = 2**26 + 5, 33
    x = untouched(1, n, d)
    assert x.size > 2**31
    x[0, -3:] = normal(0, 3, d)
    codes, planes = untouched(1, 2, n, dtype=np.int64), ox.random_hyperplanes(d, 5, 2)
    monkeypatch.setattr(namespace, "empty", lambda *shape, **keywords: codes)
    plugin.hash_codes(x, planes)
    np.testing.assert_array_equal(codes[0, :, -3:], generic.hash_codes(x[0, -3:], planes))

    order = untouched(1, n, dtype=np.int64)
    order[0, -3:] = [n - 1, n - 3, n - 2]
    rows, number = np.int64(n), np.int64
    cells = untouched(1, n, d + 1)
    values = untouched(1, n, 1)
    grid = (launch.parts(cells.size, 256),)
    launch.run("build_tree.cu", "gather_cells", x, grid, 256, x, values, order, cells, rows, rows, d, 1)
    np.testing.assert_array_equal(cells[0, -1, :d], x[0, -2])

    axes, projections = normal(1, 1, d, dtype="float32"), untouched(1, n)
    grid = (launch.parts(n * 32, 256),)
    launch.run("build_tree.cu", "project", x, grid, 256, x, None, order, axes, projections, rows, rows, number(1), d)
    np.testing.assert_allclose(projections[0, -3:], x[0, [-1, -3, -2]] @ axes[0], rtol=1e-5)

    summary = untouched(n // 2, 2 * d + 1)
    grid = (launch.parts(n // 2 * (d + 1), 256),)
    launch.run("build_tree.cu", "summarise", x, grid, 256, cells, None, summary, number(n // 2), 2, d + 1, d, 1)
    last = cells[0, n // 2 * 2 - 2 : n // 2 * 2, :d]
    np.testing.assert_allclose(summary[-1, :d], last.mean(0), rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(RACES, reason="the smallest sizes only")
def test_trees_of_more_than_two_to_the_31_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of so many groups, against the last of so many nodes and keys, is what it is alone."""
    emulator = Emulator(last_block=True)
    monkeypatch.setattr(launch, "function", emulator.function)
    dim, width, g, leaf, chunks = 33, 35, 33, 4, 8
    each = 64  # cells of a chunk, a level of cells only
    index, above = np.arange(g), np.arange(chunks)
    cells, rows = normal(0, chunks * each * leaf, dim + width), normal(1, chunks * each, 2 * dim + width) ** 2
    queries, seen = normal(2, g, dim), normal(3, g)

    def last(groups: int, nodes: int) -> tuple[np.ndarray, ...]:
        """State and counts of the last group, among so many, that reads the last chunks of so many cells."""
        shapes = (groups, g), (groups, chunks), (nodes, 2 * dim + width), (nodes * leaf, dim + width)
        kinds = np.int64, np.int64, np.float32, np.float32
        held = [untouched(*shape, dtype=kind) for shape, kind in zip(shapes, kinds, strict=True)]
        held[0][-1], held[1][-1], held[2][-len(rows) :], held[3][-len(cells) :] = index, above, rows, cells
        held[1][-1] += nodes // each - chunks
        wide = chunks * each
        q, before = queries.astype(np.float32), seen.astype(np.float32)
        votes, amount_above = untouched(groups, g, dtype=bool), untouched(groups, dtype=np.int32)
        votes[-1], amount_above[-1] = True, chunks
        node, opened = (untouched(groups, wide, dtype=np.int64) for _ in range(2))
        mass, may = (untouched(groups, g, wide) for _ in range(2))
        threshold, whole, share, read = (untouched(groups, *more) for more in ((), (g,), (wide,), (3,)))
        amount, tops, totals = untouched(groups, dtype=np.int32), np.full((1, g), -np.inf, np.float32), untouched(1, g)
        threshold[-1], out = np.log(0.01), untouched(g, width)
        given = q, held[0], held[2], None, held[1], amount_above, node, mass, may
        grid = (groups, launch.parts(wide, 64), 2)
        launch.run(
            "tree_attention.cu", "node_masses", q, grid, 128, *given, g, wide, chunks, each, leaf, dim, width, 0.3
        )
        launch.run(
            "tree_attention.cu", "pick_nodes", q, (groups,), 256,
            held[0], votes, before, tops, totals, threshold, amount_above, node, may, mass, None, None, whole, share,
            opened, amount, read, g, wide, 0, each, 0, 0, leaf,
        )  # fmt: skip
        launch.run(
            "tree_attention.cu", "attend_lists", q, (groups, 2, 1), 128,
            q, held[0], amount_above, held[2], node, mass, held[3], None, opened, amount, out, tops, totals,
            np.int64(g), g, wide, each, leaf, dim, width, 0.3, template=(64,),
        )  # fmt: skip
        return out, tops, totals, read[-1]

    groups, nodes = 2**31 // (g * chunks * each) + 2, 2**31 // (leaf * (dim + width)) // each * each + each
    assert min(groups * g * chunks * each, nodes * leaf * (dim + width)) > 2**31
    ours, alone = last(groups, nodes), last(1, chunks * each)
    assert 0 < alone[3][1] < g * chunks * each * leaf  # some cells are read, some are not
    for one, other in zip(ours, alone, strict=True):
        np.testing.assert_array_equal(one, other)
    nodes = 2**31 // (2 * dim + width) // each * each + each
    assert nodes * (2 * dim + width) > 2**31
    np.testing.assert_array_equal(last(1, nodes)[0], alone[0])


def test_errors_are_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "shared_limit", lambda where: 20_000)
    with pytest.raises(
        ValueError, match=r"head size 64 in float32 needs 2\d,\d{3} bytes of shared memory .* has 20,000"
    ):
        plugin.exact_attention(
            *(normal(0, *s, dtype="float32") for s in ((1, 1, 4, 64), (1, 4, 64), (1, 4, 64))), causal=False, scale=1.0
        )


@pytest.mark.skipif(RACES, reason="the smallest sizes only")
def test_every_instance_was_launched() -> None:
    """Runs last: no instance goes untested."""
    missing = {name for file in INSTANCES for name in instances(file, ARCHITECTURE)} - LAUNCHED
    assert not missing
