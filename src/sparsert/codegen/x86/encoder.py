"""The batch encoder: columns of instructions in, bytes out, without a Python object per instruction.

A batch holds any number of instructions that share a row of the table and an encoding; their bytes are assembled as
64-bit words with array arithmetic. That costs some thirty array operations however long the batch is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InternalError
from .table import ALIGN, LABEL, M0F, M1, NAMES, ROWS, Row, Tuple

LEGACY, VEX128, VEX256, EVEX128, EVEX256, EVEX512 = range(6)
RIP = 16  # as ``base``: ``disp`` is a label

Words = NDArray[np.uint64]
Ints = NDArray[np.int64]
Field = int | NDArray[np.integer]  # one value for the whole batch, or one per instruction

_ROWS = tuple(ROWS[name] for name in NAMES)
_BRANCHES = tuple("b" in row.operands for row in _ROWS)
_MANDATORY = (0, 0x66, 0xF3, 0xF2, 0xF0)
_WORD = (1 << 64) - 1
_NUMBERS = np.arange(32)
# What a register number adds to the first six bytes of an EVEX instruction: ModRM.reg with R and R', vvvv with V'.
_EVEX_REG = (_NUMBERS & 7) << 43 | (~_NUMBERS & 8) << 12 | (~_NUMBERS & 16) << 8
_EVEX_VVVV = (~_NUMBERS & 15) << 19 | (~_NUMBERS & 16) << 23
_KINDS = {LEGACY: "L", VEX128: "V", VEX256: "V", EVEX128: "E", EVEX256: "E", EVEX512: "E"}


@dataclass(frozen=True)
class Batch:
    """Instructions of one table row and encoding.

    Attributes:
        row: row number in the table, or ``LABEL`` (its number in ``imm``) or ``ALIGN`` (bytes in ``imm``).
        place: (n,) position of each in the instruction stream.
        fields: ``reg``, ``vvvv``, ``rm``; memory operands instead of ``rm``: ``base``, ``index``, ``scale``, ``disp``
            for ``[base + index * 2**scale + disp]``; ``imm`` (of a branch: its label); ``mask``, ``zero``.
            Absent ones do not occur.
        bcast: embedded broadcast.
    """

    row: int
    encoding: int
    place: Ints
    fields: dict[str, Field] = field(default_factory=dict)
    bcast: bool = False


@dataclass(frozen=True)
class Encoded:
    """Bytes, the offset at which every instruction starts (one more entry for the end), and where the labels lie."""

    code: NDArray[np.uint8]
    offsets: Ints
    labels: Ints


def encode(batches: list[Batch], labels: int) -> Encoded:
    """Encode, lay out, and resolve labels.

    One label more than ``labels`` may be referred to: the end of the code, padded to a cache line, where constants go.
    """
    n = sum(batch.place.size for batch in batches)
    low, high, length = np.zeros(n, np.uint64), np.zeros(n, np.uint64), np.zeros(n, np.int64)
    for batch in batches:
        if batch.row < len(_ROWS) and batch.place.size:
            low[batch.place], head, length[batch.place] = _encoded(batch)
            if head is not None:
                high[batch.place] = head
    for batch in batches:
        if batch.row == ALIGN:
            _align(batch, length, low, high)
    offsets = np.zeros(n + 1, np.int64)
    np.cumsum(length, out=offsets[1:])
    places = np.full(labels + 1, -1, np.int64)
    places[labels] = (offsets[n] + 63) // 64 * 64
    for batch in batches:
        if batch.row == LABEL:
            places[batch.fields["imm"]] = offsets[batch.place]
    code = _flatten(low, high, length, offsets, int(places[labels]))
    for batch in batches:
        if batch.row < len(_ROWS) and (_BRANCHES[batch.row] or _holds(batch.fields.get("base", 0), RIP)):
            _resolve(batch, code, offsets, places)
    return Encoded(code, offsets, places)


def _encoded(batch: Batch) -> tuple[Words, Words | None, Ints | int]:
    """What :func:`_encode` gives; single instructions, as around calls and loops, come again in every program."""
    if batch.place.size != 1:
        return _encode(batch)
    fields = tuple([(key, value if isinstance(value, int) else int(value[0])) for key, value in batch.fields.items()])
    return _encode_one(batch.row, batch.encoding, batch.bcast, fields)


@lru_cache(4096)
def _encode_one(
    row: int, encoding: int, bcast: bool, fields: tuple[tuple[str, int], ...]
) -> tuple[Words, Words | None, Ints | int]:
    return _encode(Batch(row, encoding, np.zeros(1, np.int64), dict(fields), bcast))


def _encode(batch: Batch) -> tuple[Words, Words | None, Ints | int]:
    """Low and high words (None where no instruction is longer than 8 bytes) and lengths."""
    row, f, kind, n = _ROWS[batch.row], batch.fields, _KINDS[batch.encoding], batch.place.size
    mem = "base" in f
    if kind not in row.encodings or (batch.bcast and (kind != "E" or row.tuple != Tuple.FULL or not mem)):
        raise InternalError(f"{NAMES[batch.row]} has no such encoding ({kind}, broadcast={batch.bcast})")
    reg = row.digit if row.digit >= 0 else f["reg"] if "r" in row.operands else 0
    vvvv = f["vvvv"] if "v" in row.operands else 0
    if kind == "V" and any(_largest(f.get(key, 0)) > 15 for key in ("reg", "vvvv", "rm")):
        raise InternalError(f"{NAMES[batch.row]}: VEX reaches registers 0 to 15 only")
    has_modrm = row.digit >= 0 or "m" in row.operands
    opcode: Ints | int = row.opcode
    modrm: Ints | int = 0
    tail: Ints | int = 0
    size: Ints | int = 0
    x: Ints | int = 0
    b: Ints | int = 0
    if mem:
        modrm, tail, size, x, b = _memory_operand(f, _displacement_unit(row, batch.encoding, batch.bcast), n)
    elif has_modrm:
        rm = _wide(f["rm"])
        modrm, x, b = 0xC0 | rm & 7, rm >> 4 & 1, rm >> 3 & 1
    elif "o" in row.operands:
        rm = _wide(f["rm"])
        opcode, b = opcode | rm & 7, rm >> 3
    if row.imm:
        value = _wide(f["imm"]) << (4 if "s" in row.operands else 0)
        imm = 0 if "b" in row.operands else value & (1 << 8 * row.imm) - 1
        if "b" not in row.operands and not _fits(value, 8 * row.imm):
            raise InternalError(f"{NAMES[batch.row]}: an immediate does not fit {row.imm} bytes")
        tail, size = tail | imm << size * 8, size + row.imm
        if (size if isinstance(size, int) else size.max()) > 8 or (mem and _holds(f["base"], RIP)):
            raise InternalError(
                f"{NAMES[batch.row]}: more than eight bytes behind ModRM, or an immediate behind a RIP operand"
            )
    if kind == "E":
        vector = batch.encoding - EVEX128 if row.fixed_length < 0 else row.fixed_length
        fixed = (0x62 | 0x6000 | row.map << 8 | (row.w << 7 | 4 | row.prefix) << 16
                 | (vector << 5 | int(batch.bcast) << 4) << 24 | row.opcode << 32)  # fmt: skip
        head: Ints | int = _looked_up(_EVEX_REG, reg) | _looked_up(_EVEX_VVVV, vvvv)
        head = head | (
            (modrm << 40 | fixed) ^ (x << 14 | b << 13) | _wide(f.get("zero", 0)) << 31 | _wide(f.get("mask", 0)) << 24
        )
        at: Ints | int = 6
        return _join(head, at, tail, size, n)
    reg, vvvv = _wide(reg), _wide(vvvv)
    modrm = modrm | (reg & 7) << 3
    if kind == "V":
        vector = batch.encoding - VEX128 if row.fixed_length < 0 else row.fixed_length
        last, r = (~vvvv & 15) << 3 | vector << 2 | row.prefix, (~reg & 8) << 4
        short = 0xC5 | (r | last) << 8 | row.opcode << 16 | modrm << 24
        long = (0xC4 | (r | (x ^ 1) << 6 | (b ^ 1) << 5 | row.map) << 8 | (row.w << 7 | last) << 16
                | row.opcode << 24 | modrm << 32)  # fmt: skip
        if row.map == M0F and row.w == 0:
            compact = (x | b) == 0
            head, at = _choose(compact, short, long), _choose(compact, 3, 4) + int(has_modrm)
        else:
            head, at = long, 4 + int(has_modrm)
    else:
        ext_r = 0 if row.digit >= 0 else reg >> 3 & 1
        rex = row.w << 3 | ext_r << 2 | x << 1 | b
        before, escape = int(row.prefix != 0), int(row.map != M1)
        rest = (0x0F * escape | opcode << 8 * escape | modrm << 8 * (escape + 1)) << 8 * before
        head = _MANDATORY[row.prefix] | _choose(rex != 0, (0x40 | rex) << 8 * before | rest << 8, rest)
        at = before + escape + 1 + int(has_modrm) + _choose(rex != 0, 1, 0)
    return _join(head, at, tail, size, n)


def _choose(condition: Any, yes: Ints | int, no: Ints | int) -> Ints | int:
    """``numpy.where``, or a plain choice where all instructions agree.

    Most batches are short, and array calls are what they cost.
    """
    if isinstance(condition, (bool, np.bool_)):
        return yes if condition else no
    return np.where(condition, yes, no)


def _looked_up(table: Ints, number: Field) -> Ints | int:
    return int(table[number]) if isinstance(number, int) else table.take(number)


def _fits(value: Ints | int, bits: int) -> bool:
    """Whether values are ``bits`` wide, signed or unsigned."""
    low, high = -(1 << bits - 1), 1 << bits
    return low <= value < high if isinstance(value, int) else bool((value >= low).all() and (value < high).all())


def _holds(value: Field, number: int) -> bool:
    return value == number if isinstance(value, int) else bool((value == number).any())


def _largest(value: Field) -> int:
    return value if isinstance(value, int) else int(value.max())


def _wide(value: Field) -> Ints | int:
    return value if isinstance(value, int) else value.astype(np.int64, copy=False)


def _displacement_unit(row: Row, encoding: int, bcast: bool) -> int:
    """What an 8-bit displacement counts in (EVEX disp8*N); 1 outside EVEX."""
    if encoding < EVEX128:
        return 1
    vector = 16 << (encoding - EVEX128 if row.fixed_length < 0 else row.fixed_length)
    return {Tuple.FULL: 4 if bcast else vector, Tuple.FULLMEM: vector, Tuple.T1S: 4, Tuple.T4: 16, Tuple.NONE: 1,
            Tuple.QUARTER: vector // 4, Tuple.PACKED: 4}[row.tuple]  # fmt: skip


def _memory_operand(
    f: dict[str, Field], unit: int, n: int
) -> tuple[Ints | int, Ints | int, Ints | int, Ints | int, Ints | int]:
    """ModRM without reg, the bytes behind it as a word, their number, and the extension bits X and B."""
    base, index, disp = _wide(f["base"]), _wide(f.get("index", -1)), _wide(f.get("disp", 0))
    simple = isinstance(base, int) and base < RIP and base & 7 not in (4, 5) and isinstance(index, int) and index < 0
    if not simple or isinstance(disp, int) or not isinstance(base, int):
        return _memory_operand_general(base, index, _wide(f.get("scale", 0)), disp, unit)
    # Nearly always: [base + disp8].
    short = (disp >> unit.bit_length() - 1).astype(np.int8)
    odd = np.flatnonzero((np.multiply(short, unit, dtype=np.int64) != disp) | (short == 0))
    scaled = short.view(np.uint8).astype(np.int64)
    if not odd.size:
        return 0x40 | base & 7, scaled, 1, 0, base >> 3 & 1
    rest = disp[odd]
    if (rest != rest.astype(np.int32)).any():
        raise InternalError("a displacement does not fit 32 bits")
    none = rest == 0
    modrm, size = np.full(n, 0x40 | base & 7), np.ones(n, np.int64)
    modrm[odd], scaled[odd], size[odd] = (
        np.where(none, base & 7, 0x80 | base & 7),
        rest & 0xFFFFFFFF,
        np.where(none, 0, 4),
    )
    return modrm, scaled, size, 0, base >> 3 & 1


def _memory_operand_general(
    base: Ints | int, index: Ints | int, scale: Ints | int, disp: Ints | int, unit: int
) -> tuple[Ints | int, Ints | int, Ints | int, Ints | int, Ints | int]:
    rip, low3 = base == RIP, base & 7
    indexed = index >= 0 if isinstance(index, int) or (index < 0).any() else True
    near = (-(1 << 31) <= disp) & (disp < 1 << 31)
    if not np.all(near | rip):
        raise InternalError("a displacement does not fit 32 bits")
    scaled = disp >> unit.bit_length() - 1
    fits = (-128 <= scaled) & (scaled < 128) & (disp & unit - 1 == 0)
    sib = _choose(rip, False, indexed | (low3 == 4))
    none = (disp == 0) & (low3 != 5)
    length = _choose(rip, 4, _choose(none, 0, _choose(fits, 1, 4)))
    mod = _choose(rip | none, 0, _choose(fits, 1, 2))
    tail = _choose(rip | none, 0, _choose(fits, scaled & 0xFF, disp & 0xFFFFFFFF))
    tail = _choose(sib, tail << 8 | scale << 6 | _choose(indexed, index & 7, 4) << 3 | low3, tail)
    modrm = mod << 6 | _choose(rip, 5, _choose(sib, 4, low3))
    return modrm, tail, length + _choose(sib, 1, 0), _choose(indexed, index >> 3, 0), _choose(rip, 0, base >> 3)


def _signed(word: int) -> int:
    """The lower 64 bits as NumPy's integers hold them."""
    return (word + (1 << 63) & _WORD) - (1 << 63)


