"""How a dense product is blocked: one frozen record, read off the caches. No choice changes a bit of the result."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from ..errors import ScheduleError
from ..target import Target

_LEAST_K = 512  # steps of a block of K: shorter ones load and store sums too often
_SHARE = 2  # a group of panels, or a single one, takes at most this part of the second-level cache
_PANELS = 8  # ... and twice as many are no faster
_TURNING = 12  # steps of k that take as long as transposing a result; with separate broadcasts it never paid
_FEW_POSITIONS = (
    64  # of a convolution, which with separate broadcasts are better turned (49: 1.1 and 1.4 times, 196: 0.8)
)
_LINE, _WAYS = 64, 8


@dataclass(frozen=True)
class DenseSchedule:
    """How a dense product is blocked.

    Attributes:
        k_block: steps of k per block; the sums are carried from block to block in the output.
        panels: panels of columns per group; the blocks of rows go over a group one after the other.
        copy: rows of a row-major first operand are copied first, since their pitch lets them share few sets of a cache.
        anew: the sum of each block of K begins anew and is added to those before, as wide rows need.
    """

    k_block: int
    panels: int = 1
    copy: bool = False
    anew: bool = False

    def __post_init__(self) -> None:
        for name in ("k_block", "panels"):
            if getattr(self, name) < 1:
                raise ScheduleError(f"{name}={getattr(self, name)} is not positive", where=name)

    def __str__(self) -> str:
        words = f"k_block={self.k_block} panels={self.panels}"
        return words + " copy" * self.copy + " anew" * self.anew


def choose(k: int, fold: int, target: Target, width: int) -> DenseSchedule:
    """Blocks of equal size, a group of whose panels of ``width`` bytes per k stays in the second-level cache.

    ``fold`` (0: none): K is so long that it must be summed in pieces of that size.
    """
    room = target.l2 // _SHARE // width
    if fold:
        return DenseSchedule(fold, max(1, min(_PANELS, room // fold)), anew=True)
    k_block = max(1, -(-k // -(-k // max(_LEAST_K, room)))) if k else 1
    return DenseSchedule(k_block, max(1, min(_PANELS, room // k_block)))


def conflicts(pitch: int, rows: int, target: Target) -> bool:
    """Whether ``rows`` rows of this pitch fall into so few sets of the first-level cache that they evict each other."""
    sets = target.l1d // _LINE // _WAYS
    if pitch % _LINE:
        return False
    return rows > _WAYS // 2 * (sets // gcd(pitch // _LINE, sets))


def turns(m: int, columns: int, k: int, target: Target) -> bool:
    """Whether y (m, columns) is better computed transposed: its rows then fill vectors that its columns would not.

    Transposing back costs little beside the product, but wants four columns and a vector of rows, at least, and of both
    where there is a residual.
    """
    lanes = target.lanes
    if not target.embedded_broadcast or m < lanes or columns < lanes:
        return False
    return columns * -(-m // lanes) * (k + _TURNING) < m * -(-columns // lanes) * k


def turns_image(m: int, positions: int, k: int, target: Target) -> bool:
    """The same for a convolution, whose transposed product leaves out kernel rows and prefetches weights, too."""
    few = min(m, positions) >= target.lanes and positions <= _FEW_POSITIONS and not target.embedded_broadcast
    return few or turns(m, positions, k, target)
