"""Dense convolutions: the looped form, whose second operand is made from images panel by panel (note 0015)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..codegen.assemble import listing
from ..errors import InternalError
from ..kernels.dense import UNROLL, VECTORS, generate
from ..kernels.dense_arguments import Copy, Form, Line, Slot, Tap
from ..kernels.dense_image import COPY_MASKS, mask_bytes
from ..kernels.plan import fold_width
from ..runtime.cpu import Frame, address_of
from ..runtime.memory import aligned_empty
from ..schedule.dense import DenseSchedule, choose
from ..schedule.task import Task
from ..sparsity.geometry import Geometry, Padding
from ..sparsity.pattern import SparseMatrix
from ..sparsity.taps import Window
from ..sparsity.views import Views, full_taps
from ..target import Target
from .arrays import Array
from .dense import SHAPES, Code, code_of, frame, pack_rows
from .dense_parts import Crew, Extents, Parts, Share, Shift, described, note, share_out
from .images import column_phases, origin

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Order:
    """In which order the taps of a row are summed.

    Attributes:
        taps: (K,) their columns of W, channel by channel.
        borders: of the blocks of K, by group where ``own``, else one for all.
    """

    taps: Ints
    borders: tuple[tuple[int, ...], ...]
    schedule: DenseSchedule

    @property
    def own(self) -> bool:
        """Groups have borders of their own."""
        return len(self.borders) > 1


def order_of(columns: int, window: Window, target: Target) -> Order:
    """The order of the sparse form, and its borders where sums are formed in pieces."""
    taps, width = full_taps(columns, window), VECTORS * target.tile_bytes
    order = np.argsort(taps.key, kind="stable")
    key, extent = taps.key[order], taps.extent
    fold = fold_width(columns, extent * window.groups) if columns else 0
    if not fold:
        schedule = choose(columns, 0, target, width)
        borders = (*range(0, columns, schedule.k_block), columns)
        return Order(order, (borders,), schedule)
    found = []
    for group in range(window.groups):
        cells = (key + group * extent) // fold
        found.append((0, *(np.flatnonzero(np.diff(cells)) + 1).tolist(), columns))
    longest = max(int(np.diff(borders).max()) for borders in found)
    return Order(order, tuple(found), choose(columns, longest, target, width))


class Key(NamedTuple):
    """What a binding depends on: extents and steps of the arrays, in bytes."""

    images: int
    height: int
    width: int
    x: tuple[int, int, int, int]  # from image to image, channel, row; and from column phase to column phase, if staged
    y: tuple[int, int]
    r: tuple[int, int]
    same: bool  # the residual is y itself


class DenseConv:
    """A dense convolution behind a compiled operator: the same contract as the sparse product.

    A product per group; images, or groups, are the matrices of a batch. Any number of threads may call at once.
    """

    narrowest = 0

    def __init__(self, task: Task, target: Target, window: Window, padding: Padding) -> None:
        self.task, self.target, self.window, self.padding = task, target, window, padding
        t = task
        self.form = Form("columns", "image", "rows" if t.bias else None, t.activation, t.parameters, t.residual,
                         step=2 if window.stride[1] == 2 else 1)  # fmt: skip
        self.code = code_of(self.form, target)
        self.order = order_of(task.pattern.cols, window, target)
        self.schedule = self.order.schedule
        self.crew: Crew | None = None
        self.seen: dict[int, str] = {}
        self.values: list[tuple[Array, int, int]] = []  # packed, and the bytes of a block of rows and of a group
        self._bias: Array = aligned_empty(0)
        self._bindings: dict[Key, ConvBinding] = {}

    def share(self, crew: Crew) -> None:
        """Calls for shapes not seen yet may use several threads."""
        self.crew = crew
        self._bindings.clear()

    def threads_note(self) -> str:
        """How many threads calls so far used, in words."""
        return note(self.crew, self.seen)

    def load(self, values: Array, bias: Array | None) -> None:
        """Pack new values; calls under way keep the ones they started with."""
        weight = SparseMatrix(self.task.pattern, values).to_dense()[:, self.order.taps]
        groups, (m, k) = self.window.groups, weight.shape
        made = [pack_rows(weight[m // groups * g : m // groups * (g + 1)], self.code.rows) for g in range(groups)]
        array = aligned_empty(sum(packed.size for packed, _, _ in made))
        array[:] = np.concatenate([packed.reshape(-1) for packed, _, _ in made])
        if bias is not None and not self._bias.size:
            self._bias = aligned_empty(bias.size)
            self._bias[:] = bias
        self.values[:] = [(array, made[0][2], 4 * made[0][0].size)]

    def listing(self) -> str:
        """The machine code as text, generated anew."""
        return listing(generate(self.form, self.target).program, self.target.isa)

    def geometry(self, height: int, width: int) -> Geometry:
        """Of images of this size."""
        size = height, width
        return Geometry(self.window, size, self.padding.resolve(size, self.window))

    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> ConvBinding | None:
        """The binding for arrays like these; None where rows of y or the residual lie apart or have to be copied."""
        same = r is not None and address_of(r) == address_of(y)
        if not _one_run(y) or (r is not None and not _one_run(r)) or (same and len(self.order.borders[0]) > 2):
            return None
        key = Key(x.shape[0], x.shape[2], columns, (*x.strides[:3], x.strides[3] if x.ndim == 5 else 0),
                  y.strides[:2], (0, 0) if r is None else r.strides[:2], same)  # fmt: skip
        binding = self._bindings.get(key)
        if binding is None:
            if len(self._bindings) >= SHAPES:
                self._bindings.clear()
            binding = self._bindings[key] = self._binding(key)
        return binding

    def run(self, x: Array, y: Array, r: Array | None, columns: int) -> None:
        """One call on any arrays, with copies where the kernel cannot take them."""
        out = np.empty(y.shape, np.float32) if r is not None or not _one_run(y) else y
        r = r if r is None else np.ascontiguousarray(r)
        binding = self.bind(x, out, r, columns)
        if binding is None:
            raise InternalError("rows of a new array lie apart")
        binding.call(address_of(x), address_of(out), 0 if r is None else address_of(r))
        if out is not y:
            y[...] = out

    def _binding(self, key: Key) -> ConvBinding:
        groups, (rows, k) = self.window.groups, self.task.pattern.shape
        g = self.geometry(key.height, key.width)
        m, channels, positions = rows // groups, self.window.channels(k) // groups, g.out[0] * g.out[1]
        _, block, group = self.values[0]
        whole = Extents(key.images, m, positions, k, 4 * (block // (4 * k) if k else 0), 0, key.y[1], key.r[1], 0,
                        key.x[0], key.y[0], key.r[0], block)  # fmt: skip
        per_group = Shift(group, channels * key.x[1], m * key.y[1], m * key.r[1], 4 * m * self.task.bias)
        if groups == 1:
            calls, images = [(whole, Shift(), self.order.borders[0])], 1
        elif self.order.own:
            calls = [(whole, Shift(*(i * step for step in per_group)), self.order.borders[i]) for i in range(groups)]
            images = 1
        else:
            a, b, c, r, bias = per_group
            by_group = replace(whole, batch=groups, a_batch=a, b_batch=b, c_batch=c, r_batch=r, bias_batch=bias)
            calls, images = [(by_group, Shift(), self.order.borders[0])], key.images
        code, crew, schedule, seen, values = self.code, self.crew, self.schedule, self.seen, self._bias

        def make() -> list[tuple[Parts, Shift]]:
            found = []
            for extents, shift, borders in calls:
                shares, by = share_out(extents, code.rows, code.target.lanes, crew, a="columns", b="image",
                                       bias=code.form.bias)  # fmt: skip
                frames = []
                for share in shares:
                    views = Views(g, share.first, share.first + share.extents.n, key.x[2], bool(key.x[3]))
                    made = image_frame(code, share, schedule, borders, views, channels, key.x[1], key.x[3])
                    made.slots[Slot.BIAS] = address_of(values) + shift.bias + share.shift.bias
                    frames.append((made, share.shift))
                how = described(len(frames), by)
                found.append((Parts(frames, code.executable.address, code.executable.call, crew, how), shift))
                if len(seen) < SHAPES:
                    seen[positions] = how
            return found

        return ConvBinding(self, make, images, (key.x[0], key.y[0], key.r[0]))


class ConvBinding:
    """The convolution for arrays of one shape and pitch; ``images``: how often its calls are repeated."""

    def __init__(
        self, product: DenseConv, make: Callable[[], list[tuple[Parts, Shift]]], images: int,
        steps: tuple[int, int, int],
    ) -> None:  # fmt: skip
        self.values, self.make, self.images, self.steps = product.values, make, images, steps
        self.code = product.code
        self.free: list[list[tuple[Parts, Shift]]] = []

    def call(self, xa: int, ya: int, ra: int) -> None:
        """One call with x, y and the residual (0: none) at these addresses."""
        try:
            made = self.free.pop()
        except IndexError:
            made = self.make()
        packed, _, _ = self.values[0]  # held here: a refit does not free what this call reads
        weights, (dx, dy, dr) = address_of(packed), self.steps
        for image in range(self.images):
            for parts, shift in made:
                parts.point(weights + shift.a, xa + image * dx + shift.b, ya + image * dy + shift.c,
                            ra + image * dr + shift.r)  # fmt: skip
                parts.run()
        self.free.append(made)
        del packed

    def fixed(self, xa: int, ya: int, ra: int) -> Callable[[], None]:
        """The call for arrays that stay where they are."""
        call = self.call
        return lambda: call(xa, ya, ra)


def image_frame(
    code: Code, share: Share, schedule: DenseSchedule, borders: tuple[int, ...], views: Views, channels: int,
    channel: int, phase: int,
) -> Frame:  # fmt: skip
    """An argument block, tables and planes for a part of a convolution.

    Args:
        borders: of the blocks of K.
        channels: of a group.
        channel, phase: bytes from channel to channel of an image, and from column phase to column phase.
    """
    target, e = code.target, share.extents
    k_block = max(b - a for a, b in zip(borders, borders[1:], strict=False)) if len(borders) > 1 else 1
    made = frame(code, e, replace(schedule, k_block=k_block), share.blocks)
    s, kept = made.slots, list[Any]()

    def table(array: NDArray[Any]) -> int:
        """Kept beside the frame."""
        memory = aligned_empty(max(array.size, 1), array.dtype)
        memory[: array.size] = array.reshape(-1)
        kept.append(memory)
        return address_of(memory)

    sizes = np.diff(borders)
    lines = np.zeros((sizes.size, len(Line)), np.int64)
    lines[:, Line.TURNS], lines[:, Line.REST] = np.divmod(sizes, UNROLL)
    lines[:, Line.A], lines[:, Line.TAPS] = sizes * e.a_pitch, sizes * 8 * len(Tap)
    planes = views.planes
    order = np.argsort(full_taps(len(views.places()), views.geometry.window).key, kind="stable")
    places = views.places()[order]
    step = 4 * views.plane * len(planes) if planes else channel
    taps = np.empty((channels, places.size, len(Tap)), np.int64)
    taps[..., Tap.PLACE] = step * np.arange(channels)[:, None] + places
    taps[..., Tap.OTHER] = np.arange(places.size) * VECTORS * mask_bytes(target)
    s[Slot.LINES], s[Slot.TAPS], s[Slot.K_BLOCKS] = table(lines), table(taps), sizes.size - 1
    masks, number = _masks(views.inside()[order], target)
    addresses = table(masks) + number * (places.size * VECTORS * mask_bytes(target))
    whole = e.n // (VECTORS * target.lanes)
    s[Slot.VIEWS] = table(addresses)
    s[Slot.VIEWS_PANEL], s[Slot.VIEWS_GROUP], s[Slot.VIEWS_TAIL] = 8, 8 * s[Slot.GROUP], 8 * whole
    s[Slot.B_K], s[Slot.PACK], s[Slot.PACK_TAIL], s[Slot.CHANNELS] = 0, 1, 1, channels
    if planes:
        memory = aligned_empty(channels * len(planes) * views.plane)
        copies, ends = _copies(views, channel, phase, target)
        kept.append(memory)
        copies[:, Copy.MASKS] += table(ends)
        s[Slot.STAGES], s[Slot.COPIES], s[Slot.PLANES] = len(copies), table(copies), address_of(memory)
        if not len(copies):  # nothing but padding: no plane is read
            s[Slot.STAGES] = 0
    made.kept = kept
    return made


def _masks(inside: NDArray[np.bool_], target: Target) -> tuple[NDArray[Any], Ints]:
    """(different panels, places, vectors, ...): masks as they lie in memory, and which of these a panel has."""
    places, n = inside.shape
    width = VECTORS * target.lanes
    panels = -(-n // width)
    padded = np.zeros((places, panels * width), bool)
    padded[:, :n] = inside
    by_panel = padded.reshape(places, panels, width).transpose(1, 0, 2)
    found, number = np.unique(by_panel.reshape(panels, -1), axis=0, return_inverse=True)
    return _stored(found.reshape(-1, target.lanes), target), np.asarray(number, np.int64).reshape(-1)


def _stored(masks: NDArray[np.bool_], target: Target) -> NDArray[Any]:
    """(n, lanes) as the kernels read them: bits, or vectors of signs."""
    return np.packbits(masks, 1, "little") if target.masks else np.where(masks, -1, 0).astype(np.int32)


def _copies(views: Views, channel: int, phase: int, target: Target) -> tuple[Ints, NDArray[Any]]:
    """Lines for the planes of a channel, with the offsets of their masks in the second array."""
    g, lanes = views.geometry, target.lanes
    (sh, sw), step, size = g.window.stride, 1 if phase else g.window.stride[1], 4 * views.plane
    copies, masks = [], []
    for number, plane in enumerate(views.planes):
        rows, columns = plane.rows, plane.columns
        if not rows.count or not columns.count:
            continue
        vectors = (columns.count - 1) // lanes
        tail = columns.count - vectors * lanes
        at = 4 * columns.first
        if phase:
            own = next(i for i, p in enumerate(column_phases(g.window)) if (columns.first - origin(g, p)) % sw == 0)
            at = own * phase + 4 * ((columns.first - origin(g, column_phases(g.window)[own])) // sw)
        line = np.zeros(len(Copy), np.int64)
        line[Copy.FROM], line[Copy.TO] = rows.first * views.row + at, number * size + 4 * plane.at
        line[Copy.ROWS], line[Copy.VECTORS] = rows.count, vectors
        line[Copy.FROM_ROW], line[Copy.TO_ROW] = sh * views.row, 4 * g.out[1]
        line[Copy.FROM_CHANNEL], line[Copy.TO_CHANNEL] = channel, size * len(views.planes)
        line[Copy.MASKS] = len(copies) * COPY_MASKS * mask_bytes(target)
        copies.append(line)
        wanted, lane = (tail - 1) * step + 1, np.arange(lanes)
        masks += [lane < wanted, lane + lanes < wanted, lane < tail]
    stored = _stored(np.array(masks, bool).reshape(-1, lanes), target)
    return np.array(copies, np.int64).reshape(-1, len(Copy)), stored


def _one_run(array: Array) -> bool:
    """Rows of each plane follow each other without a gap."""
    return array.shape[2] <= 1 or array.strides[2] == 4 * array.shape[3]
