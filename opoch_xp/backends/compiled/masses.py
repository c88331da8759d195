"""A level's masses, row by row: the law of few keys, weights, and what passes a cut; in vectors of queries.

Arrays are (m, g), nodes by queries; g is a multiple of a vector's numbers. Every function goes through one row.
"""

from typing import Any

from llvmlite import ir
from numba import types

from opoch_xp.backends.compiled.vector import Vectors, emitted
from opoch_xp.treecode.law import DEVIATIONS, SMALLEST

LARGEST = 1e20  # weight relative to the maximum that was estimated, far within float32
LOG, GAIN, WIDTH, SLOPE, KNEE, SHARE = range(6)  # places in a table of the law's coefficients: see treecode.law


@emitted
def law(typing: Any, mass: Any, may: Any, i: Any, table: Any, top: Any) -> Any:
    """mass[i] and may[i], of a node's mean and variance, become its log mass and the log of what it may hold; top (g,)
    is raised to the mass. table (6,): the coefficients of opoch_xp.treecode.law."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, i_ = Vectors(context, builder, mass.dtype), arguments[2]
        mass_, may_, table_, top_ = to.arrays(signature, arguments, 0, 1, 3, 4)
        log, gain, width, slope, knee, share = (
            to.spread(builder.load(to.at(table_, to.number(place)))) for place in range(6)
        )
        one, least = to.constant(1.0), to.constant(SMALLEST)
        with to.each_vector(builder.extract_value(mass_.shape, 1)) as j:
            row, more, highest = to.at(mass_, i_, j), to.at(may_, i_, j), to.at(top_, j)
            sigma2 = to.load(more)
            root = to.sqrt(to.fma(sigma2, width, one))
            l = to.fma(gain, to.sub(root, one), to.add(to.load(row), log))
            square = to.div(to.mul(sigma2, to.fma(slope, sigma2, share)), to.add(sigma2, knee))
            alike = to.logarithm(to.larger(to.smaller(sigma2, one), least))
            most = to.fma(to.constant(DEVIATIONS), to.sqrt(square), to.fma(to.constant(0.5), alike, l))
            to.store(l, row)
            to.store(most, more)
            to.store(to.larger(to.load(highest), l), highest)
        return context.get_dummy_value()

    return types.void(mass, may, types.intp, table, top), generate


@emitted
def weigh(typing: Any, mass: Any, i: Any, shift: Any, whole: Any) -> Any:
    """mass[i] becomes exp(mass[i] - shift), which is added to whole; both (g,). Returns its largest number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, i_ = Vectors(context, builder, mass.dtype), arguments[1]
        mass_, shift_, whole_ = to.arrays(signature, arguments, 0, 2, 3)
        heavy = to.variable(to.constant(0.0))
        with to.each_vector(builder.extract_value(mass_.shape, 1)) as j:
            row, total = to.at(mass_, i_, j), to.at(whole_, j)
            weight = to.exponential(to.sub(to.load(row), to.load(to.at(shift_, j))))
            to.store(weight, row)
            to.store(to.add(to.load(total), weight), total)
            to.set(heavy, to.larger(to.get(heavy), weight))
        return to.largest(to.get(heavy))

    return mass.dtype(mass, types.intp, shift, whole), generate


@emitted
def weigh_keys(typing: Any, logits: Any, r: Any, shift: Any, weights: Any) -> Any:
    """weights[r] = exp(logits[r] - shift), of as many numbers; whether one reaches LARGEST, or is no number. shift: a
    number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, r_ = Vectors(context, builder, logits.dtype), arguments[1]
        logits_, weights_ = to.arrays(signature, arguments, 0, 3)
        shift_, large = to.spread(arguments[2]), to.variable(ir.Constant(ir.IntType(1), 0))
        places = ir.IntType(to.width)
        with to.each_vector(builder.extract_value(logits_.shape, 1)) as j:
            weight = to.exponential(to.sub(to.load(to.at(logits_, r_, j)), shift_))
            to.store(weight, to.at(weights_, r_, j))
            found = builder.bitcast(builder.fcmp_unordered(">=", weight, to.constant(LARGEST)), places)
            to.set(large, builder.or_(to.get(large), builder.icmp_unsigned("!=", found, ir.Constant(places, 0))))
        return to.get(large)

    return types.boolean(logits, types.intp, logits.dtype, weights), generate


@emitted
def tally(typing: Any, weights: Any, r: Any, sums: Any, row: Any, column: Any) -> Any:
    """Adds the vectors of weights[r] to that of sums[row] from `column` on: their sum, place by place."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, (_, r_, _, row_, column_) = Vectors(context, builder, weights.dtype), arguments
        weights_, sums_ = to.arrays(signature, arguments, 0, 2)
        into = to.at(sums_, row_, column_)
        total = to.variable(to.load(into))
        with to.each_vector(builder.extract_value(weights_.shape, 1)) as j:
            to.set(total, to.add(to.get(total), to.load(to.at(weights_, r_, j))))
        to.store(to.get(total), into)
        return context.get_dummy_value()

    return types.void(weights, types.intp, sums, types.intp, types.intp), generate


