"""The byte model predicts Python source, its attention can be replaced, its heads are what attention was given."""

import numpy as np
import pytest

from opoch_xp.cache import KVCache
from opoch_xp.data import byte_model
from opoch_xp.methods import Exact


@pytest.fixture(scope="module")
def run():
    weights, tokens = byte_model.load(), byte_model.text(1500, byte_model.OFFSET)
    return weights, tokens, *byte_model.forward(weights, tokens)


def test_it_predicts_python_source(run):
    _, tokens, logits, _ = run
    assert logits.shape == (1500, 256)
    assert byte_model.bits_per_byte(logits, tokens) < 2.5  # 8 is chance


def test_bits_per_byte_is_the_mean_surprise(run):
    _, tokens, logits, _ = run
    z = logits.astype(np.float64)
    surprise = [np.log2(np.exp(z[i - 1]).sum()) - z[i - 1, tokens[i]] / np.log(2) for i in range(700, 1500)]
    assert byte_model.bits_per_byte(logits, tokens, 700) == pytest.approx(np.mean(surprise), rel=1e-5)


def test_later_text_never_changes_what_was_predicted(run):
    weights, tokens, logits, _ = run
    earlier, _ = byte_model.forward(weights, tokens[:600])
    np.testing.assert_allclose(earlier, logits[:600], rtol=1e-3, atol=1e-3)


def test_a_text_can_be_read_in_parts(run):
    weights, tokens, logits, _ = run
    caches, parts = [KVCache(Exact()) for _ in range(byte_model.LAYERS)], []
    for part in np.split(tokens[:600], [500, 501, 502]):
        layers = iter(caches)
        start = len(caches[0])
        parts.append(byte_model.forward(weights, part, lambda *heads: next(layers).prefill(*heads).out, start)[0])  # noqa: B023
    np.testing.assert_allclose(np.concatenate(parts), logits[:600], rtol=1e-3, atol=1e-3)


def test_exact_attention_equals_the_dense_softmax():
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 37, 8)).astype(np.float32)
    logits = np.where(np.tril(np.ones((37, 37), bool)), q @ k.transpose(0, 2, 1) / 8**0.5, -np.inf)
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    dense = weight @ v / weight.sum(-1, keepdims=True)
    for rows in (1, 7, 64):
        np.testing.assert_allclose(byte_model.exact_attention(q, k, v, rows), dense, rtol=1e-4, atol=1e-5)


def test_attention_can_be_replaced(run):
    weights, tokens, logits, _ = run
    calls = []

    def nothing(q, k, v):
        calls.append(q.shape)
        return np.zeros_like(v)

    without, _ = byte_model.forward(weights, tokens, nothing)
    assert calls == [(4, 1500, 64)] * 4
    assert byte_model.bits_per_byte(without, tokens) > byte_model.bits_per_byte(logits, tokens) + 0.5


def test_heads_are_what_attention_was_given(run):
    layers = run[3]
    q, k, v = byte_model.heads(1500)
    assert q.dtype == k.dtype == v.dtype == np.float32
    for layer, (layer_q, layer_k, layer_v) in enumerate(layers):
        rows = slice(4 * layer, 4 * layer + 4)
        for whole, part in ((q, layer_q), (k, layer_k), (v, layer_v)):
            np.testing.assert_array_equal(whole[rows], part)


def test_text_has_a_name():
    tokens = byte_model.text(100, 7)
    assert tokens.dtype == np.uint8
    np.testing.assert_array_equal(tokens[3:], byte_model.text(97, 10))
    assert len(byte_model.text_hash(tokens)) == 12
    assert byte_model.text_hash(tokens) != byte_model.text_hash(tokens[1:])


@pytest.mark.parametrize(("n", "offset"), [(0, 0), (10, -1), (10**9, 0), (10, 10**9)])
def test_text_that_is_not_there(n, offset):
    with pytest.raises(ValueError, match="the held-out text has"):
        byte_model.text(n, offset)


def test_an_interpreter_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(byte_model.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "python311.zip")})
    with pytest.raises(FileNotFoundError, match="zipped or stripped"):
        byte_model.text(10)
