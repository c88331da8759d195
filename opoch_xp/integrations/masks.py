"""What a model of transformers asks of an attention: masks, read as masks of keys, and keywords that cannot be had.

The function for masks turns what the model asks for into a mask of keys, which says by its shape what else there is to
know:

    (batch or 0, seen)          causal; the first `seen` keys hold something, 0 rows: none of them is padding
    (batch or 0, 1, 1, keys)    not causal

and refuses what is neither, such as sliding windows. The attention takes it from there.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

from opoch_xp.backends.torch.operator import opaque
from opoch_xp.integrations.transformers_cache import read_back

COMPOSED = and_masks().__qualname__  # of a mask that is the intersection of others
OTHER_MASK = (
    "the model asks for a mask that is neither causal nor full (a sliding or chunked window, packed sequences, or one"
    " of its own), which opoch_xp does not have; use attn_implementation='eager' or 'sdpa'"
)
WITHOUT_EFFECT = {  # on attention, of the keywords that models hand through
    "cache_position", "is_causal", "logits_to_keep", "num_items_in_batch", "output_hidden_states", "past_key_values",
    "position_embeddings", "position_ids", "return_dict", "token_type_ids", "use_cache",
}  # fmt: skip


def key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    local_size: int | None = None,
    use_vmap: bool = False,
    **others: Any,
) -> Tensor:
    """The mask of keys of the module docstring; bool, True = keep. attention_mask (batch, keys) is the padding mask.

    local_size: of a window or chunks. use_vmap: the caller added masks of its own. Compiled or traced, no number is
    looked at: a mask of keys that are all kept stays one, and what can only be seen when the model runs is checked by
    the graph.
    """
    traced = opaque(*(() if attention_mask is None else (attention_mask,)))
    causal = mask_function is causal_mask_function
    if traced and isinstance(q_offset, Tensor):  # a static cache
        return _of_one(batch_size, q_length, kv_length, q_offset, kv_offset, causal, attention_mask)
    start = int(kv_offset)
    if mask_function is not causal_mask_function and mask_function is not bidirectional_mask_function:
        causal, length = True, int(q_offset) + q_length - start
        composed = inspect.isfunction(mask_function) and mask_function.__qualname__ == COMPOSED
        if not composed or use_vmap or (local_size is not None and length > local_size):
            raise NotImplementedError(OTHER_MASK)
        if traced:
            _check_when_run(mask_function, batch_size, q_length, q_offset, start, device)
        elif local_size is None or not _is_window(mask_function, local_size):
            raise NotImplementedError(OTHER_MASK)
    seen = int(q_offset) + q_length - start if causal else kv_length  # a static cache is longer than what it holds
    if causal and attention_mask is not None and attention_mask.shape[1] < start + seen:
        raise ValueError(
            f"attention_mask must cover the {start + seen} tokens so far, those of the cache included, got one of"
            f" {attention_mask.shape[1]}"
        )
    if attention_mask is None:
        padding = torch.empty(0, seen, dtype=torch.bool, device=device)
    else:
        padding = attention_mask[:, start : start + seen].to(torch.bool)
        padding = torch.nn.functional.pad(padding, (0, seen - padding.shape[1]), value=False)
        if not traced and read_back(padding).all():
            padding = padding[:0]
    return padding if causal else padding[:, None, None, :]


def _of_one(
    batch: int, q_length: int, kv_length: int, q_offset: Tensor, kv_offset: Any, causal: bool, padding: Tensor | None
) -> Tensor:
    """The mask of keys for one token whose position is known when the graph runs."""
    if not causal:
        raise NotImplementedError(OTHER_MASK)
    if q_length > 1:
        raise NotImplementedError(
            f"a static cache can be compiled for one token at a time, got {q_length}: compile the steps of decoding"
            " alone, as generate does"
        )
    keys = torch.arange(kv_length, device=q_offset.device) + kv_offset
    kept = (keys <= q_offset).expand(batch, kv_length)
    if padding is not None and padding.shape[0]:
        more = max(0, kv_length - padding.shape[1])
        kept = kept & torch.nn.functional.pad(padding.to(torch.bool), (0, more), value=False)[:, :kv_length]
    return kept[:, None, None, :]


def _is_window(mask_function: Callable[..., Any], size: int) -> bool:
    """Whether the mask is a causal window and nothing else."""
    window = sliding_window_causal_mask_function(size)
    parts, ours = (inspect.getclosurevars(f).nonlocals["mask_functions"] for f in (mask_function, window))
    return [part.__qualname__ for part in parts] == [part.__qualname__ for part in ours]


def _check_when_run(
    mask_function: Callable[..., Any], batch: int, q_length: int, q_offset: int, kv_offset: int, device: Any
) -> None:
    """Have the graph check that the mask is causal: transformers cannot see while it is compiled that positions do not
    restart, and asks for the mask of packed sequences. Of these, windows and chunks, a query that sees the first key
    sees all up to its own."""
    rows = torch.arange(batch, device=device)[:, None]
    i = q_offset + torch.arange(q_length, device=device)
    head = torch.zeros((), dtype=torch.long, device=device)
    last = q_offset + q_length - 1
    seen = mask_function(rows, head, i, torch.full_like(i, kv_offset)) & mask_function(rows, head, i, i)
    beyond = mask_function(rows, head, i, (i + 1).clamp(max=last)) & (i < last)
    torch._assert_async((seen & ~beyond).all(), OTHER_MASK)


def read(
    module: Any, mask: Tensor | None, shape: torch.Size, n_k: int, is_causal: bool | None
) -> tuple[bool, Tensor | None]:
    """Whether attention is causal, and the mask (batch or 0, seen) of the keys, or None: the first `seen` are there."""
    batch, _, n_q, _ = shape
    if mask is None:  # the model has masks of its own, or none
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        return bool(causal) and n_q > 1, None
    if mask.ndim == 2 and mask.shape[0] in (0, batch) and mask.shape[1] <= n_k:
        return True, mask
    if mask.ndim == 4 and mask.shape[0] in (0, batch) and mask.shape[1:] == (1, 1, n_k) and mask.dtype == torch.bool:
        return False, mask[:, 0, 0]
    raise NotImplementedError(
        f"attention_mask must be a padding mask (batch, keys), got one of shape {tuple(mask.shape)} and dtype"
        f" {mask.dtype} for {n_q} queries and {n_k} keys: opoch_xp takes no other mask"
    )


def columns(module: Any, mask: Tensor | None, shape: torch.Size, is_causal: bool | None) -> Tensor | None:
    """The mask (batch or 0, seen) of columns for keys of a TreecodeCache; None where the model has none."""
    causal, kept = read(module, mask, shape, 0 if mask is None else mask.shape[-1], is_causal)
    if not causal and (mask is not None or shape[2] > 1):
        raise NotImplementedError(
            "a TreecodeCache is for causal self-attention, which the model does not ask for here: use another cache"
        )
    return kept


def refuse(dropout: float, others: dict[str, Any], keys: int) -> None:
    if dropout:
        raise NotImplementedError(
            f"attention dropout must be 0, got {dropout}: set the model's attention dropout to 0, or call model.eval()"
        )
    for name, value in others.items():
        if name == "sliding_window" and value is not None and value >= keys:
            continue
        if value is not None and value is not False and name not in WITHOUT_EFFECT:
            raise NotImplementedError(
                f"opoch_xp's attention cannot honour {name}={value if not isinstance(value, Tensor) else 'a tensor'};"
                " use attn_implementation='eager' or 'sdpa'"
            )