@emitted
def hottest(typing: Any, may: Any, i: Any, cut: Any) -> Any:
    """By how much may[i] passes the cut (g,), where it does most; NaN counts for nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, i_ = Vectors(context, builder, may.dtype), arguments[1]
        may_, cut_ = to.arrays(signature, arguments, 0, 2)
        most = to.variable(to.constant(-float("inf")))
        with to.each_vector(builder.extract_value(may_.shape, 1)) as j:
            passed = to.sub(to.load(to.at(may_, i_, j)), to.load(to.at(cut_, j)))
            to.set(most, to.larger(passed, to.get(most)))
        return to.largest(to.get(most))

    return may.dtype(may, types.intp, cut), generate


@emitted
def above(typing: Any, may: Any, i: Any, j: Any, cut: Any) -> Any:
    """Which numbers of the vector may[i, j:] pass those of cut[j:], as the bits of a whole number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, (_, i_, j_, _) = Vectors(context, builder, may.dtype), arguments
        may_, cut_ = to.arrays(signature, arguments, 0, 3)
        passed = builder.fcmp_ordered(">", to.load(to.at(may_, i_, j_)), to.load(to.at(cut_, j_)))
        return builder.zext(builder.bitcast(passed, ir.IntType(to.width)), ir.IntType(64))

    return types.int64(may, types.intp, types.intp, cut), generate


@emitted
def keep(typing: Any, mass: Any, i: Any, into: Any, total: Any) -> Any:
    """Row i of `mass` becomes row `into`, and is added to total (g,)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, (_, i_, into_, _) = Vectors(context, builder, mass.dtype), arguments
        mass_, total_ = to.arrays(signature, arguments, 0, 3)
        with to.each_vector(builder.extract_value(mass_.shape, 1)) as j:
            row, whole = to.load(to.at(mass_, i_, j)), to.at(total_, j)
            to.store(row, to.at(mass_, into_, j))
            to.store(to.add(to.load(whole), row), whole)
        return context.get_dummy_value()

    return types.void(mass, types.intp, types.intp, total), generate


@emitted
def slopes(typing: Any, weight: Any, slope: Any, spread: Any, rest: Any, i: Any, table: Any) -> Any:
    """weight[i], P, and slope[i], dout . v, become dl = P (dout . v - rest) and its derivative by sigma^2, which is
    spread[i]; rest (g,). table (6,) as in `law`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, (_, _, _, _, i_, _) = Vectors(context, builder, weight.dtype), arguments
        weight_, slope_, spread_, rest_, table_ = to.arrays(signature, arguments, 0, 1, 2, 3, 5)
        gain, width = (to.spread(builder.load(to.at(table_, to.number(place)))) for place in (GAIN, WIDTH))
        one, half = to.constant(1.0), to.mul(to.constant(0.5), to.mul(gain, width))
        with to.each_vector(builder.extract_value(weight_.shape, 1)) as j:
            at, along = to.at(weight_, i_, j), to.at(slope_, i_, j)
            dl = to.mul(to.load(at), to.sub(to.load(along), to.load(to.at(rest_, j))))
            root = to.sqrt(to.fma(to.load(to.at(spread_, i_, j)), width, one))
            to.store(dl, at)
            to.store(to.mul(dl, to.div(half, root)), along)
        return context.get_dummy_value()

    return types.void(weight, slope, spread, rest, types.intp, table), generate


@emitted
def weigh_pairs(typing: Any, logits: Any, slope: Any, r: Any, whole: Any, rest: Any) -> Any:
    """logits[r] and slope[r], dout . v, become P = exp(logits - whole) and dl = P (dout . v - rest); whole and rest are
    numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, (_, _, r_, whole_, rest_) = Vectors(context, builder, logits.dtype), arguments
        logits_, slope_ = to.arrays(signature, arguments, 0, 1)
        whole_, rest_ = to.spread(whole_), to.spread(rest_)
        with to.each_vector(builder.extract_value(logits_.shape, 1)) as j:
            at, along = to.at(logits_, r_, j), to.at(slope_, r_, j)
            weight = to.exponential(to.sub(to.load(at), whole_))
            to.store(weight, at)
            to.store(to.mul(weight, to.sub(to.load(along), rest_)), along)
        return context.get_dummy_value()

    return types.void(logits, slope, types.intp, logits.dtype, logits.dtype), generate


@emitted
def weigh_against(typing: Any, logits: Any, slope: Any, i: Any, whole: Any, rest: Any) -> Any:
    """The same for a row of queries: whole and rest (g,)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, (_, _, i_, _, _) = Vectors(context, builder, logits.dtype), arguments
        logits_, slope_, whole_, rest_ = to.arrays(signature, arguments, 0, 1, 3, 4)
        with to.each_vector(builder.extract_value(logits_.shape, 1)) as j:
            at, along = to.at(logits_, i_, j), to.at(slope_, i_, j)
            weight = to.exponential(to.sub(to.load(at), to.load(to.at(whole_, j))))
            to.store(weight, at)
            to.store(to.mul(weight, to.sub(to.load(along), to.load(to.at(rest_, j)))), along)
        return context.get_dummy_value()

    return types.void(logits, slope, types.intp, whole, rest), generate
