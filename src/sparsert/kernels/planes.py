"""Convolutions over padded planes: how the input pointer walks, and the copies between images and planes.

An input channel lies in scratch as a plane whose rows are separated by zeros; the columns of the product are the
positions of such a plane, so one run of tiles covers many image rows (:mod:`sparsert.sparsity.geometry`). An argument
block describes a band of output rows; the bands of an image follow each other, and all images repeat them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codegen.vector import OP, Builder, S
from ..schedule.task import Task
from ..sparsity.taps import Taps, Window
from ..target import Target
from .arguments import SLOTS, Arg, Move
from .lines import REGISTERS, Lines, lines

Ints = NDArray[np.int64]
_STEPS = 8  # rows that the multiples of a pitch reach from one base,
_NEAR = 32  # and floats that short displacements do


# ---- The input pointer -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Walk:
    """Loads from planes, one after the other: how X is moved in front of each, and what is left for its operand.

    Attributes:
        plane, rows, floats: by how many planes, pitches and floats.
        step, disp: of the operand.
        mask: the number of its mask, if there are any.
        lines: how vectors are cut out of cache lines, where the code knows the distance of rows;
        register: the first that may hold lines; width: bytes of one.
    """

    plane: Ints
    row: Ints
    floats: Ints
    step: Ints
    disp: Ints
    mask: Ints | None
    lines: Lines | None = None
    register: int = 0
    width: int = 0

    @property
    def load(self) -> dict[str, Any]:
        """Columns of the loads, all but the register."""
        masked = {"op": OP["load"]} if self.mask is None else {"op": OP["load_by_mask"], "b": self.mask}
        plain: dict[str, Any] = {"a": 0, "b": 0, **masked, "ptr": S.X, "step": self.step, "disp": self.disp}
        if self.lines is None:
            return plain
        low, high = (self.register + (self.lines.line + i) % REGISTERS for i in (0, 1))
        shuffled: dict[str, Any] = {
            "op": OP["lanes_by_mask"], "a": low, "b": high, "step": self.mask, "disp": self.lines.lane,
        }  # fmt: skip
        return plain | {name: np.where(self.lines.cut, column, plain[name]) for name, column in shuffled.items()}

    @property
    def moves(self) -> Ints:
        """Program rows in front of each load."""
        moves = (self.plane == 1) + 3 * (self.plane > 1) + 2 * (self.row != 0) + (self.floats != 0)
        if self.lines is not None:
            moves = moves + self.lines.low + self.lines.high
        return np.asarray(moves, np.int64)

    def rows(self) -> Iterator[tuple[NDArray[np.bool_], dict[str, Any]]]:
        """The program rows that move X or load lines, and in front of which loads."""
        one, many, row, floats = self.plane == 1, self.plane > 1, self.row != 0, self.floats != 0
        plane = {"disp": Arg.X_PLANE.byte}
        onto_x = {"op": OP["s_add"], "d": S.X, "a": S.TMP}
        yield one, {"op": OP["s_add_arg"], "d": S.X, **plane}
        yield many, {"op": OP["s_arg"], "d": S.TMP, **plane}
        yield many, {"op": OP["s_muli"], "d": S.TMP, "a": S.TMP, "disp": self.plane[many]}
        yield many, onto_x
        yield row, {"op": OP["s_muli"], "d": S.TMP, "a": S.PX, "disp": self.row[row]}
        yield row, onto_x
        yield floats, {"op": OP["s_addi"], "d": S.X, "disp": 4 * self.floats[floats]}
        if self.lines is not None:
            for loaded, behind in ((self.lines.low, 0), (self.lines.high, 1)):
                line = self.lines.line[loaded] + behind
                register = self.register + line % REGISTERS
                yield loaded, {"op": OP["load"], "d": register, "ptr": S.X, "disp": line * self.width}


def walk(taps: Taps, window: Window, key: Ints, chain: NDArray[Any], register: int, target: Target) -> Walk:
    """The walk over ``key``, whose planes rise within a chain; X starts at plane 0 where ``chain`` changes.

    ``register``: the first of those that are free for lines.
    """
    plane, pitch, offset = taps.place(key)
    far_row, far_offset = pitch // _STEPS, offset // _NEAR
    goes_on = np.zeros(key.size, bool)
    np.equal(chain[1:], chain[:-1], out=goes_on[1:])

    def difference(column: Ints) -> Ints:
        delta = column.copy()
        delta[1:] -= column[:-1] * goes_on[1:]
        return delta

    if window.pitch:
        none, place = np.zeros_like(plane), window.shift + pitch * window.pitch + offset
        return Walk(difference(plane), none, none, none, 4 * place, _masks(window, plane, offset),
                    lines(place, plane, chain, target.lanes), register, target.tile_bytes)  # fmt: skip
    return Walk(difference(plane), difference(far_row) * _STEPS, difference(far_offset) * _NEAR,
                pitch % _STEPS, 4 * (offset % _NEAR), _masks(window, plane, offset))  # fmt: skip


def _masks(window: Window, plane: Ints, offset: Ints) -> Ints | None:
    """By load, the number of its mask."""
    if not window.masks:
        return None
    number = np.zeros((max(b for b, _ in window.mask_places) + 1, max(o for _, o in window.mask_places) + 1), np.int64)
    for i, place in enumerate(window.mask_places):
        number[place] = i
    column_phase = np.array([b for _, b in window.phases])[plane % len(window.phases)]
    return np.asarray(number[column_phase, offset])


def load_masks(b: Builder, window: Window, target: Target) -> None:
    """The masks of the current tile, from a table with a line per mask and tile."""
    if not window.masks:
        return
    b.emit("s_arg", d=S.TMP, disp=Arg.XT.byte)
    b.emit("s_muli", d=S.TMP, a=S.TMP, disp=window.masks)
    b.emit("s_add_arg", d=S.TMP, disp=Arg.MASKS.byte)
    for i in range(window.masks):
        b.emit("mask_from", d=i, ptr=S.TMP, disp=i * target.tile_bytes)


def copy(b: Builder, taps: Taps, window: Window, key: Ints, register: int, target: Target) -> None:
    """The vectors that ``key`` names, from where X points to the panel."""
    path = walk(taps, window, key, np.zeros(key.size, np.int8), register + 1, target)
    before: list[list[dict[str, Any]]] = [[] for _ in range(key.size)]
    for some, columns in path.rows():
        for i, load in enumerate(np.flatnonzero(some).tolist()):
            before[load].append({name: value[i] if isinstance(value, np.ndarray) else value
                                 for name, value in columns.items()})  # fmt: skip
    for load, rows in enumerate(before):
        for row in rows:
            b.emit_many(n=1, **row)
        b.emit_many(n=1, d=register, **{name: value[load] if isinstance(value, np.ndarray) else value
                                        for name, value in path.load.items()})  # fmt: skip
        b.emit("store", a=register, ptr=S.PANEL, disp=int(key[load]) * target.tile_bytes)


# ---- Images and planes -------------------------------------------------------------------------------------------


_CALL = (
    (Arg.X, Arg.X_HERE), (Arg.Y, Arg.Y_HERE), (Arg.R, Arg.R_HERE), (Arg.W, Arg.W_HERE), (Arg.IMAGES, Arg.IMAGES_LEFT),
)  # fmt: skip
"""What the call says, and the variables that go from band to band."""


def copies(task: Task) -> int:
    """How many copies have slots: one per phase of x, one for y and one for the residual."""
    return len(task.window.phases) + 1 + (task.residual is not None) if task.window else 0


def slots(task: Task) -> int:
    """Slots of an argument block."""
    return SLOTS + copies(task) * len(Move)


class Images:
    """What stands around the product: copies in and out, the loop over bands, the loop over images."""

    def __init__(
        self, task: Task, window: Window, target: Target, channels: int | None = None, outputs: int | None = None,
        weights: int = 0,
    ) -> None:  # fmt: skip
        """``weights``: bytes from the values of an image to those of the next, for images that are channels."""
        self.task, self.window, self.target, self.weights = task, window, target, weights
        self.channels = window.channels(task.pattern.cols) if channels is None else channels
        self.outputs = task.pattern.rows if outputs is None else outputs
        self.x_copies = len(window.phases)
        self._band = -1

    def open(self, b: Builder) -> None:
        """At the top: the band's part of x and of the residual to planes."""
        for slot, variable in _CALL:
            b.emit("s_arg", d=S.TMP, disp=slot.byte)
            b.emit("s_put", a=S.TMP, disp=variable.byte)
        self._band = b.label("next band of rows")
        b.place(self._band)
        ends = [(Arg.Y_DIRECT, Arg.Y_HERE, Arg.Y_START, Arg.Y_PLANES)]
        ends += [(Arg.X_DIRECT, Arg.X_HERE, Arg.X_START, Arg.X_PLANES)] * (self.window.pitch > 0)
        ends += [(Arg.R_DIRECT, Arg.R_HERE, Arg.R_START, Arg.R_PLANES)] * (self.task.residual is not None)
        for direct, image, start, base in ends:
            there = b.label()
            b.emit("s_arg", d=S.TMP, disp=start.byte)
            b.emit("s_arg", d=S.T, disp=direct.byte)
            b.emit("jump_zero", a=S.T, disp=there)
            b.emit("s_add_arg", d=S.TMP, disp=image.byte)
            b.place(there)
            b.emit("s_put", a=S.TMP, disp=base.byte)
        for phase in range(self.x_copies):
            self._copy_in(
                b, phase, self.channels, Arg.X_HERE, f"pack x {self.window.phases[phase]}", self.window.stride[1]
            )
        if self.task.residual:
            self._copy_in(b, self.x_copies + 1, self.outputs, Arg.R_HERE, "pack residual", 1)

    def close(self, b: Builder) -> None:
        """At the end: y to the image; then the next band, then the next image."""
        self._copy_out(b, self.x_copies)
        size, image, done = 8 * slots(self.task), b.label("next image"), b.label()
        b.emit("s_arg", d=S.T, disp=Arg.MORE.byte)
        b.emit("jump_zero", a=S.T, disp=image)
        for slot in (*(variable for _, variable in _CALL), Arg.W):
            b.emit("s_arg", d=S.TMP, disp=slot.byte)
            b.emit("s_put", a=S.TMP, disp=size + slot.byte)
        b.emit("s_addi", d=S.ARGS, disp=size)
        b.emit("jump", disp=self._band)
        b.place(image)
        b.emit("s_arg", d=S.T, disp=Arg.IMAGES_LEFT.byte)
        b.emit("s_addi", d=S.T, disp=-1)
        b.emit("jump_zero", a=S.T, disp=done)
        moved = ((S.X, Arg.X_HERE, Arg.X_IMAGE), (S.Y, Arg.Y_HERE, Arg.Y_IMAGE), (S.PANEL, Arg.R_HERE, Arg.R_IMAGE))
        for register, slot, step in moved:
            b.emit("s_arg", d=register, disp=slot.byte)
            b.emit("s_add_arg", d=register, disp=step.byte)
        b.emit("s_add_arg", d=S.ARGS, disp=Arg.BACK.byte)
        for register, slot, _ in moved:
            b.emit("s_put", a=register, disp=slot.byte)
        b.emit("s_put", a=S.T, disp=Arg.IMAGES_LEFT.byte)
        if self.weights:
            b.emit("s_arg", d=S.TMP, disp=Arg.W_HERE.byte)
            b.emit("s_addi", d=S.TMP, disp=self.weights)
            b.emit("s_put", a=S.TMP, disp=Arg.W_HERE.byte)
        b.emit("jump", disp=self._band)
        b.place(done)

    # Registers of the copies: X and Y walk over channels of image and plane, W and PX3 over rows, PANEL and CONST
    # over the vectors of a row; T counts channels, K rows, PX vectors; PX5 and PX7 hold the pitches.

    def _copy_in(self, b: Builder, copy: int, channels: int, base: Arg, note: str, stride: int) -> None:
        """Rows of the image to planes, zeros around them."""
        if not channels:
            return
        channel = self._channels(b, copy, channels, base, note)
        width = self.target.tile_bytes
        b.emit("zero", d=1)
        b.emit("s_mov", d=S.PX3, a=S.Y)
        self._zeros(b, Move.ABOVE.byte(copy))
        b.emit("s_mov", d=S.PX3, a=S.Y)
        b.emit("s_add_arg", d=S.PX3, disp=Move.SKIP.byte(copy))

        def whole(b: Builder, source: S, target: S) -> None:
            b.emit("load", d=0, ptr=source)
            if stride == 2:
                b.emit("load", d=2, ptr=source, disp=width)
                b.emit("evens", d=0, a=0, b=2)
            b.emit("store", a=0, ptr=target)

        def last(b: Builder, source: S, target: S) -> None:
            if stride == 2:
                self._mask(b, copy, 0)
            b.emit("load_mask", d=0, ptr=source)
            if stride == 2:
                self._mask(b, copy, width)
                b.emit("load_mask", d=2, ptr=source, disp=width)
                b.emit("evens", d=0, a=0, b=2)
            b.emit("store", a=0, ptr=target)

        self._rows(b, copy, whole, last, stride * width if stride == 2 else width)
        self._zeros(b, Move.BELOW.byte(copy))
        self._next(b, copy, channel)

    def _copy_out(self, b: Builder, copy: int) -> None:
        """Rows of planes to the image."""
        if not self.outputs:
            return
        channel = self._channels(b, copy, self.outputs, Arg.Y_HERE, "unpack y")
        b.emit("s_mov", d=S.PX3, a=S.Y)

        def whole(b: Builder, image: S, plane: S) -> None:
            b.emit("load", d=0, ptr=plane)
            b.emit("store", a=0, ptr=image)

        def last(b: Builder, image: S, plane: S) -> None:
            b.emit("load", d=0, ptr=plane)
            b.emit("store_mask", a=0, ptr=image)

        self._rows(b, copy, whole, last, self.target.tile_bytes)
        self._next(b, copy, channel)

    def _mask(self, b: Builder, copy: int, disp: int) -> None:
        b.emit("s_arg", d=S.TMP, disp=Move.MASK.byte(copy))
        b.emit("set_mask", ptr=S.TMP, disp=disp)

    def _channels(self, b: Builder, copy: int, channels: int, base: Arg, note: str) -> int:
        """The top of the loop over channels, with W at the image's first row."""
        b.emit("s_arg", d=S.T, disp=Move.ROWS.byte(copy))
        b.emit("s_add_arg", d=S.T, disp=Move.ABOVE.byte(copy))
        b.emit("s_add_arg", d=S.T, disp=Move.BELOW.byte(copy))
        self._end = b.label()
        b.emit("jump_zero", a=S.T, disp=self._end)
        self._mask(b, copy, 0)
        for register, move in ((S.X, Move.FROM), (S.Y, Move.AT), (S.PX5, Move.ROW), (S.PX7, Move.PITCH)):
            b.emit("s_arg", d=register, disp=move.byte(copy))
        b.emit("s_add_arg", d=S.X, disp=base.byte)
        b.emit("s_set", d=S.T, disp=channels)
        channel = b.label(note)
        b.place(channel)
        b.emit("s_mov", d=S.W, a=S.X)
        return channel

    def _next(self, b: Builder, copy: int, channel: int) -> None:
        b.emit("s_add_arg", d=S.X, disp=Move.CHANNEL.byte(copy))
        b.emit("s_add_arg", d=S.Y, disp=Move.PLANE.byte(copy))
        b.emit("loop", a=S.T, disp=channel)
        b.place(self._end)

    def _zeros(self, b: Builder, count: int) -> None:
        top, end = b.label(), b.label()
        b.emit("s_arg", d=S.K, disp=count)
        b.emit("jump_zero", a=S.K, disp=end)
        b.place(top)
        b.emit("store", a=1, ptr=S.PX3)
        b.emit("s_addi", d=S.PX3, disp=self.target.tile_bytes)
        b.emit("loop", a=S.K, disp=top)
        b.place(end)

    def _rows(self, b: Builder, copy: int, whole: _Part, last: _Part, step: int) -> None:
        """All rows of a channel: ``whole`` vectors, ``last`` for what the mask leaves of the last one."""
        narrow, row, vector, end = b.label(), b.label(), b.label(), b.label()
        b.emit("s_arg", d=S.K, disp=Move.ROWS.byte(copy))
        b.emit("jump_zero", a=S.K, disp=end)
        b.emit("s_arg", d=S.PX, disp=Move.VECTORS.byte(copy))
        b.emit("jump_zero", a=S.PX, disp=narrow)
        b.place(row)
        b.emit("s_mov", d=S.PANEL, a=S.W)
        b.emit("s_mov", d=S.CONST, a=S.PX3)
        b.emit("s_arg", d=S.PX, disp=Move.VECTORS.byte(copy))
        b.place(vector)
        whole(b, S.PANEL, S.CONST)
        b.emit("s_addi", d=S.PANEL, disp=step)
        b.emit("s_addi", d=S.CONST, disp=self.target.tile_bytes)
        b.emit("loop", a=S.PX, disp=vector)
        last(b, S.PANEL, S.CONST)
        b.emit("s_add", d=S.W, a=S.PX5)
        b.emit("s_add", d=S.PX3, a=S.PX7)
        b.emit("loop", a=S.K, disp=row)
        b.emit("jump", disp=end)
        b.place(narrow)
        last(b, S.W, S.PX3)
        b.emit("s_add", d=S.W, a=S.PX5)
        b.emit("s_add", d=S.PX3, a=S.PX7)
        b.emit("loop", a=S.K, disp=narrow)
        b.place(end)


_Part = Callable[[Builder, S, S], None]
