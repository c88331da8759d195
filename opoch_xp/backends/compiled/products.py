"""Products of rows named by an index.

A product holds 4 rows by one or more vectors in registers while it runs along the other axis, as matrix libraries do;
but rows are read where they lie, through an index, so that nothing is gathered first.

Measured, one core of an Intel Xeon with AVX-512, float32, 512 rows of 64 against 128 queries: 155 billion operations a
second, 153 against 64, 146 against 32, where OpenBLAS has 115 to 133 on rows that are gathered already; the same
written as loops for the compiler to turn into vectors, 50 to 85.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from opoch_xp.backends.compiled.vector import VECTOR, WIDE, Vectors, compiled, emitted, inlined

Array = Any

ROWS = 4  # of a block of a product
TALL = 8 if WIDE else 4  # of one that is a vector wide: as many sums as keep a processor busy
AHEAD = 4  # rows asked for before they are needed, at the least,
QUEUE = 256  # and so many that they take products with as many numbers: of few queries a row is soon done
MIXED = 64  # rows mixed at a time: their weights for 128 queries are 32 kB, of the first cache
_ACROSS = 2 if WIDE else 1  # vectors of queries in a block
_ALONG = 4 if WIDE else 2  # vectors of a row in a block


def _block(rows: int, vectors: int, along: bool) -> Any:
    """block(a, index, i, first, count, x, j, out, o): for r below `rows` and j in `vectors` vectors

        out[o + r, j] += sum over c below count of a[index[i + r], first + c] * x[c, j]   (along=False)
        out[o + r, j] += sum over c below count of a[index[i + c], first + r] * x[c, j]   (along=True)

    All arrays are C-contiguous.
    """

    @emitted
    def block(typing: Any, a: Any, index: Any, i: Any, first: Any, count: Any, x: Any, j: Any, out: Any, o: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            to = Vectors(context, builder, x.dtype)
            _, _, i_, first_, count_, _, j_, _, o_ = arguments
            a_, index_, x_, out_ = to.arrays(signature, arguments, 0, 1, 5, 7)

            def row_of(at: Any) -> Any:
                return to.at(a_, builder.load(to.at(index_, builder.add(i_, at))), first_)

            starts = [] if along else [row_of(to.number(r)) for r in range(rows)]

            def factor(c: Any, base: Any, r: int) -> Any:
                return builder.gep(base, [to.number(r)]) if along else builder.gep(starts[r], [c])

            _multiply(
                to, count_, [to.at(out_, builder.add(o_, to.number(r)), j_) for r in range(rows)], vectors,
                lambda c: to.at(x_, c, j_), row_of if along else None, factor,
            )  # fmt: skip
            return context.get_dummy_value()

        whole = types.intp
        return types.void(a, index, whole, whole, whole, x, whole, out, whole), generate

    return block


def _multiply(
    to: Vectors, count: Any, into: list[Any], vectors: int, column: Any, base: Any, factor: Any, mask: Any = None
) -> None:
    """into[r] += sum over c below count of factor(c, base(c), r) * column(c), `vectors` vectors of it, in registers;
    with a mask, of the numbers where it is set."""
    sums = [[to.variable(to.load(pointer, v, mask)) for v in range(vectors)] for pointer in into]
    with to.each(count) as c:
        start = column(c)
        xs = [to.load(start, v, mask) for v in range(vectors)]
        here = base(c) if base else None
        for r, held in enumerate(sums):
            one = to.spread(to.builder.load(factor(c, here, r)))
            for x, variable in zip(xs, held, strict=True):
                to.set(variable, to.fma(one, x, to.get(variable)))
    for pointer, held in zip(into, sums, strict=True):
        for v, variable in enumerate(held):
            to.store(to.get(variable), pointer, v, mask)


def _rank(rows: int, vectors: int, part: bool = False) -> Any:
    """rank(a, ai, ao, first, count, x, xi, xj, out, oi, oo, oj, columns): for r below `rows`, and j in `vectors` of
    vectors or, in part of one, below `columns`,

        out[oi[oo + r], oj + j] += sum over c below count of a[ai[ao + r], first + c] * x[xi + c, xj + j]

    All arrays are C-contiguous; the rows of out differ.
    """

    @emitted
    def rank(
        typing: Any, a: Any, ai: Any, ao: Any, first: Any, count: Any, x: Any, xi: Any, xj: Any, out: Any, oi: Any,
        oo: Any, oj: Any, columns: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            to = Vectors(context, builder, x.dtype)
            _, _, ao_, first_, count_, _, xi_, xj_, _, _, oo_, oj_, columns_ = arguments
            a_, ai_, x_, out_, oi_ = to.arrays(signature, arguments, 0, 1, 5, 8, 9)

            def row_of(index: Any, start: Any, r: int) -> Any:
                return builder.load(to.at(index, builder.add(start, to.number(r))))

            lefts = [to.at(a_, row_of(ai_, ao_, r), first_) for r in range(rows)]
            _multiply(
                to, count_, [to.at(out_, row_of(oi_, oo_, r), oj_) for r in range(rows)], vectors,
                lambda c: to.at(x_, builder.add(xi_, c), xj_), None, lambda c, base, r: builder.gep(lefts[r], [c]),
                to.first(columns_) if part else None,
            )  # fmt: skip
            return context.get_dummy_value()

        whole = types.intp
        return types.void(a, ai, whole, whole, whole, x, whole, whole, out, oi, whole, whole, whole), generate

    return rank


@emitted
def _prefetch(typing: Any, a: Any, row: Any, column: Any) -> Any:
    """Asks for the cache line of a[row, column], a C-contiguous; nothing waits for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to = Vectors(context, builder, a.dtype)
        at = to.at(*to.arrays(signature, arguments, 0), arguments[1], arguments[2])
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), number, number, number])
        ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        at = builder.bitcast(at, ir.IntType(8).as_pointer())
        builder.call(ask, [at, ir.Constant(number, 0), ir.Constant(number, 3), ir.Constant(number, 1)])
        return context.get_dummy_value()

    return types.void(a, types.intp, types.intp), generate


