"""Convolutions against an independent float64 form: every parameter drawn, both compiled targets and the reference."""

from __future__ import annotations

import contextlib
import threading
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sparsert
from sparsert import Clip, Schedule
from sparsert.errors import AliasError, PatternMismatchError, ShapeError, UnsupportedError, ValueRangeError
from sparsert.operators import depthwise as depthwise_module
from sparsert.operators import images
from sparsert.operators.depthwise import DepthwiseProduct
from sparsert.runtime.host import host_report
from sparsert.schedule import cost
from sparsert.sparsity.geometry import Geometry, padding
from sparsert.sparsity.pattern import as_sparse
from sparsert.sparsity.taps import Window, conv_taps

TARGETS = [name for name, reason in host_report()["targets"].items() if reason is None]
F64 = NDArray[np.float64]


def convolve(x: Any, w: Any, stride: Any, pads: Any, dilation: Any, groups: int) -> tuple[F64, F64]:
    """The convolution and the sum of magnitudes, in float64, kernel place by kernel place."""
    wide, size = (np.pad(a.astype(np.float64), ((0, 0), (0, 0), *pads)) for a in (x, np.abs(x)))
    outputs, channels, kh, kw = w.shape
    rows, columns = (
        (n - (k - 1) * d - 1) // s + 1 for n, k, d, s in zip(wide.shape[2:], (kh, kw), dilation, stride, strict=True)
    )
    y, magnitude = (np.zeros((x.shape[0], outputs, rows, columns)) for _ in range(2))
    each = outputs // groups
    for g, i, j in product(range(groups), range(kh), range(kw)):
        at = np.s_[
            :, g * channels : (g + 1) * channels,
            i * dilation[0] : i * dilation[0] + (rows - 1) * stride[0] + 1 : stride[0],
            j * dilation[1] : j * dilation[1] + (columns - 1) * stride[1] + 1 : stride[1],
        ]  # fmt: skip
        part = w[g * each : (g + 1) * each, :, i, j].astype(np.float64)
        y[:, g * each : (g + 1) * each] += np.einsum("oc,bchw->bohw", part, wide[at])
        magnitude[:, g * each : (g + 1) * each] += np.einsum("oc,bchw->bohw", np.abs(part), size[at])
    return y, magnitude


def pruned(rng: np.random.Generator, shape: tuple[int, ...], density: float) -> NDArray[np.float32]:
    return np.where(rng.random(shape) < density, rng.standard_normal(shape), 0).astype(np.float32)


def close(got: Any, want: F64, magnitude: F64, terms: int) -> bool:
    """The project's bound: 1e-6 * sqrt(terms) * sum of |terms|, and the rounding of what was added."""
    return bool(np.all(np.abs(got - want) <= 1e-6 * np.sqrt(terms) * (magnitude + 1) + 4 * np.spacing(np.float32(1))))


