"""Methods: frozen dataclasses that say how attention is computed. Values: print, hash, compare, put in a table."""

from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any


def check_whole(name: str, value: object, low: int, high: int | None = None) -> None:
    """ValueError, in the caller's words, unless the value is a whole number within its bounds."""
    bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or int(value) < low or (high is not None and int(value) > high):  # type: ignore[call-overload]
        raise ValueError(f"{name} must be a whole number {bounds}, got {value!r}")


def _power_of_two(value: int) -> bool:
    return value & (value - 1) == 0


@dataclass(frozen=True)
class Exact:
    """Softmax attention over every visible key, streamed in blocks.

    Cost: n_q * n_k dot products (half of that when causal), O(n) memory at any length. Source: Milakov and Gimelshein,
    Online normalizer calculation for softmax, 2018.

    >>> import numpy as np, opoch_xp as ox
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 100, 8))
    >>> ox.attention(q, k, v, method=ox.Exact()).shape
    (100, 8)
    """


@dataclass(frozen=True)
class LSH:
    """Softmax attention over the keys that share a bucket of random hyperplanes with the query; the rest is dropped.

    A key is a candidate when its `bits`-bit sign code equals the query's in at least one of `tables` tables, or when it
    is one of the `window` most recent keys (causal only). `bits=0` is exact attention. Buckets larger than `max_bucket`
    (default `max(256, 8 * n_k / 2**bits)`) are skipped; when causal their `max_bucket` most recent keys are read. With
    `center` the mean key is subtracted before hashing, which changes no softmax.

    Cost: hashing is `bits * tables` dot products a row; attention is n_q times the candidates per query. The error is
    the softmax mass that was missed times the distance between what was read and what was not: measure it with
    `opoch_xp.audit`. Raises ValueError for parameters out of range, and when run for a window without causal. Source:
    Charikar, Similarity estimation techniques from rounding algorithms, 2002.

    >>> import numpy as np, opoch_xp as ox
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 100, 8))
    >>> ox.attend(q, k, v, method=ox.LSH(bits=4, tables=2)).report.pairs < 0.2  # of the keys, about 1 in 8
    True
    """

    bits: int = 12
    tables: int = 8
    window: int = 0
    seed: int = 0
    max_bucket: int | None = None
    center: bool = True

    def __post_init__(self) -> None:
        check_whole("bits", self.bits, 0, 62)
        check_whole("tables", self.tables, 1)
        check_whole("window", self.window, 0)
        check_whole("seed", self.seed, 0)
        if self.max_bucket is not None:
            check_whole("max_bucket", self.max_bucket, 1)


@dataclass(frozen=True)
class Treecode:
    """Exact near field, mean far field: a query reads its own block, the cells that matter, and summaries of the rest.

    Keys are split into cells of `leaf` keys by hyperplanes at the median of each node's principal axis, in chunks of
    `block`, `block * fan`, `block * fan**2`, ... keys; `branch` cells make a parent, up to at most `top` nodes a chunk.
    A node stands for its keys as one pseudo-key at their mean value, with the log mass that as many normal logits of
    its mean and variance have on average.

    `rtol` in [0, 1) says how exact: of m nodes that may stay closed, at least 128, one that may hold more than
    rtol / sqrt(m) of a query's mass is opened, a cell that may is read key by key. The error grows and falls with it,
    and is of its size; 0 is exact attention. `least` nodes of each level of large nodes, where clusters may hide, are
    opened whatever they hold. The first `sinks` keys are read exactly by every query that sees them: models put the
    mass of many heads there.

    Queries go in groups of `group` that are close in space, and a group opens what any of its queries wants: which
    nodes a query sees as one may depend on later queries of its chunk. `group=1` shares nothing: an output then never
    changes when later tokens do. `most` bounds the nodes a group opens of a level and the cells it reads, the heaviest
    first; None: no bound, or 128 where shapes must be static (JAX). `iterations` power iterations find each
    axis, from a direction drawn with `seed`; 0 keeps that direction.

    Cost: see docs/mathematics.md; on heads of a pretrained model some hundreds of rows a query beside its own block at
    8,192 tokens, some thousands at a million. O(N) memory. Raises ValueError for parameters that do not fit together.
    Source: Barnes and Hut, A hierarchical O(N log N) force-calculation algorithm, 1986; Derrida, Random-energy model,
    1981.

    >>> import numpy as np, opoch_xp as ox
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1000, 8))
    >>> method = ox.Treecode(rtol=0.2, block=64, leaf=4)
    >>> ox.attend(q, k, v, causal=True, method=method).report.pairs < 0.8
    True
    """

    rtol: float = 0.05
    sinks: int = 16
    block: int = 1024
    fan: int = 32
    leaf: int = 16
    branch: int = 8
    top: int = 8
    group: int = 128
    least: int = 32
    most: int | None = None
    iterations: int = 4
    seed: int = 0

    def __new__(cls, *given: Any, **named: Any) -> "Treecode":
        old = [name for name in OLD if name in named]
        if old:
            raise TypeError(
                f"Treecode has no parameter {old[0]!r}: how much is opened follows from rtol, the accuracy asked for;"
                f" got {old[0]}={named[old[0]]!r}"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.rtol, bool) or not isinstance(self.rtol, Real) or not 0 <= float(self.rtol) < 1:
            raise ValueError(f"rtol must be a number of at least 0 and below 1, got {self.rtol!r}")
        for name in ("block", "leaf", "top", "group"):
            check_whole(name, getattr(self, name), 1)
        for name in ("fan", "branch"):
            check_whole(name, getattr(self, name), 2)
        for name in ("sinks", "least", "iterations", "seed"):
            check_whole(name, getattr(self, name), 0)
        if self.most is not None:
            check_whole("most", self.most, 1)
        if self.block % self.leaf or not _power_of_two(self.block // self.leaf):
            raise ValueError(f"block / leaf must be a power of two, got block={self.block} and leaf={self.leaf}")
        for name in ("fan", "branch"):
            if not _power_of_two(getattr(self, name)):
                raise ValueError(f"{name} must be a power of two, got {name}={getattr(self, name)}")


OLD = ("open", "near", "own")  # budgets of the first form of the treecode

Method = Exact | LSH | Treecode


def method_name(method: Method) -> str:
    """A method as one would write it: the parameters that are not at their defaults, and always an LSH's size."""
    always = ("bits", "tables") if isinstance(method, LSH) else ()
    given = [field for field in fields(method) if field.name in always or getattr(method, field.name) != field.default]
    return f"{type(method).__name__}({', '.join(f'{f.name}={getattr(method, f.name)!r}' for f in given)})"
