"""Buckets: which keys share a query's code in one table."""

from dataclasses import dataclass
from typing import Any

Array = Any


@dataclass(frozen=True)
class Buckets:
    """The candidates of every query in one table: a run of the keys sorted by code.

    order (n_k,) int64: the keys, sorted by code, ties by position; start, stop (n_q,) int64: query i's run of `order`,
    empty where its bucket holds no key it may read. This is the dense mask of candidates:

        mask = np.zeros((len(start), len(order)), dtype=bool)
        for i in range(len(start)):
            for place in range(start[i], stop[i]):
                mask[i, order[place]] = True
    """

    order: Array
    start: Array
    stop: Array


@dataclass(frozen=True)
class Tables:
    """The vectors of an index in every table, sorted by code.

    codes (tables, n), ascending in each table; order (tables, n), the vector at each place, ties by position; both of
    an integer dtype that the backend chose. offsets (tables, 2**bits + 1), where the run of each code begins and the
    last ends, or None where that would be longer than the table. The vectors whose code in table t is c:

        order[t, codes[t] == c]
    """

    bits: int
    codes: Array
    order: Array
    offsets: Array | None = None
