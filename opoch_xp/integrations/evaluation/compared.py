"""What a model's attention is compared with, each as a function of a layer's call; and what each reads."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opoch_xp.arguments import prepare, restore
from opoch_xp.cost import visible_pairs
from opoch_xp.integrations.evaluation.subject import Attend, Call, sdpa
from opoch_xp.integrations.settings import Settings, by_method
from opoch_xp.methods import LSH, Method, Treecode, method_name
from opoch_xp.solve import solve


@dataclass(frozen=True)
class Window:
    """The last `size` keys, of an encoder as many on both sides together, and the first `sinks`."""

    size: int = 1024
    sinks: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("size", self.size, 1), ("sinks", self.sinks, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} of a Window must be a whole number of at least {least}, got {value!r}")


RTOLS = (0.2, 0.1, 0.05)
Compared = Method | Window | Settings


def attend_by(method: Compared | None) -> Callable[[Call], tuple[Tensor, Tensor]]:
    """A method as a function of a call: its output, and what each head read. None: scaled_dot_product_attention."""
    if method is None:
        return lambda call: (sdpa(call), _all_rows(call))
    if isinstance(method, Window):
        return lambda call: _window(call, method)
    if isinstance(method, Settings):
        return lambda call: _by_settings(call, method)
    return lambda call: _solved(call, method)


def outputs(method: Compared | None) -> Attend:
    """The same, without what was read."""
    attend = attend_by(method)
    return lambda call: attend(call)[0]


class _Told:
    """The kernels of a backend, which keep what tree_attention read: (batch, repeat, 3) sums, see Part."""

    def __init__(self, kernels: Any, heads: tuple[int, int]) -> None:
        self._kernels, self._heads, self.read = kernels, heads, torch.zeros(*heads, 3, dtype=torch.float64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def tree_attention(self, *arguments: Any, **options: Any) -> Any:
        part = self._kernels.tree_attention(*arguments, **options)
        self.read += part.read.reshape(*self._heads, -1, 3).sum(2).to("cpu", torch.float64)
        return part


def _solved(call: Call, method: Method) -> tuple[Tensor, Tensor]:
    problem = prepare(call.query, call.key, call.value, causal=call.causal, scale=call.scale)
    told = _Told(problem.kernels, problem.q.shape[:2])
    found = solve(replace(problem, kernels=told), method)
    out, _ = restore(call.query, call.value, found.out, found.lse, problem.xp)
    rows = {name: float(value) for name, value in found.rows.items()}
    read = torch.full(problem.q.shape[:2], sum(rows.get(part, 0.0) for part in ("local", "sinks", "near", "far")))
    read += (told.read[..., :2].sum(2) / max(1, problem.n_q)).float()
    return out, _by_head(read, call)


def _by_head(read: Tensor, call: Call) -> Tensor:
    """read (batch of key heads, repeat) as the mean over the batch, (H,)."""
    return read.reshape(call.query.shape[0], -1).mean(0)


def _by_settings(call: Call, settings: Settings) -> tuple[Tensor, Tensor]:
    """As Settings.attend, layer by layer; layers without settings attend exactly."""
    methods = settings.layers.get(call.layer)
    if methods is None:
        return sdpa(call), _all_rows(call)
    out = call.query.new_empty(*call.query.shape[:3], call.value.shape[-1])
    read = torch.empty(call.query.shape[1])
    for method, heads, arrays in by_method(call.query, call.key, call.value, methods, f"layer {call.layer}"):
        out[:, heads], read[heads] = _solved(Call(call.layer, *arrays, call.causal, call.scale), method)
    return out, read


def _all_rows(call: Call) -> Tensor:
    n = call.query.shape[2]
    return torch.full((call.query.shape[1],), visible_pairs(n, n, call.causal) / n)


def _window(call: Call, method: Window) -> tuple[Tensor, Tensor]:
    """Blocks of queries under a mask, by scaled_dot_product_attention."""
    n, repeat = call.query.shape[2], call.query.shape[1] // call.key.shape[1]
    key, value = (x.repeat_interleave(repeat, 1) for x in (call.key, call.value))
    size, sinks = method.size, min(method.sinks, n)
    before, after = (size - 1, 0) if call.causal else (size // 2, size // 2)
    out, read = torch.empty(*call.query.shape[:3], value.shape[-1], dtype=value.dtype, device=value.device), 0
    for start in range(0, n, size):
        stop = min(start + size, n)
        low, high = max(0, start - before), min(n, stop + after)
        first = torch.arange(min(sinks, low), device=key.device)
        keys = torch.cat([first, torch.arange(low, high, device=key.device)])
        i = torch.arange(start, stop, device=key.device)[:, None]
        mask = (keys >= i - before) & (keys <= i + after) | (keys < sinks)
        if call.causal:
            mask &= keys <= i
        read += int(mask.sum())
        near = [torch.cat([x[:, :, : len(first)], x[:, :, low:high]], 2) for x in (key, value)]
        out[:, :, start:stop] = torch.nn.functional.scaled_dot_product_attention(
            call.query[:, :, start:stop], near[0], near[1], attn_mask=mask, scale=call.scale
        )
    return out, torch.full((call.query.shape[1],), read / n)


def name_of(method: Compared | None) -> str:
    """A method as a table names it."""
    if method is None:
        return "exact, SDPA"
    if isinstance(method, Window):
        first = f"{method.sinks:,} first keys + " if method.sinks else ""
        return f"{first}window of {method.size:,}"
    if isinstance(method, Settings):
        return method.name
    return method_name(method)


def usual(causal: bool, rtols: tuple[float, ...] = RTOLS) -> list[Compared]:
    """What is compared where nothing is named: windows without and with the first keys, hashing, treecodes."""
    trees = [Treecode(rtol=rtol) for rtol in rtols]
    return [Window(), Window(sinks=16), LSH(bits=8, tables=8, window=512 if causal else 0), *trees]
