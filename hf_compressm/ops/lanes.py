"""Vectors of 16 numbers in Numba kernels: their operations are vector instructions, whatever LLVM can prove.

LLVM splits a vector into the registers of the machine. Addresses are integers, in bytes, so a kernel is compiled once
per precision and not once per layout of its tensors; the caller of a kernel must keep the tensors alive. `like` is a
scalar, float32 or float64, that sets the precision. Vectors have the shape (16,).

This module uses internals of Numba; `tests/ops/test_lanes.py` names them.

Source: Muller, Elementary Functions, 3rd edition 2016, for exp2 by a polynomial through Chebyshev points.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16
FLAGS = ("contract", "nsz", "arcp")
"""Products and sums may fuse. Their order stays, which `exp2` needs; NaN and infinity keep their meaning."""
LOG2E = math.log2(math.e)
LN2 = math.log(2)


class LanesType(types.Type):
    """Type of a vector of `LANES` numbers, float32 or float64."""

    def __init__(self, dtype: types.Float):
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: LanesType):
        super().__init__(dmm, fe_type, ir.VectorType(_scalar(fe_type.dtype), LANES))


def _scalar(dtype: types.Float) -> ir.Type:
    return ir.FloatType() if dtype == types.float32 else ir.DoubleType()


def _constant(value: float, kind: ir.Type) -> ir.Constant:
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [_constant(value, kind.element)] * LANES)
    return ir.Constant(kind, float(np.float32(value)) if kind == ir.FloatType() else value)


def _splat(builder: Any, value: Any) -> Any:
    vector = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


def _pointer(builder: Any, address: Any, kind: ir.Type) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _arithmetic(operation: Callable, instruction: str) -> None:
    @infer_global(operation)
    class Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and any(isinstance(arg, LanesType) for arg in args):
                kind = next(arg for arg in args if isinstance(arg, LanesType))
                # A scalar operand takes the vector's precision.
                return signature(kind, *(arg if isinstance(arg, LanesType) else kind.dtype for arg in args))

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vectors = [a if isinstance(k, LanesType) else _splat(builder, a) for a, k in zip(args, sig.args, strict=True)]
        return getattr(builder, instruction)(*vectors, flags=FLAGS)

    for operands in ((LanesType, LanesType), (LanesType, types.Float), (types.Float, LanesType)):
        lower_builtin(operation, *operands)(lower)


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")


@intrinsic
def bytes_of(typingctx: Any, like: Any) -> Any:
    """Bytes of a number: 4 or 8."""
    return types.int64(like), lambda context, builder, sig, args: ir.Constant(ir.IntType(64), like.bitwidth // 8)


@intrinsic
def read(typingctx: Any, address: Any, like: Any) -> Any:
    """Read the number at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0], _scalar(like)))

    return like(types.int64, like), codegen


@intrinsic
def load(typingctx: Any, address: Any, like: Any) -> Any:
    """Read the vector (16,) at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        loaded = builder.load(_pointer(builder, args[0], ir.VectorType(_scalar(like), LANES)))
        loaded.align = like.bitwidth // 8
        return loaded

    return LanesType(like)(types.int64, like), codegen


@intrinsic
def store(typingctx: Any, address: Any, value: Any) -> Any:
    """Write a vector (16,) to an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        stored = builder.store(args[1], _pointer(builder, args[0], args[1].type))
        stored.align = value.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(types.int64, value), codegen


@intrinsic
def gather(typingctx: Any, address: Any, stride: Any, count: Any, like: Any) -> Any:
    """Read `count` numbers, 1 <= count <= 16, that lie `stride` bytes apart; the vector's other places are zero."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind, index = _scalar(like), ir.IntType(64)
        vector = _constant(0.0, ir.VectorType(kind, LANES))
        last = builder.sub(args[2], ir.Constant(index, 1))
        for place in range(LANES):
            wanted = ir.Constant(index, place)
            within = builder.icmp_signed("<=", wanted, last)
            # Beyond the last place, the last one is read once more: no address is out of bounds.
            where = builder.add(args[0], builder.mul(builder.select(within, wanted, last), args[1]))
            value = builder.select(within, builder.load(_pointer(builder, where, kind)), _constant(0.0, kind))
            vector = builder.insert_element(vector, value, ir.Constant(ir.IntType(32), place))
        return vector

    return LanesType(like)(types.int64, types.int64, types.int64, like), codegen


@intrinsic
def scatter(typingctx: Any, address: Any, stride: Any, count: Any, value: Any) -> Any:
    """Write the first `count` places of a vector, `stride` bytes apart."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        with cgutils.for_range(builder, args[2]) as loop:
            number = builder.extract_element(args[3], loop.index)
            where = builder.add(args[0], builder.mul(loop.index, args[1]))
            builder.store(number, _pointer(builder, where, number.type))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, value), codegen


