"""Memory operands as a base and an offset of 12 bits in units of the access, and what computes other bases for them.

A pointer itself is never moved. What it does not reach lies in a *window*, a multiple of as much as such an offset
spans, or some run-time pitches away: the address is computed into a register beside the pointer, from the one before
where that takes a single instruction. An x vector in row-major arrays then takes an addition and a load.
"""

from __future__ import annotations

import numpy as np

from ...errors import InternalError
from ..vector import OP, OPS, PITCH_OF, Program, S
from .encoder import Ints, Value
from .registers import FAR, GPR
from .stream import TEMP, Stream

_UNITS = {op.name: 1 for op in OPS if op.scalar} | {
    "bcast": 4, "prefetch": 8, "prefetch_near": 8, "load_mask": 1, "store_mask": 1,
    "s_load32": 4, "s_store32": 4, "s_at16": 2, "s_at32": 4,
}  # fmt: skip
_UNIT = np.array([_UNITS.get(op.name, 16) if "m" in op.form else 0 for op in OPS])
"""Bytes that an offset of each operation's instruction counts in; 0: no memory operand."""
_WRITES = np.array([op.scalar and "d" in op.form for op in OPS])
_MULTIPLES = {S.X: {1: S.PX, 3: S.PX3, 5: S.PX5, 7: S.PX7}, S.Y: {1: S.PY}}


class Addresses:
    """The operands of a program; what computes them is put into ``stream`` first."""

    def __init__(self, program: Program, stream: Stream) -> None:
        c = self._c = program.columns
        self._stream = stream
        op = c["op"]
        self._base, self._offset = np.zeros(op.size, np.int64), c["disp"].copy()
        memory = np.flatnonzero(_UNIT[op])
        self._joints = np.flatnonzero((op == OP["label"]) | (op == OP["call"]) | (op == OP["invoke"]))
        self._writes = np.flatnonzero(_WRITES[op])
        for number in np.unique(c["ptr"][memory]).tolist():
            self._pointer(S(number), memory[c["ptr"][memory] == number])

    def operand(self, rows: Ints) -> tuple[Value, Value]:
        """Base and offset of ``rows``."""
        base = self._base[rows]
        return int(base[0]) if (base == base[0]).all() else base, self._offset[rows]

    def _pointer(self, pointer: S, rows: Ints) -> None:
        unit, disp, step = _UNIT[self._c["op"][rows]], self._c["disp"][rows], self._c["step"][rows].astype(np.int64)
        window = disp & -4096 * int(unit.min())
        window = np.where((disp - window) % unit, disp, window)
        self._offset[rows] = disp - window
        self._base[rows] = GPR[pointer]
        away = (window != 0) | (step != 0)
        if not away.any():
            return
        far, window, step = rows[away], window[away], step[away]
        if pointer in FAR:
            self._base[far] = FAR[pointer]
            self._walk(pointer, far, window, step)
        elif step.any():
            raise InternalError(f"pointer {pointer.name} has no pitch")
        else:
            self._base[far] = TEMP
            self._stream.sum(far, TEMP, GPR[pointer], window)

    def _walk(self, pointer: S, rows: Ints, window: Ints, step: Ints) -> None:
        """The register beside the pointer from operand to operand."""
        own, beside = GPR[pointer], FAR[pointer]
        written = self._c["d"][self._writes]
        related = np.isin(written, [pointer, *_MULTIPLES.get(pointer, {}).values()])
        joints = np.sort(np.concatenate([self._joints, self._writes[related]]))
        region = np.searchsorted(joints, rows)
        fresh = np.ones(rows.size, bool)
        np.not_equal(region[1:], region[:-1], out=fresh[1:])
        by, steps = np.diff(window, prepend=0), np.diff(step, prepend=0)
        fresh |= (np.abs(by) >= 1 << 24) | ((steps != 0) & (self._multiple(pointer, steps)[0] < 0))
        by, steps = np.where(fresh, window, by), np.where(fresh, step, steps)
        moved = np.flatnonzero(fresh | (by != 0) | (steps != 0))
        rows, by, steps = rows[moved], by[moved], steps[moved]
        source = np.where(fresh[moved], own, beside)
        some = by != 0
        self._stream.sum(rows[some], beside, source[some], by[some])
        source[some] = beside
        register, shift = self._multiple(pointer, steps)
        for name, sign in (("add", 1), ("sub", -1)):
            some = (np.sign(steps) == sign) & (register >= 0)
            self._stream.put(name, rows[some], beside, source[some], register[some], shift[some])
        some = (steps != 0) & (register < 0)
        if some.any():
            self._stream.number(rows[some], TEMP, steps[some])
            self._stream.put("madd", rows[some], beside, TEMP, GPR[PITCH_OF[pointer]], source[some])

    @staticmethod
    def _multiple(pointer: S, steps: Ints) -> tuple[Ints, Ints]:
        """The register with so many pitches, when shifted; -1 where there is none."""
        if pointer not in _MULTIPLES:
            return np.full(steps.size, -1), steps
        size = np.abs(steps)
        power = np.maximum(size & -size, 1)
        odd, shift = size // power, np.log2(power).astype(np.int64)
        table = np.full(9, -1)
        for times, register in _MULTIPLES[pointer].items():
            table[times] = GPR[register]
        return table[np.minimum(odd, 8)], shift
