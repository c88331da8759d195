"""What a call costs before any arithmetic: `attention` on a tiny input, and the kernel that it calls."""

from typing import Any

import numpy as np

import opoch_xp as ox
from opoch_xp.arguments import to_host

from .common import BACKENDS, Suite, library, verify

TOKENS, DIM = 16, 8
CALLS = 100  # whose median is taken


class Dispatch(Suite):
    """Exact attention of 16 tokens by name, and by its kernel; the overhead is what lies between."""

    params = (BACKENDS,)
    param_names = ("backend",)
    repeat = (50, 500, 2.0)

    def prepare(self, backend: str) -> None:
        self.library = library(backend, TOKENS, "exact_attention")
        host = np.random.default_rng(0).standard_normal((3, TOKENS, DIM), np.float32)
        self.q, self.k, self.v = (self.library.array(x) for x in host)
        self.method = ox.Exact()
        differ = np.abs(to_host(self.attention()) - to_host(self.kernel()))
        self.error = float(differ.max())
        verify("difference", self.error, most=1e-6)

    def attention(self) -> Any:
        return ox.attention(self.q, self.k, self.v, causal=True, method=self.method, backend=self.library.backend)

    def kernel(self) -> Any:
        out, _ = self.library.kernels.exact_attention(
            self.q[None, None, ...], self.k[None, ...], self.v[None, ...], causal=True, scale=DIM**-0.5
        )
        return out[0, 0, ...]

    def time_attention(self, *params: Any) -> None:
        self.library.kernels.synchronize(self.attention())

    def time_kernel(self, *params: Any) -> None:
        self.library.kernels.synchronize(self.kernel())

    def track_overhead(self, *params: Any) -> float:
        times = [[self.library.seconds(call) for _ in range(CALLS)] for call in (self.attention, self.kernel)]
        return float(np.median(times[0]) - np.median(times[1]))

    def track_error(self, *params: Any) -> float:
        return self.error

    track_overhead.unit = "seconds"
    track_error.unit = "largest difference"
