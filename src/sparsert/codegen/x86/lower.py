"""The vector vocabulary on x86-64: a recipe per operation, and how far-away operands are addressed.

A recipe is one line per instruction: a row of the encoding table and where each field comes from (``reg=d`` takes column ``d``,
``rm=b`` a register or, if negative, a constant; ``mem`` the row's memory operand; ``imm`` its immediate or label).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InternalError
from ..vector import OP, OPS, PITCH_OF, TILE_BYTES, Program, S
from .encoder import EVEX512, LEGACY, RIP, VEX256, Instructions, allocate
from .table import ALIGN, LABEL, ROW, ROWS

GPR = {
    S.ARGS: 7, S.X: 0, S.W: 2, S.Y: 1, S.PX: 9, S.PX3: 10, S.PX5: 11, S.PX7: 3, S.PY: 14, S.T: 12, S.K: 13, S.TMP: 15,
    S.CONST: 8, S.CODE: 6,
}  # fmt: skip
"""rdi rax rdx rcx r9 r10 r11 rbx r14 r12 r13 r15 r8 rsi. rbp keeps the frame chain, rsp is the stack's."""
RBX, RBP, RSP, CALLEE_SAVED = 3, 5, 4, (3, 12, 13, 14, 15)

_COMMON = {
    "mov": "vmovaps reg=d rm=a", "load": "vmovups reg=d mem", "store": "vmovups_st reg=a mem", "bcast": "vbroadcastss reg=d mem",
    "const": "vmovups reg=d rm=b", "add": "vaddps reg=d vvvv=a rm=b", "sub": "vsubps reg=d vvvv=a rm=b",
    "mul": "vmulps reg=d vvvv=a rm=b", "div": "vdivps reg=d vvvv=a rm=b", "min": "vminps reg=d vvvv=a rm=b",
    "max": "vmaxps reg=d vvvv=a rm=b", "bit_and": "vandps reg=d vvvv=a rm=b", "bit_or": "vorps reg=d vvvv=a rm=b",
    "bit_xor": "vxorps reg=d vvvv=a rm=b", "add_i": "vpaddd reg=d vvvv=a rm=b",
    "fma_acc": "vfmadd231ps reg=d vvvv=a rm=b", "fma_mul": "vfmadd213ps reg=d vvvv=a rm=b",
    "fnma_acc": "vfnmadd231ps reg=d vvvv=a rm=b", "fnma_mul": "vfnmadd213ps reg=d vvvv=a rm=b",
    "to_int": "vcvtps2dq reg=d rm=a", "load4": "vmovups_x reg=d mem",
    "zip_lo": "vunpcklps reg=d vvvv=a rm=b", "zip_hi": "vunpckhps reg=d vvvv=a rm=b",
    "zip2_lo": "vunpcklpd reg=d vvvv=a rm=b", "zip2_hi": "vunpckhpd reg=d vvvv=a rm=b",
}  # fmt: skip
_SCALAR = {
    "s_arg": "mov reg=d arg", "s_put": "mov_st reg=a arg", "s_mov": "mov reg=d rm=a", "s_add": "add reg=d rm=a",
    "s_sub": "sub reg=d rm=a", "s_addi": "add_imm rm=d imm", "s_set": "mov_imm rm=d imm", "s_muli": "imul_imm reg=d rm=a imm",
    "s_min": "cmp reg=d rm=a; cmova reg=d rm=a", "s_min_arg": "cmp reg=d arg; cmova reg=d arg",
    "s_const": "lea reg=d pool", "s_code": "lea reg=d code", "prefetch": "prefetcht1 mem",
    "label": "LABEL imm", "align": "ALIGN imm", "jump": "jmp imm", "jump_zero": "test reg=a rm=a; jz imm",
    "loop": "dec rm=a; jnz imm", "call": "call imm", "ret": "ret",
    "enter": "endbr64 rm=2; push rm=5; mov reg=5 rm=4; " + "; ".join(f"push rm={r}" for r in CALLEE_SAVED),
    "leave": "; ".join(f"pop rm={r}" for r in reversed(CALLEE_SAVED)) + "; pop rm=5; vzeroupper; ret",
}  # fmt: skip
RECIPES = {
    EVEX512: _COMMON | _SCALAR | {
        "zero": "vpxord reg=d vvvv=d rm=d", "fma_bcast": "vfmadd231ps reg=d vvvv=a mem bcast=1",
        "round": "vrndscaleps reg=d rm=a imm=8", "shl": "vpslld vvvv=d rm=a imm",
        "select_neg": "vpmovd2m reg=1 rm=d; vblendmps reg=d vvvv=b rm=a mask=1",
        "insert4": "vinsertf32x4 reg=d vvvv=d mem imm=b", "store4": "vextractf32x4 reg=a mem imm=b",
        "set_mask": "vmovups reg=31 mem; vpmovd2m reg=2 rm=31",
        "load_mask": "vmovups reg=d mem mask=2 zero=1", "store_mask": "vmovups_st reg=a mem mask=2",
    },
    VEX256: _COMMON | _SCALAR | {
        "zero": "vxorps reg=d vvvv=d rm=d", "round": "vroundps reg=d rm=a imm=8", "shl": "vpslld_vex vvvv=d rm=a imm",
        "select_neg": "vblendvps reg=d vvvv=b rm=a imm=d",
        "insert4": "vinsertf128 reg=d vvvv=d mem imm=b", "store4": "vextractf128 reg=a mem imm=b",
        "set_mask": "vmovups reg=15 mem", "load_mask": "vmaskmovps reg=d vvvv=15 mem",
        "store_mask": "vmaskmovps_st reg=a vvvv=15 mem",
    },
}  # fmt: skip
"""By vector encoding. Mask operations use k2, or ymm15: they occur outside the accumulate loop only."""

