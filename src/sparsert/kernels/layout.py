"""Copies between the caller's row-major arrays and tile-major panels: loops over run-time extents, no pattern in them."""

from __future__ import annotations

from ..codegen.vector import Builder, S
from ..target import Target
from .arguments import Arg

_STRIP = 8  # rows copied per turn of the loop


def load_multiples(b: Builder, pitch: Arg) -> None:
    """The pitch in slot ``pitch`` and its multiples into the registers that go with pointer X."""
    for k, register in enumerate((S.PX, S.PX3, S.PX5, S.PX7)):
        b.emit("s_arg", d=register, disp=Arg(pitch + k).byte)


def pack_rows(b: Builder, target: Target, extent: int) -> None:
    """PANEL[t][k][:] = x[k, columns of tile t] for the tiles of this group, columns clamped at X_LAST.

    Strips of eight rows walk along their columns, so that every load moves by a tile and the hardware prefetcher sees eight streams.
    """
    load_multiples(b, Arg.X_PITCH)
    for strip, pointer in ((S.W, Arg.X_NEXT), (S.CONST, Arg.PANEL)):
        b.emit("s_arg", d=strip, disp=pointer.byte)
    b.emit("s_arg", d=S.TMP, disp=Arg.X_LAST.byte)
    b.emit("s_sub", d=S.TMP, a=S.W)
    b.emit("s_put", a=S.TMP, disp=Arg.XT.byte)  # the last tile's column offset
    if extent >= _STRIP:
        turn = b.label("pack x")
        b.emit("s_set", d=S.K, disp=extent // _STRIP)
        b.place(turn)
        _pack_strip(b, target, extent, _STRIP)
        for step in (S.PX7, S.PX):
            b.emit("s_add", d=S.W, a=step)
        b.emit("s_addi", d=S.CONST, disp=_STRIP * target.tile_bytes)
        b.emit("loop", a=S.K, disp=turn)
    if extent % _STRIP:
        _pack_strip(b, target, extent, extent % _STRIP)


def _pack_strip(b: Builder, target: Target, extent: int, rows: int) -> None:
    """``rows`` rows at W, all tiles of the group, to the panel rows at CONST."""
    tile = b.label()
    b.emit("s_mov", d=S.Y, a=S.CONST)
    b.emit("s_arg", d=S.T, disp=Arg.COUNT.byte)
    b.emit("s_set", d=S.CODE, disp=0)
    b.place(tile)
    b.emit("s_mov", d=S.X, a=S.CODE)
    b.emit("s_min_arg", d=S.X, disp=Arg.XT.byte)
    b.emit("s_add", d=S.X, a=S.W)
    for i in range(rows):
        b.emit("load", d=i, ptr=S.X, step=i)
    for i in range(rows):
        b.emit("store", a=i, ptr=S.Y, disp=i * target.tile_bytes)
    b.emit("s_addi", d=S.Y, disp=extent * target.tile_bytes)
    b.emit("s_addi", d=S.CODE, disp=target.tile_bytes)
    b.emit("loop", a=S.T, disp=tile)


def pack_transposed(b: Builder, target: Target, extent: int, source: Arg, tile: Arg, last: Arg, pitch: Arg, panel: Arg) -> None:
    """panel[t][k][i] = x[lanes * t + i, k]: 4x4 transpositions; where ``extent`` is no multiple of 4 the last four overlap."""
    top, turn = b.label(f"transpose into {panel.name}"), b.label()
    load_multiples(b, pitch)
    _start(b, source, panel)
    b.place(top)
    b.emit("s_arg", d=S.W, disp=Arg.XT.byte)
    b.emit("s_set", d=S.K, disp=extent // 4)
    b.place(turn)
    b.emit("s_mov", d=S.X, a=S.W)
    _gather(b, target)
    b.emit("s_addi", d=S.W, disp=16)
    b.emit("s_addi", d=S.Y, disp=4 * target.tile_bytes)
    b.emit("loop", a=S.K, disp=turn)
    rest = extent % 4
    if rest:
        b.emit("s_addi", d=S.W, disp=4 * rest - 16)
        b.emit("s_addi", d=S.Y, disp=(rest - 4) * target.tile_bytes)
        b.emit("s_mov", d=S.X, a=S.W)
        _gather(b, target)
        b.emit("s_addi", d=S.Y, disp=4 * target.tile_bytes)
    advance(b, Arg.XT, tile, last)
    b.emit("loop", a=S.T, disp=top)


def unpack_transposed(b: Builder, target: Target, extent: int) -> None:
    """y[lanes * t + i, m] = Y_PANEL[t][m][i], the same way backwards."""
    top, turn = b.label("transpose into y"), b.label()
    load_multiples(b, Arg.Y_PITCH)
    _start(b, Arg.Y_NEXT, Arg.Y_PANEL)
    b.place(top)
    b.emit("s_arg", d=S.W, disp=Arg.XT.byte)
    b.emit("s_set", d=S.K, disp=extent // 4)
    b.place(turn)
    b.emit("s_mov", d=S.X, a=S.W)
    _scatter(b, target)
    b.emit("s_addi", d=S.W, disp=16)
    b.emit("s_addi", d=S.Y, disp=4 * target.tile_bytes)
    b.emit("loop", a=S.K, disp=turn)
    rest = extent % 4
    if rest:
        b.emit("s_addi", d=S.W, disp=4 * rest - 16)
        b.emit("s_addi", d=S.Y, disp=(rest - 4) * target.tile_bytes)
        b.emit("s_mov", d=S.X, a=S.W)
        _scatter(b, target)
        b.emit("s_addi", d=S.Y, disp=4 * target.tile_bytes)
    advance(b, Arg.XT, Arg.Y_TILE, Arg.Y_LAST)
    b.emit("loop", a=S.T, disp=top)


def advance(b: Builder, pointer: Arg, step: Arg | int, last: Arg | None) -> None:
    """Move a tile pointer that is kept in the argument block, not beyond ``last``."""
    b.emit("s_arg", d=S.TMP, disp=pointer.byte)
    if isinstance(step, Arg):
        b.emit("s_arg", d=S.K, disp=step.byte)
        b.emit("s_add", d=S.TMP, a=S.K)
    else:
        b.emit("s_addi", d=S.TMP, disp=step)
    if last is not None:
        b.emit("s_min_arg", d=S.TMP, disp=last.byte)
    b.emit("s_put", a=S.TMP, disp=pointer.byte)


def _start(b: Builder, source: Arg, panel: Arg) -> None:
    b.emit("s_arg", d=S.TMP, disp=source.byte)
    b.emit("s_put", a=S.TMP, disp=Arg.XT.byte)
    b.emit("s_arg", d=S.Y, disp=panel.byte)
    b.emit("s_arg", d=S.T, disp=Arg.COUNT.byte)


def _transpose4(b: Builder, r: int) -> None:
    """Registers r .. r+3 hold rows of 4x4 blocks, one block per 128 bits; their transposes end in the same registers."""
    t = r + 4
    b.emit("zip_lo", d=t, a=r, b=r + 1)
    b.emit("zip_hi", d=t + 1, a=r, b=r + 1)
    b.emit("zip_lo", d=t + 2, a=r + 2, b=r + 3)
    b.emit("zip_hi", d=t + 3, a=r + 2, b=r + 3)
    b.emit("zip2_lo", d=r, a=t, b=t + 2)
    b.emit("zip2_hi", d=r + 1, a=t, b=t + 2)
    b.emit("zip2_lo", d=r + 2, a=t + 1, b=t + 3)
    b.emit("zip2_hi", d=r + 3, a=t + 1, b=t + 3)


def _gather(b: Builder, target: Target) -> None:
    """Four columns of a tile's rows at X, transposed to four vectors at Y."""
    for quarter in range(target.lanes // 4):
        for i in range(4):
            b.emit("insert4" if quarter else "load4", d=i, b=quarter, ptr=S.X, step=4 * quarter + i)
    _transpose4(b, 0)
    for i in range(4):
        b.emit("store", a=i, ptr=S.Y, disp=i * target.tile_bytes)


def _scatter(b: Builder, target: Target) -> None:
    for i in range(4):
        b.emit("load", d=i, ptr=S.Y, disp=i * target.tile_bytes)
    _transpose4(b, 0)
    for quarter in range(target.lanes // 4):
        for i in range(4):
            b.emit("store4", a=i, b=quarter, ptr=S.X, step=4 * quarter + i)
