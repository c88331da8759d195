"""What an evaluation of a model says, against the model run by itself and against figures worked out by hand."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaModel,
)

import opoch_xp as ox  # noqa: E402
from opoch_xp.integrations.evaluation import (  # noqa: E402
    Study,
    Window,
    choice,
    compared,
    heads,
    results,
    scores,
    study,
    tasks,
)
from opoch_xp.integrations.evaluation.answer import fastest  # noqa: E402
from opoch_xp.integrations.evaluation.subject import Call, Subject, sdpa  # noqa: E402
from opoch_xp.integrations.settings import attend_heads  # noqa: E402
from opoch_xp.integrations.transformers import Settings, evaluate, register  # noqa: E402

SMALL = ox.Treecode(rtol=0.05, sinks=2, block=16, leaf=4, fan=4, branch=4, top=8, group=8, least=2)
COARSE = ox.Treecode(rtol=0.4, sinks=2, block=16, leaf=4, fan=4, branch=4, top=8, group=8, least=2)
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
SHARED = {**SIZES, "num_key_value_heads": 2}


def made(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).eval()


def llama(**more: Any) -> Any:
    return made(LlamaForCausalLM, LlamaConfig(**SHARED, **more))


def windows() -> Any:
    """A model whose last layer has a window."""
    config = Qwen2Config(**SHARED, use_sliding_window=True, sliding_window=32, max_window_layers=2)
    return made(Qwen2ForCausalLM, config)


def ids(n: int = 200) -> Any:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 97, n))


def call(causal: bool, n: int = 70) -> Call:
    q, k, v = (torch.randn(1, h, n, 8, generator=torch.manual_seed(h)) for h in (4, 2, 2))
    return Call(0, q, k, v, causal, None)


@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": True}])
def test_scores_are_those_of_the_model_by_itself(more: dict[str, Any]) -> None:
    model, tokens = llama(**more), ids()
    found = evaluate(model, tokens, [ox.Exact(), COARSE], decode=False)
    with torch.no_grad():
        exact = model(tokens[None]).logits[0].log_softmax(-1)
        register("opoch_coarse", COARSE)
        model.set_attn_implementation("opoch_coarse")
        ours = model(tokens[None]).logits[0].log_softmax(-1)
    place, wanted = slice(100, 199), tokens[101:]
    losses = [-x[place].gather(1, wanted[:, None])[:, 0].mean() for x in (exact, ours)]
    same = (exact[place].argmax(1) == ours[place].argmax(1)).float().mean()
    kl = (exact.exp() * (exact - ours)).sum(1)[place].mean()
    rows = {row.name: row.scored for row in found.rows}
    assert found.loss == pytest.approx(float(losses[0]), abs=1e-5)
    assert rows["exact, SDPA"].kl == pytest.approx(0, abs=1e-6)
    assert rows["Exact()"].kl == pytest.approx(0, abs=1e-6)
    coarse = rows[compared.name_of(COARSE)]
    assert coarse.loss_added == pytest.approx(float(losses[1] - losses[0]), abs=1e-5)
    assert coarse.kl == pytest.approx(float(kl), rel=1e-3)
    assert coarse.kl > 1e-4
    assert coarse.agrees == pytest.approx(float(same))
    assert (found.layers, found.refused, found.tokens, found.scored) == ((0, 1, 2), {}, 200, 100)


def test_logits_that_a_model_scales_are_scaled_and_others_refused() -> None:
    config = GraniteConfig(**SHARED, logits_scaling=3.0)
    model, tokens = made(GraniteForCausalLM, config), ids()
    found = evaluate(model, tokens, [ox.Exact()], decode=False)
    with torch.no_grad():
        wanted = torch.nn.functional.cross_entropy(model(tokens[None]).logits[0, 100:199], tokens[101:])
    assert found.loss == pytest.approx(float(wanted), abs=1e-5)

    class Odd(LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *arguments: Any, **options: Any) -> Any:
            told = super().forward(*arguments, **options)
            told.logits = told.logits.sin()
            return told

    with pytest.raises(ValueError, match="the logits of Odd are not those of its last product"):
        evaluate(made(Odd, LlamaConfig(**SHARED)), tokens)


def test_the_model_is_left_as_it_was() -> None:
    model = llama().train()
    evaluate(model, ids(), [COARSE], decode=False)
    assert model.config._attn_implementation == "sdpa"
    assert model.training


def test_layers_that_cannot_be_replaced_stay_as_they_were() -> None:
    model, tokens = windows(), ids()
    found = evaluate(model, tokens, [ox.Exact(), COARSE])
    assert found.layers == (0, 1)
    assert list(found.refused) == [2]
    assert "sliding_window=32" in found.refused[2]
    assert {row.name: row.scored.kl for row in found.rows}["Exact()"] == pytest.approx(0, abs=1e-6)
    assert all(row.decoded is None for row in found.rows[1:])  # a TreecodeCache has no windows
    assert found.notes == ("Decoding was not measured: a TreecodeCache is for models of full attention alone.",)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(tokens[None]).logits[0, 100:199], tokens[101:])
    assert found.loss == pytest.approx(float(loss), abs=1e-5)


def test_some_layers_alone() -> None:
    found = evaluate(llama(), ids(), [COARSE], layers=[1], decode=False)
    assert found.layers == (1,)
    assert {head.layer for head in found.heads} == {1}
    some = evaluate(llama(), ids(), [COARSE], layers=[1])
    assert all(row.decoded is None for row in some.rows)  # a TreecodeCache would take all layers
    assert 0 < found.rows[1].scored.kl < evaluate(llama(), ids(), [COARSE], decode=False).rows[1].scored.kl


def test_an_encoder() -> None:
    config = BertConfig(**{name: value for name, value in SIZES.items() if name != "num_key_value_heads"})
    model, tokens = made(BertModel, config), ids(300).reshape(2, 150)
    found = evaluate(model, tokens, [Window(64), SMALL])
    with torch.no_grad():
        register("opoch_small", SMALL)
        exact = model(tokens).last_hidden_state.mean(1)
        model.set_attn_implementation("opoch_small")
        ours = model(tokens).last_hidden_state.mean(1)
    apart = 1 - torch.nn.functional.cosine_similarity(exact, ours).mean()
    rows = {row.name: row.scored for row in found.rows}
    assert rows[compared.name_of(SMALL)].apart == pytest.approx(float(apart), abs=1e-6)
    assert rows["window of 64"].apart > 1e-4
    assert rows["exact, SDPA"].apart == pytest.approx(0, abs=1e-6)
    assert found.loss is None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("size", "sinks"), [(16, 0), (16, 3), (7, 1), (200, 0)])
def test_windows(causal: bool, size: int, sinks: int) -> None:
    given = call(causal)
    out, rows = compared.attend_by(Window(size, sinks))(given)
    i, j = torch.arange(70)[:, None], torch.arange(70)
    near = (j > i - size) & (j <= i) if causal else (i - j).abs() <= size // 2
    mask = (near | (j < sinks)) & (j <= i) if causal else near | (j < sinks)
    wide = [x.repeat_interleave(2, 1) for x in (given.key, given.value)]
    right = torch.nn.functional.scaled_dot_product_attention(given.query, *wide, attn_mask=mask)
    torch.testing.assert_close(out, right)
    assert rows.tolist() == pytest.approx([float(mask.sum()) / 70] * 4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("method", [ox.Exact(), SMALL, COARSE, ox.LSH(bits=2, tables=2)])
def test_rows_of_each_head_are_those_of_the_call(causal: bool, method: Any) -> None:
    given = call(causal)
    out, rows = compared.attend_by(method)(given)
    told = ox.attend(given.query, given.key, given.value, causal=causal, method=method, check=False)
    torch.testing.assert_close(out, told.out)
    assert float(rows.mean()) == pytest.approx(sum(told.report.rows.values()), rel=1e-5)
    if isinstance(method, ox.Treecode):
        one = ox.attend(given.query[:, 1:2], given.key[:, :1], given.value[:, :1], causal=causal, method=method)
        assert float(rows[1]) == pytest.approx(sum(one.report.rows.values()), rel=0.2)
        assert len(set(rows.tolist())) > 1


def test_times_and_errors_are_those_of_the_layers() -> None:
    watch = heads.Watch([COARSE, ox.Exact()], {})
    given = call(True)
    torch.testing.assert_close(watch(given), sdpa(given))
    coarse, exact = watch.methods
    out, right = ox.attention(given.query, given.key, given.value, causal=True, method=COARSE), sdpa(given)
    apart, whole = ((x[0, :, 35:]) for x in (out - right, right))
    wanted = apart.norm(dim=(1, 2)) / whole.norm(dim=(1, 2))
    torch.testing.assert_close(coarse.error[0], wanted)
    torch.testing.assert_close(coarse.share[0], apart.pow(2).sum((1, 2)) / whole.pow(2).sum())
    told = coarse.attended(watch.exact)
    assert told.worst == pytest.approx(float(wanted.max()))
    assert told.worst_head == (0, int(wanted.argmax()))
    assert told.speedup == pytest.approx(watch.exact.seconds[0] / coarse.seconds[0])
    assert exact.attended(watch.exact).error < 1e-6
    assert [set(head.error) for head in watch.found()[0]] == [{coarse.name, "Exact()"}] * 4


def test_kinds_of_heads() -> None:
    n, rng = 3000, torch.manual_seed(0)
    place = torch.arange(n)
    q, k = torch.zeros(1, 4, n, 4), torch.zeros(1, 4, n, 4)
    q[0, 0, :, 0], k[0, 0, 0, 0] = 1, 40.0  # the first key
    q[0, 1, :, 0] = 1
    k[0, 1, :, 0] = place / 20  # later keys weigh more
    q[0, 2, :, 0], k[0, 2, 300:305, 0] = 1, 40.0  # five keys far away
    q[0, 3] = torch.randn(n, 4, generator=rng) / 100
    found = heads.looked_at(Call(5, q, k, torch.zeros(1, 4, n, 4), True, 1.0))
    assert [head.kind for head in found] == ["sink", "local", "sharp", "flat"]
    assert found[0].effective_keys == pytest.approx(1, abs=1e-3)
    assert found[2].effective_keys == pytest.approx(5, rel=1e-3)
    assert found[3].effective_keys > 1000
    assert all(sum(head.mass.values()) == pytest.approx(1, abs=1e-4) for head in found)
    assert (found[1].layer, found[1].head) == (5, 1)
    assert found[3].sigma is not None
    assert found[3].sigma < 1e-3


def test_tokens_that_need_long_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "SHORT", 32)
    model, tokens = llama(), ids(256)
    subject = Subject(model)
    with subject.attending():
        exact = scores.reference(subject, tokens[None], subject.pass_over(tokens[None], sdpa), lambda *_: None)
    with torch.no_grad():
        whole = model(tokens[None]).logits[0].log_softmax(-1)
        short = []
        for t in range(129, 256):
            low = 129 + (t - 129) // 32 * 32 - 32
            short.append(float(model(tokens[None, low:t]).logits[0, -1].log_softmax(-1)[tokens[t]]))
    gained = np.array([float(whole[t - 1, tokens[t]]) for t in range(129, 256)]) - np.array(short)
    count = int(scores.LONG_SHARE * 127)
    assert sorted(exact.long.tolist()) == sorted(np.argsort(-gained)[:count].tolist())
    assert scores.reference(subject, tokens[None, :100], exact.states, lambda *_: None).long is None


@pytest.mark.parametrize("power", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("tol", [1e-4, 1e-3, 1e-2])
def test_the_rtol_for_a_tolerance(power: float, tol: float) -> None:
    def distance(rtol: float) -> float:
        return 0.02 * rtol**power

    found = {rtol: distance(rtol) for rtol in (0.05, 0.1, 0.2)}
    for _ in range(4):
        rtol = choice.next_rtol(found, tol)
        if rtol is None:
            break
        assert rtol not in found
        found[rtol] = distance(rtol)
    best = (tol / 0.02) ** (1 / power)
    within = [rtol for rtol, what in found.items() if what <= tol]
    if best < choice.LOWEST:
        assert not within
    else:
        assert max(within) >= min(0.6 * best, choice.HIGHEST)


def test_the_fastest_and_of_those_alike_the_most_accurate() -> None:
    def row(rtol: float, kl: float) -> Any:
        return results.Row(str(rtol), ox.Treecode(rtol=rtol), results.Scored(0.0, kl, 1.0))

    rows = {row.name: row for row in (row(0.05, 0.001), row(0.1, 0.002), row(0.2, 0.004))}
    taken = [
        {"0.05": 4.0, "0.1": 3.1, "0.2": 3.0}, {"0.05": 3.0, "0.1": 3.1, "0.2": 3.0}, {"0.05": 4.0, "0.2": 3.0}, {},
    ]  # fmt: skip
    assert [getattr(fastest(seconds, rows), "name", None) for seconds in taken] == ["0.1", "0.05", "0.2", None]
    assert [rows["0.1"].within(tol) for tol in (0.001, 0.002)] == [False, True]
    assert not results.Row("window").within(1.0)


def measured(method: Any, rows: Any, share: Any) -> Any:
    """What was measured of two layers of two key heads, each of two query heads."""
    one = heads.Measured(method)
    for layer in range(2):
        one.rows[layer], one.share[layer] = (torch.tensor(x[layer]).repeat_interleave(2) for x in (rows, share))
    return one


def test_an_rtol_for_each_key_head_reads_less_for_as_much_wrong() -> None:
    def wrong(rtol: float) -> list[list[float]]:
        return [[1e-1 * rtol, 1e-6 * rtol], [1e-6 * rtol, 1e-6 * rtol]]

    def rows(rtol: float) -> list[list[float]]:
        return [[100 / rtol**0.5] * 2] * 2

    trees = [measured(ox.Treecode(rtol=x), rows(x), wrong(x)) for x in (0.05, 0.1, 0.2)]
    found = choice.by_key_head(trees, {0: 2, 1: 2}, ox.Treecode(rtol=0.1))
    assert found is not None
    assert found.layers[0][0].rtol == pytest.approx(0.1, rel=0.15)  # what it does wrong is all the budget
    assert [one.rtol for one in (found.layers[0][1], *found.layers[1])] == [
        pytest.approx(0.5)
    ] * 3  # what the others do is nothing
    assert choice.by_key_head(trees[:1], {0: 2, 1: 2}, ox.Treecode(rtol=0.1)) is None
    alike = [measured(ox.Treecode(rtol=x), rows(x), [[x, x], [x, x]]) for x in (0.05, 0.1, 0.2)]
    same = choice.by_key_head(alike, {0: 2, 1: 2}, ox.Treecode(rtol=0.1))
    assert same is None


def test_settings_are_kept_in_a_file(tmp_path: Path) -> None:
    several = Settings({0: (SMALL, COARSE), 2: (ox.Exact(),), 11: (ox.LSH(bits=3),)})
    path = tmp_path / "settings.json"
    several.save(path)
    assert Settings.load(path) == several
    for text, why in (
        ("{", "Expecting"), ('{"format": "another"}', "'another'"), ("[]", "list"),
        ('{"format": "opoch_xp settings 1", "layers": {"0": [{"method": "Magic"}]}}', "'Magic'"),
        ('{"format": "opoch_xp settings 1", "layers": {}}', "layers"),
        ('{"format": "opoch_xp settings 1", "layers": {"0": [{"method": "Treecode", "rtol": 7}]}}', "rtol"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=why):
            register("opoch_settings", settings=path)
    with pytest.raises(TypeError, match="method or settings"):
        register("opoch_settings", ox.Exact(), settings=several)
    with pytest.raises(OSError, match="nowhere"):
        register("opoch_settings", settings=tmp_path / "nowhere")


def test_settings_attend_key_head_by_key_head() -> None:
    given = call(True)
    out = attend_heads(given.query, given.key, given.value, (SMALL, COARSE), "layer 3", causal=True)
    for number, method in enumerate((SMALL, COARSE)):
        some = slice(2 * number, 2 * number + 2), slice(number, number + 1)
        one = ox.attention(given.query[:, some[0]], given.key[:, some[1]], given.value[:, some[1]], causal=True,
                           method=method)  # fmt: skip
        torch.testing.assert_close(out[:, some[0]], one)
    with pytest.raises(ValueError, match="layer 3 has 2 key heads, and settings for 3"):
        attend_heads(given.query, given.key, given.value, (SMALL, COARSE, SMALL), "layer 3")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_on_settings_is_what_was_evaluated(attention: str) -> None:
    """Layers that are left out, one of them with a window, attend as before; gradients and padding too."""
    settings, tokens = Settings({0: (SMALL, COARSE), 1: (ox.Exact(),)}), ids()
    model = windows()
    model.set_attn_implementation(attention)
    found = evaluate(model, tokens, [settings], decode=False)
    assert set(found.refused) == {2}
    with torch.no_grad():
        exact = model(tokens[None]).logits[0].log_softmax(-1)
        register("opoch_settings", settings=settings)
        model.set_attn_implementation("opoch_settings")
        ours = model(tokens[None]).logits[0].log_softmax(-1)
    kl = (exact.exp() * (exact - ours)).sum(1)[100:199].mean()
    assert found.rows[1].scored.kl == pytest.approx(float(kl), rel=1e-3)

    register("opoch_settings", settings=Settings({0: (ox.Exact(),)}))
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :20] = 0
    given = torch.stack([tokens[:60], tokens[60:120]])
    with torch.no_grad():
        ours = model(given, attention_mask=mask).logits[mask.bool()]
        model.set_attn_implementation(attention)
        right = model(given, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("opoch_settings")
    steps = model.generate(tokens[None, :50], max_new_tokens=5, do_sample=False, pad_token_id=0)
    model.set_attn_implementation(attention)
    assert steps.tolist() == model.generate(
        tokens[None, :50], max_new_tokens=5, do_sample=False, pad_token_id=0
    ).tolist()  # fmt: skip


def test_decoding_is_measured_on_the_same_tokens() -> None:
    found = evaluate(llama(), ids(), [ox.Treecode(rtol=0.2), COARSE], tol=0.5)
    rows = {row.name: row.decoded for row in found.rows}
    assert rows["exact, SDPA"].kl == pytest.approx(0, abs=1e-6)
    assert rows["exact, SDPA"].speedup == 1
    assert rows["Treecode(rtol=0.2)"].kl == pytest.approx(0, abs=1e-6)  # 200 tokens are one block
    assert 1e-5 < rows[compared.name_of(COARSE)].kl < 0.1


class Words:
    """A tokenizer of two characters at a time, whose texts begin with a token of their own."""

    bos_token_id = 1

    def __call__(self, text: str, **options: Any) -> Any:
        places = [(i, min(i + 2, len(text))) for i in range(0, len(text), 2)]
        ids = [100 + sum(map(ord, text[a:b])) for a, b in places]
        return type("Told", (), {"input_ids": ids, "offset_mapping": places})()


def test_answers_stand_where_a_task_says_and_in_its_text() -> None:
    made, left = tasks.tasks(Words(), "All is well. " * 2000, 6000, 1)
    assert left == []
    assert [task.name for task in made] == ["needles in text", "needle among its like", "variables", "frequent words"]
    for task in made:
        assert task.ids.shape[1] <= 6000
        assert task.ids.shape[1] > 4000
        ids = task.ids[0].tolist()
        assert task.answers[-1].stop == len(ids)
        assert ids[0] == 1
    again, other = (tasks.tasks(Words(), "All is well. " * 2000, 6000, seed)[0] for seed in (1, 2))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(made, again, strict=True))
    assert not any(torch.equal(a.ids, b.ids) for a, b in zip(made, other, strict=True))
    none, left = tasks.tasks(Words(), "All is well. " * 2000, 100, 1)
    assert none == []
    assert left[0] == "The task of needles in text needs more than 100 tokens: it was left out."


def test_an_answer_is_placed_by_its_characters_and_stands_in_the_text() -> None:
    ids, places = tasks._placed(Words(), "It is so.", [("\nA is", " 12"), ("\nB is", " 3")])
    text = "It is so.\nA is 12\nB is 3"
    assert len(ids) == (len(text) + 1) // 2
    held = [text[2 * a : 2 * b] for a, b in places]
    assert ["12" in held[0], "3" in held[1]] == [True, True]
    assert all(b - a <= 2 for a, b in places)
    for make in (tasks._needles("All is well. " * 999), tasks._many_needles, tasks._variables, tasks._frequent_words):
        pieces, asked = make(np.random.default_rng(0), 8000)
        assert len(asked) in (3, 8)
        assert all(answer in "".join(pieces) for _, answer in asked)


def test_an_answer_is_right_where_each_of_its_tokens_is_the_likeliest() -> None:
    class Knows:
        """States are the next tokens; that of one place is wrong."""

        device = torch.device("cpu")

        def pass_over(self, ids: Any, attend: Any) -> Any:
            states = torch.nn.functional.one_hot(ids.roll(-1, 1), 97).float() * 50
            states[0, 17] = states[0, 17].roll(1)
            return states

        def log_probabilities(self, states: Any) -> Any:
            return states.log_softmax(-1)

    task = tasks.Task("", ids(40)[None], (slice(10, 14), slice(16, 20), slice(30, 32)))
    found = tasks.answer(Knows(), task, sdpa)  # type: ignore[arg-type]
    assert (found.asked, found.right) == (3, pytest.approx(2 / 3))
    assert found.loss == pytest.approx(50 / 10, rel=1e-3)


def test_a_method_that_runs_out_of_memory_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend_by(method: Any) -> Any:
        if isinstance(method, Window):
            raise MemoryError
        return real(method)

    real = compared.attend_by
    monkeypatch.setattr(heads, "attend_by", attend_by)
    found = evaluate(llama(), ids(), [Window(16), COARSE], decode=False)
    rows = {row.name: row for row in found.rows}
    assert rows["window of 16"].failed == "out of memory"
    assert rows["window of 16"].scored is None
    assert rows[compared.name_of(COARSE)].scored is not None
    assert [set(head.error) & {"window of 16"} for head in found.heads] == [set()] * 12


def test_what_fails_of_one_method_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(subject: Any, task: Any, attend: Any) -> Any:
        raise RuntimeError("no luck.\nand more")

    def decoded(subject: Any, exact: Any, method: Any, name: str) -> Any:
        if method == COARSE:
            raise MemoryError
        return 1.0, 0.0

    monkeypatch.setattr(tasks, "answer", asked)
    monkeypatch.setattr(study, "decoded", decoded)
    model = made(LlamaForCausalLM, LlamaConfig(**{**SHARED, "vocab_size": 400, "max_position_embeddings": 3000}))
    lsh = ox.LSH(bits=2, tables=2, window=4096)
    found = evaluate(
        model, ids(2000), [lsh, SMALL, COARSE], tokenizer=Words(), text="All is well. " * 999, task_tokens=2000
    )
    rows = {row.name: row for row in found.rows}
    assert rows[compared.name_of(SMALL)].decoded.speedup == 1
    assert rows[compared.name_of(COARSE)].decoded is None
    assert f"Decoding with {compared.name_of(COARSE)} was not measured: out of memory." in found.notes
    assert "exact, SDPA was not asked for needles in text: no luck." in found.notes
    assert found.answer
    assert all(row.scored is not None for row in found.rows)


def test_what_was_done_before_an_interrupt_is_kept() -> None:
    model, begun = llama(), []

    def begin(step: str, weight: float) -> None:
        begun.append(step)
        if step.startswith("the model with") and sum(one.startswith("the model with") for one in begun) == 3:
            raise KeyboardInterrupt

    half = Study(model, ids(), [Window(16), COARSE], begin=begin)
    with pytest.raises(ValueError, match="nothing was measured yet"):
        half.result()
    with pytest.raises(KeyboardInterrupt):
        half.run()
    found = half.result()
    assert found.stopped == "interrupted"
    assert [row.scored is None for row in found.rows] == [False, False, True]
    assert all(row.attended is not None for row in found.rows)
    assert "interrupted" in found.answer
    assert model.config._attn_implementation == "sdpa"
    json.dumps(found.as_dict())


def test_the_first_pass_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "reference", interrupt)
    half = Study(llama(), ids(), [COARSE])
    assert not half.begun
    with pytest.raises(KeyboardInterrupt):
        half.run()
    assert half.begun
    assert all(row.attended is not None and row.scored is None for row in half.result().rows)


def test_the_answer_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = llama(), ids(400)
    found = evaluate(model, tokens, [SMALL, COARSE], tol=0.005, decode=False)
    names = [row.name for row in found.rows]
    assert "for a tolerance of 0.005" in found.answer or "Keep scaled_dot_product_attention" in found.answer
    told = next(row for row in found.rows if row.name in found.answer)
    assert told.scored.kl <= 0.005
    assert f"{told.scored.kl:.2g}" in found.answer
    assert names[0] == "exact, SDPA"
    none = evaluate(model, tokens, [COARSE], tol=1e-9, decode=False)
    assert "No treecode with an rtol of at least 0.005 stays within KL 1e-09" in none.answer
    assert none.line == ""
    short = evaluate(model, tokens, [ox.Treecode()], tol=0.5, decode=False)
    assert "Keep scaled_dot_product_attention for 400 tokens: they are one block" in short.answer
    assert (short.line, short.settings) == ("", None)
    assert "No treecode was compared" in evaluate(model, tokens, [Window(16)], decode=False).answer
    monkeypatch.setattr(study.Measured, "attended", slow(study.Measured.attended))
    kept = evaluate(model, tokens, [SMALL, COARSE], tol=0.5, decode=False)
    assert "Keep scaled_dot_product_attention for 400 tokens" in kept.answer
    monkeypatch.setattr(study.Measured, "attended", slow(study.Measured.attended, 100.0))
    taken = evaluate(model, tokens, [SMALL, COARSE], tol=0.5, decode=False)
    assert taken.answer.startswith("Take Treecode(")
    assert taken.line.startswith("register(")
    assert taken.settings is not None
    assert set(taken.settings.layers) == {0, 1, 2}


def slow(attended: Any, factor: float = 0.001) -> Any:
    """The figures with another speed: times of so few tokens are no figures."""
    from dataclasses import replace

    return lambda self, exact: replace(
        attended(self, exact), exact_seconds=1.0, seconds=1.0 if self is exact else 1 / factor
    )


@pytest.mark.parametrize(
    ("arguments", "error", "why"),
    [
        ({"tol": 2.0}, ValueError, "tol must be a number between 0 and 1"),
        ({"ids": ids(20)}, ValueError, "at least 64 tokens, got 20"),
        ({"ids": ids(600)}, ValueError, "at most the 512 tokens"),
        ({"ids": ids().float()}, TypeError, "whole numbers"),
        ({"ids": ids().reshape(2, 100)}, ValueError, "one text"),
        ({"methods": [COARSE, COARSE]}, ValueError, "names of their own"),
        ({"methods": ["Treecode"]}, TypeError, "method must be one of"),
        ({"layers": [7]}, ValueError, r"it has no layer of the numbers \[7\]"),
        ({"model": "gemma"}, ValueError, "no attention of Gemma2ForCausalLM can be replaced"),
        ({"model": "mistral"}, ValueError, "sliding_window=16"),
    ],
)
def test_what_cannot_be_evaluated_is_said(arguments: dict[str, Any], error: Any, why: str) -> None:
    given: dict[str, Any] = {"model": "llama", "ids": ids(), "methods": [COARSE], **arguments}
    kinds = {
        "llama": llama,
        "gemma": lambda: made(Gemma2ForCausalLM, Gemma2Config(**SHARED, head_dim=16, attn_implementation="eager")),
        "mistral": lambda: made(MistralForCausalLM, MistralConfig(**SHARED, sliding_window=16)),
    }
    model = kinds[given.pop("model")]()
    with pytest.raises(error, match=why):
        evaluate(model, given.pop("ids"), given.pop("methods"), **given)
    assert model.config._attn_implementation in ("sdpa", "eager")


def saved(folder: Path, model: Any, tokenizer: bool = True) -> Path:
    """The model, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(folder)
    if tokenizer:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    return folder


