"""Row blocks as code: passes over the tiles of a group, and a turn of every block of a pass for every tile."""

from __future__ import annotations

from collections.abc import Iterator
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
from . import epilogue, planes
from .accumulate import LINE, Body
from .arguments import Arg
from .handover import Handover
from .layout import TRANSPOSED_Y, Cursor, load_multiples, scatter
from .plan import Plan


@dataclass(frozen=True, eq=False)
class Blocks:
    """Emits the code of all row blocks for the tiles of one group; control falls through from pass to pass."""

    task: Task
    target: Target
    schedule: Schedule
    plan: Plan
    body: Body
    tiled: bool  # x is read tile by tile,
    packing: str  # and how it got there
    finish: Template | None
    handover: Handover
    scatters: bool  # transposed output is written from the accumulators, without a panel in between

    def emit(self, b: Builder) -> None:
        if not self.tiled or self.packing != "none" or self.scatters:
            load_multiples(b, Arg.Y_PITCH if self.scatters else Arg.X_PITCH)
        here = b.label()
        for cells in self._passes():
            following = b.label()
            b.place(here)
            if self.packing == "ahead" and cells[0] in self.body.copied:
                self._copy_pass(b, self.body.copied[cells[0]])
            self._pass(b, cells, following)
            here = following
        b.place(here)

    def _passes(self) -> Iterator[list[int]]:
        """Cells, blocks of segments, that go over the tiles together."""
        p, c = self.plan, self.body
        blocks = p.n_blocks
        together = self.schedule.blocks or blocks
        for segment in range(p.segments):
            outer = segment in (0, p.segments - 1)  # others carry on what they have no taps for
            cells = [
                cell
                for cell in range(segment * blocks, (segment + 1) * blocks)
                if outer or cell in c.copied or c.cuts[cell + 1] > c.cuts[cell]
            ]
            for start in range(0, len(cells), max(together, 1)):
                yield cells[start : start + together]

    def _pass(self, b: Builder, cells: list[int], following: int) -> None:
        """Turns of ``cells``, tile by tile; ``following`` labels the code behind them."""
        p, c = self.plan, self.body
        kinds = dict.fromkeys((self._packs(cell), self._ends(cell)) for cell in cells)
        cursors = list(dict.fromkeys(cursor for kind in kinds for cursor in self._walked(*kind)))
        if not self.handover.chained:
            self.handover.open(b)
        self._run_ahead(b, cells[-1], following)
        for cursor in cursors:
            cursor.rewind(b)
        b.emit("s_arg", d=S.T, disp=Arg.COUNT.byte)
        b.emit("align", disp=16)
        top = [b.label(self._name(cell)) for cell in cells]
        for label, cell in zip(top, cells, strict=True):
            b.place(label)
            self._turn(b, cell, cell % p.n_blocks)
        for cursor in cursors:
            cursor.advance(b)
        for pointer, lines in c.lines.items():
            if lines[cells[-1]]:
                b.emit("s_addi", d=pointer, disp=int(lines[cells[-1]]) * LINE)
        b.emit("loop", a=S.T, disp=top[0])
        if not self.handover.chained:
            self.handover.close(b, cells[-1])

    def _turn(self, b: Builder, cell: int, block: int) -> None:
        """One block of one segment, for the current tile."""
        p, c = self.plan, self.body
        rows = p.order[int(p.blocks[block]) : int(p.blocks[block + 1])]
        x, y, r, sums = self._cursors
        n, later = rows.size, cell >= p.n_blocks
        if self._packs(cell):
            self._in_place.point(b, S.X)
            x.point(b, S.PANEL)
            if self.task.window:
                planes.load_masks(b, self.task.window, self.target)
            if cell in c.copied:
                self._copy(b, c.copied[cell])
                if self.task.window:
                    self._in_place.point(b, S.X)
        else:
            x.point(b, S.X)
            if self.task.window and not self.tiled:
                planes.load_masks(b, self.task.window, self.target)
        b.emit("s_arg", d=S.W, disp=Arg.W.byte)
        if later:
            sums.point(b, S.CONST)
        self.handover.begin(b)
        if cell in c.idle:
            self.handover.renew(b, cell, c.idle[cell])
        b.emit_table(c.table, int(c.cuts[cell]), int(c.cuts[cell + 1]))
        if later and p.folds:  # the accumulators without taps hold the sums so far
            for accumulator in np.setdiff1d(np.arange(n), c.idle.get(cell, [])).tolist():
                b.emit("load", d=n, ptr=S.CONST, disp=int(rows[accumulator]) * self.target.tile_bytes)
                b.emit("add", d=accumulator, a=accumulator, b=n)
        if self._ends(cell):
            self._finish(b, cell, rows, r, y)
        else:
            self.handover.end(b, cell, sums, None)

    def _ends(self, cell: int) -> bool:
        """Whether the cell is of the last segment, behind which rows are complete."""
        return cell >= (self.plan.segments - 1) * self.plan.n_blocks

    def _packs(self, cell: int) -> bool:
        """Whether a turn of the cell stores what it loads of x to the panel."""
        return self.packing == "beside" and cell % self.plan.n_blocks == 0

    def _walked(self, packs: bool, ends: bool) -> Iterator[Cursor]:
        """The cursors that a turn of such a cell points with."""
        x, y, r, sums = self._cursors
        if packs:
            yield self._in_place
        yield x
        if ends:
            yield y
            if self.task.residual:
                yield r
        if self.plan.segments > 1:
            yield sums

    def _name(self, cell: int) -> str:
        """A remark for listings."""
        p = self.plan
        segment, block = divmod(cell, p.n_blocks)
        rows = p.order[int(p.blocks[block]) : int(p.blocks[block + 1])]
        shown = str(rows[:4].tolist())[1:-1] + (" ..." if rows.size > 4 else "")
        return f"rows {shown}" + (f", segment {segment}" if p.segments > 1 else "")

    def _run_ahead(self, b: Builder, cell: int, following: int) -> None:
        """Point at the code and the values that come after this cell's, where it prefetches any."""
        p, end = self.plan, int(self.plan.cuts[cell + 1])
        if any(lines[cell] for lines in self.body.lines.values()):
            b.emit("s_code", d=S.PANEL, disp=following)
            b.emit("s_arg", d=S.K, disp=Arg.W.byte)
            b.emit("s_addi", d=S.K, disp=4 * int(p.value_slot[end] if end < p.taps.size else p.slots))

    def _copy_pass(self, b: Builder, k: NDArray[np.int64]) -> None:
        """Rows ``k`` of x to the panel, for all tiles of the group."""
        cursors = (self._in_place, self._cursors[0])
        for cursor in cursors:
            cursor.rewind(b)
        b.emit("s_arg", d=S.T, disp=Arg.COUNT.byte)
        tile = b.label("pack x")
        b.place(tile)
        for cursor, register in zip(cursors, (S.X, S.PANEL), strict=True):
            cursor.point(b, register)
        if self.task.window:
            planes.load_masks(b, self.task.window, self.target)
        self._copy(b, k)
        for cursor in cursors:
            cursor.advance(b)
        b.emit("loop", a=S.T, disp=tile)

    def _copy(self, b: Builder, k: NDArray[np.int64]) -> None:
        """Rows ``k`` of the current tile of x to the panel; X is moved where they lie in planes."""
        if self.task.window:
            planes.copy(b, self.task.taps, self.task.window, k, self.schedule.rows, self.target)
            return
        stores, register = np.tile([False, True], k.size), self.schedule.rows
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
        base = Arg.X_PLANES if self.task.window else Arg.X
        return Cursor(Arg.XT, base, Arg.X_NEXT, self.target.tile_bytes, Arg.X_LAST)

    @cached_property
    def _cursors(self) -> tuple[Cursor, Cursor, Cursor, Cursor]:
        """Over the tiles of x, y, the residual, and the sums carried between segments."""
        tile = self.target.tile_bytes
        rows, columns = self.task.pattern.rows * tile, self.task.extent * tile
        partial = Cursor(Arg.PT, Arg.PARTIAL, Arg.ZERO, rows)
        if self.task.layout == "tile_major":
            height = self.task.height * tile or rows
            x, y, r = (
                Cursor(Arg.XT, Arg.X, Arg.X_NEXT, columns),
                Cursor(Arg.YT, Arg.Y, Arg.Y_NEXT, height),
                Cursor(Arg.RT, Arg.R, Arg.R_NEXT, height),
            )
        elif self.task.layout == "transposed":
            x, r = Cursor(Arg.XT, Arg.PANEL, Arg.ZERO, columns), Cursor(Arg.RT, Arg.R_PANEL, Arg.ZERO, rows)
            y = TRANSPOSED_Y if self.scatters else Cursor(Arg.YT, Arg.Y_PANEL, Arg.ZERO, rows)
        else:
            x = Cursor(Arg.PANEL_T, Arg.PANEL, Arg.ZERO, columns) if self.packing != "none" else self._in_place
            y_base, r_base = (Arg.Y_PLANES, Arg.R_PLANES) if self.task.window else (Arg.Y, Arg.R)
            y, r = (
                Cursor(Arg.YT, y_base, Arg.Y_NEXT, tile, Arg.Y_LAST),
                Cursor(Arg.RT, r_base, Arg.R_NEXT, tile, Arg.R_LAST),
            )
        return x, y, r, partial

    def _residual(self, b: Builder, r: Cursor, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Point Y at the tile of the residual; say where each accumulator's vector lies in it."""
        r.point(b, S.Y)
        if self.task.layout != "row_major":
            return {"ptr": S.Y, "step": 0, "disp": rows * self.target.tile_bytes}
        b.emit("s_arg", d=S.PY, disp=Arg.R_PITCH.byte)
        return {"ptr": S.Y, "step": rows}
