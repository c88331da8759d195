"""Registry of backends: one entry-point group, read once; one dictionary lookup a call.

A plugin is a module named by an entry point of the group `opoch_xp.backends`; the entry point's name is the array
library. It may define any of KERNELS, with the signature and meaning of the twin in `opoch_xp.backends.generic`; what
it lacks is filled with that twin once, when the plugin is loaded. Nothing falls back at call time. It may also define
ACCEPTS, the dtypes its kernels take as they are (others are widened to float32 before; kernels that accept 16 bits
return float32), COST, what the automatic choice reckons with, thread_count(), from how many threads at a time its
kernels may be called with a gain (1 where it says nothing), API_VERSION, the version of this contract that it was
written for (1 where it says none), and unavailable(), why it cannot be used here, or "".

`opoch_xp.testing.check_backend` is the contract in executable form.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from types import ModuleType, SimpleNamespace
from typing import Any

GROUP = "opoch_xp.backends"
API_VERSION = 2  # grows when a plugin written before would break or compute wrong: another signature, value or meaning
KERNELS = (
    "exact_attention",
    "hash_codes",
    "bucket_attention",
    "build_tree",
    "query_groups",
    "tree_attention",
    "merge_part",
    "sort_tables",
    "find_candidates",
    "search_buckets",
    "synchronize",
)
CONSTANTS = ("ACCEPTS", "COST", "thread_count")


@dataclass(frozen=True)
class Backend:
    """One installed backend: where it comes from, whether it can be used, which kernels are its own.

    name: the array library; source: module and distribution; version: of the distribution, "" for `generic`; reason:
    why it cannot be used, "" when it can; native: the kernels it defines; generic: those that are filled with the
    twins.
    """

    name: str
    source: str
    version: str
    available: bool
    reason: str
    native: tuple[str, ...]
    generic: tuple[str, ...]


def library(xp: Any) -> str:
    """Name of the array library behind a namespace: "numpy", "torch", "jax", "array_api_strict", ..."""
    parts = xp.__name__.split(".")
    return parts[1] if parts[0] == "array_api_compat" and len(parts) > 1 else parts[0]


def namespace(name: str) -> Any:
    """The namespace of an array library: array_api_compat's, or the module `name`, or `name.numpy`.

    Raises ImportError where there is none.
    """
    for path in (f"array_api_compat.{name}", name, f"{name}.numpy"):
        try:
            xp = import_module(path)
        except ModuleNotFoundError as missing:
            if f"{path}.".startswith(f"{missing.name}.") or missing.name == name.partition(".")[0]:
                continue
            raise  # the library is there and lacks something of its own
        if hasattr(xp, "asarray"):
            return xp
    raise ImportError(
        f"there is no array library {name!r} here: neither array_api_compat.{name} nor {name} has asarray"
    )


def _read() -> tuple[Iterable[EntryPoint], dict[str, Exception]]:
    """The entry points of the group; and, by distribution, why those that cannot be read cannot. They hide none of
    others."""
    try:
        return entry_points(group=GROUP), {}
    except Exception:  # of a line in any group of any distribution
        pass
    points: list[EntryPoint] = []
    faults, seen = {}, set()
    for distribution in distributions():
        name, _ = _named(distribution)
        if name in seen:  # the first on the path is the one that is imported
            continue
        seen |= {name} if name else set()
        try:
            points += distribution.entry_points.select(group=GROUP)
        except Exception as error:
            if f"[{GROUP}]" in _listing(distribution):
                faults[name] = error
    return points, faults


def _listing(distribution: Distribution) -> str:
    """The text that a distribution's entry points stand in; "" where it is none."""
    try:
        return distribution.read_text("entry_points.txt") or ""
    except Exception:
        return ""


def _named(distribution: Distribution | None) -> tuple[str, str]:
    """Name and version of a distribution; empty where it has none, as what an uninstallation left behind."""
    try:
        return (distribution.name or "", distribution.version or "") if distribution else ("", "")
    except Exception:  # without METADATA, by version of Python
        return "", ""


@cache
def _found() -> dict[str, tuple[EntryPoint, ...]]:
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in _read()[0]:
        known = found.setdefault(point.name, ())
        if all(point.value != other.value for other in known):  # one distribution may be on the path twice
            found[point.name] = (*known, point)
    return found


