"""How accumulators pass from one turn, a block's pass over one tile, to the next.

Thirty stores in a row fill the scheduler while the multiply-adds behind them wait for it: a twentieth of the time at
90 %. So an accumulator keeps its result into the next turn and is stored there right before its own first tap starts
it anew, which spreads the stores over some hundred multiply-adds (design note 0010).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codegen.vector import OP, Builder, S
from ..schedule.task import Task
from ..target import Target
from .arguments import Arg
from .layout import Cursor
from .plan import Plan

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Handover:
    """Which results wait for the next turn, and how any turn stores and starts its accumulators.

    The turn before left behind where its results go: ``Arg.BEHIND`` and, of row-major arrays, ``Arg.BEHIND_PITCH``.
    Before the first turn these lead to scratch that nobody reads, since what the registers hold there is no result.

    Attributes:
        deferred: accumulators below this number are stored by the next turn, the others at the end of their own.
        chained: the next turn may be another block's. Otherwise the last turn of every block stores what is left.
    """

    task: Task
    target: Target
    plan: Plan
    deferred: int
    chained: bool

    @cached_property
    def discarded(self) -> int:
        """Vectors of scratch that the stores before the first turn may write."""
        if not self.deferred:
            return 0
        if self.task.layout == "row_major":
            return 1  # all of them to the same place, with a pitch of 0
        return self.deferred if self.chained else self.task.pattern.rows

    def open(self, b: Builder) -> None:
        """Before the first turn of a chain."""
        if self.deferred:
            b.emit_many("zero", self.deferred, d=np.arange(self.deferred))
            b.emit("s_arg", d=S.TMP, disp=Arg.DISCARD.byte)
            b.emit("s_put", a=S.TMP, disp=Arg.BEHIND.byte)
            b.emit("s_arg", d=S.TMP, disp=Arg.ZERO.byte)
            b.emit("s_put", a=S.TMP, disp=Arg.BEHIND_PITCH.byte)

    def begin(self, b: Builder) -> None:
        """At the top of a turn: Y to where the turn before wanted its results."""
        if self.deferred:
            b.emit("s_arg", d=S.Y, disp=Arg.BEHIND.byte)
            if self.task.layout == "row_major":
                b.emit("s_arg", d=S.PY, disp=Arg.BEHIND_PITCH.byte)

    def end(self, b: Builder, cell: int, cursor: Cursor, pitch: Arg | None) -> None:
        """The results of a turn of ``cell`` go where ``cursor`` points: now, or by and by in the next turn.

        ``pitch``: of the array, if it is row-major; None for the sums of a segment, which are tiles.
        """
        first, last = self._span(cell)
        cursor.point(b, S.Y)
        if self.task.layout == "row_major":
            if pitch is None:
                b.emit("s_set", d=S.PY, disp=self.target.tile_bytes)
            else:
                b.emit("s_arg", d=S.PY, disp=pitch.byte)
        if pitch is not None and self.task.window and self.task.window.pitch:
            self._tail(b, cursor)
        if self.chained:
            if self.task.layout == "row_major":
                b.emit("s_muli", d=S.TMP, a=S.PY, disp=first)
                b.emit("s_add", d=S.Y, a=S.TMP)
            else:
                b.emit("s_addi", d=S.Y, disp=first * self.target.tile_bytes)
        now = np.arange(self.deferred, last - first)
        if now.size:
            rows = now if self.chained else self.plan.order[first + now]
            b.emit_many("store", now.size, a=now, **self._place(rows))
        if self.deferred:
            b.emit("s_put", a=S.Y, disp=Arg.BEHIND.byte)
            if self.task.layout == "row_major":
                b.emit("s_put", a=S.PY, disp=Arg.BEHIND_PITCH.byte)

    def _tail(self, b: Builder, cursor: Cursor) -> None:
        """To scratch instead, if y ends in the midst of the tile."""
        whole = b.label()
        b.emit("s_arg", d=S.TMP, disp=cursor.at.byte)
        b.emit("s_arg", d=S.W, disp=Arg.TAIL_AT.byte)
        b.emit("jump_differs", a=S.TMP, b=S.W, disp=whole)
        b.emit("s_arg", d=S.Y, disp=Arg.TAIL.byte)
        b.emit("s_set", d=S.PY, disp=self.target.tile_bytes)
        b.place(whole)

    def close(self, b: Builder, cell: int = 0) -> None:
        """Store what the last turn left, which was one of ``cell`` unless the turns are chained."""
        if self.deferred:
            self.begin(b)
            first, last = self._span(cell)
            accumulators = np.arange(min(self.deferred, last - first))
            b.emit_many(n=accumulators.size, **self.store(np.full_like(accumulators, cell), accumulators))

    def renew(self, b: Builder, cell: int, accumulators: Ints) -> None:
        """Store and start ``accumulators``, which no tap does."""
        of = np.full_like(accumulators, cell)
        waiting = int(np.count_nonzero(accumulators < self.deferred))  # the first ones
        b.emit_many(n=waiting, **self.store(of[:waiting], accumulators[:waiting]))
        b.emit_many(n=of.size, **self.start(of, accumulators))

    def store(self, cell: Ints, accumulator: Ints) -> dict[str, Any]:
        """Rows that store what the turn before left in accumulators of ``cell``."""
        rows = accumulator if self.chained else self._rows(cell, accumulator)
        return {"op": OP["store"], "a": accumulator} | self._place(rows)

    def start(self, cell: Ints, accumulator: Ints) -> dict[str, Any]:
        """Rows that start accumulators of ``cell``: with 0, with the bias, or with the sums of the segments before."""
        p = self.plan
        op = np.full(cell.shape, OP["zero"], np.uint8)
        disp, ptr = np.zeros(cell.shape, np.int64), np.full(cell.shape, S.W, np.int8)
        blocks = p.n_blocks
        if self.task.bias:
            of = cell < blocks
            op[of] = OP["bcast"]
            disp[of] = 4 * p.bias_slot[p.blocks[cell[of]] + accumulator[of]]
        of = cell >= blocks
        op[of], ptr[of] = OP["load"], S.CONST
        disp[of] = self._rows(cell[of], accumulator[of]) * self.target.tile_bytes
        return {"op": op, "d": accumulator, "ptr": ptr, "disp": disp}

    def _span(self, cell: int) -> tuple[int, int]:
        """From which to which position of ``plan.order`` the block of ``cell`` reaches."""
        block = cell % self.plan.n_blocks
        return int(self.plan.blocks[block]), int(self.plan.blocks[block + 1])

    def _rows(self, cell: Ints, accumulator: Ints) -> Ints:
        """The output rows that accumulators of ``cell`` stand for."""
        position: Ints = self.plan.blocks[cell % self.plan.n_blocks] + accumulator
        return self.plan.order[position]

    def _place(self, rows: Ints) -> dict[str, Any]:
        """Where ``rows``, counted from where Y points, lie."""
        if self.task.layout == "row_major":
            return {"ptr": S.Y, "step": rows}
        return {"ptr": S.Y, "disp": rows * self.target.tile_bytes}
