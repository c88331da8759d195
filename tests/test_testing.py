"""check_backend: right plugins pass, and each wrong one is refused by the name of its fault."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import array_api_strict as strict
import numpy as np
import pytest
from conftest import Install, plugin_module
from typer.testing import CliRunner
from wrong_kernels import WRONG, Kernel, merge_one_row_late, twin

from opoch_xp.backends import KERNELS, generic
from opoch_xp.cli.app import app
from opoch_xp.cost import Cost
from opoch_xp.methods import Exact
from opoch_xp.testing import BackendError, check_backend, namespace

pytestmark = pytest.mark.dynamic_shapes
DEVICE = strict.Device("device1")


def plugin(install: Install, library: str = "array_api_strict", **members: Any) -> None:
    install((library, "the_plugin"), the_plugin=plugin_module("the_plugin", **members))


@pytest.mark.parametrize(("wrong", "named"), WRONG, ids=[named for _, named in WRONG])
def test_a_wrong_kernel_is_refused_by_its_fault(install: Install, wrong: Kernel, named: str) -> None:
    plugin(install, **{named.partition(":")[0]: wrong})
    with pytest.raises(BackendError) as refused:
        check_backend("array_api_strict", device=DEVICE)
    assert f"\n\n{named}" in str(refused.value)
    assert {check.kernel for check in refused.value.failed} == {named.partition(":")[0]}
    assert str(refused.value).startswith("backend 'array_api_strict' (the_plugin) breaks its contract: ")


# right plugins


def test_twins_under_another_name_are_right(install: Install) -> None:
    plugin(install, **{kernel: getattr(generic, kernel) for kernel in KERNELS})
    report = check_backend("array_api_strict", device=DEVICE)
    assert (report.native, report.generic) == (KERNELS, ())
    assert (report.library, report.device, report.dtypes) == ("array_api_strict", str(DEVICE), ("float32", "float64"))
    assert len({check.kernel for check in report.checks} & set(KERNELS)) == len(KERNELS)
    assert not any(check.fault for check in report.checks)


def test_our_own_plugin_is_right() -> None:
    report = check_backend("numpy")
    assert set(report.native) == set(KERNELS)
    title, counted, _, header, *lines = str(report).splitlines()
    assert title.startswith("backend numpy: opoch_xp.backends.numpy (opoch-xp ")
    assert counted == f"arrays of numpy on cpu, float32, float64: {len(report.checks)} checks passed"
    assert header.split() == ["kernel", "whose", "checks", "cases"]
    assert {line.split()[0] for line in lines} >= set(KERNELS)
    assert max(map(len, lines)) <= 118


def test_the_plugin_of_another_library_is_right() -> None:
    pytest.importorskip("torch")
    report = check_backend("torch", device="cpu")
    assert set(report.native) | set(report.generic) == set(KERNELS)


def widening(kernel: str, short: Any, widen: Callable[[Any], Any]) -> Kernel:
    """The twin, with arrays of the dtype `short` widened."""

    @twin(kernel)
    def wide(run: Kernel, *given: Any, **options: Any) -> Any:
        return run(*(widen(x) if getattr(x, "dtype", None) == short else x for x in given), **options)

    return wide


NARROW = ("exact_attention", "build_tree", "query_groups", "tree_attention")


def test_a_plugin_may_accept_16_bits(install: Install) -> None:
    kernels = {kernel: widening(kernel, np.float16, lambda x: x.astype(np.float32)) for kernel in NARROW}
    plugin(install, "numpy", ACCEPTS=("float16", "float32", "float64"), **kernels)
    report = check_backend("numpy")
    assert report.dtypes == ("float16", "float32", "float64")
    assert {check.kernel for check in report.checks if check.dtype == "float16"} == {*NARROW, "all together"}
    kernels["exact_attention"] = generic.exact_attention
    plugin(install, "numpy", ACCEPTS=("float16", "float32"), **kernels)
    with pytest.raises(BackendError, match="exact_attention: out has dtype float16, expected float32"):
        check_backend("numpy")


def test_bfloat16_which_numpy_lacks(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("opoch_xp.testing.together.METHODS", (Exact(),))  # the generic treecode is slow in PyTorch
    kernels = {kernel: widening(kernel, torch.bfloat16, torch.Tensor.float) for kernel in NARROW}
    plugin(install, "torch", ACCEPTS=("bfloat16", "float32"), **kernels)
    assert check_backend("torch").dtypes == ("bfloat16", "float32")


# what is wrong beside the kernels


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ({"ACCEPTS": ["float32"]}, "ACCEPTS: is ['float32']"),
        ({"ACCEPTS": ("float64",)}, "ACCEPTS: is ('float64',)"),
        ({"ACCEPTS": ("float32", "int8")}, "ACCEPTS: is ('float32', 'int8')"),
        (
            {"ACCEPTS": ("float16", "float32"), "exact_attention": generic.exact_attention},
            "ACCEPTS: lacks build_tree, ",
        ),
        ({"COST": 3.0}, "COST: is 3.0, not an opoch_xp.cost.Cost"),
        ({"COST": Cost(read=0.0, split=1.0)}, "COST: is Cost(read=0.0, split=1.0)"),
        ({"synchronize": lambda *arrays: arrays}, "synchronize: returns "),
    ],
    ids=["a list", "float64", "whole numbers", "a kernel alone", "a number", "free reads", "a return"],
)
def test_what_a_plugin_states(install: Install, stated: dict[str, Any], named: str) -> None:
    plugin(install, **stated)
    with pytest.raises(BackendError) as refused:
        check_backend("array_api_strict")
    assert f"\n\n{named}" in str(refused.value)


def test_a_kernel_that_writes_to_its_arguments_and_back(install: Install) -> None:
    """Nothing shows it but an array that may not be written to."""

    @twin("exact_attention")
    def there_and_back(attend: Kernel, q: Any, k: Any, v: Any, **options: Any) -> Any:
        before = k.copy()
        k -= 0.5
        k[...] = before
        return attend(q, k, v, **options)

    plugin(install, "numpy", exact_attention=there_and_back)
    with pytest.raises(BackendError, match="raises ValueError for views that are read-only: output array is read-only"):
        check_backend("numpy")


def test_a_method_that_errs_though_its_kernels_do_not(install: Install) -> None:
    """A split that is no worse on normal keys: clusters show it."""

    @twin("build_tree")
    def by_one_axis(build: Kernel, k: Any, v: Any, axes: Any, method: Any, **options: Any) -> Any:
        if k.shape[2] == 16 and options.get("order") is None:
            rows = strict.arange(k.shape[1], dtype=strict.int64, device=k.device)
            options["order"] = strict.broadcast_to(rows, k.shape[:2])
        return build(k, v, axes, method, **options)

    plugin(install, build_tree=by_one_axis)
    with pytest.raises(
        BackendError, match="all together: reads .* rows a query, at most .* are expected\n  case: Treecode, float32"
    ):
        check_backend("array_api_strict")


def test_what_cannot_be_checked(install: Install) -> None:
    plugin(install, exact_attention=generic.exact_attention, unavailable=lambda: "no beads")
    with pytest.raises(RuntimeError, match="backend 'array_api_strict' cannot be used here: no beads"):
        check_backend("array_api_strict")
    with pytest.raises(
        ImportError, match="there is no array library 'abacus' here: neither array_api_compat.abacus nor"
    ):
        check_backend("abacus")
    with pytest.raises(ValueError, match="backend must be one of array_api_strict, generic; got 'numpy'"):
        check_backend("numpy", xp=strict)
    install()
    with pytest.raises(ValueError, match="no backend 'array_api_strict' is installed"):
        check_backend("array_api_strict")


def test_a_library_s_own_namespace_will_do(install: Install) -> None:
    plugin(install, "numpy", hash_codes=generic.hash_codes)
    assert check_backend("numpy", xp=np).native == ("hash_codes",)


def test_the_command_prints_what_was_checked_or_every_fault(install: Install, tmp_path: Path) -> None:
    plugin(install, merge_part=generic.merge_part)
    path, command = tmp_path / "checks.json", ["backends", "--check", "array_api_strict", "--json"]
    right = CliRunner().invoke(app, [*command, str(path)])
    assert right.exit_code == 0
    assert right.stdout.startswith("backend array_api_strict: the_plugin\n")
    assert {check["fault"] for check in json.loads(path.read_text())} == {""}
    plugin(install, merge_part=merge_one_row_late)
    wrong = CliRunner().invoke(app, [*command, "-"])
    assert wrong.exit_code == 1
    assert "merge_part: rows are merged one place too late: an offset is off by one\n  case: first rows" in wrong.stderr
    assert {check["kernel"] for check in json.loads(wrong.stdout) if check["fault"]} == {"merge_part"}
    missing = CliRunner().invoke(app, ["backends", "--check", "numpy"])
    assert missing.exit_code == 2
    assert missing.stderr.startswith("opoch-xp: no backend 'numpy' is installed;")


def test_a_library_is_found_by_its_name() -> None:
    assert namespace("array_api_strict") is strict
    assert namespace("numpy").__name__ == "array_api_compat.numpy"
    with pytest.raises(ImportError, match="there is no array library 'numpy.linalg' here"):
        namespace("numpy.linalg")
