"""Cases of exact_attention and merge_part."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from opoch_xp.testing.calls import Call
from opoch_xp.testing.case import Case
from opoch_xp.testing.compare import budget
from opoch_xp.testing.inputs import qkv

Heads = tuple[np.ndarray, np.ndarray, np.ndarray]


def heads(seed: int, batch: int, repeat: int, n_q: int, n_k: int, d: int = 7, d_v: int = 5) -> Heads:
    """q (batch, repeat, n_q, d), k (batch, n_k, d) and v (batch, n_k, d_v), normal."""
    return qkv(seed, n_q, n_k, d, d_v, lead=(batch, repeat), key_lead=(batch,))


def masked(arrays: Heads, share: float, seed: int = 0) -> dict[str, Any]:
    """The arguments with a mask that keeps about `share` of the keys, and none of the last entry's; hidden keys and
    values are zeros."""
    q, k, v = arrays
    mask = np.random.default_rng(seed).random(k.shape[:2]) < share
    mask[-1] = False
    return {"q": q, "k": k * mask[..., None], "v": v * mask[..., None], "mask": mask}


def exact(
    name: str, sentence: str, arrays: Heads | dict[str, Any], *, causal: bool = False, scale: float = 0.4,
    positions: np.ndarray | None = None,
) -> Case:  # fmt: skip
    given: dict[str, Any] = {"mask": None} | (
        arrays if isinstance(arrays, dict) else dict(zip("qkv", arrays, strict=True))
    )
    call = Call("exact_attention", {**given, "causal": causal, "scale": scale, "positions": positions})
    q, k, v, mask = (given[key] for key in ("q", "k", "v", "mask"))
    mistakes = {}
    if mask is not None:
        mistakes["ignores the mask"] = call.but(mask=None)
        mistakes["takes mask for the keys to hide"] = call.but(mask=~mask)
    if causal:
        n_q, n_k = q.shape[2], k.shape[1]
        last = np.arange(n_q) + (n_k - n_q) if positions is None else positions
        if positions is not None:
            mistakes["ignores positions"] = call.but(positions=None)
        mistakes["a query sees one key too many: an offset is off by one"] = call.but(positions=last + 1)
        mistakes["a query sees one key too few: an offset is off by one"] = call.but(positions=last - 1)
        mistakes["query i sees keys up to i, not to i + n_k - n_q"] = call.but(positions=np.arange(n_q))
        mistakes["ignores causal"] = call.but(causal=False, positions=None)
    return Case(name, sentence, call, lambda dtype: budget(q, k, v, scale, dtype), mistakes)


def exact_cases() -> Iterator[Case]:
    softmax = "out and lse are those of the dense softmax in float64"
    aligned = "query i sees the keys at positions up to i + n_k - n_q"
    nothing = "a row that sees no key is zeros with lse -inf"
    yield exact("odd sizes", softmax, heads(0, 3, 1, 13, 29))
    yield exact("one query, one key", softmax, heads(1, 1, 1, 1, 1, 1, 1))
    yield exact("query heads that share a key head", softmax, heads(2, 2, 3, 9, 17), scale=-0.5)
    yield exact("causal, fewer queries than keys", aligned, heads(3, 2, 2, 9, 21), causal=True)
    yield exact("causal, more queries than keys", f"{aligned}; {nothing}", heads(4, 2, 1, 21, 9), causal=True)
    yield exact("a mask", f"only keys with mask True weigh; {nothing}", masked(heads(5, 3, 2, 11, 19), 0.6))
    yield exact("causal with a mask", f"{aligned}; {nothing}", masked(heads(6, 2, 1, 23, 23), 0.3), causal=True)
    several = masked(heads(7, 2, 1, 141, 1101, 16, 9), 0.7)
    several["mask"][0, 200:1030] = False  # whole tiles of hidden keys
    several["k"][~several["mask"]], several["v"][~several["mask"]] = 0, 0
    yield exact("several tiles, some hidden whole", softmax, several, causal=True)
    positions = np.array([20, 3, 3, 50, 0, -1, 11])
    numbered = "query i sees the keys at positions up to positions[i]"
    yield exact("positions", f"{numbered}; {nothing}", heads(8, 2, 2, 7, 21), causal=True, positions=positions)
    q, k, v = heads(9, 1, 2, 40, 33)
    yield exact("large logits", "sums keep a running maximum: logits of thousands are finite", (100 * q, 10 * k, v))
    q, k, v = heads(10, 2, 1, 12, 15)
    q[0, 0, 4] = np.nan
    yield exact("a query that is not a number", "it spoils its own row alone", (q, k, v))
    q, k, _ = heads(11, 2, 1, 15, 15, 6, 6)
    yield exact("keys that are the values too", softmax, (q, k, k))
    yield exact("no queries", "outputs are empty", heads(12, 2, 1, 0, 5))
    yield exact("no heads", "outputs are empty", heads(13, 0, 1, 4, 5))


def merge_cases() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    out, lse = rng.standard_normal((2, 3, 13, 5)), rng.standard_normal((2, 3, 13))
    lse[0, 0, :6] = -np.inf
    for name, start, n in (("first rows", 0, 4), ("rows in between", 5, 6), ("last rows", 9, 4), ("all rows", 0, 13)):
        part, part_lse = rng.standard_normal((2, 3, n, 5)), 3 * rng.standard_normal((2, 3, n))
        part_lse[:, :, 1] = -np.inf  # both have seen nothing where lse is -inf as well
        whole = {"out": np.where(np.isfinite(lse)[..., None], out, 0), "lse": lse}
        piece = {"part": np.where(np.isfinite(part_lse)[..., None], part, 0), "part_lse": part_lse}
        call = Call("merge_part", {**whole, **piece, "start": start})
        mistakes = {}
        for step, where in ((1, "late"), (-1, "early")):
            if 0 <= start + step <= 13 - n:
                mistakes[f"rows are merged one place too {where}: an offset is off by one"] = call.but(
                    start=start + step
                )
        tolerance = partial(_merged, np.concatenate([lse, part_lse], axis=2), out)
        yield Case(name, "rows from start on are weighted by exp(lse); the rest stay", call, tolerance, mistakes)


def _merged(lse: np.ndarray, out: np.ndarray, dtype: str) -> float:
    """An lse errs by its rounding, weights by that of both exponents, and some roundings more."""
    largest = float(np.abs(lse[np.isfinite(lse)]).max())
    return float(np.finfo("float64" if dtype == "float64" else "float32").eps) * (4 * largest + 16) * np.abs(out).max()
