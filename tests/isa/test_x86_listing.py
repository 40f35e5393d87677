"""Listings say what the code does: objdump reads the same instructions at the same offsets from the same bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from binutils import decoded
from sparsert import Clip, Schedule, compile_matmul
from sparsert.codegen.x86.assemble import ENCODINGS, assemble, listing
from sparsert.kernels import activations, matmul
from sparsert.listings import compile_listing
from sparsert.schedule.task import Task
from sparsert.sparsity.pattern import as_sparse
from sparsert.target import TARGETS

CASES: dict[str, tuple[str, Schedule, str | None, Any, bool]] = {
    "row_major": ("row_major", Schedule(2), None, None, False),
    "packed": ("row_major", Schedule(3, packing="beside", blocks=2), "before", "relu", True),
    "tile_major": ("tile_major", Schedule(2, order="overlap", prefetch=True), "after", Clip(-1, 2.5), True),
    "transposed": ("transposed", Schedule(4), "before", "gelu", True),
    "segments": ("row_major", Schedule(2, k_segment=9), None, "silu", False),
    "wide": ("tile_major", Schedule(3, k_segment=300), None, "hardswish", False),
}
EXTENTS = {"wide": (5, 900)}
LISTED = [isa for isa in ENCODINGS if isa in TARGETS]  # what users may name


def program(name: str, isa: str) -> Any:
    layout, schedule, residual, activation, bias = CASES[name]
    rng = np.random.default_rng(len(name))
    rows, cols = EXTENTS.get(name, (7, 30))
    pattern = as_sparse((rng.random((rows, cols)) < 0.4).astype(np.float32)).pattern
    found, parameters = activations.parse(activation)
    task = Task(pattern, bias, found.name if found else None, parameters, residual, layout)
    return matmul.generate(task, schedule, TARGETS[isa]).program


LINE = re.compile(r"^ *([0-9a-f]+)  ([0-9a-f]+) +(\S.*)$")
CONSTANT = re.compile(r"^ *([0-9a-f]+)  ([0-9a-f]{8}) x 16 +; (\S+)$")
LABEL = re.compile(r"^L(\d+):(?:  ; (.*))?$")


def our_text(text: str, labels: dict[int, int], end: int) -> str:
    """A listing's instruction with label names resolved, the way objdump writes it."""
    text = re.sub(r"\{1to\d+\}", "", text)
    text = re.sub(r"(?<=, )-(0x[0-9a-f]+)$", lambda m: hex((1 << 64) - int(m[1], 16)), text)
    text = re.sub(r"\[rip\+L(\d+)\]", lambda m: f"[rip+{hex(labels[int(m[1])] - end)}]", text)
    return re.sub(r"\bL(\d+)$", lambda m: hex(labels[int(m[1])]), text).replace(", ", ",")


def their_text(text: str) -> str:
    """Less what objdump adds: targets as a remark, that an encoding is the long one, sizes where nothing is read."""
    text = text.replace("+0x0]", "]")  # r13 and rbp take a displacement even where it is zero
    text = re.sub(r" +#.*", "", text).lower().removeprefix("{evex} ").replace("bcst", "ptr")
    return text.replace("byte ptr ", "") if text.startswith("prefetch") else text


@pytest.mark.tools("objdump")
@pytest.mark.parametrize("isa", LISTED)
@pytest.mark.parametrize("name", CASES)
def test_objdump_reads_what_the_listing_says(name: str, isa: str, tmp_path: Path) -> None:
    made = program(name, isa)
    code = assemble(made, isa)
    labels: dict[int, int] = {}
    ours: list[tuple[int, str, str]] = []
    constants: list[tuple[int, int]] = []
    waiting: list[int] = []
    for line in listing(made, isa).splitlines():
        if found := LABEL.match(line):
            waiting.append(int(found[1]))
            assert found[2] == (made.notes.get(int(found[1])) if int(found[1]) < made.labels else "constants")
            continue
        if found := CONSTANT.match(line):
            constants.append((int(found[1], 16), int(found[2], 16)))
            value = np.array([int(found[2], 16)], np.uint32).view(np.float32)[0]
            assert np.array_equal(np.float32(found[3]), value, equal_nan=True)
        elif found := LINE.match(line):
            ours.append((int(found[1], 16), found[2], found[3]))
        else:
            pytest.fail(f"a line of no known kind: {line!r}")
        labels |= dict.fromkeys(waiting, int(found[1], 16))
        waiting = []
    size = ours[-1][0] + len(ours[-1][1]) // 2
    assert bytes.fromhex("".join(raw for _, raw, _ in ours)) == code.code[:size]
    assert not any(code.code[size : code.constants]), "padding to the constants"
    theirs = [d for d in decoded(code.code[:size], tmp_path) if "nop" not in d.text and d.text != "xchg ax,ax"]
    assert not any("(bad)" in d.text for d in theirs)
    want = [(at, raw, our_text(text, labels, at + len(raw) // 2)) for at, raw, text in ours if text != "nop"]
    assert [(d.offset, d.raw, their_text(d.text)) for d in theirs] == want
    assert [bits for _, bits in constants] == list(made.constants)
    for at, bits in constants:
        assert code.code[at : at + 64] == np.full(16, bits, "<u4").tobytes()
    assert set(labels) >= set(range(made.labels)), "every label is listed"
    assert len(code.code) == code.constants + 64 * len(constants)


def test_each_target_lists_its_own_registers(rng: np.random.Generator) -> None:
    weight = np.where(rng.random((4, 6)) < 0.5, 1, 0).astype(np.float32)
    assert "NumPy" in compile_matmul(weight, target="reference").listing()
    listings = {isa: compile_listing(weight, target=isa) for isa in LISTED}
    assert "zmm" in listings["x86-avx512"]
    assert "ymm" in listings["x86-avx2"]
    assert "zmm" not in listings["x86-avx2"]


@pytest.mark.isa("x86-avx2")
def test_an_operator_lists_the_code_it_runs(rng: np.random.Generator) -> None:
    weight = np.where(rng.random((4, 6)) < 0.5, 1, 0).astype(np.float32)
    compiled = compile_matmul(weight, activation="relu", target="x86-avx2")
    assert compiled.listing() == compile_listing(weight, activation="relu", target="x86-avx2")
