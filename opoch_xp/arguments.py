"""From the caller's arguments to a Problem: every check in the caller's words, then one layout for all kernels."""

from math import isfinite
from numbers import Complex, Real
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from opoch_xp.backends import kernels_for, library
from opoch_xp.problem import Problem, sum_dtype

Array = Any
DTYPES = ("float16", "bfloat16", "float32", "float64")
HOST_LIBRARIES = ("numpy", "array_api_strict")
OPERATIONS = ("__array_ufunc__", "__array_function__", "__mul__", "__eq__")  # of an array; a subclass may have its own


def namespace_of(**arrays: Array) -> Any:
    """The one namespace of the named arrays; TypeError when an argument is no array or libraries are mixed."""
    spaces = {}
    for name, array in arrays.items():
        check_plain(name, array)
        try:
            spaces[name] = array_namespace(array)
        except TypeError:
            kind = type(array).__name__
            raise TypeError(f"{name} must be an array of a library with an array namespace, got {kind}") from None
    if len(set(spaces.values())) > 1:
        given = ", ".join(f"{name}: {library(xp)}" for name, xp in spaces.items())
        raise TypeError(f"{_names(arrays)} must be arrays of one library, got {given}")
    return next(iter(spaces.values()))


def check_plain(name: str, array: Array) -> None:
    """TypeError for a subclass of NumPy's arrays that computes otherwise: matrices, masked arrays, quantities."""
    kind = type(array)
    if kind is np.ndarray or not isinstance(array, np.ndarray):
        return
    if any(getattr(kind, operation) is not getattr(np.ndarray, operation) for operation in OPERATIONS):
        raise TypeError(
            f"{name} must be a plain array, got {kind.__module__}.{kind.__qualname__}, which computes otherwise: give"
            " its numbers by numpy.asarray, and what is masked as a mask of its own"
        )


def name_of(dtype: Any) -> str:
    """float32, whatever a library calls it: an instance, a class, with or without its module."""
    return str(dtype).rsplit(".", 1)[-1].removesuffix("'>")


def dtype_name(array: Array) -> str:
    return name_of(array.dtype)


def on_host(xp: Any, array: Array) -> bool:
    """Whether reading the array's figures back costs nothing: host arrays that are not being traced."""
    return library(xp) in HOST_LIBRARIES or (library(xp) == "torch" and array.device.type == "cpu")


def detached(array: Array) -> Array:
    """A tensor of PyTorch's apart from its graph, in memory as it is read: negated where a view only says so."""
    return array.detach().resolve_neg() if hasattr(array, "resolve_neg") else array


def to_host(array: Array) -> np.ndarray:
    """The array in NumPy, copied from its device where it has one of its own."""
    array = detached(array)
    if hasattr(array, "cpu"):  # PyTorch's
        array = array.cpu()
    try:
        return np.asarray(array.get() if hasattr(array, "get") else array)
    except (TypeError, ValueError, RuntimeError):  # of a device that is asked by the standard's own way
        return np.from_dlpack(array, device="cpu")


def _names(arrays: dict[str, Array]) -> str:
    names = list(arrays)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def check_kind(**arrays: Array) -> None:
    for name, array in arrays.items():  # of PyTorch; other libraries have layouts of other kinds
        layout = "torch.nested" if getattr(array, "is_nested", False) else str(getattr(array, "layout", ""))
        if layout.startswith("torch.") and layout != "torch.strided":
            raise TypeError(f"{name} must be a dense array, got one that is {layout.removeprefix('torch.')}")
    dtypes = {name: dtype_name(array) for name, array in arrays.items()}
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise TypeError(f"{name} must have dtype {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {dtype}")
    devices = {name: where for name, array in arrays.items() if (where := device(array)) is not None}  # None: traced
    for what, figures in (("dtype", dtypes), ("device", devices)):
        if len({str(figure) for figure in figures.values()}) > 1:
            given = ", ".join(f"{name}: {figure}" for name, figure in figures.items())
            kind = TypeError if what == "dtype" else ValueError
            raise kind(f"{_names(arrays)} must have one {what}, got {given}")


def _check_shapes(q: Array, k: Array, v: Array) -> None:
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if len({len(q.shape), len(k.shape), len(v.shape)}) > 1 or len(q.shape) < 2:
        raise ValueError(f"q, k and v must have the same number of axes, at least (n, d); {shapes}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same last axis d; {shapes}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k and v must have the same number of keys n_k; {shapes}")
    if k.shape[-2] == 0 or k.shape[-1] == 0:
        raise ValueError(f"k must have at least one key and one dimension; {shapes}")
    if len(q.shape) == 2:
        return
    if q.shape[:-3] != k.shape[:-3] or k.shape[:-2] != v.shape[:-2]:
        raise ValueError(f"q, k and v must have the same batch axes, and k and v the same heads; {shapes}")
    heads, key_heads = q.shape[-3], k.shape[-3]
    if (key_heads == 0) != (heads == 0) or (key_heads and heads % key_heads):
        raise ValueError(f"the heads of q must be a multiple of the heads of k, got {heads} and {key_heads}")


def check_mask(xp: Any, key_mask: Array, k: Array) -> None:
    namespace_of(k=k, key_mask=key_mask)
    expected = (k.shape[-2],) if len(k.shape) == 2 else (*k.shape[:-3], k.shape[-2])
    if dtype_name(key_mask) != "bool":
        raise TypeError(f"key_mask must have dtype bool (True = keep), got {dtype_name(key_mask)}")
    if tuple(key_mask.shape) != tuple(expected):
        shape = tuple(key_mask.shape)
        raise ValueError(f"key_mask must have shape {tuple(expected)}, the batch axes of k and n_k; got {shape}")
    if None not in (device(key_mask), device(k)) and str(device(key_mask)) != str(device(k)):
        raise ValueError(f"key_mask must be on the device of k, {device(k)}, got {device(key_mask)}")


