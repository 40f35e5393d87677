"""Every row of the AArch64 table over drawn operands: the words are those of GNU as.

Second opinion: objdump reads our words as it reads those of as, none of them undefined. What a batch may not hold, and
the layout of branches, labels and alignment.
"""

from __future__ import annotations

import re
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

from oracle import program
from sparsert.codegen.arm64 import stream as layout
from sparsert.codegen.arm64.assemble import assemble, instruction_text
from sparsert.codegen.arm64.encoder import Batch, encode, encoded
from sparsert.codegen.arm64.lower import RECIPES, lower
from sparsert.codegen.arm64.registers import CALLEE_SAVED, FAR, GPR, MASK
from sparsert.codegen.arm64.stream import Stream
from sparsert.codegen.arm64.table import BRANCHES, FIELDS, ROWS
from sparsert.codegen.vector import OPS, S
from sparsert.errors import CodeBudgetError, InternalError
from sparsert.target import TARGETS

PREFIX = "aarch64-linux-gnu-"
oracle = pytest.mark.tools(f"{PREFIX}as", f"{PREFIX}objdump", f"{PREFIX}objcopy", f"{PREFIX}ld")
DRAWS = 200
SAME_BASE_AND_TARGET = ("ldp", "ldp_d", "ldp_post", "stp_pre")  # register combinations as rejects or warns about


