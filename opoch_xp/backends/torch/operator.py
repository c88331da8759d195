"""Attention as one operator of PyTorch: what autograd, torch.compile, torch.func and autocast see of a call.

`opoch_xp::attend` is the call, `opoch_xp::attend_backward` its gradient; both take the caller's arrays, and a method as
the numbers of its fields. A gradient is recomputed from q, k, v and the lse, so nothing but those is kept.
"""

import math
import warnings
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from opoch_xp.arguments import check_arrays, check_scale, lay_out, namespace_of, prepare, restore
from opoch_xp.backends import kernels_for
from opoch_xp.backends.torch.kernels import exact_backward
from opoch_xp.backends.torch.lsh_gradients import lsh_backward
from opoch_xp.backends.torch.tree_gradients import forest_backward
from opoch_xp.cost import visible_pairs
from opoch_xp.methods import LSH, Exact, Method, Treecode
from opoch_xp.problem import Problem, Solution
from opoch_xp.solve import choose, solve
from opoch_xp.treecode.forest import State, Tier
from opoch_xp.treecode.tree import Tree

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # out, lse, figures, seen
Gradients = tuple[Tensor, Tensor, Tensor]

PLAIN = (Tensor, torch.nn.Parameter)  # types of arrays; a subclass may compute otherwise
DISPATCH = Tensor.__torch_dispatch__
KINDS = (Exact, LSH, Treecode)
PARTS = {Exact: ("local",), LSH: ("near", "far")}  # rows of a report by part, in their places among the figures
TREE_PARTS = ("local", "sinks", "nodes", "keys")  # of a treecode, and of a method that is chosen when it runs
FIGURES = len(TREE_PARTS) + 1  # the last is `Solution.bounded`
DIGITS = 2**53  # a fraction of float64 times this is whole


def numbers(method: Method | None) -> list[int]:
    """A method as whole numbers: -1 for a field that is None, fraction and exponent for one that is no whole number. No
    number says that predicted costs choose."""
    if method is None:
        return []
    found = [KINDS.index(type(method))]
    for field in fields(method):
        value = getattr(method, field.name)
        if field.type is float:
            fraction, exponent = math.frexp(value)
            found += [int(fraction * DIGITS), exponent]
        else:
            found.append(-1 if value is None else int(value))
    return found


def named(numbers: list[int]) -> Method | None:
    """The method that `numbers` stand for; None where predicted costs choose."""
    if not numbers:
        return None
    kind, *left = (int(number) for number in numbers)
    values: dict[str, Any] = {}
    for field in fields(KINDS[kind]):
        value: Any = left.pop(0)
        if field.type is float:
            value = math.ldexp(value / DIGITS, left.pop(0))
        elif field.type is bool:
            value = bool(value)
        values[field.name] = None if value < 0 else value
    return KINDS[kind](**values)


def method_of(numbers: list[int], problem: Problem) -> Method:
    """The method that `numbers` stand for, or the one predicted cheaper on this problem."""
    return named(numbers) or choose(problem)[0]


def tier_sizes(method: Method | None, n_k: int) -> int:
    """How many sizes of chunks there are of n_k keys: at least as many as tiers that a Treecode reads, by whose number
    the operator keeps what they were told. Where the method is yet to be chosen, those of Treecode()."""
    method = Treecode() if method is None else method
    if not isinstance(method, Treecode):
        return 0
    size, found = method.block, 0
    while size <= n_k:
        size, found = size * method.fan, found + 1
    return found


def follows(*arrays: Any) -> bool:
    """Whether PyTorch follows what is computed from these arrays: for gradients or tangents, to compile, trace or batch
    it, to cast, or for a mode or a subclass of its user's."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in arrays):
        return True
    return opaque(*arrays) or watched(*arrays) or casts(arrays[0]) or has_tangent(*arrays)


def opaque(*arrays: Any) -> bool:
    """Whether the arrays hold no numbers that could be looked at: compiled, traced, batched by torch.func, of a
    subclass that has its numbers elsewhere, or shapes alone."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None  # of torch.jit
        or _transformed()
        or any(getattr(mode, "_mode_key", None) is not None for mode in _modes())  # of PyTorch's own tracers
        or any(x.device.type == "meta" or type(x).__torch_dispatch__ is not DISPATCH for x in arrays)
    )


