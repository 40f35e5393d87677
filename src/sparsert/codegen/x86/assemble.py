"""Vector program in, code object or listing out."""

from __future__ import annotations

import numpy as np

from ..codeobject import CodeObject
from ..pool import listed, pool
from ..vector import Program
from .encoder import EVEX128, EVEX256, EVEX512, LEGACY, RIP, VEX128, VEX256, encode
from .lower import lower
from .table import ALIGN, LABEL, NAMES, ROWS, Tuple

ENCODINGS = {"x86-avx512": EVEX512, "x86-avx2": VEX256, "x86-avx512-256": EVEX256}


def assemble(program: Program, isa: str) -> CodeObject:
    encoded = encode(lower(program, ENCODINGS[isa]), program.labels)
    return CodeObject(isa, encoded.code.tobytes() + pool(program), encoded.code.size, encoded.offsets.size - 1)


def listing(program: Program, isa: str) -> str:
    """Offset, bytes and instruction in Intel syntax, a line each, with the kernel's remarks at the labels."""
    batches = lower(program, ENCODINGS[isa])
    encoded = encode(batches, program.labels)
    raw, size, offsets = encoded.code.tobytes(), encoded.code.size, encoded.offsets.tolist()
    lines = [""] * (len(offsets) - 1)
    for batch in batches:
        fields = {key: np.broadcast_to(value, batch.place.size).tolist() for key, value in batch.fields.items()}
        for i, place in enumerate(batch.place.tolist()):
            one = {key: value[i] for key, value in fields.items()}
            if batch.row == LABEL:
                note = program.notes.get(one["imm"], "")
                lines[place] = f"L{one['imm']}:" + (f"  ; {note}" if note else "")
                continue
            text = "nop" if batch.row == ALIGN else instruction_text(NAMES[batch.row], batch.encoding, one, batch.bcast)
            if offsets[place + 1] > offsets[place]:
                lines[place] = f"{offsets[place]:8x}  {raw[offsets[place] : offsets[place + 1]].hex():<24} {text}"
    return "\n".join([*filter(None, lines), *listed(program, size)]) + "\n"


_GENERAL = [
    "rax",
    "rcx",
    "rdx",
    "rbx",
    "rsp",
    "rbp",
    "rsi",
    "rdi",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
]
_HALF = [f"e{name[1:]}" for name in _GENERAL[:8]] + [f"{name}d" for name in _GENERAL[8:]]
_WORD = [name[1:] for name in _GENERAL[:8]] + [f"{name}w" for name in _GENERAL[8:]]
_WIDTH = ("xmm", "ymm", "zmm")


def instruction_text(name: str, enc: int, c: dict[str, int], bcast: bool = False) -> str:
    """One instruction in Intel syntax, as GNU as reads it."""
    row = ROWS[name]
    length = 0 if enc == LEGACY else (enc - EVEX128 if enc >= EVEX128 else enc - VEX128)
    length = row.fixed_length if row.fixed_length >= 0 else length

    def register(kind: str, number: int) -> str:
        if kind == "g":
            return _GENERAL[number]
        if kind == "e":
            return _HALF[number]
        if kind == "h":
            return _WORD[number]
        return f"k{number}" if kind == "k" else f"{'xmm' if kind == '4' else _WIDTH[length]}{number}"

    def memory(kind: str) -> str:
        if c["base"] == RIP:
            return f"[rip+L{c['disp']}]"
        text = _GENERAL[c["base"]]
        if c.get("index", -1) >= 0:
            text += f"+{_GENERAL[c['index']]}*{1 << c.get('scale', 0)}"
        if c.get("disp"):
            text += f"{'+' if c['disp'] > 0 else '-'}{abs(c['disp']):#x}"
        broadcast = f"{{1to{4 << length}}}" if bcast else ""
        size = ("word" if kind == "w" else
                "dword" if bcast or row.tuple == Tuple.T1S else
                "xmmword" if kind in ("4", "p") or (length == 0 and kind in "xq") else
                ("", "ymmword", "zmmword")[length])  # fmt: skip
        if row.tuple == Tuple.QUARTER:
            size = ("dword", "qword", "xmmword")[length]
        if row.tuple == Tuple.HALF:
            size = ("qword", "xmmword", "ymmword")[length]
        size = {"e": "dword", "w": "word", "y": "byte"}.get(kind, "qword") if enc == LEGACY else size
        prefix = "" if name in ("lea", "prefetcht0", "prefetcht1") else f"{size} ptr "
        return f"{prefix}[{text}]{broadcast}"

    words = []
    for operand in row.operands.split():
        letter, kind = operand[0], operand[1:]
        if letter == "r":
            words.append(register(kind, c["reg"]))
        elif letter == "v":
            words.append(register(kind, c["vvvv"]))
        elif letter == "o":
            words.append(register(kind, c["rm"]))
        elif letter == "m":
            words.append(register(kind, c["rm"]) if "rm" in c else memory(kind))
        elif letter == "s":
            words.append(register(kind, c["imm"]))
        else:
            words.append(f"L{c['imm']}" if letter == "b" else f"{c['imm']:#x}")
    if c.get("mask") and words:
        words[0] += f"{{k{c['mask']}}}" + ("{z}" if c.get("zero") else "")
    return f"{row.mnemonic or name.removesuffix('_x')} {', '.join(words)}".rstrip()
