"""The index: its building, candidates and search, with the recall against an exact search for the same queries."""

from typing import Any

import numpy as np

import opoch_xp as ox
from opoch_xp import vectors
from opoch_xp.arguments import to_host

from .common import BACKENDS, SIZES, Suite, library, verify

DIM, QUERIES, K = 64, 256, 10
SETTINGS = {"bits": 12, "tables": 16, "probes": 2}
LEAST_RECALL = {
    "clustered": 0.5,
    "random": 0.05,
}  # true neighbours of random directions are hardly nearer than the rest


class Index(Suite):
    """LSHIndex on unit vectors with neighbours to be found, clustered, and with none, random."""

    params = (BACKENDS, tuple(LEAST_RECALL), SIZES[1:])
    param_names = ("backend", "kind", "vectors")

    def prepare(self, backend: str, kind: str, rows: int) -> None:
        self.library = library(backend, rows, "search_buckets")
        x, q, _ = vectors.make(kind, rows, QUERIES, DIM)
        self.x, self.q = self.library.array(x), self.library.array(q)
        self.index = self.built()
        offsets, _ = self.candidates()
        self.per_query = int(offsets[-1]) / QUERIES
        exact = ox.LSHIndex(DIM, bits=0, tables=1)
        exact.add(x)
        truth = exact.search(q, K, exact=True).ids
        found = to_host(self.search().ids)
        self.recall = float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(truth, found, strict=True)]))
        verify("recall", self.recall, least=LEAST_RECALL[kind], most=1.0)

    def built(self) -> ox.LSHIndex:
        index = ox.LSHIndex(DIM, **SETTINGS, backend=self.library.backend)
        self.library.kernels.synchronize(index.add(self.x))
        return index

    def candidates(self) -> Any:
        found = self.index.candidates(self.q)
        self.library.kernels.synchronize(*found)
        return found

    def search(self) -> Any:
        found = self.index.search(self.q, K)
        self.library.kernels.synchronize(*found)
        return found

    def time_build(self, *params: Any) -> None:
        self.built()

    def time_candidates(self, *params: Any) -> None:
        self.candidates()

    def time_search(self, *params: Any) -> None:
        self.search()

    def track_recall(self, *params: Any) -> float:
        return self.recall

    def track_candidates(self, *params: Any) -> float:
        return self.per_query

    track_recall.unit = f"share of the {K} nearest"
    track_candidates.unit = "candidates a query"
