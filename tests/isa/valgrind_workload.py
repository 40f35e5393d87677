"""Operators for x86-avx2 on arrays that end where their allocation ends, to be run under valgrind's memcheck.

    valgrind --xml=yes --xml-file=OUT python valgrind_workload.py CASES [--overrun]

``--overrun`` claims one float more of x than was allocated: an error that has to be found.
"""

from __future__ import annotations

import ctypes
import sys

import numpy as np

import sparsert

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
ACTIVATIONS = (None, "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh", "sigmoid", "tanh")


def exact(shape: tuple[int, ...], short: int = 0) -> np.ndarray:
    """An array in a block of its own that ends with it, or ``short`` floats before. Never freed."""
    n = int(np.prod(shape))
    address = libc.malloc(max(4 * (n - short), 1))
    return np.frombuffer((ctypes.c_float * n).from_address(address), np.float32).reshape(shape)


def filled(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    array = exact(shape)
    array[...] = rng.standard_normal(shape)
    return array


def run(rng: np.random.Generator) -> None:
    m, k, n = (int(rng.integers(1, 80)) for _ in range(3))
    weight = (rng.standard_normal((m, k)) * (rng.random((m, k)) < rng.choice([0.02, 0.1, 0.4, 1.0]))).astype(np.float32)
    bias = filled((m,), rng) if rng.random() < 0.5 else None
    residual = (None, "before", "after")[int(rng.integers(3))]
    settings = {"activation": ACTIVATIONS[int(rng.integers(len(ACTIVATIONS)))], "residual": residual}
    layout = ("row_major", "tile_major", "linear")[int(rng.integers(3))]
    if layout == "linear":
        op = sparsert.compile_linear(weight, bias, target="x86-avx2", **settings)
        x_shape, y_shape = (n, k), (n, m)
    else:
        op = sparsert.compile_matmul(weight, bias, target="x86-avx2", layout=layout, **settings)
        tiles = -(-n // op.tile)
        x_shape, y_shape = ((k, n), (m, n)) if layout == "row_major" else ((tiles, k, op.tile), (tiles, m, op.tile))
    r = filled(y_shape, rng) if residual else None
    y = op(filled(x_shape, rng), out=exact(y_shape), residual=r)
    assert np.isfinite(y).all()  # reads every element: one that was not written is an error of its own


def run_convolution(rng: np.random.Generator) -> None:
    groups, (kh, kw) = int(rng.integers(1, 3)), (int(k) for k in rng.integers(1, 4, 2))
    inputs, outputs = groups * int(rng.integers(1, 5)), groups * int(rng.integers(1, 9))
    b, h, w = int(rng.integers(1, 3)), int(rng.integers(1, 20)), int(rng.integers(1, 20))
    weight = rng.standard_normal((outputs, inputs // groups, kh, kw)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.6] = 0
    residual = (None, "before", "after")[int(rng.integers(3))]
    settings = {"stride": int(rng.integers(1, 3)), "padding": (kh - 1, kw - 1), "groups": groups, "residual": residual}
    op = sparsert.compile_conv2d(weight, None, "relu", target="x86-avx2", threads=1, **settings)
    rows, columns = ((n + k - 2) // settings["stride"] + 1 for n, k in ((h, kh), (w, kw)))
    shape = (b, outputs, rows, columns)
    r = filled(shape, rng) if residual else None
    assert np.isfinite(op(filled((b, inputs, h, w), rng), out=exact(shape), residual=r)).all()


def overrun(rng: np.random.Generator) -> None:
    weight = rng.standard_normal((8, 8)).astype(np.float32)
    x = exact((8, 64), short=1)
    sparsert.compile_matmul(weight, target="x86-avx2")(x)


if __name__ == "__main__":
    generator = np.random.default_rng(0)
    for _ in range(int(sys.argv[1])):
        run(generator)
        run_convolution(generator)
    if "--overrun" in sys.argv:
        overrun(generator)
