"""A compiled depthwise convolution on the CPU: code for images of a shape, made when the first one comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codegen.assemble import assemble
from ..codegen.vector import Program
from ..kernels import depthwise
from ..kernels.arguments import SLOTS, Arg
from ..runtime.cpu import Executable, address_of
from ..runtime.memory import aligned_empty
from .arrays import overlaps
from .images import ConvProduct
from .native import Array, Binding, Loaded, NativeProduct
from .team import Solo

_MOST_SHAPES = 64  # that get code of their own, which bindings may call for good; others take the general form


class ChannelsProduct(NativeProduct):
    """The fast form, for images of one shape; its frames are those of one image each."""

    def __init__(
        self, general: ConvProduct, program: Program, table: NDArray[np.uint16], plan: depthwise.Plan
    ) -> None:  # fmt: skip
        code = assemble(program, general.target.isa)
        super().__init__(general.task, general.schedule, general.target, general.kernel, Executable(code.code))
        self.unit, self.plan, self.table = 1, plan, aligned_empty(table.size, np.uint16)
        self.table[:] = table.reshape(-1)

    def bind_key(self, key: tuple[int, ...]) -> Binding:
        """The binding for a key of :meth:`ConvProduct.bind`."""
        binding = self._bindings.get(key)
        return Binding(self, key) if binding is None else binding

    def new_frame(self, key: tuple[int, ...], offset: int) -> Solo:
        """An argument block for one image, whose channels are the program's images."""
        lanes = self.target.lanes
        frame = Solo(SLOTS, 2 * lanes)
        frame.call = self.executable.call
        s = frame.slots
        frame.scratch.view(np.int32)[:] = np.arange(2 * lanes).reshape(lanes, 2).T.reshape(-1)
        s[Arg.PANEL] = address_of(frame.scratch)
        s[Arg.IMAGES], s[Arg.X_IMAGE], s[Arg.Y_IMAGE], s[Arg.R_IMAGE] = self.task.pattern.rows, key[4], key[8], key[11]
        s[Arg.X_LAST], s[Arg.Y_LAST] = self.plan.blocks[-1], self.plan.tiles[-1]
        s[Arg.MASKS] = address_of(self.table)
        frame.kept = self.table
        return frame


class DepthwiseProduct(ConvProduct):
    """Channel by channel where images and arrays allow it, else as any convolution, to the same bits."""

    tailors = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._by_shape: dict[tuple[int, ...], ChannelsProduct | None] = {}
        self._channel_values = Loaded({}, {})

    def load(self, values: Array, bias: Array | None) -> None:
        """Pack new values; calls under way keep the ones they started with."""
        packed = depthwise.pack(self.task, values, bias)
        kept = aligned_empty(packed.size)
        kept[:] = packed.reshape(-1)
        with self._changing:
            super().load(values, bias)
            self._channel_values = Loaded({0: (kept,)}, {0: (address_of(kept),)})
            for product in list(self._by_shape.values()):
                if product is not None:
                    product.values[0] = self._channel_values

    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> Any:
        """The binding for arrays like these."""
        general = super().bind(x, y, r, columns)
        if not self.window.masked and r is not None and overlaps(r, y):
            return general  # tiles that overlap would read what others have written
        product = self._product(general.key)
        if product is None:
            return general
        one = product.bind_key(general.key)
        if x.shape[0] == 1:
            return one
        return EachImage(one, x.shape[0], x.strides[0], y.strides[0], 0 if r is None else r.strides[0])

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
        product = ChannelsProduct(self, *made)
        product.values[0] = self._channel_values
        return product

    def run(self, x: Array, y: Array, r: Array | None, columns: int) -> None:
        """One call."""
        self.bind(x, y, r, columns).call(address_of(x), address_of(y), 0 if r is None else address_of(r))


class EachImage:
    """A binding of one image, called for all of them."""

    def __init__(self, one: Binding, images: int, x: int, y: int, r: int) -> None:
        self.one, self.steps = one, [(i * x, i * y, i * r) for i in range(images)]

    def call(self, xa: int, ya: int, ra: int) -> None:
        for x, y, r in self.steps:
            self.one.call(xa + x, ya + y, ra + r)

    def fixed(self, xa: int, ya: int, ra: int) -> Callable[[], None]:
        calls = [self.one.fixed(xa + x, ya + y, ra + r) for x, y, r in self.steps]

        def run() -> None:
            for call in calls:
                call()

        return run
