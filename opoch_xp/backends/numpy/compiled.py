"""The compiled kernels on NumPy arrays, over the plugin's threads; see opoch_xp.backends.compiled."""

from typing import Any

import numpy as np

from opoch_xp.backends.compiled import exact
from opoch_xp.backends.compiled import tree as trees
from opoch_xp.backends.numpy.pool import thread_count
from opoch_xp.methods import Treecode
from opoch_xp.treecode.tree import Lists, Part, Tree

Array = np.ndarray


def exact_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    scale: float,
    mask: Array | None = None,
    positions: Array | None = None,
) -> tuple[Array, Array]:
    """See opoch_xp.backends.generic.exact.exact_attention."""
    return exact.exact_attention(
        q, k, v, causal=causal, scale=scale, mask=mask, positions=positions, workers=thread_count()
    )


def merge_part(out: Array, lse: Array, part: Array, part_lse: Array, start: int) -> tuple[Array, Array]:
    """See opoch_xp.backends.generic.exact.merge_part; out and lse are changed in place and returned."""
    return exact.merge_part(out, lse, part, part_lse, start, thread_count())


def build_tree(
    k: Array, v: Array, axes: Any, method: Treecode, *, mask: Array | None = None, order: Array | None = None,
    stretch: Array | None = None,
) -> Tree:  # fmt: skip
    """See opoch_xp.backends.generic.tree.build_tree."""
    return trees.build_tree(k, v, axes, method, mask=mask, order=order, stretch=stretch, workers=thread_count())


def query_groups(queries: Array, axes: Any, method: Treecode, *, stretch: Array | None = None) -> Array:
    """See opoch_xp.backends.generic.tree.query_groups."""
    return trees.query_groups(queries, axes, method, stretch=stretch, workers=thread_count())


def tree_attention(
    queries: Array,
    tree: Tree,
    first: Array,
    count: Array,
    groups: Array,
    method: Treecode,
    *,
    scale: float,
    seen: Array,
    lists: Lists | None = None,
) -> Part:
    """See opoch_xp.backends.generic.tree.tree_attention."""
    return trees.tree_attention(
        queries, tree, first, count, groups, method, scale=scale, seen=seen, lists=lists, workers=thread_count()
    )
