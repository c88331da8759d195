"""What PyTorch follows: gradients, torch.compile, torch.func, autocast, meta tensors; and what it must be told."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import opoch_xp as ox  # noqa: E402
from opoch_xp.arguments import prepare  # noqa: E402
from opoch_xp.backends.torch.operator import gradients, method_of, numbers  # noqa: E402

SMALL = ox.Treecode(rtol=0.5, sinks=3, block=16, leaf=4, fan=4, branch=2, top=2, group=8, least=2)
BOUND = ox.Treecode(rtol=0.4, sinks=0, block=16, leaf=2, fan=4, branch=4, top=4, group=5, least=0, most=2)
SINGLE = ox.Treecode(rtol=0.3, sinks=20, block=16, leaf=1, fan=2, branch=2, top=4, group=1, least=1)
BUCKETS = ox.LSH(bits=3, tables=2)
ALONE = ox.LSH(bits=6, tables=1, max_bucket=2)  # many queries without a candidate: the mean field's gradient
WINDOW = ox.LSH(bits=2, tables=2, window=3, center=False)
METHODS = (SMALL, BOUND, SINGLE, ox.Exact(), BUCKETS, ALONE, ox.LSH(bits=0))


def qkv(*lead: int, n: int = 60, d: int = 6, dtype: Any = torch.float64, grad: bool = True, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    shape = (*lead, n, d)
    return [torch.randn(shape, dtype=dtype, generator=generator).requires_grad_(grad) for _ in range(3)]


def grouped(seed: int = 0, n_q: int = 80, n_k: int = 110) -> Any:
    """Four query heads on two key heads, values of another width; logits that are not flat."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (1, 4, n_q, 6), (1, 2, n_k, 6), (1, 2, n_k, 5)
    return [(1.5 * torch.randn(s, dtype=torch.float64, generator=generator)).requires_grad_() for s in shapes]


def call(method: Any, **keywords: Any) -> Callable[..., Any]:
    def attend(*arrays: Any) -> Any:
        found = ox.attend(*arrays, method=method, **keywords)
        return found.out, torch.where(torch.isfinite(found.lse), found.lse, 0.0)  # rows that see nothing: -inf

    return attend


def kept(hidden: int, n_k: int = 110) -> Any:
    """A mask that hides the first keys, which are the sinks, and some of the others."""
    mask = torch.rand(1, n_k, generator=torch.Generator().manual_seed(3)) < 0.7
    mask[:, :hidden] = False
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", [*METHODS, WINDOW], ids=repr)
def test_gradients_of_out_and_lse(method: Any, causal: bool, masked: bool) -> None:
    if getattr(method, "window", 0) and not causal:
        pytest.skip("a window is causal")
    mask = kept(20) if masked else None
    assert torch.autograd.gradcheck(call(method, causal=causal, key_mask=mask), grouped(), fast_mode=True)


@pytest.mark.parametrize("hidden", [None, 2, 20])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_q", [80, 120])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_gradients_equal_those_through_the_generic_kernels(method: Any, n_q: int, causal: bool, hidden: Any) -> None:
    """Every entry of every gradient; also where queries outnumber keys and some see nothing, and sinks are hidden."""
    q, k, v = grouped(5, n_q=n_q)
    mask = None if hidden is None else kept(hidden)
    found = []
    for backend in ("generic", "torch"):
        out, lse = call(method, causal=causal, key_mask=mask, backend=backend)(q, k, v)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        found.append(torch.autograd.grad((out * weight).sum() + lse.square().sum(), (q, k, v)))
    for generic, ours in zip(*found, strict=True):
        assert float((generic - ours).abs().max()) <= 1e-11 * float(generic.abs().max())
    if mask is not None:
        assert not any(x[:, :, ~mask[0]].any() for x in found[1][1:])


def test_gradients_where_most_is_closed_and_where_nothing_is() -> None:
    """The inputs above take every path: some nodes stay closed, some cells are read by some queries of a group."""
    read = ox.attend(*grouped(5), causal=True, method=SMALL).report.rows
    assert read["nodes"] > 4
    assert 4 < read["keys"] < 50
    assert ox.attend(*grouped(5), causal=True, method=BOUND).report.bounded > 0


