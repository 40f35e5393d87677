"""Dense products: against float64, against the sparse form and the interpreter bit by bit, in any shape and layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sparsert
from oracle import COMPILED, complaint, expected, same_bits
from sparsert.codegen.assemble import assemble
from sparsert.codegen.interpreter import region, run
from sparsert.errors import (
    AliasError,
    CodeBudgetError,
    DTypeError,
    PatternMismatchError,
    ScheduleError,
    ShapeError,
    UnsupportedError,
    ValueRangeError,
)  # fmt: skip
from sparsert.kernels.dense import generate
from sparsert.kernels.dense_arguments import Form, Slot
from sparsert.kernels.plan import FOLD_TAPS
from sparsert.operators.dense import Code, Turned, code_of, frame, pack_panels, pack_rows
from sparsert.operators.dense_parts import Extents, blocks_of_rows
from sparsert.runtime.cpu import address_of
from sparsert.schedule.dense import DenseSchedule, choose, conflicts, turns
from sparsert.sparsity.pattern import as_sparse
from sparsert.target import TARGETS

Array = NDArray[np.float32]
SHAPES = ((1, 1, 1), (3, 5, 2), (13, 4, 33), (15, 17, 31), (28, 16, 32), (29, 33, 65), (64, 70, 49), (100, 3, 16))
compiled = pytest.mark.parametrize("target", COMPILED)


def full(rng: np.random.Generator, *shape: int) -> Array:
    """Normal values without a zero."""
    values = rng.standard_normal(shape).astype(np.float32)
    return np.where(values == 0, np.float32(1), values)


def bound(a: Any, b: Any) -> Any:
    """What a product in float32 may be off by: 1e-6 * sqrt(K) * |a| @ |b|."""
    terms = max(1, a.shape[-1])
    return 1e-6 * np.sqrt(terms) * np.matmul(np.abs(a, dtype=np.float64), np.abs(b, dtype=np.float64)) + 1e-40


@compiled
@pytest.mark.parametrize("residual", [None, "before", "after"])
@pytest.mark.parametrize("activation", [None, "relu", "hardswish", "gelu"])
def test_the_bits_of_the_sparse_form(
    target: str, activation: str | None, residual: str | None, rng: np.random.Generator
) -> None:
    for m, k, n in SHAPES:
        weight, x = full(rng, m, k), full(rng, k, n)
        bias = full(rng, m) if rng.random() < 0.7 else None
        r = full(rng, m, n) if residual else None
        options: dict[str, Any] = {"residual": residual, "target": target}
        dense = sparsert.compile_matmul(weight, bias, activation, form="dense", **options)
        linear = sparsert.compile_linear(weight, bias, activation, form="dense", **options)
        sparse = sparsert.compile_matmul(weight, bias, activation, form="sparse", **options)
        y = dense(x, residual=r)
        assert not complaint(y, expected(as_sparse(weight), x, bias, activation, residual, r))
        assert same_bits(y, sparse(x, residual=r)), (m, k, n)
        assert same_bits(y.T, linear(np.ascontiguousarray(x.T), residual=None if r is None else r.T)), (m, k, n)
        if r is not None:
            assert same_bits(dense(x, out=r, residual=r), y)


@compiled
@pytest.mark.parametrize("k", [FOLD_TAPS, FOLD_TAPS + 1, 2 * FOLD_TAPS + 333])
def test_long_sums_are_those_of_the_sparse_form(target: str, k: int, rng: np.random.Generator) -> None:
    weight, bias, x = full(rng, 17, k), full(rng, 17), full(rng, k, 37)
    r = full(rng, 17, 37)
    dense, sparse = (
        sparsert.compile_matmul(weight, bias, "relu", residual="before", target=target, form=form)
        for form in ("dense", "sparse")
    )
    assert same_bits(dense(x, residual=r), sparse(x, residual=r))
    want = sparse(x, residual=r)
    assert same_bits(dense(x, out=r, residual=r), want)  # y holds sums of pieces while r is still to be read


@compiled
def test_columns_that_leave_vectors_empty(
    target: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transposed product, chosen or not, with every kind of overlap when it is transposed back."""
    monkeypatch.setattr("sparsert.operators.dense.turns", lambda *_: True)
    for m, k, n in ((64, 40, 49), (33, 400, 17), (70, 130, 33), (47, 600, 66)):
        weight, bias, x, r = full(rng, m, k), full(rng, m), full(rng, k, n), full(rng, m, n)
        dense, sparse = (
            sparsert.compile_matmul(weight, bias, "silu", residual="before", target=target, form=form)
            for form in ("dense", "sparse")
        )
        y = dense(x, residual=r)
        assert same_bits(y, sparse(x, residual=r))
        bindings = dense._compiled.product._bindings.values()  # type: ignore[attr-defined]
        assert {type(made) for binding in bindings for made in binding.free} == {Turned}
        dense.refit(2 * weight)
        sparse.refit(2 * weight)
        assert same_bits(dense(x, residual=r), sparse(x, residual=r))
    assert turns(2048, 49, 512, TARGETS["x86-avx512"])
    assert not turns(2048, 48, 512, TARGETS["x86-avx512"])
    assert not turns(2048, 49, 512, TARGETS["x86-avx2"])


