"""``compile_conv2d`` and its kin: convolutions, through the same chain as products."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .compiler import build, build_looped
from .errors import CodeBudgetError, ShapeError, UnsupportedError, ValueRangeError
from .kernels import depthwise
from .operators import tuned
from .operators.arrays import Array
from .operators.conv import CompiledConv, ReferenceConv, as_weight, flat
from .operators.conv_transpose import (
    CompiledConvTranspose,
    Part,
    Phase,
    part_of,
    phases,
    together,
    transposed_weight,
)
from .operators.depthwise import DepthwiseProduct
from .operators.images import ConvProduct
from .operators.looped_conv import LoopedConv
from .request import Request, make_request, make_task
from .schedule.schedule import Schedule
from .schedule.task import Task
from .sparsity.geometry import MAX_PADDING, Geometry, Padding, pair
from .sparsity.geometry import padding as read_padding
from .sparsity.pattern import SparseMatrix, as_sparse
from .sparsity.taps import Window
from .target import Target

_MOST_SPAN = 1 << 24  # elements that a kernel spans: a plane is at least as large
_MOST_PHASES = 1 << 12


def compile_conv2d(
    weight: Any, bias: Any = None, activation: Any = None, *, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1, kernel: Any = None, residual: str | None = None, precision: str = "f32", target: str = "native",
    threads: int | None = None, schedule: Schedule | None = None, max_code_bytes: int | None = None,
    tune: str | None = None, tuning: str | os.PathLike[str] | None = None, size: Any = None,
) -> CompiledConv:  # fmt: skip
    """Compile ``y = act(conv2d(x, W) + b)`` for a sparse W; x (B, C, H, W) of any B, H and W.

    Args:
        weight: (O, C / groups, kh, kw), its pattern is ``weight != 0``; or, with ``kernel``, a matrix
            (O, C / groups * kh * kw) in any form that :func:`compile_matmul` takes.
        stride, dilation: an integer, or (rows, columns).
        padding: an integer, (rows, columns), ((top, bottom), (left, right)), "same_upper" or "same_lower" (as ONNX's
            ``auto_pad``).
        groups: channels of input and output are cut into so many groups; C of them is a depthwise convolution.
        kernel: (kh, kw) of a weight that is given as a matrix.
        bias, activation, residual, precision, target, threads, schedule, max_code_bytes, tune, tuning: as for
            :func:`compile_matmul`. A depthwise convolution that reads x in place has no schedule to tune.
        size: (H, W) of an image to tune for and to look up; by default one whose output is 14 x 14. Any size can be
            computed.

    Raises:
        The errors of :func:`compile_matmul`. At a call, ShapeError where the padded image is smaller than a kernel.
    """
    request = _request(target, threads, schedule, max_code_bytes, tune, tuning)
    layer = _layer(weight, kernel, 2, stride, read_padding(padding), dilation, groups, bias, activation, residual,
                   precision, request.target)  # fmt: skip
    return _compile(layer, request, size)


def compile_conv1d(
    weight: Any, bias: Any = None, activation: Any = None, *, stride: int = 1, padding: Any = 0, dilation: int = 1,
    groups: int = 1, kernel: int | None = None, residual: str | None = None, precision: str = "f32",
    target: str = "native", threads: int | None = None, schedule: Schedule | None = None,
    max_code_bytes: int | None = None, tune: str | None = None, tuning: str | os.PathLike[str] | None = None,
    size: int | None = None,
) -> CompiledConv:  # fmt: skip
    """Compile ``y = act(conv1d(x, W) + b)`` for a sparse W (O, C / groups, k); x (B, C, L) to y (B, O, L').

    ``padding`` is an integer, (left, right), "same_upper" or "same_lower", ``size`` a length; all else as for
    :func:`compile_conv2d`.
    """
    request = _request(target, threads, schedule, max_code_bytes, tune, tuning)
    layer = _line(weight, kernel, stride, padding, dilation, groups, bias, activation, residual, precision,
                  request.target)  # fmt: skip
    return _compile(layer, request, size)


def _line(
    weight: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, groups: Any, bias: Any, activation: Any,
    residual: str | None, precision: str, target: Target,
) -> _Layer:  # fmt: skip
    """A convolution along one axis, as one of images of a single row."""
    pads = padding
    if not isinstance(padding, str):
        pads = ((0, 0), pair(padding, "padding", 0))
    (_, s), (_, d) = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    places = None if kernel is None else (1, kernel)
    return _layer(weight, places, 1, (1, s), read_padding(pads), (1, d), groups, bias, activation, residual,
                  precision, target)  # fmt: skip


class _Layer(NamedTuple):
    """A convolution, its arguments checked."""

    task: Task
    window: Window
    padding: Padding
    axes: int
    values: Array
    bias: Array | None

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


def _request(target: str, threads: int | None, schedule: Schedule | None, max_code_bytes: int | None, tune: str | None,
             tuning: str | os.PathLike[str] | None) -> Request:  # fmt: skip
    wanted = tuned.request(tune, tuning, None)
    if schedule is not None and tune is not None:
        raise UnsupportedError("a given schedule leaves nothing to tune", where="tune", hint="Give one of the two.")
    return make_request(target, threads, schedule, max_code_bytes, wanted)


def _layer(
    weight: Any, kernel: Any, axes: int, stride: Any, pads: Padding, dilation: Any, groups: Any, bias: Any,
    activation: Any, residual: str | None, precision: str, target: Target,
) -> _Layer:  # fmt: skip
    matrix, (kh, kw) = _weight(weight, kernel, axes)
    window = Window((kh, kw), pair(stride, "stride", 1), pair(dilation, "dilation", 1), _groups(groups, matrix))
    _check_span(window)
    window = replace(window, masked=1 <= window.kernel[1] <= target.masks and pads.covers(window))
    task, b = make_task(matrix, bias, activation, residual, precision, "row_major")
    return _Layer(replace(task, window=window), window, pads, axes, matrix.values, b)


def _compile(layer: _Layer, request: Request, size: Any, looped: bool = False) -> CompiledConv:
    """``looped``: as if unrolled code had turned out to be too large."""
    started = time.perf_counter()
    task, window, pads = layer.task, layer.window, layer.padding
    in_place = depthwise.fits(task, request.target)
    if size is not None or request.tuning is not None:
        shapes = layer.shapes(size)  # which checks the size, be it used or not
        wanted = None if in_place or request.tuning is None else request.tuning.on(shapes)
        request = request._replace(tuning=wanted)
    native = DepthwiseProduct if in_place else ConvProduct
    try:
        if looped:
            raise CodeBudgetError("all phases together are too large", where="max_code_bytes")
        compiled = build(
            task, layer.values, layer.bias, request, started,
            partial(native, window=window, padding=pads), partial(ReferenceConv, window=window, padding=pads),
        )  # fmt: skip
    except CodeBudgetError:
        if request.schedule is not None or not request.target.loops:
            raise
        product = LoopedConv(task, request.target, window, pads)
        compiled = build_looped(task, layer.values, layer.bias, request, started, product)
    if isinstance(compiled.product, DepthwiseProduct):
        compiled.product.room = request.budget - compiled.stats.code_bytes
    return CompiledConv(compiled, layer.bias, window, pads, layer.axes)


def _check_span(window: Window) -> None:
    """What a kernel spans has to fit planes that fit memory."""
    rows, columns = window.span
    if rows * columns > _MOST_SPAN or max(rows, columns) > MAX_PADDING:
        raise ValueRangeError(
            f"a kernel of {window.kernel[0]} x {window.kernel[1]} places spans {rows} x {columns} elements",
            where="dilation",
            hint=f"At most {_MOST_SPAN} together and {MAX_PADDING} along an axis are possible.",
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


def compile_conv_transpose2d(
    weight: Any, bias: Any = None, activation: Any = None, *, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, dilation: Any = 1, groups: int = 1, residual: str | None = None, precision: str = "f32",
    target: str = "native", threads: int | None = None, schedule: Schedule | None = None,
    max_code_bytes: int | None = None, tune: str | None = None, tuning: str | os.PathLike[str] | None = None,
    size: Any = None,
) -> CompiledConvTranspose:  # fmt: skip
    """Compile ``y = act(conv_transpose2d(x, W) + b)``, as ``torch.nn.ConvTranspose2d``.

    Each phase of the output, its rows and columns ``stride`` apart, is a convolution of stride 1 with those kernel
    places that reach it: nothing is multiplied with zeros that a stride would insert.

    Args:
        weight: dense (C, O / groups, kh, kw); its pattern is ``weight != 0``.
        padding: zeros that the convolution it transposes would add: an integer, (rows, columns) or
            ((top, bottom), (left, right)).
        output_padding: rows and columns added at the end; less than stride or dilation.
        stride, dilation: an integer, or (rows, columns); there are ``stride`` times ``stride`` phases, at most 4,096.
        schedule: of all phases.
        max_code_bytes: for all phases together; where unrolled code would take more, all loop over their patterns.
        groups, bias, activation, residual, precision, target, threads, tune, tuning, size: as for
            :func:`compile_conv2d`; phases are tuned, and shared out over threads, one by one.

    Raises:
        The errors of :func:`compile_conv2d`. At a call, ShapeError where padding leaves nothing of the output.
    """
    started = time.perf_counter()
    request = _request(target, threads, schedule, max_code_bytes, tune, tuning)
    layers = _phases(weight, bias, activation, stride, padding, output_padding, dilation, groups, residual, precision,
                     request.target)  # fmt: skip
    parts = [Part(row, column, _compile(layer, request, size)) for row, column, layer in layers]
    shape = np.asarray(as_weight(weight)).shape
    if together(parts, 1, 0.0).code_bytes > request.budget:
        parts = [Part(row, column, _compile(layer, request, size, True)) for row, column, layer in layers]
    stats = together(parts, int(np.prod(shape)), time.perf_counter() - started)
    return CompiledConvTranspose(tuple(parts), pair(stride, "stride", 1), groups, shape, stats)


def _phases(
    weight: Any, bias: Any, activation: Any, stride: Any, padding: Any, output_padding: Any, dilation: Any, groups: Any,
    residual: str | None, precision: str, target: Target,
) -> list[tuple[Phase, Phase, _Layer]]:  # fmt: skip
    """The convolutions that a transposed one consists of."""
    s, d, extra = pair(stride, "stride", 1), pair(dilation, "dilation", 1), pair(output_padding, "output_padding", 0)
    if any(e >= max(a, b) for e, a, b in zip(extra, s, d, strict=True)):
        raise ValueRangeError(f"{extra} is not smaller than stride {s} or dilation {d}", where="output_padding")
    if s[0] * s[1] > _MOST_PHASES:
        raise ValueRangeError(f"{s[0]} x {s[1]} phases are more than {_MOST_PHASES}", where="stride",
                              hint="Use smaller strides.")  # fmt: skip
    pads = read_padding(padding).pads
    if pads is None:
        raise UnsupportedError("a rule does not pad a transposed convolution", where="padding", hint="Give numbers.")
    dense = transposed_weight(weight, groups)
    kernel = dense.shape[2:]
    _check_span(Window((kernel[0], kernel[1]), dilation=d))
    rows, columns = (phases(k, a, b, p, e) for k, a, b, p, e in zip(kernel, s, d, pads, extra, strict=True))
    return [
        (row, column, _layer(
            part_of(dense, row, column), None, 2, 1, Padding((row.pads, column.pads)), (row.dilation, column.dilation),
            groups, bias, activation, residual, precision, target,
        ))
        for row in rows for column in columns
    ]  # fmt: skip
