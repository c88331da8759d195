"""What JAX traces: compiled, differentiated and batched calls equal plain ones; what must be told where it can't be."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest

os.environ.setdefault("JAX_ENABLE_X64", "1")  # float64, and codes of 64 bits
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import opoch_xp as ox  # noqa: E402
from opoch_xp.backends import kernels_for  # noqa: E402
from opoch_xp.cli.rows import arrays_of  # noqa: E402
from opoch_xp.testing import assert_close, check_backend, relative_error, rounding  # noqa: E402

SMALL = ox.Treecode(rtol=0.2, sinks=3, block=16, leaf=4, fan=4, branch=2, top=2, group=8, least=2)
METHODS = (SMALL, ox.Exact())
KEPT = jnp.asarray(np.random.default_rng(2).random((2, 130)) < 0.8)


def qkv(dtype: str = "float64", n_q: int = 130) -> Any:
    """Four query heads on two key heads, two batch entries, values of another width; logits that are not flat."""
    rng = np.random.default_rng(0)
    shapes = (2, 4, n_q, 6), (2, 2, 130, 6), (2, 2, 130, 5)
    return [jnp.asarray(1.5 * rng.standard_normal(shape), dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize(("compiled", "backend"), [(True, None), (False, None), (True, "generic")])
def test_every_way_equals_numpy(compiled: bool, backend: str | None, method: Any, causal: bool) -> None:
    arrays = qkv(n_q=100)

    def attend(*arrays: Any) -> Any:
        found = ox.attend(*arrays, causal=causal, method=method, key_mask=KEPT, backend=backend)
        return found.out, found.lse

    host = [np.array(x) for x in arrays]
    right = ox.attend(*host, causal=causal, method=method, key_mask=np.array(KEPT), backend="generic", check=False)
    for ours, theirs in zip((jax.jit(attend) if compiled else attend)(*arrays), (right.out, right.lse), strict=True):
        assert isinstance(ours, jax.Array)
        assert ours.dtype == theirs.dtype
        assert_close(np.asarray(ours), theirs, rounding(*host))
    assert "tree_attention" in kernels_for(jnp).native


@pytest.mark.parametrize("backend", [None, "generic"])
@pytest.mark.parametrize(("rtol", "most"), [(1e-6, None), (1e-6, 5), (0.0, None)])
def test_compiled_calls_are_bounded(rtol: float, most: int | None, backend: str | None) -> None:
    """128 cells of 256 where the method has no bound, as NumPy is told that bound; all of them for rtol = 0."""
    q, k, v = (np.random.default_rng(i).standard_normal((512, 4)) for i in range(3))
    method = ox.Treecode(rtol=rtol, most=most, sinks=0, block=512, leaf=2, top=256, group=512)
    found = jax.jit(lambda *a: ox.attention(*a, method=method, backend=backend))(*map(jnp.asarray, (q, k, v)))
    exact = oracle.dense(q, k, v)[0]
    if rtol == 0:
        assert_close(np.asarray(found), exact, rounding(q, k, v))
        return
    bounded = ox.attend(q, k, v, method=replace(method, most=most or 128), backend="generic", check=False)
    assert_close(np.asarray(found), bounded.out, rounding(q, k, v))
    assert relative_error(bounded.out, exact) > 1e-4  # the bound leaves something closed


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_gradients_are_those_of_the_output(method: Any, causal: bool, masked: bool) -> None:
    """jax.grad of the compiled call, along a random direction, against a central difference of out and lse."""
    arrays, rng, step = qkv(), np.random.default_rng(1), 1e-6
    weight, along = rng.standard_normal((2, 4, 130, 5)), [rng.standard_normal(a.shape) for a in arrays]

    @jax.jit
    def loss(*arrays: Any) -> Any:
        found = ox.attend(*arrays, causal=causal, method=method, key_mask=KEPT if masked else None)
        return (found.out * weight).sum() + jnp.where(jnp.isfinite(found.lse), found.lse, 0.0).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
    slope = sum(float((g * a).sum()) for g, a in zip(gradients, along, strict=True))
    ahead, behind = (loss(*(x + sign * step * a for x, a in zip(arrays, along, strict=True))) for sign in (1, -1))
    assert slope == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-5)


def test_gradient_of_the_queries_alone() -> None:
    """Keys and values that are not traced stand beside queries that are."""
    q, k, v = qkv()
    found = jax.grad(lambda q: ox.attention(q, k, v, causal=True, method=SMALL).sum())(q)
    right = jax.grad(lambda *arrays: ox.attention(*arrays, causal=True, method=SMALL).sum())(q, k, v)
    assert_close(np.asarray(found), np.asarray(right), rounding(*map(np.asarray, (q, k, v))))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_vmap_equals_a_batch_axis(method: Any) -> None:
    arrays = qkv()
    mapped = jax.vmap(lambda *one: ox.attention(*one, causal=True, method=method))(*arrays)
    right = ox.attention(*arrays, causal=True, method=method)
    assert_close(np.asarray(mapped), np.asarray(right), rounding(*map(np.asarray, arrays)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_lower_precision_goes_in_and_comes_out(dtype: str) -> None:
    arrays = qkv(dtype)
    found = jax.jit(lambda *a: ox.attend(*a, causal=True, method=ox.Exact()).out)(*arrays)
    assert found.dtype == dtype
    exact = oracle.dense(*(np.asarray(x[0, 0], np.float64) for x in arrays), causal=True)[0]
    assert relative_error(np.asarray(found[0, 0], np.float64), exact) < 2 * float(jnp.finfo(dtype).eps)


def test_few_shapes_are_traced_whatever_the_length() -> None:
    """The loops are loops: four times the tokens in as many tiers are the same program but for its sizes."""
    method = ox.Treecode(sinks=3, block=16, leaf=4, fan=64, branch=2, top=2, group=8, most=4)

    def program(n: int) -> int:
        traced = jax.jit(lambda *a: ox.attention(*a, causal=True, method=method)).trace(*[jnp.zeros((n, 6))] * 3)
        return len(str(traced.jaxpr).splitlines())

    assert program(960) <= 1.1 * program(240)


def test_what_must_look_at_numbers_is_refused() -> None:
    arrays = qkv()
    refused: list[dict[str, Any]] = [{"tol": 0.1}, {"check": True}, {"check_finite": True}, {"method": ox.LSH(bits=3)}]
    for keywords in refused:
        (name,) = keywords
        with pytest.raises(ValueError, match=f"{name} must look at numbers"):
            jax.jit(lambda *a, k=keywords: ox.attention(*a, **k))(*arrays)


def test_the_contract() -> None:
    assert "jax" in str(check_backend("jax"))


def test_the_command_line_finds_jax_s_arrays() -> None:
    (array,) = arrays_of("jax", np.ones((2, 3)))
    assert isinstance(array, jax.Array)


def test_codes_need_64_bits() -> None:
    planes = ox.random_hyperplanes(6, bits=4, tables=2)
    assert ox.hash_codes(qkv()[0], planes).dtype == jnp.int64
    jax.config.update("jax_enable_x64", False)
    try:
        x = jnp.ones((3, 6), jnp.float32)
        with pytest.raises(RuntimeError, match="JAX gives after jax.config.update"):
            ox.hash_codes(x, planes)
        assert ox.attention(x, x, x, causal=True, method=SMALL).dtype == jnp.float32  # needs no more than 32
    finally:
        jax.config.update("jax_enable_x64", True)


def test_a_cache_of_fixed_capacity_compiles_for_few_shapes() -> None:
    """Steps compile where a tier gets its first chunk or twice as many; between, nothing, whatever the length."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((heads, 200, 8))) for heads in (4, 2, 2))
    method = ox.Treecode(rtol=0.1, sinks=3, block=8, leaf=4, fan=16, branch=2, top=2, group=1, most=8)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    cache, counts, found = ox.KVCache(method, capacity=200), [], []
    for i in range(200):
        before = len(compiled)
        cache.append(k[:, i : i + 1], v[:, i : i + 1])
        found.append(cache.attend(q[:, i : i + 1]).out)
        counts.append(len(compiled) - before)
    assert counts[0] > 0
    steps = {step for step, count in enumerate(counts) if count}
    assert steps <= {0, 8, 16, 24, 40, 72, 128, 136}, steps  # a first chunk, then 2, 4 and 8 of them; the second tier
    host = [np.asarray(x) for x in (q, k, v)]
    expected = ox.attention(*host, causal=True, method=method, backend="generic", check=False)
    assert_close(np.concatenate(found, axis=1), expected, rounding(*host))
    with pytest.raises(ValueError, match=r"append and attend outside jax\.jit"):
        jax.jit(cache.attend)(q[:, :1])
