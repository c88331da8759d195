"""What to take: the rtol that keeps a model within a tolerance, and an rtol for each key head that costs less."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from opoch_xp.integrations.evaluation.heads import Measured
from opoch_xp.integrations.settings import Settings
from opoch_xp.methods import Treecode

BY_HEAD = "an rtol for each key head"
LOWEST, HIGHEST = 0.005, 0.5  # values of rtol that are tried
MARGIN = 0.8  # of the tolerance, that is aimed at between measured values
OF_A_HEAD = 0.9  # the largest rtol of a key head
RUNGS = 25  # values of rtol that a head may have,
BEYOND = 2.5  # from the least that was measured over this, to the largest times this


def next_rtol(found: Mapping[float, float], tol: float) -> float | None:
    """The rtol to try next, of what was found of others, distances by rtol: by the line through the two nearest to tol,
    both axes logarithmic. None where it would be within a fifth of one that was tried and is within tol, or too small
    to be of use."""
    tried = sorted(found)
    low = max((rtol for rtol in tried if found[rtol] <= tol), default=None)
    high = min((rtol for rtol in tried if found[rtol] > tol and rtol > (low or 0.0)), default=None)
    if low is not None and high is not None:
        wanted = min(_extrapolated(found, tol, [low, high]), _rounded(high / 1.1))
    elif low is not None:
        wanted = min(_extrapolated(found, tol, tried[-2:]), 2 * low, HIGHEST)
    else:
        wanted = max(_extrapolated(found, tol, tried[:2]), LOWEST)
    if low is None:
        return wanted if wanted < tried[0] / 1.05 else None
    return wanted if wanted > 1.2 * low else None


def _extrapolated(found: Mapping[float, float], tol: float, at: Sequence[float]) -> float:
    """Where the line through two values, both axes logarithmic, comes to tol with a margin."""
    if len(at) < 2:
        return _rounded(at[0] * (MARGIN * tol / max(found[at[0]], 1e-12)) ** 0.7)
    (x0, y0), (x1, y1) = ((math.log(x), math.log(max(found[x], 1e-12))) for x in at)
    slope = max((y1 - y0) / (x1 - x0), 0.2)
    return _rounded(math.exp(x0 + (math.log(MARGIN * tol) - y0) / slope))


def _rounded(rtol: float) -> float:
    """Two figures, downward."""
    step = 10.0 ** (math.floor(math.log10(rtol)) - 1)
    return round(math.floor(rtol / step + 1e-9) * step, 6)


def by_key_head(measured: Sequence[Measured], key_heads: Mapping[int, int], target: Treecode) -> Settings | None:
    """An rtol for each layer and key head: fewest rows read for as much wrong in the layers' outputs, summed, as one
    rtol for all, the target's, would have; None where fewer than two values of rtol were measured, or it is one again.

    measured: treecodes in the same layers, from whose rows and errors those of other values of rtol are interpolated.
    What is wrong of a head counts by its share of its layer's output, and all layers count alike.
    """
    trees = {one.method.rtol: one for one in measured if isinstance(one.method, Treecode)}
    if len(trees) < 2:
        return None
    rtols = np.array(sorted(trees))
    ladder = np.geomspace(max(LOWEST, rtols[0] / BEYOND), min(OF_A_HEAD, rtols[-1] * BEYOND), RUNGS)
    ladder = np.unique([*map(_rounded, ladder), target.rtol])
    places = [(layer, head) for layer in key_heads for head in range(key_heads[layer])]
    rows, wrong = (
        _through(
            ladder, rtols, np.array([[of(trees[x], *place, key_heads[place[0]]) for x in rtols] for place in places])
        )
        for of in (_rows, _wrong)
    )
    budget = wrong[:, np.searchsorted(ladder, target.rtol)].sum()
    low, high = -60.0, 60.0  # logarithm of what a share of an output is worth, in rows
    for _ in range(60):
        middle = (low + high) / 2
        chosen = (rows + math.exp(middle) * wrong).argmin(1)
        over = float(np.take_along_axis(wrong, chosen[:, None], 1).sum()) > budget
        low, high = (middle, high) if over else (low, middle)
    chosen = (rows + math.exp(high) * wrong).argmin(1)
    if len(set(chosen.tolist())) == 1:
        return None
    layers: dict[int, tuple[Treecode, ...]] = {}
    for (layer, _), rung in zip(places, chosen.tolist(), strict=True):
        layers[layer] = (*layers.get(layer, ()), replace(target, rtol=float(ladder[rung])))
    return Settings(layers, BY_HEAD)


def _rows(one: Measured, layer: int, head: int, key_heads: int) -> float:
    """Rows read by a query of those that share a key head, mean."""
    return float(one.rows[layer].reshape(key_heads, -1)[head].mean())


def _wrong(one: Measured, layer: int, head: int, key_heads: int) -> float:
    """What is wrong in the heads that share a key head, of the square of the layer's output."""
    return float(one.share[layer].reshape(key_heads, -1)[head].sum())


def _through(ladder: np.ndarray, rtols: np.ndarray, values: np.ndarray) -> np.ndarray:
    """values (places, rtols) at the ladder's values of rtol: lines between the measured ones and beyond them, both axes
    logarithmic."""
    x, at, y = np.log(rtols), np.log(ladder), np.log(np.maximum(values, 1e-12))
    piece = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
    part = (at - x[piece]) / (x[piece + 1] - x[piece])
    return np.exp(y[:, piece] + part * (y[:, piece + 1] - y[:, piece]))
