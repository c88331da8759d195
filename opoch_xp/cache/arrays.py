"""Arrays that change: in place where their library can, else anew.

A function that writes returns the array that holds what was written; the one given is given up.
"""

from typing import Any

import numpy as np
from array_api_compat import device, is_writeable_array

from opoch_xp import index_values
from opoch_xp.arguments import to_host
from opoch_xp.treecode.tree import HostRows

Array = Any


def taken(xp: Any, x: Array, index: np.ndarray) -> Array:
    """x[index] along the first axis, index being host integers: a view where they are a run, in the arrays' library."""
    first, count = int(index[0]) if len(index) else 0, len(index)
    run = count and int(index[-1]) - first == count - 1 and (np.diff(index) == 1).all()
    if isinstance(x, HostRows):
        return x.xp.asarray(x.data[first : first + count] if run else x.data[index], device=x.where)
    return x[first : first + count, ...] if run else xp.take(x, xp.asarray(index, device=device(x)), axis=0)


def put(xp: Any, x: Array, starts: np.ndarray, source: Array, count: int) -> Array:
    """x[starts[i] : starts[i] + count] = source[i * count : (i + 1) * count] along the first axis, for every i."""
    if isinstance(x, HostRows):
        source = source.data if isinstance(source, HostRows) else to_host(source)
        put(np, x.data, starts, source, count)
        return x
    source = xp.astype(source, x.dtype, copy=False)
    if is_writeable_array(x):
        for i, start in enumerate(starts.tolist()):
            x[start : start + count, ...] = source[i * count : (i + 1) * count, ...]
        return x
    place = np.full(x.shape[0], -1)
    place[(starts[:, None] + np.arange(count)).reshape(-1)] = np.arange(len(starts) * count)
    index = xp.asarray(place, device=device(x))
    found = xp.take(source, xp.where(index < 0, 0, index), axis=0)
    return xp.where(xp.reshape(index >= 0, (-1, *[1] * (x.ndim - 1))), found, x)


def write_tokens(xp: Any, x: Array, sequences: np.ndarray, start: int, source: Array) -> Array:
    """x[sequences, :, start : start + m] = source (len(sequences), heads, m, ...); x (batch, heads, tokens, ...)."""
    batch, _, m, _ = source.shape
    if m == 0:
        return x
    if is_writeable_array(x):
        if batch == x.shape[0]:  # they are in order
            x[:, :, start : start + m, ...] = source
        else:
            for i, one in enumerate(sequences.tolist()):
                x[one : one + 1, :, start : start + m, ...] = source[i : i + 1, ...]
        return x
    batch, _, tokens, _ = x.shape
    place = xp.arange(tokens, device=device(x)) - start
    inside = (place >= 0) & (place < m)
    found = xp.take(source, xp.clip(place, 0, m - 1), axis=2)
    if len(sequences) < batch:
        number = np.full(batch, -1)
        number[sequences] = np.arange(len(sequences))
        found = xp.take(found, xp.asarray(np.maximum(number, 0), device=device(x)), axis=0)
        inside = inside & xp.asarray(number >= 0, device=device(x))[:, None]
        inside = xp.reshape(inside, (batch, 1, tokens, *[1] * (x.ndim - 3)))
    else:
        inside = xp.reshape(inside, (tokens, *[1] * (x.ndim - 3)))
    return xp.where(inside, found, x)


def bytes_of(*arrays: Array) -> int:
    """Bytes that the arrays' numbers take."""
    return sum(index_values.bytes_of(x.data if isinstance(x, HostRows) else x) for x in arrays)
