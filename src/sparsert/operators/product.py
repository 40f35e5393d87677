"""``CompiledProduct``: what ``compile_product`` returns, a product of two activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import AliasError, ShapeError
from ..kernels.activations import ACTIVATIONS
from ..kernels.dense_arguments import Form
from ..kernels.dense_micro import VECTORS
from ..kernels.plan import fold_width
from ..runtime.cpu import address_of
from ..schedule.dense import choose
from ..target import Target
from .arrays import Array, as_input, as_output, empty, overlaps, packed_columns
from .dense import SHAPES, Code, code_of, parts
from .dense_parts import Extents, Parts, note
from .matmul import Bound, Uncopied
from .team import Crew


@dataclass(frozen=True)
class ProductSpec:
    """What a product of two activations computes around them."""

    transpose_a: bool
    transpose_b: bool
    scale: float
    activation: str | None
    parameters: tuple[float, ...]


class CompiledProduct(Uncopied):
    """``y = act(scale * a @ b)`` for two activations of any extents, compiled; see :func:`sparsert.compile_product`.

    Args (of a call):
        a: float32 (..., M, K), or (..., K, M) if compiled with ``transpose_a``. Any strides; an operand whose rows or
            columns lie back to back is read where it is, or packed on the way.
        b: float32 (..., K, N), or (..., N, K) with ``transpose_b``. Leading axes broadcast as in ``numpy.matmul``.
        out: float32 (..., M, N), written and returned; a new array if None. It may overlap neither operand.
    """

    def __init__(self, spec: ProductSpec, target: Target, crew: Crew | None = None) -> None:
        self.spec, self._target, self._crew = spec, target, crew
        self._seen: dict[int, str] = {}
        self._frames: dict[tuple[object, ...], tuple[Code, list[Parts]]] = {}
        self._scale = np.full(1, spec.scale, np.float32)

    @property
    def target(self) -> str:
        """Name of the target this was compiled for."""
        return self._target.name

    def explain(self) -> str:
        """What was compiled, in a few lines."""
        s = self.spec
        words = [f"dense product, run-time extents, target {self.target}"]
        if s.scale != 1:
            words.append(f"scaled by {s.scale:.9g}")
        if s.activation:
            words.append(f"then {s.activation}{s.parameters or ''}")
        return "; ".join([*words, f"threads {note(self._crew, self._seen)}"])

    def __repr__(self) -> str:
        return f"<{type(self).__name__} target={self.target}>"

    def __call__(self, a: Any, b: Any, out: Any = None) -> Array:
        """Compute the product.

        Raises:
            ShapeError, DTypeError, AliasError: see :mod:`sparsert.errors`; nothing is written then.
        """
        return self._run(a, b, out)[0]

    def bind(self, a: Any, b: Any, out: Any = None) -> Bound:
        """The product tied to arrays, for loops, as :meth:`CompiledMatmul.bind`: nothing is checked later on."""
        y, matrices = self._run(a, b, out)
        if matrices is None:
            return Bound(lambda: self(a, b, y), y, ())
        steps = [self._fixed(*three) for three in matrices]

        def run() -> None:
            for step in steps:
                step()

        return Bound(steps[0] if len(steps) == 1 else run, y, (matrices, a, b))

    def _run(self, a: Any, b: Any, out: Any) -> tuple[Array, list[tuple[Array, Array, Array]] | None]:
        """One call with every check: the output, and the matrices of its native calls unless there were copies."""
        a, b = as_input(a, "a"), as_input(b, "b")
        for name, array in (("a", a), ("b", b)):
            if array.ndim < 2:
                raise ShapeError(f"shape {array.shape} has fewer than two axes", where=name,
                                 hint="Add axes: a row is x[None, :], a column x[:, None].")  # fmt: skip
        if self.spec.transpose_a:
            a = a.swapaxes(-1, -2)
        if self.spec.transpose_b:
            b = b.swapaxes(-1, -2)
        (m, k), (k2, n) = a.shape[-2:], b.shape[-2:]
        if k != k2:
            raise ShapeError(f"shapes {a.shape} and {b.shape}, as (M, K) and (K, N), differ in K", where="b",
                             hint="transpose_a and transpose_b swap the last two axes.")  # fmt: skip
        try:
            batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        except ValueError:
            raise ShapeError(f"leading axes {a.shape[:-2]} and {b.shape[:-2]} do not broadcast", where="b") from None
        shape = (*batch, m, n)
        y = empty(shape) if out is None else as_output(out, shape)
        for name, array in (("a", a), ("b", b)):
            if out is not None and y.size and array.size and overlaps(array, y):
                raise AliasError(f"out overlaps {name}, which is still read while out is written", where="out",
                                 hint="Pass another array.")  # fmt: skip
        if not y.size:
            return y, []
        if not k or self._target.isa == "reference":
            self._in_numpy(a, b, y)
            return y, None
        target = y if packed_columns(y) else empty(shape)
        given = a, b
        a, b = _readable(a), _readable(b)
        matrices = list(_matrices(np.broadcast_to(a, (*batch, m, k)), np.broadcast_to(b, (*batch, k, n)), target))
        for three in matrices:
            self._native(*three)
        if target is not y:
            y[...] = target
        return y, matrices if target is y and a is given[0] and b is given[1] else None

    def _in_numpy(self, a: Array, b: Array, y: Array) -> None:
        with np.errstate(all="ignore"):
            total = np.matmul(a, b, dtype=np.float64) * np.float64(self._scale[0])
            if self.spec.activation is not None:
                total = ACTIVATIONS[self.spec.activation].reference(total, *self.spec.parameters)
            y[...] = total

    def _native(self, a: Array, b: Array, y: Array) -> None:
        key = (a.shape, b.shape[2], a.strides, b.strides, y.strides)
        found = self._frames.get(key)
        if found is None:
            if len(self._frames) >= SHAPES:
                self._frames.clear()
            found = self._frames[key] = (self._code(a, b), [])
        code, free = found
        try:
            made = free.pop()
        except IndexError:
            made = self._frame(code, a, b, y)
        made.point(address_of(a), address_of(b), address_of(y), 0)
        made.run()
        free.append(made)

    def _fixed(self, a: Array, b: Array, y: Array) -> Callable[[], None]:
        """The native call on matrices that stay where they are. Threads that meet get frames of their own."""
        code, free = self._code(a, b), list[Parts]()

        def run() -> None:
            try:
                made = free.pop()
            except IndexError:
                made = self._frame(code, a, b, y)
                made.point(address_of(a), address_of(b), address_of(y), 0)
            made.run()
            free.append(made)

        return run

    def _code(self, a: Array, b: Array) -> Code:
        s = self.spec
        form = Form("rows" if packed_columns(a) else "columns", "rows" if packed_columns(b) else "transposed",
                    activation=s.activation, parameters=s.parameters, scale=s.scale != 1)  # fmt: skip
        return code_of(form, self._target)

    def _frame(self, code: Code, a: Array, b: Array, y: Array) -> Parts:
        (batch, m, k), n = a.shape, b.shape[2]
        fold = fold_width(k, k)
        made = parts(code, Extents(
            batch, m, n, k, a.strides[1 if code.form.a == "rows" else 2], b.strides[1 if code.form.b == "rows" else 2],
            y.strides[1], 0, a.strides[0], b.strides[0], y.strides[0],
        ), choose(k, fold, self._target, VECTORS * self._target.tile_bytes), self._crew, self._scale)  # fmt: skip
        if len(self._seen) < SHAPES:
            self._seen[n] = made.how
        return made


def _matrices(a: Array, b: Array, y: Array) -> Iterator[tuple[Array, Array, Array]]:
    """Runs of matrices a fixed distance apart, (batch, rows, columns) each: one native call."""
    while a.ndim > 3 and all(_mergeable(array) for array in (a, b, y)):
        a, b, y = (_merged(array) for array in (a, b, y))
    if a.ndim > 3:
        for index in range(a.shape[0]):
            yield from _matrices(a[index], b[index], y[index])
    elif a.ndim == 2:
        yield a[None], b[None], y[None]
    else:
        yield a, b, y


def _readable(array: Array) -> Array:
    """The array itself where rows or columns lie back to back, else a copy.

    Transposed operands are read four columns at a time: narrower ones are copied.
    """
    if packed_columns(array) or (array.strides[-2] == 4 and array.shape[-1] >= 4):
        return array
    return np.ascontiguousarray(array)


def _mergeable(array: Array) -> bool:
    return 1 in array.shape[:2] or array.strides[0] == array.shape[1] * array.strides[1]


def _merged(array: Array) -> Array:
    """The first two axes, which lie back to back, as one; never a copy."""
    outer, inner = array.shape[:2]
    stride = array.strides[1 if inner > 1 else 0]
    return np.lib.stride_tricks.as_strided(
        array, (outer * inner, *array.shape[2:]), (stride, *array.strides[2:]), writeable=array.flags.writeable
    )
