"""Every row of the x86 table, in every encoding it allows, over drawn operands: the bytes are those of GNU as.

Second opinion: objdump decodes our bytes to the text it gives for the bytes of as, instruction by instruction.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest

from binutils import assembled, decoded
from sparsert.codegen.x86.assemble import instruction_text
from sparsert.codegen.x86.encoder import EVEX128, EVEX256, EVEX512, LEGACY, RIP, VEX128, VEX256, Batch, Encoded, encode
from sparsert.codegen.x86.table import ALIGN, LABEL, NAMES, ROW, ROWS, Tuple
from sparsert.errors import InternalError

oracle = pytest.mark.tools("as", "objdump", "objcopy")
DRAWS = 150  # per row, encoding and kind of operand
EVEX = (EVEX128, EVEX256, EVEX512)
LEGAL = {"L": (LEGACY,), "V": (VEX128, VEX256), "E": EVEX}
RSP = 4
NOT_IN_128_BITS = ("vinsertf32x4", "vextractf32x4", "vpermpd_imm", "vshuff64x2", "vbroadcastf32x4")
BRANCHES = tuple(name for name, row in ROWS.items() if row.operands == "b")
REGISTERS_ONLY = ("vpslld_vex", "vpmovd2m", "kmovw", "movzx16_r", "vexpandps_r")  # sources not read from memory
LEGACY_SIZES = {"me": "dword", "mw": "word", "my": "byte"}
FIXED_RM = {"endbr64": 2, "xgetbv": 0}  # opcodes that look like an operand


# One instruction per place; -1 in ``rm`` is a memory operand, -1 in ``index`` none.
FIELDS = {"row": 0, "enc": 0, "bcast": 0, "reg": 0, "vvvv": 0, "rm": -1, "base": 0, "index": -1, "scale": 0, "disp": 0,
          "imm": 0, "mask": 0, "zero": 0}  # fmt: skip
Instructions = dict[str, np.ndarray]


def allocate(n: int) -> Instructions:
    return {name: np.full(n, default, np.int64) for name, default in FIELDS.items()}


def batches(c: Instructions) -> list[Batch]:
    """``c`` as the encoder takes it: batches of one row, encoding, kind of operand and base.

    A field that a batch agrees on is a number, others are arrays: the encoder has code for either.
    """
    base = np.where(c["index"] < 0, c["base"], -1)
    key = np.stack([c["row"], c["enc"], c["bcast"], np.minimum(c["rm"], 0), np.minimum(c["index"], 0), base])
    groups, member = np.unique(key, axis=1, return_inverse=True)
    made = []
    for g in range(groups.shape[1]):
        place = np.flatnonzero(member.reshape(-1) == g)
        row, enc, bcast, rm, index, _ = groups[:, g].tolist()
        modrm = row < LABEL and (
            ROWS[NAMES[row]].digit >= 0 or any(o[0] in "mo" for o in ROWS[NAMES[row]].operands.split())
        )
        names = ["reg", "vvvv", "imm", "mask", "zero"] + ([] if not modrm else ["rm"] if rm == 0 else ["base", "disp"])
        names += ["index", "scale"] if index == 0 and rm < 0 else []
        columns = {name: c[name][place] for name in names}
        if row >= LABEL:
            made.append(Batch(row, LEGACY, place, {"imm": columns["imm"]}))
            continue
        optional = ("mask", "zero", *(("disp",) if RIP not in c["base"][place] else ()))
        used = {k: v for k, v in columns.items() if np.any(v) or k not in optional}
        fields = {k: v if np.any(v != v[0]) else int(v[0]) for k, v in used.items()}
        made.append(Batch(row, enc, place, fields, bool(bcast)))
    return made


def seeded(text: str, request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng([request.config.getoption("--seed"), zlib.crc32(text.encode())])


def encodings(name: str) -> list[int]:
    found = [e for letter in ROWS[name].encodings for e in LEGAL[letter]]
    return [e for e in found if not (e in (EVEX128, VEX128) and name in NOT_IN_128_BITS)]


def displacements(rng: np.random.Generator, n: int, unit: int) -> np.ndarray:
    """Around all that a displacement's form depends on: 0, one byte, one byte times the operand's size, four bytes."""
    near = np.array([0, 0, 1, -1, 3, 64, 126, 127, 128, 129, -127, -128, -129, 4096, -4096, 2**31 - 1, -(2**31)])
    scaled = np.array([1, -1, 2, 126, 127, 128, -127, -128, -129, 1000]) * unit
    beside = scaled + rng.choice([-unit // 2, -1, 1, unit // 2], scaled.size)
    return rng.choice(np.concatenate([near, scaled, scaled, beside, rng.integers(-(2**31), 2**31, 8)]), n)


def draw(name: str, enc: int, operand: str, n: int, rng: np.random.Generator) -> Instructions:
    """``n`` instructions whose operand ``rm`` is of one kind.

    A "register", one in the "opcode", "memory", "rip" (labels 0 and 1), "broadcast", or "none".
    """
    row = ROWS[name]
    c = allocate(n)
    c["row"][:], c["enc"][:], c["bcast"][:] = ROW[name], enc, operand == "broadcast"
    limit = 32 if enc in EVEX else 16

    def registers(letter: str) -> np.ndarray:
        kind = next((o[1:] for o in row.operands.split() if o[0] == letter), "")
        return rng.integers(0, {"k": 8, "g": 16}.get(kind, limit), n)

    if "r" in row.operands:
        c["reg"] = registers("r")
    if "v" in row.operands:
        c["vvvv"] = registers("v")
    if row.imm:
        wide = 2 ** (8 * row.imm - 1)
        edges = [0, 1, 8, -1, 127, -128, wide - 1, -wide] + ([128, -129, 4096] if row.imm == 4 else [])
        c["imm"] = rng.choice(np.concatenate([edges, rng.integers(-wide, wide, 8)]), n)
        if "L" not in row.encodings:  # only general instructions extend the sign
            c["imm"] &= 0xFF
    if name in ("shl", "shr"):
        c["imm"] = rng.choice(np.delete(np.arange(64), 1), n)  # by 1 has a form of its own
    if "s" in row.operands:
        c["imm"] = rng.integers(0, 16, n)
    if name in ("vinsertf32x4", "vextractf32x4"):
        c["imm"] = rng.integers(0, 4, n)
    if "b" in row.operands:
        c["imm"] = rng.integers(0, 2, n)
    if name in FIXED_RM:
        c["rm"][:] = FIXED_RM[name]
    elif operand in ("register", "opcode"):
        c["rm"] = registers("m" if operand == "register" else "o")
    elif operand == "rip":
        c["base"][:], c["disp"] = RIP, rng.integers(0, 2, n)
    elif operand in ("memory", "broadcast"):
        c["base"] = rng.integers(0, 16, n)
        index = rng.integers(-1, 16, n)
        c["index"] = np.where((index == RSP) | (rng.random(n) < 0.4), -1, index)
        c["scale"] = np.where(c["index"] >= 0, rng.integers(0, 4, n), 0)
        element = operand == "broadcast" or row.tuple == Tuple.T1S
        c["disp"] = displacements(rng, n, 4 if element else 16 << max(0, enc - EVEX128))
    if row.imm == 4 and operand == "memory":  # SIB, displacement and immediate are nine bytes: the encoder refuses
        c["index"][:], c["scale"][:], c["base"] = -1, 0, np.where(c["base"] & 7 == RSP, 3, c["base"])
    if enc in EVEX and name != "vpmovd2m":
        c["mask"] = np.where(rng.random(n) < 0.5, 0, rng.integers(1, 8, n))
        to_memory = row.operands[0] == "m" and operand != "register"
        c["zero"] = ((c["mask"] > 0) & (rng.random(n) < 0.5) & (not to_memory)).astype(np.int64)
    return c


def operands_of(name: str, enc: int) -> list[str]:
    row = ROWS[name]
    if "m" not in row.operands:
        return ["opcode" if "o" in row.operands else "none"]
    rm = next(o for o in row.operands.split() if o[0] == "m")
    kinds = [] if rm in ("mq", "mw", "my", "mp") else ["register"]
    if name not in REGISTERS_ONLY:
        kinds += ["memory"] + ([] if row.imm else ["rip"])  # no RIP operand has an immediate (encoder._resolve)
        kinds += ["broadcast"] if enc in EVEX and row.tuple == Tuple.FULL else []
    return kinds


def joined(parts: list[Instructions]) -> Instructions:
    return {name: np.concatenate([p[name] for p in parts]) for name in FIELDS}


def label(number: int) -> Instructions:
    c = allocate(1)
    c["row"][0], c["imm"][0] = LABEL, number
    return c


def drawn(name: str, n: int, rng: np.random.Generator) -> Instructions:
    return joined([draw(name, enc, kind, n, rng) for enc in encodings(name) for kind in operands_of(name, enc)])


def fields(c: Instructions, i: int) -> dict[str, int]:
    return {name: int(column[i]) for name, column in c.items()}


def source_line(c: Instructions, i: int) -> str:
    """The listing's text of one instruction, with the encoding forced that is meant."""
    f = fields(c, i)
    for absent in ["rm"] if f["rm"] < 0 else ["base", "index"]:
        del f[absent]
    if f["row"] == LABEL:
        return f"L{f['imm']}:"
    name = NAMES[f["row"]]
    forced = "{evex} " if f["enc"] in EVEX else "{vex} " if f["enc"] != LEGACY and name != "vzeroupper" else ""
    operands = ROWS[name].operands
    if "rm" in f and operands.startswith(("r", "m")) and not ROWS[name].digit >= 0:
        forced += "{store} " if operands.startswith("m") else "{load} "
    if operands == "b" and name != "call":
        forced += "{disp32} "
    text = instruction_text(name, f["enc"], f, bool(f["bcast"]))
    size = next((LEGACY_SIZES[kind] for kind in ("me", "mw", "my") if kind in operands), "qword")
    return forced + (
        text.replace("[rip", f"{size} ptr [rip")
        if f["enc"] == LEGACY and name not in ("prefetcht0", "prefetcht1")
        else text
    )


