"""The vector vocabulary on x86-64: a recipe per operation, and how far-away operands are addressed.

A recipe is one line per instruction: a row of the table and where each field comes from (``reg=d`` takes column ``d``,
``rm=b`` a register or, if negative, a constant; ``mem`` the row's memory operand; ``imm`` its immediate or label).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InternalError
from ..vector import OP, OPS, PITCH_OF, POOL_BYTES, Program, S, by_operation, unpacked
from .encoder import EVEX512, LEGACY, RIP, VEX256, Batch, Field, Ints
from .table import ALIGN, LABEL, ROW, ROWS

GPR = {
    S.ARGS: 7, S.X: 0, S.W: 2, S.Y: 1, S.PX: 9, S.PX3: 10, S.PX5: 13, S.PX7: 3, S.PY: 14, S.T: 12, S.K: 11, S.TMP: 15,
    S.CONST: 8, S.PANEL: 6,
}  # fmt: skip
"""rbp keeps the frame chain, rsp is the stack's. Bases avoid r12 and r13, whose encodings are longer."""
CALLEE_SAVED = (3, 12, 13, 14, 15)

_COMMON = {
    "mov": "vmovaps reg=d rm=a", "load": "vmovups reg=d mem", "store": "vmovups_st reg=a mem",
    "bcast": "vbroadcastss reg=d mem", "const": "vmovups reg=d rm=b",
    "add": "vaddps reg=d vvvv=a rm=b", "sub": "vsubps reg=d vvvv=a rm=b",
    "mul": "vmulps reg=d vvvv=a rm=b", "div": "vdivps reg=d vvvv=a rm=b", "min": "vminps reg=d vvvv=a rm=b",
    "max": "vmaxps reg=d vvvv=a rm=b", "bit_and": "vandps reg=d vvvv=a rm=b", "bit_or": "vorps reg=d vvvv=a rm=b",
    "bit_xor": "vxorps reg=d vvvv=a rm=b", "add_i": "vpaddd reg=d vvvv=a rm=b",
    "fma_acc": "vfmadd231ps reg=d vvvv=a rm=b", "fma_mul": "vfmadd213ps reg=d vvvv=a rm=b",
    "fnma_acc": "vfnmadd231ps reg=d vvvv=a rm=b", "fnma_mul": "vfnmadd213ps reg=d vvvv=a rm=b",
    "to_int": "vcvtps2dq reg=d rm=a", "load4": "vmovups_x reg=d mem",
    "zip_lo": "vunpcklps reg=d vvvv=a rm=b", "zip_hi": "vunpckhps reg=d vvvv=a rm=b",
    "zip2_lo": "vunpcklpd reg=d vvvv=a rm=b", "zip2_hi": "vunpckhpd reg=d vvvv=a rm=b",
    "load_bytes": "vpmovsxbd reg=d mem",
}  # fmt: skip
_SCALAR = {
    "s_arg": "mov reg=d arg", "s_put": "mov_st reg=a arg", "s_mov": "mov reg=d rm=a", "s_add": "add reg=d rm=a",
    "s_sub": "sub reg=d rm=a", "s_addi": "add_imm rm=d imm", "s_set": "mov_imm rm=d imm",
    "s_muli": "imul_imm reg=d rm=a imm", "s_add_arg": "add reg=d arg",
    "s_max_arg": "cmp reg=d arg; cmovl reg=d arg", "s_min_arg": "cmp reg=d arg; cmovg reg=d arg",
    "s_const": "lea reg=d pool", "s_code": "lea reg=d code", "prefetch": "prefetcht1 mem",
    "prefetch_near": "prefetcht0 mem",
    "label": "LABEL imm", "align": "ALIGN imm", "jump": "jmp imm", "jump_zero": "test reg=a rm=a; jz imm",
    "loop": "dec rm=a; jnz imm", "call": "call imm", "ret": "ret",
    "enter": "endbr64 rm=2; push rm=5; mov reg=5 rm=4; " + "; ".join(f"push rm={r}" for r in CALLEE_SAVED),
    "s_load32": "mov32 reg=d mem", "s_store32": "mov32_st reg=a mem",
    "s_at8": "movzx8 reg=15 mem; shl rm=15 imm=b; lea reg=d base=a index=15 scale=0",
    "s_at16": "movzx16 reg=15 mem; shl rm=15 imm=b; lea reg=d base=a index=15 scale=0",
    "s_at32": "mov32 reg=15 mem; shl rm=15 imm=b; lea reg=d base=a index=15 scale=0",
    "leave": "; ".join(f"pop rm={r}" for r in reversed(CALLEE_SAVED)) + "; pop rm=5; vzeroupper; ret",
    "s_load": "mov reg=d mem", "s_store": "mov_st reg=a mem", "s_exchange": "xchg reg=d mem",
    "s_replace": "mov reg=0 rm=d; cmpxchg reg=b mem; mov reg=d rm=0",
    "s_fetch_add": "xadd reg=d mem", "s_pause": "pause", "jump_equal": "cmp reg=a rm=b; jz imm",
    "jump_differs": "cmp reg=a rm=b; jnz imm", "jump_less": "cmp reg=a rm=b; jl imm",
    # Behind ``enter`` the stack is eight bytes off the sixteen that functions want.
    "invoke": "add_imm8 rm=4 imm=-8; call_at rm=a; add_imm8 rm=4 imm=8",
}  # fmt: skip
RECIPES = {
    EVEX512: _COMMON | _SCALAR | {
        "zero": "vpxord reg=d vvvv=d rm=d", "fma_bcast": "vfmadd231ps reg=d vvvv=a mem bcast=1",
        "mul_bcast": "vmulps reg=d vvvv=a mem bcast=1",
        "round": "vrndscaleps reg=d rm=a imm=8", "shl": "vpslld vvvv=d rm=a imm",
        "select_neg": "vpmovd2m reg=1 rm=d; vblendmps reg=d vvvv=b rm=a mask=1",
        "insert4": "vinsertf32x4 reg=d vvvv=d mem imm=b", "store4": "vextractf32x4 reg=a mem imm=b",
        "set_mask": "vmovups reg=31 mem; vpmovd2m reg=2 rm=31",
        "load_mask": "vmovups reg=d mem mask=2 zero=1", "store_mask": "vmovups_st reg=a mem mask=2",
        "mask_from": "vmovups reg=31 mem; vpmovd2m reg=d+3 rm=31", "load_by_mask": "vmovups reg=d mem mask=b+3 zero=1",
        "evens": "vshufps reg=d vvvv=a rm=b imm=136; vpermpd_imm reg=d rm=d imm=216; "
                 "vshuff64x2 reg=d vvvv=d rm=d imm=216",
        "sign_mask": "vpmovd2m reg=2 rm=a", "expand": "vexpandps reg=d mem mask=2 zero=1",
        "lookup2": "vpermi2ps reg=d vvvv=a rm=b", "fma_mask": "vfmadd231ps reg=d vvvv=a rm=b mask=2",
        "s_skip": "kmovw reg=15 rm=2; popcnt reg=15 rm=15; lea reg=d base=d index=15 scale=2",
        "mask_bits": "kmovw_load reg=d+3 mem", "store_by_mask": "vmovups_st reg=a mem mask=b+3",
        "bcast_by_mask": "vbroadcastss reg=d mem mask=b+3 zero=1", "pick": "vpermt2ps reg=d vvvv=a rm=b",
        "lanes_from": "valignd reg=d vvvv=b rm=a imm",
        "rotate_by_mask": "valignd reg=d vvvv=a rm=a imm mask=b+3 zero=1",
    },
    VEX256: _COMMON | _SCALAR | {
        "zero": "vxorps reg=d vvvv=d rm=d", "round": "vroundps reg=d rm=a imm=8", "shl": "vpslld_vex vvvv=d rm=a imm",
        "select_neg": "vblendvps reg=d vvvv=b rm=a imm=d",
        "insert4": "vinsertf128 reg=d vvvv=d mem imm=b", "store4": "vextractf128 reg=a mem imm=b",
        "set_mask": "vmovups reg=15 mem", "load_mask": "vmaskmovps reg=d vvvv=15 mem",
        "store_mask": "vmaskmovps_st reg=a vvvv=15 mem",
        "evens": "vshufps reg=d vvvv=a rm=b imm=136; vpermpd_imm reg=d rm=d imm=216",
    },
}  # fmt: skip
"""By vector encoding. Masks of the copies are k2, or ymm15: they occur outside the accumulate loop only. The numbered
masks of the accumulate loop are k3 to k7, and where the ISA has no mask registers there are none."""

