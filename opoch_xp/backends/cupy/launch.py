"""Launching: the CUDA sources, their template instances, and what a launch needs.

`function` compiles an instance once a device, through NVRTC; CuPy keeps the machine code on disk. Launches go to the
current stream of the arrays' device and wait for nothing.
"""

from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

Array = Any
Function = Callable[[tuple[int, ...], tuple[int, ...], tuple[Any, ...], int], None]  # grid, block, arguments, bytes

HERE = Path(__file__).parent
OPTIONS = ("--std=c++17", f"-I{HERE}")
TYPES = {"float32": "float", "float64": "double"}
COLUMNS = {"float32": (32, 64, 128), "float64": (32, 64)}  # numbers of a value that a block does at once
LANES = 32
QUERIES, KEYS, SLAB = 32, 64, 16  # of a tile: BQ, BK and SLAB of tile.cuh
TILE_THREADS = 128

_TILES = [(TYPES[name], columns) for name, widths in COLUMNS.items() for columns in widths]
INSTANCES: dict[str, tuple[str, ...]] = {
    "exact_attention.cu": (
        *(f"exact_attention<{kind}, {columns}>" for kind, columns in _TILES),
        *(f"merge_part<{kind}>" for kind in TYPES.values()),
    ),
    "hash_codes.cu": tuple(f"hash_codes<{kind}>" for kind in TYPES.values()),
    "build_tree.cu": tuple(
        f"{kernel}<{kind}>"
        for kernel in ("split_nodes", "node_axes", "project", "gather_cells", "summarise")
        for kind in TYPES.values()
    ),
    "tree_attention.cu": (
        *(f"{kernel}<{kind}>" for kernel in ("node_masses", "pick_nodes", "own_cells") for kind in TYPES.values()),
        *(f"attend_lists<{kind}, {columns}, {own}>" for kind, columns in _TILES for own in ("false", "true")),
    ),
    "bucket_attention.cu": tuple(f"attend_buckets<{kind}, {columns}>" for kind, columns in _TILES),
}


@cache
def _module(file: str) -> Any:
    import cupy

    return cupy.RawModule(code=(HERE / file).read_text(), options=OPTIONS, name_expressions=INSTANCES[file])


@cache
def function(file: str, name: str, where: int) -> Function:
    """One instance of INSTANCES on the device number `where`, which is the current one."""
    kernel = _module(file).get_function(name)
    most = shared_limit(where)

    def launch(grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...], shared: int) -> None:
        if shared > 48 << 10 and kernel.max_dynamic_shared_size_bytes < shared:  # more than that is on request only
            kernel.max_dynamic_shared_size_bytes = most
        kernel(grid, block, arguments, shared_mem=shared)

    return launch


@cache
def shared_limit(where: int) -> int:
    """Bytes of shared memory a block may have on the device number `where`."""
    import cupy

    return int(cupy.cuda.Device(where).attributes["MaxSharedMemoryPerBlockOptin"])


def run(
    file: str, kernel: str, like: Array, grid: tuple[int, ...], threads: int, *arguments: Any,
    template: tuple[Any, ...] = (), shared: int = 0,
) -> None:  # fmt: skip
    """Launch `kernel` for the dtype of `like` and further template arguments. Arguments: arrays, None for a null
    pointer, NumPy scalars of the kernel's own types; Python floats become the dtype of `like`, Python integers `int`.

    Raises ValueError where `shared` bytes are more than the device has.
    """
    if 0 in grid:
        return
    where = number_of(like)
    if shared > shared_limit(where):
        raise ValueError(
            f"head size {like.shape[-1]} in {like.dtype} needs {shared:,} bytes of shared memory a block,"
            f" the device has {shared_limit(where):,}; take a smaller head size or dtype, or backend='generic'"
        )
    real = like.dtype.type
    given = tuple(
        np.uint64(0) if a is None else real(a) if isinstance(a, float) else np.int32(a) if isinstance(a, int) else a
        for a in arguments
    )
    name = f"{kernel}<{', '.join(map(str, (TYPES[like.dtype.name], *template)))}>"
    function(file, name, where)(grid, (threads,), given, shared)


def number_of(array: Array) -> int:
    """Number of the device of an array; 0 for a host's."""
    return getattr(device(array), "id", 0)


def on_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel with the device of its first array as the current one: CuPy allocates and launches there."""

    @wraps(kernel)
    def there(first: Array, *args: Any, **keywords: Any) -> Any:
        here = device(first)
        if not hasattr(here, "__enter__"):
            return kernel(first, *args, **keywords)
        with here:
            return kernel(first, *args, **keywords)

    return there


def contiguous(*arrays: Array) -> list[Any]:
    """The arrays in C order; None stays."""
    return [None if a is None else array_namespace(a).ascontiguousarray(a) for a in arrays]


def columns_for(width: int, dtype: Any) -> int:
    """Numbers of a value of `width` that a block does at once: EP of tile.cuh."""
    widths = COLUMNS[dtype.name]
    return next((columns for columns in widths if columns >= width), widths[-1])


def tile_bytes(dim: int, columns: int, dtype: Any) -> int:
    """Shared memory of a `Tile` of tile.cuh."""
    numbers = dim * QUERIES + SLAB * max(KEYS + 1, columns) + QUERIES * (KEYS + 1) + 3 * QUERIES
    return 8 * (2 * QUERIES + 2 * KEYS) + numbers * dtype.itemsize


def parts(whole: int, size: int) -> int:
    """How many parts of at most `size` make up `whole`."""
    return -(-whole // size)
