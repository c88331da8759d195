"""A token at a time through the whole model: seconds of a step, and what the steps are worth."""

from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from opoch_xp.integrations import transformers_cache
from opoch_xp.integrations.evaluation.heads import wait
from opoch_xp.integrations.evaluation.scores import Reference, divergence
from opoch_xp.integrations.evaluation.subject import Subject
from opoch_xp.methods import Method

STEPS = 32


def decoded(subject: Subject, exact: Reference, method: Method | None, name: str) -> tuple[float, float]:
    """The median seconds of a step of the model, over the last STEPS tokens after all before them, and the KL of the
    exact distribution on these; None: a DynamicCache and the model's own attention, else a TreecodeCache and the
    attention registered as `name`."""
    model, n = subject.model, exact.ids.shape[1]
    cache: Any = DynamicCache(config=model.config) if method is None else transformers_cache.TreecodeCache(method)
    before = model.config._attn_implementation
    model.set_attn_implementation(subject.before if method is None else name)
    seconds, states = [], []
    try:
        _step(subject, exact.ids[:, : n - STEPS], cache)
        for place in range(n - STEPS, n):
            wait(subject.device)
            start = perf_counter()
            states.append(_step(subject, exact.ids[:, place : place + 1], cache)[0])
            wait(subject.device)
            seconds.append(perf_counter() - start)
    finally:
        model.set_attn_implementation(before)
    return float(np.median(seconds)), divergence(subject, torch.cat(states), exact.states[0, -STEPS:])


def _step(subject: Subject, ids: Tensor, cache: Any) -> Tensor:
    """The last states of the body over ids, which the cache takes."""
    told: Tensor = subject.body(input_ids=ids, **{subject.cache_name: cache}, use_cache=True).last_hidden_state
    return told
