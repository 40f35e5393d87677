"""How a dense product is blocked: one frozen record, read off the caches. No choice changes a bit of the result."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ScheduleError
from ..target import Target

_SHARE = 4  # a panel of B takes at most this part of the second-level cache


@dataclass(frozen=True)
class DenseSchedule:
    """Blocks of K of ``k_block`` steps, each with its panels of B; ``anew``: sums of a block begin anew (see below)."""

    k_block: int
    anew: bool = False

    def __post_init__(self) -> None:
        if self.k_block < 1:
            raise ScheduleError(f"k_block={self.k_block} is not positive", where="k_block")

    def __str__(self) -> str:
        return f"k_block={self.k_block}{' summed in pieces' if self.anew else ''}"


def choose(k: int, fold: int, target: Target, width: int) -> DenseSchedule:
    """Blocks of equal size, so that a panel of ``width`` bytes per k stays in the second-level cache.

    ``fold`` (0: none): K is so long that it must be summed in pieces of that size.
    """
    if fold:
        return DenseSchedule(fold, True)
    most = max(256, target.l2 // _SHARE // width)
    return DenseSchedule(max(1, -(-k // -(-k // most))) if k else 1)
