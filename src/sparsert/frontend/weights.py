"""Pruned layers out of files: ``load_layers("model.tflite")``, ``load_layers("weights.npz")``, ...

| suffix | layers |
|---|---|
| ``.npy`` | one dense matrix |
| ``.npz`` | each matrix ``NAME`` or ``NAME.w``, each CSR group ``NAME.data/.indices/.indptr/.shape``; bias ``NAME.b`` |
| ``.npz`` written by ``scipy.sparse.save_npz`` | one matrix (csr, csc, coo, bsr) |
| ``.smtx`` | one pattern of the Deep Learning Matrix Collection, with drawn values |
| ``.tflite`` | the pruned 1x1 convolutions and fully connected layers |
| ``.zip``, ``ARCHIVE.zip:MEMBER`` | the ``.smtx`` and ``.npy`` members, or one of them |

A dense matrix's pattern is where it is not zero; a sparse form's is what it stores.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError, UnsupportedError
from ..sparsity.pattern import Pattern, SparseMatrix, as_sparse, from_csr, require_finite
from .container import MAX_BYTES, Archive, read_file, read_npy, some
from .tflite import read_layers

Activation = str | tuple[str, float, float] | None

MAX_EXTENT = 2**24  # rows or columns of a layer from a file; statistics of a pattern take a few words for each
MIN_ZEROS = 0.5  # a matrix that a .tflite file stores densely is a pruned layer if half of it is zero

_DENSE_NAME = re.compile(r"(.+)[./](?:w|weight|kernel)")
# TensorFlow Lite's fused activations that compile_matmul knows.
_ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "relu6": ("clip", 0.0, 6.0),
    "relu_n1_to_1": ("clip", -1.0, 1.0),
    "tanh": "tanh",
}
_CSR_PARTS = ("data", "indices", "indptr", "shape")
_SMTX_CHARS = bytes(range(48, 58)) + b" \t\r"


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's weights.

    Attributes:
        name: what the file calls it; unique within the file.
        weight: (M, K) with its pattern.
        bias: (M,) float32, where the file has one.
        columns: N, the number of output positions of one image, where the file tells.
        note: what a reader of a benchmark row should know beyond name and shape: where values come from, a stride.
        activation: what follows in the network, as ``compile_matmul`` takes it.
    """

    name: str
    weight: SparseMatrix
    bias: NDArray[np.float32] | None = None
    columns: int | None = None
    note: str = ""
    activation: Activation = None


def load_layers(path: str | os.PathLike[str]) -> list[Layer]:
    """The layers of a file, in its order; see the module's table for formats.

    Raises:
        UnsupportedError: the suffix is none of the table's.
        FormatError: the file is missing, damaged, claims more than it holds, or has no layer.
        ShapeError, DTypeError, ValueRangeError: its weights cannot be compiled (integers, NaN, ...).
        All name the file and, where there is one, the layer.
    """
    text = os.fspath(path)
    archive, colon, member = text.partition(".zip:")
    if colon:
        return _read_archive(Path(archive + ".zip"), [member])
    reader = READERS.get(Path(text).suffix.lower())
    if reader is None:
        raise UnsupportedError(f"files of type {Path(text).suffix or '(none)'} are not read", where=text,
                               hint=f"Weights come as {', '.join(READERS)}.")  # fmt: skip
    layers = reader(Path(text))
    if not layers:
        raise FormatError("the file has no layer to compile", where=text,
                          hint="See the documentation of sparsert.frontend.weights for what is read.")  # fmt: skip
    return layers


def pick(layers: list[Layer], name: str, where: str) -> Layer:
    """The layer of that name; a part or an extension of its path will do where only one layer has it (``conv2d_7``).

    Raises:
        UnsupportedError: no layer has it, or several; the message lists the names.
    """
    found = [layer for layer in layers if layer.name == name] or [
        layer for layer in layers if f"/{name}/" in f"/{layer.name}/" or f"/{layer.name}/" in f"/{name}/"
    ]
    if len(found) != 1:
        what = f"{len(found)} layers are called {name!r}" if found else f"there is no layer {name!r}"
        raise UnsupportedError(what, where=where, hint=f"The file has {some([c.name for c in found or layers], 60)}.")
    return found[0]