@pytest.mark.parametrize("method", [SMALL, SINGLE], ids=repr)
def test_arrays_may_lie_in_memory_as_models_have_them(method: Any) -> None:
    """Heads beside one another: neither arrays nor gradients are contiguous."""
    right = grouped()
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in right]
    found = []
    for arrays in (right, strided):
        out, lse = call(method, causal=True)(*arrays)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
        found.append((out, lse, *torch.autograd.grad((out * weight).sum() + lse.sum(), arrays)))
    for ours, other in zip(*found, strict=True):
        assert float((ours - other).detach().abs().max()) <= 1e-12 * float(other.detach().abs().max())


@pytest.mark.parametrize("method", [SMALL, ox.Exact()], ids=repr)
def test_the_gradient_of_lse_without_values(method: Any) -> None:
    q, k, v = grouped()
    found = []
    for values in (v, v[..., :0]):
        lse = ox.attend(q, k, values, causal=False, method=method).lse
        found.append(torch.autograd.grad(lse.square().sum(), (q, k)))
    for ours, right in zip(*found, strict=True):
        assert float((ours - right).abs().max()) <= 1e-12 * float(right.abs().max())


def test_gradients_of_a_spoiled_query_stay_in_its_row() -> None:
    q, k, v = qkv(n=64)
    clean = torch.autograd.grad(ox.attention(q, k, v, causal=True, method=ox.Exact())[:60].sum(), (q, k, v))
    bad = q.detach().clone()
    bad[61] = torch.nan
    bad.requires_grad_()
    for method in (ox.Exact(), SMALL):
        out = ox.attention(bad, k, v, causal=True, method=method)
        found = torch.autograd.grad(out.sum(), (bad, k, v))
        assert torch.isnan(out[61]).all()
        assert torch.isnan(found[0][61]).all()
        assert all(torch.isfinite(g).all() for g in (found[0][:61], *found[1:]))
    out = ox.attention(bad, k, v, causal=True, method=ox.Exact())[:60].sum()
    for ours, right in zip(torch.autograd.grad(out, (bad, k, v)), clean, strict=True):
        keep = torch.isfinite(ours)
        assert float((ours - right)[keep].abs().max()) < 1e-12


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2)])
def test_some_inputs_alone_need_a_gradient(which: tuple[int, ...]) -> None:
    arrays = qkv(2)
    whole = torch.autograd.grad(ox.attention(*arrays, causal=True, method=SMALL).square().sum(), arrays)
    some = [x.detach().requires_grad_(i in which) for i, x in enumerate(arrays)]
    ox.attention(*some, causal=True, method=SMALL).square().sum().backward()
    for i, x in enumerate(some):
        assert torch.equal(x.grad, whole[i]) if i in which else x.grad is None


def test_no_grad_keeps_nothing_and_gives_the_same() -> None:
    arrays = qkv(2)
    followed = ox.attention(*arrays, causal=True, method=SMALL)
    with torch.no_grad():
        out = ox.attention(*arrays, causal=True, method=SMALL)
    assert followed.requires_grad
    assert not out.requires_grad
    assert torch.equal(out, followed)


