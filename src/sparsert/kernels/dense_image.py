"""An operand of a dense convolution: taps by positions of the output, a matrix that is nowhere in memory.

Position p of the output reads, for the tap at channel c and kernel row and column (i, j), the input at a place that is
p plus a constant, as long as rows of the input, or of a plane made of every other of its columns, are as long as those
of the output. Where this is the second operand, a row is then a contiguous stretch of memory under a mask, which is off
where the tap lies beside the image. The first block of rows loads these stretches and stores them to a panel; others
read that. As the first operand, whose elements are broadcast, it has no masks: planes with zeros are made first. So
they are where rows differ, strides among the reasons: a copy of some rows and columns of each channel.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..codegen.vector import Builder, Row, S, row
from ..target import Target
from .dense_arguments import Copy, Form, Slot, Tap

LINE = 64  # bytes of a cache line
AHEAD_LINES = 2
"""Cache lines that are prefetched in a turn of the inner loop."""
COPY_MASKS = 3
"""Of the last vector of a row that is copied: as it is loaded, in up to two parts, and as it is stored."""


def mask_bytes(target: Target) -> int:
    """Bytes of a mask in memory: bits, or where there are no registers for those, a vector."""
    return 2 if target.masks else target.tile_bytes


def next_taps(b: Builder) -> None:
    """Point at the taps of the block of K, and at the masks of the panel."""
    b.emit("s_arg", d=S.CONST, disp=Slot.TAPS_AT.byte)
    b.emit("s_arg", d=S.TMP, disp=Slot.VIEWS_AT.byte)
    b.emit("s_load", d=S.PX7, ptr=S.TMP)


def load_tap(k: int, registers: range, target: Target) -> Iterator[Row]:
    """Vectors of the ``k``-th tap from here, of the panel at W."""
    yield row("s_load", d=S.PX3, ptr=S.CONST, disp=8 * len(Tap) * k + Tap.PLACE.byte)
    yield row("s_load", d=S.PX5, ptr=S.CONST, disp=8 * len(Tap) * k + Tap.OTHER.byte)
    yield row("s_add", d=S.PX3, a=S.W)
    yield row("s_add", d=S.PX5, a=S.PX7)
    for j, register in enumerate(registers):
        where = {"ptr": S.PX3, "disp": j * target.tile_bytes}
        if target.masks:
            yield row("mask_bits", d=j, ptr=S.PX5, disp=j * mask_bytes(target))
            yield row("load_by_mask", d=register, b=j, **where)
        else:
            yield row("set_mask", ptr=S.PX5, disp=j * mask_bytes(target))
            yield row("load_mask", d=register, **where)


def walk_taps(b: Builder) -> None:
    """Point at the taps of the block of rows, and at what is prefetched beside it."""
    for register, slot in ((S.CONST, Slot.TAPS_AT), (S.PX7, Slot.AHEAD), (S.PX, Slot.AHEAD_STEP)):
        b.emit("s_arg", d=register, disp=slot.byte)


def look_ahead(step: S) -> Iterator[Row]:
    """A part of the next panel to the second-level cache: all blocks of rows read this one, the first from afar."""
    for line in range(AHEAD_LINES):
        yield row("prefetch", ptr=S.PX7, disp=line * LINE)
    yield row("s_add", d=S.PX7, a=step)


def reach_tap(k: int) -> Iterator[Row]:
    """Where the ``k``-th tap from here reads the block of rows at Y (to PX3), and the panel at W (to PX5)."""
    yield row("s_load", d=S.PX3, ptr=S.CONST, disp=8 * len(Tap) * k + Tap.PLACE.byte)
    yield row("s_load", d=S.PX5, ptr=S.CONST, disp=8 * len(Tap) * k + Tap.OTHER.byte)
    yield row("s_add", d=S.PX3, a=S.Y)
    yield row("s_add", d=S.PX5, a=S.W)


def stage(b: Builder, form: Form, target: Target) -> None:
    """The planes of the current image, if there are to be any: what taps are relative to then."""
    name = "A" if form.a == "image" else "B"
    move, channel, line, vector, tail, end = (
        b.label(note) for note in ("copy to planes", "channel", "row", "", "last vector", "")
    )
    tile, width = target.tile_bytes, mask_bytes(target)
    b.emit("s_arg", d=S.TMP, disp=Slot.PLANES.byte)
    b.emit("jump_zero", a=S.TMP, disp=end)
    b.emit("s_put", a=S.TMP, disp=Slot[f"{name}_BLOCK"].byte)
    b.emit("s_arg", d=S.TMP, disp=Slot.STAGES.byte)
    b.emit("jump_zero", a=S.TMP, disp=end)  # nothing but padding
    b.emit("s_put", a=S.TMP, disp=Slot.COPIES_LEFT.byte)
    b.emit("s_arg", d=S.CONST, disp=Slot.COPIES.byte)
    b.place(move)
    for register, word, base in ((S.X, Copy.FROM, Slot[f"{name}_MATRIX"]), (S.Y, Copy.TO, Slot.PLANES)):
        b.emit("s_load", d=register, ptr=S.CONST, disp=word.byte)
        b.emit("s_add_arg", d=register, disp=base.byte)
    for register, word in ((S.PX, Copy.FROM_ROW), (S.PX3, Copy.TO_ROW), (S.TMP, Copy.MASKS)):
        b.emit("s_load", d=register, ptr=S.CONST, disp=word.byte)
    if target.masks:
        for i in range(COPY_MASKS):
            b.emit("mask_bits", d=i, ptr=S.TMP, disp=i * width)
    b.emit("s_arg", d=S.T, disp=Slot.CHANNELS.byte)
    b.place(channel)
    b.emit("s_mov", d=S.PANEL, a=S.X)
    b.emit("s_mov", d=S.W, a=S.Y)
    b.emit("s_load", d=S.K, ptr=S.CONST, disp=Copy.ROWS.byte)
    b.place(line)
    b.emit("s_mov", d=S.PX5, a=S.PANEL)
    b.emit("s_mov", d=S.PX7, a=S.W)
    b.emit("s_load", d=S.PY, ptr=S.CONST, disp=Copy.VECTORS.byte)
    b.emit("jump_zero", a=S.PY, disp=tail)
    b.place(vector)
    for i in range(form.step):
        b.emit("load", d=i, ptr=S.PX5, disp=i * tile)
    if form.step == 2:
        b.emit("evens", d=0, a=0, b=1)
    b.emit("store", a=0, ptr=S.PX7)
    b.emit("s_addi", d=S.PX5, disp=form.step * tile)
    b.emit("s_addi", d=S.PX7, disp=tile)
    b.emit("loop", a=S.PY, disp=vector)
    b.place(tail)
    for i in range(form.step):
        if target.masks:
            b.emit("load_by_mask", d=i, b=i, ptr=S.PX5, disp=i * tile)
        else:
            b.emit("set_mask", ptr=S.TMP, disp=i * width)
            b.emit("load_mask", d=i, ptr=S.PX5, disp=i * tile)
    if form.step == 2:
        b.emit("evens", d=0, a=0, b=1)
    if target.masks:
        b.emit("store_by_mask", a=0, b=2, ptr=S.PX7)
    else:
        b.emit("set_mask", ptr=S.TMP, disp=2 * width)
        b.emit("store_mask", a=0, ptr=S.PX7)
    b.emit("s_add", d=S.PANEL, a=S.PX)
    b.emit("s_add", d=S.W, a=S.PX3)
    b.emit("loop", a=S.K, disp=line)
    for register, word in ((S.X, Copy.FROM_CHANNEL), (S.Y, Copy.TO_CHANNEL)):
        b.emit("s_load", d=S.PX5, ptr=S.CONST, disp=word.byte)
        b.emit("s_add", d=register, a=S.PX5)
    b.emit("loop", a=S.T, disp=channel)
    b.emit("s_addi", d=S.CONST, disp=8 * len(Copy))
    b.emit("s_arg", d=S.T, disp=Slot.COPIES_LEFT.byte)
    b.emit("s_addi", d=S.T, disp=-1)
    b.emit("s_put", a=S.T, disp=Slot.COPIES_LEFT.byte)
    b.emit("jump_zero", a=S.T, disp=end)
    b.emit("jump", disp=move)
    b.place(end)
