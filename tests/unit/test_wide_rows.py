"""Rows with very many nonzeros: summed in pieces, so that rounding stays within the promised bound."""

from __future__ import annotations

import numpy as np
import pytest

import sparsert
from oracle import COMPILED, same_bits
from sparsert import Schedule
from sparsert.kernels.plan import FOLD_TAPS


@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("extent", [FOLD_TAPS, FOLD_TAPS + 1, 4 * FOLD_TAPS, 16 * FOLD_TAPS + 5])
def test_the_bound_holds_where_all_products_have_one_sign(target: str, extent: int, rng: np.random.Generator) -> None:
    weight = np.full((3, extent), 0.1, np.float32)
    weight[1, rng.random(extent) < 0.5] = 0
    weight[2, 100:] = 0
    x = np.repeat(rng.uniform(0.5, 2, 64).astype(np.float32)[None], extent, axis=0)
    want = weight.astype(np.float64) @ x
    bound = 1e-6 * np.sqrt((weight != 0).sum(axis=1))[:, None] * want
    bias = np.array([1, -2, 3], np.float32)
    for layout in ("row_major", "tile_major"):
        op = sparsert.compile_matmul(weight, target=target, layout=layout)
        if layout == "tile_major":
            tiles = np.ascontiguousarray(x.reshape(extent, -1, op.tile).transpose(1, 0, 2))
            got = op(tiles).transpose(1, 0, 2).reshape(3, -1)
        else:
            got = op(x)
        assert (np.abs(got - want) <= bound).all()
    op = sparsert.compile_matmul(weight, bias, "relu", target=target)
    for schedule in (Schedule(3), Schedule(2, k_segment=1000), Schedule(1, packing="beside", tiles=2, prefetch=True)):
        again = sparsert.compile_matmul(weight, bias, "relu", target=target, schedule=schedule)
        assert same_bits(again(x), op(x))
    linear = sparsert.compile_linear(np.vstack([weight, weight]), np.hstack([bias, bias]), "relu", target=target)
    assert same_bits(linear(np.ascontiguousarray(x.T)).T[:3], op(x))