def drawn(rng: np.random.Generator) -> dict[str, Any]:
    def some(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    groups = some(2, 3) if rng.random() < 0.25 else 1
    c: dict[str, Any] = {
        "groups": groups, "inputs": some(1, 6) * groups, "outputs": some(1, 20) * groups,
        "kernel": (some(1, 4), some(1, 4)), "stride": (some(1, 3), some(1, 3)), "dilation": (some(1, 3), some(1, 3)),
        "pads": ((some(0, 3), some(0, 3)), (some(0, 3), some(0, 3))), "size": (some(1, 40), some(1, 40)),
        "images": some(0, 3), "residual": [None, "before", "after"][some(0, 2)], "bias": rng.random() < 0.5,
        "density": float(rng.choice([0.05, 0.2, 1.0])),
    }  # fmt: skip
    kind = rng.random()
    if kind < 0.2:  # as a network has them: y as large as x
        k = int(rng.choice([1, 3, 5]))
        c |= {"kernel": (k, k), "pads": ((k // 2, k // 2),) * 2, "dilation": (1, 1)}
    elif kind < 0.4:  # depthwise
        n = some(1, 20)
        c |= {"groups": n, "inputs": n, "outputs": n, "kernel": (3, 3), "dilation": (1, 1), "pads": ((1, 1), (1, 1)),
              "density": 2.0}  # fmt: skip
    return c


def problems(c: dict[str, Any], rng: np.random.Generator) -> list[str]:
    """What goes wrong with a drawn convolution, on all targets."""
    (b, ci, co), g = (c["images"], c["inputs"], c["outputs"]), c["groups"]
    w = pruned(rng, (co, ci // g, *c["kernel"]), c["density"])
    x = rng.standard_normal((b, ci, *c["size"])).astype(np.float32)
    bias = rng.standard_normal(co).astype(np.float32) if c["bias"] else None
    ops = {
        target: sparsert.compile_conv2d(
            w, bias, stride=c["stride"], padding=c["pads"], dilation=c["dilation"], groups=g, residual=c["residual"],
            target=target,
        )
        for target in TARGETS
    }  # fmt: skip
    spans = [(k - 1) * d + 1 for k, d in zip(c["kernel"], c["dilation"], strict=True)]
    if any(n + sum(p) < span for n, p, span in zip(c["size"], c["pads"], spans, strict=True)):
        for op in ops.values():
            with pytest.raises(ShapeError, match="smaller than"):
                op(x)
        return []
    want, magnitude = convolve(x, w, c["stride"], c["pads"], c["dilation"], g)
    if bias is not None:
        want, magnitude = want + bias[:, None, None], magnitude + np.abs(bias[:, None, None])
    r = rng.standard_normal(want.shape).astype(np.float32) if c["residual"] else None
    if r is not None:
        want, magnitude = want + r, magnitude + np.abs(r)
    wrong = []
    for target, op in ops.items():
        y = op(x, residual=r)
        terms = int(np.prod(w.shape[1:])) + 2
        if y.shape != want.shape or not close(y, want, magnitude, terms):
            wrong.append(f"{target}: wrong for {c}")
        if not np.array_equal(op(x, residual=r), y):
            wrong.append(f"{target}: a second call gives other bits for {c}")
    return wrong


@pytest.mark.parametrize("part", range(8))
def test_drawn_convolutions(part: int, rng: np.random.Generator) -> None:
    for _ in range(12):
        assert not problems(drawn(rng), rng)


@pytest.mark.full
@pytest.mark.parametrize("part", range(20))
def test_many_drawn_convolutions(part: int, rng: np.random.Generator) -> None:
    for _ in range(50):
        assert not problems(drawn(rng), rng)


def test_planes_hold_what_every_tap_reads(rng: np.random.Generator) -> None:
    for _ in range(300):
        draw = [tuple(int(n) for n in rng.integers(1, high, 2)) for high in (5, 4, 4, 10)]
        (k, s, d, size), pads = draw, ((int(rng.integers(4)), int(rng.integers(4))),) * 2
        window = Window(k, s, d, 1)  # type: ignore[arg-type]
        geometry = Geometry(window, size, pads)  # type: ignore[arg-type]
        if any(n + sum(p) < span for n, p, span in zip(size, pads, window.span, strict=True)):
            continue
        rows, columns = geometry.out
        first = int(rng.integers(rows))
        band = geometry.band((first, rows))
        image = np.arange(1, size[0] * size[1] + 1).reshape(size)
        padded = np.pad(image, pads)
        taps = conv_taps(as_sparse(np.ones((1, k[0] * k[1]), np.float32)).pattern, window)
        for phase, (down, across) in enumerate(band.runs):
            plane = np.zeros(band.floats + 2 * band.pitch, int)
            for i, j in product(range(down.count), range(across.count)):
                at = (down.zeros + i) * band.pitch + across.zeros + j
                assert plane[at] == 0
                plane[at] = image[down.first + i * s[0], across.first + j * s[1]]
            for place, (p, y, x) in enumerate(zip(taps.plane, taps.pitch, taps.offset, strict=True)):
                if p != phase:
                    continue
                ky, kx = place // k[1] * d[0], place % k[1] * d[1]
                for r, c in product(range(rows - first), range(columns)):
                    assert plane[(r + y) * band.pitch + c + x] == padded[(first + r) * s[0] + ky, c * s[1] + kx]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_same_padding_is_that_of_onnx(target: str, stride: int, rng: np.random.Generator) -> None:
    for name, size in product(("same_upper", "same_lower"), (5, 8, 17)):
        w, x = pruned(rng, (4, 3, 4, 3), 0.5), rng.standard_normal((1, 3, size, size)).astype(np.float32)
        out = -(-size // stride)
        total = [max(0, (out - 1) * stride + k - size) for k in (4, 3)]
        pads = [(t // 2, t - t // 2) if name == "same_upper" else (t - t // 2, t // 2) for t in total]
        want, magnitude = convolve(x, w, (stride, stride), pads, (1, 1), 1)
        y = sparsert.compile_conv2d(w, stride=stride, padding=name, target=target)(x)
        assert y.shape == (1, 4, out, out)
        assert close(y, want, magnitude, 36)


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "reference"])
def test_bits_do_not_depend_on_the_schedule(target: str, rng: np.random.Generator) -> None:
    w, x = pruned(rng, (40, 9, 3, 3), 0.2), rng.standard_normal((2, 9, 13, 17)).astype(np.float32)
    for stride, pads in ((1, 1), (2, 1), (1, 0), ((2, 1), (2, 0))):
        options: dict[str, Any] = {"stride": stride, "padding": pads, "target": target}
        plain = sparsert.compile_conv2d(w, **options)(x)
        for rows, segment, tiles, packing, order in (
            (3, 7, 2, "beside", "natural"), (7, 0, 0, "ahead", "natural"), (5, 20, 1, "none", "overlap"),
            (8, 33, 0, "beside", "count"), (4, 0, 3, "ahead", "overlap"),
        ):  # fmt: skip
            schedule = Schedule(rows, segment, tiles, packing=packing, order=order)
            y = sparsert.compile_conv2d(w, schedule=schedule, **options)(x)
            assert np.array_equal(y.view(np.int32), plain.view(np.int32)), schedule


@pytest.mark.parametrize("target", TARGETS)
def test_bits_do_not_depend_on_the_threads(
    target: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "LEAST_SHARE", 1)
    monkeypatch.setattr(images, "_LEAST_COLUMNS", 16)
    shared = 0
    for count, size, stride, residual in ((1, 23, 1, "after"), (2, 9, 1, None), (5, 31, 2, "before"), (12, 7, 1, None)):
        weight = pruned(rng, (21, 6, 3, 3), 0.3)
        x = rng.standard_normal((count, 6, size, size + 3)).astype(np.float32)
        settings = {"padding": 1, "stride": stride, "residual": residual, "target": target}
        want = None
        for threads in (1, 2, 3, 7):
            op = sparsert.compile_conv2d(weight, None, "relu", threads=threads, **settings)
            side = (size - 1) // stride + 1, (size + 2) // stride + 1
            r = np.resize(x, (count, 21, *side)) if residual else None
            y = op(x, residual=r)
            want = y if want is None else want
            assert np.array_equal(y, want)
            assert np.array_equal(op.bind(x, residual=r)(), want)
            shared += "ranges of image" in op.explain()
    assert shared >= 12 or target == "reference"


@pytest.mark.parametrize("target", TARGETS)
def test_nan_and_infinity_stay_where_a_tap_reads_them(target: str) -> None:
    w = np.zeros((1, 1, 3, 3), np.float32)
    w[0, 0, 1, 0] = w[0, 0, 0, 2] = 1
    x = np.zeros((1, 1, 6, 19), np.float32)
    x[0, 0, 2, 18], x[0, 0, 4, 0] = np.nan, np.inf
    y = sparsert.compile_conv2d(w, padding=1, target=target)(x)[0, 0]
    assert sorted(map(tuple, np.argwhere(np.isnan(y)).tolist())) == [(3, 17)]
    assert sorted(map(tuple, np.argwhere(np.isinf(y)).tolist())) == [(4, 1)]
    assert np.count_nonzero(y) == 2


@pytest.mark.parametrize("target", TARGETS)
def test_bands_of_large_images(target: str, rng: np.random.Generator) -> None:
    """Planes beyond the second-level cache: bands of rows; single rows beyond it: bands of columns."""
    for inputs, size, stride in ((24, (150, 121), 1), (24, (150, 121), 2), (40, (2, 9001), 1)):
        if target == "reference" and stride == 2:
            continue
        w, x = pruned(rng, (5, inputs, 3, 3), 0.1), rng.standard_normal((1, inputs, *size)).astype(np.float32)
        for pads in ((1, 1), (0, 2)):
            want, magnitude = convolve(x, w, (stride, stride), (pads, pads), (1, 1), 1) if size[0] > 2 else (None, None)
            both = (pads, pads)
            if want is None:
                both = ((1, 1), pads)
                want, magnitude = convolve(x, w, (stride, stride), both, (1, 1), 1)
            assert magnitude is not None
            y = sparsert.compile_conv2d(w, stride=stride, padding=both, target=target)(x)
            assert close(y, want, magnitude, 9 * inputs)


@pytest.mark.parametrize("target", TARGETS)
def test_views_in_and_out(target: str, rng: np.random.Generator) -> None:
    w = pruned(rng, (6, 4, 3, 3), 0.4)
    whole = rng.standard_normal((2, 8, 12, 40)).astype(np.float32)
    op = sparsert.compile_conv2d(w, activation=Clip(-1, 1), padding=1, residual="after", target=target)
    for x in (whole[:, ::2, ::-1, 3:30], whole[:, 4:, :, ::2], whole.transpose(0, 1, 3, 2)[:, :4]):
        r = rng.standard_normal((2, 6, *x.shape[2:])).astype(np.float32)
        want = op(np.ascontiguousarray(x), residual=r)
        big = np.full((2, 6, x.shape[2] + 3, x.shape[3] + 5), 7, np.float32)
        out = big[:, :, 1:-2, 2:-3]
        assert op(x, out=out, residual=r) is out
        assert np.array_equal(out, want)
        assert np.all(big[:, :, 0] == 7)
        assert np.all(big[:, :, :, :2] == 7)
        assert np.all(big[:, :, :, -3:] == 7)
        again = r.copy()
        assert np.array_equal(op(x, out=again, residual=again), want)
        bound = op.bind(x, residual=r)
        assert np.array_equal(bound(), want)
        assert np.array_equal(bound(), want)


def test_matrix_weights_and_refit(rng: np.random.Generator) -> None:
    w, x = pruned(rng, (6, 4, 3, 2), 0.4), rng.standard_normal((1, 4, 9, 9)).astype(np.float32)
    op = sparsert.compile_conv2d(w)
    m = as_sparse(w.reshape(6, 24))
    csr = (m.values, m.pattern.indices, m.pattern.indptr, (6, 24))
    assert np.array_equal(sparsert.compile_conv2d(csr, kernel=(3, 2))(x), op(x))
    op.refit(2 * w)
    assert np.array_equal(op(x), sparsert.compile_conv2d(2 * w)(x))
    with pytest.raises(PatternMismatchError):
        op.refit(np.ones_like(w))
    depthwise = pruned(rng, (6, 1, 3, 3), 2.0)
    d = sparsert.compile_conv2d(depthwise, padding=1, groups=6)
    image = rng.standard_normal((1, 6, 9, 9)).astype(np.float32)
    before = d(image)
    d.refit(-depthwise)
    assert np.array_equal(d(image), -before)


@pytest.mark.parametrize("activation", ["relu6", "silu", "gelu"])
def test_depthwise_is_the_general_form_to_the_bit(activation: str, rng: np.random.Generator) -> None:
    """The fast form wants rows of y back to back; an output with gaps gets the general one."""
    for k, stride, size in product((3, 5), (1, 2), (5, 7, 14, 20, 33, 56)):
        w = pruned(rng, (5, 1, k, k), 2.0)
        bias = rng.standard_normal(5).astype(np.float32)
        op = sparsert.compile_conv2d(w, bias, activation, padding="same_upper", stride=stride, groups=5)
        x = rng.standard_normal((2, 5, size, size)).astype(np.float32)
        y = op(x)
        gaps = np.empty((*y.shape[:3], y.shape[3] + 1), np.float32)[..., :-1]
        assert np.array_equal(op(x, out=gaps), y)


def transpose(x: Any, w: Any, stride: Any, pads: Any, extra: Any, dilation: Any, groups: int) -> F64:
    """Every input scattered to the outputs that it reaches."""
    b, c, h, width = x.shape
    each, outputs = c // groups, w.shape[1]
    full = [(n - 1) * s + d * (k - 1) + 1 + e
            for n, s, d, k, e in zip((h, width), stride, dilation, w.shape[2:], extra, strict=True)]  # fmt: skip
    y = np.zeros((b, groups * outputs, *full))
    for g, i, j in product(range(groups), range(w.shape[2]), range(w.shape[3])):
        part = np.einsum("co,bchw->bohw", w[g * each : (g + 1) * each, :, i, j].astype(np.float64),
                         x[:, g * each : (g + 1) * each].astype(np.float64))  # fmt: skip
        i0, j0 = i * dilation[0], j * dilation[1]
        y[:, g * outputs : (g + 1) * outputs, i0 : i0 + (h - 1) * stride[0] + 1 : stride[0],
          j0 : j0 + (width - 1) * stride[1] + 1 : stride[1]] += part  # fmt: skip
    return y[:, :, pads[0] : full[0] - pads[0], pads[1] : full[1] - pads[1]]


@pytest.mark.parametrize("part", range(3))
def test_drawn_transposed_convolutions(part: int, rng: np.random.Generator) -> None:
    for _ in range(12):
        groups = int(rng.integers(1, 3))
        k, s, d, p, size = (tuple(map(int, rng.integers(low, high, 2)))
                            for low, high in ((1, 5), (1, 4), (1, 3), (0, 3), (1, 10)))  # fmt: skip
        extra = tuple(int(rng.integers(max(a, b))) for a, b in zip(s, d, strict=True))
        w = pruned(rng, (2 * groups, 3, *k), 0.6)
        x = rng.standard_normal((2, 2 * groups, *size)).astype(np.float32)
        op = sparsert.compile_conv_transpose2d(
            w, stride=s, padding=p, output_padding=extra, dilation=d, groups=groups, target=str(rng.choice(TARGETS))
        )
        want = transpose(x, w, s, p, extra, d, groups)
        if want.size == 0:
            with pytest.raises(ShapeError):
                op(x)
            continue
        assert op.out_shape(x.shape) == want.shape
        assert np.abs(op(x) - want).max() < 1e-4


@pytest.mark.parametrize("target", TARGETS)
def test_one_axis(target: str, rng: np.random.Generator) -> None:
    for length, k, stride, pads, dilation in (
        (1, 1, 1, 0, 1),
        (50, 5, 1, (4, 0), 2),
        (301, 7, 4, 3, 1),
        (40, 3, 2, 1, 3),
    ):
        w, x = pruned(rng, (7, 3, k), 0.5), rng.standard_normal((2, 3, length)).astype(np.float32)
        both = (pads, pads) if isinstance(pads, int) else pads
        want, magnitude = convolve(x[:, :, None], w[:, :, None], (1, stride), ((0, 0), both), (1, dilation), 1)
        y = sparsert.compile_conv1d(w, stride=stride, padding=pads, dilation=dilation, target=target)(x)
        assert y.shape == (2, 7, want.shape[3])
        assert close(y[:, :, None], want, magnitude, 3 * k)


def test_what_is_wrong_is_said() -> None:
    w = np.ones((4, 2, 3, 3), np.float32)
    x = np.ones((1, 2, 8, 8), np.float32)
    op = sparsert.compile_conv2d(w)
    for bad in (x[0], x[:, :1], np.ones((1, 2, 2, 8), np.float32)):
        with pytest.raises(ShapeError):
            op(bad)
    with pytest.raises(AliasError):
        op(x, out=np.lib.stride_tricks.as_strided(x, (1, 4, 6, 6), x.strides))
    for options, error in (
        ({"stride": 0}, ValueRangeError), ({"padding": -1}, ValueRangeError), ({"padding": "valid"}, UnsupportedError),
        ({"dilation": (1, 2, 3)}, ValueRangeError), ({"groups": 3}, ShapeError), ({"groups": 0}, ValueRangeError),
        ({"kernel": (5, 5)}, ShapeError), ({"padding": 1 << 40}, ValueRangeError),
    ):  # fmt: skip
        with pytest.raises(error):
            sparsert.compile_conv2d(w, **options)  # type: ignore[arg-type]
    with pytest.raises(ShapeError):
        sparsert.compile_conv2d(w[0, 0])
    with pytest.raises(ValueRangeError):
        sparsert.compile_conv_transpose2d(w, stride=2, output_padding=2)
    assert padding("same_lower").pads is None
    assert "sparse convolution" in op.explain()
    assert "pack x" in op.listing()


def test_threads_that_meet_at_a_first_depthwise_call_share_one_product(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one would be gone while its code runs, and keep its values at a refit."""
    w = rng.standard_normal((9, 1, 3, 3)).astype(np.float32)
    x = rng.standard_normal((1, 9, 12, 12)).astype(np.float32)
    op = sparsert.compile_conv2d(w, padding=1, groups=9)
    product = op._compiled.product
    if not isinstance(product, DepthwiseProduct):
        pytest.skip("this target has no such form")
    made, barrier = [], threading.Barrier(2)

    class Slow(depthwise_module.ChannelsProduct):
        def __init__(self, *args: Any) -> None:
            made.append(self)
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait(0.2)  # where both make one, they meet here
            super().__init__(*args)

    monkeypatch.setattr(depthwise_module, "ChannelsProduct", Slow)
    outs = [np.empty_like(x) for _ in range(2)]
    threads = [threading.Thread(target=op, args=(x, out)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert all(np.array_equal(out, op(x)) for out in outs)


def test_a_refit_takes_no_kernel_of_other_axes(rng: np.random.Generator) -> None:
    w = rng.standard_normal((8, 4, 3, 3)).astype(np.float32)
    op = sparsert.compile_conv2d(w)
    for wrong in (w.transpose(0, 2, 3, 1), w.reshape(8, 4, 9)):
        with pytest.raises(ShapeError, match="new_weight"):
            op.refit(wrong)
    line = sparsert.compile_conv1d(w[:, :, 0])
    with pytest.raises(ShapeError, match="new_weight"):
        line.refit(w[:, :, 0].transpose(0, 2, 1))
    line.refit(w[:, :, 1])
    op.refit(w.reshape(8, 36))


def test_a_refit_of_a_transposed_convolution_takes_no_other_kernel(rng: np.random.Generator) -> None:
    w = rng.standard_normal((4, 4, 3, 2)).astype(np.float32)
    for stride in (1, 2, 4):
        op = sparsert.compile_conv_transpose2d(w, stride=stride, dilation=2)
        op.refit(2 * w)
        for wrong in (np.pad(w, ((0, 0), (0, 0), (0, 2), (0, 2))), w[:, :, :2], w[0]):
            with pytest.raises(ShapeError, match="new_weight"):
                op.refit(wrong)
    with pytest.raises(ShapeError, match="groups"):
        sparsert.compile_conv_transpose2d(w, groups=True)
