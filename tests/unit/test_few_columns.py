"""Products that loop over the pattern as data: the same bits as unrolled code, whatever the number of columns."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest

import sparsert
from oracle import COMPILED, complaint, dense_matrix, expected, same_bits
from sparsert import Clip
from sparsert.codegen.assemble import assemble
from sparsert.codegen.interpreter import Region, run
from sparsert.codegen.vector import Builder, Program, S
from sparsert.errors import UnsupportedError, ValueRangeError
from sparsert.kernels import lookup, looped
from sparsert.kernels.compact import Slot
from sparsert.kernels.plan import FOLD_TAPS
from sparsert.operators import bf16
from sparsert.operators.compact import CompactProduct
from sparsert.runtime.cpu import Executable, address_of
from sparsert.schedule import cost
from sparsert.schedule.task import Task
from sparsert.sparsity.pattern import SparseMatrix, as_sparse
from sparsert.sparsity.streams import PRESENT, Stream, lockstep, windows
from sparsert.target import named

Array = np.ndarray
compiled = pytest.mark.parametrize("target", COMPILED)


def uneven(rng: np.random.Generator, rows: int, cols: int, density: float) -> SparseMatrix:
    """Some rows are several times as dense as others, some are empty; explicit zeros among the values."""
    dense = dense_matrix(rng, rows, cols, density) * (rng.random((rows, 1)) < 0.9)
    dense[rng.random(dense.shape) < 0.3 * rng.random((rows, 1))] = 0
    matrix = as_sparse(dense)
    values = np.where(rng.random(matrix.values.size) < 0.05, rng.choice([0.0, -0.0]), matrix.values)
    return SparseMatrix(matrix.pattern, values.astype(np.float32))


def own(op: Any, columns: int) -> CompactProduct | None:
    """The product that an operator computes so many columns with, if it is a looped one."""
    found: CompactProduct | None = op._compact(columns)
    return found


SHAPES = [(1, 1), (1, 40), (40, 1), (16, 32), (17, 33), (64, 500), (130, 65), (5, 300)]


@pytest.mark.parametrize("shape", SHAPES)
@compiled
def test_bits_do_not_depend_on_the_columns(target: str, shape: tuple[int, int], rng: np.random.Generator) -> None:
    """Column by column what the unrolled code gives for wide arrays, for every N up to a tile and one more."""
    for density in (0.0, 0.05, 0.3, 1.0):
        matrix = uneven(rng, *shape, density)
        bias = rng.standard_normal(shape[0]).astype(np.float32) if rng.random() < 0.5 else None
        op = sparsert.compile_matmul(matrix, bias, target=target)
        linear = sparsert.compile_linear(matrix, bias, target=target)
        x = rng.standard_normal((shape[1], 32)).astype(np.float32)
        x[rng.random(x.shape) < 0.05] = rng.choice([np.nan, np.inf, -np.inf, -0.0, 1e-41])
        with np.errstate(all="ignore"):
            wide = op(x)
            assert not complaint(wide, expected(matrix, x, bias))
            for n in range(1, 18):
                assert same_bits(op(np.ascontiguousarray(x[:, :n])), wide[:, :n])
                assert same_bits(linear(np.ascontiguousarray(x[:, :n].T)).T, wide[:, :n])


@compiled
def test_which_form_computes_what(target: str, rng: np.random.Generator) -> None:
    op = sparsert.compile_matmul(dense_matrix(rng, 64, 64, 0.2), target=target)
    forms = [own(op, n) for n in range(1, 18)]
    if target == "x86-avx512":
        assert [form is not None and form.by_lookup for form in forms] == [True] * 2 + [False] * 15
        assert [form is not None for form in forms] == [True] * 8 + [False] * 9
    else:
        assert [form is not None for form in forms] == [True] * 7 + [False] * 10
    assert "lookups" in op.explain() or target == "x86-avx2"


@pytest.mark.parametrize("residual", [None, "before", "after"])
@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu", Clip(-0.5, 0.5)])
@compiled
def test_epilogues(target: str, activation: Any, residual: str | None, rng: np.random.Generator) -> None:
    matrix = uneven(rng, 105, 140, 0.25)
    bias = rng.standard_normal(105).astype(np.float32)
    op = sparsert.compile_matmul(matrix, bias, activation, residual=residual, target=target)
    small = sparsert.compile_matmul(
        matrix, bias, activation, residual=residual, target=target, max_code_bytes=op.stats.code_bytes - 1
    )
    x, r = rng.standard_normal((140, 40)).astype(np.float32), rng.standard_normal((105, 40)).astype(np.float32)
    wide = op(x, residual=r if residual else None)
    assert not complaint(wide, expected(matrix, x, bias, activation, residual, r))
    for n in (1, 2, 3, 8, 11, 40):
        given = np.ascontiguousarray(r[:, :n]) if residual else None
        for one in (op, small):
            assert same_bits(one(np.ascontiguousarray(x[:, :n]), residual=given), wide[:, :n])
        if residual:  # in place
            y = np.ascontiguousarray(r[:, :n])
            op(np.ascontiguousarray(x[:, :n]), out=y, residual=y)
            assert same_bits(y, wide[:, :n])


@compiled
def test_strides(target: str, rng: np.random.Generator) -> None:
    matrix = uneven(rng, 37, 50, 0.3)
    op = sparsert.compile_matmul(matrix, residual="after", target=target)
    x, r = rng.standard_normal((50, 9)).astype(np.float32), rng.standard_normal((37, 9)).astype(np.float32)
    for n in (1, 2, 5):
        want = op(np.ascontiguousarray(x[:, :n]), residual=np.ascontiguousarray(r[:, :n]))
        y = np.zeros((2 * 37, 3 * n), np.float32)
        views = [
            (x[:, :n], r[:, :n], y[:37, :n]),
            (np.ascontiguousarray(x[::-1, :n])[::-1], np.asfortranarray(r[:, :n]), y[::-2, ::-3]),
            (np.asfortranarray(x[:, :n]), np.ascontiguousarray(r[:, :n][:, ::-1])[:, ::-1], y[1::2, 1::3]),
        ]
        for xv, rv, yv in views:
            y[...] = 7
            op(xv, out=yv, residual=rv)
            assert same_bits(np.ascontiguousarray(yv), want)
            assert int((y == 7).sum()) >= y.size - yv.size
            bound = op.bind(xv, yv, rv)
            yv[...] = 0
            bound()
            assert same_bits(np.ascontiguousarray(yv), want)


@compiled
def test_residuals_that_overlap_the_output(target: str, rng: np.random.Generator) -> None:
    matrix = uneven(rng, 30, 80, 0.6)
    op = sparsert.compile_matmul(matrix, residual="before", target=target, max_code_bytes=4000)
    for n in (1, 3, 20):
        x = rng.standard_normal((80, n)).astype(np.float32)
        memory = rng.standard_normal((32, n)).astype(np.float32)
        want = op(x, residual=memory[2:].copy())
        got = op(x, out=memory[1:31], residual=memory[2:])
        assert same_bits(got, want)


@compiled
def test_rows_that_are_summed_in_pieces(target: str, rng: np.random.Generator) -> None:
    cols = 3 * FOLD_TAPS
    dense = dense_matrix(rng, 20, cols, 0.02)
    dense[3] = 1.0
    dense[4, : cols // 2] = 0.1
    dense[5], dense[6, :FOLD_TAPS] = 0.0, 0.0
    for bias in (None, rng.standard_normal(20).astype(np.float32)):
        op = sparsert.compile_matmul(dense, bias, "relu6", target=target)
        x = (0.01 * rng.standard_normal((cols, 16))).astype(np.float32)
        x[:, 1] = -0.0
        wide = op(x)
        for n in (1, 2, 3, 9):
            assert same_bits(op(np.ascontiguousarray(x[:, :n])), wide[:, :n])
        form = own(op, 1)
        assert form is not None
        assert form.stream.folds > 1


@compiled
def test_signs_of_zero(target: str) -> None:
    """A sum begins with its first product: -0 where that is -0, and 0 in empty rows."""
    weight = np.zeros((4, 40), np.float32)
    weight[0, 3], weight[1, [3, 39]], weight[2, 39] = -1.0, [-1.0, 2.0], 1.0
    for n in (1, 2, 4, 16):
        y = sparsert.compile_matmul(weight, target=target)(np.zeros((40, n), np.float32))
        assert np.signbit(y[:, 0]).tolist() == [True, False, False, False]


@compiled
def test_nan_reaches_the_rows_that_use_it_and_no_others(target: str, rng: np.random.Generator) -> None:
    dense = dense_matrix(rng, 70, 90, 0.1)
    op = sparsert.compile_matmul(dense, target=target)
    for n in (1, 2, 4):
        for k in (0, 31, 32, 89):
            x = np.ones((90, n), np.float32)
            x[k] = np.inf
            assert np.array_equal(~np.isfinite(op(x)).all(axis=1), dense[:, k] != 0)


@compiled
def test_refit(target: str, rng: np.random.Generator) -> None:
    matrix = uneven(rng, 33, 160, 0.3)
    other = SparseMatrix(matrix.pattern, rng.standard_normal(matrix.values.size).astype(np.float32))
    bias = rng.standard_normal(33).astype(np.float32)
    x = rng.standard_normal((160, 20)).astype(np.float32)
    for budget in (None, 4000):
        op = sparsert.compile_matmul(matrix, bias, target=target, max_code_bytes=budget)
        op(np.ascontiguousarray(x[:, :1]))
        bound = op.bind(np.ascontiguousarray(x[:, :2]))
        op.refit(other)  # known to the product that was made before, and to those made later
        want = sparsert.compile_matmul(other, bias, target=target)(x)
        for n in (1, 3, 20):
            assert same_bits(op(np.ascontiguousarray(x[:, :n])), want[:, :n])
        assert same_bits(bound(), want[:, :2])


@pytest.mark.parametrize("layout", ["row_major", "tile_major", "linear"])
@compiled
def test_layers_that_exceed_their_budget_of_code_are_looped(target: str, layout: str, rng: np.random.Generator) -> None:
    matrix = uneven(rng, 100, 130, 0.3)
    options: dict[str, Any] = {"target": target}
    build = sparsert.compile_linear if layout == "linear" else sparsert.compile_matmul
    if layout != "linear":
        options["layout"] = layout
    op, small = build(matrix, **options), build(matrix, max_code_bytes=8000, **options)
    assert small.schedule is None
    assert small.stats.code_bytes <= 8000 < op.stats.code_bytes
    assert "looped" in small.explain()
    assert "vfmadd231ps" in small.listing()
    for n in (1, 7, 16, 50):
        shape = {"row_major": (130, n), "tile_major": (n, 130, op.tile), "linear": (n, 130)}[layout]
        x = rng.standard_normal(shape).astype(np.float32)
        assert same_bits(small(x), op(x))


@compiled
def test_many_columns_of_the_weight(target: str, rng: np.random.Generator) -> None:
    """Numbers of columns beyond 16 bits, and gaps that a window crosses in several moves."""
    cols = (1 << 16) + 40
    weight = np.zeros((20, cols), np.float32)
    weight[rng.integers(0, 20, 60), rng.integers(0, cols, 60)] = 1.5
    weight[[0, 1], [0, cols - 1]] = 2.0
    op = sparsert.compile_matmul(weight, target=target)
    x = rng.standard_normal((cols, 16)).astype(np.float32)
    wide = op(x)
    for n in (1, 2, 5):
        assert same_bits(op(np.ascontiguousarray(x[:, :n])), wide[:, :n])


@pytest.mark.parametrize("threads", [2, 3])
@compiled
def test_ranges_of_rows_on_several_threads(
    target: str, threads: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as on one thread, whatever is stored how, also in place and in pieces."""
    monkeypatch.setattr(cost, "LEAST_SHARE", 50)
    for rows, cols, density in ((150, 90, 0.3), (70, 2 * FOLD_TAPS, 0.05), (3, 400, 0.9)):
        first = uneven(rng, rows, cols, density)
        weights = [first, SparseMatrix(first.pattern, as_bf16(first.values)), first]
        bias = rng.standard_normal(rows).astype(np.float32)
        many, one = (
            sparsert.compile_matmul(first, bias, "relu", residual="after", target=target, threads=n)
            for n in (threads, 1)
        )
        small = sparsert.compile_matmul(
            first, bias, "relu", residual="after", target=target, threads=threads, max_code_bytes=8000
        )
        x, r = rng.standard_normal((cols, 40)).astype(np.float32), rng.standard_normal((rows, 40)).astype(np.float32)
        for weight in weights:
            for op in (many, one, small):
                op.refit(weight)
            for n in (1, 2, 3, 4, 7, 8, 9, 40):
                xn, y = np.ascontiguousarray(x[:, :n]), np.ascontiguousarray(r[:, :n])
                want = one(xn, residual=y.copy())
                assert not complaint(want, expected(weight, xn, bias, "relu", "after", y))
                assert same_bits(many(xn, residual=y), want)
                assert same_bits(small(xn, residual=y), want)
                in_place = y.copy()
                assert same_bits(many(xn, out=in_place, residual=in_place), want)
        product = own(small, 4)
        assert product is not None
        assert rows < 100 or len(product._cuts(40)) == 1 + threads
        assert f"up to {threads}" in small.explain()


