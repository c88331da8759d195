"""Attention over sequences too long for exact attention, for arrays of any library, with its error measured."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opoch_xp.attention import ApproximationWarning, Attention, Report, attend, attention
    from opoch_xp.audit import Audit, audit
    from opoch_xp.backends import installed as backends
    from opoch_xp.cache import KVCache
    from opoch_xp.explain import explain
    from opoch_xp.hashing import hash_codes, random_hyperplanes
    from opoch_xp.index import LSHIndex
    from opoch_xp.methods import LSH, Exact, Treecode
    from opoch_xp.suggest import suggest
    from opoch_xp.tune import tune

__version__ = "0.1.0"
__all__ = [
    "LSH",
    "ApproximationWarning",
    "Attention",
    "Audit",
    "Exact",
    "KVCache",
    "LSHIndex",
    "Report",
    "Treecode",
    "attend",
    "attention",
    "audit",
    "backends",
    "explain",
    "hash_codes",
    "random_hyperplanes",
    "suggest",
    "tune",
]

_HOME = {
    "ApproximationWarning": "attention",
    "Attention": "attention",
    "Report": "attention",
    "attend": "attention",
    "attention": "attention",
    "Audit": "audit",
    "audit": "audit",
    "explain": "explain",
    "KVCache": "cache",
    "hash_codes": "hashing",
    "random_hyperplanes": "hashing",
    "LSH": "methods",
    "LSHIndex": "index",
    "Exact": "methods",
    "Treecode": "methods",
    "suggest": "suggest",
    "tune": "tune",
}


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use: importing the package imports no array library."""
    if name == "backends":  # a package that can be called
        return import_module("opoch_xp.backends")
    if name not in _HOME:
        raise AttributeError(f"module 'opoch_xp' has no attribute {name!r}")
    value = getattr(import_module(f"opoch_xp.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """The package: `ox.audit` is the function, although the import of the module `opoch_xp.audit` would set it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
