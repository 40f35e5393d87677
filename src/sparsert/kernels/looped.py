"""The tap kernel as a loop: columns in the lanes, rows in lockstep, the pattern as data.

A bundle of rows has an accumulator per row. A step broadcasts one weight per row and multiplies it with the row of x
whose number stands in the pattern; rows that have none left multiply -0 with a row of zeros, which changes no bit. One
program serves all layers with the same epilogue; code is a few hundred bytes instead of some ten per nonzero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..codegen.vector import Builder, Program, S, check
from ..schedule.task import Task
from ..target import Target
from . import epilogue
from .compact import Copy, Slot, count_down, finish, set_slot, trips

MOST_ROWS = 24  # per bundle: beyond, nothing is gained
_MINUS_ZERO = 0x80000000
_VALUES = S.PX7  # packed values
_AHEAD = ((_VALUES, 4096), (S.PANEL, 2048))


@dataclass(frozen=True)
class Looped:
    """What the program depends on beside the epilogue.

    Attributes:
        rows: per bundle, each an accumulator.
        index_bytes: 2 or 4, of a row of x in the pattern.
        folds: rows are summed in pieces.
    """

    rows: int
    index_bytes: int
    folds: bool


def rows_per_bundle(task: Task, target: Target) -> int:
    """As many as registers allow, fewer where the layer has few rows; programs come in few sizes."""
    code = finish(task, target, Builder())
    most = min(MOST_ROWS, target.registers - max(2, code.registers + target.scratch if code else 0))
    return next((n for n in (4, 8, 12, 16) if task.pattern.rows <= n <= most), most)


def generate(task: Task, target: Target, form: Looped) -> Program:
    """The program of ``form`` with the epilogue of ``task``, whose pattern does not matter."""
    b, rows, width = Builder(), form.rows, target.tile_bytes
    code = finish(task, target, b)
    done, tile, bundle = b.label("done"), b.label("tile of columns"), b.label("bundle of rows")
    b.emit("enter")
    for source, variable in ((Slot.X, Slot.XT), (Slot.Y, Slot.YT), (Slot.R, Slot.RT), (Slot.COLUMNS, Slot.LEFT)):
        set_slot(b, variable, source)
    b.place(tile)
    b.emit("s_arg", d=S.T, disp=Slot.LEFT.byte)
    b.emit("jump_zero", a=S.T, disp=done)
    b.emit("s_min_arg", d=S.T, disp=Slot.LANES.byte)
    b.emit("s_put", a=S.T, disp=Slot.HERE.byte)
    _copy(b, target, Slot.XT, Slot.PANEL, Slot.X_OFFSETS, Slot.X_ENTRIES, Slot.X_COLUMN, Slot.X_WHOLE, True)
    if task.residual:
        _copy(b, target, Slot.RT, Slot.Y_PANEL, Slot.R_OFFSETS, Slot.Y_ENTRIES, Slot.R_COLUMN, Slot.R_WHOLE, True)
    set_slot(b, Slot.COUNT_AT, Slot.COUNTS)
    set_slot(b, Slot.BUNDLE, Slot.BUNDLES)
    b.emit("s_arg", d=_VALUES, disp=Slot.W.byte)
    b.emit("s_put", a=_VALUES, disp=Slot.START_AT.byte)
    b.emit("s_add_arg", d=_VALUES, disp=Slot.VALUES.byte)
    b.emit("s_arg", d=S.PANEL, disp=Slot.STREAM.byte)
    b.emit("s_arg", d=S.Y, disp=Slot.Y_PANEL.byte)
    b.place(bundle)
    b.emit("s_arg", d=S.X, disp=Slot.PANEL.byte)
    b.emit("s_arg", d=S.CONST, disp=Slot.START_AT.byte)
    b.emit_many("bcast", rows, d=np.arange(rows), ptr=S.CONST, disp=4 * np.arange(rows))
    b.emit("s_addi", d=S.CONST, disp=4 * rows)
    b.emit("s_put", a=S.CONST, disp=Slot.START_AT.byte)
    _steps(b, form, target)
    if form.folds:
        _more_folds(b, form, target)
    if code is not None:
        place = {"ptr": S.Y, "disp": np.arange(rows) * width} if task.residual else {}
        epilogue.apply(b, code, rows, place)
    b.emit_many("store", rows, a=np.arange(rows), ptr=S.Y, disp=np.arange(rows) * width)
    b.emit("s_addi", d=S.Y, disp=rows * width)
    count_down(b, Slot.BUNDLE, bundle)
    _copy(b, target, Slot.YT, Slot.Y_PANEL, Slot.Y_OFFSETS, Slot.Y_ENTRIES, Slot.Y_COLUMN, Slot.Y_WHOLE, False)
    for at, step in ((Slot.XT, Slot.X_TILE), (Slot.YT, Slot.Y_TILE), (Slot.RT, Slot.R_TILE)):
        b.emit("s_arg", d=S.TMP, disp=at.byte)
        b.emit("s_add_arg", d=S.TMP, disp=step.byte)
        b.emit("s_put", a=S.TMP, disp=at.byte)
    b.emit("s_arg", d=S.T, disp=Slot.LEFT.byte)
    b.emit("s_arg", d=S.K, disp=Slot.HERE.byte)
    b.emit("s_sub", d=S.T, a=S.K)
    b.emit("s_put", a=S.T, disp=Slot.LEFT.byte)
    b.emit("jump", disp=tile)
    b.place(done)
    b.emit("leave")
    program = b.finish()
    check(program)
    return program


def _copy(b: Builder, target: Target, base: Slot, panel: Slot, offsets: Slot, entries: Slot, stride: Slot, whole: Slot,
          inward: bool) -> None:  # fmt: skip
    b.emit("s_arg", d=S.X, disp=base.byte)
    b.emit("s_arg", d=S.W, disp=panel.byte)
    Copy(b, offsets, entries, inward).tile(target, stride, whole)


def _steps(b: Builder, form: Looped, target: Target) -> None:
    """All steps of a fold: the accumulators go on from what they hold."""
    rows = form.rows
    x, weight = rows, rows + 1
    done, top = b.label(), b.label("step")
    trips(b, done)
    b.emit("align", disp=16)
    b.place(top)
    at = {2: "s_at16", 4: "s_at32"}[form.index_bytes]
    scale = target.tile_bytes.bit_length() - 1
    for pointer, distance in _AHEAD:
        for line in range(-(-rows * (4 if pointer == _VALUES else form.index_bytes) // 64)):
            b.emit("prefetch_near", ptr=pointer, disp=distance + 64 * line)
    for row in range(rows):
        b.emit(at, d=S.K, a=S.X, b=scale, ptr=S.PANEL, disp=form.index_bytes * row)
        b.emit("load", d=x, ptr=S.K)
        if target.embedded_broadcast:
            b.emit("fma_bcast", d=row, a=x, ptr=_VALUES, disp=4 * row)
        else:
            b.emit("bcast", d=weight, ptr=_VALUES, disp=4 * row)
            b.emit("fma_acc", d=row, a=x, b=weight)
    b.emit("s_addi", d=S.PANEL, disp=form.index_bytes * rows)
    b.emit("s_addi", d=_VALUES, disp=4 * rows)
    b.emit("loop", a=S.T, disp=top)
    b.place(done)


def _more_folds(b: Builder, form: Looped, target: Target) -> None:
    """The other folds of a bundle, each summed by itself and added."""
    rows, again = form.rows, b.label("next fold")
    every = np.arange(rows)
    set_slot(b, Slot.FOLD, Slot.FOLDS)
    b.place(again)
    b.emit("s_arg", d=S.CONST, disp=Slot.SUMS.byte)
    b.emit_many("store", rows, a=every, ptr=S.CONST, disp=every * target.tile_bytes)
    b.emit("s_const", d=S.CONST)
    b.emit_many("const", rows, d=every, b=-1 - b.constant(_MINUS_ZERO))
    _steps(b, form, target)
    b.emit("s_arg", d=S.CONST, disp=Slot.SUMS.byte)
    for row in range(rows):
        b.emit("load", d=rows, ptr=S.CONST, disp=row * target.tile_bytes)
        b.emit("add", d=row, a=row, b=rows)
    count_down(b, Slot.FOLD, again)
