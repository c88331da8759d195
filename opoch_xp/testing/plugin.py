"""What a plugin states beside its kernels' numbers: their signatures, what they accept, what they cost."""

from collections.abc import Iterator
from inspect import Parameter, Signature, signature
from typing import Any

import numpy as np

from opoch_xp.arguments import DTYPES
from opoch_xp.backends import KERNELS, generic
from opoch_xp.cost import Cost
from opoch_xp.testing.arrays import Library
from opoch_xp.testing.report import Check

NARROW = ("float16", "bfloat16")
NARROW_KERNELS = ("exact_attention", "build_tree", "query_groups", "tree_attention")  # that get 16-bit floats as such


def plugin_checks(kernels: Any, library: Library) -> Iterator[Check]:
    """The checks of the plugin's constants, and of each of its kernels' signatures."""
    for kernel in KERNELS:
        if kernel in kernels.native:
            fault = _signature(getattr(kernels, kernel), getattr(generic, kernel))
            yield Check(kernel, "signature", "", "the parameters are the twin's; more of them have defaults", fault)
    yield Check("ACCEPTS", "constants", "", f"a tuple of {', '.join(DTYPES)}, float32 among them", _accepts(kernels))
    filled = [kernel for kernel in NARROW_KERNELS if kernel not in kernels.native and kernels.name != "generic"]
    narrow = [dtype for dtype in kernels.ACCEPTS if dtype in NARROW]
    sentence = "who accepts 16 bits has kernels that sum them in float32; the generic ones do not"
    yield Check("ACCEPTS", "constants", "", sentence, f"lacks {', '.join(filled)}" if narrow and filled else "")
    yield Check("COST", "constants", "", "a Cost of numbers above 0", _cost(kernels.COST))
    yield Check("thread_count", "constants", "", "a whole number of at least 1", _thread_count(kernels))
    if "synchronize" in kernels.native:
        fault = _synchronize(kernels, library)
        yield Check("synchronize", "some arrays, or none", "", "it waits, and returns None", fault)


def _accepts(kernels: Any) -> str:
    given = kernels.ACCEPTS
    fits = isinstance(given, tuple) and set(given) <= set(DTYPES) and "float32" in given
    return "" if fits else f"is {given!r}"


def _cost(cost: Any) -> str:
    if not isinstance(cost, Cost):
        return f"is {cost!r}, not an opoch_xp.cost.Cost"
    return "" if min(cost.read, cost.split) > 0 else f"is {cost!r}"


def _thread_count(kernels: Any) -> str:
    try:
        count = kernels.thread_count()
    except Exception as error:  # whatever a plugin raises is told
        return f"raises {type(error).__name__}: {error}"
    return "" if isinstance(count, int) and not isinstance(count, bool) and count > 0 else f"returns {count!r}"


def _synchronize(kernels: Any, library: Library) -> str:
    array = library.array(np.ones(3), "float32")
    try:
        returned = kernels.synchronize(), kernels.synchronize(array, array)
    except Exception as error:  # whatever a plugin raises is told
        return f"raises {type(error).__name__}: {error}"
    return "" if returned == (None, None) else f"returns {returned[1]!r}"


def _signature(kernel: Any, twin: Any) -> str:
    """How a kernel's parameters differ from its twin's; nothing of wrappers that pass on whatever they get."""
    try:
        given = signature(kernel).parameters.values()
    except (TypeError, ValueError):  # of compiled code that does not tell
        return ""
    if {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD} <= {parameter.kind for parameter in given}:
        return ""
    bare = [parameter.replace(annotation=Parameter.empty) for parameter in given]
    wanted = [parameter.replace(annotation=Parameter.empty) for parameter in signature(twin).parameters.values()]
    names = [parameter.name for parameter in wanted]
    optional = all(parameter.default is not Parameter.empty for parameter in bare if parameter.name not in names)
    if optional and [parameter for parameter in bare if parameter.name in names] == wanted:
        return ""
    return f"has the signature {_told(bare)}, expected {_told(wanted)}"


def _told(parameters: list[Parameter]) -> str:
    try:
        return str(Signature(parameters))
    except ValueError:
        return ", ".join(map(str, parameters))
