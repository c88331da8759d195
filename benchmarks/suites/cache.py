"""KVCache: a step of decoding, appending, and a crop, with the error of the step against exact attention."""

from typing import Any

import numpy as np

import opoch_xp as ox
from opoch_xp import workloads

from .common import BACKENDS, SIZES, Suite, library, verify

DIM, HEADS = 64, 8  # query heads, on one key head
PLACES = 8  # steps, spread over the second half of the length, whose mean is the figure
TOKENS = 256  # appended at once
MOST_ERROR = 0.15
METHODS = {"Exact": ox.Exact(), "Treecode": ox.Treecode(block=256, group=8, rtol=0.2)}


class Decoding(Suite):
    """8 query heads on one key head, keys in runs of topics; a small block, so that trees are read at any length."""

    params = (BACKENDS, tuple(METHODS), SIZES[1:])
    param_names = ("backend", "method", "tokens")

    def prepare(self, backend: str, method: str, rows: int) -> None:
        self.library = library(backend, rows, "build_tree")
        stream = workloads.Stream(DIM)
        self.caches, self.queries, errors, read = [], [], [], []
        k, v = (self.library.array(x) for x in stream.tokens(rows + TOKENS))
        self.more = k[:, rows:, :], v[:, rows:, :]
        for place in np.linspace(rows // 2, rows, PLACES, dtype=int).tolist():
            cache = ox.KVCache(METHODS[method], rows + TOKENS, backend=self.library.backend)
            cache.append(k[:, :place, :], v[:, :place, :])
            q = self.library.array(stream.queries(HEADS))
            errors.append(float(np.mean(cache.audit(q).error)))
            read.append(sum(cache.attend(q).report.rows.values()))
            self.caches.append(cache)
            self.queries.append(q)
        self.error, self.rows = float(np.mean(errors)), float(np.mean(read))
        verify("error", self.error, most=MOST_ERROR if method != "Exact" else 1e-5)

    def time_steps(self, *params: Any) -> None:
        """A step at every place."""
        for cache, q in zip(self.caches, self.queries, strict=True):
            self.library.kernels.synchronize(cache.attend(q).out)

    def time_append(self, *params: Any) -> None:
        """256 tokens, and what they fill; then they are cropped, so that the next sample finds the same."""
        self.caches[-1].append(*self.more)
        self.library.kernels.synchronize(self.more[0])
        self.caches[-1].crop(len(self.caches[-1]) - TOKENS)

    def track_error(self, *params: Any) -> float:
        return self.error

    def track_rows(self, *params: Any) -> float:
        return self.rows

    def track_bytes(self, *params: Any) -> int:
        return self.caches[-1].nbytes

    track_error.unit = "mean relative error of a head"
    track_rows.unit = "rows a query reads"
    track_bytes.unit = "bytes"
