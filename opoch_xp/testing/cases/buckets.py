"""Cases of hash_codes and bucket_attention."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from opoch_xp.testing.calls import Call
from opoch_xp.testing.case import Case
from opoch_xp.testing.cases.exact import heads, masked
from opoch_xp.testing.cases.search import exactly
from opoch_xp.testing.compare import budget
from opoch_xp.testing.inputs import whole


def hash_cases() -> Iterator[Case]:
    sentence = "bit b of code t is [planes[t, b] . x >= 0], in int64"
    sizes: list[tuple[tuple[int, ...], int, int]] = [
        ((13,), 7, 3), ((2, 3, 11), 8, 2), ((5, 9), 9, 1), ((33,), 1, 2), ((21,), 33, 2), ((6,), 62, 3), ((5,), 0, 2),
        ((0,), 4, 2), ((0, 4), 4, 1), ((700,), 17, 3),
    ]  # fmt: skip
    for seed, (rows, bits, tables) in enumerate(sizes):
        x, planes = whole(seed, *rows, 5), whole(seed + 100, tables, bits, 5)
        call = Call("hash_codes", {"x": x, "planes": planes})
        mistakes = {
            "packs the bits in reverse": call.but(planes=planes[:, ::-1]),
            "takes the tables in reverse": call.but(planes=planes[::-1]),
        }
        yield Case(
            f"rows {'x'.join(map(str, rows))}, {tables} tables of {bits} bits", sentence, call, exactly, mistakes
        )
    x = np.array([[0.0, 0.0], [-0.0, -0.0], [1.0, -1.0], [np.nan, 1.0]])
    planes = np.array([[[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]]], dtype=np.float32)
    call = Call("hash_codes", {"x": x, "planes": planes})
    yield Case("zeros and NaN", "zero of either sign counts as positive, NaN does not", call, exactly)


def bucket(name: str, sentence: str, given: dict[str, Any], codes: int, tables: int = 3, **options: Any) -> Case:
    """A case with keys and queries in `codes` buckets a table."""
    q, k, v = (given[key] for key in "qkv")
    (batch, repeat, n_q, _), n_k = q.shape, k.shape[1]
    rng = np.random.default_rng(n_q + n_k)
    options = {"causal": False, "scale": 0.6, "window": 0, "max_bucket": None, "mask": None, **given, **options}
    query_codes = rng.integers(0, codes, (batch, repeat, tables, n_q)) * 2**40  # more than 32 bits
    key_codes = rng.integers(0, codes, (batch, tables, n_k)) * 2**40
    call = Call("bucket_attention", {**options, "query_codes": query_codes, "key_codes": key_codes})
    mistakes = {}
    if options["mask"] is not None:
        mistakes["ignores the mask"] = call.but(mask=None)
    if options["max_bucket"] is not None:
        mistakes["ignores max_bucket"] = call.but(max_bucket=None)
    if options["window"]:
        mistakes["ignores window"] = call.but(window=0)
        for step in (-1, 1):
            mistakes[f"window is off by {step}"] = call.but(window=options["window"] + step)
    if options["causal"]:
        mistakes["ignores causal"] = call.but(causal=False, window=0)
        shifted = _shifted(call)
        mistakes["a query sees one key too many: an offset is off by one"] = shifted(1)
        mistakes["a query sees one key too few: an offset is off by one"] = shifted(-1)
    if tables > 1:
        mistakes["reads the first table alone"] = call.but(
            query_codes=query_codes[:, :, :1], key_codes=key_codes[:, :1]
        )
    return Case(name, sentence, call, lambda dtype: budget(q, k, v, options["scale"], dtype), mistakes)


def _shifted(call: Call) -> Any:
    """Calls in which every query stands one position later, by a hidden key at the end, or earlier, by one key less."""
    given = call.arguments
    k, v, codes = given["k"], given["v"], given["key_codes"]
    mask = np.ones(k.shape[:2], bool) if given["mask"] is None else given["mask"]

    def shifted(step: int) -> Call:
        if step < 0:
            return call.but(k=k[:, :-1], v=v[:, :-1], key_codes=codes[:, :, :-1], mask=mask[:, :-1])
        longer = (np.concatenate([x, 0 * x[:, :1]], axis=1) for x in (k, v, mask))
        wide = dict(zip(("k", "v", "mask"), longer, strict=True))
        return call.but(**wide, key_codes=np.concatenate([codes, codes[:, :, :1]], axis=2))

    return shifted


def plain(*arrays: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip("qkv", arrays, strict=True))


def bucket_cases() -> Iterator[Case]:
    union = "a query reads every key that shares a code with it in some table, once"
    field = "a query without a candidate gets the mean field of its bucket in the first table, or of all kept keys"
    recent = "a query sees nothing after its own position i + n_k - n_q"
    yield bucket("odd sizes", union, plain(*heads(0, 2, 1, 13, 29)), 3)
    yield bucket("query heads that share a key head", union, plain(*heads(1, 2, 3, 9, 17)), 3)
    yield bucket("a mask", union, masked(heads(2, 3, 1, 21, 33), 0.5), 4)
    yield bucket("many empty buckets", field, masked(heads(3, 2, 1, 23, 31), 0.7), 40, 1)
    skipped = f"buckets above max_bucket are skipped; {field}"
    yield bucket("large buckets", skipped, plain(*heads(4, 2, 1, 50, 90)), 6, 2, max_bucket=14)
    yield bucket("one bucket", union, plain(*heads(5, 1, 2, 270, 301, 6, 4)), 1, 2)
    yield bucket("causal, fewer queries than keys", recent, plain(*heads(6, 2, 1, 17, 40)), 3, causal=True)
    yield bucket("causal, more queries than keys", recent, plain(*heads(7, 2, 2, 40, 17)), 3, causal=True)
    yield bucket("causal, many empty buckets", "without a candidate, the mean value of all kept keys before",
                 masked(heads(8, 2, 1, 30, 41), 0.6), 40, 1, causal=True)  # fmt: skip
    yield bucket("a window", "the window most recent positions are candidates too", plain(*heads(9, 2, 1, 37, 45)), 12,
                 causal=True, window=5)  # fmt: skip
    yield bucket("a window, a mask and large buckets", "of a bucket the max_bucket most recent keys are read",
                 masked(heads(10, 2, 2, 61, 70), 0.6), 4, causal=True, window=3, max_bucket=4)  # fmt: skip
    q, k, v = heads(11, 1, 2, 12, 20)
    q[0, 1, 4] = np.nan
    yield bucket("a query that is not a number", "it spoils its own row alone", plain(q, k, v), 2)
    yield bucket("no queries", "outputs are empty", plain(*heads(12, 2, 1, 0, 5)), 2)
