"""Patterns as compact data, for kernels that loop over it instead of being unrolled from it.

Both forms deal rows, heavy ones first, to *bundles* that advance in lockstep, one nonzero of every row a step, each row
by rising column. A bundle's steps are cut into *folds*, which are summed by themselves (long rows, see
:mod:`sparsert.kernels.plan`); a step holds an entry per row, or nothing where a row has none left within reach.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .pattern import Pattern

Ints = NDArray[np.int64]
PRESENT = 0x80  # in the byte of an entry of a lookup step: there is one
_FURTHEST = 255  # blocks of columns that a window moves at once


@dataclass(frozen=True, eq=False)
class Stream:
    """A pattern as data.

    Attributes:
        order: (rows,) the output row at each position; the positions of the last bundle may exceed them.
        lanes: positions per bundle; ``folds``: folds per bundle.
        counts: (bundles * folds,) int32, trips of the inner loop in each.
        data: what the loop reads beside the values, as bytes.
        source: (n,) which value of the pattern (CSR order) each place of the packed values holds, -1 for padding.
        steps: steps of all bundles; see ``fill``.
        begins: (positions,) whether a row has a nonzero in its first fold.
    """

    order: Ints
    lanes: int
    folds: int
    counts: NDArray[np.int32]
    data: NDArray[np.uint8]
    source: Ints
    steps: int
    begins: NDArray[np.bool_]

    @property
    def bundles(self) -> int:
        return self.counts.size // self.folds

    @property
    def fill(self) -> float:
        """The share of entries that are nonzeros."""
        return int((self.source >= 0).sum()) / max(1, self.steps * self.lanes)


def _dealt(pattern: Pattern, lanes: int, fold: int) -> tuple[Ints, Ints]:
    """The order of rows, and (folds + 1, positions) where in CSR order each position's folds begin."""
    order = np.argsort(-pattern.row_counts, kind="stable")
    positions = -(-pattern.rows // lanes) * lanes
    folds = -(-pattern.cols // fold) if fold and pattern.cols else 1
    cuts = np.zeros((folds + 1, positions), np.int64)
    cuts[0, : order.size], cuts[folds, : order.size] = pattern.indptr[order], pattern.indptr[order + 1]
    if folds > 1:
        key = pattern.row_of.astype(np.int64) * folds + pattern.indices // fold
        begins = np.searchsorted(key, np.arange(pattern.rows * folds)).reshape(-1, folds)
        cuts[:folds, : order.size] = begins[order].T
    return order, cuts


def lockstep(pattern: Pattern, lanes: int, fold: int = 0, unit: int = 1) -> Stream:
    """Entries are columns times ``unit`` (uint16, or uint32 where those of 16 bits do not suffice), ``lanes`` a step.

    Padding stands for column ``cols``, where the kernel keeps zeros.
    """
    order, cuts = _dealt(pattern, lanes, fold)
    folds, positions = cuts.shape[0] - 1, cuts.shape[1]
    bundles = positions // lanes
    length = np.diff(cuts, axis=0)
    counts = length.reshape(folds, bundles, lanes).max(axis=2, initial=0).T.reshape(-1)  # bundle by bundle
    starts = np.concatenate([[0], np.cumsum(counts)])
    steps = int(starts[-1])
    source = np.full(steps * lanes, -1, np.int64)
    for f in range(folds):
        position = np.repeat(np.arange(positions), length[f])
        within = np.arange(position.size) - np.repeat(np.cumsum(length[f]) - length[f], length[f])
        place = (starts[position // lanes * folds + f] + within) * lanes + position % lanes
        source[place] = cuts[f][position] + within
    column = np.where(source >= 0, np.append(pattern.indices, 0)[source], pattern.cols)
    data = (column * unit).astype("<u2" if wide_bytes(pattern, unit) == 2 else "<u4").view(np.uint8)
    return Stream(order, lanes, folds, counts.astype(np.int32), data, source, steps, length[0] > 0)


def wide_bytes(pattern: Pattern, unit: int = 1) -> int:
    """Bytes of an entry in :func:`lockstep`."""
    return 2 if pattern.cols * unit < 1 << 16 else 4


def windows(pattern: Pattern, lanes: int, window: int, unroll: int, fold: int = 0) -> Stream:
    """Entries are bytes, places within a window of columns that moves by whole blocks of ``lanes`` columns.

    A trip begins with a byte, by how many blocks the window moves, and holds ``unroll`` steps of a byte per row: 0 for
    none, else ``PRESENT`` plus the column's distance from the window's begin. The window goes where the row that is
    furthest behind needs it; others may be up to a window ahead, which is what fills the steps. Values have no
    padding: the kernel expands them.
    """
    order, cuts = _dealt(pattern, lanes, fold)
    folds, positions = cuts.shape[0] - 1, cuts.shape[1]
    bundles = positions // lanes
    indices = np.append(pattern.indices.astype(np.int64), 1 << 40)
    base = np.zeros(bundles, np.int64)
    counts = np.zeros((bundles, folds), np.int64)
    found: list[tuple[int, int, Ints, Ints, Ints, Ints]] = []
    ahead = np.arange(unroll)[:, None]
    for f in range(folds):
        at, end = cuts[f].reshape(bundles, lanes).copy(), cuts[f + 1].reshape(bundles, lanes)
        trip = 0
        active = np.flatnonzero((at < end).any(axis=1))
        while active.size:
            here, last = at[active], end[active]
            column = indices[np.where(here < last, here, -1)]
            move = np.minimum(column.min(axis=1) // lanes - base[active], _FURTHEST)
            base[active] += move
            start = base[active] * lanes
            taps = here[:, None, :] + ahead
            inside = taps < last[:, None, :]
            place = indices[np.where(inside, taps, -1)] - start[:, None, None]
            inside &= place < window
            found.append((f, trip, active, move, np.where(inside, taps, -1), np.where(inside, place | PRESENT, 0)))
            at[active] = here + inside.sum(axis=1)
            counts[active, f] += 1
            trip += 1
            active = active[(at[active] < end[active]).any(axis=1)]
    starts = np.concatenate([[0], np.cumsum(counts.reshape(-1))])
    trips = int(starts[-1])
    data = np.zeros((trips, 1 + unroll * lanes), np.uint8)
    source = np.full((trips, unroll * lanes), -1, np.int64)
    for f, trip, active, move, taps, place in found:
        rows = starts[active * folds + f] + trip
        data[rows, 0] = move
        data[rows, 1:] = place.reshape(active.size, -1)
        source[rows] = taps.reshape(active.size, -1)
    packed = source.reshape(-1)
    first = np.diff(cuts, axis=0)[0] > 0
    return Stream(order, lanes, folds, counts.reshape(-1).astype(np.int32), data.reshape(-1), packed[packed >= 0],
                  trips * unroll, first)  # fmt: skip
