"""Real heads: the byte model's 16 heads on 8,192 bytes, the error of each method and the model's bits per byte."""

import numpy as np
from common import Table, timed_attend, torch_exact

import opoch_xp as ox
from opoch_xp.data import byte_model

N = byte_model.CONTEXT
SEEDS = (0, 1, 2)
METHODS = (
    ("exact", lambda seed: ox.Exact(), 1),
    ("window of 1,024 only", lambda seed: ox.LSH(bits=62, tables=1, window=1024, seed=seed), 1),
    ("LSH", lambda seed: ox.LSH(bits=8, tables=8, window=512, seed=seed), 3),
    ("Treecode()", lambda seed: ox.Treecode(seed=seed), 3),
    ("Treecode(group=1)", lambda seed: ox.Treecode(group=1, seed=seed), 3),
    ("Treecode(rtol=0.2)", lambda seed: ox.Treecode(rtol=0.2, seed=seed), 3),
)


def main() -> None:
    weights, tokens = byte_model.load(), byte_model.text(N, byte_model.OFFSET)
    q, k, v = byte_model.heads(N, byte_model.OFFSET)
    yardstick = torch_exact(q, k, v, True)
    title = f"Byte model, 16 heads, {N:,} tokens causal, text {byte_model.text_hash(tokens)}, PyTorch exact {yardstick}"
    columns = [
        "method",
        "seeds",
        "time (s)",
        "mean error, 16 heads",
        "worst head",
        "pairs",
        "bits per byte",
        "of each seed",
    ]
    table = Table("heads", title, columns)
    exact = ox.attention(q, k, v, causal=True, method=ox.Exact())
    for name, method, seeds in METHODS:
        rows = [_measure(method(seed), (q, k, v), exact, weights, tokens) for seed in SEEDS[:seeds]]
        seconds, mean, worst, pairs, bits = (float(np.mean(column)) for column in zip(*rows, strict=True))
        table.add(name, seeds, seconds, mean, worst, pairs, f"{bits:.4f}", " ".join(f"{row[-1]:.4f}" for row in rows))
    table.save()


def _measure(method, arrays, exact, weights, tokens) -> tuple[float, float, float, float, float]:
    """Seconds, mean and worst error over all rows of a head, share of pairs, bits per byte on the second half."""
    repeats = 1 if getattr(method, "group", 2) == 1 else 3  # a query alone takes 20 times as long
    seconds, result = timed_attend(arrays, True, method, repeats)
    error = np.linalg.norm(result.out - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
    logits, _ = byte_model.forward(weights, tokens, lambda q, k, v: ox.attention(q, k, v, causal=True, method=method))
    bits = byte_model.bits_per_byte(logits, tokens, N // 2)
    return seconds, float(error.mean()), float(error.max()), result.report.pairs, bits


if __name__ == "__main__":
    main()