def _join(
    head: Ints | int, at: Ints | int, tail: Ints | int, size: Ints | int, n: int
) -> tuple[Words, Words | None, Ints | int]:
    """Head and tail bytes as a pair of words, and the total length."""
    length = at + size
    shifted = tail << at * 8
    word = head | (_signed(shifted) if isinstance(shifted, int) else shifted)
    low = np.full(n, word & _WORD, np.uint64) if isinstance(word, int) else word.view(np.uint64)
    if (length if isinstance(length, int) else length.max()) <= 8:
        return low, None, length
    bits = np.asarray(64 - at * 8).astype(np.uint64)
    return (
        low,
        (np.zeros(n, np.int64) + (_signed(tail) if isinstance(tail, int) else tail)).view(np.uint64) >> bits,
        length,
    )


_NOPS = {
    1: "90",
    2: "6690",
    3: "0f1f00",
    4: "0f1f4000",
    5: "0f1f440000",
    6: "660f1f440000",
    7: "0f1f8000000000",
    8: "0f1f840000000000",
}


_PADDING = np.array(
    [
        np.frombuffer(
            b"".join(bytes.fromhex(_NOPS[n]) for n in (min(pad, 8), pad - min(pad, 8)) if n).ljust(16, b"\0"), "<u8"
        )
        for pad in range(16)
    ]
)
"""Low and high word of so many bytes of no-ops."""


