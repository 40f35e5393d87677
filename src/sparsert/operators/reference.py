"""The product in NumPy: the ``reference`` target, correct everywhere and slow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..kernels.activations import ACTIVATIONS
from ..schedule.task import Task
from .arrays import Array

_CHUNK = 1 << 22  # products held at once


class ReferenceProduct:
    """``act(W @ x + b)`` over the stored entries alone, accumulated in float64, rounded once."""

    narrowest = 1

    def __init__(self, task: Task) -> None:
        self.task = task
        self._loaded: tuple[NDArray[np.float64], Array | None] = (np.zeros(0), None)

    def load(self, values: Array, bias: Array | None) -> None:
        """New values; calls under way keep the ones they started with."""
        self._loaded = values.astype(np.float64), bias

    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> None:
        """There is nothing to prepare."""

    def run(self, x: Array, y: Array, r: Array | None, columns: int) -> None:
        """The same contract as the native product: x, y and r as the task's layout says."""
        task, loaded = self.task, self._loaded
        if task.layout == "tile_major":
            for tile in range(x.shape[0]):
                self._product(*loaded, x[tile], y[tile], None if r is None else r[tile])
        elif task.layout == "transposed":
            self._product(*loaded, x.T, y.T, None if r is None else r.T)
        else:
            self._product(*loaded, x, y, r)

    def _product(self, values: NDArray[np.float64], bias: Array | None, x: Array, y: Array, r: Array | None) -> None:
        pattern, activation, n = self.task.pattern, self.task.activation, max(1, x.shape[1])
        with np.errstate(all="ignore"):
            start = 0
            while start < pattern.rows:
                stop = max(
                    start + 1, int(np.searchsorted(pattern.indptr, pattern.indptr[start] + _CHUNK // n, "right")) - 1
                )
                stop = min(stop, pattern.rows)
                total = self._rows(values, x, start, stop)
                if bias is not None:
                    total += bias[start:stop, None]
                if r is not None and self.task.residual == "before":
                    total += r[start:stop]
                if activation is not None:
                    total = ACTIVATIONS[activation].reference(total, *self.task.parameters)
                if r is not None and self.task.residual == "after":
                    total = total + r[start:stop]
                y[start:stop] = total
                start = stop

    def _rows(self, values: NDArray[np.float64], x: Array, start: int, stop: int) -> NDArray[np.float64]:
        pattern = self.task.pattern
        lo, hi = int(pattern.indptr[start]), int(pattern.indptr[stop])
        total = np.zeros((stop - start, x.shape[1]))
        if hi > lo:
            products = values[lo:hi, None] * x[pattern.indices[lo:hi]]
            filled = np.flatnonzero(np.diff(pattern.indptr[start : stop + 1]))
            total[filled] = np.add.reduceat(products, pattern.indptr[start:stop][filled] - lo, axis=0)
        return total
