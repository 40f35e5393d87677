"""What a layer should give: float64 over the stored entries alone, and how far float32 may lie from that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsert import Clip
from sparsert.sparsity.pattern import SparseMatrix

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


# function and the largest slope it has anywhere
ACTIVATIONS: dict[Any, tuple[Callable[[F64], F64], float]] = {
    None: (lambda x: x, 1.0),
    "relu": (lambda x: np.maximum(x, 0.0), 1.0),
    "relu6": (lambda x: np.minimum(np.maximum(x, 0.0), 6.0), 1.0),
    "silu": (_gated(_sigmoid), 1.1),
    "hardswish": (_gated(lambda x: np.minimum(np.maximum(x + 3.0, 0.0), 6.0) / 6.0), 1.5),
    "gelu": (_gated(lambda x: 0.5 * _erfc(-x / np.sqrt(2.0))), 1.13),
    "gelu_tanh": (_gated(lambda x: _sigmoid(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))), 1.13),
}


def activation_of(spec: Any) -> tuple[Callable[[F64], F64], float]:
    """The function that an activation argument names, and its largest slope."""
    if isinstance(spec, Clip):
        return lambda x: np.minimum(np.maximum(x, spec.lo), spec.hi), 1.0
    return ACTIVATIONS[spec]


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
             r: Any = None) -> Expected:  # fmt: skip
    """The layer in float64 for x (K, N), with the project's bound.

    A row's sum may be off by ``1e-6 * sqrt(terms) * sum of |terms|``; bias and a residual added before count as terms. The activation
    stretches that by its largest slope and adds 4 ulp of its own value, a residual added afterwards one rounding. Below the smallest
    normal number rounding is absolute: half a spacing for each term.
    """
    with np.errstate(all="ignore"):
        x = np.asarray(x, np.float64)
        magnitudes = SparseMatrix(matrix.pattern, np.abs(matrix.values))
        total, size = product(matrix, x), product(magnitudes, np.abs(x))
        terms = matrix.pattern.row_counts.astype(np.float64)[:, None]
        for extra in (None if bias is None else np.asarray(bias, np.float64)[:, None], r if residual == "before" else None):
            if extra is not None:
                total, size, terms = total + extra, size + np.abs(np.asarray(extra, np.float64)), terms + 1
        function, slope = activation_of(activation)
        y = function(total)
        bound = slope * (1e-6 * np.sqrt(terms) * size + terms * _TINY) + 4 * spacing(y)
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
    return f"{int(bad.sum())} of {got.size} wrong; at {place}: {got[at]!r}, should be {want.y[at]!r} +- {want.bound[at]:.3g}"