@compiled
def test_threads_share_one_operator(target: str, rng: np.random.Generator) -> None:
    op = sparsert.compile_matmul(uneven(rng, 64, 64, 0.3), target=target)
    x = rng.standard_normal((64, 4)).astype(np.float32)
    want = [op(np.ascontiguousarray(x[:, :n])) for n in range(1, 5)]
    wrong: list[int] = []

    def work() -> None:
        for _ in range(50):
            for n in range(1, 5):
                if not same_bits(op(np.ascontiguousarray(x[:, :n])), want[n - 1]):
                    wrong.append(n)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- the pattern as data ---------------------------------------------------------------------------------------------


def unfolded(stream: Stream, cols: int, lanes: int, window: int, unroll: int) -> list[list[tuple[int, int]]]:
    """(column, value) of every row in the order of a windowed stream, read as the kernel reads it."""
    trips = stream.data.reshape(-1, 1 + unroll * lanes)
    rows: list[list[tuple[int, int]]] = [[] for _ in range(stream.order.size)]
    values, trip = iter(stream.source.tolist()), 0
    for bundle in range(stream.bundles):
        base = 0
        for count in stream.counts[bundle * stream.folds : (bundle + 1) * stream.folds].tolist():
            for _ in range(count):
                base += int(trips[trip, 0]) * lanes
                for place, byte in enumerate(trips[trip, 1:].tolist()):
                    if byte:
                        column = base + byte - PRESENT
                        assert byte >= PRESENT
                        assert column < min(cols, base + window)
                        rows[stream.order[bundle * lanes + place % lanes]].append((column, next(values)))
                trip += 1
    assert trip == len(trips)
    assert next(values, None) is None
    return rows