def _swapped(to: Vectors, a: Any, b: Any, run: int) -> tuple[Any, Any]:
    """Of two vectors, runs of `run` numbers: those of even number of both, and those of odd number, in turn."""
    low = [i if not i & run else to.width + i - run for i in range(to.width)]
    high = [i + run if not i & run else to.width + i for i in range(to.width)]
    return to.shuffled(a, b, low), to.shuffled(a, b, high)


@emitted
def _turn_square(typing: Any, a: Any, row: Any, column: Any, out: Any, into: Any, at: Any) -> Any:
    """out[into + j, at + i] = a[row + i, column + j] for i and j below a vector's numbers: a square transposed in
    registers, runs of 1, 2, 4, ... numbers changing places in turn."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to = Vectors(context, builder, a.dtype)
        _, row_, column_, _, into_, at_ = arguments
        a_, out_ = to.arrays(signature, arguments, 0, 3)
        lines = [to.load(to.at(a_, builder.add(row_, to.number(i)), column_)) for i in range(to.width)]
        run = 1
        while run < to.width:
            for i in range(to.width):
                if not i & run:
                    lines[i], lines[i + run] = _swapped(to, lines[i], lines[i + run], run)
            run *= 2
        for j, line in enumerate(lines):
            to.store(line, to.at(out_, builder.add(into_, to.number(j)), at_))
        return context.get_dummy_value()

    return types.void(a, types.intp, types.intp, out, types.intp, types.intp), generate


@emitted
def _dots_of_rows(typing: Any, a: Any, row: Any, count: Any, x: Any, xi: Any, out: Any, oi: Any, oj: Any) -> Any:
    """out[oi, oj + i] = sum over c below count of a[row + i, c] * x[xi, c], for i below a vector's numbers; count a
    multiple of them. Sums of products along the rows, added up across: a transposition and its sums in one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to = Vectors(context, builder, x.dtype)
        _, row_, count_, _, xi_, _, oi_, oj_ = arguments
        a_, x_, out_ = to.arrays(signature, arguments, 0, 3, 5)
        starts = [to.at(a_, builder.add(row_, to.number(i)), to.number(0)) for i in range(to.width)]
        right = to.at(x_, xi_, to.number(0))
        sums = [to.variable(to.constant(0.0)) for _ in starts]
        with to.each_vector(count_) as c:
            factor = to.load(builder.gep(right, [c]))
            for start, one in zip(starts, sums, strict=True):
                to.set(one, to.fma(to.load(builder.gep(start, [c])), factor, to.get(one)))
        lines, run = [to.get(one) for one in sums], 1
        while len(lines) > 1:
            lines = [to.add(*_swapped(to, lines[i], lines[i + 1], run)) for i in range(0, len(lines), 2)]
            run *= 2
        to.store(lines[0], to.at(out_, oi_, oj_))
        return context.get_dummy_value()

    return types.void(a, types.intp, types.intp, x, types.intp, out, types.intp, types.intp), generate


