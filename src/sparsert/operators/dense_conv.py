"""Dense convolutions: the looped form, one of whose operands is an image seen as a matrix (note 0015)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..codegen.assemble import listing
from ..errors import InternalError
from ..kernels.dense import generate
from ..kernels.dense_arguments import Form
from ..kernels.dense_micro import VECTORS
from ..kernels.plan import fold_width
from ..runtime.cpu import Frame, address_of
from ..runtime.memory import aligned_empty
from ..schedule.dense import DenseSchedule, choose, turns_image
from ..schedule.task import Task
from ..sparsity.geometry import Geometry, Padding
from ..sparsity.pattern import SparseMatrix
from ..sparsity.taps import Window
from ..sparsity.views import Views, full_taps
from ..target import Target
from .arrays import Array
from .dense import SHAPES, Turned, code_of, pack_panels, pack_rows, parts, spread_pitch
from .dense_images import Image, Starts, columns_frame, positions_of, rows_frame
from .dense_parts import Extents, Parts, Share, Shareable, Shift, blocks_of_rows

_KEPT_BYTES = 32 << 20
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Order:
    """In which order the taps of a row are summed.

    Attributes:
        taps: (K,) their columns of W, channel by channel.
        borders: of the blocks of K; by group where these differ, else one for all.
    """

    taps: Ints
    borders: tuple[tuple[int, ...], ...]
    schedule: DenseSchedule


def order_of(columns: int, window: Window, target: Target) -> Order:
    """The order of the sparse form, and its borders where sums are formed in pieces."""
    taps, width = full_taps(columns, window), VECTORS * target.tile_bytes
    order = np.argsort(taps.key, kind="stable")
    key, extent = taps.key[order], taps.extent
    fold = fold_width(columns, extent * window.groups)
    if not fold:
        schedule = choose(columns, 0, target, width)
        return Order(order, ((*range(0, columns, schedule.k_block), columns),), schedule)
    borders = []
    for group in range(window.groups):
        pieces = -(-extent * window.groups // fold)  # those of other groups are empty, but the first brings the bias
        cuts = np.searchsorted(key + group * extent, fold * np.arange(pieces + 1))
        borders.append(tuple(cuts.tolist()))
    longest = max(high - low for some in borders for low, high in pairwise(some))
    return Order(order, tuple(borders), choose(columns, longest, target, width))


class Weights:
    """W, its taps in order, in the arrangements that bindings ask for, each made when it is first asked for."""

    def __init__(self, product: DenseConv, values: Array, bias: Array | None) -> None:
        self.task, self.order, self.groups = product.task, product.order, product.window.groups
        self.most, self.lanes, self.values, self.bias = product.code.rows, product.target.lanes, values, bias
        self.made: dict[bool, Array] = {}

    def dense(self) -> Array:
        """(M, K)."""
        return SparseMatrix(self.task.pattern, self.values).to_dense()[:, self.order.taps]

    def get(self, panels: bool) -> Array:
        """As panels of columns, or as blocks of rows, group by group."""
        found = self.made.get(panels)
        if found is None:
            pieces = np.split(self.dense(), self.groups)
            packed = [(pack_panels(w, self.lanes) if panels else pack_rows(w, self.most))[0] for w in pieces]
            found = aligned_empty(sum(piece.size for piece in packed))
            found[:] = np.concatenate([piece.reshape(-1) for piece in packed])
            self.made[panels] = found
        return found


class Key(NamedTuple):
    """What a binding depends on: extents and steps of the arrays, in bytes."""

    images: int
    height: int
    width: int
    x: tuple[int, ...]  # from image to image, channel, row; and from column phase to column phase, if those lie apart
    y: tuple[int, ...]
    r: tuple[int, ...]
    same: bool  # the residual is y itself


class DenseConv(Shareable):
    """A dense convolution behind a compiled operator: the same contract as the sparse product.

    A product per group; images, or groups, are the matrices of a batch. Where output positions would leave much of
    their last vector empty, the transposed product is computed, image by image. Any number of threads may call at once.
    """

    narrowest = 0

    def __init__(self, task: Task, target: Target, window: Window, padding: Padding) -> None:
        super().__init__()
        self.task, self.target, self.window, self.padding = task, target, window, padding
        self.form = self._form("columns", "image", "rows" if task.bias else None)
        self.code = code_of(self.form, target)
        self.order = order_of(task.pattern.cols, window, target)
        self.schedule = self.order.schedule
        self.values: list[Weights] = []
        self._kept = 0  # bytes of scratch in bindings, roughly

    def _form(self, a: str, b: str, bias: str | None) -> Form:
        t = self.task
        step = 2 if self.window.stride[1] == 2 else 1
        return Form(a, b, bias, t.activation, t.parameters, t.residual, step=step)

    def load(self, values: Array, bias: Array | None) -> None:
        """Pack new values; calls under way keep the ones they started with."""
        weights = Weights(self, values, bias)
        for panels in self.values[0].made if self.values else ():
            weights.get(panels)
        self._keep(bias)
        self.values[:] = [weights]

    def listing(self) -> str:
        """The machine code as text, generated anew."""
        return listing(generate(self.form, self.target).program, self.target.isa)

    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> ConvBinding | None:
        """The binding for arrays like these; None where rows of y or the residual lie apart or have to be copied.

        x is 4-D, or 5-D with ``columns`` where it comes column phase by phase.
        """
        same = r is not None and address_of(r) == address_of(y)
        if not _one_run(y) or (r is not None and not _one_run(r)) or (same and len(self.order.borders[0]) > 2):
            return None
        key = Key(x.shape[0], x.shape[2], columns, (*x.strides[:3], x.strides[3] if x.ndim == 5 else 0),
                  y.strides[:2], (0, 0) if r is None else r.strides[:2], same)  # fmt: skip
        binding = self._bindings.get(key)
        if binding is None:
            self._kept += 4 * x[0].size  # planes of an image take about as much, in every binding
            if len(self._bindings) >= SHAPES or self._kept > _KEPT_BYTES:
                self._bindings.clear()
                self._kept = 4 * x[0].size
            binding = self._bindings[key] = self._binding(key)
        return binding

    def run(self, x: Array, y: Array, r: Array | None, columns: int) -> None:
        """One call on any arrays, with copies where the kernel cannot take them."""
        out = y if r is None and _one_run(y) else np.empty(y.shape, np.float32)
        r = r if r is None else np.ascontiguousarray(r)
        binding = self.bind(x, out, r, columns)
        if binding is None:
            raise InternalError("rows of a new array lie apart")
        binding.call(address_of(x), address_of(out), 0 if r is None else address_of(r))
        if out is not y:
            y[...] = out

    def _binding(self, key: Key) -> ConvBinding:
        size, k = (key.height, key.width), self.task.pattern.cols
        geometry = Geometry(self.window, size, self.padding.resolve(size, self.window))
        positions, rising = geometry.out[0] * geometry.out[1], min(*key.y, *key.r) >= 0
        if rising and self.window.groups == 1 and turns_image(self.task.pattern.rows, positions, k, self.target):
            return self._turned(key, geometry)
        return self._straight(key, geometry)

    def _straight(self, key: Key, g: Geometry) -> ConvBinding:
        groups, (rows, k) = self.window.groups, self.task.pattern.shape
        m, channels, positions = rows // groups, self.window.channels(k) // groups, g.out[0] * g.out[1]
        blocks = blocks_of_rows(m, self.code.rows)
        block = 4 * k * blocks.size
        whole = Extents(key.images, m, positions, k, 4 * blocks.size, 0, key.y[1], key.r[1], 0,
                        key.x[0], key.y[0], key.r[0], block)  # fmt: skip
        step = Shift(block * (blocks.large + blocks.small), channels * key.x[1], m * key.y[1], m * key.r[1],
                     4 * m * self.task.bias)  # fmt: skip
        borders = self.order.borders
        calls = [(whole, Shift(*(i * n for n in step)), some) for i, some in enumerate(borders)]
        one_by_one = groups > 1 and len(borders) == 1
        if one_by_one:
            calls = [(replace(whole, batch=groups, a_batch=step.a, b_batch=step.b, c_batch=step.c, r_batch=step.r,
                              bias_batch=step.bias), Shift(), borders[0])]  # fmt: skip
        code, crew, schedule, seen, bias = self.code, self.crew, self.schedule, self.seen, self._bias
        image = Image(channels, key.x[1], key.x[3])

        def frame(some: tuple[int, ...], share: Share) -> Frame:
            return columns_frame(code, share, schedule, some, _views(key, g, share.first, share.extents.n), image)

        def make() -> list[Step]:
            found = []
            for extents, shift, some in calls:
                own = bias[shift.bias // 4 :]
                made = parts(code, extents, schedule, crew, own, make=partial(frame, some))
                found.append(Step(made, shift))
                if len(seen) < SHAPES:
                    seen[positions] = made.how
            return found

        return ConvBinding(self, make, key, one_by_one, False)

    def _turned(self, key: Key, g: Geometry) -> ConvBinding:
        m, k = self.task.pattern.shape
        positions, channels = g.out[0] * g.out[1], self.window.channels(k)
        code = code_of(self._form("image", "rows", "columns"), self.target)
        views = replace(_views(key, g, 0, positions), padded=True)
        rows = positions_of(views, code.rows)
        width, pitch = VECTORS * self.target.lanes, spread_pitch(m)
        extents = Extents(1, positions, m, k, 0, 4 * width, pitch, pitch, panel=4 * width * k)
        crew, schedule, seen, target = self.crew, self.schedule, self.seen, self.target
        borders, residual = self.order.borders[0], self.task.residual is not None
        image = Image(channels, key.x[1], key.x[3])

        def make() -> list[Step]:
            starts = Starts(rows, m, len(views.places()))
            main = parts(
                code, extents, schedule, crew, starts.array, ("columns",),
                lambda share: rows_frame(code, share, schedule, borders, views, rows, image, m),
            )  # fmt: skip
            if len(seen) < SHAPES:
                seen[positions] = main.how
            return [Step(Turned(main, m, positions, key.y[1], key.r[1], target, residual, crew), Shift(), starts)]

        return ConvBinding(self, make, key, True, True)


class Step(NamedTuple):
    """A native call, or a few, for all groups or one; a transposed product has sums that begin with ``starts``."""

    product: Parts | Turned
    shift: Shift
    starts: Starts | None = None


class ConvBinding:
    """The convolution for arrays of one shape and pitch.

    Args:
        one_by_one: a native call takes one image.
        turned: it computes the transposed product.
    """

    def __init__(
        self, product: DenseConv, make: Callable[[], list[Step]], key: Key, one_by_one: bool, turned: bool
    ) -> None:
        self.values, self.make, self.turned = product.values, make, turned
        self.images, self.steps = key.images if one_by_one else 1, (key.x[0], key.y[0], key.r[0])
        self.free: list[list[Step]] = []

    def call(self, xa: int, ya: int, ra: int) -> None:
        """One call with x, y and the residual (0: none) at these addresses."""
        try:
            made = self.free.pop()
        except IndexError:
            made = self.make()
        weights = self.values[0]
        packed = weights.get(self.turned)  # held here: a refit does not free what this call reads
        wa, (dx, dy, dr) = address_of(packed), self.steps
        for image in range(self.images):
            x, y, r = xa + image * dx, ya + image * dy, ra + image * dr
            for product, shift, starts in made:
                if starts is None:
                    product.point(wa + shift.a, x + shift.b, y + shift.c, r + shift.r)
                else:
                    starts.update(weights)
                    product.point(x, wa, y, r)
                product.run()
        self.free.append(made)
        del packed

    def fixed(self, xa: int, ya: int, ra: int) -> Callable[[], None]:
        """The call for arrays that stay where they are."""
        call = self.call
        return lambda: call(xa, ya, ra)


def _views(key: Key, geometry: Geometry, first: int, count: int) -> Views:
    return Views(geometry, first, first + count, key.x[2], bool(key.x[3]))


def _one_run(array: Array) -> bool:
    """Rows of each plane follow each other without a gap."""
    return bool(array.shape[2] <= 1 or array.strides[2] == 4 * array.shape[3])
