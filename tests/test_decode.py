"""`opoch-xp decode`: its figures are those of an independent computation, on made keys and with the byte model."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
from test_cli import refused, run, table_of

from opoch_xp import workloads
from opoch_xp.cache import KVCache
from opoch_xp.cli import decode, generate
from opoch_xp.cli.product import Product
from opoch_xp.data import byte_model
from opoch_xp.methods import Exact, Treecode


def dense(q, k, v, window=None):
    """Causal attention of the last queries, head by head, float64: q (heads, n_q, d), k and v (key heads, n, d)."""
    repeat, (n_q, n) = len(q) // len(k), (q.shape[1], k.shape[1])
    back = np.arange(n - n_q, n)[:, None] - np.arange(n)
    seen = (back >= 0) & (back < (window or n))
    logits = q.astype(np.float64) @ k.repeat(repeat, 0).transpose(0, 2, 1) / q.shape[2] ** 0.5
    weight = np.where(seen, np.exp(logits - logits.max()), 0.0)
    return weight @ v.repeat(repeat, 0) / weight.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("decode") / "found.json"
    result = run("decode", "--context", 5001, "--new", 37, "--heads", 4, "--key-heads", 2, "--json", path)
    return result.stdout, json.loads(path.read_text())


@pytest.fixture(autouse=True, scope="module")
def once(backend):
    """The command names its own backend: one run of the suite is enough."""
    if backend.option != "numpy":
        pytest.skip("the command names its own backend")


NAMES = ["Exact, BLAS", "Exact()", "Treecode(rtol=0.3, branch=4, group=8)", "Treecode()"]


def test_every_way_to_decode_is_a_row(made):
    shown, found = made
    header, *body = table_of(shown)
    assert header == decode.COLUMNS
    assert [cells[0] for cells in body] == [row["method"] for row in found["rows"]] == NAMES
    assert all(all(cells) for cells in body)
    assert "5,001 tokens of context and 37 new ones, 4 query heads on 2 key heads of 64, float32, seed 0" in shown
    assert f"speed-up: over {max(found['rows'][:2], key=lambda row: row['speedup'])['method']}, the faster" in shown


def test_figures_of_the_rows_fit_one_another(made):
    _, found = made
    product, exact, *treecodes = found["rows"]
    assert max(exact["speedup"], product["speedup"]) == 1.0
    assert exact["rows"] == product["rows"] == 5001 + (37 + 1) / 2
    for row in treecodes:
        assert row["rows"] < 5001
        assert 0 < row["error"] < row["p99"] <= row["max"]
        assert row["seconds"] <= row["p99_seconds"] <= row["max_seconds"]
        assert row["speedup"] == pytest.approx(min(exact["seconds"], product["seconds"]) / row["seconds"])
        assert row["append_seconds"] > 0
    assert product["bytes"] == exact["bytes"] == 2 * 2 * (5001 + 37) * 64 * 4
    assert found["sampled_steps"] == 37
    assert max(exact["error"], product["error"]) < 1e-4


@pytest.mark.parametrize("place", [2, 3])
def test_the_error_is_that_of_an_independent_computation(made, place):
    method = [decode.DECODING, Treecode()][place - 2]
    stream = workloads.Stream(64, 2, seed=0)
    k, v = stream.tokens(5001)
    cache = KVCache(method)
    cache.append(k, v)
    stream.queries(2)  # of the first query, before the clock
    whole, single = [], []
    for _ in range(37):
        q, (new_k, new_v) = stream.queries(2), stream.tokens(1)
        cache.append(new_k, new_v)
        k, v = np.concatenate([k, new_k], axis=1), np.concatenate([v, new_v], axis=1)
        exact = dense(q, k, v)
        wrong = cache.attend(q).out - exact
        whole.append(np.linalg.norm(wrong) / np.linalg.norm(exact))
        single.extend(np.linalg.norm(wrong, axis=2).ravel() / np.linalg.norm(exact, axis=2).ravel())
    row = made[1]["rows"][place]
    assert row["error"] == pytest.approx(np.mean(whole), rel=1e-3)
    assert row["p99"] == pytest.approx(np.percentile(single, 99), rel=1e-3)
    assert row["max"] == pytest.approx(max(single), rel=1e-3)


def test_a_single_token_of_context():
    found = json.loads(run("decode", "--context", 1, "--new", 1, "--dim", 8, "--json", "-").stdout)
    assert [row["rows"] for row in found["rows"]] == [2.0] * 4  # there is no block to split
    assert max(row["max"] for row in found["rows"]) < 1e-5


@pytest.mark.parametrize(("new", "every"), [(1, 1), (63, 1), (64, 2), (256, 8), (10_000, 8)])
def test_at_least_32_steps_are_sampled_where_there_are_as_many(new, every):
    assert decode.spacing(new) == every


def test_query_heads_of_a_key_head_make_one_group():
    groups = [decode.methods(decode.Setup(10, 1, 32, heads, 8, "numpy", 3))[1].group for heads in (32, 4, 2)]
    assert groups == [8, 8, 16]
    assert {method.seed for method in decode.methods(decode.Setup(10, 1, 1, 1, 8, "numpy", 3))[1:]} == {3}


@pytest.mark.parametrize("window", [None, 1, 100, 1000])
@pytest.mark.parametrize("pieces", [(700,), (300, 400), (690, 1, 9)])
def test_two_products_are_attention(window, pieces):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((heads, 700, 8)).astype(np.float32) for heads in (4, 2, 2))
    product, found = Product(710, window), []
    for low, high in pairwise([0, *np.cumsum(pieces)]):
        found.append(product.prefill(q[:, low:high], k[:, low:high], v[:, low:high]))
    out = np.concatenate([one.out for one in found], axis=1)
    np.testing.assert_allclose(out, dense(q, k, v, window), rtol=1e-4, atol=1e-5)
    assert len(product) == 700
    seen = np.minimum(np.arange(700) + 1, window or 700)[-pieces[-1] :]
    assert sum(found[-1].report.rows.values()) == pytest.approx(seen.mean())


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    text = byte_model.text(1500, byte_model.OFFSET)
    (folder / "text.py").write_bytes(text.tobytes())
    arguments = ("decode", "--model", "bytes", "--file", folder / "text.py", "--context", 1301, "--new", 6)
    result = run(*arguments, "--json", folder / "found.json")
    return text[-1301:], result.stdout, json.loads((folder / "found.json").read_text()), arguments


def test_bits_of_exact_attention_are_the_model_s_own(read):
    tokens, shown, found, _ = read
    logits, _ = byte_model.forward(byte_model.load(), tokens)
    exact, product, window, treecode = found["rows"]
    for row in (exact, product):
        assert row["bits"] == pytest.approx(byte_model.bits_per_byte(logits, tokens, 650), abs=1e-4)
    assert exact["bits"] != window["bits"] != treecode["bits"]
    assert max(abs(row["bits"] - exact["bits"]) for row in (window, treecode)) < 0.05
    assert treecode["rows"] < window["rows"] < exact["rows"] == product["rows"] == (651 + 1301) / 2
    assert max(exact["p99"], product["p99"]) < 1e-4 < treecode["error"] < treecode["p99"]
    header, *body = table_of(shown)
    assert header == generate.COLUMNS
    assert [cells[0] for cells in body] == [row["method"] for row in found["rows"]]
    assert "the last 1,301 of 1,500 bytes of" in shown
    assert found["text"] == byte_model.text_hash(tokens)


def test_what_is_written_is_the_likeliest_byte_after_byte(read):
    tokens, shown, found, _ = read
    written = tokens
    for _ in range(6):
        logits, _ = byte_model.forward(byte_model.load(), written)
        written = np.append(written, np.argmax(logits[-1]).astype(np.uint8))
    exact, product, _, treecode = found["rows"]
    assert exact["written"] == product["written"] == generate.printable(written[-6:].tobytes())
    agree = found["agree"]
    assert exact["written"][:agree] == treecode["written"][:agree]
    assert f"{agree:,} bytes that they wrote." in shown
    assert "trained on" not in shown


def test_drawn_bytes_are_an_input_s(read):
    *_, arguments = read
    first, again, other = (
        json.loads(run(*arguments, "--temperature", 1.5, "--seed", seed, "--json", "-").stdout) for seed in (1, 1, 2)
    )
    texts = [[row["written"] for row in one["rows"]] for one in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("make", [lambda: KVCache(generate.TREECODE), lambda: KVCache(Exact()), lambda: Product(1200)])
def test_a_text_read_byte_by_byte_is_a_text_read_at_once(make):
    tokens, weights = byte_model.text(1100, byte_model.OFFSET), byte_model.load()
    found = []
    for pieces in ([1100], [1000, *[1] * 60, 40]):
        decoder = generate.Decoder(weights, [make() for _ in range(byte_model.LAYERS)], np)
        found.append(np.concatenate([decoder.read(part) for part in np.split(tokens, np.cumsum(pieces)[:-1])]))
    np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-3)


def test_a_byte_is_drawn_by_its_share():
    logits = np.log(np.array([1.0, 2.0, 1.0]))
    assert generate.choice(logits, 0, 0.99) == 1
    assert [generate.choice(logits, 1.0, chance) for chance in (0.0, 0.24, 0.26, 0.74, 0.76, 1 - 1e-17)] == [
        0, 0, 1, 1, 2, 2,
    ]  # fmt: skip
    assert generate.choice(logits, 0.01, 0.001) == 1


def test_bytes_are_shown_without_obeying_them():
    assert generate.printable(b"a\n\tb \xc3\xa9") == "a\n\tb \xe9"
    assert generate.printable(b"\xff\x1b[2J\x00\r") == "\\xff\\x1b[2J\\x00\\r"


def test_a_text_of_fences_is_a_block_of_code(tmp_path):
    path = tmp_path / "fences.md"
    path.write_bytes(b"```\nx\n````\n")
    shown = run("decode", "--model", "bytes", "--file", path, "--new", 1).stdout
    assert re.search(r"The end of the text\n\n`````text\n```\nx\n", shown)


def test_decode_refuses_in_one_line(tmp_path):
    assert "--heads must be a multiple of --key-heads, got 3 and 2" in refused("decode", "--heads", 3, "--key-heads", 2)
    for more in ((), ("--model", "bytes")):
        assert "--backend must be one of" in refused("decode", *more, "--backend", "nampy")
        assert "no folder" in refused("decode", *more, "--json", tmp_path / "none" / "decode.json")
        assert run("decode", *more, "--context", 0, code=2).stdout == ""
        assert run("decode", *more, "--new", 0, code=2).stdout == ""
    assert "--file needs --model bytes" in refused("decode", "--file", tmp_path / "a")
    assert "--temperature needs --model bytes" in refused("decode", "--temperature", 0)
    model = ("decode", "--model", "bytes")
    assert "--dim is for made keys" in refused(*model, "--dim", 64)
    assert "from 2 to 65,536" in refused(*model, "--context", 65_537)
    assert "from 2 to 65,536" in refused(*model, "--context", 1)
    assert "no such file" in refused(*model, "--file", tmp_path / "none")
    assert "directory" in refused(*model, "--file", tmp_path)
    (tmp_path / "empty").touch()
    assert "at least 2 bytes, got 0" in refused(*model, "--file", tmp_path / "empty")
    assert "--temperature must be a finite number" in refused(*model, "--temperature", "inf")
    assert run(*model, "--temperature", -1, code=2).stdout == ""
