"""Convolutions whose unrolled code may not be made: the bits of those whose may."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sparsert
from oracle import COMPILED, same_bits
from sparsert import convolution
from sparsert.errors import CodeBudgetError, PatternMismatchError, ShapeError
from sparsert.operators import looped_conv
from unit.test_convolution import close, convolve, drawn, pruned

ROOM = 9500  # bytes: enough for any loop over a pattern


def forced(*args: Any, **options: Any) -> sparsert.CompiledConv:
    """A convolution as it is compiled where unrolled code would be too large, however little it is."""

    def refuse(*_: Any) -> Any:
        raise CodeBudgetError("too large", where="max_code_bytes")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "build", refuse)
        op = sparsert.compile_conv2d(*args, **options)
    assert op.schedule is None
    return op


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("target", COMPILED)
def test_drawn_convolutions_have_the_same_bits(
    part: int, target: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looped_conv, "_PLANES", int(rng.choice([200, 2000, 1 << 20])))  # floats: many bands, or one
    for _ in range(12):
        c = drawn(rng) | {"images": int(rng.integers(1, 3))}
        w = pruned(rng, (c["outputs"], c["inputs"] // c["groups"], *c["kernel"]), c["density"])
        bias = rng.standard_normal(c["outputs"]).astype(np.float32) if c["bias"] else None
        options: dict[str, Any] = {
            "stride": c["stride"], "padding": c["pads"], "dilation": c["dilation"], "groups": c["groups"],
            "residual": c["residual"], "activation": [None, "silu", "relu"][int(rng.integers(3))], "target": target,
        }  # fmt: skip
        op = sparsert.compile_conv2d(w, bias, **options)
        small = forced(w, bias, **options)
        x = rng.standard_normal((c["images"], c["inputs"], *c["size"])).astype(np.float32)
        x[rng.random(x.shape) < 0.01], x[rng.random(x.shape) < 0.02] = np.nan, -0.0
        try:
            shape = op.out_shape(x.shape)
        except ShapeError:
            with pytest.raises(ShapeError):
                small(x)
            continue
        r = rng.standard_normal(shape).astype(np.float32) if c["residual"] else None
        want = op(x, residual=r)
        assert same_bits(small(x, residual=r), want), c
        wide = np.full((*shape[:2], shape[2] + 1, shape[3] + 2), 7, np.float32)
        out = wide[:, :, :-1, 1:-1]
        assert same_bits(small(x[:, :, ::-1].copy()[:, :, ::-1], out=out, residual=r), want)
        assert (wide[:, :, -1] == 7).all()
        assert (wide[..., 0] == 7).all()
        assert (wide[..., -1] == 7).all()
        if r is not None:
            assert same_bits(small(x, out=r, residual=r), want)


@pytest.mark.parametrize("target", COMPILED)
def test_wide_rows_are_summed_in_the_same_pieces(target: str, rng: np.random.Generator) -> None:
    for stride, dilation in ((1, 1), (2, 1), (1, 2)):
        w = pruned(rng, (3, 600, 3, 3), 0.95)
        x = rng.standard_normal((1, 600, 9, 11)).astype(np.float32)
        options: dict[str, Any] = {"stride": stride, "dilation": dilation, "padding": 1, "target": target}
        op = sparsert.compile_conv2d(w, **options)
        small = sparsert.compile_conv2d(w, max_code_bytes=ROOM, **options)
        assert op.schedule is not None
        assert small.schedule is None
        want, magnitude = convolve(x, w, (stride,) * 2, ((1, 1),) * 2, (dilation,) * 2, 1)
        assert close(small(x), want, magnitude, 5400)
        assert same_bits(small(x), op(x))


@pytest.mark.parametrize("target", COMPILED)
def test_it_behaves_as_other_operators_do(target: str, rng: np.random.Generator) -> None:
    w, x = pruned(rng, (40, 16, 3, 3), 0.3), rng.standard_normal((2, 16, 9, 9)).astype(np.float32)
    op = sparsert.compile_conv2d(w, padding=1, target=target, max_code_bytes=ROOM)
    assert op.schedule is None
    assert 0 < op.stats.code_bytes <= ROOM
    assert "looped    unrolled code would take more than the 9500 bytes" in op.explain()
    assert "loop over the pattern uses no others" in op.explain()
    assert "step" in op.listing()
    before = op(x)
    bound = op.bind(x)
    op.refit(-w)
    assert same_bits(op(x), -before)
    assert same_bits(bound(), -before)
    with pytest.raises(PatternMismatchError):
        op.refit(np.ones_like(w))
    line = sparsert.compile_conv1d(w[:, :, 0], padding=1, target=target, max_code_bytes=ROOM)
    assert same_bits(line(x[:, :, 0]), sparsert.compile_conv1d(w[:, :, 0], padding=1, target=target)(x[:, :, 0]))
    back, wide = (
        sparsert.compile_conv_transpose2d(w, stride=2, target=target, max_code_bytes=room) for room in (ROOM, None)
    )
    images = rng.standard_normal((1, 40, 5, 6)).astype(np.float32)
    assert same_bits(back(images), wide(images))
    with pytest.raises(CodeBudgetError, match="even a loop"):
        sparsert.compile_conv2d(w, target=target, max_code_bytes=100)
    with pytest.raises(CodeBudgetError):
        sparsert.compile_conv2d(w, target=target, max_code_bytes=ROOM, schedule=sparsert.Schedule(4))
    depthwise = pruned(rng, (900, 1, 3, 3), 2.0)
    planes = rng.standard_normal((1, 900, 7, 7)).astype(np.float32)
    options: dict[str, Any] = {"padding": 1, "groups": 900, "target": target}
    small = sparsert.compile_conv2d(depthwise, max_code_bytes=ROOM, **options)
    assert small.schedule is None
    assert same_bits(small(planes), sparsert.compile_conv2d(depthwise, **options)(planes))


def test_scratch_of_many_shapes_does_not_pile_up(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looped_conv, "_MOST_KEPT", 1 << 14)
    op = sparsert.compile_conv2d(pruned(rng, (40, 6, 3, 3), 0.9), padding=1, max_code_bytes=ROOM)
    product: Any = op._compiled.product
    if not isinstance(product, looped_conv.LoopedConv):
        pytest.skip("the reference target has no code")
    for size in range(3, 60):
        op(np.ones((1, 6, size, 4), np.float32))
        assert sum(p.floats for free in product._free.values() for p in free) <= 1 << 16
    assert len(product._bands) < 32
