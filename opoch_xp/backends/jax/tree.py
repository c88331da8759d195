"""The treecode's kernels in JAX: the generic twins, compiled, their groups gone through by JAX's loop.

Shapes are static, under jax.jit or not: a group opens at most `most` nodes of a level and reads at most as many cells;
generic.tree.MOST where the method has no bound of its own, and all of them for rtol = 0.
"""

from typing import Any

import jax
import numpy as np

from opoch_xp.backends import generic
from opoch_xp.backends.generic.tree import attend_runs, most_chunks, static_bound
from opoch_xp.backends.jax.loops import compiled, in_blocks, largest
from opoch_xp.methods import Treecode
from opoch_xp.treecode.tree import Lists, Part, Tree

Array = Any

jax.tree_util.register_dataclass(Tree, ("cells", "order", "summaries", "counts", "kept"), ("sizes", "dim"))
jax.tree_util.register_dataclass(Lists, ("opened", "cells", "reads"), ())
jax.tree_util.register_dataclass(Part, ("out", "lse", "read"), ())

build_tree = compiled("method")(generic.build_tree)
query_groups = compiled("method")(generic.query_groups)


def tree_attention(
    queries: Array,
    tree: Tree,
    first: np.ndarray,
    count: np.ndarray,
    groups: Array,
    method: Treecode,
    *,
    scale: float,
    seen: Array,
    lists: Lists | None = None,
) -> Part:
    """See opoch_xp.backends.generic.tree.tree_attention."""
    chunks = 1 << (most_chunks(count) - 1).bit_length()  # few shapes: a cache that grows is compiled for few of them
    return _attend(queries, tree, first, count, groups, scale, seen, lists, method=static_bound(method), chunks=chunks)


@compiled("method", "chunks")
def _attend(
    queries: Array, tree: Tree, first: Array, count: Array, groups: Array, scale: float, seen: Array, lists: Any,
    method: Treecode, chunks: int,
) -> Part:  # fmt: skip
    run = (first, count, chunks)
    return attend_runs(queries, tree, run, groups, method, scale, seen, lists, in_blocks, largest)
