"""A compiled product on the CPU: point the argument block at the arrays, make one native call."""

from __future__ import annotations

import ctypes
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import chain, pairwise, zip_longest
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import InternalError
from ..kernels.arguments import SLOTS, Arg
from ..kernels.matmul import Kernel
from ..runtime.cpu import Executable, Frame, address_of
from ..runtime.memory import aligned_empty
from ..schedule import cost
from ..schedule.schedule import Schedule
from ..schedule.task import Task
from ..target import Target
from .locks import ChildLock
from .team import Call, Crew, Part, Solo, Team, pieces, tile_cuts

Array = NDArray[np.float32]
_Kind = TypeVar("_Kind", bound=Frame)
MOST_SHAPES = 32  # shapes and pitches whose frames are kept,
_KEPT_BYTES = 32 << 20  # and scratch
_LEAST_TILES = 3  # so many tiles take as long as fetching the code that they pass over
_ALIGN_TILES = 12  # so many tiles a row must have for aligning to pay, which costs one more


class Loaded(NamedTuple):
    """Packed values: of the whole product under 0, of its parts under their number."""

    packed: dict[int, tuple[Array, ...]]
    addresses: dict[int, tuple[int, ...]]


class Binding:
    """The product for arrays of one shape and pitch: what is left to say at a call is where they lie."""

    __slots__ = ("by_x", "free", "key", "owner", "unit", "values")

    def __init__(self, product: Framed, key: tuple[int, ...]) -> None:
        self.owner, self.key = weakref.ref(product), key  # no cycle: code is unmapped as soon as the operator is gone
        self.values = product.values
        self.free: dict[int, list[Call]] = {}  # by how far x or y is off the alignment that its rows share
        self.unit, self.by_x = product.unit, product.aligns_x

    def call(self, xa: int, ya: int, ra: int) -> None:
        """One call with x, y and the residual (0: none) at these addresses."""
        offset = self._offset(xa, ya, ra)
        free = self.free.setdefault(offset, [])
        try:
            frame = free.pop()
        except IndexError:
            frame = self._owner().frame(self, offset)
        loaded = self.values[0]  # held here: a refit meanwhile does not free what this call reads
        frame.aim(xa, ya, ra, loaded.addresses)
        frame.call(frame.address)
        free.append(frame)
        del loaded

    def fixed(self, xa: int, ya: int, ra: int) -> Callable[[], None]:
        """The call for arrays that stay where they are. It keeps a frame to itself; threads that meet make more."""
        values, owner, key = self.values, self._owner(), self.key
        offset = self._offset(xa, ya, ra)
        free: list[tuple[Call, Loaded | None]] = []

        def run() -> None:
            try:
                frame, loaded = free.pop()
            except IndexError:
                frame, loaded = owner.new_frame(key, offset), None
            if loaded is not values[0]:
                loaded = values[0]  # held with the frame: a refit meanwhile does not free what this call reads
                frame.aim(xa, ya, ra, loaded.addresses)
            frame.call(frame.address)
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
        values: one entry, which all bindings see.
    """

    def __init__(self, unit: int, aligns_x: bool) -> None:
        self.unit, self.aligns_x = unit, aligns_x
        self.values: list[Loaded] = [Loaded({}, {})]
        self._bindings: dict[tuple[int, ...], Binding] = {}
        self._kept = 0  # bytes of scratch in frames, roughly: threads may count at once

    @abstractmethod
    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> Binding:
        """The binding for arrays like these."""

    @abstractmethod
    def new_frame(self, key: tuple[int, ...], offset: int) -> Call:
        """What a call on arrays of the binding of ``key`` needs, all but the addresses filled in."""

    def run(self, x: Array, y: Array, r: Array | None, columns: int) -> None:
        """One call; see :meth:`bind`."""
        self.bind(x, y, r, columns).call(address_of(x), address_of(y), 0 if r is None else address_of(r))

    def frame(self, binding: Binding, offset: int) -> Call:
        """A new frame for ``binding``, which is known from now on; too many, or too large, and all are forgotten."""
        frame = self.new_frame(binding.key, offset)
        self._kept += frame.nbytes
        if len(self._bindings) >= MOST_SHAPES or self._kept > _KEPT_BYTES:
            for other in list(self._bindings.values()):
                other.free.clear()
            self._bindings.clear()
            self._kept = frame.nbytes
        self._bindings[binding.key] = binding
        return frame


class NativeProduct(Framed):
    """Code unrolled from a pattern."""

    crew: Crew | None = None

    def __init__(self, task: Task, schedule: Schedule, target: Target, kernel: Kernel, executable: Executable) -> None:
        # If no fewer vectors of x are loaded where the caller has it than stored of y, its rows get aligned.
        m, k = task.pattern.shape
        aligns_x = k * (1 if schedule.packing != "none" else kernel.plan.n_blocks) >= m
        super().__init__(target.tile_bytes if task.layout == "row_major" else 1, aligns_x)
        self.task, self.schedule, self.target, self.kernel = task, schedule, target, kernel
        self.executable = executable
        self.narrowest = target.lanes
        self._rows: dict[int, list[tuple[int, NativeProduct]]] = {}  # parts by rows, by how many were asked for
        self._changing = ChildLock()
        self._splits: dict[int, cost.Split] = {}  # by columns: what calls so far were

    def share(self, crew: Crew) -> None:
        """Calls for shapes not seen yet may use several threads."""
        self.crew = crew
        self._splits.clear()

    def load(self, values: Array, bias: Array | None) -> None:
        """Pack new values; calls under way keep the ones they started with."""
        with self._changing:
            loaded = Loaded({}, {})
            self._pack(loaded, 0, [(0, self)], values, bias)
            for parts, products in self._rows.items():
                self._pack(loaded, parts, products, values, bias)
            self.values[0] = loaded

    def _pack(self, loaded: Loaded, name: int, products: list[tuple[int, NativeProduct]], values: Array,
              bias: Array | None) -> None:  # fmt: skip
        """Values and biases of the rows of ``products`` under ``name``."""
        indptr, packed = self.task.pattern.indptr, []
        for first, product in products:
            last = first + product.task.pattern.rows
            array = aligned_empty(max(product.kernel.plan.slots, 1))
            some = None if bias is None else bias[first:last]
            product.kernel.pack(values[int(indptr[first]) : int(indptr[last])], some, array)
            packed.append(array)
        loaded.packed[name] = tuple(packed)
        loaded.addresses[name] = tuple(address_of(array) for array in packed)

    def copy(self) -> NativeProduct:
        """The same code and values at other addresses."""
        memory = self.executable.memory
        made = self._with(Executable(ctypes.string_at(memory.address, memory.size)))
        packed = {0: tuple(_copied(array) for array in self.values[0].packed[0])}
        made.values[0] = Loaded(packed, {0: tuple(address_of(array) for array in packed[0])})
        return made

    def _with(self, executable: Executable) -> NativeProduct:
        """The same product with its code elsewhere, and no values yet."""
        return NativeProduct(self.task, self.schedule, self.target, self.kernel, executable)

    def current(self) -> tuple[Array, Array | None]:
        """The values and biases that were loaded last."""
        return self.kernel.unpack(self.values[0].packed[0][0])

    def _row_parts(self, parts: int) -> list[tuple[int, NativeProduct]]:
        """Products of ranges of rows, compiled when first asked for."""
        if self.crew is None:
            return []
        with self._changing:
            if parts not in self._rows:
                made = self.crew.rows(parts)
                old = self.values[0]
                loaded = Loaded(dict(old.packed), dict(old.addresses))
                self._pack(loaded, parts, made, *self.kernel.unpack(old.packed[0][0]))
                self.values[0] = loaded
                self._rows[parts] = made
            return self._rows[parts]

    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> Binding:
        """The binding for arrays like these.

        ``columns``, at least the target's lanes, of row-major or transposed arrays whose innermost stride is one
        element, or whole tiles.
        """
        key = (columns, x.strides[0], y.strides[0], 0 if r is None else r.strides[0])
        binding = self._bindings.get(key)
        return Binding(self, key) if binding is None else binding

    def new_frame(self, key: tuple[int, ...], offset: int) -> Call:
        """What a call on arrays of these shapes and pitches needs, all but the addresses filled in."""
        columns, x_pitch, y_pitch, r_pitch = key
        pitches, width, lanes = (x_pitch, y_pitch, r_pitch), self.target.tile_bytes, self.target.lanes
        # Rows whose pitch is a multiple of a tile share their alignment: with the first tile shifted, those behind it
        # no longer cross cache lines.
        shared = (x_pitch if self.aligns_x else y_pitch) % width == 0
        long = columns >= _ALIGN_TILES * lanes
        start = -offset if self.task.layout == "row_major" and shared and long and offset % 4 == 0 else 0
        tiles = -(-(4 * columns - start) // width)
        split = self._split(tiles)
        head, tail = start < 0, 4 * columns - start < tiles * width

        def parts(product: NativeProduct, low: int, high: int, first: int = 0, weights: int = 0) -> list[Part]:
            """The tiles from ``low`` to ``high`` of the rows that ``product`` computes, from row ``first`` on."""
            group = cost.tiles_per_group(product.task, product.schedule, self.target, high - low)
            least = max(_LEAST_TILES, -(-cost.LEAST_PIECE // max(1, product.task.pattern.nnz)))
            found = []
            for begin, end in pairwise(pieces(low, high, group, least, range(1 + head, tiles - tail))):
                left = (start + begin * width) // 4 if begin else 0
                right = (start + end * width) // 4 if end < tiles else columns
                frame = product._frame(Frame, right - left, pitches, 0 if begin else start)
                dx, dy, dr = (left * step // lanes for step in self._tile_steps(pitches))
                below, r_below = (first * step for step in self._row_steps(pitches))
                found.append(Part(frame, product.executable.address, (dx, dy + below, dr + r_below), weights))
            return found

        by_thread: list[list[Part]] = []
        if split.by == "rows":
            rows = self._row_parts(split.parts)
            by_thread = [parts(product, 0, tiles, first, number) for number, (first, product) in enumerate(rows)]
        elif split.by == "columns":
            cuts = tile_cuts(tiles, split.parts, head, tail)
            by_thread = [parts(self, int(low), int(high)) for low, high in pairwise(cuts)]
        if len(self._splits) < MOST_SHAPES:
            self._splits[columns] = cost.Split(split.by, max(1, len(by_thread)))
        if self.crew is not None and len(by_thread) > 1:
            turns = [part for part in chain(*zip_longest(*by_thread)) if part is not None]  # of every thread the first
            return Team(self.crew.pool(), turns, split.parts if split.by == "rows" else 0, len(by_thread))
        solo = self._frame(Solo, columns, pitches, start)
        solo.call = self.executable.call
        return solo

    def _split(self, tiles: int) -> cost.Split:
        """How a call of so many tiles is shared out; only a call that has the work for it starts threads."""
        if self.crew is None or not self.task.pattern.nnz:
            return cost.Split("", 1)
        threads, by_rows = self.crew.threads, not self.kernel.plan.folds
        wanted = cost.split(self.task, self.schedule, self.target, threads, tiles, by_rows)
        if wanted.parts > 1:
            pool = self.crew.pool()
            if not pool.ensure(wanted.parts - 1):
                threads = pool.workers + 1
                wanted = cost.split(self.task, self.schedule, self.target, threads, tiles, by_rows)
        if wanted.by == "rows" and len(self._row_parts(wanted.parts)) < 2:
            wanted = cost.split(self.task, self.schedule, self.target, threads, tiles, False)
        return wanted

    def threads_note(self) -> str:
        """How many threads calls so far used, in words."""
        if self.crew is None:
            return "1, as asked for, or all that this system has"
        trouble = self.crew.pool().trouble if self._splits else ""
        seen = [f"{columns} columns {split}" for columns, split in list(self._splits.items())[-4:]]
        return "; ".join((f"up to {self.crew.threads}", *seen, *([trouble] if trouble else [])))

    def _tile_steps(self, pitches: tuple[int, int, int]) -> tuple[int, int, int]:
        """Bytes from tile to tile of x, y and the residual."""
        task, width = self.task, self.target.tile_bytes
        height = task.height or task.pattern.rows
        if task.layout == "row_major":
            return width, width, width
        if task.layout == "transposed":
            x, y, r = (self.target.lanes * pitch for pitch in pitches)
            return x, y, r
        return task.pattern.cols * width, height * width, height * width

    def _row_steps(self, pitches: tuple[int, int, int]) -> tuple[int, int]:
        """Bytes from output row to output row of y and of the residual."""
        if self.task.layout == "row_major":
            return pitches[1], pitches[2]
        step = 4 if self.task.layout == "transposed" else self.target.tile_bytes
        return step, step if self.task.residual else 0

    def _frame(self, kind: type[_Kind], columns: int, pitches: tuple[int, int, int], start: int) -> _Kind:
        """An argument block and scratch for one thread's columns; ``start``: see :class:`Arg`."""
        lanes, width = self.target.lanes, self.target.tile_bytes
        steps = self._tile_steps(pitches)
        tiles = -(-(4 * columns - start) // width)
        group = cost.tiles_per_group(self.task, self.schedule, self.target, tiles)
        panels = {slot: rows * group for slot, rows in self._panels().items()} | {Arg.DISCARD: self.kernel.discarded}
        frame = kind(SLOTS, sum(panels.values()) * lanes)
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
        m, k = task.pattern.rows, task.extent
        staged = task.layout == "transposed"
        return {
            Arg.PANEL: k if staged or (self.schedule.packing != "none" and task.layout == "row_major") else 0,
            Arg.R_PANEL: m if staged and task.residual else 0,
            Arg.Y_PANEL: m if staged and not self.kernel.scatters else 0,
            Arg.PARTIAL: m if self.kernel.plan.segments > 1 else 0,
        }


def _copied(array: Array) -> Array:
    """The same, beginning a cache line as well."""
    copy: Array = aligned_empty(array.size)
    copy[:] = array
    return copy
