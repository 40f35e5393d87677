"""Depthwise convolutions in place: the general form's bits, and not a byte outside of x, y and the residual."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

import sparsert
from sparsert.codegen import interpreter
from sparsert.errors import ShapeError
from sparsert.kernels import depthwise
from sparsert.kernels.arguments import SLOTS, Arg
from sparsert.runtime.host import host_report
from sparsert.schedule import cost
from sparsert.schedule.task import Task
from sparsert.sparsity.geometry import Geometry, padding
from sparsert.sparsity.pattern import as_sparse
from sparsert.sparsity.taps import Window
from sparsert.target import TARGETS
from unit.test_convolution import close, convolve, pruned

AVX512 = TARGETS["x86-avx512"]
SIZES = ((1, 1), (2, 3), (1, 17), (7, 7), (14, 14), (5, 9), (16, 16), (28, 28), (33, 17), (20, 56), (3, 40), (31, 4))
native = pytest.mark.skipif(
    host_report()["targets"]["x86-avx512"] is not None, reason="this machine does not execute AVX-512"
)


def shaped(size: tuple[int, int], stride: tuple[int, int], pads: Any, k: int, bias: bool, residual: str | None) -> Any:
    """Task and shape for three channels whose rows lie back to back; None where the image is too small."""
    rule = padding(pads)
    window = Window((k, k), stride, groups=3)
    window = Window((k, k), stride, groups=3, masked=rule.covers(window))
    task = Task(as_sparse(np.ones((3, k * k), np.float32)).pattern, bias, "relu", (), residual, window=window)
    geometry = Geometry(window, size, rule.resolve(size, window))
    try:
        row = 4 * geometry.out[1]
    except ShapeError:
        return None
    return task, depthwise.Shape(geometry, 4 * size[1], row, row if residual else 0)


CASES = list(product(SIZES, ((1, 1), (2, 2), (2, 1), (1, 2)), (1, "same_upper", 0, ((0, 1), (0, 1))), (3, 5)))


@pytest.mark.parametrize("part", range(6))
def test_the_program_reads_and_writes_nothing_else(part: int, rng: np.random.Generator) -> None:
    """In the interpreter, whose memory ends where x and y do; results are those of float64."""
    ran = 0
    for number, (size, stride, pads, k) in enumerate(CASES):
        if number % 6 != part or (number // 6) % 2:
            continue
        bias, residual = bool(number % 4 < 2), "before" if number % 3 == 0 else None
        made = shaped(size, stride, pads, k, bias, residual)
        if made is None or not depthwise.fits(made[0], AVX512):
            continue
        task, shape = made
        found = depthwise.generate(task, AVX512, shape)
        if found is None:
            continue
        program, table, plan = found
        ran += 1
        g = shape.geometry
        w, b = rng.standard_normal((3, 1, k, k)).astype(np.float32), rng.standard_normal(3).astype(np.float32)
        x = rng.standard_normal((2, 3, *size)).astype(np.float32)
        r = rng.standard_normal((2, 3, *g.out)).astype(np.float32)
        y = np.full((2, 3, *g.out), np.float32(-7e33))
        packed = np.ascontiguousarray(depthwise.pack(task, w.reshape(-1), b if bias else None))
        numbers = np.arange(32, dtype=np.int32).reshape(16, 2).T.copy()
        memory = {name: interpreter.region(at << 24, array) for at, (name, array) in enumerate(
            {"x": x, "y": y, "r": r, "w": packed, "masks": table, "numbers": numbers}.items(), 1)}  # fmt: skip
        args = np.zeros(SLOTS, np.int64)
        slots = {Arg.X: "x", Arg.Y: "y", Arg.R: "r", Arg.W: "w", Arg.MASKS: "masks", Arg.PANEL: "numbers"}
        for slot, name in slots.items():
            args[slot] = memory[name].address
        args[Arg.IMAGES], args[Arg.X_LAST], args[Arg.Y_LAST] = 3, plan.blocks[-1], plan.tiles[-1]
        args[Arg.X_IMAGE], args[Arg.Y_IMAGE], args[Arg.R_IMAGE] = (a[0, 0].nbytes for a in (x, y, r))
        args[Arg.GROUP] = 2  # images, whose channels lie behind each other
        interpreter.run(program, 16, args, memory)
        want, magnitude = convolve(x, w, stride, g.pads, (1, 1), 3)
        want = want + (b[:, None, None] if bias else 0) + (r if residual else 0)
        assert close(y, np.maximum(want, 0), magnitude + 9, k * k + 2), (size, stride, pads, k)
    assert ran > 8


@native
def test_the_bits_do_not_depend_on_the_threads(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of channels or of images, whose arrays may have gaps between channels and images."""
    monkeypatch.setattr(cost, "LEAST_SHARE", 1)
    said = set()
    for images, channels, size, stride, residual in (
        (1, 5, 7, 1, None), (1, 12, 20, 2, "after"), (3, 8, 14, 1, "before"), (4, 3, 9, 1, None),
        (7, 2, 33, 1, "after"), (2, 1, 8, 1, None), (1, 1, 40, 1, None),
    ):  # fmt: skip
        w, bias = pruned(rng, (channels, 1, 3, 3), 2.0), rng.standard_normal(channels).astype(np.float32)
        whole = rng.standard_normal((images, channels + 2, size + 1, size)).astype(np.float32)
        x, want = whole[:, 1:-1, 1:], None
        for threads in (1, 2, 3, 7):
            op = sparsert.compile_conv2d(w, bias, "silu", stride=stride, padding=1, groups=channels, residual=residual,
                                         threads=threads, target="x86-avx512")  # fmt: skip
            r = np.resize(whole, op.out_shape(x.shape)) if residual else None
            y = op(x, residual=r)
            want = y if want is None else want
            gaps = np.full((images + 1, channels + 3, *y.shape[2:]), -7e33, np.float32)
            op(x, out=gaps[:-1, 2:-1], residual=r)
            assert np.array_equal(y, want)
            assert np.array_equal(gaps[:-1, 2:-1], want)
            assert (gaps[-1] == np.float32(-7e33)).all()
            assert (gaps[:, :2] == np.float32(-7e33)).all()
            assert np.array_equal(op.bind(x, residual=r)(), want)
            op.refit(-w)
            new = sparsert.compile_conv2d(
                -w, bias, "silu", stride=stride, padding=1, groups=channels, residual=residual
            )
            assert np.array_equal(op(x, residual=r), new(x, residual=r))
            said |= {f"{threads} {word}" for word in ("channels", "images") if f"ranges of {word}" in op.explain()}
    assert said == {f"{n} {word}" for n in (2, 3, 7) for word in ("channels", "images")}


