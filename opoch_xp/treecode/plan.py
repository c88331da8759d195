"""The static part of a treecode: how chunks of keys become levels of nodes, and rows of queries groups."""

from dataclasses import dataclass
from functools import lru_cache
from math import log

from opoch_xp.methods import Treecode

FEWEST = 128  # closed nodes that errors are reckoned for at the least: short contexts cost little and err most


@dataclass(frozen=True)
class LevelPlan:
    """The levels of a chunk's tree. Level 0 are the cells; the last is the coarsest, where a walk begins.

    nodes: of each level, in a chunk; sizes: keys of a node. forced: how many nodes of the level a group of queries
    opens whatever they hold: `least` of the method where a node has more than `block / top` keys, so that its mean and
    variance may hide clusters, and none elsewhere. small: those `block / top` keys.
    """

    nodes: tuple[int, ...]
    sizes: tuple[int, ...]
    forced: tuple[int, ...]
    small: int

    @property
    def depth(self) -> int:
        """Number of the coarsest level."""
        return len(self.nodes) - 1

    def children(self, level: int) -> int:
        """Nodes of the level below that a node of a level is made of."""
        return self.nodes[level - 1] // self.nodes[level]

    def threshold(self, chunks: int, rtol: float) -> float:
        """The log of the share of a query's mass from which on a node is opened, against the trees of so many chunks.

        A closed node errs by about its share of the output, and the errors of m nodes add to sqrt(m) of one; m is the
        number of small nodes that cover the chunks, as many as a walk may leave closed.
        """
        if not rtol:
            return -float("inf")
        return log(rtol) - 0.5 * log(max(FEWEST, chunks * self.nodes[0] * self.sizes[0] // self.small))


@lru_cache(256)
def level_plan(size: int, method: Treecode) -> LevelPlan:
    """The levels of a chunk of `size` keys: cells, then `branch` to a parent, to at most `top` nodes."""
    nodes = [size // method.leaf]
    while nodes[-1] > method.top:
        nodes.append(max(1, nodes[-1] // method.branch))
    sizes = tuple(size // count for count in nodes)
    small = max(1, method.block // method.top)  # keys of a node at the top of the first tier
    forced = tuple(method.least if level and keys > small else 0 for level, keys in enumerate(sizes))
    return LevelPlan(tuple(nodes), sizes, forced, small)


def splits(rows: int, size: int) -> int:
    """Levels of halving that bring `rows` rows into parts of at most `size`."""
    return max(0, (-(-rows // size) - 1).bit_length())


def group_count(rows: int, group: int) -> int:
    """Groups of at most `group` rows."""
    return -(-rows // group)


def group_rows(rows: int, group: int) -> int:
    """Rows of a full group: all where they make one."""
    return min(rows, group)
