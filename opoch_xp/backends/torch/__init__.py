"""PyTorch plugin: the kernels for CPU and CUDA tensors, on as many threads as PyTorch has.

CPU tensors go through compiled kernels where Numba is installed: see opoch_xp.backends.compiled.
"""

import torch

from opoch_xp.backends.compiled import wanted
from opoch_xp.backends.torch.kernels import build_tree, exact_attention, merge_part, query_groups, tree_attention
from opoch_xp.cost import COMPILED, Cost

__all__ = [
    "COST",
    "build_tree",
    "exact_attention",
    "merge_part",
    "query_groups",
    "synchronize",
    "thread_count",
    "tree_attention",
]

API_VERSION = 2  # of opoch_xp.backends
COST = COMPILED if wanted() else Cost(read=2.9, split=80.0)


def synchronize(*arrays: torch.Tensor) -> None:
    """Wait until the device of each array has computed it; a CPU has when it returns."""
    for device in {array.device for array in arrays if array.is_cuda}:
        torch.cuda.synchronize(device)


def thread_count() -> int:
    """From how many threads at a time kernels may be called with a gain: compiled ones alone, PyTorch has its own."""
    return torch.get_num_threads() if wanted() else 1
