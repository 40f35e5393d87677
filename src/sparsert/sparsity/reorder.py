"""In which order output rows are dealt to register blocks. Any order is right; some load fewer input vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .pattern import Pattern

Order = NDArray[np.int64]


def natural(pattern: Pattern, rows: int) -> Order:
    """Rows as they come."""
    return np.arange(pattern.rows)


def by_count(pattern: Pattern, rows: int) -> Order:
    """Heavy rows together: a heavy block touches nearly every column anyway, blocks of light rows then touch few."""
    return np.argsort(-pattern.row_counts, kind="stable")


def by_overlap(pattern: Pattern, rows: int) -> Order:
    """Greedy groups of ``rows``: the heaviest row left seeds a block, then the row adding the fewest new columns joins.

    Rows know their overlap with the block: a column that the block gains adds one to every row that has it.
    """
    m = pattern.rows
    by_column = np.argsort(pattern.indices, kind="stable")
    members = pattern.row_of[by_column]  # rows of column 0, of column 1, ...
    starts = np.concatenate([[0], np.cumsum(np.bincount(pattern.indices, minlength=pattern.cols))])
    # What is minimised: columns a row would add, ties going to the row that shares more. Taken rows cost infinity.
    count = pattern.row_counts.astype(np.float64)
    cost, order = 1.001 * count, np.empty(m, np.int64)
    heaviest = np.argsort(-pattern.row_counts, kind="stable")
    taken, next_seed = np.zeros(m, bool), 0
    for at in range(m):
        if at % rows == 0:
            while taken[heaviest[next_seed]]:
                next_seed += 1
            row = int(heaviest[next_seed])
            covered = np.zeros(pattern.cols, bool)
            cost = np.where(taken, np.inf, 1.001 * count)
        else:
            row = int(np.argmin(cost))
        order[at], taken[row], cost[row] = row, True, np.inf
        mine = pattern.indices[pattern.indptr[row] : pattern.indptr[row + 1]]
        fresh = mine[~covered[mine]]
        covered[fresh] = True
        touched = members[_ranges(starts[fresh], starts[fresh + 1])]
        cost -= np.bincount(touched, minlength=m)
    return order


def _ranges(begin: Order, end: Order) -> Order:
    """All integers of the half-open ranges, one range behind the other."""
    length = end - begin
    total = np.cumsum(length)
    if not total.size:
        return np.zeros(0, np.int64)
    ranges: Order = np.arange(total[-1]) + np.repeat(begin - total + length, length)
    return ranges


ORDERS = {"natural": natural, "count": by_count, "overlap": by_overlap}


def loads(pattern: Pattern, order: Order, rows: int) -> int:
    """Input vectors that blocks of ``rows`` rows in ``order`` load per column tile: distinct (block, column) pairs."""
    if not pattern.nnz:
        return 0
    rank = np.empty(pattern.rows, np.int64)
    rank[order] = np.arange(pattern.rows)
    touched = np.zeros((-(-pattern.rows // rows), pattern.cols), bool)
    touched[rank[pattern.row_of] // rows, pattern.indices] = True
    return int(np.count_nonzero(touched))
