"""What the compiled kernels are made of: exponentials, and products of rows named by an index.

A product holds 4 rows by one or two vectors of 64 bytes in registers while it runs along the other axis, as matrix
libraries do; but rows are read where they lie, through an index, so that nothing is gathered first. Queries are the
contiguous axis, a multiple of `lanes`. Sums may be taken in another order than written (`reassoc`, `contract`);
infinities and NaN keep their meaning.

Measured, one core of an Intel Xeon with AVX-512, float32, 512 rows of 64 against 128 queries: 155 billion operations a
second, 153 against 64, 146 against 32, where OpenBLAS has 115 to 133 on rows that are gathered already; the same
written as loops for the compiler to turn into vectors, 50 to 85. Exponentials: .28 ns a number, numpy.exp .34.
"""

import math
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

Array = Any

FLAGS = {"contract", "reassoc", "nsz", "arcp"}
ROWS = 4  # of a block of a product
AHEAD = 4  # rows asked for before they are needed, at the least,
QUEUE = (
    256  # and so many that they take products with as many numbers: of few queries a row is done before the next comes
)
MIXED = 64  # rows mixed at a time: their weights for 128 queries are 32 kB, of the first cache
VECTOR = 64  # bytes
LOWEST = -80.0  # exp of less counts as zero: no denormal numbers, which cost a hundred times as much
WIDE = bool(llvm.get_host_cpu_features().get("avx512f", False))  # registers for two vectors a row


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Machine code for the processor at hand, which runs without the interpreter's lock and is kept on disk."""
    return njit(cache=True, nogil=True, error_model="numpy", fastmath=FLAGS)(function)


def lanes(dtype: Any) -> int:
    """Numbers of a vector: what an axis of queries is a multiple of."""
    return VECTOR // np.dtype(dtype).itemsize


def emitted(function: Callable[..., Any]) -> Any:
    """A function of compiled code whose instructions `function` writes itself."""
    return intrinsic(function)


@emitted
def _as_float(typing: Any, bits: Any) -> Any:
    """The float32 whose bits are those of an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@emitted
def _pointer(typing: Any, address: Any, like: Any) -> Any:
    """A memory address as a pointer to numbers of the dtype of `like`, an array."""
    kind = types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(types.intp, like), generate


@compiled
def array_at(address: int, rows: int, width: int, like: Array) -> Array:
    """The C-contiguous array (rows, width) that lies at an address, of the dtype of `like`. Nothing keeps it alive."""
    return carray(_pointer(address, like), (rows, width))


def exponential(x: Any) -> Any:
    """e**x, 0 below LOWEST; float32 by a polynomial that errs by up to 4e-7 of the result. In compiled code only."""
    raise TypeError("exponential is for compiled kernels")


@overload(exponential)
def _exponential(x: Any) -> Any:
    def double(x: Any) -> Any:
        return math.exp(x)

    if x != types.float32:
        return double

    def single(x: Any) -> Any:
        # e**x = 2**n e**r, |r| <= ln 2 / 2. Coefficients: Cephes' expf, S. L. Moshier, 1992.
        y = min(max(x, np.float32(LOWEST)), np.float32(88.0))
        n = np.floor(y * np.float32(1.44269504) + np.float32(0.5))
        r = y - n * np.float32(0.693359375)
        r = r - n * np.float32(-2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        p = p * r * r + r + np.float32(1.0)
        e = p * _as_float((np.int32(n) + np.int32(127)) << np.int32(23))
        return e if x >= np.float32(LOWEST) else (np.float32(0.0) if x < np.float32(LOWEST) else x)  # NaN stays NaN

    return single


def _block(rows: int, vectors: int, along: bool) -> Any:
    """block(a, index, i, first, count, x, j, out, o): for r below `rows` and j in `vectors` vectors

        out[o + r, j] += sum over c below count of a[index[i + r], first + c] * x[c, j]   (along=False)
        out[o + r, j] += sum over c below count of a[index[i + c], first + r] * x[c, j]   (along=True)

    All arrays are C-contiguous.
    """

    @emitted
    def block(typing: Any, a: Any, index: Any, i: Any, first: Any, count: Any, x: Any, j: Any, out: Any, o: Any) -> Any:
        whole = types.intp
        real = x.dtype
        width = VECTOR // (real.bitwidth // 8)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            number = context.get_value_type(whole)
            vector = ir.VectorType(context.get_value_type(real), width)
            a_, index_, i_, first_, count_, x_, j_, out_, o_ = arguments
            a_, x_, out_, index_ = (
                context.make_array(kind)(context, builder, value)
                for kind, value in ((a, a_), (x, x_), (out, out_), (index, index_))
            )

            def place(array: Any, row: Any, column: Any) -> Any:
                stride = builder.extract_value(array.shape, 1)
                return builder.gep(array.data, [builder.add(builder.mul(row, stride), column)])

            def vector_at(pointer: Any, v: int) -> Any:
                return builder.bitcast(builder.gep(pointer, [number(v * width)]), vector.as_pointer())

            def index_at(at: Any) -> Any:
                return builder.load(builder.gep(index_.data, [builder.add(i_, at)]))

            size = real.bitwidth // 8
            sums = [[cgutils.alloca_once(builder, vector) for _ in range(vectors)] for _ in range(rows)]
            into = [
                [vector_at(place(out_, builder.add(o_, number(r)), j_), v) for v in range(vectors)] for r in range(rows)
            ]
            for pointers, held in zip(into, sums, strict=True):
                for pointer, one in zip(pointers, held, strict=True):
                    builder.store(builder.load(pointer, align=size), one)
            starts = [] if along else [place(a_, index_at(number(r)), first_) for r in range(rows)]
            name = f"llvm.fma.v{width}f{real.bitwidth}"
            multiply_add = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
            nothing = ir.Constant(vector, ir.Undefined)
            same = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
            with cgutils.for_range(builder, count_) as loop:
                c = loop.index
                column = place(x_, c, j_)
                xs = [builder.load(vector_at(column, v), align=size) for v in range(vectors)]
                base = place(a_, index_at(c), first_) if along else None
                for r in range(rows):
                    pointer = builder.gep(base, [number(r)]) if along else builder.gep(starts[r], [c])
                    one = builder.insert_element(nothing, builder.load(pointer), ir.Constant(ir.IntType(32), 0))
                    factor = builder.shuffle_vector(one, nothing, same)
                    for v in range(vectors):
                        total = builder.call(multiply_add, [factor, xs[v], builder.load(sums[r][v])])
                        builder.store(total, sums[r][v])
            for pointers, held in zip(into, sums, strict=True):
                for pointer, one in zip(pointers, held, strict=True):
                    builder.store(builder.load(one), pointer, align=size)
            return context.get_dummy_value()

        return types.void(a, index, whole, whole, whole, x, whole, out, whole), generate

    return block


@emitted
def _prefetch(typing: Any, a: Any, row: Any, column: Any) -> Any:
    """Asks for the cache line of a[row, column], a C-contiguous; nothing waits for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(a)(context, builder, arguments[0])
        stride = builder.extract_value(array.shape, 1)
        at = builder.gep(array.data, [builder.add(builder.mul(arguments[1], stride), arguments[2])])
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), number, number, number])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        at = builder.bitcast(at, ir.IntType(8).as_pointer())
        builder.call(fetch, [at, ir.Constant(number, 0), ir.Constant(number, 3), ir.Constant(number, 1)])
        return context.get_dummy_value()

    return types.void(a, types.intp, types.intp), generate


