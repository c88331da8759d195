"""Whole methods on a plugin's kernels and the generic ones beside them: their error against exact attention."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from opoch_xp.arguments import prepare
from opoch_xp.backends import namespace
from opoch_xp.methods import LSH, Exact, Method, Treecode
from opoch_xp.solve import solve
from opoch_xp.testing.arrays import Library
from opoch_xp.testing.compare import budget, relative_error
from opoch_xp.testing.inputs import clustered
from opoch_xp.testing.report import Check

METHODS: tuple[Method, ...] = (
    Exact(),
    LSH(bits=4, tables=3),
    Treecode(rtol=0.2, sinks=3, block=32, fan=4, leaf=4, branch=4, top=4, group=16, least=2),
)
TOKENS, SEEDS = 512, 4  # several tiers of the Treecode
MORE = 1.05  # times the twins' error: what another rounding, or axes from a sample, may move it by


def together_checks(kernels: Any, library: Library, dtypes: tuple[str, ...]) -> Iterator[Check]:
    """One check for each method, causal or not, and dtype: the mean error of some inputs of clusters."""
    for method in METHODS:
        for causal in (False, True):
            for dtype in dtypes:
                name = f"{type(method).__name__}{', causal' if causal else ''}"
                sentence = f"errs against exact attention by at most {MORE} times what the generic twins err by"
                yield Check("all together", name, dtype, sentence, _fault(kernels, library, method, causal, dtype))


def _fault(kernels: Any, library: Library, method: Method, causal: bool, dtype: str) -> str:
    errors = []
    for seed in range(SEEDS):
        try:
            out = _out(kernels.name, library, method, causal, dtype, seed)
        except Exception as error:  # whatever a plugin raises is told
            return f"raises {type(error).__name__}: {error}"
        errors.append(relative_error(out, _exact(causal, seed)))
    ours, allowed = float(np.mean(errors)), MORE * _of_twins(method, causal) + _rounding(dtype)
    return "" if ours <= allowed else f"errs by {ours:.3g}, at most {allowed:.3g} is expected"  # and where it is NaN


def _out(backend: str, library: Library, method: Method, causal: bool, dtype: str, seed: int) -> np.ndarray:
    q, k, v = (library.array(x, dtype) for x in clustered(seed, TOKENS))
    return library.host(solve(prepare(q, k, v, causal=causal, backend=backend), method).out)


@cache
def _exact(causal: bool, seed: int) -> np.ndarray:
    return _out("generic", Library(namespace("numpy")), Exact(), causal, "float64", seed)


@cache
def _of_twins(method: Method, causal: bool) -> float:
    """The twins' error in float64, mean over the seeds."""
    host = Library(namespace("numpy"))
    outs = (_out("generic", host, method, causal, "float64", seed) for seed in range(SEEDS))
    return float(np.mean([relative_error(out, _exact(causal, seed)) for seed, out in enumerate(outs)]))


def _rounding(dtype: str) -> float:
    """What rounding alone may give, by the bound on one entry: of all inputs the largest."""
    inputs = (clustered(seed, TOKENS) for seed in range(SEEDS))
    norms = ((np.sqrt(np.mean(v**2)), arrays) for arrays in inputs for v in arrays[2:])
    return max(budget(*arrays, dtype=dtype) / norm for norm, arrays in norms)