def has_shorter_form(c: Instructions, i: int) -> bool:
    """Where as has other bytes for the same instruction.

    One-byte immediates, the form for rax, and a W that VEX ignores but EVEX does not.
    """
    name, rm, imm = NAMES[c["row"][i]], int(c["rm"][i]), int(c["imm"][i])
    one_byte = -128 <= imm <= 127
    return (
        (name == "add_imm" and (one_byte or rm == 0))
        or (name == "imul_imm" and one_byte)
        or (name in ("shl", "shr") and imm == 1)
        or (name in ("vunpcklpd", "vunpckhpd") and c["enc"][i] in (VEX128, VEX256))
    )


def compare(c: Instructions, folder: Path) -> int:
    """Our encoding of ``c`` against that of as, both ways; how many instructions were compared."""
    real = np.flatnonzero(c["row"] < LABEL)
    ours = encode(batches(c), 2)
    raw, offsets = ours.code.tobytes(), ours.offsets.tolist()
    theirs = assembled([source_line(c, i) for i in range(c["row"].size)], folder)
    mine, other = decoded(raw[: offsets[-1]], folder), decoded(theirs, folder)
    assert len(other) == real.size, "one line of source is one instruction"
    assert [d.offset for d in mine] == [offsets[i] for i in real], "objdump sees other borders between instructions"
    for i, a, b in zip(real.tolist(), mine, other, strict=True):
        what = f"{NAMES[c['row'][i]]} {fields(c, i)}\n  source  {source_line(c, i)}"
        where = f"{what}\n  ours    {a.raw}  {a.text}\n  GNU as  {b.raw}  {b.text}"
        assert "(bad)" not in a.text, where
        assert a.text == b.text, where
        assert a.raw == b.raw or has_shorter_form(c, i), where
    return real.size


