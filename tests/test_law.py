"""The law of few keys: simulated nodes, its limits, and every backend's copy of it."""

import numpy as np
import pytest
from conftest import Backend

import opoch_xp as ox
from opoch_xp import Treecode
from opoch_xp.testing import assert_close, budget
from opoch_xp.treecode import law
from opoch_xp.treecode.law import coefficients, coefficients_of, excess, log_deviation, log_gain, log_mass
from opoch_xp.treecode.tree import Lists

METHOD = Treecode(block=64, leaf=16, branch=2, top=4, group=8)
DRAWS = 4000


def simulated(count: int, sigma: float) -> np.ndarray:
    """ln((1/n) sum exp(x)) of `count` normal numbers of deviation sigma, many times."""
    x = sigma * np.random.default_rng(count).standard_normal((DRAWS, count))
    top = x.max(1, keepdims=True)
    return top[:, 0] + np.log(np.exp(x - top).mean(1))


@pytest.mark.parametrize(
    ("count", "within", "more"), [(4, 0.07, 1.1), (16, 0.08, 1.15), (128, 0.12, 1.5), (1024, 0.22, 2.4)]
)
def test_it_is_what_simulated_nodes_hold(count: int, within: float, more: float) -> None:
    """The mean to `within`; the deviation is never too small by more than its own rounding, nor too large by `more`."""
    c = coefficients_of(count)
    for sigma in (0.3, 1.0, 2.0, 4.0, 8.0):
        drawn = simulated(count, sigma)
        assert log_gain(np.float64(sigma**2), c) == pytest.approx(drawn.mean(), abs=within)
        assert 0.97 * drawn.std() <= log_deviation(np.float64(sigma**2), c) <= more * drawn.std()


def test_its_limits() -> None:
    sigma2 = np.array([0.0, 1e-12, 1e-3, 1.0, 1e4])
    assert log_gain(sigma2, coefficients_of(1)).tolist() == [0.0] * 5  # one key is known exactly
    assert log_gain(np.array(0.0), coefficients_of(64)) == 0
    assert (np.diff(log_gain(sigma2, coefficients_of(64))) >= 0).all()
    assert (np.diff(log_deviation(sigma2, coefficients_of(64))) >= 0).all()
    assert excess(np.array(0.0), np.array(64.0)) < -30  # keys that are alike are right as they are
    assert log_mass(np.array(3.0), np.array(1.0), np.array(0.0)) == -np.inf


@pytest.mark.parametrize("count", [0, 1, 16])
def test_its_slope_is_finite_where_keys_are_alike(count: int) -> None:
    c, step = coefficients_of(count), 1e-7
    slope = (log_gain(np.array(step), c) - log_gain(np.array(0.0), c)) / step
    assert slope == pytest.approx(c.gain * c.width / 2, abs=1e-6)
    assert np.isfinite(slope)


def test_gradients_are_finite_where_keys_are_alike_and_nodes_hold_none_or_one(backend: Backend) -> None:
    """Of the keys of a cell 16 are equal and kept, or one is, or none; most of the cells stay closed."""
    rng = np.random.default_rng(0)
    q, k, v = (np.repeat(rng.standard_normal((1, 16, 8)), 16, axis=1) for _ in range(3))
    kept = np.repeat(np.arange(16) % 3 > 0, 16) | (np.arange(256) % 96 == 0)
    keywords = {"method": METHOD, "key_mask": backend.array(kept), "backend": backend.name}
    for gradient in backend.gradients(lambda *arrays: ox.attention(*arrays, **keywords).sum(), q, k, v):
        assert np.isfinite(gradient).all()
        assert gradient.any()


def test_coefficients_of_numbers_and_of_arrays_are_the_same() -> None:
    counts = np.array([0.0, 1.0, 3.0, 16.0, 100_000.0])
    found = coefficients(counts)
    for i, count in enumerate(counts):
        one = coefficients_of(int(count))
        for name in law.Coefficients.__dataclass_fields__:
            assert getattr(found, name)[i] == pytest.approx(getattr(one, name))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("sharp", [0.1, 1.0, 6.0])
def test_every_backend_weighs_nodes_by_it(backend: Backend, sharp: float, hidden: bool, dtype: str) -> None:
    """A part that opens nothing: its lse is that of the log masses of the nodes at the top."""
    rng = np.random.default_rng(0)
    k, v, q = rng.standard_normal((2, 64, 8)), rng.standard_normal((2, 64, 3)), sharp * rng.standard_normal((1, 11, 8))
    kept = rng.random((2, 64)) < 0.5 if hidden else None
    if kept is not None:
        kept[1] = False
        k, v = k * kept[..., None], v * kept[..., None]
    order = np.stack([rng.permutation(64) for _ in range(2)])
    kernels = backend.kernels

    def array(x: np.ndarray) -> object:
        return backend.array(x.astype(dtype) if x.dtype.kind == "f" else x)

    axes = rng.standard_normal((2, 8))
    mask = None if kept is None else array(kept)
    tree = kernels.build_tree(array(k), array(v), axes, METHOD, mask=mask, order=array(order))
    groups = array(np.concatenate([np.arange(11), np.arange(11, 16)])[None])
    nothing = Lists((), array(np.zeros((2, 0), np.int64)), array(np.zeros((2, 8, 0), bool)))
    part = kernels.tree_attention(
        array(q), tree, np.array([0]), np.array([2]), groups, METHOD, scale=0.5, seen=array(np.full((1, 11), -np.inf)),
        lists=nothing,
    )  # fmt: skip
    nodes = np.take_along_axis(k, order[..., None], 1).reshape(8, 16, 8)
    there = np.ones((8, 16)) if kept is None else np.take_along_axis(kept, order, 1).reshape(8, 16)
    count = there.sum(1)
    share = there / np.maximum(count, 1)[:, None]
    mean = (share[..., None] * nodes).sum(1)
    var = (share[..., None] * (nodes - mean[:, None]) ** 2).sum(1)
    mass = log_mass(0.5 * q[0] @ mean.T, 0.25 * q[0] ** 2 @ var.T, count)
    right = np.log(np.exp(mass - mass.max()).sum(1)) + mass.max()
    assert_close(backend.numpy(part.lse)[0], right, budget(q, k, v, 0.5, dtype) if dtype == "float32" else 1e-10)
    assert backend.numpy(part.read)[0].tolist() == [11 * 8, 0, 0]