def test_a_second_derivative_is_refused() -> None:
    q, k, v = qkv(2)
    first = torch.autograd.grad(ox.attention(q, k, v, method=SMALL).square().sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiated once, not twice"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_have_the_dtype_of_their_inputs(dtype: Any) -> None:
    wide = qkv(2, dtype=torch.float64)
    right = torch.autograd.grad(ox.attention(*wide, causal=True, method=ox.Exact()).square().sum(), wide)
    low = [x.detach().to(dtype).requires_grad_() for x in wide]
    out = ox.attention(*low, causal=True, method=ox.Exact())
    found = torch.autograd.grad(out.float().square().sum(), low)
    assert out.dtype == dtype
    for ours, exact in zip(found, right, strict=True):
        assert ours.dtype == dtype
        error = float((ours.double() - exact).norm() / exact.norm())
        assert error < 8 * torch.finfo(dtype).eps  # inputs, output, gradient in, gradient out: each rounded once


@pytest.mark.parametrize("method", [SMALL, ox.Exact(), BUCKETS, None], ids=repr)
def test_compiles_whole_forward_and_backward(method: Any) -> None:
    arrays = qkv(2, 2, dtype=torch.float32)

    def loss(q: Any, k: Any, v: Any) -> Any:
        return ox.attention(2 * q, k, v, causal=True, method=method).square().sum()

    eager = loss(*arrays)
    right = torch.autograd.grad(eager, arrays)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the compiler's own
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        found = compiled(*arrays)
        gradients = torch.autograd.grad(found, arrays)
    assert torch.equal(found, eager)
    assert all(torch.equal(a, b) for a, b in zip(gradients, right, strict=True))


def test_compiles_for_lengths_that_change() -> None:
    """The number of tiers, which the operator keeps an array of each for, follows from them."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = torch.compile(call(SMALL, causal=True), fullgraph=True, backend="aot_eager", dynamic=True)
        for n in (70, 90, 12, 20):
            arrays = qkv(2, n=n)
            ours, right = (function(*arrays) for function in (compiled, call(SMALL, causal=True)))
            assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))
            ours, right = (torch.autograd.grad(out.square().sum() + lse.sum(), arrays) for out, lse in (ours, right))
            assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))


@pytest.mark.parametrize("method", [SMALL, ox.Exact(), BUCKETS, None], ids=repr)
def test_the_operator_keeps_its_promises_to_the_compiler(method: Any) -> None:
    q, k, v = qkv(2, 2, n=70, dtype=torch.float32)
    given = (q, k, v, None, True, 0.3, numbers(method))
    for strided in (False, True):  # heads beside one another, as models have them
        if strided:
            given = (
                *(x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in given[:3]),
                *given[3:],
            )
        found = torch.library.opcheck(torch.ops.opoch_xp.attend.default, given)
        assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "method",
    [
        SMALL,
        BOUND,
        ox.Treecode(rtol=0, seed=2**60 + 1),
        ox.Treecode(rtol=1e-300, sinks=0),
        ox.Treecode(rtol=1 - 2**-53),
        ox.Exact(),
        BUCKETS,
        ALONE,
        None,
    ],
    ids=repr,
)
def test_a_method_survives_as_numbers(method: Any) -> None:
    problem = prepare(*qkv(grad=False))
    assert method_of(numbers(method), problem) == (ox.Exact() if method is None else method)


@pytest.mark.parametrize("method", [SMALL, BOUND, ox.Exact(), BUCKETS, None], ids=repr)
def test_reports_say_the_same_however_a_call_is_followed(method: Any) -> None:
    """The parts that were read, with autograd, compiled, cast and without; compiled calls choose when they run."""
    arrays = qkv(2, 2, n=100, dtype=torch.float32)

    def report(*arrays: Any) -> Any:
        return ox.attend(*arrays, causal=True, method=method, check=False).report

    def figures(*arrays: Any) -> Any:
        found = report(*arrays)
        return {**found.read, "bounded": found.met_bound}

    with torch.no_grad():
        plain = report(*arrays)
    followed = report(*arrays)
    assert list(followed.rows) == list(plain.rows)
    assert followed.rows == pytest.approx(plain.rows)
    assert followed.bounded == plain.bounded == pytest.approx(plain.bounded)
    assert followed.pairs == pytest.approx(plain.pairs)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = torch.compile(figures, fullgraph=True, backend="aot_eager")(*arrays)
    found = {part: float(rows) for part, rows in compiled.items()}
    unknown = {"sinks": 0.0, "nodes": 0.0, "keys": 0.0} if method is None else {}
    assert found == pytest.approx({**plain.rows, **unknown, "bounded": plain.bounded})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = report(*arrays)
    assert list(cast.rows) == list(plain.rows)
    assert cast.pairs == pytest.approx(plain.pairs, rel=0.1)


def test_vmap_and_grad_of_torch_func() -> None:
    q, k, v = qkv(3, 2, grad=False)

    def one(q: Any, k: Any, v: Any) -> Any:
        return ox.attention(q, k, v, causal=True, method=SMALL)

    def slope(q: Any, k: Any, v: Any) -> Any:
        return torch.func.grad(lambda q: one(q, k, v).square().sum())(q)

    for function in (one, slope):
        right = torch.stack([function(*x) for x in zip(q, k, v, strict=True)])
        assert float((torch.func.vmap(function)(q, k, v) - right).abs().max()) < 1e-12
    right = torch.stack([one(x, k[0, 0], v[0, 0]) for x in q[:, 0]])  # one head, keys shared by the batch
    assert float((torch.func.vmap(one, in_dims=(0, None, None))(q[:, 0], k[0, 0], v[0, 0]) - right).abs().max()) < 1e-12


def test_autocast_decides_the_dtype() -> None:
    arrays = qkv(2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = ox.attention(*arrays, method=SMALL)
        theirs = torch.nn.functional.scaled_dot_product_attention(*(x[None] for x in arrays))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    gradient = torch.autograd.grad(ours.float().sum(), arrays)
    assert all(g.dtype == torch.float32 for g in gradient)


def test_meta_tensors_give_shapes() -> None:
    q, k, v = (
        torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in ((2, 8, 50, 16), *[(2, 2, 70, 16)] * 2)
    )
    found = ox.attend(q, k, v[..., :12], causal=True)
    assert found.out.shape == (2, 8, 50, 12)
    assert found.lse.shape == (2, 8, 50)
    assert (found.out.device.type, found.out.dtype, found.lse.dtype) == ("meta", torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="heads of q must be a multiple"):
        ox.attend(q[:, :3], k, v)
    with pytest.raises(ValueError, match="tol must look at numbers"):
        ox.attend(q, k, v, tol=0.1)


def test_deterministic_mode_gives_the_same_bits() -> None:
    arrays = qkv(2, n=300, dtype=torch.float32)
    found = []
    for flag in (False, True, True):
        torch.use_deterministic_algorithms(flag)
        try:
            out = ox.attention(*arrays, causal=True, method=SMALL)
            found.append((out, *torch.autograd.grad(out.square().sum(), arrays)))
        finally:
            torch.use_deterministic_algorithms(False)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_causal_is_that_of_scaled_dot_product_attention() -> None:
    from torch.nn.attention.bias import causal_lower_right

    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v = qkv(1, 2, grad=False)
    right = sdpa(q, k, v, is_causal=True)
    assert float((ox.attention(q, k, v, causal=True) - right).abs().max()) < 1e-12
    right = sdpa(q[:, :, :20], k, v, attn_mask=causal_lower_right(20, 60))
    assert float((ox.attention(q[:, :, :20], k, v, causal=True) - right).abs().max()) < 1e-12


def test_tensors_that_cannot_be_read_are_named() -> None:
    q, k, v = qkv(2, grad=False)
    with pytest.raises(TypeError, match="k must be a dense array, got one that is sparse_coo"):
        ox.attention(q, k.to_sparse(), v)
    with pytest.raises(ValueError, match="one device, got q: cpu, k: meta, v: cpu"):
        ox.attention(q, k.to("meta"), v)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype, and say so
        nested = torch.nested.nested_tensor([q[0], q[1]])
    with pytest.raises(TypeError, match="v must be a dense array, got one that is nested"):
        ox.attention(q, k, nested)
    with torch.inference_mode():
        seen = torch.randn(2, 60, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        ox.attention(seen, k.clone().requires_grad_(), v)


def test_figures_of_a_report_wait_until_they_are_asked_for() -> None:
    found = ox.attend(*qkv(2), method=BUCKETS)
    assert isinstance(found.report.read["near"], torch.Tensor)
    assert 0 < found.report.rows["near"] <= 60
    assert isinstance(found.report.pairs, float)


def test_memory_stays_linear() -> None:
    """No array as long as the sequence times itself: the largest that is made has fewer entries than n * n / 4."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes() // x.element_size())
            return out

    n, method = 8192, ox.Treecode()
    q, k, v = qkv(1, n=n, d=8, dtype=torch.float32, grad=False)
    problem = prepare(q, k, v, causal=True)
    assert problem.kernels.name == "torch"
    seen = torch.zeros(1, 1, n, 2)
    with Watch():
        out, lse = (
            getattr(ox.attend(q, k, v, causal=True, method=method, check=False), name) for name in ("out", "lse")
        )
        ox.attention(q, k, v, causal=True, method=ox.Exact())
        gradients(problem, method, lse[:, None], seen, torch.ones_like(out)[:, None], lse[:, None])
    assert 0 < largest < n * n // 4


def test_a_bound_among_equals_loses_nothing() -> None:
    """All nodes of a level hold the same: those that are not opened stay closed."""
    from opoch_xp.backends import generic
    from opoch_xp.backends.torch import tree

    method = ox.Treecode(rtol=0.001, sinks=0, block=64, leaf=2, fan=4, branch=4, top=4, group=16, most=3)
    queries, keys, values = (x[None] for x in qkv(n=16, grad=False))
    k, v = (x[:, :2].repeat(3, 32, 1) for x in (keys, values))
    built = generic.build_tree(k, v, None, method, order=torch.arange(64).repeat(3, 1))
    given = 3 * queries, built, np.array([0]), np.array([3]), torch.arange(16)[None], method
    seen = torch.full((1, 16), -torch.inf, dtype=torch.float64)
    ours, right = (kernels.tree_attention(*given, scale=0.4, seen=seen) for kernels in (tree, generic))
    assert torch.equal(ours.read, right.read)
    assert float((ours.lse - right.lse).abs().max()) < 1e-12


def test_results_equal_those_of_numpy() -> None:
    """Everything opened, float32: two libraries, one definition."""
    arrays = qkv(2, 3, n=500, dtype=torch.float32, grad=False)
    opened = ox.Treecode(rtol=0, block=64, fan=4)
    ours = ox.attention(*arrays, causal=True, method=opened)
    theirs = ox.attention(*(x.numpy() for x in arrays), causal=True, method=opened)
    assert np.abs(ours.numpy() - theirs).max() < 1e-5


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_forward_mode_is_refused_and_the_generic_kernels_have_it() -> None:
    q, k, v = qkv(2, grad=False)
    tangent = torch.ones_like(q)
    with torch.autograd.forward_ad.dual_level():
        for name in range(3):
            duals = [
                torch.autograd.forward_ad.make_dual(x, tangent) if i == name else x for i, x in enumerate((q, k, v))
            ]
            for method in (SMALL, ox.Exact(), BUCKETS, None):
                with pytest.raises(NotImplementedError, match="no forward-mode derivative.* backend='generic'"):
                    ox.attention(*duals, method=method)
            with pytest.raises(ValueError, match="carries no tangents"):
                ox.KVCache(SMALL).prefill(*duals)
        dual = torch.autograd.forward_ad.make_dual(q, tangent)
        found = torch.autograd.forward_ad.unpack_dual(ox.attention(dual, k, v, method=SMALL, backend="generic")).tangent
    step = 1e-6  # the choices that a treecode makes stay as they are in a step so small
    ahead, behind = (ox.attention(q + s * tangent, k, v, method=SMALL, backend="generic") for s in (step, -step))
    assert float((found - (ahead - behind) / (2 * step)).abs().max()) < 1e-7
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: ox.attention(q, k, v, method=SMALL), (q,), (tangent,))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("grad", [False, True])
def test_a_trace_holds_the_operator(scale: float | None, grad: bool) -> None:
    arrays = qkv(2, grad=grad)
    traced = torch.jit.trace(lambda *x: ox.attention(*x, causal=True, scale=scale, method=SMALL), arrays)
    others = qkv(2, n=77, seed=1)
    right = ox.attention(*others, causal=True, scale=scale, method=SMALL)
    assert torch.equal(traced(*others), right)