def command(*arguments: Any, code: int = 0) -> Any:
    from typer.testing import CliRunner

    from opoch_xp.cli.app import app

    result = CliRunner().invoke(app, ["model", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


BYTES = {**SHARED, "vocab_size": 256, "max_position_embeddings": 3000}


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(study.Measured, "attended", slow(study.Measured.attended, 100.0))
    config = Qwen2Config(**BYTES, use_sliding_window=True, sliding_window=32, max_window_layers=2)
    folder = saved(tmp_path / "small", made(Qwen2ForCausalLM, config))
    html, save, out = (tmp_path / name for name in ("page.html", "settings.json", "figures.json"))
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April. " * 200)
    told = command(
        folder, "--text", text, "--tokens", 2600, "--task-tokens", 2400, "--tol", 0.5, "--html", html, "--save", save,
        "--json", out,
    ).stdout  # fmt: skip
    assert "Qwen2ForCausalLM, 2 layers replaced, 2,600 tokens, text.txt; 1,300 scored" in told
    assert "1 layer stays as it is, 2: opoch_xp's attention cannot honour sliding_window=32" in told
    figures = json.loads(out.read_text())
    names = [row["name"] for row in figures["rows"]]
    assert names[:4] == ["exact, SDPA", "window of 1,024", "16 first keys + window of 1,024",
                         "LSH(bits=8, tables=8, window=512)"]  # fmt: skip
    assert all(f"| {name} " in told for name in names)
    assert {"needles in text", "variables"} <= set(figures["rows"][0]["tasks"])
    assert "The exact model itself fails at" in told
    page = html.read_text()
    assert page.count("<svg") == 4
    assert not re.search(r"(src|href)=.http", page)
    assert figures["answer"] in told
    assert figures["line"]
    assert f'register(settings="{save}")' in told  # a layer stays as it is
    assert Settings.load(save).layers.keys() == {0, 1}


def test_the_command_on_an_encoder(tmp_path: Path) -> None:
    """As many full rows as it has positions, with the tokens at their ends; positions may begin after a padding's."""
    config = RobertaConfig(**{**SIZES, "vocab_size": 300, "max_position_embeddings": 130, "type_vocab_size": 1})
    folder = saved(tmp_path / "encoder", made(RobertaModel, config))
    out = tmp_path / "figures.json"
    told = command(folder, "--tokens", 600, "--json", out).stdout
    assert "RobertaModel, 3 layers replaced, 512 tokens" in told  # 4 rows of 128
    assert "| 1 - cosine |" in told
    assert "they are one block of a treecode" in told
    figures = json.loads(out.read_text())
    assert not figures["language"]
    assert max(row["scored"]["apart"] for row in figures["rows"] if "LSH" not in row["name"]) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("nowhere",), "PATH must be a folder of a model of transformers, or a .gguf file; nowhere is not there"),
        (("{tmp}/text.txt",), "text.txt is no .gguf file"),
        (("{tmp}",), "holds no config.json"),
        (("{model}", "--text", "{tmp}/short.txt", "--tokens", 100), "the text has 5 tokens, fewer than --tokens 100"),
        (("{model}", "--text", "{tmp}/short.txt"), "at least 64 tokens, got 5"),
        (("{model}", "--text", "{tmp}/text.txt", "--tokens", 4000), "at most the 3,000 tokens"),
        (("{model}", "--text", "{tmp}/none.txt"), "none.txt"),
        (("{bare}",), "holds no tokenizer that transformers can read"),
        (("{model}", "--layers", "two"), "--layers must be numbers of layers such as 0-5,12; got 'two'"),
        (("{model}", "--layers", "7", "--tokens", 100, "--no-tasks"), "it has no layer of the numbers [7]"),
        (("{model}", "--methods", "magic"), "--methods must be of window, sinks, lsh, treecode; got 'magic'"),
        (("{model}", "--tol", 0), "--tol must be a number between 0 and 1"),
        (("{model}", "--rtol", 3), "--rtol must be a number between 0 and 1"),
        (("{model}", "--dtype", "int8"), "--dtype must be one of float32, bfloat16, float16; got 'int8'"),
        (("{model}", "--device", "magic", "--tokens", 100), "--device magic cannot take the model"),
        (("{model}", "--html", "{tmp}/no/page.html"), "--html"),
        (("{gemma}", "--tokens", 100, "--no-tasks"), "no attention of Gemma2ForCausalLM can be replaced"),
    ],
)
def test_what_the_command_cannot_do_is_said_in_a_line(
    arguments: tuple[Any, ...], why: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tmp = tmp_path_factory.mktemp("model")
    (tmp / "text.txt").write_text("It was a bright cold day. " * 300)
    (tmp / "short.txt").write_text("Short")
    places = {"tmp": tmp}
    for name in ("model", "bare", "gemma"):
        if any(f"{{{name}}}" in str(one) for one in arguments):
            kind, config = (Gemma2ForCausalLM, Gemma2Config) if name == "gemma" else (LlamaForCausalLM, LlamaConfig)
            places[name] = saved(tmp / name, made(kind, config(**BYTES)), tokenizer=name != "bare")
    result = command(*(str(one).format(**places) for one in arguments), code=2)
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("opoch-xp: ")
    assert why in line


def test_an_interrupted_command_shows_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Study) -> None:
        raise KeyboardInterrupt

    folder = saved(tmp_path / "small", made(LlamaForCausalLM, LlamaConfig(**BYTES)))
    monkeypatch.setattr(Study, "_decode", interrupt)
    out = tmp_path / "figures.json"
    told = command(folder, "--tokens", 200, "--methods", "treecode", "--no-tasks", "--json", out, code=130).stdout
    assert "| Treecode() " in told
    assert json.loads(out.read_text())["stopped"] == "interrupted"
