"""Schedules: what is legal, what the cost model chooses, and that no legal one changes a single bit of a result."""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any

import numpy as np
import pytest

import sparsert
from oracle import COMPILED, complaint, dense_matrix, expected, same_bits
from sparsert import Schedule
from sparsert.errors import ScheduleError
from sparsert.schedule.schedule import PACKING, most_rows
from sparsert.sparsity.pattern import as_sparse
from sparsert.sparsity.reorder import ORDERS, loads
from sparsert.target import TARGETS

SHAPES = [(40, 50, 0.1), (33, 7, 0.5), (5, 120, 0.3), (64, 64, 1.0), (70, 30, 0.02)]


def uneven(rng: np.random.Generator, rows: int, cols: int, density: float) -> np.ndarray:
    weight = dense_matrix(rng, rows, cols, density)
    weight[rng.permutation(rows)[: rows // 5]] = 0
    weight[rng.integers(rows)] = rng.standard_normal(cols)
    return weight


@pytest.mark.parametrize(
    ("field", "value"),
    [("rows", 0), ("rows", -3), ("rows", 2.0), ("rows", "4"), ("rows", True), ("rows", None), ("k_segment", -1),
     ("k_segment", 1.5), ("k_segment", False), ("tiles", -1), ("tiles", "all"), ("blocks", -2), ("blocks", None),
     ("order", "best"), ("order", None),
     ("packing", "yes"), ("packing", True), ("prefetch", 1)],
)  # fmt: skip
def test_illegal_by_themselves(field: str, value: Any) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule(**{"rows": 4, field: value})
    assert caught.value.where == field
    assert repr(value) in caught.value.what


def test_prefetching_goes_with_single_blocks() -> None:
    with pytest.raises(ScheduleError, match="blocks=1"):
        Schedule(4, blocks=0, prefetch=True)


def test_schedules_are_values() -> None:
    one = Schedule(rows=4, k_segment=32, tiles=2, blocks=3, packing="beside", order="count")
    assert one == dataclasses.replace(
        Schedule(rows=4), k_segment=32, tiles=2, blocks=3, packing="beside", order="count"
    )
    assert len({one, dataclasses.replace(one)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.rows = 5  # type: ignore[misc]
    assert "\n" not in str(one)
    for word in ("rows=4", "k_segment=32", "tiles=2", "blocks=3", "packing=beside", "order=count"):
        assert word in str(one)
    assert (
        len({str(Schedule(4, prefetch=p, packing=q, order=o)) for p in (False, True) for q in PACKING for o in ORDERS})
        == 18
    )


@pytest.mark.parametrize("target", ["x86-avx512", "x86-avx2"])
@pytest.mark.parametrize("spare", [2, 3, 9])
def test_rows_are_limited_by_registers(target: str, spare: int) -> None:
    most = most_rows(TARGETS[target], spare)
    assert 1 <= most <= TARGETS[target].registers - spare
    Schedule(rows=most).check(TARGETS[target], spare)
    with pytest.raises(ScheduleError, match=f"{most + 1} rows need") as caught:
        Schedule(rows=most + 1).check(TARGETS[target], spare)
    assert caught.value.where == "rows"
    assert caught.value.hint == f"Use rows <= {most}."


@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_permutations(order: str, rng: np.random.Generator) -> None:
    for rows, cols, density in [*SHAPES, (0, 5, 1.0), (1, 1, 1.0), (6, 0, 1.0), (8, 8, 0.0)]:
        pattern = as_sparse(dense_matrix(rng, rows, cols, density)).pattern
        for block in (1, 4, 28):
            assert np.array_equal(np.sort(ORDERS[order](pattern, block)), np.arange(rows))


def test_loads_are_distinct_columns_of_each_block(rng: np.random.Generator) -> None:
    weight = uneven(rng, 45, 30, 0.2)
    pattern = as_sparse(weight).pattern
    for order in ORDERS:
        for block in (1, 7, 45, 60):
            permutation = ORDERS[order](pattern, block)
            shuffled = weight[permutation] != 0
            assert loads(pattern, permutation, block) == sum(
                shuffled[at : at + block].any(axis=0).sum() for at in range(0, 45, block)
            )
    assert loads(pattern, np.arange(45), 1) == pattern.nnz


def test_grouping_by_overlap_loads_less(rng: np.random.Generator) -> None:
    """Rows of four kinds, shuffled: the greedy grouping finds them again."""
    kinds = rng.random((4, 64)) < 0.2
    pattern = as_sparse(kinds[rng.permutation(np.repeat(np.arange(4), 8))].astype(np.float32)).pattern
    assert loads(pattern, ORDERS["overlap"](pattern, 8), 8) == kinds.sum()
    assert loads(pattern, ORDERS["natural"](pattern, 8), 8) > 1.5 * kinds.sum()


@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("layout", ["row_major", "tile_major", "linear"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_what_the_cost_model_chooses_is_legal(
    target: str, layout: str, activation: str | None, rng: np.random.Generator
) -> None:
    for rows, cols, density in [*SHAPES, (0, 3, 1.0), (1, 1, 1.0), (3, 0, 1.0)]:
        weight = dense_matrix(rng, rows, cols, density)
        options: dict[str, Any] = {"target": target} if layout == "linear" else {"target": target, "layout": layout}
        compile_ = sparsert.compile_linear if layout == "linear" else sparsert.compile_matmul
        op = compile_(weight, activation=activation, form="sparse", **options)
        assert op.schedule is not None
        again = compile_(weight, activation=activation, schedule=op.schedule, **options)
        assert again.schedule == op.schedule
        assert again.listing() == op.listing()
        assert str(op.schedule) in op.explain()
        assert "because   given by the caller" in again.explain()


def variants(most: int) -> list[Schedule]:
    rows = sorted({1, 2, min(5, most), most})
    plain = [Schedule(r, tiles=t) for r in rows for t in (0, 1, 3)]
    split = [Schedule(most, k_segment=k, tiles=t) for k in (1, 7, 25, 1000) for t in (0, 2)]
    packed = [
        Schedule(min(4, most), k_segment=k, tiles=t, packing=p) for k, t, p in product((0, 10), (0, 1, 2), PACKING)
    ]
    ordered = [
        Schedule(min(6, most), order=o, prefetch=p, k_segment=k) for o in ORDERS for p in (False, True) for k in (0, 11)
    ]
    passes = [
        Schedule(min(3, most), k_segment=k, blocks=n, tiles=t, packing=p, order=o)
        for k, n, t in product((0, 11), (0, 2, 5), (0, 2))
        for p, o in product(PACKING, ("natural", "count"))
    ]
    return plain + split + packed + ordered + passes


@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_do_not_depend_on_the_schedule(
    target: str, shape: tuple[int, int, float], rng: np.random.Generator
) -> None:
    rows, cols, density = shape
    weight, bias = uneven(rng, rows, cols, density), rng.standard_normal(rows).astype(np.float32)
    xs = [rng.standard_normal((cols, columns)).astype(np.float32) for columns in (3, 16, 53)]
    rs = [rng.standard_normal((rows, x.shape[1])).astype(np.float32) for x in xs]
    options: dict[str, Any] = {"activation": "hardswish", "residual": "before", "target": target}
    op = sparsert.compile_matmul(weight, bias, **options)
    wanted = [op(x, residual=r) for x, r in zip(xs, rs, strict=True)]
    for x, r, y in zip(xs, rs, wanted, strict=True):
        wrong = complaint(y, expected(as_sparse(weight), x, bias, "hardswish", "before", r))
        assert not wrong, wrong
    assert op.schedule is not None
    for schedule in variants(op.schedule.rows):
        one = sparsert.compile_matmul(weight, bias, schedule=schedule, **options)
        # transposing takes four registers: fewer rows fit then
        four_spare = dataclasses.replace(schedule, rows=min(schedule.rows, TARGETS[target].registers - 4))
        two = sparsert.compile_linear(weight, bias, schedule=four_spare, **options)
        for x, r, y in zip(xs, rs, wanted, strict=True):
            assert same_bits(one(x, residual=r), y), schedule
            assert same_bits(two(np.ascontiguousarray(x.T), residual=np.ascontiguousarray(r.T)).T, y), schedule


@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("bias", [False, True])
def test_signs_of_zeros_do_not_depend_on_the_schedule(target: str, bias: bool, rng: np.random.Generator) -> None:
    """A sum of products that are all -0 is -0, unless a bias of +0 comes first."""
    weight = -np.abs(uneven(rng, 40, 50, 0.1))
    weight[7] = 0
    b = np.zeros(40, np.float32) if bias else None
    x = np.where(rng.random((50, 20)) < 0.5, 0.0, -0.0).astype(np.float32)
    wanted = sparsert.compile_matmul(weight, b, target=target)(x)
    signs = np.signbit(wanted)
    all_negative = ((weight != 0).astype(int) @ np.signbit(x).astype(int) == 0) & (weight != 0).any(axis=1)[:, None]
    assert not wanted.any()
    assert np.array_equal(signs, all_negative & (b is None))
    for schedule in variants(sparsert.compile_matmul(weight, b, target=target).schedule.rows):  # type: ignore[union-attr]
        assert same_bits(sparsert.compile_matmul(weight, b, target=target, schedule=schedule)(x), wanted), schedule


@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("bias", [None, 0.0, -0.0])
def test_signs_of_zeros_where_wide_rows_are_summed_in_pieces(target: str, bias: float | None) -> None:
    """A piece in which a row has no taps adds nothing to it, whether its block has some or not; the first gives +0."""
    weight = np.zeros((5, 9000), np.float32)
    weight[1] = weight[3, ::2] = 1
    weight[0, [0, -1]] = weight[2, 4000] = weight[4, -1] = -1
    b, x = None if bias is None else np.full(5, bias, np.float32), np.zeros((9000, 16), np.float32)
    wanted = sparsert.compile_matmul(weight, b, target=target)(x)
    negative = (
        [False] * 5 if bias == 0 and not np.signbit(bias) else [True, False, bias is not None, False, bias is not None]
    )
    assert np.signbit(wanted).all(axis=1).tolist() == negative
    for rows, order, packing in product((1, 2, 5), ORDERS, PACKING):
        schedule = Schedule(rows, order=order, packing=packing)
        assert same_bits(sparsert.compile_matmul(weight, b, target=target, schedule=schedule)(x), wanted), schedule


@pytest.mark.parametrize("target", COMPILED)
def test_a_segment_is_a_segment_of_the_code(target: str, rng: np.random.Generator) -> None:
    """The code differs where the schedule does; the bits above would agree just as well if it did not."""
    weight = dense_matrix(rng, 30, 60, 0.3)
    schedules = [
        Schedule(6),
        Schedule(3),
        Schedule(6, k_segment=20),
        Schedule(6, packing="beside"),
        Schedule(6, packing="ahead"),
        Schedule(6, order="overlap"),
        Schedule(6, blocks=2),
        Schedule(6, blocks=0),
    ]
    code = {
        schedule: sparsert.compile_matmul(weight, target=target, schedule=schedule).listing() for schedule in schedules
    }
    assert len(set(code.values())) == len(code)
    assert code[schedules[2]].count("segment 2") >= 5
