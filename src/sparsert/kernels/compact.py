"""What kernels share that loop over a pattern held as data: their arguments, and the copies around them.

The caller's arrays may have any strides. Where each row of theirs begins stands in a list of offsets, made once for a
shape, which also undoes the order in which rows were dealt to bundles.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import auto

from ..codegen.registers import Template
from ..codegen.slots import Slots
from ..codegen.vector import Builder, S
from ..schedule.task import Task
from ..target import Target
from . import epilogue


class Slot(Slots):
    """The argument block, as :class:`~sparsert.kernels.arguments.Arg`: what differs from call to call comes first."""

    X = 0  # addresses: input,
    Y = auto()  # output,
    R = auto()  # residual,
    W = auto()  # what sums begin with, a float per position, then the packed values
    VALUES = auto()  # how far behind W the values are
    STREAM = auto()  # the pattern
    COUNTS = auto()
    BUNDLES = auto()
    FOLDS = auto()  # folds behind the first
    X_ENTRIES = auto()  # rows of x,
    X_OFFSETS = auto()  # their list of offsets,
    X_COLUMN = auto()  # bytes from column to column,
    X_WHOLE = auto()  # and how many columns of a tile lie back to back, ready to be copied as a vector
    Y_ENTRIES = auto()
    Y_OFFSETS = auto()
    Y_COLUMN = auto()
    Y_WHOLE = auto()
    R_OFFSETS = auto()
    R_COLUMN = auto()
    R_WHOLE = auto()
    X_TILE = auto()  # bytes from tile to tile
    Y_TILE = auto()
    R_TILE = auto()
    COLUMNS = auto()
    LANES = auto()
    PANEL = auto()  # scratch: x,
    PITCH = auto()  # bytes from column to column of it, and multiples
    PITCH3 = auto()
    PITCH5 = auto()
    PITCH7 = auto()
    Y_PANEL = auto()  # the residual, then the output
    Y_PITCH = auto()
    SUMS = auto()  # of the folds so far
    COUNT_AT = auto()  # variables of the kernel: places in the counts and in what sums begin with,
    START_AT = auto()
    BUNDLE = auto()  # bundles left,
    FOLD = auto()  # folds left,
    LEFT = auto()  # columns left,
    HERE = auto()  # columns of this tile
    XT = auto()  # the current tile
    YT = auto()
    RT = auto()


SLOTS = len(Slot)


def set_slot(b: Builder, variable: Slot, source: Slot) -> None:
    """``variable`` gets what is in ``source``."""
    b.emit("s_arg", d=S.TMP, disp=source.byte)
    b.emit("s_put", a=S.TMP, disp=variable.byte)


def count_down(b: Builder, variable: Slot, top: int) -> None:
    """One less in ``variable``; to ``top`` unless nothing is left."""
    done = b.label()
    b.emit("s_arg", d=S.T, disp=variable.byte)
    b.emit("s_addi", d=S.T, disp=-1)
    b.emit("s_put", a=S.T, disp=variable.byte)
    b.emit("jump_zero", a=S.T, disp=done)
    b.emit("jump", disp=top)
    b.place(done)


def trips(b: Builder, done: int) -> None:
    """The next of the counts into T; to ``done`` where it is zero."""
    b.emit("s_arg", d=S.T, disp=Slot.COUNT_AT.byte)
    b.emit("s_mov", d=S.TMP, a=S.T)
    b.emit("s_addi", d=S.TMP, disp=4)
    b.emit("s_put", a=S.TMP, disp=Slot.COUNT_AT.byte)
    b.emit("s_load32", d=S.T, ptr=S.T)
    b.emit("jump_zero", a=S.T, disp=done)


def finish(task: Task, target: Target, b: Builder) -> Template | None:
    """The epilogue of every bundle; its residual lies where its output will."""
    return epilogue.template(task, target, b)


class Copy:
    """The elements of rows of an array to a panel, or back. Rows begin at K; W is where they lie in the panel."""

    def __init__(self, b: Builder, offsets: Slot, entries: Slot, inward: bool) -> None:
        self.b, self.offsets, self.entries, self.inward = b, offsets, entries, inward

    def column(self) -> None:
        """One column, from or to X, back to back in the panel."""

        def element() -> None:
            self._move()
            self.b.emit("s_addi", d=S.W, disp=4)

        self._rows(element)

    def tile(self, width: int, target: Target, stride: Slot, whole: Slot) -> None:
        """A tile of ``width`` columns, all of a vector's lanes or four: rows back to back in the panel.

        Rows of ``whole`` columns lie back to back in the array.
        """
        b, scalar, done = self.b, self.b.label(), self.b.label()
        b.emit("s_arg", d=S.K, disp=Slot.HERE.byte)
        b.emit("s_arg", d=S.PX, disp=whole.byte)
        b.emit("s_sub", d=S.K, a=S.PX)
        vectors = b.label()
        b.emit("jump_zero", a=S.K, disp=vectors)
        b.emit("jump", disp=scalar)
        b.place(vectors)

        def vector() -> None:
            source, sink = (S.K, S.W) if self.inward else (S.W, S.K)
            load, store = ("load", "store") if width == target.lanes else ("load4", "store4")
            b.emit(load, d=0, ptr=source)
            b.emit(store, a=0, ptr=sink)
            b.emit("s_addi", d=S.W, disp=4 * width)

        def elements() -> None:
            b.emit("s_arg", d=S.PX, disp=Slot.HERE.byte)
            b.emit("s_mov", d=S.Y, a=S.W)
            top = b.label()
            b.place(top)
            self._move(S.Y)
            b.emit("s_add", d=S.K, a=S.PY)
            b.emit("s_addi", d=S.Y, disp=4)
            b.emit("loop", a=S.PX, disp=top)
            b.emit("s_addi", d=S.W, disp=4 * width)

        b.emit("s_arg", d=S.PY, disp=stride.byte)
        self._rows(vector)
        b.emit("jump", disp=done)
        b.place(scalar)
        b.emit("s_arg", d=S.PY, disp=stride.byte)
        self._rows(elements)
        b.place(done)

    def _move(self, panel: S = S.W) -> None:
        source, sink = (S.K, panel) if self.inward else (panel, S.K)
        self.b.emit("s_load32", d=S.PX3, ptr=source)
        self.b.emit("s_store32", a=S.PX3, ptr=sink)

    def _rows(self, one: Callable[[], None]) -> None:
        b, top, done = self.b, self.b.label(), self.b.label()
        b.emit("s_arg", d=S.T, disp=self.entries.byte)
        b.emit("jump_zero", a=S.T, disp=done)
        b.emit("s_arg", d=S.CONST, disp=self.offsets.byte)
        b.place(top)
        b.emit("s_load", d=S.K, ptr=S.CONST)
        b.emit("s_addi", d=S.CONST, disp=8)
        b.emit("s_add", d=S.K, a=S.X)
        one()
        b.emit("loop", a=S.T, disp=top)
        b.place(done)
