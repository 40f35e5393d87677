"""The batch encoder: columns of instructions in, bytes out, without a Python object per instruction.

All instructions that share a row of the table, an encoding and an operand kind are encoded together: their bytes are assembled
as 64-bit words with array arithmetic. A block of equal instructions costs some thirty array operations however long it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InternalError
from .table import ALIGN, LABEL, M0F, M1, NAMES, ROWS, Row, Tuple

LEGACY, VEX128, VEX256, EVEX128, EVEX256, EVEX512 = range(6)
RIP = 16  # as ``base``: ``disp`` is a label
FIELDS = ("row", "enc", "reg", "vvvv", "rm", "base", "index", "scale", "disp", "imm", "mask", "zero", "bcast")
DEFAULTS = {"rm": -1, "index": -1}
DTYPES = {"disp": np.int64, "imm": np.int64}  # the others are int8 or uint8

Instructions = dict[str, NDArray[Any]]
Words = NDArray[np.uint64]
Ints = NDArray[np.int64]

_ROWS = tuple(ROWS[name] for name in NAMES)
_MANDATORY = (0, 0x66, 0xF3, 0xF2)


def allocate(n: int) -> Instructions:
    """Columns for ``n`` instructions, filled with what an absent operand reads as.

    ``rm`` is -1 for a memory operand, then ``[base + index * 2**scale + disp]``; ``reg``/``vvvv``/``rm`` are register numbers;
    ``bcast`` asks for an embedded broadcast; ``imm`` of a branch is its label.
    """
    columns: Instructions = {}
    for name in FIELDS:
        dtype = np.uint8 if name == "row" else DTYPES.get(name, np.int8)
        columns[name] = np.full(n, DEFAULTS[name], dtype) if name in DEFAULTS else np.zeros(n, dtype)
    return columns


@dataclass(frozen=True)
class Encoded:
    """Bytes, and the offset at which every instruction starts (one more entry for the end)."""

    code: NDArray[np.uint8]
    offsets: Ints
    labels: Ints


def encode(c: Instructions, labels: int) -> Encoded:
    """Encode, lay out, and resolve labels. ``row`` may be ``LABEL`` (its number in ``imm``) or ``ALIGN`` (bytes in ``imm``).

    One label more than ``labels`` may be referred to: the end of the code, padded to a cache line, where constants go.
    """
    n = c["row"].size
    low, high, length = np.zeros(n, np.uint64), np.zeros(n, np.uint64), np.zeros(n, np.int64)
    memory = c["rm"] < 0
    key = c["row"].astype(np.int32)
    key <<= 5
    key |= c["enc"].astype(np.int32) << 2
    key |= (c["bcast"] != 0).astype(np.int32) << 1
    key |= memory
    for group in np.flatnonzero(np.bincount(key)).tolist():
        row = group >> 5
        if row < len(_ROWS):
            rows = np.flatnonzero(key == group)
            encoding, bcast, mem = (group >> 2) & 7, bool(group & 2), bool(group & 1)
            low[rows], high[rows], length[rows] = _encode_group(row, encoding, bcast, mem, c, rows)
    _align(c, length, low, high)
    offsets = np.zeros(n + 1, np.int64)
    np.cumsum(length, out=offsets[1:])
    places = np.full(labels + 1, -1, np.int64)
    places[labels] = (offsets[n] + 63) // 64 * 64
    is_label = np.flatnonzero(c["row"] == LABEL)
    places[c["imm"][is_label]] = offsets[is_label]
    code = _flatten(low, high, length, offsets, int(places[labels]))
    _resolve(c, code, offsets, places)
    return Encoded(code, offsets, places)


def _encode_group(number: int, encoding: int, bcast: bool, mem: bool, c: Instructions, rows: Ints) -> tuple[Words, Words, Ints]:
    row = _ROWS[number]
    legal = {LEGACY: "L", VEX128: "V", VEX256: "V"}.get(encoding, "E")
    if legal not in row.encodings or (bcast and (legal != "E" or row.tuple != Tuple.FULL or not mem)):
        raise InternalError(f"{NAMES[number]} has no such encoding ({legal}, broadcast={bcast})")
    n = rows.size
    none = np.zeros(n, np.int64)
    reg = none + row.digit if row.digit >= 0 else c["reg"][rows].astype(np.int64) if "r" in row.operands else none
    vvvv = c["vvvv"][rows].astype(np.int64) if "v" in row.operands else none
    has_modrm = row.digit >= 0 or "m" in row.operands
    if not has_modrm:
        modrm = tail = tail_length = ext_x = ext_b = none
    elif mem:
        scale = _displacement_unit(row, encoding, bcast)
        modrm, tail, tail_length, ext_x, ext_b = _memory_operand(c, rows, reg, scale)
    else:
        rm = c["rm"][rows].astype(np.int64)
        modrm = 0xC0 | (reg & 7) << 3 | (rm & 7)
        tail, tail_length, ext_x, ext_b = none, none, rm >> 4 & 1, rm >> 3 & 1
    tail = tail.view(np.uint64)
    if row.imm:
        imm = (c["imm"][rows] & ((1 << 8 * row.imm) - 1)).view(np.uint64)
        if "s" in row.operands:
            imm = imm << np.uint64(4)
        if "b" in row.operands:
            imm = np.zeros(n, np.uint64)
        tail = tail | imm << (tail_length * 8).view(np.uint64)
        tail_length = tail_length + row.imm
    if legal == "E":
        vector_length = encoding - EVEX128 if row.fixed_length < 0 else row.fixed_length
        fixed = (0x62 | 0x6000 | row.map << 8 | (row.w << 7 | 4 | row.prefix) << 16
                 | (vector_length << 5 | int(bcast) << 4) << 24 | row.opcode << 32)  # fmt: skip
        word = modrm << 40 | (~reg & 8) << 12 | (~reg & 16) << 8 | (~vvvv & 15) << 19 | (~vvvv & 16) << 23 | fixed
        word ^= ext_x << 14 | ext_b << 13
        if np.any(c["mask"][rows]):
            word |= c["zero"][rows].astype(np.int64) << 31 | c["mask"][rows].astype(np.int64) << 24
        return _join(word, 6, tail, tail_length)
    if legal == "V":
        vector_length = encoding - VEX128 if row.fixed_length < 0 else row.fixed_length
        last = (~vvvv & 15) << 3 | vector_length << 2 | row.prefix
        r, wide = (~reg & 8) << 4, ext_x | ext_b
        short = 0xC5 | (r | last) << 8 | row.opcode << 16 | modrm << 24
        long = (0xC4 | (r | (ext_x ^ 1) << 6 | (ext_b ^ 1) << 5 | row.map) << 8 | (row.w << 7 | last) << 16
                | row.opcode << 24 | modrm << 32)  # fmt: skip
        compact = (wide == 0) & (row.map == M0F) & (row.w == 0)
        head = np.where(compact, short, long)
        return _join(head, np.where(compact, 3, 4) + int(has_modrm), tail, tail_length)
    ext_r = (reg >> 3 & 1) if row.digit < 0 else np.zeros(n, np.int64)
    rex = row.w << 3 | ext_r << 2 | ext_x << 1 | ext_b
    head, at = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for byte, present in (
        (np.full(n, _MANDATORY[row.prefix]), np.full(n, row.prefix != 0)),
        (0x40 | rex, rex != 0),
        (np.full(n, 0x0F), np.full(n, row.map != M1)),
        (np.full(n, row.opcode), np.full(n, True)),
        (modrm, np.full(n, has_modrm)),
    ):
        head |= np.where(present, byte << at * 8, 0)
        at += present
    return _join(head, at, tail, tail_length)


def _displacement_unit(row: Row, encoding: int, bcast: bool) -> int:
    """What an 8-bit displacement counts in (EVEX disp8*N); 1 outside EVEX."""
    if encoding < EVEX128:
        return 1
    vector = 16 << (encoding - EVEX128 if row.fixed_length < 0 else row.fixed_length)
    return {Tuple.FULL: 4 if bcast else vector, Tuple.FULLMEM: vector, Tuple.T1S: 4, Tuple.T4: 16, Tuple.NONE: 1}[row.tuple]


def _memory_operand(c: Instructions, rows: Ints, reg: Ints, unit: int) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """ModRM, the bytes behind it as a word, their number, and the extension bits X and B.

    Nearly all operands are ``[base + disp8]``: those are computed for everyone, the others again on their own.
    """
    base, disp = c["base"][rows].astype(np.int64), c["disp"][rows]
    scaled = disp >> unit.bit_length() - 1
    low3 = base & 7
    modrm = 0x40 | (reg & 7) << 3 | low3
    tail, size, ext_x, ext_b = scaled & 0xFF, np.ones(rows.size, np.int64), np.zeros(rows.size, np.int64), base >> 3 & 1
    fits = (scaled == scaled.astype(np.int8)) & (disp & unit - 1 == 0)
    plain = fits & (disp != 0) & (c["index"][rows] < 0) & (low3 != 4) & (base < RIP)
    odd = np.flatnonzero(~plain)
    if odd.size:
        base, disp, scaled, low3, fits = base[odd], disp[odd], scaled[odd], low3[odd], fits[odd]
        index = c["index"][rows[odd]].astype(np.int64)
        rip, indexed = base == RIP, index >= 0
        if np.any((disp != disp.astype(np.int32)) & ~rip):
            raise InternalError("a displacement does not fit 32 bits")
        sib = (indexed | (low3 == 4)) & ~rip
        none = (disp == 0) & (low3 != 5)
        length = np.where(rip, 4, np.where(none, 0, np.where(fits, 1, 4)))
        mod = np.where(rip | none, 0, np.where(fits, 1, 2))
        bytes_behind = np.where(length == 1, scaled & 0xFF, np.where((length == 4) & ~rip, disp & 0xFFFFFFFF, 0))
        sib_byte = c["scale"][rows[odd]].astype(np.int64) << 6 | np.where(indexed, index & 7, 4) << 3 | low3
        modrm[odd] = mod << 6 | (reg[odd] & 7) << 3 | np.where(rip, 5, np.where(sib, 4, low3))
        tail[odd] = np.where(sib, bytes_behind << 8 | sib_byte, bytes_behind)
        size[odd] = length + sib
        ext_x[odd] = np.where(indexed, index >> 3, 0)
        ext_b[odd] = np.where(rip, 0, base >> 3)
    return modrm, tail, size, ext_x, ext_b


def _join(head: Ints, head_length: int | Ints, tail: Words, tail_length: Ints) -> tuple[Words, Words, Ints]:
    """Head and tail bytes as a pair of words and the total length."""
    bits = np.asarray(head_length * 8).astype(np.uint64)
    return head.view(np.uint64) | tail << bits, tail >> (np.uint64(64) - bits), tail_length + head_length


_NOPS = {1: "90", 2: "6690", 3: "0f1f00", 4: "0f1f4000", 5: "0f1f440000", 6: "660f1f440000", 7: "0f1f8000000000", 8: "0f1f840000000000"}


def _align(c: Instructions, length: Ints, low: Words, high: Words) -> None:
    """Give every ALIGN row (to 16 bytes at most) the long no-ops it needs."""
    at, previous = 0, 0
    for row in np.flatnonzero(c["row"] == ALIGN).tolist():
        at += int(length[previous:row].sum())
        pad = -at % min(int(c["imm"][row]), 16)
        raw = b"".join(bytes.fromhex(_NOPS[n]) for n in (min(pad, 8), pad - min(pad, 8)) if n)
        low[row], high[row] = np.frombuffer(raw.ljust(16, b"\0"), "<u8")
        length[row] = pad
        previous = row


def _flatten(low: Words, high: Words, length: Ints, offsets: Ints, size: int) -> NDArray[np.uint8]:
    """Instructions back to back. Whole words are stored in rising order, so that each overwrites the padding of the one before."""
    code = np.zeros(size + 16, np.uint8)
    words: NDArray[np.uint64] = np.ndarray((code.size - 7,), "<u8", code, strides=(1,))
    long = np.flatnonzero(length > 8)
    words[offsets[long] + 8] = high[long]
    some = np.flatnonzero(length > 0) if np.any(length == 0) else slice(None)
    words[offsets[:-1][some]] = low[some]
    return code[:size]


def _resolve(c: Instructions, code: NDArray[np.uint8], offsets: Ints, places: Ints) -> None:
    """Write the 32-bit distances of branches and RIP-relative operands, which end their instruction (no RIP operand has an immediate)."""
    branch = np.isin(c["row"], _BRANCHES)
    relative = (c["base"] == RIP) & (c["rm"] < 0)
    for rows, label in ((np.flatnonzero(branch), c["imm"]), (np.flatnonzero(relative), c["disp"])):
        distance = places[label[rows]] - offsets[rows + 1]
        if np.any(places[label[rows]] < 0) or np.any(distance != distance.astype(np.int32)):
            raise InternalError("a branch reaches no label, or further than 2 GiB")
        raw = distance.astype("<i4").view(np.uint8).reshape(-1, 4)
        code[(offsets[rows + 1] - 4)[:, None] + np.arange(4)] = raw


_BRANCHES = [i for i, row in enumerate(_ROWS) if row.operands == "b"]
