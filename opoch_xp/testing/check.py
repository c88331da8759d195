"""check_backend: the contract of a plugin in executable form."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from array_api_compat import array_namespace
from array_api_compat import device as device_of

from opoch_xp.arguments import DTYPES
from opoch_xp.backends import kernels_for, listed, namespace
from opoch_xp.backends import library as library_of
from opoch_xp.testing.arrays import Library
from opoch_xp.testing.case import Case, checks
from opoch_xp.testing.cases import cases_of
from opoch_xp.testing.plugin import NARROW, NARROW_KERNELS, plugin_checks
from opoch_xp.testing.report import BackendError, Check, Report
from opoch_xp.testing.together import together_checks


def check_backend(name: str, *, device: Any = None, xp: Any = None) -> Report:
    """Checks every kernel of the plugin installed for the array library `name` against its generic twin.

    device: where the arrays live, as the library names it; None is the library's own choice. xp: the library's
    namespace, by default `array_api_compat.name`, the module `name` or `name.numpy`. The name "generic" checks the
    generic kernels in the library xp.

    Every kernel is called in small odd sizes, with masks, empty axes and rows that see nothing, in each dtype that the
    plugin accepts; the report lists the cases. The twin computes the same in NumPy and float64, given the decisions
    that the kernel made by itself. Integers must be equal, floats within the rounding of the sums, see
    opoch_xp.testing.rounding. Then whole methods run on the plugin's kernels and the generic ones beside them, and are
    compared by their error against exact attention. Cost: seconds.

    Raises BackendError, an AssertionError that tells every fault; ValueError where no plugin of the name is installed;
    RuntimeError where it cannot be used here; ImportError where the library is not there; and what the plugin raises
    when it is imported.

    >>> report = check_backend("generic")
    >>> report.native == report.generic, report.dtypes
    (False, ('float32', 'float64'))
    """
    xp = namespace("numpy" if name == "generic" else name) if xp is None else xp
    library = Library(array_namespace(xp.asarray(0.0)), device)
    kernels = kernels_for(library.xp, name)
    entry = listed(name)
    if not entry.available:
        raise RuntimeError(f"backend {name!r} cannot be used here: {entry.reason}")
    dtypes = tuple(dtype for dtype in DTYPES if dtype in kernels.ACCEPTS and library.has(dtype))
    found = tuple(_all(kernels, library, dtypes))
    if any(check.fault for check in found):
        raise BackendError(name, entry.source, found)
    where = str(device_of(library.array(np.zeros(1))))
    return Report(name, entry.source, library_of(library.xp), where, dtypes, found, kernels.native, entry.generic)


def _all(kernels: Any, library: Library, dtypes: tuple[str, ...]) -> Iterator[Check]:
    """Every check; numbers are not asked of kernels whose signature is wrong, nor of methods made of wrong kernels."""
    found = list(plugin_checks(kernels, library))
    wrong = {check.kernel for check in found if check.fault}
    for kernel in kernels.native:
        for case in cases_of(kernel) if kernel not in wrong else ():
            for dtype in _dtypes_of(case, dtypes):
                found += checks(case, kernels, library, dtype)
    if not any(check.fault for check in found):
        found += together_checks(kernels, library, dtypes)
    yield from found


def _dtypes_of(case: Case, dtypes: tuple[str, ...]) -> tuple[str, ...]:
    """What a case runs in, of the dtypes that the plugin accepts."""
    if case.wide:
        return tuple(dtype for dtype in dtypes if dtype == "float64")
    if case.call.kernel not in NARROW_KERNELS:  # the others get their floats widened
        dtypes = tuple(dtype for dtype in dtypes if dtype not in NARROW)
    return dtypes if case.call.floats else dtypes[:1]