_VECTORS = 2 if WIDE else 1
_dots, _dots_rest = _block(ROWS, _VECTORS, False), _block(ROWS, 1, False)
_mix, _mix_rest = _block(ROWS, _VECTORS, True), _block(ROWS, 1, True)
_mix_row = _block(1, 1, True)


@compiled
def dots(a: Array, index: Array, start: int, stop: int, first: int, dim: int, x: Array, out: Array) -> None:
    """out[i] = sum over c below dim of a[index[i], first + c] * x[c], i from start to stop, a multiple of ROWS apart.

    a (n, w), index (m,) int64, x (dim, g), out (m, g); g a multiple of `lanes`.
    """
    width = x.shape[1]
    vector = VECTOR // x.itemsize
    step = _VECTORS * vector
    ahead = max(AHEAD, QUEUE // width)
    for i in range(start, min(start + ahead, stop)):
        for c in range(0, dim, vector):
            _prefetch(a, index[i], first + c)
    for i in range(start, stop, ROWS):
        for r in range(i + ahead, min(i + ahead + ROWS, stop)):
            for c in range(0, dim, vector):
                _prefetch(a, index[r], first + c)
        for r in range(ROWS):
            row = out[i + r]
            for j in range(width):
                row[j] = 0
        j = 0
        while j + step <= width:
            _dots(a, index, i, first, dim, x, j, out, i)
            j += step
        while j < width:
            _dots_rest(a, index, i, first, dim, x, j, out, i)
            j += vector


@compiled
def mix(a: Array, index: Array, start: int, stop: int, first: int, columns: int, w: Array, out: Array) -> None:
    """out[c] += sum over i from start to stop of a[index[i], first + c] * w[i - start], for c below columns.

    a (n, ...), index (m,) int64, w (stop - start, g), out (columns, g); g a multiple of `lanes`.
    """
    width = w.shape[1]
    vector = VECTOR // w.itemsize
    step = _VECTORS * vector
    whole = columns // ROWS * ROWS
    for low in range(start, stop, MIXED):
        count = min(MIXED, stop - low)
        weights = w[low - start : low - start + count]
        for i in range(low, low + count):
            for c in range(0, columns, vector):
                _prefetch(a, index[i], first + c)
        for c in range(0, whole, ROWS):
            j = 0
            while j + step <= width:
                _mix(a, index, low, first + c, count, weights, j, out, c)
                j += step
            while j < width:
                _mix_rest(a, index, low, first + c, count, weights, j, out, c)
                j += vector
        for c in range(whole, columns):
            for j in range(0, width, vector):
                _mix_row(a, index, low, first + c, count, weights, j, out, c)
