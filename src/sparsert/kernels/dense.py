"""The looped form: C = act(A @ B + bias), dense, with run-time extents, as one native call.

One code object per epilogue serves every shape (design note 0015): for each number of rows of C that a block may have
there is a micro-kernel, which keeps the block's rows by two vectors of columns in registers. Loops around it:

    for matrix of the batch:
        for block of K:                  # C carries the sums
            for group of panels:         # of B, which stay in the second-level cache
                for block of rows:       # the first one packs B
                    for panel of columns: one micro-kernel

Elements of A are broadcast, B is loaded by vectors. Every output sums its products by rising k into one running sum,
which begins with the bias, or else with its first product: blocks change no bit. Sums of more than
:data:`~.plan.FOLD_TAPS` products are formed in pieces, as in the sparse form.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..codegen.vector import Builder, Program, S, check
from ..target import Target
from . import epilogue
from .dense_arguments import Form, Line, RowsLine, Slot
from .dense_image import stage
from .dense_micro import VECTORS, MicroKernels, Shape
from .layout import transpose4


@dataclass(frozen=True)
class Kernel:
    """The program of a form; ``rows`` is the most rows of a block."""

    program: Program
    rows: int


def generate(form: Form, target: Target) -> Kernel:
    """The vector program of ``form``: a few thousand rows, the same for every shape."""
    b = Builder()
    program = _Program(form, target, b)
    program.emit()
    finished = b.finish()
    check(finished)
    return Kernel(finished, program.rows)


_PANELS = ((VECTORS, False), *((v, True) for v in range(1, VECTORS + 1)))
"""Vectors and mask: whole panels, then the possible last ones."""


_STEPPED = ("A", "B", "C", "R", "BIAS")
"""What lies elsewhere for each matrix of a batch."""


class _Program(MicroKernels):
    """Loops around the micro-kernels, and what packs for them."""

    def __init__(self, form: Form, target: Target, b: Builder) -> None:
        super().__init__(form, target, b)
        self.packs_first = form.b == "transposed"
        self.choose: dict[tuple[int, bool, bool], int] = {}

    # ---- loops -----------------------------------------------------------------------------------------------------
    def emit(self) -> None:
        b = self.b
        packing = (False,) if self.packs_first or self.turned else (False, True)
        kinds = [(*panel, packs) for panel in _PANELS for packs in packing]
        self.choose = {kind: b.label() for kind in kinds}
        pack = {v: b.label("pack transposed B") for v in range(1, VECTORS + 1)}
        b.emit("enter")
        self.copy(*((Slot[f"{name}_MATRIX"], Slot[name]) for name in _STEPPED), (Slot.MATRICES_LEFT, Slot.BATCH))
        matrix = b.label("matrix of the batch")
        b.place(matrix)
        self._matrix(pack)
        self.advance(*((Slot[f"{name}_MATRIX"], Slot[f"{name}_BATCH"]) for name in _STEPPED))
        self.repeat(Slot.MATRICES_LEFT, matrix)
        b.emit("leave")
        if self.packs_first:
            for vectors, label in pack.items():
                b.place(label)
                self._pack_transposed(vectors)
                b.emit("ret")
        else:
            for label in pack.values():
                b.place(label)
        for kind, label in self.choose.items():
            kernels = [(b.label(str(shape)), shape) for shape in
                       (Shape(rows, *kind) for rows in range(self.rows, 0, -1))]  # fmt: skip
            b.place(label)
            for at, (kernel, _) in enumerate(kernels):
                if at:
                    b.emit("s_addi", d=S.TMP, disp=-1)
                b.emit("jump_zero", a=S.TMP, disp=kernel)
            b.emit("ret")  # no block has no rows
            for kernel, shape in kernels:
                b.emit("align", disp=16)
                b.place(kernel)
                self.kernel(shape)
                b.emit("ret")
        for vectors, label in self.finish.items():
            b.place(label)
            if self.activation is not None:
                epilogue.apply(b, self.activation, self.rows * vectors, {})
            b.emit("ret")

    def _matrix(self, pack: dict[int, int]) -> None:
        """All blocks of K of one matrix."""
        b = self.b
        self.copy((Slot.A_BLOCK, Slot.A_MATRIX), (Slot.B_BLOCK, Slot.B_MATRIX), (Slot.START, Slot.ZERO),
                  (Slot.FINAL, Slot.ZERO), (Slot.K_LEFT, Slot.K_BLOCKS), (Slot.NOW_TURNS, Slot.TURNS),
                  (Slot.NOW_REST, Slot.REST), (Slot.NOW_GROUPS, Slot.K_GROUPS), (Slot.NOW_K_TAIL, Slot.K_TAIL),
                  (Slot.NOW_K_MASK, Slot.K_MASK))  # fmt: skip
        if self.image or self.turned:
            self.copy((Slot.LINE, Slot.LINES), (Slot.TAPS_AT, Slot.TAPS))
            stage(b, self.form, self.target)
        block, last, panels = b.label("block of K"), b.label("last block of K"), b.label()
        b.place(block)
        self.unless(Slot.K_LEFT, last)
        self.get(S.T, Slot.K_LEFT)
        b.emit("s_addi", d=S.T, disp=-1)
        self.put(S.T, Slot.K_LEFT)
        b.emit("jump", disp=panels)
        b.place(last)
        self.copy((Slot.FINAL, Slot.ONE), (Slot.NOW_TURNS, Slot.LAST_TURNS), (Slot.NOW_REST, Slot.LAST_REST),
                  (Slot.NOW_GROUPS, Slot.LAST_K_GROUPS), (Slot.NOW_K_TAIL, Slot.LAST_K_TAIL),
                  (Slot.NOW_K_MASK, Slot.LAST_K_MASK))  # fmt: skip
        b.place(panels)
        if self.image:
            self._line()
        self._panels(pack)
        self.advance((Slot.A_BLOCK, Slot.A_K), (Slot.B_BLOCK, Slot.B_K))
        self.copy((Slot.START, Slot.NEXT))
        if self.image:
            self.advance((Slot.TAPS_AT, Slot.TAPS_K))
        if self.turned:
            self.advance((Slot.LINE, Slot.LINES_K))
        self.unless(Slot.FINAL, block)

    def _line(self) -> None:
        """What the line of this block of K says."""
        b = self.b
        self.get(S.T, Slot.LINE)
        for slot, word in ((Slot.NOW_TURNS, Line.TURNS), (Slot.NOW_REST, Line.REST), (Slot.A_K, Line.A),
                           (Slot.TAPS_K, Line.TAPS)):  # fmt: skip
            b.emit("s_load", d=S.TMP, ptr=S.T, disp=word.byte)
            self.put(S.TMP, slot)
        b.emit("s_addi", d=S.T, disp=8 * len(Line))
        self.put(S.T, Slot.LINE)

    def _line_of_rows(self) -> None:
        """What the line of this block of rows says."""
        b = self.b
        self.get(S.T, Slot.LINE_ROWS)
        for slot, word in ((Slot.NOW_TURNS, RowsLine.TURNS), (Slot.NOW_REST, RowsLine.REST),
                           (Slot.TAPS_AT, RowsLine.TAPS), (Slot.AHEAD_STEP, RowsLine.AHEAD_STEP)):  # fmt: skip
            b.emit("s_load", d=S.TMP, ptr=S.T, disp=word.byte)
            self.put(S.TMP, slot)
        for slot, word, base in ((Slot.BIAS_ROWS, RowsLine.BIAS, Slot.BIAS_HERE),
                                 (Slot.AHEAD, RowsLine.AHEAD, Slot.B_HERE)):  # fmt: skip
            b.emit("s_load", d=S.TMP, ptr=S.T, disp=word.byte)
            b.emit("s_add_arg", d=S.TMP, disp=base.byte)
            self.put(S.TMP, slot)
        b.emit("s_addi", d=S.T, disp=8 * len(RowsLine))
        self.put(S.T, Slot.LINE_ROWS)

    def _panels(self, pack: dict[int, int]) -> None:
        """All panels of columns, for one block of K: groups of whole ones, then the last one if it is narrower."""
        b = self.b
        if self.form.a == "rows":
            self._copy_a()
        here = ("B_HERE", "C_HERE", "R_HERE", "BIAS_HERE") + self.image * ("VIEWS_HERE",)
        start = (Slot.B_BLOCK, Slot.C_MATRIX, Slot.R_MATRIX, Slot.BIAS_MATRIX) + self.image * (Slot.VIEWS,)
        self.copy(*zip((Slot[name] for name in here), start, strict=True), (Slot.GROUPS_LEFT, Slot.GROUPS),
                  (Slot.IN_TAIL, Slot.ZERO))  # fmt: skip
        tail, group, whole, end = b.label("last panel"), b.label("group of panels"), b.label(), b.label()
        self.unless(Slot.GROUPS_LEFT, tail)
        b.place(group)
        self.copy((Slot.PANELS_NOW, Slot.GROUP))
        self.get(S.T, Slot.GROUPS_LEFT)
        b.emit("s_addi", d=S.T, disp=-1)
        last = b.label()
        b.emit("jump_zero", a=S.T, disp=last)
        b.emit("jump", disp=whole)
        b.place(last)
        self.copy((Slot.PANELS_NOW, Slot.LAST_GROUP))
        b.place(whole)
        self.copy((Slot.AHEAD_FROM, Slot.B_HERE))
        if self.ahead:
            self.advance((Slot.AHEAD_FROM, Slot.B_GROUP))
        self._rows(VECTORS, False, Slot.PACK, pack)
        self.advance(*((Slot[name], Slot[name.replace("HERE", "GROUP")]) for name in here))
        self.repeat(Slot.GROUPS_LEFT, group)
        b.place(tail)
        self.copy(*zip((Slot[name] for name in here), start, strict=True), (Slot.PANELS_NOW, Slot.ONE_PANEL),
                  (Slot.IN_TAIL, Slot.ONE_PANEL))  # fmt: skip
        self.advance(*((Slot[name], Slot[name.replace("HERE", "TAIL")]) for name in here))
        for vectors, masked in _PANELS[1:]:
            other, taken = b.label(), b.label()
            self.get(S.T, Slot.TAIL)
            b.emit("s_addi", d=S.T, disp=-vectors)
            b.emit("jump_zero", a=S.T, disp=taken)
            b.emit("jump", disp=other)
            b.place(taken)
            self._rows(vectors, masked, Slot.PACK_TAIL, pack)
            b.emit("jump", disp=end)
            b.place(other)
        b.place(end)

    def _rows(self, vectors: int, masked: bool, packs: Slot, pack: dict[int, int]) -> None:
        """All blocks of rows, for a group of panels of columns."""
        b, width = self.b, vectors * self.tile
        if self.packs_first:
            again = b.label("pack a panel of B")
            self.copy((Slot.B_NEXT, Slot.B_HERE), (Slot.PANEL_AT, Slot.PANEL), (Slot.PANELS_LEFT, Slot.PANELS_NOW))
            b.place(again)
            b.emit("call", disp=pack[vectors])
            self.advance((Slot.B_NEXT, Slot.B_PANEL), (Slot.PANEL_AT, Slot.PANEL_STEP))
            self.repeat(Slot.PANELS_LEFT, again)
            self._packed(width)
        else:
            self.copy((Slot.B_NEXT, Slot.B_HERE), (Slot.B_STEP, Slot.B_PITCH),
                      (Slot.B_ACROSS, Slot.B_PANEL), (Slot.PACKING, packs))  # fmt: skip
        first = Slot.A_FROM if self.form.a == "rows" else Slot.A_BLOCK
        self.copy((Slot.A_AT, first), (Slot.C_ROWS, Slot.C_HERE), (Slot.R_ROWS, Slot.R_HERE),
                  (Slot.BIAS_ROWS, Slot.BIAS_HERE), *(self.turned * ((Slot.LINE_ROWS, Slot.LINE),)),
                  (Slot.AHEAD_LINE, Slot.AHEADS))  # fmt: skip
        for size in ("LARGE", "SMALL"):
            over, rows = b.label(), b.label(f"{size.lower()} blocks of rows")
            self.unless(Slot[size], over)
            self.copy((Slot.ROWS_LEFT, Slot[size]))
            b.place(rows)
            if self.turned:
                self._line_of_rows()
            elif self.ahead:
                self._next_ahead()
            self.copy((Slot.B_AT, Slot.B_NEXT), (Slot.C_AT, Slot.C_ROWS), (Slot.R_AT, Slot.R_ROWS),
                      (Slot.BIAS_AT, Slot.BIAS_ROWS), (Slot.PANELS_LEFT, Slot.PANELS_NOW))  # fmt: skip
            plain, after = b.label(), b.label()
            across = ((Slot.C_AT, Slot.C_PANEL), (Slot.R_AT, Slot.R_PANEL), (Slot.BIAS_AT, Slot.BIAS_PANEL))
            if not (self.packs_first or self.turned):
                again = b.label()
                self.unless(Slot.PACKING, plain)
                views = self.image * ((Slot.VIEWS_AT, Slot.VIEWS_HERE),)
                self.copy((Slot.PANEL_AT, Slot.PANEL), *views)
                b.place(again)
                self.get(S.TMP, Slot[f"SKIP_{size}"])
                b.emit("call", disp=self.choose[vectors, masked, True])
                views = self.image * ((Slot.VIEWS_AT, Slot.VIEWS_PANEL),)
                self.advance((Slot.B_AT, Slot.B_PANEL), (Slot.PANEL_AT, Slot.PANEL_STEP), *across, *views)
                self.repeat(Slot.PANELS_LEFT, again)
                self.copy((Slot.PACKING, Slot.ZERO))
                self._packed(width)
                b.emit("jump", disp=after)
            b.place(plain)
            self.get(S.TMP, Slot[f"SKIP_{size}"])
            b.emit("call", disp=self.choose[vectors, masked, False])
            self.advance((Slot.B_AT, Slot.B_ACROSS), *across, *(self.ahead * ((Slot.AHEAD, Slot.B_PANEL),)))
            self.repeat(Slot.PANELS_LEFT, plain)
            b.place(after)
            self.advance((Slot.A_AT, Slot[f"A_{size}"]), *((Slot[f"{name}_ROWS"], Slot[f"{name}_{size}"])
                                                           for name in ("C", "R", "BIAS")))  # fmt: skip
            self.repeat(Slot.ROWS_LEFT, rows)
            b.place(over)

    def _next_ahead(self) -> None:
        """Which part of the next group of panels this block of rows prefetches."""
        b = self.b
        self.get(S.T, Slot.AHEAD_LINE)
        b.emit("s_load", d=S.TMP, ptr=S.T)
        b.emit("s_add_arg", d=S.TMP, disp=Slot.AHEAD_FROM.byte)
        self.put(S.TMP, Slot.AHEAD)
        b.emit("s_addi", d=S.T, disp=8)
        self.put(S.T, Slot.AHEAD_LINE)

    def _packed(self, width: int) -> None:
        """From now on B is read from its panels."""
        self.copy((Slot.B_NEXT, Slot.PANEL), (Slot.B_ACROSS, Slot.PANEL_STEP))
        self.b.emit("s_set", d=S.TMP, disp=width)
        self.put(S.TMP, Slot.B_STEP)

    def _copy_a(self) -> None:
        """The rows of A to scratch, where its own pitch would put them all into the same few sets of a cache."""
        b = self.b
        done, line, turn, rest, next_line = (b.label(note) for note in ("", "copy A", "", "", ""))
        self.copy((Slot.A_FROM, Slot.A_BLOCK))
        self.unless(Slot.COPY_A, done)
        self.copy((Slot.ROWS_LEFT, Slot.COPY_A), (Slot.A_FROM, Slot.A_COPY))
        self.get(S.CONST, Slot.A_BLOCK)
        self.get(S.PANEL, Slot.A_COPY)
        self.get(S.TMP, Slot.NOW_K_MASK)
        b.emit("set_mask", ptr=S.TMP)
        b.place(line)
        b.emit("s_mov", d=S.X, a=S.CONST)
        b.emit("s_mov", d=S.Y, a=S.PANEL)
        self.get(S.T, Slot.NOW_GROUPS)
        b.emit("jump_zero", a=S.T, disp=rest)
        b.place(turn)
        b.emit("load", d=0, ptr=S.X)
        b.emit("store", a=0, ptr=S.Y)
        b.emit("s_addi", d=S.X, disp=self.tile)
        b.emit("s_addi", d=S.Y, disp=self.tile)
        b.emit("loop", a=S.T, disp=turn)
        b.place(rest)
        self.unless(Slot.NOW_K_TAIL, next_line)
        b.emit("load_mask", d=0, ptr=S.X)
        b.emit("store_mask", a=0, ptr=S.Y)
        b.place(next_line)
        b.emit("s_add_arg", d=S.CONST, disp=Slot.A_SOURCE.byte)
        b.emit("s_add_arg", d=S.PANEL, disp=Slot.A_PITCH.byte)
        self.repeat(Slot.ROWS_LEFT, line)
        b.place(done)

    # ---- packing a transposed B ------------------------------------------------------------------------------------
    def _pack_transposed(self, vectors: int) -> None:
        """PANEL[k][n] = B[n][k]: vectors of k from four rows, 4x4 blocks transposed, quarters stored.

        The last four rows of B overlap those before. Where the panel has fewer than four, elements in front of it
        are written: the padding of the row before, which nothing reads, and 12 bytes in front of the first.
        """
        b = self.b
        self.get(S.PX, Slot.B_PITCH)
        for register, factor in ((S.PX3, 3), (S.PX5, 5), (S.PX7, 7)):
            b.emit("s_muli", d=register, a=S.PX, disp=factor)
        self.get(S.TMP, Slot.NOW_K_MASK)
        b.emit("set_mask", ptr=S.TMP)
        self.get(S.CONST, Slot.B_NEXT)  # the four rows of B,
        self.get(S.PANEL, Slot.PANEL_AT)  # and their place in the panel
        quad, last, end = b.label(), b.label(), b.label()
        if vectors == VECTORS:  # a whole panel, or the last one
            b.emit("s_set", d=S.K, disp=VECTORS * self.target.lanes // 4)
            self.unless(Slot.IN_TAIL, quad)
        self.get(S.K, Slot.QUADS)
        b.emit("jump_zero", a=S.K, disp=last)
        b.place(quad)
        self._pack_quad(vectors)
        for register, step in ((S.CONST, Slot.QUAD_PITCH), (S.PANEL, Slot.SIXTEEN)):
            b.emit("s_add_arg", d=register, disp=step.byte)
        b.emit("loop", a=S.K, disp=quad)
        b.place(last)
        self.unless(Slot.IN_TAIL, end)
        self.unless(Slot.OVERLAP, end)
        b.emit("s_add_arg", d=S.PANEL, disp=Slot.OVERLAP.byte)
        b.emit("s_add_arg", d=S.CONST, disp=Slot.OVERLAP_PITCH.byte)
        self._pack_quad(vectors)
        b.place(end)

    def _pack_quad(self, vectors: int) -> None:
        """Four rows of B at CONST to four columns of the panel at PANEL."""
        b, width = self.b, vectors * self.tile
        turn, rest, end = b.label(), b.label(), b.label()
        b.emit("s_mov", d=S.X, a=S.CONST)
        b.emit("s_mov", d=S.Y, a=S.PANEL)
        self.get(S.T, Slot.NOW_GROUPS)
        b.emit("jump_zero", a=S.T, disp=rest)
        for load in ("load", "load_mask"):
            if load == "load":
                b.place(turn)
            else:
                b.place(rest)
                self.unless(Slot.NOW_K_TAIL, end)
            for i in range(4):
                b.emit(load, d=i, ptr=S.X, step=i)
            transpose4(b)
            for k in range(self.target.lanes):
                b.emit("store4", a=k % 4, b=k // 4, ptr=S.Y, disp=k * width)
            if load == "load":
                b.emit("s_addi", d=S.X, disp=self.tile)
                b.emit("s_addi", d=S.Y, disp=self.target.lanes * width)
                b.emit("loop", a=S.T, disp=turn)
        b.place(end)