_MULTIPLES = {0: (-1, 0), 1: (S.PX, 0), 2: (S.PX, 1), 3: (S.PX3, 0), 4: (S.PX, 2), 5: (S.PX5, 0), 6: (S.PX3, 1), 7: (S.PX7, 0)}
_INDEX = np.array([-1 if reg < 0 else GPR[S(reg)] for reg, _ in _MULTIPLES.values()], np.int8)
_SCALE = np.array([scale for _, scale in _MULTIPLES.values()], np.int8)
_WINDOWED = {S.X: TILE_BYTES, S.W: 4}
"""Pointers that walk far, and what a compressed displacement of theirs counts in; others take 32-bit displacements."""
_MODIFIES = [OP[name] for name in ("s_add", "s_sub", "s_addi", "s_min", "s_min_arg")]
_GPR_OF = np.array([GPR[s] for s in S], np.int8)
_SCALAR_OP = np.array([op.scalar for op in OPS])
_MEMORY_OP = np.array(["m" in op.form for op in OPS])
_WRITES_SCALAR = np.array([op.scalar and "d" in op.form for op in OPS])

_Part = tuple[int, int, dict[str, Any]]


def _parse(recipe: str, vector_encoding: int) -> list[_Part]:
    parts: list[_Part] = []
    for line in recipe.split(";"):
        name, *fields = line.split()
        row = {"LABEL": LABEL, "ALIGN": ALIGN}.get(name)
        encoding = LEGACY
        if row is None:
            row = ROW[name]
            encoding = LEGACY if "L" in ROWS[name].encodings else VEX256 if name == "vzeroupper" else vector_encoding
        sources: dict[str, Any] = {}
        for item in fields:
            key, _, value = item.partition("=")
            sources[key] = int(value) if value.lstrip("-").isdigit() else value
        parts.append((row, encoding, sources))
    return parts


_PARSED = {enc: {OP[name]: _parse(text, enc) for name, text in recipes.items()} for enc, recipes in RECIPES.items()}
_COUNTS = {
    enc: np.array([len(recipes.get(i, ())) for i in range(len(OPS))], np.int64) for enc, recipes in _PARSED.items()
}


