"""JAX on a CPU: the plugin and the generic kernels under jax.jit, what compiling them takes, and their gradients.

Yardstick: jax.nn.dot_product_attention, which holds the matrix, up to 16,384 tokens; beyond, Exact() by the plugin.
Compiled ahead of time, verified against exact rows, then timed in turn; a ratio is the median over the rounds.
"""

from dataclasses import replace
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Table, audited, in_turn

import opoch_xp as ox
from opoch_xp import workloads

FAST = ox.Treecode(rtol=0.2, most=64)
MATRIX = 16_384  # tokens up to which the yardstick's matrix fits
ROUNDS = 3
Call = tuple[Any, str | None]  # method, backend; None for jax.nn.dot_product_attention


def attend(call: Call | None, q: Any, k: Any, v: Any) -> Any:
    """out (1, n, 64), causal, by a method or by JAX's own."""
    if call is None:
        turned = (jnp.moveaxis(x, 0, 1)[None] for x in (q, k, v))  # (batch, n, heads, d)
        return jnp.moveaxis(jax.nn.dot_product_attention(*turned, is_causal=True)[0], 1, 0)
    return ox.attention(q, k, v, causal=True, method=call[0], backend=call[1])


def gradients(call: Call | None, q: Any, k: Any, v: Any) -> Any:
    """Forward and backward."""
    return jax.grad(lambda *arrays: attend(call, *arrays).sum(), (0, 1, 2))(q, k, v)


def compare(table: Table, n: int, calls: tuple[Call | None, ...], function: Any, name: str) -> None:
    host = workloads.make("scattered", n)
    arrays = [jnp.asarray(x) for x in host]
    exact = ox.attend(*host, causal=True, method=ox.Exact())
    programs, compiling = [], []
    for call in calls:
        start = perf_counter()
        programs.append(jax.jit(partial(function, call)).lower(*arrays).compile())
        compiling.append(perf_counter() - start)
    forward = programs if function is attend else [jax.jit(partial(attend, call)) for call in calls]
    outputs = [np.asarray(program(*arrays)) for program in forward]
    errors = [float(audited(*host, True, replace(exact, out=out)).error[0]) for out in outputs]
    times = in_turn([lambda p=p: jax.block_until_ready(p(*arrays)) for p in programs], ROUNDS)
    for call, taken, seconds, wrong in zip(calls, compiling, times, errors, strict=True):
        ratio = median(a / b for a, b in zip(times[0], seconds, strict=True))
        method = "jax.nn.dot_product_attention" if call is None else call[0]
        kernels = "" if call is None else call[1] or "plugin"
        table.add("scattered", n, name, method, kernels, taken, median(seconds), ratio, wrong)


def main() -> None:
    print(f"JAX {jax.__version__}, {jax.devices()}")
    table = Table(
        "xla",
        f"JAX {jax.__version__} on a CPU, jitted, float32, 1 head of 64, causal",
        ["workload", "tokens", "pass", "method", "kernels", "compiling (s)", "time (s)", "times faster", "error"],
    )
    plugin = tuple((method, None) for method in (ox.Exact(), ox.Treecode(), FAST))
    generic = ((ox.Exact(), "generic"), (ox.Treecode(), "generic"))
    compare(table, 8192, (None, *plugin, *generic), attend, "forward")
    compare(table, MATRIX, (None, *plugin), attend, "forward")
    compare(table, 65_536, plugin, attend, "forward")
    compare(table, MATRIX, (None, *plugin), gradients, "forward and backward")
    table.save()


if __name__ == "__main__":
    main()
