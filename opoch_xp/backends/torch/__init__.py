"""PyTorch plugin: the kernels for CPU and CUDA tensors, on PyTorch's own threads."""

from opoch_xp.backends.torch.split import query_groups
from opoch_xp.backends.torch.tree import build_tree, tree_attention
from opoch_xp.cost import Cost

__all__ = ["COST", "build_tree", "query_groups", "tree_attention"]

COST = Cost(read=4.5, split=38.0)
