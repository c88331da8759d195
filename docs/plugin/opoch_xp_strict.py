"""A backend for array_api_strict: exact attention of its own, with the whole matrix of logits; the rest is generic."""

from typing import Any

import array_api_strict as xp
import numpy as np

API_VERSION = 2  # of opoch_xp.backends, when this was written

Array = Any


def exact_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    scale: float,
    mask: Array | None = None,
    positions: np.ndarray | None = None,
) -> tuple[Array, Array]:
    """See opoch_xp.backends.generic.exact.exact_attention; memory for n_q * n_k logits a head."""
    n_q, n_k = q.shape[2], k.shape[1]
    logits = scale * (q @ xp.matrix_transpose(k)[:, None, :, :])  # (batch, repeat, n_q, n_k)
    if causal:
        last = np.arange(n_q) + (n_k - n_q) if positions is None else positions
        logits = xp.where(xp.asarray(np.arange(n_k) <= last[:, None], device=q.device), logits, -xp.inf)
    if mask is not None:
        logits = xp.where(mask[:, None, None, :], logits, -xp.inf)
    top = xp.max(logits, axis=-1, keepdims=True)
    weight = xp.exp(logits - xp.where(top == -xp.inf, 0.0, top))
    total = xp.sum(weight, axis=-1, keepdims=True)
    seen = total != 0  # of a row that sees no key the output is zeros, and lse -inf
    total = xp.where(seen, total, 1.0)
    return weight @ v[:, None, :, :] / total, xp.where(seen, top + xp.log(total), -xp.inf)[..., 0]
