"""Machine code and its vectors: what functions of compiled code are made of that write their instructions themselves.

A vector is 64 bytes, 16 numbers of float32 or 8 of float64, whatever the processor's registers hold; LLVM cuts it to
their size. Sums may be taken in another order than written (`reassoc`, `contract`); infinities and NaN keep their
meaning.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any
from warnings import warn

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, entrypoints
from numba.core.caching import FunctionCache
from numba.extending import intrinsic, overload
from numba.np.numpy_support import carray

from opoch_xp.treecode import law

Array = Any

FLAGS = {"contract", "reassoc", "nsz", "arcp"}
VECTOR = 64  # bytes
LOWEST = -80.0  # exp of less counts as zero: no denormal numbers, which cost a hundred times as much
LOWEST_DOUBLE = -700.0  # the same in float64: the inverse of a sum of weights is finite
HIGHEST = 88.0  # exp of more is infinite in float32
WIDE = bool(llvm.get_host_cpu_features().get("avx512f", False))  # registers for two vectors a row
# e**x = 2**n e**r, |r| <= ln 2 / 2: a polynomial in r, Cephes' expf, S. L. Moshier, 1992
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
LN2 = (0.693359375, -2.12194440e-4)  # in two parts
# ln x = n ln 2 + ln m, 1 <= m < 2: the polynomial of degree four in m through Chebyshev's points
LOG = (-0.0543709336, 0.433932442, -1.44059216, 2.79283652, -1.73172644)


with suppress(Exception):  # what Numba does once before it compiles, and gives up on metadata that cannot be read
    entrypoints.init_all()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Machine code for the processor at hand, which runs without the interpreter's lock and is kept on disk, where a
    folder may be written; a warning says so where none may."""
    made: Any = njit(nogil=True, error_model="numpy", fastmath=FLAGS)(function)
    try:
        made._cache = _Kept(function)
    except RuntimeError:
        _tell_not_kept("no folder for it may be written")
    return made


def _digest() -> str:
    """Of the sources that machine code may hold parts of: those of this folder, and of the law of a node's mass."""
    found = [*sorted(Path(__file__).parent.glob("*.py")), Path(law.__file__)]
    return sha256(b"".join(path.read_bytes() for path in found if path.exists())).hexdigest()


class _Kept(FunctionCache):
    """Numba's cache of a function, which forgets it when any of the sources has changed, and not its own file alone;
    where the disk takes nothing, machine code is this process's alone."""

    _SOURCES = _digest()

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = (self._cache_file._source_stamp, self._SOURCES)

    def save_overload(self, *arguments: Any) -> None:
        try:
            super().save_overload(*arguments)
        except OSError as error:
            _tell_not_kept(str(error))


_told: list[str] = []


