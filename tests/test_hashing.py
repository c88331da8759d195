"""Random hyperplanes and their codes: equal to the definition bit by bit, for every backend, and errors by name."""

from importlib import import_module
from typing import Any

import numpy as np
import pytest
from conftest import Backend
from hypothesis import given
from hypothesis import strategies as st

import opoch_xp as ox
from opoch_xp.testing import whole

BITS = [0, 1, 7, 8, 9, 16, 17, 24, 31, 32, 33, 62]


def definition(x: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """The sum of 2**b over the planes b with planes[t, b] . x >= 0, in whole numbers, (..., tables, n)."""
    signs = np.einsum("tbd,...nd->...tnb", planes.astype(np.float64), x.astype(np.float64)) >= 0
    return (signs * (np.int64(1) << np.arange(planes.shape[1], dtype=np.int64))).sum(-1, dtype=np.int64)


def codes_of(backend: Backend, x: Any, planes: np.ndarray) -> np.ndarray:
    found = ox.hash_codes(backend.array(x), planes, backend=backend.name)
    assert found.dtype == backend.xp.int64
    return backend.numpy(found)


@given(
    lead=st.sampled_from([(), (1,), (2, 3), (0,)]),
    n=st.integers(0, 40),
    dim=st.integers(1, 9),
    bits=st.sampled_from(BITS),
    tables=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 2**32),
)
def test_codes_are_the_definition(
    backend: Backend, lead: tuple[int, ...], n: int, dim: int, bits: int, tables: int, dtype: str, seed: int
) -> None:
    x, planes = whole(seed, *lead, n, dim).astype(dtype), whole(seed + 1, tables, bits, dim)
    found = codes_of(backend, x, planes)
    assert found.shape == (*lead, tables, n)
    np.testing.assert_array_equal(found, definition(x, planes))


@pytest.mark.parametrize("bits", [12, 20])
def test_rows_beyond_one_block(backend: Backend, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    monkeypatch.setattr(import_module("opoch_xp.backends.generic.hashing"), "PROJECTIONS", 3000)
    monkeypatch.setattr(import_module("opoch_xp.backends.numpy.hashing"), "BLOCK", 3000)
    x, planes = whole(0, 2, 501, 5), whole(1, 3, bits, 5)
    np.testing.assert_array_equal(codes_of(backend, x, planes), definition(x, planes))


def test_zero_of_either_sign_counts_as_positive_and_nan_does_not(backend: Backend) -> None:
    x = np.asarray([[0.0, 0.0], [-0.0, -0.0], [1.0, -1.0], [np.nan, 1.0]])
    found = codes_of(backend, x, np.asarray([[[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]]], dtype=np.float32))
    np.testing.assert_array_equal(found, [[7, 7, 7, 0]])


def test_62_bits_all_set_is_the_largest_code(backend: Backend) -> None:
    assert codes_of(backend, np.ones((1, 1)), np.ones((1, 62, 1), np.float32)) == 2**62 - 1


def test_rows_collide_as_often_as_their_angle_says(backend: Backend) -> None:
    bits, tables, angle = 4, 4000, np.pi / 5
    x = np.zeros((2, 16))
    x[:, :2] = [1, 0], [np.cos(angle), np.sin(angle)]
    a, b = codes_of(backend, x, ox.random_hyperplanes(16, bits, tables, seed=3)).T
    expected = (1 - angle / np.pi) ** bits
    spread = np.sqrt(expected * (1 - expected) / tables)
    assert abs((a == b).mean() - expected) < 4 * spread


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_floats_are_widened(backend: Backend, dtype: str) -> None:
    if not backend.has(dtype):
        pytest.skip(f"{backend.option} has no {dtype}")
    x, planes = whole(0, 30, 4), whole(1, 2, 12, 4)
    short = backend.xp.astype(backend.array(x), getattr(backend.xp, dtype))
    np.testing.assert_array_equal(
        backend.numpy(ox.hash_codes(short, planes, backend=backend.name)), definition(x, planes)
    )


def test_arrays_with_strides_or_without_leave_to_write() -> None:
    x, planes = whole(0, 4, 60, 6), ox.random_hyperplanes(3, 10, 2)
    x.flags.writeable = planes.flags.writeable = False
    part = x.transpose(1, 0, 2)[::2, ::-1, ::2]
    np.testing.assert_array_equal(ox.hash_codes(part, planes), ox.hash_codes(part.copy(), planes))


def test_hyperplanes_are_the_float64_stream_of_the_seed() -> None:
    planes = ox.random_hyperplanes(5, bits=3, tables=2, seed=7)
    assert planes.dtype == np.float32
    np.testing.assert_array_equal(planes, np.random.default_rng(7).standard_normal((2, 3, 5)).astype(np.float32))
    assert ox.random_hyperplanes(5).shape == (4, 16, 5)
    assert ox.random_hyperplanes(5, bits=0).shape == (4, 0, 5)
    assert not np.array_equal(planes, ox.random_hyperplanes(5, bits=3, tables=2, seed=8))


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"dim": 0}, "dim must be a whole number of at least 1, got 0"),
        ({"bits": 63}, "bits must be a whole number from 0 to 62, got 63"),
        ({"bits": -1}, "bits must"),
        ({"bits": 2.0}, "bits must"),
        ({"tables": 0}, "tables must"),
        ({"tables": True}, "tables must"),
        ({"seed": -1}, "seed must"),
    ],
)
def test_hyperplanes_name_what_does_not_fit(keywords: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ox.random_hyperplanes(**{"dim": 4, **keywords})


@pytest.mark.parametrize(
    ("x", "planes", "kind", "named"),
    [
        (np.zeros((3, 4), np.int64), np.zeros((1, 2, 4)), TypeError, "x must be real floating, got dtype int64"),
        (np.zeros((3, 4), np.complex64), np.zeros((1, 2, 4)), TypeError, "x must be real floating"),
        (np.zeros(4), np.zeros((1, 2, 4)), ValueError, r"x must be \(..., n, dim\), got shape \(4,\)"),
        (np.zeros((3, 4)), np.zeros((1, 2, 4), int), TypeError, "planes must be real floating"),
        (np.zeros((3, 4)), np.zeros((2, 4)), ValueError, r"planes must be \(tables, bits, dim\)"),
        (np.zeros((3, 4)), np.zeros((1, 2, 5)), ValueError, r"dim of x = 4, got shape \(1, 2, 5\)"),
        (np.zeros((3, 4)), np.zeros((1, 63, 4)), ValueError, "at most 62 bits a table, got 63"),
    ],
)
def test_codes_name_what_does_not_fit(x: np.ndarray, planes: np.ndarray, kind: type[Exception], named: str) -> None:
    with pytest.raises(kind, match=named):
        ox.hash_codes(x, planes)
