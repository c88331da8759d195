"""Inputs of the property tests: hypothesis strategies for shapes, masks and parameters."""

from dataclasses import dataclass

import numpy as np
import oracle
from hypothesis import strategies as st

from opoch_xp import Treecode


def level(q: np.ndarray) -> np.ndarray:
    """Queries of the same signs whose balance is one in every dimension, whichever of them tell it."""
    return np.where(q < 0, -1.0, 1.0)


@dataclass(frozen=True)
class Call:
    """Arrays of one call and the arguments that go with them; `kept` is the key_mask or None."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    kept: np.ndarray | None
    causal: bool
    scale: float | None

    def heads(self) -> list[tuple[tuple[int, ...], np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]]:
        """Each query head: its index, q, k, v of that head, and its batch entry's mask."""
        found = []
        for index in np.ndindex(self.q.shape[:-2]):
            repeat = self.q.shape[-3] // self.k.shape[-3] if index else 1
            key = (*index[:-1], index[-1] // repeat) if index else ()
            kept = None if self.kept is None else self.kept[index[:-1]]
            found.append((index, self.q[index], self.k[key], self.v[key], kept))
        return found

    def balance(self, index: tuple[int, ...], method: Treecode) -> np.ndarray:
        """w (d,) of the key head that a query head reads."""
        if not index:
            return oracle.known(self.q[None], self.k.shape[-2], self.causal, method)
        repeat = self.q.shape[-3] // self.k.shape[-3]
        first = index[-1] // repeat * repeat
        queries = self.q[index[:-1]][first : first + repeat]
        return oracle.known(queries, self.k.shape[-2], self.causal, method)


@st.composite
def calls(draw: st.DrawFn, longest: int = 80, tied: bool = False) -> Call:
    """Any shapes with n_q and n_k up to `longest`; `tied`: entries may be whole numbers, and many rows equal."""
    n_q, n_k = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    d, d_v = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    lead, key_lead = draw(
        st.sampled_from([((), ()), ((2,), (2,)), ((4,), (2,)), ((2, 3), (2, 1)), ((1, 1, 2), (1, 1, 2))])
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shapes = ((*lead, n_q, d), (*key_lead, n_k, d), (*key_lead, n_k, d_v))
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    if tied and draw(st.booleans()):
        q, k = np.round(q), np.round(k)
    kept = None
    if draw(st.booleans()):
        kept = rng.random((*lead[:-1], n_k)) < draw(st.sampled_from([0.0, 0.2, 0.9]))
    return Call(q, k, v, kept, draw(st.booleans()), draw(st.sampled_from([None, 0.3, 1.5])))


@st.composite
def methods(draw: st.DrawFn) -> Treecode:
    """Any Treecode whose blocks are short enough for `calls` to have several tiers."""
    leaf = draw(st.integers(1, 4))
    return Treecode(
        rtol=draw(st.sampled_from([0.02, 0.1, 0.5])),
        sinks=draw(st.integers(0, 5)),
        block=leaf * 2 ** draw(st.integers(0, 3)),
        fan=draw(st.sampled_from([2, 4])),
        leaf=leaf,
        branch=draw(st.sampled_from([2, 4])),
        top=draw(st.integers(1, 8)),
        group=draw(st.integers(1, 9)),
        least=draw(st.integers(0, 4)),
        most=draw(st.sampled_from([None, None, 1, 3])),
        iterations=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 3)),
    )