def check_row(name: str, n: int, rng: np.random.Generator, folder: Path) -> None:
    c = drawn(name, n, rng)
    other = np.array([has_shorter_form(c, i) for i in range(c["row"].size)])
    # Other lengths shift what stands behind them, so those get a program of their own, and no labels in it.
    count = compare(joined([label(0), pick(c, ~other), label(1)]), folder)
    if other.any():
        count += compare(pick(c, other & (c["base"] != RIP)), folder)
    assert count > 0


def pick(c: Instructions, some: np.ndarray) -> Instructions:
    return {name: column[some] for name, column in c.items()}


@oracle
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_gnu_as(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    check_row(name, DRAWS if ROWS[name].operands else 1, seeded(name, request), tmp_path)


@oracle
@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in NAMES if ROWS[name].operands])
def test_ten_times_as_many(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    check_row(name, 10 * DRAWS, seeded(f"full {name}", request), tmp_path)


def mixed(n: int, rng: np.random.Generator) -> Instructions:
    """``n`` instructions of all rows in random order, branches and rip operands to labels 0 and 1 included."""
    c = joined([drawn(name, n // 200, rng) for name in NAMES])
    return pick(c, rng.permutation(c["row"].size)[:n])


def code_of(c: Instructions, labels: int = 2) -> tuple[bytes, Encoded]:
    encoded = encode(batches(c), labels)
    return encoded.code[: encoded.offsets[-1]].tobytes(), encoded


def test_a_batch_is_its_instructions_one_by_one(rng: np.random.Generator) -> None:
    c = mixed(1500, rng)
    away = (c["base"] == RIP) | np.isin(c["row"], [ROW[name] for name in BRANCHES])
    c = pick(c, ~away)
    whole, encoded = code_of(c)
    alone = [code_of(pick(c, np.arange(c["row"].size) == i))[0] for i in range(c["row"].size)]
    assert whole == b"".join(alone)
    assert np.array_equal(np.diff(encoded.offsets), [len(one) for one in alone])


def test_a_batch_does_not_depend_on_its_order(rng: np.random.Generator) -> None:
    c = joined([label(0), mixed(800, rng), label(1)])
    whole, encoded = code_of(c)
    made = batches(c)
    again = encode([made[i] for i in rng.permutation(len(made))], 2)
    assert again.code[: again.offsets[-1]].tobytes() == whole
    assert np.array_equal(again.labels, encoded.labels)


@oracle
def test_mixed_instructions_and_labels_against_gnu_as(rng: np.random.Generator, tmp_path: Path) -> None:
    c = joined([label(0), mixed(3000, rng), label(1)])
    c = pick(c, np.array([c["row"][i] >= LABEL or not has_shorter_form(c, i) for i in range(c["row"].size)]))
    assert compare(c, tmp_path) > 2000


def branch(name: str, to: int) -> Instructions:
    c = allocate(1)
    c["row"][0], c["imm"][0] = ROW[name], to
    return c


def lea(to: int) -> Instructions:
    c = allocate(1)
    c["row"][0], c["reg"][0], c["base"][0], c["disp"][0] = ROW["lea"], 9, RIP, to
    return c


@oracle
@pytest.mark.parametrize("between", [0, 1, 17, 18, 19, 5000, 80000])
def test_labels_near_and_far(between: int, tmp_path: Path) -> None:
    """Forward and backward over 0 bytes to a megabyte: every branch, and lea of a label."""
    filler = allocate(between)
    filler["row"][:], filler["rm"][:], filler["reg"][:], filler["imm"][:] = ROW["imul_imm"], 3, 9, 1 << 20
    uses = [branch(name, to) for name in BRANCHES for to in range(3)] + [lea(to) for to in range(3)]
    c = joined([label(0), *uses, filler, label(1), *uses, filler, *uses, label(2)])
    raw, encoded = code_of(c, 3)
    inner = [source_line(c, i) for i in range(c["row"].size) if c["row"][i] != ROW["imul_imm"]]
    fill = [".rept " + str(between), "imul r9, rbx, 1048576", ".endr"]
    n = len(uses) + 1
    assert raw == assembled([*inner[:n], *fill, *inner[n : 2 * n], *fill, *inner[2 * n :]], tmp_path)
    assert encoded.labels[:3].tolist() == [0, 1 + encoded.offsets[n + between] - 1, len(raw)]


def test_one_more_label_is_the_next_cache_line() -> None:
    raw, encoded = code_of(joined([lea(1), label(0), branch("ret", 0)]), 1)
    assert encoded.code.size == 64
    assert encoded.labels.tolist() == [7, 64]
    assert int.from_bytes(raw[3:7], "little") == 64 - 7


@oracle
@pytest.mark.parametrize("before", range(17))
def test_alignment_is_filled_with_long_no_ops(before: int, tmp_path: Path) -> None:
    one = allocate(before)
    one["row"][:] = ROW["ret"]
    align = allocate(1)
    align["row"][0], align["imm"][0] = ALIGN, 16
    raw, encoded = code_of(joined([one, align, label(0), one, align, label(1)]))
    padding = -before % 16
    assert encoded.labels[:2].tolist() == [before + padding, 2 * (before + padding)]
    for start in (before, 2 * before + padding):
        found = decoded(raw[start : start + padding], tmp_path) if padding else []
        assert len(found) == -(-padding // 8), "no-ops as long as can be"
        assert all("nop" in d.text or d.text == "xchg ax,ax" for d in found)


def single(name: str, enc: int, bcast: bool = False, **fields: int) -> Batch:
    return Batch(ROW[name], enc, np.arange(1), dict(fields), bcast)


REGISTERS = {"reg": 1, "vvvv": 2, "rm": 3}
MEMORY = {"reg": 1, "vvvv": 2, "base": 3, "disp": 64}
ILLEGAL = {
    "a vector instruction in a legacy encoding": single("vaddps", LEGACY, **REGISTERS),
    "a general instruction in a vector encoding": single("add", VEX256, **REGISTERS),
    "an EVEX instruction in VEX": single("vpxord", VEX256, **REGISTERS),
    "a VEX instruction in EVEX": single("vblendvps", EVEX512, imm=3, **REGISTERS),
    "a broadcast in VEX": single("vaddps", VEX256, True, **MEMORY),
    "a broadcast of a register": single("vaddps", EVEX512, True, **REGISTERS),
    "a broadcast to an instruction without": single("vmovups", EVEX512, True, **MEMORY),
    "a displacement beyond 32 bits": single("vaddps", EVEX512, **(MEMORY | {"disp": 1 << 31})),
    "and below": single("vaddps", EVEX512, **(MEMORY | {"disp": -(1 << 31) - 1})),
    "a branch to a label that is nowhere": single("jmp", LEGACY, imm=0),
    "an address of a label that is nowhere": single("lea", LEGACY, reg=0, base=RIP, disp=0),
    "an immediate behind a rip operand": single("vrndscaleps", EVEX512, reg=0, base=RIP, disp=1, imm=8),
    "nine bytes behind ModRM": single("mov_imm", LEGACY, base=RSP, disp=4096, imm=1 << 20),
}


@pytest.mark.parametrize("what", ILLEGAL)
def test_what_cannot_be_encoded_is_an_internal_error(what: str) -> None:
    with pytest.raises(InternalError):
        encode([ILLEGAL[what]], 1)


def test_arrays_of_displacements_are_checked_too() -> None:
    fields = {"reg": 0, "base": 3, "disp": np.array([64, 1 << 40])}
    with pytest.raises(InternalError, match="32 bits"):
        encode([Batch(ROW["vmovups"], EVEX512, np.arange(2), fields)], 0)
