"""Compiled operators as a user meets them: strides, out=, aliasing, DLPack, refit, what they tell about themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sparsert
from oracle import COMPILED, EVERY_TARGET, complaint, dense_matrix, expected, same_bits
from sparsert import Clip, Schedule
from sparsert.errors import (
    AliasError,
    DTypeError,
    FormatError,
    PatternMismatchError,
    ShapeError,
    UnsupportedError,
    ValueRangeError,
)
from sparsert.sparsity.pattern import as_sparse

M, K = 37, 45


@pytest.fixture
def weight(rng: np.random.Generator) -> np.ndarray:
    return dense_matrix(rng, M, K, 0.2)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def check(y: np.ndarray, weight: np.ndarray, x: np.ndarray, *rest: Any) -> None:
    assert y.dtype == np.float32
    wrong = complaint(y, expected(as_sparse(weight), x, *rest))
    assert not wrong, wrong


VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contiguous": lambda a: a,
    "fortran": np.asfortranarray,
    "columns of a wider array": lambda a: np.pad(a, ((0, 0), (3, 5)))[:, 3:-5],
    "rows of a longer array": lambda a: np.repeat(a, 3, axis=0)[::3],
    "every other column": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "rows backwards": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "columns backwards": lambda a: np.ascontiguousarray(a[:, ::-1])[:, ::-1],
    "both backwards": lambda a: np.ascontiguousarray(a[::-1, ::-1])[::-1, ::-1],
    "unaligned": lambda a: _unaligned(a),
}


def _unaligned(array: np.ndarray) -> np.ndarray:
    pitch = 4 * array.shape[1] + 3
    moved = np.ndarray(array.shape, np.float32, np.empty(pitch * array.shape[0] + 8, np.uint8), 1, (pitch, 4))
    moved[...] = array
    return moved


@pytest.mark.parametrize("target", EVERY_TARGET)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("columns", [1, 5, 12, 16, 33])
def test_strides(target: str, view: str, columns: int, weight: np.ndarray, rng: np.random.Generator) -> None:
    x, r = normal(rng, K, columns), normal(rng, M, columns)
    out = VIEWS[view](np.zeros((M, columns), np.float32))
    op = sparsert.compile_matmul(weight, residual="after", target=target)
    assert op(VIEWS[view](x), out=out, residual=VIEWS[view](r)) is out
    check(out, weight, x, None, None, "after", r)

    out = VIEWS[view](np.zeros((columns, M), np.float32))
    linear = sparsert.compile_linear(weight, residual="after", target=target)
    assert (
        linear(VIEWS[view](np.ascontiguousarray(x.T)), out=out, residual=VIEWS[view](np.ascontiguousarray(r.T))) is out
    )
    check(out.T, weight, x, None, None, "after", r)


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_what_lies_between_the_elements_of_out_stays(target: str, weight: np.ndarray, rng: np.random.Generator) -> None:
    x = normal(rng, K, 20)
    op = sparsert.compile_matmul(weight, target=target)
    for step in (1, 2):
        whole = np.full((2 * M, 50), 7.0, np.float32)
        mask = np.ones(whole.shape, bool)
        mask[::2, 4 : 4 + 20 * step : step] = False
        op(x, out=whole[::2, 4 : 4 + 20 * step : step])
        assert np.all(whole[mask] == 7)
        check(whole[::2, 4 : 4 + 20 * step : step], weight, x)


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_broadcast_inputs(target: str, weight: np.ndarray, rng: np.random.Generator) -> None:
    op, linear = sparsert.compile_matmul(weight, target=target), sparsert.compile_linear(weight, target=target)
    row, column = normal(rng, 1, 21), normal(rng, K, 1)
    for x in (np.broadcast_to(row, (K, 21)), np.broadcast_to(column, (K, 21)), np.broadcast_to(np.float32(2), (K, 21))):
        check(op(x), weight, x)
        check(linear(x.T).T, weight, x)


@pytest.mark.parametrize("target", EVERY_TARGET)
@pytest.mark.parametrize("leading", [(), (1,), (20,), (3, 7), (2, 1, 9), (0,), (2, 0, 3)])
def test_leading_axes_of_a_linear_layer(
    target: str, leading: tuple[int, ...], weight: np.ndarray, rng: np.random.Generator
) -> None:
    x, bias = normal(rng, *leading, K), normal(rng, M)
    op = sparsert.compile_linear(weight, bias, "relu", target=target)
    y = op(x)
    assert y.shape == (*leading, M)
    check(y.reshape(-1, M).T, weight, x.reshape(-1, K).T, bias, "relu")
    if len(leading) == 2 and y.size:  # axes that do not merge: neither of x nor of out
        apart = np.zeros((3, 14, K), np.float32)[:, ::2]
        apart[...] = x
        out = np.zeros((3, 9, M), np.float32)
        assert np.shares_memory(op(apart, out=out[:, :7]), out)
        assert same_bits(out[:, :7], y)
        assert not out[:, 7:].any()


@pytest.mark.parametrize("target", EVERY_TARGET)
@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (5, 0), (0, 0), (1, 1), (1, 40), (40, 1), (3, 2), (2, 33)])
@pytest.mark.parametrize("columns", [0, 1, 17])
def test_degenerate_extents(target: str, rows: int, cols: int, columns: int, rng: np.random.Generator) -> None:
    weight, bias = dense_matrix(rng, rows, cols, 0.7), normal(rng, rows)
    x, r = normal(rng, cols, columns), normal(rng, rows, columns)
    y = sparsert.compile_matmul(weight, bias, "relu", residual="before", target=target)(x, residual=r)
    assert y.shape == (rows, columns)
    check(y, weight, x, bias, "relu", "before", r)
    linear = sparsert.compile_linear(weight, bias, "relu", residual="before", target=target)
    assert same_bits(linear(x.T, residual=r.T).T, y)
    tiled = sparsert.compile_matmul(weight, bias, target=target, layout="tile_major")
    for t in (0, 2):
        assert tiled(np.zeros((t, cols, tiled.tile), np.float32)).shape == (t, rows, tiled.tile)


@pytest.mark.parametrize("target", EVERY_TARGET)
@pytest.mark.parametrize("residual", [None, "before", "after"])
def test_tile_major(target: str, residual: str | None, weight: np.ndarray, rng: np.random.Generator) -> None:
    """Column ``tile * t + i`` of row ``k`` lies at [t, k, i]; results are the row-major ones to the bit."""
    bias = normal(rng, M)
    tiled = sparsert.compile_matmul(weight, bias, "silu", residual=residual, target=target, layout="tile_major")
    plain = sparsert.compile_matmul(weight, bias, "silu", residual=residual, target=target)
    tile = tiled.tile
    for t in (1, 2, 5):
        x, r = normal(rng, K, tile * t), normal(rng, M, tile * t)
        arranged = [np.ascontiguousarray(a.reshape(len(a), t, tile).transpose(1, 0, 2)) for a in (x, r)]
        out = np.zeros((t, M, tile), np.float32)
        given = arranged[1] if residual else None
        assert tiled(arranged[0], out=out, residual=given) is out
        y = out.transpose(1, 0, 2).reshape(M, tile * t)
        check(y, weight, x, bias, "silu", residual, r)
        assert same_bits(y, plain(x, residual=r if residual else None))
        if residual:
            assert same_bits(tiled(arranged[0], out=given, residual=given), out)


# ---- out and residual: what may overlap ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", EVERY_TARGET)
@pytest.mark.parametrize("columns", [7, 12, 16, 40, 64])
@pytest.mark.parametrize("residual", ["before", "after"])
def test_residual_in_place(
    target: str, residual: str, columns: int, weight: np.ndarray, rng: np.random.Generator
) -> None:
    x, r = normal(rng, K, columns), normal(rng, M, columns)
    options = {"residual": residual, "target": target}
    if target != "reference":
        options["schedule"] = Schedule(rows=4, tiles=2)
    op = sparsert.compile_matmul(weight, activation="silu", **options)
    y = op(x, residual=r)
    check(y, weight, x, None, "silu", residual, r)
    both = r.copy()
    assert op(x, out=both, residual=both) is both
    assert same_bits(both, y)
    linear = sparsert.compile_linear(weight, activation="silu", **options)
    both = np.ascontiguousarray(r.T)
    assert same_bits(linear(np.ascontiguousarray(x.T), out=both, residual=both).T, y)


@pytest.mark.parametrize("target", EVERY_TARGET)
@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (1, 3), (2, 16)])
@pytest.mark.parametrize("columns", [32, 35])
def test_residual_that_half_overlaps_out(
    target: str, shift: tuple[int, int], columns: int, weight: np.ndarray, rng: np.random.Generator
) -> None:
    x, whole = normal(rng, K, columns), normal(rng, M + 2, columns + 16)
    down, right = shift
    for out_first in (True, False):
        shared = whole.copy()
        here, there = shared[:M, :columns], shared[down : down + M, right : right + columns]
        out, r = (here, there) if out_first else (there, here)
        before = r.copy()
        sparsert.compile_matmul(weight, residual="before", target=target)(x, out=out, residual=r)
        check(out, weight, x, None, None, "before", before)


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_residual_may_be_x(target: str, rng: np.random.Generator) -> None:
    weight, x = dense_matrix(rng, 30, 30, 0.2), normal(rng, 30, 50)
    check(
        sparsert.compile_matmul(weight, residual="after", target=target)(x, residual=x),
        weight,
        x,
        None,
        None,
        "after",
        x,
    )


@pytest.mark.parametrize("target", EVERY_TARGET)
@pytest.mark.parametrize("shape", [(M, 32), (M, 5)])
def test_out_must_not_overlap_x(target: str, shape: tuple[int, int], rng: np.random.Generator) -> None:
    square, columns = dense_matrix(rng, M, M, 0.2), shape[1]
    shared = normal(rng, 2 * M, columns)
    before = shared.copy()
    op = sparsert.compile_matmul(square, target=target)
    linear = sparsert.compile_linear(square, target=target)
    tiled = sparsert.compile_matmul(square, target=target, layout="tile_major")
    whole = normal(rng, 2, M, tiled.tile)
    for call in (
        lambda: op(shared[:M], out=shared[:M]),
        lambda: op(shared[:M], out=shared[M - 1 : -1]),
        lambda: op(shared[::2], out=shared[1::2]),  # disjoint but interleaved: taken for an overlap, as documented
        lambda: linear(shared[:M].T, out=shared[1 : M + 1].T),
        lambda: tiled(whole, out=whole),
    ):
        with pytest.raises(AliasError) as caught:
            call()
        assert caught.value.where == "out"
        assert "another array" in caught.value.hint
    assert same_bits(shared, before)


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_read_only_out(target: str, weight: np.ndarray, rng: np.random.Generator) -> None:
    out = np.zeros((M, 20), np.float32)
    out.setflags(write=False)
    for refused in (out, np.broadcast_to(np.float32(0), (M, 20))):
        with pytest.raises(AliasError) as caught:
            sparsert.compile_matmul(weight, target=target)(normal(rng, K, 20), out=refused)
        assert caught.value.where == "out"
        assert caught.value.hint
    assert not out.any()


# ---- what is refused -------------------------------------------------------------------------------------------------


class Tensor:
    """The least that speaks DLPack."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **options: Any) -> Any:
        if self.device[0] != 1:
            raise BufferError("not on this device")
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_dlpack(target: str, weight: np.ndarray, rng: np.random.Generator) -> None:
    x, bias, r = normal(rng, K, 19), normal(rng, M), normal(rng, M, 19)
    op = sparsert.compile_matmul(Tensor(weight), Tensor(bias), residual="before", target=target)
    check(op(Tensor(x), residual=Tensor(r)), weight, x, bias, None, "before", r)
    op.refit(Tensor(2 * weight))
    check(op(Tensor(x[::-1]), residual=r), 2 * weight, x[::-1], bias, None, "before", r)
    for refused in (Tensor(x, (2, 0)), Tensor(x.astype(np.float64))):
        with pytest.raises(DTypeError) as caught:
            op(refused, residual=r)
        assert caught.value.where == "x"
        assert caught.value.hint


