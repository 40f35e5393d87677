"""Vector program in, code object or listing out."""

from __future__ import annotations

import re

import numpy as np

from ...errors import CodeBudgetError
from ..codeobject import CodeObject
from ..pool import listed, pool
from ..vector import Program
from .encoder import encode
from .lower import lower
from .table import BRANCHES, ROWS

REACH = 128 << 20  # bytes that a branch spans


def assemble(program: Program, isa: str) -> CodeObject:
    """Little-endian code, to be mapped at a multiple of 4,096 bytes: constants are found by their page.

    Raises:
        CodeBudgetError: branches would not reach across the code.
    """
    laid = lower(program)
    if 4 * laid.size > REACH:
        raise CodeBudgetError(
            f"the code takes {4 * laid.size} bytes, and branches reach {REACH}",
            hint="Split or prune the layer further, or use target='reference'.",
        )
    code = encode(laid.batches, laid.size).astype("<u4", copy=False).tobytes()
    code += bytes(-len(code) % 64)
    return CodeObject(isa, code + pool(program), len(code), laid.size)


def listing(program: Program, isa: str) -> str:
    """Offset, word and instruction as GNU as reads it, a line each, with the kernel's remarks at the labels."""
    laid = lower(program)
    words, lines = encode(laid.batches, laid.size).tolist(), [""] * laid.size
    marks: dict[int, list[str]] = {}
    for number, place in enumerate(laid.labels[:-1].tolist()):
        note = program.notes.get(number, "")
        marks.setdefault(place, []).append(f"L{number}:" + (f"  ; {note}" if note else ""))
    for batch in laid.batches:
        n = batch.place.size
        fields = {key: np.broadcast_to(value, n).tolist() for key, value in batch.fields.items()}
        labels = [None] * n if batch.label is None else batch.label.tolist()
        for i, place in enumerate(batch.place.tolist()):
            text = instruction_text(batch.row, {key: value[i] for key, value in fields.items()}, labels[i])
            lines[place] = f"{4 * place:8x}  {words[place]:08x}  {text}"
    out = [line for place in range(laid.size) for line in (*marks.get(place, ()), lines[place])]
    return "\n".join([*out, *marks.get(laid.size, ()), *listed(program, 4 * int(laid.labels[-1]))]) + "\n"


def instruction_text(name: str, fields: dict[str, int], label: int | None = None) -> str:
    """One instruction as GNU as reads it; ``label``: what it refers to by name."""

    def operand(match: re.Match[str]) -> str:
        word = match[1]
        kind, field = next(pair for pair in ROWS[name].operands if "".join(pair) == word)
        value = fields[field]
        if not kind:
            named = label is not None and (field in BRANCHES or field == "page")
            return f"L{label}" if named else f".{value:+}" if field in BRANCHES else str(value)
        if value == 31 and kind in "XWP":
            return "sp" if kind == "P" else f"{kind.lower()}zr"
        return f"{'x' if kind == 'P' else kind.lower()}{value}"

    text = re.sub(r"<(\w+)>", operand, ROWS[name].text)
    if label is not None and name == "add_imm":
        text = re.sub(r"#\d+$", f":lo12:L{label}", text)
    return re.sub(r", #0\](?!!)|, lsl #0$", lambda m: m[0][-1] if m[0].endswith("]") else "", text)
