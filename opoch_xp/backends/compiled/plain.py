"""Arrays as the compiled kernels take them."""

from typing import Any

import numpy as np

Array = Any


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
