"""The space of schedules: legal, distinct, bounded, the cost model's choice first; and lines of schedules."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from oracle import dense_matrix
from sparsert import Schedule
from sparsert.errors import ScheduleError
from sparsert.kernels import matmul
from sparsert.schedule import cost, space
from sparsert.schedule.schedule import PACKING
from sparsert.schedule.task import LAYOUTS, Task
from sparsert.sparsity.pattern import as_sparse
from sparsert.sparsity.reorder import ORDERS
from sparsert.target import TARGETS

SHAPES = [(40, 50, 0.1), (200, 2100, 0.05), (300, 1200, 0.2), (64, 64, 0.02), (12, 700, 0.5), (1, 1, 1.0), (0, 4, 1.0),
          (9, 0, 1.0), (50, 60, 0.0)]  # fmt: skip
NATIVE = ("x86-avx512", "x86-avx2")


def tasks(rng: np.random.Generator, shapes: list[tuple[int, int, float]] = SHAPES) -> list[Task]:
    patterns = [as_sparse(dense_matrix(rng, *shape)).pattern for shape in shapes]
    return [Task(pattern, layout=layout) for pattern in patterns for layout in LAYOUTS]


@pytest.mark.parametrize("target", NATIVE)
@pytest.mark.parametrize("columns", [1, 49, 3136])
def test_candidates_are_legal_distinct_and_bounded(target: str, columns: int, rng: np.random.Generator) -> None:
    found = TARGETS[target]
    for task in tasks(rng):
        spare = matmul.spare(task, found)
        every = space.candidates(task, found, spare, columns, 1000)
        assert len({space.canonical(task, schedule, found, columns) for schedule in every}) == len(every) <= 400
        assert every[0] == cost.choose(task, found, spare)
        for schedule in every:
            schedule.check(found, spare)
            plain = space.canonical(task, schedule, found, columns)
            assert space.canonical(task, plain, found, columns) == plain
            assert space.plausible(task, schedule)
            assert plain.packing == "none" or task.layout == "row_major"
        for most in (1, 4, 8):
            assert space.candidates(task, found, spare, columns, most) == every[:most]
        if task.pattern.nnz > 1000 and task.pattern.rows > found.registers:
            assert len(every) >= 16


@pytest.mark.parametrize("target", NATIVE)
def test_every_field_is_varied(target: str, rng: np.random.Generator) -> None:
    """A tuner that never offers a value cannot find out that it is good."""
    pattern = as_sparse(dense_matrix(rng, 300, 2100, 0.04)).pattern
    task, found = Task(pattern), TARGETS[target]
    every = space.candidates(task, found, matmul.spare(task, found), 500, 1000)
    assert {s.packing for s in every} == set(PACKING)
    assert {s.order for s in every} == set(ORDERS)
    for field, least in (("prefetch", 2), ("k_segment", 4), ("tiles", 3), ("blocks", 4), ("rows", 3)):
        assert len({getattr(s, field) for s in every}) >= least, field


@pytest.mark.parametrize("target", NATIVE)
def test_equal_forms_generate_equal_code(target: str, rng: np.random.Generator) -> None:
    """What ``canonical`` takes for the same is: the code is, and so are the groups of tiles."""
    found, columns = TARGETS[target], 100
    for task in tasks(rng, [(40, 50, 0.1), (9, 30, 0.3)]):
        tiles, spare = -(-columns // found.lanes), matmul.spare(task, found)
        seen: dict[Schedule, set[tuple[bytes, int]]] = {}
        for rows, k, t, n, packing in itertools.product((5, 9, found.registers - spare), (0, 20, 90), (0, 2, 99),
                                                         (0, 1, 2, 50), PACKING):  # fmt: skip
            schedule = Schedule(min(rows, found.registers - spare), k, t, n, packing)
            plain = space.canonical(task, schedule, found, columns)
            columns_of = matmul.generate(task, schedule, found).program.columns
            code = b"".join(columns_of[name].tobytes() for name in ("op", "ptr", "step", "disp"))  # whatever registers
            seen.setdefault(plain, set()).add((code, cost.tiles_per_group(task, schedule, found, tiles)))
        assert len(seen) > 5
        for plain, codes in seen.items():
            assert len({code for code, _ in codes}) == 1, plain
            one_pass = not plain.blocks or plain.rows >= task.pattern.rows
            scratch = plain.k_segment or plain.packing != "none" or task.layout == "transposed"
            assert len(codes) == 1 or (one_pass and not scratch), plain


def test_absurd_schedules_are_not_plausible(rng: np.random.Generator) -> None:
    task = Task(as_sparse(dense_matrix(rng, 4, 6400, 0.1)).pattern)
    assert space.plausible(task, Schedule(4, k_segment=100))
    assert not space.plausible(task, Schedule(4, k_segment=99))
    assert not space.plausible(task, Schedule(4, k_segment=1))


def test_loads_bound_sparse_products_only(rng: np.random.Generator) -> None:
    """The formula against counts: vectors of x that blocks load, and multiply-adds, of a drawn pattern."""
    target = TARGETS["x86-avx512"]
    for density, bound in ((0.01, True), (0.03, True), (0.05, True), (0.1, False), (0.2, False), (0.5, False)):
        pattern = as_sparse(dense_matrix(rng, 310, 400, density)).pattern
        task = Task(pattern)
        assert cost.load_bound(task, target, 31) is bound
        kernel = matmul.generate(task, Schedule(30), target)
        x, weights = kernel.x_loads / target.loads, pattern.nnz / target.broadcasts
        assert (x + weights > 0.9 * pattern.nnz / target.fmas and x > 0.4 * (x + weights)) is bound


def test_lines_of_schedules(rng: np.random.Generator) -> None:
    for _ in range(200):
        schedule = Schedule(
            int(rng.integers(1, 40)), int(rng.integers(0, 3000)), int(rng.integers(0, 9)), int(rng.integers(0, 5)),
            str(rng.choice(list(PACKING))), str(rng.choice(list(ORDERS))),
        )  # fmt: skip
        if schedule.blocks == 1:
            schedule = dataclasses.replace(schedule, prefetch=bool(rng.integers(2)))
        assert Schedule.parse(str(schedule)) == schedule
    assert Schedule.parse("rows=3") == Schedule(3)


@pytest.mark.parametrize(
    "text",
    ["", "rows", "rows=", "rows=x", "rows=-1", "rows=1_0", "rows=99999999999", "rows=3 rows=4", "rows=3 order=best",
     "rows=3 prefetch=no", "rows=3 blocks=2 prefetch", "k_segment=4", "rows=3 colour=red", "rows=all", "rows=٣",
     "rows=3 order", "rows=3; import os"],
)  # fmt: skip
def test_lines_that_are_no_schedules(text: str) -> None:
    with pytest.raises(ScheduleError):
        Schedule.parse(text)


def test_segments_in_the_first_cache(rng: np.random.Generator) -> None:
    """Where loads of x bound and code is short, segments of x fit L1; else x or code stays as it was."""
    target = TARGETS["x86-avx512"]

    def chosen(rows: int, cols: int, density: float) -> Schedule:
        return cost.choose(Task(as_sparse(dense_matrix(rng, rows, cols, density)).pattern), target, 1)

    near = chosen(200, 1200, 0.05)
    assert (near.k_segment, near.blocks, near.order) == (256, 0, "natural")
    assert near.k_segment * target.tile_bytes <= target.l1d // 2
    assert chosen(200, 1200, 0.03).k_segment == 512  # fewer taps in a segment would not pay for carrying sums
    assert chosen(200, 1200, 0.005).k_segment == 0
    assert chosen(200, 400, 0.05).k_segment == 0  # its x fits L1 as it is
    assert chosen(200, 1200, 0.15).blocks == 1  # multiply-adds bound
    cold = chosen(1000, 1200, 0.05)  # more code than that comes from far away and is prefetched instead
    assert (cold.k_segment, cold.blocks, cold.prefetch) == (0, 1, True)
    assert chosen(20, 1200, 0.05).k_segment == 0  # one block uses each row of x once
