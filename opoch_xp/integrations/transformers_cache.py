"""TreecodeCache: a cache of Hugging Face transformers that keeps the keys and values of each layer in a KVCache.

A model hands its new keys and values to `update`, and what that returns to the attention of its `attn_implementation`.
Here these are tensors of the new tokens alone, `NewTokens`, which tell their shape and refuse every operation. The
attention that `register` registers finds in them the layer that is to take them, which appends them and attends, in
one call; nothing has changed until then. Any other attention fails at its first operation, where it would attend to the
new tokens alone.

A transformers cache counts columns, padding included; a KVCache holds tokens. A layer keeps which columns were tokens,
on the host, where there is padding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import resolve_name
from transformers.cache_utils import Cache, CacheLayerMixin

from opoch_xp.backends.torch.operator import cast, casts, without_casts
from opoch_xp.cache import KVCache
from opoch_xp.methods import Method

# what a model may ask of keys before it hands them to its attention
TOLD = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
    Tensor.size,
    Tensor.dim,
}


@dataclass(frozen=True, eq=False)
class Step:
    """New keys (batch, H_kv, m, d) and values (batch, H_kv, m, d_v) that a layer of `start` columns is to take."""

    layer: "TreecodeLayer"
    keys: Tensor
    values: Tensor
    start: int

    @contextmanager
    def taken(self) -> Iterator[None]:
        """The attention to these tokens: whatever is raised inside, all layers are as they were before the pass."""
        with self.layer.forward.of(self.layer):
            yield

    def attend(self, queries: Tensor, columns: Tensor | None, scale: float | None) -> Tensor:
        """Append, and attend with queries (batch, H, m, d): (batch, H, m, d_v). columns as `key_mask` gives them."""
        if self.layer.columns != self.start:
            raise RuntimeError(
                f"these keys were attended to already, or the cache changed since `update`: they come after column"
                f" {self.start}, the layer holds {self.layer.columns} columns"
            )
        if torch.is_grad_enabled() and any(x.requires_grad for x in (queries, self.keys, self.values)):
            raise ValueError(
                "a TreecodeCache carries no gradients: run the model under torch.no_grad(), as generate does, or train"
                " without a cache (use_cache=False)"
            )
        return self.layer.attend(queries, self.keys, self.values, columns, scale)


class NewTokens(Tensor):
    """Keys or values that `update` returned: they tell shape, dtype and device, and refuse every other operation."""

    step: Step

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in TOLD:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is Tensor.__repr__:
            return f"NewTokens({tuple(args[0].shape)} for {args[0].step.layer!r})"
        raise NotImplementedError(
            "the keys and values of a TreecodeCache are attended to by the attention that"
            " opoch_xp.integrations.transformers.register() makes, by no other and not under torch.compile: set"
            " attn_implementation='opoch_treecode', or the name that was registered, or use another cache;"
            f" something else called {resolve_name(func)} on them"
        )


def step_of(key: Tensor, value: Tensor) -> Step | None:
    """The step that the keys and values of a call of attention belong to; None: they are tensors like others."""
    steps = [x.step if isinstance(x, NewTokens) else None for x in (key, value)]
    if steps[0] is not steps[1]:
        raise ValueError("key and value must come from one call of a TreecodeCache's `update`")
    return steps[0]


def read_back(mask: Tensor) -> np.ndarray:
    """A mask on the host: copied once, and kept with the mask for the layers that it is handed to."""
    kept: np.ndarray | None = mask.__dict__.get("read_back")
    if kept is None:
        kept = mask.__dict__["read_back"] = mask.cpu().numpy().copy()
    return kept


@contextmanager
def unrecorded() -> Iterator[None]:
    """Without gradients, and with tensors that may be written to later, under torch.inference_mode or not."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Forward:
    """The layers that took tokens in one pass of the model: they give them back where a later layer fails."""

    def __init__(self) -> None:
        self._taken: list[tuple[TreecodeLayer, int | None]] = []  # None: it was empty, and of no shape

    @contextmanager
    def of(self, layer: "TreecodeLayer") -> Iterator[None]:
        if any(layer is other for other, _ in self._taken):  # the next pass
            self._taken = []
        before = layer.columns if layer.is_initialized else None
        try:
            yield
        except BaseException:
            for other, columns in [*self._taken, (layer, before)]:
                other.keep(columns)
            self._taken = []
            raise
        self._taken.append((layer, before))


