"""Layers that were really pruned, against SciPy in float64: every compiled target, every layout."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparsert
from oracle import COMPILED, F64, complaint, dense_matrix, expected, same_bits
from sparsert.benchmarks.testdata import dlmc_index, mobilenet_v1_pointwise, read_dlmc
from sparsert.sparsity.pattern import SparseMatrix, as_sparse, from_csr

sparse = pytest.importorskip("scipy.sparse", reason="SciPy multiplies in float64 here")

MOBILENET = [f"pw{k}" for k in range(13)]
FILTERS = [f"rn50_{sparsity}_bg{group}" for sparsity in (90, 95) for group in (1, 2, 3)]
PATTERNS = 4  # of each DLMC collection, from the smallest to the largest


def multiply(matrix: SparseMatrix, x: F64) -> F64:
    p = matrix.pattern
    product: F64 = sparse.csr_matrix((matrix.values.astype(np.float64), p.indices, p.indptr), shape=p.shape) @ x
    return product


def check(
    matrix: SparseMatrix, columns: int, target: str, rng: np.random.Generator, bias: Any = None, activation: Any = None
) -> None:
    """Three layouts give what SciPy gives, and one another's bits."""
    x = rng.standard_normal((matrix.shape[1], columns)).astype(np.float32)
    y = sparsert.compile_matmul(matrix, bias, activation, target=target)(x)
    wrong = complaint(y, expected(matrix, x, bias, activation, multiply=multiply))
    assert not wrong, wrong
    linear = sparsert.compile_linear(matrix, bias, activation, target=target)(np.ascontiguousarray(x.T))
    assert same_bits(linear.T, y)
    tiled = sparsert.compile_matmul(matrix, bias, activation, target=target, layout="tile_major")
    whole = np.zeros((x.shape[0], -(-columns // tiled.tile) * tiled.tile), np.float32)
    whole[:, :columns] = x
    arranged = np.ascontiguousarray(whole.reshape(x.shape[0], -1, tiled.tile).transpose(1, 0, 2))
    assert same_bits(tiled(arranged).transpose(1, 0, 2).reshape(len(y), -1)[:, :columns], y)


@functools.cache
def mobilenet() -> dict[str, tuple[SparseMatrix, np.ndarray, int]]:
    """The 13 1x1 layers; a random matrix of 90 % stands in for the last, whose weights are not published."""
    layers = {}
    for name, weight, bias, columns in mobilenet_v1_pointwise():
        stand_in = as_sparse(dense_matrix(np.random.default_rng(12), 1024, 1024, 0.1))
        layers[name] = (weight or stand_in, bias, columns)
    return layers


@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("name", MOBILENET)
def test_mobilenet_v1(name: str, target: str, test_data: Path, rng: np.random.Generator) -> None:
    matrix, bias, columns = mobilenet()[name]
    check(matrix, columns, target, rng, bias, "relu")


def test_mobilenet_v1_is_the_pruned_network(test_data: Path) -> None:
    assert list(mobilenet()) == MOBILENET
    for name, (matrix, bias, _) in mobilenet().items():
        assert bias.shape == (matrix.shape[0],)
        assert 0.08 < matrix.pattern.density < 0.12, name


@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("name", FILTERS)
def test_resnet50_filters(name: str, target: str, test_data: Path, rng: np.random.Generator) -> None:
    """3x3 filters as matrices over (ic, ky, kx)."""
    with np.load(test_data / "weights" / "resnet50_3x3.npz") as arrays:
        data, indices, indptr, shape = (arrays[f"{name}.{part}"] for part in ("data", "indices", "indptr", "shape"))
    assert tuple(shape[2:]) == (3, 3)
    matrix = from_csr(data.astype(np.float32), indices, indptr, (shape[0], 9 * shape[1]), name)
    check(matrix, 100, target, rng, None, "relu")


@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("name", FILTERS)
def test_resnet50_convolutions(name: str, target: str, test_data: Path, rng: np.random.Generator) -> None:
    """The same filters as convolutions, against SciPy's product with all windows of the image as columns."""
    with np.load(test_data / "weights" / "resnet50_3x3.npz") as arrays:
        data, indices, indptr, shape = (arrays[f"{name}.{part}"] for part in ("data", "indices", "indptr", "shape"))
    matrix = from_csr(data.astype(np.float32), indices, indptr, (shape[0], 9 * shape[1]), name)
    x = rng.standard_normal((1, shape[1], 9, 14)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x[0], ((0, 0), (1, 1), (1, 1))), (3, 3), (1, 2))
    columns = np.ascontiguousarray(windows.transpose(0, 3, 4, 1, 2)).reshape(9 * shape[1], -1)
    y = sparsert.compile_conv2d(matrix, None, "relu", kernel=(3, 3), padding=1, target=target)(x)
    wrong = complaint(y.reshape(len(y[0]), -1), expected(matrix, columns, None, "relu", multiply=multiply))
    assert not wrong, wrong


@pytest.mark.parametrize("target", COMPILED)
def test_dlmc_patterns(target: str, test_data: Path, rng: np.random.Generator) -> None:
    entries: dict[str, list[Any]] = {}
    for entry in dlmc_index():
        entries.setdefault(entry.collection, []).append(entry)
    assert entries, "no archive of the collection is there"
    for group in entries.values():
        fit = sorted((e for e in group if e.rows * e.cols <= 2**21), key=lambda e: e.rows * e.cols)
        for at in np.linspace(0, len(fit) - 1, PATTERNS).astype(int):
            check(read_dlmc(fit[at]), 50, target, rng, activation="gelu_tanh")