def _origin(point: EntryPoint) -> str:
    name, version = _named(point.dist)
    return f"{point.value} ({name} {version})" if name else point.value


def _module(name: str) -> Any:
    if name == "generic":
        return import_module("opoch_xp.backends.generic")
    points = _found()[name]
    if len(points) > 1:
        raise RuntimeError(
            f"backend {name!r} is defined by more than one plugin: {', '.join(map(_origin, points))};"
            " uninstall all but one"
        )
    try:
        return points[0].load()
    except SystemExit as error:
        raise ImportError(f"backend {name!r}: the plugin {_origin(points[0])} ended with {error!r}") from error


def _check_version(name: str, module: Any) -> None:
    """RuntimeError unless the plugin was written for the version of the contract that is in force here."""
    version = getattr(module, "API_VERSION", 1)
    if version == API_VERSION and type(version) is int:
        return
    [point] = _found()[name]
    plugin = _named(point.dist)[0] or point.value
    cure = "its API_VERSION must be a whole number"
    if type(version) is int:
        older = "opoch-xp" if version > API_VERSION else plugin
        cure = f"upgrade {older}, or install a {plugin} that was written for version {API_VERSION}"
    raise RuntimeError(
        f"backend {name!r}: the plugin {_origin(point)} was written for version {version!r} of the plugin API, and this"
        f" opoch_xp has version {API_VERSION}: {cure}"
    )


@cache
def _kernels(name: str) -> SimpleNamespace:
    generic = import_module("opoch_xp.backends.generic")
    module = _module(name)
    if name != "generic":
        _check_version(name, module)
    members = {kernel: getattr(module, kernel, None) or getattr(generic, kernel) for kernel in (*KERNELS, *CONSTANTS)}
    native = tuple(kernel for kernel in KERNELS if hasattr(module, kernel))
    return SimpleNamespace(name=name, native=native, **members)


@cache
def kernels_for(xp: Any, backend: str | None = None) -> SimpleNamespace:
    """Kernels, as attributes, for arrays of the namespace `xp`: its plugin's, or the generic twins.

    Raises ValueError for a backend that is not installed or is for another library, RuntimeError for two plugins of
    one name or one written for another API_VERSION; a plugin that fails to import raises its own exception.
    """
    name = library(xp)
    if backend not in (None, name, "generic"):
        known = ", ".join(sorted({"generic", *_found()}))
        if backend not in _found():
            raise ValueError(f"backend must be one of {known}; got {backend!r}")
        raise ValueError(f"backend {backend!r} takes {backend} arrays, got {name} arrays")
    if backend == name and name not in _found():
        raise ValueError(f"no backend {backend!r} is installed; backend=None or 'generic' uses the generic kernels")
    return _kernels(name if name in _found() and backend != "generic" else "generic")


def listed(name: str) -> Backend:
    """One of the installed backends; one that is broken has its reason."""
    points = _found().get(name, ())
    source = ", ".join(map(_origin, points)) or "opoch_xp.backends.generic"
    version = _named(points[0].dist)[1] if points else ""
    try:
        native = _kernels(name).native
        reason = getattr(_module(name), "unavailable", lambda: "")()
    except Exception as error:  # any plugin may fail in any way; the listing says how
        reason, native = f"{type(error).__name__}: {error}", ()
    filled = tuple(kernel for kernel in KERNELS if kernel not in native) if native else ()
    return Backend(name, source, version, not reason, reason, native, filled)


def installed() -> list[Backend]:
    """Every backend that is installed: its name, source, version, whether it can be used or why not, its kernels.

    A backend that is broken is listed with its reason; nothing is raised. Imports every plugin.

    >>> import opoch_xp as ox
    >>> [backend.name for backend in ox.backends() if backend.available and backend.name in ("generic", "numpy")]
    ['generic', 'numpy']
    """
    return [*map(listed, sorted({*_found(), "generic"})), *_unreadable()]


def _unreadable() -> list[Backend]:
    """Distributions that name backends in a list that cannot be read."""
    return [
        Backend(name, "entry_points.txt", "", False, f"its entry points cannot be read: {error}", (), ())
        for name, error in _read()[1].items()
    ]


class _Backends(ModuleType):
    """This package, callable: `ox.backends()` lists what is installed, and its modules are imported as any others."""

    def __call__(self) -> list[Backend]:
        """Every backend that is installed: see `installed`."""
        return installed()


sys.modules[__name__].__class__ = _Backends
