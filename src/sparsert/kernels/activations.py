"""Activation functions as straight-line float32 vector programs, written once for every instruction set.

A program is a function ``(v, x, *parameters) -> y`` over the small vocabulary :class:`Vocabulary`; a code generator
emits instructions from it, the tests evaluate it with NumPy.  No branches, no tables, no gathers, at most one
division, at most four temporaries beside ``x``.

**The exponential.**  exp(-Y) = 2^n * exp(-(Y + n ln 2)) with n = round(-Y / ln 2): the reduction of Cody and Waite
(*Software Manual for the Elementary Functions*, 1980, ch. 6), here in three instructions:

- ``t = magic - y / kappa`` rounds n into the low bits of the sum; the low nine bits of ``magic`` are an exponent bias,
  so ``t << 23`` is a power of two without any conversion (``y`` only has to be near Y, it just chooses n);
- ``m = offset - t * kappa`` is exact, since ``kappa`` has at most 16 significant bits;
- ``r = m - f * g``, rounded once, where Y is proportional to the product ``f * g``.

``kappa`` stands for ln 2 in units in which the other constants are float32 numbers too.  The unit is free, so it was
searched for one in which their ratios hold to 2^-30 or better; the usual second step with the low part of ln 2 is not
needed.  ``offset`` differs from ``magic * kappa`` by a little; the polynomial for exp(r) is fitted on the
shifted interval.  The argument is clamped on the side where the exponent would wrap.

**The tails.**  x * sigmoid(Y) is x / (1 + exp(-Y)), and exp(-Y) exceeds float32 while the quotient is still a normal
number.  The denominator is therefore formed as ``c + c exp(-Y)`` with a small power of two ``c``, and the quotient is
multiplied by ``c``: one rounding even where the result is subnormal.  Where x is so large that the result is x to the
last bit, x itself is selected (exponent and quotient overflow there, harmlessly).

**Fitting.**  Coefficients are minimax: linear programs over 200 to 400 Chebyshev nodes in float64, each coefficient
rounded to float32 in turn, lowest degree first, with the rest fitted again and a beam over both neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedError, ValueRangeError

T = TypeVar("T")
Float64Array = NDArray[np.float64]


class Vocabulary(Protocol[T]):
    """Lane-wise float32 operations on opaque values of type ``T``; every operation rounds once, to nearest even."""

    def const(self, value: float, /) -> T: ...
    def bits(self, pattern: int, /) -> T: ...
    def add(self, a: T, b: T, /) -> T: ...
    def sub(self, a: T, b: T, /) -> T: ...
    def mul(self, a: T, b: T, /) -> T: ...
    def div(self, a: T, b: T, /) -> T: ...
    def fma(self, a: T, b: T, c: T, /) -> T: ...  # a * b + c
    def fnma(self, a: T, b: T, c: T, /) -> T: ...  # c - a * b
    def min(self, a: T, b: T, /) -> T: ...  # b where unordered or equal
    def max(self, a: T, b: T, /) -> T: ...  # b where unordered or equal
    def bit_and(self, a: T, b: T, /) -> T: ...
    def bit_or(self, a: T, b: T, /) -> T: ...
    def bit_xor(self, a: T, b: T, /) -> T: ...
    def round(self, a: T, /) -> T: ...  # to an integer, nearest even, as a float
    def to_int(self, a: T, /) -> T: ...  # the same as a 32-bit lane; 0x80000000 where out of range
    def shl(self, a: T, count: int, /) -> T: ...  # 32-bit lanes
    def add_i(self, a: T, b: T, /) -> T: ...  # 32-bit lanes, wrapping
    def select_neg(self, s: T, a: T, b: T, /) -> T: ...  # a where the sign bit of s is set, else b


@dataclass(frozen=True)
class Activation:
    """An activation function in its two forms, and what is known about the first.

    ``function(v, x, *params)`` is the float32 program, ``reference(x, *params)`` the same in float64 on arrays.
    ``max_ulp`` bounds the error of the program in units in the last place of the correctly rounded float32 result
    for results of 2^-126 and above, measured on all float32 with 2^-10 <= |x| <= 100 and samples of the rest; smaller
    results are within 4 * 2^-149, or 0 where ``source`` says so.  ``source`` names the method.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Float64Array]
    max_ulp: float
    source: str
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clip:
    """min(hi, max(lo, x)).  The bounds may be infinite and are rounded to float32, as the input is.

    Raises:
        ValueRangeError: a bound is no number, or ``lo > hi``.
    """

    lo: float
    hi: float

    def __post_init__(self) -> None:
        try:
            with np.errstate(over="ignore"):
                lo, hi = float(np.float32(float(self.lo))), float(np.float32(float(self.hi)))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueRangeError(f"{self.lo!r} and {self.hi!r} are not two numbers", where="clip") from error
        if not lo <= hi:
            raise ValueRangeError(f"no value lies between {self.lo!r} and {self.hi!r}", where="clip",
                                  hint="Give the lower bound first; NaN is no bound.")  # fmt: skip
        object.__setattr__(self, "lo", lo)
        object.__setattr__(self, "hi", hi)


