"""``compile_conv2d`` and its kin: convolutions, through the same chain as products."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from .compiler import build, build_looped
from .errors import CodeBudgetError, ShapeError, UnsupportedError, ValueRangeError
from .kernels import depthwise
from .operators.conv import CompiledConv, ReferenceConv, as_weight, flat
from .operators.conv_transpose import (
    CompiledConvTranspose,
    Part,
    part_of,
    phases,
    transposed_weight,
)
from .operators.depthwise import DepthwiseProduct
from .operators.images import ConvProduct
from .operators.looped_conv import LoopedConv
from .request import make_request, make_task
from .schedule.schedule import Schedule
from .sparsity.geometry import Padding, pair
from .sparsity.geometry import padding as read_padding
from .sparsity.pattern import SparseMatrix, as_sparse
from .sparsity.taps import Window


def compile_conv2d(
    weight: Any, bias: Any = None, activation: Any = None, *, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1, kernel: Any = None, residual: str | None = None, precision: str = "f32", target: str = "native",
    threads: int | None = None, schedule: Schedule | None = None, max_code_bytes: int | None = None,
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
        bias, activation, residual, precision, target, threads, schedule, max_code_bytes: as for :func:`compile_matmul`.

    Raises:
        The errors of :func:`compile_matmul`. At a call, ShapeError where the padded image is smaller than a kernel.
    """
    return _compile(weight, kernel, 2, stride, read_padding(padding), dilation, groups, bias, activation, residual,
                    precision, target, threads, schedule, max_code_bytes)  # fmt: skip


def compile_conv1d(
    weight: Any, bias: Any = None, activation: Any = None, *, stride: int = 1, padding: Any = 0, dilation: int = 1,
    groups: int = 1, kernel: int | None = None, residual: str | None = None, precision: str = "f32",
    target: str = "native", threads: int | None = None, schedule: Schedule | None = None,
    max_code_bytes: int | None = None,
) -> CompiledConv:  # fmt: skip
    """Compile ``y = act(conv1d(x, W) + b)`` for a sparse W (O, C / groups, k); x (B, C, L) to y (B, O, L').

    ``padding`` is an integer, (left, right), "same_upper" or "same_lower"; all else as for :func:`compile_conv2d`.
    """
    pads = padding
    if not isinstance(padding, str):
        pads = ((0, 0), pair(padding, "padding", 0))
    (_, s), (_, d) = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    places = None if kernel is None else (1, kernel)
    return _compile(weight, places, 1, (1, s), read_padding(pads), (1, d), groups, bias, activation, residual,
                    precision, target, threads, schedule, max_code_bytes)  # fmt: skip


def _compile(
    weight: Any, kernel: Any, axes: int, stride: Any, pads: Padding, dilation: Any, groups: int, bias: Any,
    activation: Any, residual: str | None, precision: str, target: str, threads: int | None,
    schedule: Schedule | None, max_code_bytes: int | None,
) -> CompiledConv:  # fmt: skip
    started = time.perf_counter()
    matrix, (kh, kw) = _weight(weight, kernel, axes)
    window = Window((kh, kw), pair(stride, "stride", 1), pair(dilation, "dilation", 1), _groups(groups, matrix))
    request = make_request(target, threads, schedule, max_code_bytes)
    masks = request.target.masks
    window = replace(window, masked=1 <= window.kernel[1] <= masks and pads.covers(window))
    task, b = make_task(matrix, bias, activation, residual, precision, "row_major")
    task = replace(task, window=window)
    native = DepthwiseProduct if depthwise.fits(task, request.target) else ConvProduct
    try:
        compiled = build(
            task, matrix.values, b, request, started,
            partial(native, window=window, padding=pads), partial(ReferenceConv, window=window, padding=pads),
        )  # fmt: skip
    except CodeBudgetError:
        if schedule is not None or not request.target.loops:
            raise
        looped = LoopedConv(task, request.target, window, pads)
        compiled = build_looped(task, matrix.values, b, request, started, looped)
    if isinstance(compiled.product, DepthwiseProduct):
        compiled.product.room = request.budget - compiled.stats.code_bytes
    return CompiledConv(compiled, b, window, pads, axes)


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
    target: str = "native", threads: int | None = None, max_code_bytes: int | None = None,
) -> CompiledConvTranspose:  # fmt: skip
    """Compile ``y = act(conv_transpose2d(x, W) + b)``, as ``torch.nn.ConvTranspose2d``.

    Each phase of the output, its rows and columns ``stride`` apart, is a convolution of stride 1 with those kernel
    places that reach it: nothing is multiplied with zeros that a stride would insert.

    Args:
        weight: dense (C, O / groups, kh, kw); its pattern is ``weight != 0``.
        padding: zeros that the convolution it transposes would add: an integer, (rows, columns) or
            ((top, bottom), (left, right)).
        output_padding: rows and columns added at the end; less than stride or dilation.
        stride, dilation, groups, bias, activation, residual, precision, target, threads, max_code_bytes: as for
            :func:`compile_conv2d`.

    Raises:
        The errors of :func:`compile_conv2d`.
    """
    s, d, extra = pair(stride, "stride", 1), pair(dilation, "dilation", 1), pair(output_padding, "output_padding", 0)
    if any(e >= max(a, b) for e, a, b in zip(extra, s, d, strict=True)):
        raise ValueRangeError(f"{extra} is not smaller than stride {s} or dilation {d}", where="output_padding")
    pads = read_padding(padding).pads
    if pads is None:
        raise UnsupportedError("a rule does not pad a transposed convolution", where="padding", hint="Give numbers.")
    dense = transposed_weight(weight, groups)
    rows, columns = (phases(k, a, b, p, e) for k, a, b, p, e in zip(dense.shape[2:], s, d, pads, extra, strict=True))
    parts = []
    for row in rows:
        for column in columns:
            op = compile_conv2d(
                part_of(dense, row, column), bias, activation, padding=(row.pads, column.pads),
                dilation=(row.dilation, column.dilation), groups=groups, residual=residual, precision=precision,
                target=target, threads=threads, max_code_bytes=max_code_bytes,
            )  # fmt: skip
            parts.append(Part(row, column, op))
    return CompiledConvTranspose(tuple(parts), s, groups, (dense.shape[0], np.asarray(weight).shape[0]))
