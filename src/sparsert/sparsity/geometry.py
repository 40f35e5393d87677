"""Where the planes of a convolution lie: padding, the pitch that neighbouring rows share, phases, bands of rows.

A plane holds the rows of one input channel one behind the other, ``pitch`` floats apart; the zeros between two rows
pad the end of one and the start of the next. Output (r, c) is position ``r * pitch + c``, and its tap at kernel row
and column (i, j) reads ``(r + i) * pitch + c + j``: the same distance for every output, across rows too.
The positions between two output rows are computed as well and mean nothing. A strided convolution has a plane per
phase: rows and columns of the padded image taken ``stride`` apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ShapeError, UnsupportedError, ValueRangeError
from .taps import Window

Pads = tuple[tuple[int, int], tuple[int, int]]
SAME = ("same_upper", "same_lower")
MAX_PADDING = 1 << 20


@dataclass(frozen=True)
class Padding:
    """What a user said: ``((top, bottom), (left, right))``, or the name of a rule that makes y as large as x / stride
    (ONNX ``auto_pad``), the odd zero behind ("same_upper") or in front ("same_lower")."""

    pads: Pads | None
    rule: str = ""

    def covers(self, window: Window) -> bool:
        """Whether an output row is never shorter than the rows of a phase: what masks instead of zeros rely on."""
        return self.pads is None or sum(self.pads[1]) >= window.span[1] - 1

    def resolve(self, size: tuple[int, int], window: Window) -> Pads:
        """The zeros around an image of ``size``."""
        if self.pads is not None:
            return self.pads
        out: list[tuple[int, int]] = []
        for extent, span, stride in zip(size, window.span, window.stride, strict=True):
            total = max(0, (-(-extent // stride) - 1) * stride + span - extent) if extent else 0
            less, more = total // 2, total - total // 2
            out.append((less, more) if self.rule == "same_upper" else (more, less))
        return out[0], out[1]


def pair(value: Any, where: str, least: int) -> tuple[int, int]:
    """An int, or (rows, columns).

    Raises:
        ValueRangeError: it is neither, or a number is below ``least``.
    """
    parts = (value, value) if _is_int(value) else value
    if not isinstance(parts, (tuple, list)) or len(parts) != 2 or not all(_is_int(n) and n >= least for n in parts):
        raise ValueRangeError(f"{value!r} is neither an integer nor two, from {least} on", where=where)
    if max(parts) > MAX_PADDING:
        raise ValueRangeError(f"{value!r} is beyond {MAX_PADDING}", where=where)
    return int(parts[0]), int(parts[1])


def padding(value: Any, where: str = "padding") -> Padding:
    """``padding=`` as users write it: an int, (rows, columns), ((top, bottom), (left, right)) or a name of a rule.

    Raises:
        UnsupportedError: an unknown name. ValueRangeError: anything else.
    """
    if isinstance(value, str):
        if value not in SAME:
            raise UnsupportedError(f"unknown padding {value!r}", where=where, hint=f"Known: {', '.join(SAME)}.")
        return Padding(None, value)
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, (tuple, list)) for v in value):
        return Padding((pair(list(value[0]), where, 0), pair(list(value[1]), where, 0)))
    rows, columns = pair(value, where, 0)
    return Padding(((rows, rows), (columns, columns)))


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Run:
    """Rows or columns of an image that a phase holds: ``zeros`` of padding, then ``count`` from ``first`` on."""

    zeros: int
    first: int
    count: int


@dataclass(frozen=True)
class Geometry:
    """Planes for images of ``size`` (rows, columns)."""

    window: Window
    size: tuple[int, int]
    pads: Pads

    @cached_property
    def out(self) -> tuple[int, int]:
        """Rows and columns of the output.

        Raises:
            ShapeError: the padded image is smaller than what a kernel spans.
        """
        padded = [n + a + b for n, (a, b) in zip(self.size, self.pads, strict=True)]
        if any(n < span for n, span in zip(padded, self.window.span, strict=True)):
            raise ShapeError(
                f"an image of {self.size[0]} x {self.size[1]}, padded to {padded[0]} x {padded[1]}, is smaller than "
                f"the {self.window.span[0]} x {self.window.span[1]} that a kernel spans",
                where="x",
                hint="Use larger images or more padding.",
            )
        rows, columns = ((n - span) // s + 1 for n, span, s in zip(padded, self.window.span, self.window.stride,
                                                                    strict=True))  # fmt: skip
        return rows, columns

    @cached_property
    def reach(self) -> tuple[int, int]:
        """By how many rows and columns of a phase the furthest tap lies behind its output."""
        (h, w), (sh, sw) = self.window.span, self.window.stride
        return (h - 1) // sh, (w - 1) // sw

    def run(self, axis: int, phase: int, start: int, needed: int) -> Run:
        """Of ``needed`` rows (axis 0) or columns (1) of a phase from ``start`` on, those that are not padding."""
        stride, before, extent = self.window.stride[axis], self.pads[axis][0], self.size[axis]
        low = max(start, -((phase - before) // stride))  # the first that lies at 0 or above in the image
        high = min(start + needed, (extent - 1 + before - phase) // stride + 1)
        low = min(low, start + needed)
        return Run(low - start, low * stride + phase - before, max(0, high - low))

    def band(self, rows: tuple[int, int], columns: tuple[int, int] | None = None) -> Band:
        """Planes for output rows, and perhaps columns, from one number up to another."""
        return Band(self, rows, columns or (0, self.out[1]))


@dataclass(frozen=True)
class Band:
    """Planes for a part of the output, of one row at least."""

    geometry: Geometry
    rows: tuple[int, int]
    columns: tuple[int, int]

    @cached_property
    def out(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    @cached_property
    def runs(self) -> tuple[tuple[Run, Run], ...]:
        """Rows and columns of the image that each phase holds."""
        g = self.geometry
        needed = (self.out[0] + g.reach[0], self.out[1] + g.reach[1])
        return tuple(
            (g.run(0, row, self.rows[0], needed[0]), g.run(1, column, self.columns[0], needed[1]))
            for row, column in g.window.phases
        )

    @cached_property
    def pitch(self) -> int:
        """Floats between rows of a plane."""
        if self.geometry.window.masked and self.columns == (0, self.geometry.out[1]):
            return self.out[1]
        needed = self.out[1] + self.geometry.reach[1]
        gaps = [run.count + max(run.zeros, needed - run.zeros - run.count) for _, run in self.runs]
        return max(self.out[1], *gaps)

    def mask(self, column_phase: int, offset: int) -> NDArray[np.bool_]:
        """(pitch,) by output column: whether the tap at ``offset`` of a phase reads a column of the image."""
        run = next(
            run for (_, run), (_, b) in zip(self.runs, self.geometry.window.phases, strict=True) if b == column_phase
        )
        column = np.arange(self.pitch) + offset - run.zeros
        return (column >= 0) & (column < run.count)

    @property
    def positions(self) -> int:
        """Columns of the product."""
        return (self.out[0] - 1) * self.pitch + self.out[1]

    @property
    def floats(self) -> int:
        """Of an input plane, from the first to the last that an output reads."""
        return self.positions + self.geometry.reach[0] * self.pitch + self.geometry.reach[1]


_LEAST_COLUMNS = 256  # of a band


def bands(geometry: Geometry, inputs: int, outputs: int, budget: int, least: int = 1) -> list[Band]:
    """Rows, and columns where rows are very long, cut so that the planes of a band take about ``budget`` floats.

    There are so many planes of input and output. There are no fewer bands than ``least``, unless there are fewer rows.
    """
    rows, columns = geometry.out

    def floats(band: Band) -> int:
        return inputs * band.floats + outputs * band.positions

    one, everything = floats(geometry.band((0, 1))), floats(geometry.band((0, rows)))
    if one > budget and columns > _LEAST_COLUMNS:
        parts = min(-(-one // budget), -(-columns // _LEAST_COLUMNS))
        cuts = [columns * i // parts for i in range(parts + 1)]
        pairs = list(pairwise(cuts))
        return [geometry.band((row, row + 1), pair) for row in range(rows) for pair in pairs]
    per_row = max(1, (everything - one) // max(rows - 1, 1))
    most = max(1, 1 + (budget - one) // per_row)
    parts = max(-(-rows // most), min(least, rows))
    cuts = [rows * i // parts for i in range(parts + 1)]
    return [geometry.band(pair) for pair in pairwise(cuts)]
