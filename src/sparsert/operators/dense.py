"""Dense products as native calls: the looped form bound to arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..codegen.x86.assemble import assemble, listing
from ..errors import AliasError, InternalError, ShapeError
from ..kernels.activations import ACTIVATIONS
from ..kernels.dense import UNROLL, VECTORS, Form, Slot, generate
from ..kernels.plan import fold_width
from ..runtime.cpu import Executable, Frame, address_of
from ..runtime.memory import aligned_empty
from ..schedule.dense import DenseSchedule, choose, conflicts
from ..schedule.task import Task
from ..sparsity.pattern import SparseMatrix
from ..target import Target
from .arrays import Array, as_input, as_output, empty, overlaps, packed_columns

_SHAPES = 32  # shapes and pitches whose frames are kept


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
    a_pitch = (-(-kc * 4 // 128) * 128 + 64) if copied else e.a_pitch  # an odd number of lines
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


class DenseProduct:
    """The looped form with a constant W behind a compiled operator: the same contract as the sparse product.

    Row-major x is the B of the product, packed on the way; in linear layers it is the A, read where it lies. Any number
    of threads may call at once.
    """

    narrowest = 1

    def __init__(self, task: Task, target: Target) -> None:
        self.task, self.target = task, target
        self.linear = task.layout == "transposed"
        self.form = Form(
            "rows" if self.linear else "columns", bias=("columns" if self.linear else "rows") if task.bias else None,
            activation=task.activation, parameters=task.parameters, residual=task.residual,
        )  # fmt: skip
        self.code = code_of(self.form, target)
        _, k = task.pattern.shape
        self.fold = fold_width(k, k)
        self.schedule = choose(k, self.fold, target, VECTORS * target.tile_bytes)
        self.values: list[tuple[Array, int]] = [(aligned_empty(0), 0)]
        self._layout = (0, 0)  # pitch, and bytes of a block or panel, of the packed values
        self._bias: Array = aligned_empty(0)
        self._bindings: dict[tuple[int, ...], DenseBinding] = {}

    def load(self, values: Array, bias: Array | None) -> None:
        """Pack new values; calls under way keep the ones they started with."""
        weight = SparseMatrix(self.task.pattern, values).to_dense()
        if self.linear:
            packed, *layout = pack_panels(weight, self.target.lanes)
        else:
            packed, *layout = pack_rows(weight, self.code.rows)
        aligned = aligned_empty(packed.size)
        aligned[:] = packed.reshape(-1)
        if bias is not None and not self._bias.size:
            self._bias = aligned_empty(bias.size)
            self._bias[:] = bias
        self._layout = layout[0], layout[1]
        self.values[0] = aligned, address_of(aligned)

    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> DenseBinding | None:
        """The binding for arrays like these; None where the residual has to be copied at each call."""
        same = r is not None and address_of(r) == address_of(y)
        if same and self.fold:  # y holds sums of the pieces meanwhile
            return None
        key = (columns, x.strides[0], y.strides[0], 0 if r is None else r.strides[0], int(same))
        binding = self._bindings.get(key)
        if binding is None:
            if len(self._bindings) >= _SHAPES:
                self._bindings.clear()
            binding = self._bindings[key] = DenseBinding(self, self._frames(*key))
        return binding

    def listing(self) -> str:
        """The machine code as text, generated anew."""
        return listing(generate(self.form, self.target).program, self.target.isa)

    def _frames(self, columns: int, x_pitch: int, y_pitch: int, r_pitch: int, same: int) -> Callable[[], Frame]:
        m, k = self.task.pattern.shape
        pitch, block = self._layout
        if self.linear:
            extents = Extents(1, columns, m, k, x_pitch, pitch, y_pitch, r_pitch, panel=block)
        else:
            extents = Extents(1, m, columns, k, pitch, x_pitch, y_pitch, r_pitch, a_block=block)
        schedule = replace(self.schedule, k_block=k) if same else self.schedule  # y must not be written before r is read
        code, bias = self.code, self._bias  # not self: a binding does not keep its product

        def make() -> Frame:
            made = frame(code, extents, schedule)
            made.slots[Slot.BIAS] = address_of(bias)
            return made

        return make

    def run(self, x: Array, y: Array, r: Array | None, columns: int) -> None:
        """One call; x, y and r as the task's layout says."""
        r = r.copy() if r is not None and self.fold else r
        binding = self.bind(x, y, r, columns)
        if binding is None:
            raise InternalError("a copied residual is y itself")
        binding.call(address_of(x), address_of(y), 0 if r is None else address_of(r))


