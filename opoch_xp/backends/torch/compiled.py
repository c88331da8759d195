"""The compiled kernels on CPU tensors, over PyTorch's number of threads; other tensors go through the plain kernels.
See opoch_xp.backends.compiled."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from opoch_xp.backends.compiled import exact, gradients
from opoch_xp.backends.compiled import tree as trees
from opoch_xp.backends.torch import exact as plain_exact
from opoch_xp.backends.torch import tree as plain_tree
from opoch_xp.backends.torch import tree_backward as plain_backward
from opoch_xp.backends.torch.tree_backward import TreeGradients, Whole
from opoch_xp.methods import Treecode
from opoch_xp.treecode.tree import Lists, Part, Tree


def _here(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _host(x: Any) -> Any:
    """A tensor as an array of the same memory; anything else as it is."""
    return x.detach().numpy() if isinstance(x, Tensor) else x


def _mapped(function: Any, built: Tree) -> Tree:
    """The tree with `function` applied to its arrays."""
    several = (None if arrays is None else tuple(map(function, arrays)) for arrays in (built.summaries, built.counts))
    summaries, counts = several
    assert summaries is not None
    kept = None if built.kept is None else function(built.kept)
    return Tree(function(built.cells), function(built.order), summaries, built.sizes, counts, kept, built.dim)


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float,
    mask: Tensor | None = None,
    positions: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """See opoch_xp.backends.generic.exact.exact_attention."""
    if not _here(q):
        return plain_exact.exact_attention(q, k, v, causal=causal, scale=scale, mask=mask, positions=positions)
    out, lse = exact.exact_attention(
        *map(_host, (q, k, v)), causal=causal, scale=scale, mask=_host(mask), positions=positions,
        workers=torch.get_num_threads(),
    )  # fmt: skip
    return torch.from_numpy(out), torch.from_numpy(lse)


def merge_part(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """See opoch_xp.backends.generic.exact.merge_part; out and lse are changed in place and returned."""
    if not _here(out):
        return plain_exact.merge_part(out, lse, part, part_lse, start)
    exact.merge_part(_host(out), _host(lse), _host(part), _host(part_lse), start, torch.get_num_threads())
    return out, lse


def build_tree(
    k: Tensor, v: Tensor, axes: Any, method: Treecode, *, mask: Tensor | None = None, order: Tensor | None = None,
    stretch: Tensor | None = None,
) -> Tree:  # fmt: skip
    """See opoch_xp.backends.generic.tree.build_tree."""
    if not _here(k):
        return plain_tree.build_tree(k, v, axes, method, mask=mask, order=order, stretch=stretch)
    built = trees.build_tree(
        _host(k), _host(v), axes, method, mask=_host(mask), order=_host(order), stretch=_host(stretch),
        workers=torch.get_num_threads(),
    )  # fmt: skip
    return _mapped(torch.from_numpy, built)


def query_groups(queries: Tensor, axes: Any, method: Treecode, *, stretch: Tensor | None = None) -> Tensor:
    """See opoch_xp.backends.generic.tree.query_groups."""
    if not _here(queries):
        return plain_tree.query_groups(queries, axes, method, stretch=stretch)
    found = trees.query_groups(_host(queries), axes, method, stretch=_host(stretch), workers=torch.get_num_threads())
    return torch.from_numpy(np.require(found, requirements="W"))


def tree_attention(
    queries: Tensor,
    tree: Tree,
    first: np.ndarray,
    count: np.ndarray,
    groups: Tensor,
    method: Treecode,
    *,
    scale: float,
    seen: Tensor,
    lists: Lists | None = None,
) -> Part:
    """See opoch_xp.backends.generic.tree.tree_attention."""
    if not _here(queries):
        return plain_tree.tree_attention(
            queries, tree, first, count, groups, method, scale=scale, seen=seen, lists=lists
        )
    given = None if lists is None else Lists(tuple(map(_host, lists.opened)), _host(lists.cells), _host(lists.reads))
    found = trees.tree_attention(
        _host(queries), _mapped(_host, tree), first, count, _host(groups), method, scale=scale, seen=_host(seen),
        lists=given, workers=torch.get_num_threads(),
    )  # fmt: skip
    return Part(*map(torch.from_numpy, (found.out, found.lse, found.read)))


def tier_backward(
    queries: Tensor,
    tree: Tree,
    first: np.ndarray,
    count: np.ndarray,
    groups: Tensor,
    method: Treecode,
    *,
    scale: float,
    seen: Tensor,
    whole: Whole,
    into: TreeGradients,
) -> Tensor:
    """See opoch_xp.backends.torch.tree_backward.tier_backward."""
    if not _here(queries):
        return plain_backward.tier_backward(
            queries, tree, first, count, groups, method, scale=scale, seen=seen, whole=whole, into=into
        )
    found = gradients.tier_backward(
        _host(queries), _mapped(_host, tree), first, count, _host(groups), method, scale=scale, seen=_host(seen),
        lse=_host(whole.lse), dout=_host(whole.dout), delta=_host(whole.delta), cells=_host(into.cells),
        summaries=tuple(map(_host, into.summaries)), workers=torch.get_num_threads(),
    )  # fmt: skip
    return torch.from_numpy(found)


def key_gradients(tree: Tree, found: TreeGradients) -> tuple[Tensor, Tensor]:
    """See opoch_xp.backends.torch.tree_backward.key_gradients."""
    if not _here(found.cells):
        return plain_backward.key_gradients(tree, found)
    below = _host(found.cells), tuple(map(_host, found.summaries))
    dk, dv = gradients.key_gradients(_mapped(_host, tree), *below, torch.get_num_threads())
    return torch.from_numpy(dk), torch.from_numpy(dv)


def exact_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, dout: Tensor, delta: Tensor, *, causal: bool, scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See opoch_xp.backends.torch.exact.exact_backward; over as many threads as q has entries of its batch."""
    if not _here(q) or len(q) < torch.get_num_threads():
        return plain_exact.exact_backward(q, k, v, lse, dout, delta, causal=causal, scale=scale, mask=mask)
    dq, dk, dv = gradients.exact_backward(
        *map(_host, (q, k, v, lse, dout, delta)), causal=causal, scale=scale, mask=_host(mask),
        workers=torch.get_num_threads(),
    )  # fmt: skip
    return torch.from_numpy(dq), torch.from_numpy(dk), torch.from_numpy(dv)