@pytest.mark.parametrize(("lanes", "window", "unroll"), [(16, 64, 4), (16, 32, 2), (8, 16, 1)])
@pytest.mark.parametrize("fold", [0, 100])
def test_windows_hold_every_nonzero_in_order(
    lanes: int, window: int, unroll: int, fold: int, rng: np.random.Generator
) -> None:
    for shape, density in [((40, 700), 0.1), ((1, 1), 1.0), ((17, 9000), 0.001), ((3, 0), 0.0), ((20, 90), 0.9)]:
        pattern = as_sparse(dense_matrix(rng, *shape, density)).pattern
        stream = windows(pattern, lanes, window, unroll, fold)
        for row, found in enumerate(unfolded(stream, shape[1], lanes, window, unroll)):
            span = range(int(pattern.indptr[row]), int(pattern.indptr[row + 1]))
            assert found == [(int(pattern.indices[i]), i) for i in span]
        if pattern.nnz:
            assert stream.fill == pattern.nnz / (stream.steps * lanes)


def test_windows_fill_steps_better_than_blocks(rng: np.random.Generator) -> None:
    """Rows may be a window apart; a step per nonzero of the fullest row of every block of columns fills half."""
    pattern = as_sparse(dense_matrix(rng, 512, 2048, 0.1)).pattern
    counts = np.zeros((512, 64), np.int64)
    np.add.at(counts, (pattern.row_of, pattern.indices // 32), 1)
    by_block = pattern.nnz / (16 * counts[np.argsort(-pattern.row_counts)].reshape(32, 16, 64).max(axis=1).sum())
    assert windows(pattern, 16, 64, 4).fill > 0.7 > 0.55 > by_block


@pytest.mark.parametrize("fold", [0, 64])
def test_lockstep_holds_every_nonzero_in_order(fold: int, rng: np.random.Generator) -> None:
    pattern = as_sparse(dense_matrix(rng, 30, 200, 0.2)).pattern
    stream = lockstep(pattern, 8, fold)
    columns, source = stream.data.view("<u2").reshape(-1, 8), stream.source.reshape(-1, 8)
    assert np.all((columns == 200) == (source < 0))
    starts = np.concatenate([[0], np.cumsum(stream.counts.reshape(-1, stream.folds).sum(axis=1))])
    for position, row in enumerate(stream.order.tolist()):
        bundle, lane = divmod(position, 8)
        mine = source[starts[bundle] : starts[bundle + 1], lane]
        assert mine[mine >= 0].tolist() == list(range(pattern.indptr[row], pattern.indptr[row + 1]))
        assert (
            columns[starts[bundle] : starts[bundle + 1], lane][mine >= 0].tolist()
            == pattern.indices[pattern.indptr[row] : pattern.indptr[row + 1]].tolist()
        )


# ---- the programs mean in Python what the processor does -------------------------------------------------------------


def memory_of(array: Array) -> Region:
    size = array.nbytes
    return Region(address_of(array), np.frombuffer((ctypes.c_uint8 * size).from_address(address_of(array)), np.uint8))


PROGRAMS = [
    ("x86-avx512", "x86-avx512", True, 16), ("x86-avx512", "x86-avx512", False, 16),
    ("x86-avx512", "x86-avx512-256", False, 8), ("x86-avx512", "x86-avx512-256", False, 4),
    ("x86-avx2", "x86-avx2", False, 8), ("x86-avx2", "x86-avx2", False, 4),
]  # fmt: skip
programs = pytest.mark.parametrize(
    ("needs", "target", "by_lookup", "width"), [pytest.param(*p, marks=pytest.mark.isa(p[0])) for p in PROGRAMS]
)


@pytest.mark.parametrize("bf16", [False, True])
@programs
def test_programs_in_the_interpreter(
    needs: str, target: str, by_lookup: bool, width: int, bf16: bool, rng: np.random.Generator
) -> None:
    """On exactly the bytes that a product has: one read or written beyond them is an error."""
    for rows, cols in ((21, 70), (70, 66_000)):
        matrix = uneven(rng, rows, cols, 0.2 if cols < 100 else 0.0004)
        values = as_bf16(matrix.values) if bf16 else matrix.values
        task = Task(matrix.pattern, True, "relu", residual="after")
        bias = rng.standard_normal(rows).astype(np.float32)
        for n in (1, 2) if by_lookup else (3, 20):
            product = CompactProduct(task, named(target), by_lookup, width)
            product.load(values, bias)
            assert product.bf16 == bf16
            assert same_bits(product.unpack(), values)
            x, r = rng.standard_normal((cols, n)).astype(np.float32), rng.standard_normal((rows, n)).astype(np.float32)
            got, want = np.zeros((2, rows, n), np.float32)
            product.run(x, want, r, n)
            assert not complaint(want, expected(SparseMatrix(matrix.pattern, values), x, bias, "relu", "after", r))
            frame = product.new_frame((n, *x.strides, *got.strides, *r.strides), 0)
            weights = product.values[0].packed[0][0]
            frame.point(address_of(x), address_of(got), address_of(r), address_of(weights))
            arrays = {"x": x, "y": got, "r": r, "w": weights, "scratch": frame.scratch, "data": product.data,
                      "counts": product.counts}  # fmt: skip
            form = product.form_of(n, bf16)
            program: Program = (
                lookup.generate(task, named(target), form)
                if isinstance(form, lookup.Lookup)
                else looped.generate(task, named(target), form)
            )
            memory = {name: memory_of(a) for name, a in arrays.items()}
            run(program, named(target).lanes, frame.slots, memory, budget=10**7)
            assert same_bits(got, want)


def every_operation(lanes: int) -> tuple[Program, int]:
    """What loops over few columns have of their own, from X by indices from W to Y; how many floats."""
    b, at = Builder(), 0
    b.emit("enter")
    for register, slot in ((S.X, Slot.X), (S.Y, Slot.Y), (S.PANEL, Slot.W)):
        b.emit("s_arg", d=register, disp=slot.byte)

    def keep(register: int) -> None:
        nonlocal at
        b.emit("store", a=register, ptr=S.Y, disp=4 * at)
        at += lanes

    b.emit("load", d=0, ptr=S.X)
    b.emit("bcast4", d=1, ptr=S.X, disp=16)
    keep(1)
    for selector in (0x00, 0x55, 0xAA, 0xFF, 0x1B, 0x9C):
        b.emit("shuffle4", d=1, a=0, disp=selector)
        keep(1)
    b.emit("load_words", d=1, ptr=S.X, disp=6)
    keep(1)
    b.emit("s_load", d=S.K, ptr=S.PANEL)
    for register in (S.PX, S.PX3, S.PX5):
        b.emit("s_low16", d=register, a=S.K)
        b.emit("s_shr", d=S.K, disp=16)
    b.emit("mov", d=2, a=0)
    b.emit("fma_at", d=2, a=1, b=S.PX3, ptr=S.X)
    keep(2)
    if lanes >= 8:
        b.emit("load4_pair", d=1, a=S.K, b=S.PX5, ptr=S.X)
        keep(1)
        b.emit("load4_pair", d=1, a=S.PX, b=S.PX, ptr=S.X)
        keep(1)
    b.emit("leave")
    return b.finish(), at


@pytest.mark.parametrize(
    ("needs", "target"),
    [
        pytest.param(*p, marks=pytest.mark.isa(p[0]))
        for p in (("x86-avx512", "x86-avx512"), ("x86-avx512", "x86-avx512-256"), ("x86-avx2", "x86-avx2"))
    ],
)
def test_operations_mean_what_the_processor_does(needs: str, target: str, rng: np.random.Generator) -> None:
    lanes = named(target).lanes
    program, size = every_operation(lanes)
    x = rng.standard_normal(8 * lanes).astype(np.float32)
    for _ in range(20):
        indices = rng.integers(0, 3 * lanes + 1, 4).astype(np.uint16)
        got, want = np.zeros((2, size), np.float32)
        arrays = {"x": x, "y": want, "w": indices}
        slots = np.array([address_of(x), address_of(want), 0, address_of(indices)], np.int64)
        run(program, lanes, slots, {name: memory_of(a) for name, a in arrays.items()})
        slots[1] = address_of(got)
        executable = Executable(assemble(program, named(target).isa).code)
        executable.call(address_of(slots))
        assert same_bits(got, want)


# ---- values in 16 bits -----------------------------------------------------------------------------------------------


def as_bf16(values: Array) -> Array:
    """Finite values to the nearest with 8 significant bits, ties to even, worked out in float64."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    exponent = np.maximum(exponent, -125)  # subnormals have fewer bits
    scale = np.ldexp(1.0, exponent - 8)
    return (np.rint(values.astype(np.float64) / scale) * scale).astype(np.float32) + 0 * mantissa.astype(np.float32)


def test_rounding_to_bf16(rng: np.random.Generator) -> None:
    wild = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    ties = (rng.integers(0, 2**16, 2000, dtype=np.uint32) << np.uint32(16) | np.uint32(0x8000)).view(np.float32)
    values = np.concatenate([wild, ties, np.float32([0.0, -0.0, 1.0, 3.0e38, 1e-45, -1e-40])])
    values = values[np.isfinite(values) & (np.abs(values) < 3.38e38)]
    got = bf16.rounded(values)
    assert np.array_equal(got, as_bf16(values))
    assert np.array_equal(np.signbit(got), np.signbit(values))
    assert bf16.exact(got)
    assert not bf16.exact(values)
    assert same_bits(bf16.widened(bf16.narrowed(got)), got)
    with np.errstate(all="ignore"):
        assert np.isinf(bf16.rounded(np.float32([3.4e38]))).all()


@pytest.mark.parametrize("shape", SHAPES)
@compiled
def test_weights_that_are_exact_in_bf16_are_stored_so(
    target: str, shape: tuple[int, int], rng: np.random.Generator
) -> None:
    for density in (0.05, 0.3, 1.0):
        matrix = uneven(rng, *shape, density)
        matrix = SparseMatrix(matrix.pattern, as_bf16(matrix.values))
        bias = rng.standard_normal(shape[0]).astype(np.float32) if rng.random() < 0.5 else None
        op = sparsert.compile_matmul(matrix, bias, "relu" if rng.random() < 0.5 else None, target=target)
        small = sparsert.compile_matmul(matrix, bias, op._compiled.task.activation, target=target, max_code_bytes=7000)
        x = rng.standard_normal((shape[1], 32)).astype(np.float32)
        wide = op(x)
        assert not complaint(wide, expected(matrix, x, bias, op._compiled.task.activation))
        for n in range(1, 18):
            assert same_bits(op(np.ascontiguousarray(x[:, :n])), wide[:, :n])
            assert same_bits(small(np.ascontiguousarray(x[:, :n])), wide[:, :n])
            form = own(op, n)
            assert form is None or form.bf16
        assert "16 bits" in op.explain()


@compiled
def test_rows_in_pieces_with_values_in_16_bits(target: str, rng: np.random.Generator) -> None:
    dense = as_bf16(dense_matrix(rng, 20, 3 * FOLD_TAPS, 0.02))
    dense[3] = 1.0
    x = (0.01 * rng.standard_normal((3 * FOLD_TAPS, 16))).astype(np.float32)
    op = sparsert.compile_matmul(dense, target=target)
    wide = op(x)
    for n in (1, 2, 3, 8, 9):
        assert same_bits(op(np.ascontiguousarray(x[:, :n])), wide[:, :n])


@compiled
def test_a_refit_decides_anew_how_values_are_stored(target: str, rng: np.random.Generator) -> None:
    first = uneven(rng, 61, 160, 0.3)
    pattern = first.pattern
    exact, other = (SparseMatrix(pattern, v) for v in (as_bf16(first.values), first.values * np.float32(1.1)))
    x = rng.standard_normal((160, 20)).astype(np.float32)
    sizes = (1, 2, 3, 4, 7, 20)
    for budget in (None, 7000):
        op = sparsert.compile_matmul(exact, target=target, max_code_bytes=budget)
        bounds = [op.bind(np.ascontiguousarray(x[:, :n])) for n in sizes]
        for weight in (other, exact, other):
            op.refit(weight)
            want = sparsert.compile_matmul(weight, target=target)(x)
            for n, bound in zip(sizes, bounds, strict=True):
                assert same_bits(bound(), want[:, :n])
                assert same_bits(op(np.ascontiguousarray(x[:, :n])), want[:, :n])
            form = own(op, 1)
            assert form is not None
            assert form.bf16 == (weight is exact)
            assert ("16 bits" in op.explain()) == (weight is exact)


@pytest.mark.parametrize("target", [*COMPILED, "reference"])
def test_storage_rounds_the_weights_for_any_number_of_columns(target: str, rng: np.random.Generator) -> None:
    matrix = uneven(rng, 45, 90, 0.3)
    rounded = SparseMatrix(matrix.pattern, as_bf16(matrix.values))
    bias = rng.standard_normal(45).astype(np.float32)
    x = rng.standard_normal((90, 40)).astype(np.float32)
    for options in ({}, {"form": "dense"}, {"max_code_bytes": 7000}):
        if target == "reference" and options:
            continue
        op = sparsert.compile_matmul(matrix, bias, target=target, storage="bf16", **options)
        linear = sparsert.compile_linear(matrix, bias, target=target, storage="bf16", **options)
        assert "bf16" in op.explain()
        for new in (None, rng.standard_normal(matrix.values.size).astype(np.float32)):
            if new is not None:
                rounded = SparseMatrix(matrix.pattern, as_bf16(new))
                for one in (op, linear):
                    one.refit(SparseMatrix(matrix.pattern, new))
            for n in (1, 2, 4, 8, 40):
                want = expected(rounded, x[:, :n], bias)
                assert not complaint(op(np.ascontiguousarray(x[:, :n])), want)
                assert not complaint(linear(np.ascontiguousarray(x[:, :n].T)).T, want)
        rounded = SparseMatrix(matrix.pattern, as_bf16(matrix.values))


def test_storages_there_are_not_and_values_that_overflow() -> None:
    weight = np.eye(4, dtype=np.float32)
    for storage in ("f16", "BF16", 16, ["bf16"]):
        with pytest.raises(UnsupportedError, match="storage"):
            sparsert.compile_matmul(weight, storage=storage, target="reference")  # type: ignore[arg-type]
    op = sparsert.compile_linear(weight, storage="bf16", target="reference")
    weight[1, 1] = 3.4e38  # above the largest bfloat16 by more than half a step
    with pytest.raises(ValueRangeError, match="infinite"):
        sparsert.compile_linear(weight, storage="bf16", target="reference")
    with pytest.raises(ValueRangeError, match="infinite"):
        op.refit(weight)


@pytest.mark.parametrize("cols", [(1 << 13) - 1, 1 << 13, (1 << 14) - 1, 1 << 14, (1 << 15) - 1, 1 << 15])
@compiled
def test_numbers_of_columns_where_indices_grow(target: str, cols: int, rng: np.random.Generator) -> None:
    """Eights of bytes in 16 bits reach so many rows of x of 16, 8 and 4 columns; zeros lie behind the last one."""
    weight = np.zeros((21, cols), np.float32)
    weight[rng.integers(0, 21, 60), rng.integers(0, cols, 60)] = 1.1
    weight[:2, cols - 1] = 2.1
    op = sparsert.compile_matmul(weight, target=target)
    small = sparsert.compile_matmul(weight, target=target, max_code_bytes=op.stats.code_bytes - 1)
    x = rng.standard_normal((cols, 16)).astype(np.float32)
    wide = op(x)
    assert not complaint(wide, expected(as_sparse(weight), x))
    for n in (1, 2, 4, 8, 16):
        assert same_bits(op(np.ascontiguousarray(x[:, :n])), wide[:, :n])
        assert same_bits(small(np.ascontiguousarray(x[:, :n])), wide[:, :n])
