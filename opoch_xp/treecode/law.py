"""The law of few keys: what a node of a tree holds of a query's softmax, estimated from its count, mean and variance.

A node of n keys whose logits have mean m and variance sigma^2 holds the log mass ln n + m + ln((1/n) sum exp(x)), where
x are n normal numbers of that variance. `log_gain` is the expected value of its last term, `log_deviation` the standard
deviation. Both are fits to simulated nodes of 4 to 1,024 keys, with the right limits: sigma^2 / 2 for many keys that
count, the largest of n normal numbers where one key does. The random-energy law (Derrida, 1981) is the limit of many
keys, and 3 too high for 16 keys at sigma = 5.

Backends that write these formulas again are held to them by one test, tests/test_law.py.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from array_api_compat import array_namespace

Array = Any

DEVIATIONS = 3.0  # of the log mass, by which a node may hold more than is estimated
SMALLEST = 1e-30  # of a variance, as its logarithm is taken: below, the keys of a node are alike


@dataclass(frozen=True)
class Coefficients:
    """What the law needs of a node's count: ln n and four constants made of it.

    gain: a of log_gain; width: 1 / t**2; slope: s**2 of log_deviation; knee: p**2; share: p**2 / n. Numbers, or arrays
    of one shape.
    """

    log: Any
    gain: Any
    width: Any
    slope: Any
    knee: Any
    share: Any


def _coefficients(log: Any, count: Any) -> Coefficients:
    t = 1 + 0.26 * log
    s, p = 1 / (1 + 0.25 * log), 1.2 + 0.4 * log
    return Coefficients(log, log * (0.92 + 0.067 * log), 1 / (t * t), s * s, p * p, p * p / count)


@lru_cache(256)
def coefficients_of(count: int) -> Coefficients:
    """The coefficients of nodes of `count` keys, numbers; a node of none has those of one."""
    count = max(count, 1)
    return _coefficients(math.log(count), float(count))


def coefficients(count: Array) -> Coefficients:
    """The coefficients of counts (...), floats."""
    xp = array_namespace(count)
    count = xp.where(count > 0, count, 1.0)
    return _coefficients(xp.log(count), count)


def log_gain(sigma2: Array, c: Coefficients) -> Array:
    """E ln((1/n) sum of n exp(x)), x normal with variance sigma2: a hyperbola in sigma, within .08 for n = 16 and .22
    for 1,024. Its derivative is finite everywhere, also at zero."""
    return c.gain * (array_namespace(sigma2).sqrt(1 + sigma2 * c.width) - 1)


def log_deviation(sigma2: Array, c: Coefficients) -> Array:
    """Standard deviation of the same, or more: sigma / sqrt(n) while many keys count, that of the largest key when one
    does. Up to 1.15 times the deviation of 16 keys, 2.4 times that of 1,024 (at sigma = 1)."""
    return array_namespace(sigma2).sqrt(sigma2 * (c.slope * sigma2 + c.share) / (sigma2 + c.knee))


def log_mass(dot: Array, sigma2: Array, count: Array) -> Array:
    """Estimated ln of the sum of exp(scale q . k) over the keys of a node; -inf for a node of none.

    dot = scale q . mean key; sigma2 = scale**2 sum_i q_i**2 var_i; count: keys of the node. All broadcast.
    """
    xp, c = array_namespace(dot), coefficients(count)
    return xp.where(count > 0, dot + c.log + log_gain(sigma2, c), -xp.inf)


def excess(sigma2: Array, count: Array) -> Array:
    """By how much the log of what a node may hold exceeds its log mass: three deviations more than is estimated, less
    where its keys are alike, since their mean is then right whatever it holds."""
    xp = array_namespace(sigma2)
    alike = 0.5 * xp.log(xp.clip(sigma2, SMALLEST, 1.0))
    return DEVIATIONS * log_deviation(sigma2, coefficients(count)) + alike