class Refused:
    """An attribute that transformers has and a tree has not: asked for, it raises; what is set is dropped."""

    def __init__(self, used: str) -> None:
        self.used = used

    def __get__(self, layer: Any, kind: Any = None) -> Any:
        if layer is None:
            return self
        raise NotImplementedError(f"a TreecodeCache has no keys and values as tensors, {self.used}: use a DynamicCache")

    def __set__(self, layer: Any, nothing: None) -> None: ...


class TreecodeLayer(CacheLayerMixin):
    """The cache of one layer: a KVCache, `cache`, and how many columns, padding included, it has seen.

    settings: the arguments of the KVCache. kept: None, or (batch, columns) bool on the host, False = padding.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, settings: dict[str, Any], forward: Forward) -> None:
        super().__init__()
        self.settings, self.forward = settings, forward
        self.reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.columns:,} columns, {self.cache!r})"

    def reset(self) -> None:
        """Forget everything, sizes included."""
        self.cache = KVCache(**self.settings)
        self.columns = 0
        self.kept: np.ndarray | None = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Fix dtype, device and sizes by keys and values of any number of tokens, and take none of them."""
        with unrecorded():
            self.cache.append(key_states[:, :, :0], value_states[:, :, :0])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values for the registered attention, which puts them into the cache; nothing changes yet."""
        step = Step(self, key_states, value_states, self.columns)
        new = key_states.as_subclass(NewTokens), value_states.as_subclass(NewTokens)
        for one in new:
            one.step = step
        return new

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, columns: Tensor | None, scale: float | None
    ) -> Tensor:
        """Append keys and values and attend, as `Step.attend`; whatever is raised, the layer is as it was before."""
        batch, _, m, _ = keys.shape
        if queries.shape[2] != m:
            raise NotImplementedError(
                f"a TreecodeCache is for self-attention, got {queries.shape[2]} queries and {m} new keys: give the keys"
                " of cross-attention, which are those of an encoder, to another cache"
            )
        kept = self._columns(columns, batch, m)
        new = None if kept is None else kept[:, self.columns :]
        if casts(queries):
            queries, keys, values = cast(queries, keys, values)
        with unrecorded(), without_casts(queries):
            out = self.cache.prefill(queries, keys, values, key_mask=new, scale=scale).out
        self.columns, self.kept, self.is_initialized = self.columns + m, kept, True
        return out

    def _columns(self, mask: Tensor | None, batch: int, m: int) -> np.ndarray | None:
        """Which columns hold a token once m more came, None: all; ValueError unless the mask goes on from the last."""
        seen = self.columns + m
        if mask is not None and mask.shape[1] != seen:
            raise ValueError(
                f"attention_mask is for {mask.shape[1]} columns, the layer holds {self.columns} and {m} are new: where"
                " a pass was interrupted, crop the cache to the columns that all of its layers hold, or reset it"
            )
        if mask is None or not mask.shape[0]:
            if self.kept is not None:
                raise ValueError(
                    "the cache holds padding: attention_mask must be given with every pass, and cover the columns that"
                    " are held as well as the new ones"
                )
            return None
        kept = read_back(mask)
        before = np.ones((batch, self.columns), bool) if self.kept is None else self.kept
        if not np.array_equal(kept[:, : self.columns], before):
            raise ValueError(
                f"attention_mask must be what it was for the {self.columns} columns that the cache holds: what was"
                " padding was not kept, and what was kept cannot be hidden"
            )
        return None if kept.all() else kept

    def keep(self, columns: int | None) -> None:
        """Keep the first columns, of those that are held; None: forget the sizes too."""
        if columns is None:
            self.reset()
        else:
            kept = None if self.kept is None else self.kept[:, :columns]
            with unrecorded():
                self.cache.crop(columns if kept is None else kept.sum(axis=1))
            self.columns, self.kept = columns, None if kept is None or kept.all() else kept

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -n columns of every sequence, n negative, or keep the first n; 0 changes nothing.

        Of padding among them nothing is dropped. Raises ValueError where fewer are held.
        """
        n = index(tokens_to_remove)
        if -n > self.columns:
            raise ValueError(f"tokens_to_remove must be at least -{self.columns}, the columns that are held, got {n}")
        if n and self.is_initialized:
            self.keep(self.columns + n if n < 0 else min(n, self.columns))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """`batch_select_indices` by the beams that a search goes on with; complete chunks are shared, not copied."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences named by whole numbers or by a bool mask, in that order."""
        if not self.is_initialized:
            return
        chosen = np.asarray(torch.as_tensor(indices).cpu())
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        with unrecorded():
            self.cache.select(chosen)
        self.kept = None if self.kept is None else self.kept[chosen]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times in a row; complete chunks are shared, not copied."""
        if self.is_initialized:
            with unrecorded():
                self.cache.repeat(repeats)
            self.kept = None if self.kept is None else self.kept.repeat(repeats, axis=0)

    def get_seq_length(self) -> int:
        """Columns held, padding included; `cache.lengths` are the tokens of each sequence."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask of `query_length` new ones is to cover, and the first of them."""
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        """The capacity; -1 where there is none."""
        return -1 if self.cache.capacity is None else self.cache.capacity

    get_max_cache_shape = get_max_length  # its name in earlier versions of transformers

    keys: Any = Refused("which cross-attention, layers that share keys and continuous batching read")
    values: Any = keys

    def offload(self) -> None:
        raise NotImplementedError("keys and values lie where TreecodeCache(offload=...) says")

    prefetch = offload


