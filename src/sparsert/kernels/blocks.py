"""A register block as code: start accumulators, walk its taps, run the epilogue, store; for every tile of the group."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codegen.registers import Template
from ..codegen.vector import Builder, S
from ..schedule.task import Task
from ..target import Target
from . import epilogue
from .accumulate import LINE, Body
from .arguments import Arg
from .layout import TRANSPOSED_Y, Cursor, load_multiples, scatter
from .plan import Plan


@dataclass(frozen=True, eq=False)
class Blocks:
    """Emits the code of all row blocks for the tiles of one group; control falls through from block to block."""

    task: Task
    target: Target
    plan: Plan
    body: Body
    tiled: bool  # x is read tile-major: every displacement is a constant
    finish: Template | None
    scatters: bool  # transposed output is written from the accumulators, without a panel in between

    def emit(self, b: Builder) -> None:
        p, blocks = self.plan, self.plan.blocks.size - 1
        if not self.tiled or self.scatters:
            load_multiples(b, Arg.Y_PITCH if self.scatters else Arg.X_PITCH)
        here = b.label()
        for cell in range(p.segments * blocks):
            first, last = cell < blocks, cell >= (p.segments - 1) * blocks
            if first or last or self.body.cuts[cell + 1] > self.body.cuts[cell]:
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
        accumulators = np.arange(n)
        partial = {"ptr": S.Y, "disp": rows * self.target.tile_bytes}
        x, y, r, sums = self._cursors
        cursors = (
            [x] + ([y] if last else []) + ([r] if last and task.residual else []) + ([] if first and last else [sums])
        )
        shown = ", ".join(map(str, rows[:4].tolist())) + (" ..." if n > 4 else "")
        segment = f", segment {cell // (p.blocks.size - 1)}" if p.segments > 1 else ""
        top = b.label(f"rows {shown}{segment}")
        self._run_ahead(b, cell, following)
        for cursor in cursors:
            cursor.rewind(b)
        b.emit("s_arg", d=S.T, disp=Arg.COUNT.byte)
        b.emit("align", disp=16)
        b.place(top)
        x.point(b, S.X)
        b.emit("s_arg", d=S.W, disp=Arg.W.byte)
        if not first and not p.folds:
            sums.point(b, S.Y)
            b.emit_many("load", n, d=accumulators, **partial)
        elif first and task.bias:
            b.emit_many("bcast", n, d=accumulators, ptr=S.W, disp=p.bias_slot[span] * 4)
        else:
            b.emit_many("zero", n, d=accumulators)
        b.emit_many(
            c.op[body], body.stop - body.start, c.d[body], c.a[body], c.b[body], c.ptr[body], c.step[body], c.disp[body]
        )
        if not first and p.folds:
            sums.point(b, S.Y)
            for accumulator, disp in enumerate((rows * self.target.tile_bytes).tolist()):
                b.emit("load", d=n, ptr=S.Y, disp=disp)
                b.emit("add", d=accumulator, a=accumulator, b=n)
        if last:
            self._finish(b, rows, r, y)
        else:
            sums.point(b, S.Y)
            b.emit_many("store", n, a=accumulators, **partial)
        for cursor in cursors:
            cursor.advance(b)
        for pointer, lines in c.lines.items():
            if lines[cell]:
                b.emit("s_addi", d=pointer, disp=int(lines[cell]) * LINE)
        b.emit("loop", a=S.T, disp=top)

    def _run_ahead(self, b: Builder, cell: int, following: int) -> None:
        """Point at the code and the values that come after this cell's, where it prefetches any."""
        p, end = self.plan, int(self.plan.cuts[cell + 1])
        if any(lines[cell] for lines in self.body.lines.values()):
            b.emit("s_code", d=S.CODE, disp=following)
            b.emit("s_arg", d=S.K, disp=Arg.W.byte)
            b.emit("s_addi", d=S.K, disp=4 * int(p.value_slot[end] if end < p.taps.size else p.slots))

    def _finish(self, b: Builder, rows: NDArray[np.int64], r: Cursor, y: Cursor) -> None:
        """Epilogue and output of a block that has all its taps."""
        n = rows.size
        if self.finish is not None:
            where = self._by_rows(b, r, Arg.R_PITCH, rows) if self.task.residual else {}
            epilogue.apply(b, self.finish, n, where)
        if self.scatters:
            y.point(b, S.X)
            b.emit("s_addi", d=S.X, disp=4 * int(rows[0]))
            scatter(b, self.target, n)
        else:
            b.emit_many("store", n, a=np.arange(n), **self._by_rows(b, y, Arg.Y_PITCH, rows))

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
            x = (
                Cursor(Arg.XT, Arg.PANEL, Arg.ZERO, columns)
                if self.tiled
                else Cursor(Arg.XT, Arg.X, Arg.X_NEXT, tile, Arg.X_LAST)
            )
            y, r = (
                Cursor(Arg.YT, Arg.Y, Arg.Y_NEXT, tile, Arg.Y_LAST),
                Cursor(Arg.RT, Arg.R, Arg.R_NEXT, tile, Arg.R_LAST),
            )
        return x, y, r, partial

    def _by_rows(self, b: Builder, cursor: Cursor, pitch: Arg, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Point Y at the tile of an array with one row per output; say where each accumulator's vector lies in it."""
        cursor.point(b, S.Y)
        if self.task.layout != "row_major":
            return {"ptr": S.Y, "step": 0, "disp": rows * self.target.tile_bytes}
        b.emit("s_arg", d=S.PY, disp=pitch.byte)
        return {"ptr": S.Y, "step": rows}
