"""Depthwise convolutions where x lies: several image rows of one channel in a block, a loop over channels around it.

Nothing is copied: masks, fixed by the shape, cut what padding adds to a load. A loaded vector serves every output row
that it reaches, and the weights of a channel stay in registers. Where rows are short, a vector holds several. At
column stride 2 vectors of even and odd columns are shuffled out of pairs of loads, and stay permuted until the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..codegen.vector import OP, Builder, Program, S, check
from ..schedule.task import Task
from ..sparsity.geometry import Geometry
from ..target import Target
from . import epilogue
from .arguments import Arg

MOST_ROWS = 14
_MOST_MASKS = 1 << 16  # of a table
_LEAST_ROWS = 3

Event = tuple[int, int]  # accumulator, rank of the tap
Key = tuple[int, ...]  # a vector: line and column offset; a load of which two make one, also its half; an element: 0, 0


def fits(task: Task, target: Target) -> bool:
    """Whether ``task`` is depthwise with every channel's whole kernel in the pattern, and ``target`` has masks."""
    window = task.window
    if window is None or target.masks < 2 or window.stride[1] > 2 or not (window.masked or task.residual is None):
        return False
    places = window.kernel[0] * window.kernel[1]
    p = task.pattern
    own = window.groups == p.rows and p.cols == places and p.nnz == places * window.groups
    return own and target.registers - places - task.bias - _temporaries(task, target) >= _LEAST_ROWS


def _temporaries(task: Task, target: Target) -> int:
    code = epilogue.template(task, target, Builder())
    return max(epilogue.inner_registers(target), code.registers if code else 0)


