"""KVCache: any chunking is one prefill, to rounding; what is refused changes nothing."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Backend
from hypothesis import given
from hypothesis import strategies as st

import opoch_xp as ox
from opoch_xp.testing import assert_close, clustered, relative_error

ALONE = ox.Treecode(rtol=0.3, sinks=3, block=16, fan=4, leaf=4, branch=2, top=4, group=1, least=2)
METHODS = {
    "treecode": ALONE,
    "no sinks": replace(ALONE, sinks=0),
    "sinks of blocks": replace(ALONE, sinks=20),  # more than a block holds
    "groups": ox.Treecode(rtol=0.3, sinks=3, block=16, fan=2, leaf=4, branch=4, top=8, group=8, least=2),
    "exact": ox.Exact(),
    "lsh": ox.LSH(bits=3, tables=2),
}
HASHING = pytest.mark.dynamic_shapes
EVERY = [pytest.param(name, marks=HASHING) if name == "lsh" else name for name in METHODS]
SAME = [name for name in EVERY if name != "groups"]  # in any chunking
TREES = ["treecode", "no sinks", "sinks of blocks"]
# 16 * 4 * 4 = 256 tokens fill a chunk of the third tier; then chunks of both others and a part of a block
N = 256 + 64 + 2 * 16 + 5


def arrays(n: int = N, heads: int = 4, key_heads: int = 2, batch: int = 2, seed: int = 0) -> tuple[np.ndarray, ...]:
    """q (batch, heads, n, 8), k and v (batch, key_heads, n, 8 and 6), float64."""
    rng = np.random.default_rng(seed)
    shapes = (batch, heads, n, 8), (batch, key_heads, n, 8), (batch, key_heads, n, 6)
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    return q, k, v


def unequal(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same products of queries and keys, of which the queries know little of the dimensions where keys are widest:
    where the balance is another, so are the trees."""
    spread = 4.0 ** np.linspace(-1, 1, q.shape[-1])
    return q / spread, k * spread, v


