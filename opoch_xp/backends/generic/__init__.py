"""Generic kernels in plain Array API standard 2024.12: the specification, and the twin of every plugin's kernel."""

from typing import Any

from opoch_xp.backends.generic.buckets import bucket_attention
from opoch_xp.backends.generic.exact import exact_attention, merge_part
from opoch_xp.backends.generic.hashing import hash_codes
from opoch_xp.backends.generic.search import find_candidates, search_buckets, sort_tables
from opoch_xp.backends.generic.tree import build_tree, query_groups, tree_attention
from opoch_xp.cost import Cost

__all__ = [
    "ACCEPTS",
    "COST",
    "bucket_attention",
    "build_tree",
    "exact_attention",
    "find_candidates",
    "hash_codes",
    "merge_part",
    "query_groups",
    "search_buckets",
    "sort_tables",
    "synchronize",
    "thread_count",
    "tree_attention",
]

ACCEPTS = ("float32", "float64")  # other inputs are widened to float32 before the kernels see them
COST = Cost(read=16.0, split=10.0)


def synchronize(*arrays: Any) -> None:
    """Wait until the arrays are computed. Nothing to wait for on a host."""
    for array in arrays:
        wait = getattr(array, "block_until_ready", None)
        if wait is not None:
            wait()


def thread_count() -> int:
    """From how many threads at a time kernels may be called with a gain: these wait for one another."""
    return 1
