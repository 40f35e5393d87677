"""Vectors of x cut out of the cache lines that they lie across, where the code knows how far apart image rows are.

The taps of a 3x3 kernel read vectors a float apart, so nearly all of them cross a line, which costs two accesses each.
Where the distance of rows is a constant, so is the place of every vector within its lines: the two lines are loaded
once, aligned, and shuffled into each of the vectors between them, also those of the next image row if that begins in
the same line. A vector that shares its lines with no other is loaded as it lies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
REGISTERS = 2  # of lines, those of even and of odd numbers


@dataclass(frozen=True, eq=False)
class Lines:
    """Where vectors lie, and which lines are loaded for them.

    Attributes:
        cut: whether the vector is cut out of lines.
        line, lane: where it begins.
        low, high: whether this line, and the next, is loaded in front of it: others have it from a vector before.
    """

    cut: Flags
    line: Ints
    lane: Ints
    low: Flags
    high: Flags


def lines(place: Ints, plane: Ints, chain: NDArray[np.integer], lanes: int) -> Lines:
    """How to load the vectors that begin ``place`` floats into planes, at rising places while plane and chain stay."""
    line, lane = np.divmod(place, lanes)
    n = place.size
    follows, repeats = (
        np.zeros(n, bool),
        np.zeros(n, bool),
    )  # begins in the line behind that of the vector before, in it
    if n:
        same = (plane[1:] == plane[:-1]) & (chain[1:] == chain[:-1])
        follows[1:] = same & (line[1:] == line[:-1] + 1)
        repeats[1:] = same & (line[1:] == line[:-1])
    group = np.cumsum(~repeats) - 1  # of vectors that begin in the same line
    first = np.flatnonzero(~repeats)
    size = np.diff(np.append(first, n))
    joined = follows[first]  # whether the group before begins in the line before
    linked = joined.copy()
    linked[:-1] |= joined[1:]
    cut = ((size > 1) | linked)[group]
    across = cut & (lane > 0)  # reaches into the next line
    begun = np.cumsum(across) - across
    high = across & (begun == begun[first][group])  # the first of its group that does
    reached = np.zeros(first.size, bool)
    reached[group[across]] = True
    known = np.zeros(first.size, bool)
    known[1:] = joined[1:] & reached[:-1]
    low = cut & ~repeats & ~known[group]
    return Lines(cut, line, lane, low, high)