def watched(*arrays: Any) -> bool:
    """Whether a mode of a caller's, or a subclass, is to see the operator."""
    return bool(_modes()) or any(type(x) not in PLAIN for x in arrays)


def _modes() -> list[Any]:
    """The modes of __torch_dispatch__ that are on."""
    return _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else []


def _plain(*arrays: Any) -> bool:
    """Whether nobody but autograd looks at what is computed from the arrays."""
    return not (opaque(*arrays) or watched(*arrays) or any(map(torch._C._functorch.is_legacy_batchedtensor, arrays)))


def has_tangent(*arrays: Any) -> bool:
    """Whether forward-mode differentiation follows one of the arrays."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in arrays)


def _transformed() -> bool:
    """Whether a transformation of torch.func is at work."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def casts(array: Tensor) -> bool:
    """Whether autocast is on for the array's device."""
    return array.device.type != "meta" and torch.is_autocast_enabled(array.device.type)


def cast(*arrays: Tensor) -> tuple[Tensor, ...]:
    """The arrays in the dtype of autocast, as scaled_dot_product_attention takes them: float64 stays."""
    dtype = torch.get_autocast_dtype(arrays[0].device.type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in arrays)


def without_casts(array: Tensor) -> torch.autocast:
    """The context in which nothing is cast: what is summed in float32 stays there."""
    return torch.autocast(array.device.type, enabled=False)


def attend(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, causal: bool, scale: float | None, method: list[int],
    problem: Problem | None = None,
) -> Gradients:  # fmt: skip
    """out (..., H, n_q, d_v), lse (..., H, n_q), and figures of the report, for `report_of`: see opoch_xp.attend.

    scale None is q.shape[-1] ** -0.5; problem: what the arguments were prepared to, where they were. Raises
    NotImplementedError for arrays that carry a tangent.
    """
    if has_tangent(q, k, v):
        _refuse_tangents()
    if _plain(q, k, v):
        return _Eager.apply(problem, q, k, v, key_mask, causal, scale, method)[:3]
    run = _Attend.apply if _transformed() else attend_operator
    return run(q, k, v, key_mask, causal, scale, method)[:3]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, causal: bool, scale: float | None, method: list[int], *,
    problem: Problem | None = None,
) -> Outputs:  # fmt: skip
    """`attend` on arrays that hold numbers; and seen (..., H, n_q, tiers), the log of the mass that each query had read
    before the trees of each tier, -inf where it reads none of them."""
    if problem is None:
        problem = prepare(q, k, v, causal=causal, scale=scale, key_mask=key_mask, check_finite=False)
    chosen, shape = method_of(method, problem), problem.q.shape[:3]
    tiers = tier_sizes(named(method), problem.n_k)
    seen = torch.full((*shape, tiers), -torch.inf, dtype=problem.dtype, device=q.device)

    def watch(tier: Tier, tree: Tree, runs: Any, groups: Tensor, state: State) -> None:
        seen[:, :, runs.rows, tier.number] = state[1][:, :, runs.rows]

    with without_casts(q):
        solution = solve(problem, chosen, watch)
    figures = [*(solution.rows.get(part, 0.0) for part in PARTS.get(type(chosen), TREE_PARTS)), solution.bounded]
    figures = [*figures[:-1], *[0.0] * (FIGURES - len(figures)), figures[-1]]
    out, lse = restore(q, v, solution.out, solution.lse, problem.xp)
    if any(isinstance(figure, Tensor) for figure in figures):
        found = torch.stack([torch.as_tensor(figure, device=q.device).float() for figure in figures])
    else:
        found = torch.tensor(figures, dtype=torch.float32, device=q.device)
    return out, lse, found, seen.reshape(*q.shape[:-1], seen.shape[-1])


