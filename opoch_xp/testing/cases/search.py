"""Cases of sort_tables, find_candidates and search_buckets: whole numbers, whose products are exact and often equal."""

from collections.abc import Iterator
from functools import partial

import numpy as np

from opoch_xp.testing.calls import Call, Parts
from opoch_xp.testing.case import Case, Words
from opoch_xp.testing.inputs import whole

N, M, DIM, TABLES, PROBES, BITS = 101, 23, 5, 3, 2, 4  # vectors, queries


def exactly(dtype: str) -> float:
    return 0.0


def sort_cases() -> Iterator[Case]:
    sentence = "codes ascend in every table; order says which vector each is, ties by position"
    for name, n, bits, spread in (
        ("odd sizes", 101, 5, 1), ("one code", 20, 0, 1), ("many bits", 77, 62, 2**40), ("no vectors", 0, 3, 1),
    ):  # fmt: skip
        codes = np.random.default_rng(n).integers(0, min(2**bits, 12), (3, n)) * spread
        call = Call("sort_tables", {"codes": codes, "bits": bits})
        yield Case(name, sentence, call, exactly, own="offsets", rule=partial(_sorted, codes, bits))


def _sorted(codes: np.ndarray, bits: int, parts: Parts) -> Words:
    order, offsets = parts["order"].astype(np.int64), parts["offsets"]
    if codes.size and order.min() >= 0 and order.max() < codes.shape[1]:
        ordered = np.take_along_axis(codes, order, axis=1)
        equal, back = np.diff(ordered, axis=1) == 0, np.diff(order, axis=1) < 0
        if (np.diff(ordered, axis=1) >= 0).all() and (equal & back).any():
            table, place = np.argwhere(equal & back)[0].tolist()
            pair = order[table, place : place + 2].tolist()
            return "equal codes do not come by position", f"table {table} holds {pair} in this order, of one code"
    if offsets is not None:
        expected = np.stack([np.searchsorted(np.sort(row), np.arange(2**bits + 1)) for row in codes])
        if not np.array_equal(offsets, expected):
            return "offsets are not where the run of each code begins", f"{offsets[0].tolist()}, table 0"
    return "", ""


def tables_of(n: int) -> Call:
    codes = np.random.default_rng(n).integers(0, 2**BITS, (TABLES, n))
    return Call("sort_tables", {"codes": codes, "bits": BITS})


def probes(m: int) -> np.ndarray:
    return np.random.default_rng(m).integers(0, 2**BITS, (PROBES, TABLES, m))


def _limits(call: Call) -> dict[str, Call]:
    limit = call.arguments["limit"]
    if limit is None:
        return {}
    return {
        "ignores limit": call.but(limit=None),
        "limit is off by one: too large": call.but(limit=limit + 1),
        "limit is off by one: too small": call.but(limit=limit - 1),
    }


def candidate_cases() -> Iterator[Case]:
    sentence = "places of query i are what its runs hold, each once, ascending; limit counts entries, run by run"
    for name, n, m, limit in (
        ("odd sizes", N, M, None), ("a limit", N, M, 9), ("a limit of one", N, M, 1), ("no queries", N, 0, None),
        ("no vectors", 0, M, None), ("one vector, one query", 1, 1, None),
    ):  # fmt: skip
        call = Call("find_candidates", {"tables": tables_of(n), "codes": probes(m), "limit": limit})
        mistakes = _limits(call)
        if m:
            mistakes["reads the first probe alone"] = call.but(codes=probes(m)[:1])
        yield Case(name, sentence, call, exactly, mistakes)


def search_cases() -> Iterator[Case]:
    sentence = "the k best candidates by q . x + bias, best first, ties by place; -1 and -inf where there are fewer"
    q, x, bias = whole(0, M, DIM), whole(1, N, DIM), whole(2, N)
    allowed = np.random.default_rng(3).random(N) < 0.5
    base = {"q": q, "x": x, "bias": None, "tables": tables_of(N), "codes": probes(M), "k": 4}
    call = Call("search_buckets", {**base, "allowed": None, "limit": None})
    cases = {
        "odd sizes": call,
        "more than there are": call.but(k=N + 3),
        "a bias": call.but(bias=bias, k=7),
        "some allowed": call.but(allowed=allowed, k=7),
        "a limit, a bias, some allowed": call.but(allowed=allowed, bias=bias, limit=9),
        "every vector is a candidate": call.but(codes=None, k=30),
        "every vector that is allowed": call.but(codes=None, allowed=allowed, bias=bias, k=N),
        "no queries": call.but(q=q[:0], codes=probes(0)),
        "no vectors": call.but(x=x[:0], tables=tables_of(0)),
    }
    for name, one in cases.items():
        mistakes = _limits(one)
        if one.arguments["allowed"] is not None:
            mistakes["ignores allowed"] = one.but(allowed=None)
        if one.arguments["bias"] is not None:
            mistakes["ignores bias"] = one.but(bias=None)
        yield Case(name, sentence, one, exactly, mistakes, rule=_ranked)


def _ranked(parts: Parts) -> Words:
    places, scores = parts["places"], parts["scores"]
    ties = (scores[:, 1:] == scores[:, :-1]) & (places[:, 1:] < places[:, :-1]) & (places[:, 1:] >= 0)
    if not ties.any():
        return "", ""
    row, rank = np.argwhere(ties)[0].tolist()
    return "equal scores do not come by place", f"query {row}: places {places[row, rank : rank + 2].tolist()}"