@native
def test_the_bits_are_those_of_the_general_form(rng: np.random.Generator) -> None:
    """An output with gaps between its rows gets the general form."""
    made = 0
    for number, (size, stride, pads, k) in enumerate(CASES):
        w = pruned(rng, (5, 1, k, k), 2.0)
        bias = rng.standard_normal(5).astype(np.float32) if number % 2 else None
        residual = (None, "before", "after")[number % 3]
        activation = (None, "relu6", "gelu", "silu")[number % 4]
        op = sparsert.compile_conv2d(w, bias, activation, padding=pads, stride=stride, groups=5, residual=residual)
        x = rng.standard_normal((2, 5, *size)).astype(np.float32)
        x[0, 1, 0, 0], x[1, 4, -1, -1], x[0, 0, size[0] // 2, 0] = np.nan, np.inf, -0.0
        try:
            shape = op.out_shape(x.shape)
        except ShapeError:
            continue
        r = rng.standard_normal(shape).astype(np.float32) if residual else None
        gaps = np.empty((*shape[:3], shape[3] + 1), np.float32)[..., :-1]
        y = op(x, residual=r)
        op(x, out=gaps, residual=r)
        made += any(getattr(op._compiled.product, "_by_shape", {}).values())
        assert np.array_equal(y.view(np.int32) & _same(y), gaps.copy().view(np.int32) & _same(y)), (size, stride, pads)
        assert np.array_equal(np.isnan(y), np.isnan(gaps))
        wide = np.zeros((2, 5, size[0], size[1] + 3), np.float32)  # and an input with gaps
        wide[..., : size[1]] = x
        assert np.array_equal(op(wide[..., : size[1]], residual=r), y, equal_nan=True)
    assert made > len(CASES) // 3


def _same(y: np.ndarray) -> np.ndarray:
    """The bits that count: none of a NaN."""
    return np.where(np.isnan(y), 0, -1).astype(np.int32)


def test_the_zeros_of_padding_are_summed_like_any_other(rng: np.random.Generator) -> None:
    """The signs of sums of zeros tell."""
    w = pruned(rng, (4, 1, 3, 3), 2.0)
    op = sparsert.compile_conv2d(w, padding=1, groups=4)
    x = np.full((1, 4, 14, 14), -0.0, np.float32)
    gaps = np.empty((1, 4, 14, 15), np.float32)[..., :-1]
    assert np.array_equal(np.signbit(op(x)), np.signbit(op(x, out=gaps)))


@native
@pytest.mark.parametrize("dilation", [(10, 18), (5, 1), (2, 3)])
def test_blocks_of_widely_dilated_kernels_fit_the_registers(
    dilation: tuple[int, int], rng: np.random.Generator
) -> None:
    """More rows hold more vectors, where the lines that a row reads are far apart."""
    w = pruned(rng, (3, 1, 3, 3), 2.0)
    for stride, size in (((2, 1), 60), ((1, 1), 40), ((2, 2), 70), ((3, 1), 90)):
        op = sparsert.compile_conv2d(w, stride=stride, padding=dilation, dilation=dilation, groups=3)
        x = rng.standard_normal((1, 3, size, size)).astype(np.float32)
        want, magnitude = convolve(x, w, stride, tuple((d, d) for d in dilation), dilation, 3)
        assert close(op(x), want, magnitude, 11)


def test_kernel_columns_that_lie_beside_the_image_everywhere(rng: np.random.Generator) -> None:
    """Nothing of their vectors is in the image: they are zeros, not turned out of others."""
    weight, bias = rng.standard_normal((13, 1, 3, 3), np.float32), rng.standard_normal(13, np.float32)
    x = rng.standard_normal((2, 13, 8, 6), np.float32)
    geometry = {"dilation": (2, 23), "padding": ((34, 35), (1, 48)), "groups": 13}
    wanted = sparsert.compile_conv2d(weight, bias, target="reference", **geometry)(x)
    got = sparsert.compile_conv2d(weight, bias, **geometry)(x)
    assert np.abs(got - wanted).max() < 1e-5
