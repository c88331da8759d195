"""Rows: one method on one input, with its time, its memory and its error measured in the same run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from opoch_xp.arguments import prepare
from opoch_xp.attention import Attention, attend
from opoch_xp.audit import audit, exact_rows
from opoch_xp.backends import installed, kernels_for, namespace
from opoch_xp.cost import visible_pairs
from opoch_xp.measure import cores, timed
from opoch_xp.methods import Exact, Method, Treecode, method_name

Array = Any
AUDIT_ROWS = 256  # a head
RTOLS = (0.3, 0.1, 0.02)  # beside the default, of treecodes that are compared
FULL_PAIRS = 1_000_000_000  # pairs of query and key up to which exact attention runs in full: a few seconds
SAMPLE_BLOCKS = 4  # beyond that it is timed on so many blocks of query rows per core, evenly spaced,
BLOCK_ROWS = 512  # each of so many rows in a row, as the kernels take them: 4,096 rows on two cores,
BLOCK_PAIRS = 300_000_000  # and fewer where a block has more pairs than this
WARM_ROWS = 6000  # of a call before the clock starts, so that start-up and compiling are not counted: two blocks
# the library whose arrays a backend takes, where that is not its own name; a plugin's name is its library's
LIBRARIES = {"generic": "numpy", "strict": "array_api_strict"}


@dataclass(frozen=True)
class Input:
    """Arrays of one library, how attention is asked for, and the backend that computes it."""

    q: Array
    k: Array
    v: Array
    causal: bool
    backend: str | None = None
    seed: int = 0

    @property
    def heads(self) -> int:
        return int(np.prod(self.q.shape[:-2]))

    @property
    def pairs(self) -> int:
        return self.heads * visible_pairs(self.q.shape[-2], self.k.shape[-2], self.causal)


@dataclass(frozen=True)
class Row:
    """One line of a table. error: mean over heads of the Frobenius error; bound: upper end of its 95% interval on the
    worst head; p99: of single queries; pairs: share of the visible pairs that were computed. None: not measured."""

    method: str
    seconds: float | None = None
    speedup: float | None = None
    extra_bytes: int | None = None
    error: float | None = None
    bound: float | None = None
    p99: float | None = None
    pairs: float | None = None
    bits: float | None = None
    extrapolated: bool = False
    refused: bool = False


def treecodes(seed: int = 0) -> list[tuple[str | None, Method]]:
    """Treecodes from cheap to dear, the default among them."""
    return [(None, Treecode(rtol=rtol, seed=seed)) for rtol in sorted({*RTOLS, Treecode().rtol}, reverse=True)]


def library_of(backend: str) -> Any:
    """The namespace of the library that the backend is for; ValueError where there is none, or it is not installed."""
    names = sorted({*LIBRARIES, *(entry.name for entry in installed())})
    if backend not in names:
        raise ValueError(f"--backend must be one of {', '.join(names)}; got {backend!r}")
    library = LIBRARIES.get(backend, backend)
    try:
        return namespace(library)
    except ImportError:
        raise ValueError(f"--backend {backend} needs {library}, which is not installed") from None


def arrays_of(backend: str, *arrays: np.ndarray) -> tuple[Array, ...]:
    """The arrays in the library that the backend is for; raises as `library_of`."""
    xp = library_of(backend)
    return tuple(xp.asarray(array) for array in arrays)


def check(given: Input) -> None:
    """Every check of the library on the arrays, before anything is computed."""
    prepare(given.q, given.k, given.v, causal=given.causal, backend=given.backend)


def run(given: Input, method: Method) -> Attention:
    """Attention, waited for where a device computes."""
    result = attend(given.q, given.k, given.v, causal=given.causal, method=method, backend=given.backend, check=False)
    wait(given, result.out)
    return result


def kernels(given: Input) -> Any:
    """The kernels that compute: a plugin's, or the generic ones."""
    return kernels_for(array_namespace(given.q), given.backend)


def wait(given: Input, array: Array) -> None:
    """Wait for the device that computes the array."""
    kernels(given).synchronize(array)


