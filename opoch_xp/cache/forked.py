"""Caches whose keys lie in files, after a fork: parent and child would write each other's tokens."""

import os
from typing import Any
from weakref import WeakSet

_mapped: WeakSet[Any] = WeakSet()  # KVCaches


class _Forked:
    """In the place of the store of a cache that is the parent's."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(
            "this cache's keys lie in files that are the parent's since the fork of this process: save the cache before"
            " forking, and load it in the child"
        )


def leave_to_parent(cache: Any) -> None:
    """Have every use of the cache raise RuntimeError in processes that are forked from this one."""
    _mapped.add(cache)


def _in_child() -> None:
    for cache in list(_mapped):
        if cache._store is not None:
            cache._store = _Forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
