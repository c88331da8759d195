"""Hashing: sign codes of random hyperplanes, and how many of their bits differ from float64's."""

from typing import Any

import numpy as np

import opoch_xp as ox
from opoch_xp.arguments import to_host

from .common import BACKENDS, SIZES, Suite, library, verify

BITS, TABLES, DIM = 16, 8, 64
SAMPLE = 1024  # rows whose codes are computed in float64
WRONG = 1e-4  # share of bits: only projections within rounding of zero may differ


class Codes(Suite):
    """`hash_codes` of Gaussian rows."""

    params = (BACKENDS, SIZES)
    param_names = ("backend", "rows")

    def prepare(self, backend: str, rows: int) -> None:
        self.library = library(backend, rows, "hash_codes")
        host = np.random.default_rng(0).standard_normal((rows, DIM), np.float32)
        self.x, self.planes = self.library.array(host), ox.random_hyperplanes(DIM, BITS, TABLES)
        sample = host[:SAMPLE].astype(np.float64)
        codes = to_host(self.codes())[:, :SAMPLE]
        bits = codes[..., None] >> np.arange(BITS) & 1  # (tables, sample, bits)
        expected = np.einsum("nd,tbd->tnb", sample, self.planes.astype(np.float64)) >= 0
        self.error = float((bits != expected).mean())
        verify("share of wrong bits", self.error, most=WRONG)

    def codes(self) -> Any:
        codes = ox.hash_codes(self.x, self.planes, backend=self.library.backend)
        self.library.kernels.synchronize(codes)
        return codes

    def time_codes(self, *params: Any) -> None:
        self.codes()

    def track_error(self, *params: Any) -> float:
        return self.error

    track_error.unit = "share of bits"
