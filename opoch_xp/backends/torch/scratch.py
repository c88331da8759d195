"""Memory that is used again: on the CPU a large array that is new costs more in page faults than its arithmetic."""

from math import prod

import torch

Tensor = torch.Tensor


class Scratch:
    """Uninitialised memory by name, kept from call to call and grown when it has to be. One owner, one thread."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.kept: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A tensor of this shape, of the dtype and device of `like`; what it held is lost."""
        size = prod(shape)
        memory = self.kept.get(name)
        if memory is None or memory.numel() < size:
            memory = self.kept[name] = self.like.new_empty(size)
        return memory[:size].view(shape)

    def gather(self, name: str, rows: Tensor, index: Tensor) -> Tensor:
        """rows[index] for rows (n, w) and an index of any shape, (*index.shape, w)."""
        taken = self(name, index.numel(), rows.shape[1])
        torch.index_select(rows, 0, index.reshape(-1), out=taken)
        return taken.view(*index.shape, rows.shape[1])
