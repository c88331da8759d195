"""The front end: what every method must do, whatever it computes; and each bad argument told in the caller's words."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from conftest import Backend
from inputs import level

import opoch_xp as ox
from opoch_xp import Exact, Treecode
from opoch_xp.backends import library
from opoch_xp.testing import assert_close, qkv, rounding

SMALL = Treecode(rtol=0.2, sinks=3, block=32, fan=4, leaf=4, branch=4, top=4, group=8, least=2)
FULL = Treecode(rtol=0.0, sinks=3, block=32, fan=4, leaf=4, branch=4, top=4, group=8, least=2)
METHODS = [Exact(), SMALL]
each_method = pytest.mark.parametrize("method", METHODS, ids=["exact", "treecode"])


@pytest.fixture(scope="module")
def attend(backend: Backend) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """attend on host arrays: out and lse on the host."""

    def call(*arrays: Any, **keywords: Any) -> tuple[np.ndarray, np.ndarray]:
        if keywords.get("key_mask") is not None:
            keywords["key_mask"] = backend.array(keywords["key_mask"])
        found = ox.attend(*(backend.array(a) for a in arrays), backend=backend.name, **keywords)
        return backend.numpy(found.out), backend.numpy(found.lse)

    return call


Attend = Callable[..., tuple[np.ndarray, np.ndarray]]


@each_method
@pytest.mark.parametrize("causal", [False, True])
def test_heads_and_batches_are_independent(attend: Attend, method: ox.Exact, causal: bool) -> None:
    q, k, v = qkv(0, 150, 170, lead=(2, 4), key_lead=(2, 2))
    q = level(q)  # the query heads of a key head share their balance, and nothing else
    kept = np.random.default_rng(1).random((2, 170)) < 0.8
    whole = attend(q, k, v, causal=causal, key_mask=kept, method=method)
    for b in range(2):
        for h in range(4):
            one = attend(q[b, h], k[b, h // 2], v[b, h // 2], causal=causal, key_mask=kept[b], method=method)
            for part, full in zip(one, whole, strict=True):
                assert_close(part, full[b, h], rounding(q, k, v))


@each_method
def test_heads_may_come_in_any_order(attend: Attend, method: ox.Exact) -> None:
    q, k, v = qkv(1, 130, lead=(5,))
    order = [3, 0, 4, 1, 2]
    whole, permuted = attend(q, k, v, method=method), attend(q[order], k[order], v[order], method=method)
    for full, part in zip(whole, permuted, strict=True):
        assert_close(part, full[order], rounding(q, k, v))


@each_method
def test_grouped_query_heads_equal_repeated_key_heads(attend: Attend, method: ox.Exact) -> None:
    q, k, v = qkv(2, 100, lead=(6,), key_lead=(2,))
    q = level(q)
    grouped = attend(q, k, v, causal=True, method=method)
    repeated = attend(q, np.repeat(k, 3, 0), np.repeat(v, 3, 0), causal=True, method=method)
    for part, full in zip(grouped, repeated, strict=True):
        assert_close(part, full, rounding(q, k, v))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", [Exact(), FULL], ids=["exact", "treecode"])
def test_hidden_keys_may_hold_anything(attend: Attend, method: ox.Exact, causal: bool) -> None:
    q, k, v = qkv(3, 90, 110, lead=(2, 2), key_lead=(2, 1))
    kept = np.random.default_rng(2).random((2, 110)) < 0.6
    hidden = np.broadcast_to(~kept[:, None, :, None], k.shape)
    k[hidden], v[np.broadcast_to(~kept[:, None, :, None], v.shape)] = np.nan, np.inf
    out, lse = attend(q, k, v, causal=causal, key_mask=kept, method=method)
    clean = np.nan_to_num(k, nan=0.0), np.nan_to_num(v, posinf=0.0)
    for b in range(2):
        for h in range(2):
            right = oracle.dense(q[b, h], clean[0][b, 0], clean[1][b, 0], causal=causal, kept=kept[b])
            assert_close(out[b, h], right[0], rounding(q, *clean), "out")
            assert_close(lse[b, h], right[1], rounding(q, *clean), "lse")


@each_method
def test_hiding_no_key_changes_nothing(attend: Attend, method: ox.Exact) -> None:
    q, k, v = qkv(4, 200)
    plain, masked = attend(q, k, v, method=method), attend(q, k, v, method=method, key_mask=np.ones(200, bool))
    assert_close(masked[1], plain[1], rounding(q, k, v) if method == Exact() else 0.5)  # splits may round otherwise
    if method == Exact():
        assert_close(masked[0], plain[0], rounding(q, k, v))


@each_method
def test_rows_that_see_no_key_are_zeros(attend: Attend, method: ox.Exact) -> None:
    q, k, v = qkv(5, 150, 100, lead=(1,))
    out, lse = attend(q, k, v, causal=True, method=method)
    assert (out[:, :50] == 0).all()
    assert (lse[:, :50] == -np.inf).all()
    assert np.isfinite(lse[:, 50:]).all()
    for causal in (False, True):
        kept = np.arange(100) >= 100
        out, lse = attend(q, k, v, causal=causal, method=method, key_mask=kept[None, :][0])
        assert (out == 0).all()
        assert (lse == -np.inf).all()


@each_method
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("causal", [False, True])
def test_a_query_that_is_not_finite_spoils_its_own_row(
    attend: Attend, method: ox.Exact, bad: float, causal: bool
) -> None:
    q, k, v = qkv(6, 200, lead=(2,))
    clean = attend(q, k, v, causal=causal, method=Exact())
    for row in (0, 77, 199):
        q[1, row, 2] = bad
    full = FULL if isinstance(method, Treecode) else method
    out, lse = attend(q, k, v, causal=causal, method=full)
    spoiled = np.zeros((2, 200), bool)
    spoiled[1, [0, 77, 199]] = True
    assert not np.isfinite(out[spoiled]).any()
    assert not np.isfinite(lse[spoiled]).any()
    assert_close(out[~spoiled], clean[0][~spoiled], rounding(clean[0], k, v) + rounding(k, k, v))
    assert np.isfinite(attend(q, k, v, causal=causal, method=method)[0][~spoiled]).all()


@each_method
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("n_q", "n_k", "d", "d_v"),
    [(1, 1, 1, 1), (3, 31, 5, 2), (31, 3, 1, 1), (33, 65, 1, 3), (1, 129, 3, 1), (127, 127, 2, 7)],
)
def test_odd_sizes(attend: Attend, method: ox.Exact, n_q: int, n_k: int, d: int, d_v: int, causal: bool) -> None:
    q, k, v = qkv(7, n_q, n_k, d, d_v)
    full = FULL if isinstance(method, Treecode) else method
    found, right = attend(q, k, v, causal=causal, method=full), oracle.dense(q, k, v, causal=causal)
    for part, dense in zip(found, right, strict=True):
        assert_close(part, dense, rounding(q, k, v))


@each_method
@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((0, 4), (6, 4), (6, 3)),
        ((5, 4), (6, 4), (6, 0)),
        ((0, 5, 4), (0, 6, 4), (0, 6, 3)),
        ((0, 2, 5, 4), (0, 2, 6, 4), (0, 2, 6, 3)),
        ((2, 0, 5, 4), (2, 0, 6, 4), (2, 0, 6, 3)),
    ],
    ids=["no query", "no value", "no head", "no batch", "no head in a batch"],
)
@pytest.mark.parametrize("masked", [False, True])
def test_empty_axes_give_empty_outputs(
    attend: Attend, method: ox.Exact, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], masked: bool
) -> None:
    kept = np.ones((*k[:-3], 6) if len(k) > 2 else 6, bool) if masked else None
    for choice in (method, None):
        out, lse = attend(np.ones(q), np.ones(k), np.ones(v), method=choice, key_mask=kept)
        assert out.shape == (*q[:-1], v[-1])
        assert lse.shape == q[:-1]


@each_method
def test_no_value_dimension_still_has_its_lse(attend: Attend, method: ox.Exact) -> None:
    q, k, v = qkv(8, 40)
    out, lse = attend(q, k, v[:, :0], causal=True, method=FULL if isinstance(method, Treecode) else method)
    assert out.shape == (40, 0)
    assert_close(lse, oracle.dense(q, k, v, causal=True)[1], rounding(q, k, v))


@each_method
def test_strides_do_not_matter(backend: Backend, method: ox.Exact) -> None:
    q, k, v = (backend.array(a) for a in qkv(9, 120, lead=(3,)))
    xp = backend.xp
    views = []
    for a in (q, k, v):
        spread = xp.reshape(xp.stack([a, a * 0 + 7], axis=2), (3, 240, a.shape[2]))  # every second row
        views.append(spread[:, ::2, :])
    turned = [xp.permute_dims(xp.asarray(xp.permute_dims(a, (2, 1, 0)), copy=True), (2, 1, 0)) for a in (q, k, v)]
    right = ox.attend(q, k, v, causal=True, method=method, backend=backend.name)
    for arrays in (views, turned):
        found = ox.attend(*arrays, causal=True, method=method, backend=backend.name)
        assert_close(backend.numpy(found.out), backend.numpy(right.out), rounding(*map(backend.numpy, (q, k, v))))


@each_method
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_dtypes_come_back(backend: Backend, method: ox.Exact, dtype: str) -> None:
    if not backend.has(dtype):
        pytest.skip(f"the library has no {dtype}")
    kind = getattr(backend.xp, dtype)
    q, k, v = (backend.xp.astype(backend.array(a), kind) for a in qkv(10, 100, lead=(2,)))
    found = ox.attend(q, k, v, method=method, backend=backend.name)
    assert found.out.dtype == kind
    assert found.lse.dtype == (kind if dtype == "float64" else backend.xp.float32)
    assert type(found.out) is type(q)


@each_method
def test_inputs_are_left_as_they_are(backend: Backend, method: ox.Exact) -> None:
    host = qkv(11, 100, lead=(2,))
    kept = np.arange(100) % 3 > 0
    arrays, mask = [backend.array(a) for a in host], backend.array(kept)
    if backend.option in ("numpy", "generic"):
        for array in (*arrays, mask):
            array.flags.writeable = False
    for masked in (None, mask):
        ox.attend(*arrays, causal=True, key_mask=masked, method=method, backend=backend.name)
    for array, was in zip((*arrays, mask), (*host, kept), strict=True):
        assert np.array_equal(backend.numpy(array), was)


@each_method
@pytest.mark.parametrize("causal", [False, True])
def test_every_output_is_written(
    backend: Backend, method: ox.Exact, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uninitialised memory that holds NaN or the largest integer: what is read before it is written shows."""
    if backend.xp.__name__ != "array_api_compat.numpy":
        pytest.skip("NumPy's uninitialised memory is filled")
    empty, empty_like = np.empty, np.empty_like

    def poisoned(array: np.ndarray) -> np.ndarray:
        array[...] = np.nan if array.dtype.kind == "f" else True if array.dtype == bool else np.iinfo(array.dtype).max
        return array

    q, k, v = qkv(12, 300, 333, lead=(2,))
    kept = np.arange(333) % 5 > 0
    for mask in (None, kept):
        keywords = {"causal": causal, "method": method, "key_mask": mask, "backend": backend.name}
        right = ox.attend(q, k, v, **keywords)
        with monkeypatch.context() as patch:
            patch.setattr(np, "empty", lambda *a, **b: poisoned(empty(*a, **b)))
            patch.setattr(np, "empty_like", lambda *a, **b: poisoned(empty_like(*a, **b)))
            found = ox.attend(q, k, v, **keywords)
        assert np.array_equal(found.out, right.out)
        assert np.array_equal(found.lse, right.lse)