_MULTIPLES = {1: (S.PX, 0), 2: (S.PX, 1), 3: (S.PX3, 0), 4: (S.PX, 2), 5: (S.PX5, 0), 6: (S.PX3, 1), 7: (S.PX7, 0)}
_BY_PRODUCT = 8
_INDEX = np.array([-1] + [GPR[reg] for reg, _ in _MULTIPLES.values()] + [GPR[S.TMP]], np.int8)
_SCALE = np.array([0] + [scale for _, scale in _MULTIPLES.values()] + [0], np.int8)
"""Index register and scale: none, then 1 to 7 pitches, then the product in TMP."""
_WINDOWED = {S.X: 64, S.W: 4}
"""Pointers that walk far, and what a compressed displacement of theirs counts in; others take 32-bit displacements."""
_MODIFIES = np.array(
    [
        op.name
        in ("s_add", "s_sub", "s_addi", "s_add_arg", "s_max_arg", "s_min_arg", "s_at8", "s_at16", "s_at32", "s_skip")
        for op in OPS
    ]
)
_GPR_OF = np.array([GPR[s] for s in S], np.int8)
_WRITES = np.array([op.scalar and "d" in op.form for op in OPS])


_Part = tuple[int, int, dict[str, Any]]


def _parse(recipe: str, vector_encoding: int) -> list[_Part]:
    parts: list[_Part] = []
    for line in recipe.split(";"):
        name, *fields = line.split()
        row = {"LABEL": LABEL, "ALIGN": ALIGN}.get(name)
        encoding = LEGACY
        if row is None:
            row = ROW[name]
            form = ROWS[name].encodings
            encoding = LEGACY if "L" in form else vector_encoding if "E" in form else VEX256
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


