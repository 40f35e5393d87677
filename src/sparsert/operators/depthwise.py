"""A compiled depthwise convolution on the CPU: code for images of a shape, made when the first one comes."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..codegen.assemble import assemble, listing
from ..kernels import depthwise
from ..kernels.arguments import SLOTS, Arg
from ..runtime.cpu import Executable, Frame, address_of
from ..runtime.memory import aligned_empty
from ..schedule.cost import Split
from ..schedule.task import Task
from ..sparsity.geometry import Geometry
from ..target import Target
from .arrays import overlaps
from .images import ConvProduct
from .native import MOST_SHAPES, Array, Binding, Loaded, NativeProduct
from .team import Addresses, Call, Part, Solo, Team

_MOST_SHAPES = 64  # that get code of their own, which bindings may call for good; others take the general form
_BY_CHANNEL = -1  # the name of the values in the order of this form
_CYCLES = {1: 1.3, 2: 2.2}  # of a multiply-add with its share of loads and shuffles, by column stride (note 0016)
_IMAGES, _CHANNELS = "images", "channels"
_Kind = TypeVar("_Kind", bound=Frame)


class _Alone(Solo):
    """On the caller alone, with the values of this form."""

    __slots__ = ()

    def aim(self, xa: int, ya: int, ra: int, weights: Addresses) -> None:
        self.point(xa, ya, ra, weights[_BY_CHANNEL][0])


class ChannelsProduct(NativeProduct):
    """The fast form, for images of one shape; it sees the values of the general form's product, and new ones too."""

    def __init__(
        self, general: ConvProduct, executable: Executable, table: NDArray[np.uint16], plan: depthwise.Plan
    ) -> None:  # fmt: skip
        super().__init__(general.task, general.schedule, general.target, general.kernel, executable)
        self.unit, self.plan, self.table = 1, plan, aligned_empty(table.size, np.uint16)
        self.table[:] = table.reshape(-1)
        self.values, self.crew, self._splits = general.values, general.crew, general._splits

    def bind_key(self, key: tuple[int, ...]) -> Binding:
        """The binding for a key of :meth:`ConvProduct.bind`."""
        binding = self._bindings.get(key)
        return Binding(self, key) if binding is None else binding

    def new_frame(self, key: tuple[int, ...], offset: int) -> Call:
        """Argument blocks for images of this shape: of all channels, or of a range of channels or images each."""
        images, channels, split = key[0], self.task.pattern.rows, self._share_out(key[0])
        if len(self._splits) < MOST_SHAPES:
            self._splits[key[2]] = split
        if self.crew is None or split.parts < 2:
            alone = self._range(_Alone, key, images, channels)
            alone.call = self.executable.call
            return alone
        weights = 4 * (self.plan.order.size + self.task.bias)
        parts: list[Part] = []
        for part in range(split.parts):
            first, last = ((images if split.by == _IMAGES else channels) * p // split.parts for p in (part, part + 1))
            if split.by == _IMAGES:
                frame, at, dw = self._range(Frame, key, last - first, channels), 3, 0
            else:
                frame, at, dw = self._range(Frame, key, images, last - first), 4, first * weights
            shifts = first * key[at], first * key[at + 4], first * key[at + 7]
            parts.append(Part(frame, self.executable.address, shifts, 0, dw))
        return Team(self.crew.pool(), parts, _BY_CHANNEL, len(parts))

    def _share_out(self, images: int) -> Split:
        """Which parts of a call different threads do: whole images, or channels of every image."""
        channels, plan = self.task.pattern.rows, self.plan
        vectors = images * channels * plan.records * plan.rows
        work = int(vectors * plan.order.size * _CYCLES[plan.halves])
        parts = 1 if self.crew is None else self.crew.wanted(work)
        if parts < 2:
            return Split("", 1)
        by_image = images % parts == 0 or (channels % parts and images > channels)
        by, most = (_IMAGES, images) if by_image else (_CHANNELS, channels)
        return Split(by, min(parts, most)) if min(parts, most) > 1 else Split("", 1)

    def _range(self, kind: type[_Kind], key: tuple[int, ...], images: int, channels: int) -> _Kind:
        """An argument block for so many channels, the program's images, of so many images."""
        lanes = self.target.lanes
        frame = kind(SLOTS, 2 * lanes)
        s = frame.slots
        frame.scratch.view(np.int32)[:] = np.arange(2 * lanes).reshape(lanes, 2).T.reshape(-1)
        s[Arg.PANEL] = address_of(frame.scratch)
        s[Arg.IMAGES], s[Arg.X_IMAGE], s[Arg.Y_IMAGE], s[Arg.R_IMAGE] = channels, key[4], key[8], key[11]
        s[Arg.GROUP] = images
        s[Arg.X_GROUP], s[Arg.Y_GROUP], s[Arg.R_GROUP] = (key[i] - channels * key[i + 1] for i in (3, 7, 10))
        s[Arg.X_LAST], s[Arg.Y_LAST] = self.plan.blocks[-1], self.plan.tiles[-1]
        s[Arg.MASKS] = address_of(self.table)
        frame.kept = self.table
        return frame


def list_shape(task: Task, target: Target, shape: depthwise.Shape) -> str:
    """The code for images of a shape as text; empty where these take the general form."""
    made = depthwise.generate(task, target, shape)
    height, width = shape.geometry.size
    heading = f"; in place, for images of {height} x {width} and rows {shape.x}, {shape.y} and {shape.r} bytes apart\n"
    return "" if made is None else heading + listing(made[0], target.isa)


class DepthwiseProduct(ConvProduct):
    """Channel by channel where images and arrays allow it, else as any convolution, to the same bits.

    Attributes:
        room: bytes that code for further shapes may take together; others take the general form.
    """

    room = 1 << 30

    tailors = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._by_shape: dict[tuple[int, ...], ChannelsProduct | None] = {}

    def _pack(self, loaded: Loaded, name: int, products: list[tuple[int, NativeProduct]], values: Array,
              bias: Array | None) -> None:  # fmt: skip
        super()._pack(loaded, name, products, values, bias)
        packed = depthwise.pack(self.task, values, bias)
        kept = aligned_empty(packed.size)
        kept[:] = packed.reshape(-1)
        loaded.packed[_BY_CHANNEL], loaded.addresses[_BY_CHANNEL] = (kept,), (address_of(kept),)

    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> Binding:
        """The binding for arrays like these."""
        general = super().bind(x, y, r, columns)
        if not self.window.masked and r is not None and overlaps(r, y):
            return general  # tiles that overlap would read what others have written
        product = self._product(general.key)
        return general if product is None else product.bind_key(general.key)

    def listing(self) -> str:
        """The code for the shapes of images so far, as text."""
        texts = []
        for (height, width, *steps), product in list(self._by_shape.items()):
            if product is not None:
                geometry = Geometry(self.window, (height, width), self.padding.resolve((height, width), self.window))
                texts.append(list_shape(self.task, self.target, depthwise.Shape(geometry, *steps)))
        return "".join(texts)

    def _product(self, key: tuple[int, ...]) -> ChannelsProduct | None:
        """The code for images like these; None: not this way."""
        _, height, width = key[:3]
        shape = height, width, key[5], key[9], key[12]
        with self._changing:
            if shape not in self._by_shape:
                if len(self._by_shape) >= _MOST_SHAPES:
                    return None
                self._by_shape[shape] = self._made(key, shape)
            return self._by_shape[shape]

    def _made(self, key: tuple[int, ...], shape: tuple[int, ...]) -> ChannelsProduct | None:
        geometry = self.geometry(key)
        if key[9] != 4 * geometry.out[1] or key[12] not in (0, key[9]):
            return None
        made = depthwise.generate(self.task, self.target, depthwise.Shape(geometry, *shape[2:]))
        if made is None:
            return None
        program, table, plan = made
        code = assemble(program, self.target.isa).code
        if len(code) > self.room:
            return None
        self.room -= len(code)
        return ChannelsProduct(self, Executable(code), table, plan)
