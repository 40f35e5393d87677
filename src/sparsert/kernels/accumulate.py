"""The one kernel: rows of accumulators, the block's taps in the order of their displacement, an epilogue, a store.

An input vector is loaded once per distinct displacement of a block and serves every tap there; a tap is one fused multiply-add whose
weight is broadcast from memory. The code holds the pattern; values are data behind pointer W (design note 0005).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codegen.registers import Template
from ..codegen.vector import OP, Builder, S
from ..schedule.schedule import Schedule
from ..schedule.task import Task
from ..sparsity.partition import row_blocks
from ..sparsity.taps import Taps
from ..target import Target
from . import epilogue
from .arguments import Arg
from .epilogue import INPUT_REGISTERS
from .layout import TRANSPOSED_Y, Cursor, load_multiples, scatter

PREFETCH = {S.CODE: 16, S.K: 40}
"""Which pointers run ahead, and every how many taps: the code of a tap takes some 10 bytes, its value 4."""
LINE = 64  # bytes of a cache line


@dataclass(frozen=True, eq=False)
class Plan:
    """The taps of a layer in execution order, segment by segment and block by block.

    Attributes:
        blocks: (blocks + 1,) offsets into ``order``; ``order``: the output row each position stands for.
        cuts: (segments * blocks + 1,) offsets into the tap arrays.
        taps: (n,) tap executed at each place; ``accumulator``: its row within the block; ``fresh``: it needs a new vector of x.
        value_slot: (n,) where each tap's values lie in the packed array, in 32-bit slots (one float32, two bfloat16 or four int8); ``bias_slot``: (rows,) by position.
    """

    blocks: NDArray[np.int64]
    order: NDArray[np.int64]
    cuts: NDArray[np.int64]
    taps: NDArray[np.int64]
    accumulator: NDArray[np.int64]
    fresh: NDArray[np.bool_]
    value_slot: NDArray[np.int64]
    bias_slot: NDArray[np.int64]
    slots: int

    @property
    def segments(self) -> int:
        return max(1, (self.cuts.size - 1) // max(1, self.blocks.size - 1))


def plan(taps: Taps, extent: int, order: NDArray[np.int64], schedule: Schedule, bias: bool, unit: int = 1) -> Plan:
    """Sort ``taps`` of an ``extent``-row input by (segment, block, displacement, row) and give every value its slot.

    The rows of every block are a multiple of ``unit``.
    """
    blocks = row_blocks(taps.rows, schedule.rows, unit)
    n_blocks = blocks.size - 1
    width = schedule.k_segment or max(extent, 1)
    segments = max(1, -(-extent // width))
    position = np.empty(taps.rows, np.int64)
    position[order] = np.arange(taps.rows)
    block_of = np.repeat(np.arange(n_blocks), np.diff(blocks))
    inside = np.arange(taps.rows) - blocks[:-1][block_of] if taps.rows else np.zeros(0, np.int64)
    tap_position = position[taps.row]
    block, k = block_of[tap_position], taps.pitch.astype(np.int64)
    cell = k // width * n_blocks + block if segments > 1 else block
    executed = _lexsort(tap_position, k, cell)
    accumulator = inside[tap_position]
    place = (cell * max(extent, 1) + k)[executed]
    fresh = np.ones(place.size, bool)
    np.not_equal(place[1:], place[:-1], out=fresh[1:])
    cuts = np.searchsorted(place, np.arange(segments * n_blocks + 1) * max(extent, 1))
    # Biases of a block stand in front of its first segment's values: one pointer walks both.
    ahead = blocks[1:] if bias else np.zeros(n_blocks, np.int64)
    shift = np.concatenate([ahead, np.full((segments - 1) * n_blocks, ahead[-1] if n_blocks else 0)])
    value_slot = np.arange(place.size) + np.repeat(shift, np.diff(cuts))
    bias_slot = np.arange(taps.rows) + cuts[:-1][block_of] if bias else np.zeros(0, np.int64)
    return Plan(blocks, order, cuts, executed, accumulator[executed], fresh, value_slot, bias_slot,
                int(place.size + (taps.rows if bias else 0)))  # fmt: skip


def _lexsort(*keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """The stable permutation that sorts by the last key, then the one before, ...; short words, which NumPy sorts by radix, where they do."""
    order: NDArray[np.int64] | None = None
    for key in keys:
        short = key.astype(np.uint16) if key.size and key.max() < 1 << 16 else key
        if order is None:
            rising = key.size < 2 or bool((key[1:] >= key[:-1]).all())  # rows in their natural order are
            order = np.arange(key.size) if rising else np.argsort(short, kind="stable")
        else:
            order = order[np.argsort(short[order], kind="stable")]
    return np.zeros(0, np.int64) if order is None else order


@dataclass(frozen=True)
class Body:
    """Columns of the accumulate rows of the whole layer, and where each (segment, block) cell ends."""

    op: NDArray[np.uint8]
    d: NDArray[np.int16]
    a: NDArray[np.int16]
    b: NDArray[np.int16]
    ptr: NDArray[np.int8]
    step: NDArray[np.int32]
    disp: NDArray[np.int64]
    cuts: NDArray[np.int64]


def accumulate(taps: Taps, p: Plan, schedule: Schedule, target: Target, tiled: bool) -> Body:
    """Loads and multiply-adds of every block at once: array operations only, whatever the number of nonzeros.

    With ``schedule.prefetch``, taps touch the code and the values that follow line by line: four tiles cover a block of equal size.
    """
    broadcast = 0 if target.embedded_broadcast else 1
    n = p.taps.size
    per_tap = np.full(n, 1 + broadcast)
    per_tap[p.fresh] += 1
    touching = [np.arange(every - 1, n if schedule.prefetch else 0, every) for every in PREFETCH.values()]
    for touched in touching:
        per_tap[touched] += 1
    end = np.cumsum(per_tap)
    total = int(end[-1]) if n else 0
    op, d, a, b = np.empty(total, np.uint8), np.zeros(total, np.int16), np.zeros(total, np.int16), np.zeros(total, np.int16)
    ptr, step, disp = np.full(total, S.W, np.int8), np.zeros(total, np.int32), np.zeros(total, np.int64)
    first_input, weight = schedule.rows, schedule.rows + INPUT_REGISTERS
    turn = np.cumsum(p.fresh, dtype=np.int32) % INPUT_REGISTERS
    source = (first_input + turn).astype(np.int16)
    k = taps.pitch[p.taps]
    loaded, at = np.flatnonzero(p.fresh), end - per_tap
    for pointer, touched in zip(PREFETCH, touching, strict=True):
        row, at[touched] = at[touched], at[touched] + 1
        op[row], ptr[row] = OP["prefetch"], pointer
        cell = np.searchsorted(p.cuts, touched, "right") - 1
        disp[row] = (np.arange(touched.size) - np.searchsorted(touched, p.cuts)[cell]) * LINE
    row = at[loaded]
    op[row], d[row], ptr[row] = OP["load"], source[loaded], S.X
    if tiled:
        disp[row] = k[loaded].astype(np.int64) * target.tile_bytes
    else:
        step[row] = k[loaded]
    slot_bytes = p.value_slot * 4
    if broadcast:
        row = end - 2
        op[row], d[row], disp[row] = OP["bcast"], weight, slot_bytes
    row = end - 1
    op[row], d[row], a[row] = OP["fma_acc" if broadcast else "fma_bcast"], p.accumulator, source
    if broadcast:
        b[row] = weight
    else:
        disp[row] = slot_bytes
    cuts = np.concatenate([[0], end])[p.cuts]
    return Body(op, d, a, b, ptr, step, disp, cuts)


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
        ahead = b.label()
        for cell in range(p.segments * blocks):
            segment, block = divmod(cell, blocks)
            first, last = segment == 0, segment == p.segments - 1
            lo, hi = int(self.body.cuts[cell]), int(self.body.cuts[cell + 1])
            if hi > lo or first or last:
                note = f", segment {segment}" if p.segments > 1 else ""
                ahead = self._block(b, block, slice(lo, hi), first, last, note, ahead, int(self.plan.cuts[cell + 1]))
        b.place(ahead)

    def _block(self, b: Builder, block: int, body: slice, first: bool, last: bool, note: str, here: int, end: int) -> int:
        """Emits one block, placing label ``here`` in front; returns the label of what follows. Its taps end at tap ``end``."""
        task, p = self.task, self.plan
        span = slice(int(p.blocks[block]), int(p.blocks[block + 1]))
        rows = p.order[span]
        n = rows.size
        partial = {"ptr": S.Y, "disp": rows * self.target.tile_bytes}
        top = b.label(f"rows {', '.join(map(str, rows[:4]))}{' ...' if n > 4 else ''}{note}")
        x, y, r, partial_sums = self._cursors()
        following = b.label()
        cursors = [x] + ([y] if last else []) + ([r] if last and task.residual else []) + ([] if first and last else [partial_sums])
        ahead = self.body.ptr[body][self.body.op[body] == OP["prefetch"]]
        b.place(here)
        if ahead.size:
            b.emit("s_code", d=S.CODE, disp=following)
            b.emit("s_arg", d=S.K, disp=Arg.W.byte)
            b.emit("s_addi", d=S.K, disp=4 * int(p.value_slot[end] if end < p.taps.size else p.slots))
        for cursor in cursors:
            cursor.rewind(b)
        b.emit("s_arg", d=S.T, disp=Arg.COUNT.byte)
        b.emit("align", disp=16)
        b.place(top)
        x.point(b, S.X)
        b.emit("s_arg", d=S.W, disp=Arg.W.byte)
        if not first:
            partial_sums.point(b, S.Y)
            b.emit_many("load", n, d=np.arange(n), **partial)
        elif task.bias:
            b.emit_many("bcast", n, d=np.arange(n), ptr=S.W, disp=p.bias_slot[span] * 4)
        else:
            b.emit_many("zero", n, d=np.arange(n))
        c = self.body
        b.emit_many(c.op[body], body.stop - body.start, c.d[body], c.a[body], c.b[body], c.ptr[body], c.step[body], c.disp[body])
        if last:
            if self.finish is not None:
                where = self._by_rows(b, r, Arg.R_PITCH, rows) if task.residual else {}
                epilogue.apply(b, self.finish, n, where)
            if self.scatters:
                y.point(b, S.X)
                b.emit("s_addi", d=S.X, disp=4 * int(rows[0]))
                scatter(b, self.target, n)
            else:
                b.emit_many("store", n, a=np.arange(n), **self._by_rows(b, y, Arg.Y_PITCH, rows))
        else:
            partial_sums.point(b, S.Y)
            b.emit_many("store", n, a=np.arange(n), **partial)
        for cursor in cursors:
            cursor.advance(b)
        for pointer in PREFETCH if ahead.size else ():
            b.emit("s_addi", d=pointer, disp=int(np.count_nonzero(ahead == pointer)) * LINE)
        b.emit("loop", a=S.T, disp=top)
        return following

    def _cursors(self) -> tuple[Cursor, Cursor, Cursor, Cursor]:
        """Over the tiles of x, y, the residual, and the sums carried between segments."""
        tile = self.target.tile_bytes
        rows, columns = self.task.pattern.rows * tile, self.task.pattern.cols * tile
        partial = Cursor(Arg.PT, Arg.PARTIAL, Arg.ZERO, rows)
        if self.task.layout == "tile_major":
            x, y, r = Cursor(Arg.XT, Arg.X, Arg.X_NEXT, columns), Cursor(Arg.YT, Arg.Y, Arg.Y_NEXT, rows), Cursor(Arg.RT, Arg.R, Arg.R_NEXT, rows)
        elif self.task.layout == "transposed":
            x, r = Cursor(Arg.XT, Arg.PANEL, Arg.ZERO, columns), Cursor(Arg.RT, Arg.R_PANEL, Arg.ZERO, rows)
            y = TRANSPOSED_Y if self.scatters else Cursor(Arg.YT, Arg.Y_PANEL, Arg.ZERO, rows)
        else:
            x = Cursor(Arg.XT, Arg.PANEL, Arg.ZERO, columns) if self.tiled else Cursor(Arg.XT, Arg.X, Arg.X_NEXT, tile, Arg.X_LAST)
            y, r = Cursor(Arg.YT, Arg.Y, Arg.Y_NEXT, tile, Arg.Y_LAST), Cursor(Arg.RT, Arg.R, Arg.R_NEXT, tile, Arg.R_LAST)
        return x, y, r, partial

    def _by_rows(self, b: Builder, cursor: Cursor, pitch: Arg, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Point Y at the tile of an array with one row per output and say where each accumulator's vector lies in it."""
        cursor.point(b, S.Y)
        if self.task.layout != "row_major":
            return {"ptr": S.Y, "step": 0, "disp": rows * self.target.tile_bytes}
        b.emit("s_arg", d=S.PY, disp=pitch.byte)
        return {"ptr": S.Y, "step": rows}
