"""Exact attention: equal to the dense softmax, whatever the shapes, tiles, masks and sizes of the logits."""

import numpy as np
import oracle
import pytest
from conftest import Backend
from hypothesis import given
from inputs import Call, calls

import opoch_xp as ox
from opoch_xp.audit import exact_rows
from opoch_xp.testing import assert_close, qkv, relative_error, rounding


@given(call=calls(tied=True))
def test_equals_the_dense_softmax(backend: Backend, call: Call) -> None:
    mask = None if call.kept is None else backend.array(call.kept)
    arrays = (backend.array(a) for a in (call.q, call.k, call.v))
    found = ox.attend(
        *arrays, causal=call.causal, scale=call.scale, key_mask=mask, method=ox.Exact(), backend=backend.name
    )
    tolerance = rounding(call.q, call.k, call.v, call.scale)
    for index, q, k, v, kept in call.heads():
        right = oracle.dense(q, k, v, causal=call.causal, scale=call.scale, kept=kept)
        assert_close(backend.numpy(found.out)[index], right[0], tolerance, "out")
        assert_close(backend.numpy(found.lse)[index], right[1], tolerance, "lse")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), [(1, 3001), (700, 2100), (1100, 900)])
def test_many_tiles(backend: Backend, n_q: int, n_k: int, causal: bool) -> None:
    q, k, v = qkv(0, n_q, n_k, lead=(2,), key_lead=(1,))
    kept = np.random.default_rng(1).random(n_k) < 0.8
    kept[512:1100] = False  # a whole tile of hidden keys
    found = ox.attend(
        *(backend.array(a) for a in (q, k, v)),
        causal=causal,
        key_mask=backend.array(kept),
        method=ox.Exact(),
        backend=backend.name,
    )
    for head in range(2):
        right = oracle.dense(q[head], k[0], v[0], causal=causal, kept=kept)
        assert_close(backend.numpy(found.out)[head], right[0], rounding(q, k, v), "out")
        assert_close(backend.numpy(found.lse)[head], right[1], rounding(q, k, v), "lse")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e4])
def test_logits_of_any_size(backend: Backend, dtype: str, size: float) -> None:
    """From a flat softmax to a hard one, small and large maxima: sums without a running maximum would overflow."""
    q, k, v = qkv(2, 300, dtype=dtype)
    q = (q * size).astype(dtype)
    k[::7] -= size  # rows whose largest logit is very negative, and others
    found = ox.attend(*(backend.array(a) for a in (q, k, v)), causal=True, method=ox.Exact(), backend=backend.name)
    right = oracle.dense(q, k, v, causal=True)
    tolerance = rounding(q, k, v, dtype=dtype)
    out, lse = backend.numpy(found.out), backend.numpy(found.lse)
    assert np.isfinite(out).all()
    assert_close(lse, right[1], tolerance, "lse")
    assert_close(out, right[0], min(tolerance, 10.0), "out")
    assert str(out.dtype) == str(lse.dtype) == dtype


@pytest.mark.parametrize("start", [0, 3, 7])
def test_halves_merged_by_lse_equal_the_whole(backend: Backend, start: int) -> None:
    """merge_part takes the other half's rows from `start` on; the rows before have seen the first half alone."""
    q, k, v = (backend.array(a) for a in qkv(3, 12, 40, lead=(2, 3), key_lead=(2,)))
    kept = np.random.default_rng(4).random((2, 40)) < 0.5
    kept[0, :25], kept[1, 25:] = False, False  # each entry has a half that sees no key
    mask, exact = backend.array(kept), backend.kernels.exact_attention
    whole = exact(q, k, v, causal=False, scale=0.5, mask=mask)
    left = exact(q, k[:, :25, :], v[:, :25, :], causal=False, scale=0.5, mask=mask[:, :25])
    right = exact(q[:, :, start:, :], k[:, 25:, :], v[:, 25:, :], causal=False, scale=0.5, mask=mask[:, 25:])
    before = [backend.numpy(part) for part in left]
    merged = backend.kernels.merge_part(*left, *right, start)
    tolerance = rounding(backend.numpy(q), backend.numpy(k), backend.numpy(v), 0.5)
    for was, now, full in zip(before, merged, whole, strict=True):
        assert_close(backend.numpy(now)[:, :, start:], backend.numpy(full)[:, :, start:], tolerance)
        assert_close(backend.numpy(now)[:, :, :start], was[:, :, :start], 0.0)


def test_merging_two_parts_that_saw_nothing(backend: Backend) -> None:
    out, lse = (backend.writable(a) for a in (np.zeros((1, 1, 4, 2)), np.full((1, 1, 4), -np.inf)))
    part, part_lse = (backend.array(a) for a in (np.zeros((1, 1, 2, 2)), np.full((1, 1, 2), -np.inf)))
    merged = backend.kernels.merge_part(out, lse, part, part_lse, 1)
    assert_close(backend.numpy(merged[0]), np.zeros((1, 1, 4, 2)), 0.0)
    assert_close(backend.numpy(merged[1]), np.full((1, 1, 4), -np.inf), 0.0)


def test_numbered_rows_alone_equal_those_of_the_whole(backend: Backend) -> None:
    q, k, v = (backend.array(a) for a in qkv(5, 200, 150, lead=(2,)))
    rows = np.array([0, 49, 50, 199, 77])
    found = exact_rows(q, k, v, rows, causal=True, backend=backend.name)
    whole = ox.attend(q, k, v, causal=True, method=ox.Exact(), backend=backend.name)
    tolerance = rounding(backend.numpy(q), backend.numpy(k), backend.numpy(v))
    assert_close(backend.numpy(found[0]), backend.numpy(whole.out)[:, rows], tolerance)
    assert_close(backend.numpy(found[1]), backend.numpy(whole.lse)[:, rows], tolerance)


def test_float16_sums_are_wider(backend: Backend) -> None:
    """The output errs by its own rounding: no more than the exact output rounded to float16 does, twice."""
    if not backend.has("float16"):
        pytest.skip("the library has no float16")
    q, k, v = qkv(6, 64, 3000, dtype="float16")
    found = ox.attend(*(backend.array(a) for a in (q, k, v)), method=ox.Exact(), backend=backend.name)
    right, lse = oracle.dense(q, k, v)
    assert 0 < relative_error(backend.numpy(found.out), right) <= 2 * relative_error(right.astype(np.float16), right)
    assert str(found.out.dtype).endswith("float16")
    assert_close(backend.numpy(found.lse), lse, rounding(q, k, v, dtype="float16"))