def _tell_not_kept(reason: str) -> None:
    """One warning a process, whatever the number of functions."""
    if not _told:
        _told.append(reason)
        warn(
            f"machine code is not kept on disk, so that every process compiles it anew, for up to a minute: {reason};"
            " set the environment variable NUMBA_CACHE_DIR to a folder that may be written",
            RuntimeWarning,
            stacklevel=2,
        )


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, made a part of every function that calls it: a call counts its arrays, which costs more than a cell."""
    return njit(inline="always", nogil=True, error_model="numpy", fastmath=FLAGS)(function)


def lanes(dtype: Any) -> int:
    """Numbers of a vector: what an axis of queries is a multiple of."""
    return VECTOR // np.dtype(dtype).itemsize


def emitted(function: Callable[..., Any]) -> Any:
    """A function of compiled code whose instructions `function` writes itself."""
    return intrinsic(function)


class Vectors:
    """Instructions on vectors of `real`, numba's float32 or float64, written at the end of a builder."""

    def __init__(self, context: Any, builder: Any, real: Any) -> None:
        self.context, self.builder = context, builder
        self.size = real.bitwidth // 8
        self.width = VECTOR // self.size
        self.real = context.get_value_type(real)
        self.kind = ir.VectorType(self.real, self.width)
        self.whole = context.get_value_type(types.intp)

    def number(self, value: int) -> Any:
        """A whole number as the machine indexes with."""
        return ir.Constant(self.whole, value)

    def arrays(self, signature: Any, arguments: Any, *places: int) -> list[Any]:
        """The arrays among the arguments of a call, by their place."""
        made = self.context.make_array
        return [made(signature.args[place])(self.context, self.builder, arguments[place]) for place in places]

    def at(self, array: Any, *index: Any) -> Any:
        """Where the number stands at an index of a C-contiguous array of one axis or two."""
        place = index[0]
        if len(index) == 2:
            stride = self.builder.extract_value(array.shape, 1)
            place = self.builder.add(self.builder.mul(index[0], stride), index[1])
        return self.builder.gep(array.data, [place])

    def load(self, pointer: Any, vectors: int = 0, mask: Any = None) -> Any:
        """The vector that begins so many vectors after a place; with a mask, nothing is read where it is not set, and
        zeros stand there."""
        if mask is None:
            return self.builder.load(self._cast(pointer, vectors), align=self.size)
        return self._masked("load", self.kind, self._cast(pointer, vectors), mask, self.constant(0.0))

    def store(self, value: Any, pointer: Any, vectors: int = 0, mask: Any = None) -> None:
        """Writes a vector to such a place; with a mask, where it is set."""
        if mask is None:
            self.builder.store(value, self._cast(pointer, vectors), align=self.size)
        else:
            self._masked("store", ir.VoidType(), value, self._cast(pointer, vectors), mask)

    def first(self, count: Any) -> Any:
        """The mask of a vector's first `count` numbers."""
        integers = ir.VectorType(self.whole, self.width)
        nothing, place = ir.Constant(integers, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        spread = self.shuffled(self.builder.insert_element(nothing, count, place), nothing, [0] * self.width)
        return self.builder.icmp_signed("<", ir.Constant(integers, list(range(self.width))), spread)

    def _masked(self, name: str, result: Any, *given: Any) -> Any:
        """llvm.masked.load or store, whose pointer is followed by its alignment."""
        arguments = []
        for one in given:
            arguments += [one, ir.Constant(ir.IntType(32), self.size)] if one.type.is_pointer else [one]
        kind = ir.FunctionType(result, [one.type for one in arguments])
        full = f"llvm.masked.{name}.v{self.width}f{8 * self.size}.p0"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, full), arguments)

    def _cast(self, pointer: Any, vectors: int) -> Any:
        if vectors:
            pointer = self.builder.gep(pointer, [self.number(vectors * self.width)])
        return self.builder.bitcast(pointer, self.kind.as_pointer())

    def constant(self, value: float) -> Any:
        return ir.Constant(self.kind, [value] * self.width)

    def spread(self, one: Any) -> Any:
        """A number in every place."""
        nothing, first = ir.Constant(self.kind, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        return self.shuffled(self.builder.insert_element(nothing, one, first), nothing, [0] * self.width)

    def shuffled(self, a: Any, b: Any, places: list[int]) -> Any:
        """The numbers of a, and after them of b, at these places."""
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places))

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b)

    def sub(self, a: Any, b: Any) -> Any:
        return self.builder.fsub(a, b)

    def mul(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b)

    def div(self, a: Any, b: Any) -> Any:
        return self.builder.fdiv(a, b)

    def larger(self, a: Any, b: Any) -> Any:
        """The larger of each two numbers; b where one is NaN."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def smaller(self, a: Any, b: Any) -> Any:
        return self.builder.select(self.builder.fcmp_ordered("<", a, b), a, b)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c."""
        return self._call("fma", a, b, c)

    def sqrt(self, a: Any) -> Any:
        return self._call("sqrt", a)

    def _call(self, name: str, *given: Any) -> Any:
        kind = ir.FunctionType(self.kind, [self.kind] * len(given))
        full = f"llvm.{name}.v{self.width}f{8 * self.size}"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, full), given)

    def sum(self, a: Any) -> Any:
        """The sum of a vector's numbers."""
        return self._across(a, self.add)

    def largest(self, a: Any) -> Any:
        return self._across(a, self.larger)

    def _across(self, a: Any, both: Callable[[Any, Any], Any]) -> Any:
        step = self.width // 2
        while step:
            a = both(a, self.shuffled(a, a, [(i + step) % self.width for i in range(self.width)]))
            step //= 2
        return self.builder.extract_element(a, ir.Constant(ir.IntType(32), 0))

    def exponential(self, x: Any) -> Any:
        """See `exponential`."""
        if self.size == 8:
            low = self.builder.fcmp_ordered("<", x, self.constant(LOWEST_DOUBLE))
            return self.builder.select(low, self.constant(0.0), self._each("exp", x))
        builder, integers = self.builder, ir.VectorType(ir.IntType(32), self.width)
        y = self.smaller(self.larger(x, self.constant(LOWEST)), self.constant(HIGHEST))
        n = self._call("floor", self.fma(y, self.constant(1.44269504), self.constant(0.5)))
        r = self.fma(n, self.constant(-LN2[0]), y)
        r = self.fma(n, self.constant(-LN2[1]), r)
        p = self.constant(EXP[0])
        for coefficient in EXP[1:]:
            p = self.fma(p, r, self.constant(coefficient))
        p = self.add(self.fma(self.mul(p, r), r, r), self.constant(1.0))
        bits = builder.add(builder.fptosi(n, integers), ir.Constant(integers, [127] * self.width))
        power = builder.bitcast(builder.shl(bits, ir.Constant(integers, [23] * self.width)), self.kind)
        low = builder.fcmp_unordered("<", x, self.constant(LOWEST))  # or NaN, which stays
        nothing = builder.select(builder.fcmp_ordered("<", x, self.constant(LOWEST)), self.constant(0.0), x)
        return builder.select(low, nothing, self.mul(p, power))

    def logarithm(self, x: Any) -> Any:
        """See `logarithm`."""
        if self.size == 8:
            return self._each("log", x)
        builder, integers = self.builder, ir.VectorType(ir.IntType(32), self.width)

        def whole(value: int) -> Any:
            return ir.Constant(integers, [value] * self.width)

        bits = builder.bitcast(x, integers)
        n = builder.sitofp(builder.sub(builder.ashr(bits, whole(23)), whole(127)), self.kind)
        m = builder.bitcast(builder.or_(builder.and_(bits, whole(0x007FFFFF)), whole(0x3F800000)), self.kind)
        p = self.constant(LOG[0])
        for coefficient in LOG[1:]:
            p = self.fma(p, m, self.constant(coefficient))
        return self.fma(n, self.constant(math.log(2)), p)

    def _each(self, name: str, x: Any) -> Any:
        """A function of one number, of every number of a vector."""
        function = cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(self.real, [self.real]), f"llvm.{name}.f{8 * self.size}"
        )
        for i in range(self.width):
            place = ir.Constant(ir.IntType(32), i)
            one = self.builder.call(function, [self.builder.extract_element(x, place)])
            x = self.builder.insert_element(x, one, place)
        return x

    def variable(self, value: Any) -> Any:
        """A vector or number that changes: `get` and `set` read and write it."""
        place = cgutils.alloca_once(self.builder, value.type)
        self.builder.store(value, place)
        return place

    def get(self, variable: Any) -> Any:
        return self.builder.load(variable)

    def set(self, variable: Any, value: Any) -> None:
        self.builder.store(value, variable)

    @contextmanager
    def each(self, count: Any) -> Iterator[Any]:
        """A loop over whole numbers below count."""
        with cgutils.for_range(self.builder, count) as loop:
            yield loop.index

    @contextmanager
    def each_vector(self, count: Any) -> Iterator[Any]:
        """A loop over the places of vectors along an axis of `count` numbers, a multiple of a vector's."""
        with self.each(self.builder.udiv(count, self.number(self.width))) as index:
            yield self.builder.mul(index, self.number(self.width))


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


