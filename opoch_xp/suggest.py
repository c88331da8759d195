"""Settings of an index: from the collision model, or measured on vectors and queries."""

from dataclasses import dataclass
from functools import cache
from math import ceil, log, log2
from numbers import Real
from typing import Any

import numpy as np

from opoch_xp.arguments import to_host
from opoch_xp.hashing import random_hyperplanes
from opoch_xp.methods import check_whole
from opoch_xp.probing import flip_sets, probe_codes

Array = Any
MOST_TABLES = 64  # of a suggestion: each costs memory for every vector
PROBES = (1, 2, 4, 8, 16)
MOST_BITS = 32  # of a suggestion
TRIALS = 4096  # pairs of vectors that the chance of a probe to find a neighbour is simulated with
SAMPLE = 65_536  # vectors that tune counts the entries of buckets on
# what a query does, in units of a dot product with a vector that is read in turn (NumPy, dim 64)
FETCH = 8.0  # a candidate: fetched from anywhere in memory, compared, sorted
LOOK_UP = 4.0  # a bucket


@dataclass(frozen=True)
class Suggestion:
    """Settings and what to expect of them: recall, the share of the neighbours that are candidates, and `candidates`,
    entries of buckets read a query (an entry counted in every table that holds it)."""

    bits: int
    tables: int
    probes: int
    recall: float
    candidates: float

    @property
    def settings(self) -> dict[str, int]:
        """The arguments of `LSHIndex` and of `rebuilt`."""
        return {"bits": self.bits, "tables": self.tables, "probes": self.probes}

    @property
    def cost(self) -> float:
        """Of a query, in dot products, about: hashing, looking buckets up, reading what they hold."""
        return self.bits * self.tables + LOOK_UP * self.tables * self.probes + FETCH * self.candidates


def suggest(dim: int, n: int, *, recall: float = 0.9, angle: float = 30.0) -> Suggestion:
    """Bits, tables and probes that find the share `recall` of neighbours at `angle` degrees, for n random directions.

    One bit of two vectors at angle theta agrees with probability p = 1 - theta / 180; a table finds the neighbour with
    probability p ** bits, T tables with 1 - (1 - p ** bits) ** T; for probes the chance of a table is simulated. What
    is read besides are random directions of dim dimensions that share a bucket. The cheapest setting of at most 64
    tables is returned; bits=0, which reads everything, where none reaches `recall`. For the same recall the candidates
    grow with n as n ** (log(1 / p) / log 2): .26 at 30 degrees, .42 at 45, .58 at 60. `LSHIndex.tune` measures instead.

    Raises ValueError when dim < 1, n < 1, recall is outside (0, 1) or angle outside [0, 90).

    >>> found = suggest(64, 1_000_000, recall=0.9, angle=30)
    >>> found.recall >= 0.9, found.candidates < 10_000
    (True, True)
    """
    check_whole("dim", dim, 1)
    check_whole("n", n, 1, 2**63 - 1)
    _check_share("recall", recall, one=False)
    dim, n = int(dim), int(n)
    if isinstance(angle, bool) or not isinstance(angle, Real) or not 0 <= float(angle) < 90:
        raise ValueError(f"angle must be in degrees, at least 0 and below 90, got {angle!r}")
    best = Suggestion(0, 1, 1, 1.0, float(n))
    theta = np.radians(angle)
    for bits in range(1, min(MOST_BITS, ceil(log2(n)) + 6) + 1):
        for probes in PROBES:
            if probes > 2**bits:
                break
            chance = _chance(bits, probes, float(theta))
            if 1 - (1 - chance) ** MOST_TABLES < recall:
                continue
            tables = 1 if chance >= recall else ceil(log(1 - recall) / log(1 - chance))
            entries = n * tables * probes * random_collisions(dim, bits)
            found = Suggestion(bits, tables, probes, 1 - (1 - chance) ** tables, min(entries, float(n * tables)))
            if found.cost < best.cost:
                best = found
    return best


