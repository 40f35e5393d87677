"""A compiled depthwise convolution on the CPU: code for blocks of image rows, made when an image needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..codegen.assemble import assemble
from ..kernels import depthwise
from ..kernels.arguments import Arg
from ..runtime.cpu import Executable, address_of
from ..runtime.memory import aligned_empty
from ..sparsity.geometry import Geometry
from .images import ConvProduct
from .native import Array, Binding, Loaded, NativeProduct
from .team import Solo

_MOST_PLANE = 1 << 18  # floats of a channel's planes: larger ones go band by band, as all convolutions do


class ChannelsProduct(NativeProduct):
    """The fast form, for blocks of ``rows`` image rows; its frames are those of one image each."""

    def __init__(self, general: ConvProduct, rows: int, tail: int) -> None:
        task, target = general.task, general.target
        program = depthwise.generate(task, general.window, target, rows, tail)
        code = assemble(program, target.isa)
        super().__init__(task, general.schedule, target, general.kernel, Executable(code.code))
        self.general, self.rows, self.unit = general, rows, 1

    def bind_key(self, key: tuple[int, ...]) -> Binding:
        """The binding for a key of :meth:`ConvProduct.bind`."""
        binding = self._bindings.get(key)
        return Binding(self, key) if binding is None else binding

    def new_frame(self, key: tuple[int, ...], offset: int) -> Solo:
        """An argument block for one image, whose channels are the program's images."""
        base = self.general.new_frame((1, *key[1:]), 0, one_channel=True)
        height, width = key[1:3]
        x, y, r = key[3:6], key[7:10], key[10:13]
        window, lanes = self.general.window, self.target.lanes
        geometry = Geometry(window, (height, width), self.general.padding.resolve((height, width), window))
        (rows, columns), s = geometry.out, base.slots
        pitch, total = columns, rows * columns
        blocks, tiles = -(-rows // self.rows), -(-columns // lanes)
        s[Arg.IMAGES], s[Arg.X_IMAGE], s[Arg.Y_IMAGE], s[Arg.R_IMAGE] = self.task.pattern.rows, x[1], y[1], r[1]
        s[Arg.TILES], s[Arg.GROUP] = blocks, tiles
        s[Arg.R_LAST], s[Arg.Y_LAST] = 4 * max(columns - lanes, 0), 4 * (rows - self.rows) * pitch
        last = max(0, total - (self.rows - 1) * pitch - lanes)  # 0: one block, whose tail is cut
        s[Arg.X_LAST] = 4 * last
        s[Arg.Y_GROUP] = 4 * self.rows * pitch
        s[Arg.Y_PITCH], s[Arg.R_PITCH] = 4 * pitch, 4 * pitch
        if window.masks:
            table = aligned_empty(blocks * tiles * window.masks * lanes, np.int32).reshape(-1, window.masks, lanes)
            band = geometry.band((0, rows))
            at = np.minimum(np.arange(blocks) * self.rows, rows - self.rows)[:, None] * pitch
            at = at + np.minimum(np.arange(tiles) * lanes, max(columns - lanes, 0))
            at = np.minimum(at.reshape(-1), last)
            column = (at[:, None] + np.arange(lanes)) % pitch
            for number, place in enumerate(window.mask_places):
                table[:, number] = -band.mask(*place)[column].astype(np.int32)
            s[Arg.MASKS] = address_of(table)
            base.kept = table
        base.call = self.executable.call
        return base


class DepthwiseProduct(ConvProduct):
    """Channel by channel where images and arrays allow it, else as any convolution, to the same bits."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._by_rows: dict[tuple[int, int], ChannelsProduct] = {}
        self._channel_values = Loaded({}, {})

    def load(self, values: Array, bias: Array | None) -> None:
        """Pack new values; calls under way keep the ones they started with."""
        packed = depthwise.pack(self.task, values, bias)
        kept = aligned_empty(packed.size)
        kept[:] = packed.reshape(-1)
        with self._changing:
            super().load(values, bias)
            self._channel_values = Loaded({0: (kept,)}, {0: (address_of(kept),)})
            for product in self._by_rows.values():
                product.values[0] = self._channel_values

    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> Any:
        """The binding for arrays like these."""
        general = super().bind(x, y, r, columns)
        size = (x.shape[2], columns)
        geometry = Geometry(self.window, size, self.padding.resolve(size, self.window))
        block = self._block(geometry)
        arrays = (y,) if r is None else (y, r)
        if block is None or any(a.strides[2] != 4 * geometry.out[1] for a in arrays):
            return general
        if block not in self._by_rows:
            with self._changing:
                if block not in self._by_rows:
                    product = ChannelsProduct(self, *block)
                    product.values[0] = self._channel_values
                    self._by_rows[block] = product
        one = self._by_rows[block].bind_key(general.key)
        if x.shape[0] == 1:
            return one
        return EachImage(one, x.shape[0], x.strides[0], y.strides[0], 0 if r is None else r.strides[0])

    def _block(self, geometry: Geometry) -> tuple[int, int] | None:
        """Image rows per block, and of them those behind which a tile reaches beyond the plane; None: not this way."""
        (rows, columns), lanes = geometry.out, self.target.lanes
        planes = len(self.window.phases) * geometry.band((0, rows)).floats
        if planes > _MOST_PLANE or rows * columns < lanes:
            return None
        parts = -(-rows // depthwise.most_rows(self.task, self.target))
        each = -(-rows // parts)
        if (rows - each + 1) * columns >= lanes:
            return each, 0
        if parts > 1 or self.task.residual:  # a residual is read by whole vectors, which here reach beyond its end
            return None
        return each, min(each, -(-lanes // columns) - 1)

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
