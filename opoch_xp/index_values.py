"""What an index holds, and what it answers."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from opoch_xp.arguments import dtype_name, to_host
from opoch_xp.buckets import Tables
from opoch_xp.index_settings import Settings

Array = Any


class Candidates(NamedTuple):
    """offsets (m + 1,) and ids (total,) int64: those of query i are ids[offsets[i] : offsets[i + 1]]."""

    offsets: Array
    ids: Array


class Neighbours(NamedTuple):
    """ids (m, k) int64 and scores (m, k), best first; -1 and -inf where fewer than k were found."""

    ids: Array
    scores: Array


class InRange(NamedTuple):
    """offsets (m + 1,), ids (total,) int64 and scores (total,): those of query i are at offsets[i] : offsets[i + 1]."""

    offsets: Array
    ids: Array
    scores: Array


@dataclass(frozen=True)
class Contents:
    """The vectors of an index at one moment: never changed, only replaced, so that a reader sees all of it or none.

    x (n, dim), of unit length where the metric is cosine; ids (n,) int64; next_id is above every id there ever was.
    """

    x: Array
    ids: Array
    tables: Tables
    next_id: int


@dataclass(frozen=True)
class Stats:
    """What an index holds.

    size: vectors; occupied: buckets that hold any, over all tables; largest: vectors in the largest; histogram[i]:
    buckets of 2**i to 2**(i + 1) - 1 vectors. expected: chance that two random directions share a bucket of one table,
    2**-bits; observed: share of the pairs of vectors held that do, mean over tables. bytes: vectors, ids and tables.
    """

    size: int
    occupied: int
    largest: int
    histogram: tuple[int, ...]
    expected: float
    observed: float
    bytes: int


def stats_of(settings: Settings, contents: Contents | None) -> Stats:
    """See `LSHIndex.stats`."""
    expected = 2.0**-settings.bits
    n = 0 if contents is None else contents.x.shape[0]
    if contents is None or n == 0:
        return Stats(0, 0, 0, (), expected, 0.0, 0)
    sizes = np.concatenate([run_lengths(to_host(contents.tables.codes[t, :])) for t in range(settings.tables)])
    pairs = float(np.sum(sizes.astype(np.float64) * (sizes - 1))) / settings.tables
    arrays = (contents.x, contents.ids, contents.tables.codes, contents.tables.order, contents.tables.offsets)
    return Stats(
        size=n,
        occupied=len(sizes),
        largest=int(sizes.max()),
        histogram=tuple(np.bincount(np.log2(sizes).astype(np.int64)).tolist()),
        expected=expected,
        observed=pairs / (n * (n - 1)) if n > 1 else 0.0,
        bytes=sum(bytes_of(array) for array in arrays if array is not None),
    )


def run_lengths(codes: np.ndarray) -> np.ndarray:
    """Lengths of the runs of equal codes."""
    begin = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
    return np.diff(np.append(begin, len(codes)))


def bytes_of(array: Array) -> int:
    return int(np.prod(array.shape)) * np.dtype(dtype_name(array)).itemsize