def _sum_is_finite(xp: Any, array: Array) -> bool:
    """One summing pass: True says that every entry is finite; the sum of finite entries may overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        return isfinite(float(detached(xp.sum(array))))


def check_finite_array(xp: Any, name: str, array: Array) -> None:
    if _sum_is_finite(xp, array) or bool(xp.all(xp.isfinite(array))):
        return
    flat = xp.reshape(xp.isfinite(array), (-1,))
    place, where = int(xp.argmin(xp.astype(flat, xp.int8))), []
    for size in reversed(array.shape):
        where.append(place % size)
        place //= size
    batch, row, column = reversed(where)
    raise ValueError(
        f"{name} must be finite; the first entry that is not stands at key {row}, dimension {column}"
        f" of key head {batch} (batch axes and heads counted together); a key_mask hides keys that hold no number"
    )


def check_arrays(q: Array, k: Array, v: Array, key_mask: Array | None) -> Any:
    """The namespace of arrays that fit together, by their kinds and shapes; otherwise TypeError or ValueError."""
    xp = namespace_of(q=q, k=k, v=v)
    check_kind(q=q, k=k, v=v)
    _check_shapes(q, k, v)
    if key_mask is not None:
        check_mask(xp, key_mask, k)
    return xp


def kernels_named(xp: Any, backend: object) -> Any:
    """The kernels of opoch_xp.backends.kernels_for; TypeError where the backend is no name."""
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be the name of a backend or None, got {backend!r}")
    return kernels_for(xp, backend)


def check_scale(scale: float | None, dim: int) -> float:
    """The scale given, a number or an array of one without axes, or dim ** -0.5; TypeError or ValueError where it is
    not finite, or is one that gradients are to flow to."""
    if getattr(scale, "requires_grad", False):
        raise TypeError("scale must be a finite number, got one that requires gradients: multiply q by it instead")
    try:
        if not isinstance(scale, Real | None) and (
            not hasattr(scale, "__float__") or isinstance(scale, Complex) or len(getattr(scale, "shape", ()))
        ):
            raise TypeError
        number = float(dim**-0.5 if scale is None else scale)
    except TypeError:
        raise TypeError(f"scale must be a finite number, got {scale!r}") from None
    if not abs(number) < float("inf"):
        raise ValueError(f"scale must be a finite number, got {scale}")
    return number


def prepare(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Array | None = None,
    backend: str | None = None,
    check_finite: bool | None = None,
) -> Problem:
    """The Problem that the arguments pose, or TypeError or ValueError in the caller's words."""
    xp = check_arrays(q, k, v, key_mask)
    problem = lay_out(xp, kernels_named(xp, backend), q, k, v, causal, check_scale(scale, q.shape[-1]), key_mask)
    if check_finite or (check_finite is None and on_host(xp, q)):
        check_finite_array(xp, "k", problem.k)
        check_finite_array(xp, "v", problem.v)
    return problem


def lay_out(
    xp: Any, kernels: Any, q: Array, k: Array, v: Array, causal: bool, scale: float, key_mask: Array | None
) -> Problem:
    """The Problem of arguments that were checked."""
    if kernels.name != "generic":  # kernels write in place: gradients are opoch_xp.graphs'
        q, k, v = (detached(x) for x in (q, k, v))
    stored = q.dtype if dtype_name(q) in kernels.ACCEPTS else xp.float32
    key_heads = 1
    for size in k.shape[:-2]:
        key_heads *= size
    repeat = 1 if len(q.shape) == 2 or not k.shape[-3] else q.shape[-3] // k.shape[-3]
    q3 = xp.reshape(xp.astype(q, stored, copy=False), (key_heads, repeat, *q.shape[-2:]))
    k3 = xp.reshape(xp.astype(k, stored, copy=False), (key_heads, *k.shape[-2:]))
    v3 = xp.reshape(xp.astype(v, stored, copy=False), (key_heads, *v.shape[-2:]))
    mask = None
    if not on_host(xp, q) or not _sum_is_finite(xp, q3):
        wide = xp.astype(q3, sum_dtype(xp, q3.dtype), copy=False)
        wide = xp.where(xp.isfinite(wide), wide, xp.nan)  # logits of -inf would pass for keys that are not seen
        q3 = xp.astype(wide, q3.dtype, copy=False)
    if key_mask is not None and key_heads:
        per_batch = 1 if len(k.shape) == 2 else k.shape[-3]
        spread = xp.reshape(key_mask, (-1, 1, k.shape[-2]))
        spread = xp.broadcast_to(spread, (key_heads // per_batch, per_batch, k.shape[-2]))
        mask = xp.reshape(spread, (key_heads, k.shape[-2]))
        zero = xp.zeros((), dtype=k3.dtype, device=device(k3))
        k3 = xp.where(mask[..., None], k3, zero)
        v3 = xp.where(mask[..., None], v3, zero)
    return Problem(xp, kernels, q3, k3, v3, mask, bool(causal), float(scale))


def restore(q: Array, v: Array, out: Array, lse: Array, xp: Any) -> tuple[Array, Array]:
    """out (..., H, n_q, d_v) in q's dtype and lse (..., H, n_q), from the kernels' layout."""
    return xp.astype(xp.reshape(out, (*q.shape[:-1], v.shape[-1])), q.dtype, copy=False), xp.reshape(lse, q.shape[:-1])
