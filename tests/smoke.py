"""The installed package with nothing beside it but what it depends on: run as a script, away from the repository."""

import subprocess
import sys
import tempfile
from importlib.metadata import files, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import opoch_xp as ox
from opoch_xp.data import byte_model

EXTRAS = ("cupy", "jax", "matplotlib", "numba", "rich", "threadpoolctl", "torch", "transformers", "typer")


def main() -> None:
    assert not [name for name in EXTRAS if find_spec(name)], "the environment holds more than the package needs"
    assert ox.__version__ == version("opoch_xp")
    held = {Path(str(file)).suffix for file in files("opoch_xp") or []}
    assert {".py", ".typed", ".cu", ".cuh"} <= held, f"the wheel holds {sorted(held)}"

    q, k, v = byte_model.heads(n=1024)
    tree = ox.Treecode(rtol=0.3, block=64)
    exact = ox.attention(q, k, v, causal=True, method=ox.Exact())
    for method in (tree, ox.LSH(bits=4, tables=4, window=64)):
        error = np.linalg.norm(ox.attention(q, k, v, causal=True, method=method) - exact) / np.linalg.norm(exact)
        print(f"{method!r}: error {error:.1%}")
        assert 0 < error < 0.5, "neither exact nor wrong"
    print(f"audited: {ox.audit(q, k, v, causal=True, method=tree, rows=32).error.mean():.1%}")

    index = ox.LSHIndex(64, bits=6, tables=8)
    index.add(k[0])
    assert np.array_equal(index.search(k[0, :5], k=1).ids[:, 0], np.arange(5))
    with tempfile.TemporaryDirectory() as folder:
        index.save(f"{folder}/keys.safetensors")
        assert len(ox.LSHIndex.load(f"{folder}/keys.safetensors")) == 1024

    print(*((backend.name, backend.available, backend.reason) for backend in ox.backends()), sep="\n")
    assert [backend.name for backend in ox.backends() if backend.available] == ["generic", "numpy"]
    told = subprocess.run([sys.executable, "-m", "opoch_xp", "wall"], capture_output=True, text=True)
    assert told.returncode == 1, told
    assert "pip install" in told.stderr, told
    print(told.stderr.strip())


main()