@pytest.mark.parametrize("target", EVERY_TARGET)
@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "uint8", "bool", "complex64", ">f4", "object"])
def test_only_float32(target: str, dtype: str, weight: np.ndarray) -> None:
    op = sparsert.compile_matmul(weight, residual="after", target=target)
    x, y = np.zeros((K, 4), np.float32), np.zeros((M, 4), np.float32)
    for name, arguments in {
        "x": (x.astype(dtype), None, y),
        "out": (x, y.astype(dtype), y),
        "residual": (x, None, y.astype(dtype)),
    }.items():
        with pytest.raises(DTypeError, match="float32") as caught:
            op(arguments[0], out=arguments[1], residual=arguments[2])
        assert caught.value.where == name
        assert caught.value.hint


@pytest.mark.parametrize("value", [None, 3.0, [[1.0]], "x"])
def test_what_is_no_array(value: Any, weight: np.ndarray) -> None:
    for op in (
        sparsert.compile_matmul(weight, target="reference"),
        sparsert.compile_linear(weight, target="reference"),
    ):
        with pytest.raises(DTypeError, match="not an array") as caught:
            op(value)
        assert (caught.value.where, bool(caught.value.hint)) == ("x", True)


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_wrong_shapes(target: str, weight: np.ndarray) -> None:
    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    op = sparsert.compile_matmul(weight, residual="after", target=target)
    linear = sparsert.compile_linear(weight, residual="after", target=target)
    tiled = sparsert.compile_matmul(weight, target=target, layout="tile_major")
    t = tiled.tile
    strided = zeros(2, K, 2 * t)[:, :, ::2]
    cases: list[tuple[Callable[[], Any], str, str]] = [
        (lambda: op(zeros(4, K), residual=zeros(M, 4)), "x", "pass x.T"),
        (lambda: op(zeros(K), residual=zeros(M)), "x", ""),
        (lambda: op(zeros(K + 1, 4), residual=zeros(M, 4)), "x", ""),
        (lambda: op(zeros(1, K, 4), residual=zeros(M, 4)), "x", ""),
        (lambda: op(zeros(K, 4), residual=zeros(4, M)), "residual", ""),
        (lambda: op(zeros(K, 4), residual=zeros(M, 1)), "residual", ""),
        (lambda: op(zeros(K, 4), out=zeros(M, 5), residual=zeros(M, 4)), "out", ""),
        (lambda: op(zeros(K, 4), out=zeros(M * 4), residual=zeros(M, 4)), "out", ""),
        (lambda: linear(zeros(K, 4), residual=zeros(4, M)), "x", "pass x.T"),
        (lambda: linear(zeros(), residual=zeros(M)), "x", ""),
        (lambda: linear(zeros(2, 3, K), residual=zeros(6, M)), "residual", ""),
        (lambda: linear(zeros(2, 3, K), out=zeros(6, M), residual=zeros(2, 3, M)), "out", ""),
        (lambda: tiled(zeros(K, t)), "x", "row_major"),
        (lambda: tiled(zeros(2, K, t - 1)), "x", "row_major"),
        (lambda: tiled(zeros(2, K, t), out=zeros(3, M, t)), "out", ""),
        (lambda: tiled(strided), "x", "ascontiguousarray"),
        (lambda: tiled(zeros(2, K, t), out=zeros(2, M, 2 * t)[:, :, ::2]), "out", "ascontiguousarray"),
    ]
    for call, where, hint in cases:
        with pytest.raises(ShapeError) as caught:
            call()
        assert caught.value.where == where
        assert hint in caught.value.hint


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_residual_given_exactly_if_compiled_so(target: str, weight: np.ndarray) -> None:
    x, y = np.zeros((K, 16), np.float32), np.zeros((M, 16), np.float32)
    for op, residual in ((sparsert.compile_matmul(weight, target=target), y),
                         (sparsert.compile_matmul(weight, residual="before", target=target), None)):  # fmt: skip
        with pytest.raises(UnsupportedError, match="residual") as caught:
            op(x, residual=residual)
        assert caught.value.where == "residual"
        assert "before" in caught.value.hint


