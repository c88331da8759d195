"""Tasks over threads, and arrays as the compiled kernels take them."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import numpy as np

Array = Any


def share(function: Callable[[Any], None], tasks: Iterable[Any], workers: int) -> None:
    """function(task) for every task, over `workers` threads, each taking the next as it is free; kernels run without
    the interpreter's lock. The first error is raised."""
    tasks = list(tasks)
    numbers = count()

    def work() -> None:
        while (number := next(numbers)) < len(tasks):
            function(tasks[number])

    workers = min(workers, len(tasks))
    if workers <= 1:
        work()
        return
    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(work) for _ in range(workers)]:
            future.result()


class _Memory:
    """An array's memory without its mark as read-only, as NumPy's array interface."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, False)}


def plain(array: Array) -> np.ndarray:
    """The array in C order, aligned and not marked as read-only, so that one piece of machine code serves all.

    Copies where order or alignment differ; so it is not to be written to.
    """
    array = np.require(array, requirements=["C", "A"])
    return array if array.flags.writeable else np.asarray(_Memory(array))
