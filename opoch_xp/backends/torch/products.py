"""Batched products in the precision asked for: float32 as it is, or bfloat16 where a CPU multiplies that faster."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_dtype: ContextVar[torch.dtype] = ContextVar("opoch_xp_product_dtype", default=torch.float32)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Within: the treecode multiplies float32 CPU arrays in `name`, "float32" (the default) or "bfloat16".

    bfloat16 keeps 8 bits of every factor and of every product: logits err by up to 2**-8 of their size. It pays on CPUs
    with bfloat16 products (AVX512-BF16, AMX), and costs time on others. Measure both: see the page on PyTorch in docs/.
    Hold it around backward() as well, so that the gradient opens what the output opened. Raises ValueError for another
    name.

    >>> from opoch_xp.backends.torch import precision
    >>> with precision("bfloat16"):
    ...     pass
    """
    if name not in NAMES:
        raise ValueError(f"name must be {' or '.join(map(repr, NAMES))}, got {name!r}")
    token = _dtype.set(NAMES[name])
    try:
        yield
    finally:
        _dtype.reset(token)


def reduced() -> bool:
    """Whether products in bfloat16 are asked for."""
    return _dtype.get() != torch.float32


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b for batches of matrices, into `out` where one is given."""
    if a.dtype != torch.float32 or not reduced() or a.device.type != "cpu":
        return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
    found = torch.bmm(a.bfloat16(), b.bfloat16())
    return found.float() if out is None else out.copy_(found)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out + a @ b, in place."""
    if a.dtype != torch.float32 or not reduced() or a.device.type != "cpu":
        return out.baddbmm_(a, b)
    return out.add_(torch.bmm(a.bfloat16(), b.bfloat16()))
