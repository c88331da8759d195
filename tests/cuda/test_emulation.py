"""The emulation catches what it is there for: planted mistakes, each in one of the two orders of threads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

if shutil.which("g++") is None:
    pytest.skip("the emulation is compiled by g++, which is not installed", allow_module_level=True)

from emulator import RACES, build, call

SOURCE = """
#include <ptx.cuh>
// out[t] = x[THREADS - 1 - t], through shared memory
template <class T> __global__ void reverse(const T* x, T* out) {
  extern __shared__ __align__(16) char shared[];
  T* held = (T*)shared;
  held[threadIdx.x] = x[threadIdx.x];
  BARRIER;
  out[threadIdx.x] = held[63 - threadIdx.x];
}
// out[w] = sum of the 32 numbers of warp w
template <class T> __global__ void add(const T* x, T* out) {
  T sum = x[threadIdx.x];
  for (int step = FIRST; step; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
  if (threadIdx.x % LANES == LANE) out[threadIdx.x / LANES] = sum;
}
// out[t] = x[t], through an asynchronous copy of 16 bytes a pair of threads
template <class T> __global__ void copy(const T* x, T* out) {
  extern __shared__ __align__(16) char shared[];
  T* held = (T*)shared;
  if (threadIdx.x % 2 == 0) copy_async(held + threadIdx.x, x + threadIdx.x, true);
  copy_group();
  WAIT;
  __syncthreads();
  out[threadIdx.x] = held[threadIdx.x];
}
// out (16, 8) = the identity times b (16, 8) with b[k][n] = 8 k + n, by one of two warps
template <class T> __global__ void matrix(const T*, T* out) {
  const int lane = threadIdx.x % LANES, y = lane / 4, x = lane % 4 * 2;
  const auto one = [&](int row, int column) { return packed<f16>(row == column, row == column + 1); };
  const u32 a[4] = {one(y, x), one(y + 8, x), one(y, x + 8), one(y + 8, x + 8)};
  u32 b[2];
  for (int i = 0; i < 2; i++) b[i] = packed<f16>(8 * (x + 8 * i) + y, 8 * (x + 8 * i + 1) + y);
  float d[4] = {};
  multiply_add<f16>(d, a, b);
  if (threadIdx.x < LANES)
    for (int i = 0; i < 4; i++) out[(y + i / 2 * 8) * 8 + x + (SWAP ? 1 - i % 2 : i % 2)] = d[i];
}
// one lane waits for the block, the rest of its warp for that lane
template <class T> __global__ void meet(const T* x, T* out) {
  if (threadIdx.x == 5)
    __syncthreads();
  else
    __syncwarp();
  out[threadIdx.x] = x[threadIdx.x];
}
"""
X = np.arange(64.0)


def run(kernel: str, size: int, down: bool, *more: str, **defines: str) -> np.ndarray:
    chosen = {
        "BARRIER": "__syncthreads()",
        "FIRST": "16",
        "LANE": "0",
        "WAIT": "copy_wait<0>()",
        "SWAP": "0",
        **defines,
    }
    flags = tuple(f"-D{name}={value}" for name, value in chosen.items()) + more
    out = np.full(size, np.nan)
    call(getattr(build(SOURCE, (f"{kernel}<double>",), flags), f"{kernel}_double_"), (1,), (64,), (X, out), down)
    return out


@pytest.mark.parametrize("down", [False, True])
def test_right_kernels_are_right(down: bool) -> None:
    np.testing.assert_array_equal(run("reverse", 64, down), X[::-1])
    np.testing.assert_array_equal(run("add", 2, down), X.reshape(2, 32).sum(1))


@pytest.mark.parametrize("down", [False, True])
def test_right_copies_and_matrices_are_right(down: bool) -> None:
    np.testing.assert_array_equal(run("copy", 64, down), X)
    np.testing.assert_array_equal(run("matrix", 128, down), np.arange(128.0))


@pytest.mark.parametrize("wait", ["", "copy_wait<1>()"])
def test_a_missing_wait_reads_nan(wait: str) -> None:
    for down in (False, True):
        assert np.isnan(run("copy", 64, down, WAIT=wait)).all()


def test_a_wrong_place_in_a_fragment() -> None:
    assert (run("matrix", 128, False, SWAP="1") != np.arange(128.0)).all()


def test_a_missing_barrier_reads_nan() -> None:
    for down in (False, True):
        assert np.isnan(run("reverse", 64, down, BARRIER="")).sum() == 32


def test_a_barrier_of_a_warp_is_not_one_of_a_block() -> None:
    assert any(np.isnan(run("reverse", 64, down, BARRIER="__syncwarp()")).any() for down in (False, True))


def test_a_wrong_lane() -> None:
    assert (run("add", 2, False, FIRST="8") != X.reshape(2, 32).sum(1)).all()


def test_a_barrier_that_some_never_reach_ends_the_program() -> None:
    script = "import test_emulation as t; t.run('meet', 64, False)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "deadlock" in done.stderr


@pytest.mark.parametrize("barrier", ["__syncthreads()", ""])
def test_threads_of_the_system_under_thread_sanitizer(barrier: str) -> None:
    """It reports the missing barrier, and nothing where there is one."""
    found = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    library = found.stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("g++ has no libtsan")
    script = f"import test_emulation as t; t.run('reverse', 64, False, *{RACES!r}, BARRIER={barrier!r})"
    environment = {**os.environ, "LD_PRELOAD": library, "TSAN_OPTIONS": "exitcode=66 halt_on_error=1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == (0 if barrier else 66), done.stderr
    assert ("data race" in done.stderr) == (not barrier)
