"""Layers of a model of transformers: their numbers, and their attention as it was before it was replaced."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from opoch_xp.integrations.masks import key_mask


def layer_number(module: Any) -> int:
    """The number that a model gives the layer of an attention module; NotImplementedError where it gives none."""
    number = getattr(module, "layer_idx", None)
    if not isinstance(number, int):
        raise NotImplementedError(f"{type(module).__name__} does not know the number of its layer, by which methods go")
    return number


def or_mask_of(before: str) -> Callable[..., Tensor | None]:
    """`key_mask`, or the mask that the attention `before` takes, where what the model asks for is no mask of keys."""

    def mask_of(*sizes: Any, **asked: Any) -> Tensor | None:
        try:
            return key_mask(*sizes, **asked)
        except NotImplementedError:
            found: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[before](*sizes, **asked)
            return found

    return mask_of


def as_before(
    before: str, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float,
    scaling: float | None, **others: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """The attention named `before` of transformers, with a mask that `or_mask_of` made."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(before, eager)
    if mask is not None:
        mask = _whole(mask, query.shape[2], key.shape[2], before == "eager")
    if before == "eager" and mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    found: tuple[Tensor, Any] = attend(module, query, key, value, mask, dropout=dropout, scaling=scaling, **others)
    return found


def _whole(mask: Tensor, n_q: int, n_k: int, always: bool) -> Tensor | None:
    """A mask of keys, see opoch_xp.integrations.masks, as (batch or 1, 1, n_q or 1, n_k); None where it hides nothing
    that a causal attention would not hide anyway, unless `always`. Other masks stay what they are."""
    if mask.ndim == 4:
        return mask if mask.shape[0] else None
    held = mask.shape[1]
    if not mask.shape[0] and n_q == n_k == held and not always:
        return None
    keys = torch.arange(n_k, device=mask.device)
    visible = keys <= torch.arange(held - n_q, held, device=mask.device)[:, None]
    if not mask.shape[0]:
        return visible[None, None]
    return visible & torch.nn.functional.pad(mask, (0, n_k - held))[:, None, None]
