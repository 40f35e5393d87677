"""``CompiledConvTranspose``: a transposed convolution as one convolution of stride 1 per phase of its output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from ..errors import AliasError, ShapeError
from ..schedule.dense import DenseSchedule
from ..schedule.schedule import Schedule
from .arrays import Array, as_input, as_output, empty, overlaps, require_shape
from .conv import CompiledConv, as_weight
from .matmul import Bound, Stats, Uncopied


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

    @property
    def title(self) -> str:
        return phase_title(self.row, self.column)


def phase_title(row: Phase, column: Phase) -> str:
    """A line above the listing of a phase."""
    return f"; phase {row.first}, {column.first}: kernel rows {list(row.places)}, columns {list(column.places)}"


def together(parts: Sequence[Part], elements: int, compile_seconds: float) -> Stats:
    """Facts about all phases of a weight of so many elements."""
    ops = {id(part.op): part.op for part in parts}.values()
    each = [op.stats for op in ops]
    nnz, loads = sum(s.nnz for s in each), sum(s.nnz / s.fmas_per_load for s in each if s.fmas_per_load)
    loops = [op.schedule is None for op in ops]  # these share their code
    code = sum(s.code_bytes for s, loop in zip(each, loops, strict=True) if not loop)
    code += max((s.code_bytes for s, loop in zip(each, loops, strict=True) if loop), default=0)
    values = sum(s.value_bytes for s in each)
    return Stats(nnz, nnz / max(1, elements), code, values, (code + values) / max(1, nnz) if code else 0.0,
                 nnz / loads if loads else 0.0, sum(s.instructions for s in each), compile_seconds)  # fmt: skip


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
        self, parts: tuple[Part, ...], stride: tuple[int, int], groups: int, shape: tuple[int, int, int, int],
        stats: Stats,
    ) -> None:  # fmt: skip
        self.parts, self.stride, self.groups, self.shape = parts, stride, groups, shape
        self.channels = shape[1] * groups, shape[0]
        self._stats = stats
        self._largest = max(parts, key=lambda part: part.op.stats.nnz).op

    @property
    def stats(self) -> Stats:
        """Facts about all phases together."""
        return self._stats

    @property
    def schedule(self) -> Schedule | DenseSchedule | None:
        """How the phase with the most nonzeros is blocked; :meth:`explain` shows every phase."""
        return self._largest.schedule

    @property
    def target(self) -> str:
        """Name of the target this was compiled for."""
        return self._largest.target

    @property
    def tile(self) -> int:
        """Columns of a tile: the lanes of the target's vectors."""
        return self._largest.tile

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
        if out is not None and y.size and overlaps(x, y):
            raise AliasError("out overlaps x, which is still read while out is written", where="out",
                             hint="Pass another array.")  # fmt: skip
        r = None if residual is None else as_input(residual, "residual")
        if r is not None:
            require_shape(r, shape, "residual")
            r = r.copy() if overlaps(r, y) else r
        for part in self.parts:
            mine = np.s_[:, :, part.row.first :: self.stride[0], part.column.first :: self.stride[1]]
            if min(y[mine].shape[2:]):  # small images leave some phases nothing
                rows, columns = (slice(p.crop[0], max(n - p.crop[1], 0)) for p, n in
                                 zip((part.row, part.column), x.shape[2:], strict=True))  # fmt: skip
                _run(part.op, x[:, :, rows, columns], y[mine], None if r is None else r[mine])
        return y

    def bind(self, x: Any, out: Any = None, residual: Any = None) -> Bound:
        """The operator tied to arrays; a call checks them again, and costs what ``self(x, out)`` does."""
        y = self(x, out, residual)
        return Bound(lambda: self(x, y, residual), y, ())

    def refit(self, new_weight: Any) -> None:
        """New values for the compiled pattern, (C, O / groups, kh, kw).

        Raises:
            PatternMismatchError: a nonzero lies outside the pattern; the operator is unchanged.
            ValueRangeError: a value is not finite. ShapeError, DTypeError: as at compile time.
        """
        dense = transposed_weight(new_weight, self.groups, "new_weight")
        if dense.shape[2:] != self.shape[2:]:  # its phases would be those of a part of it
            raise ShapeError(f"a kernel of {dense.shape[2:]} does not fit the compiled {self.shape[2:]}",
                             where="new_weight", hint="Compile a new operator for a new shape.")  # fmt: skip
        new = [part_of(dense, part.row, part.column) for part in self.parts]
        for part, weight in zip(self.parts, new, strict=True):
            part.op.check(weight)
        for part, weight in zip(self.parts, new, strict=True):
            part.op.refit(weight)

    def explain(self) -> str:
        """What was compiled and why so, then phase by phase."""
        s, (o, _), (_, _, kh, kw) = self.stats, self.channels, self.shape
        lines = [
            f"{o}x{self.shape[0]}x{kh}x{kw} sparse transposed convolution, stride {self.stride}, groups {self.groups}, "
            f"as {len(self.parts)} convolutions, target {self.target}",
            f"pattern   {s.nnz} nonzeros ({100 * (1 - s.density):.1f} % sparse)",
            f"code      {s.code_bytes} bytes, {s.instructions} instructions; "
            f"with values {s.bytes_per_nonzero:.1f} bytes per nonzero",
            f"compiled  in {1e3 * s.compile_seconds:.1f} ms",
        ]
        for part in self.parts:
            lines += [
                f"phase {part.row.first}, {part.column.first}",
                *(f"  {e}" for e in part.op.explain().split("\n")),
            ]
        return "\n".join(lines)

    def listing(self) -> str:
        """The machine code of all phases, each with a line of its own in front."""
        return "".join(f"{part.title}\n{part.op.listing()}" for part in self.parts)

    def __repr__(self) -> str:
        o, c = self.channels
        return f"<{type(self).__name__} {o}x{c} nnz={self.stats.nnz} target={self.target}>"


def _run(op: CompiledConv, x: Array, y: Array, r: Array | None) -> None:
    """One phase. Where more is to be cut off than x has, all that is read is padding, of which there is too much."""
    rows, columns = y.shape[2:]
    whole = op.out_shape((x.shape[0], x.shape[1], x.shape[2], x.shape[3]))
    if whole == y.shape:
        op(x, out=y, residual=r)
        return
    wide = None
    if r is not None:
        wide = np.zeros(whole, np.float32)
        wide[:, :, :rows, :columns] = r
    y[...] = op(x, residual=wide)[:, :, :rows, :columns]
