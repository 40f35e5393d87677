"""Argument blocks of dense convolutions, and the tables and planes that they point to.

*Columns* of the product are positions of the output, or, in the transposed product, its *rows*. A block of rows is then
a row of the image where that is short; kernel rows that lie beside the image as a whole are left out, and what their
products, all of them zeros, would do to the sign of a sum of zeros is done to what it begins with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.dense_arguments import Copy, Line, RowsLine, Slot, Tap
from ..kernels.dense_image import AHEAD_LINES, COPY_MASKS, LINE, mask_bytes
from ..kernels.dense_micro import UNROLL, VECTORS
from ..runtime.cpu import Frame, address_of
from ..runtime.memory import aligned_empty
from ..schedule.dense import DenseSchedule
from ..sparsity.pattern import SparseMatrix
from ..sparsity.views import Views, full_taps
from ..target import Target
from .bands import column_phases, origin
from .dense import Code, frame
from .dense_parts import Blocks, Share, blocks_of_rows

_LEAST_ROW = 5  # positions of an image row that make a block of their own
Ints = NDArray[np.int64]


class Image(NamedTuple):
    """An image of x: channels (of a group), bytes between these, and between column phases if they lie apart."""

    channels: int
    channel: int
    phase: int

    def step(self, views: Views) -> int:
        """Bytes from channel to channel of what taps read."""
        return 4 * views.plane * len(views.planes) if views.planes else self.channel


class Tables:
    """What an argument block points to, kept with it."""

    def __init__(self, frame: Frame) -> None:
        self.frame, self.kept = frame, list[Any]()
        frame.kept = self.kept

    def add(self, array: NDArray[Any]) -> int:
        """The address of a copy."""
        memory = aligned_empty(max(array.size, 1), array.dtype)
        memory[: array.size] = array.reshape(-1)
        self.kept.append(memory)
        return address_of(memory)

    def planes(self, views: Views, image: Image, target: Target) -> None:
        """Memory for planes, and how to fill them."""
        if not views.planes:
            return
        planes = aligned_empty(image.channels * len(views.planes) * views.plane)
        if views.padded:
            planes[:] = 0
        self.kept.append(planes)
        copies, masks = _copies(views, image, target)
        copies[:, Copy.MASKS] += self.add(masks)
        s = self.frame.slots
        s[Slot.STAGES], s[Slot.COPIES], s[Slot.PLANES] = len(copies), self.add(copies), address_of(planes)


def _stored(masks: NDArray[np.bool_], target: Target) -> NDArray[Any]:
    """Masks (n, lanes) as the kernels read them: bits, or vectors of signs."""
    return np.packbits(masks, 1, "little") if target.masks else np.where(masks, -1, 0).astype(np.int32)


def _copies(views: Views, image: Image, target: Target) -> tuple[Ints, NDArray[Any]]:
    """Lines for the planes of a channel, with the offsets of their masks in the second array."""
    g, lanes = views.geometry, target.lanes
    (sh, sw), step, size = g.window.stride, 1 if image.phase else g.window.stride[1], 4 * views.plane
    copies, masks = list[Ints](), list[NDArray[np.bool_]]()
    for number, plane in enumerate(views.planes):
        rows, columns = plane.rows, plane.columns
        if not rows.count or not columns.count:
            continue
        vectors = (columns.count - 1) // lanes
        tail = columns.count - vectors * lanes
        at = 4 * columns.first
        if image.phase:
            firsts = [columns.first - origin(g, phase) for phase in column_phases(g.window)]
            own = next(i for i, first in enumerate(firsts) if first % sw == 0)
            at = own * image.phase + 4 * (firsts[own] // sw)
        line = np.zeros(len(Copy), np.int64)
        line[Copy.FROM], line[Copy.TO] = rows.first * views.row + at, number * size + 4 * plane.at
        line[Copy.ROWS], line[Copy.VECTORS] = rows.count, vectors
        line[Copy.FROM_ROW], line[Copy.TO_ROW] = sh * views.row, 4 * g.out[1]
        line[Copy.FROM_CHANNEL], line[Copy.TO_CHANNEL] = image.channel, size * len(views.planes)
        line[Copy.MASKS] = len(copies) * COPY_MASKS * mask_bytes(target)
        copies.append(line)
        wanted, lane = (tail - 1) * step + 1, np.arange(lanes)
        masks += [lane < wanted, lane + lanes < wanted, lane < tail]
    return np.array(copies, np.int64).reshape(-1, len(Copy)), _stored(np.array(masks, bool).reshape(-1, lanes), target)


def columns_frame(
    code: Code, share: Share, schedule: DenseSchedule, borders: tuple[int, ...], views: Views, image: Image
) -> Frame:
    """What a product whose second operand is an image needs, for a part of it; ``borders``: of the blocks of K."""
    target, e, sizes = code.target, share.extents, np.diff(borders)
    made = frame(code, e, replace(schedule, k_block=int(sizes.max())), share.blocks)
    s, tables = made.slots, Tables(made)
    lines = np.zeros((sizes.size, len(Line)), np.int64)
    lines[:, Line.TURNS], lines[:, Line.REST] = np.divmod(sizes, UNROLL)
    lines[:, Line.A], lines[:, Line.TAPS] = sizes * e.a_pitch, sizes * 8 * len(Tap)
    taps, order = _taps(views, image)
    line = VECTORS * mask_bytes(target)  # of the masks of a tap
    taps[..., Tap.OTHER] = line * np.arange(order.size)
    s[Slot.LINES], s[Slot.TAPS], s[Slot.K_BLOCKS] = tables.add(lines), tables.add(taps), sizes.size - 1
    masks, number = _masks(views.inside()[order], target)
    s[Slot.VIEWS] = tables.add(tables.add(masks) + number * line * order.size)
    whole = e.n // (VECTORS * target.lanes)
    s[Slot.VIEWS_PANEL], s[Slot.VIEWS_GROUP], s[Slot.VIEWS_TAIL] = 8, 8 * s[Slot.GROUP], 8 * whole
    s[Slot.B_K], s[Slot.PACK], s[Slot.PACK_TAIL], s[Slot.CHANNELS] = 0, 1, 1, image.channels
    tables.planes(views, image, target)
    return made


def _taps(views: Views, image: Image) -> tuple[Ints, Ints]:
    """(channels, places, words): lines of a table of taps, and the order of the places of the kernel."""
    order = np.argsort(full_taps(len(views.places()), views.geometry.window).key, kind="stable")
    taps = np.zeros((image.channels, order.size, len(Tap)), np.int64)
    taps[..., Tap.PLACE] = image.step(views) * np.arange(image.channels)[:, None] + views.places()[order]
    return taps, order


def _masks(inside: NDArray[np.bool_], target: Target) -> tuple[NDArray[Any], Ints]:
    """(different panels, places, vectors, ...): masks as they lie in memory, and which of these a panel has."""
    places, n = inside.shape
    width = VECTORS * target.lanes
    panels = -(-n // width)
    padded = np.zeros((places, panels * width), bool)
    padded[:, :n] = inside
    by_panel = padded.reshape(places, panels, width).transpose(1, 0, 2)
    found, number = np.unique(by_panel.reshape(panels, -1), axis=0, return_inverse=True)
    return _stored(found.reshape(-1, target.lanes), target), np.asarray(number, np.int64).reshape(-1)


class Positions(NamedTuple):
    """How positions are cut into blocks.

    Attributes:
        kinds: of each block, which of ``skipped``.
        skipped: places of the kernel that lie beside the image for all positions of a block.
    """

    blocks: Blocks
    kinds: tuple[int, ...]
    skipped: tuple[tuple[int, ...], ...]


def positions_of(views: Views, most: int) -> Positions:
    """Blocks of at most ``most`` positions."""
    inside, width = views.inside(), views.geometry.out[1]
    whole = _LEAST_ROW <= width <= most
    blocks = Blocks(inside.shape[1] // width, 0, width) if whole else blocks_of_rows(inside.shape[1], most)
    firsts = [blocks.range(i, i + 1) for i in range(blocks.large + blocks.small)]
    skipped = [tuple(np.flatnonzero(~inside[:, row : row + some.rows].any(1)).tolist()) for some, row in firsts]
    kinds = sorted(set(skipped))
    return Positions(blocks, tuple(kinds.index(places) for places in skipped), tuple(kinds))


class Starts:
    """What sums begin with: (kinds, M), made anew for new weights."""

    def __init__(self, rows: Positions, m: int, places: int) -> None:
        self.rows, self.m, self.places = rows, m, places
        self.array = aligned_empty(len(rows.skipped) * m)
        self.made_for: object = None

    def update(self, weights: Any) -> None:
        """For the values of a product, its ``weights``: once for each."""
        if self.made_for is weights:
            return
        matrix, bias = SparseMatrix(weights.task.pattern, weights.values).to_dense(), weights.bias
        # A zero of the padding times a weight is a zero of the weight's sign, and of zeros one +0 makes the sum +0.
        by_place: NDArray[np.bool_] = np.any(~np.signbit(matrix.reshape(self.m, -1, self.places)), axis=1)
        for row, places in zip(self.array.reshape(-1, self.m), self.rows.skipped, strict=True):
            row[:] = -0.0 if bias is None else bias
            row[by_place[:, list(places)].any(1)] += np.float32(0)
        self.made_for = weights


def rows_frame(
    code: Code, share: Share, schedule: DenseSchedule, borders: tuple[int, ...], views: Views, rows: Positions,
    image: Image, m: int,
) -> Frame:  # fmt: skip
    """What a product whose first operand is an image needs, for a part of the rows of W; ``m``: all of them."""
    sizes = np.diff(borders)
    made = frame(code, share.extents, replace(schedule, k_block=int(sizes.max()), panels=1), rows.blocks)
    s, tables = made.slots, Tables(made)
    taps, order = _taps(views, image)
    taps = taps.reshape(-1, len(Tap))
    taps[:, Tap.OTHER] = np.arange(len(taps)) * VECTORS * code.target.tile_bytes
    lines = np.zeros((len(sizes), len(rows.kinds), len(RowsLine)), np.int64)
    for kind, places in enumerate(rows.skipped):
        kept = np.tile(~np.isin(order, places), image.channels)
        address, of_kind = tables.add(taps[kept]), np.array(rows.kinds) == kind
        counts = np.diff(np.concatenate([[0], np.cumsum(kept)])[np.array(borders)])
        for word, value in ((RowsLine.TURNS, counts // UNROLL), (RowsLine.REST, counts % UNROLL),
                            (RowsLine.TAPS, address + 8 * len(Tap) * (np.cumsum(counts) - counts))):  # fmt: skip
            lines[:, of_kind, word] = value[:, None]
        lines[:, of_kind, RowsLine.BIAS] = 4 * m * kind
    # Each block of rows prefetches a part of the next panel, until all of it is.
    line = VECTORS * code.target.tile_bytes
    reached = np.cumsum(lines[..., RowsLine.TURNS], 1) - lines[..., RowsLine.TURNS]
    reached *= AHEAD_LINES * LINE
    wanted = reached < line * sizes[:, None]
    lines[..., RowsLine.AHEAD] = s[Slot.B_GROUP] + line * np.array(borders[:-1])[:, None] + reached * wanted
    lines[..., RowsLine.AHEAD_STEP] = AHEAD_LINES * LINE * wanted
    s[Slot.LINES], s[Slot.LINES_K] = tables.add(lines), lines[0].nbytes
    s[Slot.K_BLOCKS], s[Slot.B_K], s[Slot.CHANNELS] = len(sizes) - 1, 0, image.channels
    tables.planes(views, image, code.target)
    return made
