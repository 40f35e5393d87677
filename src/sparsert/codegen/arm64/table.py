"""Every AArch64 instruction SparseRT can emit, one row each.

A row is the instruction as the manual writes it (Arm Architecture Reference Manual, DDI 0487, C6 and C7) and its word
with all operands zero. What stands in angle brackets is an operand: a letter for the kind of register and the field
that holds its number (``<Vd>``: vector register in field ``d``), or the name of an immediate in :data:`FIELDS`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Field:
    """Where an operand goes: ``value / scale``, cut from its low bits up into ``parts`` (first bit, number of bits).

    ``copy``: another place for a register that is named twice.
    """

    parts: tuple[tuple[int, int], ...]
    scale: int = 1
    signed: bool = False
    copy: int = 0

    @property
    def bits(self) -> int:
        return sum(width for _, width in self.parts)

    @property
    def least(self) -> int:
        return -(self.scale << self.bits - 1) if self.signed else 0

    @property
    def most(self) -> int:
        return ((1 << self.bits - self.signed) - 1) * self.scale


FIELDS = {
    "d": Field(((0, 5),)), "n": Field(((5, 5),)), "m": Field(((16, 5),)), "a": Field(((10, 5),)),
    "s": Field(((5, 5),), copy=16),  # both sources
    "h": Field(((16, 4),)),  # the low half of the vector registers
    "lane": Field(((21, 1), (11, 1))), "lane8": Field(((20, 1), (21, 1), (11, 1))),
    "lane_ld": Field(((12, 1), (30, 1))), "half": Field(((20, 1),)),
    "left": Field(((16, 5),)), "byte": Field(((5, 5), (16, 3))),
    "imm12": Field(((10, 12),)), "imm16": Field(((5, 16),)), "hw": Field(((21, 2),), 16), "lsl": Field(((10, 6),)),
    "off2": Field(((10, 12),), 2), "off4": Field(((10, 12),), 4), "off8": Field(((10, 12),), 8),
    "off16": Field(((10, 12),), 16),
    "pair": Field(((15, 7),), 8, signed=True), "bit": Field(((19, 5), (31, 1))),
    "to26": Field(((0, 26),), 4, signed=True), "to19": Field(((5, 19),), 4, signed=True),
    "to14": Field(((5, 14),), 4, signed=True), "page": Field(((29, 2), (5, 19)), 4096, signed=True),
}  # fmt: skip
REGISTERS = "VQDSHXWP"
"""Kinds of registers: vectors, their low 128, 64, 32, 16 bits; general ones, their low halves, and P with sp for 31."""

BRANCHES = ("to26", "to19", "to14")

SYNTAX = {
    # vectors of four float32
    "fadd": (0x4E20D400, "fadd <Vd>.4s, <Vn>.4s, <Vm>.4s"),
    "fsub": (0x4EA0D400, "fsub <Vd>.4s, <Vn>.4s, <Vm>.4s"),
    "fmul": (0x6E20DC00, "fmul <Vd>.4s, <Vn>.4s, <Vm>.4s"),
    "fdiv": (0x6E20FC00, "fdiv <Vd>.4s, <Vn>.4s, <Vm>.4s"),
    "fmla": (0x4E20CC00, "fmla <Vd>.4s, <Vn>.4s, <Vm>.4s"),
    "fmls": (0x4EA0CC00, "fmls <Vd>.4s, <Vn>.4s, <Vm>.4s"),
    "fmla_lane": (0x4F801000, "fmla <Vd>.4s, <Vn>.4s, <Vm>.s[<lane>]"),
    "fmul_lane": (0x4F809000, "fmul <Vd>.4s, <Vn>.4s, <Vm>.s[<lane>]"),
    "fcmgt": (0x6EA0E400, "fcmgt <Vd>.4s, <Vn>.4s, <Vm>.4s"),
    "frintn": (0x4E218800, "frintn <Vd>.4s, <Vn>.4s"),
    "fcvtns": (0x4E21A800, "fcvtns <Vd>.4s, <Vn>.4s"),
    # and of whatever 128 bits
    "add_v": (0x4EA08400, "add <Vd>.4s, <Vn>.4s, <Vm>.4s"),
    "shl": (0x4F205400, "shl <Vd>.4s, <Vn>.4s, #<left>"),
    "signs": (0x4F210400, "sshr <Vd>.4s, <Vn>.4s, #31"),
    "and_v": (0x4E201C00, "and <Vd>.16b, <Vn>.16b, <Vm>.16b"),
    "orr_v": (0x4EA01C00, "orr <Vd>.16b, <Vn>.16b, <Vm>.16b"),
    "eor_v": (0x6E201C00, "eor <Vd>.16b, <Vn>.16b, <Vm>.16b"),
    "bsl": (0x6E601C00, "bsl <Vd>.16b, <Vn>.16b, <Vm>.16b"),
    "bit": (0x6EA01C00, "bit <Vd>.16b, <Vn>.16b, <Vm>.16b"),
    "bif": (0x6EE01C00, "bif <Vd>.16b, <Vn>.16b, <Vm>.16b"),
    "mov_v": (0x4EA01C00, "mov <Vd>.16b, <Vs>.16b"),
    "uzp1": (0x4E801800, "uzp1 <Vd>.4s, <Vn>.4s, <Vm>.4s"),
    "zip1": (0x4E803800, "zip1 <Vd>.4s, <Vn>.4s, <Vm>.4s"),
    "zip2": (0x4E807800, "zip2 <Vd>.4s, <Vn>.4s, <Vm>.4s"),
    "zip1_2d": (0x4EC03800, "zip1 <Vd>.2d, <Vn>.2d, <Vm>.2d"),
    "zip2_2d": (0x4EC07800, "zip2 <Vd>.2d, <Vn>.2d, <Vm>.2d"),
    "zero": (0x6F00E400, "movi <Vd>.2d, #0"),
    "movi_top": (0x4F006400, "movi <Vd>.4s, #<byte>, lsl #24"),
    "dup": (0x4E040400, "dup <Vd>.4s, <Vn>.s[0]"),
    "umov": (0x4E083C00, "mov <Xd>, <Vn>.d[<half>]"),
    # vectors and memory
    "ldr_q": (0x3DC00000, "ldr <Qd>, [<Pn>, #<off16>]"),
    "str_q": (0x3D800000, "str <Qd>, [<Pn>, #<off16>]"),
    "ldr_s": (0xBD400000, "ldr <Sd>, [<Pn>, #<off4>]"),
    "ld1_lane": (0x0D408000, "ld1 {<Vd>.s}[<lane_ld>], [<Pn>]"),
    "st1_lane": (0x0D008000, "st1 {<Vd>.s}[<lane_ld>], [<Pn>]"),
    "stp_d": (0x6D000000, "stp <Dd>, <Da>, [<Pn>, #<pair>]"),
    "ldp_d": (0x6D400000, "ldp <Dd>, <Da>, [<Pn>, #<pair>]"),
    "prfm": (0xF9800002, "prfm pldl2keep, [<Pn>, #<off8>]"),
    "prfm_near": (0xF9800000, "prfm pldl1keep, [<Pn>, #<off8>]"),
    # general registers
    "ldrb": (0x39400000, "ldrb <Wd>, [<Pn>, #<imm12>]"),
    "ldrh": (0x79400000, "ldrh <Wd>, [<Pn>, #<off2>]"),
    "ldr_w": (0xB9400000, "ldr <Wd>, [<Pn>, #<off4>]"),
    "str_w": (0xB9000000, "str <Wd>, [<Pn>, #<off4>]"),
    "ldr": (0xF9400000, "ldr <Xd>, [<Pn>, #<off8>]"),
    "str": (0xF9000000, "str <Xd>, [<Pn>, #<off8>]"),
    "stp": (0xA9000000, "stp <Xd>, <Xa>, [<Pn>, #<pair>]"),
    "ldp": (0xA9400000, "ldp <Xd>, <Xa>, [<Pn>, #<pair>]"),
    "stp_pre": (0xA9800000, "stp <Xd>, <Xa>, [<Pn>, #<pair>]!"),
    "ldp_post": (0xA8C00000, "ldp <Xd>, <Xa>, [<Pn>], #<pair>"),
    "mov": (0xAA0003E0, "mov <Xd>, <Xm>"),
    "movz": (0xD2800000, "movz <Xd>, #<imm16>, lsl #<hw>"),
    "movn": (0x92800000, "movn <Xd>, #<imm16>, lsl #<hw>"),
    "movk": (0xF2800000, "movk <Xd>, #<imm16>, lsl #<hw>"),
    "add": (0x8B000000, "add <Xd>, <Xn>, <Xm>, lsl #<lsl>"),
    "sub": (0xCB000000, "sub <Xd>, <Xn>, <Xm>, lsl #<lsl>"),
    "add_imm": (0x91000000, "add <Pd>, <Pn>, #<imm12>"),
    "add_top": (0x91400000, "add <Pd>, <Pn>, #<imm12>, lsl #12"),
    "sub_imm": (0xD1000000, "sub <Pd>, <Pn>, #<imm12>"),
    "sub_top": (0xD1400000, "sub <Pd>, <Pn>, #<imm12>, lsl #12"),
    "subs_imm": (0xF1000000, "subs <Xd>, <Pn>, #<imm12>"),
    "cmp": (0xEB00001F, "cmp <Xn>, <Xm>"),
    "csel_gt": (0x9A80C000, "csel <Xd>, <Xn>, <Xm>, gt"),
    "csel_lt": (0x9A80B000, "csel <Xd>, <Xn>, <Xm>, lt"),
    "madd": (0x9B000000, "madd <Xd>, <Xn>, <Xm>, <Xa>"),
    "adrp": (0x90000000, "adrp <Xd>, <page>"),
    # control
    "b": (0x14000000, "b <to26>"),
    "bl": (0x94000000, "bl <to26>"),
    "b_eq": (0x54000000, "b.eq <to19>"),
    "b_ne": (0x54000001, "b.ne <to19>"),
    "cbz": (0xB4000000, "cbz <Xd>, <to19>"),
    "cbnz": (0xB5000000, "cbnz <Xd>, <to19>"),
    "tbz": (0x36000000, "tbz <Xd>, #<bit>, <to14>"),
    "b_lt": (0x5400000B, "b.lt <to19>"),
    "blr": (0xD63F0000, "blr <Xn>"),
    "ret": (0xD65F03C0, "ret"),
    "bti": (0xD503245F, "bti c"),
    "nop": (0xD503201F, "nop"),
    # threads
    "ldar": (0xC8DFFC00, "ldar <Xd>, [<Pn>]"),
    "stlr": (0xC89FFC00, "stlr <Xd>, [<Pn>]"),
    "ldaxr": (0xC85FFC00, "ldaxr <Xd>, [<Pn>]"),
    "stlxr": (0xC800FC00, "stlxr <Wm>, <Xd>, [<Pn>]"),
    "yield": (0xD503203F, "yield"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One instruction: its word, its text, and the names of its operands (as in the text) with their fields."""

    base: int
    text: str
    operands: tuple[tuple[str, str], ...]  # (kind of register or "", field), in the order of the text


def _row(base: int, text: str) -> Row:
    names = re.findall(r"<(\w+)>", text)
    return Row(base, text, tuple((n[0], n[1:]) if n[0] in REGISTERS else ("", n) for n in names))


ROWS = {name: _row(*row) for name, row in SYNTAX.items()}
