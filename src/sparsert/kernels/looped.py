"""The tap kernel as a loop: columns in the lanes, rows in lockstep, the pattern as data.

A bundle of rows has an accumulator per row. A step broadcasts one weight per row and multiplies it with the row of x
whose number stands in the pattern; rows that have none left multiply -0 with a row of zeros, which changes no bit. One
program serves all layers with the same epilogue; code is about a kilobyte instead of some ten bytes per nonzero.

Loads bound such a loop, three for a nonzero (x, weight, number), so where multiply-adds address x by themselves, four
numbers come with one load, and four weights or more, which are then spread from a register (design note 0014). Four
columns or fewer take half of a vector, and rows go in pairs: even positions in the lower half, odd ones in the upper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..codegen.vector import Builder, Program, S, check
from ..schedule.task import Task
from ..target import Target
from . import epilogue
from .compact import Copy, Slot, count_down, finish, set_slot, trips

MOST_ROWS = 24  # per bundle, of a loop that is bound by loads,
_MOST_INDEXED = 28  # and of one that reads four numbers at once
_TEMPORARIES = 4  # registers: weights (twice, in 16 bits), the weight of a row, a pair of rows of x
_MINUS_ZERO = 0x80000000
_UPPER = 0xFFFF0000  # the odd one of two values in 16 bits
_SPREAD = (0x00, 0x55, 0xAA, 0xFF)  # an element of every four lanes to all of them
_VALUES = S.PX7  # packed values
_INDICES = (S.PX, S.PX3, S.PX5, S.K)
_AHEAD = ((_VALUES, 4096), (S.PANEL, 2048))


@dataclass(frozen=True)
class Looped:
    """What the program depends on beside the epilogue.

    Attributes:
        rows: per bundle, each an accumulator, or half of one where four columns are half of a vector.
        index_bytes: 2 or 4, of a row of x in the pattern.
        folds: rows are summed in pieces.
        width: columns of a tile, 4 or the target's lanes.
        bf16: values are stored in 16 bits.
    """

    rows: int
    index_bytes: int
    folds: bool
    width: int
    bf16: bool = False


def rows_per_bundle(task: Task, target: Target, width: int) -> int:
    """As many as registers allow, fewer where the layer has few rows; programs come in few sizes."""
    code = finish(task, target, Builder())
    epilogue_registers = code.registers + target.scratch if code else 0
    if not target.indexed:
        most = min(MOST_ROWS, target.registers - max(2, epilogue_registers))
        return next((n for n in (4, 8, 12, 16) if task.pattern.rows <= n <= most), most)
    most = min(_MOST_INDEXED, target.registers - max(_TEMPORARIES, epilogue_registers)) // 4 * 4
    halves = target.lanes // width
    return halves * next((n for n in (4, 8, 12, 16) if task.pattern.rows <= halves * n <= halves * most), most)


def index_unit(target: Target, width: int) -> int:
    """What an entry of the pattern counts in: rows of x, or eights of bytes where x is addressed by them."""
    return width // 2 if target.indexed else 1


def value_places(target: Target, form: Looped) -> tuple[NDArray[np.int64], int]:
    """Where a step keeps the value of each row, in floats or in numbers of 16 bits, and how many it takes.

    A group is what one load brings: a float for every row of four, or of eight in pairs, the odd ones behind the even
    ones. Values in 16 bits share a float's place with those of the next group.
    """
    row = np.arange(form.rows)
    if not target.indexed:
        return row, form.rows
    group = 4 * target.lanes // form.width if form.width < target.lanes else 4
    place = row if group == 4 else row // 8 * 8 + row % 2 * 4 + row % 8 // 2
    if not form.bf16:
        return place, form.rows
    which, within = np.divmod(place, group)
    return which // 2 * 2 * group + 2 * within + which % 2, -(-form.rows // (2 * group)) * 2 * group


def generate(task: Task, target: Target, form: Looped) -> Program:
    """The program of ``form`` with the epilogue of ``task``, whose pattern does not matter."""
    b, rows, width = Builder(), accumulators(target, form), target.tile_bytes
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
    _copy(b, target, form, Slot.XT, Slot.PANEL, Slot.X_OFFSETS, Slot.X_ENTRIES, Slot.X_COLUMN, Slot.X_WHOLE, True)
    if task.residual:
        _copy(b, target, form, Slot.RT, Slot.Y_PANEL, Slot.R_OFFSETS, Slot.Y_ENTRIES, Slot.R_COLUMN, Slot.R_WHOLE, True)
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
    if form.width == target.lanes:
        b.emit_many("bcast", rows, d=np.arange(rows), ptr=S.CONST, disp=4 * np.arange(rows))
    else:
        for first in range(0, rows, 4):
            b.emit("load", d=rows, ptr=S.CONST, disp=8 * first)
            b.emit_many("shuffle4", 4, d=first + np.arange(4), a=rows, disp=_SPREAD)
    b.emit("s_addi", d=S.CONST, disp=4 * form.rows)
    b.emit("s_put", a=S.CONST, disp=Slot.START_AT.byte)
    steps = _steps_indexed if target.indexed else _steps
    steps(b, form, target)
    if form.folds:
        _more_folds(b, form, target, steps)
    if code is not None:
        place = {"ptr": S.Y, "disp": np.arange(rows) * width} if task.residual else {}
        epilogue.apply(b, code, rows, place)
    b.emit_many("store", rows, a=np.arange(rows), ptr=S.Y, disp=np.arange(rows) * width)
    b.emit("s_addi", d=S.Y, disp=rows * width)
    count_down(b, Slot.BUNDLE, bundle)
    _copy(b, target, form, Slot.YT, Slot.Y_PANEL, Slot.Y_OFFSETS, Slot.Y_ENTRIES, Slot.Y_COLUMN, Slot.Y_WHOLE, False)
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


def accumulators(target: Target, form: Looped) -> int:
    """Of a bundle."""
    return form.rows * form.width // target.lanes


def _copy(b: Builder, target: Target, form: Looped, base: Slot, panel: Slot, offsets: Slot, entries: Slot,
          stride: Slot, whole: Slot, inward: bool) -> None:  # fmt: skip
    b.emit("s_arg", d=S.X, disp=base.byte)
    b.emit("s_arg", d=S.W, disp=panel.byte)
    Copy(b, offsets, entries, inward).tile(form.width, target, stride, whole)


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


def _steps_indexed(b: Builder, form: Looped, target: Target) -> None:
    """As :func:`_steps`, where multiply-adds address x by eights of bytes."""
    count, pairs = accumulators(target, form), form.width < target.lanes
    group, size = (8, 2) if pairs else (4, 1)  # rows whose weights one load brings; rows of an accumulator
    loaded, low, weight, x = range(count, count + _TEMPORARIES)
    values = value_places(target, form)[1] * (2 if form.bf16 else 4)
    done, top = b.label(), b.label("step")
    if form.bf16:
        b.emit("s_const", d=S.CONST)
    trips(b, done)
    b.emit("align", disp=16)
    b.place(top)
    for (pointer, distance), step in zip(_AHEAD, (values, form.index_bytes * form.rows), strict=True):
        for line in range(-(-step // 64)):
            b.emit("prefetch_near", ptr=pointer, disp=distance + 64 * line)
    for row in range(0, form.rows, size):
        if row % 4 == 0:
            _indices(b, form, row)
        if row % group == 0:
            which = row // group
            if not form.bf16:
                source = loaded
                b.emit("load" if pairs else "bcast4", d=loaded, ptr=_VALUES, disp=4 * row)
            elif which % 2 == 0:
                source = low
                b.emit("load" if pairs else "bcast4", d=loaded, ptr=_VALUES, disp=2 * row)
                b.emit("shl", d=low, a=loaded, disp=16)
            else:
                source = loaded
                b.emit("bit_and", d=loaded, a=loaded, b=-1 - b.constant(_UPPER))
        spread = {"d": weight, "a": source, "disp": _SPREAD[row // size % 4]}
        if pairs:
            b.emit("load4_pair", d=x, a=_INDICES[row % 4], b=_INDICES[row % 4 + 1], ptr=S.X)
            b.emit("shuffle4", **spread)
            b.emit("fma_acc", d=row // 2, a=weight, b=x)
        else:
            b.emit("shuffle4", **spread)
            b.emit("fma_at", d=row, a=weight, b=_INDICES[row % 4], ptr=S.X)
    b.emit("s_addi", d=S.PANEL, disp=form.index_bytes * form.rows)
    b.emit("s_addi", d=_VALUES, disp=values)
    b.emit("loop", a=S.T, disp=top)
    b.place(done)


def _indices(b: Builder, form: Looped, row: int) -> None:
    """Those of four rows into as many registers."""
    if form.index_bytes == 4:
        for i, register in enumerate(_INDICES):
            b.emit("s_load32", d=register, ptr=S.PANEL, disp=4 * (row + i))
        return
    *others, last = _INDICES
    b.emit("s_load", d=last, ptr=S.PANEL, disp=2 * row)
    for register in others:
        b.emit("s_low16", d=register, a=last)
        b.emit("s_shr", d=last, disp=16)


def _more_folds(b: Builder, form: Looped, target: Target, steps: Callable[[Builder, Looped, Target], None]) -> None:
    """The other folds of a bundle, each summed by itself and added."""
    rows, again = accumulators(target, form), b.label("next fold")
    every = np.arange(rows)
    set_slot(b, Slot.FOLD, Slot.FOLDS)
    b.place(again)
    b.emit("s_arg", d=S.CONST, disp=Slot.SUMS.byte)
    b.emit_many("store", rows, a=every, ptr=S.CONST, disp=every * target.tile_bytes)
    b.emit("s_const", d=S.CONST)
    b.emit_many("const", rows, d=every, b=-1 - b.constant(_MINUS_ZERO))
    steps(b, form, target)
    b.emit("s_arg", d=S.CONST, disp=Slot.SUMS.byte)
    for row in range(rows):
        b.emit("load", d=rows, ptr=S.CONST, disp=row * target.tile_bytes)
        b.emit("add", d=row, a=row, b=rows)
    count_down(b, Slot.FOLD, again)
