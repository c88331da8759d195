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

from opoch_xp.problem import sum_dtype

Array = Any
Function = Callable[[tuple[int, ...], tuple[int, ...], tuple[Any, ...], int], None]  # grid, block, arguments, bytes

HERE = Path(__file__).parent
OPTIONS = ("-std=c++17", f"-I{HERE}")
TYPES = {"float32": "float", "float64": "double"}
HALVES = {"float16": "f16", "bfloat16": "bf16"}  # through tensor cores, where there are: from TENSOR_CORES on
TENSOR_CORES = 80
COLUMNS = {  # numbers of a value that a block does at once
    "float32": (32, 64, 128), "float64": (32, 64), "float16": (32, 64, 128), "bfloat16": (32, 64, 128),
}  # fmt: skip
LANES = 32
QUERIES, KEYS, SLAB, SLAB_16, GAP = 32, 64, 16, 32, 8  # of a tile: BQ, BK, SLAB, ... of tile.cuh
TILE_THREADS = 128

_TILES = [(kind, columns) for name, kind in TYPES.items() for columns in COLUMNS[name]]
_HALF_TILES = [(kind, columns) for name, kind in HALVES.items() for columns in COLUMNS[name]]
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
        *(f"{kernel}<{kind}>" for kernel in ("node_masses", "pick_nodes") for kind in TYPES.values()),
        *(f"attend_lists<{kind}, {columns}>" for kind, columns in _TILES),
    ),
    "bucket_attention.cu": tuple(f"attend_buckets<{kind}, {columns}>" for kind, columns in _TILES),
    "search_buckets.cu": tuple(
        f"best_candidates<{kind}, {dense}>" for kind in TYPES.values() for dense in ("false", "true")
    ),
}
TENSOR_INSTANCES: dict[str, tuple[str, ...]] = {
    "exact_attention.cu": tuple(f"exact_attention<{kind}, {columns}>" for kind, columns in _HALF_TILES),
    "tree_attention.cu": tuple(f"attend_lists<{kind}, {columns}>" for kind, columns in _HALF_TILES),
}


def instances(file: str, arch: int) -> tuple[str, ...]:
    """The template instances of a source for compute capability `arch`."""
    return INSTANCES[file] + (TENSOR_INSTANCES.get(file, ()) if arch >= TENSOR_CORES else ())


@cache
def architecture(where: int) -> int:
    """Compute capability of the device number `where`: 90 for 9.0."""
    import cupy

    return int(cupy.cuda.Device(where).compute_capability)


@cache
def _module(file: str, arch: int) -> Any:
    import cupy

    return cupy.RawModule(code=(HERE / file).read_text(), options=OPTIONS, name_expressions=instances(file, arch))


@cache
def function(file: str, name: str, where: int) -> Function:
    """One instance of INSTANCES on the device number `where`, which is the current one."""
    kernel = _module(file, architecture(where)).get_function(name)
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
    pointer, NumPy scalars of the kernel's own types; Python floats become the dtype that is summed in, Python integers
    `int`.

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
    real = sum_dtype(np, like.dtype)
    given = tuple(
        np.uint64(0) if a is None else real(a) if isinstance(a, float) else np.int32(a) if isinstance(a, int) else a
        for a in arguments
    )
    name = f"{kernel}<{', '.join(map(str, ((TYPES | HALVES)[like.dtype.name], *template)))}>"
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
    state = QUERIES * (KEYS + 1) + 3 * QUERIES
    if dtype.name in HALVES:
        slab = 2 * max(KEYS * (SLAB_16 + GAP), SLAB * (columns + GAP))
        products = 2 * (slab + QUERIES * (parts(dim, SLAB_16) * SLAB_16 + GAP)) + 4 * state
    else:
        products = dtype.itemsize * (dim * QUERIES + SLAB * max(KEYS + 1, columns) + state)
    return 8 * (2 * QUERIES + 2 * KEYS) + products


def tensor_cores(like: Array, *sizes: int) -> bool:
    """Whether 16-bit numbers of such sizes go through tensor cores: rows must be whole copies of 16 bytes."""
    return architecture(number_of(like)) >= TENSOR_CORES and all(size % 8 == 0 for size in sizes)


def widened(*arrays: Array) -> list[Any]:
    """The arrays with 16-bit numbers as float32; None stays."""
    return [
        a if a is None or a.dtype.name not in HALVES else array_namespace(a).astype(a, array_namespace(a).float32)
        for a in arrays
    ]


def parts(whole: int, size: int) -> int:
    """How many parts of at most `size` make up `whole`."""
    return -(-whole // size)
