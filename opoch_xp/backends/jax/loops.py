"""What makes generic kernels JAX's: compiled for each shape, with a loop that is traced once whatever its length."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp

Array = Any


def compiled(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """jax.jit of a kernel, arguments named in `static` being part of its shape; products in full precision."""

    def decorate(kernel: Callable[..., Any]) -> Callable[..., Any]:
        @partial(jax.jit, static_argnames=static)
        @wraps(kernel)
        def run(*arguments: Any, **named: Any) -> Any:
            with jax.default_matmul_precision("highest"):  # accelerators round to 16 bits otherwise
                return kernel(*arguments, **named)

        return run

    return decorate


def in_blocks(function: Callable[..., tuple[Array, ...]], arrays: tuple[Array, ...], step: int) -> tuple[Array, ...]:
    """opoch_xp.backends.generic.tree.in_blocks as one loop, traced once; its gradient computes a block anew.

    The last block is filled up with zeros, and what they give is dropped.
    """
    entries = arrays[0].shape[0]
    blocks = -(-entries // step)
    step = -(-entries // blocks)

    def cut(array: Array) -> Array:
        padded = jnp.pad(array, [(0, blocks * step - entries)] + [(0, 0)] * (array.ndim - 1))
        return jnp.reshape(padded, (blocks, step, *array.shape[1:]))

    found = jax.lax.map(jax.checkpoint(lambda block: function(*block)), tuple(cut(array) for array in arrays))
    return tuple(jnp.reshape(x, (blocks * step, *x.shape[2:]))[:entries] for x in found)


def largest(x: Array, count: int) -> Array:
    """opoch_xp.backends.generic.tree.largest: picking a few of a row costs a fiftieth of sorting it."""
    return jax.lax.top_k(x, count)[1]
