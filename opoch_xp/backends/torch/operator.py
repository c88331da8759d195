"""Attention as one operator of PyTorch: what autograd, torch.compile, torch.func and autocast see of a call.

`opoch_xp::attend` is the call, `opoch_xp::attend_backward` its gradient; both take the caller's arrays, and a method as
the numbers of its fields. A gradient is recomputed from q, k, v and the lse, so nothing but those is kept.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from opoch_xp.arguments import check_arrays, prepare, restore
from opoch_xp.backends.torch.exact import exact_backward
from opoch_xp.backends.torch.lsh_gradients import lsh_backward
from opoch_xp.backends.torch.tree_gradients import forest_backward
from opoch_xp.cost import visible_pairs
from opoch_xp.forest import rows_per_query
from opoch_xp.methods import LSH, Exact, Method, Treecode
from opoch_xp.problem import Problem, Solution
from opoch_xp.solve import choose, solve

Outputs = tuple[Tensor, Tensor, Tensor]  # out, lse, figures

KINDS = (Exact, LSH, Treecode)
FIGURES = ("near", "far")  # rows that LSH only knows when it has run


def numbers(method: Method | None) -> list[int]:
    """A method as whole numbers, -1 for a field that is None; no number says that predicted costs choose."""
    if method is None:
        return []
    values = [getattr(method, field.name) for field in fields(method)]
    return [KINDS.index(type(method)), *(-1 if value is None else int(value) for value in values)]


def method_of(numbers: list[int], problem: Problem) -> Method:
    """The method that `numbers` stand for, or the one predicted cheaper on this problem."""
    if not numbers:
        return choose(problem)[0]
    kind, *values = numbers
    named: dict[str, Any] = {
        field.name: bool(value) if field.type in (bool, "bool") else None if value < 0 else value
        for field, value in zip(fields(KINDS[kind]), values, strict=True)
    }
    return KINDS[kind](**named)


def follows(*arrays: Any) -> bool:
    """Whether PyTorch follows what is computed from these arrays: for gradients, to compile or batch it, or to cast."""
    return opaque(*arrays) or (torch.is_grad_enabled() and any(x.requires_grad for x in arrays)) or casts(arrays[0])


def opaque(*arrays: Any) -> bool:
    """Whether the arrays hold no numbers that could be looked at: compiled, batched by torch.func, or shapes alone."""
    return (
        torch.compiler.is_compiling()
        or _transformed()
        or any(x.device.type == "meta" or type(x).__name__ == "FakeTensor" for x in arrays)
    )


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
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, causal: bool, scale: float, method: list[int]
) -> Outputs:
    """out (..., H, n_q, d_v), lse (..., H, n_q), and the figures of LSH (2,): see opoch_xp.attend."""
    run = _Attend.apply if _transformed() else attend_operator
    return run(q, k, v, key_mask, causal, scale, method)


@torch.library.custom_op("opoch_xp::attend", mutates_args=())
def attend_operator(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, causal: bool, scale: float, method: list[int]
) -> Outputs:
    """`attend` on arrays that hold numbers."""
    problem = prepare(q, k, v, causal=causal, scale=scale, key_mask=key_mask, check_finite=False)
    with without_casts(q):
        solution = solve(problem, method_of(method, problem))
    figures = [torch.as_tensor(solution.rows.get(name, 0.0), device=q.device).float() for name in FIGURES]
    out, lse = restore(q, v, solution.out, solution.lse, problem.xp)
    return out, lse, torch.stack(figures)


@attend_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_mask: Any, causal: bool, scale: float, method: list[int]) -> Outputs:
    check_arrays(q, k, v, key_mask)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:-1], dtype=wide)
    return q.new_empty((*q.shape[:-1], v.shape[-1])), lse, q.new_empty(2, dtype=torch.float32)


@torch.library.custom_op("opoch_xp::attend_backward", mutates_args=())
def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
    causal: bool, scale: float, method: list[int],
) -> Outputs:  # fmt: skip
    """Gradients of q, k and v."""
    problem = prepare(q, k, v, causal=causal, scale=scale, key_mask=key_mask, check_finite=False)
    shape = problem.q.shape[:3]
    out, dout = (x.to(problem.q.dtype).reshape(*shape, v.shape[-1]) for x in (out, dout))
    seen = torch.isfinite(lse.reshape(shape))
    delta = (dout * torch.where(seen[..., None], out, 0.0)).sum(-1) - dlse.to(problem.q.dtype).reshape(shape)
    with without_casts(q):
        dq, dk, dv = gradients(problem, method_of(method, problem), lse.reshape(shape), dout, delta)
    dq = torch.where(torch.isnan(lse.reshape(shape))[..., None], torch.nan, dq)
    if problem.mask is not None:
        dk, dv = (torch.where(problem.mask[..., None], x, 0.0) for x in (dk, dv))
    return _like(dq, q), _like(dk, k), _like(dv, v)


def _like(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(like.shape).to(like.dtype)


@attend_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Outputs:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def solution(problem: Problem, method: Method, out: Tensor, lse: Tensor, figures: Tensor) -> Solution:
    """What `attend` gave, as the solution of the problem posed by the same arrays: no gradient follows it."""
    shape = problem.q.shape[:3]
    if isinstance(method, LSH):
        rows: dict[str, Any] = dict(zip(FIGURES, figures, strict=True))
    elif isinstance(method, Treecode):
        rows = rows_per_query(problem.n_q, problem.n_k, problem.causal, method)
    else:
        rows = {"local": visible_pairs(problem.n_q, problem.n_k, problem.causal) / max(problem.n_q, 1)}
    out = out.detach().to(problem.q.dtype).reshape(*shape, -1)
    return Solution(out, lse.detach().reshape(shape), rows)


def gradients(problem: Problem, method: Method, lse: Tensor, dout: Tensor, delta: Tensor) -> Outputs:
    """Gradients in the layout of the problem: see opoch_xp.backends.torch.tree_gradients.forest_backward."""
    if 0 in problem.q.shape[:3]:
        return torch.zeros_like(problem.q), torch.zeros_like(problem.k), torch.zeros_like(problem.v)
    if isinstance(method, Treecode):
        return forest_backward(problem, method, lse, dout, delta)
    if isinstance(method, LSH):
        return lsh_backward(problem, method, lse, dout, delta)
    return exact_backward(
        problem.q, problem.k, problem.v, lse, dout, delta, causal=problem.causal, scale=problem.scale, mask=problem.mask
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    q, k, v, key_mask, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, key_mask, *output[:2])
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor, _: Tensor) -> tuple[Any, ...]:
    q, k, v, key_mask, out, lse = ctx.saved_tensors
    run = _AttendBackward.apply if _transformed() else attend_backward
    return (*run(q, k, v, key_mask, out, lse, dout, dlse, *ctx.options), None, None, None, None)


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "opoch_xp.attention can be differentiated once, not twice: its gradient has no gradient of its own; use"
        " backend='generic' for second derivatives"
    )


attend_operator.register_autograd(_differentiate, setup_context=_keep)
attend_backward.register_autograd(_refuse, setup_context=lambda ctx, inputs, output: None)


class _Attend(torch.autograd.Function):
    """The operator for transformations of torch.func, which take no gradient registered with an operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Outputs:
        return attend_operator(*inputs)

    setup_context = staticmethod(_keep)
    backward = staticmethod(_differentiate)


class _AttendBackward(torch.autograd.Function):
    """Its gradient, likewise."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Outputs:
        return attend_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
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
    out, lse, figures = attend_operator(*(_headed(x, flat) for x in (q, k, v)), mask, causal, scale, method)
    out, lse = (x[:, 0] if flat else x for x in (out, lse))
    return (out, lse, figures), (0, 0, None)


@attend_backward.register_vmap
def _(info: Any, axes: tuple[Any, ...], *inputs: Any) -> Any:
    *arrays, causal, scale, method = inputs
    arrays = [_front(x, axis, info.batch_size) for x, axis in zip(arrays, axes, strict=False)]
    flat = arrays[0].ndim == 3
    mask = arrays.pop(3)
    q, k, v, *rest = (_headed(x, flat) for x in arrays)
    found = attend_backward(q, k, v, mask, *rest, causal, scale, method)
    return tuple(x[:, 0] if flat else x for x in found), (0, 0, 0)
