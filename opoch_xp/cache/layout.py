"""What a cache holds, fixed by the first keys appended, and the checks of what is given to it afterwards."""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from array_api_compat import device

from opoch_xp.arguments import (
    check_finite_array,
    check_kind,
    check_mask,
    detached,
    dtype_name,
    kernels_named,
    name_of,
    namespace_of,
    on_host,
    to_host,
)
from opoch_xp.backends import generic, library
from opoch_xp.graphs import has_tangent, traced
from opoch_xp.problem import sum_dtype

Array = Any
FEW = 1 << 12  # numbers of an array that a product of one thread goes through
Columns = np.ndarray | None  # the columns of an input that are kept; None: all


@dataclass(frozen=True)
class Layout:
    """The library, device, dtype and sizes of the keys and values of a cache.

    lead: the axes before heads, () where there are two axes or three; batch: sequences, their product; kind: the type
    of the arrays; dtype: as given; stored: what is kept, one that the kernels take; host: whether reading is free.
    """

    xp: Any
    kernels: Any
    kind: type
    device: Any
    dtype: Any
    stored: Any
    host: bool
    axes: int
    lead: tuple[int, ...]
    heads: int
    dim: int
    width: int

    def __deepcopy__(self, memo: dict[int, Any]) -> "Layout":
        return self

    @cached_property
    def batch(self) -> int:
        return math.prod(self.lead)

    @cached_property
    def before(self) -> tuple[int, ...]:
        """The axes of keys and values before tokens, as given."""
        return (*self.lead, self.heads) if self.axes > 2 else ()

    @cached_property
    def everyone(self) -> np.ndarray:
        """The numbers of all sequences."""
        return np.arange(self.batch)

    @cached_property
    def summed(self) -> Any:
        """The dtype of out and lse."""
        return sum_dtype(self.xp, self.stored)


def stored_dtype(xp: Any, kernels: Any, name: str, widened: bool) -> Any:
    """What numbers of the dtype of that name are kept in: float32 for 16 bits, where the kernels that read them, or
    the generic ones (`widened`), do not take them as they are."""
    accepted = generic.ACCEPTS if widened else kernels.ACCEPTS
    return getattr(xp, name if name in accepted else "float32")


def of_first(k: Array, v: Array, backend: str | None, offload: bool) -> Layout:
    """The layout that the first keys and values fix; TypeError or ValueError where they do not fit together."""
    xp = namespace_of(k=k, v=v)
    check_kind(k=k, v=v)
    shapes = f"got k {tuple(k.shape)}, v {tuple(v.shape)}"
    if len(k.shape) < 2 or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"k and v must have the same axes before the last, at least (n, d); {shapes}")
    if 0 in (*k.shape[:-2], k.shape[-1], v.shape[-1]):
        raise ValueError(f"k and v must have at least one sequence, head and dimension; {shapes}")
    kernels = kernels_named(xp, backend)
    stored = stored_dtype(xp, kernels, dtype_name(k), offload and not on_host(xp, k))
    stored = k.dtype if name_of(stored) == dtype_name(k) else stored  # the same object, which is compared
    heads = k.shape[-3] if len(k.shape) > 2 else 1
    sizes = len(k.shape), tuple(k.shape[:-3]), heads, k.shape[-1], v.shape[-1]
    return Layout(xp, kernels, type(k), device(k), k.dtype, stored, on_host(xp, k), *sizes)


def check_numbers(**arrays: Array) -> None:
    """ValueError for arrays that hold no numbers yet, or that gradients are to flow through."""
    if traced(*arrays.values()):
        raise ValueError(
            "a KVCache changes from call to call, which a traced function does not: append and attend outside jax.jit;"
            " with capacity= the kernels inside are compiled once"
        )
    if has_tangent(*arrays.values()):
        raise ValueError("a KVCache carries no tangents: append and attend outside of forward-mode differentiation")
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_grad_enabled():
        return
    for name, array in arrays.items():
        if getattr(array, "requires_grad", False):
            raise ValueError(
                f"{name} requires gradients, which a KVCache does not carry: use torch.no_grad() around the call, or"
                " opoch_xp.attention to train"
            )


def check_same(layout: Layout, k: Array, v: Array) -> None:
    """TypeError or ValueError unless k and v are more of what the cache holds."""
    for name, array, size in (("k", k, layout.dim), ("v", v, layout.width)):
        _check_kind(layout, name, array)
        shape = tuple(array.shape)
        if len(shape) != layout.axes or shape[:-2] != layout.before or shape[-1] != size:
            expected = f"({''.join(f'{n}, ' for n in layout.before)}n, {size})"
            raise ValueError(f"{name} must have shape {expected}, as the cache's, got {shape}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k and v must have the same tokens, got k {tuple(k.shape)}, v {tuple(v.shape)}")


