"""The meaning of every operation of the vector vocabulary, as Python that runs: the oracle of every ISA.

Lanes hold float32, one rounding per operation. Where that leaves a choice, the vocabulary means: ``min`` and ``max``
give the second operand where the two are equal or unordered; multiply-adds round once; ``round`` and ``to_int`` round
to nearest even, ``to_int`` of what fits no int32 is INT_MIN. Which NaN comes out of several is left open.

Memory consists of named regions. An access of a single byte outside them is an error, and so is reading a register
that nothing was written to, a constant before ``s_const``, or a pitch whose multiples are not in place. Operands with
a ``step`` may use TMP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import InternalError
from .vector import ARGUMENTS, OPS, PITCH_OF, PRESERVED, Program, S

Lanes = NDArray[np.float32]
_WORD = (1 << 64) - 1
_POOL, _CODE = 1 << 62, 1 << 63  # addresses of the constants and of the labels: only compared, never accessed


class Region(NamedTuple):
    """``data`` at ``address``; its size is its length in bytes."""

    address: int
    data: NDArray[np.uint8]


Memory = Mapping[str, Region]
Functions = Mapping[int, Callable[..., None]]
"""Native functions by address; each is called with the values of the six argument registers, None where unwritten."""


def region(address: int, array: NDArray[np.generic]) -> Region:
    """A region that shares the memory of a C-contiguous array."""
    data = array.reshape(-1).view(np.uint8)
    if not np.shares_memory(data, array) and array.size:
        raise InternalError("a region of memory is C-contiguous")
    return Region(address, data)


class Row(NamedTuple):
    """One row of a program."""

    op: int
    d: int
    a: int
    b: int
    ptr: int
    step: int
    disp: int


def _bits(x: Lanes) -> NDArray[np.uint32]:
    return x.view(np.uint32)


def _floats(x: NDArray[np.uint32]) -> Lanes:
    return x.astype(np.uint32, copy=False).view(np.float32)


def fused(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """a * b + c, rounded once.

    The product is exact in float64. Its sum with c is rounded to odd (where inexact, the neighbour with an odd last
    bit: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008); rounding that to float32 rounds
    the exact sum.
    """
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    even = np.isfinite(total) & np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    odd = bits + np.where(even, np.where((error > 0) == (total > 0), 1, -1), 0)
    return odd.view(np.float64).astype(np.float32)


def _to_int(a: Lanes) -> Lanes:
    rounded = np.rint(a.astype(np.float64))
    inside = (rounded >= -(2.0**31)) & (rounded < 2.0**31)
    return np.where(inside, rounded, -(2.0**31)).astype(np.int32).view(np.float32)


def _zip(a: Lanes, b: Lanes, half: int, width: int) -> Lanes:
    """From every 128 bits: the lower or upper ``half`` of a and b, ``width`` lanes of either in turn."""
    parts = [x.reshape(-1, 2, 2 // width, width)[:, half] for x in (a, b)]
    return np.stack(parts, axis=2).reshape(-1)


# Operations on lanes: the function of the old d, a and b gives the new d.
LANES: dict[str, Callable[[Lanes, Lanes, Lanes], Lanes]] = {
    "zero": lambda d, a, b: np.zeros_like(d),
    "mov": lambda d, a, b: a,
    "const": lambda d, a, b: b,
    "add": lambda d, a, b: a + b,
    "sub": lambda d, a, b: a - b,
    "mul": lambda d, a, b: a * b,
    "div": lambda d, a, b: a / b,
    "min": lambda d, a, b: np.where(a < b, a, b),
    "max": lambda d, a, b: np.where(a > b, a, b),
    "bit_and": lambda d, a, b: _floats(_bits(a) & _bits(b)),
    "bit_or": lambda d, a, b: _floats(_bits(a) | _bits(b)),
    "bit_xor": lambda d, a, b: _floats(_bits(a) ^ _bits(b)),
    "add_i": lambda d, a, b: _floats(_bits(a) + _bits(b)),  # modulo 2**32
    "fma_acc": lambda d, a, b: fused(a, b, d),
    "fma_mul": lambda d, a, b: fused(d, a, b),
    "fnma_acc": lambda d, a, b: fused(-a, b, d),
    "fnma_mul": lambda d, a, b: fused(-d, a, b),
    "round": lambda d, a, b: np.rint(a),
    "to_int": lambda d, a, b: _to_int(a),
    "select_neg": lambda d, a, b: np.where(_bits(d) >> 31 != 0, a, b),  # by the sign bit: of -0.0 and of NaN too
    "zip_lo": lambda d, a, b: _zip(a, b, 0, 1),  # a0 b0 a1 b1 of every four lanes
    "zip_hi": lambda d, a, b: _zip(a, b, 1, 1),  # a2 b2 a3 b3
    "zip2_lo": lambda d, a, b: _zip(a, b, 0, 2),  # a0 a1 b0 b1
    "zip2_hi": lambda d, a, b: _zip(a, b, 1, 2),  # a2 a3 b2 b3
    "evens": lambda d, a, b: np.concatenate([a[::2], b[::2]]),
    "lookup2": lambda d, a, b: np.concatenate([a, b])[_bits(d) % (2 * d.size)],  # d's low bits say which lane
}
_READS_D = ("fma_acc", "fma_mul", "fnma_acc", "fnma_mul", "select_neg", "lookup2")


class Machine:
    """Registers, memory and the place in the program."""

    def __init__(
        self, program: Program, lanes: int, args: NDArray[np.int64], memory: Memory, functions: Functions, here: int
    ) -> None:
        self.lanes, self.args, self.memory, self.functions = lanes, args, memory, functions
        self.rows = [Row(*row) for row in zip(*(c.tolist() for c in program.columns.values()), strict=True)]
        self.labels = {row.disp: i for i, row in enumerate(self.rows) if OPS[row.op].name == "label"}
        self.constants = [np.full(lanes, bits, np.uint32).view(np.float32) for bits in program.constants]
        self.vector: dict[int, Lanes] = {}
        self.scalar: dict[int, int] = {int(S.ARGS): here & _WORD}
        self.mask: NDArray[np.bool_] | None = None
        self.masks: dict[int, NDArray[np.bool_]] = {}
        self.calls: list[int] = []
        self.at = 0
        self.done = False

    def fail(self, what: str) -> InternalError:
        row = self.rows[self.at]
        return InternalError(what, where=f"row {self.at}, {OPS[row.op].name} d={row.d} a={row.a} b={row.b} "
                                         f"ptr={row.ptr} step={row.step} disp={row.disp}")  # fmt: skip

    def lane(self, number: int, negative_is_constant: bool = False) -> Lanes:
        if number < 0 and negative_is_constant:
            if self.scalar.get(S.CONST) != _POOL:
                raise self.fail("a constant is used before s_const")
            return self.constants[-1 - number]
        if number not in self.vector:
            raise self.fail(f"vector register {number} is read before it is written")
        return self.vector[number]

    def get(self, number: int) -> int:
        if number not in self.scalar:
            raise self.fail(f"scalar register {S(number).name} is read before it is written")
        return self.scalar[number]

    def put(self, number: int, value: int) -> None:
        self.scalar[number] = value & _WORD

    def slot(self, byte: int) -> int:
        if byte % 8 or not 0 <= byte < 8 * self.args.size:
            raise self.fail(f"byte {byte} is no slot of the argument block")
        return byte // 8

    def address(self, row: Row) -> int:
        where = self.get(row.ptr) + row.disp
        if row.step:
            if row.ptr not in (S.X, S.Y):
                raise self.fail(f"pointer {S(row.ptr).name} has no pitch")
            pitch = self.get(PITCH_OF[S(row.ptr)])
            multiples = {S.PX3: 3, S.PX5: 5, S.PX7: 7} if row.ptr == S.X else {}
            if any(self.get(register) != pitch * n & _WORD for register, n in multiples.items()):
                raise self.fail("the multiples of the pitch are not in place")
            where += row.step * pitch
            self.scalar.pop(S.TMP, None)
        return where & _WORD

    def bytes(self, address: int, size: int) -> NDArray[np.uint8]:
        """A view of ``size`` bytes, all inside one region."""
        for start, data in self.memory.values():
            if start <= address and address + size <= start + data.size:
                return data[address - start : address - start + size]
        name, (start, data) = min(self.memory.items(), key=lambda item: abs(item[1].address - address))
        raise self.fail(f"{size} bytes at {address:#x} are outside all regions; nearest is {name} of {data.size} bytes "
                        f"at {start:#x}")  # fmt: skip

    def read(self, row: Row, lanes: int) -> Lanes:
        return self.bytes(self.address(row), 4 * lanes).copy().view(np.float32)

    def write(self, row: Row, value: Lanes) -> None:
        self.bytes(self.address(row), 4 * value.size)[:] = value.view(np.uint8)

    def masked(self, row: Row) -> list[tuple[int, NDArray[np.uint8]]]:
        """The lanes that the mask selects, each with its bytes; the others are not accessed."""
        if self.mask is None:
            raise self.fail("a masked access before set_mask")
        start = self.address(row)
        return [(i, self.bytes(start + 4 * i, 4)) for i in np.flatnonzero(self.mask).tolist()]

    def jump(self, label: int) -> None:
        if label not in self.labels:
            raise self.fail(f"label {label} is nowhere")
        self.at = self.labels[label]


def _insert4(m: Machine, r: Row) -> None:
    d = m.lane(r.d).copy()
    d[4 * r.b : 4 * r.b + 4] = m.read(r, 4)
    m.vector[r.d] = d


def _load4(m: Machine, r: Row) -> None:
    m.vector[r.d] = np.zeros(m.lanes, np.float32)
    m.vector[r.d][:4] = m.read(r, 4)


def _load_mask(m: Machine, r: Row) -> None:
    d = np.zeros(m.lanes, np.float32)
    for i, raw in m.masked(r):
        d[i] = raw.view(np.float32)[0]
    m.vector[r.d] = d


def _mask_from(m: Machine, r: Row) -> None:
    m.masks[r.d] = _bits(m.read(r, m.lanes)) >> 31 != 0


def _numbered(m: Machine, r: Row) -> NDArray[np.bool_]:
    if r.b not in m.masks:
        raise m.fail(f"mask {r.b} is used before it is set")
    return m.masks[r.b]


def _load_by_mask(m: Machine, r: Row) -> None:
    mask, d, start = _numbered(m, r), np.zeros(m.lanes, np.float32), m.address(r)
    for i in np.flatnonzero(mask).tolist():
        d[i] = m.bytes(start + 4 * i & _WORD, 4).view(np.float32)[0]
    m.vector[r.d] = d


def _mask_bits(m: Machine, r: Row) -> None:
    if m.lanes > 16:
        raise m.fail("masks have 16 bits")
    bits = int(m.bytes(m.address(r), 2).copy().view(np.uint16)[0])
    m.masks[r.d] = bits >> np.arange(m.lanes) & 1 != 0


def _bcast_by_mask(m: Machine, r: Row) -> None:
    mask = _numbered(m, r)
    m.vector[r.d] = np.where(mask, m.read(r, 1)[0] if mask.any() else np.float32(0), np.float32(0))


def _pick(m: Machine, r: Row) -> None:
    both = np.concatenate([m.lane(r.d), m.lane(r.b)])
    m.vector[r.d] = both[_bits(m.lane(r.a)) % both.size]


def _lanes_from(m: Machine, r: Row) -> None:
    both = np.concatenate([m.lane(r.a), m.lane(r.b)])
    if not 0 <= r.disp < m.lanes:
        raise m.fail(f"there is no lane {r.disp}")
    m.vector[r.d] = both[r.disp : r.disp + m.lanes]


def _lanes_by_mask(m: Machine, r: Row) -> None:
    mask = _numbered(m, r._replace(b=r.step))
    _lanes_from(m, r)
    m.vector[r.d] = np.where(mask, m.vector[r.d], np.float32(0))


def _rotate_by_mask(m: Machine, r: Row) -> None:
    m.vector[r.d] = np.where(_numbered(m, r), np.roll(m.lane(r.a), -r.disp), np.float32(0))


def _store_by_mask(m: Machine, r: Row) -> None:
    mask, value, start = _numbered(m, r), m.lane(r.a), m.address(r)
    for i in np.flatnonzero(mask).tolist():
        m.bytes(start + 4 * i & _WORD, 4)[:] = value[i : i + 1].view(np.uint8)


def _store_mask(m: Machine, r: Row) -> None:
    for i, raw in m.masked(r):
        raw[:] = m.lane(r.a)[i : i + 1].view(np.uint8)


def _set_mask(m: Machine, r: Row) -> None:
    m.mask = _bits(m.read(r, m.lanes)) >> 31 != 0


def _load_bytes(m: Machine, r: Row) -> None:
    raw = m.bytes(m.address(r), m.lanes).view(np.int8)
    m.vector[r.d] = raw.astype(np.int32).view(np.float32)


def _sign_mask(m: Machine, r: Row) -> None:
    m.mask = _bits(m.lane(r.a)) >> 31 != 0


def _selected(m: Machine) -> NDArray[np.bool_]:
    if m.mask is None:
        raise m.fail("a mask is used before it is set")
    return m.mask


def _expand(m: Machine, r: Row) -> None:
    mask = _selected(m)
    d = np.zeros(m.lanes, np.float32)
    d[mask] = m.read(r, int(mask.sum()))
    m.vector[r.d] = d


def _fma_mask(m: Machine, r: Row) -> None:
    d = m.lane(r.d)
    m.vector[r.d] = np.where(_selected(m), fused(m.lane(r.a), m.lane(r.b), d), d)


def _load_words(m: Machine, r: Row) -> None:
    m.vector[r.d] = _floats(m.bytes(m.address(r), 2 * m.lanes).copy().view("<u2").astype(np.uint32))


def _expand_lanes(m: Machine, r: Row) -> None:
    mask, a = _selected(m), m.lane(r.a)
    d = np.zeros(m.lanes, np.float32)
    d[mask] = a[: int(mask.sum())]
    m.vector[r.d] = d


def _bcast4(m: Machine, r: Row) -> None:
    m.vector[r.d] = np.tile(m.read(r, 4), m.lanes // 4)


def _shuffle4(m: Machine, r: Row) -> None:
    lanes = np.arange(m.lanes)
    m.vector[r.d] = m.lane(r.a)[lanes & ~3 | r.disp >> 2 * (lanes & 3) & 3]


def _indexed(m: Machine, r: Row, index: int, lanes: int) -> Lanes:
    return m.bytes(m.address(r) + 8 * m.get(index) & _WORD, 4 * lanes).copy().view(np.float32)


def _fma_at(m: Machine, r: Row) -> None:
    m.vector[r.d] = fused(m.lane(r.a), _indexed(m, r, r.b, m.lanes), m.lane(r.d))


def _load4_pair(m: Machine, r: Row) -> None:
    d = np.zeros(m.lanes, np.float32)
    d[:4], d[4:8] = _indexed(m, r, r.a, 4), _indexed(m, r, r.b, 4)
    m.vector[r.d] = d


def _unsigned(m: Machine, r: Row, size: int) -> int:
    return int.from_bytes(m.bytes(m.address(r), size).tobytes(), "little")


def _store32(m: Machine, r: Row) -> None:
    m.bytes(m.address(r), 4)[:] = np.frombuffer((m.get(r.a) & 0xFFFFFFFF).to_bytes(4, "little"), np.uint8)


def _at(m: Machine, r: Row, size: int) -> None:
    m.put(r.d, m.get(r.a) + (_unsigned(m, r, size) << r.b))
    if r.d != S.TMP:
        m.scalar.pop(S.TMP, None)


def _skip(m: Machine, r: Row, size: int = 4) -> None:
    m.put(r.d, m.get(r.d) + size * int(_selected(m).sum()))
    m.scalar.pop(S.TMP, None)


def _loop(m: Machine, r: Row) -> None:
    m.put(r.a, m.get(r.a) - 1)
    if m.get(r.a):
        m.jump(r.disp)


def _call(m: Machine, r: Row) -> None:
    m.calls.append(m.at)
    m.jump(r.disp)


def _ret(m: Machine, r: Row) -> None:
    if not m.calls:
        raise m.fail("return without a call")
    m.at = m.calls.pop()


def _leave(m: Machine, r: Row) -> None:
    if m.calls:
        raise m.fail("the kernel is left inside a call")
    m.done = True


def _shl(m: Machine, r: Row) -> None:
    bits = _bits(m.lane(r.a))
    m.vector[r.d] = _floats(bits << np.uint32(r.disp) if r.disp < 32 else np.zeros_like(bits))


def _lane(m: Machine, r: Row) -> Lanes:
    """One element of b, for all lanes."""
    if not 0 <= r.disp < m.lanes:
        raise m.fail(f"there is no lane {r.disp}")
    return m.lane(r.b)[r.disp : r.disp + 1]


def _slot_value(m: Machine, r: Row) -> int:
    return int(m.args[m.slot(r.disp)]) & _WORD


def _signed(word: int) -> int:
    return word - (word >> 63 << 64)


def _put_slot(m: Machine, r: Row) -> None:
    m.args[m.slot(r.disp)] = np.uint64(m.get(r.a)).astype(np.int64)


def _prefetch(m: Machine, r: Row) -> None:
    m.address(r)  # no effect, and any address is allowed


def _nothing(m: Machine, r: Row) -> None:
    pass


def _word(m: Machine, r: Row) -> NDArray[np.uint64]:
    """The 64-bit word in memory that a row names."""
    address = m.address(r)
    if address % 8:
        raise m.fail(f"a shared word at {address:#x} is not aligned")
    return m.bytes(address, 8).view(np.uint64)


def _s_store(m: Machine, r: Row) -> None:
    _word(m, r)[0] = m.get(r.a)


def _s_exchange(m: Machine, r: Row) -> None:
    word, m.mask = _word(m, r), None
    old, word[0] = int(word[0]), m.get(r.d)
    m.put(r.d, old)


def _s_fetch_add(m: Machine, r: Row) -> None:
    word, m.mask = _word(m, r), None
    old = int(word[0])
    word[0] = old + m.get(r.d) & _WORD
    m.put(r.d, old)


def _s_replace(m: Machine, r: Row) -> None:
    word, m.mask = _word(m, r), None
    old, new = int(word[0]), m.get(r.b)
    if old == m.get(r.d):
        word[0] = new
    m.scalar.pop(S.X, None)
    m.put(r.d, old)


def _invoke(m: Machine, r: Row) -> None:
    function = m.functions.get(m.get(r.a))
    if function is None or m.calls:
        raise m.fail("a native function is called inside a routine, or is none")
    function(*(m.scalar.get(register) for register in ARGUMENTS))
    m.vector, m.mask = {}, None
    m.scalar = {register: value for register, value in m.scalar.items() if register in PRESERVED}


# All others: with memory, scalars or control.
EFFECTS: dict[str, Callable[[Machine, Row], None]] = {
    "load": lambda m, r: m.vector.update({r.d: m.read(r, m.lanes)}),
    "store": lambda m, r: m.write(r, m.lane(r.a)),
    "bcast": lambda m, r: m.vector.update({r.d: np.full(m.lanes, m.read(r, 1)[0])}),  # one float to all lanes
    "fma_bcast": lambda m, r: m.vector.update({r.d: fused(m.lane(r.a), m.read(r, 1), m.lane(r.d))}),
    "mul_bcast": lambda m, r: m.vector.update({r.d: m.lane(r.a) * m.read(r, 1)}),
    "fma_lane": lambda m, r: m.vector.update({r.d: fused(m.lane(r.a), _lane(m, r), m.lane(r.d))}),
    "mul_lane": lambda m, r: m.vector.update({r.d: m.lane(r.a) * _lane(m, r)}),
    "shl": _shl,  # bits to the left, zeros in
    "load4": _load4,  # four floats to the first lanes, zeros to the others
    "insert4": _insert4,  # four floats to lanes 4 b ...
    "store4": lambda m, r: m.write(r, m.lane(r.a)[4 * r.b : 4 * r.b + 4]),
    "set_mask": _set_mask,  # the sign bits of a vector in memory
    "load_mask": _load_mask,  # zero where the mask is off
    "store_mask": _store_mask,
    "mask_from": _mask_from,  # one of several masks, d, from the sign bits of a vector in memory
    "load_by_mask": _load_by_mask,  # zero where mask b is off
    "mask_bits": _mask_bits,  # mask d from 16 bits in memory
    "store_by_mask": _store_by_mask,
    "bcast_by_mask": _bcast_by_mask,
    "pick": _pick,  # lanes of d and then b, by the numbers in a
    "lanes_from": _lanes_from,  # of a and then b, from a lane of a on
    "lanes_by_mask": _lanes_by_mask,  # the same, zero where the mask that step names is off
    "rotate_by_mask": _rotate_by_mask,  # lane i from lane i + disp, zero where mask b is off
    "prefetch": _prefetch,  # into the second-level cache
    "prefetch_near": _prefetch,  # into the first
    "load_bytes": _load_bytes,  # as many bytes as there are lanes, sign-extended to integers
    "sign_mask": _sign_mask,  # the sign bits of a register
    "expand": _expand,  # consecutive floats to the lanes that the mask selects, zeros to the others
    "fma_mask": _fma_mask,  # d + a * b where the mask selects, d elsewhere
    "s_arg": lambda m, r: m.put(r.d, _slot_value(m, r)),
    "s_put": _put_slot,
    "s_mov": lambda m, r: m.put(r.d, m.get(r.a)),
    "s_add": lambda m, r: m.put(r.d, m.get(r.d) + m.get(r.a)),  # modulo 2**64, as all of them
    "s_sub": lambda m, r: m.put(r.d, m.get(r.d) - m.get(r.a)),
    "s_addi": lambda m, r: m.put(r.d, m.get(r.d) + r.disp),
    "s_set": lambda m, r: m.put(r.d, r.disp),
    "s_muli": lambda m, r: m.put(r.d, m.get(r.a) * r.disp),
    "s_add_arg": lambda m, r: m.put(r.d, m.get(r.d) + _slot_value(m, r)),
    "s_max_arg": lambda m, r: m.put(r.d, max(m.get(r.d), _slot_value(m, r), key=_signed)),
    "s_min_arg": lambda m, r: m.put(r.d, min(m.get(r.d), _slot_value(m, r), key=_signed)),
    "s_const": lambda m, r: m.put(r.d, _POOL),
    "s_code": lambda m, r: m.put(r.d, _CODE + r.disp),
    "label": _nothing,
    "align": _nothing,
    "jump": lambda m, r: m.jump(r.disp),
    "jump_zero": lambda m, r: m.jump(r.disp) if m.get(r.a) == 0 else None,
    "loop": _loop,  # counts down, jumps unless zero is reached
    "call": _call,
    "ret": _ret,
    "enter": _nothing,
    "leave": _leave,
    "s_load32": lambda m, r: m.put(r.d, _unsigned(m, r, 4)),
    "s_store32": _store32,
    "s_at8": lambda m, r: _at(m, r, 1),  # a plus an unsigned byte in memory, shifted left by b; may use TMP
    "s_at16": lambda m, r: _at(m, r, 2),
    "s_at32": lambda m, r: _at(m, r, 4),
    "s_skip": _skip,  # past as many floats as the mask selects lanes; may use TMP
    "bcast4": _bcast4,  # four floats to every four lanes
    "shuffle4": _shuffle4,  # within every four lanes: lane i from the one that two bits of the immediate name
    "load_words": _load_words,  # as many numbers of 16 bits as there are lanes, zeros above them
    "expand_lanes": _expand_lanes,  # the first lanes of a to the lanes that the mask selects, zeros to the others
    "fma_at": _fma_at,  # d + a * the vector in memory, 8 b further on; b is a scalar register
    "load4_pair": _load4_pair,  # four floats 8 a further on, then four 8 b further on, zeros; both scalar registers
    "s_skip2": lambda m, r: _skip(m, r, 2),  # past as many numbers of 16 bits as the mask selects lanes; may use TMP
    "s_low16": lambda m, r: m.put(r.d, m.get(r.a) & 0xFFFF),
    "s_shr": lambda m, r: m.put(r.d, m.get(r.d) >> r.disp),
    "s_load": lambda m, r: m.put(r.d, int(_word(m, r)[0])),
    "s_store": _s_store,
    "s_exchange": _s_exchange,  # the register and the word swap what they hold
    "s_fetch_add": _s_fetch_add,  # the register gives what is added and takes what was there
    "s_replace": _s_replace,  # by b if the word is d, which takes what was there; X is lost
    "s_pause": _nothing,  # a turn of a loop that waits for another thread
    "jump_equal": lambda m, r: m.jump(r.disp) if m.get(r.a) == m.get(r.b) else None,
    "jump_differs": lambda m, r: m.jump(r.disp) if m.get(r.a) != m.get(r.b) else None,
    "jump_less": lambda m, r: m.jump(r.disp) if _signed(m.get(r.a)) < _signed(m.get(r.b)) else None,
    "invoke": _invoke,  # a native function, not from within ``call``; registers but PRESERVED are lost
}


def _lanewise(name: str) -> Callable[[Machine, Row], None]:
    function, form = LANES[name], next(op.form for op in OPS if op.name == name)
    unused = np.zeros(0, np.float32)

    def effect(m: Machine, r: Row) -> None:
        d = m.lane(r.d) if name in _READS_D else np.zeros(m.lanes, np.float32)
        a = m.lane(r.a) if "a" in form else unused
        b = m.lane(r.b, True) if "b" in form else unused
        m.vector[r.d] = function(d, a, b)

    return effect


_BY_NUMBER = [_lanewise(op.name) if op.name in LANES else EFFECTS[op.name] for op in OPS]


def run(program: Program, lanes: int, args: NDArray[np.int64], memory: Memory, budget: int = 10**6,
        functions: Functions | None = None, here: int = -1) -> int:  # fmt: skip
    """Execute ``program`` from its first row to ``leave``; how many rows that took.

    Args:
        lanes: float32 lanes of a vector register, a multiple of 4.
        args: the argument block, one 64-bit slot each; the program's own variables in it are written.
        memory: the regions it may access, by name.
        budget: rows after which it counts as a runaway.
        functions: what ``invoke`` may call.
        here: the address of ``args``, for programs that pass it on or read through it; ``args`` is no region by itself.

    Raises:
        InternalError: the program does what no program may; ``where`` names the row.
    """
    m = Machine(program, lanes, args, memory, functions or {}, here)
    with np.errstate(all="ignore"):
        for count in range(1, budget + 1):
            if m.at >= len(m.rows):
                raise InternalError("control runs past the end of the program", where=f"row {m.at}")
            row = m.rows[m.at]
            _BY_NUMBER[row.op](m, row)
            if m.done:
                return count
            m.at += 1
    raise m.fail(f"no end after {budget} rows")
