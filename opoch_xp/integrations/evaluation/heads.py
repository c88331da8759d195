"""Heads: where the softmax of each lies, and what methods do in it, layer by layer of an exact pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch
from torch import Tensor

from opoch_xp.arguments import prepare
from opoch_xp.integrations.evaluation.compared import Compared, attend_by, name_of
from opoch_xp.integrations.evaluation.results import Attended, Head
from opoch_xp.integrations.evaluation.subject import Call
from opoch_xp.measure import timed
from opoch_xp.methods import Treecode
from opoch_xp.text import first_line
from opoch_xp.treecode.forest import build_tier, tiers

ROWS = 256  # queries of the second half on which errors are taken, a head
LOOKED = 32  # of them, on which the softmax is looked at
FIRST, NEAR, OWN = 16, 64, 1024  # keys: the first, the last few, and the last of a block
SHARP = 64  # effective keys


@dataclass
class Measured:
    """One method in the layers of a pass: seconds and rows read a layer, errors a head, of single queries, and in the
    layer's output: of each head the square of what is wrong over the square of the whole."""

    method: Compared | None
    seconds: dict[int, float] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)
    error: dict[int, Tensor] = field(default_factory=dict)
    share: dict[int, Tensor] = field(default_factory=dict)
    single: list[Tensor] = field(default_factory=list)
    extra_bytes: int | None = None

    @property
    def name(self) -> str:
        return name_of(self.method)

    @property
    def seconds_of_all(self) -> float:
        return sum(self.seconds.values())

    def attended(self, exact: "Measured") -> Attended:
        """The figures of all layers."""
        seconds = self.seconds_of_all
        errors = {(layer, head): e for layer, x in self.error.items() for head, e in enumerate(x.tolist())}
        worst = max(errors, key=lambda where: errors[where])
        single = torch.cat([x.flatten() for x in self.single])
        return Attended(
            seconds, exact.seconds_of_all, sum(errors.values()) / len(errors), errors[worst], worst,
            float(single.quantile(0.99) if len(single) < 1 << 24 else single[:: len(single) >> 23].quantile(0.99)),
            float(torch.stack(list(self.rows.values())).mean()), self.extra_bytes,
        )  # fmt: skip


class Watch:
    """An exact pass in which methods attend beside: to the same q, k and v, layer by layer, in turn.

    As the function of a call it returns what scaled_dot_product_attention does. A method that fails is given up.
    heads: of each layer, what an earlier pass found.
    """

    def __init__(self, methods: Sequence[Compared], heads: Mapping[int, list[Head]]) -> None:
        self.exact = Measured(None)
        self.methods = [Measured(method) for method in methods]
        self.heads = dict(heads)
        self.failed: dict[str, str] = {}
        self._warm = False

    def __call__(self, call: Call) -> Tensor:
        if not self._warm:
            self._warm = True
            for one in (self.exact, *self.methods):
                self._first(one, call)
        rows = sampled(call.query.shape[2], ROWS, call.query.device)
        exact = self._run(self.exact, call)
        assert exact is not None
        self._compare(self.exact, call.layer, exact[:, :, rows], exact[:, :, rows])
        for one in self.methods:
            out = self._run(one, call)
            if out is not None:
                self._compare(one, call.layer, out[:, :, rows], exact[:, :, rows])
        if call.layer not in self.heads:
            self.heads[call.layer] = looked_at(call)
        return exact

    def _first(self, one: Measured, call: Call) -> None:
        """A call before the clock starts, and one for its memory."""
        try:
            attend = attend_by(one.method)
            attend(call)
            one.extra_bytes = extra_bytes(lambda: attend(call), call.query.device)
        except Exception as error:
            self._give_up(one, error)

    def _run(self, one: Measured, call: Call) -> Tensor | None:
        if one.name in self.failed:
            return None
        try:
            wait(call.query.device)
            start = perf_counter()
            out, rows = attend_by(one.method)(call)
            wait(call.query.device)
        except Exception as error:
            self._give_up(one, error)
            return None
        one.seconds[call.layer], one.rows[call.layer] = perf_counter() - start, rows
        return out

    def _give_up(self, one: Measured, error: Exception) -> None:
        if one is self.exact:
            raise error
        self.failed[one.name] = reason_of(error)

    @staticmethod
    def _compare(one: Measured, layer: int, out: Tensor, exact: Tensor) -> None:
        """(B, H, rows, d_v) each."""
        apart, whole = (out - exact).double(), exact.double()
        one.error[layer] = (((apart**2).sum((0, 2, 3)) / (whole**2).sum((0, 2, 3)).clamp(min=1e-30)).sqrt()).float()
        one.share[layer] = ((apart**2).sum((0, 2, 3)) / (whole**2).sum().clamp(min=1e-30)).float()
        one.single.append((apart.norm(dim=3) / whole.norm(dim=3).clamp(min=1e-30)).float())

    def found(self) -> dict[int, list[Head]]:
        """The heads of each layer, with the errors and rows of every method that was not given up."""
        some = [one for one in self.methods if one.name not in self.failed]

        def with_these(layer: int, head: Head) -> Head:
            error = {one.name: float(one.error[layer][head.head]) for one in some}
            rows = {one.name: float(one.rows[layer][head.head]) for one in some}
            return replace(head, error={**head.error, **error}, rows={**head.rows, **rows})

        return {layer: [with_these(layer, head) for head in heads] for layer, heads in self.heads.items()}


