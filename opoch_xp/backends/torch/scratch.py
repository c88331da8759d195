"""Memory that is used again, and weights in place: on the CPU a large array that is new costs more in page faults than
its arithmetic."""

from math import prod

import torch
from torch.nn import functional

Tensor = torch.Tensor

LOWEST = -80.0  # exp of less is a denormal number in float32, which costs ten times as much and weighs nothing


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


def weights_(logits: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """exp(logits - top) in place, and top, the largest along the axis (kept), finite; what is denormal counts as zero."""
    lowest = torch.finfo(logits.dtype).min
    if not logits.shape[axis]:
        return logits, logits.sum(axis, keepdim=True).fill_(lowest)
    top = logits.amax(axis, keepdim=True).clamp_min_(lowest)
    return functional.threshold_(logits.sub_(top), LOWEST, -torch.inf).exp_(), top