def warm_up(given: Input, method: Method) -> None:
    """A short call before the clock starts."""
    q, k, v = (array[..., : min(WARM_ROWS, array.shape[-2]), :] for array in (given.q, given.k, given.v))
    run(replace(given, q=q, k=k, v=v), method)


def materialised_row(given: Input) -> Row:
    """Exact attention with its matrix of logits in memory: what it would need; it is not run."""
    logits = given.heads * given.q.shape[-2] * given.k.shape[-2] * np.dtype(np.float32).itemsize
    return Row("Exact, matrix in memory", extra_bytes=logits, refused=True)


def exact_row(given: Input) -> Row:
    """Streaming exact attention, in full where that takes seconds, else on evenly spaced rows and extrapolated."""
    name, n_q = "Exact(), streaming", given.q.shape[-2]
    exact = Row(name, speedup=1.0, error=0.0, bound=0.0, p99=0.0, pairs=1.0)
    if given.pairs <= FULL_PAIRS:
        warm_up(given, Exact())
        _, seconds, extra = timed(lambda: run(given, Exact()))
        return replace(exact, seconds=seconds, extra_bytes=extra)
    rows = sampled_blocks(n_q, given.pairs)

    def sample() -> Array:
        out, _ = exact_rows(
            given.q, given.k, given.v, rows, causal=given.causal, backend=given.backend, check_finite=False
        )
        wait(given, out)
        return out

    warm_up(given, Exact())
    out, seconds, extra = timed(sample)
    if extra is not None:  # the outputs that were not computed would be held as well
        extra += int(np.prod(out.shape)) // len(rows) * (n_q - len(rows)) * np.dtype(np.float32).itemsize
    return replace(exact, seconds=seconds * n_q / len(rows), extra_bytes=extra, extrapolated=True)


def sampled_blocks(n_q: int, pairs: int) -> np.ndarray:
    """Row numbers of evenly spaced blocks of query rows, whose mean is the middle, longest rows first.

    Blocks, because a kernel takes neighbouring rows together; the longest first, so that cores end together.
    """
    block = min(BLOCK_ROWS, n_q)
    wanted = SAMPLE_BLOCKS * cores() * min(1.0, BLOCK_PAIRS * n_q / (pairs * block))
    count = min(max(1, round(wanted)), n_q // block)
    starts = ((np.arange(count)[::-1] + 0.5) * n_q / count - block / 2).astype(np.int64)
    return (starts[:, None] + np.arange(block)).reshape(-1)


def method_row(given: Input, method: Method, exact: Row, name: str | None = None) -> Row:
    """A method in full, and its error against exact attention on sampled rows of that same output."""
    warm_up(given, method)
    result, seconds, extra = timed(lambda: run(given, method))
    found = audit(
        given.q, given.k, given.v, causal=given.causal, backend=given.backend, output=result, rows=AUDIT_ROWS,
        seed=given.seed, check_finite=False,
    )  # fmt: skip
    return Row(
        name or method_name(method),
        seconds=seconds,
        speedup=exact.seconds / seconds if exact.seconds is not None else None,
        extra_bytes=extra,
        error=float(np.mean(found.error)),
        bound=found.worst,
        p99=found.per_query.p99,
        pairs=float(result.report.pairs),
        extrapolated=exact.extrapolated,
    )


def measure_rows(given: Input, methods: list[tuple[str | None, Method]], begin: Callable[[str], None]) -> list[Row]:
    """Exact attention, then every method; `begin` is told what is being measured."""
    begin("Exact()")
    rows = [exact_row(given)]
    for name, method in methods:
        begin(name or method_name(method))
        rows.append(method_row(given, method, rows[0], name))
    return rows


def error_notes(heads: int, rows: int) -> list[str]:
    """What the columns of errors, memory and pairs say."""
    several = "mean over heads, " if heads > 1 else ""
    return [
        f"error: Frobenius norm of (approximate - exact) over that of exact, {several}on {rows:,} sampled rows a head "
        "of the timed output; p99: of single queries.",
        "extra memory: high-water mark above the inputs, output included; pairs: rows read, over keys seen.",
    ]
