"""Every instance of every kernel, compiled for GPUs that are not there: by NVRTC, and by nvcc under a budget.

`OPOCH_ARCHITECTURES="75 80 90 100"` names others than the default; `nox -s cuda_compile` runs this.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from nvrtc import compiled, library

from opoch_xp.backends.cupy import launch

ARCHITECTURES = [int(arch) for arch in os.environ.get("OPOCH_ARCHITECTURES", "90").split()]
FILES = sorted(launch.INSTANCES)
# Registers of a thread, at the most: what __launch_bounds__ leaves when four blocks of 128 threads, or two of 256,
# share the 65,536 registers of a multiprocessor; tiles of doubles have half as many blocks. A spill is a register too
# many: none is allowed.
BUDGET, DOUBLES = 128, 255

pytestmark = pytest.mark.skipif(library() is None, reason="NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12")


def test_every_source_has_instances() -> None:
    assert sorted(path.name for path in launch.HERE.glob("*.cu")) == FILES
    for file in FILES:
        kernels = set(re.findall(r"\b(\w+)\(", (launch.HERE / file).read_text()))
        for name in launch.INSTANCES[file]:
            assert name.partition("<")[0] in kernels
        source = (launch.HERE / file).read_text()
        declared = re.findall(r"__global__ void\s+(?:__launch_bounds__\(.*\)\s+)?(\w+)\(", source)
        assert set(declared) == {name.partition("<")[0] for name in launch.INSTANCES[file]}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_nvrtc(file: str, arch: int) -> None:
    """Without a warning, and with every instance in the machine code."""
    source = (launch.HERE / file).read_text()
    found = compiled(source, launch.instances(file, arch), arch, launch.OPTIONS)
    assert set(found) == set(launch.instances(file, arch))
    assert all(found.values()), found


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_nvcc_budget(file: str, arch: int, tmp_path: Path) -> None:
    """Registers within BUDGET, no spills, no static shared memory beyond what the launcher counts (none)."""
    names = launch.instances(file, arch)
    references = ", ".join(f"(void*)&{name}" for name in names)
    path = tmp_path / file
    path.write_text(f"{(launch.HERE / file).read_text()}\nvoid* instances[] = {{{references}}};\n")
    command = ["nvcc", "-std=c++17", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", f"-I{launch.HERE}"]
    done = subprocess.run(
        [*command, str(path), "-o", str(tmp_path / "out.cubin")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    entries = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*?)\n",
        done.stderr,
        re.DOTALL,
    )
    assert len(entries) == len(names), done.stderr
    for name, stores, loads, registers, rest in entries:
        print(f"sm_{arch} {name}: {registers} registers, {stores} + {loads} bytes spilled")
        assert (int(stores), int(loads)) == (0, 0), f"{name} spills"
        assert int(registers) <= (DOUBLES if re.match(r"_Z\d+[a-z_]+Id", name) else BUDGET), (
            f"{name} uses {registers} registers"
        )
        assert "smem" not in rest, f"{name} has static shared memory: {rest}"
