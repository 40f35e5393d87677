"""What a layer should give: float64 over the stored entries alone, and how far float32 may lie from that."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsert import Clip
from sparsert.codegen.vector import Builder, Program
from sparsert.sparsity.pattern import SparseMatrix

_ARM = platform.machine() in ("aarch64", "arm64")
COMPILED = [
    pytest.param(name, marks=pytest.mark.isa(name))
    for name in (("aarch64-neon",) if _ARM else ("x86-avx512", "x86-avx2"))
]
EVERY_TARGET = [*COMPILED, "reference"]
"""For ``parametrize``: targets that this machine cannot execute skip."""

F64 = NDArray[np.float64]
OVERFLOW = 1e37  # sums of larger terms may overflow in float32 on the way, in an order that only the kernel knows
_TINY = 2.0**-149  # spacing of subnormal float32


class Expected(NamedTuple):
    """``y`` and how far a float32 result may be from it; where ``judged`` is false, anything goes (see OVERFLOW)."""

    y: F64
    bound: F64
    judged: NDArray[np.bool_]


def _erfc(x: F64) -> F64:
    from scipy.special import erfc

    return erfc(x)


def _sigmoid(x: F64) -> F64:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def _gated(gate: Callable[[F64], F64]) -> Callable[[F64], F64]:
    """x * gate(x), and its limit 0 where x is minus infinity."""
    return lambda x: np.where(x == -np.inf, 0.0, x * gate(x))


class Activation(NamedTuple):
    """A function, its largest slope, and what a result may be off by absolutely (tails that are flushed to zero)."""

    of: Callable[[F64], F64]
    slope: float
    absolute: float = 0.0


ACTIVATIONS = {
    None: Activation(lambda x: x, 1.0),
    "relu": Activation(lambda x: np.maximum(x, 0.0), 1.0),
    "relu6": Activation(lambda x: np.minimum(np.maximum(x, 0.0), 6.0), 1.0),
    "silu": Activation(_gated(_sigmoid), 1.1),
    "hardswish": Activation(_gated(lambda x: np.minimum(np.maximum(x + 3.0, 0.0), 6.0) / 6.0), 1.5),
    "gelu": Activation(_gated(lambda x: 0.5 * _erfc(-x / np.sqrt(2.0))), 1.13, 2.0**-126),
    "gelu_tanh": Activation(_gated(lambda x: _sigmoid(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), 1.13),
    "sigmoid": Activation(_sigmoid, 0.25),
    "tanh": Activation(np.tanh, 1.0),
}


def activation_of(spec: Any) -> Activation:
    """What an activation argument names."""
    if isinstance(spec, Clip):
        return Activation(lambda x: np.minimum(np.maximum(x, spec.lo), spec.hi), 1.0)
    return ACTIVATIONS[spec]


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    """Whether two results are identical; all NaN count as one: which operand's payload survives is up to the CPU."""
    return a.shape == b.shape and bool(np.all((bits(a) == bits(b)) | (np.isnan(a) & np.isnan(b))))


def bits(array: NDArray[np.float32]) -> NDArray[np.int32]:
    return np.ascontiguousarray(array).view(np.int32)


def dense_matrix(rng: np.random.Generator, rows: int, cols: int, density: float) -> NDArray[np.float32]:
    """Normal values at uniformly drawn places."""
    mask = rng.random((rows, cols)) < density
    return np.where(mask, rng.standard_normal((rows, cols)), 0).astype(np.float32)


def product(matrix: SparseMatrix, x: F64) -> F64:
    """W @ x over stored entries: 0 * inf is NaN only where the zero is stored."""
    pattern, total = matrix.pattern, np.zeros((matrix.shape[0], x.shape[1]))
    values = matrix.values.astype(np.float64)
    for row in range(pattern.rows):
        span = slice(int(pattern.indptr[row]), int(pattern.indptr[row + 1]))
        if span.stop > span.start:
            total[row] = (values[span, None] * x[pattern.indices[span]]).sum(axis=0)
    return total


def expected(matrix: SparseMatrix, x: Any, bias: Any = None, activation: Any = None, residual: str | None = None,
             r: Any = None, multiply: Callable[[SparseMatrix, F64], F64] = product) -> Expected:  # fmt: skip
    """The layer in float64 for x (K, N), with the project's bound.

    A row's sum may be off by ``1e-6 * sqrt(terms) * sum of |terms|``; bias and a residual added before count as terms.
    The activation stretches that by its largest slope and adds 4 ulp of its own value, a residual added afterwards one
    rounding. Below the smallest normal number rounding is absolute: half a spacing for each term.
    """
    with np.errstate(all="ignore"):
        x = np.asarray(x, np.float64)
        magnitudes = SparseMatrix(matrix.pattern, np.abs(matrix.values))
        total, size = multiply(matrix, x), multiply(magnitudes, np.abs(x))
        terms = matrix.pattern.row_counts.astype(np.float64)[:, None]
        for extra in (
            None if bias is None else np.asarray(bias, np.float64)[:, None],
            r if residual == "before" else None,
        ):
            if extra is not None:
                total, size, terms = total + extra, size + np.abs(np.asarray(extra, np.float64)), terms + 1
        function = activation_of(activation)
        y = function.of(total)
        bound = function.slope * (1e-6 * np.sqrt(terms) * size + terms * _TINY) + 4 * spacing(y) + function.absolute
        if residual == "after":
            y = y + np.asarray(r, np.float64)
            bound = bound + spacing(y)
        return Expected(y, bound, ~(np.isfinite(size) & (size > OVERFLOW)))


def spacing(y: F64) -> F64:
    """One ulp of float32 at ``y``."""
    return np.spacing(np.minimum(np.abs(y), 3e38).astype(np.float32)).astype(np.float64)


def complaint(got: NDArray[np.float32], want: Expected) -> str:
    """The worst element that is not what it should be, in words; empty if there is none."""
    with np.errstate(all="ignore"):
        value = got.astype(np.float64)
        close = np.abs(value - want.y) <= want.bound
        same = np.where(np.isfinite(want.y), close, (value == want.y) | (np.isnan(value) & np.isnan(want.y)))
        bad = ~same & want.judged
        if not bad.any():
            return ""
        excess = np.where(bad, np.nan_to_num(np.abs(value - want.y) / want.bound, nan=np.inf), -1.0)
        at = np.unravel_index(int(np.argmax(excess)), got.shape)
        place = tuple(int(i) for i in at)
    should = f"{want.y[at]!r} +- {want.bound[at]:.3g}"
    return f"{int(bad.sum())} of {got.size} wrong; at {place}: {got[at]!r}, should be {should}"


def program(*emitted: tuple[str, dict[str, int]], labels: int = 0) -> Program:
    """A program of single rows: names of operations with their columns."""
    b = Builder()
    for _ in range(labels):
        b.label()
    for name, columns in emitted:
        b.emit(name, **columns)
    return b.finish()
