"""Threads of the NumPy plugin: tasks over all cores, BLAS held to one thread meanwhile.

How many: `threads(n)` around a call, else the environment variable OPOCH_NUM_THREADS, else the cores this process may
use. Results do not depend on the number. Without threadpoolctl BLAS cannot be held, so tasks then run one after
another and BLAS keeps its own threads.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from threading import Lock, get_ident, local
from typing import Any, TypeVar

import numpy as np

from opoch_xp.threads import call, share

try:
    from threadpoolctl import OpenBLASController, ThreadpoolController
except ImportError:  # an extra: see the docstring
    OpenBLASController = ThreadpoolController = None

Task = TypeVar("Task")
Result = TypeVar("Result")
_chosen: ContextVar[int | None] = ContextVar("threads", default=None)


def thread_count() -> int:
    """Threads a kernel of this plugin will use now.

    Raises ValueError when OPOCH_NUM_THREADS is not a whole number of at least 1.
    """
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    text = os.environ.get("OPOCH_NUM_THREADS")
    if text is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise ValueError(f"OPOCH_NUM_THREADS must be a whole number of at least 1, got {text!r}")
    return int(text)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Limit the plugin's kernels to `number` threads within the block, for this thread of Python's and what it calls.

    Raises ValueError when number is not a whole number of at least 1.

    >>> from opoch_xp.backends.numpy import thread_count, threads
    >>> with threads(1):
    ...     thread_count()
    1
    """
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"number of threads must be a whole number of at least 1, got {number!r}")
    token = _chosen.set(number)
    try:
        yield
    finally:
        _chosen.reset(token)


class _OneBlasThread:
    """Holds BLAS to one thread while any call is inside: the limit is the whole process's, so calls are counted."""

    def __init__(self) -> None:
        self.lock, self.inside = Lock(), 0
        self.controller: Any = None
        self.limit: Any = None
        self.workers = local()

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0 and ThreadpoolController is not None:
                self.controller = self.controller or ThreadpoolController()
                _free_blas()
                self.limit = self._hold()
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0 and self.limit is not None:
                _free_blas()  # the last call out may come from another thread than the first one in
                self.limit.restore_original_limits()
                self.limit = None
                _free_blas()

    def _hold(self) -> Any:
        return self.controller.limit(limits=1, user_api="blas")

    def hold_worker(self) -> None:
        """Where BLAS is built on OpenMP the limit is each thread's own: a worker sets it, once and for good."""
        if not hasattr(self.workers, "limit"):
            self.workers.limit = self._hold()


def _free_blas() -> None:
    """Let any thread set BLAS's number: threadpoolctl leaves that to the thread that did it first, while it lives."""
    getattr(OpenBLASController, "clear_controlling_thread", lambda force: None)(force=True)


_one_blas_thread = _OneBlasThread()


def run(function: Callable[[Task], Result], tasks: Iterable[Task]) -> list[Result]:
    """[function(task) for task in tasks], over the threads, floating-point warnings off: see opoch_xp.threads.share."""
    tasks, caller = list(tasks), get_ident()
    results: list[Any] = [None] * len(tasks)

    def work(number: int) -> None:
        if get_ident() != caller:
            _one_blas_thread.hold_worker()
        with np.errstate(all="ignore"):
            results[number] = function(tasks[number])

    with call(), _one_blas_thread:
        share(work, range(len(tasks)), thread_count() if ThreadpoolController else 1)
    return results


class Buffers:
    """Scratch arrays of one thread or task by name, grown as needed: fresh memory a batch would cost page faults."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        size = prod(shape)
        if name not in self.arrays or self.arrays[name].size < size:
            self.arrays[name] = np.empty(size, dtype=dtype)
        return self.arrays[name][:size].reshape(shape)