def check_queries(layout: Layout, q: Array) -> None:
    """TypeError or ValueError unless queries fit the keys of the cache."""
    _check_kind(layout, "q", q)
    shape = tuple(q.shape)
    heads = shape[-3] if len(shape) > 2 else layout.heads
    fits = len(shape) == layout.axes and shape[:-3] == layout.lead and shape[-1] == layout.dim
    if not fits or not heads or heads % layout.heads:
        heads_of = f"a multiple of {layout.heads}, " if layout.axes > 2 else ""
        expected = f"({''.join(f'{n}, ' for n in layout.lead)}{heads_of}n_q, {layout.dim})"
        raise ValueError(f"q must have shape {expected}, to go with the cache's keys, got {shape}")


def _check_kind(layout: Layout, name: str, array: Array) -> None:
    """TypeError or ValueError unless an array is of the cache's library, dtype and device."""
    if type(array) is not layout.kind:
        xp = namespace_of(**{name: array})
        if xp is not layout.xp:
            raise TypeError(f"{name} must be an array of {library(layout.xp)}, as the cache's, got {library(xp)}")
    if array.dtype != layout.dtype:
        raise TypeError(f"{name} must have the cache's dtype {name_of(layout.dtype)}, got {dtype_name(array)}")
    if device(array) != layout.device:
        raise ValueError(f"{name} must be on the cache's device {layout.device}, got {device(array)}")


def arranged(layout: Layout, x: Array) -> Array:
    """Keys or values (..., H_kv, m, d) as they are stored, (batch, H_kv, m, d)."""
    x = detached(x)
    if layout.stored is not x.dtype:
        x = layout.xp.astype(x, layout.stored, copy=False)
    if layout.axes < 5:
        return x if layout.axes == 4 else x[None, ...] if layout.axes == 3 else x[None, None, ...]
    return layout.xp.reshape(x, (layout.batch, layout.heads, *x.shape[-2:]))


def arranged_queries(layout: Layout, q: Array) -> Array:
    """Queries (..., H, n_q, d) as kernels take them, (batch, H_kv, repeat, n_q, d); what is not finite is NaN."""
    xp = layout.xp
    q = detached(q)
    q = xp.astype(q, layout.stored, copy=False)
    if not layout.host or not _all_finite(xp, q):
        wide = xp.astype(q, layout.summed, copy=False)
        q = xp.astype(xp.where(xp.isfinite(wide), wide, xp.nan), layout.stored, copy=False)
    repeat = 1 if layout.axes == 2 else q.shape[-3] // layout.heads
    return xp.reshape(q, (layout.batch, layout.heads, repeat, *q.shape[-2:]))


def _all_finite(xp: Any, *arrays: Array) -> bool:
    """Whether no entry is infinite or NaN, by sums: False may be an overflow."""
    if all(type(x) is np.ndarray and x.size <= FEW for x in arrays):  # of a token: a product is a fifth of a sum's cost
        return all(math.isfinite(np.vdot(x, x)) for x in arrays)
    with np.errstate(over="ignore", invalid="ignore"):
        return all(math.isfinite(float(xp.sum(x))) for x in arrays)


def check_finite(layout: Layout, wanted: bool | None, k: Array, v: Array) -> None:
    """ValueError for keys or values that are not finite: looked for on the host, elsewhere where it is wanted."""
    if k.shape[-2] and (layout.host if wanted is None else wanted) and not _all_finite(layout.xp, k, v):
        for name, array in (("k", k), ("v", v)):
            check_finite_array(layout.xp, name, layout.xp.reshape(array, (-1, *array.shape[-2:])))


def columns_kept(layout: Layout, key_mask: Array | None, k: Array) -> list[tuple[np.ndarray, Columns]]:
    """Sequences, in groups that keep the same columns of k, and those columns. Reads the mask back to the host."""
    if key_mask is None:
        return [(layout.everyone, None)]
    at_host = isinstance(key_mask, np.ndarray)  # whatever the library of k
    check_mask(layout.xp, key_mask, np.broadcast_to(np.float32(0), tuple(k.shape)) if at_host else k)
    kept = to_host(key_mask).reshape(layout.batch, -1)
    if kept.all():
        return [(layout.everyone, None)]
    return [(some, np.flatnonzero(kept[some[0]])) for some in _grouped(layout.everyone, map(np.ndarray.tobytes, kept))]


def alike(sequences: np.ndarray, *figures: np.ndarray) -> Iterable[np.ndarray]:
    """The sequences in groups whose figures are the same."""
    if len(sequences) == 1:
        return (sequences,)
    return _grouped(sequences, zip(*(x[sequences].tolist() for x in figures), strict=True))


def _grouped(sequences: np.ndarray, keys: Iterable[Any]) -> list[np.ndarray]:
    """The sequences whose keys are equal, in groups."""
    groups: dict[Any, list[int]] = {}
    for number, key in zip(sequences.tolist(), keys, strict=True):
        groups.setdefault(key, []).append(number)
    return [np.array(some) for some in groups.values()]


def sequence_numbers(indices: Any) -> np.ndarray:
    """Host integers of a list or an array of whole numbers."""
    numbers = np.asarray(indices if isinstance(indices, list | tuple | range) else to_host(indices))
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or not len(numbers):
        raise ValueError(f"indices must be whole numbers along one axis, at least one, got {indices!r}")
    return numbers.astype(np.int64)
