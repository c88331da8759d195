"""LSH: equal to the dense softmax over the candidates the codes define, exact without bits, nothing from later keys."""

from dataclasses import dataclass, replace
from importlib import import_module
from inspect import cleandoc
from typing import Any

import numpy as np
import pytest
from conftest import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import Call, calls

import opoch_xp as ox
from opoch_xp import LSH, Exact
from opoch_xp.buckets import Buckets
from opoch_xp.lsh import bucket_limit
from opoch_xp.testing import assert_close, clustered, qkv, relative_error, rounding

pytestmark = pytest.mark.dynamic_shapes
Result = tuple[np.ndarray, np.ndarray, np.ndarray]  # out, lse, read


@dataclass(frozen=True)
class Coded:
    """Arguments of the kernel `bucket_attention`, on the host."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    query_codes: np.ndarray
    key_codes: np.ndarray
    causal: bool
    scale: float
    mask: np.ndarray | None
    window: int
    max_bucket: int | None

    def kernel(self, backend: Backend) -> Result:
        arrays = [backend.array(a) for a in (self.q, self.k, self.v, self.query_codes, self.key_codes)]
        mask = None if self.mask is None else backend.array(self.mask)
        options = {"causal": self.causal, "scale": self.scale, "window": self.window, "max_bucket": self.max_bucket}
        out, lse, read = backend.kernels.bucket_attention(*arrays, mask=mask, **options)
        return backend.numpy(out), backend.numpy(lse), backend.numpy(read)

    def tolerance(self, dtype: str = "float64") -> float:
        return rounding(self.q, self.k, self.v, self.scale, dtype)

    def visible(self, b: int) -> np.ndarray:
        """(n_q, n_k): kept, and not after the query."""
        n_q, n_k = self.q.shape[2], self.k.shape[1]
        kept = np.ones(n_k, bool) if self.mask is None else self.mask[b]
        last = np.arange(n_q) + n_k - n_q if self.causal else np.full(n_q, n_k)
        return kept & (np.arange(n_k) <= last[:, None])

    def candidates(self, b: int, r: int) -> np.ndarray:
        """(n_q, n_k): the union over tables of what a bucket offers, and the window."""
        visible, found = self.visible(b), np.zeros((self.q.shape[2], self.k.shape[1]), dtype=bool)
        for t in range(self.key_codes.shape[1]):
            bucket = visible & (self.query_codes[b, r, t][:, None] == self.key_codes[b, t])
            if self.max_bucket is not None:
                later = np.cumsum(bucket[:, ::-1], axis=1)[:, ::-1] - bucket  # keys of the bucket after each
                bucket &= later < self.max_bucket if self.causal else bucket.sum(1, keepdims=True) <= self.max_bucket
            found |= bucket
        if self.window:
            position = np.arange(self.q.shape[2])[:, None] + self.k.shape[1] - self.q.shape[2]
            found |= visible & (np.arange(self.k.shape[1]) > position - self.window)
        return found

    def mean_field(self, b: int, r: int, i: int) -> tuple[np.ndarray, float]:
        """What a query without a candidate gets."""
        keys = self.visible(b)[i]
        if not self.causal:
            bucket = keys & (self.key_codes[b, 0] == self.query_codes[b, r, 0, i])
            keys = bucket if bucket.any() else keys
        if not keys.any():
            return np.zeros(self.v.shape[2]), -np.inf
        q, n = self.q[b, r, i].astype(np.float64), keys.sum()
        mass = self.scale * q @ self.k[b, keys].mean(0) + np.log(n)
        if not self.causal:
            sigma = abs(self.scale) * np.sqrt((q**2) @ self.k[b, keys].var(0))
            mass += sigma**2 / 2 - max(0.0, sigma - np.sqrt(2 * np.log(n))) ** 2 / 2
        return self.v[b, keys].mean(0), mass

    def definition(self) -> Result:
        """Dense, float64, a query at a time."""
        out, lse = np.zeros((*self.q.shape[:3], self.v.shape[2])), np.zeros(self.q.shape[:3])
        read = np.zeros(self.q.shape[:3], dtype=np.int64)
        for b, r in np.ndindex(self.q.shape[:2]):
            found = self.candidates(b, r)
            read[b, r] = found.sum(1)
            for i, keys in enumerate(found):
                if not keys.any():
                    out[b, r, i], lse[b, r, i] = self.mean_field(b, r, i)
                    continue
                logits = self.scale * self.k[b, keys].astype(np.float64) @ self.q[b, r, i].astype(np.float64)
                weights = np.exp(logits - logits.max())
                out[b, r, i] = weights @ self.v[b, keys] / weights.sum()
                lse[b, r, i] = np.log(weights.sum()) + logits.max()
        return out, lse, read


def check(backend: Backend, coded: Coded) -> None:
    for found, expected, what in zip(coded.kernel(backend), coded.definition(), ("out", "lse", "read"), strict=True):
        assert_close(found, expected, 0 if what == "read" else coded.tolerance(), what)


@st.composite
def codings(draw: st.DrawFn, longest: int = 40) -> Coded:
    batch, repeat = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    n_q, n_k = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    d, d_v, tables = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    codes = draw(st.sampled_from([1, 2, 6, 40]))
    spread = draw(st.sampled_from([1, 2**16, 2**32, 2**48]))  # codes that differ in one digit of 16 bits
    norm = draw(st.sampled_from([0.1, 1.0, 40.0]))
    q, k = norm * rng.standard_normal((batch, repeat, n_q, d)), rng.standard_normal((batch, n_k, d))
    v, mask = rng.standard_normal((batch, n_k, d_v)), None
    if draw(st.booleans()):
        mask = rng.random((batch, n_k)) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9]))
        k[~mask], v[~mask] = 0, 0
    causal = draw(st.booleans())
    return Coded(
        q, k, v,
        spread * rng.integers(0, codes, (batch, repeat, tables, n_q)),
        spread * rng.integers(0, codes, (batch, tables, n_k)),
        causal, draw(st.sampled_from([0.7, -0.5])), mask,
        draw(st.sampled_from([0, 1, 7, 100])) if causal else 0,
        draw(st.sampled_from([None, 1, 3, 10])),
    )  # fmt: skip


def crowded(seed: int, causal: bool, max_bucket: int | None, codes: int = 3, n: int = 700) -> Coded:
    """Buckets longer than a tile of any backend, most pairs in several tables."""
    rng = np.random.default_rng(seed)
    q, k, v = qkv(seed, n, n + 33, d=4, d_v=3, lead=(1, 1), key_lead=(1,))
    drawn = rng.integers(0, codes, (1, 1, 3, n)), rng.integers(0, codes, (1, 3, n + 33))
    return Coded(q, k, v, *drawn, causal, 0.6, None, 5 if causal else 0, max_bucket)


@settings(max_examples=100)
@given(coded=codings())
def test_kernel_is_the_dense_softmax_over_candidates(backend: Backend, coded: Coded) -> None:
    check(backend, coded)


@given(coded=codings(longest=60))
def test_short_tiles_and_batches_change_nothing(backend: Backend, coded: Coded) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in [
            ("generic.buckets", "ELEMENTS", 4000), ("generic.buckets", "SUM_BLOCK", 7),
            ("numpy.bucket_tables", "TILE", 8), ("numpy.bucket_tables", "TASK", 500),
            ("numpy.buckets", "BATCH", 900), ("numpy.buckets", "WASTE", 50),
            ("numpy.mean_field", "BLOCK", 7), ("numpy.mean_field", "RUNS", 2),
        ]:  # fmt: skip
            patch.setattr(import_module(f"opoch_xp.backends.{module}"), name, value)
        check(backend, coded)


@pytest.mark.parametrize("max_bucket", [None, 100, 240])
@pytest.mark.parametrize("causal", [False, True])
def test_buckets_longer_than_a_tile(backend: Backend, causal: bool, max_bucket: int | None) -> None:
    check(backend, crowded(0, causal, max_bucket))


@pytest.mark.parametrize(("codes", "max_bucket"), [(60, None), (60, 10), (700, None), (700, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_many_short_buckets_and_empty_ones(backend: Backend, causal: bool, codes: int, max_bucket: int | None) -> None:
    check(backend, crowded(5, causal, max_bucket, codes))


@pytest.mark.parametrize("causal", [False, True])
def test_float32_errs_by_rounding(backend: Backend, causal: bool) -> None:
    coded = crowded(1, causal, 240)
    short = replace(coded, **{name: getattr(coded, name).astype(np.float32) for name in "qkv"})
    expected, found = short.definition(), short.kernel(backend)
    assert found[0].dtype == found[1].dtype == np.float32
    for part in (0, 1):
        assert_close(found[part], expected[part], short.tolerance("float32"))


def test_a_pair_counts_once_however_many_tables_it_meets_in(backend: Backend) -> None:
    one = crowded(2, True, None, n=90)
    one = replace(one, query_codes=one.query_codes[:, :, :1], key_codes=one.key_codes[:, :1])
    three = replace(one, query_codes=np.repeat(one.query_codes, 3, 2), key_codes=np.repeat(one.key_codes, 3, 1))
    for a, b in zip(one.kernel(backend), three.kernel(backend), strict=True):
        assert_close(a, b, one.tolerance())


def test_logits_of_any_size_stay_finite(backend: Backend) -> None:
    coded = crowded(3, False, None, n=60)
    large = replace(coded, scale=300.0)
    check(backend, large)
    assert np.isfinite(large.kernel(backend)[0]).all()


def test_a_query_that_is_not_finite_spoils_its_own_row(backend: Backend) -> None:
    coded = crowded(4, False, None, n=60)
    spoilt = replace(coded, q=coded.q.copy())
    spoilt.q[0, 0, 7] = np.nan
    clean, found = coded.kernel(backend)[0], spoilt.kernel(backend)[0]
    assert np.isnan(found[0, 0, 7]).all()
    assert_close(np.delete(found, 7, 2), np.delete(clean, 7, 2), coded.tolerance())


@given(coded=codings(longest=25), recent=st.sampled_from([0, 4]), older=st.sampled_from([0, 4]))
def test_buckets_are_the_mask_their_docstring_builds(coded: Coded, recent: int, older: int) -> None:
    xp = import_module("array_api_compat.numpy")
    n_k, window = coded.k.shape[1], recent or older
    flat = import_module("opoch_xp.backends.generic.buckets").Flat(
        xp, (1, 1, coded.q.shape[2], n_k), "cpu", coded.causal, None if coded.mask is None else coded.mask[:1]
    )
    numbers = flat.numbers(coded.query_codes[:1, :1, 0], coded.key_codes[:1, 0])
    limits = {"recent": recent, "older": 0 if recent else older} if coded.causal else {"limit": coded.max_bucket}
    buckets = flat.buckets(*numbers, **limits)
    loop = cleandoc(Buckets.__doc__ or "").split(":\n\n")[-1]
    names: dict[str, Any] = {"np": np, "order": buckets.order, "start": buckets.start, "stop": buckets.stop}
    exec(cleandoc(loop), names)
    one = replace(coded, window=0, max_bucket=None if coded.causal else coded.max_bucket)
    one = replace(one, query_codes=one.query_codes[:, :, :1], key_codes=one.key_codes[:, :1])
    expected = one.candidates(0, 0)
    if coded.causal and window:
        near = replace(one, key_codes=one.key_codes * 0 - 1, window=window).candidates(0, 0)
        expected = expected & near if recent else expected & ~near
    np.testing.assert_array_equal(names["mask"], expected)


def lsh(backend: Backend, q: Any, k: Any, v: Any, method: Any, **keywords: Any) -> tuple[np.ndarray, np.ndarray]:
    """out and lse on the host."""
    arrays = (backend.array(a) for a in (q, k, v))
    if keywords.get("key_mask") is not None:
        keywords["key_mask"] = backend.array(keywords["key_mask"])
    found = ox.attend(*arrays, method=method, backend=backend.name, **keywords)
    return backend.numpy(found.out), backend.numpy(found.lse)


@pytest.mark.parametrize("method", [LSH(bits=0), LSH(bits=0, max_bucket=1000), LSH(bits=0, max_bucket=1000, tables=2)])
@given(call=calls(longest=150))
def test_no_bits_is_exact(backend: Backend, call: Call, method: LSH) -> None:
    options = {"causal": call.causal, "scale": call.scale, "key_mask": call.kept}
    tolerance = 2 * rounding(call.q, call.k - call.k.mean(), call.v, call.scale)
    exact = lsh(backend, call.q, call.k, call.v, Exact(), **options)
    for found, expected in zip(lsh(backend, call.q, call.k, call.v, method, **options), exact, strict=True):
        assert_close(found, expected, tolerance)


def test_a_window_over_everything_is_exact(backend: Backend) -> None:
    q, k, v = qkv(0, 90, 120, lead=(2,))
    exact = lsh(backend, q, k, v, Exact(), causal=True)
    for found, expected in zip(lsh(backend, q, k, v, LSH(window=120), causal=True), exact, strict=True):
        assert_close(found, expected, 2 * rounding(q, k, v))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_call_hashes_centered_keys(backend: Backend, causal: bool, masked: bool) -> None:
    method, n = LSH(bits=4, tables=3, seed=5, max_bucket=20), 200
    q, k, v = qkv(1, n, lead=(1,))
    k += 3.0  # without centering all keys fall on one side
    kept = np.random.default_rng(2).random(n) < 0.7 if masked else np.ones(n, bool)
    first = np.flatnonzero(kept)[:64] if causal else np.flatnonzero(kept)
    center = k[0, first].mean(0)
    planes = ox.random_hyperplanes(8, 4, 3, seed=5).astype(np.float64)
    query_codes, key_codes = ox.hash_codes(q[None], planes), ox.hash_codes(k - center, planes)
    mask = kept[None] if masked else None
    coded = Coded(q[None], k, v, query_codes, key_codes, causal, 8**-0.5, mask, 0, 20)
    out, lse, _ = coded.definition()
    early = np.cumsum(kept) <= 64 if causal else np.zeros(n, bool)
    exact = lsh(backend, q, k, v, Exact(), causal=causal, key_mask=mask[0] if masked else None)
    found = lsh(backend, q, k, v, method, causal=causal, key_mask=mask[0] if masked else None)
    for one, whole, part in zip(found, exact, (out[0], lse[0]), strict=True):
        seen = early.reshape(1, n, *[1] * (part.ndim - 2))
        # without a candidate the variance, and so the mean field, is that of centered keys: the same
        assert_close(one, np.where(seen, whole, part), 20 * coded.tolerance())
    assert not early.all()
    assert relative_error(out[0], exact[0]) > 0.01


@pytest.mark.parametrize("holes", ["none", "some", "left"])
def test_later_keys_and_values_never_change_an_output(backend: Backend, holes: str) -> None:
    rng, n, extra = np.random.default_rng(0), 180, 10
    q, k, v = qkv(3, n - extra, n, lead=(2,))
    kept = {"none": None, "some": rng.random(n) < 0.6, "left": np.arange(n) > 50}[holes]
    method = LSH(bits=3, tables=2, window=3, max_bucket=10)
    out, lse = lsh(backend, q, k, v, method, causal=True, key_mask=kept)
    for position in (extra, 40, 63, 64, 90, 114, 115, 150):
        later = np.arange(n) > position
        new_k, new_v = (np.where(later[:, None], 5 * rng.standard_normal(x.shape), x) for x in (k, v))
        new = lsh(backend, q, new_k, new_v, method, causal=True, key_mask=kept)
        rows = position - extra + 1
        assert_close(new[0][:, :rows], out[:, :rows], 1e-12)
        assert_close(new[1][:, :rows], lse[:, :rows], 1e-12)
        assert relative_error(new[0], out) > 0.01  # the later rows do change


@given(call=calls(longest=100))
def test_heads_and_batches_know_nothing_of_one_another(backend: Backend, call: Call) -> None:
    method = LSH(bits=3, tables=3, window=2 * call.causal, max_bucket=8)
    options = {"causal": call.causal, "scale": call.scale}
    together = lsh(backend, call.q, call.k, call.v, method, **options, key_mask=call.kept)
    tolerance = 2 * rounding(call.q, call.k, call.v, call.scale)
    for index, q, k, v, kept in call.heads():
        alone = lsh(backend, q, k, v, method, **options, key_mask=kept)
        for one, all_heads in zip(alone, together, strict=True):
            assert_close(one, all_heads[index], tolerance)


@pytest.mark.parametrize("causal", [False, True])
def test_masked_keys_may_hold_anything(backend: Backend, causal: bool) -> None:
    q, k, v = qkv(4, 150)
    kept = np.random.default_rng(1).random(150) < 0.5
    method = LSH(bits=3, tables=2, max_bucket=5)
    found = lsh(backend, q, k, v, method, causal=causal, key_mask=kept)
    k[~kept], v[~kept] = np.nan, np.inf
    for one, other in zip(lsh(backend, q, k, v, method, causal=causal, key_mask=kept), found, strict=True):
        assert_close(one, other, 0)


def test_rows_that_see_no_key_are_zeros(backend: Backend) -> None:
    q, k, v = qkv(5, 9, 4)
    out, lse = lsh(backend, q, k, v, LSH(bits=2), causal=True)
    assert_close(out[:5], np.zeros((5, 5)), 0)
    assert_close(lse[:5], np.full(5, -np.inf), 0)
    for causal in (False, True):
        out, lse = lsh(backend, q, k, v, LSH(bits=2), causal=causal, key_mask=np.zeros(4, bool))
        assert_close(out, np.zeros((9, 5)), 0)
        assert_close(lse, np.full(9, -np.inf), 0)


def test_empty_axes_give_empty_outputs(backend: Backend) -> None:
    coded = crowded(6, False, None, n=20)
    for q, k, v in [(coded.q[:, :, :0], coded.k, coded.v), (coded.q[:0], coded.k[:0], coded.v[:0])]:
        batch, n_q = q.shape[0], q.shape[2]
        codes = coded.query_codes[:batch, :, :, :n_q], coded.key_codes[:batch]
        out, lse, read = replace(coded, q=q, k=k, v=v, query_codes=codes[0], key_codes=codes[1]).kernel(backend)
        assert out.shape == (batch, 1, n_q, 3)
        assert lse.shape == read.shape == (batch, 1, n_q)


def test_arrays_with_strides_or_without_leave_to_write() -> None:
    q, k, v = (a.transpose(1, 0, 2)[:, ::-1, ::2] for a in qkv(7, 2, 2, d=8, d_v=6, lead=(100,)))
    copies = [a.copy() for a in (q, k, v)]
    for a in (q, k, v):
        a.flags.writeable = False
    for causal in (False, True):
        options = {"method": LSH(bits=3, tables=2), "causal": causal}
        assert_close(ox.attention(q, k, v, **options), ox.attention(*copies, **options), 1e-12)


def test_the_same_bits_for_any_number_of_threads() -> None:
    from opoch_xp.backends.numpy import threads

    q, k, v = clustered(0, 3000)
    results = []
    for number in (1, 3, 3):
        with pytest.MonkeyPatch.context() as patch, threads(number):
            patch.setattr(import_module("opoch_xp.backends.numpy.bucket_tables"), "TASK", 1 << 16)
            results.append(ox.attention(q, k, v, method=LSH(bits=5, tables=4)))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[1], results[2])


@pytest.mark.parametrize("causal", [False, True])
def test_more_tables_err_less(backend: Backend, causal: bool) -> None:
    q, k, v = clustered(1, 1000)
    exact = lsh(backend, q, k, v, Exact(), causal=causal)[0]
    errors = [
        relative_error(lsh(backend, q, k, v, LSH(bits=8, tables=tables), causal=causal)[0], exact)
        for tables in (1, 4, 16)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_the_report_counts_what_was_read(backend: Backend) -> None:
    q, k, v = (backend.array(a) for a in qkv(8, 300))
    rows = ox.attend(q, k, v, method=LSH(bits=4, tables=1), backend=backend.name).report.rows
    assert 300 / 16 < rows["near"] < 300 / 4
    assert rows["far"] == 0
    rows = ox.attend(q, k, v, method=LSH(bits=4, tables=1, max_bucket=1), backend=backend.name).report.rows
    assert rows == {"near": 0.0, "far": 1.0}
    whole = ox.attend(q, k, v, method=LSH(bits=0), causal=True, backend=backend.name).report.rows
    assert whole["near"] == 150.5


def test_bucket_limit_is_eight_even_shares() -> None:
    assert bucket_limit(LSH(bits=12), 65536) == 256
    assert bucket_limit(LSH(bits=12), 1_000_000) == 1953
    assert bucket_limit(LSH(bits=12, max_bucket=7), 1_000_000) == 7
    assert bucket_limit(LSH(bits=0), 1_000_000) is None


def test_a_window_needs_causal(backend: Backend) -> None:
    with pytest.raises(ValueError, match="window=5 needs causal=True"):
        lsh(backend, *qkv(9, 10), LSH(window=5))
