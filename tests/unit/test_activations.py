"""Activation programs, evaluated with NumPy: accuracy against float64, special values, size, and the parser."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsert.errors import UnsupportedError, ValueRangeError
from sparsert.kernels import activations
from sparsert.kernels.activations import ACTIVATIONS, Activation, Clip, parse

F32 = NDArray[np.float32]
SMOOTH = ("hardswish", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh")
SELF_GATED = ("hardswish", "silu", "gelu", "gelu_tanh")  # x times something between 0 and 1
TINY = 2.0**-126


def _single(a: Any) -> F32:
    array = np.asarray(a)
    assert array.dtype == np.float32
    return array


def fma(a: Any, b: Any, c: Any) -> F32:
    """a * b + c rounded once. The product is exact in float64; the sum is rounded to odd there, which keeps enough for
    the second rounding to be the only one that counts (Boldo and Melquiond, IEEE Trans. Computers 57, 2008)."""
    product, c64 = np.broadcast_arrays(
        np.multiply(_single(a), _single(b), dtype=np.float64), _single(c).astype(np.float64)
    )
    total = np.array(product + c64, ndmin=1)
    part = total - product
    lost = (product - (total - part)) + (c64 - part)
    inexact = np.isfinite(lost) & (lost != 0) & np.isfinite(total)
    pattern = total.view(np.int64)
    pattern = np.where(inexact & (pattern % 2 == 0), pattern + np.where((lost > 0) == (total > 0), 1, -1), pattern)
    return pattern.view(np.float64).astype(np.float32).reshape(product.shape)


class NumpyVector:
    """The vocabulary on float32 arrays, with the semantics of x86 for min, max and NaN."""

    def const(self, value: float) -> F32:
        return np.array(value, np.float32)

    def bits(self, pattern: int) -> F32:
        return np.array(pattern, np.uint32).view(np.float32)

    def add(self, a: F32, b: F32) -> F32:
        return np.add(_single(a), _single(b), dtype=np.float32)

    def sub(self, a: F32, b: F32) -> F32:
        return np.subtract(_single(a), _single(b), dtype=np.float32)

    def mul(self, a: F32, b: F32) -> F32:
        return np.multiply(_single(a), _single(b), dtype=np.float32)

    def div(self, a: F32, b: F32) -> F32:
        return np.divide(_single(a), _single(b), dtype=np.float32)

    def fma(self, a: F32, b: F32, c: F32) -> F32:
        return fma(a, b, c)

    def fnma(self, a: F32, b: F32, c: F32) -> F32:
        return fma(-_single(a), b, c)

    def min(self, a: F32, b: F32) -> F32:
        return np.where(_single(a) < _single(b), a, b)

    def max(self, a: F32, b: F32) -> F32:
        return np.where(_single(a) > _single(b), a, b)

    def bit_and(self, a: F32, b: F32) -> F32:
        return np.bitwise_and(_single(a).view(np.int32), _single(b).view(np.int32)).view(np.float32)

    def shl(self, a: F32, count: int) -> F32:
        return np.left_shift(_single(a).view(np.int32), np.int32(count)).view(np.float32)

    def add_i(self, a: F32, b: F32) -> F32:
        return np.add(_single(a).view(np.int32), _single(b).view(np.int32)).view(np.float32)

    def select_neg(self, s: F32, a: F32, b: F32) -> F32:
        return np.where(np.signbit(_single(s)), _single(a), _single(b))


@dataclass(frozen=True)
class Node:
    """One recorded operation; a constant has no operands."""

    op: str
    operands: tuple[Node, ...] = ()


@dataclass
class Tracer:
    """The vocabulary as a recorder, for counting operations and what is alive."""

    nodes: list[Node] = field(default_factory=list)

    def __getattr__(self, op: str) -> Callable[..., Node]:
        def record(*operands: Any) -> Node:
            if op in ("const", "bits"):
                return Node(op)
            assert hasattr(activations.Vocabulary, op), op
            self.nodes.append(Node(op, tuple(o for o in operands if isinstance(o, Node))))
            return self.nodes[-1]

        return record


def size_of(activation: Activation, *parameters: float) -> tuple[int, int]:
    """Operations, and the most values (x among them, constants not) that are alive after any of them."""
    tracer = Tracer()
    x = Node("x")
    result = activation.function(tracer, x, *parameters)
    last = {id(result): len(tracer.nodes)}
    for i, node in enumerate(tracer.nodes):
        last.update({id(o): max(i, last.get(id(o), 0)) for o in node.operands if o.op not in ("const", "bits")})
    assert all(id(node) in last for node in tracer.nodes), "an operation without use"
    born = {id(x): -1, **{id(node): i for i, node in enumerate(tracer.nodes)}}
    peak = max(sum(born[n] <= i < last[n] for n in last) for i in range(len(tracer.nodes)))
    return len(tracer.nodes), peak


def run(name: str, x: Any, *parameters: float) -> F32:
    with np.errstate(all="ignore"):
        result: F32 = ACTIVATIONS[name].function(NumpyVector(), np.asarray(x, np.float32), *parameters)
    assert result.dtype == np.float32
    return result


def reference(name: str, x: Any, *parameters: float) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        result = ACTIVATIONS[name].reference(np.asarray(x, np.float32).astype(np.float64), *parameters)
    assert result.dtype == np.float64
    return result


def sample(n: int, seed: int = 0) -> F32:
    """float32 in [-100, 100]: a third evenly, a third evenly in [-15, 15], a third over all exponents and signs."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, int(np.float32(100).view(np.uint32)) + 1, n // 3, np.uint32)
    patterns |= rng.integers(0, 2, n // 3, np.uint32) << np.uint32(31)
    even = np.concatenate([rng.uniform(-100, 100, n // 3), rng.uniform(-15, 15, n // 3)]).astype(np.float32)
    return np.concatenate([even, patterns.view(np.float32)])


def ulps(y: F32, exact: NDArray[np.float64]) -> NDArray[np.float64]:
    """|y - exact| in units in the last place of exact, correctly rounded; in units of 2^-149 below 2^-126."""
    rounded = np.maximum(np.abs(exact.astype(np.float32)), np.float32(TINY))
    return np.abs(y - exact) / np.spacing(rounded).astype(np.float64)


def test_fma_of_the_tests_rounds_once() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(3000).astype(np.float32) for _ in range(2))
    near = (-a.astype(np.float64) * b).astype(np.float32)  # cancels
    half = (a * b * np.float32(2.0**24)).astype(np.float32)  # the product is about half a unit of the sum
    small = (rng.standard_normal(3000) * 1e-30).astype(np.float32)
    cases = [(a, b, near), (a, b, half), (a, b, small), (small, a, small * np.float32(1e-10)), (small, small, near)]
    for p, q, r in cases:
        for got, u, v, w in zip(fma(p, q, r), p, q, r, strict=True):
            exact = Fraction(float(u)) * Fraction(float(v)) + Fraction(float(w))
            below, above = np.nextafter(got, np.float32(-np.inf)), np.nextafter(got, np.float32(np.inf))
            error = abs(Fraction(float(got)) - exact)
            for other in (below, above):
                distance = abs(Fraction(float(other)) - exact)
                assert error < distance or (error == distance and int(got.view(np.int32)) % 2 == 0)
    # just under a tie: float64 alone would round to the tie, and then up
    p, q, r = np.float32(2.0**-12 * (1 + 2.0**-23)), np.float32(2.0**-12 * (1 - 2.0**-23)), np.float32(1 + 2.0**-23)
    assert np.float32(np.float64(p) * np.float64(q) + np.float64(r)) == np.float32(1 + 2.0**-22)
    assert fma(p, q, r) == r


@pytest.mark.parametrize("name", SMOOTH)
def test_accuracy(name: str) -> None:
    x = sample(1_000_000)
    y, exact = run(name, x), reference(name, x)
    error = ulps(y, exact)
    normal = np.abs(exact) >= TINY
    assert normal.sum() > 600_000
    assert error[normal].max() <= ACTIVATIONS[name].max_ulp <= 4.0
    histogram = np.histogram(error[normal], [0, 1, 2, 3, 4])[0] / normal.sum()
    assert histogram[0] >= 0.75
    assert histogram[2] + histogram[3] <= 0.02
    small = ~normal
    if name == "gelu":
        flushed = small & (x < -13)
        assert flushed.any()
        assert np.all((y[flushed] == 0) | (error[flushed] <= 4))
        small &= ~flushed
    assert error[small].max(initial=0) <= 4


@pytest.mark.parametrize("name", SMOOTH)
def test_accuracy_at_the_ends(name: str) -> None:
    """The far tails, where results leave the normal numbers, the smallest and the largest x."""
    tiny = (np.arange(1, 2**26, 997, dtype=np.uint32)).view(np.float32)
    huge = np.geomspace(100, 3.4e38, 60_001).astype(np.float32)
    wraps = np.linspace(100, 2000, 60_001, dtype=np.float32)  # where the exponent of an unclamped reduction wraps
    tails = (-np.linspace(9, 15, 60_001, dtype=np.float32), -np.linspace(86, 112, 60_001, dtype=np.float32))
    for x in (*tails, tiny, -tiny, huge, -huge, wraps, -wraps):
        y, exact = run(name, x), reference(name, x)
        error = ulps(y, exact)
        normal = np.abs(exact) >= TINY
        assert error[normal].max(initial=0) <= ACTIVATIONS[name].max_ulp
        dropped = (y == 0) & (x < -13) if name == "gelu" else np.zeros(x.shape, bool)
        assert error[~normal & ~dropped].max(initial=0) <= 4


@pytest.mark.parametrize("name", [*SMOOTH, "relu"])
def test_special_values(name: str) -> None:
    assert np.isnan(run(name, [np.nan, -np.nan])).all()
    assert np.isnan(reference(name, [np.nan])).all()
    top, bottom = run(name, [np.inf, -np.inf])
    limit_top, limit_bottom = {"sigmoid": (1, 0), "tanh": (1, -1)}.get(name, (np.inf, 0))
    assert (top, bottom) == (limit_top, limit_bottom)
    assert tuple(reference(name, [np.inf, -np.inf])) == (limit_top, limit_bottom)
    zeros = run(name, [0.0, -0.0])
    assert np.all(zeros == (0.5 if name == "sigmoid" else 0.0))
    if name in SELF_GATED:
        assert list(np.signbit(zeros)) == [False, True]
        large = np.float32([1e3, 1e10, 2.0**96, 2.0**97, 1e30, 1e38, np.finfo(np.float32).max])
        assert np.array_equal(run(name, large), large)
        assert np.array_equal(run(name, -large), np.zeros(large.size))


@pytest.mark.parametrize("name", SMOOTH)
def test_every_binade_of_the_exponent_reduction(name: str) -> None:
    """Reductions go wrong where n changes: both sides of every breakpoint of exp(-x), exp(2x) and exp(-x^2/2)."""
    n = np.arange(-160, 161) + 0.5
    points = np.concatenate([n * math.log(2), n * math.log(2) / 2, np.sign(n) * np.sqrt(np.abs(n) * 2 * math.log(2))])
    centre = points.astype(np.float32)
    x = (centre.view(np.int32)[:, None] + np.arange(-300, 301, dtype=np.int32)).astype(np.int32).view(np.float32)
    exact = reference(name, x)
    error = ulps(run(name, x), exact)
    assert error[np.abs(exact) >= TINY].max() <= ACTIVATIONS[name].max_ulp


def test_relu_and_clip() -> None:
    x = sample(30_000)
    assert np.array_equal(run("relu", x), np.maximum(x, 0))
    for lo, hi in ((0.0, 6.0), (-1.5, -1.25), (-math.inf, 2.0), (3.0, math.inf), (-math.inf, math.inf), (4.0, 4.0)):
        clipped = np.clip(x, np.float32(lo), np.float32(hi))
        assert np.array_equal(run("clip", x, lo, hi), clipped)
        assert np.array_equal(reference("clip", x, lo, hi), clipped)
        special = run("clip", [np.nan, np.inf, -np.inf], lo, hi)
        assert np.array_equal(special, np.float32([np.nan, hi, lo]), equal_nan=True)
        assert np.isnan(reference("clip", [np.nan], lo, hi)).all()


# x, then silu, gelu, gelu_tanh, sigmoid, tanh and hardswish of it, computed with forty digits
KNOWN = (
    (-13.0, -2.9384215872746468e-05, -7.9523137194148436e-38, -1.0511517767632533e-76, 2.2603242979035745e-06,
     -0.99999999998978182, 0.0),
    (-8.5, -0.0017291293134692554, -8.0576045988728206e-17, -1.0174447308598297e-24, 0.00020342697805520652,
     -0.99999991720124905, 0.0),
    (-3.0, -0.14227761953270034, -0.0040496940948902836, -0.0036373920817730188, 0.047425873177566781,
     -0.99505475368673045, 0.0),
    (-0.75, -0.24061597561845527, -0.16997051428265115, -0.1700394448343797, 0.32082130082460703,
     -0.63514895238728732, -0.28125),
    (1.25, 0.97162482646836393, 1.1179377829164309, 1.1177142029697146, 0.77729986117469115, 0.8482836399575129,
     0.88541666666666667),
    (4.0, 3.9280551601516338, 3.9998733150326675, 3.9999297540518076, 0.98201379003790844, 0.99932929973906704,
     4.0),
)  # fmt: skip


@pytest.mark.parametrize("row", KNOWN)
def test_references_against_known_values(row: tuple[float, ...]) -> None:
    names = ("silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "hardswish")
    for name, value in zip(names, row[1:], strict=True):
        assert reference(name, row[:1])[0] == pytest.approx(value, rel=1e-13, abs=0.0)


def test_references_take_any_shape() -> None:
    for name in SMOOTH:
        for shape in ((), (0, 3), (2, 3, 1)):
            assert ACTIVATIONS[name].reference(np.full(shape, -0.5)).shape == shape


# operations, values alive
SIZES = {"relu": (1, 1), "hardswish": (5, 2), "silu": (15, 4), "gelu": (27, 5), "gelu_tanh": (23, 5),
         "sigmoid": (13, 3), "tanh": (17, 3)}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_size(name: str) -> None:
    operations, alive = size_of(ACTIVATIONS[name])
    assert (operations, alive) == SIZES[name]
    assert alive <= 5, "x and four temporaries"


def test_clip_without_a_bound_spares_the_operation() -> None:
    clip = ACTIVATIONS["clip"]
    assert size_of(clip, 0.0, 6.0) == (2, 1)
    assert size_of(clip, -math.inf, 6.0) == (1, 1)
    assert size_of(clip, 0.0, math.inf) == (1, 1)


def test_reduction_constants() -> None:
    """What the reduction's exactness rests on: 16 bits of kappa, float32 constants, and ratios that hold to 2^-30."""
    ln2 = math.log(2)
    root = math.sqrt(8 / math.pi)
    tables = {
        "silu": (activations._SILU, activations._SILU_UNIT * ln2),
        "tanh": (activations._TANH, activations._TANH_UNIT / 2 * ln2),
        "gelu_tanh": (activations._GELU_TANH, activations._GELU_TANH_C1 / root * ln2),
        "gelu": (activations._GELU, activations._GELU.kappa),
    }
    for table, kappa in tables.values():
        assert table.kappa == pytest.approx(kappa, rel=2.0**-30, abs=0.0)
        assert (table.kappa / 2.0 ** (math.frexp(table.kappa)[1] - 16)).is_integer()
        assert 2**23 <= table.magic < 2**24
        for value in (table.magic, table.kappa, table.offset):
            assert float(np.float32(value)) == value
        assert abs(table.offset - table.magic * table.kappa) < 0.03
    ratio = activations._GELU_TANH_C2 / activations._GELU_TANH_C1
    assert ratio == pytest.approx(0.044715, rel=2.0**-30, abs=0.0)
    assert int(activations._SILU.magic) % 512 - 127 == math.log2(activations._SILU_SCALE)
    assert int(activations._GELU_TANH.magic) % 512 - 127 == math.log2(activations._GELU_TANH_SCALE)


def test_parse() -> None:
    assert parse(None) == (None, ())
    for name, activation in ACTIVATIONS.items():
        assert activation.name == name
        if not activation.parameters:
            assert parse(name) == (activation, ())
    clip = ACTIVATIONS["clip"]
    for spec in (Clip(0, 6), ("clip", 0, 6), ["clip", 0.0, 6.0], "relu6"):
        assert parse(spec) == (clip, (0.0, 6.0))
    assert parse(("clip", -np.inf, np.float32(0.1))) == (clip, (-math.inf, float(np.float32(0.1))))


@pytest.mark.parametrize(
    "spec", ["swish", "", "clip", "RELU", 3, ("clip",), ("clip", 1), ("relu", 0, 6), object(), math.exp]
)
def test_parse_names_what_is_known(spec: object) -> None:
    with pytest.raises(UnsupportedError) as caught:
        parse(spec)
    assert caught.value.where == "activation"
    for name in ("relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "Clip(lo, hi)"):
        assert name in caught.value.hint


@pytest.mark.parametrize(
    "bounds", [(1, 0), (math.nan, 1), (0, math.nan), ("a", 1), (None, 1), (0, [1, 2]), (1e-3, -1e-3)]
)
def test_clip_rejects(bounds: tuple[Any, Any]) -> None:
    with pytest.raises(ValueRangeError) as caught:
        Clip(*bounds)
    assert caught.value.where == "clip"
    with pytest.raises(ValueRangeError):
        parse(("clip", *bounds))


def test_clip_is_a_value() -> None:
    assert Clip(0, 6) == Clip(0.0, 6.0)
    assert hash(Clip(0, 6)) == hash(Clip(0.0, 6.0))
    assert Clip(0, 0.1).hi == float(np.float32(0.1))
    assert Clip(-1e300, 1e300) == Clip(-math.inf, math.inf)
    assert Clip(2, 2).lo == 2.0
    with pytest.raises(AttributeError):
        Clip(0, 1).lo = 2.0  # type: ignore[misc]
