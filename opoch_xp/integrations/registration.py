"""Registering attention with transformers: see opoch_xp.integrations.transformers."""

from collections.abc import Callable
from os import PathLike
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from opoch_xp.attention import attention
from opoch_xp.integrations.layers import as_before, layer_number, or_mask_of
from opoch_xp.integrations.masks import columns, key_mask, read, refuse
from opoch_xp.integrations.settings import Settings
from opoch_xp.integrations.transformers_cache import step_of
from opoch_xp.methods import Method
from opoch_xp.solve import check_method

RESERVED = ("sdpa", "flex_attention", "/", "eager", "paged")  # what transformers looks for in a name


def register(
    name: str = "opoch_treecode",
    method: Method | None = None,
    *,
    settings: Settings | str | PathLike[str] | None = None,
) -> None:
    """Make `attn_implementation=name` attend by `method`; None: exact attention or a treecode, by predicted cost.

    settings: in place of a method, one for each layer and key head, or the file that `opoch-xp model --save` wrote;
    layers that it leaves out attend by scaled_dot_product_attention, whatever they ask for, and a single query reads
    every key.

    Grouped-query heads, padding on either side, causal models and encoders, prefill and decoding with a cache are
    honoured; gradients too. Rows that are padding come out as zeros. Raises ValueError for a name that transformers
    would take for another and for a file that holds no settings, TypeError for a method that is none, or with settings.
    What cannot be honoured raises NotImplementedError when a model asks for it: soft-capping, sliding or chunked
    windows, packed sequences, four-dimensional masks of the caller's, attention dropout, attention weights as output,
    sinks, additive biases.
    """
    if not isinstance(name, str) or not name or any(word in name for word in RESERVED):
        raise ValueError(f"name must be a string without {', '.join(map(repr, RESERVED))}, got {name!r}")
    if method is not None and settings is not None:
        raise TypeError(f"give method or settings, not both; got method={method!r} and settings={settings!r}")
    if method is not None:
        check_method(method)
    if settings is not None and not isinstance(settings, Settings):
        settings = Settings.load(settings)
    AttentionInterface.register(name, _attend_by(method, settings))
    AttentionMaskInterface.register(name, key_mask if settings is None else or_mask_of("sdpa"))


def _attend_by(method: Method | None, settings: Settings | None) -> Callable[..., tuple[Tensor, None]]:
    def opoch_attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """query (B, H, n_q, d), key and value (B, H_kv, n_k, d); returns (B, n_q, H, d) and no weights."""
        step = step_of(key, value)
        if step is not None:
            with step.taken():
                refuse(dropout, others, step.start + key.shape[2])
                kept = columns(module, attention_mask, query.shape, others.get("is_causal"))
                return step.attend(query, kept, scaling).transpose(1, 2).contiguous(), None
        if settings is not None and layer_number(module) not in settings.layers:
            return as_before("sdpa", module, query, key, value, attention_mask, dropout, scaling, **others)
        refuse(dropout, others, key.shape[2])
        causal, kept = read(module, attention_mask, query.shape, key.shape[2], others.get("is_causal"))
        if kept is not None:
            key, value = key[:, :, : kept.shape[1]], value[:, :, : kept.shape[1]]
        padding = kept if kept is not None and kept.shape[0] else None
        options: dict[str, Any] = {"causal": causal, "scale": scaling, "key_mask": padding}
        if settings is None:
            check = None if method is None else False
            out = attention(query, key, value, method=method, check=check, **options)
        else:
            out = settings.attend(layer_number(module), query, key, value, **options)
        return out.transpose(1, 2).contiguous(), None

    return opoch_attention
