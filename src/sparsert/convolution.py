"""``compile_conv2d`` and its kin: convolutions, through the same chain as products."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from .compiler import build, build_dense, build_looped, builder
from .conv_request import Layer, layer_of, layers_of, line_of, phases_of
from .errors import CodeBudgetError, UnsupportedError
from .kernels import depthwise
from .operators import tuned
from .operators.conv import CompiledConv, ReferenceConv
from .operators.conv_transpose import (
    CompiledConvTranspose,
    Part,
    together,
    transposed_weight,
)
from .operators.dense_conv import DenseConv
from .operators.depthwise import DepthwiseProduct
from .operators.images import ConvProduct
from .operators.looped_conv import LoopedConv
from .request import Request, make_request, why_dense
from .runtime import host
from .schedule.schedule import Schedule
from .schedule.tuner import Tuning
from .sparsity.geometry import padding as read_padding
from .sparsity.geometry import pair


def compile_conv2d(
    weight: Any, bias: Any = None, activation: Any = None, *, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1, kernel: Any = None, residual: str | None = None, precision: str = "f32", target: str = "native",
    threads: int | None = None, schedule: Schedule | None = None, max_code_bytes: int | None = None,
    tune: str | None = None, tuning: str | os.PathLike[str] | None = None, size: Any = None, form: str | None = None,
) -> CompiledConv:  # fmt: skip
    """Compile ``y = act(conv2d(x, W) + b)`` for a sparse W; x (B, C, H, W) of any B, H and W.

    With AVX-512, images of a width that comes for the first time get code of their own if that is faster, in about the
    time of the compilation; up to eight widths, and as far as ``max_code_bytes`` permits.

    Args:
        weight: (O, C / groups, kh, kw), its pattern is ``weight != 0``; or, with ``kernel``, a matrix
            (O, C / groups * kh * kw) in any form that :func:`compile_matmul` takes.
        stride, dilation: an integer, or (rows, columns).
        padding: an integer, (rows, columns), ((top, bottom), (left, right)), "same_upper" or "same_lower" (as ONNX's
            ``auto_pad``).
        groups: channels of input and output are cut into so many groups; C of them is a depthwise convolution.
        kernel: (kh, kw) of a weight that is given as a matrix.
        form: "sparse", "dense" (a product per group) or None, as for :func:`compile_matmul`.
        bias, activation, residual, precision, target, threads, schedule, max_code_bytes, tune, tuning: as for
            :func:`compile_matmul`. A depthwise convolution that reads x in place has no schedule to tune.
        size: (H, W) of an image to tune for and to look up; by default one whose output is 14 x 14. Any size can be
            computed.

    Raises:
        The errors of :func:`compile_matmul`. At a call, ShapeError where the padded image is smaller than a kernel.
    """
    request = _request(target, threads, schedule, max_code_bytes, tune, tuning)
    layer = layer_of(weight, kernel, 2, stride, read_padding(padding), dilation, groups, bias, activation, residual,
                   precision, request.target)  # fmt: skip
    return _compile(layer, request, size, form)


def compile_conv1d(
    weight: Any, bias: Any = None, activation: Any = None, *, stride: int = 1, padding: Any = 0, dilation: int = 1,
    groups: int = 1, kernel: int | None = None, residual: str | None = None, precision: str = "f32",
    target: str = "native", threads: int | None = None, schedule: Schedule | None = None,
    max_code_bytes: int | None = None, tune: str | None = None, tuning: str | os.PathLike[str] | None = None,
    size: int | None = None, form: str | None = None,
) -> CompiledConv:  # fmt: skip
    """Compile ``y = act(conv1d(x, W) + b)`` for a sparse W (O, C / groups, k); x (B, C, L) to y (B, O, L').

    ``padding`` is an integer, (left, right), "same_upper" or "same_lower", ``size`` a length; all else as for
    :func:`compile_conv2d`.
    """
    request = _request(target, threads, schedule, max_code_bytes, tune, tuning)
    layer = line_of(weight, kernel, stride, padding, dilation, groups, bias, activation, residual, precision,
                  request.target)  # fmt: skip
    return _compile(layer, request, size, form)


def _request(target: str, threads: int | None, schedule: Schedule | None, max_code_bytes: int | None, tune: str | None,
             tuning: str | os.PathLike[str] | None) -> Request:  # fmt: skip
    wanted = tuned.request(tune, tuning, None)
    if schedule is not None and tune is not None:
        raise UnsupportedError("a given schedule leaves nothing to tune", where="tune", hint="Give one of the two.")
    return make_request(target, threads, schedule, max_code_bytes, wanted)


def _compile(layer: Layer, request: Request, size: Any, form: str | None, looped: bool = False) -> CompiledConv:
    """``looped``: as if unrolled code had turned out to be too large."""
    started = time.perf_counter()
    task, window, pads = layer.task, layer.window, layer.padding
    reason = why_dense(form, task, request.target, request.schedule)
    if reason and request.target.isa != "reference" and not looped:
        conv = partial(DenseConv, window=window, padding=pads)
        try:
            compiled = build_dense(task, layer.values, layer.bias, request, reason, started, conv)
            return CompiledConv(compiled, layer.bias, window, pads, layer.axes)
        except CodeBudgetError:
            if form is not None:
                raise
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
            partial(native, window=window, padding=pads, room=request.budget),
            partial(ReferenceConv, window=window, padding=pads),
        )  # fmt: skip
    except CodeBudgetError:
        if request.schedule is not None or not request.target.loops:
            raise
        product = LoopedConv(task, request.target, window, pads)
        compiled = build_looped(task, layer.values, layer.bias, request, started, product)
    if isinstance(compiled.product, DepthwiseProduct):
        compiled.product.room = request.budget - compiled.stats.code_bytes
        compiled = replace(compiled, list_code=partial(_list_in_place, compiled.list_code, compiled.product))
    return CompiledConv(compiled, layer.bias, window, pads, layer.axes)


def _list_in_place(general: Callable[[], str], product: DepthwiseProduct) -> str:
    """The general form's code, and that which was made for images of a shape since."""
    return general() + product.listing()


def compile_conv_transpose2d(
    weight: Any, bias: Any = None, activation: Any = None, *, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, dilation: Any = 1, groups: int = 1, residual: str | None = None, precision: str = "f32",
    target: str = "native", threads: int | None = None, schedule: Schedule | None = None,
    max_code_bytes: int | None = None, tune: str | None = None, tuning: str | os.PathLike[str] | None = None,
    size: Any = None, form: str | None = None,
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
        groups, bias, activation, residual, precision, target, threads, tune, tuning, size, form: as for
            :func:`compile_conv2d`; phases are tuned, and shared out over threads, one by one.

    Raises:
        The errors of :func:`compile_conv2d`. At a call, ShapeError where padding leaves nothing of the output.
    """
    started = time.perf_counter()
    request = _request(target, threads, schedule, max_code_bytes, tune, tuning)
    dense = transposed_weight(weight, groups)
    layers = phases_of(dense, bias, activation, stride, padding, output_padding, dilation, groups, residual, precision,
                     request.target)  # fmt: skip
    made: dict[tuple[Any, ...], CompiledConv] = {}

    def compiled(looped: bool) -> list[Part]:
        parts = []
        for row, column, layer in layers:  # phases that no place reaches are the same few convolutions
            key = row.places, column.places, row.pads, column.pads, looped
            made[key] = made.get(key) or _compile(layer, request, size, form, looped)
            parts.append(Part(row, column, made[key]))
        return parts

    parts = compiled(False)
    if together(parts, 1, 0.0).code_bytes > request.budget:
        parts = compiled(True)
    stats = together(parts, dense.size, time.perf_counter() - started)
    shape = dense.shape[1] * groups, dense.shape[0] // groups, dense.shape[2], dense.shape[3]
    return CompiledConvTranspose(tuple(parts), pair(stride, "stride", 1), groups, shape, stats)


def tune_convolution(
    weight: Any, bias: Any = None, activation: Any = None, *, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1, kernel: Any = None, transposed: bool = False, output_padding: Any = 0, residual: str | None = None,
    target: str = "native", tune: str = "fast", tuning: str | os.PathLike[str] | None = None, size: Any = None,
) -> list[tuple[Layer, Tuning | None]]:  # fmt: skip
    """Measure the schedules of a convolution, whatever is recorded, and record the best.

    Arguments and errors are those of :func:`compile_conv2d`, or, with ``transposed``, of
    :func:`compile_conv_transpose2d`, whose phases are tuned one by one. There is no result where no two schedules
    would differ, or where a depthwise convolution has none.
    """
    wanted, found = tuned.request(tune, tuning, None), host.resolve(target)
    if found.isa == "reference" or wanted is None:
        raise UnsupportedError("the reference target has no schedules", where="target", hint="Name a compiled target.")
    layers = layers_of(weight, bias, activation, stride, padding, dilation, groups, kernel, transposed, output_padding,
                       residual, found)  # fmt: skip
    results = []
    for _, layer in layers:
        native = partial(ConvProduct, window=layer.window, padding=layer.padding, room=0)
        result = None
        if not depthwise.fits(layer.task, found):
            result = tuned.run(layer.task, found, wanted.on(layer.shapes(size)),
                               builder(layer.task, layer.values, layer.bias, found, native)).tuning  # fmt: skip
        results.append((layer, result))
    return results
