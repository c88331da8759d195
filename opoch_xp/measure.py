"""Measuring one call: its wall time and the memory it takes beyond what was held before; and naming the machine."""

import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

STATUS = Path("/proc/self/status")  # Linux: VmRSS is what is resident now, VmHWM the most there was, both in kB
CPUINFO = Path("/proc/cpuinfo")
CLEAR = Path("/proc/self/clear_refs")  # writing 5 sets VmHWM back to VmRSS


def timed(function: Callable[[], Result]) -> tuple[Result, float, int | None]:
    """Call `function` and return (its result, wall seconds, peak extra bytes).

    Peak extra bytes: the high-water mark of resident memory during the call above the level just before it, the result
    included. None where the system cannot tell. Where a device computes, `function` has to wait for it.
    """
    level = _start_memory()
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    return result, seconds, _extra_memory(level)


def resident() -> int:
    """Bytes of this process that are in memory now, pages of mapped files included; OSError where none can tell."""
    return _status("VmRSS")


def most_resident() -> int:
    """The most that were since the process began, in bytes; OSError where none can tell."""
    return _status("VmHWM")


def _start_memory() -> tuple[int, int] | None:
    """(level in bytes, high-water mark in bytes), with the mark set back to the level where that can be done."""
    gc.collect()
    _return_free_memory()
    try:
        CLEAR.write_text("5")
        return resident(), most_resident()
    except (OSError, KeyError):
        mark = _lifetime_mark()
        return None if mark is None else (mark, mark)


def _extra_memory(level: tuple[int, int] | None) -> int | None:
    if level is None:
        return None
    before, mark = level
    try:
        peak = most_resident()
    except (OSError, KeyError):
        peak = _lifetime_mark() or mark
        return peak - before if peak > mark else None  # an unmoved lifetime mark says nothing about this call
    return max(0, peak - before)


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024


def _lifetime_mark() -> int | None:
    """The most memory the process ever held, in bytes; None on a system without getrusage."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _return_free_memory() -> None:
    """Give memory freed earlier back to the system (glibc), else the call would reuse it unseen."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def cores() -> int:
    """Cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def machine() -> str:
    """The processor's name and the cores this process may use, in words."""
    name = platform.processor() or platform.machine()
    try:
        models = [
            line.split(":", 1)[1].strip() for line in CPUINFO.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    except OSError:
        pass
    count = cores()
    return f"{name}, {count} core{'s' if count > 1 else ''}"
