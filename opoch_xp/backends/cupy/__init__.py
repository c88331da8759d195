"""CuPy plugin: kernels written in CUDA C++, compiled by NVRTC for the device at hand.

The sources beside this file are the definition of each kernel's cost; `launch` owns their instances. Launches go to the
current stream of the arrays' device; nothing waits for the device but `bucket_attention`, which reads back how many
queries found no candidate, and `search_buckets`, which reads back the sizes of buckets.
"""

from typing import Any

from opoch_xp.backends.cupy.buckets import bucket_attention
from opoch_xp.backends.cupy.exact import exact_attention, merge_part
from opoch_xp.backends.cupy.hashing import hash_codes
from opoch_xp.backends.cupy.search import search_buckets
from opoch_xp.backends.cupy.tree import build_tree, query_groups, tree_attention
from opoch_xp.cost import Cost

__all__ = [
    "ACCEPTS",
    "COST",
    "bucket_attention",
    "build_tree",
    "exact_attention",
    "hash_codes",
    "merge_part",
    "query_groups",
    "search_buckets",
    "synchronize",
    "tree_attention",
    "unavailable",
]

ACCEPTS = ("float16", "bfloat16", "float32", "float64")
API_VERSION = 2  # of opoch_xp.backends
COST = Cost(read=2.9, split=80.0)  # not measured: the PyTorch plugin's on a CPU


def unavailable() -> str:
    """Why CuPy arrays cannot be computed on here; empty when they can."""
    try:
        import cupy
    except ImportError as missing:
        return f"CuPy is not installed: {missing}"
    return "" if cupy.is_available() else "CuPy finds no CUDA device"


def synchronize(*arrays: Any) -> None:
    """Wait until the device of each array has computed it."""
    for device in {array.device for array in arrays}:
        with device:
            device.synchronize()