@compiled
def test_blocking_changes_no_bit(target: str, rng: np.random.Generator) -> None:
    found = TARGETS[target]
    for m, k, n, a, b in (
        (31, 50, 100, "rows", "rows"), (9, 37, 70, "rows", "transposed"), (40, 33, 97, "columns", "rows"),
        (17, 16, 64, "columns", "transposed"),
    ):  # fmt: skip
        code = code_of(Form(a, b), found)
        left, right = full(rng, m, k), full(rng, k, n)
        stored_a = left if a == "rows" else np.ascontiguousarray(left.T)
        stored_b = right if b == "rows" else np.ascontiguousarray(right.T)
        results = []
        for schedule in (DenseSchedule(k), DenseSchedule(7, 2), DenseSchedule(16, 3, copy=True), DenseSchedule(1, 9)):
            y = np.full((m, n), np.nan, np.float32)
            made = frame(code, Extents(1, m, n, k, stored_a.strides[0], stored_b.strides[0], y.strides[0]), schedule)
            made.point(address_of(stored_a), address_of(stored_b), address_of(y), 0)
            code.executable.call(made.address)
            results.append(y)
        assert (np.abs(results[0] - left.astype(np.float64) @ right) <= bound(left, right)).all()
        assert all(same_bits(y, results[0]) for y in results)


@compiled
def test_a_residual_in_place_under_blocks_of_k(target: str, rng: np.random.Generator) -> None:
    """Sums are carried in y, which must not be written while it holds a residual still to be read."""
    weight, x, r = full(rng, 20, 30), full(rng, 30, 64), full(rng, 20, 64)
    op = sparsert.compile_matmul(weight, residual="after", target=target, form="dense")
    want = op(x, residual=r)
    op._compiled.product._bindings.clear()  # type: ignore[attr-defined]
    op._compiled.product.schedule = DenseSchedule(7)  # type: ignore[attr-defined]
    assert same_bits(op(x, out=np.empty_like(r), residual=r), want)
    assert same_bits(op(x, out=r, residual=r), want)


@compiled
@pytest.mark.parametrize(
    ("form", "shape", "k_block"),
    [
        (Form("columns", bias="rows", activation="relu", residual="before"), (15, 9, 41), 4),
        (Form("rows", bias="columns", residual="after"), (9, 13, 37), 13),
        (Form("rows", "transposed", scale=True), (4, 18, 21), 18),
        (Form("columns", "transposed", activation="gelu"), (3, 5, 34), 3),
    ],
    ids=str,
)
def test_the_interpreter_gives_the_same_bits(
    target: str, form: Form, shape: tuple[int, int, int], k_block: int, rng: np.random.Generator
) -> None:
    """On regions of exactly the arrays' sizes, two matrices of a batch: any access outside is an error there."""
    found, (m, k, n) = TARGETS[target], shape
    code = code_of(form, found)
    a = full(rng, 2, *((m, k) if form.a == "rows" else (k, m)))
    b = full(rng, 2, *((k, n) if form.b == "rows" else (n, k)))
    r, bias = full(rng, 2, m, n), full(rng, {"rows": m, "columns": n, None: 1}[form.bias])
    results = []
    for interpreted in (False, True):
        y = np.full((2, m, n), np.nan, np.float32)
        extents = Extents(2, m, n, k, a.strides[1], b.strides[1], 4 * n, 4 * n, a.strides[0], b.strides[0], 4 * m * n,
                          4 * m * n)  # fmt: skip
        made = frame(code, extents, DenseSchedule(k_block, 2))
        made.slots[Slot.BIAS] = address_of(bias)
        made.point(address_of(a), address_of(b), address_of(y), address_of(r))
        if interpreted:
            arrays = {"a": a, "b": b, "y": y, "r": r, "bias": bias, "scratch": made.scratch}
            arrays |= {"aheads": made.kept} if isinstance(made.kept, np.ndarray) else {}
            memory = {name: region(address_of(array), array) for name, array in arrays.items()}
            run(generate(form, found).program, found.lanes, made.slots, memory)
        else:
            code.executable.call(made.address)
        results.append(y)
    assert same_bits(*results)


