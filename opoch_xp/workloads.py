"""Workloads: the inputs of every table, from inputs that suit an approximation to inputs that defeat it.

>>> from opoch_xp import workloads
>>> q, k, v = workloads.make("topics", n=1000, dim=16, heads=2)
>>> q.shape, q.dtype
((2, 1000, 16), dtype('float32'))
"""

from collections.abc import Callable

import numpy as np

from opoch_xp.data import byte_model

QKV = tuple[np.ndarray, np.ndarray, np.ndarray]

ROWS = 4096  # rows made at a time, so that scratch stays at a few MB whatever n is
TOPICS = 1024  # clusters of `topics`
TOPIC_RUN = 64  # tokens in a row on one topic
STREAM_RUN = (32, 512)  # the fewest and the most of a `Stream`
SCATTERED = 64  # clusters of `scattered`
SINKS = 4  # keys of `sinks` that stand out
SINK_NORM = 20.0  # how many times their norm is the norm of the others
SHARPNESS = 3.0  # norm of a needle's query over its key's: at dim 64 and cosine .9 it outweighs a million other keys
HEADS_LIMIT = 65_536  # tokens; the byte model's forward pass is exact, so its cost grows with their square


def make(name: str, n: int, dim: int = 64, heads: int | None = None, seed: int = 0, *, cosine: float = 0.9) -> QKV:
    """Queries, keys and values of the workload `name`, each (heads, n, dim) float32, the same for the same seed.

    - `topics`: 1,024 cluster centers c ~ N(0, I); queries 1.5 c_a + .5 N, keys 1.5 c_b + .5 N, values c_b + N, with a
      and b drawn anew every 64 tokens.
    - `scattered`: the same with 64 clusters, a and b drawn anew for every token.
    - `gaussian`: independent normal entries: flat attention, the worst case for selection.
    - `needles`: every query has a key of its own, drawn among those up to its own position, at the given `cosine` and
      with most of the softmax mass; keys and values are Gaussian, without structure to find it by.
    - `sinks`: Gaussian, and the first 4 keys have 20 times the norm.
    - `identical`: every token the same.
    - `heads`: the 16 heads of the byte model on real text (`opoch_xp.data.byte_model`); dim is 64, no seed.

    `heads` is 1 by default, and all 16 for the byte model. Memory: the outputs and a few MB; for `heads`, the model's
    activations. Raises ValueError for an unknown name or sizes that do not fit.
    """
    if name not in _MAKERS and name != "heads":
        raise ValueError(f"workload must be one of {', '.join(NAMES)}, got {name!r}")
    if min(n, dim, 1 if heads is None else heads) < 1:
        raise ValueError(f"n, dim and heads must be at least 1, got n={n}, dim={dim}, heads={heads}")
    if not -1 <= cosine <= 1:
        raise ValueError(f"cosine must be from -1 to 1, got {cosine}")
    if name == "heads":
        return _heads(n, dim, heads)
    q, k, v = (np.empty((heads or 1, n, dim), np.float32) for _ in range(3))
    rng = np.random.default_rng(seed)
    for head in range(heads or 1):
        _MAKERS[name](rng, q[head], k[head], v[head], cosine)
    return q, k, v


def _blocks(n: int) -> list[slice]:
    return [slice(start, min(start + ROWS, n)) for start in range(0, n, ROWS)]


