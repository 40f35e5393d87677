"""The vector vocabulary: a program is a table with one row per operation, held as NumPy columns.

Kernels are written once against this vocabulary and name no ISA. Columns:

======  =====================================================================================================
column  meaning
======  =====================================================================================================
op      row of :data:`OPS`
d a b   registers: vector registers for vector operations, :class:`S` numbers for scalar ones; a negative ``b``
        is constant ``-1 - b`` of the program's constant pool (a whole vector)
ptr     the scalar register a memory operand starts from; 0 where there is none
step    how many pitches of that pointer are added (row-major arrays, whose pitch is known at run time)
disp    bytes added (memory operands), the immediate, or the label
======  =====================================================================================================

The meaning of every operation is executable Python (:mod:`sparsert.codegen.interpreter`): the oracle of every ISA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InternalError

POOL_LANES = 16  # a constant fills as many lanes in the pool, whatever the ISA takes of them
POOL_BYTES = 4 * POOL_LANES


class S(IntEnum):
    """Scalar registers, by what the kernels keep in them."""

    ARGS = 0  # the argument block of the call
    X = 1  # input pointer of the current tile
    W = 2  # packed values
    Y = 3  # output, residual or partial sums: whatever the current phase reads or writes by rows
    PX = 4  # pitch of X in bytes, and its multiples: with scales 1, 2, 4, 8 they reach 8 rows
    PX3 = 5
    PX5 = 6
    PX7 = 7
    PY = 8  # pitch of Y in bytes
    T = 9  # trip counters; K also runs ahead of the values
    K = 10
    TMP = 11
    CONST = 12  # the constant pool; between taps, the sums of the segments before
    PANEL = 13  # what runs along beside x: a panel it is packed into, or the code that comes next


ARGUMENTS = (S.ARGS, S.PANEL, S.W, S.Y, S.CONST, S.PX)
"""What a native function that ``invoke`` calls takes as its arguments."""
PRESERVED = (S.PX5, S.PX7, S.PY, S.T, S.TMP)
"""The scalar registers that keep their values over ``invoke``; no vector register does."""
PITCH_OF = {S.X: S.PX, S.Y: S.PY}
"""The register that holds a pointer's pitch."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation and its ``form``, the columns in use.

    ``d``, ``a`` and ``b`` are registers, ``m`` is memory, ``i`` an immediate or a label.
    """

    name: str
    form: str
    scalar: bool = False


def _table() -> tuple[Op, ...]:
    vector = {
        "zero": "d", "mov": "da", "load": "dm", "store": "am", "bcast": "dm", "fma_bcast": "dam",
        "mul_bcast": "dam",
        "add": "dab", "sub": "dab", "mul": "dab", "div": "dab", "min": "dab", "max": "dab",
        "bit_and": "dab", "bit_or": "dab", "bit_xor": "dab", "add_i": "dab", "const": "db",
        "fma_acc": "dab", "fma_mul": "dab", "fnma_acc": "dab", "fnma_mul": "dab",
        "round": "da", "to_int": "da", "shl": "dai", "select_neg": "dab",
        "load4": "dm", "insert4": "dmb", "store4": "amb",
        "zip_lo": "dab", "zip_hi": "dab", "zip2_lo": "dab", "zip2_hi": "dab",
        "set_mask": "dm", "load_mask": "dm", "store_mask": "am", "prefetch": "m",
        "fma_lane": "dabi", "mul_lane": "dabi",
        "evens": "dab", "mask_from": "dm", "load_by_mask": "dmb",
        "load_bytes": "dm", "sign_mask": "a", "expand": "dm", "lookup2": "dab", "fma_mask": "dab",
        "prefetch_near": "m",
        "mask_bits": "dm", "store_by_mask": "amb", "bcast_by_mask": "dmb",
        "pick": "dab", "lanes_from": "dabi", "rotate_by_mask": "dabi",
    }  # fmt: skip
    scalar = {
            "s_arg": "di", "s_put": "ai", "s_mov": "da", "s_add": "da", "s_sub": "da", "s_addi": "di", "s_set": "di",
            "s_muli": "dai", "s_add_arg": "di", "s_max_arg": "di", "s_min_arg": "di", "s_const": "d", "s_code": "di",
            "label": "i", "align": "i", "jump": "i", "jump_zero": "ai", "loop": "ai", "call": "i", "ret": "",
            "enter": "", "leave": "",
            "s_load32": "dm", "s_store32": "am", "s_at8": "damb", "s_at16": "damb", "s_at32": "damb",
            "s_skip": "d",
    }  # fmt: skip
    # What threads need to meet. Words of 64 bits: s_load acquires, s_store releases, the read-modify-writes do both
    # and lose the mask.
    shared = {
        "s_load": "dm", "s_store": "am", "s_exchange": "dm", "s_fetch_add": "dm", "s_replace": "dbm", "s_pause": "",
        "jump_equal": "abi", "jump_differs": "abi", "jump_less": "abi", "invoke": "a",
    }  # fmt: skip
    groups = ((vector, False), (scalar, True), (shared, True))
    return tuple(Op(name, form, kind) for group, kind in groups for name, form in group.items())


OPS = _table()
OP = {op.name: i for i, op in enumerate(OPS)}

_HEAD = {"op": ("u1", 0), "ptr": ("i1", 1), "d": ("<i2", 2), "a": ("<i2", 4), "b": ("<i2", 6)}
COLUMNS = {"op": "u1", "d": "<i2", "a": "<i2", "b": "<i2", "ptr": "i1", "step": "<i4", "disp": "<i8"}
_NAMES = tuple(COLUMNS)
Columns = dict[str, NDArray[Any]]
Ints = NDArray[np.int64]


class Table:
    """``size`` rows, zeros at first.

    Attributes:
        heads: (size,) words of 64 bits: op, ptr, d, a and b of a row; whoever moves many rows moves these.
        columns: by name, views of the heads, and step and disp.
    """

    def __init__(self, size: int) -> None:
        self.heads = np.zeros(size, "<i8")
        self.columns: Columns = unpacked(self.heads)
        for name in ("step", "disp"):
            self.columns[name] = np.zeros(size, COLUMNS[name])


def unpacked(heads: Ints) -> Columns:
    """The columns that words hold, as views."""
    layout = {"names": list(_HEAD), "formats": [kind for kind, _ in _HEAD.values()],
              "offsets": [offset for _, offset in _HEAD.values()], "itemsize": 8}  # fmt: skip
    rows: NDArray[Any] = heads.view(np.dtype(layout))  # type: ignore[call-overload]
    return {name: rows[name] for name in _NAMES if name in _HEAD}


def heads(op: str, d: int | Ints = 0, a: int | Ints = 0, b: int | Ints = 0, ptr: int = 0) -> int | Ints:
    """Words of rows whose registers are no constants."""
    return OP[op] | ptr << 8 | d << 16 | a << 32 | b << 48


@dataclass
class Program:
    """A finished program: rows, constants (raw 32-bit patterns, one vector each) and where to look for what."""

    table: Table
    constants: tuple[int, ...]
    labels: int
    notes: dict[int, str]  # label -> remark for listings

    def __len__(self) -> int:
        return self.table.heads.size

    @property
    def columns(self) -> Columns:
        return self.table.columns


Row = tuple[int, int, int, int, int, int, int]


def row(name: str, d: int = 0, a: int = 0, b: int = 0, ptr: int = 0, step: int = 0, disp: int = 0) -> Row:
    """A row of a program."""
    return OP[name], int(d), int(a), int(b), int(ptr), int(step), int(disp)  # NumPy takes members of S slowly


@dataclass
class Builder:
    """Collects rows; whole arrays at a time where there are many."""

    _rows: list[Row] = field(default_factory=list)
    _places: list[int] = field(default_factory=list)  # of the single rows
    _runs: list[tuple[Any, ...]] = field(default_factory=list)  # place, length, then a value or an array per column
    _tables: list[tuple[int, Table, slice]] = field(default_factory=list)  # place, whose rows, which
    _size: int = 0
    _constants: dict[int, int] = field(default_factory=dict)
    _labels: int = 0
    _notes: dict[int, str] = field(default_factory=dict)

    def emit(self, name: str, d: int = 0, a: int = 0, b: int = 0, ptr: int = 0, step: int = 0, disp: int = 0) -> None:
        """One row."""
        self._rows.append((OP[name], d, a, b, ptr, step, disp))
        self._places.append(self._size)
        self._size += 1

    def emit_rows(self, rows: tuple[Row, ...]) -> None:
        """Rows that :func:`row` has made: quicker where the same ones come again and again."""
        self._rows += rows
        self._places += range(self._size, self._size + len(rows))
        self._size += len(rows)

    def emit_many(
        self, op: Any, n: int, d: Any = 0, a: Any = 0, b: Any = 0, ptr: Any = 0, step: Any = 0, disp: Any = 0
    ) -> None:
        """``n`` rows at once; every argument is a scalar or an array of ``n``, ``op`` a name or an array of numbers."""
        self._runs.append((self._size, n, OP[op] if isinstance(op, str) else op, d, a, b, ptr, step, disp))
        self._size += n

    def emit_table(self, table: Table, start: int, stop: int) -> None:
        """Rows ``start`` to ``stop`` of a table."""
        self._tables.append((self._size, table, slice(start, stop)))
        self._size += stop - start

    def constant(self, bits: int) -> int:
        """The number of a constant vector with the 32-bit pattern ``bits`` in every lane."""
        return self._constants.setdefault(bits & 0xFFFFFFFF, len(self._constants))

    def label(self, note: str = "") -> int:
        """A fresh label; place it with ``place``."""
        self._labels += 1
        if note:
            self._notes[self._labels - 1] = note
        return self._labels - 1

    def place(self, label: int) -> None:
        self.emit("label", disp=label)

    def finish(self) -> Program:
        flat = np.fromiter(chain.from_iterable(self._rows), np.int64, len(self._rows) * len(_NAMES))
        rows, places = flat.reshape(-1, len(_NAMES)), np.array(self._places, np.int64)
        table = Table(self._size)
        for place, source, some in self._tables:
            here = slice(place, place + some.stop - some.start)
            table.heads[here] = source.heads[some]
            for name in ("step", "disp"):
                table.columns[name][here] = source.columns[name][some]
        for i, name in enumerate(_NAMES):
            column = table.columns[name]
            column[places] = rows[:, i]
            for run in self._runs:
                value = run[i + 2]
                if not isinstance(value, int) or value:
                    column[run[0] : run[0] + run[1]] = value
        return Program(table, tuple(self._constants), self._labels, dict(self._notes))


def by_operation(op: NDArray[np.uint8]) -> dict[int, Ints]:
    """The rows of every operation that occurs; the frequent ones cost a comparison, not a sort."""
    found: dict[int, Ints] = {}
    others = np.ones(op.size, bool)
    sample = np.bincount(op[::32], minlength=len(OPS))
    for number in np.flatnonzero(sample > sample.sum() // 8).tolist():
        same = op == number
        found[number] = np.flatnonzero(same)
        others &= ~same
    rest = np.flatnonzero(others)
    rest = rest.take(np.argsort(op.take(rest), kind="stable"))
    cuts = np.searchsorted(op.take(rest), np.arange(len(OPS) + 1)).tolist()
    for number in range(len(OPS)):
        if cuts[number + 1] > cuts[number]:
            found[number] = rest[cuts[number] : cuts[number + 1]]
    return found


def check(program: Program) -> None:
    """Raise InternalError where a label is missing or placed twice."""
    op, disp = program.columns["op"], program.columns["disp"]
    placed = np.sort(disp[op == OP["label"]])
    if not np.array_equal(placed, np.arange(program.labels)):
        raise InternalError("labels of a vector program are not placed exactly once")
