"""Convolutions that a caller asked for, their arguments checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .errors import ShapeError, UnsupportedError, ValueRangeError
from .operators.arrays import Array
from .operators.conv import as_weight, flat
from .operators.conv_transpose import Phase, part_of, phase_title, phases, transposed_weight
from .request import make_task
from .schedule.task import Task
from .sparsity.geometry import MAX_PADDING, Geometry, Padding, pair
from .sparsity.geometry import padding as read_padding
from .sparsity.pattern import SparseMatrix, as_sparse
from .sparsity.taps import Window
from .target import Target

_MOST_SPAN = 1 << 24  # elements that a kernel spans,
_MOST_PLANES = 1 << 28  # and all its channels: planes are about as large
MOST_PHASES = 1 << 12


class Layer(NamedTuple):
    """A convolution, its arguments checked."""

    task: Task
    window: Window
    padding: Padding
    axes: int
    values: Array
    bias: Array | None

    def describe(self, size: Any) -> str:
        """The kernel and the images of ``size``, in words."""
        (_, _, height, width), _ = self.shapes(size)
        (kh, kw), (sh, sw) = self.window.kernel, self.window.stride
        return f"kernel {kh}x{kw}, stride {sh}x{sw}, images of {height}x{width}"

    def shapes(self, size: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of x and y for one image of ``size``; without a size, the least whose output is 14 x 14 (or 196 long)."""
        window, pads = self.window, self.padding.pads
        if size is None:
            wanted = (14, 14) if self.axes == 2 else (1, 196)
            least = ((o - 1) * s + span for o, s, span in zip(wanted, window.stride, window.span, strict=True))
            image = [
                max(1, n - sum(pads[axis]) if pads else wanted[axis] * window.stride[axis])
                for axis, n in enumerate(least)
            ]
        else:
            image = [*pair(size, "size", 1)] if self.axes == 2 else [1, pair(size, "size", 1)[1]]
        extent = image[0], image[1]
        p = self.task.pattern
        out = Geometry(window, extent, self.padding.resolve(extent, window)).out
        return (1, window.channels(p.cols), *extent), (1, p.rows, *out)


def layers_of(
    weight: Any, bias: Any, activation: Any, stride: Any, padding: Any, dilation: Any, groups: Any, kernel: Any,
    transposed: bool, output_padding: Any, residual: str | None, target: Target,
) -> list[tuple[str, Layer]]:  # fmt: skip
    """A convolution of images, or along one axis where the weight has three dimensions, as one layer without a name; a
    transposed one as its phases, each with the line that stands above its listing."""
    axes = 1 if getattr(weight, "ndim", 0) == 3 else 2
    if not transposed:
        if np.any(np.asarray(output_padding, object) != 0):
            raise UnsupportedError("only a transposed convolution has one", where="output_padding")
        if axes == 1:
            return [("", line_of(weight, kernel, stride, padding, dilation, groups, bias, activation, residual, "f32",
                                 target))]  # fmt: skip
        return [("", layer_of(weight, kernel, 2, stride, read_padding(padding), dilation, groups, bias, activation,
                              residual, "f32", target))]  # fmt: skip
    if kernel is not None:
        matrix, places = _weight(weight, kernel, 2)
        weight = matrix.to_dense().reshape(matrix.shape[0], -1, *places)
    dense = transposed_weight(weight, groups)
    found = phases_of(dense, bias, activation, stride, padding, output_padding, dilation, groups, residual, "f32",
                      target)  # fmt: skip
    return [(phase_title(row, column), layer) for row, column, layer in found]


def layer_of(
    weight: Any, kernel: Any, axes: int, stride: Any, pads: Padding, dilation: Any, groups: Any, bias: Any,
    activation: Any, residual: str | None, precision: str, target: Target,
) -> Layer:  # fmt: skip
    matrix, (kh, kw) = _weight(weight, kernel, axes)
    window = Window((kh, kw), pair(stride, "stride", 1), pair(dilation, "dilation", 1), _groups(groups, matrix))
    _check_span(window, window.channels(matrix.shape[1]))
    window = replace(window, masked=1 <= window.kernel[1] <= target.masks and pads.covers(window))
    task, b = make_task(matrix, bias, activation, residual, precision, "row_major")
    return Layer(replace(task, window=window), window, pads, axes, matrix.values, b)