def test_output_beyond_memory(weight: np.ndarray) -> None:
    op = sparsert.compile_matmul(np.ones((2**20, 1), np.float32), target="reference")
    with pytest.raises(ValueRangeError) as caught:
        op(np.broadcast_to(np.float32(1), (1, 2**45)))
    assert caught.value.hint


@pytest.mark.parametrize("target", EVERY_TARGET)
@pytest.mark.parametrize("layout", ["row_major", "tile_major", "linear"])
def test_calls_like_an_earlier_one_are_checked_as_well(target: str, layout: str, rng: np.random.Generator) -> None:
    """What an operator remembers of arrays that it took is no reason to take others."""
    square = dense_matrix(rng, M, M, 0.2)
    if layout == "linear":
        op: Any = sparsert.compile_linear(square, target=target)
    else:
        op = sparsert.compile_matmul(square, target=target, layout=layout)
    shape = {"row_major": (M, 40), "tile_major": (3, M, op.tile), "linear": (40, M)}[layout]
    x, other, out = normal(rng, *shape), normal(rng, *shape), np.zeros(shape, np.float32)
    wanted, second = op(x), op(other)
    for given, y in ((x, wanted), (other, second), (x, wanted)):
        assert same_bits(op(given, out=out), y)
        assert same_bits(op(given), y)
    locked = out.copy()
    locked.setflags(write=False)
    refused = [
        (x, x, None, AliasError), (x, locked, None, AliasError), (x, out.astype(np.float64), None, DTypeError),
        (x.astype(np.int32), out, None, DTypeError), (x.view(">f4"), out, None, DTypeError),
        (x[:-1], out, None, ShapeError), (x, out[:-1], None, ShapeError), (x, out, out, UnsupportedError),
    ]  # fmt: skip
    before = x.copy(), locked.copy()
    for given, target_array, residual, kind in refused:
        with pytest.raises(kind):
            op(given, out=target_array, residual=residual)
    assert same_bits(x, before[0])
    assert same_bits(locked, before[1])
    op.refit(2 * square)
    assert same_bits(op(x, out=out), 2 * wanted)


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_a_narrow_linear_layer_does_not_take_its_transposed_view_for_x(target: str, rng: np.random.Generator) -> None:
    weight, x = dense_matrix(rng, 3, 20, 0.5), normal(rng, 20, 20)
    op = sparsert.compile_linear(weight, target=target)
    for given in (x, np.asfortranarray(x), x, np.asfortranarray(x)):
        out = np.zeros((20, 3), np.float32)
        check(op(given, out=out).T, weight, given.T)


