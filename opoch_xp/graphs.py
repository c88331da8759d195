"""Libraries that follow what is computed, for gradients or to compile it.

PyTorch's plugin runs a followed call as one operator; JAX traces through the call, whose arrays then hold no numbers.
"""

import sys
from types import ModuleType
from typing import Any

Array = Any


def follower(*arrays: Array) -> ModuleType | None:
    """The module that runs a call on these arrays as one operator of their library, or None: nothing follows them.

    It has `casts`, `cast`, `without_casts`, `opaque`, `numbers`, `solution`, `report_of`, `exact_rows` and the operator
    `attend`: see opoch_xp.backends.torch.operator, the only one so far. Nothing is imported that the caller has not
    imported.
    """
    torch = sys.modules.get("torch")
    if torch is None or not all(isinstance(array, torch.Tensor) for array in arrays):
        return None
    from opoch_xp.backends.torch import operator

    return operator if operator.follows(*arrays) else None


def has_tangent(*arrays: Array) -> bool:
    """Whether forward-mode differentiation of PyTorch follows any of the arrays."""
    torch = sys.modules.get("torch")
    if torch is None or torch.autograd.forward_ad._current_level < 0:
        return False
    from opoch_xp.backends.torch import operator

    return operator.has_tangent(*(array for array in arrays if isinstance(array, torch.Tensor)))


def traced(*arrays: Array) -> bool:
    """Whether JAX traces any of the arrays, to compile, differentiate or batch what is computed from them."""
    jax = sys.modules.get("jax")
    return jax is not None and any(isinstance(array, jax.core.Tracer) for array in arrays)