def test_modes_see_the_operator() -> None:
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    arrays = qkv(2, grad=False)
    right = ox.attention(*arrays, method=SMALL)
    with Mode():
        out = ox.attention(*arrays, method=SMALL)
    assert "opoch_xp.attend.default" in seen
    assert torch.equal(out, right)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_the_operator(mode: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    arrays, others = qkv(2, grad=False), qkv(2, grad=False, seed=1)
    graph = make_fx(lambda *x: ox.attention(*x, causal=True, method=SMALL), tracing_mode=mode)(*arrays)
    assert torch.equal(graph(*others), ox.attention(*others, causal=True, method=SMALL))


def test_a_head_size_may_be_dynamic_in_an_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return ox.attention(q, k, v, causal=True, method=SMALL)

    size = torch.export.Dim("size", min=2, max=64)
    exported = torch.export.export(Model(), tuple(qkv(2, grad=False)), dynamic_shapes=[{2: size}] * 3)
    others = qkv(2, d=9, grad=False)
    assert torch.equal(exported.module()(*others), ox.attention(*others, causal=True, method=SMALL))


def test_a_subclass_gets_the_operator_and_a_parameter_is_no_subclass() -> None:
    class Own(torch.Tensor):
        pass

    q, k, v = qkv(2, grad=False)
    right = ox.attention(q, k, v, method=SMALL)
    out = ox.attention(q.as_subclass(Own), k, v, method=SMALL)
    assert type(out) is Own
    assert torch.equal(out.as_subclass(torch.Tensor), right)
    for array in (q.as_subclass(Own), torch.nn.Parameter(q, requires_grad=False)):
        assert torch.equal(ox.attention(array, k, v, tol=0.1).as_subclass(torch.Tensor), ox.attention(q, k, v, tol=0.1))
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(ValueError, match="tol must look at numbers"):
        ox.attention(*map(mode.from_tensor, (q, k, v)), tol=0.1)


def test_gradients_for_several_outputs_at_once() -> None:
    arrays = qkv(2)
    out = ox.attention(*arrays, causal=True, method=SMALL)
    several = torch.randn(3, *out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))

    def gradients(one: Any) -> Any:
        return torch.autograd.grad(out, arrays, one, retain_graph=True)

    right = [torch.stack(x) for x in zip(*map(gradients, several), strict=True)]
    batched = torch.func.vmap(gradients)(several)
    legacy = torch.autograd.grad(out, arrays, several, retain_graph=True, is_grads_batched=True)
    for found in (batched, legacy):
        for ours, other in zip(found, right, strict=True):
            assert float((ours - other).abs().max()) <= 1e-12 * float(other.abs().max())


