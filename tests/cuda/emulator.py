"""The CuPy plugin's launchers and kernels on a CPU: NumPy arrays, and CUDA sources compiled by g++ (see emulate.h)."""

import ctypes
import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from opoch_xp.backends.cupy import launch

HERE = Path(__file__).parent
SHARED = 232448  # as in emulate.h
ARCHITECTURE = 90
RACES = ("-DEMULATE_THREADS", "-fsanitize=thread", "-g")  # threads of the system, watched


def identifier(name: str) -> str:
    """A template instance as a C name."""
    return re.sub(r"\W+", "_", name)


def build(source: str, names: tuple[str, ...], flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """A library of the kernels `names` of a CUDA source, each as `void name(shape, arguments)`."""
    folder = Path(mkdtemp(prefix="opoch-xp-emulate-"))
    wrappers = "\n".join(
        f'extern "C" void {identifier(name)}(const unsigned* shape, void** arguments)'
        f" {{ emulate::launch({name}, shape, arguments); }}"
        for name in names
    )
    (folder / "kernels.cpp").write_text(f'#include "emulate.h"\n{source}\n{wrappers}\n')
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-Wall", "-Wno-unknown-pragmas", *flags]
    command += [f"-I{HERE}", f"-I{launch.HERE}", "kernels.cpp", "-o", "kernels.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"g++ failed:\n{done.stderr[:4000]}")
    return ctypes.CDLL(str(folder / "kernels.so"))


class Emulator:
    """`launch.function` for NumPy arrays. Threads of a block take turns in ascending or descending order; `threads`:
    they are threads of the system, watched by ThreadSanitizer; `last_block`: no other block of x runs."""

    def __init__(self, descending: bool = False, threads: bool = False, last_block: bool = False) -> None:
        self.descending, self.last_block = descending, last_block
        self.flags = RACES if threads else ()
        self.launched: set[str] = set()

    def function(self, file: str, name: str, where: int) -> Callable[..., None]:
        assert name in launch.instances(file, ARCHITECTURE), f"{name} is no instance of {file}"
        kernel = getattr(_library(file, self.flags), identifier(name))
        self.launched.add(name)

        def run(grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...], shared: int) -> None:
            call(kernel, grid, block, arguments, self.descending, grid[0] - 1 if self.last_block else 0)

        return run


def call(
    kernel: Any,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    arguments: tuple[Any, ...],
    down: bool,
    first: int = 0,
) -> None:
    """Runs a kernel of `build`, in x from block `first` on: arrays as pointers to their first number, NumPy scalars by
    value."""
    assert grid[0] < 2**31
    assert all(size < 2**16 for size in grid[1:])
    shape = (ctypes.c_uint * 6)(*grid, *[1] * (3 - len(grid)), block[0], down, first)
    held = []
    for one in arguments:
        if isinstance(one, np.ndarray):
            assert one.flags.c_contiguous
            held.append(np.array(one.ctypes.data, dtype=np.uint64))
        else:
            assert isinstance(one, np.generic), f"{one!r} has no type of its own"
            held.append(np.array(one))
    kernel(shape, (ctypes.c_void_p * len(held))(*(one.ctypes.data for one in held)))


@cache
def _library(file: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    return build((launch.HERE / file).read_text(), launch.instances(file, ARCHITECTURE), flags)
