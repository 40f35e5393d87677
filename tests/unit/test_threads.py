"""Operators on several threads: the same bits for every number of them, however the work is cut."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import sparsert
from oracle import COMPILED, complaint, dense_matrix, expected, same_bits
from sparsert import Clip, Schedule
from sparsert.crew import row_ranges
from sparsert.operators.native import NativeProduct
from sparsert.operators.team import Team, tile_cuts
from sparsert.runtime import workers
from sparsert.schedule import cost
from sparsert.schedule.task import Task
from sparsert.sparsity.pattern import as_sparse
from sparsert.target import TARGETS

THREADS = (1, 2, 3, 7)
LAYOUTS = ("row_major", "tile_major", "linear")
Array = np.ndarray


def cut_by(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Share out every call, however little it has to do, by columns or by rows."""

    def split(task: Any, schedule: Any, target: Any, threads: int, tiles: int, by_rows: bool = True) -> cost.Split:
        return cost.Split(kind if kind == "columns" or by_rows else "columns", threads)

    monkeypatch.setattr(cost, "split", split)


def compiler_of(layout: str) -> Callable[..., Any]:
    if layout == "linear":
        return sparsert.compile_linear
    return lambda *a, **k: sparsert.compile_matmul(*a, layout=layout, **k)


def arranged(plain: Array, layout: str, tile: int, rng: np.random.Generator) -> Array:
    """(rows, columns) as the layout has it, rows that are not back to back."""
    if layout == "tile_major":
        rows, columns = plain.shape
        return np.ascontiguousarray(plain.reshape(rows, columns // tile, tile).transpose(1, 0, 2))
    stored = plain.T if layout == "linear" else plain
    wide = np.empty((stored.shape[0], stored.shape[1] + int(rng.integers(0, 20))), np.float32)
    wide[:, : stored.shape[1]] = stored
    return wide[:, : stored.shape[1]]


def teams(op: Any) -> list[Team]:
    product: NativeProduct = op._compiled.product
    free = [frame for b in product._bindings.values() for frames in b.free.values() for frame in frames]
    return [frame for frame in free if isinstance(frame, Team)]


@pytest.mark.parametrize("kind", ["columns", "rows"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", COMPILED)
def test_bits_do_not_depend_on_threads(
    target: str, layout: str, kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_by(kind, monkeypatch)
    tile, shared = TARGETS[target].lanes, 0
    for turn in range(14):
        rows, cols = int(rng.integers(1, 150 if turn % 3 else 12)), int(rng.integers(1, 120))
        columns = int(rng.integers(1, 260)) if layout != "tile_major" else tile * int(rng.integers(1, 14))
        weight = dense_matrix(rng, rows, cols, float(rng.choice([0.03, 0.2, 0.6])))
        bias = rng.standard_normal(rows).astype(np.float32) if turn % 2 else None
        activation = [None, "relu", "gelu", Clip(-1, 1), "silu"][turn % 5]
        residual = [None, "before", "after"][turn % 3]
        x, r = (rng.standard_normal((n, columns)).astype(np.float32) for n in (cols, rows))
        given = arranged(x, layout, tile, rng), arranged(r, layout, tile, rng) if residual else None
        schedule = None if turn % 4 else Schedule(min(rows, 8), k_segment=int(rng.integers(0, 40)), tiles=turn % 3)
        first: Array | None = None
        for threads in THREADS:
            op = compiler_of(layout)(weight, bias, activation, residual=residual, target=target, threads=threads,
                                     schedule=schedule)  # fmt: skip
            y = op(given[0], residual=given[1])
            again = op.bind(given[0], np.empty_like(y), given[1])
            if first is None:
                first = y
                plain = y.transpose(1, 0, 2).reshape(rows, columns) if y.ndim == 3 else y.T if layout == "linear" else y
                assert not complaint(plain, expected(as_sparse(weight), x, bias, activation, residual, r))
            assert same_bits(np.ascontiguousarray(y), np.ascontiguousarray(first))
            assert same_bits(np.ascontiguousarray(again()), np.ascontiguousarray(first))
            if residual and given[1] is not None:  # in place, through a view like the one that the bits came from
                place = given[1].copy()
                assert same_bits(np.ascontiguousarray(op(given[0], place, place)), np.ascontiguousarray(first))
            out = np.empty_like(first)
            for _ in range(2):  # the second one takes the remembered way
                assert op(given[0], out, given[1]) is out
                assert same_bits(out, np.ascontiguousarray(first))
            found = teams(op)
            assert not found or threads > 1
            shared += len(found)
    assert shared > 20, "nearly every call was to be shared out"


@pytest.mark.parametrize("target", COMPILED)
def test_new_values_reach_every_part(target: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = dense_matrix(rng, 90, 60, 0.3), rng.standard_normal(90).astype(np.float32)
    x = rng.standard_normal((60, 128)).astype(np.float32)
    for kind in ("columns", "rows"):
        cut_by(kind, monkeypatch)
        op = sparsert.compile_matmul(weight, bias, target=target, threads=3)
        lone = sparsert.compile_matmul(weight, bias, target=target, threads=1)
        bound = op.bind(x)
        for scale in (1, -2, 0.5):
            for one in (op, lone):
                one.refit(np.float32(scale) * weight)
            assert same_bits(op(x), lone(x))
            assert same_bits(bound(), lone(x))
        late = sparsert.compile_matmul(weight, bias, target=target, threads=3)  # parts are compiled behind the refit
        late.refit(np.float32(3) * weight)
        lone.refit(np.float32(3) * weight)
        assert same_bits(late(x), lone(x))


def test_parts_are_compiled_from_what_the_operator_keeps(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_by("rows", monkeypatch)
    matrix = as_sparse(dense_matrix(rng, 64, 30, 0.3))
    data = matrix.values.copy()
    op = sparsert.compile_matmul((data, matrix.pattern.indices, matrix.pattern.indptr, (64, 30)), threads=2)
    data[:] = 0  # before the first call
    x = rng.standard_normal((30, 64)).astype(np.float32)
    assert not complaint(op(x), expected(matrix, x))


@pytest.mark.parametrize("kind", ["columns", "rows"])
@pytest.mark.parametrize("target", COMPILED)
def test_eight_callers_of_the_same_and_of_different_operators(
    target: str, kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_by(kind, monkeypatch)
    operators, wanted = [], []
    xs = [rng.standard_normal((70, columns)).astype(np.float32) for columns in (40, 64, 200)]
    for _ in range(3):
        weight = dense_matrix(rng, 80, 70, 0.2)
        operators.append(sparsert.compile_matmul(weight, activation="silu", target=target, threads=3))
        lone = sparsert.compile_matmul(weight, activation="silu", target=target, threads=1)
        wanted.append([lone(x) for x in xs])
    bound = [[op.bind(x) for x in xs] for op in operators]
    ready = threading.Barrier(8)

    def work(first: int) -> int:
        ready.wait()
        wrong = 0
        for i in range(first, first + 150):
            op, x = i % 3, i // 3 % 3
            wrong += not same_bits(operators[op](xs[x]), wanted[op][x])
            if first < 2:  # bound ones share their output
                wrong += not same_bits(bound[first][x](), wanted[first][x])
        return wrong

    with ThreadPoolExecutor(8) as callers:
        assert sum(callers.map(work, range(8))) == 0


@pytest.mark.isa("x86-avx2")
def test_wide_rows_are_never_cut_by_rows(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sums are folded depends on the widest row of all."""
    cut_by("rows", monkeypatch)
    weight = dense_matrix(rng, 24, 9000, 0.05)
    weight[3] = 1
    x = rng.standard_normal((9000, 48)).astype(np.float32)
    op = sparsert.compile_matmul(weight, target="x86-avx2", threads=2)
    assert same_bits(op(x), sparsert.compile_matmul(weight, target="x86-avx2", threads=1)(x))
    assert "2 ranges of columns" in op.explain()


@pytest.mark.isa("x86-avx2")
def test_what_is_said(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = dense_matrix(rng, 400, 300, 0.2), rng.standard_normal((300, 640)).astype(np.float32)
    op = sparsert.compile_matmul(weight, threads=2)
    assert "threads   up to 2" in op.explain()
    op(x)
    op(x[:, :32])
    assert "up to 2; 640 columns in 2 ranges of columns; 32 columns on the caller alone" in op.explain()
    assert "threads   1, as asked for" in sparsert.compile_matmul(weight, threads=1).explain()
    assert "reference" in sparsert.compile_matmul(weight, threads=4, target="reference").explain().splitlines()[-2]
    wide = sparsert.compile_matmul(dense_matrix(rng, 3000, 300, 0.2), threads=2)
    wide(x[:, :16])
    assert "16 columns in 2 ranges of rows" in wide.explain()
    budget = sparsert.compile_matmul(
        dense_matrix(rng, 3000, 300, 0.2), threads=2, max_code_bytes=wide.stats.code_bytes * 3 // 2
    )
    budget(x[:, :16])
    assert "16 columns on the caller alone" in budget.explain()


@pytest.mark.isa("x86-avx2")
def test_without_threads_the_caller_does_it_all(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = dense_matrix(rng, 400, 300, 0.2), rng.standard_normal((300, 640)).astype(np.float32)
    wanted = sparsert.compile_matmul(weight, threads=1)(x)
    monkeypatch.setattr(workers, "_pool", None)
    monkeypatch.setattr(workers, "_create", lambda *_: (11, 0))
    op = sparsert.compile_matmul(weight, threads=2)
    with pytest.warns(RuntimeWarning, match="starts no more threads"):
        assert same_bits(op(x), wanted)
    assert same_bits(op(x), wanted)
    assert "640 columns on the caller alone; the system starts no more threads" in op.explain()


@pytest.mark.isa("x86-avx2")
def test_parts_with_less_room_for_accumulators(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four divides the rows of a part, not those of the whole: its outputs are transposed in registers."""
    cut_by("rows", monkeypatch)
    weight, x = dense_matrix(rng, 91, 147, 0.2), rng.standard_normal((40, 147)).astype(np.float32)
    ops = [sparsert.compile_linear(weight, target="x86-avx2", schedule=Schedule(14), threads=n) for n in (1, 2)]
    assert same_bits(ops[0](x), ops[1](x))


def test_cuts_of_tiles() -> None:
    for tiles in range(1, 40):
        for parts in range(1, 12):
            for head in (False, True):
                for tail in (False, True):
                    cuts = tile_cuts(tiles, parts, head, tail)
                    sizes = np.diff(cuts)
                    assert cuts[0] == 0
                    assert cuts[-1] == tiles
                    assert (sizes > 0).all()
                    assert sizes.size <= parts
                    if sizes.size > 1:  # overlapping tiles stay together
                        assert sizes[0] > head
                        assert sizes[-1] > tail
                    if parts <= tiles // 3:
                        assert sizes.size == parts
                        assert sizes.max() - sizes.min() <= 1


def test_ranges_of_rows_are_even(rng: np.random.Generator) -> None:
    weight = dense_matrix(rng, 203, 100, 0.1) * (rng.random((203, 1)) < 0.7)
    heavy = dense_matrix(rng, 30, 40, 0.02)
    heavy[28:] = 1  # all the work at the end, where four do not divide
    assert row_ranges(Task(as_sparse(heavy).pattern, layout="transposed"), 2)[-1] in ((24, 30), (20, 30))
    for layout, unit in (("row_major", 1), ("tile_major", 1), ("transposed", 4)):
        pattern = as_sparse(weight).pattern
        for parts in (2, 3, 7):
            ranges = row_ranges(Task(pattern, layout=layout), parts)
            assert len(ranges) == parts
            assert ranges[0][0] == 0
            assert ranges[-1][1] == 203
            assert all(a[1] == b[0] for a, b in pairwise(ranges))
            assert all(first % unit == 0 for first, _ in ranges)
            assert all(last - first >= unit for first, last in ranges)
            work = [int(pattern.indptr[last] - pattern.indptr[first]) for first, last in ranges]
            most = int(pattern.row_counts.max())
            assert max(work) <= pattern.nnz / parts + unit * most


def test_the_cost_model_asks_for_enough_work() -> None:
    pattern = as_sparse(np.ones((64, 64), np.float32)).pattern
    target, schedule = TARGETS["x86-avx512"], Schedule(28)

    def split(tiles: int, threads: int, by_rows: bool = True) -> cost.Split:
        return cost.split(Task(pattern), schedule, target, threads, tiles, by_rows)

    least = 2 * cost.LEAST_SHARE // 4096 + 1
    assert split(least - 1, 2).parts == 1
    assert split(least, 2) == cost.Split("columns", 2)
    assert split(1000, 1).parts == 1
    assert split(10 * least, 64).parts == 10 * least * 4096 // cost.LEAST_SHARE
    large = as_sparse(np.ones((2000, 500), np.float32)).pattern
    assert cost.split(Task(large), schedule, target, 2, 1) == cost.Split("rows", 2)
    assert cost.split(Task(large), schedule, target, 2, 1, False).parts == 1
    assert cost.split(Task(large), schedule, target, 2, 3) == cost.Split("rows", 2)
    assert cost.split(Task(large), schedule, target, 2, 64) == cost.Split("columns", 2)
    assert cost.split(Task(large), schedule, target, 2, 3, False) == cost.Split("columns", 2)
