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

from opoch_xp.backends.torch import fused  # noqa: E402

GPU = torch.cuda.is_available()
WHERE = "cuda" if GPU else "cpu"


def inputs(
    groups: int, g: int, dim: int, width: int, leaf: int, nodes: int, cells: int, dtype: Any, masked: bool
) -> dict[str, Any]:
    """Random lists; some entries of the far list are absent, some nodes frozen, some hold no key."""
    generator = torch.Generator().manual_seed(groups * g + dim)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    rows = torch.cat([normal(nodes, dim), normal(nodes, dim).square() * 4, normal(nodes, width)], 1)
    counts = torch.randint(0 if masked else 1, 40, (nodes,), generator=generator)
    far = torch.randint(-1, nodes, (groups, 70), generator=generator)
    return {
        "q": normal(groups, g, dim).to(WHERE, dtype),
        "rows": rows.to(WHERE, dtype),
        "logs": counts.float().log().to(WHERE),
        "far": far.to(WHERE),
        "cells": normal(cells * leaf, dim + width).to(WHERE, dtype),
        "kept": (torch.rand(cells * leaf, generator=generator) < 0.7).to(WHERE) if masked else None,
        "near": torch.stack([torch.randperm(cells, generator=generator)[:9] for _ in range(groups)]).to(WHERE),
        "leaf": leaf,
        "scale": 0.7,
    }


def reference(q: Any, rows: Any, logs: Any, far: Any, cells: Any, kept: Any, near: Any, leaf: int, scale: float) -> Any:
    """The same from its definition, in float64."""
    q, rows, logs, cells = (x.cpu().double() for x in (q, rows, logs, cells))
    far, near, dim = far.cpu(), near.cpu(), q.shape[2]
    node = rows[far.clamp_min(0)]  # (F, M, 2 d + e)
    log = logs[far.clamp_min(0)]
    sigma2 = scale**2 * (q.square() @ node[..., dim : 2 * dim].mT)
    limit = 2 * log.clamp_min(0)[:, None]
    energy = torch.where(sigma2 <= limit, limit / 2 + sigma2 / 2, (limit * sigma2).sqrt())
    gone = (far < 0) | torch.isinf(log)
    logits = (scale * q @ node[..., :dim].mT + energy).masked_fill(gone[:, None], -torch.inf)
    number = (near[..., None] * leaf + torch.arange(leaf)).flatten(1)
    keys = cells[number]
    close = scale * q @ keys[..., :dim].mT
    if kept is not None:
        close = close.masked_fill(~kept.cpu()[number][:, None], -torch.inf)
    logits = torch.cat([logits, close], 2)
    values = torch.cat([node[..., 2 * dim :], keys[..., dim:]], 1)
    return torch.softmax(logits, 2) @ values, logits.logsumexp(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("g", "dim", "width", "leaf", "masked"),
    [
        (1, 16, 16, 4, False),
        (5, 24, 20, 8, True),
        (16, 64, 64, 8, False),
        (37, 64, 48, 5, True),
        (16, 256, 200, 4, False),
    ],
)
def test_equals_its_definition(g: int, dim: int, width: int, leaf: int, masked: bool, dtype: Any) -> None:
    """In float32 to rounding; else within the rounding of weights and squares to the dtype, each at most one unit."""
    given = inputs(3, g, dim, width, leaf, 50, 20, dtype, masked)
    out, lse = fused.attend_lists(**given)
    right, level = reference(**given)
    assert out.dtype == lse.dtype == torch.float32
    largest = 0.7 * float(given["q"].float().norm(dim=2).max() * given["cells"].float().norm(dim=1).max())
    unit = torch.finfo(dtype).eps
    logit_error = (2 * dim + 32) * torch.finfo(torch.float32).eps * (largest + 4)
    if dtype != torch.float32:
        logit_error += unit * float(
            (0.5 * (0.7 * given["q"].float()).square() @ given["rows"].float()[:, dim : 2 * dim].mT).max()
        )
    assert float((lse.cpu() - level).abs().max()) <= logit_error
    bound = (2 * logit_error + 2 * unit) * float(given["cells"].float().abs().max())
    assert float((out.cpu() - right).abs().max()) <= bound


def test_a_query_that_sees_nothing() -> None:
    given = inputs(2, 3, 16, 16, 4, 10, 12, torch.float32, True)
    given["far"].fill_(-1)
    given["kept"].fill_(False)
    out, lse = fused.attend_lists(**given)
    assert torch.equal(out.cpu(), torch.zeros(2, 3, 16))
    assert torch.isneginf(lse).all()


def test_what_it_takes() -> None:
    assert fused.supports(torch.bfloat16, 64, 64)
    assert not fused.supports(torch.float64, 64, 64)
    assert not fused.supports(torch.float32, 257, 64)


def test_tree_attention_through_the_kernel_is_that_of_the_plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    import opoch_xp as ox
    from opoch_xp.backends.compiled import wanted
    from opoch_xp.backends.torch import tree

    if wanted():  # the steps of CUDA tensors, on a CPU
        monkeypatch.setattr("opoch_xp.backends.torch.compiled._here", lambda x: False)
    method = ox.Treecode(block=32, leaf=4, fan=4, branch=4, top=4, group=16, open=4, near=3, own=0)
    q, k, v = (torch.randn(1, 2, 150, 16, generator=torch.Generator().manual_seed(i)).to(WHERE) for i in range(3))
    mask = torch.rand(1, 150, generator=torch.Generator().manual_seed(4)).to(WHERE) < 0.8
    for keywords in ({"causal": True}, {"causal": False}, {"causal": True, "key_mask": mask}):
        monkeypatch.setattr(tree, "fused_for", lambda tree, method: None)
        plain = ox.attend(q, k, v, method=method, **keywords)
        calls = []

        def counted(*args: Any, calls: Any = calls, **others: Any) -> Any:
            calls.append(1)
            return fused.attend_lists(*args, **others)

        monkeypatch.setattr(tree, "fused_for", lambda tree, method, counted=counted: counted)
        ours = ox.attend(q, k, v, method=method, **keywords)
        assert calls
        assert float((ours.out - plain.out).abs().max()) < 1e-5
        assert float((ours.lse - plain.lse).abs().max()) < 1e-5


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
