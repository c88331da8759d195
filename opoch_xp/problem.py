"""Problem: one call of attention, checked and laid out the way kernels take it; Solution: what a method gives back."""

from dataclasses import dataclass, field, replace
from typing import Any

Array = Any


def sum_dtype(xp: Any, dtype: Any) -> Any:
    """What numbers of `dtype` are summed in: float64 for float64, else float32; the dtype of out and lse."""
    return xp.float64 if dtype == xp.float64 else xp.float32


def nothing_seen(xp: Any, lead: tuple[int, ...], width: int, dtype: Any, device: Any) -> tuple[Array, Array]:
    """out (*lead, width) and lse (*lead) of queries that have seen no key: what parts are merged into."""
    here = {"dtype": dtype, "device": device}
    return xp.zeros((*lead, width), **here), xp.full(lead, -xp.inf, **here)


@dataclass(frozen=True)
class Problem:
    """Queries, keys and values in a dtype the kernels accept, heads in one batch axis; `dtype` is what is summed in.

    q (batch, repeat, n_q, d): `repeat` query heads share a key head; k (batch, n_k, d); v (batch, n_k, d_v);
    mask (batch, n_k) bool, True = keep, or None. Masked keys and values are already zeros.
    Causal: query i stands at position i + n_k - n_q and sees the keys at positions up to its own.
    """

    xp: Any  # the array-api-compat namespace of the arrays
    kernels: Any  # the kernels of the backend, as attributes: see opoch_xp.backends
    q: Array
    k: Array
    v: Array
    mask: Array | None
    causal: bool
    scale: float

    @property
    def dtype(self) -> Any:
        """Of out and lse: see `sum_dtype`."""
        return sum_dtype(self.xp, self.q.dtype)

    def widened(self) -> "Problem":
        """The same with q, k and v in `dtype`."""
        q, k, v = (self.xp.astype(x, self.dtype, copy=False) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v)

    @property
    def n_q(self) -> int:
        return self.q.shape[2]

    @property
    def n_k(self) -> int:
        return self.k.shape[1]

    def last_queries(self, n: int) -> "Problem":
        """The same problem for the last n queries; causal positions stay what they were."""
        return self if n >= self.n_q else replace(self, q=self.q[:, :, self.n_q - n :, :])


@dataclass(frozen=True)
class Solution:
    """out (batch, repeat, n_q, d_v) and lse (batch, repeat, n_q), the rows read per query by part (mean), and the share
    of the queries for which a bound of the method left something out: numbers, or arrays of no axes where only the
    device knows them."""

    out: Array
    lse: Array
    rows: dict[str, Any] = field(default_factory=dict)
    bounded: Any = 0.0
