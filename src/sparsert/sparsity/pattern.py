"""The sparsity pattern of a matrix, and how weights in any form become a pattern plus values."""

from __future__ import annotations

import hashlib
import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import DTypeError, FormatError, PatternMismatchError, ShapeError, ValueRangeError

MAX_EXTENT = 2**24  # rows or columns: the byte displacement of any row of a tile then fits 32 bits


class PatternStats(NamedTuple):
    """What one wants to know of a pattern at a glance. ``row_*`` count nonzeros per row."""

    rows: int
    cols: int
    nnz: int
    density: float
    row_min: int
    row_max: int
    row_mean: float
    row_std: float
    empty_rows: int
    empty_cols: int


@dataclass(frozen=True, eq=False)
class Pattern:
    """An immutable CSR pattern without values: ``indptr`` (rows + 1,) int64, sorted unique ``indices`` (nnz,) int32."""

    rows: int
    cols: int
    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]

    def __post_init__(self) -> None:
        self.indptr.setflags(write=False)
        self.indices.setflags(write=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    @property
    def nnz(self) -> int:
        return int(self.indices.size)

    @property
    def density(self) -> float:
        size = self.rows * self.cols
        return self.nnz / size if size else 0.0

    @cached_property
    def row_counts(self) -> NDArray[np.int64]:
        return np.diff(self.indptr)

    @cached_property
    def row_of(self) -> NDArray[np.int32]:
        """The row of every nonzero, in CSR order."""
        return np.repeat(np.arange(self.rows, dtype=np.int32), self.row_counts)

    @cached_property
    def digest(self) -> str:
        """A name of the pattern that is the same in every process: BLAKE2b of shape, row offsets and columns."""
        hasher = hashlib.blake2b(np.array(self.shape, "<i8").tobytes(), digest_size=16)
        hasher.update(self.indptr.astype("<i8", copy=False).tobytes())
        hasher.update(self.indices.astype("<i4", copy=False).tobytes())
        return hasher.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self.shape == other.shape and self.digest == other.digest

    def __hash__(self) -> int:
        return hash((self.shape, self.digest))

    def stats(self) -> PatternStats:
        counts = self.row_counts
        used = np.bincount(self.indices, minlength=self.cols) if self.nnz else np.zeros(self.cols, np.int64)
        some = counts.size > 0
        return PatternStats(
            self.rows, self.cols, self.nnz, self.density,
            int(counts.min()) if some else 0, int(counts.max()) if some else 0,
            float(counts.mean()) if some else 0.0, float(counts.std()) if some else 0.0,
            int((counts == 0).sum()), int((used == 0).sum()),
        )  # fmt: skip

    def values_of(self, weight: Any, where: str = "weight") -> NDArray[np.float32]:
        """The values of ``weight`` at this pattern's places, in CSR order (the heart of ``refit``).

        Raises:
            ShapeError: ``weight`` has another shape.
            PatternMismatchError: it has a nonzero outside the pattern.
        """
        if isinstance(weight, SparseMatrix) or is_sparse(weight) or _is_csr_tuple(weight):
            other = as_sparse(weight, where)
            self._require_shape(other.shape, where)
            values, total = self._matching(other), int(np.count_nonzero(other.values))
        else:
            dense = as_dense_weight(weight, where)
            self._require_shape(dense.shape, where)
            values, total = np.ascontiguousarray(dense[self.row_of, self.indices]), int(np.count_nonzero(dense))
        outside = total - int(np.count_nonzero(values))
        if outside:
            raise PatternMismatchError(
                f"{outside} nonzeros lie outside the compiled pattern ({self.nnz} places)",
                where=where,
                hint="Mask the new weights, or compile a new operator.",
            )
        return values

    def _matching(self, other: SparseMatrix) -> NDArray[np.float32]:
        """The values of another sparse matrix of this shape at this pattern's places, without a dense detour."""
        if other.pattern == self:
            return other.values
        width = max(self.cols, 1)
        mine, theirs = (p.row_of.astype(np.int64) * width + p.indices for p in (self, other.pattern))
        values = np.zeros(mine.size, np.float32)
        if theirs.size:
            at = np.minimum(np.searchsorted(theirs, mine), theirs.size - 1)
            found = theirs[at] == mine
            values[found] = other.values[at[found]]
        return values

    def _require_shape(self, shape: tuple[int, ...], where: str) -> None:
        if shape != self.shape:
            raise ShapeError(
                f"shape {shape} does not fit the compiled {self.shape}",
                where=where,
                hint="Compile a new operator for a new shape.",
            )


@dataclass(frozen=True, eq=False)
class SparseMatrix:
    """A pattern with its float32 values in CSR order. Explicit zeros belong to the pattern."""

    pattern: Pattern
    values: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, int]:
        return self.pattern.shape

    def to_dense(self) -> NDArray[np.float32]:
        dense = np.zeros(self.shape, np.float32)
        dense[self.pattern.row_of, self.pattern.indices] = self.values
        return dense

    def transpose(self) -> SparseMatrix:
        p = self.pattern
        order = np.lexsort((p.row_of, p.indices))
        indptr = np.concatenate([[0], np.cumsum(np.bincount(p.indices, minlength=p.cols))]).astype(np.int64)
        return SparseMatrix(Pattern(p.cols, p.rows, indptr, p.row_of[order]), self.values[order])