# ---- Programs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Exp:
    """Constants of one reduction (module docstring); ``poly`` is exp(r) in units of kappa, lowest degree first."""

    inverse: float  # about 1 / kappa, times whatever makes an argument of its y
    magic: float
    kappa: float
    offset: float
    poly: tuple[float, ...]

    def reduce(self, v: Vocabulary[T], y: T, f: T, g: T) -> tuple[T, T]:
        """``(r, s)``: exp(-Y) = poly(r) * s up to the bias that ``magic`` gives the power of two ``s``."""
        t = v.fnma(y, v.const(self.inverse), v.const(self.magic))
        r = v.fnma(f, g, v.fnma(t, v.const(self.kappa), v.const(self.offset)))
        return r, v.shl(t, 23)


_SILU_UNIT = 1.000570297241211
_SILU_SCALE = 2.0**-65
_SILU = _Exp(1.44269502, 9437246.0, 0.69354248046875, 6545131.0,
             (0.999634087, 0.999064028, 0.499238163, 0.166329771, 0.0417925119, 0.00827050302))  # fmt: skip

_GELU_TANH_C1, _GELU_TANH_C2 = 1.9195489883422852, 0.0858326330780983
_GELU_TANH_SCALE = 2.0**-63
_GELU_TANH = _Exp(1.19934845, 9456704.0, 0.8337860107421875, 7884867.5,
                  (1.00243855, 0.83335191, 0.346386075, 0.0959951952, 0.0200661439, 0.00329370168))  # fmt: skip

_GELU_H = (1.0996164083480835, 0.23656654357910156)
_GELU_ETA = (-1.28159833, 0.080238089, 0.0218996629, -0.0025416133, -0.000907305221, -7.47596496e-05, 0.00015400775,
             -3.51788512e-05, 2.6694695e-06)  # fmt: skip
_GELU = _Exp(0.721349001, 12530304.0, 1.38629150390625, 17370654.0,
             (0.271701366, 0.135850981, 0.0339628048, 0.00566026848, 0.000707564177, 7.13231857e-05,
              5.92849528e-06))  # fmt: skip


def _horner(v: Vocabulary[T], x: T, coefficients: Sequence[float]) -> T:
    *rest, second, first = coefficients
    p = v.fma(x, v.const(first), v.const(second))
    for c in reversed(rest):
        p = v.fma(p, x, v.const(c))
    return p


def _relu(v: Vocabulary[T], x: T) -> T:
    return v.max(v.const(0.0), x)


def _clip(v: Vocabulary[T], x: T, lo: float, hi: float) -> T:
    if lo > -math.inf:
        x = v.max(v.const(lo), x)
    return v.min(v.const(hi), x) if hi < math.inf else x


def _hardswish(v: Vocabulary[T], x: T) -> T:
    # Clamping x instead of x + 3 from below costs the same and makes the result 0, not NaN, at -inf; dividing before
    # the product keeps the largest x finite.
    x = v.max(v.const(-3.0), x)
    gate = v.min(v.const(6.0), v.add(x, v.const(3.0)))
    return v.mul(v.mul(gate, v.const(1 / 6)), x)


def _gated(v: Vocabulary[T], x: T, p: T, s: T, scale: float, top: float) -> T:
    """x / (1 + p * s / scale) for x below ``top``, else x."""
    y = v.mul(v.div(x, v.fma(p, s, v.const(scale))), v.const(scale))
    return v.select_neg(v.sub(x, v.const(top)), y, x)


