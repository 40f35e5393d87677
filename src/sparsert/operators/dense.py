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
from ..kernels.dense import UNROLL, VECTORS, generate
from ..kernels.dense_arguments import Form, Slot
from ..kernels.layout import TransposeArg, transpose_slots, transposition
from ..kernels.plan import fold_width
from ..runtime.cpu import Executable, Frame, address_of
from ..runtime.memory import aligned_empty
from ..schedule.dense import DenseSchedule, choose, conflicts, turns
from ..schedule.task import Task
from ..sparsity.pattern import SparseMatrix
from ..target import Target
from .arrays import Array

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


@dataclass(frozen=True)
class Extents:
    """C (batch, M, N) = A (batch, M, K) @ B (batch, K, N), and where things lie, in bytes.

    Pitches go from row to row as stored: of A given by columns, and of B transposed, those of the stored array.
    ``a_block``: from block to block of packed rows of A; ``panel``: from panel to panel of packed B.
    """

    batch: int
    m: int
    n: int
    k: int
    a_pitch: int
    b_pitch: int
    c_pitch: int
    r_pitch: int = 0
    a_batch: int = 0
    b_batch: int = 0
    c_batch: int = 0
    r_batch: int = 0
    a_block: int = 0
    panel: int = 0


def blocks_of_rows(m: int, most: int) -> tuple[int, int, int]:
    """Large blocks, small blocks, and the rows of a large one; small ones have a row less."""
    count = -(-m // most)
    size = -(-m // count)
    large = m - count * (size - 1)
    return large, count - large, size


def spread_pitch(floats: int) -> int:
    """The pitch in bytes of rows of so many floats that fall into different sets of a cache: an odd number of lines."""
    return -(-4 * floats // 128) * 128 + 64


def frame(code: Code, e: Extents, schedule: DenseSchedule) -> Frame:
    """An argument block and scratch for such arrays, all but the addresses filled in."""
    lanes, tile, form = code.target.lanes, code.target.tile_bytes, code.form
    width = VECTORS * lanes
    kc = min(schedule.k_block, e.k)
    last = e.k - (-(-e.k // kc) - 1) * kc
    panels, rest = divmod(e.n, width)
    groups = -(-panels // schedule.panels)
    group = -(-panels // groups) if groups else 0
    large, small, size = blocks_of_rows(e.m, code.rows)
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
    for name, count in (("LARGE", size), ("SMALL", size - 1)):
        s[Slot[f"A_{name}"]] = e.a_block or count * (a_pitch if rows else 4)
        s[Slot[f"C_{name}"]], s[Slot[f"R_{name}"]] = count * e.c_pitch, count * e.r_pitch
        s[Slot[f"BIAS_{name}"]] = 4 * count if form.bias == "rows" else 0
    return result


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


class DenseProduct:
    """The looped form with a constant W behind a compiled operator: the same contract as the sparse product.

    Three ways: linear layers read x, the first operand, where it lies, against panels of W. Row-major x is the second
    operand, packed on the way; where its columns would leave much of their last vector empty, the transposed product is
    computed instead, in which rows of W fill the vectors, and transposed back. All give the same bits. Any number of
    threads may call at once.
    """

    narrowest = 1

    def __init__(self, task: Task, target: Target) -> None:
        self.task, self.target = task, target
        self.linear = task.layout == "transposed"
        self.form = self._form("rows" if self.linear else "columns", "columns" if self.linear else "rows")
        self.code = code_of(self.form, target)
        _, k = task.pattern.shape
        self.fold = fold_width(k, k)
        self.schedule = choose(k, self.fold, target, VECTORS * target.tile_bytes)
        self.values: list[Packed] = []
        self._bias: Array = aligned_empty(0)
        self._bindings: dict[tuple[int, ...], DenseBinding] = {}

    def _form(self, a: str, bias: str) -> Form:
        return _form_of(self.task, a, bias)

    def load(self, values: Array, bias: Array | None) -> None:
        """Pack new values; calls under way keep the ones they started with."""
        packed = Packed(self.task, values, self.code.rows, self.target.lanes)
        for panels in self.values[0].made if self.values else (self.linear,):
            packed.get(panels)
        if bias is not None and not self._bias.size:
            self._bias = aligned_empty(bias.size)
            self._bias[:] = bias
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
        code, bias = self.code, self._bias  # not self: a binding does not keep its product

        def make() -> Frame:
            made = frame(code, extents, schedule)
            made.slots[Slot.BIAS] = address_of(bias)
            return made

        return DenseBinding(self, code, self.linear, self.linear, make)

    def _turned(self, columns: int, x_pitch: int, y_pitch: int, r_pitch: int, same: int) -> DenseBinding:
        m, k = self.task.pattern.shape
        _, _, pitch, step = self.values[0].get(True)
        code, bias, schedule = code_of(self._form("columns", "columns"), self.target), self._bias, self.schedule
        extents = Extents(1, columns, m, k, x_pitch, pitch, spread_pitch(m), spread_pitch(m), panel=step)
        lanes, residual = self.target.lanes, self.task.residual is not None

        def make() -> TurnedFrame:
            made = TurnedFrame(frame(code, extents, schedule), m, columns, y_pitch, r_pitch, lanes, residual)
            made.main.slots[Slot.BIAS] = address_of(bias)
            return made

        return TurnedBinding(self, code, True, True, make)

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
        self.transpose = transposer_of(product.target).call
        self.free: list[Any] = []

    def call(self, xa: int, ya: int, ra: int) -> None:
        """One call with x, y and the residual (0: none) at these addresses."""
        try:
            made = self.free.pop()
        except IndexError:
            made = self.make()
        packed, weights, _, _ = self.values[0].get(self.panels)  # held here: a refit does not free what this call reads
        self.execute(made, *((xa, weights) if self.first else (weights, xa)), ya, ra)
        self.free.append(made)
        del packed

    def execute(self, made: Any, a: int, b: int, ya: int, ra: int) -> None:
        """The native call."""
        made.point(a, b, ya, ra)
        self.executable.call(made.address)

    def fixed(self, xa: int, ya: int, ra: int) -> Callable[[], None]:
        """The call for arrays that stay where they are."""
        call = self.call
        return lambda: call(xa, ya, ra)


class TurnedFrame:
    """What a transposed product needs: its own frame, scratch for the transposed y and residual, and how to turn."""

    def __init__(
        self, main: Frame, m: int, columns: int, y_pitch: int, r_pitch: int, lanes: int, residual: bool
    ) -> None:
        self.main = main
        pitch = spread_pitch(m)
        size = columns * pitch // 4
        self.out = Frame(len(TransposeArg), size)
        self.out.slots[2:] = transpose_slots(columns, m, pitch, y_pitch, lanes)
        self.residual = Frame(len(TransposeArg), size if residual else 0)
        if residual:
            self.residual.slots[2:] = transpose_slots(m, columns, r_pitch, pitch, lanes)


class TurnedBinding(DenseBinding):
    """The transposed product, transposed back."""

    def execute(self, made: TurnedFrame, a: int, b: int, ya: int, ra: int) -> None:
        y, r = address_of(made.out.scratch), address_of(made.residual.scratch)
        if ra:
            made.residual.slots[:2] = ra, r
            self.transpose(made.residual.address)
        made.main.point(a, b, y, r)
        self.executable.call(made.main.address)
        made.out.slots[:2] = y, ya
        self.transpose(made.out.address)
