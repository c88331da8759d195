"""The kernels of the plugin: compiled for CPU tensors where they are wanted, plain PyTorch otherwise."""

from opoch_xp.backends.compiled import wanted

if wanted():
    from opoch_xp.backends.torch.compiled import (
        build_tree,
        exact_attention,
        merge_part,
        query_groups,
        tree_attention,
    )
else:
    from opoch_xp.backends.torch.exact import exact_attention, merge_part
    from opoch_xp.backends.torch.tree import build_tree, query_groups, tree_attention

__all__ = ["build_tree", "exact_attention", "merge_part", "query_groups", "tree_attention"]
