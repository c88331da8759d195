"""Tune: the cheapest method within a tolerance, by measurement: a search in the accuracy of a treecode."""

from dataclasses import replace
from math import exp, log, log2
from typing import Any

from opoch_xp.arguments import prepare
from opoch_xp.audit import Audit, Rung, audit_method, check_rows
from opoch_xp.cost import predicted, visible_pairs
from opoch_xp.methods import LSH, Exact, Method, Treecode
from opoch_xp.problem import Problem, Solution

Array = Any
TRIAL_QUERIES = 16_384  # a method is tried on the last of so many queries, against all keys
ROWS = 256
AUDITS = 6  # at the most
LARGEST, SMALLEST = 0.5, 1e-4  # of rtol: above, little more is saved; below, most of the keys are read
SLOPE = 0.5  # of log error against log rtol, before two are known
AIM = 0.8  # of the tolerance: the error that the next try is for
ENOUGH = 0.5  # of the tolerance: an error from here on is as cheap as it will be


def climb(
    problem: Problem, tol: float, lead: tuple[int, ...], rows: int = ROWS, seed: int = 0
) -> tuple[Method, Audit, Solution]:
    """The cheapest method within tol that was found, its audit in full and its solution; Exact() where none is."""
    if not isinstance(tol, int | float) or isinstance(tol, bool) or not 0 < tol < 1:
        raise ValueError(f"tol must be an error between 0 and 1, both excluded; got {tol!r}")
    search = _Search(problem, tol, lead, rows, seed)
    method: Method | None = None
    if search.worth_it():
        method = search.treecode() or search.buckets()
    while method is not None and len(search.rungs) < AUDITS - 1:
        if search.passes(method, problem):
            return method, replace(search.audit, ladder=tuple(search.rungs)), search.solution
        method = search.finer(method)
    search.passes(Exact(), problem)
    return Exact(), replace(search.audit, ladder=tuple(search.rungs)), search.solution


class _Search:
    """What was tried: `rungs`, and of the last of them its audit and its solution."""

    audit: Audit
    solution: Solution

    def __init__(self, problem: Problem, tol: float, lead: tuple[int, ...], rows: int, seed: int) -> None:
        self.problem, self.tol, self.lead, self.rows, self.seed = problem, float(tol), lead, rows, seed
        self.trial = problem.last_queries(TRIAL_QUERIES)
        self.rungs: list[Rung] = []
        self.whole: dict[Method, bool] = {}  # whether a method passed on all queries

    def passes(self, method: Method, part: Problem) -> bool:
        """Whether a method stays within tol on a part of the problem. Nothing is tried twice on all queries."""
        if part is self.problem and self.whole.get(method):
            return True
        self.audit, self.solution = audit_method(part, method, self.lead, self.rows, self.seed)
        passed = self.audit.worst <= self.tol
        self.rungs.append(Rung(method, self.audit.worst, self.audit.seconds, passed, part.n_q))
        if part is self.problem:
            self.whole[method] = passed
        return passed

    def worth_it(self) -> bool:
        """Whether the problem is large enough for a treecode to be predicted cheaper than exact attention."""
        shape, cost = (self.problem.n_q, self.problem.n_k, self.problem.causal), self.problem.kernels.COST
        return predicted(*shape, Treecode(), cost) < predicted(*shape, Exact(), cost)

    def treecode(self) -> Treecode | None:
        """The treecode of the largest rtol that passed on the trial, in four tries; None where none did, or where it
        read more than exact attention costs."""
        best, rtol, tries = None, min(self.tol, LARGEST), 4
        while tries and rtol >= SMALLEST:
            method, tries = Treecode(rtol=rtol), tries - 1
            passed = self.passes(method, self.trial)
            if passed:
                best, kept = method, (self.audit, self.solution)
                if self.dear():
                    return None
                if self.audit.worst >= ENOUGH * self.tol or rtol >= LARGEST:
                    break
            after = self.next_rtol()
            if best is not None and not passed and after <= best.rtol:
                break
            rtol = after
        if best is not None:  # the last that was tried may be another
            self.audit, self.solution = kept
        return best

    def dear(self) -> bool:
        """Whether the treecode that was tried last read more than exact attention costs."""
        trial, read = self.trial, self.trial.kernels.COST.read
        rows = {part: float(figure) for part, figure in self.solution.rows.items()}
        spent = rows["local"] + rows["sinks"] + read * (rows["nodes"] + rows["keys"])
        return spent * trial.n_q >= visible_pairs(trial.n_q, trial.n_k, trial.causal)

    def next_rtol(self) -> float:
        """The rtol at which the error is expected to be AIM of the tolerance, from what was tried last."""
        tried = [(r.method.rtol, max(r.error, 1e-12)) for r in self.rungs if isinstance(r.method, Treecode)]
        (rtol, error), slope = tried[-1], SLOPE
        if len(tried) > 1 and tried[-2][0] != rtol and tried[-2][1] != error:
            slope = (log(error) - log(tried[-2][1])) / (log(rtol) - log(tried[-2][0]))
            slope = min(max(slope, 0.2), 1.0)
        step = (log(AIM * self.tol) - log(error)) / slope
        return min(float(f"{rtol * exp(min(max(step, log(1 / 30)), log(30))):.2g}"), LARGEST)

    def finer(self, method: Method) -> Method | None:
        """What to try on all queries where a method passed on the trial alone."""
        if not isinstance(method, Treecode):
            return None
        rtol = min(self.next_rtol(), method.rtol / 2)
        return replace(method, rtol=rtol) if rtol >= SMALLEST else None

    def buckets(self) -> LSH | None:
        """Shared buckets in many tables; None where they do not pass or read more than exact attention."""
        method = many_tables(self.problem.n_k)
        if not self.passes(method, self.trial):
            return None
        trial, read = self.trial, sum(float(figure) for figure in self.solution.rows.values())
        return method if read * trial.n_q < visible_pairs(trial.n_q, trial.n_k, trial.causal) else None


def many_tables(n_k: int) -> LSH:
    """Shared buckets in 32 tables, for heads that look up single unrelated keys, where a far field cannot help: about
    16 keys a bucket on keys without structure."""
    return LSH(bits=max(1, min(62, round(log2(max(n_k, 2)) - 4))), tables=32)


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

    tol in (0, 1) bounds the upper end of the error's 95% interval on the sampled rows of the worst head. The rtol of a
    Treecode is searched, from tol on, for an error a little below it; where none passes, or reads more than exact
    attention would, LSH in many tables is tried, then Exact. With more than 16,384 queries methods are tried on the
    last 16,384 first, and what passes on all. At most six audits; audit.ladder keeps every one.

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
