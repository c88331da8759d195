"""The call: attention and attend check the arguments, choose a method, run it and report."""

import sys
from dataclasses import dataclass
from typing import Any
from warnings import warn

from opoch_xp.arguments import check_scale, on_host, prepare, restore
from opoch_xp.audit import Audit, audit_solution
from opoch_xp.cost import visible_pairs
from opoch_xp.graphs import follower, traced
from opoch_xp.methods import LSH, Exact, Method, Treecode
from opoch_xp.problem import Problem, Solution
from opoch_xp.solve import check_method, choose, solve
from opoch_xp.tune import climb

Array = Any
CHECK_ROWS = 32  # rows a head that an automatic choice is checked on: under 3% of the work at the crossover
WARN_ABOVE = 0.20  # upper end of the error's 95% interval: no head of SmolLM2 comes to it (docs/results.md)


class ApproximationWarning(UserWarning):
    """The method that was chosen by itself errs by more than 20% on this input: more than on any head of
    the pretrained model that it was measured on."""


@dataclass(frozen=True)
class Report:
    """What a call did: the method, why it was chosen, what it read and what it measured on the way.

    reason: why the method was chosen. rows: rows a query read, mean, by part: of a treecode "local" (keys of its own
    block), "sinks" (the first keys), "nodes" (summaries looked at) and "keys" (of the cells it read); of exact
    attention "local"; of LSH "near" (keys) and "far" (mean fields). `read` holds the same as arrays of the device where
    they are known there alone; asking for `rows` or `pairs` fetches them. method: None where a compiler saw the call
    before it had a shape to choose by. exact_rows: rows exact attention would have read. pairs: their share, which
    passes 1 where a method reads more than exact does. passes: every pass made over the input. audit: of an automatic
    choice that was checked, or of the choice that tol made; else None. bounded: the share of the queries for which
    `most` of a Treecode left something closed that it would have opened.
    """

    method: Method | None
    reason: str
    read: dict[str, Any]
    exact_rows: float
    passes: tuple[str, ...]
    audit: Audit | None = None
    met_bound: Any = 0.0

    @property
    def bounded(self) -> float:
        return float(self.met_bound)

    @property
    def rows(self) -> dict[str, float]:
        return {part: float(rows) for part, rows in self.read.items()}

    @property
    def pairs(self) -> float:
        return sum(self.rows.values()) / self.exact_rows if self.exact_rows else 0.0


@dataclass(frozen=True)
class Attention:
    """out (..., H, n_q, d_v) in q's dtype; lse (..., H, n_q), natural log-sum-exp of the scaled logits, float32 or
    wider, -inf for a row that saw no key; report: what was done."""

    out: Array
    lse: Array
    report: Report


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    method: Method | None = None,
    tol: float | None = None,
    backend: str | None = None,
    check: bool | None = None,
    check_finite: bool | None = None,
) -> Attention:
    """Attention with its log-sum-exp and a report: softmax(scale q k^T) v, by the method named or the one chosen.

    Shapes: q (..., H, n_q, d), k (..., H_kv, n_k, d), v (..., H_kv, n_k, d_v), H a multiple of H_kv; two axes are one
    head. dtypes float16, bfloat16, float32 or float64, one for all; sums are in at least float32.

    causal: query i sees the keys at positions up to i + n_k - n_q, so the last query sees every key. scale: factor of
    q . k, by default d ** -0.5. key_mask (..., n_k) bool, True = keep; masked keys and values may hold anything. A row
    that sees no key is zeros with lse -inf.

    method: Exact(), LSH(...) or Treecode(...). tol: an error in (0, 1); the cheapest method whose error on sampled
    rows stays within it is taken (see opoch_xp.tune). With neither, predicted costs choose between Exact and Treecode,
    and on host arrays a Treecode so chosen is checked on 32 rows a head: ApproximationWarning when the upper end of
    the error's 95% interval passes 20%. check=False never checks, check=True checks any method on any device.

    backend: None for the plugin of the arrays' library, "generic" for the plain Array API kernels. check_finite:
    whether to look for numbers that are not finite in k and v, which reads them back; by default on host arrays only.

    Cost: see the method. Memory: O(n). Raises TypeError for arguments of a wrong kind, ValueError for ones that do not
    fit, both naming what was expected and what was given.

    >>> import numpy as np, opoch_xp as ox
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 100, 8))
    >>> result = ox.attend(q, k, v, causal=True, method=ox.Treecode(block=32, leaf=4))
    >>> result.out.shape, result.lse.shape, sorted(result.report.rows)
    ((2, 100, 8), (2, 100), ['keys', 'local', 'nodes', 'sinks'])
    """
    if method is not None and tol is not None:
        raise TypeError(f"give method or tol, not both; got method={method!r} and tol={tol!r}")
    if method is not None:
        check_method(method)
    graph = follower(q, k, v) if backend in (None, "torch") else None
    if graph is not None:
        if graph.casts(q):  # the result has the dtype that the library's automatic casts give it; the sums are ours
            with graph.without_casts(q):
                return attend(
                    *graph.cast(q, k, v), causal=causal, scale=scale, key_mask=key_mask, method=method, tol=tol,
                    backend=backend, check=check, check_finite=check_finite,
                )  # fmt: skip
        if graph.opaque(q, k, v):
            _refuse(tol=tol, check=check, check_finite=check_finite)
            return _unseen(graph, q, k, v, causal, scale, key_mask, method)
    elif traced(q, k, v, key_mask):
        _refuse(tol=tol, check=check, check_finite=check_finite, method=method if isinstance(method, LSH) else None)
    problem = prepare(
        q, k, v, causal=causal, scale=scale, key_mask=key_mask, backend=backend, check_finite=check_finite
    )
    passes: list[str] = []
    audit, solution, reason, chosen = None, None, "named by the caller", method is None
    if tol is not None:
        method, audit, solution = climb(problem, tol, tuple(q.shape[:-2]))
        reason, passes = f"the cheapest that was tried within tol={tol}", [rung.passes for rung in audit.ladder]
    elif method is None:
        method, reason = choose(problem)
    assert method is not None  # by now
    if graph is not None:
        given = (q, k, v, key_mask, problem.causal, problem.scale, graph.numbers(method))
        out, lse, figures = graph.attend(*given, problem)
        solution = graph.solution(problem, method, out, lse, figures)
        passes.append(f"{method!r} on all rows, to be differentiated")
    else:
        if solution is None:
            solution = solve(problem, method)
            passes.append(f"{method!r} on all rows")
        out, lse = restore(q, v, solution.out, solution.lse, problem.xp)
    if chosen and tol is None and isinstance(method, Treecode) and check is None:
        check = on_host(problem.xp, q)
    if check and tol is None and not isinstance(method, Exact) and problem.n_q:
        audit = _checked(problem, method, solution, q)
        passes.append(f"Exact() on {audit.rows} rows a head")
    exact = visible_pairs(problem.n_q, problem.n_k, problem.causal) / max(problem.n_q, 1)
    return Attention(out, lse, Report(method, reason, solution.rows, exact, tuple(passes), audit, solution.bounded))


