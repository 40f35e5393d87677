"""Every x86-64 instruction SparseRT can emit, one row each.

``Row`` says all that an encoding needs (Intel SDM vol. 2, chapter 2; AMD APM vol. 3): mandatory prefix, opcode map,
opcode, W, the EVEX tuple type (which scales a compressed displacement), a ``/digit`` for the reg field, immediate
bytes, the operands in Intel order, and in which encodings it exists: ``L`` legacy, ``V`` VEX, ``E`` EVEX.

Operand letters: ``r`` ModRM.reg, ``v`` VEX.vvvv, ``m`` ModRM.rm (register or memory), ``i`` immediate, ``s`` register
in the upper half of the immediate byte (is4), ``o`` register in the opcode, ``b`` a branch displacement.  Their kinds:
``x`` vector, ``g`` 64-bit general, ``e`` 32-bit general, ``w`` and ``y`` memory of 2 bytes and of 1, ``k`` mask,
``q`` memory only, ``4`` 128-bit vector or memory, ``p`` memory of 128 bits only, ``h`` the lower half of an ``e``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

P00, P66, PF3, PLOCK = 0, 1, 2, 4  # 3 is F2; lock goes with legacy instructions only
M1, M0F, M0F38, M0F3A = 0, 1, 2, 3  # one-byte opcodes (legacy only), then the escape maps


class Tuple(IntEnum):
    """EVEX tuple types by their memory operand: a vector (with broadcast allowed or not), one float, four floats."""

    NONE = 0
    FULL = 1  # broadcast allowed
    FULLMEM = 2
    T1S = 3  # one element of 4 bytes
    T4 = 4  # four elements of 4 bytes
    QUARTER = 5  # a quarter of a vector
    PACKED = 6  # as many elements of 4 bytes as a mask selects
    HALF = 7  # half a vector


@dataclass(frozen=True, slots=True)
class Row:
    prefix: int
    map: int
    opcode: int
    w: int
    tuple: Tuple
    operands: str  # letter + kind per operand, in Intel order
    encodings: str
    digit: int = -1
    imm: int = 0
    fixed_length: int = -1  # vector length that the instruction insists on: 0 = 128, 1 = 256, 2 = 512 bits
    mnemonic: str = ""


_F, _FM, _S, _4, _N = Tuple.FULL, Tuple.FULLMEM, Tuple.T1S, Tuple.T4, Tuple.NONE
_Q, _P = Tuple.QUARTER, Tuple.PACKED

ROWS: dict[str, Row] = {
    # name                prefix map    opcode W  tuple operands       encodings
    "vfmadd231ps":    Row(P66, M0F38, 0xB8, 0, _F, "rx vx mx", "VE"),
    "vfmadd213ps":    Row(P66, M0F38, 0xA8, 0, _F, "rx vx mx", "VE"),
    "vfnmadd231ps":   Row(P66, M0F38, 0xBC, 0, _F, "rx vx mx", "VE"),
    "vfnmadd213ps":   Row(P66, M0F38, 0xAC, 0, _F, "rx vx mx", "VE"),
    "vaddps":         Row(P00, M0F,   0x58, 0, _F, "rx vx mx", "VE"),
    "vsubps":         Row(P00, M0F,   0x5C, 0, _F, "rx vx mx", "VE"),
    "vmulps":         Row(P00, M0F,   0x59, 0, _F, "rx vx mx", "VE"),
    "vdivps":         Row(P00, M0F,   0x5E, 0, _F, "rx vx mx", "VE"),
    "vminps":         Row(P00, M0F,   0x5D, 0, _F, "rx vx mx", "VE"),
    "vmaxps":         Row(P00, M0F,   0x5F, 0, _F, "rx vx mx", "VE"),
    "vandps":         Row(P00, M0F,   0x54, 0, _F, "rx vx mx", "VE"),
    "vorps":          Row(P00, M0F,   0x56, 0, _F, "rx vx mx", "VE"),
    "vxorps":         Row(P00, M0F,   0x57, 0, _F, "rx vx mx", "VE"),
    "vpxord":         Row(P66, M0F,   0xEF, 0, _F, "rx vx mx", "E"),
    "vunpcklps":      Row(P00, M0F,   0x14, 0, _F, "rx vx mx", "VE"),
    "vunpckhps":      Row(P00, M0F,   0x15, 0, _F, "rx vx mx", "VE"),
    "vunpcklpd":      Row(P66, M0F,   0x14, 1, _FM, "rx vx mx", "VE"),
    "vunpckhpd":      Row(P66, M0F,   0x15, 1, _FM, "rx vx mx", "VE"),
    "vcvtps2dq":      Row(P66, M0F,   0x5B, 0, _F, "rx mx", "VE"),
    "vrndscaleps":    Row(P66, M0F3A, 0x08, 0, _F, "rx mx i", "E", imm=1),
    "vroundps":       Row(P66, M0F3A, 0x08, 0, _FM, "rx mx i", "V", imm=1),
    "vpslld":         Row(P66, M0F,   0x72, 0, _F, "vx mx i", "E", digit=6, imm=1),
    "vpslld_vex":     Row(P66, M0F,   0x72, 0, _FM, "vx mx i", "V", digit=6, imm=1, mnemonic="vpslld"),
    "vpaddd":         Row(P66, M0F,   0xFE, 0, _F, "rx vx mx", "VE"),
    "vmovups":        Row(P00, M0F,   0x10, 0, _FM, "rx mx", "VE"),
    "vmovups_st":     Row(P00, M0F,   0x11, 0, _FM, "mx rx", "VE", mnemonic="vmovups"),
    "vmovaps":        Row(P00, M0F,   0x28, 0, _FM, "rx mx", "VE"),
    "vbroadcastss":   Row(P66, M0F38, 0x18, 0, _S, "rx mq", "VE"),
    "vmovups_x":      Row(P00, M0F,   0x10, 0, _FM, "rx mq", "VE", fixed_length=0, mnemonic="vmovups"),
    "vinsertf32x4":   Row(P66, M0F3A, 0x18, 0, _4, "rx vx m4 i", "E", imm=1),
    "vinsertf128":    Row(P66, M0F3A, 0x18, 0, _N, "rx vx m4 i", "V", imm=1, fixed_length=1),
    "vextractf32x4":  Row(P66, M0F3A, 0x19, 0, _4, "m4 rx i", "E", imm=1),
    "vextractf128":   Row(P66, M0F3A, 0x19, 0, _N, "m4 rx i", "V", imm=1, fixed_length=1),
    "vblendvps":      Row(P66, M0F3A, 0x4A, 0, _FM, "rx vx mx sx", "V", imm=1),
    "vblendmps":      Row(P66, M0F38, 0x65, 0, _F, "rx vx mx", "E"),
    "vpmovd2m":       Row(PF3, M0F38, 0x39, 0, _N, "rk mx", "E"),
    "vmaskmovps":     Row(P66, M0F38, 0x2C, 0, _FM, "rx vx mq", "V"),
    "vmaskmovps_st":  Row(P66, M0F38, 0x2E, 0, _FM, "mq vx rx", "V", mnemonic="vmaskmovps"),
    "vzeroupper":     Row(P00, M0F,   0x77, 0, _N, "", "V", fixed_length=0),
    "mov":            Row(P00, M1,    0x8B, 1, _N, "rg mg", "L"),
    "mov_st":         Row(P00, M1,    0x89, 1, _N, "mg rg", "L", mnemonic="mov"),
    "mov_imm":        Row(P00, M1,    0xC7, 1, _N, "mg i", "L", digit=0, imm=4, mnemonic="mov"),
    "lea":            Row(P00, M1,    0x8D, 1, _N, "rg mq", "L"),
    "add":            Row(P00, M1,    0x03, 1, _N, "rg mg", "L"),
    "sub":            Row(P00, M1,    0x2B, 1, _N, "rg mg", "L"),
    "cmp":            Row(P00, M1,    0x3B, 1, _N, "rg mg", "L"),
    "test":           Row(P00, M1,    0x85, 1, _N, "mg rg", "L"),
    "add_imm8":       Row(P00, M1,    0x83, 1, _N, "mg i", "L", digit=0, imm=1, mnemonic="add"),
    "add_imm":        Row(P00, M1,    0x81, 1, _N, "mg i", "L", digit=0, imm=4, mnemonic="add"),
    "imul_imm":       Row(P00, M1,    0x69, 1, _N, "rg mg i", "L", imm=4, mnemonic="imul"),
    "cmovl":          Row(P00, M0F,   0x4C, 1, _N, "rg mg", "L"),
    "cmovg":          Row(P00, M0F,   0x4F, 1, _N, "rg mg", "L"),
    "dec":            Row(P00, M1,    0xFF, 1, _N, "mg", "L", digit=1),
    "push":           Row(P00, M1,    0x50, 0, _N, "og", "L"),
    "pop":            Row(P00, M1,    0x58, 0, _N, "og", "L"),
    "ret":            Row(P00, M1,    0xC3, 0, _N, "", "L"),
    "jmp":            Row(P00, M1,    0xE9, 0, _N, "b", "L", imm=4),
    "call":           Row(P00, M1,    0xE8, 0, _N, "b", "L", imm=4),
    "jz":             Row(P00, M0F,   0x84, 0, _N, "b", "L", imm=4, mnemonic="je"),
    "jnz":            Row(P00, M0F,   0x85, 0, _N, "b", "L", imm=4, mnemonic="jne"),
    "prefetcht1":     Row(P00, M0F,   0x18, 0, _N, "mq", "L", digit=2),
    "vpmovsxbd":      Row(P66, M0F38, 0x21, 0, _Q, "rx mq", "VE"),
    "vexpandps":      Row(P66, M0F38, 0x88, 0, _P, "rx mq", "E"),
    "vpermi2ps":      Row(P66, M0F38, 0x77, 0, _F, "rx vx mx", "E"),
    "kmovw":          Row(P00, M0F,   0x93, 0, _N, "re mk", "V", fixed_length=0),
    "popcnt":         Row(PF3, M0F,   0xB8, 1, _N, "rg mg", "L"),
    "mov32":          Row(P00, M1,    0x8B, 0, _N, "re me", "L", mnemonic="mov"),
    "mov32_st":       Row(P00, M1,    0x89, 0, _N, "me re", "L", mnemonic="mov"),
    "movzx8":         Row(P00, M0F,   0xB6, 0, _N, "re my", "L", mnemonic="movzx"),
    "movzx16":        Row(P00, M0F,   0xB7, 0, _N, "re mw", "L", mnemonic="movzx"),
    "shl":            Row(P00, M1,    0xC1, 1, _N, "mg i", "L", digit=4, imm=1),
    "prefetcht0":     Row(P00, M0F,   0x18, 0, _N, "mq", "L", digit=1),
    "endbr64":        Row(PF3, M0F,   0x1E, 0, _N, "", "L", digit=7),  # encoded with rm = edx: F3 0F 1E FA
    # threads
    "xchg":           Row(P00, M1,    0x87, 1, _N, "mq rg", "L"),  # locks by itself
    "xadd":           Row(PLOCK, M0F, 0xC1, 1, _N, "mq rg", "L", mnemonic="lock xadd"),
    "cmpxchg":        Row(PLOCK, M0F, 0xB1, 1, _N, "mq rg", "L", mnemonic="lock cmpxchg"),
    "pause":          Row(PF3, M1,    0x90, 0, _N, "", "L"),
    "jl":             Row(P00, M0F,   0x8C, 0, _N, "b", "L", imm=4),
    "call_at":        Row(P00, M1,    0xFF, 0, _N, "mg", "L", digit=2, mnemonic="call"),
    "vshufps":        Row(P00, M0F,   0xC6, 0, _F, "rx vx mx i", "VE", imm=1),
    "vpermpd_imm":    Row(P66, M0F3A, 0x01, 1, _FM, "rx mx i", "VE", imm=1, mnemonic="vpermpd"),
    "vshuff64x2":     Row(P66, M0F3A, 0x23, 1, _FM, "rx vx mx i", "E", imm=1),
    "valignd":        Row(P66, M0F3A, 0x03, 0, _F, "rx vx mx i", "E", imm=1),
    "vpermt2ps":      Row(P66, M0F38, 0x7F, 0, _F, "rx vx mx", "E"),
    "kmovw_load":     Row(P00, M0F,   0x90, 0, _N, "rk mw", "V", fixed_length=0, mnemonic="kmovw"),
    # few columns
    "movzx16_r":      Row(P00, M0F,   0xB7, 0, _N, "re mh", "L", mnemonic="movzx"),
    "shr":            Row(P00, M1,    0xC1, 1, _N, "mg i", "L", digit=5, imm=1),
    "vbroadcastf128": Row(P66, M0F38, 0x1A, 0, _N, "rx mp", "V", fixed_length=1),
    "vbroadcastf32x4": Row(P66, M0F38, 0x1A, 0, _4, "rx mp", "E"),
    "vpermilps":      Row(P66, M0F3A, 0x04, 0, _F, "rx mx i", "VE", imm=1),
    "vpmovzxwd":      Row(P66, M0F38, 0x33, 0, Tuple.HALF, "rx mq", "VE"),
    "vexpandps_r":    Row(P66, M0F38, 0x88, 0, _P, "rx mx", "E", mnemonic="vexpandps"),
}  # fmt: skip

NAMES = tuple(ROWS)
ROW = {name: i for i, name in enumerate(NAMES)}
"""Row number by name; the numbers beyond ``len(ROWS)`` are pseudo-instructions without bytes of their own."""
LABEL = len(ROWS)
ALIGN = len(ROWS) + 1