def _clustered(rng: np.random.Generator, q: np.ndarray, k: np.ndarray, v: np.ndarray, clusters: int, run: int) -> None:
    n, dim = q.shape
    centers = rng.standard_normal((clusters, dim), np.float32)
    a, b = (np.repeat(rng.integers(clusters, size=-(-n // run)), run)[:n] for _ in range(2))
    for x, cluster, center, noise in ((q, a, 1.5, 0.5), (k, b, 1.5, 0.5), (v, b, 1.0, 1.0)):
        rng.standard_normal(out=x, dtype=np.float32)
        for rows in _blocks(n):
            x[rows] *= np.float32(noise)
            x[rows] += np.float32(center) * centers[cluster[rows]]


def _topics(rng: np.random.Generator, q: np.ndarray, k: np.ndarray, v: np.ndarray, cosine: float) -> None:
    _clustered(rng, q, k, v, TOPICS, TOPIC_RUN)


def _scattered(rng: np.random.Generator, q: np.ndarray, k: np.ndarray, v: np.ndarray, cosine: float) -> None:
    _clustered(rng, q, k, v, SCATTERED, 1)


def _gaussian(rng: np.random.Generator, q: np.ndarray, k: np.ndarray, v: np.ndarray, cosine: float) -> None:
    for x in (q, k, v):
        rng.standard_normal(out=x, dtype=np.float32)


def _needles(rng: np.random.Generator, q: np.ndarray, k: np.ndarray, v: np.ndarray, cosine: float) -> None:
    _gaussian(rng, q, k, v, cosine)
    for rows in _blocks(len(q)):
        needle = k[rng.integers(np.arange(rows.start, rows.stop) + 1)]  # one of the keys up to the query's own position
        norm = np.linalg.norm(needle, axis=-1, keepdims=True)
        along = needle / norm
        across = q[rows] - (q[rows] * along).sum(-1, keepdims=True) * along
        across /= np.maximum(np.linalg.norm(across, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
        q[rows] = SHARPNESS * norm * (cosine * along + (1 - cosine**2) ** 0.5 * across)


def _sinks(rng: np.random.Generator, q: np.ndarray, k: np.ndarray, v: np.ndarray, cosine: float) -> None:
    _gaussian(rng, q, k, v, cosine)
    k[:SINKS] *= np.float32(SINK_NORM)


def _identical(rng: np.random.Generator, q: np.ndarray, k: np.ndarray, v: np.ndarray, cosine: float) -> None:
    for x in (q, k, v):
        x[:] = rng.standard_normal(x.shape[1], np.float32)


def _heads(n: int, dim: int, heads: int | None) -> QKV:
    count = byte_model.LAYERS * byte_model.HEADS
    if dim != byte_model.HEAD_DIM or (heads or 1) > count:
        raise ValueError(
            f"the byte model has {count} heads of {byte_model.HEAD_DIM}: got dim={dim} and heads={heads or count}"
        )
    if n > HEADS_LIMIT:
        raise ValueError(
            f"heads is refused above {HEADS_LIMIT:,} tokens: the byte model's own forward pass is exact attention, "
            f"whose cost grows with the square of the tokens; got n={n:,}"
        )
    q, k, v = byte_model.heads(n)
    return q[:heads], k[:heads], v[:heads]


class Stream:
    """A sequence that goes on, for decoding: keys and values as they come, and queries of its last token.

    `topics` as `make` has them, but a topic stays for 32 to 512 tokens, drawn uniformly, and every query is on a topic
    of its own, drawn anew. Each key head has its own centers and runs. The same for the same seed, in pieces or whole.

    >>> from opoch_xp import workloads
    >>> stream = workloads.Stream(dim=16, heads=2)
    >>> k, v = stream.tokens(1000)
    >>> k.shape, v.shape, stream.queries(4).shape  # four query heads on each key head
    ((2, 1000, 16), (2, 1000, 16), (8, 1, 16))
    """

    def __init__(self, dim: int = 64, heads: int = 1, seed: int = 0) -> None:
        if min(dim, heads) < 1:
            raise ValueError(f"dim and heads must be at least 1, got dim={dim}, heads={heads}")
        self.dim = dim
        self._heads = [_StreamHead(dim, (seed, head)) for head in range(heads)]

    def tokens(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of the next n tokens, each (heads, n, dim) float32."""
        k, v = (np.empty((len(self._heads), n, self.dim), np.float32) for _ in range(2))
        for number, head in enumerate(self._heads):
            head.tokens(k[number], v[number])
        return k, v

    def queries(self, repeat: int = 1) -> np.ndarray:
        """A query for each of the `repeat` query heads of every key head, (heads * repeat, 1, dim) float32."""
        return np.concatenate([head.queries(repeat) for head in self._heads])[:, None, :]


class _StreamHead:
    """One key head of a `Stream`. What is drawn for topics, keys, values and queries does not mix."""

    def __init__(self, dim: int, seed: tuple[int, int]) -> None:
        self.topics, self.keys, self.values, self.asked = (np.random.default_rng((*seed, i)) for i in range(4))
        self.centers = self.topics.standard_normal((TOPICS, dim), np.float32)
        self.topic, self.left = 0, 0  # of the run that the last token was in

    def tokens(self, k: np.ndarray, v: np.ndarray) -> None:
        self.keys.standard_normal(out=k, dtype=np.float32)
        self.values.standard_normal(out=v, dtype=np.float32)
        k *= np.float32(0.5)
        start = 0
        while start < len(k):
            if not self.left:
                self.topic = int(self.topics.integers(TOPICS))
                self.left = int(self.topics.integers(*STREAM_RUN, endpoint=True))
            stop = min(start + self.left, len(k))
            k[start:stop] += np.float32(1.5) * self.centers[self.topic]
            v[start:stop] += self.centers[self.topic]
            self.left -= stop - start
            start = stop

    def queries(self, repeat: int) -> np.ndarray:
        topic = self.asked.integers(TOPICS, size=repeat)
        noise = self.asked.standard_normal((repeat, self.centers.shape[1]), np.float32)
        return np.float32(1.5) * self.centers[topic] + np.float32(0.5) * noise


_Maker = Callable[[np.random.Generator, np.ndarray, np.ndarray, np.ndarray, float], None]
_MAKERS: dict[str, _Maker] = {
    "topics": _topics,
    "scattered": _scattered,
    "gaussian": _gaussian,
    "needles": _needles,
    "sinks": _sinks,
    "identical": _identical,
}
NAMES = (*_MAKERS, "heads")