def _silu(v: Vocabulary[T], x: T) -> T:
    x = v.max(v.const(-110.0), x)  # the result at -110 rounds to -0
    r, s = _SILU.reduce(v, x, x, v.const(_SILU_UNIT))
    return _gated(v, x, _horner(v, r, _SILU.poly), s, _SILU_SCALE, 24.0)


def _sigmoid(v: Vocabulary[T], x: T) -> T:
    x = v.min(v.const(24.0), v.max(v.const(-110.0), x))
    r, s = _SILU.reduce(v, x, x, v.const(_SILU_UNIT))
    return v.div(v.const(_SILU_SCALE), v.fma(_horner(v, r, _SILU.poly), s, v.const(_SILU_SCALE)))


def _gelu_tanh(v: Vocabulary[T], x: T) -> T:
    # 2u = x * w with w = c1 + c2 x^2 reaches 90, so w needs 32 bits: what the roundings of x^2 and of w lose is
    # computed exactly (c1 is a multiple of the last place of every w, so w - c1 is exact) and added to r.
    c1, c2 = v.const(_GELU_TANH_C1), v.const(_GELU_TANH_C2)
    x = v.max(v.const(-11.0), x)  # the result at -11 rounds to -0
    square = v.mul(x, x)
    w = v.fma(square, c2, c1)
    excess = v.fnma(square, c2, v.sub(w, c1))
    excess = v.fma(v.fnma(x, x, square), c2, excess)
    r, s = _GELU_TANH.reduce(v, v.mul(x, w), x, w)
    r = v.fma(x, excess, r)
    return _gated(v, x, _horner(v, r, _GELU_TANH.poly), s, _GELU_TANH_SCALE, 6.0)


def _gelu(v: Vocabulary[T], x: T) -> T:
    # x Phi(x) = max(0, x) - a Q(a) with a = |x| and Q the upper tail of the normal distribution.
    #   a Q(a) = h exp(k (h eta(h) - a^2) + const),  h = a / (g0 + g1 a),  k = ln 2 / kappa, about 1/2.
    # The slowly varying factor of Q lives in the exponent, where it costs neither a product nor the relative error of
    # one; h is scaled so that h eta(h) is about -h, which makes a^2 + h good enough to choose n. a^2 enters the
    # exponent through one fused operation, hence unrounded. That kappa is not quite 2 ln 2 is made up for by eta, which
    # is fitted to the rest: h eta(h) = ln(a Q(a) / h) / k + a^2, less its value at 0. The bias of the exponent is one
    # more than 127, made up for in the polynomial, so that nothing above 2^-126 is lost at the far end.
    a = v.min(v.const(13.18), v.bit_and(x, v.bits(0x7FFFFFFF)))
    h = v.div(a, v.fma(a, v.const(_GELU_H[1]), v.const(_GELU_H[0])))
    r, s = _GELU.reduce(v, v.fma(a, a, h), a, a)
    r = v.fma(_horner(v, h, _GELU_ETA), h, r)
    tail = v.mul(_horner(v, r, _GELU.poly), h)
    return v.fnma(tail, s, v.max(v.const(0.0), x))


_TANH_UNIT = 2.5273139476776123
_TANH = _Exp(2.88539004, 12582912.0, 0.8759002685546875, 11021376.0,
             (0.791354001, 0.313120574, 0.0825957879, 0.0163408425, 0.00259657134, 0.000341304723))  # fmt: skip


def _tanh(v: Vocabulary[T], x: T) -> T:
    # tanh x = e / (e + 2) with e = exp(2x) - 1 = 2^n r q(r) + (2^n - 1), which does not cancel near 0; this needs an
    # r without shift, so the bias of the exponent is added separately.
    x = v.min(v.const(9.5), v.max(v.const(-9.5), x))
    t = v.fma(x, v.const(_TANH.inverse), v.const(_TANH.magic))
    r = v.fma(x, v.const(_TANH_UNIT), v.fnma(t, v.const(_TANH.kappa), v.const(_TANH.offset)))
    s = v.add_i(v.shl(t, 23), v.const(1.0))
    e = v.mul(_horner(v, r, _TANH.poly), r)
    e = v.fma(e, s, v.sub(s, v.const(1.0)))
    return v.div(e, v.add(e, v.const(2.0)))


# ---- References in float64 ---------------------------------------------------------------------------------------

_FAR = -1000.0  # below it every function that vanishes at -inf is 0 even in float64

