"""In which order a layer's taps are executed, and where each finds its value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..schedule.schedule import Schedule
from ..sparsity.partition import row_blocks
from ..sparsity.taps import Taps

_SHORT = 1 << 16  # keys below sort by radix
FOLD_TAPS = 4096  # the longest sum of float32 products whose rounding stays well inside the promised bound


@dataclass(frozen=True, eq=False)
class Plan:
    """The taps of a layer in execution order, segment by segment and block by block.

    Attributes:
        blocks: (blocks + 1,) offsets into ``order``; ``order``: the output row each position stands for.
        cuts: (segments * blocks + 1,) offsets into the tap arrays.
        taps: (n,) tap executed at each place; ``accumulator``: its row within the block; ``fresh``: it needs a new
            vector of x.
        value_slot: (n,) where each tap's values lie in the packed array, in 32-bit slots (one float32, two bfloat16 or
            four int8); ``bias_slot``: (rows,) by position.
        folds: each segment is summed by itself and added to those before, instead of going on from their sum.
    """

    blocks: NDArray[np.int64]
    order: NDArray[np.int64]
    cuts: NDArray[np.int64]
    taps: NDArray[np.int64]
    accumulator: NDArray[np.int64]
    fresh: NDArray[np.bool_]
    value_slot: NDArray[np.int64]
    bias_slot: NDArray[np.int64]
    slots: int
    folds: bool

    @property
    def n_blocks(self) -> int:
        return int(self.blocks.size) - 1

    @property
    def first_cells(self) -> range:
        """The first cell of every segment."""
        return range(0, self.cuts.size - 1, max(1, self.n_blocks))

    @property
    def segments(self) -> int:
        return max(1, (self.cuts.size - 1) // max(1, self.n_blocks))


def plan(taps: Taps, extent: int, order: NDArray[np.int64], schedule: Schedule, bias: bool, unit: int = 1) -> Plan:
    """Sort ``taps`` of an ``extent``-row input by (segment, block, displacement, row) and give every value its slot.

    The rows of every block are a multiple of ``unit``.
    """
    blocks = row_blocks(taps.rows, schedule.rows, unit)
    n_blocks = blocks.size - 1
    fold = _fold_width(taps, extent)
    width = fold or schedule.k_segment or max(extent, 1)
    segments = max(1, -(-extent // width))
    position = np.empty(taps.rows, np.int64)
    position[order] = np.arange(taps.rows)
    block_of = np.repeat(np.arange(n_blocks), np.diff(blocks))
    inside = np.arange(taps.rows) - blocks[:-1][block_of] if taps.rows else np.zeros(0, np.int64)
    tap_position = position.take(taps.row)
    block, k = block_of.take(tap_position), taps.key
    cell = k // width * n_blocks + block if segments > 1 else block
    place = cell * max(extent, 1) + k
    executed = _lexsort(tap_position, place) if place.size and place.max() < _SHORT else _lexsort(tap_position, k, cell)
    accumulator = inside.take(tap_position)
    place = place.take(executed)
    fresh = np.ones(place.size, bool)
    np.not_equal(place[1:], place[:-1], out=fresh[1:])
    cuts = np.searchsorted(place, np.arange(segments * n_blocks + 1) * max(extent, 1))
    # Biases of a block stand in front of its first segment's values: one pointer walks both.
    ahead = blocks[1:] if bias else np.zeros(n_blocks, np.int64)
    shift = np.concatenate([ahead, np.full((segments - 1) * n_blocks, ahead[-1] if n_blocks else 0)])
    value_slot = np.arange(place.size) + np.repeat(shift, np.diff(cuts))
    bias_slot = np.arange(taps.rows) + cuts[:-1][block_of] if bias else np.zeros(0, np.int64)
    return Plan(blocks, order, cuts, executed, accumulator.take(executed), fresh, value_slot, bias_slot,
                int(place.size + (taps.rows if bias else 0)), fold > 0)  # fmt: skip


def _fold_width(taps: Taps, extent: int) -> int:
    """Input rows per fold, 0 for none; see :func:`fold_width`."""
    return fold_width(int(np.bincount(taps.row).max()), extent) if extent > FOLD_TAPS and len(taps) else 0


def fold_width(most: int, extent: int) -> int:
    """Of ``extent`` input rows, how many a sum of at most ``most`` products takes at a time; 0: all.

    One running sum over tens of thousands of products of one sign would drift beyond the error bound. Such rows are
    summed in pieces, whose borders depend on the pattern alone: results stay the same under every schedule.
    """
    return -(-extent // -(-2 * most // FOLD_TAPS)) if most > FOLD_TAPS else 0


def _lexsort(*keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """The stable permutation that sorts by the last key, then the one before, and so on.

    Keys that fit are narrowed to short words, which NumPy sorts by radix.
    """
    order: NDArray[np.int64] | None = None
    for key in keys:
        if order is None and (key[1:] >= key[:-1]).all():  # rows in their natural order are
            continue
        short = key.astype(np.uint16) if key.size and key.max() < _SHORT else key
        if order is None:
            order = np.argsort(short, kind="stable")
        else:
            order = order.take(np.argsort(short.take(order), kind="stable"))
    return np.arange(keys[0].size) if order is None else order
