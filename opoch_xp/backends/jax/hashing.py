"""Codes in JAX: the generic twin, where JAX gives the 64 bits that codes have."""

from typing import Any

import jax

from opoch_xp.backends import generic


def hash_codes(x: Any, planes: Any) -> Any:
    """See opoch_xp.backends.generic.hashing.hash_codes. RuntimeError where JAX's 64-bit numbers are off."""
    if not jax.config.read("jax_enable_x64"):
        raise RuntimeError(
            "hash codes are int64, which JAX gives after jax.config.update('jax_enable_x64', True), or with"
            " JAX_ENABLE_X64=1 in the environment, alone; it is off"
        )
    return generic.hash_codes(x, planes)
