"""Attention: time, memory, error and pairs read, by length and by workload; and how time grows with length."""

from functools import partial
from typing import Any

import numpy as np

import opoch_xp as ox
from opoch_xp import workloads
from opoch_xp.measure import timed

from .common import BACKENDS, SIZES, Suite, at_most, library, verify

METHODS = {"Exact": ox.Exact(), "LSH": ox.LSH(), "Treecode": ox.Treecode()}
KERNELS = {"Exact": "exact_attention", "LSH": "bucket_attention", "Treecode": "tree_attention"}
MOST = {"Exact": 2**16, "LSH": 2**18, "Treecode": 2**20}  # tokens, so that no call takes much over a minute
WARM = 8192  # tokens of the call that loads libraries, compiles and starts threads
ROWS = 256  # that are audited
GROWTH = (2**13, 2**14, 2**15)  # tokens that exponents are fitted to, the same in quick and full runs
TOL = 0.05  # error at which growth is compared

# Largest errors allowed, about twice what was measured: LSH drops the far field, which is everything in flat attention.
BOUNDS = {
    "scattered": {"Exact": 1e-5, "LSH": 1.0, "Treecode": 0.1},
    "topics": {"Exact": 1e-5, "LSH": 3.0, "Treecode": 0.2},
    "gaussian": {"Exact": 1e-5, "LSH": 25.0, "Treecode": 0.8},
}


class _Attention(Suite):
    """One call of `attend` on one head of 64, causal: verified against exact attention on sampled rows, then timed."""

    def measure(self, backend: str, method: str, tokens: int, workload: str) -> None:
        at_most(MOST[method], tokens)
        self.library = library(backend, tokens, KERNELS[method])
        q, k, v = (self.library.array(x) for x in workloads.make(workload, tokens))
        given = {"causal": True, "backend": self.library.backend}

        def attend(n: int = tokens) -> ox.Attention:
            result = ox.attend(q[:, :n], k[:, :n], v[:, :n], method=METHODS[method], check=False, **given)
            self.library.kernels.synchronize(result.out)
            return result

        attend(min(tokens, WARM))
        result, _, self.memory = timed(attend)
        audit = ox.audit(q, k, v, output=result, rows=ROWS, **given)
        verify("error", audit.worst, most=BOUNDS[workload][method])
        self.attend, self.error, self.pairs = attend, float(audit.error[0]), result.report.pairs


class _Figures(_Attention):
    """The figures of one call."""

    def time_attend(self, *params: Any) -> None:
        self.attend()

    def track_error(self, *params: Any) -> float:
        return self.error

    def track_pairs(self, *params: Any) -> float:
        return self.pairs

    def track_memory(self, *params: Any) -> float:
        """Peak memory of the host above the inputs, output included."""
        return float("nan") if self.memory is None else self.memory

    track_error.unit = "relative error"
    track_pairs.unit = "rows read / keys seen"
    track_memory.unit = "bytes"


class Length(_Figures):
    """By backend and length, on scattered tokens."""

    params = (BACKENDS, tuple(METHODS), SIZES)
    param_names = ("backend", "method", "tokens")

    def prepare(self, backend: str, method: str, tokens: int) -> None:
        self.measure(backend, method, tokens, "scattered")


class Workload(_Figures):
    """By workload at one length, from input with cells to find to flat attention, where there is nothing to find."""

    params = (tuple(BOUNDS), tuple(METHODS))
    param_names = ("workload", "method")

    def prepare(self, workload: str, method: str) -> None:
        self.measure("numpy", method, 2**14, workload)


class Growth(_Attention):
    """How time grows with length at fixed settings: 1 is linear, 2 exact attention. The error is at the longest."""

    params = (BACKENDS, tuple(METHODS))
    param_names = ("backend", "method")

    def prepare(self, backend: str, method: str) -> None:
        self.measure(backend, method, GROWTH[-1], "scattered")

    def track_exponent(self, *params: Any) -> float:
        return exponent([min(self.library.seconds(lambda n=n: self.attend(n).out) for _ in range(3)) for n in GROWTH])

    def track_error(self, *params: Any) -> float:
        return self.error

    track_exponent.unit = "power of tokens"
    track_error.unit = "relative error"


class GrowthAtError(Suite):
    """How time grows with length at a fixed error: the cheapest method that `tune` finds within TOL at each length."""

    params = (BACKENDS,)
    param_names = ("backend",)

    def prepare(self, backend: str) -> None:
        self.library, self.times = library(backend, GROWTH[-1], "tree_attention"), []
        arrays = [self.library.array(x) for x in workloads.make("scattered", GROWTH[-1])]
        given = {"causal": True, "backend": self.library.backend}
        for n in GROWTH:
            some = [x[:, :n] for x in arrays]
            method, audit = ox.tune(*some, tol=TOL, **given)
            verify("error", audit.worst, most=TOL)
            self.error = float(audit.error[0])
            call = partial(ox.attention, *some, method=method, check=False, **given)
            self.times.append(min(self.library.seconds(call) for _ in range(3)))

    def track_exponent(self, *params: Any) -> float:
        return exponent(self.times)

    def track_error(self, *params: Any) -> float:
        return self.error

    track_exponent.unit = "power of tokens"
    track_error.unit = "relative error"


def exponent(seconds: list[float]) -> float:
    """The power of the tokens that times at the lengths GROWTH follow, fitted."""
    return float(np.polyfit(np.log(GROWTH), np.log(seconds), 1)[0])
