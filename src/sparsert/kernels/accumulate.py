"""The heart of the one kernel: the block's taps in the order of their displacement.

An input vector is loaded once per distinct displacement of a block and serves every tap there; a tap is one fused
multiply-add whose weight is broadcast from memory. The code holds the pattern; values are data behind pointer W
(design note 0005). The first tap of an accumulator stores what the turn before left in it and starts it anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codegen.vector import OP, S, Table, heads
from ..schedule.schedule import Schedule
from ..sparsity.taps import Taps
from ..target import Target
from . import planes
from .handover import Handover
from .plan import Plan

PREFETCH = {S.PANEL: 16, S.K: 40}
"""Which pointers run ahead, and every how many taps: the code of a tap takes some 10 bytes, its value 4."""
LINE = 64  # bytes of a cache line


Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Body:
    """The accumulate rows of the whole layer.

    Attributes:
        table: all of them.
        cuts: (cells + 1,) rows at which the cells, blocks of segments, begin.
        idle: per cell, the accumulators that none of its taps touches, if any.
        copied: by the first cell of a segment, the input rows to copy to the panel: those that others read, but no tap
            that packs loads.
        lines: per pointer that runs ahead, (cells,) how many lines each cell prefetches through it.
    """

    table: Table
    cuts: Ints
    idle: dict[int, Ints]
    copied: dict[int, Ints]
    lines: dict[S, Ints]


def accumulate(
    taps: Taps, p: Plan, schedule: Schedule, target: Target, tiled: bool, packing: str, handover: Handover
) -> Body:
    """Loads and multiply-adds of every block at once: array operations only, whatever the number of nonzeros.

    With ``tiled``, x is read tile by tile and every displacement is a constant; with ``packing`` from a panel, but in
    the blocks that pack beside their taps from where the caller has it. With ``schedule.prefetch``, the taps of the
    others touch the code and the values that follow line by line: four tiles cover a block of equal size.
    """
    by_element = target.by_element and p.slots >= target.lanes
    broadcast = 0 if target.embedded_broadcast or by_element else 1
    n = p.taps.size
    cells = np.repeat(np.arange(p.cuts.size - 1, dtype=np.int32), np.diff(p.cuts))
    begins, anew, idle = _begins(p, cells, schedule.rows, handover.task.bias)
    cell, started = cells[begins].astype(np.int64), p.accumulator[begins]
    stores = started < handover.deferred
    k, loaded = taps.key.take(p.taps), np.flatnonzero(p.fresh)
    in_place, kept, copied = _packing(p, k, loaded, packing)
    if handover.task.window and not tiled:
        in_place = loaded
    window = handover.task.window
    walk = planes.walk(taps, window, k[in_place], cells[in_place]) if window else None
    per_tap = p.fresh + np.int64(1 + broadcast)
    per_tap[kept] += 1
    vector, opening = _weights(p, cells, target.lanes if by_element else 0)
    per_tap[opening] += 1
    others = np.ones(n if schedule.prefetch else 0, bool)
    if packing == "beside":
        for first in p.first_cells:
            others[p.cuts[first] : p.cuts[first + 1]] = False
    running = np.flatnonzero(others)
    touching = [running[every - 1 :: every] for every in PREFETCH.values()]
    for touched in touching:
        per_tap[touched] += 1
    per_tap[begins] += np.add(stores, ~anew, dtype=np.int64)
    if walk is not None:
        per_tap[in_place] += walk.moves
    end = np.cumsum(per_tap)
    total = int(end[-1]) if n else 0
    table = Table(total)
    c = table.columns
    source, weight = schedule.rows, schedule.rows + 1  # one of each: renaming makes more pointless
    at = end - per_tap
    lines: dict[S, Ints] = {}

    def put(which: Ints, **columns: Any) -> None:
        """The next row of each of these taps."""
        row = at.take(which)
        at[which] = row + 1
        for name, column in columns.items():
            c[name][row] = column

    def put_heads(which: Ints, head: int | Ints, **columns: Any) -> None:
        """The same, of one operation."""
        table.heads[at.take(which)] = head
        put(which, **columns)

    for pointer, touched in zip(PREFETCH, touching, strict=True):
        starts = np.searchsorted(touched, p.cuts)  # the first line of every cell
        lines[pointer] = np.diff(starts)
        line = np.arange(touched.size) - np.repeat(starts[:-1], lines[pointer])
        put_heads(touched, heads("prefetch", ptr=pointer), disp=line * LINE)
    for some, columns in walk.rows() if walk is not None else ():
        put(in_place[some], **columns)
    places = at[in_place]
    where = {"disp": k[loaded] * target.tile_bytes} if tiled else {"step": k[loaded]}
    put_heads(loaded, heads("load", d=source, ptr=S.X), **where)
    in_rows = {"step": k[in_place], "disp": 0} if walk is None else walk.load
    for name, column in in_rows.items():
        c[name][places] = column
    put_heads(kept, heads("store", a=source, ptr=S.PANEL), disp=k[kept] * target.tile_bytes)
    put(begins[stores], **handover.store(cell[stores], started[stores]))
    put(begins[~anew], **handover.start(cell[~anew], started[~anew]))
    slot_bytes = p.value_slot * 4
    put_heads(opening, heads("load", d=weight, ptr=S.W), disp=4 * vector[opening])
    row = end - 1
    if by_element:
        (further, opener), operands = ("fma_lane", "mul_lane"), {"b": weight}
        c["disp"][row] = p.value_slot - vector
    elif broadcast:
        (further, opener), operands = ("fma_acc", "mul"), {"b": weight}
        table.heads[row - 1], c["disp"][row - 1] = heads("bcast", d=weight, ptr=S.W), slot_bytes
    else:
        (further, opener), operands = ("fma_bcast", "mul_bcast"), {"ptr": S.W}
        c["disp"][row] = slot_bytes
    table.heads[row] = heads(further, d=p.accumulator, a=source, **operands)
    c["op"][row[begins[anew]]] = OP[opener]
    cuts = np.where(p.cuts > 0, end[p.cuts - 1], 0) if n else np.zeros_like(p.cuts)
    return Body(table, cuts, idle, copied, lines)


def _weights(p: Plan, cells: NDArray[np.int32], lanes: int) -> tuple[Ints, Ints]:
    """The slot from which each tap's weight is loaded, ``lanes`` together (0: each on its own), and where that happens.

    Vectors of weights are aligned, but for the last, which ends with the array; a cell loads its own.
    """
    if not lanes or not p.taps.size:
        return p.value_slot, np.zeros(0, np.int64)
    vector = np.minimum(p.value_slot & -lanes, p.slots - lanes)
    opens = np.ones(vector.size, bool)
    opens[1:] = (vector[1:] != vector[:-1]) | (cells[1:] != cells[:-1])
    return vector, np.flatnonzero(opens)


def _packing(p: Plan, k: Ints, loaded: Ints, packing: str) -> tuple[Ints, Ints, dict[int, Ints]]:
    """Of the taps ``loaded``, which load x, those that do so where the caller has it, and those of them that pack.

    Also, by the first cell of a segment, the rows that others need and none of these packs.
    """
    in_place, kept, copied = [loaded[:0]], [loaded[:0]], {}
    extent = int(k.max(initial=-1)) + 1
    for cell in p.first_cells if packing != "none" else ():
        start, others, end = np.searchsorted(loaded, p.cuts[[cell, cell + 1, cell + p.n_blocks]])
        if packing == "ahead":
            others = start
        missing = np.zeros(extent, bool)
        missing[k[loaded[others:end]]] = True
        in_place.append(loaded[start:others])
        kept.append(in_place[-1][missing[k[in_place[-1]]]])
        missing[k[kept[-1]]] = False
        if missing.any():
            copied[cell] = np.flatnonzero(missing)
    return np.concatenate(in_place), np.concatenate(kept), copied


def _begins(
    p: Plan, cells: NDArray[np.int32], rows: int, bias: bool
) -> tuple[Ints, NDArray[np.bool_], dict[int, Ints]]:
    """The taps that are the first of their accumulator in a cell, and whether they are so of their sum.

    Also, per cell, the accumulators that have none. A sum begins with its first product, wherever that is, not with 0:
    results have the same bits under every schedule, to the sign of zeros.
    """
    n, blocks = p.taps.size, p.n_blocks
    at = np.full((p.segments, blocks, rows), n)
    np.minimum.at(at.reshape(-1), cells * rows + p.accumulator, np.arange(n))
    taken = at < n
    before = np.zeros_like(taken)  # there is a bias, or there were taps
    before[0] = bias
    if not p.folds:
        before[1:] = bias | np.logical_or.accumulate(taken, axis=0)[:-1]
    idle = np.argwhere((~taken & (np.arange(rows) < np.diff(p.blocks)[:, None])).reshape(-1, rows))
    cuts = np.flatnonzero(np.diff(idle[:, 0], prepend=-1))
    first = np.sort(at[taken])
    anew = np.zeros(n, bool)
    anew[at[taken & ~before]] = True
    return first, anew[first], {int(part[0, 0]): part[:, 1] for part in np.split(idle, cuts)[1:]}
