"""Drawn operators on guarded arrays; as a script, the child of ``test_guard_pages.py`` that logs a case, then runs it.

A case is drawn from its seed and number alone. To repeat one:
``PYTHONPATH=src:tests python tests/fuzz/guard_cases.py --seed 0 --first 17``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

import sparsert
from fuzz.guard import Buffers, Outcome, campaign, guarded
from oracle import ACTIVATIONS as KNOWN
from oracle import complaint, expected, same_bits
from sparsert import Clip, Schedule
from sparsert.errors import CodeBudgetError, ScheduleError
from sparsert.schedule import cost
from sparsert.sparsity.pattern import SparseMatrix, from_csr

Array = NDArray[np.float32]
ACTIVATIONS = (None, None, *(name for name in KNOWN if name), Clip(-0.5, 0.75))
PATTERNS = ("uniform", "empty_rows", "one_column", "dense", "uneven")
SPECIAL = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-40, -1e-45, 1e-30, 1e30, -1e30, 3e33], np.float32)


@dataclass(frozen=True)
class Case:
    """Everything but the values."""

    seed: int
    number: int
    target: str
    layout: str  # row_major, tile_major or linear
    shape: tuple[int, int]
    columns: tuple[int, ...]  # of one call after the other
    pattern: str
    density: float
    special: bool  # NaN, infinities, subnormal and huge numbers in x
    bias: bool
    activation: int  # index into ACTIVATIONS
    residual: str | None
    in_place: bool
    refit: bool
    threads: int
    cut: str  # how calls are shared out, however small: columns or rows


def extent(rng: np.random.Generator, most: int = 200) -> int:
    """Small numbers often, also 0; now and then a large one."""
    kind = rng.random()
    if kind < 0.06:
        return int(rng.integers(0, 2))
    return int(rng.integers(1, 40)) if kind < 0.7 else int(rng.integers(40, most + 1))


def draw(seed: int, number: int, targets: list[str]) -> tuple[Case, np.random.Generator]:
    """A case, and the generator for its values."""
    rng = np.random.default_rng([seed, number])
    target = "reference" if rng.random() < 0.04 else str(rng.choice(targets))
    columns = [int(rng.choice([extent(rng), rng.integers(1, 16), rng.integers(16, 32), 8 * rng.integers(1, 16)]))
               for _ in range(1 + int(rng.random() < 0.4))]  # fmt: skip
    residual = [None, "before", "after"][int(rng.choice(3, p=[0.4, 0.3, 0.3]))]
    case = Case(
        seed, number, target, str(rng.choice(["row_major", "tile_major", "linear"], p=[0.45, 0.2, 0.35])),
        (extent(rng), extent(rng)), tuple(columns), str(rng.choice(PATTERNS)),
        float(rng.choice([0.0, 0.02, 0.1, 0.3, 1.0], p=[0.05, 0.2, 0.4, 0.25, 0.1])),
        bool(rng.random() < 0.4), bool(rng.random() < 0.5),
        int(rng.integers(len(ACTIVATIONS))), residual, bool(residual and rng.random() < 0.4), bool(rng.random() < 0.2),
        int(rng.choice([1, 2, 3, 5])), str(rng.choice(["columns", "rows"])),
    )  # fmt: skip
    return case, rng


def places(case: Case, rng: np.random.Generator) -> NDArray[np.bool_]:
    rows, cols = case.shape
    density = np.full((rows, 1), case.density)
    if case.pattern == "uneven":  # real pruned layers: most rows near the mean, a few with several times as many
        density = density * rng.gamma(0.7, 1.4, (rows, 1))
    mask: NDArray[np.bool_] = rng.random(case.shape) < density
    if case.pattern == "dense":
        mask[...] = True
    elif case.pattern == "empty_rows":
        mask[rng.random(rows) < 0.5] = False
    elif case.pattern == "one_column" and cols:
        mask[...] = False
        mask[:, rng.integers(cols)] = True
    return mask


def weight_of(mask: NDArray[np.bool_], rng: np.random.Generator) -> SparseMatrix:
    """Values of one magnitude, some of them explicit zeros; one matrix in three is exact in bf16."""
    scale = rng.choice([1.0, 1.0, 1.0, 30.0, 1e-36])
    values = rng.standard_normal(int(mask.sum())) * scale * (rng.random(int(mask.sum())) >= 0.03)
    values = values.astype(np.float32)
    if values.view(np.uint32).sum() % 3 == 0:
        values = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    indptr = np.concatenate([[0], np.cumsum(mask.sum(axis=1))]).astype(np.int64)
    return from_csr(values, np.nonzero(mask)[1], indptr, mask.shape)


def schedule_of(rng: np.random.Generator, most: int, extent: int) -> Schedule:
    rows = int(rng.choice([1, min(2, most), min(3, most), most, rng.integers(1, most + 1)]))
    segment = int(rng.choice([0, 0, 1, 7, rng.integers(1, max(extent, 1) + 1)]))
    blocks = int(rng.choice([0, 1, 1, 1, 2, 3]))
    return Schedule(
        rows, segment, tiles=int(rng.choice([0, 1, 2, 3, 5])), blocks=blocks,
        packing=str(rng.choice(["none", "beside", "ahead"])),
        order=str(rng.choice(["natural", "count", "overlap"])), prefetch=blocks == 1 and bool(rng.random() < 0.4),
    )  # fmt: skip


def compiled(case: Case, layout: str, matrix: SparseMatrix, bias: Array | None, rng: np.random.Generator) -> Any:
    """The operator of ``case`` in ``layout``, as the cost model or as the dice will have it."""
    options: dict[str, Any] = {"residual": case.residual, "target": case.target, "threads": case.threads}
    if layout == "linear":
        build: Callable[..., Any] = sparsert.compile_linear
    else:
        build, options["layout"] = sparsert.compile_matmul, layout
    activation = ACTIVATIONS[case.activation]
    complete = 0 < matrix.pattern.nnz == matrix.shape[0] * matrix.shape[1]
    if layout != "tile_major" and complete and rng.random() < 0.5:  # with zeros, 0 * inf would count
        return build(matrix, bias, activation, form="dense", **options)
    op = build(matrix, bias, activation, form="sparse", **options)
    if not isinstance(op.schedule, Schedule) or rng.random() < 0.3:
        return op
    if rng.random() < 0.2:  # looped over the pattern, if that code is shorter
        try:
            return build(matrix, bias, activation, max_code_bytes=op.stats.code_bytes - 1, **options)
        except CodeBudgetError:
            return op
    schedule = schedule_of(rng, op.schedule.rows, matrix.shape[1])
    try:
        return build(matrix, bias, activation, schedule=schedule, **options)
    except ScheduleError as error:  # nothing but the number of rows can be too much, and the drawn one was legal
        raise AssertionError(f"{schedule} is refused: {error}") from error


def placed(buffers: Buffers, name: str, plain: Array, layout: str, tile: int, leading: tuple[int, ...],
           rng: np.random.Generator) -> Array:  # fmt: skip
    """A guarded array in ``layout`` with the elements of ``plain`` (rows, columns), drawn strides at a drawn place.

    ``leading`` is how a linear layer's columns are arranged: (), (columns,) or (2, columns / 2).
    """
    rows, columns = plain.shape
    at_end = bool(rng.random() < 0.6)
    if layout == "tile_major":
        shape: tuple[int, ...] = (-(-columns // tile), rows, tile)
        array = buffers.array(name, shape, (4 * rows * tile, 4 * tile, 4), at_end=at_end)
        array[...] = tiles(plain, tile)
        return array
    stored = plain.T if layout == "linear" else plain
    inner = int(rng.choice([4, 8, -4], p=[0.9, 0.05, 0.05]))
    pitch = abs(inner) * stored.shape[1] + int(rng.choice([0, 0, 4, 12, 60, rng.integers(1, 80)]))
    if rng.random() < 0.15:
        pitch = -pitch
    shape = (*leading, rows) if layout == "linear" else stored.shape
    outer = abs(pitch) * shape[-2] + int(rng.choice([0, 20, 33])) if len(shape) > 2 else 0  # axes that may not merge
    strides = (outer, pitch, inner)[-len(shape) :]
    if name == "x" and rng.random() < 0.03:
        strides = (0, *strides[1:])
    array = buffers.array(name, shape, strides, at_end=at_end)
    array[...] = stored.reshape(shape)
    return array


def tiles(plain: Array, tile: int) -> Array:
    """(rows, columns) as (T, rows, tile), zeros behind the last column."""
    rows, columns = plain.shape
    whole = np.zeros((rows, -(-columns // tile), tile), np.float32)
    whole.reshape(rows, whole.shape[1] * tile)[:, :columns] = plain
    return np.ascontiguousarray(whole.transpose(1, 0, 2))


def plainly(array: Array, layout: str, columns: int) -> Array:
    """(rows, columns) from an array in ``layout``."""
    if layout == "tile_major":
        return np.array(array.transpose(1, 0, 2).reshape(array.shape[1], array.shape[0] * array.shape[2])[:, :columns])
    if layout == "linear":
        return np.array(array.reshape(columns, array.shape[-1]).T)
    return np.array(array)


def run_case(case: Case, rng: np.random.Generator) -> list[str]:
    """What went wrong, in sentences; empty if nothing."""
    mask = places(case, rng)
    matrix = weight_of(mask, rng)
    bias = rng.standard_normal(case.shape[0]).astype(np.float32) if case.bias else None
    buffers = Buffers()
    problems: list[str] = []

    def cut(task: Any, schedule: Any, target: Any, threads: int, tiles: int, by_rows: bool = True) -> cost.Split:
        return cost.Split(case.cut if by_rows else "columns", threads)

    with guarded(buffers), mock.patch.object(cost, "split", cut), mock.patch.object(cost, "LEAST_SHARE", 1):
        op = compiled(case, case.layout, matrix, bias, rng)
        if case.refit:
            matrix = weight_of(mask, rng)
            op.refit(matrix)
        for columns in case.columns:
            problems += call(case, op, matrix, bias, columns, buffers, rng)
    if case.target != "reference" and not buffers.internal():
        problems.append("no buffer of the package's own was guarded: the allocators to replace have moved")
    return problems + buffers.complaints()


def call(case: Case, op: Any, matrix: SparseMatrix, bias: Array | None, columns: int, buffers: Buffers,
         rng: np.random.Generator) -> list[str]:  # fmt: skip
    """One call of ``op`` on guarded arrays, judged, and repeated in another layout and schedule."""
    rows, cols = case.shape
    values = rng.standard_normal((cols, columns)).astype(np.float32)
    if case.special:
        hit = rng.random(values.shape) < rng.choice([0.003, 0.05])
        values[hit] = rng.choice(SPECIAL, int(hit.sum()))
    forms: list[tuple[int, ...]] = [(columns,)] * 2 + [()] * (columns == 1) + [(2, columns // 2)] * (columns % 2 == 0)
    where = (case.layout, op.tile, forms[int(rng.integers(len(forms)))], rng)
    x = placed(buffers, "x", values, *where)
    values = plainly(x, case.layout, columns)  # strides of zero make elements one
    r = rng.standard_normal((rows, columns)).astype(np.float32) if case.residual else None
    out = placed(
        buffers, "out", np.full((rows, columns), -7e33, np.float32) if r is None or not case.in_place else r, *where
    )
    given = None if r is None else out if case.in_place else placed(buffers, "residual", r, *where)
    held = [
        (name, array, np.array(array))
        for name, array in (("x", x), ("residual", given))
        if array is not None and array is not out
    ]
    result = op(x, out=out, residual=given)
    problems = [] if result is out else ["the result is not out"]
    problems += [f"{name} was changed" for name, array, before in held if not same_bits(array, before)]
    got = plainly(out, case.layout, columns)
    if not case.in_place:  # whatever was kept of the first call serves a second one
        out[...] = -7e33
        op(x, out=out, residual=given)
        problems += [] if same_bits(plainly(out, case.layout, columns), got) else ["a second call gives other bits"]
    wrong = complaint(got, expected(matrix, values, bias, ACTIVATIONS[case.activation], case.residual, r))
    problems += [f"{op!r} on {columns} columns: {wrong}"] if wrong else []

    layout = str(rng.choice(["row_major", "tile_major", "linear"]))
    other = compiled(case, layout, matrix, bias, rng)
    arrange = {
        "row_major": lambda a: a,
        "tile_major": lambda a: tiles(a, other.tile),
        "linear": lambda a: np.ascontiguousarray(a.T),
    }[layout]
    again = plainly(other(arrange(values), residual=None if r is None else arrange(r)), layout, columns)
    if not same_bits(again, got):
        problems.append(f"bits differ between {case.layout}, {op.schedule} and {layout}, {other.schedule}")
    return problems


def run(seed: int, number: int, targets: list[str], note: Callable[[Any], None]) -> Outcome:
    case, rng = draw(seed, number, targets)
    note(asdict(case))
    counted = [case.target, case.layout, f"on {case.threads} threads", *["calls"] * len(case.columns)]
    return Outcome(run_case(case, rng), str(case), counted)


if __name__ == "__main__":
    sys.exit(campaign(run))
