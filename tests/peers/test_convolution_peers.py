"""Convolutions against PyTorch in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sparsert


@pytest.mark.peers("torch")
@pytest.mark.parametrize("part", range(4))
def test_drawn_convolutions_against_torch(part: int, rng: np.random.Generator) -> None:
    torch: Any = pytest.importorskip("torch")
    functional = torch.nn.functional
    for _ in range(25):
        groups = int(rng.integers(1, 4))
        k, s, d, p, size = (tuple(map(int, rng.integers(low, high, 2)))
                            for low, high in ((1, 6), (1, 4), (1, 3), (0, 4), (1, 30)))  # fmt: skip
        c, o = int(rng.integers(1, 5)) * groups, int(rng.integers(1, 12)) * groups
        x = rng.standard_normal((int(rng.integers(1, 3)), c, *size)).astype(np.float32)
        b = rng.standard_normal(o).astype(np.float32)
        w = np.where(rng.random((o, c // groups, *k)) < 0.3, rng.standard_normal((o, c // groups, *k)), 0)
        w = w.astype(np.float32)
        wide = [torch.from_numpy(a).double() for a in (x, w, b)]
        op = sparsert.compile_conv2d(w, b, stride=s, padding=p, dilation=d, groups=groups)
        try:
            want = functional.conv2d(*wide, s, p, d, groups).numpy()
        except RuntimeError:
            with pytest.raises(sparsert.errors.ShapeError):
                op(x)
        else:
            assert np.abs(op(torch.from_numpy(x)) - want).max() < 1e-4
        extra = tuple(int(rng.integers(max(a, e))) for a, e in zip(s, d, strict=True))
        v = np.where(rng.random((c, o, *k)) < 0.3, rng.standard_normal((c, o, *k)), 0).astype(np.float32)
        back = sparsert.compile_conv_transpose2d(
            v, stride=s, padding=p, output_padding=extra, dilation=d, groups=groups
        )
        try:
            want = functional.conv_transpose2d(
                wide[0], torch.from_numpy(v).double(), None, s, p, extra, groups, d
            ).numpy()
        except RuntimeError:
            with pytest.raises(sparsert.errors.ShapeError):
                back(x)
        else:
            assert np.abs(back(x) - want).max() < 1e-4
