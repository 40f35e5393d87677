"""Dense products as native calls: the looped form bound to arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..codegen.assemble import assemble, listing
from ..codegen.vector import Program
from ..errors import InternalError
from ..kernels.dense import generate
from ..kernels.dense_arguments import Form, Slot
from ..kernels.dense_micro import UNROLL, VECTORS
from ..kernels.layout import TransposeArg, transpose_slots, transposition
from ..kernels.plan import fold_width
from ..runtime.cpu import Executable, Frame, address_of
from ..runtime.memory import aligned_empty
from ..schedule.dense import DenseSchedule, choose, conflicts, turns
from ..schedule.task import Task
from ..sparsity.pattern import SparseMatrix
from ..target import Target
from .arrays import Array
from .dense_parts import RANGES, Blocks, Extents, Parts, Share, Shareable, Shift, blocks_of_rows, described, share_out
from .team import Crew

SHAPES = 32  # shapes and pitches whose frames are kept


@dataclass(frozen=True, eq=False)
class Code:
    """The machine code of one form, which serves every shape."""

    form: Form
    target: Target
    rows: int
    executable: Executable
    size: int
    instructions: int


@lru_cache(64)
def code_of(form: Form, target: Target) -> Code:
    """Code for ``form``, generated once per process."""
    kernel = generate(form, target)
    code = assemble(kernel.program, target.isa)
    return Code(form, target, kernel.rows, Executable(code.code), len(code.code), code.instructions)


def spread_pitch(floats: int) -> int:
    """The pitch in bytes of rows of so many floats that fall into different sets of a cache: an odd number of lines."""
    return -(-4 * floats // 128) * 128 + 64


def frame(code: Code, e: Extents, schedule: DenseSchedule, blocks: Blocks | None = None) -> Frame:
    """An argument block and scratch for such arrays, all but the addresses filled in; ``blocks``: of rows."""
    lanes, tile, form = code.target.lanes, code.target.tile_bytes, code.form
    width = VECTORS * lanes
    kc = min(schedule.k_block, e.k)
    last = e.k - (-(-e.k // kc) - 1) * kc
    panels, rest = divmod(e.n, width)
    groups = -(-panels // schedule.panels)
    group = -(-panels // groups) if groups else 0
    large, small, size = blocks or blocks_of_rows(e.m, code.rows)
    transposed, rows, packed = form.b == "transposed", form.a == "rows", e.panel > 0
    copied = rows and (schedule.copy or conflicts(e.a_pitch, size, code.target)) and e.n > width
    a_pitch = spread_pitch(kc) if copied else e.a_pitch
    panel_bytes = 4 * width * kc
    scratch = 0 if packed else max(group, 1) * kc * width + lanes * width
    result = Frame(len(Slot), 4 * lanes + scratch + (e.m * a_pitch // 4 if copied else 0))
    s, at = result.slots, address_of(result.scratch)
    masks = result.scratch[: 3 * lanes].view(np.int32).reshape(3, lanes)
    for mask, count in zip(masks, ((e.n - 1) % lanes + 1, kc % lanes, last % lanes), strict=True):
        mask[:] = np.where(np.arange(lanes) < count, -1, 0)
    for n, slot in zip((1, 3, 5, 7), (Slot.A_PITCH, Slot.A_PITCH3, Slot.A_PITCH5, Slot.A_PITCH7), strict=True):
        s[slot] = n * a_pitch
    overlap = -rest % 4 if rest % 4 else 0
    across = {
        "B": e.panel or (width * e.b_pitch if transposed else 4 * width), "C": 4 * width, "R": 4 * width,
        "BIAS": 4 * width if form.bias == "columns" else 0,
    }  # fmt: skip
    for name, step in across.items():
        s[Slot[f"{name}_PANEL"]], s[Slot[f"{name}_GROUP"]], s[Slot[f"{name}_TAIL"]] = step, group * step, panels * step
    values = {
        Slot.B_PITCH: e.b_pitch, Slot.C_PITCH: e.c_pitch, Slot.R_PITCH: e.r_pitch,
        Slot.A_BATCH: e.a_batch, Slot.B_BATCH: e.b_batch, Slot.C_BATCH: e.c_batch, Slot.R_BATCH: e.r_batch,
        Slot.BIAS_BATCH: e.bias_batch,
        Slot.A_K: kc * 4 if rows else kc * e.a_pitch, Slot.B_K: kc * (4 if transposed else e.b_pitch),
        Slot.BATCH: e.batch, Slot.K_BLOCKS: -(-e.k // kc) - 1, Slot.TAIL: -(-rest // lanes),
        Slot.GROUPS: groups, Slot.GROUP: group, Slot.LAST_GROUP: panels - (groups - 1) * group, Slot.ONE_PANEL: 1,
        Slot.LARGE: large, Slot.SMALL: small, Slot.SKIP_LARGE: code.rows - size, Slot.SKIP_SMALL: code.rows - size + 1,
        Slot.TURNS: kc // UNROLL, Slot.REST: kc % UNROLL,
        Slot.LAST_TURNS: last // UNROLL, Slot.LAST_REST: last % UNROLL, Slot.NEXT: 2 if schedule.anew else 1,
        Slot.PACK: int(not packed and large + small > 1), Slot.PACK_TAIL: int(not packed),
        Slot.PANEL: at + 4 * tile, Slot.PANEL_STEP: panel_bytes, Slot.MASK: at,  # the fourth vector: note in pack
        Slot.COPY_A: e.m if copied else 0, Slot.A_SOURCE: e.a_pitch, Slot.A_COPY: at + 4 * tile + 4 * scratch,
        Slot.K_GROUPS: kc // lanes, Slot.LAST_K_GROUPS: last // lanes, Slot.K_TAIL: kc % lanes,
        Slot.LAST_K_TAIL: last % lanes, Slot.K_MASK: at + tile, Slot.LAST_K_MASK: at + 2 * tile,
        Slot.QUADS: rest // 4, Slot.OVERLAP: -4 * overlap, Slot.OVERLAP_PITCH: -overlap * e.b_pitch,
        Slot.QUAD_PITCH: 4 * e.b_pitch, Slot.SIXTEEN: 16, Slot.ONE: 1,
    }  # fmt: skip
    for slot, value in values.items():
        s[slot] = value
    if form.a == "columns" and form.b == "rows":
        # Blocks of rows behind the first, UNROLL of them, prefetch what the first will pack of the next group.
        aheads = aligned_empty(large + small, np.int64)
        aheads[:] = (np.arange(large + small) - 1) % UNROLL * e.b_pitch
        result.kept, s[Slot.AHEADS], s[Slot.AHEAD_STEP] = aheads, address_of(aheads), UNROLL * e.b_pitch
    for name, count in (("LARGE", size), ("SMALL", size - 1)):
        s[Slot[f"A_{name}"]] = e.a_block or count * (a_pitch if rows else 4)
        s[Slot[f"C_{name}"]], s[Slot[f"R_{name}"]] = count * e.c_pitch, count * e.r_pitch
        s[Slot[f"BIAS_{name}"]] = 4 * count if form.bias == "rows" else 0
    return result


def parts(
    code: Code, e: Extents, schedule: DenseSchedule, crew: Crew | None, bias: Array,
    among: tuple[str, ...] = RANGES, make: Callable[[Share], Frame] | None = None,
) -> Parts:  # fmt: skip
    """The product of such arrays, shared out; ``bias`` is what BIAS points to, ``make`` what makes unusual frames."""
    form = code.form
    shares, by = share_out(e, code.rows, code.target.lanes, crew, a=form.a, b=form.b, bias=form.bias, among=among)
    frames: list[tuple[Frame, Share]] = []
    for share in shares:
        made = make(share) if make else frame(code, share.extents, schedule, share.blocks)
        made.slots[Slot.BIAS] = address_of(bias) + share.shift.bias
        frames.append((made, share))
    return Parts(frames, code.executable.address, code.executable.call, crew, described(len(frames), by))


def pack_rows(weight: Array, most: int) -> tuple[Array, int, int]:
    """W (M, K) as blocks of rows [block][k][row], its pitch and the bytes of a block; a lacking row is 0."""
    m, k = weight.shape
    large, small, size = blocks_of_rows(m, most)
    out = np.zeros((large + small, k, size), np.float32)
    out[:large] = weight[: large * size].reshape(large, size, k).transpose(0, 2, 1)
    if small:
        out[large:, :, : size - 1] = weight[large * size :].reshape(small, size - 1, k).transpose(0, 2, 1)
    return out, 4 * size, 4 * k * size


def pack_panels(weight: Array, lanes: int) -> tuple[Array, int, int]:
    """W (N, K) as panels of columns [panel][k][column], its pitch and the bytes of a panel; zeros fill the last."""
    n, k = weight.shape
    width = VECTORS * lanes
    panels, rest = divmod(n, width)
    out = np.zeros((panels + (rest > 0), k, width), np.float32)
    out[:panels] = weight[: n - rest].reshape(panels, width, k).transpose(0, 2, 1)
    out[panels:, :, :rest] = weight[n - rest :].T
    return out, 4 * width, 4 * k * width


@lru_cache(8)
def transposer_of(target: Target) -> Executable:
    """Code that transposes an array."""
    return Executable(assemble(transposition(target), target.isa).code)


class Packed:
    """W in the arrangements that bindings ask for, each made when it is first asked for."""

    def __init__(self, task: Task, values: Array, rows: int, lanes: int) -> None:
        self.task, self.values, self.rows, self.lanes = task, values, rows, lanes
        self.made: dict[bool, tuple[Array, int, int, int]] = {}  # array, address, pitch, bytes of a block or panel

    def get(self, panels: bool) -> tuple[Array, int, int, int]:
        """As panels of columns, or as blocks of rows."""
        found = self.made.get(panels)
        if found is None:
            weight = SparseMatrix(self.task.pattern, self.values).to_dense()
            array, pitch, step = pack_panels(weight, self.lanes) if panels else pack_rows(weight, self.rows)
            aligned = aligned_empty(array.size)
            aligned[:] = array.reshape(-1)
            found = self.made[panels] = aligned, address_of(aligned), pitch, step
        return found


def _form_of(t: Task, a: str, bias: str) -> Form:
    return Form(a, "rows", bias if t.bias else None, t.activation, t.parameters, t.residual)


def dense_program(task: Task, target: Target) -> Program:
    """The program of a dense product."""
    linear = task.layout == "transposed"
    return generate(_form_of(task, *(("rows", "columns") if linear else ("columns", "rows"))), target).program


class DenseProduct(Shareable):
    """The looped form with a constant W behind a compiled operator: the same contract as the sparse product.

    Three ways: linear layers read x, the first operand, where it lies, against panels of W. Row-major x is the second
    operand, packed on the way; where its columns would leave much of their last vector empty, the transposed product is
    computed instead, in which rows of W fill the vectors, and transposed back. All give the same bits. Any number of
    threads may call at once.
    """

    narrowest = 1

    def __init__(self, task: Task, target: Target) -> None:
        super().__init__()
        self.task, self.target = task, target
        self.linear = task.layout == "transposed"
        self.form = self._form("rows" if self.linear else "columns", "columns" if self.linear else "rows")
        self.code = code_of(self.form, target)
        _, k = task.pattern.shape
        self.fold = fold_width(k, k)
        self.schedule = choose(k, self.fold, target, VECTORS * target.tile_bytes)
        self.values: list[Packed] = []

    def _form(self, a: str, bias: str) -> Form:
        return _form_of(self.task, a, bias)

    def load(self, values: Array, bias: Array | None) -> None:
        """Pack new values; calls under way keep the ones they started with."""
        packed = Packed(self.task, values, self.code.rows, self.target.lanes)
        for panels in self.values[0].made if self.values else (self.linear,):
            packed.get(panels)
        self._keep(bias)
        self.values[:] = [packed]

    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> DenseBinding | None:
        """The binding for arrays like these; None where the residual has to be copied at each call."""
        same = r is not None and address_of(r) == address_of(y)
        if same and self.fold:  # y holds sums of the pieces meanwhile
            return None
        key = (columns, x.strides[0], y.strides[0], 0 if r is None else r.strides[0], int(same))
        binding = self._bindings.get(key)
        if binding is None:
            if len(self._bindings) >= SHAPES:
                self._bindings.clear()
            rising = min(key[2:4]) >= 0  # the transposition counts on rising addresses
            m, k = self.task.pattern.shape
            turned = rising and not self.linear and turns(m, columns, k, self.target)
            binding = self._bindings[key] = (self._turned if turned else self._straight)(*key)
        return binding

    def _straight(self, columns: int, x_pitch: int, y_pitch: int, r_pitch: int, same: int) -> DenseBinding:
        m, k = self.task.pattern.shape
        _, _, pitch, step = self.values[0].get(self.linear)
        if self.linear:
            extents = Extents(1, columns, m, k, x_pitch, pitch, y_pitch, r_pitch, panel=step)
        else:
            extents = Extents(1, m, columns, k, pitch, x_pitch, y_pitch, r_pitch, a_block=step)
        schedule = replace(self.schedule, k_block=k) if same else self.schedule  # y is not written before r is read
        return DenseBinding(self, self.code, self.linear, self.linear, self._parts(self.code, extents, schedule))

    def _parts(
        self, code: Code, extents: Extents, schedule: DenseSchedule, among: tuple[str, ...] = RANGES
    ) -> Callable[[], Parts]:
        """How to make what a call on such arrays needs."""
        bias, crew, seen = self._bias, self.crew, self.seen  # not self: a binding does not keep its product
        columns = extents.m if code.form.bias == "columns" or self.linear else extents.n

        def make() -> Parts:
            made = parts(code, extents, schedule, crew, bias, among)
            if len(seen) < SHAPES:
                seen[columns] = made.how
            return made

        return make

    def _turned(self, columns: int, x_pitch: int, y_pitch: int, r_pitch: int, same: int) -> DenseBinding:
        m, k = self.task.pattern.shape
        _, _, pitch, step = self.values[0].get(True)
        code = code_of(self._form("columns", "columns"), self.target)
        extents = Extents(1, columns, m, k, x_pitch, pitch, spread_pitch(m), spread_pitch(m), panel=step)
        target, crew, residual = self.target, self.crew, self.task.residual is not None
        product = self._parts(code, extents, self.schedule, ("columns",))

        def make() -> Turned:
            return Turned(product(), m, columns, y_pitch, r_pitch, target, residual, crew)

        return DenseBinding(self, code, True, True, make)

    def listing(self) -> str:
        """The machine code as text, generated anew."""
        return listing(generate(self.form, self.target).program, self.target.isa)

    def run(self, x: Array, y: Array, r: Array | None, columns: int) -> None:
        """One call; x, y and r as the task's layout says."""
        r = r.copy() if r is not None and self.fold else r
        binding = self.bind(x, y, r, columns)
        if binding is None:
            raise InternalError("a copied residual is y itself")
        binding.call(address_of(x), address_of(y), 0 if r is None else address_of(r))


