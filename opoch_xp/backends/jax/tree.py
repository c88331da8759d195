"""The treecode's kernels in JAX: the generic twins, compiled, their groups gone through by JAX's loop."""

from typing import Any

import jax
import numpy as np

from opoch_xp.backends import generic
from opoch_xp.backends.generic.tree import attend_runs, most_chunks
from opoch_xp.backends.jax.loops import compiled, in_blocks, largest
from opoch_xp.methods import Treecode
from opoch_xp.tree import Lists, Tree

Array = Any

jax.tree_util.register_dataclass(Tree, ("cells", "order", "summaries", "counts", "kept"), ("sizes", "dim"))
jax.tree_util.register_dataclass(Lists, ("opened", "own"), ())

build_tree = compiled("method")(generic.build_tree)
query_groups = compiled("method")(generic.query_groups)


def tree_attention(
    queries: Array,
    tree: Tree,
    first: np.ndarray,
    count: np.ndarray,
    axes: Any,
    method: Treecode,
    *,
    scale: float,
    groups: Array | None = None,
    lists: Lists | None = None,
) -> tuple[Array, Array]:
    """See opoch_xp.backends.generic.tree.tree_attention."""
    most = 1 << (most_chunks(count) - 1).bit_length()  # few shapes: a cache that grows is compiled for few of them
    return _attend(queries, tree, first, count, axes, scale, groups, lists, method=method, most=most)


@compiled("method", "most")
def _attend(
    queries: Array, tree: Tree, first: Array, count: Array, axes: Any, scale: float, groups: Any, lists: Any,
    method: Treecode, most: int,
) -> tuple[Array, Array]:  # fmt: skip
    run = (first, count, most)
    return attend_runs(queries, tree, run, axes, method, scale, groups, lists, in_blocks, largest)[:2]
