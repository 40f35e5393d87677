"""A compiled product on the CPU: point the argument block at the arrays, make one native call."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..errors import InternalError
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
_ALIGN_TILES = 12  # so many tiles a row must have for aligning to pay, which costs one more


class Binding:
    """The product for arrays of one shape and pitch: what is left to say at a call is where they lie."""

    __slots__ = ("by_x", "executable", "free", "key", "owner", "unit", "values")

    def __init__(self, product: Framed, key: tuple[int, ...]) -> None:
        self.owner, self.key = weakref.ref(product), key  # no cycle: code is unmapped as soon as the operator is gone
        self.executable, self.values = product.executable, product.values
        self.free: dict[int, list[Frame]] = {}  # by how far x or y is off the alignment that its rows share
        self.unit, self.by_x = product.unit, product.aligns_x

    def call(self, xa: int, ya: int, ra: int) -> None:
        """One call with x, y and the residual (0: none) at these addresses."""
        offset = self._offset(xa, ya, ra)
        free = self.free.setdefault(offset, [])
        try:
            frame = free.pop()
        except IndexError:
            frame = self._owner().frame(self, offset)
        values, weights = self.values[0]  # held here: a refit meanwhile does not free what this call reads
        frame.point(xa, ya, ra, weights)
        self.executable.call(frame.address)
        free.append(frame)
        del values

    def fixed(self, xa: int, ya: int, ra: int) -> Callable[[], None]:
        """The call for arrays that stay where they are. It keeps a frame to itself; threads that meet make more."""
        executable, values, owner, key = self.executable, self.values, self._owner(), self.key
        offset = self._offset(xa, ya, ra)
        free: list[tuple[Frame, tuple[Array, int] | None]] = []

        def run() -> None:
            try:
                frame, loaded = free.pop()
            except IndexError:
                frame, loaded = owner.new_frame(key, offset), None
            if loaded is not values[0]:
                loaded = values[0]  # held with the frame: a refit meanwhile does not free what this call reads
                frame.point(xa, ya, ra, loaded[1])
            executable.call(frame.address)
            if not free:
                free.append((frame, loaded))

        return run

    def _offset(self, xa: int, ya: int, ra: int) -> int:
        """How far the rows that get aligned are off."""
        # A residual that is y itself must be read before its element is written: no tile may overlap another then.
        return (xa if self.by_x else ya) % self.unit if ra != ya else 0

    def _owner(self) -> Framed:
        owner = self.owner()
        if owner is None:
            raise InternalError("a call outlives its operator")
        return owner


class Framed(ABC):
    """Machine code, packed values and free call frames. Any number of threads may call at once.

    Attributes:
        unit: bytes that rows are aligned to, those of x if ``aligns_x``, else those of y; 1 for none.
        values: one entry, which all bindings see: the packed values and their address.
    """

    def __init__(self, executable: Executable, unit: int, aligns_x: bool) -> None:
        self.executable, self.unit, self.aligns_x = executable, unit, aligns_x
        self.values: list[tuple[Array, int]] = [(aligned_empty(0), 0)]
        self._bindings: dict[tuple[int, ...], Binding] = {}
        self._kept = 0  # bytes of scratch in frames, roughly: threads may count at once

    @abstractmethod
    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> Binding:
        """The binding for arrays like these."""

    @abstractmethod
    def new_frame(self, key: tuple[int, ...], offset: int) -> Frame:
        """A frame for the binding of ``key``, all but the addresses filled in."""

    def run(self, x: Array, y: Array, r: Array | None, columns: int) -> None:
        """One call; see :meth:`bind`."""
        self.bind(x, y, r, columns).call(address_of(x), address_of(y), 0 if r is None else address_of(r))

    def frame(self, binding: Binding, offset: int) -> Frame:
        """A new frame for ``binding``, which is known from now on; too many, or too large, and all are forgotten."""
        frame = self.new_frame(binding.key, offset)
        self._kept += frame.scratch.nbytes
        if len(self._bindings) >= _SHAPES or self._kept > _KEPT_BYTES:
            for other in list(self._bindings.values()):
                other.free.clear()
            self._bindings.clear()
            self._kept = frame.scratch.nbytes
        self._bindings[binding.key] = binding
        return frame


class NativeProduct(Framed):
    """Code unrolled from a pattern."""

    def __init__(self, task: Task, schedule: Schedule, target: Target, kernel: Kernel, executable: Executable) -> None:
        # If no fewer vectors of x are loaded where the caller has it than stored of y, its rows get aligned.
        m, k = task.pattern.shape
        aligns_x = k * (1 if schedule.packing != "none" else kernel.plan.n_blocks) >= m
        super().__init__(executable, target.tile_bytes if task.layout == "row_major" else 1, aligns_x)
        self.task, self.schedule, self.target, self.kernel = task, schedule, target, kernel

    def load(self, values: Array, bias: Array | None) -> None:
        """Pack new values; calls under way keep the ones they started with."""
        packed = aligned_empty(max(self.kernel.plan.slots, 1))
        self.kernel.pack(values, bias, packed)
        self.values[0] = packed, address_of(packed)

    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> Binding:
        """The binding for arrays like these.

        ``columns``, at least the target's lanes, of row-major or transposed arrays whose innermost stride is one
        element, or whole tiles.
        """
        key = (columns, x.strides[0], y.strides[0], 0 if r is None else r.strides[0])
        binding = self._bindings.get(key)
        return Binding(self, key) if binding is None else binding

    def new_frame(self, key: tuple[int, ...], offset: int) -> Frame:
        """An argument block for arrays of these shapes and pitches, all but the addresses filled in."""
        columns, x_pitch, y_pitch, r_pitch = key
        task, lanes, width = self.task, self.target.lanes, self.target.tile_bytes
        m, k = task.pattern.shape
        pitches = (x_pitch, y_pitch, r_pitch)
        steps = {
            "row_major": (width,) * 3,
            "transposed": tuple(lanes * pitch for pitch in pitches),
            "tile_major": (k * width, m * width, m * width),
        }[task.layout]
        # Rows whose pitch is a multiple of a tile share their alignment: with the first tile shifted, those behind it
        # no longer cross cache lines.
        shared = (x_pitch if self.aligns_x else y_pitch) % width == 0
        long = columns >= _ALIGN_TILES * lanes
        start = -offset if task.layout == "row_major" and shared and long and offset % 4 == 0 else 0
        tiles = -(-(4 * columns - start) // width)
        group = tiles_per_group(task, self.schedule, self.target, tiles)
        panels = {slot: rows * group for slot, rows in self._panels().items()} | {Arg.DISCARD: self.kernel.discarded}
        frame = Frame(SLOTS, sum(panels.values()) * lanes)
        s = frame.slots
        s[Arg.X_LAST : Arg.X_PITCH] = [(columns - lanes) * step // lanes for step in steps]
        s[Arg.X_PITCH : Arg.X_TILE] = [pitch * n for pitch in pitches for n in (1, 3, 5, 7)]
        s[Arg.X_TILE : Arg.X_GROUP] = steps
        s[Arg.X_GROUP : Arg.START] = [step * group for step in steps]
        s[Arg.START], s[Arg.TILES], s[Arg.GROUP] = start, tiles, group
        at = address_of(frame.scratch)
        for slot, vectors in panels.items():
            s[slot] = at
            at += vectors * width
        return frame

    def _panels(self) -> dict[Arg, int]:
        """Rows of each scratch panel that a column tile needs."""
        task = self.task
        m, k = task.pattern.shape
        staged = task.layout == "transposed"
        return {
            Arg.PANEL: k if staged or (self.schedule.packing != "none" and task.layout == "row_major") else 0,
            Arg.R_PANEL: m if staged and task.residual else 0,
            Arg.Y_PANEL: m if staged and not self.kernel.scatters else 0,
            Arg.PARTIAL: m if self.kernel.plan.segments > 1 else 0,
        }
