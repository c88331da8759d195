"""The Triton kernel, through Triton's interpreter where there is no GPU, and compiled for GPUs that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

import opoch_xp as ox  # noqa: E402
from opoch_xp.backends.compiled import wanted  # noqa: E402
from opoch_xp.backends.torch import fused, tree  # noqa: E402
from opoch_xp.treecode.law import coefficients, log_mass  # noqa: E402

GPU = torch.cuda.is_available()
WHERE = "cuda" if GPU else "cpu"


def inputs(
    groups: int, g: int, dim: int, width: int, leaf: int, nodes: int, cells: int, dtype: Any, masked: bool
) -> dict[str, Any]:
    """Random lists over `nodes` nodes, the first of them `cells` cells: some entries are absent, cells nobody's."""
    generator = torch.Generator().manual_seed(groups * g + dim)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    rows = torch.cat([normal(nodes, dim), normal(nodes, dim).square() * 4, normal(nodes, width)], 1)
    count = torch.randint(1, 40, (nodes,), generator=generator).float()
    law = coefficients(count)
    far = torch.randint(-1, nodes, (groups, 70), generator=generator)
    near = torch.stack([torch.randperm(cells, generator=generator)[:9] for _ in range(groups)])
    near[torch.rand(near.shape, generator=generator) < 0.2] = -1
    return {
        "q": normal(groups, g, dim).to(WHERE, dtype),
        "rows": rows.to(WHERE, dtype),
        "law": torch.stack([law.log, law.gain, law.width], 1).to(WHERE),
        "far": far.to(WHERE),
        "cells": normal(cells * leaf, dim + width).to(WHERE, dtype),
        "kept": (torch.rand(cells * leaf, generator=generator) < 0.7).to(WHERE) if masked else None,
        "near": near.to(WHERE),
        "reads": (torch.rand(groups, g, 9, generator=generator) < 0.4).to(WHERE),
        "leaf": leaf,
        "scale": 0.7,
    }


def reference(
    q: Any, rows: Any, law: Any, far: Any, cells: Any, kept: Any, near: Any, reads: Any, leaf: int, scale: float
) -> Any:
    """The same from its definition, in float64."""
    q, rows, count, cells = (x.cpu().double() for x in (q, rows, law[:, 0].exp().round(), cells))
    far, near, reads, dim = far.cpu(), near.cpu(), reads.cpu(), q.shape[2]
    node = torch.cat([far, near], 1)
    alone = torch.cat([(far >= 0)[:, None].expand(-1, q.shape[1], -1), ~reads & (near >= 0)[:, None]], 2)
    count, node = count[node.clamp_min(0)][:, None], rows[node.clamp_min(0)]  # (F, 1, M), (F, M, 2 d + e)
    sigma2 = scale**2 * (q.square() @ node[..., dim : 2 * dim].mT)
    mass = log_mass(scale * q @ node[..., :dim].mT, sigma2, count).masked_fill(~alone, -torch.inf)
    number = (near.clamp_min(0)[..., None] * leaf + torch.arange(leaf)).flatten(1)
    keys = cells[number]
    seen = (reads & (near >= 0)[:, None]).repeat_interleave(leaf, 2)
    if kept is not None:
        seen = seen & kept.cpu()[number][:, None]
    logits = torch.cat([mass, (scale * q @ keys[..., :dim].mT).masked_fill(~seen, -torch.inf)], 2)
    values = torch.cat([node[..., 2 * dim :], keys[..., dim:]], 1)
    return torch.softmax(logits, 2) @ values, logits.logsumexp(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("g", "dim", "width", "leaf", "masked"),
    [
        (1, 16, 16, 4, False),
        (5, 24, 20, 8, True),
        (16, 64, 64, 16, False),
        (70, 64, 48, 5, True),
        (40, 256, 200, 4, False),
    ],
)
def test_equals_its_definition(g: int, dim: int, width: int, leaf: int, masked: bool, dtype: Any) -> None:
    """In float32 to rounding; else within the rounding of weights and squares to the dtype, each at most one unit."""
    given = inputs(3, g, dim, width, leaf, 50, 20, dtype, masked)
    out, lse = fused.attend_lists(**given)
    right, level = reference(**given)
    assert out.dtype == lse.dtype == torch.float32
    largest = 0.7 * float(given["q"].float().norm(dim=2).max() * given["cells"].float().norm(dim=1).max())
    sigma2 = float(((0.7 * given["q"].float()).square() @ given["rows"].float()[:, dim : 2 * dim].mT).max())
    slope = float((given["law"][:, 1] * given["law"][:, 2] / 2).max())  # of a log mass by sigma2, at the most
    unit, single = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    logit_error = (2 * dim + 32) * single * (largest + 4) + (dim + 8) * single * slope * sigma2
    if dtype != torch.float32:
        logit_error += unit * slope * sigma2
    assert float((lse.cpu() - level).abs().max()) <= logit_error
    values = torch.cat([given["rows"][:, 2 * dim :], given["cells"][:, dim:]]).float()
    bound = (2 * logit_error + 2 * unit) * float(values.abs().max())
    assert float((out.cpu() - right).abs().max()) <= bound