class DenseBinding:
    """The product for arrays of one shape and pitch. ``first``: x is the first operand; ``panels``: of W."""

    def __init__(self, product: DenseProduct, code: Code, first: bool, panels: bool, make: Callable[[], Any]) -> None:
        self.executable, self.values, self.make = code.executable, product.values, make
        self.first, self.panels = first, panels
        self.free: list[Any] = []

    def call(self, xa: int, ya: int, ra: int) -> None:
        """One call with x, y and the residual (0: none) at these addresses."""
        try:
            made = self.free.pop()
        except IndexError:
            made = self.make()
        packed, weights, _, _ = self.values[0].get(self.panels)  # held here: a refit does not free what this call reads
        made.point(*((xa, weights) if self.first else (weights, xa)), ya, ra)
        made.run()
        self.free.append(made)
        del packed

    def fixed(self, xa: int, ya: int, ra: int) -> Callable[[], None]:
        """The call for arrays that stay where they are."""
        call = self.call
        return lambda: call(xa, ya, ra)


class Turned:
    """What a transposed product needs: its frames, scratch for the transposed y and residual, and how to turn.

    Args:
        main: the product, shared out by columns: rows of W.
        m, columns: extents of y.
    """

    def __init__(
        self, main: Parts, m: int, columns: int, y_pitch: int, r_pitch: int, target: Target, residual: bool,
        crew: Crew | None,
    ) -> None:  # fmt: skip
        pitch, lanes = spread_pitch(m), target.lanes
        cuts = [(share.first, share.extents.n) for share in main.shares]
        if min(n for _, n in cuts) < lanes:  # too narrow to be transposed
            cuts = [(0, m)]
        back = [(Shift(4 * at, at * y_pitch), transpose_slots(columns, n, pitch, y_pitch, lanes)) for at, n in cuts]
        there = [(Shift(at * r_pitch, 4 * at), transpose_slots(n, columns, r_pitch, pitch, lanes)) for at, n in cuts]
        self.main = main
        self.out = aligned_empty(columns * pitch // 4)
        self.residual = aligned_empty(columns * pitch // 4 if residual else 1)
        self.back = _transposition(target, back, crew)
        self.there = _transposition(target, there, crew) if residual else None
        self.pitches = pitch, y_pitch, r_pitch

    def point(self, a: int, b: int, c: int, r: int) -> None:
        """Where x, the weights, y and the residual lie."""
        out, residual, (pitch, y_pitch, r_pitch) = address_of(self.out), address_of(self.residual), self.pitches
        self.main.point(a, b, out, residual)
        self.back.point(out, c, pitch, y_pitch)
        if self.there is not None:
            self.there.point(r, residual, r_pitch, pitch)

    def run(self) -> None:
        """The native calls."""
        if self.there is not None:
            self.there.run()
        self.main.run()
        self.back.run()


def _transposition(target: Target, cuts: list[tuple[Shift, list[int]]], crew: Crew | None) -> Parts:
    """Transpositions whose first four slots, addresses and pitches, are told later."""
    code, found = transposer_of(target), []
    for shift, slots in cuts:
        made = Frame(len(TransposeArg), 0)
        made.slots[2:] = slots
        found.append((made, shift))
    return Parts(found, code.address, code.call, crew, "")