def _refuse(**options: Any) -> None:
    """ValueError for what must look at numbers, where there are none: compiled, batched, or shapes alone."""
    for name, value in options.items():
        if value:
            raise ValueError(
                f"{name} must look at numbers, which compiled, batched, traced and meta arrays do not show; got"
                f" {name}={value}: measure outside, with opoch_xp.tune or opoch_xp.audit, and name here a method whose"
                " shapes are static, Exact or Treecode"
            )


def _unseen(
    graph: Any, q: Array, k: Array, v: Array, causal: bool, scale: float | None, key_mask: Array | None,
    method: Method | None,
) -> Attention:  # fmt: skip
    """The call where no number can be looked at: compiled, batched by a transformation, or shapes alone."""
    scale = None if scale is None else check_scale(scale, q.shape[-1])
    out, lse, figures = graph.attend(q, k, v, key_mask, bool(causal), scale, graph.numbers(method))
    exact = graph.exact_rows(q, k, bool(causal))
    rows, bounded = graph.report_of(method, figures)
    return Attention(out, lse, Report(method, "as one operator", rows, exact, ("one operator",), None, bounded))


def _frames_to_caller() -> int:
    """The stacklevel at which a warning of the calling function names the line that called this module."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        level, frame = level + 1, frame.f_back
    return level


def _checked(problem: Problem, method: Method, solution: Solution, q: Array) -> Audit:
    audit = audit_solution(problem, solution, method, tuple(q.shape[:-2]), rows=CHECK_ROWS, seed=0)
    if audit.worst > WARN_ABOVE:
        warn(
            f"{method!r} errs by {audit.error.max():.1%} (95% interval up to {audit.worst:.1%}) on {audit.rows} sampled"
            " rows of the worst head; give tol= to have a method chosen by its error, method=Exact(), or check=False",
            ApproximationWarning,
            stacklevel=_frames_to_caller(),
        )
    return audit


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    method: Method | None = None,
    tol: float | None = None,
    backend: str | None = None,
    check: bool | None = None,
    check_finite: bool | None = None,
) -> Array:
    """The output of `attend` alone, (..., H, n_q, d_v) in q's dtype, device and library: see there for every argument.

    Equals torch.nn.functional.scaled_dot_product_attention with attn_mask=causal_lower_right(n_q, n_k) where causal;
    torch's is_causal is the same when n_q = n_k.

    >>> import numpy as np, opoch_xp as ox
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 100, 8))
    >>> ox.attention(q, k, v, causal=True).shape
    (2, 100, 8)
    """
    return attend(
        q, k, v, causal=causal, scale=scale, key_mask=key_mask, method=method, tol=tol, backend=backend, check=check,
        check_finite=check_finite,
    ).out  # fmt: skip