def _check_share(name: str, share: object, one: bool) -> None:
    if isinstance(share, bool) or not isinstance(share, Real) or not (0 < float(share) < 1 or (one and share == 1)):
        raise ValueError(f"{name} must be a share above 0 and {'at most' if one else 'below'} 1, got {share!r}")


@cache
def random_collisions(dim: int, bits: int) -> float:
    """Chance that two random directions of dim dimensions share one bucket: the mean of (1 - theta / pi) ** bits."""
    if dim == 1:
        return 0.5 + 0.5 * (bits == 0)
    theta = (np.arange(20_000) + 0.5) * np.pi / 20_000
    log_weight = (dim - 2) * np.log(np.sin(theta))
    weight = np.exp(log_weight - log_weight.max())
    return float(np.sum(weight * (1 - theta / np.pi) ** bits) / np.sum(weight))


@cache
def _chance(bits: int, probes: int, theta: float) -> float:
    """Chance that a neighbour at angle theta is in one of a table's first `probes` buckets."""
    if probes == 1:
        return (1 - theta / np.pi) ** bits
    rng = np.random.default_rng(0)
    query, other = rng.standard_normal((2, TRIALS, bits))
    flipped = (query >= 0) != (np.cos(theta) * query + np.sin(theta) * other >= 0)
    sets = flip_sets(bits, probes)
    width = sets.shape[1]
    order = np.argsort(np.abs(query), axis=1)
    flipped = np.take_along_axis(flipped, order, axis=1)
    margins = np.take_along_axis(query**2, order[:, :width], axis=1)
    first = np.argsort(margins @ sets.T.astype(float), axis=1, kind="stable")[:, :probes]
    hit = (sets[first] == flipped[:, None, :width]).all(-1).any(-1) & ~flipped[:, width:].any(-1)
    return float(hit.mean())


def tuned(xp: Any, kernels: Any, q: Array, x: Array, truth: Array, recall: float, seed: int) -> list[Suggestion]:
    """Settings that find the share `recall` of `truth` (m, k), the places in x of each query's neighbours; the cheapest
    first.

    Measured: in which buckets of which tables the neighbours are, and how many of a sample of x are in those buckets.
    """
    _check_share("recall", recall, one=True)
    (m, k), n = truth.shape, x.shape[0]
    neighbours = xp.take(x, xp.reshape(truth, (-1,)), axis=0)
    step = -(-n // SAMPLE)
    sample = x[::step, :]
    settings = [Suggestion(0, 1, 1, 1.0, float(n))]
    top = ceil(log2(max(n, 2)))
    for bits in range(max(1, top - 10), min(MOST_BITS, top + 4) + 1, 2):
        planes = random_hyperplanes(x.shape[1], bits, MOST_TABLES, seed)
        most = max(probes for probes in PROBES if probes <= 2**bits)
        wanted = to_host(probe_codes(q, planes, kernels.hash_codes(q, planes), most))  # (P, T, m)
        there = to_host(kernels.hash_codes(neighbours, planes)).reshape(MOST_TABLES, m, k)
        ordered = np.sort(to_host(kernels.hash_codes(sample, planes)), axis=1)
        for probes in (probes for probes in PROBES if probes <= most):
            first = wanted[:probes]
            hit = np.zeros((MOST_TABLES, m, k), bool)
            for code in first:
                hit |= there == code[:, :, None]
            found = np.logical_or.accumulate(hit, axis=0).mean(axis=(1, 2))  # by number of tables
            enough = np.flatnonzero(found >= recall)
            if len(enough) == 0:
                continue
            tables = int(enough[0]) + 1
            entries = 0
            for table in range(tables):
                ends = (np.searchsorted(ordered[table], first[:, table], side=side) for side in ("right", "left"))
                entries += int(np.sum(next(ends) - next(ends)))
            mean = entries / m * n / sample.shape[0]
            settings.append(Suggestion(bits, tables, probes, float(found[tables - 1]), mean))
    return sorted(settings, key=lambda suggestion: suggestion.cost)