_dots, _dots_rest = _block(ROWS, _ACROSS, False), _block(ROWS, 1, False)
_mix, _mix_rest = _block(ROWS, _ACROSS, True), _block(ROWS, 1, True)
_mix_row = _block(1, 1, True)


@compiled
def dots(a: Array, index: Array, start: int, stop: int, first: int, dim: int, x: Array, out: Array) -> None:
    """out[i] = sum over c below dim of a[index[i], first + c] * x[c], i from start to stop, a multiple of ROWS apart.

    a (n, w), index (m,) int64, x (dim, g), out (m, g); g a multiple of `lanes`.
    """
    width = x.shape[1]
    vector = VECTOR // x.itemsize
    step = _ACROSS * vector
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
    step = _ACROSS * vector
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


def _products(rows: int, along: int = _ALONG) -> Any:
    """See add_products: for so many rows at a time, and vectors of a row where there are as many."""
    rank_along, rank_one, rank_part = _rank(rows, along), _rank(rows, 1), _rank(rows, 1, part=True)

    @inlined
    def products(
        a: Array, ai: Array, ao: int, first: int, count: int, x: Array, xi: int, xj: int, out: Array, oi: Array,
        oo: int, oj: int, columns: int,
    ) -> None:  # fmt: skip
        vector = VECTOR // x.itemsize
        j = 0
        while j + along * vector <= columns:
            rank_along(a, ai, ao, first, count, x, xi, xj + j, out, oi, oo, oj + j, 0)
            j += along * vector
        while j + vector <= columns:
            rank_one(a, ai, ao, first, count, x, xi, xj + j, out, oi, oo, oj + j, 0)
            j += vector
        if j < columns:
            rank_part(a, ai, ao, first, count, x, xi, xj + j, out, oi, oo, oj + j, columns - j)

    return products


# out[oi[oo + r], oj + j] += sum over c below count of a[ai[ao + r], first + c] * x[xi + c, xj + j], for r below ROWS,
# one, or TALL, and j below columns. ai and oi are whole numbers; the rows of out differ.
add_products, add_product, add_tall_products = _products(ROWS), _products(1), _products(TALL, 1)


@inlined
def turn(a: Array, first: int, count: int, column: int, columns: int, out: Array) -> None:
    """out[c, i] = a[first + i, column + c] for i below count and c below columns; out (columns, at least count)."""
    vector = VECTOR // a.itemsize
    rows, wide = count // vector * vector, columns // vector * vector
    for i in range(0, rows, vector):
        for c in range(0, wide, vector):
            _turn_square(a, first + i, column + c, out, c, i)
    for i in range(count):
        for c in range(wide if i < rows else 0, columns):
            out[c, i] = a[first + i, column + c]


@inlined
def dots_of_rows(a: Array, first: int, count: int, dim: int, x: Array, row: int, out: Array, into: int) -> None:
    """out[into, i] = sum over c below dim of a[first + i, c] * x[row, c], i below count; count and dim multiples of a
    vector's numbers."""
    for i in range(0, count, VECTOR // x.itemsize):
        _dots_of_rows(a, first + i, dim, x, row, out, into, i)


@inlined
def fetch(a: Array, first: int, count: int) -> None:
    """Asks for rows of a, which will be needed."""
    for i in range(first, first + count):
        for c in range(0, a.shape[1], VECTOR // a.itemsize):
            _prefetch(a, i, c)
