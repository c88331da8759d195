"""The treecode and exact attention in machine code for CPUs, compiled by Numba: what the NumPy and PyTorch plugins run
where Numba is installed.

    vector   exponentials, products of rows named by an index
    split    median splits by principal axes
    attend   a group of queries against the trees of a run of chunks
    tree     summaries, and the launch of attend
    exact    streaming exact attention, merging of parts
    plain    arrays as kernels take them

Arrays are NumPy's, float32 or float64. The first call of a process loads machine code from disk, the first on a machine
compiles it. It is kept beside the sources, or where NUMBA_CACHE_DIR says; a change of one source does not renew what
another has compiled of it, so delete the folder after changing `vector`.
"""

import os
from importlib.util import find_spec

VARIABLE = "OPOCH_COMPILED"


def wanted() -> bool:
    """Whether plugins take these kernels: Numba is installed, and the environment variable OPOCH_COMPILED is not 0.

    Asked once, when a plugin is loaded. Raises ValueError where the variable is neither 0 nor 1, or 1 without Numba.
    """
    chosen, installed = os.environ.get(VARIABLE), find_spec("numba") is not None
    if chosen not in (None, "0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {chosen!r}")
    if chosen == "1" and not installed:
        raise ValueError(f'{VARIABLE}=1 needs Numba: pip install "opoch-xp[compiled]"')
    return installed if chosen is None else chosen == "1"