# ---- bound calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", EVERY_TARGET)
@pytest.mark.parametrize("layout", ["row_major", "tile_major", "linear"])
@pytest.mark.parametrize("residual", [None, "after"])
def test_a_bound_call_is_the_call(target: str, layout: str, residual: str | None, rng: np.random.Generator) -> None:
    """It reads what the arrays hold at the time, also after a refit, and beside calls of other kinds."""
    square = dense_matrix(rng, M, M, 0.2)
    if layout == "linear":
        op: Any = sparsert.compile_linear(square, residual=residual, target=target)
    else:
        op = sparsert.compile_matmul(square, residual=residual, target=target, layout=layout)
    shape = {"row_major": (M, 40), "tile_major": (3, M, op.tile), "linear": (40, M)}[layout]
    x, out = normal(rng, *shape), np.zeros(shape, np.float32)
    r = None if residual is None else normal(rng, *shape)
    bound = op.bind(x, out, r)
    assert bound.out is out
    for _ in range(3):
        wanted = op(x, residual=r)
        assert bound() is out
        assert same_bits(out, wanted)
        x[...], out[...] = normal(rng, *shape), np.nan
        op.refit(rng.standard_normal() * square)
    fresh = op.bind(x, residual=r)
    assert same_bits(fresh(), op(x, residual=r))
    assert fresh.out is not out


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_a_bound_call_copies_where_the_operator_does(target: str, weight: np.ndarray, rng: np.random.Generator) -> None:
    op = sparsert.compile_matmul(weight, residual="before", target=target)
    for view in VIEWS.values():
        x, out = view(normal(rng, K, 33)), view(np.zeros((M, 33), np.float32))
        bound = op.bind(x, out, out)  # the residual is overwritten
        for _ in range(2):
            x[...], out[...] = normal(rng, K, 33), normal(rng, M, 33)
            wanted = op(x, residual=out.copy())
            assert same_bits(bound(), wanted)