def test_attention_is_the_output_of_attend(backend: Backend) -> None:
    arrays = [backend.array(a) for a in qkv(13, 60)]
    found = ox.attend(*arrays, causal=True, method=SMALL, backend=backend.name)
    out = ox.attention(*arrays, causal=True, method=SMALL, backend=backend.name)
    assert np.array_equal(backend.numpy(out), backend.numpy(found.out))


def test_report_says_what_was_done(backend: Backend) -> None:
    arrays = [backend.array(a) for a in qkv(14, 60)]
    report = ox.attend(*arrays, causal=True, method=SMALL, backend=backend.name).report
    assert report.method == SMALL
    assert report.reason == "named by the caller"
    assert report.exact_rows == 30.5
    assert report.pairs == pytest.approx(sum(report.rows.values()) / 30.5)
    assert len(report.passes) == 1
    assert report.audit is None
    checked = ox.attend(*arrays, causal=True, method=FULL, backend=backend.name, check=True).report
    assert checked.audit.rows == 32
    assert checked.passes[1:] == ("Exact() on 32 rows a head",)


Q, K, V = (np.ones(shape) for shape in ((2, 5, 4), (2, 6, 4), (2, 6, 3)))


@pytest.mark.parametrize(
    ("q", "k", "v", "kind", "told"),
    [
        (Q[0], K, V, ValueError, r"same number of axes, .* got q \(5, 4\), k \(2, 6, 4\), v \(2, 6, 3\)"),
        (Q[0, 0], K[0, 0], V[0, 0], ValueError, r"at least \(n, d\); got q \(4,\)"),
        (Q[..., :3], K, V, ValueError, r"same last axis d; got q \(2, 5, 3\), k \(2, 6, 4\)"),
        (Q, K[:, :5], V, ValueError, r"same number of keys n_k; .* k \(2, 5, 4\), v \(2, 6, 3\)"),
        (Q, K[:, :0], V[:, :0], ValueError, r"at least one key .* k \(2, 0, 4\)"),
        (Q[..., :0], K[..., :0], V, ValueError, r"and one dimension; .* k \(2, 6, 0\)"),
        (Q, np.ones((3, 6, 4)), np.ones((3, 6, 3)), ValueError, "multiple of the heads of k, got 2 and 3"),
        (Q, K[:0], V[:0], ValueError, "multiple of the heads of k, got 2 and 0"),
        (Q[:0], K, V, ValueError, "multiple of the heads of k, got 0 and 2"),
        (Q, K, V[:1], ValueError, r"k and v the same heads; .* k \(2, 6, 4\), v \(1, 6, 3\)"),
        (Q[None], np.ones((2, 1, 6, 4)), np.ones((2, 1, 6, 3)), ValueError, r"same batch axes.* q \(1, 2, 5, 4\)"),
        (Q.astype(int), K, V, TypeError, "q must have dtype float16, .*, got int64"),
        (Q, K.astype(complex), V, TypeError, "k must have dtype .*, got complex128"),
        (Q, K, V.astype(bool), TypeError, "v must have dtype .*, got bool"),
        (Q.astype("float32"), K, V, TypeError, "one dtype, got q: float32, k: float64, v: float64"),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit(
    attend: Attend, q: np.ndarray, k: np.ndarray, v: np.ndarray, kind: type[Exception], told: str
) -> None:
    for method in (None, *METHODS):
        with pytest.raises(kind, match=told):
            attend(q, k, v, method=method)


@pytest.mark.parametrize(
    ("keywords", "kind", "told"),
    [
        ({"method": Exact(), "tol": 0.1}, TypeError, r"method or tol, not both; got method=Exact\(\) and tol=0.1"),
        (
            {"method": "exact"},
            TypeError,
            r"method must be one of Exact\(...\), LSH\(...\), Treecode\(...\), got 'exact'",
        ),
        ({"method": Exact}, TypeError, "method must be one of"),
        ({"tol": 0.0}, ValueError, "between 0 and 1, both excluded; got 0.0"),
        ({"tol": 1}, ValueError, "between 0 and 1, both excluded; got 1"),
        ({"tol": float("nan")}, ValueError, "got nan"),
        ({"tol": "low"}, ValueError, "got 'low'"),
        ({"tol": True}, ValueError, "got True"),
        ({"scale": float("inf")}, ValueError, "scale must be a finite number, got inf"),
        ({"scale": float("nan")}, ValueError, "scale must be a finite number, got nan"),
        ({"scale": "big"}, TypeError, "scale must be a finite number, got 'big'"),
        ({"key_mask": np.ones(6)}, TypeError, r"dtype bool \(True = keep\), got float64"),
        ({"key_mask": np.ones(5, bool)}, ValueError, r"shape \(6,\), the batch axes of k and n_k; got \(5,\)"),
        ({"key_mask": np.ones((2, 6), bool)}, ValueError, r"shape \(6,\), .* got \(2, 6\)"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(attend: Attend, keywords: dict[str, Any], kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        attend(Q, K, V, **keywords)


def test_unknown_backend(backend: Backend) -> None:
    arrays = [backend.array(a) for a in (Q, K, V)]
    with pytest.raises(ValueError, match=r"backend must be one of .*generic.*; got 'abacus'"):
        ox.attend(*arrays, backend="abacus")


@each_method
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_keys_and_values_that_are_not_finite_are_found(attend: Attend, method: ox.Exact, name: str, bad: float) -> None:
    arrays = dict(zip("qkv", qkv(15, 20, 30, lead=(2, 4), key_lead=(2, 2)), strict=True))
    arrays[name][1, 0, 17, 3] = bad
    arrays[name][1, 1, 2, 0] = -bad
    with pytest.raises(ValueError, match=rf"{name} must be finite; .* key 17, dimension 3 of key head 2 "):
        attend(*arrays.values(), method=method)
    out, _ = attend(*arrays.values(), method=method, check_finite=False, check=False)
    assert np.isfinite(out[0]).all()


def test_large_finite_numbers_are_no_error(attend: Attend) -> None:
    """Their sum overflows: that alone says nothing."""
    q, k, v = np.zeros((3, 2)), np.full((4, 2), 1e308), np.arange(8.0).reshape(4, 2)
    out, _ = attend(q, k, v, method=Exact())
    assert_close(out, np.broadcast_to(v.mean(0), (3, 2)), rounding(q, v, v))


def test_what_is_no_array_or_of_another_library(backend: Backend) -> None:
    q, k, v = (backend.array(a) for a in (Q, K, V))
    with pytest.raises(TypeError, match="k must be an array of a library with an array namespace, got list"):
        ox.attend(q, [[1.0]], v)
    other = np if library(backend.xp) == "array_api_strict" else import_module("array_api_strict")
    with pytest.raises(TypeError, match="q, k and v must be arrays of one library, got q: .*, v: "):
        ox.attend(q, k, other.asarray(V))
    with pytest.raises(TypeError, match="k and key_mask must be arrays of one library"):
        ox.attend(q, k, v, key_mask=other.asarray(np.ones(6, bool)))


class Quantity(np.ndarray):
    """Numbers with a unit, of which NumPy's functions know nothing."""

    def __array_ufunc__(self, *arguments: Any, **keywords: Any) -> Any:
        return NotImplemented


@pytest.mark.parametrize("kind", ["matrix", "masked", "quantity"])
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_arrays_that_compute_otherwise_are_refused(kind: str) -> None:
    make = {"matrix": np.matrix, "masked": np.ma.masked_array, "quantity": lambda x: x.view(Quantity)}[kind]
    arrays = {"q": Q, "k": K, "v": V}
    for name, x in arrays.items():
        with pytest.raises(TypeError, match=f"{name} must be a plain array, got .*, which computes otherwise"):
            ox.attention(**{**arrays, name: make(x[0])} if kind == "matrix" else {**arrays, name: make(x)})
    with pytest.raises(TypeError, match="key_mask must be a plain array"):
        ox.attention(Q, K, V, key_mask=np.ma.masked_array(np.ones(K.shape[-2], bool)))
    with pytest.raises(TypeError, match="k must be a plain array"):
        ox.KVCache().append(make(K[0]), V[0])
    index = ox.LSHIndex(K.shape[-1], metric="inner")
    with pytest.raises(TypeError, match="x must be a plain array"):
        index.add(make(K[0]))
    with pytest.raises(TypeError, match="ids must be a plain array"):
        index.add(K[0], np.ma.arange(len(K[0])))
    with pytest.raises(TypeError, match="x must be a plain array"):
        ox.hash_codes(make(K[0]), ox.random_hyperplanes(K.shape[-1], 2, 2))


def test_arrays_of_files_are_plain(tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", Q)
    mapped = np.load(tmp_path / "q.npy", mmap_mode="r")
    assert type(mapped) is np.memmap
    np.testing.assert_array_equal(ox.attention(mapped, K, V), ox.attention(Q, K, V))


def test_devices_are_not_mixed() -> None:
    strict = pytest.importorskip("array_api_strict")
    q, k, v = (strict.asarray(a) for a in (Q, K, V))
    away = strict.asarray(V, device=strict.Device("device1"))
    with pytest.raises(ValueError, match="one device, got q: .*CPU_DEVICE.*, v: .*device1"):
        ox.attend(q, k, away)
    with pytest.raises(ValueError, match="key_mask must be on the device of k"):
        ox.attend(q, k, v, key_mask=strict.ones(6, dtype=strict.bool, device=strict.Device("device1")))


@pytest.mark.parametrize("method", [Exact(), SMALL, None], ids=["exact", "treecode", "chosen"])
def test_a_device_that_is_not_the_default(method: ox.Exact | None) -> None:
    strict = pytest.importorskip("array_api_strict")
    device = strict.Device("device1")
    host = qkv(16, 150, lead=(2,))
    kept = np.arange(150) % 4 > 0
    q, k, v, mask = (strict.asarray(a, device=device) for a in (*host, kept))
    found = ox.attend(q, k, v, causal=True, key_mask=mask, method=method, check=False)
    assert found.out.device == device
    assert found.lse.device == device


def test_a_library_that_lacks_what_a_method_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As dask's arrays do: one sentence says what is missing and what works, and the automatic choice is that."""
    strict = pytest.importorskip("array_api_strict")
    q, k, v = (strict.asarray(a) for a in (Q, K, V))
    monkeypatch.delattr(strict, "take_along_axis")
    for method, kind in ((SMALL, "Treecode"), (ox.LSH(bits=2, tables=2), "LSH")):
        with pytest.raises(
            NotImplementedError, match=f"has no take_along_axis, which {kind} needs there: give method="
        ):
            ox.attention(q, k, v, method=method)
    found = ox.attend(q, k, v)
    assert found.report.method == Exact()
    assert "has no take_along_axis" in found.report.reason
    assert_close(np.asarray(found.out), ox.attention(Q, K, V, method=Exact()), rounding(Q, K, V))