def pack(task: Task, values: NDArray[np.float32], bias: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """(channels, taps), by displacement, behind them the biases if there are any."""
    by_channel = values.reshape(task.pattern.rows, -1)[:, _order(task)]
    return by_channel if bias is None else np.concatenate([by_channel, bias[:, None]], axis=1)


def _order(task: Task) -> NDArray[np.int64]:
    """The taps of a channel by displacement."""
    return np.argsort(task.taps.key[: task.pattern.cols], kind="stable")


@dataclass(frozen=True)
class Shape:
    """An image and the bytes between its rows, those of the output and of the residual."""

    geometry: Geometry
    x: int
    y: int
    r: int


class Plan:
    """How a plane is cut into blocks of accumulators and tiles of columns, and which lanes of a load are the image's.

    Attributes:
        each: image rows of a vector, more than one where they are short.
        rows: accumulators of a block.
        blocks, tiles: the numbers of the first output row and column of each.
        events: the multiply-adds of a block in order.
    """

    def __init__(self, task: Task, target: Target, shape: Shape) -> None:
        self.task, self.target, self.shape = task, target, shape
        g = shape.geometry
        self.window = window = g.window
        lanes = target.lanes
        height, width = g.out
        self.halves = window.stride[1]  # loads that make a vector
        half = lanes // self.halves
        if self.halves == 1:
            joined = width == g.size[1] and shape.x == shape.y == 4 * width and window.stride[0] == 1
            self.each = max(1, lanes // width) if joined else 1
        else:
            self.each = 2 if width <= half else 1
        self.each = 1 if task.residual else min(self.each, height)
        self.order = _order(task)
        ky, kx = np.divmod(self.order, window.kernel[1])
        self.line, self.column = ky * window.dilation[0], kx * window.dilation[1]  # of every tap, by rank
        vectors = -(-height // self.each)
        left = target.registers - self.order.size - task.bias - 2 * (self.halves == 2)
        self.tiles = np.minimum(np.arange(-(-width // lanes)) * lanes, max(0, width - lanes))
        self.rows = 0
        for walk in (self._by_line, self._by_accumulator, self._by_phase):
            if walk == self._by_line and window.stride != (1, 1):
                continue
            self._recipes: dict[Key, tuple[str, tuple[Key, ...]]] = {}
            self.shares = walk != self._by_phase  # loads between even and odd columns
            most = min(MOST_ROWS, left - self._needed(walk, _LEAST_ROWS + 1))
            while not self.rows and most >= min(_LEAST_ROWS, vectors):
                # Blocks overlap at the end, and every block makes a few vectors of its own.
                rows = min(range(1, most + 1), key=lambda rows: (-(-vectors // rows) * (rows + 0.5), -rows))
                self.registers = self._needed(walk, rows)  # of a widely dilated kernel, more rows hold more vectors
                self.rows = rows if rows + self.registers <= left else 0
                most = rows - 1
            if self.rows:
                break
        if not self.rows:
            return
        step = self.rows * self.each
        self.blocks = np.minimum(np.arange(-(-height // step)) * step, max(0, height - step))

    def _needed(self, walk: Callable[[int], Iterator[Event]], rows: int) -> int:
        """Registers of a block of so many rows beside accumulators and weights; its multiply-adds are ``events``."""
        self.events = list(walk(rows))
        return max(Vectors(self).run(None), _temporaries(self.task, self.target))

    def _by_line(self, rows: int) -> Iterator[Event]:
        """Every vector once, for all rows that it serves: where taps are summed row by row."""
        ranks = range(self.order.size)
        at = [(self.line_of(j, k), int(self.column[k]), j, k) for j in range(rows) for k in ranks]
        yield from ((j, k) for _, _, j, k in sorted(at))

    def _by_accumulator(self, rows: int) -> Iterator[Event]:
        yield from ((j, k) for j in range(rows) for k in range(self.order.size))

    def _by_phase(self, rows: int) -> Iterator[Event]:
        """As by line, phase by phase: fewer vectors are held, and more are made again."""
        (sh, sw), ranks = self.window.stride, range(self.order.size)
        at = [(int(self.line[k]) % sh, int(self.column[k]) % sw, self.line_of(j, k), int(self.column[k]), j, k)
              for j in range(rows) for k in ranks]  # fmt: skip
        yield from (event[-2:] for event in sorted(at))

    @property
    def records(self) -> int:
        """Blocks times tiles."""
        return self.blocks.size * self.tiles.size

    def line_of(self, accumulator: int, rank: int) -> int:
        """The padded image's row that a tap reads, counted from the block's first."""
        return accumulator * self.each * self.window.stride[0] + int(self.line[rank])

    @cached_property
    def _lanes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """By lane of a load: output row and input column, counted from those of block and tile."""
        lane, width = np.arange(self.target.lanes), self.shape.geometry.out[1]
        if self.each == 1 or self.halves == 2:
            return 0 * lane, lane
        return lane // width, lane % width

    def loaded(self, line: int, offset: int, half: int) -> NDArray[np.uint16]:
        """(records,) the lanes of a load that lie in the image."""
        g, (sh, sw) = self.shape.geometry, self.window.stride
        row, column = self._lanes
        lanes = self.target.lanes
        down, right = (half, 0) if self.each == 2 and self.halves == 2 else (0, half * lanes)
        rows = (self.blocks[:, None, None] + down + row) * sh + line - g.pads[0][0]
        columns = self.tiles[:, None] * sw + right + column + offset - g.pads[1][0]
        inside = (rows >= 0) & (rows < g.size[0]) & (columns >= 0) & (columns < g.size[1])
        if self.each > 1 and self.halves == 1:
            inside &= row < self.each
        return _words(np.broadcast_to(inside, (self.blocks.size, self.tiles.size, lanes)))

    def stored(self, accumulator: int, half: int) -> NDArray[np.uint16]:
        """(records,) the lanes of a result that lie in the output; of two rows in a vector, those of one."""
        g, lanes = self.shape.geometry, self.target.lanes
        row, column = self._lanes
        if self.each == 2 and self.halves == 2:
            row, column = np.full(lanes, half), np.arange(lanes) - half * (lanes // 2)
        rows = self.blocks[:, None, None] + accumulator * self.each + row
        inside = (rows < g.out[0]) & (row < self.each) & (column >= 0) & (self.tiles[:, None] + column < g.out[1])
        return _words(np.broadcast_to(inside, (self.blocks.size, self.tiles.size, lanes)))

    def columns(self, offset: int) -> NDArray[np.uint16]:
        """(records,) the lanes of a vector whose column lies in the image, be the row in it or not."""
        lane = np.arange(self.target.lanes)
        row, column = self._lanes if self.halves == 1 or self.each == 1 else np.divmod(lane, lane.size // 2)
        inside = self._inside(offset, column) & (row < self.each)
        return _words(np.broadcast_to(inside, (self.records, lane.size)))

    def _inside(self, offset: int, column: NDArray[np.int64]) -> NDArray[np.bool_]:
        g, stride = self.shape.geometry, self.window.stride[1]
        read = column * stride + offset - g.pads[1][0]
        return np.asarray((read >= 0) & (read < g.size[1]))

    def filled(self, key: Key) -> NDArray[np.uint16]:
        """(records,) all lanes where a single element lies in the image, else none."""
        g, (sh, sw) = self.shape.geometry, self.window.stride
        rows = self.blocks[:, None] * sh + key[0] - g.pads[0][0]
        columns = self.tiles * sw + key[1] - g.pads[1][0]
        inside = (rows >= 0) & (rows < g.size[0]) & (columns >= 0) & (columns < g.size[1])
        return np.where(inside, (1 << self.target.lanes) - 1, 0).astype(np.uint16).reshape(-1)

    def turn(self, offset: int) -> int:
        """By how many lanes the vector that another one is made of has to be turned."""
        if self.halves == 2:
            return 1
        return offset - self._base

    @cached_property
    def _base(self) -> int:
        """The column offset whose vectors are loaded where all of a row is in one: that of the image's first column."""
        return int(min(set(self.column.tolist()), key=lambda o: abs(o - self.shape.geometry.pads[1][0])))

    def recipe(self, key: Key) -> tuple[str, tuple[Key, ...]]:
        """How a vector is made, and of which."""
        if len(key) > 2:
            return ("load", "fill")[len(key) - 3], ()
        if key not in self._recipes:
            self._recipes[key] = self._recipe(*key)
        return self._recipes[key]

    def _recipe(self, line: int, offset: int) -> tuple[str, tuple[Key, ...]]:
        step, lanes = self.halves, self.target.lanes
        offsets = set(self.column.tolist())
        before = offset - step
        if self.tiles.size == 1:
            if step == 1:
                before = self._base
            if before != offset and before in offsets and self._turns(offset):
                return "rotate", ((line, before),)
        elif step == 2 and before in offsets:
            return "shift", ((line, before), (line, before + step * lanes, 0, 0))
        if step == 1:
            return "load", ()
        odd = offset & 1 if self.shares else 0
        return ("evens", "odds")[odd], tuple((line, offset - odd, half) for half in (0, 1))

    def _turns(self, offset: int) -> bool:
        """Whether a vector has elements, and all of them are lanes of the one that it would be turned from."""
        width, lanes = self.shape.geometry.out[1], self.target.lanes
        by = offset // 2 if self.halves == 2 else self.turn(offset)  # one turn after the other
        span = lanes // 2 if self.halves == 2 and self.each == 2 else width if self.each > 1 else lanes
        column = np.flatnonzero(self._inside(offset, np.arange(min(width, span))))
        return column.size > 0 and bool(((column + by >= 0) & (column + by < span)).all())

    def place(self, line: int, offset: int, half: int) -> int:
        """Bytes from the input pointer of a block and tile to a load."""
        (top, _), (left, _) = self.shape.geometry.pads
        if self.each == 2 and self.halves == 2:
            line, half = line + half * self.window.stride[0], 0
        return (line - top) * self.shape.x + 4 * (offset - left + half * self.target.lanes)


def _load(key: Key) -> tuple[int, int, int]:
    """Line, column offset and half of a load."""
    return key[0], key[1], key[2] if len(key) > 2 else 0


def _words(lanes: NDArray[np.bool_]) -> NDArray[np.uint16]:
    """(..., lanes) as one number each, flat."""
    return np.asarray((lanes << np.arange(lanes.shape[-1])).sum(-1), np.uint16).reshape(-1)


class Vectors:
    """Which register holds which vector while the multiply-adds of a block run, and how each is made."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.left: dict[Key, int] = {}  # uses to come
        for key in map(self._key, plan.events):
            self._count(key)
        self.held: dict[Key, int] = {}
        self.free: list[int] = []
        self.most = 0

    def _key(self, event: Event) -> Key:
        return self.plan.line_of(*event), int(self.plan.column[event[1]])

    def _count(self, key: Key) -> None:
        if key not in self.left:
            for source in self.plan.recipe(key)[1]:
                self._count(source)
        self.left[key] = self.left.get(key, 0) + 1

    def _take(self, key: Key) -> int:
        if not self.free:
            self.free.append(self.most)
            self.most += 1
        self.held[key] = self.free.pop(0)
        return self.held[key]

    def _use(self, key: Key) -> None:
        self.left[key] -= 1
        if not self.left[key]:
            self.free.append(self.held.pop(key))

    def _make(self, key: Key, code: _Code | None) -> None:
        if key in self.held:
            return
        kind, sources = self.plan.recipe(key)
        for source in sources:
            self._make(source, code)
        registers = [self.held[source] for source in sources]
        register = self._take(key)  # not one of the sources, which are read after it is written
        for source in sources:
            self._use(source)
        if code:
            code.make(kind, register, registers, key)

    def run(self, code: _Code | None) -> int:
        """Emit loads, shuffles and multiply-adds; how many registers they take."""
        for event in self.plan.events:
            key = self._key(event)
            self._make(key, code)
            if code:
                code.multiply(event, self.held[key])
            self._use(key)
        return self.most


class _Code:
    """The program of a plan: images, in each one channel after the other, in each its blocks, in each its tiles.

    Channels are counted by ``Arg.IMAGES``, so many bytes apart as its steps say; images by ``Arg.GROUP``, from the end
    of one image's channels to the next image's first by ``Arg.X_GROUP`` and its kin.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.b = plan, Builder()
        self.task, self.target = plan.task, plan.target
        self.first = plan.rows + plan.registers  # register of the first weight
        self.bias = self.first + plan.order.size
        self.index = self.bias + self.task.bias  # registers with the numbers of even and of odd lanes
        self.started: set[int] = set()
        self.slots: dict[bytes, int] = {}  # of a record, by the masks that stand in it
        self.table: list[NDArray[np.uint16]] = []
        uses: dict[int, int] = {}
        for words in self._all_masks():
            number = self._slot(words)
            if number is not None:
                uses[number] = uses.get(number, 0) + 1
        ranked = sorted(uses, key=lambda number: (-uses[number], number))
        most = self.target.masks
        self.resident = ranked if len(ranked) <= most else ranked[: most - 1]
        self.passing = -1  # the mask that the last register holds, where not all stay

    def _all_masks(self) -> Iterator[NDArray[np.uint16]]:
        plan = self.plan
        for key in Vectors(plan).left:
            kind, _ = plan.recipe(key)
            if kind == "rotate":
                yield plan.columns(key[1])
            elif kind == "fill":
                yield plan.filled(key)
            elif kind == "load":
                yield plan.loaded(*_load(key))
        for accumulator in range(plan.rows):
            for half in range(plan.each if plan.halves == 2 else 1):
                yield plan.stored(accumulator, half)

    def _slot(self, words: NDArray[np.uint16]) -> int | None:
        """The number of a mask in a record; none is needed for all lanes, or for no lane."""
        if (words == (1 << self.target.lanes) - 1).all() or not words.any():
            return None
        number = self.slots.setdefault(words.tobytes(), len(self.table))
        if number == len(self.table):
            self.table.append(words)
        return number

    def _mask(self, number: int) -> int:
        """The register of a mask, which is loaded if it does not stay in one."""
        if number in self.resident:
            return self.resident.index(number)
        last = self.target.masks - 1
        if number != self.passing:
            self.b.emit("mask_bits", d=last, ptr=S.PANEL, disp=2 * number)
            self.passing = number
        return last

    def make(self, kind: str, register: int, sources: list[int], key: Key) -> None:
        """A vector, from memory or from others."""
        b, plan = self.b, self.plan
        register, (a, c) = register + plan.rows, ([source + plan.rows for source in sources] + [0, 0])[:2]
        if kind in ("evens", "odds"):
            b.emit("mov", d=register, a=a)
            b.emit("pick", d=register, a=self.index + (kind == "odds"), b=c)
        elif kind == "shift":
            b.emit("lanes_from", d=register, a=a, b=c, disp=1)
        elif kind == "rotate":
            number = self._slot(plan.columns(key[1]))
            lanes = plan.turn(key[1]) % self.target.lanes
            if number is None:
                b.emit("lanes_from", d=register, a=a, b=a, disp=lanes)
            else:
                b.emit("rotate_by_mask", d=register, a=a, b=self._mask(number), disp=lanes)
        else:
            words = plan.filled(key) if kind == "fill" else plan.loaded(*_load(key))
            number = self._slot(words)
            place = {"ptr": S.X, "disp": plan.place(*_load(key))}
            name = "bcast" if kind == "fill" else "load"
            if not words.any():
                b.emit("zero", d=register)
            elif number is None:
                b.emit(name, d=register, **place)
            else:
                b.emit(f"{name}_by_mask", d=register, b=self._mask(number), **place)

    def multiply(self, event: Event, register: int) -> None:
        accumulator, rank = event
        register, weight = register + self.plan.rows, self.first + rank
        if accumulator not in self.started and not self.task.bias:
            self.b.emit("mul", d=accumulator, a=register, b=weight)
        else:
            if accumulator not in self.started:
                self.b.emit("mov", d=accumulator, a=self.bias)
            self.b.emit("fma_acc", d=accumulator, a=register, b=weight)
        self.started.add(accumulator)

    def store(self, accumulator: int, half: int) -> None:
        plan = self.plan
        number = self._slot(plan.stored(accumulator, half))
        row = accumulator * plan.each + half
        place = {"ptr": S.Y, "disp": row * plan.shape.y - 4 * half * (self.target.lanes // 2)}
        if number is not None:
            self.b.emit("store_by_mask", a=accumulator, b=self._mask(number), **place)
        elif plan.stored(accumulator, half).any():
            self.b.emit("store", a=accumulator, **place)

    def tile(self) -> None:
        """A tile of a block, from where X, Y and PANEL point."""
        b, plan = self.b, self.plan
        Vectors(plan).run(self)
        template = epilogue.template(self.task, self.target, b)
        if template is not None:
            where = {}
            if self.task.residual:
                self._point(S.X, S.PX5, plan.shape.r, 4)
                where = {"ptr": S.X, "disp": np.arange(plan.rows) * plan.shape.r}
                number = self._slot(plan.stored(0, 0))  # that of all rows, as each has a vector to itself
                if number is not None:
                    where |= {"op": OP["load_by_mask"], "b": self._mask(number)}
            epilogue.apply(b, template, plan.rows, where)
        for accumulator in range(plan.rows):
            for half in range(plan.each if plan.halves == 2 else 1):
                self.store(accumulator, half)

    def program(self) -> Program:
        b, plan = self.b, self.plan
        taps = plan.order.size + self.task.bias
        b.emit("enter")
        bases = [(S.PX, Arg.X, Arg.X_IMAGE), (S.PX3, Arg.Y, Arg.Y_IMAGE)]
        bases += [(S.PX5, Arg.R, Arg.R_IMAGE)] * (self.task.residual is not None)
        for register, slot in (*(base[:2] for base in bases), (S.W, Arg.W), (S.PANEL, Arg.MASKS)):
            b.emit("s_arg", d=register, disp=slot.byte)
        for count, left in ((Arg.IMAGES, Arg.IMAGES_LEFT), (Arg.GROUP, Arg.COUNT)):
            b.emit("s_arg", d=S.TMP, disp=count.byte)
            b.emit("s_put", a=S.TMP, disp=left.byte)
        if plan.halves == 2:
            b.emit("s_arg", d=S.TMP, disp=Arg.PANEL.byte)
            for odd in (0, 1):
                b.emit("load", d=self.index + odd, ptr=S.TMP, disp=odd * self.target.tile_bytes)
        once = plan.records == 1
        if once:
            self._resident()
        channel, block, tile = b.label("next channel"), b.label("rows"), b.label("columns")
        done, out = b.label("next image"), b.label()
        b.emit("align", disp=16)
        b.place(channel)
        for tap in range(taps):
            b.emit("bcast", d=self.first + tap, ptr=S.W, disp=4 * tap)
        if not once:
            b.emit("s_arg", d=S.PANEL, disp=Arg.MASKS.byte)
            b.emit("s_set", d=S.PX7, disp=0)
            b.emit("s_set", d=S.K, disp=plan.blocks.size)
        b.place(block)
        if not once:
            b.emit("s_set", d=S.PY, disp=0)
            b.emit("s_set", d=S.T, disp=plan.tiles.size)
        b.place(tile)
        self._point(S.X, S.PX, plan.window.stride[0] * plan.shape.x, 4 * plan.window.stride[1])
        self._point(S.Y, S.PX3, plan.shape.y, 4)
        if not once:
            self._resident()
        self.passing = -1
        self.tile()
        if not once:
            b.emit("s_addi", d=S.PANEL, disp=2 * len(self.table))
            b.emit("s_addi", d=S.PY, disp=self.target.lanes)
            b.emit("loop", a=S.T, disp=tile)
            b.emit("s_addi", d=S.PX7, disp=plan.rows * plan.each)
            b.emit("loop", a=S.K, disp=block)
        b.emit("s_addi", d=S.W, disp=4 * taps)
        for register, _, step in bases:
            b.emit("s_add_arg", d=register, disp=step.byte)
        b.emit("s_arg", d=S.TMP, disp=Arg.IMAGES_LEFT.byte)
        b.emit("s_addi", d=S.TMP, disp=-1)
        b.emit("s_put", a=S.TMP, disp=Arg.IMAGES_LEFT.byte)
        b.emit("jump_zero", a=S.TMP, disp=done)
        b.emit("jump", disp=channel)
        b.place(done)
        b.emit("s_arg", d=S.TMP, disp=Arg.COUNT.byte)
        b.emit("s_addi", d=S.TMP, disp=-1)
        b.emit("s_put", a=S.TMP, disp=Arg.COUNT.byte)
        b.emit("jump_zero", a=S.TMP, disp=out)
        for (register, _, _), step in zip(bases, (Arg.X_GROUP, Arg.Y_GROUP, Arg.R_GROUP), strict=False):
            b.emit("s_add_arg", d=register, disp=step.byte)
        b.emit("s_arg", d=S.W, disp=Arg.W.byte)
        b.emit("s_arg", d=S.TMP, disp=Arg.IMAGES.byte)
        b.emit("s_put", a=S.TMP, disp=Arg.IMAGES_LEFT.byte)
        b.emit("jump", disp=channel)
        b.place(out)
        b.emit("leave")
        program = b.finish()
        check(program)
        return program

    def _resident(self) -> None:
        for register, number in enumerate(self.resident):
            self.b.emit("mask_bits", d=register, ptr=S.PANEL, disp=2 * number)

    def _point(self, register: S, base: S, row: int, column: int) -> None:
        """To the block's first row and the tile's first column, which are so many bytes times their numbers away."""
        b = self.b
        if self.plan.records == 1:
            b.emit("s_mov", d=register, a=base)
            return
        b.emit("s_mov", d=S.TMP, a=S.PX7)
        b.emit("s_min_arg", d=S.TMP, disp=Arg.X_LAST.byte)
        b.emit("s_muli", d=register, a=S.TMP, disp=row)
        b.emit("s_add", d=register, a=base)
        b.emit("s_mov", d=S.TMP, a=S.PY)
        b.emit("s_min_arg", d=S.TMP, disp=Arg.Y_LAST.byte)
        b.emit("s_muli", d=S.TMP, a=S.TMP, disp=column)
        b.emit("s_add", d=register, a=S.TMP)


def generate(task: Task, target: Target, shape: Shape) -> tuple[Program, NDArray[np.uint16], Plan] | None:
    """The program for images of ``shape``, the table of masks (records, masks) and the plan; None: not this way."""
    plan = Plan(task, target, shape)
    if not plan.rows or plan.records > _MOST_MASKS:
        return None
    code = _Code(plan)
    if plan.records * max(len(code.table), 1) > _MOST_MASKS:
        return None
    program = code.program()
    table = np.stack(code.table, axis=1) if code.table else np.zeros((1, 1), np.uint16)
    return program, np.ascontiguousarray(table), plan
