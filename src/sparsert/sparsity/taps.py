"""The table of taps: any linear layer as rows of (accumulator, where its input lies, where its weight lies).

A displacement is affine in what is known only at run time: ``plane * P + pitch * p + offset`` with P and p the bytes
between planes and rows of the input. A product with a matrix uses the pitch alone; convolutions use all three.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ValueRangeError
from .pattern import Pattern

GROUPS = (1, 2, 4)  # values that share a tap: float32, pairs for bf16, quadruples for int8


@dataclass(frozen=True, eq=False)
class Taps:
    """``n`` taps in the order in which every row sums its products, whatever the schedule.

    Attributes:
        row: (n,) the output row each tap accumulates into.
        plane, pitch, offset: (n,) coefficients of the input displacement.
        source: (n, group) which value of the pattern (CSR order) each lane of the tap takes; -1 is a zero.
        sparse: keys count those pitches and offsets alone that some tap has: a dilated kernel skips most of them.
    """

    rows: int
    group: int
    row: NDArray[np.int32]
    plane: NDArray[np.int32]
    pitch: NDArray[np.int32]
    offset: NDArray[np.int32]
    source: NDArray[np.int64]
    sparse: bool = False

    def __len__(self) -> int:
        return int(self.row.size)

    @cached_property
    def key(self) -> NDArray[np.int64]:
        """(n,) numbers that rise with the displacement: by plane, in it by pitch, then by offset."""
        pitches, offsets = self._used
        if not self.sparse and self.extent == pitches.size:  # a matrix
            return self.pitch.astype(np.int64)
        pitch: Any = self.pitch
        offset: Any = self.offset
        if self.sparse:
            pitch, offset = np.searchsorted(pitches, pitch), np.searchsorted(offsets, offset)
        return np.asarray((self.plane.astype(np.int64) * pitches.size + pitch) * offsets.size + offset)

    @property
    def extent(self) -> int:
        """Every key is below."""
        pitches, offsets = self._used
        return (int(self.plane.max(initial=0)) + 1) * pitches.size * offsets.size

    @property
    def pitches(self) -> int:
        """Every ``pitch`` is below,"""
        return int(self._used[0][-1]) + 1

    @property
    def offsets(self) -> int:
        """and every ``offset``."""
        return int(self._used[1][-1]) + 1

    def place(self, key: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Plane, pitch and offset of keys."""
        pitches, offsets = self._used
        above, offset = np.divmod(key, offsets.size)
        plane, pitch = np.divmod(above, pitches.size)
        return plane, pitches[pitch], offsets[offset]

    @cached_property
    def _used(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The pitches and offsets that are counted, rising."""
        pitches, offsets = (
            np.flatnonzero(np.bincount(c, minlength=1)) if self.sparse and c.size else np.arange(c.max(initial=0) + 1)
            for c in (self.pitch, self.offset)
        )
        return pitches, offsets

    def pack(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Values of the pattern as (n, group), in tap order."""
        if self.group == 1:
            return values.reshape(-1, 1)  # one value a tap: CSR order is tap order
        padded = np.append(values, np.float32(0))
        return np.asarray(padded[self.source])


def matmul_taps(pattern: Pattern, group: int = 1) -> Taps:
    """Taps of ``W @ x``: input row ``k`` (or rows ``group * k ...``) lies ``k`` pitches from the tile's pointer.

    Raises:
        ValueRangeError: ``group`` is not 1, 2 or 4.
    """
    if group not in GROUPS:
        raise ValueRangeError(f"values come in groups of {GROUPS}, not {group}", where="group")
    if group == 1:
        zero = np.zeros(pattern.nnz, np.int32)
        return Taps(pattern.rows, 1, pattern.row_of, zero, pattern.indices, zero, np.arange(pattern.nnz)[:, None])
    block, lane = np.divmod(pattern.indices, group)
    per_row = -(-pattern.cols // group)
    key, tap = np.unique(pattern.row_of.astype(np.int64) * max(per_row, 1) + block, return_inverse=True)
    row, pitch = np.divmod(key, max(per_row, 1))
    source = np.full((key.size, group), -1, np.int64)
    source[tap, lane] = np.arange(pattern.nnz)
    zero = np.zeros(key.size, np.int32)
    return Taps(pattern.rows, group, row.astype(np.int32), zero, pitch.astype(np.int32), zero, source)


@dataclass(frozen=True)
class Window:
    """How a convolution's kernel walks: everything but weights and padding.

    Attributes:
        kernel, stride, dilation: (rows, columns).
        groups: output and input channels are cut into so many, and each only sees its own.
        masked: loads have a mask per column of the kernel, which cuts what lies beside the image; rows of a plane are
            then as long as those of the output, with nothing between them.
        pitch: how long, where the code is made for that, whose planes begin ``shift`` floats into a cache line; 0 where
            each call says it.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    masked: bool = False
    pitch: int = 0
    shift: int = 0

    @property
    def masks(self) -> int:
        """How many masks the loads need."""
        return self.kernel[1] if self.masked and self.kernel[1] > 1 else 0

    @cached_property
    def mask_places(self) -> tuple[tuple[int, int], ...]:
        """Column phase and offset of every mask: of the columns of the kernel."""
        return tuple(divmod(i * self.dilation[1], self.stride[1])[::-1] for i in range(self.masks))

    @property
    def span(self) -> tuple[int, int]:
        """Rows and columns of the input that one output sees."""
        (kh, kw), (dh, dw) = self.kernel, self.dilation
        return (kh - 1) * dh + 1, (kw - 1) * dw + 1

    def channels(self, columns: int) -> int:
        """Input channels of a weight of so many columns, kernel included."""
        places = self.kernel[0] * self.kernel[1]
        return columns // places * self.groups if places else 0

    @cached_property
    def phases(self) -> tuple[tuple[int, int], ...]:
        """The phases (row, column) that taps read: a plane is split into stride x stride of them."""
        by_axis = (
            sorted({i * d % s for i in range(k)})
            for k, d, s in zip(self.kernel, self.dilation, self.stride, strict=True)
        )
        rows, columns = by_axis
        return tuple((row, column) for row in rows for column in columns)


def conv_taps(pattern: Pattern, window: Window) -> Taps:
    """Taps of a convolution whose weight (O, C / groups, kh, kw) is ``pattern`` (O, C / groups * kh * kw).

    Every input channel has a plane per phase of ``window``. At stride 1 the order of the keys is that of (channel,
    kernel row, kernel column).
    """
    (kh, kw), (sh, sw), (dh, dw) = window.kernel, window.stride, window.dilation
    channels = pattern.cols // (kh * kw) if kh * kw else 0
    channel, place = np.divmod(pattern.indices, max(kh * kw, 1))
    ky, kx = np.divmod(place, max(kw, 1))
    group = pattern.row_of // max(pattern.rows // window.groups, 1)
    row, row_phase = np.divmod(ky * dh, sh)
    column, column_phase = np.divmod(kx * dw, sw)
    rows, columns = (np.unique([phase[axis] for phase in window.phases]) for axis in (0, 1))
    rank = np.searchsorted(rows, row_phase) * columns.size + np.searchsorted(columns, column_phase)
    plane = (group * channels + channel) * len(window.phases) + rank
    return Taps(pattern.rows, 1, pattern.row_of, plane.astype(np.int32), row.astype(np.int32),
                column.astype(np.int32), np.arange(pattern.nnz)[:, None], sparse=True)  # fmt: skip
