"""Which schedule to use when nobody has measured: rules read off measurements, with the caches of the target put in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..target import Target
from .schedule import Schedule, most_rows
from .task import Task

# What the rules below were read off (Zen 4, the layers of MobileNetV1 and BERT, uniform patterns of 80 to 98 %).
_PACKING_BLOCKS = 3  # x is read in place if fewer blocks than this load it
_COPIED = 48  # so few input rows are packed ahead: cache lines that two tiles share stay in L1 from one to the other
_PACKING_TAPS = 6  # packing a row of x pays from so many uses on
_SEGMENT = 1024  # input rows per segment: its part of x stays in L2 and a block's code near L1
_SEGMENT_TAPS = 2000  # ... if that leaves a block enough work to amortise carrying the sums
_LOAD_BOUND = 0.06  # below this density loading x costs more than the multiply-adds: keep its tile in L1
_CLUSTER = 0.055  # and below this one, it pays to group rows that share columns
_ROW_TILES = 8  # tiles that go together where rows are far apart: whole stretches of a row come from memory at once
_PREFETCH_CODE = 4  # times L1: code that comes from further away than L2 sooner or later
_MOST_CLUSTERED = 4096  # rows: grouping takes about 15 us a row

LEAST_SHARE = 80_000  # vector multiply-adds of one thread, some 20 us: below, sharing out does not pay
_FETCHED = 1.7  # vector multiply-adds in the time in which the code and value of one arrive from the second-level cache
_MOVED = 2.0  # and in the time of packing or transposing a vector of x
_WORTH = 0.97  # what ranges of rows must promise, of the time of ranges of columns, to be compiled
_DENSE_CODE = 1.0  # times L1: unrolled code of a layer without zeros that is smaller stays in the cache
_DENSE_FORM = {True: 0.93, False: 0.65}  # density from which on the dense form is faster, by embedded broadcasts


def dense_reason(task: Task, target: Target) -> str:
    """Why the looped form of dense products computes ``task``, or an empty string.

    Only where no element is zero: with others its results differ from those of a sparse product, by 0 * inf.
    """
    pattern = task.pattern
    if pattern.nnz < pattern.rows * pattern.cols or code_bytes(task, target) < _DENSE_CODE * target.l1i:
        return ""
    return "no weight is zero, so the looped form multiplies all of them with code that every dense layer shares"


def code_bytes(task: Task, target: Target) -> float:
    """An estimate of the code: a multiply-add per nonzero and its share of loads."""
    per_nonzero = 7.0 if target.by_element else 9.5 if target.embedded_broadcast else 17.0
    return per_nonzero * task.pattern.nnz


def choose(task: Task, target: Target, spare: int) -> Schedule:
    """A schedule for ``task`` on ``target``, whose epilogue and inner loop leave ``spare`` registers unused."""
    pattern = task.pattern
    rows, columns = most_rows(target, spare), pattern.cols
    reused = pattern.rows > (_PACKING_BLOCKS - 1) * rows
    packs = task.layout == "row_major" and reused and pattern.nnz >= _PACKING_TAPS * columns
    segments = -(-columns // _SEGMENT)
    if segments > 1 and rows * _SEGMENT * pattern.density >= _SEGMENT_TAPS:
        k_segment = -(-columns // segments)
    else:
        k_segment = 0
    code = code_bytes(task, target)
    load_bound = pattern.density <= _LOAD_BOUND and columns * target.tile_bytes <= target.l1d
    tiles, blocks = 0, 1
    if task.layout == "tile_major":
        blocks = _blocks_per_pass(pattern.rows, rows, code, load_bound, columns * target.tile_bytes, target)
    elif code <= target.l1i or load_bound:
        tiles = _ROW_TILES
    clustered = pattern.density <= _CLUSTER and rows < pattern.rows <= _MOST_CLUSTERED
    return Schedule(
        rows,
        k_segment,
        tiles,
        blocks,
        packing="none" if not packs else "beside" if columns > _COPIED else "ahead",
        order="overlap" if clustered else "natural",
        prefetch=not tiles and blocks == 1 and code > _PREFETCH_CODE * target.l1i,
    )


def _blocks_per_pass(m: int, rows: int, code: float, load_bound: bool, x_tile: int, target: Target) -> int:
    """Row blocks that pass over the tiles together: as many as fit the instruction cache well, if x fits L1 well."""
    room = target.l1i // 2
    if code <= room or load_bound:
        return 0
    return max(1, int(room / code * -(-m // rows))) if x_tile <= target.l1d // 4 else 1


def tiles_per_group(task: Task, schedule: Schedule, target: Target, tiles: int) -> int:
    """How many of ``tiles`` column tiles share a pass over the code: as many as leave a segment of x in half of L2."""
    if schedule.tiles:
        return min(schedule.tiles, tiles)
    extent = schedule.k_segment or max(1, task.pattern.cols)
    most = max(4, target.l2 // 2 // (extent * target.tile_bytes))
    groups = -(-tiles // most)
    return -(-tiles // groups)


def reason(task: Task, target: Target, schedule: Schedule) -> str:
    """Why :func:`choose` chose so, in a sentence or two."""
    pattern, kib = task.pattern, code_bytes(task, target) / 1024
    words = [f"{schedule.rows} accumulators leave registers for input, weights and epilogue"]
    if schedule.tiles or schedule.blocks != 1:
        what = f"{schedule.blocks} blocks of code pass" if schedule.blocks > 1 else "all code passes"
        over = f"{schedule.tiles} tiles at a time" if schedule.tiles else "each tile"
        words.append(
            f"of about {kib:.0f} KiB of code, what passes stays in the instruction cache, or x in the data cache, "
            f"so {what} over {over}"
        )
    else:
        words.append(
            f"about {kib:.0f} KiB of code exceed the instruction cache, so all tiles pass over each block of it"
        )
    if schedule.packing != "none":
        words.append(
            f"each row of x is used {pattern.nnz / max(1, pattern.cols):.0f} times a tile, which pays for packing it"
        )
    elif task.layout == "row_major":
        words.append("x is read in place: packing would cost more than it saves")
    if schedule.k_segment:
        words.append(f"K is cut into segments of {schedule.k_segment}, whose part of x fits the second-level cache")
    if _DENSE_FORM[target.embedded_broadcast] <= pattern.density < 1 and task.layout != "tile_major":
        words.append("form='dense' would be faster, but multiplies zeros too: 0 * inf is NaN")
    if schedule.order != "natural":
        words.append("rows that share columns are grouped, since loads of x bound so sparse a product")
    return "; ".join(words)


# ---- few columns (design note 0014) ---------------------------------------------------------------------------------

_LOOKUP_COLUMNS = 2  # so many go by lookups: a lookup per column and step, where the loop pays for a vector anyway
_NARROW = "x86-avx2"  # half as wide vectors do for so few columns
_FAR_CODE = 4  # times L2: code that is fetched slower than one tile's multiply-adds run
_WIDE_WINDOW = 0.15  # below this density a window of four registers fills the steps better than two; above, it is full


class FewColumns(NamedTuple):
    """How a product with few columns is computed: for which target, by lookups or looped."""

    target: str
    by_lookup: bool


def window(task: Task, target: Target) -> tuple[int, int]:
    """Columns of x within reach of a lookup, and steps between two moves of that window."""
    wide = task.pattern.density < _WIDE_WINDOW
    return (4 if wide else 2) * target.lanes, 4 if wide else 2


def few_columns(task: Task, target: Target, columns: int) -> FewColumns | None:
    """None where the unrolled code, on columns padded to a tile if need be, is best."""
    narrow, code = target.lanes < 16, code_bytes(task, target)
    if task.layout == "tile_major" or not target.loops:
        return None
    if not narrow and columns <= _LOOKUP_COLUMNS:
        return FewColumns(target.name, True)
    if not narrow and 2 * columns <= target.lanes:
        return FewColumns(_NARROW, False)
    padded = columns < target.lanes and (narrow or code > target.l2)
    far = columns <= (2 if narrow else 1) * target.lanes and code > _FAR_CODE * target.l2
    return FewColumns(target.name, False) if padded or far else None


def few_columns_reason(task: Task, target: Target) -> str:
    """What :func:`few_columns` does, in a sentence."""
    kinds = [few_columns(task, target, columns) for columns in range(1, 2 * target.lanes + 1)]
    words, start = [], 0
    for at in range(1, len(kinds) + 1):
        if at == len(kinds) or kinds[at] != kinds[start]:
            kind = kinds[start]
            if kind is not None:
                span = f"N = {start + 1}" + (f" to {at}" if at > start + 1 else "")
                how = "register lookups" if kind.by_lookup else f"a loop over the pattern ({kind.target})"
                words.append(f"{span} by {how}")
            start = at
    return "; ".join(words)


@dataclass(frozen=True)
class Split:
    """How a call is shared out: ``by`` ``"columns"`` or ``"rows"`` into so many ``parts``; one part is no split."""

    by: str
    parts: int

    def __str__(self) -> str:
        return f"in {self.parts} ranges of {self.by}" if self.parts > 1 else "on the caller alone"


def split(task: Task, schedule: Schedule, target: Target, threads: int, tiles: int, by_rows: bool = True) -> Split:
    """How to share out a call of ``tiles`` column tiles; by rows only if that is possible.

    Ranges of columns share the code and need none of their own; there may be too few tiles to cut evenly, and every
    thread fetches all of the code. Ranges of rows are as even as the nonzeros, but each thread moves all of x.
    """
    nnz, columns = task.pattern.nnz, task.pattern.cols
    parts = min(threads, int(nnz * tiles / LEAST_SHARE), nnz)
    if parts < 2:
        return Split("", 1)
    moves = columns * _MOVED * (task.layout == "transposed" or schedule.packing != "none")
    fetched = _FETCHED * (code_bytes(task, target) > target.l1i)

    def time(nnz: float, tiles: int) -> float:
        passes = -(-tiles // tiles_per_group(task, schedule, target, tiles))
        return nnz * max(tiles, fetched * passes) + moves * tiles

    by_rows = by_rows and task.pattern.rows >= 8 * parts
    if by_rows and (tiles < 2 or time(nnz / parts, tiles) < _WORTH * time(nnz, -(-tiles // parts))):
        return Split("rows", parts)
    return Split("columns", min(parts, tiles)) if tiles > 1 else Split("", 1)
