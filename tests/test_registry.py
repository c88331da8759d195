"""The registry: entry points held in memory, so that every way a plugin can be wrong is tried."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import Install, module, plugin_module

import opoch_xp as ox
from opoch_xp.backends import KERNELS, kernels_for, library

registry = import_module("opoch_xp.backends")
generic = import_module("opoch_xp.backends.generic")
ABACUS = ModuleType("abacus")  # the namespace of an array library


def test_a_plugins_own_kernels_come_first_and_gaps_are_filled(install: Install) -> None:
    def exact_attention() -> None: ...

    install(("abacus", "abacus_plugin"), abacus_plugin=plugin_module("abacus_plugin", exact_attention=exact_attention))
    kernels = kernels_for(ABACUS)
    assert kernels.exact_attention is exact_attention
    assert kernels.native == ("exact_attention",)
    for kernel in (*KERNELS, "COST"):
        assert kernel == "exact_attention" or getattr(kernels, kernel) is getattr(generic, kernel)


def test_dispatch_is_one_cached_lookup(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(("abacus", "abacus_plugin"), abacus_plugin=plugin_module("abacus_plugin"))
    first = kernels_for(ABACUS)
    monkeypatch.setattr(registry, "_found", lambda: pytest.fail("the entry points are read once"))
    assert kernels_for(ABACUS) is first


def test_a_library_without_a_plugin_gets_the_generic_kernels(install: Install) -> None:
    install()
    kernels = kernels_for(ABACUS)
    assert all(getattr(kernels, kernel) is getattr(generic, kernel) for kernel in KERNELS)
    with pytest.raises(
        ValueError, match="no backend 'abacus' is installed; backend=None or 'generic' uses the generic"
    ):
        kernels_for(ABACUS, "abacus")


def test_generic_by_name_is_generic_whatever_is_installed(install: Install) -> None:
    install(("abacus", "abacus_plugin"), abacus_plugin=plugin_module("abacus_plugin", exact_attention=len))
    assert kernels_for(ABACUS, "generic").exact_attention is generic.exact_attention
    assert kernels_for(ABACUS, "abacus").exact_attention is len


def test_an_unknown_name_lists_what_is_known(install: Install) -> None:
    install(("abacus", "abacus_plugin"), ("quipu", "quipu_plugin"))
    with pytest.raises(ValueError, match="backend must be one of abacus, generic, quipu; got 'slide_rule'"):
        kernels_for(ABACUS, "slide_rule")
    with pytest.raises(ValueError, match="backend 'quipu' takes quipu arrays, got abacus arrays"):
        kernels_for(ABACUS, "quipu")


@pytest.mark.parametrize("name", [3, ["numpy"], True])
def test_a_name_that_is_no_name(name: Any) -> None:
    q, k, v = np.ones((3, 4, 2))
    with pytest.raises(TypeError, match="backend must be the name of a backend or None, got"):
        ox.attend(q, k, v, backend=name)


def test_two_plugins_of_one_name_are_an_error_on_use(install: Install) -> None:
    install(("abacus", "one"), ("abacus", "two"), one=plugin_module("one"), two=plugin_module("two"))
    with pytest.raises(
        RuntimeError, match="'abacus' is defined by more than one plugin: one, two; uninstall all but one"
    ):
        kernels_for(ABACUS)
    assert kernels_for(ABACUS, "generic").exact_attention is generic.exact_attention
    listed = {backend.name: backend for backend in ox.backends()}
    assert not listed["abacus"].available
    assert "more than one plugin" in listed["abacus"].reason


def test_one_plugin_found_twice_is_one_plugin(install: Install) -> None:
    install(("abacus", "one"), ("abacus", "one"), one=plugin_module("one", exact_attention=len))
    assert kernels_for(ABACUS).exact_attention is len


def test_a_broken_plugin_raises_its_own_error_on_use_alone(install: Install) -> None:
    install(("abacus", "no_such_module_anywhere"))
    assert kernels_for(ModuleType("quipu")).native  # others are not touched
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
            kernels_for(ABACUS)
    listed = {backend.name: backend for backend in ox.backends()}
    assert listed["abacus"].reason.startswith("ModuleNotFoundError: No module named 'no_such_module_anywhere'")
    assert not listed["abacus"].available
    assert listed["generic"].available


@pytest.mark.parametrize(
    ("version", "cure"),
    [
        (registry.API_VERSION + 1, "upgrade opoch-xp, or install a plugin that was written for version 2"),
        (registry.API_VERSION - 1, "upgrade plugin, or install a plugin that was written for version 2"),
        ("1", "its API_VERSION must be a whole number"),
        (1.0, "its API_VERSION must be a whole number"),
        (True, "its API_VERSION must be a whole number"),
        (None, "its API_VERSION must be a whole number"),
    ],
)
def test_a_plugin_written_for_another_version(install: Install, version: Any, cure: str) -> None:
    install(("abacus", "plugin"), plugin=plugin_module("plugin", exact_attention=len, API_VERSION=version))
    named = (
        f"backend 'abacus': the plugin plugin was written for version {version!r} of the plugin API, and this"
        f" opoch_xp has version {registry.API_VERSION}: {cure}"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(named)}$"):
        kernels_for(ABACUS)
    assert kernels_for(ABACUS, "generic").exact_attention is generic.exact_attention
    listed = {backend.name: backend for backend in ox.backends()}
    assert (listed["abacus"].available, listed["abacus"].reason) == (False, f"RuntimeError: {named}")


def test_a_plugin_that_states_no_version_was_written_for_the_first(install: Install, monkeypatch: Any) -> None:
    install(("abacus", "plugin"), plugin=module("plugin", exact_attention=len))
    with pytest.raises(RuntimeError, match="written for version 1 of the plugin API, and this opoch_xp has version 2"):
        kernels_for(ABACUS)
    monkeypatch.setattr(registry, "API_VERSION", 1)
    install(("abacus", "plugin"), plugin=module("plugin", exact_attention=len))
    assert kernels_for(ABACUS).exact_attention is len


def test_the_listing_says_what_is_own_and_what_is_filled(install: Install) -> None:
    plugin = plugin_module("plugin", exact_attention=len, unavailable=lambda: "no beads")
    install(("abacus", "plugin"), plugin=plugin)
    abacus, twin = ox.backends()
    assert (abacus.name, abacus.source, abacus.available, abacus.reason) == ("abacus", "plugin", False, "no beads")
    assert abacus.native == ("exact_attention",)
    assert {*abacus.native, *abacus.generic} == {*KERNELS}
    assert (twin.name, twin.available, twin.native, twin.generic) == ("generic", True, KERNELS, ())


def left_over(folder: Path, name: str, points: str, metadata: str | None) -> None:
    made = folder / f"{name}-1.0.dist-info"
    made.mkdir()
    (made / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{points}\n")
    if metadata is not None:
        (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {metadata}\nVersion: 1.0\n")


@pytest.mark.parametrize("unreadable", [False, True])
def test_broken_neighbours_are_listed_and_hide_nothing(tmp_path: Path, unreadable: bool) -> None:
    """What uninstalling leaves behind, a plugin that ends the process, a line that is no entry point."""
    left_over(tmp_path, "nothing_known", "unknown = unknown_plugin", None)
    left_over(tmp_path, "~eft", "left = left_plugin", "~eft")
    left_over(tmp_path, "exits", "exits = exits_plugin", "exits")
    (tmp_path / "exits_plugin.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "unknown_plugin.py").write_text(f"API_VERSION = {registry.API_VERSION}\n")
    if unreadable:
        left_over(tmp_path, "broken", "no entry point at all", "broken")
        left_over(tmp_path, "others", "", "others")
        (tmp_path / "others-1.0.dist-info" / "entry_points.txt").write_text("[others.group]\nno entry point\n")
        left_over(tmp_path, "bytes", "", "bytes")
        (tmp_path / "bytes-1.0.dist-info" / "entry_points.txt").write_bytes(b"[others.group]\nname = \xff\n")
    code = """
