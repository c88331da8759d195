"""`pytest --backend NAME` runs the whole suite through one backend; array tests take it from the fixture `backend`."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings

from opoch_xp.backends import kernels_for

if not Path("/proc/driver/nvidia").exists():  # no GPU: Triton's kernels run on the CPU, which it settles when imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Numba keeps machine code by the source of each file alone: a folder for each state of all of them
SOURCES = Path(str(find_spec("opoch_xp.backends.compiled").origin)).parent.glob("*.py")
DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(SOURCES))).hexdigest()[:12]
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"opoch-xp-{DIGEST}"))

LIBRARIES = {
    "numpy": "array_api_compat.numpy",
    "generic": "array_api_compat.numpy",
    "strict": "array_api_strict",
    "jax": "jax.numpy",
}


@dataclass(frozen=True)
class Backend:
    """Arrays of one library and the name to pass as `backend=`; None is the library's own choice."""

    option: str
    name: str | None
    xp: Any
    device: str | None = None

    @property
    def kernels(self) -> Any:
        return kernels_for(self.xp, self.name)

    def array(self, array: Any) -> Any:
        """A copy of a host array in the backend's library, on the device asked for."""
        named = self.device is not None and self.option == "torch"  # CuPy's arrays have no other device
        return self.xp.asarray(np.array(array), **({"device": self.device} if named else {}))

    def numpy(self, array: Any) -> np.ndarray:
        """A host copy of one of the backend's arrays."""
        if hasattr(array, "get") and hasattr(array, "device"):  # CuPy's
            array = array.get()
        if hasattr(array, "detach"):
            array = array.detach().cpu()
            array = (array.float() if str(array.dtype) == "torch.bfloat16" else array).numpy()
        return np.array(array)

    def has(self, dtype: str) -> bool:
        return hasattr(self.xp, dtype)

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
        "--backend", default="numpy", help="numpy (the plugin), generic, strict, or a library: torch, jax.numpy, ..."
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
        xp = import_module(LIBRARIES.get(option, f"array_api_compat.{option}"))
    except ImportError as missing:
        raise pytest.UsageError(f"--backend {option}: {missing}") from missing
    # the same examples every time; fewer where every operation is checked by the library, or compiled for every shape
    examples, phases = {"strict": 15, "jax": 3}.get(option, 40), (Phase.explicit, Phase.generate, Phase.shrink)
    settings.register_profile("suite", derandomize=True, deadline=None, max_examples=examples, phases=phases)
    settings.load_profile("suite")
    config.stash[BACKEND] = Backend(option, option if option in ("numpy", "generic") else None, xp, device)


def _require(device: str, library: str) -> None:
    """Ends the run where the device is not there: as a success that says why, or as a failure where one is required."""
    module = import_module(library)
    found = module.is_available() if library == "cupy" else module.cuda.is_available()
    if not found:
        reason = f"--device {device}: {library} finds no GPU on this machine"
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
