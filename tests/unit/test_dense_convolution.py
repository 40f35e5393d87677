"""Dense convolutions: against float64, and bit by bit against the sparse form, the interpreter and other blockings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sparsert
from oracle import COMPILED, same_bits
from sparsert.codegen.assemble import assemble
from sparsert.codegen.interpreter import region, run
from sparsert.errors import CodeBudgetError, PatternMismatchError, ScheduleError, ShapeError, ValueRangeError
from sparsert.kernels.dense import generate
from sparsert.kernels.dense_arguments import Form, Slot
from sparsert.kernels.dense_micro import VECTORS
from sparsert.operators import dense_conv
from sparsert.operators.dense import Code, code_of, pack_panels, pack_rows, spread_pitch
from sparsert.operators.dense_conv import DenseConv
from sparsert.operators.dense_images import Image, columns_frame, positions_of, rows_frame
from sparsert.operators.dense_parts import Extents, Share, Shift, blocks_of_rows, share_out
from sparsert.operators.team import Crew
from sparsert.runtime.cpu import address_of
from sparsert.schedule import cost
from sparsert.schedule.dense import DenseSchedule
from sparsert.sparsity.geometry import Geometry, padding
from sparsert.sparsity.taps import Window
from sparsert.sparsity.views import Views, full_taps
from sparsert.target import TARGETS
from unit.test_convolution import close, convolve, drawn

Array = NDArray[np.float32]
compiled = pytest.mark.parametrize("target", COMPILED)


def full(rng: np.random.Generator, *shape: int) -> Array:
    """Normal values without a zero."""
    values = rng.standard_normal(shape).astype(np.float32)
    return np.where(values == 0, np.float32(1), values)


def arguments(c: dict[str, Any], bias: Array | None = None) -> dict[str, Any]:
    names = ("stride", "dilation", "groups", "residual")
    return {name: c[name] for name in names} | {"padding": c["pads"], "bias": bias}


def fits(c: dict[str, Any]) -> bool:
    """Whether the padded image is as large as the kernel."""
    spans = [(k - 1) * d + 1 for k, d in zip(c["kernel"], c["dilation"], strict=True)]
    return all(n + sum(p) >= span for n, p, span in zip(c["size"], c["pads"], spans, strict=True))


def always(m: int, columns: int, k: int, target: Any) -> bool:
    """In the place of :func:`turns_image`: wherever the transposed product can be computed."""
    return m >= target.lanes and columns >= target.lanes


@compiled
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("part", range(4))
def test_drawn_convolutions(
    target: str, turned: bool, part: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float64 form, and the bits of the sparse one: with x as it is, with gaps, and into strided arrays."""
    monkeypatch.setattr(dense_conv, "turns_image", always if turned else lambda *_: False)
    for _ in range(10):
        c = drawn(rng)
        c["outputs"] += 20 * (c["groups"] == 1)
        if not fits(c):
            continue
        w = full(rng, c["outputs"], c["inputs"] // c["groups"], *c["kernel"])
        x = full(rng, c["images"], c["inputs"], c["size"][0] + 1, c["size"][1] + 3)[:, :, 1:, 2:-1]
        bias = full(rng, c["outputs"]) if c["bias"] else None
        activation = str(rng.choice(["relu", "silu"])) if rng.random() < 0.5 else None
        dense, sparse = (
            sparsert.compile_conv2d(w, activation=activation, target=target, form=form, **arguments(c, bias))
            for form in ("dense", "sparse")
        )
        assert isinstance(dense.schedule, DenseSchedule)
        shape = dense.out_shape(x.shape)
        r = full(rng, *shape) if c["residual"] else None
        y = dense(np.ascontiguousarray(x), residual=r)
        assert same_bits(y, sparse(x, residual=r)), c
        assert same_bits(y, dense(x, residual=r)), c
        wide = np.full((*shape[:3], shape[3] + 5), 7, np.float32)
        assert same_bits(dense(x, out=wide[..., 2:-3], residual=r), y), c
        assert (np.delete(wide, range(2, 2 + shape[3]), 3) == 7).all()
        if r is not None:
            own = r.copy()
            assert same_bits(dense(x, out=own, residual=own), y), c
        if activation is None and r is None:
            want, magnitude = convolve(x, w, c["stride"], c["pads"], c["dilation"], c["groups"])
            want, magnitude = (want, magnitude) if bias is None else (
                want + bias[:, None, None], magnitude + np.abs(bias[:, None, None]))  # fmt: skip
            assert close(y, want, magnitude, int(np.prod(w.shape[1:])) + 1), c
        step = dense.bind(x, residual=r)
        step.out[...] = 0
        assert same_bits(step(), y), c


@compiled
@pytest.mark.parametrize(
    ("channels", "groups", "stride", "dilation"),
    [(700, 1, 1, 1), (700, 1, 2, 1), (500, 1, (1, 3), (2, 1)), (1100, 2, 1, 1), (1100, 2, (2, 1), 1)],
)
def test_long_sums_are_those_of_the_sparse_form(
    target: str, channels: int, groups: int, stride: Any, dilation: Any, rng: np.random.Generator
) -> None:
    """More than 4096 products, summed in pieces whose borders lie anywhere in a kernel."""
    w, bias, x = full(rng, 34, channels // groups, 3, 3), full(rng, 34), full(rng, 2, channels, 7, 7)
    r = full(rng, 2, 34, *sparsert.compile_conv2d(w, stride=stride, dilation=dilation, groups=groups, padding=1,
                                                  target=target, form="dense").out_shape(x.shape)[2:])  # fmt: skip
    dense, sparse = (
        sparsert.compile_conv2d(w, bias, "relu", stride=stride, dilation=dilation, groups=groups, padding=1,
                                residual="before", target=target, form=form)
        for form in ("dense", "sparse")
    )  # fmt: skip
    want = sparse(x, residual=r)
    assert same_bits(dense(x, residual=r), want)
    assert same_bits(dense(x, out=r, residual=r), want)  # y holds sums of pieces while r is still to be read


@compiled
@pytest.mark.parametrize("size", [(7, 7), (6, 14), (5, 5)])
def test_the_sign_of_zeros(target: str, size: tuple[int, int], rng: np.random.Generator) -> None:
    """Kernel rows that lie beside the image are left out: sums of zeros have the sign that they would have."""
    for sign in (1, -1, 0):
        w = np.abs(full(rng, 64, 2, 3, 3)) * (sign or rng.choice([-1, 1], (64, 2, 3, 3)))
        w[:32, :, 0] *= -1
        x = np.where(rng.random((1, 2, *size)) < 0.7, 0, -0.0).astype(np.float32)
        for bias in (None, np.full(64, -0.0, np.float32), full(rng, 64)):
            ops = [sparsert.compile_conv2d(w.astype(np.float32), bias, padding=1, target=target, form=form)
                   for form in ("dense", "sparse")]  # fmt: skip
            assert same_bits(ops[0](x), ops[1](x))
            for op in ops:
                op.refit(-w.astype(np.float32))
            assert same_bits(ops[0](x), ops[1](x))


def test_kernel_rows_beside_the_image_are_left_out() -> None:
    window = Window((3, 3), masked=True)
    views = Views(Geometry(window, (7, 7), ((1, 1), (1, 1))), 0, 49, 28, padded=True)
    found = positions_of(views, 14)
    assert found.blocks == (7, 0, 7)
    assert [found.skipped[kind] for kind in found.kinds] == [(0, 1, 2), *[()] * 5, (6, 7, 8)]
    longer = Views(Geometry(window, (20, 20), ((1, 1), (1, 1))), 0, 400, 80, padded=True)
    assert positions_of(longer, 14).blocks == blocks_of_rows(400, 14)


@compiled
def test_zeros_are_factors(target: str, rng: np.random.Generator) -> None:
    w, x = full(rng, 40, 6, 3, 3), full(rng, 1, 6, 7, 7)
    w[:, 2, 1, 1] = 0
    x[0, 2, 3, 3] = np.inf
    dense, sparse = (sparsert.compile_conv2d(w, padding=1, target=target, form=form) for form in ("dense", None))
    assert np.isnan(dense(x)[:, :, 3, 3]).all()
    assert not np.isnan(sparse(x)[:, :, 3, 3]).any()
    w[3, 4, 0, 0] = np.nan
    with pytest.raises(ValueRangeError):
        sparsert.compile_conv2d(w, padding=1, target=target, form="dense")


@compiled
def test_when_the_dense_form_is_chosen(target: str, rng: np.random.Generator) -> None:
    w, x = full(rng, 32, 32, 3, 3), full(rng, 2, 32, 9, 9)
    op = sparsert.compile_conv2d(w, padding=1, target=target)
    assert isinstance(op.schedule, DenseSchedule)
    assert "32x32x3x3 dense convolution" in op.explain()
    assert "no weight is zero" in op.explain()
    assert "fma" in op.listing()
    for options in ({"form": "sparse"}, {"schedule": sparsert.Schedule(4)}):
        other = sparsert.compile_conv2d(w, padding=1, target=target, **options)
        assert isinstance(other.schedule, sparsert.Schedule)
        assert "sparse convolution" in other.explain()
        assert same_bits(other(x), op(x))
    small = sparsert.compile_conv2d(w, padding=1, target=target, max_code_bytes=500_000)
    assert same_bits(small(x), op(x))
    depthwise = sparsert.compile_conv2d(full(rng, 999, 1, 3, 3), padding=1, groups=999, target=target)
    assert isinstance(depthwise.schedule, sparsert.Schedule)
    w[0, 0, 0, 0] = 0
    assert isinstance(sparsert.compile_conv2d(w, target=target).schedule, sparsert.Schedule)
    with pytest.raises(CodeBudgetError):
        sparsert.compile_conv2d(w, target=target, form="dense", max_code_bytes=1000)
    with pytest.raises(ScheduleError):
        sparsert.compile_conv2d(w, target=target, form="dense", schedule=sparsert.Schedule(4))
    dense = sparsert.compile_conv2d(w, target=target, form="dense")
    with pytest.raises(PatternMismatchError):
        dense.refit(full(rng, 32, 32, 3, 3))
    with pytest.raises(ShapeError, match="smaller than"):
        dense(full(rng, 1, 32, 2, 9))


@compiled
def test_new_values_of_a_transposed_convolution_and_of_one_axis(target: str, rng: np.random.Generator) -> None:
    w, x = full(rng, 6, 8, 4, 3), full(rng, 2, 6, 9, 11)
    ops = [sparsert.compile_conv_transpose2d(w, stride=(2, 1), padding=1, target=target, form=form)
           for form in ("dense", "sparse")]  # fmt: skip
    assert same_bits(ops[0](x), ops[1](x))
    assert "dense convolution" in ops[0].explain()
    for op in ops:
        op.refit(2 * w)
    assert same_bits(ops[0](x), ops[1](x))
    w, x = full(rng, 40, 8, 5), full(rng, 3, 8, 50)
    for stride in (1, 2, 3):
        lines = [sparsert.compile_conv1d(w, stride=stride, padding=2, target=target, form=form)
                 for form in ("dense", "sparse")]  # fmt: skip
        assert same_bits(lines[0](x), lines[1](x))
        for line in lines:
            line.refit(2 * w)
        assert same_bits(lines[0](x), lines[1](x))


# ---- threads --------------------------------------------------------------------------------------------------------
@compiled
def test_the_bits_of_one_thread(target: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of every kind, cut into matrices, columns and rows."""
    monkeypatch.setattr(cost, "LEAST_SHARE", 50)
    ways: set[str] = set()
    for _ in range(12):
        c = drawn(rng)
        c["outputs"] += 20 * (c["groups"] == 1)
        if fits(c):
            w = full(rng, c["outputs"], c["inputs"] // c["groups"], *c["kernel"])
            x, bias = full(rng, c["images"], c["inputs"], *c["size"]), full(rng, c["outputs"])
            convs = [sparsert.compile_conv2d(w, target=target, form="dense", threads=n, **arguments(c, bias))
                     for n in (1, 2, 3)]  # fmt: skip
            r = full(rng, *convs[0].out_shape(x.shape)) if c["residual"] else None
            results = [conv(x, residual=r) for conv in convs]
            assert all(same_bits(y, results[0]) for y in results), c
        m, k, n = (int(rng.integers(4, 120)) for _ in range(3))
        w, x, r = full(rng, m, k), full(rng, k, n), full(rng, m, n)
        results = []
        for threads in (1, 2, 3):
            options: dict[str, Any] = {"residual": "before", "form": "dense", "threads": threads, "target": target}
            op = sparsert.compile_matmul(w, None, "silu", **options)
            results += [op(x, residual=r), sparsert.compile_linear(w, None, "silu", **options)(x.T, residual=r.T).T]
            own = r.copy()
            results.append(op(x, out=own, residual=own))
            ways.add(op.explain())
        assert all(same_bits(y, results[0]) for y in results), (m, k, n)
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            left, right = full(rng, 3, *((k, m) if a else (m, k))), full(rng, 3, *((n, k) if b else (k, n)))
            products = [sparsert.compile_product(transpose_a=bool(a), transpose_b=bool(b), threads=t, target=target)
                        for t in (1, 2, 3)]  # fmt: skip
            results = [product(left, right) for product in products]
            assert all(same_bits(y, results[0]) for y in results), (m, k, n, a, b)
            ways.add(products[2].explain())
    for kind in ("matrices", "columns", "rows"):
        assert any(f"ranges of {kind}" in words for words in ways), kind


def test_every_element_belongs_to_one_part() -> None:
    class Three(Crew):
        def wanted(self, work: int) -> int:
            return 3

    crew = Three(lambda: None, 3)  # type: ignore[arg-type, return-value]
    for m, n, batch in ((71, 33, 1), (5, 500, 1), (14, 31, 7), (29, 96, 2)):
        e = Extents(batch, m, n, 40, 4, 4 * n, 4 * n, c_batch=4 * m * n)
        for among in (("matrices",), ("columns",), ("rows",)):
            shares, _ = share_out(e, 14, 16, crew, a="columns", b="rows", bias="rows", among=among)
            seen = np.zeros((batch, m, n), int)
            for share in shares:
                z, rest = divmod(share.shift.c, e.c_batch) if among == ("matrices",) else (0, share.shift.c)
                i, j = divmod(rest, e.c_pitch)
                seen[z : z + share.extents.batch, i : i + share.extents.m,
                     j // 4 : j // 4 + share.extents.n] += 1  # fmt: skip
                assert share.blocks.rows == share.extents.m
                assert share.blocks.size <= 14
            assert (seen == 1).all()


# ---- programs -------------------------------------------------------------------------------------------------------
def planes_of(made: Any) -> dict[str, NDArray[Any]]:
    return {f"table {i}": array for i, array in enumerate(made.kept)}


@pytest.mark.parametrize("target", [*COMPILED, "aarch64-neon"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2)])
def test_the_interpreter_gives_the_same(
    target: str, turned: bool, stride: tuple[int, int], rng: np.random.Generator
) -> None:
    """On regions of exactly the arrays' sizes: any access outside is an error there."""
    found, m, channels, size, k_block = TARGETS[target], 19, 2, (5, 6), 7
    window = Window((3, 3), stride)
    geometry = Geometry(window, size, padding(1).resolve(size, window))
    n, k = geometry.out[0] * geometry.out[1], channels * 9
    w, x, bias = full(rng, m, k), full(rng, 2, channels, *size), full(rng, m)
    ordered = w[:, np.argsort(full_taps(k, window).key)]
    step, borders = stride[1], (0, k_block, 2 * k_block, k)
    form = Form("image", "rows", "columns", step=step) if turned else Form("columns", "image", "rows", step=step)
    kernel = generate(form, found)
    assert assemble(kernel.program, found.isa).code
    code = Code(form, found, kernel.rows, None, 0, 0)  # type: ignore[arg-type]
    views = Views(geometry, 0, n, 4 * size[1], padded=turned)
    image, schedule = Image(channels, 4 * size[0] * size[1], 0), DenseSchedule(k_block, 2)
    if turned:
        packed, pitch, panel = pack_panels(ordered, found.lanes)
        images, y = 1, np.full((1, n, spread_pitch(m) // 4), np.nan, np.float32)
        rows = positions_of(views, kernel.rows)
        e = Extents(1, n, m, k, 0, pitch, spread_pitch(m), panel=panel)
        made = rows_frame(code, Share(e, rows.blocks, Shift()), schedule, borders, views, rows, image, m)
        starts = np.tile(bias, len(rows.skipped))
        made.slots[Slot.BIAS] = address_of(starts)
        made.point(address_of(x), address_of(packed), address_of(y), 0)
    else:
        packed, pitch, block = pack_rows(ordered, kernel.rows)
        images, y, starts = 2, np.full((2, m, n), np.nan, np.float32), bias
        e = Extents(2, m, n, k, pitch, 0, 4 * n, 0, 0, x.strides[0], y.strides[0], 0, block)
        share = Share(e, blocks_of_rows(m, kernel.rows), Shift())
        made = columns_frame(code, share, schedule, borders, views, image)
        made.slots[Slot.BIAS] = address_of(starts)
        made.point(address_of(packed), address_of(x), address_of(y), 0)
    arrays = {"x": x[:images], "w": packed, "y": y, "bias": starts, "scratch": made.scratch} | planes_of(made)
    run(kernel.program, found.lanes, made.slots, {name: region(address_of(a), a) for name, a in arrays.items()})
    want, magnitude = convolve(x[:images], w.reshape(m, channels, 3, 3), stride, geometry.pads, (1, 1), 1)
    got = y[:, :, :m].transpose(0, 2, 1) if turned else y
    want, magnitude = (a.reshape(images, m, n) + b[:, None] for a, b in ((want, bias), (magnitude, np.abs(bias))))
    assert close(got, want, magnitude, k + 1)
    if target in COMPILED:
        again = y.copy()
        y[...] = np.nan
        code_of(form, found).executable.call(made.address)
        assert same_bits(y[:, :, :m], again[:, :, :m])
    assert VECTORS == 2
    assert DenseConv.narrowest == 0