class DenseBinding:
    """The product for arrays of one shape and pitch."""

    __slots__ = ("bias", "call_native", "executable", "first", "free", "make", "values")

    def __init__(self, product: DenseProduct, make: Callable[[], Frame]) -> None:
        self.executable, self.values, self.make = product.code.executable, product.values, make
        self.first = product.linear  # whether x is the first operand
        self.free: list[Frame] = []

    def call(self, xa: int, ya: int, ra: int) -> None:
        """One call with x, y and the residual (0: none) at these addresses."""
        try:
            frame = self.free.pop()
        except IndexError:
            frame = self.make()
        values, weights = self.values[0]  # held here: a refit meanwhile does not free what this call reads
        a, b = (xa, weights) if self.first else (weights, xa)
        frame.point(a, b, ya, ra)
        self.executable.call(frame.address)
        self.free.append(frame)
        del values

    def fixed(self, xa: int, ya: int, ra: int) -> Callable[[], None]:
        """The call for arrays that stay where they are."""
        call = self.call
        return lambda: call(xa, ya, ra)


@dataclass(frozen=True)
class ProductSpec:
    """What a product of two activations computes around them."""

    transpose_a: bool
    transpose_b: bool
    scale: float
    activation: str | None
    parameters: tuple[float, ...]


class CompiledProduct:
    """``y = act(scale * a @ b)`` for two activations of any extents, compiled; see :func:`sparsert.compile_product`.

    Args (of a call):
        a: float32 (..., M, K), or (..., K, M) if compiled with ``transpose_a``. Any strides; an operand whose rows or
            columns lie back to back is read where it is, or packed on the way.
        b: float32 (..., K, N), or (..., N, K) with ``transpose_b``. Leading axes broadcast as in ``numpy.matmul``.
        out: float32 (..., M, N), written and returned; a new array if None. It may overlap neither operand.
    """

    def __init__(self, spec: ProductSpec, target: Target) -> None:
        self.spec, self._target = spec, target
        self._frames: dict[tuple[object, ...], tuple[Code, list[Frame]]] = {}
        self._scale = np.full(1, spec.scale, np.float32)

    @property
    def target(self) -> str:
        """Name of the target this was compiled for."""
        return self._target.name

    def explain(self) -> str:
        """What was compiled, in a few lines."""
        s = self.spec
        words = [f"dense product, run-time extents, target {self.target}"]
        if s.scale != 1:
            words.append(f"scaled by {s.scale:.9g}")
        if s.activation:
            words.append(f"then {s.activation}{s.parameters or ''}")
        return "; ".join(words)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} target={self.target}>"

    def __call__(self, a: Any, b: Any, out: Any = None) -> Array:
        """Compute the product.

        Raises:
            ShapeError, DTypeError, AliasError: see :mod:`sparsert.errors`; nothing is written then.
        """
        a, b = as_input(a, "a"), as_input(b, "b")
        for name, array in (("a", a), ("b", b)):
            if array.ndim < 2:
                raise ShapeError(f"shape {array.shape} has fewer than two axes", where=name,
                                 hint="Add axes: a row is x[None, :], a column x[:, None].")  # fmt: skip
        if self.spec.transpose_a:
            a = a.swapaxes(-1, -2)
        if self.spec.transpose_b:
            b = b.swapaxes(-1, -2)
        (m, k), (k2, n) = a.shape[-2:], b.shape[-2:]
        if k != k2:
            raise ShapeError(f"a has {k} elements to multiply and b has {k2}: shapes {a.shape} and {b.shape} as (M, K) "
                             f"and (K, N)", where="b", hint="transpose_a and transpose_b swap the last two axes.")  # fmt: skip
        try:
            batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        except ValueError:
            raise ShapeError(f"leading axes {a.shape[:-2]} and {b.shape[:-2]} do not broadcast", where="b") from None
        shape = (*batch, m, n)
        y = empty(shape) if out is None else as_output(out, shape)
        for name, array in (("a", a), ("b", b)):
            if out is not None and y.size and array.size and overlaps(array, y):
                raise AliasError(f"out overlaps {name}, which is still read while out is written", where="out",
                                 hint="Pass another array.")  # fmt: skip
        if not y.size:
            return y
        if not k or self._target.isa == "reference":
            self._in_numpy(a, b, y)
            return y
        target = y if packed_columns(y) else empty(shape)
        a, b = _readable(a), _readable(b)
        self._batches(np.broadcast_to(a, (*batch, m, k)), np.broadcast_to(b, (*batch, k, n)), target)
        if target is not y:
            y[...] = target
        return y

    def _in_numpy(self, a: Array, b: Array, y: Array) -> None:
        with np.errstate(all="ignore"):
            total = np.matmul(a, b, dtype=np.float64) * np.float64(self._scale[0])
            if self.spec.activation is not None:
                total = ACTIVATIONS[self.spec.activation].reference(total, *self.spec.parameters)
            y[...] = total

    def _batches(self, a: Array, b: Array, y: Array) -> None:
        """One native call per run of matrices a fixed distance apart."""
        while a.ndim > 3 and all(_mergeable(array) for array in (a, b, y)):
            a, b, y = (_merged(array) for array in (a, b, y))
        if a.ndim > 3:
            for index in range(a.shape[0]):
                self._batches(a[index], b[index], y[index])
            return
        if a.ndim == 2:
            a, b, y = a[None], b[None], y[None]
        self._native(a, b, y)

    def _native(self, a: Array, b: Array, y: Array) -> None:
        key = (a.shape, b.shape[2], a.strides, b.strides, y.strides)
        found = self._frames.get(key)
        if found is None:
            if len(self._frames) >= _SHAPES:
                self._frames.clear()
            found = self._frames[key] = (self._code(a, b), [])
        code, free = found
        try:
            made = free.pop()
        except IndexError:
            made = self._frame(code, a, b, y)
        made.point(address_of(a), address_of(b), address_of(y), 0)
        code.executable.call(made.address)
        free.append(made)

    def _code(self, a: Array, b: Array) -> Code:
        s = self.spec
        form = Form("rows" if packed_columns(a) else "columns", "rows" if packed_columns(b) else "transposed",
                    activation=s.activation, parameters=s.parameters, scale=s.scale != 1)  # fmt: skip
        return code_of(form, self._target)

    def _frame(self, code: Code, a: Array, b: Array, y: Array) -> Frame:
        (batch, m, k), n = a.shape, b.shape[2]
        fold = fold_width(k, k)
        made = frame(code, Extents(
            batch, m, n, k, a.strides[1 if code.form.a == "rows" else 2], b.strides[1 if code.form.b == "rows" else 2],
            y.strides[1], 0, a.strides[0], b.strides[0], y.strides[0],
        ), choose(k, fold, self._target, VECTORS * self._target.tile_bytes))  # fmt: skip
        made.slots[Slot.BIAS] = address_of(self._scale)
        return made


def _readable(array: Array) -> Array:
    """The array itself where rows or columns lie back to back, else a copy.

    Transposed operands are read four columns at a time: narrower ones are copied.
    """
    if packed_columns(array) or (array.strides[-2] == 4 and array.shape[-1] >= 4):
        return array
    return np.ascontiguousarray(array)


def _mergeable(array: Array) -> bool:
    return 1 in array.shape[:2] or array.strides[0] == array.shape[1] * array.strides[1]


def _merged(array: Array) -> Array:
    """The first two axes, which lie back to back, as one; never a copy."""
    outer, inner = array.shape[:2]
    stride = array.strides[1 if inner > 1 else 0]
    return np.lib.stride_tricks.as_strided(
        array, (outer * inner, *array.shape[2:]), (stride, *array.strides[2:]), writeable=array.flags.writeable
    )
