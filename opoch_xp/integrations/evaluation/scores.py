"""What the output of a model is worth beside the exact model's: loss, divergence, and loss where context counts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opoch_xp.integrations.evaluation.results import Scored
from opoch_xp.integrations.evaluation.subject import SCORED, Subject, sdpa

SHORT = 1024  # least context of a token, where what it gains by all of the text is measured
LONG_SHARE = 0.05  # of the scored tokens: those that gain most

Begin = Callable[[str, float], None]  # what is done now, and how many units of work it is


@dataclass(frozen=True)
class Reference:
    """The exact model over the tokens ids (B, n): its last states (B, m, width) of the m tokens that are scored, at the
    end; of a language model their losses (m - 1,), and `long`, which of them need long context, None where none can be
    told."""

    ids: Tensor
    states: Tensor
    losses: Tensor | None
    long: Tensor | None

    @property
    def scored(self) -> int:
        return self.states.shape[1]

    @property
    def wanted(self) -> Tensor:
        """The tokens that follow the scored ones, but the last."""
        return self.ids[0, -self.scored + 1 :]


def reference(subject: Subject, ids: Tensor, states: Tensor, begin: Begin) -> Reference:
    """The reference of the states that an exact pass over ids ended in, those of its second half."""
    if not subject.language:
        return Reference(ids, states, None, None)
    found = Reference(ids, states[:, ids.shape[1] // 2 :], None, None)
    losses = -subject.likelihood(found.states[0, :-1], found.wanted)
    return Reference(ids, found.states, losses, _long(subject, ids, losses, begin))


def _long(subject: Subject, ids: Tensor, losses: Tensor, begin: Begin) -> Tensor | None:
    """The places among the losses of the tokens that lose most where they see SHORT to 2 SHORT tokens of context.

    After Fang et al., "What is Wrong with Perplexity for Long-context Language Modeling?", 2024 (LongPPL).
    """
    n, count = ids.shape[1], losses.shape[0]
    first = n - count  # the first token with a loss
    if first < 2 * SHORT:
        return None
    short = []
    for start in range(first, n, SHORT):  # tokens from start on, with the 2 SHORT before their last
        stop = min(start + SHORT, n)
        begin("the exact model with short context", 2 * SHORT)
        low = start - SHORT
        states = subject.pass_over(ids[:, low:stop], sdpa)[0, SHORT - 1 : -1]
        short.append(-subject.likelihood(states, ids[0, start:stop]))
    gained = torch.cat(short) - losses
    most = gained.topk(max(1, int(LONG_SHARE * count))).indices
    return most[gained[most] > 0]


def score(subject: Subject, exact: Reference, states: Tensor) -> Scored:
    """The states (B, n or m, width) of another attention beside the exact model's."""
    states = states[:, -exact.scored :]
    if exact.losses is None:
        ours, theirs = (torch.nn.functional.normalize(x.float().mean(1), dim=1) for x in (states, exact.states))
        return Scored(apart=float((1 - (ours * theirs).sum(1)).mean().clamp(min=0)))
    kl, agrees, losses = 0.0, 0, []
    pieces = (x[0, :-1].split(SCORED) for x in (states, exact.states))
    for mine, other, wanted in zip(*pieces, exact.wanted.split(SCORED), strict=True):
        ours, theirs = subject.log_probabilities(mine), subject.log_probabilities(other)
        kl += float((theirs.exp() * (theirs - ours)).sum())
        agrees += int((ours.argmax(1) == theirs.argmax(1)).sum())
        losses.append(-ours.gather(1, wanted[:, None])[:, 0])
    added, count = torch.cat(losses) - exact.losses, len(exact.losses)
    long = None if exact.long is None or not len(exact.long) else float(added[exact.long].mean())
    return Scored(float(added.mean()), kl / count, agrees / count, long)


def divergence(subject: Subject, states: Tensor, exact: Tensor) -> float:
    """KL of the exact distribution to ours, mean over states (m, width)."""
    ours, theirs = subject.log_probabilities(states), subject.log_probabilities(exact)
    return float((theirs.exp() * (theirs - ours)).sum(1).mean())