def is_sparse(weight: Any) -> bool:
    """Whether ``weight`` is a matrix in one of scipy.sparse's formats (recognised without importing SciPy)."""
    return hasattr(weight, "tocsr") and hasattr(weight, "nnz")


def _is_csr_tuple(weight: Any) -> bool:
    return isinstance(weight, tuple) and len(weight) == 4


def as_sparse(weight: Any, where: str = "weight") -> SparseMatrix:
    """Weights in any accepted form as pattern plus values.

    A dense array's pattern is ``weight != 0``.  A CSR triple ``(data, indices, indptr, shape)`` or a scipy.sparse
    matrix keeps its stored entries, explicit zeros included, duplicates summed.

    Raises:
        ShapeError, DTypeError, FormatError, ValueRangeError: see :mod:`sparsert.errors`.
    """
    if isinstance(weight, SparseMatrix):
        return weight
    if is_sparse(weight):
        csr = weight.tocsr()
        return from_csr(csr.data, csr.indices, csr.indptr, csr.shape, where)
    if _is_csr_tuple(weight):
        data, indices, indptr, shape = weight
        return from_csr(data, indices, indptr, shape, where)
    dense = as_dense_weight(weight, where)
    rows, cols = dense.shape
    flat = np.flatnonzero(dense != 0)
    values = dense.reshape(-1).take(flat)
    require_finite(values, where)  # NaN counts as nonzero
    indptr = np.searchsorted(flat, np.arange(rows + 1) * cols)
    indices = (flat - np.repeat(np.arange(rows) * cols, np.diff(indptr))).astype(np.int32)
    return SparseMatrix(Pattern(rows, cols, indptr, indices), values)


_CSR_HINT = "Pass (data, indices, indptr, shape) as scipy.sparse.csr_matrix holds them."


