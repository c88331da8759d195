"""A case: one call of a kernel, what must hold for it, and what some mistakes would give; and what is asked of it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from opoch_xp.arguments import dtype_name
from opoch_xp.backends import generic
from opoch_xp.backends import library as library_of
from opoch_xp.testing.arrays import Library
from opoch_xp.testing.calls import Call, Made, Parts, is_array, of_twin
from opoch_xp.testing.compare import difference
from opoch_xp.testing.report import Check

Words = tuple[str, str]  # a fault in a few words and how it shows; both empty where there is none

BEFORE = {"f": 2.0**100, "i": -(2**40)}  # what memory is filled with before a kernel gets it
COPIES = 4
ANY_INTEGER = ("sort_tables",)  # kernels that choose among integer dtypes


@dataclass(frozen=True)
class Case:
    """One call, and what must come of it: the generic twin's numbers, floats within `tolerance(dtype)`.

    mistakes: what calls of the twin would give were the plugin to make them, by fault. own: the output that the kernel
    decides by itself, within `rule`; the twin is then given that decision where it takes one. wide: in float64 alone,
    since a rounding may decide otherwise.
    """

    name: str
    sentence: str
    call: Call
    tolerance: Callable[[str], float]
    mistakes: Mapping[str, Call] = field(default_factory=dict)
    own: str = ""
    rule: Callable[[Parts], Words] = lambda parts: ("", "")
    wide: bool = False


def checks(case: Case, kernels: Any, library: Library, dtype: str) -> Iterator[Check]:
    """Asks everything of one case in one dtype; what cannot be asked after an answer is left out."""

    def check(sentence: str, words: Words = ("", "")) -> Check:
        return Check(case.call.kernel, case.name, dtype if case.call.floats else "", sentence, *words)

    expected = of_twin(case.call, library, dtype)
    try:
        made = Made(case.call, kernels, library, dtype)
        parts = _run(case, expected, made, library, dtype)
        again = _run(case, expected, Made(case.call, kernels, library, dtype), library, dtype)
    except Exception as error:  # whatever a plugin raises is told
        yield check("the call returns", (f"raises {type(error).__name__}: {error}", ""))
        return
    words = _unlike(case, parts, expected, library, dtype)
    yield check("outputs are arrays of the library, on the device of the inputs, of the dtype that is asked for", words)
    if words[0]:
        return
    words = next(((f"mutates its argument {name}", figures) for name, figures in made.mutated().items()), ("", ""))
    yield check("arguments stay as they are", words)
    actual, second = ({name: _host(library, part) for name, part in one.items()} for one in (parts, again))
    yield check("the same call gives the same bits twice", _unequal(actual, second))
    words = _wrong(case, actual, expected, library, dtype)
    yield check(case.sentence, words)
    if not words[0]:
        words = _of_views(case, expected, kernels, library, dtype)
        yield check("views, and arrays that may not be written to, are as good", words)


def _run(case: Case, expected: Parts, made: Made, library: Library, dtype: str) -> Parts:
    """The outputs, computed in memory that was filled with BEFORE where that can be arranged."""
    _fill_memory([part for part in expected.values() if is_array(part)], library, dtype)
    return made.outputs()


def _fill_memory(like: list[np.ndarray], library: Library, dtype: str) -> None:
    """Leaves behind memory of the outputs' sizes, which is often what the next array of such a size gets."""
    wide = "float64" if dtype == "float64" else "float32"
    filled = [np.full(part.shape, BEFORE[part.dtype.kind]) for part in like if part.dtype.kind in BEFORE]
    [library.array(part, wide) for part in filled for _ in range(COPIES)]


def _host(library: Library, part: Any) -> Any:
    return library.host(part) if is_array(part) else part


