"""A register block as code: start accumulators, walk its taps, run the epilogue, store; for every tile of the group."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codegen.registers import Template
from ..codegen.vector import OP, Builder, S
from ..schedule.schedule import Schedule
from ..schedule.task import Task
from ..target import Target
from . import epilogue
from .accumulate import LINE, Body
from .arguments import Arg
from .epilogue import INPUT_REGISTERS
from .handover import Handover
from .layout import TRANSPOSED_Y, Cursor, load_multiples, scatter
from .plan import Plan


@dataclass(frozen=True, eq=False)
class Blocks:
    """Emits the code of all row blocks for the tiles of one group; control falls through from block to block."""

    task: Task
    target: Target
    schedule: Schedule
    plan: Plan
    body: Body
    tiled: bool  # x is read tile by tile,
    packs: bool  # from a panel that the first block of a segment fills
    finish: Template | None
    handover: Handover
    scatters: bool  # transposed output is written from the accumulators, without a panel in between

    def emit(self, b: Builder) -> None:
        p, blocks = self.plan, self.plan.n_blocks
        if not self.tiled or self.packs or self.scatters:
            load_multiples(b, Arg.Y_PITCH if self.scatters else Arg.X_PITCH)
        here = b.label()
        for cell in range(p.segments * blocks):
            first, last = cell < blocks, cell >= (p.segments - 1) * blocks
            if first or last or cell in self.body.copied or self.body.cuts[cell + 1] > self.body.cuts[cell]:
                following = b.label()
                b.place(here)
                self._block(b, cell, cell % blocks, first, last, following)
                here = following
        b.place(here)

    def _block(self, b: Builder, cell: int, block: int, first: bool, last: bool, following: int) -> None:
        """One block of one segment; ``following`` labels the code behind it."""
        task, p, c = self.task, self.plan, self.body
        span = slice(int(p.blocks[block]), int(p.blocks[block + 1]))
        body = slice(int(c.cuts[cell]), int(c.cuts[cell + 1]))
        rows = p.order[span]
        n = rows.size
        x, y, r, sums = self._cursors
        packing = self.packs and block == 0
        cursors = (
            ([self._in_place, x] if packing else [x])
            + ([y] if last else [])
            + ([r] if last and task.residual else [])
            + ([] if first and last else [sums])
        )
        shown = ", ".join(map(str, rows[:4].tolist())) + (" ..." if n > 4 else "")
        segment = f", segment {cell // (p.n_blocks)}" if p.segments > 1 else ""
        top = b.label(f"rows {shown}{segment}")
        if not self.handover.chained:
            self.handover.open(b)
        self._run_ahead(b, cell, following)
        for cursor in cursors:
            cursor.rewind(b)
        b.emit("s_arg", d=S.T, disp=Arg.COUNT.byte)
        b.emit("align", disp=16)
        b.place(top)
        if packing:
            self._in_place.point(b, S.X)
            x.point(b, S.PANEL)
            self._copy(b, c.copied.get(cell, np.zeros(0, np.int64)))
        else:
            x.point(b, S.X)
        b.emit("s_arg", d=S.W, disp=Arg.W.byte)
        if not first and not p.folds:
            sums.point(b, S.CONST)
        self.handover.begin(b)
        idle = np.flatnonzero(c.idle[cell, :n])
        if idle.size:
            self.handover.renew(b, cell, idle)
        b.emit_many(n=body.stop - body.start, **{name: column[body] for name, column in c.columns.items()})
        if not first and p.folds:
            sums.point(b, S.Y)
            for accumulator, disp in enumerate((rows * self.target.tile_bytes).tolist()):
                b.emit("load", d=n, ptr=S.Y, disp=disp)
                b.emit("add", d=accumulator, a=accumulator, b=n)
        if not last:
            self.handover.end(b, cell, sums, None)
        else:
            self._finish(b, cell, rows, r, y)
        for cursor in cursors:
            cursor.advance(b)
        for pointer, lines in c.lines.items():
            if lines[cell]:
                b.emit("s_addi", d=pointer, disp=int(lines[cell]) * LINE)
        b.emit("loop", a=S.T, disp=top)
        if not self.handover.chained:
            self.handover.close(b, cell)

    def _run_ahead(self, b: Builder, cell: int, following: int) -> None:
        """Point at the code and the values that come after this cell's, where it prefetches any."""
        p, end = self.plan, int(self.plan.cuts[cell + 1])
        if any(lines[cell] for lines in self.body.lines.values()):
            b.emit("s_code", d=S.PANEL, disp=following)
            b.emit("s_arg", d=S.K, disp=Arg.W.byte)
            b.emit("s_addi", d=S.K, disp=4 * int(p.value_slot[end] if end < p.taps.size else p.slots))

    def _copy(self, b: Builder, k: NDArray[np.int64]) -> None:
        """Rows ``k`` of x to the panel."""
        register = np.repeat(self.schedule.rows + np.arange(k.size) % INPUT_REGISTERS, 2)
        stores = np.tile([False, True], k.size)
        k = np.repeat(k, 2)
        b.emit_many(
            np.where(stores, OP["store"], OP["load"]), k.size, register, register, 0,
            np.where(stores, S.PANEL, S.X), np.where(stores, 0, k), np.where(stores, k * self.target.tile_bytes, 0),
        )  # fmt: skip

    def _finish(self, b: Builder, cell: int, rows: NDArray[np.int64], r: Cursor, y: Cursor) -> None:
        """Epilogue and output of a block that has all its taps."""
        n = rows.size
        if self.finish is not None:
            where = self._residual(b, r, rows) if self.task.residual else {}
            epilogue.apply(b, self.finish, n, where)
        if self.scatters:
            y.point(b, S.X)
            b.emit("s_addi", d=S.X, disp=4 * int(rows[0]))
            scatter(b, self.target, n)
        else:
            self.handover.end(b, cell, y, Arg.Y_PITCH)

    @cached_property
    def _in_place(self) -> Cursor:
        """Over the tiles of x in rows of the caller's."""
        return Cursor(Arg.XT, Arg.X, Arg.X_NEXT, self.target.tile_bytes, Arg.X_LAST)

    @cached_property
    def _cursors(self) -> tuple[Cursor, Cursor, Cursor, Cursor]:
        """Over the tiles of x, y, the residual, and the sums carried between segments."""
        tile = self.target.tile_bytes
        rows, columns = self.task.pattern.rows * tile, self.task.pattern.cols * tile
        partial = Cursor(Arg.PT, Arg.PARTIAL, Arg.ZERO, rows)
        if self.task.layout == "tile_major":
            x, y, r = (
                Cursor(Arg.XT, Arg.X, Arg.X_NEXT, columns),
                Cursor(Arg.YT, Arg.Y, Arg.Y_NEXT, rows),
                Cursor(Arg.RT, Arg.R, Arg.R_NEXT, rows),
            )
        elif self.task.layout == "transposed":
            x, r = Cursor(Arg.XT, Arg.PANEL, Arg.ZERO, columns), Cursor(Arg.RT, Arg.R_PANEL, Arg.ZERO, rows)
            y = TRANSPOSED_Y if self.scatters else Cursor(Arg.YT, Arg.Y_PANEL, Arg.ZERO, rows)
        else:
            x = Cursor(Arg.PANEL_T, Arg.PANEL, Arg.ZERO, columns) if self.packs else self._in_place
            y, r = (
                Cursor(Arg.YT, Arg.Y, Arg.Y_NEXT, tile, Arg.Y_LAST),
                Cursor(Arg.RT, Arg.R, Arg.R_NEXT, tile, Arg.R_LAST),
            )
        return x, y, r, partial

    def _residual(self, b: Builder, r: Cursor, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Point Y at the tile of the residual; say where each accumulator's vector lies in it."""
        r.point(b, S.Y)
        if self.task.layout != "row_major":
            return {"ptr": S.Y, "step": 0, "disp": rows * self.target.tile_bytes}
        b.emit("s_arg", d=S.PY, disp=Arg.R_PITCH.byte)
        return {"ptr": S.Y, "step": rows}
