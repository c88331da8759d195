"""Whole methods on a plugin's kernels and the generic ones beside them: their error against exact
attention, and what they read."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from opoch_xp.arguments import prepare
from opoch_xp.backends import namespace
from opoch_xp.methods import LSH, Exact, Method, Treecode
from opoch_xp.problem import Solution
from opoch_xp.solve import solve
from opoch_xp.testing.arrays import Library
from opoch_xp.testing.calls import is_array
from opoch_xp.testing.compare import budget, relative_error
from opoch_xp.testing.inputs import clustered
from opoch_xp.testing.report import Check

METHODS: tuple[Method, ...] = (
    Exact(),
    LSH(bits=4, tables=3),
    Treecode(rtol=0.2, sinks=3, block=32, fan=4, leaf=4, branch=4, top=4, group=16, least=2),
)
TOKENS, SEEDS = 512, 4  # several tiers of the Treecode
MORE = 1.05  # times the twins' error: what another rounding may move it by
SPREAD = 3.0  # standard errors of the mean difference from the twins' error: what other cuts of trees move one input by
MORE_ROWS = 1.1  # times what the twins read: trees that are cut worse cost more rows, not error


def together_checks(kernels: Any, library: Library, dtypes: tuple[str, ...]) -> Iterator[Check]:
    """One check for each method, causal or not, and dtype: the mean error of some inputs of clusters, and rows read."""
    for method in METHODS:
        for causal in (False, True):
            for dtype in dtypes:
                name = f"{type(method).__name__}{', causal' if causal else ''}"
                sentence = f"errs and reads at most {MORE} and {MORE_ROWS} times what the twins do, but for chance"
                yield Check("all together", name, dtype, sentence, _fault(kernels, library, method, causal, dtype))


def _fault(kernels: Any, library: Library, method: Method, causal: bool, dtype: str) -> str:
    try:
        errors, rows = _figures(kernels.name, library, method, causal, dtype)
    except Exception as raised:  # whatever a plugin raises is told
        return f"raises {type(raised).__name__}: {raised}"
    theirs, read = _of_twins(method, causal)
    chance = SPREAD * float(np.std(errors - theirs, ddof=1)) / SEEDS**0.5
    error, allowed = float(np.mean(errors)), MORE * float(np.mean(theirs)) + chance + _rounding(dtype)
    if not error <= allowed:  # and where it is NaN
        return f"errs by {error:.3g}, at most {allowed:.3g} is expected"
    allowed = MORE_ROWS * read
    return "" if rows <= allowed else f"reads {rows:.3g} rows a query, at most {allowed:.3g} are expected"


def _figures(backend: str, library: Library, method: Method, causal: bool, dtype: str) -> tuple[np.ndarray, float]:
    """The error of each seed's input, and rows read, mean."""
    errors, rows = [], []
    for seed in range(SEEDS):
        solution = _solution(backend, library, method, causal, dtype, seed)
        errors.append(relative_error(library.host(solution.out), _exact(causal, seed)))
        rows.append(sum(float(library.host(part)) if is_array(part) else part for part in solution.rows.values()))
    return np.asarray(errors), float(np.mean(rows))


def _solution(backend: str, library: Library, method: Method, causal: bool, dtype: str, seed: int) -> Solution:
    q, k, v = (library.array(x, dtype) for x in clustered(seed, TOKENS))
    return solve(prepare(q, k, v, causal=causal, backend=backend), method)


@cache
def _exact(causal: bool, seed: int) -> np.ndarray:
    host = Library(namespace("numpy"))
    return host.host(_solution("generic", host, Exact(), causal, "float64", seed).out)


@cache
def _of_twins(method: Method, causal: bool) -> tuple[np.ndarray, float]:
    """The same of the twins, in float64."""
    return _figures("generic", Library(namespace("numpy")), method, causal, "float64")


def _rounding(dtype: str) -> float:
    """What rounding alone may give, by the bound on one entry: of all inputs the largest."""
    inputs = (clustered(seed, TOKENS) for seed in range(SEEDS))
    norms = ((np.sqrt(np.mean(v**2)), arrays) for arrays in inputs for v in arrays[2:])
    return max(budget(*arrays, dtype=dtype) / norm for norm, arrays in norms)