@pytest.mark.parametrize("target", COMPILED)
def test_bound_calls_check_nothing_again(
    target: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many shapes came before, and also with merged axes, tensors, sums in place."""
    square = dense_matrix(rng, 32, 32, 0.2)
    op, linear = sparsert.compile_matmul(square, target=target), sparsert.compile_linear(square, target=target)
    adds = sparsert.compile_matmul(square, residual="after", target=target)
    for columns in range(20, 90):
        op(normal(rng, 32, columns))
    x, x3, out, total = normal(rng, 32, 64), normal(rng, 4, 5, 32), np.zeros((32, 64), np.float32), normal(rng, 32, 64)

    class Tensor:
        __dlpack__, __dlpack_device__ = x.__dlpack__, x.__dlpack_device__

    wanted = [op(x), linear(x3), adds(x, residual=adds(x, residual=total))]
    bound = [op.bind(Tensor(), out), linear.bind(x3), adds.bind(x, total, total)]
    for kind in (sparsert.CompiledMatmul, sparsert.CompiledLinear):
        monkeypatch.setattr(kind, "_run", None)
        monkeypatch.setattr(kind, "__call__", None)
    for step, y in zip(bound, wanted, strict=True):
        assert same_bits(step(), y)


def test_a_bound_call_refuses_what_the_operator_does(weight: np.ndarray) -> None:
    op = sparsert.compile_matmul(weight)
    x = np.zeros((K, 20), np.float32)
    for arrays, kind in (((x.T,), ShapeError), ((x, x), ShapeError), ((x.astype(float),), DTypeError),
                         ((x, None, np.zeros((M, 20), np.float32)), UnsupportedError)):  # fmt: skip
        with pytest.raises(kind):
            op.bind(*arrays)


@pytest.mark.parametrize("target", COMPILED)
def test_a_bound_call_keeps_alive_what_it_needs(target: str, weight: np.ndarray, rng: np.random.Generator) -> None:
    x = normal(rng, K, 64)
    wanted = sparsert.compile_matmul(weight, target=target)(x)
    bound = sparsert.compile_matmul(weight, target=target).bind(x.copy())
    for _ in range(20):
        normal(rng, K, 64), sparsert.compile_matmul(weight, target=target)  # memory that was freed is used again
        assert same_bits(bound(), wanted)


@pytest.mark.parametrize("target", COMPILED)
def test_a_bound_call_in_many_threads(target: str, rng: np.random.Generator) -> None:
    """All write the same results to the same place, each with a frame of its own."""
    from concurrent.futures import ThreadPoolExecutor

    weight = dense_matrix(rng, 200, 200, 0.1)
    op = sparsert.compile_matmul(weight, target=target)
    x = normal(rng, 200, 300)
    bound = op.bind(x)
    wanted = bound().copy()
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda _: bound(), range(400)):
            pass
    assert same_bits(bound.out, wanted)


# ---- refit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_refit(target: str, weight: np.ndarray, rng: np.random.Generator) -> None:
    from scipy import sparse

    x, bias = normal(rng, K, 33), normal(rng, M)
    op = sparsert.compile_matmul(weight, bias, "relu", target=target)
    code = op.listing()
    new = np.where(weight != 0, normal(rng, M, K), 0).astype(np.float32)
    fewer = new.copy()
    fewer[::2] = 0
    csr = sparse.csr_matrix(new)
    forms = [
        (new, new), (fewer, fewer), (new.astype(np.float64), new), (as_sparse(new), new), (as_sparse(fewer), fewer),
        (csr, new), (sparse.coo_matrix(fewer), fewer), ((csr.data, csr.indices, csr.indptr, csr.shape), new),
    ]  # fmt: skip
    for form, dense in forms:
        op.refit(weight)
        op.refit(form)
        check(op(x), dense, x, bias, "relu")
    assert same_bits(op(x), sparsert.compile_matmul(new, bias, "relu", target=target)(x))
    assert op.listing() == code


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_refit_that_is_refused_changes_nothing(target: str, weight: np.ndarray, rng: np.random.Generator) -> None:
    x = normal(rng, K, 20)
    op = sparsert.compile_matmul(weight, target=target)
    before = op(x)
    outside, infinite, nan = weight.copy(), weight.copy(), weight.copy()
    outside[tuple(np.argwhere(weight == 0)[5])] = 1
    infinite[tuple(np.argwhere(weight)[3])] = np.inf
    nan[tuple(np.argwhere(weight)[0])] = np.nan
    refused = [
        (outside, PatternMismatchError), (as_sparse(outside), PatternMismatchError), (infinite, ValueRangeError),
        (nan, ValueRangeError), (weight.T, ShapeError), (weight[0], ShapeError), (weight.astype(np.int32), DTypeError),
        ((weight[0], [0], [0], (M, K)), FormatError),
    ]  # fmt: skip
    for new, kind in refused:
        with pytest.raises(kind) as caught:
            op.refit(new)
        assert caught.value.where == "new_weight"
        assert same_bits(op(x), before)


def test_arrays_given_are_copied(weight: np.ndarray, rng: np.random.Generator) -> None:
    bias, x, mine = normal(rng, M), normal(rng, K, 18), weight.copy()
    for target in ("native", "reference"):
        op = sparsert.compile_matmul(mine, bias, target=target)
        before = op(x)
        for values in (mine, bias):
            values += 1
        assert same_bits(op(x), before), target
        mine -= 1
        mine[weight == 0] = 0


# ---- NaN, infinities, subnormals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", EVERY_TARGET)
@pytest.mark.parametrize("activation", [None, "relu", "relu6", Clip(-1, 1), Clip(-np.inf, 2), Clip(0.5, np.inf)])
def test_nan_and_infinities(target: str, activation: Any, rng: np.random.Generator) -> None:
    weight = np.eye(20, 24, dtype=np.float32)
    weight[:, 20:] = rng.choice([0, 1, -1], (20, 4))
    x = np.zeros((24, 48), np.float32)
    x[:20] = rng.choice(np.array([np.nan, np.inf, -np.inf, 5.0, -5.0, 0.0, -0.0], np.float32), (20, 48))
    y = sparsert.compile_matmul(weight, activation=activation, target=target)(x)
    check(y, weight, x, None, activation)
    assert np.array_equal(np.isnan(y), np.isnan(x[:20]))


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_only_stored_entries_meet_infinity(target: str) -> None:
    x = np.full((2, 16), np.inf, np.float32)
    x[1] = 1
    stored = (np.array([0, 2], np.float32), np.array([0, 1]), np.array([0, 2]), (1, 2))
    assert np.isnan(sparsert.compile_matmul(stored, target=target)(x)).all()
    assert np.all(sparsert.compile_matmul(np.array([[0, 2]], np.float32), target=target)(x) == 2)


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_sums_that_overflow(target: str) -> None:
    x = np.full((2, 17), 3e38, np.float32)
    x[1] *= -1
    y = sparsert.compile_matmul(np.array([[1, -1], [-2, 0], [1, 0]], np.float32), target=target)(x)
    assert np.all(y[0] == np.inf)
    assert np.all(y[1] == -np.inf)
    assert np.all(y[2] == np.float32(3e38))


@pytest.mark.parametrize("target", EVERY_TARGET)
@pytest.mark.parametrize("columns", [3, 12, 16, 21])
def test_subnormals_are_numbers(target: str, columns: int, rng: np.random.Generator) -> None:
    weight = np.diag(rng.uniform(0.01, 1, 30)).astype(np.float32)
    x = (rng.uniform(-1, 1, (30, columns)) * 1e-38).astype(np.float32)
    product = np.diag(weight)[:, None] * x
    assert np.count_nonzero((product != 0) & (np.abs(product) < 2.0**-126)) > 0.9 * product.size
    assert same_bits(sparsert.compile_matmul(weight, target=target)(x), product)


# ---- what an operator tells ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", COMPILED)
def test_stats_and_explain(target: str, weight: np.ndarray, rng: np.random.Generator) -> None:
    op = sparsert.compile_matmul(weight, normal(rng, M), Clip(0, 6), residual="after", target=target, threads=3)
    nnz, s = int(np.count_nonzero(weight)), op.stats
    assert (s.nnz, s.density) == (nnz, nnz / (M * K))
    assert s.value_bytes == 4 * (nnz + M)
    assert s.bytes_per_nonzero == pytest.approx((s.code_bytes + s.value_bytes) / nnz)
    assert s.code_bytes > 7 * nnz
    assert s.instructions > nnz
    assert 1 <= s.fmas_per_load <= op.schedule.rows  # type: ignore[union-attr]
    assert s.compile_seconds > 0
    text = op.explain()
    for word in (
        f"{M}x{K}",
        "bias",
        "clip",
        "residual",
        target,
        f"{nnz} nonzeros",
        str(op.schedule),
        str(s.code_bytes),
        "up to 3",
    ):
        assert word in text
    assert (op.target, op.shape) == (target, (M, K))
    assert f"{M}x{K}" in repr(op)
    assert target in repr(op)
    listing = op.listing()
    assert listing.count("vfmadd") >= nnz
    assert "ret" in listing


def test_reference_tells_as_much(weight: np.ndarray) -> None:
    op = sparsert.compile_linear(weight, activation="gelu", target="reference")
    assert (op.stats.code_bytes, op.stats.instructions, op.schedule, op.target) == (0, 0, None, "reference")
    assert op.stats.nnz == np.count_nonzero(weight)
    assert "gelu" in op.explain()
    assert "no machine code" in op.listing()


@pytest.mark.parametrize("target", EVERY_TARGET)
def test_weights_in_every_form(target: str, weight: np.ndarray, rng: np.random.Generator) -> None:
    from scipy import sparse

    x = normal(rng, K, 16)
    csr = sparse.csr_matrix(weight)
    forms = [
        weight, weight.astype(np.float64), np.asfortranarray(weight), weight.tolist(), as_sparse(weight), csr,
        csr.tocoo(), csr.tocsc(), sparse.csr_array(weight), (csr.data, csr.indices, csr.indptr, csr.shape),
    ]  # fmt: skip
    wanted = sparsert.compile_matmul(weight, target=target)(x)
    check(wanted, weight, x)
    for form in forms:
        assert same_bits(sparsert.compile_matmul(form, target=target)(x), wanted)