def line_of(
    weight: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, groups: Any, bias: Any, activation: Any,
    residual: str | None, precision: str, target: Target,
) -> Layer:  # fmt: skip
    """A convolution along one axis, as one of images of a single row."""
    pads = padding
    if not isinstance(padding, str):
        pads = ((0, 0), pair(padding, "padding", 0))
    (_, s), (_, d) = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    places = None if kernel is None else (1, kernel)
    return layer_of(weight, places, 1, (1, s), read_padding(pads), (1, d), groups, bias, activation, residual,
                  precision, target)  # fmt: skip


def phases_of(
    dense: Array, bias: Any, activation: Any, stride: Any, padding: Any, output_padding: Any, dilation: Any,
    groups: Any, residual: str | None, precision: str, target: Target,
) -> list[tuple[Phase, Phase, Layer]]:  # fmt: skip
    """The convolutions that a transposed one of weight ``dense`` (O, C / groups, kh, kw) consists of."""
    s, d, extra = pair(stride, "stride", 1), pair(dilation, "dilation", 1), pair(output_padding, "output_padding", 0)
    if any(e >= max(a, b) for e, a, b in zip(extra, s, d, strict=True)):
        raise ValueRangeError(f"{extra} is not smaller than stride {s} or dilation {d}", where="output_padding")
    if s[0] * s[1] > MOST_PHASES:
        raise ValueRangeError(f"{s[0]} x {s[1]} phases are more than {MOST_PHASES}", where="stride",
                              hint="Use smaller strides.")  # fmt: skip
    pads = read_padding(padding).pads
    if pads is None:
        raise UnsupportedError("a rule does not pad a transposed convolution", where="padding", hint="Give numbers.")
    kernel = dense.shape[2:]
    _check_span(Window((kernel[0], kernel[1]), dilation=d), dense.shape[1] * groups)
    rows, columns = (phases(k, a, b, p, e) for k, a, b, p, e in zip(kernel, s, d, pads, extra, strict=True))
    return [
        (row, column, layer_of(
            part_of(dense, row, column), None, 2, 1, Padding((row.pads, column.pads)), (row.dilation, column.dilation),
            groups, bias, activation, residual, precision, target,
        ))
        for row in rows for column in columns
    ]  # fmt: skip


def _check_span(window: Window, channels: int) -> None:
    """What a kernel spans has to fit planes that fit memory."""
    rows, columns = window.span
    span = rows * columns
    if span > _MOST_SPAN or span * channels > _MOST_PLANES or max(rows, columns) > MAX_PADDING:
        raise ValueRangeError(
            f"a kernel of {window.kernel[0]} x {window.kernel[1]} places spans {rows} x {columns} elements "
            f"of {channels} channels",
            where="dilation",
            hint=f"At most {MAX_PADDING} along an axis, {_MOST_SPAN} in a channel and {_MOST_PLANES} in all will do.",
        )


def _weight(weight: Any, kernel: Any, axes: int) -> tuple[SparseMatrix, tuple[int, int]]:
    """The weight as a matrix, and the extents of its kernel."""
    if kernel is not None:
        kh, kw = pair(kernel, "kernel", 1)
        matrix = as_sparse(flat(weight))
        if matrix.shape[1] % (kh * kw):
            raise ShapeError(
                f"{matrix.shape[1]} columns are no multiple of the {kh} x {kw} of a kernel",
                where="weight",
                hint="Columns are (channel, kernel row, kernel column).",
            )
        return matrix, (kh, kw)
    if not isinstance(weight, np.ndarray) and hasattr(weight, "__dlpack__"):
        weight = as_weight(weight)
    shape = getattr(weight, "shape", ())
    if len(shape) != 2 + axes or isinstance(weight, (SparseMatrix, tuple)):
        raise ShapeError(
            f"a weight of shape {tuple(shape)} has not {2 + axes} dimensions",
            where="weight",
            hint="Pass (O, C / groups, kernel ...), or a matrix and kernel=.",
        )
    if min(shape[2:]) < 1:
        raise ShapeError(f"a kernel of {tuple(shape[2:])} is empty", where="weight")
    places = (1, *shape[2:])[-2:]
    return as_sparse(flat(weight)), (int(places[0]), int(places[1]))


def _groups(groups: Any, matrix: SparseMatrix) -> int:
    if not isinstance(groups, (int, np.integer)) or isinstance(groups, bool) or groups < 1:
        raise ValueRangeError(f"{groups!r} is not a positive integer", where="groups")
    if matrix.shape[0] % int(groups):
        raise ShapeError(f"{matrix.shape[0]} output channels cannot be cut into {groups} groups", where="groups")
    return int(groups)
