"""An image as the rows of a matrix that is nowhere in memory: where each tap of a dense convolution reads.

Columns are output positions, row by row, so a tap reads ``position + constant`` wherever rows of what it reads are as
long as those of the output. *Direct*: those of the image are, at stride 1. *Phases*: every ``stride``-th row and column
is copied to planes with rows of that length, which must hold all columns of a phase. *Shifted*: there is a plane for
each column of the kernel, with the columns that it reads; this is what remains where rows of the output are shorter
than those of a phase. Masks cut off what lies beside the image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .geometry import Geometry, Run
from .pattern import Pattern
from .taps import Taps, Window, conv_taps

_LINE = 16  # floats of a cache line


def full_taps(columns: int, window: Window) -> Taps:
    """The taps of a row without zeros, of one group."""
    pattern = Pattern(1, columns, np.array([0, columns]), np.arange(columns, dtype=np.int32))
    return conv_taps(pattern, replace(window, groups=1))


@dataclass(frozen=True)
class Plane:
    """Rows and columns of each channel that are copied one behind the other, the output's columns apart.

    Attributes:
        rows, columns: of the image, that are not padding.
        at: where they begin in the plane, in floats.
    """

    rows: Run
    columns: Run
    at: int


@dataclass(frozen=True)
class Views:
    """Where the taps of output positions ``first`` to ``last`` - 1 read.

    Attributes:
        row: bytes from row to row of an image.
        staged: columns of an image are apart already, phase by phase (a stride without a shuffle).
        padded: there are planes with zeros, so that nothing needs a mask.
    """

    geometry: Geometry
    first: int
    last: int
    row: int
    staged: bool = False
    padded: bool = False

    @cached_property
    def _span(self) -> tuple[int, int]:
        """The first output row, and how many rows of a plane its positions need."""
        width = self.geometry.out[1]
        low, high = self.first // width, (self.last - 1) // width
        return low, high - low + 1 + self.geometry.reach[0]

    @cached_property
    def direct(self) -> bool:
        """Images are read as they are."""
        g = self.geometry
        one_row = g.out[0] == 1
        aligned = g.window.stride[0] == 1 and g.size[1] == g.out[1] and self.row == 4 * g.out[1]
        return g.window.stride[1] == 1 and not (self.staged or self.padded) and (one_row or aligned)

    @cached_property
    def shifted(self) -> bool:
        """There is a plane per column of the kernel, not per column phase."""
        g = self.geometry
        needed = g.out[1] + g.reach[1]
        return self.padded or any(g.run(1, column, 0, needed).count > g.out[1] for _, column in g.window.phases)

    @cached_property
    def _columns(self) -> list[int]:
        """What tells the planes of a row phase apart: a column of the padded image."""
        window = self.geometry.window
        if self.shifted:
            return [i * window.dilation[1] for i in range(window.kernel[1])]
        return sorted({column for _, column in window.phases})

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        """Of a channel, by row phase and column; those of a channel follow each other."""
        g, (low, needed) = self.geometry, self._span
        width, found = g.out[1], []
        if self.direct:
            return ()
        for row in sorted({row for row, _ in g.window.phases}):
            rows = g.run(0, row, low, needed)
            for column in self._columns:
                columns = g.run(1, column, 0, width if self.shifted else width + g.reach[1])
                found.append(Plane(rows, columns, rows.zeros * width + (columns.zeros if self.shifted else 0)))
        return tuple(found)

    @property
    def plane(self) -> int:
        """Floats from plane to plane: an odd number of cache lines, so that they do not share the sets of a cache."""
        return (-(-self._span[1] * self.geometry.out[1] // _LINE) | 1) * _LINE

    def places(self) -> NDArray[np.int64]:
        """By place of the kernel, bytes from where the first position lies in a channel to what its tap reads."""
        g, width = self.geometry, self.geometry.out[1]
        window, ((top, _), (left, _)) = g.window, g.pads
        found = []
        for i in range(window.kernel[0]):
            for j in range(window.kernel[1]):
                y, x = i * window.dilation[0], j * window.dilation[1]
                if self.direct:
                    found.append((y - top) * self.row + 4 * (x - left + self.first))
                    continue
                (row, row_phase), (column, column_phase) = divmod(y, window.stride[0]), divmod(x, window.stride[1])
                rows = sorted({phase for phase, _ in window.phases}).index(row_phase)
                columns = self._columns.index(x if self.shifted else column_phase)
                number = rows * len(self._columns) + columns
                shift = 0 if self.shifted else column - self.planes[number].columns.zeros
                at = number * self.plane + row * width + shift + self.first - self._span[0] * width
                found.append(4 * at)
        return np.array(found, np.int64)

    def inside(self) -> NDArray[np.bool_]:
        """(places, positions): whether a tap reads the image, and not what pads it."""
        g, position = self.geometry, np.arange(self.first, self.last)
        window = g.window
        found = np.empty((window.kernel[0], window.kernel[1], position.size), bool)
        on = [
            np.array([(at * stride + k * dilation - before >= 0) & (at * stride + k * dilation - before < extent)
                      for k in range(kernel)])
            for at, stride, dilation, (before, _), extent, kernel in zip(
                np.divmod(position, g.out[1]), window.stride, window.dilation, g.pads, g.size, window.kernel,
                strict=True)
        ]  # fmt: skip
        np.logical_and(on[0][:, None], on[1][None], out=found)
        return found.reshape(-1, position.size)
