"""What a convolution's call needs: an argument block for every band of rows, and the scratch that bands share."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..kernels import planes
from ..kernels.arguments import SLOTS, Arg, Move
from ..runtime.cpu import Frame, address_of
from ..schedule.cost import tiles_per_group
from ..schedule.schedule import Schedule
from ..schedule.task import Task
from ..sparsity.geometry import Band, Geometry, Run
from ..sparsity.taps import Window
from ..target import Target
from .planes import BEYOND

_Kind = TypeVar("_Kind", bound=Frame)
Slots = NDArray[np.int64]
_LINE = 16  # floats of a cache line


class Steps(NamedTuple):
    """Bytes from image to image, channel to channel and row to row of an array."""

    image: int
    channel: int
    row: int


class Arrays(NamedTuple):
    """How the arrays of a call lie.

    Attributes:
        images: how many.
        x, y, r: input, output, residual.
        phase: bytes from column phase to column phase of an x that comes that way, else 0.
        room: floats of zeros before and behind every channel of x, which then begins a cache line.
    """

    images: int
    x: Steps
    y: Steps
    r: Steps
    phase: int
    room: int = 0


class _Copy(NamedTuple):
    """Rows of an image that go to planes, or come from them."""

    slots: dict[Move, int]
    floats: int  # of a row
    step: int  # every how many of them count


class Bands:
    """Argument blocks and scratch for ``bands``, which every image repeats.

    Attributes:
        tiles: most column tiles of a band.
        group: of which so many a group.
        tails: whether a band's y ends in the midst of a tile, whose results then go through scratch.
        in_place: whether x is read where the caller has it.
        direct: by copy, that of y and that of the residual: whether the code works on the caller's array itself.
    """

    def __init__(
        self, task: Task, window: Window, schedule: Schedule, target: Target, geometry: Geometry, bands: list[Band],
        arrays: Arrays,
    ) -> None:  # fmt: skip
        self.task, self.window, self.target = task, window, target
        self.geometry, self.bands, self.arrays = geometry, bands, arrays
        lanes, self.phases = target.lanes, len(window.phases)
        self.tiles = max(-(-max(band.positions, lanes) // lanes) for band in bands)
        self.group = tiles_per_group(task, schedule, target, self.tiles)
        columns = [band.positions for band in bands]
        self.tails = bool(window.pitch) and any(n % lanes for n in columns)
        self.in_place = arrays.room > 0 and all(self._reads_in_place(band) for band in bands)
        self.direct = {
            self.phases: self._gapless(arrays.y) and (window.pitch > 0 or min(columns) >= lanes),
            self.phases + 1: task.residual is not None and self._gapless(arrays.r) and min(columns) >= lanes
            and not self.tails,
        }  # fmt: skip

    def _gapless(self, steps: Steps) -> bool:
        """Whether rows of an array of y's shape lie as they do in planes."""
        return self.window.masked and steps.row == 4 * self.geometry.out[1]

    def _reads_in_place(self, band: Band) -> bool:
        """Whether the zeros around channels of x are those that a band needs, and its planes begin a cache line."""
        window, lanes = self.window, self.target.lanes
        (_, cols), x = band.runs[0], self.arrays.x
        if not window.pitch or self.phases > 1 or window.stride != (1, 1):
            return False
        if not x.row == 4 * band.pitch == 4 * cols.count:
            return False
        start = self._start(band)
        furthest = window.shift + self.geometry.reach[0] * band.pitch + self.geometry.reach[1]
        end = start // 4 + self._columns(band) + (furthest // lanes + 1) * lanes
        behind = end - self.geometry.size[0] * band.pitch
        aligned = start % self.target.tile_bytes == 0 == x.channel % self.target.tile_bytes
        return aligned and -start // 4 <= self.arrays.room and behind <= self.arrays.room + BEYOND * lanes

    def _start(self, band: Band) -> int:
        """Bytes from the image to the plane of its first channel, if they are the same memory."""
        rows, cols = band.runs[0]
        return rows.first * self.arrays.x.row - 4 * (rows.zeros * band.pitch + cols.zeros + self.window.shift)

    @cached_property
    def x_plane(self) -> int:
        """Floats from plane to plane of x."""
        # Copies of rows end in zeros that reach beyond: into what is written later, unless phases are copied in turn.
        beyond = self.target.lanes if self.phases > 1 else 0
        return _odd_lines(
            self.window.shift + max(band.floats + (band.pitch + beyond if beyond else 0) for band in self.bands)
        )

    @cached_property
    def y_plane(self) -> int:
        """The same of y and of the residual."""
        return _odd_lines(max(max(band.positions, self.target.lanes) for band in self.bands))

    def frame(self, kind: type[_Kind], panels: dict[Arg, int], discarded: int) -> _Kind:
        """All of it; ``panels`` has so many rows per tile, and so many vectors of scratch may be ``discarded``."""
        lanes = self.target.lanes
        sizes = self._planes()
        sizes[Arg.MASKS] = len(self.bands) * self.tiles * self.window.masks * lanes
        sizes |= {slot: rows * self.group * lanes for slot, rows in panels.items()}
        sizes[Arg.DISCARD] = discarded * lanes
        sizes[Arg.TAIL] = self.task.pattern.rows * lanes if self.tails and self.direct[self.phases] else 0
        sizes = {slot: -(-floats // _LINE) * _LINE for slot, floats in sizes.items()}
        n_slots = planes.slots(self.task)
        ends = 2 * planes.copies(self.task) * lanes  # masks of the copies
        frame = kind(n_slots * len(self.bands), sum(sizes.values()) + ends * len(self.bands))
        frame.scratch[:] = 0
        parts = np.split(frame.scratch, np.cumsum(list(sizes.values())))
        addresses = {slot: address_of(part) for slot, part in zip(sizes, parts, strict=False)}
        masks = dict(zip(sizes, parts, strict=False))[Arg.MASKS].view(np.int32)
        tables = masks[: len(self.bands) * self.tiles * self.window.masks * lanes]
        tables = tables.reshape(len(self.bands), self.tiles, -1, lanes)
        tails = parts[-1].view(np.int32).reshape(len(self.bands), -1, 2 * lanes)
        for index, band in enumerate(self.bands):
            s = frame.slots[index * n_slots : (index + 1) * n_slots]
            for slot, address in addresses.items():
                s[slot] = address
            self._tile_masks(band, tables[index])
            s[Arg.MASKS] = address_of(tables[index]) if tables.size else 0
            self._product(s, band)
            s[Arg.MORE], s[Arg.BACK] = index + 1 < len(self.bands), -8 * n_slots * (len(self.bands) - 1)
            for number, copy in enumerate(self._copies(s, band)):
                self._move(s, number, copy, tails[index, number])
        return frame

    def _planes(self) -> dict[Arg, int]:
        """Floats of the planes."""
        window, lanes = self.window, self.target.lanes
        channels = window.channels(self.task.pattern.cols)
        y_floats = self.task.pattern.rows * self.y_plane
        slack = 4 * lanes + 2 * max(band.pitch for band in self.bands)
        return {
            Arg.X_PLANES: 0 if self.in_place else channels * self.phases * self.x_plane + slack,
            Arg.Y_PLANES: 0 if self.direct[self.phases] else y_floats + slack,
            Arg.R_PLANES: y_floats + slack if self.task.residual and not self.direct[self.phases + 1] else 0,
        }

    def _columns(self, band: Band) -> int:
        """Of the product: at least a tile, and whole tiles where these may not overlap."""
        lanes = self.target.lanes
        return -(-band.positions // lanes) * lanes if self.window.pitch else max(band.positions, lanes)

    def _tail(self, band: Band) -> int:
        """Columns of the last tile, if that is not whole and the others go where the caller wants them."""
        return band.positions % self.target.lanes if self.window.pitch and self.direct[self.phases] else 0

    def _product(self, s: Slots, band: Band) -> None:
        """Slots of the product itself."""
        lanes, arrays, columns = self.target.lanes, self.arrays, self._columns(band)
        s[Arg.X_LAST : Arg.X_PITCH] = 4 * (columns - lanes)
        pitches = [4 * band.pitch, 4 * self.y_plane, 4 * self.y_plane]
        ends = ((arrays.y, Arg.Y_PLANES, Arg.Y_START), (arrays.r, Arg.R_PLANES, Arg.R_START))
        for end, (steps, planes_at, start) in enumerate(ends):
            s[start] = s[planes_at]
            if self.direct[self.phases + end]:
                # Rows of y without gaps, in long enough planes, are written where the caller wants them.
                pitches[1 + end] = steps.channel
                s[start], s[start - 2] = band.rows[0] * steps.row + 4 * band.columns[0], 1
        s[Arg.X_PITCH : Arg.X_TILE] = [pitch * n for pitch in pitches for n in (1, 3, 5, 7)]
        s[Arg.X_TILE : Arg.X_GROUP] = 4 * lanes
        s[Arg.X_GROUP : Arg.START] = 4 * lanes * self.group
        s[Arg.TILES], s[Arg.GROUP] = -(-columns // lanes), self.group
        s[Arg.X_PLANE], s[Arg.X_START] = 4 * self.x_plane, s[Arg.X_PLANES]
        if self.in_place:
            s[Arg.X_PLANE], s[Arg.X_START], s[Arg.X_DIRECT] = arrays.x.channel, self._start(band), 1
        s[Arg.TAIL_AT] = 4 * (columns - lanes) if self._tail(band) else -1
        s[Arg.IMAGES], s[Arg.X_IMAGE] = arrays.images, arrays.x.image
        s[Arg.Y_IMAGE], s[Arg.R_IMAGE] = arrays.y.image, arrays.r.image

    def _tile_masks(self, band: Band, table: NDArray[np.int32]) -> None:
        """(tiles, masks, lanes): fill in the masks of a band's tiles, the last of which ends with the columns."""
        lanes, columns = self.target.lanes, self._columns(band)
        tiles = -(-columns // lanes)
        starts = np.minimum(np.arange(tiles) * lanes, columns - lanes)
        column = (starts[:, None] + np.arange(lanes)) % max(band.pitch, 1)
        for number, place in enumerate(self.window.mask_places):
            table[:tiles, number] = -band.mask(*place)[column].astype(np.int32)

    def _copies(self, s: Slots, band: Band) -> list[_Copy]:
        """A copy per phase of x, one for y and one for a residual."""
        copies = [self._copy_in(s, band, phase, *runs) for phase, runs in enumerate(band.runs)]
        tail = self._tail(band)
        copies.append(
            self._copy_tail(s, band, tail) if tail else
            self._copy_rows(s, band, self.phases, self.arrays.y, Arg.Y_PLANES)
        )  # fmt: skip
        if self.task.residual is not None:
            copies.append(self._copy_rows(s, band, self.phases + 1, self.arrays.r, Arg.R_PLANES))
        return copies

    def _copy_in(self, s: Slots, band: Band, phase: int, rows: Run, cols: Run) -> _Copy:
        """A phase of x."""
        if self.in_place:
            return _Copy({}, 0, 1)
        x, window, lanes = self.arrays.x, self.window, self.target.lanes
        used = rows.count if cols.count else 0
        flat = x.row == 4 * band.pitch == 4 * cols.count and window.stride == (1, 1) and used > 0
        column = window.phases[phase][1]
        first, step = 4 * cols.first, window.stride[1]
        if self.arrays.phase:
            at = (cols.first - origin(self.geometry, column)) // window.stride[1]
            first, step = column_phases(window).index(column) * self.arrays.phase + 4 * at, 1
        below = band.out[0] + self.geometry.reach[0] - rows.zeros - rows.count
        apart = band.columns != (0, self.geometry.out[1])
        whole = len(self.bands) == 1  # nothing else is ever written where its zeros are
        above = -(-rows.zeros * band.pitch // lanes)
        return _Copy({
            Move.FROM: rows.first * x.row + first, Move.CHANNEL: x.channel, Move.ROW: x.row * window.stride[0],
            Move.AT: int(s[Arg.X_PLANES]) + 4 * (phase * self.x_plane + window.shift),
            Move.SKIP: 4 * (rows.zeros * band.pitch + cols.zeros), Move.PLANE: 4 * self.phases * self.x_plane,
            Move.PITCH: 4 * band.pitch * (used if flat else 1), Move.ROWS: 1 if flat else used,
            Move.ABOVE: -(-self.x_plane // lanes) if apart else 0 if whole else above,
            Move.BELOW: 0 if whole or apart else -(-below * band.pitch // lanes),
        }, cols.count * (used if flat else 1), step)  # fmt: skip

    def _copy_rows(self, s: Slots, band: Band, copy: int, steps: Steps, planes_at: Arg) -> _Copy:
        """Rows of y or of the residual."""
        return _Copy({
            Move.FROM: band.rows[0] * steps.row + 4 * band.columns[0], Move.CHANNEL: steps.channel,
            Move.ROW: steps.row, Move.AT: int(s[planes_at]), Move.PLANE: 4 * self.y_plane,
            Move.PITCH: 4 * band.pitch, Move.ROWS: 0 if self.direct[copy] else band.out[0],
        }, band.out[1], 1)  # fmt: skip

    def _copy_tail(self, s: Slots, band: Band, columns: int) -> _Copy:
        """The last ``columns`` of y's planes."""
        y = self.arrays.y
        return _Copy({
            Move.FROM: band.rows[0] * y.row + 4 * (band.columns[0] + band.positions - columns), Move.CHANNEL: y.channel,
            Move.AT: int(s[Arg.TAIL]), Move.PLANE: self.target.tile_bytes, Move.ROWS: 1,
        }, columns, 1)  # fmt: skip

    def _move(self, s: Slots, number: int, copy: _Copy, mask: NDArray[np.int32]) -> None:
        """Slots of a copy, and the mask of the last vector of its rows."""
        lanes = self.target.lanes
        vectors = max(copy.floats - 1, 0) // lanes
        tail = copy.floats - vectors * lanes
        # With a stride of 2 the last vector comes from two, up to the last element that is wanted.
        mask[: max(0, (tail - 1) * copy.step + 1) if tail else 0] = -1
        base = SLOTS + number * len(Move)
        for name, value in copy.slots.items():
            s[base + name] = value
        s[base + Move.VECTORS], s[base + Move.MASK] = vectors, address_of(mask)


def column_phases(window: Window) -> list[int]:
    """The column phases that taps read."""
    return sorted({column for _, column in window.phases})


def origin(geometry: Geometry, phase: int) -> int:
    """The first image column of a column phase."""
    return (phase - geometry.pads[1][0]) % geometry.window.stride[1]


def _odd_lines(floats: int) -> int:
    """So many floats, or more: an odd number of cache lines, so that planes do not fall into the same cache sets."""
    return (-(-floats // _LINE) | 1) * _LINE