def lower(program: Program, encoding: int) -> list[Batch]:
    """Batches of instructions for ``encoding`` (EVEX512 or VEX256).

    Label ``program.labels`` stands for the start of the constant pool.
    """
    recipes, c = _PARSED[encoding], program.columns
    op = np.ascontiguousarray(c["op"])
    rows_by_op = by_operation(op)
    missing = [OPS[i].name for i in rows_by_op if i not in recipes]
    if missing:
        raise InternalError(f"no recipe for {missing} in this encoding")
    operand = _Addressing(program, rows_by_op, encoding)
    count = _COUNTS[encoding].take(op) + operand.extra
    start = np.cumsum(count) - count
    batches = operand.batches(start)
    start += operand.extra
    for number, rows_of in rows_by_op.items():
        for rows in operand.alike(rows_of) if "m" in OPS[number].form else [rows_of]:
            view = _Rows(program, rows, operand, OPS[number].scalar)
            for k, (row, enc, sources) in enumerate(recipes[number]):
                batches += view.instruction(row, enc, start[rows] + k, sources)
    return batches


class _Rows:
    """The program rows of one operation, as the fields of the instructions that stand for them."""

    def __init__(self, program: Program, rows: Ints, operand: _Addressing, scalar: bool) -> None:
        self.c, self.rows, self.operand, self.pool, self.scalar = (
            program.columns, rows, operand, program.labels, scalar,
        )  # fmt: skip
        self.registers = unpacked(program.table.heads.take(rows))

    def _column(self, name: str) -> NDArray[Any]:
        return self.registers[name] if name in self.registers else self.c[name].take(self.rows)

    def instruction(self, row: int, enc: int, place: Ints, sources: dict[str, Any]) -> list[Batch]:
        fields: dict[str, Field] = {}
        constant = None
        for key, source in sources.items():
            if key == "mem":
                fields |= self.operand.fields(self.rows)
            elif key == "arg":
                fields |= {"base": GPR[S.ARGS], "disp": self.c["disp"].take(self.rows)}
            elif key in ("pool", "code"):
                fields |= {"base": RIP, "disp": self.pool if key == "pool" else self.c["disp"].take(self.rows)}
            elif key == "imm":
                fields["imm"] = source if isinstance(source, int) else self._column(source or "disp")
            elif isinstance(source, int):
                fields[key] = source
            elif self.scalar:
                fields[key] = _GPR_OF.take(self.registers[source])
            else:
                column, _, above = source.partition("+")
                register = self.registers[column]
                if above:
                    register = register + np.int16(above)
                fields[key] = register
                if key == "rm" and source == "b" and (register < 0).any():
                    constant = register < 0
        bcast = bool(fields.pop("bcast", 0))
        if constant is None:
            return [Batch(row, enc, place, fields, bcast)]
        number = np.asarray(fields.pop("rm"))
        in_pool: dict[str, Field] = {
            "base": GPR[S.CONST],
            "disp": (-1 - number[constant].astype(np.int64)) * POOL_BYTES,
        }
        in_register: dict[str, Field] = {"rm": number[~constant]}
        return [
            Batch(row, enc, place[some], _pick(fields, some) | where)
            for some, where in ((constant, in_pool), (~constant, in_register))
            if some.any()
        ]