class TreecodeCache(Cache):
    """A cache for generation, `model.generate(..., cache=TreecodeCache())`, whose steps go through a tree; before
    transformers 5.24 the argument is `past_key_values`.

    The model's attn_implementation must be one that `register` made; how it attends is this cache's `method`, not that
    of the name. Each layer holds an `opoch_xp.KVCache`, made when the model first comes to it; the arguments are those
    of the KVCache. `layers[i].cache` is that of layer i: its `lengths`, tokens without padding, and its `audit`.

    Grouped-query heads, batches with padding on either side, further passes over the same cache, beam search, assisted
    decoding and several samples of a prompt are honoured, and copy.deepcopy, for a prompt that is used again. An
    attention_mask must go on from that of the pass before: padding is not kept, and cannot become a token later. crop
    counts columns as transformers does, -n the last n, and n > 0 keeps the first n.

    A pass that raises in its attention leaves every layer as it was. Raises what KVCache raises, ValueError where
    gradients are to flow, and NotImplementedError for what it cannot do: another attention than the registered one,
    sliding windows, cross-attention, attention that is not causal, keys and values as tensors, torch.compile.

    Cost: see `KVCache`, for each layer; `nbytes` is what all of them hold. Nothing is read back from a device in a
    step, except attention_mask, once a pass, where one is given; generate gives none where there is no padding.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from opoch_xp.integrations.transformers import TreecodeCache, register
    >>> register()
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    ...     num_key_value_heads=2, attn_implementation="opoch_treecode",
    ... )
    >>> model = LlamaForCausalLM(config).eval()
    >>> cache = TreecodeCache()
    >>> prompt = torch.arange(50)[None]
    >>> text = model.generate(prompt, cache=cache, max_new_tokens=5, do_sample=False, pad_token_id=0)
    >>> text.shape, cache.get_seq_length()  # the last token was not read
    (torch.Size([1, 55]), 54)
    """

    def __init__(
        self,
        method: Method | None = None,
        *,
        capacity: int | None = None,
        offload: str | Path | None = None,
        offload_finest: bool = False,
        backend: str | None = None,
    ) -> None:
        settings: dict[str, Any] = {
            "method": method, "capacity": capacity, "offload": offload, "offload_finest": offload_finest,
            "backend": backend,
        }  # fmt: skip
        KVCache(**settings)  # raises what is wrong with them now
        make: Any = partial(TreecodeLayer, settings, Forward())
        super().__init__(layer_class_to_replicate=make)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of all layers."""
        layers: list[Any] = self.layers
        return sum(layer.cache.nbytes for layer in layers)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Go on from the sequences named by beam_idx, in that order; read back to the host once."""
        super().reorder_cache(beam_idx.cpu())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences named, in that order; read back to the host once."""
        super().batch_select_indices(torch.as_tensor(indices).cpu())
