"""What the suites share: the base class that skips, warms up and verifies; the backends, as a parameter; the sizes.

A suite prepares a call, verifies its result and only then is it timed, so no speed stands without an error: time_* and
track_* of one class have the same parameters and input. What raises NotImplementedError on the way is shown as n/a.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from opoch_xp.backends import kernels_for, namespace

Array = Any

FULL = os.environ.get("OPOCH_BENCH_FULL") == "1"  # the sizes of a release, which take longer than one waits for
SIZES = tuple(2**power for power in range(10, 21 if FULL else 15, 2))
GENERIC_MOST = 2**14 if FULL else 2**12  # rows through the generic kernels, which are for reading more than for speed

os.environ.setdefault("JAX_ENABLE_X64", "1")  # for codes; what is measured is float32 all the same

BACKENDS = ("numpy", "torch", "jax", "cupy", "generic")


@dataclass(frozen=True)
class Library:
    """An array library that is here and computes: `backend` is what to pass to opoch_xp."""

    xp: Any
    backend: str | None
    kernels: Any

    def array(self, host: np.ndarray) -> Array:
        return self.xp.asarray(host)

    def seconds(self, call: Callable[[], Array]) -> float:
        """Wall seconds of one call, the device's work included."""
        start = perf_counter()
        self.kernels.synchronize(call())
        return perf_counter() - start


def library(name: str, rows: int, kernel: str) -> Library:
    """The backend of that name; n/a where the library or its device is missing, or its plugin lacks the kernel.

    The generic kernels are a backend of their own, of at most GENERIC_MOST rows.
    """
    try:
        xp = namespace("numpy" if name == "generic" else name)
        xp.zeros(1)
    except Exception as missing:  # a library may fail in any way where its device is not there
        raise NotImplementedError(f"{name} is not here: {missing}") from missing
    backend = "generic" if name == "generic" else None
    kernels = kernels_for(xp, backend)
    if kernel not in kernels.native:
        raise NotImplementedError(f"{name} has no {kernel} of its own")
    if kernels.name == "generic":
        at_most(GENERIC_MOST, rows)
    return Library(xp, backend, kernels)


def at_most(most: int, rows: int) -> None:
    """n/a above a stated limit."""
    if rows > most:
        raise NotImplementedError(f"{rows:,} is above the limit of {most:,}: it would take too long")


def verify(what: str, figure: float, least: float = 0.0, most: float = np.inf) -> None:
    """Raises, so that nothing is timed, unless the figure is within its bounds; NaN is not."""
    if not least <= figure <= most:
        raise AssertionError(f"{what} must be from {least:g} to {most:g} for this to be timed, got {figure:.3g}")


class Suite:
    """Prepares once for all samples of a process; the preparation has warmed up what is timed."""

    number, warmup_time, rounds = 1, 0, 1
    repeat = (2, 20, 1.0)  # at least 2 samples, and up to 20 within a second
    _prepared: tuple[Any, ...] | None = None

    def setup(self, *params: Any) -> None:
        """asv sets up before every sample; a sample changes nothing that the next one reads."""
        if self._prepared != params:
            self.prepare(*params)
            self._prepared = params

    def prepare(self, *params: Any) -> None:
        raise NotImplementedError