def sampled(n: int, count: int, device: torch.device) -> Tensor:
    """Rows of the second half, evenly spaced."""
    half = n - n // 2
    count = min(count, half)
    return n // 2 + torch.arange(count, device=device) * half // count


def looked_at(call: Call) -> list[Head]:
    """The heads of a layer, by the first sequence of its batch; without errors and rows yet."""
    query, key = call.query[0].float(), call.key[0].float()
    heads, n, dim = query.shape
    scale = dim**-0.5 if call.scale is None else call.scale
    rows, keys = sampled(n, LOOKED, query.device), torch.arange(n, device=query.device)
    near = key.repeat_interleave(heads // len(key), 0)
    logits = scale * query[:, rows] @ near.mT
    distance = (rows[:, None] - keys) if call.causal else (rows[:, None] - keys).abs()
    if call.causal:
        logits.masked_fill_(distance < 0, -torch.inf)
    weight = logits.softmax(-1)
    first = (keys < FIRST) & (distance >= FIRST)
    parts = {"sinks": first, "64": (distance < NEAR) & ~first, "1,024": (distance >= NEAR) & (distance < OWN) & ~first}
    parts["further"] = (distance >= OWN) & ~first
    mass = {name: (weight * part).sum(-1).mean(-1).tolist() for name, part in parts.items()}
    effective = (-(weight * weight.clamp(min=1e-30).log()).sum(-1)).exp().median(-1).values.tolist()
    sigmas = _sigmas(call, logits, weight)
    found = []
    for head in range(heads):
        held = {name: values[head] for name, values in mass.items()}
        found.append(
            Head(call.layer, head, kind_of(held, effective[head]), held, effective[head], sigmas[head], {}, {})
        )
    return found


def kind_of(mass: dict[str, float], effective_keys: float) -> str:
    """See Head."""
    local = mass["64"] + mass["1,024"]
    if mass["sinks"] >= max(local, mass["further"]):
        return "sink"
    if local >= mass["further"]:
        return "local"
    return "sharp" if effective_keys <= SHARP else "flat"


def _sigmas(call: Call, logits: Tensor, weight: Tensor) -> list[float | None]:
    """Of each head the deviation of logits (H, rows, n) inside the cells of its first tier, weighted by the softmax."""
    method, heads = Treecode(), logits.shape[0]
    problem = prepare(call.query[:1], call.key[:1], call.value[:1], causal=call.causal, scale=call.scale)
    found = tiers(problem.n_q, problem.n_k, call.causal, method)
    if not found:
        return [None] * heads
    tier, batch = found[0], problem.q.shape[0]
    tree = build_tier(problem, method, tier, None, None)
    order = torch.as_tensor(tree.order, device=logits.device).long().reshape(batch, -1, tier.size)
    order = order + tier.size * torch.arange(tier.low, tier.high, device=order.device)[:, None]
    cells = order.reshape(batch, 1, -1).repeat_interleave(heads // batch, 0).expand(heads, logits.shape[1], -1)
    inside, held = (x.gather(2, cells).unflatten(2, (-1, method.leaf)) for x in (logits, weight))
    there = torch.isfinite(inside).all(-1)
    deviation = torch.where(there, inside.std(-1, correction=0), 0.0).nan_to_num(0.0)
    mass = torch.where(there, held.sum(-1), 0.0)
    total = mass.sum((1, 2))
    sigma = (deviation * mass).sum((1, 2)) / total.clamp(min=1e-30)
    return [float(s) if t > 0 else None for s, t in zip(sigma, total, strict=True)]


def wait(device: torch.device) -> None:
    """For what the device computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_bytes(function: object, device: torch.device) -> int | None:
    """Peak bytes of a call above what was held before."""
    assert callable(function)
    if device.type != "cuda":
        return timed(function)[2]
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    return int(torch.cuda.max_memory_allocated(device) - before)


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out."""
    told = str(error)
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in told or "allocate memory" in told
    )


def reason_of(error: Exception) -> str:
    """Why something was given up, in a line."""
    return "out of memory" if out_of_memory(error) else first_line(error).rstrip(".")