@torch.library.custom_op("opoch_xp::attend", mutates_args=())
def attend_operator(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, causal: bool, scale: float | None, method: list[int]
) -> Outputs:
    """`_forward` as PyTorch's compiler and transformations see it."""
    return _forward(q, k, v, key_mask, causal, scale, method)


@attend_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_mask: Any, causal: bool, scale: float | None, method: list[int]) -> Outputs:
    check_arrays(q, k, v, key_mask)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:-1], dtype=wide)
    seen = q.new_empty((*q.shape[:-1], tier_sizes(named(method), k.shape[-2])), dtype=wide)
    return q.new_empty((*q.shape[:-1], v.shape[-1])), lse, q.new_empty(FIGURES, dtype=torch.float32), seen


def _backward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor, seen: Tensor, dout: Tensor,
    dlse: Tensor, causal: bool, scale: float | None, method: list[int],
) -> Gradients:  # fmt: skip
    """Gradients of q, k and v."""
    xp = namespace_of(q=q)
    problem = lay_out(xp, kernels_for(xp), q, k, v, causal, check_scale(scale, q.shape[-1]), key_mask)
    shape = problem.q.shape[:3]
    out, dout = (x.to(problem.q.dtype).reshape(*shape, v.shape[-1]) for x in (out, dout))
    alive = torch.isfinite(lse.reshape(shape))
    delta = (dout * torch.where(alive[..., None], out, 0.0)).sum(-1) - dlse.to(problem.q.dtype).reshape(shape)
    seen = seen.reshape(*shape, seen.shape[-1])
    with without_casts(q):
        dq, dk, dv = gradients(problem, method_of(method, problem), lse.reshape(shape), seen, dout, delta)
    dq = torch.where(torch.isnan(lse.reshape(shape))[..., None], torch.nan, dq)
    if problem.mask is not None:
        dk, dv = (torch.where(problem.mask[..., None], x, 0.0) for x in (dk, dv))
    return _like(dq, q), _like(dk, k), _like(dv, v)


def _like(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(like.shape).to(like.dtype).contiguous()


@torch.library.custom_op("opoch_xp::attend_backward", mutates_args=())
def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor, seen: Tensor, dout: Tensor,
    dlse: Tensor, causal: bool, scale: float | None, method: list[int],
) -> Gradients:  # fmt: skip
    """`_backward`, likewise."""
    return _backward(q, k, v, key_mask, out, lse, seen, dout, dlse, causal, scale, method)


@attend_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Gradients:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def exact_rows(q: Tensor, k: Tensor, causal: bool) -> float:
    """Rows that exact attention reads a query, as a report has them."""
    n_q, n_k = q.shape[-2], k.shape[-2]
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:  # sizes are tensors
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            n_q, n_k = int(n_q), int(n_k)
    return visible_pairs(n_q, n_k, causal) / max(n_q, 1)