@pytest.mark.parametrize("backend", [None, "generic"])
@pytest.mark.parametrize("method", [SMALL, ox.Exact(), BUCKETS, None], ids=repr)
def test_views_that_say_that_they_are_negated(method: Any, backend: str | None) -> None:
    plain = qkv(2, grad=False)
    views = [torch.complex(x, -x).conj().imag for x in plain]
    assert all(x.is_neg() for x in views)
    right = ox.attend(*plain, causal=True, method=method, backend=backend)
    found = ox.attend(*views, causal=True, method=method, backend=backend)
    assert torch.equal(found.out, right.out)
    assert torch.equal(found.lse, right.lse)
    audits = [ox.audit(*x, causal=True, method=method, rows=8) for x in (plain, views) if method is not None]
    assert len({str(audit.error) for audit in audits}) < 2
    gradients = [
        torch.autograd.grad(ox.attention(*x, method=SMALL).sum(), x) for x in (map_grad(plain), map_grad(views))
    ]
    assert all(torch.equal(ours, other) for ours, other in zip(*gradients, strict=True))


def map_grad(arrays: Any) -> list[Any]:
    return [x.detach().requires_grad_() for x in arrays]


def test_negated_views_in_a_cache_and_an_index() -> None:
    q, k, v = qkv(2, grad=False)
    negated = [torch.complex(x, -x).conj().imag for x in (q, k, v)]
    found = []
    for arrays in ((q, k, v), negated):
        cache, index = ox.KVCache(SMALL), ox.LSHIndex(6, bits=2, tables=2)
        index.add(arrays[1][0])
        prompt = cache.prefill(*arrays)
        found.append((prompt.out, cache.attend(arrays[0][:, -1:]).out, index.search(arrays[0][0], 3).scores))
    assert all(torch.equal(ours, other) for ours, other in zip(*found, strict=True))


