"""The package: what importing it brings, that every public name is there, that every example in a docstring runs."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import pytest

import opoch_xp

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# need libraries that are not always there
OPTIONAL = (
    "opoch_xp.backends.compiled.",
    "opoch_xp.backends.cupy",
    "opoch_xp.backends.jax",
    "opoch_xp.backends.numpy.compiled",
    "opoch_xp.backends.torch",
    "opoch_xp.integrations.",
)
MODULES = [
    module.name
    for module in pkgutil.walk_packages(opoch_xp.__path__, "opoch_xp.")
    if not module.name.endswith("__main__") and not module.name.startswith(OPTIONAL)
]


def in_a_fresh_interpreter(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_importing_the_package_imports_no_array_library():
    libraries = {"numpy", "torch", "cupy", "jax", "array_api_compat", "array_api_strict", "typer", "rich"}
    loaded = in_a_fresh_interpreter("import sys, opoch_xp; print(*{name.split('.')[0] for name in sys.modules})")
    assert "opoch_xp" in loaded
    assert not libraries & set(loaded)


@pytest.mark.parametrize("first", ["opoch_xp", *sorted({f"opoch_xp.{home}" for home in opoch_xp._HOME.values()})])
def test_every_public_name_is_there_whatever_was_imported_first(first):
    code = f"import {first}, opoch_xp; print(*(type(getattr(opoch_xp, name)).__name__ for name in opoch_xp.__all__))"
    kinds = in_a_fresh_interpreter(code)
    assert len(kinds) == len(opoch_xp.__all__)
    assert "module" not in kinds  # functions and modules share names: the function is what is meant


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'atention'"):
        opoch_xp.atention  # noqa: B018
    assert set(opoch_xp.__all__) == set(dir(opoch_xp))


def test_the_package_holds_its_data():
    assert files("opoch_xp").joinpath("py.typed").is_file()
    assert files("opoch_xp.data").joinpath("byte_model.npz").is_file()


def test_the_distribution_names_the_package():
    assert version("opoch-xp") == opoch_xp.__version__
    assert entry_points(group="opoch_xp.backends")["numpy"].value == "opoch_xp.backends.numpy"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    assert isinstance(module, ModuleType)
    assert doctest.testmod(module).failed == 0


def test_the_continuous_integration_runs_what_the_readme_tells():
    *_, command = (ROOT / ".ci" / "run").read_text().splitlines()
    assert f"```console\n{command}\n```" in README


def test_the_hooks_before_a_commit_are_those_of_the_session_lint():
    hooks = set(re.findall(r'"([\w-]+==[\w.]+)"', (ROOT / ".pre-commit-config.yaml").read_text()))
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    assert len(hooks) == 4
    assert hooks <= {name for name in groups["lint"] if isinstance(name, str)}


def test_the_version_to_cite_is_that_of_the_package():
    assert f"\nversion: {opoch_xp.__version__}\n" in (ROOT / "CITATION.cff").read_text()
