"""``compile_listing``: the machine code of any layer as text, for any target, on any machine. Nothing is executed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .codegen.assemble import assemble, listing
from .codegen.vector import Program
from .conv_request import Layer, layers_of
from .errors import CodeBudgetError, UnsupportedError
from .kernels import depthwise, matmul
from .operators.compact import CompactProduct
from .operators.dense import dense_program
from .operators.depthwise import list_shape
from .operators.looped_conv import LoopedConv
from .request import budget_of, check_schedule, hopeful, loop_within, make_task, schedule_for, why_dense, within
from .runtime import host
from .schedule.schedule import Schedule
from .schedule.task import LAYOUTS, Task
from .sparsity.geometry import Geometry
from .sparsity.pattern import as_sparse
from .target import Target


def compile_listing(
    weight: Any, bias: Any = None, activation: Any = None, *, residual: str | None = None, target: str = "native",
    layout: str = "row_major", schedule: Schedule | None = None, max_code_bytes: int | None = None,
    form: str | None = None, kernel: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
    transposed: bool = False, output_padding: Any = 0, size: Any = None,
) -> str:  # fmt: skip
    """The machine code of a layer as text: what the compile function for it would generate.

    Args:
        weight: a matrix as for :func:`compile_matmul`; or that of a convolution: (O, C / groups, kh, kw) or
            (O, C / groups, k), a matrix and ``kernel``, or, if ``transposed``, (C, O / groups, kh, kw).
        layout: as for :func:`compile_matmul`, or "transposed", as for :func:`compile_linear`.
        kernel, stride, padding, dilation, groups, output_padding: of a convolution.
        size: (H, W) of the images for which a depthwise convolution, whose code depends on them, is listed first; by
            default those whose output is 14 x 14. The code that serves any others follows.
        bias, activation, residual, schedule, max_code_bytes, form: as for the compile functions. Without a ``form``,
            the one they would choose is listed. What they generate for few columns beside that is not.
        target: also one that this machine cannot execute.

    Raises:
        The errors of the compile functions but TargetUnavailableError. UnsupportedError: ``target`` is the reference.
    """
    found = host.lookup(target)
    if found.isa == "reference":
        raise UnsupportedError(
            "the reference target has no machine code", where="target", hint="Name a compiled target."
        )
    check_schedule(schedule)
    budget = budget_of(max_code_bytes)
    if kernel is not None or transposed or getattr(weight, "ndim", 2) in (3, 4):
        layers = layers_of(weight, bias, activation, stride, padding, dilation, groups, kernel, transposed,
                           output_padding, residual, found)  # fmt: skip
        if form not in (None, "sparse"):
            raise UnsupportedError(f"a convolution has no form {form!r}", where="form", hint="Leave it out.")
        return "".join(
            (f"{title}\n" if title else "") + _convolution(layer, found, schedule, budget, size)
            for title, layer in layers
        )
    given = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    for name, value in given.items():
        if np.any(np.asarray(value, object) != (name != "padding")):
            raise UnsupportedError("a product has none", where=name, hint="Say kernel= if this is a convolution.")
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise UnsupportedError(f"unknown layout {layout!r}", where="layout", hint=f"Known: {', '.join(LAYOUTS)}.")
    task, _ = make_task(as_sparse(weight), bias, activation, residual, "f32", layout)
    if why_dense(form, task, found, schedule):
        try:
            return _listed(dense_program(task, found), found, budget)
        except CodeBudgetError:
            if form is not None:
                raise
    return _unrolled(task, found, schedule, budget, form is None, lambda: CompactProduct(task, found, by_lookup=False))


def _convolution(layer: Layer, target: Target, schedule: Schedule | None, budget: int, size: Any) -> str:
    task, text = layer.task, ""
    if depthwise.fits(task, target):
        (_, _, height, width), (_, _, _, columns) = layer.shapes(size)
        geometry = Geometry(layer.window, (height, width), layer.padding.resolve((height, width), layer.window))
        shape = depthwise.Shape(geometry, 4 * width, 4 * columns, 4 * columns if task.residual else 0)
        text = list_shape(task, target, shape)
        text += "; any other images\n" if text else ""
    return text + _unrolled(task, target, schedule, budget, True,
                            lambda: LoopedConv(task, target, layer.window, layer.padding))  # fmt: skip


def _unrolled(
    task: Task, target: Target, schedule: Schedule | None, budget: int, may_loop: bool,
    looped: Callable[[], CompactProduct | LoopedConv],
) -> str:  # fmt: skip
    """The code unrolled from a pattern or, where that is too large, the loop over it."""
    try:
        hopeful(budget, task.pattern.nnz)
        return _listed(matmul.generate(task, schedule_for(task, target, schedule), target).program, target, budget)
    except CodeBudgetError:
        if schedule is not None or not may_loop or not target.loops:
            raise
    product = looped()
    loop_within(product.code_bytes, budget)
    return product.listing()


def _listed(program: Program, target: Target, budget: int) -> str:
    within(len(assemble(program, target.isa).code), budget)
    return listing(program, target.isa)
