"""PyTorch plugin: the kernels for CPU and CUDA tensors, on PyTorch's own threads."""

from opoch_xp.backends.torch.exact import exact_attention, merge_part
from opoch_xp.backends.torch.split import query_groups
from opoch_xp.backends.torch.tree import build_tree, tree_attention
from opoch_xp.cost import Cost

__all__ = ["COST", "build_tree", "exact_attention", "merge_part", "query_groups", "tree_attention"]

COST = Cost(read=4.5, split=38.0)