def parse_smtx(raw: bytes, where: str) -> SparseMatrix:
    """A pattern of the Deep Learning Matrix Collection (Gale et al., 2020) with standard normal values.

    Three lines of decimal numbers: ``rows, columns, nonzeros``; rows + 1 offsets; the column of each nonzero.  The
    values are ``numpy.random.default_rng(int(pattern.digest, 16)).standard_normal(nnz)`` in CSR order, as float32: a
    pattern has the same values wherever it is read.
    """
    lines = raw.rstrip().split(b"\n", 3) if len(raw) <= MAX_BYTES else []
    head = re.fullmatch(rb"\s*(\d{1,12}),\s*(\d{1,12}),\s*(\d{1,12})\s*", lines[0]) if lines else None
    if head is None:
        raise FormatError("the first line is not 'rows, columns, nonzeros'", where=where)
    rows, cols, nnz = (int(n) for n in head.groups())
    _check_extents((rows, cols), where)
    if len(lines) != (3 if nnz else len(lines)) or len(lines) < 2:
        raise FormatError(f"{len(lines)} lines instead of three", where=where, hint="The file is truncated.")
    indptr = _numbers(lines[1], rows + 1, "row offsets", where)
    indices = _numbers(lines[2] if len(lines) > 2 else b"", nnz, "column indices", where)
    matrix = from_csr(np.ones(nnz, np.float32), indices, indptr, (rows, cols), where)
    if matrix.pattern.nnz != nnz:
        raise FormatError(f"{nnz - matrix.pattern.nnz} columns are repeated within their row", where=where)
    return with_normal_values(matrix.pattern)


def with_normal_values(pattern: Pattern) -> SparseMatrix:
    """A pattern with standard normal values that depend on nothing but the pattern."""
    draw = np.random.default_rng(int(pattern.digest, 16)).standard_normal(pattern.nnz)
    return SparseMatrix(pattern, draw.astype(np.float32))


def _numbers(line: bytes, count: int, what: str, where: str) -> NDArray[np.int64]:
    """Exactly ``count`` decimal numbers out of a line of text."""
    if line.translate(None, _SMTX_CHARS):
        raise FormatError(f"the {what} are not decimal numbers", where=where)
    if count * 2 - 1 > len(line) or not count:  # too few bytes for so many numbers; nothing is parsed
        numbers = np.empty(0, np.int64)
    else:
        numbers = np.fromstring(line, np.int64, sep=" ")
    if numbers.size != count or (not count and line.strip()):
        raise FormatError(f"there are not {count} {what}", where=where, hint="The file is truncated or damaged.")
    return numbers


def _check_extents(shape: tuple[int, ...], where: str) -> None:
    if len(shape) < 2 or min(shape) < 0 or shape[0] > MAX_EXTENT or math.prod(shape[1:]) > MAX_EXTENT:
        raise FormatError(f"shape {shape} is not one of a layer of at most {MAX_EXTENT} rows and columns", where=where)


def _read_npy(path: Path) -> list[Layer]:
    matrix = _dense(read_npy(read_file(path), str(path)), f"{path}: {path.stem}")
    return [Layer(path.stem, matrix)]


def _read_smtx(path: Path) -> list[Layer]:
    return [Layer(path.stem, parse_smtx(read_file(path), f"{path}: {path.stem}"), note=_drawn())]


def _drawn() -> str:
    return "real pattern, values drawn from N(0, 1)"


def _read_archive(path: Path, members: list[str] | None = None) -> list[Layer]:
    """``.smtx`` and ``.npy`` members of a zip archive; a layer is called as its member without the suffix."""
    layers = []
    with Archive(path) as archive:
        for name in members or [n for n in archive.names if n.lower().endswith((".smtx", ".npy"))]:
            member, where = PurePosixPath(name), f"{path}: {name}"
            raw = archive.read(name)
            if member.suffix.lower() == ".smtx":
                layers.append(Layer(str(member.with_suffix("")), parse_smtx(raw, where), note=_drawn()))
            elif member.suffix.lower() == ".npy":
                layers.append(Layer(str(member.with_suffix("")), _dense(read_npy(raw, where), where)))
            else:
                raise UnsupportedError(f"members of type {member.suffix or '(none)'} are not read", where=where,
                                       hint="Members are .smtx or .npy.")  # fmt: skip
    return layers


