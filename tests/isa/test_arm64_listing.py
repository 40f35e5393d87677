"""Listings of AArch64 code can be assembled: GNU as makes the same words of them, labels and constants included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from golden.test_golden import TASKS, listed
from isa.test_arm64_encoder import assembled, oracle
from sparsert import compile_linear, compile_matmul
from sparsert.codegen.assemble import ISAS
from sparsert.listings import compile_listing


def source(listing: str) -> tuple[list[str], list[int]]:
    """The lines as GNU as takes them, and the words that the listing says they are."""
    lines, words = [], []
    for line in listing.splitlines():
        if line.startswith("#"):
            continue
        if line.startswith("L"):
            label, _, note = line.partition(":")
            lines += [".balign 64"] * (note.strip() == "; constants") + [f"{label}:"]
        elif " x 16 " in line:
            lines.append(f".rept 16; .word 0x{line.split()[1]}; .endr")
        else:
            _, word, text = line.split(maxsplit=2)
            lines.append(text)
            words.append(int(word, 16))
    return lines, words


@oracle
@pytest.mark.parametrize("name", TASKS)
def test_gnu_as_takes_a_listing_for_source(name: str, tmp_path: Path) -> None:
    lines, words = source(listed(TASKS[name], "aarch64-neon"))
    assert assembled(lines, tmp_path)[: len(words)].tolist() == words
    assert len(words) > 20


def test_instructions_a_nonzero(rng: np.random.Generator) -> None:
    """One load brings four weights; the rest is a multiply-add each, and loads of x."""
    weight = np.ones((24, 40), np.float32)
    text = compile_listing(weight, target="aarch64-neon", layout="tile_major")
    counts = {word: text.count(f" {word} ") for word in ("fmla", "fmul", "dup", "ld1r")}
    assert counts["fmla"] + counts["fmul"] == 24 * 40
    assert text.count("ldr q31,") == 24 * 40 // 4, "of weights"
    assert counts["dup"] == counts["ld1r"] == 0


def test_every_target_lists_everything(rng: np.random.Generator) -> None:
    weight = np.where(rng.random((9, 12)) < 0.5, 1, 0).astype(np.float32)
    for isa in ISAS:
        assert "mul" in compile_listing(weight, activation="gelu", residual="before", target=isa)
    for build in (compile_matmul, compile_linear):
        assert "NumPy" in build(weight, target="reference").listing()
