"""The plugin's kernels and their gradients: compiled for CPU tensors where they are wanted, plain PyTorch otherwise."""

from opoch_xp.backends.compiled import wanted

if wanted():
    from opoch_xp.backends.torch.compiled import (
        build_tree,
        exact_attention,
        exact_backward,
        key_gradients,
        merge_part,
        query_groups,
        tier_backward,
        tree_attention,
    )
else:
    from opoch_xp.backends.torch.exact import exact_attention, exact_backward, merge_part
    from opoch_xp.backends.torch.tree import build_tree, query_groups, tree_attention
    from opoch_xp.backends.torch.tree_backward import key_gradients, tier_backward

__all__ = [
    "build_tree",
    "exact_attention",
    "exact_backward",
    "key_gradients",
    "merge_part",
    "query_groups",
    "tier_backward",
    "tree_attention",
]