def _read_npz(path: Path) -> list[Layer]:
    with Archive(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.names if name.endswith(".npy")}
        arrays = {key: read_npy(archive.read(name), f"{path}: {key}") for key, name in members.items()}
    if {"data", "shape", "format"} <= arrays.keys():
        return [Layer(path.stem, _scipy_matrix(arrays, f"{path}: {path.stem}"))]
    layers = []
    for key, array in arrays.items():
        stem, _, part = key.rpartition(".")
        if part == "data" and all(f"{stem}.{other}" in arrays for other in _CSR_PARTS):
            layers.append(_csr_group(arrays, stem, f"{path}: {stem}"))
        elif array.dtype.kind == "f" and (array.ndim == 2 or (array.ndim == 4 and array.shape[2:] == (1, 1))):
            named = _DENSE_NAME.fullmatch(key)
            name = named[1] if named else key
            matrix = _dense(array.reshape(array.shape[:2]), f"{path}: {name}")
            layers.append(Layer(name, matrix, _bias(arrays, name, matrix.shape[0], str(path))))
    return layers


def _csr_group(arrays: Mapping[str, NDArray[Any]], stem: str, where: str) -> Layer:
    """``stem.data/.indices/.indptr/.shape``; four extents (O, I, ky, kx) are a convolution's, columns in that order."""
    data, indices, indptr, extents = (arrays[f"{stem}.{part}"] for part in _CSR_PARTS)
    shape = _extents(extents, where)
    matrix = from_csr(data, indices, indptr, (shape[0], math.prod(shape[1:])), where)
    kernel = "x".join(str(n) for n in shape[2:])
    note = f"conv {kernel}, columns in (input channel, ky, kx) order" if len(shape) > 2 else ""
    return Layer(stem, matrix, _bias(arrays, stem, shape[0], where), note=note)


def _scipy_matrix(arrays: Mapping[str, NDArray[Any]], where: str) -> SparseMatrix:
    """A matrix written by ``scipy.sparse.save_npz``; formats that reduce to CSR by sorting are converted here."""
    form = arrays["format"].tobytes().replace(b"\0", b"").decode("latin-1")  # bytes or UTF-32, by SciPy's version
    needed = {"coo": ("row", "col")}.get(form, ("indices", "indptr"))
    if form not in ("csr", "csc", "bsr", "coo"):
        raise FormatError(f"sparse format {form!r} is not read", where=where, hint="Save matrix.tocsr() instead.")
    if not all(part in arrays for part in needed):
        raise FormatError(f"a {form} matrix has {' and '.join(needed)}", where=where)
    data, shape = arrays["data"], _extents(arrays["shape"], where)
    first, second = (arrays[part].reshape(-1) for part in needed)
    if len(shape) != 2 or first.dtype.kind not in "iu" or second.dtype.kind not in "iu":
        raise FormatError("a sparse matrix has two extents and integer indices", where=where)
    if form == "csr":
        return from_csr(data, first, second, shape, where)
    if form == "csc":
        return from_csr(data, first, second, shape[::-1], where).transpose()
    if form == "bsr":
        data, first, second = _unblock(data, first.astype(np.int64), second.astype(np.int64), shape, where)
    rows, columns = first.astype(np.int64), second.astype(np.int64)
    if rows.size != columns.size or (rows.size and (rows.min() < 0 or rows.max() >= shape[0])):
        raise FormatError(f"{columns.size} columns, {rows.size} rows, or rows outside 0..{shape[0] - 1}", where=where)
    if data.size != rows.size:
        raise FormatError(f"{data.size} values for {rows.size} entries", where=where)
    order = np.argsort(rows, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))]).astype(np.int64)
    return from_csr(data.reshape(-1)[order], columns[order], indptr, shape, where)