import json, numpy as np, opoch_xp as ox
from opoch_xp.cli.app import app
assert ox.attention(*np.ones((3, 5, 2))).shape == (5, 2)
app(["backends", "--json", "-"])
"""
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert ended.returncode == 0, ended.stderr
    found = {entry["name"]: entry for entry in json.loads(ended.stdout)}
    assert found["numpy"]["available"]
    assert found["unknown"]["available"]
    assert "No module named 'left_plugin'" in found["left"]["reason"]
    assert "ended with SystemExit(3)" in found["exits"]["reason"]
    assert ("cannot be read" in found["broken"]["reason"]) if unreadable else ("broken" not in found)
    assert "others" not in found


def test_library_names() -> None:
    for name, expected in {
        "numpy": "numpy",
        "array_api_compat.torch": "torch",
        "jax.numpy": "jax",
        "array_api_strict": "array_api_strict",
    }.items():
        assert library(ModuleType(name)) == expected


def test_our_own_plugin_comes_in_through_its_entry_point() -> None:
    listed = {backend.name: backend for backend in ox.backends()}
    assert listed["numpy"].available
    assert listed["numpy"].source.startswith("opoch_xp.backends.numpy")
    assert listed["numpy"].version == ox.__version__
    assert {"exact_attention", "build_tree", "tree_attention"} <= {*listed["numpy"].native}


def test_public_names_are_functions_whatever_was_imported() -> None:
    for name in ("attention", "audit", "backends", "explain", "tune"):
        import_module(f"opoch_xp.{name}")
        assert callable(getattr(ox, name))
    assert set(ox.__all__) <= set(dir(ox))
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        _ = ox.atention
