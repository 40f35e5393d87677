"""Convolutions that loop over the pattern as data, where unrolled code would be too large.

The kernel is the one of products (:mod:`sparsert.kernels.looped`): a row of x is a displacement that some tap reads,
``plane * P + row * pitch + column`` behind the first position of the planes, and its list of row offsets is made of
these as soon as the image's shape is known. Columns are the positions of an output plane, those between its rows too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.lib.stride_tricks import as_strided

from ..kernels.plan import fold_width
from ..runtime.cpu import address_of
from ..runtime.memory import aligned_empty
from ..schedule.task import Task
from ..sparsity.geometry import Band, Geometry, Padding, bands
from ..sparsity.pattern import Pattern
from ..sparsity.taps import Window
from ..target import Target
from .arrays import Array
from .compact import CompactProduct

_PLANES = 2 << 20  # floats that the planes of a band take at most: copies stay in caches, scratch stays small
_MOST_KEPT = 32 << 20  # and floats that are kept from call to call
_MOST_SHAPES = 32


class LoopedConv:
    """A convolution over (B, C, H, W) arrays as a product that loops over its pattern, to the bits of unrolled code.

    Images are copied into padded planes, band by band, and results out of theirs. Any number of threads may call.
    """

    narrowest = 0

    def __init__(self, task: Task, target: Target, window: Window, padding: Padding) -> None:
        self.task, self.window, self.padding = task, replace(window, masked=False), padding
        taps, pattern = task.taps, task.pattern
        # Where sums are cut into folds, their borders are counted in displacements: all of them are rows of x then.
        folds = fold_width(int(pattern.row_counts.max(initial=0)), taps.extent)
        read = np.arange(taps.extent) if folds else np.unique(taps.key)
        self._order = np.lexsort((taps.key, taps.row))
        columns = np.searchsorted(read, taps.key[self._order]).astype(np.int32)
        as_product = Pattern(pattern.rows, read.size, pattern.indptr, columns)
        self.product = CompactProduct(replace(task, pattern=as_product, window=None), target, by_lookup=False)
        self.places = taps.place(read)
        self._bands: dict[tuple[int, int], list[Band]] = {}
        self._free: dict[Band, list[_Planes]] = {}
        self._kept = 0  # floats, roughly: threads may count at once

    @property
    def code_bytes(self) -> int:
        return self.product.code_bytes

    def listing(self) -> str:
        """The code as text."""
        return self.product.listing()

    def load(self, values: Array, bias: Array | None) -> None:
        """Pack new values; calls under way keep the ones they started with."""
        self.product.load(values[self._order], bias)

    def bind(self, x: Array, y: Array, r: Array | None, columns: int) -> None:
        """There is nothing to prepare: calls copy."""

    def run(self, x: Array, y: Array, r: Array | None, columns: int) -> None:
        """One call, for images of ``columns`` columns."""
        loaded = self.product.values[0]  # held here: a refit meanwhile does not free what this call reads
        for band in self._cut((x.shape[2], columns)):
            free = self._free.setdefault(band, [])
            try:
                planes = free.pop()
            except IndexError:
                planes = self._planes(band)
            planes.frame.aim(*planes.addresses, loaded.addresses)
            for image in range(x.shape[0]):
                planes.run(x[image], y[image], None if r is None else r[image])
            free.append(planes)

    def _cut(self, size: tuple[int, int]) -> list[Band]:
        """The bands of an image of ``size``; too many sizes, and all are forgotten."""
        found = self._bands.get(size)
        if found is None:
            geometry = Geometry(self.window, size, self.padding.resolve(size, self.window))
            inputs = self.window.channels(self.task.pattern.cols) * len(self.window.phases)
            outputs = self.task.pattern.rows * (2 if self.task.residual else 1)
            found = bands(geometry, inputs, outputs, _PLANES)
            if len(self._bands) >= _MOST_SHAPES or self._kept > _MOST_KEPT:
                self._bands, self._free, self._kept = {}, {}, 0
            self._bands[size] = found
        return found

    def _planes(self, band: Band) -> _Planes:
        made = _Planes(self, band)
        self._kept += made.floats
        return made


class _Planes:
    """What a call for one band has to itself: planes, views of them, and the argument block of the product."""

    def __init__(self, conv: LoopedConv, band: Band) -> None:
        task, window, width = conv.task, conv.window, conv.product.width
        m, phases, positions = task.pattern.rows, len(window.phases), band.positions
        channels, self.band = window.channels(task.pattern.cols), band
        x = aligned_empty(max(1, channels * phases * band.floats))
        outputs = [aligned_empty(max(1, m * positions)) for _ in range(2 if task.residual else 1)]
        for array in (x, *outputs):
            array[:] = 0
        self.floats = x.size + sum(array.size for array in outputs)
        self.kept = x, outputs
        self.addresses = address_of(x), address_of(outputs[0]), address_of(outputs[-1]) if task.residual else 0
        plane, row, column = conv.places
        offsets = 4 * (plane * band.floats + row * band.pitch + column)
        self.frame = conv.product.frame_for(
            positions, offsets, [4 * positions] * 2, [4] * 3, [4 * width] * 3, 0, conv.product.stream.bundles
        )
        by_phase = x[: channels * phases * band.floats].reshape(channels, phases, band.floats)
        self.x = list(self._inputs(by_phase, window))
        steps = 4 * positions, 4 * band.pitch, 4
        self.y, *rest = (as_strided(array, (m, *band.out), steps) for array in outputs)
        self.r = rest[0] if rest else None

    def _inputs(self, by_phase: Array, window: Window) -> Iterator[tuple[tuple[slice, ...], Array]]:
        """What of an image goes where."""
        (sh, sw), pitch = window.stride, self.band.pitch
        for phase, (rows, columns) in enumerate(self.band.runs):
            if by_phase.size and rows.count and columns.count:
                first = by_phase[:, phase, rows.zeros * pitch + columns.zeros :]
                inside = as_strided(
                    first, (first.shape[0], rows.count, columns.count), (first.strides[0], 4 * pitch, 4)
                )
                down = slice(rows.first, rows.first + (rows.count - 1) * sh + 1, sh)
                across = slice(columns.first, columns.first + (columns.count - 1) * sw + 1, sw)
                yield (slice(None), down, across), inside

    def run(self, x: Array, y: Array, r: Array | None) -> None:
        """One image."""
        for place, inside in self.x:
            inside[...] = x[place]
        here = np.s_[:, self.band.rows[0] : self.band.rows[1], self.band.columns[0] : self.band.columns[1]]
        if self.r is not None and r is not None:
            self.r[...] = r[here]
        self.frame.call(self.frame.address)
        y[here] = self.y