def test_an_instruction_set_of_another_machine(rng: np.random.Generator) -> None:
    """The program for four lanes, interpreted: masks, overlapping fours and all."""
    found = TARGETS["aarch64-neon"]
    for form, (m, k, n) in ((Form("rows", "transposed", "columns"), (15, 6, 13)), (Form("columns"), (3, 9, 11))):
        kernel = generate(form, found)
        assert assemble(kernel.program, found.isa).code
        code = Code(form, found, kernel.rows, None, 0, 0)  # type: ignore[arg-type]
        left, right, bias = full(rng, m, k), full(rng, k, n), full(rng, n)
        a = left if form.a == "rows" else np.ascontiguousarray(left.T)
        b = right if form.b == "rows" else np.ascontiguousarray(right.T)
        y = np.full((m, n), np.nan, np.float32)
        made = frame(code, Extents(1, m, n, k, a.strides[0], b.strides[0], 4 * n), DenseSchedule(4))
        made.slots[Slot.BIAS] = address_of(bias)
        made.point(address_of(a), address_of(b), address_of(y), 0)
        arrays = {"a": a, "b": b, "y": y, "bias": bias, "scratch": made.scratch}
        arrays |= {"aheads": made.kept} if isinstance(made.kept, np.ndarray) else {}
        run(kernel.program, 4, made.slots, {name: region(address_of(array), array) for name, array in arrays.items()})
        want = left.astype(np.float64) @ right + (bias if form.bias else 0)
        assert (np.abs(y - want) <= bound(left, right) + 1e-6 * np.abs(bias)).all()


