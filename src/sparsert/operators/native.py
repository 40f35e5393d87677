"""A compiled product on the CPU: point the argument block at the arrays, make one native call."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..kernels.arguments import SLOTS, Arg
from ..kernels.matmul import Kernel
from ..runtime.cpu import Executable, Frame, address_of
from ..runtime.memory import aligned_empty
from ..schedule.cost import tiles_per_group
from ..schedule.schedule import Schedule
from ..schedule.task import Task
from ..target import Target

Array = NDArray[np.float32]
_SHAPES = 32  # shapes and pitches whose frames are kept,
_KEPT_BYTES = 32 << 20  # and scratch
_ALIGN_TILES = 4  # so many tiles a row must have for aligning its stores to pay


class NativeProduct:
    """Machine code, packed values and free call frames. Any number of threads may call at once."""

    def __init__(self, task: Task, schedule: Schedule, target: Target, kernel: Kernel, executable: Executable) -> None:
        self.task, self.schedule, self.target, self.kernel = task, schedule, target, kernel
        self.executable = executable
        self._values: tuple[Array, int] = (aligned_empty(0), 0)
        self._frames: dict[tuple[int, ...], list[Frame]] = {}
        self._kept = 0  # bytes of scratch in frames, roughly: threads may count at once

    def load(self, values: Array, bias: Array | None) -> None:
        """Pack new values; calls under way keep the ones they started with."""
        packed = aligned_empty(max(self.kernel.plan.slots, 1))
        self.kernel.pack(values, bias, packed)
        self._values = packed, address_of(packed)

    def run(self, x: Array, y: Array, r: Array | None, columns: int) -> None:
        """One call.

        ``columns``, at least the target's lanes, of row-major or transposed arrays whose innermost stride is one
        element, or whole tiles.
        """
        xa, ya, ra = address_of(x), address_of(y), 0 if r is None else address_of(r)
        # A residual that is y itself must be read before its element is written: no tile may overlap another then.
        by_rows = self.task.layout == "row_major"
        offset = ya % self.target.tile_bytes if by_rows and ra != ya else 0
        key = (columns, x.strides[0], y.strides[0], 0 if r is None else r.strides[0], offset)
        free = self._frames.setdefault(key, [])
        try:
            frame = free.pop()
        except IndexError:
            frame = self._frame(*key)
            self._kept += frame.scratch.nbytes
            if len(self._frames) > _SHAPES or self._kept > _KEPT_BYTES:  # forget other shapes; calls under way go on
                self._frames, self._kept = {key: free}, frame.scratch.nbytes
        values, weights = self._values  # held here: a refit meanwhile does not free what this call reads
        frame.point(xa, ya, ra, weights)
        self.executable.call(frame.address)
        free.append(frame)
        del values

    def _frame(self, columns: int, x_pitch: int, y_pitch: int, r_pitch: int, offset: int) -> Frame:
        """An argument block for arrays of these shapes and pitches, all but the addresses filled in."""
        task, lanes, width = self.task, self.target.lanes, self.target.tile_bytes
        m, k = task.pattern.shape
        pitches = (x_pitch, y_pitch, r_pitch)
        steps = {
            "row_major": (width,) * 3,
            "transposed": tuple(lanes * pitch for pitch in pitches),
            "tile_major": (k * width, m * width, m * width),
        }[task.layout]
        start = 0
        if task.layout == "row_major" and offset % 4 == 0 and y_pitch % width == 0 and columns >= _ALIGN_TILES * lanes:
            start = (
                -offset
            )  # all rows of y share their alignment: the second tile starts where stores no longer cross cache lines
        tiles = -(-(4 * columns - start) // width)
        group = tiles_per_group(task, self.schedule, self.target, tiles)
        frame = Frame(SLOTS, sum(self._panels().values()) * group * lanes)
        s = frame.slots
        s[Arg.X_LAST : Arg.X_PITCH] = [(columns - lanes) * step // lanes for step in steps]
        s[Arg.X_PITCH : Arg.X_TILE] = [pitch * n for pitch in pitches for n in (1, 3, 5, 7)]
        s[Arg.X_TILE : Arg.X_GROUP] = steps
        s[Arg.X_GROUP : Arg.START] = [step * group for step in steps]
        s[Arg.START], s[Arg.TILES], s[Arg.GROUP] = start, tiles, group
        at = address_of(frame.scratch)
        for slot, rows in self._panels().items():
            s[slot] = at
            at += rows * group * width
        return frame

    def _panels(self) -> dict[Arg, int]:
        """Rows of each scratch panel that a column tile needs."""
        task = self.task
        m, k = task.pattern.shape
        staged = task.layout == "transposed"
        return {
            Arg.PANEL: k if staged or (self.schedule.packed and task.layout == "row_major") else 0,
            Arg.R_PANEL: m if staged and task.residual else 0,
            Arg.Y_PANEL: m if staged and not self.kernel.scatters else 0,
            Arg.PARTIAL: m if self.kernel.plan.segments > 1 else 0,
        }
