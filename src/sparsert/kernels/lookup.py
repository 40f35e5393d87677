"""One or two columns by register lookups: rows in the lanes, x in registers, the pattern as data.

A lane sums one output row. Registers hold a window of columns of x, out of which every lane takes the value that the
byte of its next nonzero names; its weight is expanded from packed values into the lanes that have one, and one
multiply-add serves all lanes that do (design note 0014). No code depends on a pattern: one program serves all layers
with the same epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..codegen.vector import Builder, Program, S, check
from ..schedule.task import Task
from ..target import Target
from . import epilogue
from .compact import Copy, Slot, count_down, finish, set_slot, trips

_MINUS_ZERO = 0x80000000  # begins a sum: adding to it changes no bit
_AHEAD = ((S.K, 4096), (S.K, 4160), (S.PANEL, 2048))  # what is prefetched of values and pattern, in bytes ahead

_AHEAD_BF16 = ((S.K, 4096), (S.PANEL, 2048))
OVER_READ = 32  # bytes behind the values in 16 bits: a step loads as many as there are lanes, whatever it has


@dataclass(frozen=True)
class Lookup:
    """What the program depends on beside the epilogue.

    Attributes:
        columns: of x, 1 or 2.
        window: columns of x within reach of a step, 2 or 4 registers.
        unroll: steps per move of the window.
        folds: rows are summed in pieces.
        bf16: values are stored in 16 bits.
    """

    columns: int
    window: int
    unroll: int
    folds: bool
    bf16: bool = False


def generate(task: Task, target: Target, form: Lookup) -> Program:
    """The program of ``form`` with the epilogue of ``task``, whose pattern does not matter."""
    b, n = Builder(), form.columns
    registers = form.window // target.lanes
    code = finish(task, target, b)
    b.emit("enter")
    for column in range(n):
        _column(b, column, Slot.X, Slot.X_COLUMN, Slot.PANEL, Slot.PITCH)
        Copy(b, Slot.X_OFFSETS, Slot.X_ENTRIES, True).column()
        if task.residual:
            _column(b, column, Slot.R, Slot.R_COLUMN, Slot.Y_PANEL, Slot.Y_PITCH)
            Copy(b, Slot.R_OFFSETS, Slot.Y_ENTRIES, True).column()
    done, bundle = b.label("done"), b.label("bundle of rows")
    set_slot(b, Slot.COUNT_AT, Slot.COUNTS)
    set_slot(b, Slot.BUNDLE, Slot.BUNDLES)
    b.emit("s_arg", d=S.W, disp=Slot.W.byte)
    b.emit("s_mov", d=S.K, a=S.W)
    b.emit("s_add_arg", d=S.K, disp=Slot.VALUES.byte)
    b.emit("s_arg", d=S.PANEL, disp=Slot.STREAM.byte)
    b.emit("s_arg", d=S.Y, disp=Slot.Y_PANEL.byte)
    b.emit("s_arg", d=S.PY, disp=Slot.Y_PITCH.byte)
    for k, register in enumerate((S.PX, S.PX3, S.PX5, S.PX7)):
        b.emit("s_arg", d=register, disp=Slot(Slot.PITCH + k).byte)
    b.emit("s_arg", d=S.T, disp=Slot.BUNDLE.byte)
    b.emit("jump_zero", a=S.T, disp=done)
    b.place(bundle)
    b.emit("load", d=0, ptr=S.W)
    for column in range(1, n):
        b.emit("mov", d=column, a=0)
    b.emit("s_addi", d=S.W, disp=target.tile_bytes)
    b.emit("s_arg", d=S.X, disp=Slot.PANEL.byte)
    _steps(b, form, registers, target)
    if form.folds:
        _more_folds(b, form, registers, target)
    if code is not None:
        epilogue.apply(b, code, n, {"ptr": S.Y, "step": np.arange(n)} if task.residual else {})
    for column in range(n):
        b.emit("store", a=column, ptr=S.Y, step=column)
    b.emit("s_addi", d=S.Y, disp=target.tile_bytes)
    count_down(b, Slot.BUNDLE, bundle)
    b.place(done)
    for column in range(n):
        _column(b, column, Slot.Y, Slot.Y_COLUMN, Slot.Y_PANEL, Slot.Y_PITCH)
        Copy(b, Slot.Y_OFFSETS, Slot.Y_ENTRIES, False).column()
    b.emit("leave")
    program = b.finish()
    check(program)
    return program


def _column(b: Builder, column: int, base: Slot, stride: Slot, panel: Slot, pitch: Slot) -> None:
    """Point X at a column of the caller's array and W at its place in the panel."""
    b.emit("s_arg", d=S.X, disp=base.byte)
    b.emit("s_arg", d=S.W, disp=panel.byte)
    for _ in range(column):
        b.emit("s_add_arg", d=S.X, disp=stride.byte)
        b.emit("s_add_arg", d=S.W, disp=pitch.byte)