@compiled
def test_packed_weights_hold_every_element_once(target: str, rng: np.random.Generator) -> None:
    weight = full(rng, 47, 5)
    blocks, pitch, step = pack_rows(weight, 14)
    large, small, size = blocks_of_rows(47, 14)
    assert (large, small, size, pitch, step) == (3, 1, 12, 48, 4 * 5 * 12)
    assert same_bits(np.concatenate([block.T[: size - (i >= large)] for i, block in enumerate(blocks)]), weight)
    panels, pitch, step = pack_panels(weight, 8)
    assert (panels.shape, pitch, step) == ((3, 5, 16), 64, 4 * 5 * 16)
    assert same_bits(panels.transpose(0, 2, 1).reshape(48, 5)[:47], weight)
    assert all(sum(blocks_of_rows(m, 14)[:2]) == -(-m // 14) for m in range(1, 200))


@compiled
def test_not_a_number_and_infinities(target: str, rng: np.random.Generator) -> None:
    weight, x = full(rng, 40, 50), full(rng, 50, 60)
    x[3, 7], x[4, 8], x[5, 9], x[6, 10] = np.nan, np.inf, -np.inf, 1e-42
    dense, sparse = (sparsert.compile_matmul(weight, target=target, form=form) for form in ("dense", "sparse"))
    assert same_bits(dense(x), sparse(x))
    assert np.isnan(dense(x)[:, 7]).all()
    weight[:, 4] = 0  # in the dense form a zero is a factor
    assert np.isnan(sparsert.compile_matmul(weight, target=target, form="dense")(x)[:, 8]).all()
    assert not np.isnan(sparsert.compile_matmul(weight, target=target)(x)[:, 8]).any()


@compiled
def test_when_the_dense_form_is_chosen(target: str, rng: np.random.Generator) -> None:
    weight = full(rng, 128, 128)
    op = sparsert.compile_matmul(weight, target=target)
    assert isinstance(op.schedule, DenseSchedule)
    assert "dense product" in op.explain()
    assert str(op.schedule) in op.explain()
    assert "no weight is zero" in op.explain()
    assert "fma" in op.listing()
    for options in ({"layout": "tile_major"}, {"form": "sparse"}, {"schedule": sparsert.Schedule(4)}):
        assert isinstance(sparsert.compile_matmul(weight, target=target, **options).schedule, sparsert.Schedule)
    weight[5, 6] = 0
    nearly = sparsert.compile_matmul(weight, target=target)
    assert isinstance(nearly.schedule, sparsert.Schedule)
    assert "form='dense'" in nearly.explain()
    assert isinstance(sparsert.compile_matmul(full(rng, 4, 4), target=target).schedule, sparsert.Schedule)
    dense = sparsert.compile_matmul(weight, target=target, form="dense")
    with pytest.raises(PatternMismatchError):
        dense.refit(full(rng, 128, 128))
    with pytest.raises(CodeBudgetError):
        sparsert.compile_matmul(weight, target=target, form="dense", max_code_bytes=1000)
    with pytest.raises(UnsupportedError, match="form"):
        sparsert.compile_matmul(weight, target=target, form="looped")
    with pytest.raises(UnsupportedError, match="tile-major"):
        sparsert.compile_matmul(weight, target=target, form="dense", layout="tile_major")
    with pytest.raises(ScheduleError):
        sparsert.compile_matmul(weight, target=target, form="dense", schedule=sparsert.Schedule(4))


# ---- activation x activation -------------------------------------------------------------------------------------
def operand(rng: np.random.Generator, batch: tuple[int, ...], rows: int, cols: int) -> Array:
    """An operand with one of many kinds of strides."""
    kind = rng.integers(6)
    if kind == 0:  # heads of one array
        return full(rng, rows, *batch, cols).transpose(*range(1, len(batch) + 1), 0, len(batch) + 1)
    if kind == 1:
        return full(rng, *batch, cols, rows).swapaxes(-1, -2)
    if kind == 2:
        return full(rng, *batch, rows, 2 * cols + 3)[..., : 2 * cols : 2]
    if kind == 3:
        return full(rng, *batch, rows + 3, cols + 5)[..., 2 : 2 + rows, 1 : 1 + cols]
    if kind == 4:
        return full(rng, *batch, rows, cols)[..., ::-1, :]
    return full(rng, *batch, rows, cols)


@pytest.mark.parametrize("target", [*COMPILED, "reference"])
@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("transpose_a", [False, True])
def test_products(target: str, transpose_a: bool, transpose_b: bool, rng: np.random.Generator) -> None:
    op = sparsert.compile_product(transpose_a=transpose_a, transpose_b=transpose_b, scale=0.125, target=target)
    for _ in range(60):
        m, k, n = (int(rng.choice([1, 2, 3, 4, 5, rng.integers(1, 80), 16, 32, 64])) for _ in range(3))
        batch = tuple(int(v) for v in rng.integers(1, 4, rng.integers(0, 4)))
        shorter = batch[int(rng.integers(len(batch) + 1)) :]
        a = operand(rng, batch, *((k, m) if transpose_a else (m, k)))
        b = operand(rng, shorter, *((n, k) if transpose_b else (k, n)))
        left, right = a.swapaxes(-1, -2) if transpose_a else a, b.swapaxes(-1, -2) if transpose_b else b
        want = np.matmul(left, right, dtype=np.float64) * 0.125
        held = a.copy(), b.copy()
        y = op(a, b)
        assert y.shape == want.shape
        assert (np.abs(y - want) <= 0.125 * bound(left, right)).all(), (a.shape, a.strides, b.shape, b.strides)
        out = np.full((*batch, m, n + 3), 7, np.float32)[..., 1 : n + 1]
        assert op(a, b, out=out) is out
        assert same_bits(out, y)
        assert (out.base[..., [0, n + 1, n + 2]] == 7).all()
        step = op.bind(a, b, out)
        out[...] = 0
        assert step() is out
        assert same_bits(out, y)
        assert same_bits(a, held[0])
        assert same_bits(b, held[1])


@compiled
def test_products_have_the_bits_of_layers(target: str, rng: np.random.Generator) -> None:
    for m, k, n in ((29, 33, 65), (40, FOLD_TAPS + 900, 33)):
        w, x = full(rng, m, k), full(rng, k, n)
        op = sparsert.compile_product(activation="gelu", target=target)
        assert same_bits(op(w, x), sparsert.compile_matmul(w, activation="gelu", target=target, form="sparse")(x))
        transposed = sparsert.compile_product(activation="gelu", transpose_a=True, transpose_b=True, target=target)
        assert same_bits(transposed(np.ascontiguousarray(w.T), np.ascontiguousarray(x.T)), op(w, x))


@pytest.mark.parametrize("target", [*COMPILED, "reference"])
def test_empty_products(target: str, rng: np.random.Generator) -> None:
    op = sparsert.compile_product(activation="sigmoid", target=target)
    assert op(np.ones((0, 3), np.float32), np.ones((3, 4), np.float32)).shape == (0, 4)
    assert op(np.ones((2, 0, 3), np.float32), np.ones((3, 4), np.float32)).shape == (2, 0, 4)
    assert op(np.ones((0, 2, 3), np.float32), np.ones((3, 4), np.float32)).shape == (0, 2, 4)
    assert (op(np.ones((2, 0), np.float32), np.ones((0, 4), np.float32)) == 0.5).all()
    assert op.bind(np.ones((0, 3), np.float32), np.ones((3, 4), np.float32))().shape == (0, 4)


@pytest.mark.parametrize("target", [*COMPILED, "reference"])
def test_what_a_product_refuses(target: str) -> None:
    op = sparsert.compile_product(target=target)
    a, b = np.ones((4, 5), np.float32), np.ones((5, 6), np.float32)
    for left, right in ((a[0], b), (a, b[:, 0]), (a, b.T), (np.ones((2, 4, 5), np.float32), np.ones((3, 5, 6), "f4"))):
        with pytest.raises(ShapeError):
            op(left, right)
    with pytest.raises(DTypeError):
        op(a.astype(np.float64), b)
    with pytest.raises(ShapeError):
        op(a, b, out=np.ones((4, 7), np.float32))
    square = np.ones((5, 5), np.float32)
    with pytest.raises(AliasError):
        op(square, b[:, :5], out=square)
    for options in ({"scale": np.nan}, {"scale": 1e40}, {"scale": "x"}):
        with pytest.raises(ValueRangeError):
            sparsert.compile_product(target=target, **options)
    with pytest.raises(UnsupportedError):
        sparsert.compile_product(target=target, transpose_a=1)  # type: ignore[arg-type]
    assert target in op.explain()
    assert target in repr(op)


def test_schedules_are_read_off_the_caches() -> None:
    target = TARGETS["x86-avx512"]
    assert choose(768, 0, target, 128) == DenseSchedule(768, 5)
    assert choose(64, 0, target, 128) == DenseSchedule(64, 8)
    assert choose(10000, 2000, target, 128) == DenseSchedule(2000, 2, anew=True)
    assert conflicts(12288, 14, target)
    assert not conflicts(3072, 14, target)
    assert not conflicts(3076, 14, target)
    for wrong in ({"k_block": 0}, {"k_block": 3, "panels": 0}):
        with pytest.raises(ScheduleError):
            DenseSchedule(**wrong)


@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("columns", [17, 20, 40])
def test_rows_of_the_output_and_the_residual_may_lie_backwards(target: str, columns: int) -> None:
    rng = np.random.default_rng(columns)
    weight, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((31, 26), (26, columns)))
    residual = rng.standard_normal((31, columns)).astype(np.float32)
    op = sparsert.compile_matmul(weight, form="dense", target=target, residual="after")
    wanted = op(x, residual=residual)
    memory = np.zeros((31 + 8, columns), np.float32)
    op(x, out=memory[4:-4][::-1], residual=residual[::-1].copy()[::-1])
    assert np.array_equal(memory[4:-4][::-1], wanted)
    assert not memory[:4].any()
    assert not memory[-4:].any()


@pytest.mark.parametrize("target", COMPILED)
def test_dense_code_that_exceeds_its_budget_gives_way_to_other_forms(target: str, rng: np.random.Generator) -> None:
    weight = rng.standard_normal((48, 160), np.float32)
    x = rng.standard_normal((160, 40), np.float32)
    op = sparsert.compile_matmul(weight, target=target)
    assert isinstance(op.schedule, DenseSchedule)
    if not TARGETS[target].loops:
        pytest.skip("nothing loops over the pattern there")
    other = sparsert.compile_matmul(weight, target=target, max_code_bytes=8000)
    assert other.stats.code_bytes <= 8000 < op.stats.code_bytes
    assert same_bits(other(x), op(x))