def assembled(lines: list[str], folder: Path) -> np.ndarray:
    """The words that GNU as makes of ``lines``, linked to an address far from 0."""
    source, made, linked, text = (folder / name for name in ("a.s", "a.o", "a.elf", "a.bin"))
    source.write_text("\n".join([".arch armv8.5-a", ".text", ".global _start", "_start:", *lines, ""]))
    done = subprocess.run([f"{PREFIX}as", "-o", made, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"GNU as refuses the text:\n{done.stderr[:2000]}"
    subprocess.run([f"{PREFIX}ld", "-Ttext=0x80000000", "-o", linked, made], check=True, capture_output=True)
    subprocess.run([f"{PREFIX}objcopy", "-O", "binary", "-j", ".text", linked, text], check=True)
    return np.frombuffer(text.read_bytes(), "<u4")


_LINE = re.compile(r"^\s*[0-9a-f]+:\t([0-9a-f]{8}) *\t(.*)$", re.MULTILINE)


def decoded(words: np.ndarray, folder: Path) -> list[str]:
    """objdump's reading of every word."""
    raw = folder / "d.bin"
    raw.write_bytes(words.astype("<u4").tobytes())
    command = [f"{PREFIX}objdump", "-D", "-z", "-b", "binary", "-m", "aarch64", str(raw)]
    found = _LINE.findall(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [int(word, 16) for word, _ in found] == words.tolist()
    return [text for _, text in found]


def draw(name: str, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Fields at their edges and in between; pages and branches stay within what can be linked."""
    fields = {}
    for _, field in ROWS[name].operands:
        f = FIELDS[field]
        low, high = f.least // f.scale, f.most // f.scale
        if field == "page":
            low, high = -(1 << 18), 1 << 18
        edges = [low, high, low + 1, high - 1, 0, min(1, high), (low + high) // 2]
        fields[field] = rng.choice(np.concatenate([edges, rng.integers(low, high + 1, n)]), n) * f.scale
    if name in SAME_BASE_AND_TARGET:
        fields["a"] = np.where(fields["a"] == fields["d"], (fields["d"] + 1) % 32, fields["a"])
        clash = (fields["n"] == fields["a"]) | (fields["n"] == fields["d"])
        fields["n"] = np.where(clash, 31, fields["n"])  # sp is no data register
    return fields


def one(fields: dict[str, np.ndarray], i: int) -> dict[str, int]:
    return {key: int(value[i]) for key, value in fields.items()}


def check_row(name: str, n: int, rng: np.random.Generator, folder: Path) -> None:
    fields = draw(name, n, rng)
    ours = encode([Batch(name, np.arange(n), fields)], n)
    texts = [instruction_text(name, one(fields, i)) for i in range(n)]
    if "page" in fields:  # as takes a symbol only
        texts = [re.sub(r"-?\d+$", f"p{i}", text) for i, text in enumerate(texts)]
        texts += [f".set p{i}, _start + {int(fields['page'][i])} + {4 * i // 4096 * 4096}" for i in range(n)]
    theirs = assembled(texts, folder)
    assert ours.size == theirs.size == n
    for i in np.flatnonzero(ours != theirs).tolist():
        pytest.fail(f"{name} {one(fields, i)}\n  {texts[i]}\n  ours {ours[i]:08x}, GNU as {theirs[i]:08x}")
    read = decoded(ours, folder)
    assert not any("undefined" in text or text.startswith(".inst") for text in read)
    mnemonic = ROWS[name].text.split()[0]
    aliases = {"add": "mov", "movz": "mov", "movn": "mov", "madd": "mul", "subs": "cmp", "orr": "mov", "sub": "neg"}
    assert {text.split()[0] for text in read} <= {mnemonic, aliases.get(mnemonic, mnemonic)}
    alone = [int(encoded(Batch(name, np.arange(1), one(fields, i)))) for i in range(0, n, 7)]
    assert alone == ours[::7].tolist(), "a batch is its instructions one by one"


@oracle
@pytest.mark.parametrize("name", ROWS)
def test_words_are_those_of_gnu_as(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    rng = np.random.default_rng([request.config.getoption("--seed"), zlib.crc32(name.encode())])
    check_row(name, DRAWS if ROWS[name].operands else 1, rng, tmp_path)


@oracle
@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name].operands])
def test_ten_times_as_many(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    rng = np.random.default_rng([request.config.getoption("--seed"), 1, zlib.crc32(name.encode())])
    check_row(name, 10 * DRAWS, rng, tmp_path)


def test_operands_take_bits_of_their_own() -> None:
    for name, row in ROWS.items():
        taken = 0
        for _, field in row.operands:
            f = FIELDS[field]
            mask = sum(((1 << width) - 1) << at for at, width in f.parts)
            mask |= 31 << f.copy if f.copy else 0
            assert not taken & mask, f"{name}: {field} overlaps another operand"
            taken |= mask
        assert not row.base & taken, f"{name}: the word without operands has bits where they go"


Q = {"d": 1, "n": 2, "off16": 16}
ILLEGAL = {
    "a register that does not exist": Batch("mov_v", np.arange(1), {"d": 32, "s": 0}),
    "one of several": Batch("mov_v", np.arange(2), {"d": np.array([3, 32]), "s": 0}),
    "a negative register": Batch("mov_v", np.arange(2), {"d": np.array([3, -1]), "s": 0}),
    "a displacement that is no multiple": Batch("ldr_q", np.arange(1), Q | {"off16": 8}),
    "some of which are not": Batch("ldr_q", np.arange(2), Q | {"off16": np.array([16, 24])}),
    "a displacement too far": Batch("ldr_q", np.arange(1), Q | {"off16": 65536}),
    "a negative displacement": Batch("ldr_q", np.arange(1), Q | {"off16": -16}),
    "a lane too many": Batch("fmla_lane", np.arange(1), {"d": 0, "n": 0, "m": 0, "lane": 4}),
    "a branch too far": Batch("b_ne", np.arange(1), {"to19": 1 << 20}),
    "a missing operand": Batch("fadd", np.arange(1), {"d": 0, "n": 0}),
    "two in one place": Batch("nop", np.zeros(2, np.int64), {}),
}


@pytest.mark.parametrize("what", ILLEGAL)
def test_what_cannot_be_encoded_is_an_internal_error(what: str) -> None:
    with pytest.raises(InternalError):
        encode([ILLEGAL[what]], ILLEGAL[what].place.size)


# ---- lowering ------------------------------------------------------------------------------------------------------


WITH_MASKS = {"mask_from", "mask_bits", *(op.name for op in OPS if op.name.endswith("by_mask"))}
WITH_MASKS |= {"pick", "lanes_from"}


def test_each_operation_has_a_recipe_unless_no_instruction_does_it() -> None:
    lookups = {"load_bytes", "load_words", "sign_mask", "expand", "expand_lanes", "lookup2", "fma_mask"}  # 16 lanes
    lookups |= {"s_skip", "s_skip2"}
    indexed = {"bcast4", "shuffle4", "fma_at", "load4_pair", "s_low16", "s_shr"}  # Target.indexed
    assert TARGETS["aarch64-neon"].loops
    assert set(RECIPES) == {op.name for op in OPS} - {"fma_bcast", "mul_bcast"} - WITH_MASKS - lookups - indexed


def test_scalar_registers_have_machine_registers_of_their_own() -> None:
    assert set(GPR) == set(S)
    own = [*GPR.values(), *FAR.values(), *MASK, layout.TEMP]
    assert len(set(own)) == len(own)
    assert not {18, 29, 30, 31} & set(own), "the platform's, the frame's, the link register, the stack"
    assert {r for r in own if r >= 19} <= set(CALLEE_SAVED)


def words(stream: Stream, labels: list[tuple[int, int]], aligned: tuple[int, ...] = (), count: int = 2) -> np.ndarray:
    rows = np.array(aligned, np.int64)
    laid = stream.finish(np.array(labels, np.int64).reshape(-1, 2), rows, np.full(rows.size, 4), count)
    return encode(laid.batches, laid.size)


def values(rng: np.random.Generator) -> np.ndarray:
    near = [0, 1, -1, 4095, 4096, 4097, 65535, 65536, 1 << 24, (1 << 24) - 1, (1 << 24) - 4096, 1 << 32, 1 << 48,
            (1 << 63) - 1]  # fmt: skip
    edges = np.array([*near, *(-v for v in near), -(1 << 63) + 1], np.int64)
    return np.concatenate([edges, rng.integers(-(1 << 40), 1 << 40, 50), rng.integers(-(1 << 14), 1 << 14, 50)])


def test_any_number_is_made_and_added(rng: np.random.Generator) -> None:
    """By a small interpreter of the few instructions that do it."""
    given = values(rng)
    rows = np.arange(given.size)
    for make in ("number", "sum"):
        stream = Stream(given.size)
        if make == "number":
            stream.number(rows, 3, given)
        else:
            stream.sum(rows, 3, 5, given)
        laid = stream.finish(np.zeros((0, 2), np.int64), rows[:0], rows[:0], 0)
        encode(laid.batches, laid.size)
        todo = sorted((int(place), b.row, {k: int(np.broadcast_to(v, b.place.size)[i]) for k, v in b.fields.items()})
                      for b in laid.batches for i, place in enumerate(b.place))  # fmt: skip
        ends = np.cumsum(stream.used)
        for row, end in enumerate(ends.tolist()):
            registers = {5: 1000}
            for _, name, f in todo[end - int(stream.used[row]) : end]:
                _execute(name, f, registers)
            want = int(given[row]) + (1000 if make == "sum" else 0)
            assert registers[3] == want & (1 << 64) - 1, (make, int(given[row]))
        assert stream.used.max() <= (4 if make == "number" else 5)


def _execute(name: str, f: dict[str, int], registers: dict[int, int]) -> None:
    word = (1 << 64) - 1
    if name in ("movz", "movn"):
        registers[f["d"]] = (f["imm16"] << f["hw"]) ^ (word if name == "movn" else 0)
    elif name == "movk":
        registers[f["d"]] = registers[f["d"]] & ~(0xFFFF << f["hw"]) & word | f["imm16"] << f["hw"]
    elif name == "add":
        registers[f["d"]] = (registers[f["n"]] + (registers[f["m"]] << f["lsl"])) & word
    else:
        size = f["imm12"] << (12 if name.endswith("top") else 0)
        registers[f["d"]] = (registers[f["n"]] + (size if name.startswith("add") else -size)) & word


@oracle
@pytest.mark.parametrize("between", [0, 1, 100, 262_130, 262_150, 300_000])
def test_conditional_branches_near_and_far(between: int, tmp_path: Path) -> None:
    """Beyond a megabyte the inverse condition jumps over a branch; as agrees on the words, both ways."""
    stream, tail = Stream(between + 8), between + 4
    stream.put("nop", np.arange(4, tail))
    for i, (name, operands) in enumerate((("cbz", (3,)), ("b_ne", ()), ("b", ()), ("cbnz", (4,)))):
        stream.put(name, np.array([i]), *operands, label=np.array([1]))
        stream.put(name, np.array([tail + i]), *operands, label=np.array([0]))
    got = words(stream, [(0, 0), (tail, 1)])
    text = {"cbz": "cbz x3, {}", "b_ne": "b.ne {}", "b": "b {}", "cbnz": "cbnz x4, {}"}
    assert got.size >= between + 8
    far = got.size - between - 8
    assert far == (0 if between < 262_140 else 6)
    inverse = {"cbz": "cbnz x3, .+8", "b_ne": "b.eq .+8", "cbnz": "cbz x4, .+8"}

    def lines(target: str) -> list[str]:
        return [line for name, form in text.items() for line in (
            [inverse[name], f"b {target}"] if far and name in inverse else [form.format(target)])]  # fmt: skip

    source = ["L0:", *lines("L1"), f".rept {between}", "nop", ".endr", "L1:", *lines("L0")]
    assert np.array_equal(got, assembled(source, tmp_path))


def test_alignment_is_filled_with_no_ops() -> None:
    for before in range(9):
        rows = [("ret", {})] * before + [("align", {"disp": 16}), ("label", {"disp": 0}), ("ret", {})]
        laid = lower(program(*rows, labels=1))
        assert laid.labels[0] == -(-before // 4) * 4
        assert encode(laid.batches, laid.size).tolist()[before:-1] == [0xD503201F] * (-before % 4)


def test_what_lies_behind_128_megabytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsert.codegen.arm64.assemble.REACH", 64)
    with pytest.raises(CodeBudgetError, match="branches reach 64") as caught:
        assemble(program(*[("ret", {})] * 17), "aarch64-neon")
    assert "reference" in caught.value.hint


@pytest.mark.parametrize("name", ["min", "to_int", "fma_mul"])
def test_scratch_vectors_are_refused_as_operands(name: str) -> None:
    with pytest.raises(InternalError, match="scratch"):
        lower(program((name, {"d": 2, "a": 31, "b": 2})))


def test_quarters_beyond_the_first_are_refused() -> None:
    with pytest.raises(InternalError, match="one quarter"):
        lower(program(("insert4", {"d": 2, "b": 1, "ptr": S.X})))


def test_branches_are_the_fields_that_labels_resolve() -> None:
    assert {field for row in ROWS.values() for _, field in row.operands if field.startswith("to")} == set(BRANCHES)