def _unblock(
    data: NDArray[Any], indices: NDArray[np.int64], indptr: NDArray[np.int64], shape: tuple[int, ...], where: str
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """The entries (value, row, column) of a block-sparse matrix; every place of a stored block is an entry."""
    if data.ndim != 3 or 0 in data.shape[1:] or shape[0] % data.shape[1] or shape[1] % data.shape[2]:
        raise FormatError(f"blocks of shape {data.shape[1:]} do not tile {shape}", where=where)
    blocks, height, width = data.shape
    if indptr.size != shape[0] // height + 1 or indptr[0] != 0 or np.any(np.diff(indptr) < 0) or indptr[-1] != blocks:
        raise FormatError(f"indptr does not divide {blocks} blocks among {shape[0] // height} block rows", where=where)
    if indices.size != blocks:
        raise FormatError(f"{indices.size} block columns for {blocks} blocks", where=where)
    top = np.repeat(np.arange(indptr.size - 1), np.diff(indptr)) * height
    rows = top[:, None, None] + np.arange(height)[:, None] + np.zeros(width, np.int64)
    columns = (indices * width)[:, None, None] + np.zeros((height, 1), np.int64) + np.arange(width)
    return data.reshape(-1), rows.reshape(-1), columns.reshape(-1)


def _read_tflite(path: Path) -> list[Layer]:
    found, skipped = read_layers(read_file(path), str(path))
    layers = []
    names = _short_names([layer.name for layer in found])
    for layer, name in zip(found, names, strict=True):
        entries = layer.weight.shape[0] * layer.weight.shape[1]
        if layer.encoded or layer.weight.pattern.nnz <= (1 - MIN_ZEROS) * entries:
            facts = [layer.kind] if layer.kind != "conv 1x1" else []
            known = _ACTIVATIONS.get(layer.activation)
            facts += (
                [f"its {layer.activation} left out"]
                if layer.activation and layer.activation not in _ACTIVATIONS
                else []
            )
            facts += [f"stride {layer.stride[0]}x{layer.stride[1]}"] if layer.stride != (1, 1) else []
            layers.append(Layer(name, layer.weight, layer.bias, layer.columns, ", ".join(facts), known))
    if not layers:
        what = f"none of {len(found)} 1x1 convolutions and fully connected layers is pruned"
        raise FormatError(what, where=str(path), hint=f"Left out: {some(skipped, 4)}.")
    return layers


def _short_names(names: list[str]) -> list[str]:
    """Names without the folders that all share (``model/``) and the operator (``/Conv2D``), where they stay unique."""
    parts = [name.split("/") for name in names]
    shared = next((n for n, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), 0)
    shared = max(0, min(shared, min(map(len, parts), default=0) - 2))
    short = [re.sub(r"/(Conv2D|MatMul)\d*$", "", "/".join(part[shared:])) for part in parts]
    return short if len(set(short)) == len(short) and all(short) else names


def _dense(array: NDArray[Any], where: str) -> SparseMatrix:
    if array.ndim >= 2:
        _check_extents(array.shape, where)
    return as_sparse(array, where)


def _extents(array: NDArray[Any], where: str) -> tuple[int, ...]:
    if array.ndim != 1 or array.dtype.kind not in "iu" or not 2 <= array.size <= 4:
        raise FormatError("the stored shape is not two to four integers", where=where)
    shape = tuple(int(n) for n in array)
    _check_extents(shape, where)
    return shape


def _bias(arrays: Mapping[str, NDArray[Any]], name: str, rows: int, where: str) -> NDArray[np.float32] | None:
    """``name.b`` or ``name.bias``."""
    for key in (f"{name}.b", f"{name}.bias", f"{name}/b", f"{name}/bias"):
        if key in arrays:
            bias = arrays[key]
            if bias.shape != (rows,) or bias.dtype.kind != "f":
                raise FormatError(f"bias {key} is {bias.dtype} {bias.shape}, not {rows} floats", where=where)
            with np.errstate(over="ignore"):  # what does not fit is infinite, and said so
                narrow = bias.astype(np.float32)
            require_finite(narrow, f"{where}: {key}")
            return narrow
    return None


READERS: dict[str, Callable[[Path], list[Layer]]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".smtx": _read_smtx,
    ".tflite": _read_tflite,
    ".zip": _read_archive,
}
