"""NumPy plugin: the kernels in blocks that stay in cache, on all cores; compiled ones where Numba is installed, see
`opoch_xp.backends.compiled`.

Threads: `threads(n)` around a call, or the environment variable OPOCH_NUM_THREADS; by default all cores. See
`opoch_xp.backends.numpy.pool`.
"""

from opoch_xp.backends.compiled import wanted
from opoch_xp.backends.generic import synchronize
from opoch_xp.backends.numpy.buckets import bucket_attention
from opoch_xp.backends.numpy.hashing import hash_codes
from opoch_xp.backends.numpy.pool import thread_count, threads
from opoch_xp.backends.numpy.search import find_candidates, search_buckets, sort_tables
from opoch_xp.cost import COMPILED, Cost

if wanted():
    from opoch_xp.backends.numpy.compiled import (
        build_tree,
        exact_attention,
        merge_part,
        query_groups,
        tree_attention,
    )
else:
    from opoch_xp.backends.numpy.exact import exact_attention, merge_part
    from opoch_xp.backends.numpy.tree import build_tree, query_groups, tree_attention

__all__ = [
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
    "threads",
    "tree_attention",
]

API_VERSION = 2  # of opoch_xp.backends
COST = COMPILED if wanted() else Cost(read=1.8, split=230.0)