def report_of(method: Method | None, figures: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What `Solution` calls rows and bounded, of the figures of `attend`."""
    parts = TREE_PARTS if method is None else PARTS.get(type(method), TREE_PARTS)
    return {part: figures[i] for i, part in enumerate(parts)}, figures[-1]


def solution(problem: Problem, method: Method, out: Tensor, lse: Tensor, figures: Tensor) -> Solution:
    """What `attend` returned, in the layout of the problem."""
    shape = problem.q.shape[:3]
    out = out.detach().to(problem.q.dtype).reshape(*shape, out.shape[-1])
    return Solution(out, lse.detach().reshape(shape), *report_of(method, figures))


def gradients(problem: Problem, method: Method, lse: Tensor, seen: Tensor, dout: Tensor, delta: Tensor) -> Gradients:
    """Gradients in the layout of the problem: see opoch_xp.backends.torch.tree_gradients.forest_backward."""
    q, k, v = problem.q, problem.k, problem.v
    if 0 in q.shape[:3]:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if v.shape[2] == 0:  # the gradient of the lse is still wanted
        one = replace(problem, v=v.new_zeros(*v.shape[:2], 1))
        dq, dk, _ = gradients(one, method, lse, seen, dout.new_zeros(*dout.shape[:3], 1), delta)
        return dq, dk, torch.zeros_like(v)
    if isinstance(method, Treecode):
        return forest_backward(problem, method, lse, seen, dout, delta)
    if isinstance(method, LSH):
        return lsh_backward(problem, method, lse, dout, delta)
    return exact_backward(q, k, v, lse, dout, delta, causal=problem.causal, scale=problem.scale, mask=problem.mask)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    q, k, v, key_mask, *ctx.options = inputs
    out, lse, figures, seen = output
    ctx.save_for_backward(q, k, v, key_mask, out, lse, seen)
    ctx.mark_non_differentiable(figures, seen)


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor, *_: Tensor) -> tuple[Any, ...]:
    run = _EagerBackward.apply if _plain(dout, dlse) else _AttendBackward.apply if _transformed() else attend_backward
    return (*run(*ctx.saved_tensors, dout, dlse, *ctx.options), None, None, None, None)


def _refuse_tangents() -> None:
    raise NotImplementedError(
        "opoch_xp.attention has no forward-mode derivative: differentiate backward, or use backend='generic'"
    )


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "opoch_xp.attention can be differentiated once, not twice: its gradient has no gradient of its own; use"
        " backend='generic' for second derivatives"
    )


attend_operator.register_autograd(_differentiate, setup_context=_keep)
attend_backward.register_autograd(_refuse, setup_context=lambda ctx, inputs, output: None)


class _Eager(torch.autograd.Function):
    """The operator where nobody but autograd looks: the dispatcher takes longer than a small call."""

    @staticmethod
    def forward(ctx: Any, problem: Problem | None, *inputs: Any) -> Outputs:
        found = _forward(*inputs, problem=problem)
        _keep(ctx, inputs, found)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *_differentiate(ctx, *gradients)


class _EagerBackward(torch.autograd.Function):
    """Its gradient, likewise."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Gradients:
        return _backward(*inputs)

    backward = staticmethod(_refuse)


class _Attend(torch.autograd.Function):
    """The operator for transformations of torch.func, which take no gradient registered with an operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Outputs:
        return attend_operator(*inputs)

    setup_context = staticmethod(_keep)
    backward = staticmethod(_differentiate)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _refuse_tangents()


class _AttendBackward(torch.autograd.Function):
    """Its gradient, likewise."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Gradients:
        return attend_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        pass

    backward = staticmethod(_refuse)


def _front(x: Any, axis: int | None, size: int) -> Any:
    """x with the axis that torch.func.vmap batches in front, repeated where x is the same for all."""
    if x is None:
        return None
    return x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)


def _headed(x: Tensor, flat: bool) -> Tensor:
    """A batch of arrays of one head (V, n, ...) as (V, 1, n, ...)."""
    return x[:, None] if flat else x


@attend_operator.register_vmap
def _(info: Any, axes: tuple[Any, ...], *inputs: Any) -> Any:
    *arrays, causal, scale, method = inputs
    q, k, v, mask = (_front(x, axis, info.batch_size) for x, axis in zip(arrays, axes, strict=False))
    flat = q.ndim == 3
    out, lse, figures, seen = attend_operator(*(_headed(x, flat) for x in (q, k, v)), mask, causal, scale, method)
    out, lse, seen = (x[:, 0] if flat else x for x in (out, lse, seen))
    return (out, lse, figures, seen), (0, 0, None, 0)


@attend_backward.register_vmap
def _(info: Any, axes: tuple[Any, ...], *inputs: Any) -> Any:
    *arrays, causal, scale, method = inputs
    arrays = [_front(x, axis, info.batch_size) for x, axis in zip(arrays, axes, strict=False)]
    flat = arrays[0].ndim == 3
    mask = arrays.pop(3)
    q, k, v, *rest = (_headed(x, flat) for x in arrays)
    found = attend_backward(q, k, v, mask, *rest, causal, scale, method)
    return tuple(x[:, 0] if flat else x for x in found), (0, 0, 0)
