"""Tune: walk a ladder of methods from cheap to dear, by measurement, up to the first within tol."""

from dataclasses import replace
from math import log2
from typing import Any

from opoch_xp.arguments import prepare
from opoch_xp.audit import Audit, Rung, audit_method, check_rows
from opoch_xp.cost import predicted
from opoch_xp.methods import LSH, Exact, Method, Treecode
from opoch_xp.problem import Problem, Solution

Array = Any
TRIAL_QUERIES = 16_384  # rungs are tried on the last of so many queries, against all keys
ROWS = 256


def ladder(n_k: int) -> tuple[Method, ...]:
    """The methods that tune tries, from cheap to dear; Exact() follows the last.

    Treecodes that open and read more and more; then shared buckets in many tables, for heads that look up single
    unrelated keys, where a far field cannot help: about 16 keys a bucket on keys without structure.
    """
    return (
        Treecode(open=32, own=0),
        Treecode(),
        Treecode(near=64, own=8),
        Treecode(open=128, near=128, own=16),
        LSH(bits=max(1, min(62, round(log2(max(n_k, 2)) - 4))), tables=32),
    )


def climb(
    problem: Problem, tol: float, lead: tuple[int, ...], rows: int = ROWS, seed: int = 0
) -> tuple[Method, Audit, Solution]:
    """The first rung within tol, its audit in full and its solution; Exact() where none is."""
    if not isinstance(tol, int | float) or isinstance(tol, bool) or not 0 < tol < 1:
        raise ValueError(f"tol must be an error between 0 and 1, both excluded; got {tol!r}")
    shape, cost = (problem.n_q, problem.n_k, problem.causal), problem.kernels.COST
    exact = predicted(*shape, Exact(), cost)
    trial = problem.last_queries(TRIAL_QUERIES)
    rungs: list[Rung] = []
    for method in ladder(problem.n_k):
        if isinstance(method, Treecode) and predicted(*shape, method, cost) >= exact:
            continue  # dearer than exact attention
        for part in (trial, problem) if trial is not problem else (problem,):
            audit, solution = audit_method(part, method, lead, rows, seed)
            passed = audit.worst <= tol
            rungs.append(Rung(method, audit.worst, audit.seconds, passed, part.n_q))
            if not passed:
                break
        else:
            return method, replace(audit, ladder=tuple(rungs)), solution
    audit, solution = audit_method(problem, Exact(), lead, rows, seed)
    rungs.append(Rung(Exact(), audit.worst, audit.seconds, True, problem.n_q))
    return Exact(), replace(audit, ladder=tuple(rungs)), solution


def tune(
    q: Array,
    k: Array,
    v: Array,
    *,
    tol: float,
    rows: int = ROWS,
    seed: int = 0,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    backend: str | None = None,
    check_finite: bool | None = None,
) -> tuple[Method, Audit]:
    """The cheapest method whose error stays within tol on this input, or Exact(), and its audit.

    tol in (0, 1) bounds the upper end of the error's 95% interval on the sampled rows of the worst head. Methods are
    tried in the order of `opoch_xp.tune.ladder`; a Treecode predicted dearer than Exact is passed over; with more than
    16,384 queries a rung is tried on the last 16,384 first and, if it passes, on all. audit.ladder keeps every rung.

    Arrays and the other arguments as in `attend`. Cost: the methods tried, and rows * n_k exact dot products each.
    Raises as attend does, and ValueError for a tol outside (0, 1), rows < 1 or seed < 0.

    >>> import numpy as np, opoch_xp as ox
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 300, 8))
    >>> method, found = ox.tune(q, k, v, tol=0.02)
    >>> found.worst <= 0.02, found.ladder[-1].passed
    (True, True)
    """
    check_rows(rows, seed)
    problem = prepare(
        q, k, v, causal=causal, scale=scale, key_mask=key_mask, backend=backend, check_finite=check_finite
    )
    method, audit, _ = climb(problem, tol, tuple(q.shape[:-2]), rows, seed)
    return method, audit
