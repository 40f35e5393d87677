"""Sparse peers: SciPy's CSR product, torch's CSR tensors and MKL's inspector-executor interface."""

from __future__ import annotations

import ctypes
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np

from .peers import Bound, Form, Layer


def scipy_forms(threads: int) -> list[Form]:
    """``csr_array @ X``: one thread whatever is asked for, allocates its result."""
    sparse: Any = import_module("scipy.sparse")

    def product(layer: Layer) -> Bound:
        p = layer.sparse.pattern
        weight = sparse.csr_array((layer.sparse.values, p.indices, p.indptr.astype(np.int32)), shape=p.shape)
        x = layer.x
        return Bound(lambda: weight @ x)

    return [Form("CSR@X", "kn", product, "sparse")]


def torch_csr_forms(threads: int) -> list[Form]:
    """``torch.mm`` of a ``sparse_csr_tensor`` (MKL underneath) into ``out=``."""
    torch: Any = import_module("torch")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    import warnings

    def product(layer: Layer) -> Bound:
        p = layer.sparse.pattern
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CSR support is announced as beta at the first use
            parts = (torch.from_numpy(np.array(part, np.int32)) for part in (p.indptr, p.indices))
            weight = torch.sparse_csr_tensor(*parts, torch.from_numpy(layer.sparse.values.copy()), size=p.shape)
        x, y, mm = torch.from_numpy(layer.x), torch.from_numpy(layer.y), torch.mm
        return Bound(lambda: mm(weight, x, out=y))

    return [Form("CSR@X", "kn", product, "sparse")]


NON_TRANSPOSE, ROW_MAJOR, COLUMN_MAJOR, GENERAL, SEQUENTIAL = 10, 101, 102, 20, 1
EXPECTED_CALLS = 1000


class _Description(ctypes.Structure):
    """MKL's ``matrix_descr``: type, fill mode, diagonal (the latter two are unused for general matrices)."""

    _fields_ = (("type", ctypes.c_int), ("mode", ctypes.c_int), ("diag", ctypes.c_int))


class _Handle:
    """An MKL sparse matrix that lives as long as the arrays it refers to."""

    def __init__(self, mkl: Any, layer: Layer, order: int) -> None:
        p = layer.sparse.pattern
        offsets, columns = p.indptr.astype(np.int32), np.array(p.indices, np.int32)
        values = np.array(layer.sparse.values, np.float32)
        self.mkl, self.arrays, self.pointer = mkl, (offsets, columns, values), ctypes.c_void_p()
        start = offsets.ctypes.data
        _check(mkl.mkl_sparse_s_create_csr(
            ctypes.byref(self.pointer), 0, p.rows, p.cols, ctypes.c_void_p(start), ctypes.c_void_p(start + 4),
            ctypes.c_void_p(columns.ctypes.data), ctypes.c_void_p(values.ctypes.data)))  # fmt: skip
        describe = _Description(GENERAL, 40, 50)
        mkl.mkl_sparse_set_mm_hint(self.pointer, NON_TRANSPOSE, describe, order, layer.columns, EXPECTED_CALLS)
        _check(mkl.mkl_sparse_optimize(self.pointer))

    def __del__(self) -> None:
        if self.pointer:
            self.mkl.mkl_sparse_destroy(self.pointer)


def mkl_forms(threads: int) -> list[Form]:
    """``mkl_sparse_s_mm`` after ``set_mm_hint`` and ``optimize``, on row-major and on column-major X."""
    mkl: Any = ctypes.CDLL(mkl_library())
    if threads == 1:
        mkl.MKL_Set_Threading_Layer(SEQUENTIAL)
    mkl.MKL_Set_Num_Threads_Local(threads)

    def product(layer: Layer, order: int) -> Bound:
        handle = _Handle(mkl, layer, order)
        n, rows, cols = layer.columns, layer.sparse.pattern.rows, layer.sparse.pattern.cols
        ld_x, ld_y = (n, n) if order == ROW_MAJOR else (cols, rows)
        arguments = (NON_TRANSPOSE, ctypes.c_float(1.0), handle.pointer, _Description(GENERAL, 40, 50), order,
                     ctypes.c_void_p(layer.x.ctypes.data), n, ld_x, ctypes.c_float(0.0),
                     ctypes.c_void_p(layer.y.ctypes.data), ld_y)  # fmt: skip
        run = mkl.mkl_sparse_s_mm

        def call(_keep: object = (handle, layer)) -> None:
            run(*arguments)

        layer.y[:] = 0  # MKL documents beta = 0 as overwriting; no reason to let NaNs decide
        _check(run(*arguments))
        return Bound(call)

    return [
        Form("CSR@X", "kn", lambda layer: product(layer, ROW_MAJOR), "sparse"),
        Form("CSR@X column-major", "nk", lambda layer: product(layer, COLUMN_MAJOR), "sparse"),
    ]


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"MKL sparse status {status}")


def mkl_library() -> str:
    """The path of ``libmkl_rt`` of the installed ``mkl`` package.

    Raises:
        ImportError: the package, or the library in it, is missing.
    """
    try:
        files = metadata.files("mkl") or []
    except metadata.PackageNotFoundError:
        raise ImportError("the package mkl is not installed") from None
    for file in files:
        if file.name.startswith("libmkl_rt.so"):
            return str(file.locate())
    found = sorted((Path(sys.prefix) / "lib").glob("libmkl_rt.so*"))
    if not found:
        raise ImportError("the package mkl has no libmkl_rt here")
    return str(found[0])
