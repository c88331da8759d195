"""Methods: frozen dataclasses that say how attention is computed. Values: print, hash, compare, put in a table."""

from dataclasses import dataclass
from numbers import Integral


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
    Queries go in groups of `group` that are close in space: a group opens its `open` heaviest nodes a level and reads
    its `near` heaviest cells key by key; each query then reads its `own` best cells of those left. Every node not
    opened is one pseudo-key at its mean value, with the log mass of a Gaussian cloud of keys (random-energy model).

    The weights of a query come from its past alone, but which cells it reads may depend on later queries of its chunk,
    since a group shares its lists. `group=1` shares nothing: an output then never changes when later tokens do.

    `iterations` power iterations find each axis, from a direction drawn with `seed`; 0 keeps that direction.

    Cost: about block / 2 + tiers * (fan * top / 2 + levels * open * branch + (near + own) * leaf) dot products a query,
    O(N log N) in all; O(N) memory. Raises ValueError for parameters that do not fit together. Source: Barnes and Hut, A
    hierarchical O(N log N) force-calculation algorithm, 1986; Derrida, Random-energy model, 1981.

    >>> import numpy as np, opoch_xp as ox
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1000, 8))
    >>> method = ox.Treecode(block=64, leaf=4, open=8, near=4)
    >>> ox.attend(q, k, v, causal=True, method=method).report.pairs < 0.8
    True
    """

    block: int = 2048
    fan: int = 16
    leaf: int = 16
    branch: int = 8
    top: int = 16
    group: int = 64
    open: int = 64
    near: int = 32
    own: int = 4
    iterations: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("block", "leaf", "top", "group", "open"):
            check_whole(name, getattr(self, name), 1)
        for name in ("fan", "branch"):
            check_whole(name, getattr(self, name), 2)
        for name in ("near", "own", "iterations", "seed"):
            check_whole(name, getattr(self, name), 0)
        if self.block % self.leaf or not _power_of_two(self.block // self.leaf):
            raise ValueError(f"block / leaf must be a power of two, got block={self.block} and leaf={self.leaf}")
        for name in ("fan", "branch"):
            if not _power_of_two(getattr(self, name)):
                raise ValueError(f"{name} must be a power of two, got {name}={getattr(self, name)}")


Method = Exact | LSH | Treecode
