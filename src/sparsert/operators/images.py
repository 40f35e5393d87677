"""A compiled convolution on the CPU: argument blocks for the bands of an image, and scratch for their planes."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ..kernels import planes
from ..kernels.arguments import SLOTS, Arg, Move
from ..kernels.matmul import Kernel
from ..runtime.cpu import Executable, Frame, address_of
from ..schedule.cost import LEAST_SHARE, Split, tiles_per_group
from ..schedule.schedule import Schedule
from ..schedule.task import Task
from ..sparsity.geometry import Band, Geometry, Padding, bands
from ..sparsity.taps import Window
from ..target import Target
from .native import MOST_SHAPES, Array, Binding, NativeProduct
from .team import Call, Shift, Solo, Team

_Kind = TypeVar("_Kind", bound=Frame)

_LINE = 16  # floats of a cache line
_LEAST_COLUMNS = 256  # of a thread's band
_IMAGES, _ROWS = "images", "image rows"


class ConvProduct(NativeProduct):
    """Machine code of a convolution over (B, C, H, W) arrays whose rows are contiguous."""

    def __init__(
        self, task: Task, schedule: Schedule, target: Target, kernel: Kernel, executable: Executable, window: Window,
        padding: Padding,
    ) -> None:  # fmt: skip
        super().__init__(task, schedule, target, kernel, executable)
        self.window, self.padding = window, padding
        self.unit, self.aligns_x = 1, False

    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> Binding:
        """The binding for arrays like these: 4-D, or x 5-D with ``columns`` where it comes column phase by phase."""
        key = (x.shape[0], x.shape[2], columns, *_steps(x), x.strides[3] if x.ndim == 5 else 0, *_steps(y),
               *((0, 0, 0) if r is None else _steps(r)))  # fmt: skip
        binding = self._bindings.get(key)
        return Binding(self, key) if binding is None else binding

    def geometry(self, key: tuple[int, ...]) -> Geometry:
        """Of the images that a key of :meth:`bind` stands for."""
        size = key[1], key[2]
        return Geometry(self.window, size, self.padding.resolve(size, self.window))

    def new_frame(self, key: tuple[int, ...], offset: int) -> Call:
        """What a call on such images needs, all but the addresses filled in."""
        images, width, geometry = key[0], key[2], self.geometry(key)
        split = self._share_out(geometry, images)
        bands = self._bands(geometry, split.parts if split.by == _ROWS else 1)
        if len(self._splits) < MOST_SHAPES:
            self._splits[width] = split
        if self.crew is None or split.parts < 2:
            return self._solo(key, geometry, bands)
        parts: list[tuple[Frame, int, Shift]] = []
        for part in range(split.parts):
            first, last = (images * p // split.parts for p in (part, part + 1)) if split.by == _IMAGES else (0, images)
            low, high = (len(bands) * p // split.parts for p in (part, part + 1))
            some = bands[low:high] if split.by == _ROWS else bands
            frame = self._band_frame(Frame, (last - first, *key[1:]), geometry, some)
            parts.append((frame, self.executable.address, (first * key[3], first * key[7], first * key[10], 0)))
        return Team(self.crew.pool(), parts, 0)

    def _share_out(self, geometry: Geometry, images: int) -> Split:
        """Which parts of a call different threads do: whole images, or rows of every image."""
        rows, columns = geometry.out
        work = self.task.pattern.nnz * images * -(-rows * columns // self.target.lanes)
        parts = 1 if self.crew is None else min(self.crew.threads, work // LEAST_SHARE)
        if self.crew is None or parts < 2:
            return Split("", 1)
        pool = self.crew.pool()
        if not pool.ensure(parts - 1):
            parts = min(parts, pool.workers + 1)
        if images % parts == 0 or images >= 4 * parts:
            return Split(_IMAGES, parts)
        parts = min(parts, rows * columns // _LEAST_COLUMNS, rows)
        return Split(_ROWS, parts) if parts > 1 else Split("", 1)

    def _solo(self, key: tuple[int, ...], geometry: Geometry, bands: list[Band]) -> Solo:
        frame = self._band_frame(Solo, key, geometry, bands)
        frame.call = self.executable.call
        return frame

    def _band_frame(self, kind: type[_Kind], key: tuple[int, ...], geometry: Geometry, bands: list[Band]) -> _Kind:
        """Argument blocks for bands of every image, and scratch."""
        images = key[0]
        x, phase_step, y, r = key[3:6], key[6], key[7:10], key[10:13]
        task, lanes = self.task, self.target.lanes
        m, phases = task.pattern.rows, len(self.window.phases)
        channels = self.window.channels(task.pattern.cols)
        # Copies of rows end in zeros that reach beyond: into what is written later, unless phases are copied in turn.
        beyond = lanes if phases > 1 else 0
        x_plane = _odd_lines(max(band.floats + (band.pitch + beyond if beyond else 0) for band in bands))
        y_plane = _odd_lines(max(max(band.positions, lanes) for band in bands))
        tiles = max(-(-max(band.positions, lanes) // lanes) for band in bands)
        group = tiles_per_group(task, self.schedule, self.target, tiles)
        x_floats, y_floats = channels * phases * x_plane, m * y_plane
        slack = 4 * lanes + 2 * max(band.pitch for band in bands)
        # Rows of y without gaps, in long enough planes, are written where the caller wants them.
        direct = {
            copy: self.window.masked and steps[2] == 4 * geometry.out[1] and columns_of(bands) >= lanes
            for copy, steps in ((phases, y), (phases + 1, r))
        }
        sizes = {
            Arg.X_PLANES: x_floats + slack,
            Arg.Y_PLANES: 0 if direct[phases] else y_floats + slack,
            Arg.R_PLANES: y_floats + slack if task.residual and not direct[phases + 1] else 0,
            Arg.MASKS: len(bands) * tiles * self.window.masks * lanes,
        }
        sizes |= {slot: rows * group * lanes for slot, rows in self._panels().items()}
        sizes[Arg.DISCARD] = self.kernel.discarded * lanes
        sizes = {slot: -(-floats // _LINE) * _LINE for slot, floats in sizes.items()}
        n_slots = planes.slots(task)
        masks = 2 * planes.copies(task) * lanes
        frame = kind(n_slots * len(bands), sum(sizes.values()) + masks * len(bands))
        frame.scratch[:] = 0
        at, addresses = address_of(frame.scratch), {}
        for slot, floats in sizes.items():
            addresses[slot] = at
            at += 4 * floats
        begin = (addresses[Arg.MASKS] - address_of(frame.scratch)) // 4
        table = frame.scratch[begin : begin + sizes[Arg.MASKS]].view(np.int32)
        table = table[: len(bands) * tiles * self.window.masks * lanes].reshape(len(bands), tiles, -1, lanes)
        mask_floats = frame.scratch[sum(sizes.values()) :].view(np.int32).reshape(len(bands), -1, 2 * lanes)
        whole = len(bands) == 1
        for index, band in enumerate(bands):
            s = frame.slots[index * n_slots : (index + 1) * n_slots]
            for slot, address in addresses.items():
                s[slot] = address
            columns = max(band.positions, lanes)
            s[Arg.X_LAST : Arg.X_PITCH] = 4 * (columns - lanes)
            pitches = [4 * band.pitch, 4 * y_plane, 4 * y_plane]
            ends = ((phases, y, Arg.Y_PLANES, Arg.Y_START), (phases + 1, r, Arg.R_PLANES, Arg.R_START))
            for end, (copy, steps, planes_at, start) in enumerate(ends):
                s[start] = addresses[planes_at]
                if direct[copy]:
                    pitches[1 + end] = steps[1]
                    s[start], s[start - 2] = band.rows[0] * steps[2] + 4 * band.columns[0], 1
            s[Arg.MASKS] = addresses[Arg.MASKS] + index * tiles * self.window.masks * 4 * lanes
            self._masks(band, columns, table[index])
            s[Arg.X_PITCH : Arg.X_TILE] = [pitch * n for pitch in pitches for n in (1, 3, 5, 7)]
            s[Arg.X_TILE : Arg.X_GROUP] = 4 * lanes
            s[Arg.X_GROUP : Arg.START] = 4 * lanes * group
            s[Arg.TILES], s[Arg.GROUP] = -(-columns // lanes), group
            s[Arg.X_PLANE] = 4 * x_plane
            s[Arg.MORE], s[Arg.BACK] = index + 1 < len(bands), -8 * n_slots * (len(bands) - 1)
            s[Arg.IMAGES], s[Arg.X_IMAGE], s[Arg.Y_IMAGE], s[Arg.R_IMAGE] = images, x[0], y[0], r[0]

            def move(
                copy: int, values: dict[Move, int], count: int, s: NDArray[np.int64] = s, index: int = index
            ) -> None:
                """Fill the slots of a copy whose rows have ``count`` floats."""
                vectors = max(count - 1, 0) // lanes
                tail = count - vectors * lanes
                step = self.window.stride[1] if copy < phases and not phase_step else 1
                # With a stride of 2 the last vector comes from two, up to the last element that is wanted.
                kept = max(0, (tail - 1) * step + 1) if tail else 0
                mask_floats[index, copy, :kept] = -1
                base = SLOTS + copy * len(Move)
                for name, value in values.items():
                    s[base + name] = value
                s[base + Move.VECTORS] = vectors
                s[base + Move.MASK] = address_of(mask_floats[index, copy])

            for phase, (rows, cols) in enumerate(band.runs):
                used = rows.count if cols.count else 0
                flat = x[2] == 4 * band.pitch == 4 * cols.count and self.window.stride == (1, 1) and used > 0
                column = self.window.phases[phase][1]
                first = 4 * cols.first
                if phase_step:
                    at = (cols.first - origin(geometry, column)) // self.window.stride[1]
                    first = column_phases(self.window).index(column) * phase_step + 4 * at
                below = band.out[0] + geometry.reach[0] - rows.zeros - rows.count
                apart = band.columns != (0, geometry.out[1])
                above = -(-x_plane // lanes) if apart else 0 if whole else -(-rows.zeros * band.pitch // lanes)
                move(phase, {
                    Move.FROM: rows.first * x[2] + first, Move.CHANNEL: x[1], Move.ROW: x[2] * self.window.stride[0],
                    Move.AT: addresses[Arg.X_PLANES] + 4 * phase * x_plane,
                    Move.SKIP: 4 * (rows.zeros * band.pitch + cols.zeros), Move.PLANE: 4 * phases * x_plane,
                    Move.PITCH: 4 * band.pitch * (used if flat else 1), Move.ROWS: 1 if flat else used,
                    Move.ABOVE: above, Move.BELOW: 0 if whole or apart else -(-below * band.pitch // lanes),
                }, cols.count * (used if flat else 1))  # fmt: skip
            outputs = [(phases, y, Arg.Y_PLANES)] + [(phases + 1, r, Arg.R_PLANES)] * (task.residual is not None)
            for copy, steps, slot in outputs:
                move(copy, {
                    Move.FROM: band.rows[0] * steps[2] + 4 * band.columns[0], Move.CHANNEL: steps[1],
                    Move.ROW: steps[2], Move.AT: addresses[slot], Move.PLANE: 4 * y_plane,
                    Move.PITCH: 4 * band.pitch, Move.ROWS: 0 if direct[copy] else band.out[0],
                }, band.out[1])  # fmt: skip
        return frame

    def _masks(self, band: Band, columns: int, table: NDArray[np.int32]) -> None:
        """(tiles, masks, lanes): fill in the masks of a band's tiles, the last of which ends with the columns."""
        lanes = self.target.lanes
        tiles = -(-columns // lanes)
        starts = np.minimum(np.arange(tiles) * lanes, columns - lanes)
        column = (starts[:, None] + np.arange(lanes)) % max(band.pitch, 1)
        for number, place in enumerate(self.window.mask_places):
            table[:tiles, number] = -band.mask(*place)[column].astype(np.int32)

    def _bands(self, geometry: Geometry, least: int) -> list[Band]:
        """Bands whose planes fit the second-level cache, no fewer than ``least`` unless there are fewer rows."""
        task, phases = self.task, len(self.window.phases)
        inputs = self.window.channels(task.pattern.cols) * phases
        outputs = 0 if self.window.masked else task.pattern.rows * (2 if task.residual else 1)
        return bands(geometry, inputs, outputs, self.target.l2 // 4, least)


def columns_of(bands: list[Band]) -> int:
    """Columns of the shortest product."""
    return min(band.positions for band in bands)


def column_phases(window: Window) -> list[int]:
    """The column phases that taps read."""
    return sorted({column for _, column in window.phases})


def origin(geometry: Geometry, phase: int) -> int:
    """The first image column of a column phase."""
    return (phase - geometry.pads[1][0]) % geometry.window.stride[1]


def _steps(array: Array) -> tuple[int, int, int]:
    return array.strides[0], array.strides[1], array.strides[2]


def _odd_lines(floats: int) -> int:
    """So many floats, or more: an odd number of cache lines, so that planes do not fall into the same cache sets."""
    return (-(-floats // _LINE) | 1) * _LINE