def from_csr(data: Any, indices: Any, indptr: Any, shape: Any, where: str = "weight") -> SparseMatrix:
    """A validated CSR matrix; columns are sorted within their row and duplicates summed."""
    try:
        extents = [operator.index(n) for n in np.asarray(shape, object).reshape(-1)]
    except TypeError as error:
        raise ShapeError(f"a CSR shape is two integers, not {shape!r}", where=where, hint=_CSR_HINT) from error
    if len(extents) != 2:
        raise ShapeError(f"a CSR shape has two extents, not {len(extents)}", where=where, hint=_CSR_HINT)
    rows, cols = extents
    _check_extents(rows, cols, where)
    try:
        values, columns, offsets = np.asarray(data).reshape(-1), np.asarray(indices).reshape(-1), np.asarray(indptr)
    except (TypeError, ValueError) as error:
        raise FormatError(f"not a CSR tuple: {error}", where=where, hint=_CSR_HINT) from error
    if columns.dtype.kind not in "iu" or offsets.dtype.kind not in "iu":
        raise FormatError("CSR indices and indptr are integers", where=where, hint=_CSR_HINT)
    columns, offsets = columns.astype(np.int64), offsets.reshape(-1).astype(np.int64)
    if offsets.size != rows + 1 or offsets[0] != 0 or np.any(np.diff(offsets) < 0) or offsets[-1] != columns.size:
        raise FormatError(
            f"indptr is not a rising offset table of {rows + 1} entries from 0 to {columns.size}",
            where=where,
            hint=_CSR_HINT,
        )
    if values.size != columns.size:
        raise FormatError(f"{values.size} values for {columns.size} column indices", where=where, hint=_CSR_HINT)
    if columns.size and (columns.min() < 0 or columns.max() >= cols):
        raise FormatError(f"column indices reach outside 0..{cols - 1}", where=where, hint=_CSR_HINT)
    values = _as_float32(values, where)
    require_finite(values, where)
    row_of = np.repeat(np.arange(rows, dtype=np.int64), np.diff(offsets))
    key = row_of * max(cols, 1) + columns
    if np.any(np.diff(key) <= 0):
        unique, inverse = np.unique(key, return_inverse=True)
        summed = np.zeros(unique.size, np.float64)
        np.add.at(summed, inverse, values)
        with np.errstate(over="ignore"):
            values, key = summed.astype(np.float32), unique
        require_finite(values, where)
        row_of, columns = np.divmod(key, max(cols, 1))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))]).astype(np.int64)[: rows + 1]
    return SparseMatrix(Pattern(rows, cols, offsets, columns.astype(np.int32)), np.ascontiguousarray(values))


def as_dense_weight(weight: Any, where: str) -> NDArray[np.float32]:
    """A C-contiguous float32 matrix (DLPack accepted), or an error that says what is wrong with it."""
    if not isinstance(weight, np.ndarray) and hasattr(weight, "__dlpack__"):
        try:
            weight = np.from_dlpack(weight)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise DTypeError(f"this tensor cannot be viewed as a CPU array: {error}", where=where,
                             hint="Detach it and move it to the CPU.") from error  # fmt: skip
    try:
        array = np.asarray(weight)
    except ValueError as error:
        raise ShapeError(
            f"this is no matrix: {error}",
            where=where,
            hint="Pass a two-dimensional array, or (data, indices, indptr, shape).",
        ) from error
    if array.ndim != 2:
        raise ShapeError(f"a weight matrix has two dimensions, not {array.ndim}", where=where,
                         hint="Reshape a 1x1 convolution's (O, I, 1, 1) to (O, I).")  # fmt: skip
    rows, cols = array.shape
    _check_extents(rows, cols, where)
    return np.ascontiguousarray(_as_float32(array, where))


def require_finite(values: NDArray[np.float32], where: str) -> None:
    """Raise ValueRangeError where a weight is NaN or infinite."""
    bad = values.size - int(np.count_nonzero(np.isfinite(values)))
    if bad:
        raise ValueRangeError(
            f"{bad} of {values.size} values are NaN or infinite in float32",
            where=where,
            hint="Repair the checkpoint: a pruned network cannot run on non-finite weights.",
        )


def _as_float32(array: NDArray[Any], where: str) -> NDArray[np.float32]:
    if array.dtype.kind != "f":
        raise DTypeError(
            f"weights are floating point, not {array.dtype}", where=where, hint="Convert with .astype('float32')."
        )
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def _check_extents(rows: int, cols: int, where: str) -> None:
    if not (0 <= rows <= MAX_EXTENT and 0 <= cols <= MAX_EXTENT):
        raise ValueRangeError(f"a {rows} x {cols} matrix is beyond {MAX_EXTENT} rows or columns", where=where)