_erfc: Any = np.frompyfunc(math.erfc, 1, 1)


def _reference_clip(x: Float64Array, lo: float, hi: float) -> Float64Array:
    return np.minimum(np.maximum(x, lo), hi)


def _reference_hardswish(x: Float64Array) -> Float64Array:
    x = np.maximum(x, -3.0)
    return x * (np.minimum(x + 3.0, 6.0) / 6.0)


def _reference_sigmoid(x: Float64Array) -> Float64Array:
    with np.errstate(under="ignore"):
        e = np.exp(-np.abs(x))
        return np.where(x < 0, e, 1.0) / (1.0 + e)


def _reference_silu(x: Float64Array) -> Float64Array:
    x = np.maximum(x, _FAR)
    return x * _reference_sigmoid(x)


def _reference_gelu(x: Float64Array) -> Float64Array:
    x = np.maximum(x, _FAR)
    return 0.5 * x * np.asarray(_erfc(x * -math.sqrt(0.5)), np.float64)


def _reference_gelu_tanh(x: Float64Array) -> Float64Array:
    x = np.maximum(x, _FAR)
    with np.errstate(over="ignore"):
        return x * _reference_sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))


# ---- The table ---------------------------------------------------------------------------------------------------

_REDUCTION = "exp by a Cody-Waite reduction in scaled units"

ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("relu", _relu, lambda x: np.maximum(x, 0.0), 0.0, "exact; a zero keeps its sign"),
        Activation("clip", _clip, _reference_clip, 0.0, "exact; a value equal to a bound stays", ("lo", "hi")),
        Activation("hardswish", _hardswish, _reference_hardswish, 2.5,
                   "x * (clip(x + 3, 0, 6) * (1/6)); x + 3 is exact where it is small (Sterbenz)"),
        Activation("silu", _silu, _reference_silu, 3.5, f"x / (1 + exp(-x)); {_REDUCTION}, polynomial of degree 5"),
        Activation("gelu", _gelu, _reference_gelu, 3.5,
                   "max(0, x) - |x| Q(|x|), the slow factor of Q as a polynomial of degree 9 in |x| / (g0 + g1 |x|) "
                   f"inside the exponent; {_REDUCTION}, degree 6; tails under 2^-126 become 0"),
        Activation("gelu_tanh", _gelu_tanh, _reference_gelu_tanh, 3.4,
                   "x / (1 + exp(-2u)), 2u = sqrt(8/pi) (x + 0.044715 x^3) with the rounding errors of its factors; "
                   f"{_REDUCTION}, degree 5"),
        Activation("sigmoid", _sigmoid, _reference_sigmoid, 3.4, f"1 / (1 + exp(-x)); {_REDUCTION}, degree 5"),
        Activation("tanh", _tanh, np.tanh, 3.8, f"e / (e + 2), e = exp(2x) - 1; {_REDUCTION}, degree 6"),
    )
}  # fmt: skip
"""All activation functions by name."""

_ALIASES = {"relu6": Clip(0.0, 6.0)}


def parse(spec: object) -> tuple[Activation | None, tuple[float, ...]]:
    """What an ``activation=`` argument means: the function and its parameters; ``(None, ())`` for None.

    Accepted are None, a name without parameters (also "relu6"), a :class:`Clip`, and ``("clip", lo, hi)``.

    Raises:
        UnsupportedError: no activation is meant.
        ValueRangeError: the bounds of a clip are none.
    """
    if spec is None:
        return None, ()
    if isinstance(spec, str):
        spec = _ALIASES.get(spec, spec)
    if isinstance(spec, tuple | list) and len(spec) == 3 and isinstance(spec[0], str) and spec[0] == "clip":
        spec = Clip(spec[1], spec[2])
    if isinstance(spec, Clip):
        return ACTIVATIONS["clip"], (spec.lo, spec.hi)
    if isinstance(spec, str) and spec in ACTIVATIONS and not ACTIVATIONS[spec].parameters:
        return ACTIVATIONS[spec], ()
    names = ", ".join([*(repr(name) for name, a in ACTIVATIONS.items() if not a.parameters), *map(repr, _ALIASES)])
    raise UnsupportedError(f"unknown activation {spec!r}", where="activation",
                           hint=f"Known: None, {names}, ('clip', lo, hi), Clip(lo, hi).")  # fmt: skip