def _steps(b: Builder, form: Lookup, registers: int, target: Target) -> None:
    """All steps of a fold: accumulators 0 .. columns - 1 go on from what they hold."""
    n = form.columns
    held = n + np.arange(n * registers).reshape(n, registers)  # registers of x
    index, value, found, other = (n + n * registers + np.arange(4)).tolist()
    done, top = b.label(), b.label("window")
    trips(b, done)
    b.emit("align", disp=16)
    b.place(top)
    block = target.tile_bytes.bit_length() - 1
    b.emit("s_at8", d=S.X, a=S.X, b=block, ptr=S.PANEL)
    for pointer, distance in _AHEAD_BF16 if form.bf16 else _AHEAD:
        b.emit("prefetch_near", ptr=pointer, disp=distance)
    for column in range(n):
        for i in range(registers):
            b.emit("load", d=int(held[column, i]), ptr=S.X, step=column, disp=i * target.tile_bytes)
    for step in range(form.unroll):
        b.emit("load_bytes", d=index, ptr=S.PANEL, disp=1 + step * target.lanes)
        b.emit("sign_mask", a=index)
        if form.bf16:
            b.emit("load_words", d=value, ptr=S.K)
            b.emit("shl", d=value, a=value, disp=16)
            b.emit("expand_lanes", d=value, a=value)
            b.emit("s_skip2", d=S.K)
        else:
            b.emit("expand", d=value, ptr=S.K)
            b.emit("s_skip", d=S.K)
        for column in range(n):
            x = held[column].tolist()
            b.emit("mov", d=found, a=index)
            b.emit("lookup2", d=found, a=x[0], b=x[1])
            if registers == 4:
                b.emit("mov", d=other, a=index)
                b.emit("lookup2", d=other, a=x[2], b=x[3])
                # The bit above those of the lookup says which pair, as a sign.
                half = other + 1
                b.emit("shl", d=half, a=index, disp=31 - (2 * target.lanes).bit_length() + 1)
                b.emit("select_neg", d=half, a=other, b=found)
                b.emit("fma_mask", d=column, a=value, b=half)
            else:
                b.emit("fma_mask", d=column, a=value, b=found)
    b.emit("s_addi", d=S.PANEL, disp=1 + form.unroll * target.lanes)
    b.emit("loop", a=S.T, disp=top)
    b.place(done)


def _more_folds(b: Builder, form: Lookup, registers: int, target: Target) -> None:
    """The other folds of a bundle, each summed by itself and added."""
    n, again = form.columns, b.label("next fold")
    set_slot(b, Slot.FOLD, Slot.FOLDS)
    b.place(again)
    b.emit("s_arg", d=S.CONST, disp=Slot.SUMS.byte)
    for column in range(n):
        b.emit("store", a=column, ptr=S.CONST, disp=column * target.tile_bytes)
    b.emit("s_const", d=S.CONST)
    for column in range(n):
        b.emit("const", d=column, b=-1 - b.constant(_MINUS_ZERO))
    _steps(b, form, registers, target)
    b.emit("s_arg", d=S.CONST, disp=Slot.SUMS.byte)
    for column in range(n):
        b.emit("load", d=n, ptr=S.CONST, disp=column * target.tile_bytes)
        b.emit("add", d=column, a=column, b=n)
    count_down(b, Slot.FOLD, again)