def lower(program: Program, encoding: int) -> tuple[Instructions, NDArray[np.int64]]:
    """Instructions for ``encoding`` (EVEX512 or VEX256), and for each the program row it stems from.

    Label ``program.labels`` stands for the start of the constant pool.
    """
    recipes, c = _PARSED[encoding], program.columns
    op = c["op"]
    present = np.flatnonzero(np.bincount(op, minlength=len(OPS))).tolist()
    missing = [OPS[i].name for i in present if i not in recipes]
    if missing:
        raise InternalError(f"no recipe for {missing} in this encoding")
    operand = _Addressing(program, encoding)
    count = _COUNTS[encoding][op] + operand.extra
    start = np.cumsum(count) - count
    out = allocate(int(count.sum()))
    operand.fill(out, start)
    main = start + operand.extra
    for number in present:
        rows = np.flatnonzero(op == number)
        for k, (row, enc, sources) in enumerate(recipes[number]):
            _fill(out, main[rows] + k, row, enc, sources, c, rows, operand, bool(_SCALAR_OP[number]))
    return out, np.repeat(np.arange(op.size), count)


def _fill(out: Instructions, at: NDArray[np.int64], row: int, enc: int, sources: dict[str, Any],
          c: dict[str, NDArray[Any]], rows: NDArray[np.int64], operand: _Addressing, scalar: bool) -> None:  # fmt: skip
    out["row"][at] = row
    out["enc"][at] = enc
    for key, source in sources.items():
        if key == "mem":
            for name, column in operand.columns.items():
                out[name][at] = column[rows]
        elif key == "arg":
            out["base"][at] = GPR[S.ARGS]
            out["disp"][at] = c["disp"][rows]
        elif key == "pool":
            out["base"][at] = RIP
            out["disp"][at] = operand.pool
        elif key == "code":
            out["base"][at] = RIP
            out["disp"][at] = c["disp"][rows]
        elif key == "imm":
            out["imm"][at] = source if isinstance(source, int) else c[source or "disp"][rows]
        elif isinstance(source, int):
            out[key][at] = source
        elif scalar:
            out[key][at] = _GPR_OF[c[source][rows]]
        else:
            register = c[source][rows]
            out[key][at] = register
            if key == "rm":
                constant = register < 0
                if constant.any():
                    out["rm"][at[constant]] = -1
                    out["base"][at[constant]] = GPR[S.CONST]
                    out["disp"][at[constant]] = (-1 - register[constant].astype(np.int64)) * TILE_BYTES