class Caches:
    """A cache of one backend, given and giving host arrays."""

    def __init__(self, backend: Backend, method: Any = ALONE, **options: Any) -> None:
        self.backend = backend
        self.cache = ox.KVCache(method, backend=backend.name, **options)

    def append(self, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None) -> None:
        given = self.backend.array
        self.cache.append(given(k), given(v), key_mask=None if mask is None else given(mask))

    def attend(self, q: np.ndarray, causal: bool = True) -> tuple[np.ndarray, np.ndarray]:
        found = self.cache.attend(self.backend.array(q), causal=causal)
        return self.backend.numpy(found.out), self.backend.numpy(found.lse)

    def prefill(self, *qkv: np.ndarray, mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        given = self.backend.array
        found = self.cache.prefill(*map(given, qkv), key_mask=None if mask is None else given(mask))
        return self.backend.numpy(found.out), self.backend.numpy(found.lse)


def whole(backend: Backend, method: Any, *qkv: np.ndarray, causal: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """attend in one call, without a cache."""
    found = ox.attend(*map(backend.array, qkv), causal=causal, method=method, backend=backend.name, check=False)
    return backend.numpy(found.out), backend.numpy(found.lse)


def same(found: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...], what: str) -> None:
    for name, a, b in zip(("out", "lse"), found, expected, strict=True):
        assert_close(a, b, 1e-10, f"{what}: {name}")


@pytest.mark.parametrize("name", SAME)
def test_prefill_is_one_call(backend: Backend, name: str) -> None:
    q, k, v = arrays()
    same(Caches(backend, METHODS[name]).prefill(q, k, v), whole(backend, METHODS[name], q, k, v), name)


def test_prefill_in_groups_is_one_call(backend: Backend) -> None:
    """Where the first block holds as many queries as tell a call's balance: the same groups, and the same is opened."""
    q, k, v = unequal(*arrays(700, batch=1))
    method = replace(METHODS["groups"], rtol=0.9, block=256, fan=4, leaf=8)  # so little that the groups count
    same(Caches(backend, method).prefill(q, k, v), whole(backend, method, q, k, v), "groups")


@pytest.mark.parametrize("name", SAME)
def test_token_by_token_is_prefill(backend: Backend, name: str) -> None:
    n = 90 if backend.option in ("strict", "jax") or name == "lsh" else N
    q, k, v = (x[:, :, :n] for x in arrays())
    expected = whole(backend, METHODS[name], q, k, v)
    caches, found = Caches(backend, METHODS[name]), []
    for i in range(n):
        one = slice(i, i + 1)
        caches.append(k[:, :, one], v[:, :, one])
        found.append(caches.attend(q[:, :, one]))
    same(tuple(np.concatenate(x, axis=2) for x in zip(*found, strict=True)), expected, name)


@given(st.data())
def test_any_chunking_cropping_and_reach(backend: Backend, data: st.DataObject) -> None:
    """Appends of any size, queries that reach back any distance, crops to anywhere, with a capacity and without.

    The tokens of the first block come with their queries, whose balance is that of one call.
    """
    q, k, v = unequal(*arrays(batch=1, heads=2, key_heads=1))
    method = METHODS[data.draw(st.sampled_from(TREES))]
    out, lse = whole(backend, method, q, k, v)
    caches = Caches(backend, method, capacity=data.draw(st.sampled_from([None, N])))
    n = 0
    for _ in range(data.draw(st.integers(1, 6))):
        if n and data.draw(st.booleans()):
            n = data.draw(st.integers(0, n))
            caches.cache.crop(n)
        stop = data.draw(st.integers(n, N))
        if n < 16 and stop > n:
            told = slice(n, data.draw(st.integers(min(stop, 16), stop)))
            found = caches.prefill(*(x[:, :, told] for x in (q, k, v)))
            same(found, (out[:, :, told], lse[:, :, told]), f"prefill of {told}")
            n = told.stop
        caches.append(k[:, :, n:stop], v[:, :, n:stop])
        n = stop
        assert len(caches.cache) == n
        if n:
            reach = slice(n - data.draw(st.integers(1, n)), n)
            same(caches.attend(q[:, :, reach]), (out[:, :, reach], lse[:, :, reach]), f"{reach} of {n}")


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("n", [1, 16, 64, 70, 256])
def test_all_keys(backend: Backend, name: str, n: int) -> None:
    """Not causal: every query sees every key, as in one call; then the last tokens go on as before."""
    q, k, v = (x[:, :, : n + 1] for x in unequal(*arrays()))
    caches = Caches(backend, METHODS[name])
    caches.prefill(*(x[:, :, :n] for x in (q, k, v)))
    first = q[:, :, :16]  # those of the first block, so that the balance is the same
    expected = whole(backend, METHODS[name], first, k[:, :, :n], v[:, :, :n], causal=False)
    same(caches.attend(first, causal=False), expected, "all")
    same(caches.attend(q[:, :, :n]), whole(backend, METHODS[name], q[:, :, :n], k[:, :, :n], v[:, :, :n]), "causal")
    caches.append(k[:, :, n:], v[:, :, n:])
    last = tuple(x[:, :, n:] for x in whole(backend, METHODS[name], q, k, v))
    same(caches.attend(q[:, :, n:]), last, "after")


def test_sequences_of_one_length_that_are_held_differently(backend: Backend) -> None:
    """One was attended to as a whole when its block had just filled, the other came to the same length later."""
    q, k, v = (x[:, :, :84] for x in arrays())
    caches = Caches(backend)
    caches.prefill(*(x[:, :, :64] for x in (q, k, v)), mask=np.arange(64) < np.array([[64], [60]]))
    caches.attend(q[:, :, :1], causal=False)
    caches.append(k[:, :, 60:64], v[:, :, 60:64], np.array([[False] * 4, [True] * 4]))
    assert caches.cache.lengths.tolist() == [64, 64]
    caches.append(k[:, :, 64:], v[:, :, 64:])
    same(caches.attend(q), whole(backend, ALONE, q, k, v), "both")


def test_a_balance_is_that_of_the_first_block_s_queries(backend: Backend) -> None:
    """However they come; what comes of it is another tree than without, and later queries change nothing."""
    q, k, v = unequal(*arrays(250))
    out, lse = whole(backend, ALONE, q, k, v)
    last = slice(200, 250)

    def error(caches: Caches) -> float:
        return relative_error(caches.attend(q[:, :, last])[0], out[:, :, last])

    told, later, untold = (Caches(backend) for _ in range(3))
    for i in range(0, 16, 4):
        told.append(k[:, :, i : i + 4], v[:, :, i : i + 4])
        told.cache.audit(backend.array(q[:, :, -2:] * 1e6))
        told.attend(q[:, :, i : i + 4])
        told.attend(q[:, :, : i + 4] * 4.0 ** np.arange(8))  # others of tokens that had theirs
    told.append(k[:, :, 16:], v[:, :, 16:])
    same(told.attend(q[:, :, last]), (out[:, :, last], lse[:, :, last]), "told")
    later.prefill(q[:, :, :20], k[:, :, :20], v[:, :, :20])
    later.prefill(q[:, :, 20:] * 1e3, k[:, :, 20:], v[:, :, 20:])
    same(later.attend(q[:, :, last]), (out[:, :, last], lse[:, :, last]), "later queries are others")
    untold.append(k, v)
    assert error(untold) > 1e-3
    before = untold.attend(q[:, :, last])
    untold.attend(q)  # the first queries too, but the trees are there
    untold.cache.repeat(2)
    untold.append(k[[0, 0, 1, 1]], v[[0, 0, 1, 1]])
    untold.cache.crop(250)
    untold.cache.select([0, 2])
    same(untold.attend(q[:, :, last]), before, "not told in time")
    untold.cache.crop(10)
    untold.prefill(*(x[:, :, 10:] for x in (q, k, v)))
    same(untold.attend(q[:, :, last]), (out[:, :, last], lse[:, :, last]), "in time for another first chunk")


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_a_balance_does_not_depend_on_the_unit_of_queries(backend: Backend, scale: float) -> None:
    """Nor do squares leave float32."""
    q, k, v = (x.astype("float32") for x in unequal(*arrays(40)))
    caches, kept = Caches(backend), []
    for one in (1.0, scale):
        caches.prefill(q * np.float32(one), k, v)
        kept.append(backend.numpy(caches.cache._store.balances.of(np.arange(2))))
        caches.cache.crop(0)
    assert_close(*kept, 1e-5, "balance")
    assert kept[0].max() == 1
    assert kept[0].min() < 0.6


def test_what_is_cropped_of_the_first_block_tells_nothing(backend: Backend) -> None:
    """Queries of tokens that went, and of a prefill that failed."""
    q, k, v = unequal(*arrays(80))
    expected = whole(backend, ALONE, q, k, v)
    caches = Caches(backend)
    caches.prefill(q[:, :, :5], k[:, :, :5], v[:, :, :5])
    caches.prefill(q[:, :, 5:] * 4.0 ** np.arange(8), k[:, :, 5:], v[:, :, 5:])
    caches.cache.crop(5)
    store, built = caches.cache._store, caches.cache._store._built
    store._built = lambda *arguments: 1 / 0
    with pytest.raises(ZeroDivisionError):
        caches.prefill(q[:, :, 5:] * 4.0 ** np.arange(8), k[:, :, 5:], v[:, :, 5:])
    store._built = built
    assert caches.cache.lengths.tolist() == [5, 5]
    caches.prefill(q[:, :, 5:9], k[:, :, 5:9], v[:, :, 5:9])
    found = caches.prefill(q[:, :, 9:], k[:, :, 9:], v[:, :, 9:])
    same(found, tuple(x[:, :, 9:] for x in expected), "after")


def test_sequences_have_balances_of_their_own(backend: Backend) -> None:
    """One was told its queries, of the other they came too late; beams take theirs along."""
    q, k, v = unequal(*arrays(70))
    told, untold = Caches(backend), Caches(backend)
    told.prefill(q, k, v)
    untold.append(k, v)
    expected = [x.attend(q[:, :, -20:]) for x in (told, untold)]
    assert relative_error(expected[1][0], expected[0][0]) > 1e-3
    both, first = Caches(backend), np.array([[True], [False]])
    both.prefill(*(x[:, :, :70] for x in (q, k, v)), mask=np.broadcast_to(first, (2, 70)))
    both.append(k, v, np.broadcast_to(~first, (2, 70)))
    found = both.attend(q[:, :, -20:])
    for b in (0, 1):
        same(tuple(x[b] for x in found), tuple(x[b] for x in expected[b]), f"sequence {b}")
    both.cache.reorder([1, 0])
    found = both.attend(q[[1, 0]][:, :, -20:])
    later = Caches(backend)
    later.prefill(*(x[:, :, :9] for x in (q, k, v)), mask=np.broadcast_to(first, (2, 9)))
    later.append(k[:, :, :9], v[:, :, :9], np.broadcast_to(~first, (2, 9)))
    later.attend(q[:, :, :9])  # news of one of two of a length
    later.prefill(*(x[:, :, 9:] for x in (q, k, v)))
    same(later.attend(q[:, :, -20:]), expected[0], "told one after the other")
    same(
        tuple(x[::-1] for x in found),
        tuple(np.stack([a[0], b[1]]) for a, b in zip(*expected, strict=True)),
        "reordered",
    )


@pytest.mark.parametrize("sinks", [1, 3, 16, 20, 70])
def test_sinks_are_read_exactly(backend: Backend, sinks: int) -> None:
    """Where the first keys hold nearly all of every query's mass nothing else matters, however coarse the rest is."""
    q, k, v = arrays(200)
    q[..., 0], k[..., 0] = 40.0, 0.0
    k[:, :, :sinks, 0] = 2.5
    method = replace(ALONE, rtol=0.9, sinks=sinks)
    exact = whole(backend, ox.Exact(), q, k, v)
    caches = Caches(backend, method)
    same(caches.prefill(q, k, v), whole(backend, method, q, k, v), "one call")
    assert_close(caches.attend(q)[0], exact[0], 1e-9, "exact")
    tree = caches.cache._store.tiers[1].tree  # three chunks of 64, which come first in the arrays
    kept, order = (backend.numpy(x)[:3] for x in (tree.kept, tree.order))
    np.testing.assert_array_equal(kept, order + 64 * np.arange(3)[:, None] >= sinks)
    none = Caches(backend, replace(method, sinks=0))
    none.append(k, v)
    read, others = (x.cache.attend(backend.array(q)).report.rows for x in (caches, none))
    assert read["sinks"] == pytest.approx(np.minimum(np.arange(200) // 16 * 16, sinks).mean())
    assert read["keys"] == 0 < others["keys"]  # beside them nothing is worth reading


@pytest.mark.parametrize("name", TREES)
def test_sinks_stay_the_first_tokens(backend: Backend, name: str) -> None:
    """Cropped to fewer tokens than sinks and grown again, with other tokens; beams of prompts of other lengths."""
    q, k, v = arrays(120, batch=3)
    caches = Caches(backend, METHODS[name])
    caches.prefill(q[:, :, ::-1], k[:, :, ::-1], v[:, :, ::-1])
    for n, to in ((2, 60), (17, 70), (33, 120)):
        caches.cache.crop(n if n > 2 else 0)
        start = 0 if n == 2 else n
        caches.prefill(*(x[:, :, start:to] for x in (q, k, v)))
        expected = whole(backend, METHODS[name], *(x[:, :, :to] for x in (q, k, v)))
        same(caches.attend(q[:, :, :to]), expected, f"{to} after a crop to {n}")
    caches.cache.crop(np.array([2, 19, 120]))
    caches.cache.reorder([1, 0, 1])
    order, lengths = [1, 0, 1], [19, 2, 19]
    new = arrays(70, batch=3, seed=1)
    caches.prefill(*new)
    found = caches.attend(new[0])
    for b, (one, n) in enumerate(zip(order, lengths, strict=True)):
        joined = [
            np.concatenate([x[one : one + 1, :, :n], y[b : b + 1]], axis=2) for x, y in zip((q, k, v), new, strict=True)
        ]
        expected = tuple(x[:, :, -70:] for x in whole(backend, METHODS[name], *joined))
        same(tuple(x[b : b + 1] for x in found), expected, f"beam {b}")


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", [*TREES, "exact"])
def test_padding(backend: Backend, name: str, side: str) -> None:
    """Positions count from each sequence's first token; padding may hold anything, and its rows see nothing."""
    q, k, v = arrays()
    mask = np.ones((2, N), bool)
    mask[1, {"left": slice(0, 50), "right": slice(N - 50, N), "both": slice(0, 20)}[side]] = False
    if side == "both":
        mask[1, -30:] = False
    for x in (k, v):
        x[1, :, ~mask[1]] = np.nan
    caches = Caches(backend, METHODS[name])
    out, lse = caches.prefill(q, k, v, mask=mask)
    kept = np.flatnonzero(mask[1])
    alone = [
        whole(backend, METHODS[name], *(x[b : b + 1, :, rows] for x in (q, k, v)))
        for b, rows in ((0, slice(None)), (1, kept))
    ]
    same((out[:1], lse[:1]), alone[0], "first")
    same((out[1:, :, kept], lse[1:, :, kept]), alone[1], "second")
    assert (out[1, :, ~mask[1]] == 0).all()
    assert np.isneginf(lse[1, :, ~mask[1]]).all()
    assert caches.cache.lengths.tolist() == [N, N - 50]
    # a step of both, of different lengths
    q1, k1, v1 = arrays(3, seed=1)
    caches.append(k1, v1)
    found = caches.attend(q1)
    for b, rows in ((0, slice(None)), (1, kept)):
        joined = [np.concatenate([x[b : b + 1, :, rows], y[b : b + 1]], axis=2) for x, y in ((q, q1), (k, k1), (v, v1))]
        expected = tuple(x[:, :, -3:] for x in whole(backend, METHODS[name], *joined))
        same(tuple(x[b : b + 1] for x in found), expected, f"step of {b}")


def test_rows_before_a_short_sequence(backend: Backend) -> None:
    q, k, v = (x[:, :, :5] for x in arrays())
    caches = Caches(backend)
    caches.append(k, v, np.array([[True] * 5, [False, False, False, True, True]]))
    out, lse = caches.attend(q)
    assert (out[1, :, :3] == 0).all()
    assert np.isneginf(lse[1, :, :3]).all()
    expected = whole(backend, ox.Exact(), q[1:, :, 3:], k[1:, :, 3:], v[1:, :, 3:])
    same((out[1:, :, 3:], lse[1:, :, 3:]), expected, "the rest")


@pytest.mark.parametrize("name", EVERY)
def test_reorder_select_repeat(backend: Backend, name: str) -> None:
    """Beams share what they have in common, and go their own ways."""
    q, k, v = arrays(N, batch=3)
    caches = Caches(backend, METHODS[name])
    caches.prefill(*(x[:, :, :300] for x in (q, k, v)))
    caches.cache.repeat(2)
    before = caches.cache.nbytes
    beams = np.array([0, 0, 1, 1, 2, 2])
    order = np.array([5, 0, 1, 1, 3, 4])
    caches.append(k[beams][:, :, 300:310] * np.arange(1, 7)[:, None, None, None], v[beams][:, :, 300:310])
    caches.cache.reorder(backend.array(order))
    more = [np.concatenate([x[beams][:, :, :300], x[beams][:, :, 300:310]], axis=2) for x in (k, v)]
    more[0][:, :, 300:] *= np.arange(1, 7)[:, None, None, None]
    more = [x[order] for x in more]
    rest = [x[[0, 1, 2, 0, 1, 2]][:, :, 310:] for x in (q, k, v)]
    queries = np.concatenate([q[beams][order][:, :, :310], rest[0]], axis=2)
    keys, values = (np.concatenate([x, y], axis=2) for x, y in zip(more, rest[1:], strict=True))
    found = caches.prefill(*rest)
    if name != "groups":
        expected = whole(backend, METHODS[name], queries, keys, values)
        same(found, tuple(x[:, :, 310:] for x in expected), "beams")
    caches.cache.select([4])
    assert caches.cache.lengths.tolist() == [N]
    assert caches.cache.nbytes <= before
    held = Caches(backend, METHODS[name])
    held.prefill(queries[4:5], keys[4:5], values[4:5])
    same(caches.attend(rest[0][4:5]), held.attend(rest[0][4:5]), "one of them")


def test_shared_chunks_take_no_memory(backend: Backend) -> None:
    """A prompt of 16 beams is held once, and a beam's own chunks when it has some."""
    _, k, v = arrays(N, batch=1)
    caches = Caches(backend)
    caches.append(k[:, :, :330], v[:, :, :330])
    before = caches.cache.nbytes
    near, told = 2 * (16 + 3) * (8 + 6) * 8, 2 * (16 + 1) * 8 * 8  # block and sinks; queries of a block, and a balance
    caches.cache.repeat(16)
    assert caches.cache.nbytes == before + 15 * (near + told)


@pytest.mark.parametrize("shape", [(N, 8), (2, N, 8), (2, 3, 2, N, 8)])
def test_axes(backend: Backend, shape: tuple[int, ...]) -> None:
    """One head, heads, and several axes of sequences."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape) for _ in range(3))
    caches = Caches(backend)
    same(caches.prefill(q, k, v), whole(backend, ALONE, q, k, v), "prefill")
    assert caches.cache.lengths.shape == shape[:-3]
    assert caches.attend(q[..., :2, :])[0].shape == (*shape[:-2], 2, 8)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtypes(backend: Backend, dtype: str) -> None:
    if not backend.has(dtype):
        pytest.skip(f"no {dtype}")
    q, k, v = (x.astype(dtype) for x in arrays())
    caches = Caches(backend)
    out, lse = caches.prefill(q, k, v)
    assert (out.dtype, lse.dtype) == (np.dtype(dtype), np.dtype("float32"))
    assert_close(out, whole(backend, ALONE, q, k, v)[0], 1e-2 if dtype == "float16" else 1e-4, "out")


def test_a_group_errs_less_than_its_queries_would_alone(backend: Backend) -> None:
    """It opens what any of them wants: the fewer come at a time, the less is opened, down to what each wants itself."""
    q, k, v = (x[None, None] for x in clustered(3, 400, 8, clusters=20))
    method = ox.Treecode(rtol=0.3, sinks=3, block=32, fan=4, leaf=4, branch=4, top=8, group=8, least=2)
    exact = whole(backend, ox.Exact(), q, k, v)[0]
    alone = relative_error(whole(backend, replace(method, group=1), q, k, v)[0], exact)
    errors = [relative_error(whole(backend, method, q, k, v)[0], exact)]
    for step in (100, 7, 1):
        caches, found = Caches(backend, method), []
        for i in range(0, 400, step):
            found.append(caches.prefill(*(x[:, :, i : i + step] for x in (q, k, v)))[0])
        errors.append(relative_error(np.concatenate(found, axis=2), exact))
    assert errors[-1] == pytest.approx(alone)
    assert errors[0] < 0.5 * alone
    assert max(errors) < 1.1 * alone, errors


def test_query_heads_share_a_group(backend: Backend) -> None:
    """In a step the query heads of a key head open the same nodes: a group of them, as of queries of one head."""
    q, k, v = arrays(N, heads=8, key_heads=1, batch=1)
    method = replace(ALONE, group=8)
    caches = Caches(backend, method)
    caches.append(k, v)
    out, _ = caches.attend(q[:, :, -1:])
    one = Caches(backend, method)
    one.append(k, v)
    expected, _ = one.attend(np.swapaxes(q[:, :, -1:], 1, 2), causal=False)  # one head of eight queries
    # the queries that see all keys read the same forest, the block being incomplete
    assert_close(out[:, :, 0], expected[:, 0], 1e-10, "one group")


def test_report(backend: Backend) -> None:
    q, k, v = arrays()
    caches = Caches(backend)
    found = caches.cache.prefill(*map(backend.array, (q, k, v)))
    expected = ox.attend(*map(backend.array, (q, k, v)), causal=True, method=ALONE, backend=backend.name).report
    assert found.report.rows.keys() == expected.rows.keys()
    for part, rows in expected.rows.items():
        assert found.report.rows[part] == pytest.approx(rows)
    assert found.report.pairs == pytest.approx(expected.pairs)
    assert found.report.method == ALONE
    assert found.report.bounded == expected.bounded == 0
    few = replace(ALONE, most=2)
    found = Caches(backend, few).cache.prefill(*map(backend.array, (q, k, v)))
    expected = ox.attend(*map(backend.array, (q, k, v)), causal=True, method=few, backend=backend.name).report
    assert found.report.bounded == pytest.approx(expected.bounded)
    assert found.report.bounded > 0


def test_audit(backend: Backend) -> None:
    q, k, v = arrays()
    caches = Caches(backend)
    caches.append(k, v)
    queries = q[:, :, -40:]
    found = caches.cache.audit(backend.array(queries))
    exact = whole(backend, ox.Exact(), q, k, v)[0][:, :, -40:]
    out = caches.attend(queries)[0]
    wrong, right = (np.linalg.norm(x.reshape(8, -1), axis=1).reshape(2, 4) for x in (out - exact, exact))
    assert_close(found.error, wrong / right, 1e-8, "error")
    assert found.rows == 40
    exactly = Caches(backend, ox.Exact())
    exactly.append(k, v)
    assert exactly.cache.audit(backend.array(queries)).error.max() < 1e-12


def test_nothing_depends_on_later_tokens_in_lsh(backend: Backend) -> None:
    """The largest bucket is fixed, by the capacity where there is one: here all keys share one that is larger."""
    if backend.option != "numpy":
        pytest.skip("NumPy alone: the same driver for all")
    _, k, v = (x[:1, :1] for x in arrays(1200))
    k = 10 + 0.1 * k  # on one side of every hyperplane, or nearly
    method = ox.LSH(bits=5, tables=1, center=False)  # by itself 256 keys at 700 tokens, 300 at 1,200
    for capacity in (None, 1200):
        one, many = (ox.KVCache(method, capacity) for _ in range(2))
        out = one.prefill(k, k, v).out
        many.append(k[:, :, :700], v[:, :, :700])
        assert_close(many.attend(k[:, :, 699:700]).out, out[:, :, 699:700], 1e-10, f"capacity={capacity}")
        assert one.attend(k[:, :, -1:]).report.rows["near"] == (256 if capacity is None else 300)


def test_a_chunk_is_built_once(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token: by the token after it, and by no step; a chunk of the next tier then takes its place."""
    q, k, v = (x[:1, :1, :140] for x in arrays())
    caches, built = Caches(backend), []
    caches.append(k[:, :, :1], v[:, :, :1])
    store, build = caches.cache._store, caches.cache._store._built

    def counted(rows: Any, tier: int, *others: Any) -> Any:
        built.append((tier, len(caches.cache)))
        return build(rows, tier, *others)

    monkeypatch.setattr(store, "_built", counted)
    for i in range(1, 140):
        caches.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        caches.attend(q[:, :, i : i + 1])
    # a block of 16 by the token after it; the fourth makes a chunk of 64 instead
    assert built == [(0, 16), (0, 32), (0, 48), (1, 64), (0, 80), (0, 96), (0, 112), (1, 128)]


def test_sequences_of_several_lengths_keep_their_places(backend: Backend) -> None:
    q, k, v = arrays(60, batch=4)
    lengths = [60, 40, 40, 60]
    caches = Caches(backend)
    caches.prefill(q, k, v, mask=np.arange(60) < np.array(lengths)[:, None])
    out, lse = caches.attend(q[:, :, :2])
    for b, n in enumerate(lengths):
        queries = np.concatenate([q[b : b + 1, :, : n - 2], q[b : b + 1, :, :2]], axis=2)
        expected = whole(backend, ALONE, queries, k[b : b + 1, :, :n], v[b : b + 1, :, :n])
        same((out[b : b + 1], lse[b : b + 1]), tuple(x[:, :, -2:] for x in expected), f"sequence {b}")


def test_a_query_that_is_not_finite_passes_for_none_that_sees_nothing(backend: Backend) -> None:
    """Its logits are all -inf, as those of keys that are not seen."""
    q, k, v = (x[:, :, :10] for x in arrays())
    for method in (ALONE, ox.Exact()):
        caches = Caches(backend, method)
        caches.append(np.abs(k), v)
        out, lse = caches.attend(np.full_like(q[:, :, :1], -np.inf))
        assert np.isnan(out).all()
        assert np.isnan(lse).all()


def test_queries_that_are_not_finite(backend: Backend) -> None:
    q, k, v = arrays()
    caches = Caches(backend)
    caches.append(k, v)
    q = q[:, :, -2:].copy()
    expected = caches.attend(q)
    q[0, 1, 0] = np.inf
    out, lse = caches.attend(q)
    assert np.isnan(out[0, 1, 0]).all()
    assert np.isnan(lse[0, 1, 0])
    out[0, 1, 0], lse[0, 1, 0] = expected[0][0, 1, 0], expected[1][0, 1, 0]
    same((out, lse), expected, "the others")


def test_empty_calls(backend: Backend) -> None:
    q, k, v = arrays()
    caches = Caches(backend)
    caches.append(k[:, :, :0], v[:, :, :0])
    assert len(caches.cache) == 0
    with pytest.raises(ValueError, match="the cache is empty"):
        caches.attend(q[:, :, :1])
    with pytest.raises(ValueError, match="the cache is empty, got -1"):
        ox.KVCache().crop(-1)
    caches.append(k[:, :, :20], v[:, :, :20])
    assert caches.attend(q[:, :, :0])[0].shape == (2, 4, 0, 6)
    assert caches.prefill(q[:, :, :0], k[:, :, :0], v[:, :, :0])[0].shape == (2, 4, 0, 6)
    assert len(caches.cache) == 20
    caches.cache.crop(0)
    assert len(caches.cache) == 0
    caches.prefill(*(x[:, :, :20] for x in (q, k, v)))
    same(
        caches.attend(q[:, :, 19:20]),
        tuple(x[:, :, 19:] for x in whole(backend, ALONE, q[:, :, :20], k[:, :, :20], v[:, :, :20])),
        "again",
    )


def refusals(backend: Backend) -> dict[str, tuple[type[Exception], str, Any]]:
    """What is refused: the error, what it says, and the call, given a full cache of (2, 2, N, 8 and 6)."""
    q, k, v = arrays()
    array = backend.array
    wide, mask = array(k.astype("float32")), array(np.ones((2, 3), bool))
    full = "the cache is full: capacity=400, it holds 357 tokens and 357 more"
    heads = r"q must have shape \(2, a multiple of 2, n_q, 8\)"
    many = array(np.repeat(q[:, :, :1], N + 1, 2))
    uneven = [array(x[:, :, :size]) for x, size in ((q, 2), (k, 3), (v, 3))]
    return {
        "heads": (ValueError, r"k must have shape \(2, 2, n, 8\)", lambda c: c.append(array(k[:, :1]), array(v))),
        "dim": (ValueError, "k must have shape", lambda c: c.append(array(k[..., :5]), array(v))),
        "width": (ValueError, r"v must have shape \(2, 2, n, 6\)", lambda c: c.append(array(k), array(v[..., :5]))),
        "batch": (ValueError, "k must have shape", lambda c: c.append(array(k[:1]), array(v[:1]))),
        "axes": (ValueError, "k must have shape", lambda c: c.append(array(k[0]), array(v[0]))),
        "dtype": (TypeError, "cache's dtype float64, got float32", lambda c: c.append(wide, array(v))),
        "tokens": (ValueError, "same tokens", lambda c: c.append(array(k[:, :, :3]), array(v[:, :, :2]))),
        "no array": (TypeError, "k must be an array", lambda c: c.append([1.0], array(v))),
        "finite": (ValueError, "k must be finite", lambda c: c.append(array(k * np.inf), array(v))),
        "mask": (ValueError, "key_mask must have shape", lambda c: c.append(array(k), array(v), key_mask=mask)),
        "full": (ValueError, full, lambda c: c.append(array(k), array(v))),
        "queries": (ValueError, "holds 357, got 358 queries", lambda c: c.attend(many)),
        "query heads": (ValueError, heads, lambda c: c.attend(array(q[:, :3]))),
        "query dtype": (TypeError, "q must have the cache's dtype", lambda c: c.attend(array(q.astype("float32")))),
        "scale": (ValueError, "scale must be a finite number", lambda c: c.attend(array(q), scale=float("nan"))),
        "prefill": (ValueError, "q and k must have the same tokens", lambda c: c.prefill(*uneven)),
        "crop": (ValueError, "at most the 357 tokens", lambda c: c.crop(358)),
        "crop from the end": (ValueError, "leave tokens to keep", lambda c: c.crop(-358)),
        "crop to what": (TypeError, "whole number of tokens", lambda c: c.crop(1.5)),
        "select": (ValueError, "from 0 to 1", lambda c: c.select([0, 2])),
        "select none": (ValueError, "at least one", lambda c: c.select(np.zeros(0, int))),
        "reorder": (ValueError, "must name 2 sequences, got 1", lambda c: c.reorder([0])),
        "repeat": (ValueError, "n must be a whole number", lambda c: c.repeat(0)),
        "audit": (ValueError, "at least one query", lambda c: c.audit(array(q[:, :, :0]))),
    }


@pytest.mark.parametrize("what", [
    "heads", "dim", "width", "batch", "axes", "dtype", "tokens", "no array", "finite", "mask", "full", "queries",
    "query heads", "query dtype", "scale", "prefill", "crop", "crop from the end", "crop to what", "select",
    "select none", "reorder", "repeat", "audit",
])  # fmt: skip
def test_what_is_refused_changes_nothing(backend: Backend, what: str) -> None:
    if what == "finite" and backend.option == "jax":
        pytest.skip("looked for on the host alone")
    q, k, v = arrays()
    caches = Caches(backend, ALONE, capacity=400)
    caches.append(k, v)
    before = caches.attend(q[:, :, -3:])
    error, message, call = refusals(backend)[what]
    with pytest.raises(error, match=message):
        call(caches.cache)
    assert caches.cache.lengths.tolist() == [N, N]
    same(caches.attend(q[:, :, -3:]), before, "as it was")


def test_a_failure_inside_changes_nothing(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees that cannot be built, of a second piece that is taken: the first is taken back."""
    q, k, v = arrays()
    caches = Caches(backend)
    caches.append(k[:, :, :70], v[:, :, :70])
    before = caches.attend(q[:, :, -3:])
    store, built = caches.cache._store, caches.cache._store._built
    store.step, calls = 64, []

    def fails(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise MemoryError("none left")
        return built(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(store, "_built", fails)
        with pytest.raises(MemoryError):
            caches.append(k[:, :, 70:], v[:, :, 70:])
    assert caches.cache.lengths.tolist() == [70, 70]
    same(caches.attend(q[:, :, -3:]), before, "as it was")


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"method": 3}, TypeError, "method must be one of"),
    ({"capacity": 0}, ValueError, "capacity must be a whole number of at least 1"),
    ({"offload": "no/such/folder"}, FileNotFoundError, "offload: no folder"),
    ({"offload": 3}, TypeError, 'offload must be None, "host" or a folder'),
    ({"offload": __file__}, NotADirectoryError, "is a file, expected a folder"),
    ({"offload": "host", "method": ox.Exact()}, ValueError, "offload needs a Treecode"),
    ({"offload_finest": True}, ValueError, "needs offload="),
])  # fmt: skip
def test_options_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ox.KVCache(**options)


def test_batch_calls_need_sequences(backend: Backend) -> None:
    _, k, v = (x[0] for x in arrays())
    with pytest.raises(ValueError, match="needs one axis of sequences"):
        ox.KVCache().reorder([0])
    caches = Caches(backend)
    caches.append(k, v)
    with pytest.raises(ValueError, match=r"the cache holds axes \(\) before heads"):
        caches.cache.select([0])


def test_offload_is_the_same(backend: Backend, tmp_path: Path) -> None:
    """Keys and values on the host or in files: the same bits."""
    q, k, v = arrays()
    plain = Caches(backend)
    plain.append(k, v)
    expected = plain.attend(q[:, :, -20:])
    for offload in ("host", tmp_path / "new"):
        for finest in (False, True):
            caches = Caches(backend, ALONE, offload=offload, offload_finest=finest)
            for i in range(0, N, 50):
                caches.append(k[:, :, i : i + 50], v[:, :, i : i + 50])
            same(caches.attend(q[:, :, -20:]), expected, f"{offload} {finest}")
            caches.cache.repeat(2)
            caches.cache._store.memory.release()
            caches.append(k[[0, 0, 1, 1]][:, :, :40], v[[0, 0, 1, 1]][:, :, :40])
            caches.cache.select([0, 2])
            caches.cache.crop(N)
            same(caches.attend(q[:, :, -20:]), expected, f"{offload} {finest}, cropped")
    assert list((tmp_path / "new").iterdir()) == []


def test_fetched_cells(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device, what is opened is fetched from the host: made believe here, where there is none."""
    from opoch_xp.cache import layout

    q, k, v = arrays()
    plain = Caches(backend)
    expected = plain.prefill(q, k, v)
    monkeypatch.setattr(layout, "on_host", lambda xp, array: False)
    caches = Caches(backend, ALONE, offload="host")
    same(caches.prefill(q, k, v), expected, "prefill")
    trees = caches.cache._store.tiers[0].tree
    assert type(trees.cells).__name__ == "HostRows"
    caches.cache.crop(300)
    caches.append(k[:, :, 300:], v[:, :, 300:])
    same(caches.attend(q[:, :, -20:]), tuple(x[:, :, -20:] for x in expected), "cropped")


@pytest.mark.parametrize("change", ["append", "repeated", "select"])
def test_no_memory_left_changes_nothing(backend: Backend, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Room for another tier, for rows of their own or for fewer rows is not given, where an older tier is to change."""
    from opoch_xp.cache import memory

    q, k, v = arrays(batch=3)
    caches = Caches(backend)
    caches.prefill(*(x[:, :, :250] for x in (q, k, v)))
    chosen = np.arange(3).repeat(2) if change == "repeated" else np.arange(3)
    if change == "repeated":
        caches.cache.repeat(2)
    q, k, v = (x[chosen] for x in (q, k, v))
    before = caches.attend(q[:, :, :250])

    def fails(*arguments: Any) -> Any:
        raise MemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(memory.Memory, "zeros", fails)
        with pytest.raises(MemoryError):
            caches.cache.select([1]) if change == "select" else caches.append(k[:, :, 250:290], v[:, :, 250:290])
    assert caches.cache.lengths.tolist() == [250] * len(chosen)
    same(caches.attend(q[:, :, :250]), before, "as it was")
    caches.append(k[:, :, 250:], v[:, :, 250:])
    same(caches.attend(q), whole(backend, ALONE, q, k, v), "and goes on")


def test_files_take_what_is_held_and_room_to_double(tmp_path: Path) -> None:
    """The first chunk of a tier of 32,768 tokens reserves nothing for its 30 others."""
    _, k, v = arrays(n=40_000, heads=1, key_heads=1, batch=1)
    cache = ox.KVCache(ox.Treecode(), offload=tmp_path)
    cache.append(k.astype("float32"), v.astype("float32"))
    assert cache.nbytes < 4 * 4 * (k.size + v.size)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="a system that takes no room in advance")
def test_no_room_on_the_disk_changes_nothing(tmp_path: Path) -> None:
    """Files as large as asked for may not be: writing to what is mapped beyond would end the process."""
    import resource

    q, k, v = arrays(n=4096, batch=1)
    cache = ox.KVCache(ALONE, offload=tmp_path)
    cache.append(k[:, :, :300], v[:, :, :300])
    before = cache.attend(q[:, :, :5], causal=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, limits[1]))
    try:
        with pytest.raises(OSError, match=r"for [\d,]+ bytes.*" + tmp_path.name):
            cache.append(k[:, :, 300:], v[:, :, 300:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(cache) == 300
    after = cache.attend(q[:, :, :5], causal=False)
    same((after.out, after.lse), (before.out, before.lse), "as it was")
    cache.append(k[:, :, 300:], v[:, :, 300:])
    assert len(cache) == 4096


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="a system that takes no room in advance")
def test_room_on_the_disk_is_taken_before_it_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from opoch_xp.cache import memory

    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    _, k, v = arrays(n=300, batch=1)
    cache = ox.KVCache(ALONE, offload=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(memory.os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left on device, for") as error:
            cache.append(k, v)
    assert error.value.errno == errno.ENOSPC
    assert len(cache) == 0
    cache.append(k, v)
    assert len(cache) == 300


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_cache_in_files_stays_with_the_parent_of_a_fork(tmp_path: Path) -> None:
    _, k, v = arrays(batch=1)
    cache = ox.KVCache(ALONE, offload=tmp_path)
    held = ox.KVCache(ALONE)
    for one in (cache, held):
        one.append(k[:, :, :65], v[:, :, :65])
    child = os.fork()
    if child == 0:
        told = ""
        try:
            cache.append(k[:, :, 65:195], v[:, :, 65:195])
        except RuntimeError as error:
            told = str(error)
        held.append(k[:, :, 65:195] + 1, v[:, :, 65:195] + 1)  # memory is the child's own
        os._exit(0 if "since the fork" in told and len(held) == 195 else 1)
    assert os.waitpid(child, 0)[1] == 0
    for one in (cache, held):
        one.append(k[:, :, 65:195], v[:, :, 65:195])
    found, right = (one.attend(k[:, :, :195], causal=False) for one in (cache, held))
    same((found.out, found.lse), (right.out, right.lse), "the parent goes on")


@pytest.mark.parametrize("name", ["treecode", "exact"])
def test_what_began_in_inference_mode_goes_on_without(tmp_path: Path, name: str) -> None:
    import copy

    torch = pytest.importorskip("torch")
    q, k, v = map(torch.tensor, arrays())
    with torch.inference_mode():
        cache = ox.KVCache(METHODS[name])
        cache.prefill(*(x[:, :, :7] for x in (q, k, v)))
        cache.prefill(*(x[:, :, 7:70] for x in (q, k, v)))
        cache.save(tmp_path / "cache.safetensors")
        loaded = ox.KVCache.load(tmp_path / "cache.safetensors", like=k)
        copied = copy.deepcopy(cache)
        cache.reorder([0, 1])
    expected = ox.attend(q, k, v, causal=True, method=METHODS[name], check=False)
    for one in (cache, loaded, copied):
        one.append(k[:, :, 70:75], v[:, :, 70:75])
        one.append(k[:, :, 75:], v[:, :, 75:])
        assert_close(one.attend(q).out.numpy(), expected.out.numpy(), 1e-10, "goes on")