def test_a_query_that_sees_nothing() -> None:
    given = inputs(2, 3, 16, 16, 4, 30, 12, torch.float32, True)
    given["far"].fill_(-1)
    given["kept"].fill_(False)
    given["reads"].fill_(True)
    out, lse = fused.attend_lists(**given)
    assert torch.equal(out.cpu(), torch.zeros(2, 3, 16))
    assert torch.isneginf(lse).all()


def test_what_it_takes() -> None:
    assert fused.supports(torch.bfloat16, 64, 64)
    assert not fused.supports(torch.float64, 64, 64)
    assert not fused.supports(torch.float32, 257, 64)


@pytest.mark.parametrize("most", [None, 3])
def test_tree_attention_through_the_kernel_is_that_of_the_plain_steps(
    most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wanted():  # the steps of CUDA tensors, on a CPU
        monkeypatch.setattr("opoch_xp.backends.torch.compiled._here", lambda x: False)
    method = ox.Treecode(rtol=0.2, sinks=3, block=32, leaf=4, fan=4, branch=4, top=4, group=20, least=2, most=most)
    q, k, v = (torch.randn(1, 2, 150, 16, generator=torch.Generator().manual_seed(i)).to(WHERE) for i in range(3))
    mask = torch.rand(1, 150, generator=torch.Generator().manual_seed(4)).to(WHERE) < 0.8
    q[0, 1, 120] = torch.nan
    for keywords in ({"causal": True}, {"causal": False}, {"causal": True, "key_mask": mask}):
        monkeypatch.setattr(tree, "attend_for", lambda _: tree._attend_plainly)
        plain = ox.attend(q, k, v, method=method, **keywords)
        monkeypatch.setattr(tree, "attend_for", fused.FusedGroups)
        calls = []

        def counted(*args: Any, calls: Any = calls, attend_lists: Any = fused.attend_lists, **others: Any) -> Any:
            calls.append(1)
            return attend_lists(*args, **others)

        with monkeypatch.context() as patched:
            patched.setattr(fused, "attend_lists", counted)
            ours = ox.attend(q, k, v, method=method, **keywords)
        assert calls
        assert ours.report.rows == pytest.approx(plain.report.rows)
        assert ours.report.bounded == plain.report.bounded
        for one, other in ((ours.out, plain.out), (ours.lse, plain.lse)):
            assert torch.equal(torch.isfinite(one), torch.isfinite(other))
            assert float((one - other)[torch.isfinite(one)].abs().max()) < 1e-5


SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have: CUDA programming guide, compute capabilities


@pytest.mark.skipif(GPU, reason="a GPU compiles what it runs")
def test_compiles_for_gpus(tmp_path: Path) -> None:
    """To machine code by Triton's own compiler, for every dtype and width; shared memory within bounds."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("compile_fused.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 3 * 4 + 3
    for one in found:
        assert one["bytes"] > 0, one
        assert one["shared"] <= SHARED[one["arch"]], one
