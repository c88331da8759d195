"""Memory that is used again, and weights in place: on the CPU a large array that is new costs more in page faults than
its arithmetic."""

from math import prod

import torch
from torch import Tensor
from torch.nn import functional

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


def softmax(logits: Tensor, weight: Tensor, masked: bool) -> tuple[Tensor, Tensor]:
    """Softmax of logits (G, g, m) into `weight`, and its lse (G, g, 1); zeros and -inf where a row is masked whole.

    The largest weight is exp(top - lse): one pass of the library's own softmax, and no exponential of our own.
    """
    if not logits.shape[2]:
        return weight, logits.new_full((*logits.shape[:2], 1), -torch.inf)
    torch.softmax(logits, 2, out=weight)
    top = logits.amax(2, keepdim=True)
    lse = top - weight.amax(2, keepdim=True).log_()
    if masked:
        unseen = top == -torch.inf
        weight.masked_fill_(unseen, 0.0)
        lse.masked_fill_(unseen, -torch.inf)
    return weight, lse


def weights_of(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse) in place; what is denormal counts as zero."""
    return functional.threshold(logits.sub_(lse), LOWEST, -torch.inf, inplace=True).exp_()
