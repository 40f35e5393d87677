"""A compiled product on the CPU: point the argument block at the arrays, make one native call."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..codegen.vector import TILE, TILE_BYTES
from ..kernels.arguments import SLOTS, Arg
from ..kernels.matmul import Kernel
from ..runtime.cpu import Executable, Frame, address_of
from ..runtime.memory import aligned_empty
from ..schedule.cost import tiles_per_group
from ..schedule.schedule import Schedule
from ..schedule.task import Task
from ..target import Target

Array = NDArray[np.float32]


class NativeProduct:
    """Machine code, packed values and free call frames. Any number of threads may call at once."""

    def __init__(self, task: Task, schedule: Schedule, target: Target, kernel: Kernel, executable: Executable) -> None:
        self.task, self.schedule, self.target, self.kernel = task, schedule, target, kernel
        self.executable = executable
        self.values: Array = aligned_empty(0)
        self._frames: list[Frame] = []

    def load(self, values: Array, bias: Array | None) -> None:
        """Pack new values; calls under way keep the ones they started with."""
        packed = aligned_empty(max(self.kernel.plan.slots, 1))
        self.kernel.pack(values, bias, packed)
        self.values = packed

    def run(self, x: Array, y: Array, r: Array | None, columns: int) -> None:
        """One call. ``columns`` >= 16 of row-major or transposed arrays whose innermost stride is one element, or whole tiles."""
        task, tiles = self.task, -(-columns // TILE)
        group = tiles_per_group(task, self.schedule, self.target, tiles)
        frame = self._frames.pop() if self._frames else Frame(SLOTS)
        s, values = frame.slots, self.values
        xa, ya, ra = address_of(x), address_of(y), 0 if r is None else address_of(r)
        s[Arg.X], s[Arg.Y], s[Arg.R], s[Arg.W] = xa, ya, ra, address_of(values)
        s[Arg.TILES], s[Arg.GROUP] = tiles, group
        m, k = task.pattern.shape
        if task.layout == "tile_major":
            steps = [k * TILE_BYTES, m * TILE_BYTES, m * TILE_BYTES]
        else:
            pitches = [x.strides[0], y.strides[0], 0 if r is None else r.strides[0]]
            s[Arg.X_PITCH : Arg.X_TILE] = [p * n for p in pitches for n in (1, 3, 5, 7)]
            steps = [TILE_BYTES] * 3 if task.layout == "row_major" else [TILE * p for p in pitches]
            ahead = columns - TILE
            s[Arg.X_LAST : Arg.X_PITCH] = [base + ahead * step // TILE for base, step in zip((xa, ya, ra), steps, strict=True)]
        s[Arg.X_TILE : Arg.X_GROUP] = steps
        s[Arg.X_GROUP : Arg.TILES] = [step * group for step in steps]
        self._scratch(frame, group)
        self.executable.call(frame.address)
        self._frames.append(frame)

    def _scratch(self, frame: Frame, group: int) -> None:
        """Panels of one group, each behind the other."""
        task, s = self.task, frame.slots
        m, k = task.pattern.shape
        staged = task.layout == "transposed"
        sizes = {
            Arg.PANEL: k if staged or (self.schedule.packed and task.layout == "row_major") else 0,
            Arg.R_PANEL: m if staged and task.residual else 0,
            Arg.Y_PANEL: m if staged else 0,
            Arg.PARTIAL: m if self.kernel.plan.segments > 1 else 0,
        }
        total = sum(sizes.values())
        if total:
            at = frame.reserve(total * group * TILE)
            for slot, rows in sizes.items():
                s[slot] = at
                at += rows * group * TILE_BYTES
