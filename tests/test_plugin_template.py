"""The template of docs/plugins.md, installed by pip as its users would: found, right, and used."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from inspect import signature
from pathlib import Path

import pytest

from opoch_xp.backends import KERNELS, generic

pytest.importorskip("pip")

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "opoch_xp_strict.py")
USED = """
import array_api_strict, numpy, opoch_xp_strict
import opoch_xp as ox
from opoch_xp.testing import check_backend

calls, own = [], opoch_xp_strict.exact_attention
opoch_xp_strict.exact_attention = lambda *arrays, **options: calls.append(1) or own(*arrays, **options)
q, k, v = numpy.random.default_rng(0).standard_normal((3, 2, 50, 8))
out = ox.attention(*map(array_api_strict.asarray, (q, k, v)), causal=True)
assert calls and type(out) is type(array_api_strict.asarray(q))
numpy.testing.assert_allclose(numpy.asarray(out), ox.attention(q, k, v, causal=True), atol=1e-12)

[listed] = [entry for entry in ox.backends() if entry.name == "array_api_strict"]
assert listed.source == "opoch_xp_strict (opoch-xp-strict 0.1.0)" and listed.available
assert listed.native == ("exact_attention",) and len(listed.generic) == 10
print(check_backend("array_api_strict", device=array_api_strict.Device("device1")))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """That of an interpreter which has the template installed, in a folder of its own."""
    source, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT / "docs" / "plugin", source)
    with_ours = ["--no-build-isolation"] if find_spec("hatchling") else []  # otherwise pip fetches one to build with
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", *with_ours, "--target", str(target)]
    run([sys.executable, "-m", "pip", "install", *options, str(source)], dict(os.environ))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])}


def run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_listed_right_and_used(environment: dict[str, str]) -> None:
    report = run([sys.executable, "-c", USED], environment)
    assert report.startswith("backend array_api_strict: opoch_xp_strict (opoch-xp-strict 0.1.0)\n")


def test_the_command_checks_it(environment: dict[str, str]) -> None:
    found = run([sys.executable, "-m", "opoch_xp", "backends", "--check", "array_api_strict"], environment)
    assert "exact_attention   own" in found


def test_the_suite_runs_through_it(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_exact.py"]
    assert " passed" in run([*command, "--backend", "array_api_strict"], environment)


def test_the_table_of_kernels_names_every_kernel_and_parameter() -> None:
    lines = (ROOT / "docs" / "plugins.md").read_text().splitlines()
    for kernel in KERNELS:
        [row] = [line for line in lines if line.startswith(f"| `{kernel}` |")]
        parameters = set(signature(getattr(generic, kernel)).parameters) - {"arrays"}
        assert parameters <= set(re.findall(r"\w+", row)), kernel


def test_it_is_short_enough_to_be_read() -> None:
    assert sum(len((ROOT / "docs" / "plugin" / name).read_text().splitlines()) for name in FILES) < 60
