"""The chain from a pruned layer to machine code."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from .codegen.assemble import assemble, listing
from .codegen.vector import Program, Table
from .crew import crew, ranges
from .errors import CodeBudgetError, UnsupportedError, ValueRangeError
from .kernels import activations, matmul
from .operators import tuned
from .operators.arrays import Array
from .operators.compact import CompactProduct, SmallProducts
from .operators.dense import DenseProduct
from .operators.dense_conv import DenseConv
from .operators.looped_conv import LoopedConv
from .operators.matmul import Compiled, CompiledLinear, CompiledMatmul, Product, Stats
from .operators.native import NativeProduct
from .operators.product import CompiledProduct, ProductSpec
from .operators.reference import ReferenceProduct
from .operators.trials import Built
from .request import (
    MAX_CODE_BYTES,
    Request,
    hopeful,
    loop_within,
    make_request,
    make_task,
    schedule_for,
    weights,
    why_dense,
    within,
)
from .runtime import host, workers
from .runtime.cpu import Executable
from .schedule import cost
from .schedule.schedule import Schedule
from .schedule.task import LAYOUTS, Task
from .schedule.tuner import Tuning
from .sparsity.pattern import as_sparse
from .target import Target

_Kind = TypeVar("_Kind", CompiledMatmul, CompiledLinear)


def compile_matmul(
    weight: Any, bias: Any = None, activation: Any = None, *, residual: str | None = None, precision: str = "f32",
    target: str = "native", threads: int | None = None, layout: str = "row_major", schedule: Schedule | None = None,
    max_code_bytes: int | None = None, form: str | None = None, tune: str | None = None,
    tuning: str | os.PathLike[str] | None = None, columns: int | None = None, storage: str | None = None,
) -> CompiledMatmul:  # fmt: skip
    """Compile ``y = act(W @ x + b)`` for a sparse W.

    Args:
        weight: (M, K): a dense array (its pattern is ``weight != 0``), a scipy.sparse matrix or a CSR tuple
            ``(data, indices, indptr, shape)`` (their pattern is what they store, explicit zeros included;
            duplicates are summed).
        bias: (M,) float32.
        activation: None, "relu", "relu6", "silu", "hardswish", "gelu" (erf), "gelu_tanh", "sigmoid", "tanh" or
            ``sparsert.Clip(lo, hi)``.
        residual: None, or "before" / "after": a residual given at each call is added before or after the activation.
        precision: "f32".
        target: "native" (the best this machine executes), "x86-avx512", "x86-avx2",
            "aarch64-neon" or "reference" (NumPy, everywhere).
        threads: upper bound; None is what affinity mask and cgroup quota allow, 1 is never more than the caller. A call
            with work for more (20 us each) shares out its columns, or, where they are few, its rows, whose code is
            generated at the first such call. Calls that meet in several Python threads run on one thread each but the
            first. Results are the same to the last bit.
        layout: "row_major" (x (K, N)) or "tile_major" (x (T, K, tile), as layers inside a network exchange it).
        schedule: how to block the product, in the sparse form; None leaves it to the cost model.
        max_code_bytes: generate no more code than this: where unrolled code would, the product loops over the pattern
            as data, which is slower but takes a few kilobytes of code whatever the layer.
        form: "sparse" (unrolled over the nonzeros), "dense" (looped over all elements: one code for every shape, but
            where W has zeros they are factors too, and 0 * inf is NaN) or None: dense where nothing is zero and W is
            large enough for it. ``explain()`` says what was chosen, and where "dense" would be faster.
        tune: None leaves the schedule to the cost model; "fast" and "full" measure some (8, or up to 96) schedules and
            take the fastest, unless it is recorded already. "fast" takes up to 0.5 s per 50,000 nonzeros. Samples are
            of a layer as a network calls it, behind others; "fast-warm" and "full-warm" measure calls in a row, for a
            product that is called over and over. Results are the same bits whatever the schedule.
        tuning: the file of records, or "off". By default what the variable SPARSERT_TUNING says, or a file in the
            user's cache folder, if ``tune`` is given; without ``tune`` records are used where ``tuning`` names them.
        columns: N to tune for, and to look up; 196 by default. Any N can be computed.
        storage: None, or "bf16": weights, not the bias, are rounded to bfloat16 (to nearest, ties to even), those of a
            refit too, and products with few columns store them in two bytes. Results are those of the rounded weights,
            the same for any N. Without it weights that are all exact in bfloat16 are stored so there, unasked.

    Raises:
        ShapeError, DTypeError, FormatError, ValueRangeError, UnsupportedError: what is wrong with an argument.
        TargetUnavailableError: this machine cannot execute ``target``. ScheduleError: ``schedule`` does not fit it.
        CodeBudgetError: even looped code would exceed ``max_code_bytes``, or that of the given ``schedule`` would.
        ExecutableMemoryError: the system's policy forbids generated code.
    """
    if not isinstance(layout, str) or layout not in LAYOUTS[:2]:
        raise UnsupportedError(f"unknown layout {layout!r}", where="layout", hint=f"Known: {', '.join(LAYOUTS[:2])}.")
    return _compile(
        CompiledMatmul, weight, bias, activation, residual, precision, target, threads, layout, schedule,
        max_code_bytes, form, tune, tuning, columns, storage,
    )  # fmt: skip


def compile_linear(
    weight: Any, bias: Any = None, activation: Any = None, *, residual: str | None = None, precision: str = "f32",
    target: str = "native", threads: int | None = None, schedule: Schedule | None = None,
    max_code_bytes: int | None = None, form: str | None = None, tune: str | None = None,
    tuning: str | os.PathLike[str] | None = None, columns: int | None = None, storage: str | None = None,
) -> CompiledLinear:  # fmt: skip
    """Compile ``y = act(x @ W.T + b)`` for a sparse W (M, K): x (..., K) to y (..., M), as ``torch.nn.Linear``.

    Arguments and errors are those of :func:`compile_matmul`.
    """
    return _compile(
        CompiledLinear, weight, bias, activation, residual, precision, target, threads, "transposed", schedule,
        max_code_bytes, form, tune, tuning, columns, storage,
    )  # fmt: skip


def compile_product(
    *, transpose_a: bool = False, transpose_b: bool = False, scale: float = 1.0, activation: Any = None,
    target: str = "native", threads: int | None = None,
) -> CompiledProduct:  # fmt: skip
    """Compile ``y = act(scale * a @ b)`` for two activations, as in attention: a (..., M, K), b (..., K, N).

    M, K, N and the leading axes, which broadcast, are those of each call; one piece of code serves them all.

    Args:
        transpose_a: a is (..., K, M).
        transpose_b: b is (..., N, K).
        scale: the sums are multiplied by this, rounded to float32.
        activation, target, threads: as in :func:`compile_matmul`.

    Raises:
        UnsupportedError: an unknown activation or target. ValueRangeError: ``scale`` is no finite number, or
            ``threads`` no positive one.
        TargetUnavailableError, ExecutableMemoryError: as in :func:`compile_matmul`.
    """
    for name, flag in (("transpose_a", transpose_a), ("transpose_b", transpose_b)):
        if not isinstance(flag, (bool, np.bool_)):
            raise UnsupportedError(f"{name}={flag!r} is neither True nor False", where=name)
    try:
        with np.errstate(over="ignore"):
            factor = float(np.float32(scale))
    except (TypeError, ValueError, OverflowError):
        factor = np.nan
    if not np.isfinite(factor):
        raise ValueRangeError(f"{scale!r} is no finite number", where="scale", hint="1 / sqrt(64) is usual.")
    found, parameters = activations.parse(activation)
    spec = ProductSpec(bool(transpose_a), bool(transpose_b), factor, found.name if found else None, parameters)
    request = make_request(target, threads, None, None)
    return CompiledProduct(spec, request.target, ranges(request.target, request.threads))


def tune_layer(
    weight: Any, bias: Any = None, activation: Any = None, *, residual: str | None = None, target: str = "native",
    layout: str = "row_major", tune: str = "fast", tuning: str | os.PathLike[str] | None = None,
    columns: int | None = None,
) -> Tuning | None:  # fmt: skip
    """Measure the schedules of a layer, whatever is recorded, and record the best; None if there is only one.

    Arguments and errors are those of the compile functions; ``layout`` may be "transposed", as for
    :func:`compile_linear`.
    """
    wanted, found, matrix = tuned.request(tune, tuning, columns), host.resolve(target), as_sparse(weight)
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise UnsupportedError(f"unknown layout {layout!r}", where="layout", hint=f"Known: {', '.join(LAYOUTS)}.")
    if found.isa == "reference" or wanted is None:
        raise UnsupportedError("the reference target has no schedules", where="target", hint="Name a compiled target.")
    task, b = make_task(matrix, bias, activation, residual, "f32", layout)
    return tuned.run(task, found, wanted, builder(task, matrix.values, b, found)).tuning


def builder(
    task: Task, values: Array, bias: Array | None, target: Target, native: Callable[..., NativeProduct] = NativeProduct
) -> Callable[[Schedule], Built]:
    """What compiles a task for a tuner."""
    budget = hopeful(MAX_CODE_BYTES, task.pattern.nnz)
    return lambda schedule: _build(task, schedule, target, budget, values, bias, native)


def _compile(
    kind: type[_Kind], weight: Any, bias: Any, activation: Any, residual: str | None, precision: str, target: str,
    threads: int | None, layout: str, schedule: Schedule | None, max_code_bytes: int | None, form: str | None,
    tune: str | None, tuning: str | os.PathLike[str] | None, columns: int | None, storage: str | None,
) -> _Kind:  # fmt: skip
    started = time.perf_counter()
    matrix = weights(weight, storage)
    task, b = make_task(matrix, bias, activation, residual, precision, layout)
    wanted = tuned.request(tune, tuning, columns)
    if schedule is not None and tune is not None:
        raise UnsupportedError("a given schedule leaves nothing to tune", where="tune", hint="Give one of the two.")
    request = make_request(target, threads, schedule, max_code_bytes, wanted)

    def made(compiled: Compiled) -> _Kind:
        return kind(replace(compiled, storage=storage), b)

    dense_reason = why_dense(form, task, request.target, schedule)
    if dense_reason and request.target.isa != "reference":
        as_dense = replace(task, layout="transposed" if kind is CompiledLinear else task.layout)
        try:
            return made(build_dense(as_dense, matrix.values, b, request, dense_reason, started))
        except CodeBudgetError:
            if form is not None:
                raise
    try:
        compiled = build(task, matrix.values, b, request, started)
    except CodeBudgetError:
        if schedule is not None or form is not None or not request.target.loops:
            raise
        looped = CompactProduct(task, request.target, by_lookup=False)
        looped.crew = ranges(request.target, request.threads)
        compiled = build_looped(task, matrix.values, b, request, started, looped, looped.threads_note)
        small = SmallProducts(task, request.target, lambda: (looped.unpack(), b), looped.crew)
        return made(replace(compiled, small=small))
    if isinstance(compiled.product, NativeProduct):
        compiled = replace(
            compiled,
            small=SmallProducts(
                task, request.target, compiled.product.current, ranges(request.target, request.threads)
            ),
        )
    return made(compiled)


def build(
    task: Task, values: Array, bias: Array | None, request: Request, started: float,
    native: Callable[..., NativeProduct] = NativeProduct, reference: Callable[[Task], Product] = ReferenceProduct,
) -> Compiled:  # fmt: skip
    """From a task to what an operator holds."""
    target = request.target
    if target.isa == "reference":
        product = reference(task)
        product.load(values, bias)
        note = partial(_one_thread, "the reference target")
        stats = _stats(task, started)
        return Compiled(task, target, product, stats, None, "", request.threads, _no_listing, note)
    budget = hopeful(request.budget, task.pattern.nnz)

    def make(candidate: Schedule) -> Built:
        return _build(task, candidate, target, budget, values, bias, native)

    built: Built | None = None
    if request.schedule is None and request.tuning is not None:
        chosen, reason, built, _ = tuned.choose(task, target, request.tuning, make)
    else:
        chosen = schedule_for(task, target, request.schedule)
        reason = "given by the caller" if request.schedule else cost.reason(task, target, chosen)
    kernel, made, code_bytes, instructions = built or make(chosen)
    if request.threads > 1 and workers.supported():
        made.share(crew(task, target, request.schedule, request.threads, budget - code_bytes))
    stats = _stats(task, started, code_bytes, instructions, task.pattern.nnz / max(1, kernel.x_loads))

    def list_code() -> str:
        return listing(matmul.generate(task, chosen, target).program, target.isa)

    return Compiled(task, target, made, stats, chosen, reason, request.threads, list_code, made.threads_note)


def build_dense(
    task: Task, values: Array, bias: Array | None, request: Request, reason: str, started: float,
    native: Callable[[Task, Target], DenseProduct | DenseConv] = DenseProduct,
) -> Compiled:  # fmt: skip
    """From a task to what an operator of the dense form holds."""
    product = native(task, request.target)
    product.load(values, bias)
    if (threads := ranges(request.target, request.threads)) is not None:
        product.share(threads)
    code = product.code
    within(code.size, request.budget)
    stats = _stats(task, started, code.size, code.instructions, float(code.rows))
    return Compiled(
        task, request.target, product, stats, product.schedule, reason, request.threads, product.listing,
        product.threads_note,
    )  # fmt: skip


def build_looped(
    task: Task, values: Array, bias: Array | None, request: Request, started: float,
    product: CompactProduct | LoopedConv, note: Callable[[], str] | None = None,
) -> Compiled:  # fmt: skip
    """Where unrolled code would exceed the budget: a loop over the pattern."""
    product.load(values, bias)
    loop_within(product.code_bytes, request.budget)
    reason = f"unrolled code would take more than the {request.budget} bytes that are permitted"
    stats = _stats(task, started, product.code_bytes, 0, 1.0)
    return Compiled(task, request.target, product, stats, None, reason, request.threads, product.listing,
                    note or partial(_one_thread, "a loop over the pattern"))  # fmt: skip


def _stats(task: Task, started: float, code_bytes: int = 0, instructions: int = 0, reuse: float = 0.0) -> Stats:
    nnz = task.pattern.nnz
    value_bytes = 4 * (nnz + (task.pattern.rows if task.bias else 0))
    per_nonzero = (code_bytes + value_bytes) / max(1, nnz) if code_bytes else 0.0
    seconds = time.perf_counter() - started
    return Stats(nnz, task.pattern.density, code_bytes, value_bytes, per_nonzero, reuse, instructions, seconds)


def _build(
    task: Task, schedule: Schedule, target: Target, budget: int, values: Array, bias: Array | None,
    native: Callable[..., NativeProduct] = NativeProduct,
) -> Built:  # fmt: skip
    """Machine code with its values, ready to be called."""
    kernel = matmul.generate(task, schedule, target)
    code = assemble(kernel.program, target.isa)
    within(len(code.code), budget)
    kernel = replace(kernel, program=Program(Table(0), (), 0, {}))  # twice as large as the code, no longer needed
    product = native(task, schedule, target, kernel, Executable(code.code))
    product.load(values, bias)
    return Built(kernel, product, len(code.code), code.instructions)


def _one_thread(what: str) -> str:
    return f"1, whatever is permitted: {what} uses no others"


def _no_listing() -> str:
    return "the reference target runs NumPy: there is no machine code to list\n"
