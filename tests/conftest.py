"""`pytest --backend NAME` runs the whole suite through one backend; array tests take it from the fixture `backend`.

NAME is that of an array library, as in an entry point of the group `opoch_xp.backends`, or the path of its namespace:
arrays are then of that library, and kernels of the plugin installed for it. Others: readonly, NumPy arrays that may not
be written; generic, the generic twins on NumPy arrays; strict, under array-api-strict without what a compiler of static
shapes would refuse.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings

from opoch_xp.backends import GROUP, kernels_for, library
from opoch_xp.testing import Library, namespace

if not Path("/proc/driver/nvidia").exists():  # no GPU: Triton's kernels run on the CPU, which it settles when imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

# machine code of one folder for every environment that runs tests here
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / "opoch-xp-machine-code"))

registry = import_module("opoch_xp.backends")
Install = Callable[..., None]
LIBRARIES = {"readonly": "numpy", "generic": "numpy", "strict": "array_api_strict"}  # of options that are no library
TWINS = ("generic", "strict")


@dataclass(frozen=True)
class Backend:
    """Arrays of one library and the name to pass as `backend=`; None where no plugin is installed for it."""

    option: str
    name: str | None
    library: Library

    @property
    def xp(self) -> Any:
        return self.library.xp

    @property
    def kernels(self) -> Any:
        return kernels_for(self.xp, self.name)

    def array(self, array: Any) -> Any:
        """A copy of a host array in the backend's library, on the device asked for."""
        made = self.writable(array)
        if self.option == "readonly":
            made.flags.writeable = False
        return made

    def writable(self, array: Any) -> Any:
        """The same, for those who may write it: what is given up, and the test itself."""
        return self.library.array(array)

    def numpy(self, array: Any) -> np.ndarray:
        """A host copy of one of the backend's arrays."""
        return self.library.host(array)

    def has(self, dtype: str) -> bool:
        return self.library.has(dtype)

    def gradients(self, loss: Callable[..., Any], *host: np.ndarray) -> list[np.ndarray]:
        """Gradients of loss(*arrays) for the host arrays, on the host; the test is skipped where there are none."""
        arrays = [self.array(array) for array in host]
        if hasattr(self.xp, "autograd"):
            arrays = [array.requires_grad_() for array in arrays]
            found = self.xp.autograd.grad(loss(*arrays), arrays)
        elif self.option == "jax":
            found = import_module("jax").grad(loss, range(len(arrays)))(*arrays)
        else:
            pytest.skip("the library has no gradients")
        return [self.numpy(gradient) for gradient in found]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        default="numpy",
        help="a library, as plugins are named: numpy, torch; readonly; generic; strict",
    )

    parser.addoption(
        "--device",
        default=None,
        help="where the library's arrays live: cuda; OPOCH_REQUIRE_GPU=1 makes a lack an error",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "dynamic_shapes: the method is not static; strict then allows boolean indexing and dependent shapes"
    )
    config.addinivalue_line("markers", "smallest: the smallest size of a CUDA kernel, for checks that are slow")
    option = config.getoption("--backend")
    device = config.getoption("--device")
    if device is not None:
        _require(device, option)
    if option == "jax":  # float64, and codes of 64 bits
        os.environ.setdefault("JAX_ENABLE_X64", "1")
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiled once, run once
    try:
        xp = namespace(LIBRARIES.get(option, option))
    except ImportError as missing:
        raise pytest.UsageError(f"--backend {option}: {missing}") from missing
    # the same examples every time; fewer where every operation is checked by the library, or compiled for every shape
    examples, phases = {"strict": 15, "jax": 3}.get(option, 40), (Phase.explicit, Phase.generate, Phase.shrink)
    settings.register_profile("suite", derandomize=True, deadline=None, max_examples=examples, phases=phases)
    settings.load_profile("suite")
    name = "generic" if option in TWINS else library(xp)
    name = name if name in {"generic", *entry_points(group=GROUP).names} else None
    config.stash[BACKEND] = Backend(option, name, Library(xp, None if option == "cupy" else device))  # it has no other


def _require(device: str, option: str) -> None:
    """Ends the run where the device is not there: as a success that says why, or as a failure where one is required."""
    module = import_module(option)
    found = {"cupy": "is_available", "torch": "cuda.is_available"}.get(option)
    if found and not attrgetter(found)(module)():
        reason = f"--device {device}: {option} finds no GPU on this machine"
        required = os.environ.get("OPOCH_REQUIRE_GPU") == "1"
        pytest.exit(f"{reason}{' and OPOCH_REQUIRE_GPU=1' if required else ''}", returncode=1 if required else 0)


BACKEND = pytest.StashKey[Backend]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    with _flags(item):
        return (yield)


def _flags(item: pytest.Item) -> AbstractContextManager[Any]:
    """Under array-api-strict, what a compiler of static shapes would refuse is switched off."""
    if item.config.stash[BACKEND].option != "strict" or item.get_closest_marker("dynamic_shapes"):
        return nullcontext()
    return import_module("array_api_strict").ArrayAPIStrictFlags(boolean_indexing=False, data_dependent_shapes=False)


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.config.stash[BACKEND]


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


def plugin_module(name: str, **members: Any) -> ModuleType:
    """A plugin that states the version of the contract in force, if no other."""
    return module(name, **{"API_VERSION": registry.API_VERSION, **members})


def _forget() -> None:
    """What the registry has read of the plugins."""
    for cached in (registry._found, registry._kernels, registry.kernels_for):
        cached.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Replaces the installed plugins by name=value pairs and the modules given, for one test."""

    def replace(*points: tuple[str, str], **modules: ModuleType) -> None:
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        found = [EntryPoint(name, value, registry.GROUP) for name, value in points]
        monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in found if p.group == group])
        _forget()

    yield replace
    monkeypatch.undo()
    _forget()