class _Addressing:
    """Memory operands as base, index, scale and a short displacement, and the instructions that move the base for it.

    A byte displacement is split into a window, which the pointer is moved to, and a rest that fits the compressed 8-bit form.
    Steps of a run-time pitch reach eight rows through the multiples of the pitch; other pointers multiply into TMP.
    The moves accumulate between two explicit writes of the pointer, so a pointer is to be set anew at the top of a loop.
    """

    def __init__(self, program: Program, encoding: int) -> None:
        c = program.columns
        op, ptr, n = c["op"], c["ptr"], len(program)
        self.pool = program.labels
        self.extra = np.zeros(n, np.int64)
        base, index, scale = np.zeros(n, np.int8), np.full(n, -1, np.int8), np.zeros(n, np.int8)
        disp, rm = c["disp"].copy(), np.full(n, -1, np.int8)
        self.columns = {"base": base, "index": index, "scale": scale, "disp": disp, "rm": rm}
        self._moves: list[tuple[NDArray[np.int64], S, NDArray[np.int64], NDArray[np.int64]]] = []
        self._products: list[tuple[NDArray[np.int64], S, NDArray[np.int64]]] = []
        memory = np.flatnonzero(_MEMORY_OP[op])
        writes = np.flatnonzero(_WRITES_SCALAR[op])
        labels = np.flatnonzero(op == OP["label"])
        used = ptr[memory]
        for number in np.flatnonzero(np.bincount(used, minlength=len(S))).tolist():
            pointer = S(number)
            rows = memory[used == number]
            base[rows] = GPR[pointer]
            written = writes[c["d"][writes] == number]
            window = np.zeros(rows.size, np.int64)
            if pointer in _WINDOWED:
                size = 256 * (1 if encoding == VEX256 else _WINDOWED[pointer])
                window = (c["disp"][rows] + size // 2) // size * size
                disp[rows] -= window
            steps = c["step"][rows].astype(np.int64)
            reach = np.zeros_like(steps)
            stepped = np.flatnonzero(steps)
            if stepped.size and pointer == S.X:
                reach, inside = steps >> 3, steps & 7
                index[rows], scale[rows] = _INDEX[inside], _SCALE[inside]
            elif stepped.size:
                index[rows[stepped]] = GPR[S.TMP]
                self.extra[rows[stepped]] += 1
                self._products.append((rows[stepped], PITCH_OF[pointer], steps[stepped]))
            region = np.searchsorted(written, rows)
            first = np.ones(rows.size, bool)
            first[1:] = region[1:] != region[:-1]
            self._move(pointer, rows, first, window, reach)
            modified = written[np.isin(op[written], _MODIFIES)]
            self._check(pointer, rows, (window != 0) | (reach != 0), labels, written, modified)

    def _move(self, pointer: S, rows: NDArray[np.int64], first: NDArray[np.bool_], where: NDArray[np.int64], reach: NDArray[np.int64]) -> None:
        delta, hop = np.diff(where, prepend=0), np.diff(reach, prepend=0)
        delta[first], hop[first] = where[first], reach[first]
        moved = np.flatnonzero((delta != 0) | (hop != 0))
        delta, hop = delta[moved], hop[moved]
        self.extra[rows[moved]] += (delta != 0).astype(np.int64) + (hop != 0) + ((hop != 0) & (hop != 1))
        self._moves.append((rows[moved], pointer, delta, hop))

    @staticmethod
    def _check(pointer: S, rows: NDArray[np.int64], away: NDArray[np.bool_], labels: NDArray[np.int64],
               written: NDArray[np.int64], modified: NDArray[np.int64]) -> None:  # fmt: skip
        """A pointer that moves may not be used on behind a label, where control can come from elsewhere, nor be added to meanwhile."""
        fresh = np.setdiff1d(written, modified)
        region = np.searchsorted(fresh, rows)
        moving = np.unique(region[away])
        for joints, step in ((labels, 0), (modified, -1)):
            neighbour = np.searchsorted(rows, joints) + step
            inside = (neighbour >= 0) & (neighbour < rows.size)
            n = neighbour[inside]
            bad = region[n] == np.searchsorted(fresh, joints[inside])
            if np.any(bad & (np.isin(region[n], moving) if step == 0 else away[n])):
                raise InternalError(f"pointer {pointer.name} is used across a label, or added to, while it is moved")

    def fill(self, out: Instructions, start: NDArray[np.int64]) -> None:
        used = np.zeros(start.size, np.int64)
        for rows, pointer, delta, hop in self._moves:
            has = delta != 0
            at = start[rows[has]] + used[rows[has]]
            short = delta[has] == delta[has].astype(np.int8)
            out["row"][at] = np.where(short, ROW["add_imm8"], ROW["add_imm"])
            out["rm"][at] = GPR[pointer]
            out["imm"][at] = delta[has]
            used[rows[has]] += 1
            if not hop.any():
                continue
            one, many = hop == 1, (hop != 0) & (hop != 1)
            at = start[rows[one]] + used[rows[one]]
            out["row"][at] = ROW["lea"]
            out["reg"][at] = out["base"][at] = GPR[pointer]
            out["index"][at], out["scale"][at] = GPR[PITCH_OF[pointer]], 3
            used[rows[one]] += 1
            at = start[rows[many]] + used[rows[many]]
            out["row"][at], out["reg"][at], out["rm"][at] = ROW["imul_imm"], GPR[S.TMP], GPR[PITCH_OF[pointer]]
            out["imm"][at] = hop[many] * 8
            out["row"][at + 1], out["reg"][at + 1], out["rm"][at + 1] = ROW["add"], GPR[pointer], GPR[S.TMP]
            used[rows[many]] += 2
        for rows, pitch, steps in self._products:
            at = start[rows] + used[rows]
            out["row"][at], out["reg"][at], out["rm"][at], out["imm"][at] = ROW["imul_imm"], GPR[S.TMP], GPR[pitch], steps
            used[rows] += 1
