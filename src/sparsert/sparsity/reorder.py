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
    """Heavy rows together: a block of heavy rows touches nearly every column anyway, blocks of light rows then touch few."""
    return np.argsort(-pattern.row_counts, kind="stable")


def by_overlap(pattern: Pattern, rows: int) -> Order:
    """Greedy groups of ``rows``: the heaviest row left seeds a block, then whichever row adds the fewest new columns joins.

    Cost is O(rows of the matrix squared * columns) bit operations: for layers whose cost model asks for it.
    """
    m = pattern.rows
    member = np.zeros((m, max(pattern.cols, 1)), np.float32)
    member[pattern.row_of, pattern.indices] = 1.0
    counts = pattern.row_counts.astype(np.float32)
    left, order = np.ones(m, bool), np.empty(m, np.int64)
    at = 0
    while at < m:
        seed = int(np.argmax(np.where(left, counts, -1.0)))
        covered = member[seed].copy()
        shared = member @ covered
        block = [seed]
        left[seed] = False
        while len(block) < rows and at + len(block) < m:
            # Few new columns first, many shared ones as the tie-break.
            score = np.where(left, shared - 1.001 * counts, -np.inf)
            best = int(np.argmax(score))
            fresh = member[best] * (1.0 - covered)
            shared += member @ fresh
            covered += fresh
            left[best] = False
            block.append(best)
        order[at : at + len(block)] = block
        at += len(block)
    return order


ORDERS = {"natural": natural, "count": by_count, "overlap": by_overlap}


def loads(pattern: Pattern, order: Order, rows: int) -> int:
    """Input vectors that blocks of ``rows`` rows taken in ``order`` load per column tile: distinct (block, column) pairs."""
    if not pattern.nnz:
        return 0
    rank = np.empty(pattern.rows, np.int64)
    rank[order] = np.arange(pattern.rows)
    touched = np.zeros((-(-pattern.rows // rows), pattern.cols), bool)
    touched[rank[pattern.row_of] // rows, pattern.indices] = True
    return int(np.count_nonzero(touched))