def _align(batch: Batch, length: Ints, low: Words, high: Words) -> None:
    """Give every ALIGN row (to 16 bytes at most) the long no-ops it needs."""
    pads, padding = [], 0
    for before in np.cumsum(length)[batch.place].tolist():
        pads.append(-(before + padding) % 16)
        padding += pads[-1]
    low[batch.place], high[batch.place] = _PADDING[pads].T
    length[batch.place] = pads


def _flatten(low: Words, high: Words, length: Ints, offsets: Ints, size: int) -> NDArray[np.uint8]:
    """Instructions back to back.

    Whole words are stored in rising order, so that each overwrites the padding of the one before, and one without
    bytes, a label, is overwritten altogether.
    """
    code = np.zeros(size + 16, np.uint8)
    words: NDArray[np.uint64] = np.ndarray((code.size - 7,), "<u8", code, strides=(1,))
    long = np.flatnonzero(length > 8)
    words[offsets[long] + 8] = high[long]
    words[offsets[:-1]] = low
    return code[:size]


def _resolve(batch: Batch, code: NDArray[np.uint8], offsets: Ints, places: Ints) -> None:
    """Write the 32-bit distances of branches and RIP-relative operands.

    They end their instruction: no RIP-relative operand has an immediate behind it.
    """
    branch, base = _BRANCHES[batch.row], batch.fields.get("base", 0)
    label = np.zeros(batch.place.size, np.int64) + (batch.fields["imm"] if branch else batch.fields["disp"])
    rows = np.arange(label.size) if branch else np.flatnonzero(np.zeros(label.size, np.int64) + base == RIP)
    end, label = offsets[batch.place[rows] + 1], label[rows]
    distance = places[label] - end
    if np.any(places[label] < 0) or np.any(distance != distance.astype(np.int32)):
        raise InternalError("a branch reaches no label, or further than 2 GiB")
    code[(end - 4)[:, None] + np.arange(4)] = distance.astype("<i4").view(np.uint8).reshape(-1, 4)
