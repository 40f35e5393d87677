"""Copies between the caller's row-major arrays and tile-major panels: loops over run-time extents, no pattern."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import auto
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..codegen.slots import Slots
from ..codegen.vector import OP, Builder, Program, Row, S, check, row
from ..target import Target
from .arguments import Arg


def load_multiples(b: Builder, pitch: Arg) -> None:
    """The pitch in slot ``pitch`` and its multiples into the registers that go with pointer X."""
    for k, register in enumerate((S.PX, S.PX3, S.PX5, S.PX7)):
        b.emit("s_arg", d=register, disp=Arg(pitch + k).byte)


@dataclass(frozen=True)
class Cursor:
    """Where the current tile of an array lies.

    An offset is kept in slot ``at``, held between 0 and slot ``last``, behind slot ``base``.
    """

    at: Arg
    base: Arg
    start: Arg
    step: Arg | int
    last: Arg | None = None

    def rewind(self, b: Builder) -> None:
        """To the first tile of the group."""
        b.emit_rows(_rewind(self))

    def point(self, b: Builder, register: S) -> None:
        """The tile's address into ``register``."""
        b.emit_rows(_point(self, register))

    def advance(self, b: Builder) -> None:
        """To the next tile."""
        b.emit_rows(_advance(self, isinstance(self.step, Arg)))  # an Arg equals the number of its slot


@lru_cache(256)
def _rewind(cursor: Cursor) -> tuple[Row, ...]:
    return row("s_arg", d=S.TMP, disp=cursor.start.byte), row("s_put", a=S.TMP, disp=cursor.at.byte)


@lru_cache(256)
def _point(cursor: Cursor, register: S) -> tuple[Row, ...]:
    rows = [row("s_arg", d=register, disp=cursor.at.byte)]
    if cursor.last is not None:
        rows.append(row("s_max_arg", d=register, disp=Arg.ZERO.byte))
        rows.append(row("s_min_arg", d=register, disp=cursor.last.byte))
    return *rows, row("s_add_arg", d=register, disp=cursor.base.byte)


@lru_cache(256)
def _advance(cursor: Cursor, by_slot: bool) -> tuple[Row, ...]:
    if isinstance(cursor.step, Arg):
        step = row("s_add_arg", d=S.TMP, disp=cursor.step.byte)
    else:
        step = row("s_addi", d=S.TMP, disp=cursor.step)
    return row("s_arg", d=S.TMP, disp=cursor.at.byte), step, row("s_put", a=S.TMP, disp=cursor.at.byte)


TRANSPOSED_X = Cursor(Arg.XT, Arg.X, Arg.X_NEXT, Arg.X_TILE, Arg.X_LAST)
TRANSPOSED_Y = Cursor(Arg.YT, Arg.Y, Arg.Y_NEXT, Arg.Y_TILE, Arg.Y_LAST)
TRANSPOSED_R = Cursor(Arg.RT, Arg.R, Arg.R_NEXT, Arg.R_TILE, Arg.R_LAST)
"""The caller's arrays where a tile is so many of their rows."""


def pack_transposed(b: Builder, target: Target, extent: int, cursor: Cursor, pitch: Arg, panel: Arg) -> None:
    """panel[t][k][i] = x[lanes * t + i, k] by 4x4 transpositions; unless 4 divides ``extent`` the last four overlap."""
    _transposed(b, target, extent, cursor, pitch, panel, _gather)


def unpack_transposed(b: Builder, target: Target, extent: int, cursor: Cursor, pitch: Arg, panel: Arg) -> None:
    """y[lanes * t + i, m] = panel[t][m][i], the same way backwards."""
    _transposed(b, target, extent, cursor, pitch, panel, _scatter)