@intrinsic
def where_less(typingctx: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
    """`yes` in places where a < b, else `no`, also where a or b is NaN."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1], flags=("nsz",)), args[2], args[3])

    return a(a, a, a, a), codegen


@intrinsic
def add_sums(typingctx: Any, address: Any, a: Any, b: Any) -> Any:
    """Add the sum of the places of a, and the sum of those of b, to the two numbers at an address."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def folded(left: Any, right: Any, side: int) -> Any:
            """Sums of the halves of two neighbours, `side` places wide, over the length of left and right together."""
            first = [start + place for start in (0, side) for place in range(side // 2)]
            parts = []
            for places in (first, [place + side // 2 for place in first]):
                chosen = ir.Constant(ir.VectorType(ir.IntType(32), side), places)
                parts.append(builder.shuffle_vector(left, right, chosen))
            return builder.fadd(*parts, flags=FLAGS)

        both = folded(args[1], args[2], LANES)
        for side in (LANES // 2, LANES // 4, LANES // 8):
            both = folded(both, both, side)
        pointer = _pointer(builder, args[0], both.type)
        old = builder.load(pointer)
        old.align = a.dtype.bitwidth // 8
        stored = builder.store(builder.fadd(old, both, flags=FLAGS), pointer)
        stored.align = old.align
        return context.get_dummy_value()

    return types.void(types.int64, a, a), codegen


def _series(builder: Any, x: Any, coefficients: Any) -> Any:
    total = _constant(coefficients[-1], x.type)
    for coefficient in reversed(coefficients[:-1]):
        total = builder.fadd(builder.fmul(total, x, flags=FLAGS), _constant(coefficient, x.type), flags=FLAGS)
    return total


def _chebyshev(function: Callable, degree: int, span: tuple[float, float]) -> list[float]:
    fit = np.polynomial.Chebyshev.interpolate(function, degree, span)
    return fit.convert(kind=np.polynomial.Polynomial).coef.tolist()


_EXP2 = {
    degree: _chebyshev(
        lambda f: np.expm1(f * LN2) / np.where(f == 0, 1, f) + np.where(f == 0, LN2, 0), degree, (-0.5, 0.5)
    )
    for degree in (5, 12)
}
_ATANH = {terms: [2 / (2 * k + 1) for k in range(terms)] for terms in (8, 17)}


@intrinsic
def exp2(typingctx: Any, x: Any) -> Any:
    """2^x with an error of one or two units in the last place; x is clamped to the exponents of normal numbers."""
    single = x.dtype == types.float32
    bits, mantissa, bias, lowest, highest = (32, 23, 127, -126, 127) if single else (64, 52, 1023, -1022, 1023)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind, whole = args[0].type, ir.VectorType(ir.IntType(bits), LANES)
        x = args[0]
        for sign, bound in (("<", lowest), (">", highest)):
            limit = _constant(bound, kind)
            x = builder.select(builder.fcmp_ordered(sign, x, limit, flags=("nsz",)), limit, x)
        # Adding 1.5 * 2^mantissa rounds to a whole number, which stands in the last bits: 2^x = 2^k (1 + f q(f)).
        magic = _constant(1.5 * 2.0**mantissa, kind)
        shifted = builder.fadd(x, magic, flags=FLAGS)
        f = builder.fsub(x, builder.fsub(shifted, magic, flags=FLAGS), flags=FLAGS)
        exponent = builder.shl(builder.bitcast(shifted, whole), ir.Constant(whole, [mantissa] * LANES))
        scale = builder.bitcast(builder.add(exponent, ir.Constant(whole, [bias << mantissa] * LANES)), kind)
        scaled = builder.fmul(scale, f, flags=FLAGS)
        q = _series(builder, f, _EXP2[5 if single else 12])
        return builder.fadd(builder.fmul(scaled, q, flags=FLAGS), scale, flags=FLAGS)

    return x(x), codegen


@intrinsic
def log1p(typingctx: Any, x: Any) -> Any:
    """log(1 + x) for 0 <= x <= 1, with small relative error: 2 artanh(x / (2 + x))."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        s = builder.fdiv(args[0], builder.fadd(args[0], _constant(2.0, args[0].type), flags=FLAGS), flags=FLAGS)
        square = builder.fmul(s, s, flags=FLAGS)
        return builder.fmul(s, _series(builder, square, _ATANH[8 if x.dtype == types.float32 else 17]), flags=FLAGS)

    return x(x), codegen


@intrinsic
def full(typingctx: Any, like: Any, value: Any) -> Any:
    """A vector with one value in all places, in the precision of `like`, a scalar or a vector."""
    kind = like if isinstance(like, LanesType) else LanesType(like)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, context.cast(builder, args[1], value, kind.dtype))

    return kind(like, value), codegen


@njit(inline="always")
def sigmoid(x):
    """1 / (1 + exp(-x)), between 0 and 1."""
    zero, one = full(x, 0.0), full(x, 1.0)
    small = exp2(where_less(x, zero, x, zero - x) * LOG2E)
    return where_less(x, zero, small, one) / (small + one)


@njit(inline="always")
def softplus(x):
    """log(1 + exp(x)), > 0; x itself for x > 20, as in PyTorch."""
    zero = full(x, 0.0)
    small = exp2(where_less(x, zero, x, zero - x) * LOG2E)
    value = where_less(x, zero, zero, x) + log1p(small)
    return where_less(full(x, 20.0), x, x, value)


@njit(inline="always")
def softplus_slope(x):
    """Derivative of `softplus`, between 0 and 1."""
    return where_less(full(x, 20.0), x, full(x, 1.0), sigmoid(x))
