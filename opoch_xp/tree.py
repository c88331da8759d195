"""Values of the treecode: the trees of equal chunks of keys, and the lists a group of queries opens."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from opoch_xp.arguments import to_host
from opoch_xp.methods import Treecode

Array = Any


class HostRows:
    """Rows that lie in host memory, or in a file, while a device computes: what it reads of them is fetched.

    data (chunks, ...), NumPy's; `xp` and `where` the library and device that read it. The generic kernels take one for
    the cells and the finest summaries of a tree.
    """

    def __init__(self, data: np.ndarray, xp: Any, where: Any) -> None:
        self.data, self.xp, self.where = data, xp, where

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def fetch(self, index: Array, rows: int) -> Array:
        """Runs of `rows` rows, (*index.shape, rows, ...), by their number, on the device."""
        flat = self.data.reshape(-1, rows, *self.data.shape[2:])
        return self.xp.asarray(flat[to_host(index)], device=self.where)


@dataclass(frozen=True)
class Tree:
    """Trees of equal chunks of keys. Keys are in cell order, so a node is a run of rows: node i of a level with `size`
    keys a node holds the rows [i * size, (i + 1) * size) of its chunk.

    cells (chunks, keys, d + d_v): key and value side by side; order (chunks, keys) int64: where each row came from.
    summaries: one array a level, finest first, (chunks, nodes, 2 * d + d_v): mean key, diagonal variance of the keys,
    mean value side by side. counts: one array a level (chunks, nodes), the kept keys of each node; kept (chunks, keys)
    bool; both None when no key is masked.
    """

    cells: Array
    order: Array
    summaries: tuple[Array, ...]
    sizes: tuple[int, ...]
    counts: tuple[Array, ...] | None
    kept: Array | None
    dim: int

    @property
    def leaf(self) -> int:
        return self.sizes[0]


@dataclass(frozen=True)
class Lists:
    """What each group of queries opens. Nodes and cells are numbered from the first chunk of the group's run.

    opened: one array a level, coarsest first, (groups, nodes), the last being the near cells;
    own (groups, rows, cells): each query's own near cells.
    """

    opened: tuple[Array, ...]
    own: Array


def chunk_size(method: Treecode, tier: int) -> int:
    """Keys of a chunk of a tier."""
    return method.block * method.fan**tier


def level_nodes(size: int, method: Treecode) -> tuple[int, ...]:
    """Nodes per level, finest first, of a chunk of `size` keys: cells, then `branch` to a parent, to at most `top`."""
    nodes = [size // method.leaf]
    while nodes[-1] > method.top:
        nodes.append(max(1, nodes[-1] // method.branch))
    return tuple(nodes)


@lru_cache(1024)
def rows_read(size: int, count: int, method: Treecode) -> dict[str, int]:
    """Dot products a query spends on the trees of `count` chunks of `size` keys, by part."""
    nodes = level_nodes(size, method)
    candidates, far, picked = count * nodes[-1], 0, 0
    for level in range(len(nodes) - 1, -1, -1):
        far += candidates
        picked = min(method.open if level else method.near, candidates)
        if level:
            candidates = picked * (nodes[level - 1] // nodes[level])
    own = min(method.own, candidates - picked)
    return {"far": far, "near": picked * method.leaf, "own": own * method.leaf}


def splits(rows: int, size: int) -> int:
    """Levels of halving that bring `rows` rows into cells of at most `size`."""
    return max(0, (-(-rows // size) - 1).bit_length())


def group_count(rows: int, group: int) -> int:
    return -(-rows // group)