def _pick(fields: dict[str, Field], some: NDArray[np.bool_]) -> dict[str, Field]:
    return {key: value if isinstance(value, int) else value[some] for key, value in fields.items()}


class _Addressing:
    """Memory operands as base, index, scale and a short displacement, and the instructions that move the base for it.

    A byte displacement is split into a window, which the pointer is moved to, and a rest that fits the compressed 8-bit
    form. Steps of a run-time pitch reach eight rows through the multiples of the pitch; other pointers multiply into
    TMP. The moves accumulate between two explicit writes of the pointer, so a pointer is to be set anew at the top of
    a loop.
    """

    def __init__(self, program: Program, rows_by_op: dict[int, Ints], encoding: int) -> None:
        c, ptr = program.columns, np.ascontiguousarray(program.columns["ptr"])
        self.c, self.disp = c, c["disp"].copy()
        self.extra = np.zeros(len(program), np.int64)
        self._index: dict[int, tuple[NDArray[np.int8], NDArray[np.int8]]] = {}
        self._moves: list[tuple[Ints, S, Ints, Ints]] = []
        self._products: list[tuple[Ints, S, Ints]] = []
        self._indexed = np.zeros(len(program), np.int8)
        none = np.zeros(0, np.int64)
        writes = np.sort(np.concatenate([none, *(rows for i, rows in rows_by_op.items() if _WRITES[i])]))
        labels = rows_by_op.get(OP["label"], none)
        for number in sorted({*_WINDOWED, *np.unique(ptr[c["step"] != 0]).tolist()}):
            pointer = S(number)
            rows = np.flatnonzero(ptr == number)
            if not rows.size:
                continue
            written = writes[c["d"][writes] == number]
            window, reach = self._windows(pointer, rows, encoding), self._reaches(pointer, rows)
            if window is None and reach is None:
                continue
            # Rows that matter: first behind a write of the pointer, or elsewhere than the one before.
            turns = np.searchsorted(rows, written)
            turns = [np.zeros(1, np.int64), turns[turns < rows.size]]
            turns += [np.flatnonzero(place[1:] != place[:-1]) + 1 for place in (window, reach) if place is not None]
            at = np.unique(np.concatenate(turns))
            still = np.zeros(at.size, np.int64)
            window, reach = still if window is None else window[at], still if reach is None else reach[at]
            self._move(pointer, rows[at], written, window, reach)
            modifies = _MODIFIES[c["op"][written]]
            self._check(
                pointer, rows, rows[at], (window != 0) | (reach != 0), labels, written[~modifies], written[modifies]
            )
        self._kind = ptr * np.int8(2) + (self._indexed != 0)

    def _windows(self, pointer: S, rows: Ints, encoding: int) -> Ints | None:
        """How many bytes the pointer is moved for each row; what is left of the displacement stays."""
        if pointer not in _WINDOWED:
            return None
        bits = 7 + (0 if encoding == VEX256 else _WINDOWED[pointer].bit_length() - 1)
        disp = self.disp[rows]
        window = disp + (1 << bits)
        window &= -2 << bits
        self.disp[rows] = disp - window
        return window

    def _reaches(self, pointer: S, rows: Ints) -> Ints | None:
        """How many eights of pitches X is moved for each row; other pointers get the product of pitch and step."""
        steps = self.c["step"][rows].astype(np.int64)
        stepped = np.flatnonzero(steps)
        if not stepped.size:
            return None
        if pointer == S.X:
            self._indexed[rows] = steps & 7
            return steps >> 3
        self._indexed[rows[stepped]] = _BY_PRODUCT
        self.extra[rows[stepped]] += 1
        self._products.append((rows[stepped], PITCH_OF[pointer], steps[stepped]))
        return None

    def _move(self, pointer: S, rows: Ints, written: Ints, where: Ints, reach: Ints) -> None:
        region = np.searchsorted(written, rows)
        same = np.zeros(rows.size, bool)
        np.equal(region[1:], region[:-1], out=same[1:])
        delta, hop = where.copy(), reach.copy()
        delta[1:] -= where[:-1] * same[1:]
        hop[1:] -= reach[:-1] * same[1:]
        moved = np.flatnonzero((delta != 0) | (hop != 0))
        delta, hop = delta[moved], hop[moved]
        self.extra[rows[moved]] += (delta != 0).astype(np.int64) + (hop != 0) + ((hop != 0) & (hop != 1))
        self._moves.append((rows[moved], pointer, delta, hop))

    @staticmethod
    def _check(
        pointer: S, rows: Ints, turns: Ints, away: NDArray[np.bool_], labels: Ints, fresh: Ints, modified: Ints
    ) -> None:
        """A pointer that moves may neither be used on behind a label nor be added to meanwhile.

        Control can reach a label from elsewhere. ``rows`` use the pointer, and it changes its place at some of them,
        ``turns``, whether ``away`` or back.
        """
        moving = np.zeros(fresh.size + 1, bool)
        moving[np.searchsorted(fresh, turns[away])] = True
        for joints, step in ((labels, 0), (modified, -1)):
            neighbour = np.searchsorted(rows, joints) + step
            inside = (neighbour >= 0) & (neighbour < rows.size)
            user, region = rows[neighbour[inside]], np.searchsorted(fresh, joints[inside])
            bad = np.searchsorted(fresh, user) == region
            bad &= away[np.searchsorted(turns, user, "right") - 1] if step else moving[region]
            if bad.any():
                raise InternalError(f"pointer {pointer.name} is used across a label, or added to, while it is moved")

    def alike(self, rows: Ints) -> list[Ints]:
        """``rows`` apart by pointer, and by whether there is an index: the plain ones are many, and quickly encoded."""
        kind = self._kind.take(rows)
        if kind.min() == kind.max():
            return [rows]
        return [rows.take(np.flatnonzero(kind == one)) for one in np.unique(kind)]

    def fields(self, rows: Ints) -> dict[str, Field]:
        """The memory operand of ``rows``, which are alike, as fields of an instruction."""
        fields: dict[str, Field] = {"base": GPR[S(int(self.c["ptr"][rows[0]]))], "disp": self.disp.take(rows)}
        if self._indexed[rows[0]]:
            indexed = self._indexed.take(rows)
            fields |= {"index": _INDEX.take(indexed), "scale": _SCALE.take(indexed)}
        return fields

    def batches(self, start: Ints) -> list[Batch]:
        """The instructions that move pointers or multiply steps, in front of the row that needs them."""
        used = np.zeros(start.size, np.int64)
        out: list[Batch] = []

        def put(name: str, rows: Ints, **fields: Field) -> None:
            if rows.size:
                out.append(Batch(ROW[name], LEGACY, start[rows] + used[rows], fields))
                used[rows] += 1

        for rows, pointer, delta, hop in self._moves:
            short = delta == delta.astype(np.int8)
            for name, some in (("add_imm8", short & (delta != 0)), ("add_imm", ~short)):
                put(name, rows[some], rm=GPR[pointer], imm=delta[some])
            if hop.any():
                one, many, pitch = rows[hop == 1], (hop != 0) & (hop != 1), GPR[PITCH_OF[pointer]]
                put("lea", one, reg=GPR[pointer], base=GPR[pointer], index=pitch, scale=3)
                put("imul_imm", rows[many], reg=GPR[S.TMP], rm=pitch, imm=hop[many] * 8)
                put("add", rows[many], reg=GPR[pointer], rm=GPR[S.TMP])
        for rows, pitch, steps in self._products:
            put("imul_imm", rows, reg=GPR[S.TMP], rm=GPR[pitch], imm=steps)
        return out
