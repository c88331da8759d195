"""Solve: a Problem by a method, and the choice of one by predicted cost."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from array_api_compat import device

from opoch_xp.backends import library
from opoch_xp.cost import Cost, predicted, visible_pairs
from opoch_xp.lsh import attend_buckets
from opoch_xp.methods import LSH, Exact, Method, Treecode
from opoch_xp.problem import Problem, Solution, nothing_seen
from opoch_xp.treecode.forest import Watch, attend_treecode


def _exact(problem: Problem, method: Exact) -> Solution:
    out, lse = problem.kernels.exact_attention(
        problem.q, problem.k, problem.v, causal=problem.causal, scale=problem.scale, mask=problem.mask
    )
    rows = visible_pairs(problem.n_q, problem.n_k, problem.causal) / max(problem.n_q, 1)
    return Solution(out, lse, {"local": rows})


_SOLVERS: dict[type, Callable[[Problem, Any], Solution]] = {
    Exact: _exact,
    LSH: attend_buckets,
    Treecode: attend_treecode,
}


# functions of the Array API standard that some libraries lack, and methods need where a library has no plugin
NEEDED: dict[type, tuple[str, ...]] = {LSH: ("searchsorted", "take_along_axis"), Treecode: ("take_along_axis",)}


def _lacking(problem: Problem, method: type) -> str:
    """What the arrays' library lacks for a method, in words; "" where it lacks nothing."""
    if problem.kernels.name != "generic":
        return ""
    missing = [name for name in NEEDED.get(method, ()) if not hasattr(problem.xp, name)]
    return f"{library(problem.xp)} has no {' and no '.join(missing)}" if missing else ""


def check_method(method: object) -> None:
    """TypeError unless `method` is one of the methods."""
    if type(method) not in _SOLVERS:
        names = ", ".join(f"{kind.__name__}(...)" for kind in _SOLVERS)
        raise TypeError(f"method must be one of {names}, got {method!r}")


def solve(problem: Problem, method: Method, watch: Watch | None = None) -> Solution:
    """Run one method on a problem, floating-point warnings off; an empty one gives empty arrays.

    watch: of attend_treecode, for a Treecode. Raises NotImplementedError where the library lacks what the method needs.
    """
    lacking = _lacking(problem, type(method))
    if lacking:
        raise NotImplementedError(f"{lacking}, which {type(method).__name__} needs there: give method=Exact()")
    xp, lead, width = problem.xp, problem.q.shape[:3], problem.v.shape[-1]
    here = device(problem.q)
    if 0 in lead:
        return Solution(*nothing_seen(xp, lead, width, problem.dtype, here))
    if width == 0:  # the lse is still wanted
        solution = solve(
            replace(problem, v=xp.zeros((*problem.v.shape[:2], 1), dtype=problem.v.dtype, device=here)), method, watch
        )
        return replace(solution, out=solution.out[..., :0])
    with np.errstate(all="ignore"):  # infinite logits are meant, and what is not finite is seen in the output
        if isinstance(method, Treecode):
            return attend_treecode(problem, method, watch)
        return _SOLVERS[type(method)](problem, method)


def choose(problem: Problem) -> tuple[Method, str]:
    """Exact or Treecode(), whichever is predicted cheaper, and why."""
    lacking = _lacking(problem, Treecode)
    if lacking:
        return Exact(), f"{lacking}, which Treecode needs there"
    return _cheaper(problem.n_q, problem.n_k, problem.causal, problem.kernels.COST)


@lru_cache(1024)
def _cheaper(n_q: int, n_k: int, causal: bool, cost: Cost) -> tuple[Method, str]:
    exact, tree = (predicted(n_q, n_k, causal, method, cost) for method in (Exact(), Treecode()))
    figures = f"per head, in dot products of exact attention: Exact {exact:.3g}, Treecode {tree:.3g}"
    return Treecode() if tree < exact else Exact(), f"chosen by predicted cost ({figures})"