@emitted
def lowest_bit(typing: Any, bits: Any) -> Any:
    """The number of the lowest bit that is set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = ir.IntType(64)
        kind = ir.FunctionType(whole, [whole, ir.IntType(1)])
        count = cgutils.get_or_insert_function(builder.module, kind, "llvm.cttz.i64")
        return builder.call(count, [arguments[0], ir.Constant(ir.IntType(1), 1)])

    return types.int64(types.int64), generate


def exponential(x: Any) -> Any:
    """e**x, 0 below LOWEST; float32 by a polynomial that errs by up to 4e-7 of the result. In compiled code only."""
    raise TypeError("exponential is for compiled kernels")


@emitted
def _as_float(typing: Any, bits: Any) -> Any:
    """The float32 whose bits are those of an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@overload(exponential)
def _exponential(x: Any) -> Any:
    def double(x: Any) -> Any:
        return 0.0 if x < LOWEST_DOUBLE else math.exp(x)

    if x != types.float32:
        return double
    low, high, one, half, log2 = (np.float32(value) for value in (LOWEST, HIGHEST, 1.0, 0.5, 1.44269504))
    first, second = (np.float32(value) for value in LN2)
    a, b, c, d, e, f = (np.float32(value) for value in EXP)

    def single(x: Any) -> Any:
        y = min(max(x, low), high)
        n = np.floor(y * log2 + half)
        r = y - n * first
        r = r - n * second
        p = ((((a * r + b) * r + c) * r + d) * r + e) * r + f
        p = p * r * r + r + one
        power = p * _as_float((np.int32(n) + np.int32(127)) << np.int32(23))
        return power if x >= low else (np.float32(0.0) if x < low else x)  # NaN stays NaN

    return single
