"""Random inputs on the host, the same for every backend."""

import numpy as np

MANY = 10**6  # more nodes than any test has: everything is opened


def qkv(
    seed: int, n_q: int, n_k: int | None = None, d: int = 8, d_v: int = 5, lead: tuple[int, ...] = (),
    key_lead: tuple[int, ...] | None = None, dtype: str = "float64",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Independent normal q (*lead, n_q, d), k (*key_lead, n_k, d) and v (*key_lead, n_k, d_v)."""
    rng, key_lead, n_k = np.random.default_rng(seed), lead if key_lead is None else key_lead, n_k or n_q
    shapes = (*lead, n_q, d), (*key_lead, n_k, d), (*key_lead, n_k, d_v)
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return q, k, v


def clustered(seed: int, n: int, d: int = 16, clusters: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One head whose tokens scatter around cluster centers: what a treecode is for. float32."""
    rng = np.random.default_rng(seed)
    centers, (a, b) = rng.standard_normal((clusters, d)), rng.integers(clusters, size=(2, n))
    noise = rng.standard_normal((3, n, d))
    parts = 1.5 * centers[a] + 0.5 * noise[0], 1.5 * centers[b] + 0.5 * noise[1], centers[b] + noise[2]
    q, k, v = (part.astype(np.float32) for part in parts)
    return q, k, v


def whole(seed: int, *shape: int) -> np.ndarray:
    """Small whole numbers: their dot products are exact in any order, often equal and often zero. float32."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)
