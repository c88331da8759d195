"""Audit: the error of a method on the caller's own input, measured against exact attention on sampled rows."""

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import device

from opoch_xp.arguments import prepare, restore, to_host
from opoch_xp.methods import Method
from opoch_xp.problem import Problem, Solution
from opoch_xp.solve import check_method, choose, solve

if TYPE_CHECKING:
    from opoch_xp.attention import Attention

Array = Any
RESAMPLES = 1000  # of the bootstrap: its percentiles are good to about a tenth of the interval's width
INTERVAL = (2.5, 97.5)  # percent
UNBOUNDED = 1e140  # error of an output that is no number: sums of its square stay finite


@dataclass(frozen=True)
class PerQuery:
    """Relative error of single queries, |approximate - exact| / |exact|, over all sampled rows and heads."""

    mean: float
    p50: float
    p99: float
    max: float


@dataclass(frozen=True)
class Rung:
    """One method that `tune` tried. error: the upper end of its error's 95% interval on the worst head; seconds: what
    it took; passed: whether error stayed within tol; queries: on how many of the last queries it was tried."""

    method: Method
    error: float
    seconds: float
    passed: bool
    queries: int

    @property
    def passes(self) -> str:
        return f"{self.method!r} on {self.queries} queries: error {self.error:.3g}, {self.seconds:.3g} s"


@dataclass(frozen=True)
class Audit:
    """Error of a method on sampled rows. Host NumPy figures.

    error (..., H): per head, the Frobenius norm of (approximate - exact) over that of exact, on the sampled rows;
    interval (..., H, 2): its 95% interval by bootstrap over rows; per_query: figures of single queries; missed: mean of
    1 - exp(lse - lse_exact), the softmax mass that the method did not see (negative where it saw too much); rows:
    sampled rows a head; heads: how many; seed: of the sample; seconds: what the method took, 0 when its output was
    given; ladder: the rungs tried, when the audit comes from `tune`.
    """

    error: np.ndarray
    interval: np.ndarray
    per_query: PerQuery
    missed: float
    rows: int
    heads: int
    seed: int
    method: Method
    seconds: float = 0.0
    ladder: tuple[Rung, ...] = ()

    @property
    def worst(self) -> float:
        """Upper end of the interval of the worst head: what tol is compared with."""
        return float(self.interval[..., 1].max(initial=0.0))


def host_array(array: Array) -> np.ndarray:
    """The array's figures on the host, float64."""
    return to_host(array).astype(np.float64, copy=False)


def sampled_rows(problem: Problem, rows: int, seed: int) -> np.ndarray:
    """Row numbers to audit: drawn without replacement among the queries that see a key."""
    first = max(0, problem.n_q - problem.n_k) if problem.causal else 0
    seen = problem.n_q - first
    if rows >= seen:
        return np.arange(first, problem.n_q)
    return np.sort(np.random.default_rng(seed).choice(seen, rows, replace=False)) + first


def solve_rows(problem: Problem, rows: np.ndarray) -> Solution:
    """Exact attention of the numbered queries, in the dtype that is accumulated in."""
    problem, xp = problem.widened(), problem.xp
    index = xp.asarray(rows, device=device(problem.q))
    positions = rows + (problem.n_k - problem.n_q)
    with np.errstate(all="ignore"):
        out, lse = problem.kernels.exact_attention(
            xp.take(problem.q, index, axis=2), problem.k, problem.v, causal=problem.causal, scale=problem.scale,
            mask=problem.mask, positions=positions,
        )  # fmt: skip
    return Solution(out, lse)


def audit_solution(
    problem: Problem,
    solution: Solution,
    method: Method,
    lead: tuple[int, ...],
    *,
    rows: int,
    seed: int,
    seconds: float = 0.0,
) -> Audit:
    """Audit of a solution at hand; `lead` are the caller's batch axes and heads."""
    chosen = sampled_rows(problem, rows, seed)
    exact = solve_rows(problem, chosen)
    index = problem.xp.asarray(chosen, device=device(problem.q))
    out, lse = (problem.xp.take(x, index, axis=2) for x in (solution.out, solution.lse))
    return compared(out, lse, exact.out, exact.lse, method, lead, seed=seed, seconds=seconds)


