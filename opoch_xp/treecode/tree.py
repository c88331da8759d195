"""The trees of equal chunks of keys, what groups of queries open in them, and what is read."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from opoch_xp.arguments import to_host

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
    """What each group of queries opens. Nodes and cells are numbered from the first chunk of the group's run, -1 for
    none.

    opened: one array for each level above the cells, coarsest first, (groups, nodes); cells (groups, cells): those that
    some query of the group reads key by key; reads (groups, rows, cells) bool: which query reads which of them.
    """

    opened: tuple[Array, ...]
    cells: Array
    reads: Array


@dataclass(frozen=True)
class Part:
    """What tree_attention returns: out (T, n, d_v) and lse (T, n) of each task's queries over the keys of its chunks.

    read (T, 3): sums over the queries of a task, floats: nodes looked at, keys read one by one, and queries whose group
    met the bound `most` of the method.
    """

    out: Array
    lse: Array
    read: Array
