"""The heart of the one kernel: the block's taps in the order of their displacement.

An input vector is loaded once per distinct displacement of a block and serves every tap there; a tap is one fused
multiply-add whose weight is broadcast from memory. The code holds the pattern; values are data behind pointer W
(design note 0005).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..codegen.vector import OP, S
from ..schedule.schedule import Schedule
from ..sparsity.taps import Taps
from ..target import Target
from .epilogue import INPUT_REGISTERS
from .plan import Plan

PREFETCH = {S.CODE: 16, S.K: 40}
"""Which pointers run ahead, and every how many taps: the code of a tap takes some 10 bytes, its value 4."""
LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class Body:
    """Columns of the accumulate rows of the whole layer.

    Attributes:
        cuts: (cells + 1,) rows at which the cells, blocks of segments, begin.
        lines: per pointer that runs ahead, (cells,) how many lines each cell prefetches through it.
    """

    op: NDArray[np.uint8]
    d: NDArray[np.int16]
    a: NDArray[np.int16]
    b: NDArray[np.int16]
    ptr: NDArray[np.int8]
    step: NDArray[np.int32]
    disp: NDArray[np.int64]
    cuts: NDArray[np.int64]
    lines: dict[S, NDArray[np.int64]]


def accumulate(taps: Taps, p: Plan, schedule: Schedule, target: Target, tiled: bool) -> Body:
    """Loads and multiply-adds of every block at once: array operations only, whatever the number of nonzeros.

    With ``schedule.prefetch``, taps touch the code and the values that follow line by line: four tiles cover a block
    of equal size.
    """
    broadcast = 0 if target.embedded_broadcast else 1
    n = p.taps.size
    per_tap = p.fresh + np.int64(1 + broadcast)
    touching = [np.arange(every - 1, n if schedule.prefetch else 0, every) for every in PREFETCH.values()]
    for touched in touching:
        per_tap[touched] += 1
    end = np.cumsum(per_tap)
    total = int(end[-1]) if n else 0
    op, d, a, b = (
        np.empty(total, np.uint8),
        np.zeros(total, np.int16),
        np.zeros(total, np.int16),
        np.zeros(total, np.int16),
    )
    ptr, step, disp = np.full(total, S.W, np.int8), np.zeros(total, np.int32), np.zeros(total, np.int64)
    first_input, weight = schedule.rows, schedule.rows + INPUT_REGISTERS
    turn = np.cumsum(p.fresh, dtype=np.int32) % INPUT_REGISTERS
    source = (first_input + turn).astype(np.int16)
    k = taps.pitch[p.taps]
    loaded, at = np.flatnonzero(p.fresh), end - per_tap
    lines: dict[S, NDArray[np.int64]] = {}
    for pointer, touched in zip(PREFETCH, touching, strict=True):
        row, at[touched] = at[touched], at[touched] + 1
        op[row], ptr[row] = OP["prefetch"], pointer
        first = np.searchsorted(touched, p.cuts)  # the first line of every cell
        lines[pointer] = np.diff(first)
        disp[row] = (np.arange(touched.size) - np.repeat(first[:-1], lines[pointer])) * LINE
    row = at[loaded]
    op[row], d[row], ptr[row] = OP["load"], source[loaded], S.X
    if tiled:
        disp[row] = k[loaded].astype(np.int64) * target.tile_bytes
    else:
        step[row] = k[loaded]
    slot_bytes = p.value_slot * 4
    if broadcast:
        row = end - 2
        op[row], d[row], disp[row] = OP["bcast"], weight, slot_bytes
    row = end - 1
    op[row], d[row], a[row] = OP["fma_acc" if broadcast else "fma_bcast"], p.accumulator, source
    if broadcast:
        b[row] = weight
    else:
        disp[row] = slot_bytes
    cuts = np.concatenate([[0], end])[p.cuts]
    return Body(op, d, a, b, ptr, step, disp, cuts, lines)