def _unlike(case: Case, parts: Parts, expected: Parts, library: Library, dtype: str) -> Words:
    """What is another kind of thing than the twin's output."""
    place = str(device(library.array(np.zeros(1))))
    for name, want in expected.items():
        if name not in parts:
            return f"{name} is missing", f"{', '.join(parts)} were returned"
        part = parts[name]
        if not is_array(want):
            if name != case.own and part != want:
                return f"{name} is {part}, expected {want}", ""
            continue
        try:
            where = library_of(array_namespace(part))
        except TypeError:
            return f"{name} is no array", f"it is {type(part).__name__}"
        if where != library_of(library.xp):
            return f"{name} is an array of {where}", f"the inputs are arrays of {library_of(library.xp)}"
        if str(device(part)) != place:
            return f"{name} is on {device(part)}, the inputs are on {place}", ""
        kind, wanted = dtype_name(part), _dtypes(case.call.kernel, name, want.dtype.kind, dtype)
        if kind not in wanted:
            return f"{name} has dtype {kind}, expected {' or '.join(wanted)}", f"floats go in as {dtype}"
    return "", ""


def _dtypes(kernel: str, name: str, kind: str, dtype: str) -> tuple[str, ...]:
    """What an output may have, floats going in as `dtype`: see opoch_xp.problem.sum_dtype."""
    if kind == "b":
        return ("bool",)
    if kind != "f":
        return ("int64", "int32", "int16", "uint64", "uint32", "uint16") if kernel in ANY_INTEGER else ("int64",)
    wide = "float64" if dtype == "float64" else "float32"
    return tuple(dict.fromkeys((wide, dtype))) if name == "cells" else (wide,)  # keys and values as they came


def _unequal(actual: Parts, second: Parts) -> Words:
    for name, part in actual.items():
        if is_array(part) and not np.array_equal(part, second[name], equal_nan=part.dtype.kind == "f"):
            return "is not deterministic", f"{name}: {difference(second[name], part, 0.0)[1]}, the second time"
    return "", ""


def _wrong(case: Case, actual: Parts, expected: Parts, library: Library, dtype: str) -> Words:
    """What is wrong with the numbers."""
    for name, part in actual.items():
        if not is_array(part) or part.dtype.kind not in BEFORE:
            continue
        left = np.argwhere(part == BEFORE[part.dtype.kind])
        if len(left):
            shown = f"{len(left)} of {part.size} entries hold what was in memory before, the first at"
            return f"{name} is not written everywhere", f"{shown} {tuple(left[0].tolist())}"
    if all(actual[name].shape == want.shape for name, want in expected.items() if is_array(want)):
        words = case.rule(actual)
        if words[0]:
            return words
        if case.own in signature(getattr(generic, case.call.kernel)).parameters:
            expected = of_twin(case.call.but(**{case.own: actual[case.own]}), library, dtype)
    name, words = _apart(case, actual, expected, dtype)
    if not name:
        return "", ""
    figures = f"{name}: {words[1]}"
    for fault, mistake in case.mistakes.items():
        if not _apart(case, actual, _like(actual, of_twin(mistake, library, dtype)), dtype)[0]:
            return fault, figures
    return f"{name} {words[0]}", figures


def _apart(case: Case, actual: Parts, expected: Parts, dtype: str) -> tuple[str, Words]:
    """The first output that is not the expected one, and how."""
    for name, want in expected.items():
        if is_array(want) and (name != case.own or actual[name].shape != want.shape):
            words = difference(actual[name], want, case.tolerance(dtype) if want.dtype.kind == "f" else 0.0)
            if words[0]:
                return name, words
    return "", ("", "")


def _like(actual: Parts, mistaken: Parts) -> Parts:
    """The outputs of a mistake, cut to the shapes of the actual ones."""
    shapes = {name: part.shape for name, part in actual.items() if is_array(part)}
    return {name: part[tuple(map(slice, shapes[name]))] for name, part in mistaken.items() if name in shapes}


def _of_views(case: Case, expected: Parts, kernels: Any, library: Library, dtype: str) -> Words:
    """What is wrong where every array is a view that is read-only."""
    try:
        made = Made(case.call, kernels, library, dtype, views=True)
        actual = {name: _host(library, part) for name, part in made.outputs().items()}
    except Exception as error:  # as above
        return f"raises {type(error).__name__} for views that are read-only: {error}", ""
    fault, found = _wrong(case, actual, expected, library, dtype)
    return (f"misreads views into larger arrays: {fault}", found) if fault else ("", "")
