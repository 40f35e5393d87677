"""Which schedule to use when nobody has measured: rules read off measurements, with the caches of the target put in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from ..target import Target
from .schedule import Schedule, most_rows
from .task import Task

# What the rules below were read off (Zen 4, the layers of MobileNetV1 and BERT, uniform patterns of 80 to 98 %).
_PACKING_BLOCKS = 3  # x is read in place if fewer blocks than this load it
_COPIED = 48  # so few input rows are packed ahead: cache lines that two tiles share stay in L1 from one to the other
_PACKING_TAPS = 7  # packing a row of x beside the multiply-adds pays from so many uses on,
_COPYING_TAPS = 6  # and in a pass of its own from so many
_SEGMENT = 1024  # input rows per segment: its part of x stays in L2 and a block's code near L1
_SEGMENT_TAPS = 65  # ... if that leaves a row enough work to amortise carrying its sum
_CONV_SEGMENT = 768  # displacements per segment of a convolution,
_CONV_TAPS = 700  # ... if that leaves a block so much work
_CONV_NEAR = 0.75  # of L1: what a segment's rows of x may take where the code knows how long they are,
_TAILORED_TAPS = 200  # ... if that leaves a block so much work
_TAILORED_USES = 5  # multiply-adds a vector of x from which on it may as well be loaded as it lies
_LOAD_SHARE = 0.95  # loads that take so much of the time of the multiply-adds decide,
_X_SHARE = 0.42  # and if so much of theirs goes into x, then it must be in L1
_CARRIED = 10  # multiply-adds per row and segment that pay for carrying a sum into the next one
_ROW_TILES = 8  # tiles that go together where rows are far apart: whole stretches of a row come from memory at once
_PREFETCH_CODE = 4  # times L1: code that comes from further away than L2 sooner or later
_MOST_GROUPED = 4096  # rows: grouping takes about 15 us a row

LEAST_SHARE = 80_000  # vector multiply-adds of one thread, some 20 us: below, sharing out does not pay
LEAST_PIECE = 400_000  # and of what a thread may take over from a slower one, some 100 us
_FETCHED = 1.7  # vector multiply-adds in the time in which the code and value of one arrive from the second-level cache
_MOVED = 2.0  # and in the time of packing or transposing a vector of x
_WORTH = 0.97  # what ranges of rows must promise, of the time of ranges of columns, to be compiled
_DENSE_CODE = 1.0  # times L1: unrolled code of a layer without zeros that is smaller stays in the cache
_DENSE_ROWS = 4  # per group of a convolution: fewer leave the micro-kernel short of accumulators
_DENSE_FORM = {True: 0.93, False: 0.65}  # density from which on the dense form is faster, by embedded broadcasts


def dense_reason(task: Task, target: Target) -> str:
    """Why the looped form of dense products computes ``task``, or an empty string.

    Only where no element is zero: with others its results differ from those of a sparse product, by 0 * inf.
    """
    pattern = task.pattern
    if pattern.nnz < pattern.rows * pattern.cols or code_bytes(task, target) < _DENSE_CODE * target.l1i:
        return ""
    if task.window and pattern.rows < _DENSE_ROWS * task.window.groups:
        return ""
    return "no weight is zero, so the looped form multiplies all of them with code that every dense layer shares"


def code_bytes(task: Task, target: Target) -> float:
    """An estimate of the code: a multiply-add per nonzero and its share of loads."""
    return target.fma_bytes * task.pattern.nnz


def load_bound(task: Task, target: Target, rows: int) -> bool:
    """Whether loads of x bound the product, and not multiply-adds or loads of weights.

    A block of R rows at density d touches, and loads, ``1 - (1 - d)^R`` of the rows of x, for ``R d`` multiply-adds
    each of which loads its weight.
    """
    m, d = task.pattern.rows, task.pattern.density
    r = m / max(1, -(-m // rows))
    x, weights = float(1 - (1 - d) ** r) / target.loads, r * d / target.broadcasts
    return x + weights >= _LOAD_SHARE * r * d / target.fmas and x >= _X_SHARE * (x + weights)


def choose(task: Task, target: Target, spare: int) -> Schedule:
    """A schedule for ``task`` on ``target``, whose epilogue and inner loop leave ``spare`` registers unused."""
    if task.window:
        return _convolution(task, target, spare)
    pattern = task.pattern
    rows, columns = most_rows(target, spare), pattern.cols
    code, x_tile = code_bytes(task, target), columns * target.tile_bytes
    reused = pattern.rows > (_PACKING_BLOCKS - 1) * rows
    how, uses = ("beside", _PACKING_TAPS) if columns > _COPIED else ("ahead", _COPYING_TAPS)
    packing = how if task.layout == "row_major" and reused and pattern.nnz >= uses * columns else "none"
    loads = pattern.rows > rows and load_bound(task, target, rows)  # one block loads everything once in any order
    near = target.l1d // 2 // target.tile_bytes
    near = near if pattern.density * near >= _CARRIED else 2 * near
    far_code = code > _PREFETCH_CODE * target.l1i  # cold, it needs to be prefetched, which goes with single blocks
    if loads and x_tile > target.l1d and pattern.density * near >= _CARRIED and not far_code:
        return Schedule(rows, near, _ROW_TILES, 0, packing)
    segments = -(-columns // _SEGMENT)
    long = segments > 1 and _SEGMENT * pattern.density >= _SEGMENT_TAPS
    tiles, blocks, near_x = 0, 1, loads and x_tile <= target.l1d
    if task.layout == "tile_major":
        blocks = _blocks_per_pass(pattern.rows, rows, code, near_x, x_tile, target)
    elif code <= target.l1i or near_x:
        tiles = _ROW_TILES
    grouped = loads and pattern.rows <= _MOST_GROUPED
    return Schedule(
        rows,
        -(-columns // segments) if long else 0,
        tiles,
        blocks,
        packing,
        order="overlap" if grouped else "natural",
        prefetch=not tiles and blocks == 1 and far_code,
    )


def _convolution(task: Task, target: Target, spare: int) -> Schedule:
    """Loads of x, many of which cross cache lines, bound a convolution: rows that share them go together."""
    pattern, rows, extent = task.pattern, most_rows(target, spare), task.extent
    segments = -(-extent // _CONV_SEGMENT)
    grouped = rows < pattern.rows <= _MOST_GROUPED and task.window is not None and task.window.groups == 1
    return Schedule(
        rows,
        -(-extent // segments) if segments > 1 and rows * _CONV_SEGMENT * pattern.density >= _CONV_TAPS else 0,
        order="overlap" if grouped else "natural",
    )


def tailors(task: Task, target: Target) -> bool:
    """Whether a convolution gets code for the size of its images, which cuts vectors of x out of cache lines.

    Where many multiply-adds share a vector, its load bounds nothing.
    """
    window, rows = task.window, task.pattern.rows
    if window is None or not 1 < window.masks <= target.masks:
        return False
    blocks = max(1, -(-rows // (target.registers - 1)))
    return task.pattern.density * rows <= _TAILORED_USES * blocks


def tailored(task: Task, target: Target, spare: int, general: Schedule) -> Schedule:
    """The schedule of such code: the ``general`` code's, if someone chose that, as far as registers permit.

    Otherwise segments are of so many channels that the rows of x that a tile reads, and those between them, which the
    next tiles read, stay in L1.
    """
    window, rows = task.window, min(general.rows, most_rows(target, spare))
    if window is None or general != _convolution(task, target, target.registers - general.rows):
        return replace(general, rows=rows, packing="none")
    taps, lanes = task.taps, target.lanes
    height, width = taps.pitches, taps.offsets
    span = (height - 1) * window.pitch + width - 1 + lanes
    lines = min(-(-span // lanes), 3 * height)
    channels = -(-task.extent // (height * width))
    near = int(_CONV_NEAR * target.l1d) // (lines * target.tile_bytes), _CONV_SEGMENT // (height * width)
    segments = -(-channels // max(1, min(near)))
    segment = -(-channels // segments) * height * width
    long = segments > 1 and rows * segment * task.pattern.density >= _TAILORED_TAPS
    return replace(general, rows=rows, k_segment=segment if long else 0)


def _blocks_per_pass(m: int, rows: int, code: float, near_x: bool, x_tile: int, target: Target) -> int:
    """Row blocks that pass over the tiles together: as many as fit the instruction cache well, if x fits L1 well."""
    room = target.l1i // 2
    if code <= room or near_x:
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
    if task.window:
        return _convolution_reason(schedule)
    words = [f"chosen by the cost model: {schedule.rows} accumulators leave registers for input, weights and epilogue"]
    if schedule.tiles or schedule.blocks != 1:
        what = f"{schedule.blocks} blocks of code pass" if schedule.blocks > 1 else "all code passes"
        over = "each tile" + (f", {schedule.tiles} tiles at a time" if schedule.tiles else "")
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
        cache = "first" if schedule.k_segment * target.tile_bytes <= target.l1d and schedule.blocks != 1 else "second"
        words.append(f"K is cut into segments of {schedule.k_segment}, whose part of x fits the {cache}-level cache")
    if _DENSE_FORM[target.embedded_broadcast] <= pattern.density < 1 and task.layout != "tile_major":
        words.append("form='dense' would be faster, but multiplies zeros too: 0 * inf is NaN")
    if schedule.order != "natural":
        words.append("rows that share columns are grouped, since loads of x bound so sparse a product")
    return "; ".join(words)


# ---- few columns (design note 0014) ---------------------------------------------------------------------------------

_LOOKUP_COLUMNS = 2  # so many go by lookups: a lookup per column and step, where the loop pays for a vector anyway
_HALF_COLUMNS = 4  # so many take half of the shortest vectors, and rows go in pairs
_FAR_CODE = 4  # times L2: code that is fetched slower than one tile's multiply-adds run
_WIDE_WINDOW = 0.15  # below this density a window of four registers fills the steps better than two; above, it is full


class FewColumns(NamedTuple):
    """How a product with few columns is computed: for which target, by lookups or looped, in tiles how wide."""

    target: str
    by_lookup: bool
    width: int


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
        return FewColumns(target.name, True, target.lanes)
    if target.indexed and columns <= _HALF_COLUMNS:
        return FewColumns(target.narrow or target.name, False, _HALF_COLUMNS)
    if target.narrow and 2 * columns <= target.lanes:
        return FewColumns(target.narrow, False, target.lanes // 2)
    padded = columns < target.lanes and (narrow or code > target.l2)
    far = columns <= (2 if narrow else 1) * target.lanes and code > _FAR_CODE * target.l2
    return FewColumns(target.name, False, target.lanes) if padded or far else None


def few_columns_reason(task: Task, target: Target) -> str:
    """What :func:`few_columns` does, in a sentence."""
    kinds = [few_columns(task, target, columns) for columns in range(1, 2 * target.lanes + 1)]
    words, start = [], 0
    for at in range(1, len(kinds) + 1):
        if at == len(kinds) or kinds[at] != kinds[start]:
            kind = kinds[start]
            if kind is not None:
                span = f"N = {start + 1}" + (f" to {at}" if at > start + 1 else "")
                wide = f"{kind.width} at a time"
                how = "register lookups" if kind.by_lookup else f"a loop over the pattern, {wide}"
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


def _convolution_reason(schedule: Schedule) -> str:
    words = [f"chosen by the cost model: {schedule.rows} accumulators leave registers for input, weights and epilogue"]
    if schedule.k_segment:
        words.append("the input is cut into segments whose code and planes stay near the first-level caches")
    if schedule.order != "natural":
        words.append("rows that share displacements are grouped, since loads of x bound a convolution")
    return "; ".join(words)
