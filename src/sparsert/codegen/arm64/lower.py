"""The vector vocabulary on AArch64: a recipe per operation, a line of assembly per instruction.

The words behind an instruction's name are its operands in the order of its text: columns ``d``, ``a`` and ``b`` (``b``
may be a constant, which is loaded first), ``imm``, a number, a register by name, ``t`` and ``u`` for the two scratch
vectors; ``mem`` and ``arg`` stand for a base and its offset, ``pool`` for those of a constant, ``to`` for a label,
``shift`` for the number ``b``.
Words in capitals are :class:`_Rows` methods: short sequences that depend on the value. A recipe may come in variants,
by the operand that has the same register as ``d``.

Scratch vectors are the last two; kernels leave them alone but in the loop of taps, whose operations need none
(``Target.scratch``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ...errors import InternalError
from ..vector import OP, OPS, POOL_BYTES, Program, S, by_operation
from .address import Addresses
from .encoder import Ints, Value
from .registers import CALLEE_SAVED, GPR, MASK
from .stream import TEMP, Laid, Stream
from .table import ROWS

T, U = 31, 30
_M0, _M1 = (f"x{r}" for r in MASK)


def _by_lane(instruction: str) -> str:
    """Lane by lane, where the sign bit of the mask is set."""
    lanes = [f"tbz {mask} {bit} 8; {instruction} {i} x17" for i, (mask, bit) in
             enumerate([(_M0, 31), (_M0, 63), (_M1, 31), (_M1, 63)])]  # fmt: skip
    return "; add_imm x17 x17 4; ".join(lanes)


_SAVED = [*range(8, 16)]
_FRAME = 16 + 8 * (len(_SAVED) + len(CALLEE_SAVED))
_PAIRS = [(f"{kind} v{a} v{b}" if kind.endswith("_d") else f"{kind} x{a} x{b}") + f" sp {at}" for kind, at, a, b in [
    *(("st_d", 16 + 8 * i, *_SAVED[i : i + 2]) for i in range(0, len(_SAVED), 2)),
    *(("st", 80 + 8 * i, *CALLEE_SAVED[i : i + 2]) for i in range(0, len(CALLEE_SAVED), 2))]]  # fmt: skip

RECIPES: dict[str, str | dict[str, str]] = {
    "zero": "zero d", "mov": "mov_v d a", "load": "ldr_q d mem", "store": "str_q a mem",
    "bcast": "ldr_s d mem; dup d d", "const": "ldr_q d pool",
    "fma_lane": "fmla_lane d a b imm", "mul_lane": "fmul_lane d a b imm",
    "add": "fadd d a b", "sub": "fsub d a b", "mul": "fmul d a b", "div": "fdiv d a b",
    # Of two equal or unordered numbers the second: neither fmin nor fminnm is that.
    "min": {"": "fcmgt d b a; bsl d a b", "b": "fcmgt t b a; bit d a t", "a": "fcmgt t b a; bif d b t"},
    "max": {"": "fcmgt d a b; bsl d a b", "b": "fcmgt t a b; bit d a t", "a": "fcmgt t a b; bif d b t"},
    "bit_and": "and_v d a b", "bit_or": "orr_v d a b", "bit_xor": "eor_v d a b", "add_i": "add_v d a b",
    "fma_acc": "fmla d a b", "fma_mul": "mov_v t b; fmla t d a; mov_v d t",
    "fnma_acc": "fmls d a b", "fnma_mul": "mov_v t b; fmls t d a; mov_v d t",
    "round": "frintn d a",
    # fcvtns saturates; whatever is not below 2**31, NaN included, becomes INT_MIN.
    "to_int": "movi_top t 79; fcmgt t t a; movi_top u 128; fcvtns d a; bif d u t",
    "shl": "shl d a imm",
    "select_neg": {"": "signs d d; bsl d a b", "b": "signs t d; bit d a t", "a": "signs t d; bif d b t"},
    "load4": "ldr_q d mem", "insert4": "FIRST; ldr_q d mem", "store4": "FIRST; str_q a mem",
    "evens": "uzp1 d a b",
    "zip_lo": "zip1 d a b", "zip_hi": "zip2 d a b", "zip2_lo": "zip1_2d d a b", "zip2_hi": "zip2_2d d a b",
    "set_mask": f"ldr_q t mem; umov {_M0} t 0; umov {_M1} t 1",
    "load_mask": f"LEA; zero d; {_by_lane('ld1_lane d')}", "store_mask": f"LEA; {_by_lane('st1_lane a')}",
    "prefetch": "prfm mem",
    "s_arg": "ldr d arg", "s_put": "str a arg", "s_mov": "mov d a", "s_add": "add d d a 0", "s_sub": "sub d d a 0",
    "s_addi": "ADD", "s_set": "SET d", "s_muli": "SET x17; madd d a x17 xzr", "s_add_arg": "ldr x17 arg; add d d x17 0",
    "s_max_arg": "ldr x17 arg; cmp d x17; csel_gt d d x17", "s_min_arg": "ldr x17 arg; cmp d x17; csel_lt d d x17",
    "s_const": "adrp d pool_label; add_imm d d pool_label", "s_code": "adrp d to; add_imm d d to",
    "label": "", "align": "", "jump": "b to", "jump_zero": "cbz a to", "loop": "subs_imm a a 1; b_ne to",
    "call": "stp_pre x29 x30 sp -16; bl to; ldp_post x29 x30 sp 16", "ret": "ret",
    "enter": "; ".join([f"bti; stp_pre x29 x30 sp {-_FRAME}; add_imm x29 sp 0",
                        *(pair.replace("st", "stp", 1) for pair in _PAIRS)]),
    "leave": "; ".join([*(pair.replace("st", "ldp", 1) for pair in _PAIRS), f"ldp_post x29 x30 sp {_FRAME}; ret"]),
    "prefetch_near": "prfm_near mem", "s_load32": "ldr_w d mem", "s_store32": "str_w a mem",
    "s_at8": "ldrb x17 mem; add d a x17 shift", "s_at16": "ldrh x17 mem; add d a x17 shift",
    "s_at32": "ldr_w x17 mem; add d a x17 shift",
    "s_load": "LEA; ldar d x17", "s_store": "LEA; stlr a x17",
    "s_exchange": f"LEA; ldaxr {_M0} x17; stlxr {_M1} d x17; cbnz {_M1} -8; mov d {_M0}",
    "s_fetch_add": f"LEA; ldaxr {_M0} x17; add {_M0} {_M0} d 0; stlxr {_M1} {_M0} x17; cbnz {_M1} -12; sub d {_M0} d 0",
    "s_replace": f"LEA; ldaxr {_M0} x17; cmp {_M0} d; b_ne 12; stlxr {_M1} b x17; cbnz {_M1} -16; mov d {_M0}",
    "s_pause": "yield", "jump_equal": "cmp a b; b_eq to", "jump_differs": "cmp a b; b_ne to",
    "jump_less": "cmp a b; b_lt to",
    # The five that survive go to the stack; of ARGUMENTS, four are not where functions want them.
    "invoke": "mov x16 a; stp_pre x6 x7 sp -48; stp x8 x9 sp 16; str x11 sp 32; mov x1 x13; mov x5 x4; mov x4 x12; "
              "blr x16; ldr x11 sp 32; ldp x8 x9 sp 16; ldp_post x6 x7 sp 48",
}  # fmt: skip
"""All but the operations that take a weight straight from memory, which no instruction here does."""

_Line = tuple[str, tuple[str, ...]]
_FIXED = {"t": T, "u": U, "sp": 31, "xzr": 31}
_GPR_OF = np.array([GPR[s] for s in S], np.int64)


def _parse(recipe: str) -> tuple[_Line, ...]:
    lines = [line.split() for line in recipe.split(";") if line.strip()]
    return tuple((name, tuple(words)) for name, *words in lines)


_PARSED: dict[str, dict[str, tuple[_Line, ...]]] = {
    name: {case: _parse(text) for case, text in (recipe if isinstance(recipe, dict) else {"": recipe}).items()}
    for name, recipe in RECIPES.items()
}


def lower(program: Program) -> Laid:
    """The program as batches of instructions with their places.

    Label ``program.labels`` stands for the start of the constant pool, the next multiple of 64 bytes.
    """
    op = program.columns["op"]
    rows_of = by_operation(op)
    missing = [OPS[i].name for i in rows_of if OPS[i].name not in RECIPES]
    if missing:
        raise InternalError(f"no recipe for {', '.join(missing)} on AArch64")
    stream = Stream(op.size)
    address = Addresses(program, stream)
    for number, rows in rows_of.items():
        name = OPS[number].name
        for case, some in _cases(program, name, rows):
            view = _Rows(program, some, address, stream, OPS[number].form, OPS[number].scalar)
            for line in _PARSED[name][case]:
                view.line(*line)
    labels, aligned = (rows_of.get(OP[name], np.zeros(0, np.int64)) for name in ("label", "align"))
    disp = program.columns["disp"]
    return stream.finish(np.stack([labels, disp[labels]], 1), aligned, disp[aligned] // 4, program.labels)


def _cases(program: Program, name: str, rows: Ints) -> list[tuple[str, Ints]]:
    """The variants of an operation's recipe, and the rows each is for."""
    if len(_PARSED[name]) == 1:
        return [("", rows)]
    c = program.columns
    d, a, b = (c[key][rows] for key in "dab")
    cases = {"b": d == b, "a": (d == a) & (d != b), "": (d != a) & (d != b)}
    return [(case, rows[some]) for case, some in cases.items() if some.any()]