def test_a_scale_may_be_an_array_of_one_number_and_no_parameter() -> None:
    arrays = qkv(2, grad=False)
    right = ox.attention(*arrays, scale=0.25, method=SMALL)
    for scale in (torch.tensor(0.25), np.float32(0.25), np.array(0.25)):
        assert torch.equal(ox.attention(*arrays, scale=scale, method=SMALL), right)
    for scale, words in (
        (torch.tensor([0.25]), r"tensor\(\[0.2500\]\)"),
        (torch.tensor(0.25, requires_grad=True), "one that requires gradients: multiply q by it"),
        (1j, "1j"),
    ):
        with pytest.raises(TypeError, match=f"scale must be a finite number, got {words}"):
            ox.attention(*arrays, scale=scale, method=SMALL)


@pytest.mark.parametrize("shapes", [((0, 4), 30, 8), ((2, 0), 30, 8), ((2, 4), 0, 8), ((2, 4), 30, 0)], ids=str)
@pytest.mark.parametrize("method", [SMALL, ox.Exact(), BUCKETS, None], ids=repr)
def test_nothing_to_do_has_gradients_of_zero(method: Any, shapes: Any) -> None:
    lead, n_q, width = shapes
    arrays = [torch.ones(*lead, *s, requires_grad=True) for s in ((n_q, 8), (30, 8), (30, width))]
    out = ox.attention(*arrays, method=method)
    assert out.shape == (*lead, n_q, width)
    for x, gradient in zip(arrays, torch.autograd.grad(out.sum(), arrays), strict=True):
        assert gradient.shape == x.shape
        assert not gradient.any()
