"""The vector vocabulary and the builder: what is emitted is what the program holds, in that order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsert.codegen import interpreter
from sparsert.codegen.vector import COLUMNS, OP, OPS, PITCH_OF, Builder, S, check
from sparsert.codegen.x86.encoder import EVEX256, EVEX512, VEX256
from sparsert.codegen.x86.lower import GPR, RECIPES
from sparsert.errors import InternalError

WITH_MASKS = {"mask_from", "load_by_mask", "mask_bits", "store_by_mask", "bcast_by_mask", "pick", "lanes_from",
              "rotate_by_mask", "lanes_by_mask"}  # fmt: skip
"""Operations for ISAs that have mask registers."""


def table(builder: Builder) -> list[tuple[Any, ...]]:
    columns = builder.finish().columns
    return [(OPS[op].name, *rest) for op, *rest in zip(*(c.tolist() for c in columns.values()), strict=True)]


def test_the_vocabulary_is_numbered_and_named_once() -> None:
    assert len({op.name for op in OPS}) == len(OPS) <= 256
    assert [OP[op.name] for op in OPS] == list(range(len(OPS)))
    assert {op.name for op in OPS if "m" in op.form} == {
        "load", "store", "bcast", "fma_bcast", "mul_bcast", "load4", "insert4", "store4", "set_mask", "load_mask",
        "store_mask", "prefetch", "prefetch_near", "load_bytes", "expand", "s_load", "s_load32", "s_store32",
        "s_at8", "s_at16", "s_at32", "s_store", "s_exchange", "s_fetch_add", "s_replace", "mask_from", "load_by_mask",
        "mask_bits", "store_by_mask", "bcast_by_mask", "bcast4", "load_words", "fma_at", "load4_pair",
    }  # fmt: skip
    assert all(set(op.form) <= set("dabmi") and len(set(op.form)) == len(op.form) for op in OPS)


def test_each_encoding_has_a_recipe_for_what_kernels_may_emit_there() -> None:
    everything = {op.name for op in OPS}
    everything -= {"fma_lane", "mul_lane"}  # elements of registers: nothing on x86 multiplies by one
    assert set(RECIPES[EVEX512]) == set(RECIPES[EVEX256]) == everything
    assert set(RECIPES[VEX256]) == everything - WITH_MASKS - {
        "fma_bcast", "mul_bcast",  # AVX2 broadcasts in an instruction of its own, has no mask registers,
        "expand_lanes", "s_skip2", "sign_mask", "expand", "lookup2", "fma_mask", "s_skip",  # and takes no lookups
    }  # fmt: skip


def test_scalar_registers_have_machine_registers_of_their_own() -> None:
    assert set(GPR) == set(S)
    assert len(set(GPR.values())) == len(S)
    assert not {4, 5} & set(GPR.values()), "rsp and rbp belong to the stack"
    assert set(PITCH_OF) == {S.X, S.Y}


def test_rows_keep_their_order_one_by_one_and_many() -> None:
    b = Builder()
    b.emit("enter")
    b.emit("load", d=3, ptr=S.X, step=2, disp=-64)
    b.emit_many("store", 3, a=np.array([5, 6, 7]), ptr=S.Y, disp=np.array([0, 64, 1 << 33]))
    b.emit_many(np.array([OP["zero"], OP["ret"]], np.uint8), 2, d=np.array([9, 0]))
    b.emit("add", d=1, a=2, b=-3)
    assert table(b) == [
        ("enter", 0, 0, 0, 0, 0, 0), ("load", 3, 0, 0, S.X, 2, -64), ("store", 0, 5, 0, S.Y, 0, 0),
        ("store", 0, 6, 0, S.Y, 0, 64), ("store", 0, 7, 0, S.Y, 0, 1 << 33), ("zero", 9, 0, 0, 0, 0, 0),
        ("ret", 0, 0, 0, 0, 0, 0), ("add", 1, 2, -3, 0, 0, 0),
    ]  # fmt: skip


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), max_size=30))
def test_any_mixture_of_chunks_keeps_its_order(chunks: list[tuple[bool, int]]) -> None:
    b, number, emitted = Builder(), 0, []
    for many, count in chunks:
        values = np.arange(number, number + count)
        if many:
            b.emit_many("store", count, a=values, disp=values * 1000)
        else:
            for value in values.tolist():
                b.emit("store", a=value, disp=value * 1000)
        emitted += values.tolist()
        number += count
    program = b.finish()
    assert len(program) == number
    assert program.columns["a"].tolist() == emitted
    assert program.columns["disp"].tolist() == [1000 * value for value in emitted]


def test_an_empty_program_has_typed_columns() -> None:
    program = Builder().finish()
    assert len(program) == 0
    assert {name: column.dtype for name, column in program.columns.items()} == COLUMNS
    check(program)


def test_constants_are_pooled_by_their_bits() -> None:
    b = Builder()
    assert [b.constant(bits) for bits in (0x3F800000, 0x80000000, -0x80000000, 0x3F800000, 0)] == [0, 1, 1, 0, 2]
    assert b.finish().constants == (0x3F800000, 0x80000000, 0)


def test_labels_are_counted_and_annotated() -> None:
    b = Builder()
    first, second = b.label("rows 0 to 3"), b.label()
    b.place(second)
    b.place(first)
    program = b.finish()
    assert (first, second, program.labels, program.notes) == (0, 1, 2, {0: "rows 0 to 3"})
    check(program)


@pytest.mark.parametrize("placed", [[], [0], [0, 0], [0, 1, 1], [0, 2], [0, 1, 2]])
def test_labels_have_one_place_each(placed: list[int]) -> None:
    b = Builder()
    b.label()
    b.label()
    for label in placed:
        b.place(label)
    with pytest.raises(InternalError, match="exactly once"):
        check(b.finish())


def test_what_shuffles_lanes_and_masks_by_bits() -> None:
    b = Builder()
    for register, slot in ((S.X, 0), (S.Y, 8), (S.PANEL, 16)):
        b.emit("s_arg", d=register, disp=slot)
    b.emit("mask_bits", d=0, ptr=S.PANEL)
    b.emit("mask_bits", d=1, ptr=S.PANEL, disp=2)
    for register in range(3):
        b.emit("load", d=register, ptr=S.X, disp=16 * register)
    b.emit("lanes_from", d=3, a=0, b=1, disp=1)
    b.emit("store", a=3, ptr=S.Y)
    b.emit("rotate_by_mask", d=3, a=0, b=0, disp=3)
    b.emit("store", a=3, ptr=S.Y, disp=16)
    b.emit("bcast_by_mask", d=3, b=0, ptr=S.X, disp=4)
    b.emit("store", a=3, ptr=S.Y, disp=32)
    b.emit("bcast_by_mask", d=3, b=1, ptr=S.X, disp=-4)  # outside of memory, but no lane is on
    b.emit("store", a=3, ptr=S.Y, disp=48)
    b.emit("pick", d=0, a=2, b=1)
    b.emit("store_by_mask", a=0, b=0, ptr=S.Y, disp=64)
    for register in range(2):
        b.emit("load", d=register, ptr=S.X, disp=16 * register)
    b.emit("lanes_by_mask", d=3, a=0, b=1, step=0, disp=3)
    b.emit("store", a=3, ptr=S.Y, disp=80)
    b.emit("leave")
    x = np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0], np.float32)
    x.view(np.int32)[8:] = [7, 1, 0, 4]
    masks, y = np.array([0b0110, 0], np.uint16), np.full(24, 9, np.float32)
    args = np.array([1 << 12, 1 << 16, 1 << 20], np.int64)
    memory = {"x": interpreter.region(1 << 12, x), "y": interpreter.region(1 << 16, y)}
    interpreter.run(b.finish(), 4, args, {**memory, "masks": interpreter.region(1 << 20, masks)})
    got = [[1, 2, 3, 4], [0, 0, 1, 0], [0, 1, 1, 0], [0] * 4, [9, 1, 0, 9], [0, 4, 5, 0]]
    assert y.reshape(6, 4).tolist() == got


def test_numbered_masks_select_lanes() -> None:
    """A masked load reads the lanes of its mask alone: others may lie outside of memory."""
    b = Builder()
    b.emit("s_arg", d=S.TMP, disp=0)
    b.emit("mask_from", d=2, ptr=S.TMP)
    b.emit("s_arg", d=S.X, disp=8)
    b.emit("load_by_mask", d=0, b=2, ptr=S.X)
    b.emit("s_arg", d=S.Y, disp=16)
    b.emit("store", a=0, ptr=S.Y)
    b.emit("leave")
    mask, x, y = np.array([0, -1, -1, 0], np.int32), np.array([5, 7], np.float32), np.full(4, 9, np.float32)
    args = np.array([1 << 12, (1 << 16) - 4, 1 << 20], np.int64)
    interpreter.run(b.finish(), 4, args, {"mask": interpreter.region(1 << 12, mask),
                                          "x": interpreter.region(1 << 16, x),
                                          "y": interpreter.region(1 << 20, y)})  # fmt: skip
    assert y.tolist() == [0, 5, 7, 0]
