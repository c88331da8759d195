"""Import: what `import opoch_xp` costs in a fresh interpreter, and that it brings no array library along."""

import subprocess
import sys

LIBRARIES = {"numpy", "torch", "cupy", "jax", "numba", "array_api_compat"}


class Import:
    """The package, and its first call beside it, each in an interpreter of its own."""

    rounds = 1
    repeat = 5

    def setup(self) -> None:
        code = "import sys, opoch_xp; print(*{name.split('.')[0] for name in sys.modules})"
        loaded = set(
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        )
        if LIBRARIES & loaded:
            raise AssertionError(f"import opoch_xp must import no array library, got {LIBRARIES & loaded}")

    def timeraw_package(self) -> str:
        return "import opoch_xp"

    def timeraw_attention(self) -> str:
        return "from opoch_xp import attention"
