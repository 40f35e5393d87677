"""The table of taps: any linear layer as rows of (accumulator, where its input lies, where its weight lies).

A displacement is affine in what is known only at run time: ``plane * P + pitch * p + offset`` with P and p the bytes
between planes and rows of the input. A product with a matrix uses the pitch alone; convolutions use all three.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    rows: int
    group: int
    row: NDArray[np.int32]
    plane: NDArray[np.int32]
    pitch: NDArray[np.int32]
    offset: NDArray[np.int32]
    source: NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.row.size)

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
