"""Calls of kernels as values: one call is made of the plugin, in its library, and of the generic twin, in NumPy."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from inspect import signature
from typing import Any

import numpy as np

from opoch_xp.backends import generic, namespace
from opoch_xp.buckets import Tables
from opoch_xp.testing.arrays import Library
from opoch_xp.testing.compare import difference
from opoch_xp.treecode.tree import Lists, Part, Tree

Array = Any
Parts = dict[str, Any]  # outputs or arguments, by name

HOST = ("axes", "count", "first", "planes", "positions")  # arguments that kernels take as NumPy arrays
GIVEN_UP = {"merge_part": ("out", "lse")}  # arguments whose memory a kernel may reuse
OUTPUTS = {
    "exact_attention": ("out", "lse"),
    "hash_codes": ("codes",),
    "bucket_attention": ("out", "lse", "read"),
    "query_groups": ("groups",),
    "merge_part": ("out", "lse"),
    "find_candidates": ("offsets", "places"),
    "search_buckets": ("places", "scores"),
}


@dataclass(frozen=True)
class Call:
    """A kernel and its arguments by name.

    Host arrays become the library's, but for those named in HOST. An argument may be a Call: its result is then given.
    """

    kernel: str
    arguments: Parts

    @property
    def floats(self) -> bool:
        """Whether an array of the library holds floats."""
        given = ((name, value) for name, value in self.arguments.items() if name not in HOST)
        return any(value.floats if isinstance(value, Call) else _is_float(value) for _, value in given)

    def but(self, **changed: Any) -> "Call":
        """The same with other arguments."""
        return replace(self, arguments={**self.arguments, **changed})


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The arrays, and whatever else, that a value is made of, by name: "tree.summaries[0]"."""
    if isinstance(value, Tree | Tables | Lists | Part):
        for field in fields(value):
            yield from leaves(getattr(value, field.name), f"{name}.{field.name}".lstrip("."))
    elif isinstance(value, tuple):
        for number, part in enumerate(value):
            yield from leaves(part, f"{name}[{number}]")
    else:
        yield name, value


class Made:
    """A call whose arguments are arrays of one library; a host array given twice becomes one array given twice.

    dtype: of floats. views: every array is a part of a larger one that holds NaN, -1 or True around it, without leave
    to write to where the library has that.
    """

    def __init__(self, call: Call, kernels: Any, library: Library, dtype: str, views: bool = False) -> None:
        self.kernel = call.kernel
        self._kernels, self._library, self._dtype, self._views = kernels, library, dtype, views
        self._given_up = GIVEN_UP.get(call.kernel, ())
        self._known: dict[int, Array] = {}
        self._arguments = {name: self._of(value, name) for name, value in call.arguments.items()}
        given = (leaf for item in self._arguments.items() for leaf in leaves(item[1], item[0]))
        watched = {name: value for name, value in given if is_array(value) and name not in self._given_up}
        self._before = {name: (value, library.host(value)) for name, value in watched.items()}

    def result(self) -> Any:
        """What the kernel returns, called as the library calls it: by place what may be given so, the rest by name."""
        bound = signature(getattr(generic, self.kernel)).bind(**self._arguments)
        with np.errstate(all="ignore"):
            return getattr(self._kernels, self.kernel)(*bound.args, **bound.kwargs)

    def outputs(self) -> Parts:
        """The same by name; ValueError where it is not as many values as the twin's."""
        result, names = self.result(), OUTPUTS.get(self.kernel)
        if names is None:
            return dict(leaves(result))
        parts = result if isinstance(result, tuple) else (result,)
        if len(parts) != len(names):
            raise ValueError(f"{len(parts)} values were returned, expected {len(names)}: {', '.join(names)}")
        return dict(zip(names, parts, strict=True))

    def mutated(self) -> dict[str, str]:
        """The arguments that are not what they were, and how."""
        now = {
            name: difference(self._library.host(array), before, 0.0) for name, (array, before) in self._before.items()
        }
        return {name: figures for name, (kind, figures) in now.items() if kind}

    def _of(self, value: Any, name: str) -> Any:
        if isinstance(value, Call):
            return Made(value, self._kernels, self._library, self._dtype).result()
        if isinstance(value, Lists):
            return Lists(*(self._of(part, name) for part in (value.opened, value.cells, value.reads)))
        if isinstance(value, tuple):
            return tuple(self._of(part, name) for part in value)
        if not isinstance(value, np.ndarray):
            return value
        if name in HOST:
            return value.copy()
        if id(value) not in self._known:
            view = self._views and name not in self._given_up
            self._known[id(value)] = self._view(value) if view else self._library.array(value, self._dtype)
        return self._known[id(value)]

    def _view(self, value: np.ndarray) -> Array:
        larger = np.full([size + 2 for size in value.shape], {"f": np.nan, "b": True}.get(value.dtype.kind, -1))
        inside = tuple(slice(1, size + 1) for size in value.shape)
        larger = larger.astype(value.dtype)
        larger[inside] = value
        view = self._library.array(larger, self._dtype)[inside]
        if isinstance(view, np.ndarray):
            view.flags.writeable = False
        return view


def of_twin(call: Call, library: Library, dtype: str) -> Parts:
    """What the generic twin returns in NumPy and float64, of the numbers that `dtype` in the library can hold."""

    def held(value: Any, name: str) -> Any:
        if isinstance(value, Call):
            return Call(value.kernel, {inner: held(x, inner) for inner, x in value.arguments.items()})
        if _is_float(value) and name not in HOST:
            return library.host(library.array(value, dtype)).astype(np.float64)
        return value

    return Made(held(call, ""), generic, Library(namespace("numpy")), "float64").outputs()
