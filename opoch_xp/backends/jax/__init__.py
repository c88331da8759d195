"""JAX plugin: the generic kernels, compiled, with JAX's own loops where theirs would be unrolled.

Exact attention and the treecode are static: `jax.jit`, `jax.grad` and `jax.vmap` pass through them. A kernel is
compiled once for each shape it meets, whether the call around it is compiled or not. Gradients compute each block anew,
so no matrix is kept. Shared buckets and the index depend on the numbers: they do not run under `jax.jit`.
"""

from opoch_xp.backends.generic import synchronize
from opoch_xp.backends.jax.exact import exact_attention, merge_part
from opoch_xp.backends.jax.hashing import hash_codes
from opoch_xp.backends.jax.tree import build_tree, query_groups, tree_attention
from opoch_xp.cost import Cost

__all__ = [
    "COST",
    "build_tree",
    "exact_attention",
    "hash_codes",
    "merge_part",
    "query_groups",
    "synchronize",
    "tree_attention",
]

API_VERSION = 2  # of opoch_xp.backends
COST = Cost(read=2.0, split=300.0)  # fitted to benchmarks/xla.py on two cores: within a fifth of each ratio
