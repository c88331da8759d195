"""The model that is evaluated, with attention that can be replaced layer by layer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from opoch_xp.integrations.layers import as_before, or_mask_of
from opoch_xp.integrations.masks import read, refuse

NAME = "opoch_evaluated"
SCORED = 1024  # tokens whose logits are held at a time
CHECKED = 16  # tokens on which the model's logits are compared with those of its last product


@dataclass(frozen=True)
class Call:
    """The attention of one layer: query (B, H, n, d), key and value (B, H_kv, n, ...), not padded; scale or None."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool
    scale: float | None


Attend = Callable[[Call], Tensor]  # (B, H, n, d_v)


def sdpa(call: Call) -> Tensor:
    """Exact attention, as models of transformers have it by default."""
    repeat = call.query.shape[1] // call.key.shape[1]
    key, value = call.key, call.value
    wide = call.key.shape[-1] == call.value.shape[-1] <= 256
    if repeat > 1 and not wide:
        key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        call.query, key, value, is_causal=call.causal, scale=call.scale, enable_gqa=repeat > 1 and wide
    )


def most_tokens(model: Any) -> int | None:
    """The tokens that a model has positions for; None where it does not say."""
    most: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    first = getattr(table, "padding_idx", None)  # of models whose positions count from after the padding's
    return most if most is None or first is None else most - first - 1


class Subject:
    """A model of transformers, on whatever device it is.

    layers: numbers of those to be replaced, as the model numbers them; None: all that can be.
    `refused`: why a layer attends as it did before, by number. Raises ValueError for logits that are not those of the
    last product.
    """

    def __init__(self, model: Any, layers: Sequence[int] | None = None) -> None:
        self.model, self.body = model, model.base_model
        self.head = model.get_output_embeddings()
        self.language = self.head is not None and model.can_generate()
        self.before = model.config._attn_implementation
        taken = signature(self.body.forward).parameters
        self.cache_name = "cache" if "cache" in taken else "past_key_values"  # its name before transformers 5.24
        self.wanted = None if layers is None else frozenset(layers)
        self.refused: dict[int, str] = {}
        self.replaced: list[int] = []
        self._numbers: dict[int, int] = {}
        self._attend: Attend = sdpa
        training = model.training
        model.eval()
        self.factor, self.cap = self._finish() if self.language else (1.0, None)
        model.train(training)

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def device(self) -> torch.device:
        found: torch.device = next(self.model.parameters()).device
        return found

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Within it the model attends by what `pass_over` is given."""
        AttentionInterface.register(NAME, self._attention)
        AttentionMaskInterface.register(NAME, or_mask_of(self.before))
        training = self.model.training
        self.model.set_attn_implementation(NAME)
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.set_attn_implementation(self.before)
            self.model.train(training)

    def _attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0,
        scaling: float | None = None, **others: Any,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        number = getattr(module, "layer_idx", None)  # by which settings are registered
        if not isinstance(number, int):
            number = self._numbers.setdefault(id(module), len(self._numbers))
        try:
            refuse(dropout, others, key.shape[2])
            causal, kept = read(module, mask, query.shape, key.shape[2], others.get("is_causal"))
            if (kept is not None and kept.shape[0]) or query.shape[2] != key.shape[2]:
                raise NotImplementedError("it attends to other tokens than its own, or to padding")
        except NotImplementedError as reason:
            self.refused.setdefault(number, str(reason))
            return as_before(self.before, module, query, key, value, mask, dropout, scaling, **others)
        call = Call(number, query, key, value, causal, scaling)
        if self.wanted is not None and number not in self.wanted:
            return sdpa(call).transpose(1, 2).contiguous(), None
        if number not in self.replaced:
            self.replaced.append(number)
        return self._attend(call).transpose(1, 2).contiguous(), None

    def pass_over(self, ids: Tensor, attend: Attend) -> Tensor:
        """The last states (B, n, width) of the model's body over ids (B, n), its layers attending by `attend`."""
        self._attend = attend
        states: Tensor = self.body(input_ids=ids, **({"use_cache": False} if self.language else {})).last_hidden_state
        return states

    def log_probabilities(self, states: Tensor) -> Tensor:
        """Of the next token, (m, vocabulary) float32, from states (m, width)."""
        logits = self.head(states).float() * self.factor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits.log_softmax(-1)

    def likelihood(self, states: Tensor, wanted: Tensor) -> Tensor:
        """Log-likelihood (m,) of the tokens wanted (m,) after states (m, width)."""
        parts = zip(states.split(SCORED), wanted.split(SCORED), strict=True)
        return torch.cat([self.log_probabilities(x).gather(1, y[:, None])[:, 0] for x, y in parts])

    def _finish(self) -> tuple[float, float | None]:
        """What the model does with its last product: a factor, and a bound that logits are bent to."""
        size = min(int(self.head.weight.shape[0]), CHECKED)
        ids = torch.arange(size, device=self.device)[None]
        with torch.no_grad():
            told = self.model(input_ids=ids).logits[0].float()
            plain = self.head(self.body(input_ids=ids).last_hidden_state[0]).float()
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        factor = 1.0 if cap is not None else float((told * plain).sum() / (plain * plain).sum())
        ours = plain * factor if cap is None else torch.tanh(plain / cap) * cap
        if not torch.allclose(ours, told, rtol=1e-2, atol=1e-2 * float(told.std())):
            raise ValueError(f"the logits of {self.name} are not those of its last product, by which tokens are scored")
        return (1.0 if abs(factor - 1) < 1e-3 else factor), cap
