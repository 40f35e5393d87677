"""A dense product on one thread or several: ranges of its batch, of its panels of columns or of its blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.dense_micro import VECTORS
from ..runtime.cpu import Frame, address_of
from ..runtime.memory import aligned_empty
from ..runtime.workers import job
from .team import Crew

RANGES = ("matrices", "columns", "rows")
"""What parts may be ranges of."""
_ROWS_COST = 1.02  # each range of rows packs the columns for itself


class Shareable:
    """What dense operators have in common: threads for their calls, and a bias that stays where bindings found it."""

    crew: Crew | None

    def __init__(self) -> None:
        self.crew = None
        self.seen: dict[int, str] = {}
        self._bias = aligned_empty(0)
        self._bindings: dict[Any, Any] = {}

    def share(self, crew: Crew) -> None:
        """Calls for shapes not seen yet may use several threads."""
        self.crew = crew
        self._bindings.clear()

    def threads_note(self) -> str:
        """How many threads calls so far used, in words."""
        return note(self.crew, self.seen)

    def _keep(self, bias: NDArray[np.float32] | None) -> None:
        if bias is not None and not self._bias.size:
            self._bias = aligned_empty(bias.size)
            self._bias[:] = bias


@dataclass(frozen=True)
class Extents:
    """C (batch, M, N) = A (batch, M, K) @ B (batch, K, N), and where things lie, in bytes.

    Pitches go from row to row as stored: of A given by columns, and of B transposed, those of the stored array.
    ``a_block``: from block to block of packed rows of A; ``panel``: from panel to panel of packed B.
    """

    batch: int
    m: int
    n: int
    k: int
    a_pitch: int
    b_pitch: int
    c_pitch: int
    r_pitch: int = 0
    a_batch: int = 0
    b_batch: int = 0
    c_batch: int = 0
    r_batch: int = 0
    a_block: int = 0
    panel: int = 0
    bias_batch: int = 0


class Blocks(NamedTuple):
    """How rows are cut: large blocks come first, small ones have a row less than the ``size`` of a large one."""

    large: int
    small: int
    size: int

    def range(self, low: int, high: int) -> tuple[Blocks, int]:
        """Of the blocks from one number up to another, and the first row."""
        large = max(0, min(high, self.large) - low)
        return Blocks(large, high - low - large, self.size), low * self.size - max(0, low - self.large)

    @property
    def rows(self) -> int:
        """Of all blocks."""
        return self.large * self.size + self.small * (self.size - 1)


def blocks_of_rows(m: int, most: int) -> Blocks:
    """The fewest blocks of at most ``most`` rows, as equal as can be."""
    count = -(-m // most)
    size = -(-m // count)
    large = m - count * (size - 1)
    return Blocks(large, count - large, size)


class Shift(NamedTuple):
    """How many bytes the operands of a part lie behind those of the whole."""

    a: int = 0
    b: int = 0
    c: int = 0
    r: int = 0
    bias: int = 0


class Share(NamedTuple):
    """What one thread does: ``first`` is its first column."""

    extents: Extents
    blocks: Blocks
    shift: Shift
    first: int = 0


def share_out(
    e: Extents, most: int, lanes: int, crew: Crew | None, *, a: str, b: str, bias: str | None,
    among: tuple[str, ...] = RANGES,
) -> tuple[list[Share], str]:  # fmt: skip
    """The parts of a product, and what they are ranges of.

    Args:
        most: rows of the largest block.
        a, b, bias: how the operands are stored, as :class:`~.kernels.dense_arguments.Form` says.
        among: what to choose from.
    """
    blocks, width = blocks_of_rows(e.m, most), VECTORS * lanes
    work = e.batch * e.m * e.k * -(-e.n // lanes)
    parts = 1 if crew is None else crew.wanted(work)
    units = {"matrices": e.batch, "columns": -(-e.n // width), "rows": blocks.large + blocks.small}

    def longest(kind: str) -> float:
        """The part of the work that the slowest thread has."""
        return -(-units[kind] // parts) / units[kind] * (_ROWS_COST if kind == "rows" and not e.panel else 1.0)

    by = min(among, key=longest)
    parts = min(parts, units[by])
    if parts < 2:
        return [Share(e, blocks, Shift())], ""
    found = []
    for low, high in pairwise(units[by] * i // parts for i in range(parts + 1)):
        if by == "matrices":
            shift = Shift(*(low * step for step in (e.a_batch, e.b_batch, e.c_batch, e.r_batch, e.bias_batch)))
            found.append(Share(replace(e, batch=high - low), blocks, shift))
        elif by == "columns":
            first, last = low * width, min(high * width, e.n)
            moved = low * e.panel if e.panel else first * (e.b_pitch if b == "transposed" else 4)
            shift = Shift(0, 0 if b == "image" else moved, 4 * first, 4 * first, 4 * first * (bias == "columns"))
            found.append(Share(replace(e, n=last - first), blocks, shift, first))
        else:
            some, row = blocks.range(low, high)
            moved = low * e.a_block if e.a_block else row * (e.a_pitch if a == "rows" else 4)
            shift = Shift(moved, 0, row * e.c_pitch, row * e.r_pitch, 4 * row * (bias == "rows"))
            found.append(Share(replace(e, m=some.rows), some, shift))
    return found, by


class Parts:
    """Frames for arrays of one shape, and the native call on all of them. One caller at a time has them to itself.

    Args:
        frames: of each part, and its share, or how far its operands lie behind the whole's.
        address, call: of the code that all of them run.
        how: in words, how the call is shared out.
    """

    __slots__ = ("_address", "_call", "_frames", "_job", "_pool", "how", "shares")

    def __init__(
        self, frames: Sequence[tuple[Frame, Share] | tuple[Frame, Shift]], address: int,
        call: Callable[[int], None], crew: Crew | None, how: str,
    ) -> None:  # fmt: skip
        self.how, self.shares = how, [share for _, share in frames if isinstance(share, Share)]
        shifts = [share.shift if isinstance(share, Share) else share for _, share in frames]
        self._frames = [(frame.point, *shift[:4]) for (frame, _), shift in zip(frames, shifts, strict=True)]
        self._pool = None if crew is None or len(frames) < 2 else crew.pool()
        if self._pool is None:
            self._address, self._call = frames[0][0].address, call
        else:
            self._job = job(self._pool.address, [(address, frame.address) for frame, _ in frames])
            self._address, self._call = address_of(self._job), self._pool.dispatch

    def point(self, a: int, b: int, c: int, r: int) -> None:
        """Where the operands lie."""
        for point, da, db, dc, dr in self._frames:
            point(a + da, b + db, c + dc, r + dr)

    def run(self) -> None:
        """The native call."""
        pool = self._pool
        if pool is not None and pool.workers < len(self._frames) - 1:  # the child of a fork has none yet
            pool.ensure(len(self._frames) - 1)
        self._call(self._address)


def note(crew: Crew | None, seen: dict[int, str]) -> str:
    """How many threads calls so far used, in words; ``seen`` by number of columns."""
    if crew is None:
        return "1, as asked for, or all that this system has"
    trouble = crew.pool().trouble if seen else ""
    words = [f"{columns} columns {how}" for columns, how in list(seen.items())[-4:]]
    return "; ".join((f"up to {crew.threads}", *words, *([trouble] if trouble else [])))


def described(parts: int, by: str) -> str:
    """How a call is shared out, in words."""
    return f"in {parts} ranges of {by}" if parts > 1 else "on the caller alone"
