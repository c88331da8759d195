"""Arrays of one library, made of NumPy's and brought back."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from opoch_xp.arguments import dtype_name, to_host

Array = Any


@dataclass(frozen=True)
class Library:
    """A library's namespace, and the device its arrays are to live on: None is the library's own choice."""

    xp: Any
    device: Any = None

    def has(self, dtype: str) -> bool:
        return hasattr(self.xp, dtype)

    def array(self, array: Any, dtype: str | None = None) -> Array:
        """A copy of a host array in the library, floats in `dtype` where one is named."""
        array = np.array(array)
        where = {} if self.device is None else {"device": self.device}
        if dtype is None or array.dtype.kind != "f":
            return self.xp.asarray(array, **where)
        if dtype == "bfloat16":  # which NumPy lacks
            return self.xp.astype(self.xp.asarray(array.astype(np.float32), **where), self.xp.bfloat16)
        return self.xp.asarray(array.astype(dtype), **where)

    def host(self, array: Array) -> np.ndarray:
        """A copy on the host of one of the library's arrays; bfloat16, which NumPy lacks, as float32."""
        if dtype_name(array) == "bfloat16":
            array = array_namespace(array).astype(array, self.xp.float32)
        return np.array(to_host(array))
