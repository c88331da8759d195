"""The treecode's kernels in NumPy: the generic steps for a few groups of queries at a time, threads over batches."""

from collections.abc import Callable
from typing import Any

import numpy as np

from opoch_xp.backends import generic
from opoch_xp.backends.generic.tree import attend_runs, grouped_rows, largest, most_chunks
from opoch_xp.backends.numpy.pool import run
from opoch_xp.backends.numpy.split import principal_order
from opoch_xp.methods import Treecode
from opoch_xp.treecode.tree import Lists, Part, Tree

Array = np.ndarray
GROUPS = 8  # attended at a time, at the most: calls long enough that threads do not wait for the interpreter


def build_tree(
    k: Array, v: Array, axes: Any, method: Treecode, *, mask: Array | None = None, order: Array | None = None,
    stretch: Array | None = None,
) -> Tree:  # fmt: skip
    """See opoch_xp.backends.generic.tree.build_tree."""
    if order is None:
        order = principal_order(k, axes, method.iterations, mask, stretch)
    return generic.build_tree(k, v, axes, method, mask=mask, order=order)


def query_groups(queries: Array, axes: Any, method: Treecode, *, stretch: Array | None = None) -> Array:
    """See opoch_xp.backends.generic.tree.query_groups."""
    return grouped_rows(queries, axes, method, stretch, principal_order)


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
    runs = (np.asarray(first), np.asarray(count), most_chunks(count))
    top = _largest if method.most is None else largest  # what a bound leaves of equals is decided in one way
    with np.errstate(all="ignore"):
        return attend_runs(queries, tree, runs, groups, method, scale, seen, lists, _in_blocks, top)


def _in_blocks(function: Callable[..., tuple[Array, ...]], arrays: tuple[Array, ...], step: int) -> tuple[Array, ...]:
    """opoch_xp.backends.generic.tree.in_blocks, blocks over the threads."""
    step = max(1, min(step, GROUPS))
    parts = run(lambda s: function(*(a[s : s + step] for a in arrays)), range(0, len(arrays[0]), step))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def _largest(x: Array, count: int) -> Array:
    """opoch_xp.backends.generic.tree.largest, in any order: a partition costs a tenth of a sort."""
    rest = x.shape[-1] - count
    if rest == 0 or count == 0:
        return np.broadcast_to(np.arange(count), (*x.shape[:-1], count))
    return np.argpartition(x, rest, axis=-1)[..., rest:]