def _transposed(
    b: Builder,
    target: Target,
    extent: int,
    cursor: Cursor,
    pitch: Arg,
    panel: Arg,
    four: Callable[[Builder, Target], None],
) -> None:
    """Walk the caller's array (W, X) and a panel (Y) four rows of the panel at a time."""
    top, turn = b.label(f"transpose, {panel.name}"), b.label()
    load_multiples(b, pitch)
    cursor.rewind(b)
    b.emit("s_arg", d=S.Y, disp=panel.byte)
    b.emit("s_arg", d=S.T, disp=Arg.COUNT.byte)
    b.place(top)
    cursor.point(b, S.W)
    b.emit("s_set", d=S.K, disp=extent // 4)
    b.place(turn)
    b.emit("s_mov", d=S.X, a=S.W)
    four(b, target)
    b.emit("s_addi", d=S.W, disp=16)
    b.emit("s_addi", d=S.Y, disp=4 * target.tile_bytes)
    b.emit("loop", a=S.K, disp=turn)
    if extent % 4:
        b.emit("s_addi", d=S.W, disp=4 * (extent % 4) - 16)
        b.emit("s_addi", d=S.Y, disp=(extent % 4 - 4) * target.tile_bytes)
        b.emit("s_mov", d=S.X, a=S.W)
        four(b, target)
        b.emit("s_addi", d=S.Y, disp=4 * target.tile_bytes)
    cursor.advance(b)
    b.emit("loop", a=S.T, disp=top)


# (operation, d, a, b): registers 0 to 3 hold rows of 4x4 blocks, one block per 128 bits, and receive their transposes;
# 4 to 7 are temporary.
_TRANSPOSE = (
    ("zip_lo", 4, 0, 1), ("zip_hi", 5, 0, 1), ("zip_lo", 6, 2, 3), ("zip_hi", 7, 2, 3),
    ("zip2_lo", 0, 4, 6), ("zip2_hi", 1, 4, 6), ("zip2_lo", 2, 5, 7), ("zip2_hi", 3, 5, 7),
)  # fmt: skip
TRANSPOSE_REGISTERS = 4


def transpose4(b: Builder) -> None:
    for op, d, x, y in _TRANSPOSE:
        b.emit(op, d=d, a=x, b=y)


def scatter(b: Builder, target: Target, rows: int) -> None:
    """Accumulators 0 to ``rows`` - 1 to consecutive elements of the tile's rows at X.

    ``rows`` is a multiple of four, and the multiples of X's pitch are loaded.
    """
    groups = np.arange(0, rows, 4)

    def spread(*registers: int) -> NDArray[np.int64]:
        """A register of the network for every group; the temporaries lie behind the accumulators."""
        column = np.array(registers)
        return np.where(column < 4, column + groups[:, None], column - 4 + rows).reshape(-1)

    names, d, x, y = zip(*_TRANSPOSE, strict=True)
    ops = np.tile(np.array([OP[name] for name in names], np.uint8), groups.size)
    b.emit_many(ops, ops.size, spread(*d), spread(*x), spread(*y))
    # Row by row of the caller's array, so that its stores follow each other.
    row, group = np.divmod(np.arange(target.lanes * groups.size), groups.size)
    b.emit_many("store4", row.size, a=groups[group] + row % 4, b=row // 4, ptr=S.X, step=row, disp=4 * groups[group])


def _gather(b: Builder, target: Target) -> None:
    """Four columns of a tile's rows at X, transposed to four vectors at Y."""
    for quarter in range(target.lanes // 4):
        for i in range(4):
            b.emit("insert4" if quarter else "load4", d=i, b=quarter, ptr=S.X, step=4 * quarter + i)
    transpose4(b)
    for i in range(4):
        b.emit("store", a=i, ptr=S.Y, disp=i * target.tile_bytes)


def _scatter(b: Builder, target: Target) -> None:
    for i in range(4):
        b.emit("load", d=i, ptr=S.Y, disp=i * target.tile_bytes)
    transpose4(b)
    for quarter in range(target.lanes // 4):
        for i in range(4):
            b.emit("store4", a=i, b=quarter, ptr=S.X, step=4 * quarter + i)


class TransposeArg(Slots):
    """The argument block of :func:`transposition`: addresses, then bytes and counts."""

    IN = 0
    OUT = auto()
    IN_PITCH = auto()
    OUT_PITCH = auto()
    IN_STEP = auto()  # four rows of the input; the last four may overlap those before,
    IN_LAST = auto()
    QUADS = auto()
    OUT_LAST = auto()  # as they do in the rows of the output
    OUT_STEP = auto()  # a vector of the input's columns, rows of the output; and the same for the last one
    OUT_LAST_ROWS = auto()
    IN_LAST_COLUMNS = auto()
    VECTORS = auto()
    COLUMN = auto()  # variables: offsets of the current vector
    ROWS = auto()


def transposition(target: Target) -> Program:
    """out[j][i] = in[i][j] for any arrays of at least four rows and a vector of columns, which do not overlap."""
    b, arg = Builder(), TransposeArg
    column, quad = b.label("vector of columns"), b.label("four rows")
    b.emit("enter")
    for register, slot in ((S.PX, arg.OUT_PITCH), (S.PY, arg.IN_PITCH), (S.T, arg.VECTORS)):
        b.emit("s_arg", d=register, disp=slot.byte)
    for register, factor in ((S.PX3, 3), (S.PX5, 5), (S.PX7, 7)):
        b.emit("s_muli", d=register, a=S.PX, disp=factor)
    b.emit("s_set", d=S.TMP, disp=0)
    for slot in (arg.COLUMN, arg.ROWS):
        b.emit("s_put", a=S.TMP, disp=slot.byte)
    b.place(column)
    b.emit("s_arg", d=S.K, disp=arg.QUADS.byte)
    b.emit("s_set", d=S.CONST, disp=0)
    b.emit("s_set", d=S.PANEL, disp=0)
    b.place(quad)
    for pointer, within, last, across, end, base in (
        (S.Y, S.CONST, arg.IN_LAST, arg.COLUMN, arg.IN_LAST_COLUMNS, arg.IN),
        (S.X, S.PANEL, arg.OUT_LAST, arg.ROWS, arg.OUT_LAST_ROWS, arg.OUT),
    ):
        b.emit("s_arg", d=S.W, disp=across.byte)
        b.emit("s_min_arg", d=S.W, disp=end.byte)
        b.emit("s_mov", d=pointer, a=within)
        b.emit("s_min_arg", d=pointer, disp=last.byte)
        b.emit("s_add", d=pointer, a=S.W)
        b.emit("s_add_arg", d=pointer, disp=base.byte)
    for i in range(4):
        b.emit("load", d=i, ptr=S.Y)
        b.emit("s_add", d=S.Y, a=S.PY)
    transpose4(b)
    for j in range(target.lanes):
        b.emit("store4", a=j % 4, b=j // 4, ptr=S.X, step=j)
    b.emit("s_add_arg", d=S.CONST, disp=arg.IN_STEP.byte)
    b.emit("s_addi", d=S.PANEL, disp=16)
    b.emit("loop", a=S.K, disp=quad)
    for slot, step in ((arg.COLUMN, target.tile_bytes), (arg.ROWS, arg.OUT_STEP)):
        b.emit("s_arg", d=S.TMP, disp=slot.byte)
        if isinstance(step, TransposeArg):
            b.emit("s_add_arg", d=S.TMP, disp=step.byte)
        else:
            b.emit("s_addi", d=S.TMP, disp=step)
        b.emit("s_put", a=S.TMP, disp=slot.byte)
    b.emit("loop", a=S.T, disp=column)
    b.emit("leave")
    program = b.finish()
    check(program)
    return program


def transpose_slots(rows: int, columns: int, in_pitch: int, out_pitch: int, lanes: int) -> list[int]:
    """The argument block of :func:`transposition` but for its first two slots; the input has these extents."""
    return [
        in_pitch, out_pitch, 4 * in_pitch, (rows - 4) * in_pitch, -(-rows // 4), 4 * (rows - 4),
        lanes * out_pitch, (columns - lanes) * out_pitch, 4 * (columns - lanes), -(-columns // lanes), 0, 0,
    ]  # fmt: skip
