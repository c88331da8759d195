"""Every wrapper of PTX against its meaning in NumPy, by its twin on the CPU; and on a GPU against the twin."""

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if shutil.which("g++") is None:
    pytest.skip("the twins are compiled by g++, which is not installed", allow_module_level=True)

from emulator import build, call, identifier

from opoch_xp.backends.cupy import launch

SOURCE = Path(__file__).with_name("wrappers.cu").read_text()
NAMES = ("halves<f16>", "halves<bf16>", "product<f16>", "product<bf16>", "copies<float>")
Run = Callable[..., None]  # name, grid, block, arguments, shared; arrays are written in place


@pytest.fixture(scope="module")
def twin() -> Run:
    library = build(SOURCE, NAMES)

    def run(name: str, grid: int, block: int, arguments: tuple[Any, ...], shared: int = 0) -> None:
        call(getattr(library, identifier(name)), (grid,), (block,), arguments, False)

    return run


@pytest.fixture(scope="module")
def device() -> Run:
    if find_spec("cupy") is None:
        pytest.skip("CuPy is not installed")
    import cupy

    if not cupy.is_available():
        pytest.skip("CuPy finds no CUDA device")
    module = cupy.RawModule(code=SOURCE, options=launch.OPTIONS, name_expressions=NAMES)

    def run(name: str, grid: int, block: int, arguments: tuple[Any, ...], shared: int = 0) -> None:
        there = [cupy.asarray(one) if isinstance(one, np.ndarray) else one for one in arguments]
        module.get_function(name)((grid,), (block,), tuple(there), shared_mem=shared)
        for one, other in zip(arguments, there, strict=True):
            if isinstance(one, np.ndarray):
                one[...] = cupy.asnumpy(other)

    return run


def hard_numbers() -> np.ndarray:
    """Numbers of every size, ties of rounding among them, infinities and zeros of both signs."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(2000) * 10.0 ** rng.integers(-8, 5, 2000)
    ties = 1 + np.arange(64) / 2**11 + 2.0**-12, 1 + np.arange(64) / 2**8 + 2.0**-9
    return np.concatenate([x, *ties, [0.0, -0.0, np.inf, -np.inf, 65504, 65519.99, 65520, 1e-8]]).astype(np.float32)


def halves(run: Run, kind: str) -> tuple[np.ndarray, np.ndarray]:
    a = hard_numbers()
    b, bits, wide = a[::-1].copy(), np.zeros(len(a), np.uint32), np.zeros((2, len(a)), np.float32)
    run(f"halves<{kind}>", -(-len(a) // 64), 64, (a, b, bits, wide, np.int64(len(a))))
    return bits, wide


def product(run: Run, kind: str) -> np.ndarray:
    """Of whole numbers, whose sums are exact in whatever order."""
    rng = np.random.default_rng(1)
    a, b, d = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    expected = d + a @ b
    run(f"product<{kind}>", 1, 32, (a, b, d))
    np.testing.assert_array_equal(d, expected)
    return d


def copies(run: Run) -> np.ndarray:
    x, there = np.arange(2 * 4 * 64, dtype=np.float32), np.random.default_rng(2).random(128) < 0.7
    out = np.full_like(x, np.nan)
    run("copies<float>", 1, 64, (x, there, out), 4 * x.size)
    np.testing.assert_array_equal(out, x * np.repeat(there, 4))
    return out


def test_the_twins_round_as_ieee_754_says(twin: Run) -> None:
    a = hard_numbers()
    with np.errstate(over="ignore"):
        bits, wide = halves(twin, "f16")
        expected = np.stack([a, a[::-1]]).astype(np.float16)
    np.testing.assert_array_equal(wide, expected.astype(np.float32))
    np.testing.assert_array_equal(bits & 0xFFFF, expected[0].view(np.uint16))
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits, wide = halves(twin, "bf16")
    expected = np.stack([a, a[::-1]]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(wide, expected.astype(np.float32))
    np.testing.assert_array_equal(bits >> 16, expected[1].view(np.uint16))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_the_twins_multiply(twin: Run, kind: str) -> None:
    product(twin, kind)


def test_the_twins_copy(twin: Run) -> None:
    copies(twin)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_a_device_does_what_the_twins_do(twin: Run, device: Run, kind: str) -> None:
    for ours, theirs in zip(halves(twin, kind), halves(device, kind), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(product(twin, kind), product(device, kind))
    np.testing.assert_array_equal(copies(twin), copies(device))
