"""A small byte-level language model of Python source in NumPy: real queries, keys and values without a download.

4 layers of 4 heads of 64, rotary positions, trained to 8,192 tokens of context on the sources of Python's standard
library. The text it reads here is from the files kept out of training, taken from the running interpreter's own
library: another Python version holds other text, so print `text_hash` and the version beside every figure.

    >>> from opoch_xp.data import byte_model
    >>> q, k, v = byte_model.heads(n=64)
    >>> q.shape
    (16, 64, 64)
"""

import hashlib
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

LAYERS = 4
HEADS = 4  # in each layer
HEAD_DIM = 64
WIDTH = HEADS * HEAD_DIM
ROPE_BASE = 50_000.0
EMBEDDING_GAIN = 4.0  # embeddings were trained at a quarter of their size
CONTEXT = 8192  # tokens of context in training
HELD_OUT = 18  # every 18th file, sorted by path, was kept out of training
OFFSET = 40_000  # where the text of this project's figures starts

Weights = dict[str, np.ndarray]
AttentionFunction = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def load(path: Path | None = None) -> Weights:
    """The weights by name, float32, from int8 rows with one float32 scale each (the packaged file by default)."""
    with np.load(path or Path(__file__).with_name("byte_model.npz"), allow_pickle=False) as file:
        rows = [name.removesuffix(".q") for name in file.files if name.endswith(".q")]
        weights = {name: file[f"{name}.q"].astype(np.float32) * file[f"{name}.scale"][:, None] for name in rows}
        return weights | {name: file[name] for name in file.files if not name.endswith((".q", ".scale"))}


@cache
def _held_out_text(root: Path) -> bytes:
    """The held-out files one after another, each after a line with its name."""
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    kept = [name for name in sorted(paths) if not _left_out(f"/{name}")]
    return b"".join(
        b"\n# FILE " + paths[name].name.encode() + b"\n" + paths[name].read_bytes() for name in kept[::HELD_OUT]
    )


def _left_out(name: str) -> bool:
    """Tests, installed packages and the editor are not the library."""
    return any(part in name for part in ("/test/", "site-packages", "dist-packages", "/idle"))


def text(n: int, offset: int = 0) -> np.ndarray:
    """`n` bytes (uint8) of held-out standard-library source of the running interpreter, from byte `offset`.

    Raises FileNotFoundError where the interpreter comes without sources (zipped or stripped), ValueError where they are
    shorter than offset + n.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    data = _held_out_text(root)
    if not data:
        raise FileNotFoundError(
            f"no Python sources under {root}: this interpreter's standard library is zipped or stripped, and the byte "
            "model reads its text from there"
        )
    if n < 1 or offset < 0 or offset + n > len(data):
        raise ValueError(
            f"the held-out text has {len(data):,} bytes: n must be at least 1 and offset + n at most that, "
            f"got n={n:,} and offset={offset:,}"
        )
    return np.frombuffer(data, np.uint8)[offset : offset + n]


def text_hash(tokens: np.ndarray) -> str:
    """The first 12 hexadecimal digits of the text's SHA-256: names the text that a figure was measured on."""
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:12]


def exact_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, rows: int = 256) -> np.ndarray:
    """Exact causal attention in plain NumPy, `rows` queries at a time: q, k, v (heads, n, d)."""
    out = np.empty_like(v)
    scale = np.float32(q.shape[-1] ** -0.5)
    for start in range(0, q.shape[1], rows):
        stop = min(start + rows, q.shape[1])
        logits = (q[:, start:stop] * scale) @ k[:, :stop].transpose(0, 2, 1)  # (heads, rows, stop)
        logits[:, :, start:][:, np.triu(np.ones((stop - start, stop - start), bool), 1)] = -np.inf
        np.exp(logits - logits.max(-1, keepdims=True), out=logits)
        out[:, start:stop] = logits @ v[:, :stop] / logits.sum(-1, keepdims=True)
    return out


def forward(
    weights: Weights, tokens: np.ndarray, attention: AttentionFunction = exact_attention, start: int = 0
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Next-byte logits (n, 256) and, layer by layer, the (q, k, v) that attention was given, each (4, n, 64) float32.

    weights: from `load`; tokens (n,) uint8. `attention(q, k, v)` returns the causal attention output (4, n, 64): pass
    an approximation to see what it does to the model. start: position of the first token; `attention`, called once a
    layer, is then to know keys and values of those before (`opoch_xp.KVCache.prefill` does). Cost: 4 layers of width
    256, and four times the attention.

    >>> from opoch_xp.data import byte_model
    >>> logits, heads = byte_model.forward(byte_model.load(), byte_model.text(50))
    >>> logits.shape, len(heads), heads[0][0].shape
    ((50, 256), 4, (4, 50, 64))
    """
    n = len(tokens)
    x = weights["e.weight"][tokens] * np.float32(EMBEDDING_GAIN)  # (n, width)
    heads = []
    for layer in range(LAYERS):
        w = {name: weights[f"b.{layer}.{name}.weight"] for name in ("n1", "n2", "qkv", "o", "up", "dn")}
        qkv = (_rms_norm(x, w["n1"]) @ w["qkv"].T).reshape(n, 3, HEADS, HEAD_DIM).transpose(1, 2, 0, 3)
        q, k, v = _rotate(qkv[0], start), _rotate(qkv[1], start), np.ascontiguousarray(qkv[2])  # (heads, n, head_dim)
        heads.append((q, k, v))
        x = x + attention(q, k, v).transpose(1, 0, 2).reshape(n, WIDTH) @ w["o"].T
        x = x + np.square(np.maximum(_rms_norm(x, w["n2"]) @ w["up"].T, 0)) @ w["dn"].T
    return _rms_norm(x, weights["n.weight"]) @ weights["h.weight"].T, heads


def _rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + np.finfo(np.float32).eps) * weight


def _rotate(x: np.ndarray, start: int) -> np.ndarray:
    """Rotary positions from `start` on (Su et al., RoFormer, 2021), on x (heads, n, head_dim), halves paired."""
    frequency = ROPE_BASE ** -(np.arange(0, HEAD_DIM, 2, dtype=np.float32) / HEAD_DIM)
    angle = np.arange(start, start + x.shape[1], dtype=np.float32)[:, None] * frequency  # (n, head_dim / 2)
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def bits_per_byte(logits: np.ndarray, tokens: np.ndarray, start: int = 1) -> float:
    """Mean cross-entropy in bits of the tokens at positions `start` and later, each predicted from those before."""
    z = logits[start - 1 : -1]  # the logits at a position predict the token after it
    z = z - z.max(-1, keepdims=True)
    nats = np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), tokens[start:]]
    return float(np.mean(nats) / np.log(2))


def heads(n: int = CONTEXT, offset: int = OFFSET) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v of all 16 heads of the model, layer by layer, on `n` bytes of text: each (16, n, 64) float32.

    Cost: the model's own exact forward pass, O(n**2) time and O(n) memory. Raises as `text` does.
    """
    _, layers = forward(load(), text(n, offset))
    q, k, v = (np.concatenate(arrays) for arrays in zip(*layers, strict=True))
    return q, k, v
