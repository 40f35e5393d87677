"""``CompiledConvTranspose``: a transposed convolution as one convolution of stride 1 per phase of its output."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from ..errors import ShapeError
from .arrays import Array, as_input, as_output, empty, overlaps, require_shape
from .conv import CompiledConv, as_weight
from .matmul import Bound, Uncopied


@dataclass(frozen=True)
class Phase:
    """Along one axis, outputs ``first``, ``first + stride``, ... and the kernel places that reach them.

    Attributes:
        places: of the kernel, in the order of the input they read.
        dilation: between neighbours of these.
        pads: zeros around the input; ``crop`` elements are cut off its ends first.
        extra: outputs beyond one per input.
    """

    first: int
    places: tuple[int, ...]
    dilation: int
    pads: tuple[int, int]
    crop: tuple[int, int]
    extra: int


def phases(kernel: int, stride: int, dilation: int, pads: tuple[int, int], output_padding: int) -> tuple[Phase, ...]:
    """The phases of an axis.

    Output ``q * stride + first`` reads input ``q + (first + pad - place * dilation) / stride``.
    """
    beyond = dilation * (kernel - 1) + output_padding + 1 - sum(pads)  # outputs are (inputs - 1) * stride + this
    found = []
    for first in range(stride):
        places = tuple(k for k in reversed(range(kernel)) if (first + pads[0] - k * dilation) % stride == 0)
        reads = [(first + pads[0] - k * dilation) // stride for k in places] or [0]
        extra = -(-(beyond - first) // stride) - 1
        before, behind = -reads[0], extra + reads[-1]
        found.append(Phase(first, places, dilation // gcd(stride, dilation), (max(before, 0), max(behind, 0)),
                           (max(-before, 0), max(-behind, 0)), extra))  # fmt: skip
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Part:
    row: Phase
    column: Phase
    op: CompiledConv


def transposed_weight(weight: Any, groups: int, where: str = "weight") -> Array:
    """(C, O / groups, kh, kw) as the (O, C / groups, kh, kw) of a convolution.

    Raises:
        ShapeError: it has another rank, or its channels cannot be cut into groups.
    """
    w = np.asarray(
        as_weight(weight) if hasattr(weight, "__dlpack__") and not isinstance(weight, np.ndarray) else weight
    )
    if w.ndim != 4 or min(w.shape[2:]) < 1:
        raise ShapeError(f"shape {w.shape} is not (C, O / groups, kh, kw)", where=where)
    if not isinstance(groups, (int, np.integer)) or isinstance(groups, bool) or groups < 1 or w.shape[0] % groups:
        raise ShapeError(f"{w.shape[0]} input channels cannot be cut into {groups} groups", where="groups")
    inputs, outputs, kh, kw = w.shape
    by_group = w.reshape(groups, inputs // groups, outputs, kh, kw).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(by_group.reshape(groups * outputs, inputs // groups, kh, kw))


def part_of(dense: Array, row: Phase, column: Phase) -> Array:
    """The kernel of a phase; one of zeros where no place reaches it."""
    if not row.places or not column.places:
        return np.zeros((*dense.shape[:2], max(len(row.places), 1), max(len(column.places), 1)), dense.dtype)
    return np.ascontiguousarray(dense[:, :, list(row.places)][:, :, :, list(column.places)])


class CompiledConvTranspose(Uncopied):
    """``y = act(conv_transpose2d(x, W) + b)`` for one sparse W, compiled.

    Args (of a call):
        x: float32 (B, C, H, W).
        out: float32 (B, O, H', W'), written and returned; a new array if None.
        residual: float32 like ``out``, exactly if compiled with ``residual=``.
    """

    def __init__(
        self, parts: tuple[Part, ...], stride: tuple[int, int], groups: int, channels: tuple[int, int]
    ) -> None:
        self.parts, self.stride, self.groups, self.channels = parts, stride, groups, channels

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """The shape of y for an x of ``shape``.

        Raises:
            ShapeError: nothing would be left of y.
        """
        if len(shape) != 4 or shape[1] != self.channels[1] or min(shape[2:]) < 1:
            raise ShapeError(f"shape {tuple(shape)} is not (B, C={self.channels[1]}, H, W) of one pixel at least",
                             where="x")  # fmt: skip
        extents = []
        for n, stride, axis in ((shape[2], self.stride[0], "row"), (shape[3], self.stride[1], "column")):
            own = {getattr(part, axis).first: getattr(part, axis) for part in self.parts}
            extents.append(sum(max(0, n + own[first].extra) for first in range(stride)))
        if min(extents) < 1:
            raise ShapeError(f"an x of shape {tuple(shape)} leaves {extents[0]} x {extents[1]} outputs", where="x",
                             hint="Use larger images or less padding.")  # fmt: skip
        return shape[0], self.channels[0], extents[0], extents[1]

    def __call__(self, x: Any, out: Any = None, residual: Any = None) -> Array:
        """Compute all phases.

        Raises:
            ShapeError, DTypeError, AliasError, UnsupportedError: see :mod:`sparsert.errors`.
        """
        x = as_input(x, "x")
        shape = self.out_shape(x.shape)
        y = empty(shape) if out is None else as_output(out, shape)
        if out is not None and overlaps(x, y):
            x = x.copy()
        r = None if residual is None else as_input(residual, "residual")
        if r is not None:
            require_shape(r, shape, "residual")
            r = r.copy() if overlaps(r, y) else r
        for part in self.parts:
            mine = np.s_[:, :, part.row.first :: self.stride[0], part.column.first :: self.stride[1]]
            if y[mine].size or (y.size == 0):
                rows, columns = (slice(p.crop[0], max(n - p.crop[1], 0)) for p, n in
                                 zip((part.row, part.column), x.shape[2:], strict=True))  # fmt: skip
                part.op(x[:, :, rows, columns], out=y[mine], residual=None if r is None else r[mine])
        return y

    def bind(self, x: Any, out: Any = None, residual: Any = None) -> Bound:
        """The operator tied to arrays; a call checks them again, and costs what ``self(x, out)`` does."""
        y = self(x, out, residual)
        return Bound(lambda: self(x, y, residual), y, ())

    def refit(self, new_weight: Any) -> None:
        """New values for the compiled pattern, (C, O / groups, kh, kw).

        Raises:
            PatternMismatchError: a nonzero lies outside the pattern; the operator is unchanged.
        """
        dense = transposed_weight(new_weight, self.groups, "new_weight")
        kernel = tuple(
            max((place for part in self.parts for place in getattr(part, axis).places), default=0) + 1
            for axis in ("row", "column")
        )
        if dense.shape[2:] != kernel:  # its phases would be those of a part of it
            raise ShapeError(f"a kernel of {dense.shape[2:]} does not fit the compiled {kernel}", where="new_weight",
                             hint="Compile a new operator for a new shape.")  # fmt: skip
        new = [part_of(dense, part.row, part.column) for part in self.parts]
        for part, weight in zip(self.parts, new, strict=True):
            part.op.check(weight)
        for part, weight in zip(self.parts, new, strict=True):
            part.op.refit(weight)

    def explain(self) -> str:
        """What was compiled, phase by phase."""
        return "\n".join(f"phase {p.row.first}, {p.column.first}: {p.op.explain()}" for p in self.parts)

    def listing(self) -> str:
        """The machine code of all phases."""
        return "".join(part.op.listing() for part in self.parts)

    def __repr__(self) -> str:
        o, c = self.channels
        nnz = sum(part.op.stats.nnz for part in self.parts)
        return f"<{type(self).__name__} {o}x{c} nnz={nnz} target={self.parts[0].op.target}>"
