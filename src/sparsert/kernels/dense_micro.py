"""The micro-kernel of the looped form: a block of rows by one or two vectors of columns, kept in registers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..codegen.registers import Operand, Recorder, Template, assign
from ..codegen.vector import Builder, Row, S, row
from ..target import Target
from .activations import ACTIVATIONS
from .dense_arguments import Form, Slot, Tap
from .dense_image import load_tap, look_ahead, next_taps, reach_tap, walk_taps

UNROLL = 4
"""Steps of k in one turn of the inner loop."""
VECTORS = 2
"""Vectors of a panel of columns."""
_NEGATIVE_ZERO = 0x80000000  # a sum that starts with it has the bits of its first product, the sign of zeros too


def most_rows(form: Form, target: Target) -> int:
    """Rows of the largest block: accumulators beside two vectors of B, a broadcast element, a mask and the epilogue."""
    code = _activation(form, target, Builder())
    return (target.registers - max(4, code.registers if code else 0) - target.scratch) // VECTORS


def _activation(form: Form, target: Target, b: Builder) -> Template | None:
    if form.activation is None:
        return None
    v = Recorder()
    value: Operand = ACTIVATIONS[form.activation].function(v, v.input(), *form.parameters)
    return assign(v, value, b, 4, target.addend_only)


@dataclass(frozen=True)
class Shape:
    """A micro-kernel: rows, vectors, whether the last one is masked, and whether B is packed on the way."""

    rows: int
    vectors: int
    masked: bool
    packs: bool

    def accumulator(self, i: int, j: int) -> int:
        return i * self.vectors + j

    def __str__(self) -> str:
        return f"{self.rows} rows x {self.vectors} vectors{', masked' * self.masked}{', packs B' * self.packs}"


class MicroKernels:
    """Emits the micro-kernels of a form, and what reads and writes the slots of an argument block."""

    def __init__(self, form: Form, target: Target, b: Builder) -> None:
        self.form, self.target, self.b = form, target, b
        self.tile = target.tile_bytes
        self.activation = _activation(form, target, b)
        self.rows = most_rows(form, target)
        self.source = VECTORS * self.rows  # vectors of B behind the accumulators, then the element of A
        self.element = self.source + VECTORS
        self.ahead = form.a == "columns" and form.b == "rows"  # and there are registers to spare
        self.finish = {v: b.label(f"activation of {self.rows}x{v}") for v in range(1, VECTORS + 1)}
        self.image, self.turned = form.b == "image", form.a == "image"

    # ---- short words for rows of the program -----------------------------------------------------------------------
    def get(self, register: S, slot: Slot) -> None:
        self.b.emit("s_arg", d=register, disp=slot.byte)

    def put(self, register: S, slot: Slot) -> None:
        self.b.emit("s_put", a=register, disp=slot.byte)

    def copy(self, *pairs: tuple[Slot, Slot]) -> None:
        """Slots from slots."""
        for to, source in pairs:
            self.get(S.TMP, source)
            self.put(S.TMP, to)

    def advance(self, *pairs: tuple[Slot, Slot]) -> None:
        for variable, step in pairs:
            self.get(S.TMP, variable)
            self.b.emit("s_add_arg", d=S.TMP, disp=step.byte)
            self.put(S.TMP, variable)

    def unless(self, slot: Slot, label: int) -> None:
        """To ``label`` if the slot holds 0."""
        self.get(S.TMP, slot)
        self.b.emit("jump_zero", a=S.TMP, disp=label)

    def repeat(self, slot: Slot, label: int) -> None:
        """Count down; to ``label`` until 0 is reached."""
        self.get(S.T, slot)
        self.b.emit("s_addi", d=S.T, disp=-1)
        self.put(S.T, slot)
        out = self.b.label()
        self.b.emit("jump_zero", a=S.T, disp=out)
        self.b.emit("jump", disp=label)
        self.b.place(out)

    # ---- the micro-kernel ------------------------------------------------------------------------------------------
    def kernel(self, shape: Shape) -> None:
        b = self.b
        if shape.masked:
            self._mask()
        self._start(shape)
        for register, slot in ((S.Y, Slot.A_AT), (S.PX, Slot.A_PITCH), (S.W, Slot.B_AT), (S.PY, Slot.B_STEP)):
            self.get(register, slot)
        if self.turned:
            walk_taps(b)
        elif self.form.a == "rows":
            for register, slot in ((S.PX3, Slot.A_PITCH3), (S.PX5, Slot.A_PITCH5), (S.PX7, Slot.A_PITCH7)):
                self.get(register, slot)
        else:
            b.emit("s_mov", d=S.X, a=S.Y)
        if shape.packs:
            self.get(S.PANEL, Slot.PANEL_AT)
        if shape.packs and self.image:
            next_taps(b)
        if self.ahead and not shape.packs:
            self.get(S.PX7, Slot.AHEAD)
            self.get(S.PX5, Slot.AHEAD_STEP)
        for steps, count in ((UNROLL, Slot.NOW_TURNS), (1, Slot.NOW_REST)):
            over, turn = b.label(), b.label()
            self.get(S.K, count)
            b.emit("jump_zero", a=S.K, disp=over)
            if steps > 1:
                b.emit("align", disp=16)
            b.place(turn)
            b.emit_rows(tuple(self._steps(shape, steps)))
            b.emit("loop", a=S.K, disp=turn)
            b.place(over)
        self._finish(shape)

    def _steps(self, shape: Shape, steps: int) -> Iterator[Row]:
        """``steps`` of k: vectors of B, and for every row an element of A times each."""
        rows = self.form.a == "rows"
        if rows:
            yield row("s_mov", d=S.X, a=S.Y)
            yield row("s_addi", d=S.Y, disp=4 * steps)
        for k in range(steps):
            if self.turned:
                yield from reach_tap(k)
            if shape.packs and self.image:
                yield from load_tap(k, range(self.source, self.source + shape.vectors), self.target)
            else:
                for j in range(shape.vectors):
                    masked = shape.packs and shape.masked and j == shape.vectors - 1
                    yield row("load_mask" if masked else "load", d=self.source + j, disp=j * self.tile,
                              ptr=S.PX5 if self.turned else S.W)  # fmt: skip
            if shape.packs:
                for j in range(shape.vectors):
                    yield row("store", a=self.source + j, ptr=S.PANEL, disp=(k * shape.vectors + j) * self.tile)
            if not (self.turned or (shape.packs and self.image)):
                yield row("s_add", d=S.W, a=S.PY)
            order = range(shape.rows)
            for i in reversed(order) if rows and k % 2 else order:  # fewer moves of a base that reaches eight rows
                where = {"step": i, "disp": 4 * k} if rows else {"disp": 4 * i}
                yield row("bcast", d=self.element, ptr=S.PX3 if self.turned else S.X, **where)
                for j in range(shape.vectors):
                    yield row("fma_acc", d=shape.accumulator(i, j), a=self.source + j, b=self.element)
            if self.form.a == "columns":
                yield row("s_add", d=S.X, a=S.PX)
        if shape.packs:
            yield row("s_addi", d=S.PANEL, disp=steps * shape.vectors * self.tile)
        if self.turned and steps > 1:
            yield from look_ahead(S.PX)
        if self.ahead and not shape.packs and steps > 1:
            yield from look_ahead(S.PX5)
        if self.turned or (shape.packs and self.image):
            yield row("s_addi", d=S.CONST, disp=8 * len(Tap) * steps)

    def _mask(self) -> None:
        self.get(S.TMP, Slot.MASK)
        self.b.emit("set_mask", ptr=S.TMP)

    def _each(self, shape: Shape, address: Slot, pitch: Slot) -> Iterator[tuple[int, int, bool]]:
        """Walk Y over the block's part of an array: accumulators, displacement, and whether it is masked."""
        self.get(S.Y, address)
        self.get(S.PY, pitch)
        for i in range(shape.rows):
            for j in range(shape.vectors):
                yield shape.accumulator(i, j), j * self.tile, shape.masked and j == shape.vectors - 1
            if i < shape.rows - 1:
                self.b.emit("s_add", d=S.Y, a=S.PY)

    def _start(self, shape: Shape) -> None:
        """The accumulators: the bias, the sums of the blocks of K before, or what gives the first product's bits."""
        b, bias = self.b, self.form.bias
        fresh, carried, go = b.label(), b.label(), b.label()
        accumulators = [(shape.accumulator(i, j), i, j) for i in range(shape.rows) for j in range(shape.vectors)]
        self.get(S.TMP, Slot.START)
        b.emit("jump_zero", a=S.TMP, disp=fresh)
        b.emit("s_addi", d=S.TMP, disp=-1)
        b.emit("jump_zero", a=S.TMP, disp=carried)
        if bias is not None:  # else 2 is 0
            self._nothing(shape)
            b.emit("jump", disp=go)
        b.place(fresh)
        if bias is None:
            self._nothing(shape)
        else:
            self.get(S.Y, Slot.BIAS_AT)
            for accumulator, i, j in accumulators:
                if bias == "rows":
                    b.emit("mov" if j else "bcast", d=accumulator, a=accumulator - j, ptr=S.Y, disp=0 if j else 4 * i)
                elif i:
                    b.emit("mov", d=accumulator, a=j)
                else:
                    masked = shape.masked and j == shape.vectors - 1
                    b.emit("load_mask" if masked else "load", d=accumulator, ptr=S.Y, disp=j * self.tile)
        b.emit("jump", disp=go)
        b.place(carried)
        for accumulator, disp, masked in self._each(shape, Slot.C_AT, Slot.C_PITCH):
            b.emit("load_mask" if masked else "load", d=accumulator, ptr=S.Y, disp=disp)
        b.place(go)

    def _nothing(self, shape: Shape) -> None:
        b = self.b
        b.emit("s_const", d=S.CONST)
        b.emit("const", d=0, b=-1 - b.constant(_NEGATIVE_ZERO))
        for accumulator in range(1, shape.rows * shape.vectors):
            b.emit("mov", d=accumulator, a=0)

    def _finish(self, shape: Shape) -> None:
        """Sums of pieces added up, the epilogue behind the last block of K, and the stores."""
        b, form, other = self.b, self.form, self.element
        whole, raw = b.label(), b.label()
        if shape.masked:
            self._mask()
        self.get(S.TMP, Slot.START)
        for _ in range(2):
            b.emit("jump_zero", a=S.TMP, disp=whole)
            b.emit("s_addi", d=S.TMP, disp=-1)
        for accumulator, disp, masked in self._each(shape, Slot.C_AT, Slot.C_PITCH):
            b.emit("load_mask" if masked else "load", d=other, ptr=S.Y, disp=disp)
            b.emit("add", d=accumulator, a=accumulator, b=other)
        b.place(whole)
        self.unless(Slot.FINAL, raw)
        if form.scale:
            self.get(S.Y, Slot.BIAS_AT)
            b.emit("bcast", d=other, ptr=S.Y)
            for accumulator in range(shape.rows * shape.vectors):
                b.emit("mul", d=accumulator, a=accumulator, b=other)
        if form.residual == "before":
            self._residual(shape)
        if self.activation is not None:
            for accumulator in range(shape.rows * shape.vectors, self.rows * shape.vectors):
                b.emit("zero", d=accumulator)  # the activation is applied to all of them
            b.emit("call", disp=self.finish[shape.vectors])
            if shape.masked:
                self._mask()
        if form.residual == "after":
            self._residual(shape)
        b.place(raw)
        for accumulator, disp, masked in self._each(shape, Slot.C_AT, Slot.C_PITCH):
            b.emit("store_mask" if masked else "store", a=accumulator, ptr=S.Y, disp=disp)

    def _residual(self, shape: Shape) -> None:
        for accumulator, disp, masked in self._each(shape, Slot.R_AT, Slot.R_PITCH):
            self.b.emit("load_mask" if masked else "load", d=self.element, ptr=S.Y, disp=disp)
            self.b.emit("add", d=accumulator, a=accumulator, b=self.element)