class _Rows:
    """The program rows of one operation, as operands of the instructions that stand for them."""

    def __init__(
        self, program: Program, rows: Ints, address: Addresses, stream: Stream, form: str, scalar: bool
    ) -> None:
        self.c, self.labels, self.rows, self.address, self.stream = (
            program.columns,
            program.labels,
            rows,
            address,
            stream,
        )
        self.registers: dict[str, NDArray[np.integer]] = {}
        for key in "dab":
            if key in form:
                column = self.c[key][rows]
                self.registers[key] = _GPR_OF[column] if scalar else column
        self.constants = not scalar and "b" in form and "a" in form and bool((self.c["b"][rows] < 0).any())
        self.checked = False

    def line(self, name: str, words: tuple[str, ...]) -> None:
        if name.isupper():
            _SEQUENCES[name](self, *words)
            return
        if self.constants and "b" in words:
            self._load_constants()
        operands: list[Value] = []
        label = None
        for word in words:
            if word in self.registers:
                operands.append(self.registers[word])
            elif word == "mem":
                operands += self.address.operand(self.rows)
            elif word == "arg":
                operands += [GPR[S.ARGS], self.c["disp"][self.rows]]
            elif word == "pool":
                operands += [GPR[S.CONST], POOL_BYTES * (-1 - self.c["b"][self.rows].astype(np.int64))]
            elif word == "imm":
                operands.append(self.c["disp"][self.rows])
            elif word == "shift":
                operands.append(self.c["b"][self.rows].astype(np.int64))
            elif word in ("to", "pool_label"):
                label = self.c["disp"][self.rows] if word == "to" else np.full(self.rows.size, self.labels)
            else:
                if word in "tu":
                    self._spare_scratch()
                operands.append(_number(word))
        if len(operands) + (label is not None) != len(ROWS[name].operands):
            raise InternalError(f"{name} takes {len(ROWS[name].operands)} operands, not {' '.join(words)}")
        self.stream.put(name, self.rows, *operands, label=label)

    def _load_constants(self) -> None:
        """Constants among ``b`` to the second scratch vector."""
        self._spare_scratch()
        b = self.registers["b"]
        some = b < 0
        at = POOL_BYTES * (-1 - b[some].astype(np.int64))
        self.stream.put("ldr_q", self.rows[some], U, GPR[S.CONST], at)
        self.registers["b"] = np.where(some, U, b)
        self.constants = False

    def _spare_scratch(self) -> None:
        if not self.checked:
            self.checked = True
            for key, column in self.registers.items():
                if (column >= U).any():
                    name = OPS[int(self.c["op"][self.rows[0]])].name
                    raise InternalError(f"{name} needs the scratch vectors, and {key} is one of them")

    def add(self) -> None:
        self.stream.sum(self.rows, self.registers["d"], self.registers["d"], self.c["disp"][self.rows])

    def set(self, d: str) -> None:
        self.stream.number(self.rows, self.registers.get(d, TEMP), self.c["disp"][self.rows])

    def lea(self) -> None:
        base, offset = self.address.operand(self.rows)
        self.stream.sum(self.rows, TEMP, base, np.zeros(self.rows.size, np.int64) + offset)

    def first(self) -> None:
        if self.c["b"][self.rows].any():
            raise InternalError("a vector of four lanes has one quarter")


_SEQUENCES: dict[str, Callable[..., None]] = {
    "ADD": _Rows.add,
    "SET": _Rows.set,
    "LEA": _Rows.lea,
    "FIRST": _Rows.first,
}


def _number(word: str) -> int:
    return _FIXED[word] if word in _FIXED else int(word.lstrip("xv"))
