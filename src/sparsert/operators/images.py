"""A compiled convolution on the CPU: argument blocks for the bands of an image, and scratch for their planes."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from ..codegen.assemble import assemble
from ..kernels import matmul
from ..kernels.matmul import Kernel
from ..runtime.cpu import Executable, Frame
from ..schedule import cost
from ..schedule.cost import Split
from ..schedule.schedule import Schedule
from ..schedule.task import Task
from ..sparsity.geometry import Band, Geometry, Padding, bands
from ..sparsity.taps import Window
from ..target import Target
from .bands import Arrays, Bands, Steps
from .native import MOST_SHAPES, Array, Binding, NativeProduct
from .team import Call, Part, Solo, Team

_Kind = TypeVar("_Kind", bound=Frame)

_LEAST_COLUMNS = 256  # of a thread's band
_IMAGES, _ROWS = "images", "image rows"
_MOST_SIZES = 256  # of images, whose code is remembered,
_MOST_WINDOWS = 8  # of which so many different ones have code of their own
_LONGEST_ROW = 512  # floats
_REACH = 2048  # floats that a pointer reaches without being moved, which all rows of a kernel have to


class ConvProduct(NativeProduct):
    """Machine code of a convolution over (B, C, H, W) arrays whose rows are contiguous.

    Images of a few sizes get code of their own when they first come, which knows where their rows lie (note 0016).

    Attributes:
        tailors: whether there may be such code; room: bytes that are left for it.
    """

    tailors = True

    def __init__(
        self, task: Task, schedule: Schedule, target: Target, kernel: Kernel, executable: Executable, window: Window,
        padding: Padding, room: int,
    ) -> None:  # fmt: skip
        super().__init__(task, schedule, target, kernel, executable)
        self.window, self.padding, self.room = window, padding, room - executable.memory.size
        self.unit, self.aligns_x = 1, False
        self._by_size: dict[tuple[int, ...], ConvProduct | None] = {}  # None: this one, which makes no cycle
        self._by_window: dict[Window, ConvProduct] = {}

    def _with(self, executable: Executable) -> NativeProduct:
        return ConvProduct(self.task, self.schedule, self.target, self.kernel, executable, self.window, self.padding, 0)

    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> Binding:
        """The binding for arrays like these: 4-D, or x 5-D with ``columns`` where it comes column phase by phase."""
        return self.bind_planes(x, y, r, columns, 0)

    def bind_planes(self, x: Array, y: Array, r: Array | None, columns: int, room: int) -> Binding:
        """The same, with so many floats of zeros before and behind every channel of x, which begin cache lines."""
        key = (x.shape[0], x.shape[2], columns, *_steps(x), x.strides[3] if x.ndim == 5 else 0, *_steps(y),
               *((0, 0, 0) if r is None else _steps(r)), room)  # fmt: skip
        product = self._tailored_to(key)
        binding = product._bindings.get(key)
        return Binding(product, key) if binding is None else binding

    def _tailored_to(self, key: tuple[int, ...]) -> ConvProduct:
        """The product whose code is made for rows as long as those of such images; this one where there is none."""
        size = key[1:3]
        if size not in self._by_size:
            with self._changing:
                if len(self._by_size) >= _MOST_SIZES:
                    self._by_size.clear()
                self._by_size[size] = self._tailor(self.geometry(key))
        return self._by_size.get(size) or self

    def _tailor(self, geometry: Geometry) -> ConvProduct | None:
        """A product with code for images like these, if that is worth while and there is room for it."""
        if not self.tailors or not cost.tailors(self.task, self.target):
            return None
        bands = self._bands(geometry, 1)
        if any(band.columns != (0, geometry.out[1]) for band in bands):
            return None
        pitch = bands[0].pitch if self.window.kernel[0] > 1 else 1  # which a single row of taps does without
        tall, wide = self.window.span
        if pitch > _LONGEST_ROW or (tall - 1) * pitch + wide + 2 * self.target.lanes > _REACH:
            return None
        rows, columns = bands[0].runs[0]
        shift = -(rows.zeros * bands[0].pitch + columns.zeros) % self.target.lanes
        window = replace(self.window, pitch=pitch, shift=shift)
        if window in self._by_window:
            return self._by_window[window]
        task = replace(self.task, window=window)
        schedule = cost.tailored(task, self.target, matmul.spare(task, self.target), self.schedule)
        if len(self._by_window) >= _MOST_WINDOWS or cost.code_bytes(task, self.target) > self.room:
            return None
        kernel = matmul.generate(task, schedule, self.target)
        code = assemble(kernel.program, self.target.isa).code
        if len(code) > self.room:
            return None
        self.room -= len(code)
        made = ConvProduct(task, schedule, self.target, kernel, Executable(code), window, self.padding, 0)
        made.crew, made._splits = self.crew, self._splits
        made.load(*self.current())
        self._by_window[window] = made
        return made

    @property
    def tailored(self) -> list[int]:
        """Bytes of code of every size of images that has its own."""
        return [made.executable.memory.size for made in list(self._by_window.values())]

    def load(self, values: Array, bias: Array | None) -> None:
        """Pack new values; calls under way keep the ones they started with."""
        with self._changing:
            super().load(values, bias)
            for made in self._by_window.values():
                made.load(values, bias)

    def geometry(self, key: tuple[int, ...]) -> Geometry:
        """Of the images that a key of :meth:`bind` stands for."""
        size = key[1], key[2]
        return Geometry(self.window, size, self.padding.resolve(size, self.window))

    def new_frame(self, key: tuple[int, ...], offset: int) -> Call:
        """What a call on such images needs, all but the addresses filled in."""
        images, width, geometry = key[0], key[2], self.geometry(key)
        split = self._share_out(geometry, images)
        bands = self._bands(geometry, split.parts if split.by == _ROWS else 1)
        whole = [geometry.band((0, geometry.out[0]))]
        if split.by != _ROWS and self._described(key, geometry, whole).in_place:  # there are no planes to be kept small
            bands = whole
        if len(self._splits) < MOST_SHAPES:
            self._splits[width] = split
        if self.crew is None or split.parts < 2:
            return self._solo(key, geometry, bands)
        parts: list[Part] = []
        for part in range(split.parts):
            first, last = (images * p // split.parts for p in (part, part + 1)) if split.by == _IMAGES else (0, images)
            low, high = (len(bands) * p // split.parts for p in (part, part + 1))
            some = bands[low:high] if split.by == _ROWS else bands
            frame = self._band_frame(Frame, (last - first, *key[1:]), geometry, some)
            parts.append(Part(frame, self.executable.address, (first * key[3], first * key[7], first * key[10])))
        return Team(self.crew.pool(), parts, 0, len(parts))

    def _share_out(self, geometry: Geometry, images: int) -> Split:
        """Which parts of a call different threads do: whole images, or rows of every image."""
        rows, columns = geometry.out
        work = self.task.pattern.nnz * images * -(-rows * columns // self.target.lanes)
        parts = 1 if self.crew is None else self.crew.wanted(work)
        if parts < 2:
            return Split("", 1)
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
        return self._described(key, geometry, bands).frame(kind, self._panels(), self.kernel.discarded)

    def _described(self, key: tuple[int, ...], geometry: Geometry, bands: list[Band]) -> Bands:
        arrays = Arrays(key[0], Steps(*key[3:6]), Steps(*key[7:10]), Steps(*key[10:13]), key[6], key[13])
        return Bands(self.task, self.window, self.schedule, self.target, geometry, bands, arrays)

    def _bands(self, geometry: Geometry, least: int) -> list[Band]:
        """Bands whose planes fit the second-level cache, no fewer than ``least`` unless there are fewer rows."""
        task, phases = self.task, len(self.window.phases)
        inputs = self.window.channels(task.pattern.cols) * phases
        outputs = 0 if self.window.masked else task.pattern.rows * (2 if task.residual else 1)
        return bands(geometry, inputs, outputs, self.target.l2 // 4, least)


def _steps(array: Array) -> tuple[int, int, int]:
    return array.strides[0], array.strides[1], array.strides[2]
