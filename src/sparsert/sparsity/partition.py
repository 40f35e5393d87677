"""How rows are cut into register blocks, and blocks into equal shares of work."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def row_blocks(rows: int, limit: int, unit: int = 1) -> NDArray[np.int64]:
    """Offsets of the fewest blocks of at most ``limit`` rows, as equal as can be.

    A last block of two rows would starve the FMAs. With ``unit``, which divides ``rows`` and is at most ``limit``,
    every block is a multiple of it.
    """
    units, most = rows // unit, limit // unit
    count = -(-units // most) if units else 0
    return np.arange(count + 1) * units // max(count, 1) * unit


def balanced(work: NDArray[np.int64], parts: int) -> NDArray[np.int64]:
    """Offsets that cut consecutive items into ``parts`` runs of nearly equal ``work`` (nonzeros)."""
    total = np.concatenate([[0], np.cumsum(work)])
    goals = total[-1] * np.arange(1, parts) / parts
    cuts = np.searchsorted(total, goals, side="left")
    # Of the two borders around a goal, take the nearer.
    before = np.maximum(cuts - 1, 0)
    cuts = np.where(goals - total[before] < total[np.minimum(cuts, total.size - 1)] - goals, before, cuts)
    return np.concatenate([[0], np.maximum.accumulate(cuts), [work.size]]).astype(np.int64)