def compared(
    out: Array,
    lse: Array,
    exact_out: Array,
    exact_lse: Array,
    method: Method,
    lead: tuple[int, ...],
    *,
    seed: int,
    seconds: float = 0.0,
) -> Audit:
    """Audit of rows at hand: outputs (a, b, rows, d_v) and lse (a, b, rows), a * b heads, in the shape `lead`."""
    out, lse, exact_out, exact_lse = (host_array(x) for x in (out, lse, exact_out, exact_lse))
    heads, rows = out.shape[0] * out.shape[1], out.shape[2]
    shape = (heads, rows)
    if 0 in shape:
        return Audit(
            np.zeros(lead), np.zeros((*lead, 2)), PerQuery(0, 0, 0, 0), 0.0, rows, heads, seed, method, seconds
        )
    with np.errstate(all="ignore"):
        wrong = ((out - exact_out) ** 2).sum(-1).reshape(shape)
        right = (exact_out**2).sum(-1).reshape(shape)
        share = np.exp(np.where(np.isneginf(exact_lse), 0.0, lse - exact_lse)).reshape(shape)
    spoiled = np.isnan(right) | np.isnan(exact_lse).reshape(shape)  # by a query that is not finite: nothing to meet
    wrong = np.where(spoiled, 0.0, np.where(np.isfinite(wrong), wrong, UNBOUNDED**2))
    right = np.where(spoiled, 0.0, right)
    missed = np.where(spoiled, 0.0, 1 - np.where(np.isfinite(share), share, 0.0))

    draw = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), RESAMPLES)
    single = _ratio(wrong, right)
    figures = PerQuery(*(float(f(single)) for f in (np.mean, np.median, _p99, np.max)))
    return Audit(
        error=_ratio(wrong.sum(1), right.sum(1)).reshape(lead),
        interval=np.percentile(_ratio(wrong @ draw.T, right @ draw.T), INTERVAL, axis=1).T.reshape(*lead, 2),
        per_query=figures,
        missed=float(missed.mean()),
        rows=rows,
        heads=heads,
        seed=seed,
        method=method,
        seconds=seconds,
    )


def audit_method(
    problem: Problem, method: Method, lead: tuple[int, ...], rows: int, seed: int
) -> tuple[Audit, Solution]:
    """Run a method in full, timed, and audit it: the audit and the solution."""
    start = perf_counter()
    solution = solve(problem, method)
    problem.kernels.synchronize(solution.out)
    seconds = perf_counter() - start
    return audit_solution(problem, solution, method, lead, rows=rows, seed=seed, seconds=seconds), solution


def _ratio(wrong: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Relative error; an exact output of zeros that is met counts as no error, one that is not as one without bound."""
    with np.errstate(all="ignore"):
        return np.where(wrong == 0, 0.0, np.minimum(np.sqrt(wrong / right), UNBOUNDED))


def _p99(x: np.ndarray) -> float:
    return float(np.percentile(x, 99))


def check_rows(rows: object, seed: object) -> None:
    for name, value, low in (("rows", rows, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")


def audit(
    q: Array,
    k: Array,
    v: Array,
    *,
    method: Method | None = None,
    rows: int = 256,
    seed: int = 0,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    backend: str | None = None,
    check_finite: bool | None = None,
    output: "Attention | None" = None,
) -> Audit:
    """Error of a method on this input, on `rows` sampled rows a head: the method runs in full, the rows exactly.

    Arrays as in `attend`. method: by default the one that attend would choose. output: the Attention of an earlier call
    with the same arguments; it is audited and no method runs. Reads the rows back to the host.
    Cost: the method, and rows * n_k dot products a head. Raises as attend does, and ValueError for rows < 1.

    >>> import numpy as np, opoch_xp as ox
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 300, 8))
    >>> found = ox.audit(q, k, v, method=ox.Treecode(block=32, leaf=4), rows=64)
    >>> found.error.shape, found.interval.shape, bool(found.error.max() < found.worst)
    ((2,), (2, 2), True)
    """
    check_rows(rows, seed)
    if method is not None and output is not None:
        raise TypeError(
            f"give method or output, not both; got method={method!r} and the output of {output.report.method!r}"
        )
    if method is not None:
        check_method(method)
    problem = prepare(
        q, k, v, causal=causal, scale=scale, key_mask=key_mask, backend=backend, check_finite=check_finite
    )
    lead = tuple(q.shape[:-2])
    if output is not None:
        xp, shape = problem.xp, (*problem.q.shape[:3], problem.v.shape[-1])
        expected, given_shape = (*q.shape[:-1], v.shape[-1]), tuple(output.out.shape)
        if given_shape != expected:
            raise ValueError(f"output must have out {expected}, got {given_shape}")
        out = xp.reshape(xp.astype(output.out, problem.dtype, copy=False), shape)
        if output.report.method is None:
            raise ValueError("output must come from a call that names its method: a compiled call chose its own")
        given = Solution(out, xp.reshape(output.lse, shape[:3]))
        return audit_solution(problem, given, output.report.method, lead, rows=rows, seed=seed)
    if method is None:
        method, _ = choose(problem)
    return audit_method(problem, method, lead, rows, seed)[0]


def exact_rows(
    q: Array,
    k: Array,
    v: Array,
    rows: np.ndarray,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    backend: str | None = None,
    check_finite: bool | None = None,
) -> tuple[Array, Array]:
    """Exact attention of the numbered queries alone: out (..., H, rows, d_v) and lse (..., H, rows).

    rows: host integers, row numbers of q. Otherwise as `attend`.
    """
    problem = prepare(
        q, k, v, causal=causal, scale=scale, key_mask=key_mask, backend=backend, check_finite=check_finite
    )
    solution = solve_rows(problem, np.asarray(rows))
    picked = problem.xp.take(q, problem.xp.asarray(np.asarray(rows), device=device(problem.q)), axis=-2)
    return restore(picked, v, solution.out, solution.lse, problem.xp)
