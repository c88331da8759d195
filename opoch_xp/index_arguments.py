"""What the caller gives an index, checked in the caller's words."""

from typing import Any

import numpy as np
from array_api_compat import device

from opoch_xp.arguments import DTYPES, check_plain, detached, dtype_name, namespace_of, to_host
from opoch_xp.backends import library
from opoch_xp.index_settings import Settings
from opoch_xp.index_values import Contents

Array = Any


def vectors(name: str, x: Array, settings: Settings, held: Contents | None) -> tuple[Any, Array]:
    """The namespace of x (m, dim), and x as it is hashed and compared: of unit length where the metric is cosine."""
    xp = namespace_of(**{name: x})
    if dtype_name(x) not in DTYPES:
        raise TypeError(f"{name} must have dtype {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype_name(x)}")
    if x.ndim != 2 or x.shape[1] != settings.dim:
        raise ValueError(f"{name} must be (m, dim) with dim = {settings.dim}, got shape {tuple(x.shape)}")
    x = detached(x)  # an index has no gradient
    if xp.finfo(x.dtype).bits < 32:
        x = xp.astype(x, xp.float32)
    if held is not None:
        ours = namespace_of(x=held.x)
        if ours is not xp:
            raise TypeError(f"{name} must be of {library(ours)}, as what the index holds, got {library(xp)}")
        if x.dtype != held.x.dtype:
            raise TypeError(
                f"{name} must have dtype {dtype_name(held.x)}, as what the index holds, got {dtype_name(x)}"
            )
        if str(device(x)) != str(device(held.x)):
            raise ValueError(f"{name} must be on {device(held.x)}, as what the index holds, got {device(x)}")
    with np.errstate(over="ignore", invalid="ignore"):
        squares = xp.vecdot(x, x)  # a row that is not finite has none that is
    if not bool(xp.all(xp.isfinite(squares))) and not bool(xp.all(xp.isfinite(x))):
        row = int(xp.argmin(xp.astype(xp.all(xp.isfinite(x), axis=1), xp.int8)))
        raise ValueError(f"{name} must be finite; row {row} is not")
    if settings.metric == "cosine":
        return xp, _unit(xp, x, squares)
    most = float(xp.finfo(x.dtype).max) / 4
    if not bool(xp.all(squares <= most)):
        row = int(xp.argmax(squares))
        raise ValueError(
            f"{name} must have squared lengths below {most:.2g}, or scores overflow {dtype_name(x)}; row {row} has "
            "not: scale the vectors, or use the metric 'cosine'"
        )
    return xp, x


def _unit(xp: Any, x: Array, squares: Array) -> Array:
    """Rows at unit length, given their squared lengths; zero rows stay zero."""
    limits = xp.finfo(x.dtype)
    if bool(xp.all((squares > limits.smallest_normal / limits.eps) & (squares < limits.max))):
        return x / xp.sqrt(squares)[:, None]
    top = xp.max(xp.abs(x), axis=1, keepdims=True)  # first, so that squares neither vanish nor overflow
    x = x / xp.where(top > 0, top, 1.0)
    length = xp.sqrt(xp.vecdot(x, x))[:, None]
    return x / xp.where(length > 0, length, 1.0)


def allowed_by(xp: Any, filter: Array | None, held: Contents | None) -> Array | None:
    """The filter of a search, checked."""
    if filter is None:
        return None
    n = 0 if held is None else held.x.shape[0]
    ours = namespace_of(filter=filter)
    if ours is not xp or dtype_name(filter) != "bool":
        given = f"{dtype_name(filter)} of {library(ours)}"
        raise TypeError(f"filter must be a bool array of {library(xp)}, as q is, got {given}")
    if tuple(filter.shape) != (n,):
        raise ValueError(f"filter must have shape ({n},), one entry a vector held, got {tuple(filter.shape)}")
    return filter


def new_ids(ids: Array, count: int, held: Contents | None) -> np.ndarray:
    """The ids (count,) of vectors that are added, on the host, checked."""
    numbers = numbers_of(ids)
    if len(numbers) != count:
        raise ValueError(f"ids must be one for each of the {count} vectors, got {len(numbers)}")
    if numbers.min(initial=0) < 0:
        raise ValueError(f"ids must be at least 0, got {int(numbers.min())}")
    check_different(numbers)
    if held is not None:
        check_free(numbers, held)
    return numbers


def check_free(numbers: np.ndarray, held: Contents) -> None:
    """ValueError unless the index holds none of these ids."""
    taken = np.intersect1d(numbers, to_host(held.ids))
    if len(taken):
        raise ValueError(f"ids must be new to the index; {few(taken)} {are(taken)} held already")


def numbers_of(ids: Array) -> np.ndarray:
    """Ids on the host, (m,) int64."""
    check_plain("ids", ids)
    numbers = to_host(ids) if hasattr(ids, "shape") else np.asarray(ids)
    if numbers.size == 0 and numbers.ndim == 1:
        return np.zeros(0, np.int64)
    large = numbers.dtype.kind == "O" and numbers.ndim == 1 and all(isinstance(number, int) for number in numbers)
    if numbers.ndim != 1 or not (large or numbers.dtype.kind in "iu"):
        given = f"{numbers.dtype} of shape {numbers.shape}" if numbers.ndim else repr(ids)
        raise ValueError(f"ids must be a list of whole numbers, got {given}")
    if large or (numbers.dtype.kind == "u" and numbers.max() > np.iinfo(np.int64).max):
        raise ValueError(f"ids must be below 2**63, got {max(numbers.tolist(), key=abs)}")
    return numbers.astype(np.int64)


def check_different(numbers: np.ndarray) -> None:
    """ValueError for an id that is given twice."""
    values, counts = np.unique(numbers, return_counts=True)
    if len(values) < len(numbers):
        raise ValueError(f"ids must differ; {few(values[counts > 1])} given more than once")


def few(numbers: np.ndarray) -> str:
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return ", ".join(map(str, numbers[:3].tolist())) + more


def are(numbers: np.ndarray) -> str:
    return "is" if len(numbers) == 1 else "are"
