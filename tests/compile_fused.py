"""Compile the Triton kernel for GPUs that are not there: a line of JSON per instance.

Run by test_fused.py, in a process where Triton is not interpreting.
"""

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opoch_xp.backends.torch import fused


def compiled(dim: int, queries: int, dtype: str, arch: int) -> Any:
    """The kernel for groups of so many queries, keys and values of `dim` numbers, to machine code."""
    names = ("q", "rows", "law", "far", "cells", "kept", "near", "reads", "out", "lse")
    kinds = (dtype, dtype, "fp32", "i64", dtype, "u8", "i64", "u8", "fp32", "fp32")
    signature = {name: f"*{kind}" for name, kind in zip(names, kinds, strict=True)}
    signature |= {"scale": "fp32", "g": "i32", "M": "i32", "C": "i32"}
    wide = fused.padded(dim)
    constants = {
        "D": dim, "E": dim, "DP": wide, "EP": wide, "LEAF": 16, "MASKED": True, "UPCAST": False,
        **fused.block_sizes(queries, wide, 4 if dtype == "fp32" else 2),
    }  # fmt: skip
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=fused._attend, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32))


if __name__ == "__main__":
    for arch in (80, 90):
        for dtype in ("fp32", "bf16", "fp16"):
            for dim in (16, 64, 128, 256) if arch == 90 else (64,):
                found = compiled(dim, 128, dtype, arch)
                size, shared = len(found.asm["cubin"]), found.metadata.shared
                print(
                    json.dumps({"arch": arch, "dtype": dtype, "dim": dim, "bytes": size, "shared": shared}), flush=True
                )
