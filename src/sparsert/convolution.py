"""``compile_conv2d`` and its kin: convolutions, through the same chain as products."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from .compiler import build, make_task
from .errors import ShapeError, ValueRangeError
from .kernels import depthwise
from .operators.conv import CompiledConv, ReferenceConv, as_weight, flat
from .operators.depthwise import DepthwiseProduct
from .operators.images import ConvProduct
from .runtime import host
from .schedule.schedule import Schedule
from .sparsity.geometry import padding as read_padding
from .sparsity.geometry import pair
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
    started = time.perf_counter()
    matrix, (kh, kw) = _weight(weight, kernel, 2)
    window = Window((kh, kw), pair(stride, "stride", 1), pair(dilation, "dilation", 1), _groups(groups, matrix))
    pads = read_padding(padding)
    masks = host.resolve(target).masks
    window = replace(window, masked=1 <= window.kernel[1] <= masks and pads.covers(window))
    task, b = make_task(matrix, bias, activation, residual, precision, "row_major")
    task = replace(task, window=window)
    native = DepthwiseProduct if depthwise.fits(task, host.resolve(target)) else ConvProduct
    compiled = build(
        task, matrix.values, b, target, threads, schedule, max_code_bytes, started,
        partial(native, window=window, padding=pads), partial(ReferenceConv, window=window, padding=pads),
    )  # fmt: skip
    return CompiledConv(compiled, b, window, pads)


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
            hint="Pass (O, C / groups, kh, kw), or a matrix and kernel=(kh, kw).",
        )
    if min(shape[2:]) < 1:
        raise ShapeError(f"a kernel of {tuple(shape[2:])} is empty", where="weight")
    return as_sparse(flat(weight)), (int(shape[2]), int(shape[3]))


def _groups(groups: Any, matrix: SparseMatrix) -> int:
    if not isinstance(groups, (int, np.integer)) or isinstance(groups, bool) or groups < 1:
        raise ValueRangeError(f"{groups!r} is not a positive integer", where="groups")
    if matrix.shape[0] % int(groups):
        raise ShapeError(f"{matrix.shape[0]} output channels cannot be cut into {groups} groups", where="groups")
    return int(groups)
