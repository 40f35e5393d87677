"""Convolutions with code for the size of their images: against float64, and to the bits of the general code."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sparsert
from oracle import same_bits
from sparsert import Planes, Schedule
from sparsert.errors import AliasError, DTypeError, ShapeError, ValueRangeError
from sparsert.kernels.arguments import Arg
from sparsert.kernels.lines import lines
from sparsert.operators.images import ConvProduct
from sparsert.runtime.host import host_report
from sparsert.schedule import cost
from sparsert.sparsity.pattern import as_sparse
from sparsert.sparsity.taps import Window

from .test_convolution import close, convolve, pruned

MASKED = pytest.mark.skipif(host_report()["targets"]["x86-avx512"] is not None, reason="no masked loads here")
Drawn = dict[str, Any]


def product_of(op: sparsert.CompiledConv) -> ConvProduct:
    product = op._compiled.product
    assert isinstance(product, ConvProduct)
    return product


def pair(monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> list[sparsert.CompiledConv]:
    """The operator, and the same without code for sizes."""
    ops = [sparsert.compile_conv2d(*args, **options) for _ in range(2)]
    monkeypatch.setattr(product_of(ops[1]), "tailors", False)
    return ops


def drawn(rng: np.random.Generator) -> Drawn:
    """Convolutions whose output rows are no shorter than their input rows, per phase."""

    def some(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    kernel, dilation = (some(1, 5), some(2, 5)), (some(1, 2), some(1, 3))
    span = (kernel[1] - 1) * dilation[1]
    left = some(0, span)
    stride = (1, 1) if rng.random() < 0.7 else (some(1, 2), some(1, 2))
    rows = (kernel[0] - 1) * dilation[0]
    top = some(0, rows + 1)
    groups = some(1, 3)
    return {
        "shape": (some(1, 3), some(1, 9) * groups, max(1, rows + 1 - top) + some(0, 12), some(1, 45)),
        "weight": (some(1, 40) * groups, kernel), "groups": groups,
        "options": {"stride": stride, "dilation": dilation, "groups": groups,
                    "padding": ((top, some(0, 3)), (left, span - left + some(0, 2))),
                    "residual": [None, "before", "after"][some(0, 2)], "activation": [None, "relu", "silu"][some(0, 2)],
                    "schedule": None if rng.random() < 0.6 else Schedule(some(1, 28), some(0, 60), some(0, 3),
                                                                        some(0, 2))},
    }  # fmt: skip


@MASKED
@pytest.mark.parametrize("part", range(6))
def test_drawn_convolutions(part: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    used = 0
    for _ in range(15):
        c = drawn(rng)
        (b, channels, h, w), (outputs, kernel), options = c["shape"], c["weight"], c["options"]
        weight = pruned(rng, (outputs, channels // c["groups"], *kernel), float(rng.choice([0.03, 0.1, 0.2])))
        x = rng.standard_normal((b, channels, h, w)).astype(np.float32)
        bias = rng.standard_normal(outputs).astype(np.float32) if rng.random() < 0.5 else None
        op, general = pair(monkeypatch, weight, bias, target="x86-avx512", **options)
        padding, act = options["padding"], options["activation"]
        want, magnitude = convolve(x, weight, options["stride"], padding, options["dilation"], c["groups"])
        r = rng.standard_normal(want.shape).astype(np.float32) if options["residual"] else None
        got = op(x, residual=r)
        assert same_bits(got, general(x, residual=r)), c
        if bias is not None:
            want, magnitude = want + bias[:, None, None], magnitude + np.abs(bias)[:, None, None]
        if act is None:
            want, magnitude = (want, magnitude) if r is None else (want + r, magnitude + np.abs(r))
            assert close(got, want, magnitude, weight[0].size + 2), c
        planes = Planes.of(x, max(map(max, padding)))
        assert same_bits(op(planes, residual=r), got), c
        used += bool(product_of(op)._by_window)
    assert used > 5


@MASKED
def test_every_width_and_alignment(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths of every residue, heights that leave every tail; y in place whose neighbours stay as they are."""
    weight = pruned(rng, (37, 5, 3, 3), 0.1)
    for width in range(1, 35):
        height = int(rng.integers(1, 9))
        op, general = pair(monkeypatch, weight, padding=1, target="x86-avx512")
        x = rng.standard_normal((2, 5, height, width)).astype(np.float32)
        want, magnitude = convolve(x, weight, (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
        y = np.full((2, 37, height * width + 3), 7, np.float32)
        view = y[:, :, : height * width].reshape(2, 37, height, width)
        assert view.base is not None
        assert op(x, out=view) is view
        assert close(view, want, magnitude, 46)
        assert same_bits(view, general(x))
        assert (y[:, :, height * width :] == 7).all()
        assert product_of(op)._by_window


@pytest.mark.parametrize("lanes", [4, 16])
def test_lines_are_loaded_once_and_in_time(lanes: int, rng: np.random.Generator) -> None:
    for _ in range(300):
        n = int(rng.integers(0, 30))
        chain, plane = np.sort(rng.integers(0, 3, n)), rng.integers(0, 3, n)
        place = rng.integers(0, 5 * lanes, n)
        order = np.unique(np.stack([chain, plane, place]), axis=1)
        chain, plane, place = order
        found = lines(place, plane, chain, lanes)
        held: dict[int, tuple[int, int, int]] = {}
        loads = 0
        for i in range(place.size):
            line, lane = divmod(int(place[i]), lanes)
            assert (line, lane) == (found.line[i], found.lane[i])
            for loaded, number in ((found.low[i], line), (found.high[i], line + 1)):
                if loaded:
                    mine = (int(chain[i]), int(plane[i]), number)
                    assert found.cut[i]
                    assert held.get(number % 2) != mine, "loaded twice"
                    held[number % 2], loads = mine, loads + 1
            if found.cut[i]:
                for number in (line, line + 1)[: 2 if lane else 1]:
                    assert held[number % 2] == (chain[i], plane[i], number)
        alone = int(np.count_nonzero(~found.cut))
        crossing = int(np.count_nonzero(found.lane > 0)) + place.size
        assert loads + 2 * alone - int(np.count_nonzero(~found.cut & (found.lane == 0))) <= crossing


@MASKED
def test_new_values_reach_code_for_sizes(rng: np.random.Generator) -> None:
    weight = pruned(rng, (33, 4, 3, 3), 0.2)
    bias = rng.standard_normal(33).astype(np.float32)
    op = sparsert.compile_conv2d(weight, bias, padding=1)
    first, second = (rng.standard_normal((1, 4, 6, width)).astype(np.float32) for width in (11, 14))
    bound = op.bind(first)
    op.refit(2 * weight)
    for x, got in ((first, bound()), (first, op(first)), (second, op(second))):
        want, magnitude = convolve(x, 2 * weight, (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
        assert close(got, want + bias[:, None, None], magnitude + 4, 40)
    assert len(product_of(op)._by_window) == 2


@MASKED
def test_code_for_sizes_is_bounded(rng: np.random.Generator) -> None:
    weight = pruned(rng, (33, 4, 3, 3), 0.2)
    op = sparsert.compile_conv2d(weight, padding=1)
    for width in range(3, 20):
        x = rng.standard_normal((1, 4, 3, width)).astype(np.float32)
        want, magnitude = convolve(x, weight, (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
        assert close(op(x), want, magnitude, 40)
    assert len(product_of(op)._by_window) == 8
    tight = sparsert.compile_conv2d(weight, padding=1, max_code_bytes=op.stats.code_bytes + 8)
    x = np.ones((1, 4, 3, 8), np.float32)
    assert same_bits(tight(x), op(x))
    assert not product_of(tight)._by_window, "there is no room for a second piece of code"
    assert "8 with code of their own" in op.explain()
    assert "of their own" not in tight.explain()


@MASKED
def test_one_code_serves_every_length_of_one_row(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = pruned(rng, (20, 30, 3), 0.1)
    op, general = (sparsert.compile_conv1d(weight, padding=1) for _ in range(2))
    monkeypatch.setattr(product_of(general), "tailors", False)
    for length in (3, 17, 160, 1001, 40_000):
        x = rng.standard_normal((2, 30, length)).astype(np.float32)
        assert same_bits(op(x), general(x))
    assert len(product_of(op)._by_window) == 1


def test_which_convolutions_get_such_code(rng: np.random.Generator) -> None:
    from sparsert.schedule.task import Task
    from sparsert.target import TARGETS

    def fits(density: float, masked: bool, target: str, kernel: tuple[int, int] = (3, 3)) -> bool:
        pattern = as_sparse(pruned(rng, (128, 40 * kernel[0] * kernel[1]), density)).pattern
        return cost.tailors(Task(pattern, window=Window(kernel, masked=masked)), TARGETS[target])

    assert fits(0.1, True, "x86-avx512")
    assert not fits(0.5, True, "x86-avx512"), "loads bound nothing"
    assert not fits(0.1, False, "x86-avx512")
    assert not fits(0.1, True, "x86-avx512", (1, 1)), "every load is aligned"
    assert not fits(0.1, True, "x86-avx2")


@MASKED
@pytest.mark.parametrize("density", [0.1, 0.6])
def test_code_goes_with_its_operator(density: float, rng: np.random.Generator) -> None:
    """Without a garbage collection: nothing refers to itself."""
    op = sparsert.compile_conv2d(pruned(rng, (40, 8, 3, 3), density), padding=1)
    op(np.ones((1, 8, 9, 9), np.float32))
    product = product_of(op)
    assert bool(product._by_window) == (density < 0.5)
    left = [weakref.ref(made) for made in (product, *product._by_window.values())]
    gc.disable()
    try:
        del op, product
        assert [ref() for ref in left] == [None] * len(left)
    finally:
        gc.enable()


@MASKED
def test_first_calls_that_meet(rng: np.random.Generator) -> None:
    weight = pruned(rng, (40, 8, 3, 3), 0.1)
    op = sparsert.compile_conv2d(weight, padding=1)
    arrays = [rng.standard_normal((1, 8, 9, width)).astype(np.float32) for width in (9, 12, 16, 23)] * 2
    results: list[NDArray[np.float32] | None] = [None] * len(arrays)
    gate = threading.Barrier(len(arrays))

    def work(i: int) -> None:
        gate.wait()
        for _ in range(20):
            results[i] = op(arrays[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(arrays))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for x, got in zip(arrays, results, strict=True):
        want, magnitude = convolve(x, weight, (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
        assert got is not None
        assert close(got, want, magnitude, 80)


# ---- planes ----------------------------------------------------------------------------------------------------------


def in_place(op: sparsert.CompiledConv) -> set[int]:
    """What frames say about x, of all sizes so far."""
    found = set()
    for made in product_of(op)._by_window.values():
        for binding in made._bindings.values():
            for frames in binding.free.values():
                found |= {int(frame.slots[Arg.X_DIRECT]) for frame in frames}  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("target", [name for name, reason in host_report()["targets"].items() if reason is None])
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (9, 21), (1, 1), (20, 16)])
def test_a_chain_of_planes(target: str, size: tuple[int, int], rng: np.random.Generator) -> None:
    weights = [pruned(rng, (40, 40, 3, 3), 0.05) for _ in range(3)]
    ops = [sparsert.compile_conv2d(w, activation="relu", padding=1, target=target, threads=1) for w in weights]
    x = rng.standard_normal((2, 40, *size)).astype(np.float32)
    want, planes = x, Planes.of(x)
    for op in ops:
        want = op(want)
        following = Planes(want.shape)
        got = op(planes, out=following)
        assert got is following.images
        assert same_bits(got, want)
        assert not around_images(following).any()
        planes = following
        bound = op.bind(Planes.of(x), out=Planes(x.shape))
        assert same_bits(bound(), op(x))
    if target == "x86-avx512" and min(size) > 1:
        assert 1 in in_place(ops[1])


def around_images(planes: Planes) -> NDArray[np.float32]:
    """All floats of the memory behind ``planes`` that belong to no image."""
    memory, own = planes._floats, planes.images
    start = (own.__array_interface__["data"][0] - memory.__array_interface__["data"][0]) // 4
    kept = np.ones(memory.size, bool)
    b, c, h, w = own.shape
    for image in range(b):
        for channel in range(c):
            first = start + (image * own.strides[0] + channel * own.strides[1]) // 4
            kept[first : first + h * w] = False
    return np.asarray(memory[kept])


@MASKED
def test_planes_that_are_copied_after_all(rng: np.random.Generator) -> None:
    """Too small a border, strides, output rows of another length: right, from scratch."""
    x = rng.standard_normal((2, 6, 13, 18)).astype(np.float32)
    for kernel, border, options in (
        (5, 1, {"padding": 2}), (3, 1, {"padding": 1, "stride": 2}), (3, 3, {"padding": 2}), (3, 1, {"padding": 0}),
        (3, 0, {"padding": 1}), (1, 1, {}), (3, 1, {"padding": 1, "groups": 6}),
    ):  # fmt: skip
        weight = pruned(rng, (36, 6 // options.get("groups", 1), kernel, kernel), 0.2)
        op = sparsert.compile_conv2d(weight, **options)
        assert same_bits(op(Planes.of(x, border)), op(x)), (kernel, border, options)
    large = sparsert.compile_conv2d(pruned(rng, (36, 6, 5, 5), 0.1), padding=2)
    assert same_bits(large(Planes.of(x, 2)), large(x))
    assert 1 in in_place(large)


@MASKED
def test_an_array_like_planes_is_no_planes(rng: np.random.Generator) -> None:
    """The same strides with something else around the images, after a call with planes."""
    weight = pruned(rng, (34, 4, 3, 3), 0.2)
    op = sparsert.compile_conv2d(weight, padding=1)
    planes = Planes.of(rng.standard_normal((1, 4, 8, 9)).astype(np.float32))
    out = Planes((1, 34, 8, 9))
    want = op(planes, out=out).copy()
    kept = planes.images.copy()
    planes._floats[...] = np.nan
    planes.images[...] = kept
    for _ in range(2):
        assert same_bits(op(planes.images, out=out.images), want)


@MASKED
def test_planes_on_threads_and_as_residual(rng: np.random.Generator) -> None:
    weight = pruned(rng, (64, 64, 3, 3), 0.09)
    x = Planes.of(rng.standard_normal((1, 64, 56, 56)).astype(np.float32))
    r = Planes.of(rng.standard_normal((1, 64, 56, 56)).astype(np.float32))
    one, two = (sparsert.compile_conv2d(weight, padding=1, residual="before", threads=n) for n in (1, 2))
    want = one(x.images, residual=r.images)
    for op in (one, two):
        assert same_bits(op(x, residual=r), want)
        y = Planes.of(r.images)
        op(x, out=y, residual=y)
        assert same_bits(y.images, want)
        assert not around_images(y).any()


def test_columns_of_planes_are_products(rng: np.random.Generator) -> None:
    x, y = Planes.of(rng.standard_normal((2, 12, 5, 9)).astype(np.float32)), Planes((2, 7, 5, 9))
    weight = pruned(rng, (7, 12), 0.4)
    op = sparsert.compile_matmul(weight)
    for image in range(2):
        op(x.columns[image], out=y.columns[image])
        want = weight.astype(np.float64) @ x.images[image].reshape(12, 45)
        assert np.allclose(y.images[image].reshape(7, 45), want, atol=1e-5)
    assert not around_images(y).any()


def test_what_planes_refuse() -> None:
    with pytest.raises(ShapeError, match="B, C, H, W"):
        Planes((1, 2, 3))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="B, C, H, W"):
        Planes((1, 2, 3, -1))
    for border in (-1, 1.5, True, 1 << 40):
        with pytest.raises(ValueRangeError, match="border"):
            Planes((1, 2, 3, 4), border)  # type: ignore[arg-type]
    with pytest.raises(ValueRangeError, match="allocated"):
        Planes((1 << 30, 1 << 20, 1 << 20, 8))
    with pytest.raises(DTypeError):
        Planes.of(np.zeros((1, 2, 3, 4)))
    with pytest.raises(ShapeError):
        Planes.of(np.zeros((2, 3, 4), np.float32))
    assert Planes((0, 3, 4, 5)).images.shape == (0, 3, 4, 5)
    assert Planes((2, 3, 0, 5)).columns.shape == (2, 3, 0)
    assert repr(Planes((2, 3, 4, 5), 2)) == "<Planes 2x3x4x5, border 2>"
    op = sparsert.compile_conv2d(np.ones((2, 2, 3, 3), np.float32), padding=1)
    x = Planes((1, 2, 4, 4))
    with pytest.raises(AliasError):
        op(x, out=x)
    with pytest.raises(ShapeError):
        op(x, out=Planes((1, 2, 4, 5)))
