"""What an evaluation finds: a row for each method, a head for each head of the model, and the answer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from opoch_xp.integrations.settings import Settings
from opoch_xp.methods import Method, Treecode

KINDS = ("sink", "local", "sharp", "flat")


@dataclass(frozen=True)
class Scored:
    """What the model's output becomes, a token of those that are scored.

    loss_added: nats over the exact model's; kl: of the exact distribution to this one, nats; agrees: how often the
    likeliest token is the same; long_loss_added: loss added on the tokens that need the most context, None where the
    text is too short to tell. Of an encoder only `apart`: 1 - cosine of the embeddings, mean over the texts.
    """

    loss_added: float | None = None
    kl: float | None = None
    agrees: float | None = None
    long_loss_added: float | None = None
    apart: float | None = None

    @property
    def distance(self) -> float:
        """What a tolerance is compared with: the KL, or of an encoder 1 - cosine."""
        found = self.kl if self.apart is None else self.apart
        assert found is not None
        return found


@dataclass(frozen=True)
class Attended:
    """What a method does in the attention of all layers that it replaces, fed with the exact model's q, k and v.

    seconds: of all of them, one pass; exact_seconds: of scaled_dot_product_attention beside it in the same pass;
    error: Frobenius norm of (approximate - exact) over that of exact, a head, mean; worst: of the worst head, which is
    worst_head (layer, head); p99: of single queries; rows: read by a query, mean; extra_bytes: peak of one layer above
    its inputs, None where the system cannot tell.
    """

    seconds: float
    exact_seconds: float
    error: float
    worst: float
    worst_head: tuple[int, int]
    p99: float
    rows: float
    extra_bytes: int | None

    @property
    def speedup(self) -> float:
        """Times faster than scaled_dot_product_attention."""
        return self.exact_seconds / self.seconds


@dataclass(frozen=True)
class Decoded:
    """A token at a time after the text's beginning: seconds of a step of the whole model, median; speedup over the same
    with a DynamicCache and scaled_dot_product_attention; kl to the exact model on these tokens, nats."""

    seconds: float
    speedup: float
    kl: float


@dataclass(frozen=True)
class Answered:
    """A task: answers asked for, the share that was right in every token, and the loss of a token of an answer."""

    asked: int
    right: float
    loss: float


@dataclass(frozen=True)
class Row:
    """A method. method: None for what the library has not, windows and scaled_dot_product_attention; prefill:
    seconds of a pass of the whole model; failed: why figures are missing, "" where none are."""

    name: str
    method: Method | Settings | None = None
    scored: Scored | None = None
    prefill: float | None = None
    attended: Attended | None = None
    decoded: Decoded | None = None
    tasks: Mapping[str, Answered] = field(default_factory=dict)
    failed: str = ""

    def within(self, tol: float) -> bool:
        """Whether what it does is known, and no more than a tolerance."""
        return self.scored is not None and self.scored.distance <= tol


@dataclass(frozen=True)
class Head:
    """A query head on the text, from sampled queries of its second half.

    kind: where most of its softmax lies: "sink" (the first keys), "local" (the last 1,024), or elsewhere: "sharp" (on
    up to 64 keys) or "flat". mass: by distance, "sinks", "64", "1,024" and "further"; effective_keys: exp of the
    entropy, median; sigma: standard deviation of the logits inside a cell of keys, weighted by the softmax, None where
    there is no cell. error, rows: of each method that was compared, by its name.
    """

    layer: int
    head: int
    kind: str
    mass: Mapping[str, float]
    effective_keys: float
    sigma: float | None
    error: Mapping[str, float]
    rows: Mapping[str, float]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns.

    `rows`, exact first; `heads`; `refused`: why layers stayed as they were, by number; `chosen`: the row of the
    treecode for the tolerance, "" where there is none; `answer`: what to take, in words; `line`: the Python to paste;
    `settings`: what to save; `loss`: the exact model's, nats a token, None of an encoder; `tokens`, `scored`: read, and
    scored of them; `notes`: what could not be measured; `stopped`: why it ended early, "" where it did not.
    """

    model: str
    language: bool
    tokens: int
    scored: int
    layers: tuple[int, ...]
    refused: Mapping[int, str]
    loss: float | None
    long_tokens: int
    tol: float
    rows: tuple[Row, ...]
    heads: tuple[Head, ...]
    chosen: str
    answer: str
    line: str
    settings: Settings | None
    notes: tuple[str, ...] = ()
    stopped: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The same in types that JSON has."""
        plain = ("model", "language", "tokens", "scored", "loss", "long_tokens", "tol")
        told = ("chosen", "answer", "line", "stopped")
        found: dict[str, Any] = {name: getattr(self, name) for name in (*plain, *told)}
        found |= {"layers": list(self.layers), "refused": {str(n): why for n, why in self.refused.items()}}
        rows = [
            {**{name: value for name, value in asdict(row).items() if name != "method"}, "method": _named(row.method)}
            for row in self.rows
        ]
        heads = [asdict(head) for head in self.heads]
        found |= {"notes": list(self.notes), "settings": None if self.settings is None else self.settings.as_dict()}
        return {**found, "rows": rows, "heads": heads}


def _named(method: Method | Settings | None) -> str | None:
    return None if method is None else "settings" if isinstance(method, Settings) else repr(method)


def is_tree(row: Row) -> bool:
    """Whether the row is that of one treecode for all heads."""
    return isinstance(row.method, Treecode)
