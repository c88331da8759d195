"""explain: the parts that a row read make up its output, and are what the definition says they are."""

from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
from conftest import Backend
from hypothesis import example, given
from inputs import Call, calls, level, methods

import opoch_xp as ox
from opoch_xp import Treecode
from opoch_xp.testing import assert_close, qkv, rounding

SMALL = Treecode(rtol=0.2, sinks=3, block=32, fan=4, leaf=4, branch=4, top=4, group=8, least=2)
PARTS = ("local", "sinks", "nodes", "keys")


def explained(backend: Backend, q: Any, k: Any, v: Any, **keywords: Any) -> Any:
    if keywords.get("key_mask") is not None:
        keywords["key_mask"] = backend.array(keywords["key_mask"])
    return ox.explain(*(backend.array(a) for a in (q, k, v)), **{"backend": backend.name, **keywords})


@given(call=calls(), method=methods())
@example(
    call=Call(np.ones((1, 1)), np.ones((2, 1)), np.ones((2, 1)), np.array([False, True]), False, None),
    method=Treecode(sinks=0, block=1, fan=2, leaf=1, branch=2, top=1, group=1),
)  # a cell without keys
def test_parts_make_up_the_row(backend: Backend, call: Call, method: Treecode) -> None:
    keywords = {"causal": call.causal, "scale": call.scale, "key_mask": call.kept, "method": method}
    mask = None if call.kept is None else backend.array(call.kept)
    arrays = [backend.array(a) for a in (call.q, call.k, call.v)]
    whole = ox.attend(*arrays, **{**keywords, "key_mask": mask}, backend="generic")
    out, lse = backend.numpy(whole.out), backend.numpy(whole.lse)
    rows = np.random.default_rng(len(out)).integers(call.q.shape[-2], size=2)
    head = len(call.heads()) - 1
    index, _, k, _, kept = call.heads()[head]
    for row in rows.tolist():
        found = ox.explain(*arrays, row=row, head=head, **{**keywords, "key_mask": mask}, backend="generic")
        tolerance = rounding(call.q, call.k, call.v, call.scale)
        assert_close(found.out, out[(*index, row)], tolerance, "out")
        assert_close(found.lse, lse[(*index, row)], tolerance, "lse")
        seen = np.flatnonzero(oracle.visible(call.q.shape[-2], len(k), call.causal, kept)[row])
        read = np.concatenate([np.zeros(0, int), *(entry.keys for entry in found.entries)])
        assert np.array_equal(np.sort(read), seen), "each visible key stands in one entry"
        assert sum(map(found.share, PARTS)) == pytest.approx(1.0 if len(seen) else 0.0)
        assert found.position == (row + len(k) - call.q.shape[-2] if call.causal else None)


def test_entries_are_the_keys_and_nodes_that_they_name(backend: Backend) -> None:
    q, k, v = qkv(1, 300, lead=(2,))
    method = replace(SMALL, rtol=0.4)  # which leaves a cell closed of the finer tier, judged by the little read before
    found = explained(backend, q, k, v, row=290, head=1, method=method, causal=True)
    for entry in found.entries:
        logits = k[1, entry.keys] @ q[1, 290] / 8**0.5
        assert_close(entry.value, v[1, entry.keys].mean(0), rounding(q, k, v))
        if entry.part == "nodes":
            node = oracle.level(k[1], v[1], np.ones(300, bool), entry.keys[None])
            mass = oracle.log_mass(q[1, 290:291], node, np.array([0]), 8**-0.5)[0][0, 0]
            assert_close(entry.log_mass, mass, rounding(q, k, v))
        else:
            assert_close(entry.log_mass, logits[0], rounding(q, k, v))
        assert entry.share == pytest.approx(np.exp(entry.log_mass - found.lse))
    tally = {part: sum(entry.part == part for entry in found.entries) for part in PARTS}
    assert tally["local"] == 290 % 32 + 1
    assert tally["sinks"] == SMALL.sinks
    assert tally["keys"] % SMALL.leaf == 0  # position 290 = 2 * 128 + 1 * 32 + 2: it reads both tiers
    for part in ("nodes", "keys"):
        assert {entry.tier for entry in found.entries if entry.part == part} == {0, 1}
    shares = [entry.share for entry in found.entries]
    assert shares == sorted(shares, reverse=True)


