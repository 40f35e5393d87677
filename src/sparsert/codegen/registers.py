"""Straight-line element-wise code: recorded as single-assignment values, then given registers.

The recorder offers what activation functions are written in. Assignment is a linear scan; fused multiply-adds overwrite
one of their operands in every ISA, so the scan picks the operand that dies, and copies one only where none does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import InternalError
from .vector import Builder

ACCUMULATOR = 1000  # stands for the accumulator in a template


@dataclass(frozen=True)
class Constant:
    """A vector with one 32-bit pattern in every lane."""

    bits: int


@dataclass(frozen=True)
class Value:
    """A recorded value by number; 0 is the input."""

    number: int


Operand = Value | Constant


@dataclass(frozen=True)
class Node:
    op: str
    operands: tuple[Operand, ...]
    immediate: int = 0


@dataclass
class Recorder:
    """Records element-wise operations on float32 lanes; see :mod:`sparsert.kernels.activations` for their meaning."""

    nodes: list[Node] = field(default_factory=lambda: [Node("input", ())])

    def _record(self, op: str, *operands: Operand, immediate: int = 0) -> Value:
        self.nodes.append(Node(op, operands, immediate))
        return Value(len(self.nodes) - 1)

    def const(self, value: float) -> Constant:
        return Constant(struct.unpack("<I", struct.pack("<f", value))[0])

    def bits(self, pattern: int) -> Constant:
        return Constant(pattern & 0xFFFFFFFF)

    def input(self) -> Value:
        return Value(0)

    def residual(self) -> Value:
        return self._record("residual")

    def add(self, a: Operand, b: Operand) -> Value:
        return self._record("add", a, b)

    def sub(self, a: Operand, b: Operand) -> Value:
        return self._record("sub", a, b)

    def mul(self, a: Operand, b: Operand) -> Value:
        return self._record("mul", a, b)

    def div(self, a: Operand, b: Operand) -> Value:
        return self._record("div", a, b)

    def min(self, a: Operand, b: Operand) -> Value:
        return self._record("min", a, b)

    def max(self, a: Operand, b: Operand) -> Value:
        return self._record("max", a, b)

    def bit_and(self, a: Operand, b: Operand) -> Value:
        return self._record("bit_and", a, b)

    def bit_or(self, a: Operand, b: Operand) -> Value:
        return self._record("bit_or", a, b)

    def bit_xor(self, a: Operand, b: Operand) -> Value:
        return self._record("bit_xor", a, b)

    def add_i(self, a: Operand, b: Operand) -> Value:
        return self._record("add_i", a, b)

    def fma(self, a: Operand, b: Operand, c: Operand) -> Value:
        return self._record("fma", a, b, c)

    def fnma(self, a: Operand, b: Operand, c: Operand) -> Value:
        return self._record("fnma", a, b, c)

    def round(self, a: Operand) -> Value:
        return self._record("round", a)

    def to_int(self, a: Operand) -> Value:
        return self._record("to_int", a)

    def shl(self, a: Operand, count: int) -> Value:
        return self._record("shl", a, immediate=count)

    def select_neg(self, s: Operand, a: Operand, b: Operand) -> Value:
        return self._record("select_neg", s, a, b)


@dataclass(frozen=True)
class Template:
    """Rows (op, d, a, b, immediate) for one accumulator.

    Registers are numbered from 0, or are ``ACCUMULATOR``; constants are negative. ``preload`` are constants held in
    registers throughout: (register, constant row).
    """

    rows: tuple[tuple[str, int, int, int, int], ...]
    preload: tuple[tuple[int, int], ...]
    registers: int


_COMMUTATIVE = {"add", "mul", "bit_and", "bit_or", "bit_xor", "add_i"}


class _Assigner:
    """The linear scan: walks the nodes once, knows for each value its last use and its register."""

    def __init__(self, recorder: Recorder, result: Value, constant: Callable[[int], int], hold: bool,
                 addend: bool) -> None:  # fmt: skip
        self.hold = (
            hold  # constants that must sit in a register stay there, instead of being loaded where they are used
        )
        self.addend = addend  # multiply-adds overwrite nothing else
        self.nodes, self.result, self.constant = recorder.nodes, result.number, constant
        self.last = {result.number: len(self.nodes)}
        for i, node in enumerate(self.nodes):
            for operand in node.operands:
                if isinstance(operand, Value):
                    self.last[operand.number] = max(self.last.get(operand.number, 0), i)
        self.where: dict[int, int] = {0: ACCUMULATOR}
        self.free: list[int] = []
        self.high = 0
        self.rows: list[tuple[str, int, int, int, int]] = []
        self.preload: dict[int, int] = {}

    def take(self) -> int:
        if self.free:
            return self.free.pop()
        self.high += 1
        return self.high - 1

    def register(self, operand: Operand) -> int:
        """The register of a value, or of a constant that has to sit in one."""
        if isinstance(operand, Value):
            return self.where[operand.number]
        if operand.bits not in self.preload:
            self.high += 1
            self.preload[operand.bits] = self.high - 1
        return self.preload[operand.bits]

    def flexible(self, operand: Operand) -> int:
        """The same, but a constant may stay in memory."""
        return -1 - self.constant(operand.bits) if isinstance(operand, Constant) else self.where[operand.number]

    def dies(self, operand: Operand, at: int) -> bool:
        return isinstance(operand, Value) and self.last[operand.number] == at

    def release(self, node: Node, at: int, keep: int = -1) -> None:
        for number in {o.number for o in node.operands if isinstance(o, Value)}:
            if self.last[number] == at and self.where[number] != keep:
                self.free.append(self.where[number])

    def overwrite(self, operand: Operand, at: int) -> int:
        """A register that holds ``operand`` and may be overwritten."""
        if self.dies(operand, at):
            return self.register(operand)
        copy = self.take()
        if isinstance(operand, Constant):
            self.rows.append(("const", copy, 0, -1 - self.constant(operand.bits), 0))
        else:
            self.rows.append(("mov", copy, self.register(operand), 0, 0))
        return copy

    def run(self) -> Template:
        for i, node in enumerate(self.nodes):
            if node.op == "input" or i not in self.last:
                continue
            operands = node.operands
            if node.op in ("fma", "fnma"):
                d = self._fused(node, i)
            elif node.op == "select_neg":
                d = self.overwrite(operands[0], i)
                self.rows.append((node.op, d, self.register(operands[1]), self.register(operands[2]), 0))
                self.release(node, i, keep=d)
            elif node.op == "residual":
                d = self.take()
                self.rows.append(("residual", d, 0, 0, 0))
            else:
                a, b = (operands + (operands[0],))[:2]
                if isinstance(a, Constant) and node.op in _COMMUTATIVE:
                    a, b = b, a
                loaded = isinstance(a, Constant) and not self.hold
                ra = self.overwrite(a, i) if loaded else self.register(a)
                rb = self.flexible(b) if len(operands) == 2 else 0
                self.release(node, i)
                if loaded:
                    self.free.append(ra)
                d = self.take() if ACCUMULATOR not in self.free else self.free.pop(self.free.index(ACCUMULATOR))
                self.rows.append((node.op, d, ra, rb, node.immediate))
            self.where[i] = d
        final = self.where[self.result]
        if final != ACCUMULATOR:
            self.rows.append(("mov", ACCUMULATOR, final, 0, 0))
        preload = tuple((register, -1 - self.constant(bits)) for bits, register in self.preload.items())
        return Template(tuple(self.rows), preload, self.high)

    def _fused(self, node: Node, at: int) -> int:
        a, b, c = node.operands
        if isinstance(a, Constant):
            a, b = b, a
        dying = self.dies(c, at) or not (self.dies(a, at) or self.dies(b, at))
        if self.addend or isinstance(b, Constant) or (isinstance(c, Value) and dying):
            d = self.overwrite(c, at)
            self.rows.append((f"{node.op}_acc", d, self.register(a), self.flexible(b), 0))
        else:
            if not self.dies(a, at) and self.dies(b, at):
                a, b = b, a
            d = self.overwrite(a, at)
            self.rows.append((f"{node.op}_mul", d, self.register(b), self.flexible(c), 0))
        self.release(node, at, keep=d)
        return d


def assign(recorder: Recorder, result: Operand, builder: Builder, idle: int, addend: bool = False) -> Template:
    """Registers for everything ``result`` depends on; its value ends in the accumulator it started from.

    ``addend``: multiply-adds can overwrite their addend only (``Target.addend_only``).
    Constants that cannot stay in memory are held in registers as long as all fits ``idle``, and reloaded otherwise.
    """
    if not isinstance(result, Value):
        raise InternalError("an element-wise function must depend on its input")
    held = _Assigner(recorder, result, builder.constant, True, addend).run()
    if held.registers <= idle:
        return held
    loaded = _Assigner(recorder, result, builder.constant, False, addend).run()
    return loaded if loaded.registers < held.registers else held