def test_heads_by_number_or_by_index(backend: Backend) -> None:
    q, k, v = qkv(1, 80, lead=(2, 4), key_lead=(2, 2))
    q = level(q)  # alone, a query head tells another balance than with those that share its keys
    by_number = explained(backend, q, k, v, row=70, head=6, method=SMALL, causal=True)
    by_index = explained(backend, q, k, v, row=70, head=(1, 2), method=SMALL, causal=True)
    alone = explained(backend, q[1, 2], k[1, 1], v[1, 1], row=70, method=SMALL, causal=True)
    assert by_number.head == by_index.head == (1, 2)
    assert alone.head == ()
    for found in (by_index, alone):
        assert_close(found.out, by_number.out, rounding(q, k, v))


def test_everything_opened_holds_exact_weights(backend: Backend) -> None:
    q, k, v = qkv(2, 150)
    full = Treecode(rtol=0.0, block=32, fan=2, leaf=4, branch=4, top=8, group=8)
    found = explained(backend, q, k, v, row=149, method=full)
    weight = np.exp(k @ q[149] / 8**0.5)
    for entry in found.entries:
        assert len(entry.keys) == 1
        assert entry.share == pytest.approx(weight[entry.keys[0]] / weight.sum())
    assert found.share("nodes") == 0


def test_later_rows_do_not_matter_to_a_group_of_one(backend: Backend) -> None:
    q, k, v = qkv(3, 200)
    method = Treecode(rtol=0.2, sinks=3, block=32, fan=4, leaf=4, branch=4, top=4, group=1, least=2)
    whole = explained(backend, q, k, v, row=100, method=method, causal=True)
    part = explained(backend, q[:101], k[:101], v[:101], row=100, method=method, causal=True)
    assert [(e.part, e.tier, e.keys.tolist()) for e in part.entries] == [
        (e.part, e.tier, e.keys.tolist()) for e in whole.entries
    ]


def test_equals_the_backends_own_output(backend: Backend) -> None:
    q, k, v = qkv(4, 100, 300)
    out = ox.attend(*(backend.array(a) for a in (q, k, v)), method=SMALL, backend=backend.name).out
    if "tree_attention" in backend.kernels.native and "query_groups" not in backend.kernels.native:
        pytest.skip("the plugin keeps its groups to itself")
    for row in (0, 50, 99):
        found = explained(backend, q, k, v, row=row, method=SMALL)
        assert_close(found.out, backend.numpy(out)[row], rounding(q, k, v))


def test_reads_as_a_table(backend: Backend) -> None:
    q, k, v = qkv(5, 300)
    text = str(explained(backend, q, k, v, row=290, method=SMALL, causal=True))
    assert text.startswith("row 290 at position 290, head (), lse ")
    lines = text.splitlines()
    assert len(lines) < 25
    assert max(map(len, lines)) < 80
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[3 : lines.index("", 2)]]
    assert sum(shares) == pytest.approx(100, abs=0.005 * len(shares))  # each is rounded to two digits
    assert str(explained(backend, q, k[:10], v[:10], row=0, method=SMALL, causal=True)).startswith(
        "row 0 at position -290, head (), lse -inf"
    )


@pytest.mark.parametrize(
    ("keywords", "kind", "told"),
    [
        ({"row": 0, "method": ox.Exact()}, TypeError, r"explain is for a Treecode.*got method=Exact\(\)"),
        ({"row": 0, "method": ox.LSH()}, TypeError, r"explain is for a Treecode.*got method=LSH\("),
        ({"row": 5}, IndexError, "row must be a whole number from 0 to 4, got 5"),
        ({"row": -1}, IndexError, "from 0 to 4, got -1"),
        ({"row": 1.0}, IndexError, "from 0 to 4, got 1.0"),
        ({"row": 0, "head": 6}, IndexError, r"head must be a number below 6 or indices into the axes \(2, 3\), got 6"),
        ({"row": 0, "head": (1, 3)}, IndexError, r"got \(1, 3\)"),
        ({"row": 0, "head": (1,)}, IndexError, r"got \(1,\)"),
        ({"row": 2}, ValueError, "row 2 of q must be finite"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(
    backend: Backend, keywords: dict[str, Any], kind: type[Exception], told: str
) -> None:
    q, k, v = qkv(6, 5, 7, lead=(2, 3))
    q[0, 0, 2, 0] = np.nan
    with pytest.raises(kind, match=told):
        explained(backend, q, k, v, **keywords)
