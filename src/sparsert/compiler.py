"""The chain from a pruned layer to machine code."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from .codegen.assemble import assemble, listing
from .errors import CodeBudgetError, ScheduleError, ShapeError, UnsupportedError, ValueRangeError
from .kernels import activations, matmul
from .operators.arrays import Array, as_input
from .operators.compact import CompactProduct, SmallProducts, looped_code_bytes
from .operators.matmul import Compiled, CompiledLinear, CompiledMatmul, Product, Stats
from .operators.native import NativeProduct
from .operators.reference import ReferenceProduct
from .runtime import host
from .runtime.cpu import Executable
from .schedule import cost
from .schedule.schedule import Schedule
from .schedule.task import LAYOUTS, Task
from .sparsity.pattern import SparseMatrix, as_sparse, require_finite
from .target import Target

PRECISIONS = ("f32",)
MAX_CODE_BYTES = 1 << 30  # branches reach 2 GiB
_LEAST_BYTES = 5  # per nonzero: what refuses a hopeless budget before any work is done

_Kind = TypeVar("_Kind", CompiledMatmul, CompiledLinear)


def compile_matmul(
    weight: Any, bias: Any = None, activation: Any = None, *, residual: str | None = None, precision: str = "f32",
    target: str = "native", threads: int | None = None, layout: str = "row_major", schedule: Schedule | None = None,
    max_code_bytes: int | None = None,
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
        threads: upper bound; None is what affinity mask and cgroup quota allow. One thread is used at present.
        layout: "row_major" (x (K, N)) or "tile_major" (x (T, K, tile), as layers inside a network exchange it).
        schedule: how to block the product; None leaves it to the cost model.
        max_code_bytes: generate no more code than this: where unrolled code would, the product loops over the pattern
            as data, which is slower but takes a few kilobytes of code whatever the layer.

    Raises:
        ShapeError, DTypeError, FormatError, ValueRangeError, UnsupportedError: what is wrong with an argument.
        TargetUnavailableError: this machine cannot execute ``target``. ScheduleError: ``schedule`` does not fit it.
        CodeBudgetError: even looped code would exceed ``max_code_bytes``, or that of the given ``schedule`` would.
        ExecutableMemoryError: the system's policy forbids generated code.
    """
    if not isinstance(layout, str) or layout not in LAYOUTS[:2]:
        raise UnsupportedError(f"unknown layout {layout!r}", where="layout", hint=f"Known: {', '.join(LAYOUTS[:2])}.")
    return _compile(
        CompiledMatmul, weight, bias, activation, residual, precision, target, threads, layout, schedule, max_code_bytes
    )


def compile_linear(
    weight: Any, bias: Any = None, activation: Any = None, *, residual: str | None = None, precision: str = "f32",
    target: str = "native", threads: int | None = None, schedule: Schedule | None = None,
    max_code_bytes: int | None = None,
) -> CompiledLinear:  # fmt: skip
    """Compile ``y = act(x @ W.T + b)`` for a sparse W (M, K): x (..., K) to y (..., M), as ``torch.nn.Linear``.

    Arguments and errors are those of :func:`compile_matmul`.
    """
    return _compile(
        CompiledLinear,
        weight,
        bias,
        activation,
        residual,
        precision,
        target,
        threads,
        "transposed",
        schedule,
        max_code_bytes,
    )


def compile_listing(
    weight: Any, bias: Any = None, activation: Any = None, *, residual: str | None = None, target: str = "native",
    layout: str = "row_major", schedule: Schedule | None = None,
) -> str:  # fmt: skip
    """The machine code of a layer as text, for any target and on any machine: nothing is executed."""
    matrix = as_sparse(weight)
    task, _ = _task(matrix, bias, activation, residual, "f32", layout)
    found = host.lookup(target)
    if found.isa == "reference":
        raise UnsupportedError(
            "the reference target has no machine code", where="target", hint="Name a compiled target."
        )
    _check_schedule(schedule)
    kernel = matmul.generate(task, _schedule(task, found, schedule), found)
    return listing(kernel.program, found.isa)


def _compile(
    kind: type[_Kind], weight: Any, bias: Any, activation: Any, residual: str | None, precision: str, target: str,
    threads: int | None, layout: str, schedule: Schedule | None, max_code_bytes: int | None,
) -> _Kind:  # fmt: skip
    started = time.perf_counter()
    permitted = _threads(threads)
    found = host.resolve(target)
    matrix = as_sparse(weight)
    task, b = _task(matrix, bias, activation, residual, precision, layout)
    _check_schedule(schedule)
    permitted_bytes = _budget(max_code_bytes)
    if found.isa == "reference":
        product: Product = ReferenceProduct(task)
        chosen, reason, code_bytes, instructions, reuse, list_code = None, "", 0, 0, 0.0, _no_listing
        small: SmallProducts | None = None
    else:
        may_loop = schedule is None and found.loops
        budget = _hopeful(permitted_bytes, matrix.pattern.nnz, may_loop)
        unrolled = None if budget is None else _unrolled(task, found, schedule, budget)
        if unrolled is None:
            if (needed := looped_code_bytes(task, found)) > permitted_bytes:
                raise CodeBudgetError(
                    f"even a loop over the pattern takes {needed} bytes of code, {permitted_bytes} are permitted",
                    where="max_code_bytes",
                    hint="Raise the budget, or use target='reference'.",
                )
            compact = CompactProduct(task, found, by_lookup=False)
            product, chosen, list_code = compact, None, compact.listing
            reason = f"unrolled code would take more than the {permitted_bytes} bytes that are permitted"
            code_bytes, instructions, reuse = compact.code_bytes, 0, 1.0
            small = SmallProducts(task, found, lambda: (compact.unpack(compact.values[0][0]), b))
        else:
            native, instructions, code_bytes = unrolled
            product, chosen = native, native.schedule
            reason = "given by the caller" if schedule else cost.reason(task, found, native.schedule)
            reuse = matrix.pattern.nnz / max(1, native.kernel.x_loads)
            small = SmallProducts(task, found, lambda: (native.kernel.unpack(native.values[0][0]), b))
            fixed = native.schedule

            def list_code() -> str:
                return listing(matmul.generate(task, fixed, found).program, found.isa)

    product.load(matrix.values, b)
    nnz = matrix.pattern.nnz
    value_bytes = 4 * (nnz + (task.pattern.rows if task.bias else 0))
    per_nonzero = (code_bytes + value_bytes) / max(1, nnz) if code_bytes else 0.0
    seconds = time.perf_counter() - started
    stats = Stats(nnz, matrix.pattern.density, code_bytes, value_bytes, per_nonzero, reuse, instructions, seconds)
    return kind(Compiled(task, found, product, stats, chosen, reason, permitted, list_code, small), b)


def _unrolled(
    task: Task, found: Target, schedule: Schedule | None, budget: int
) -> tuple[NativeProduct, int, int] | None:
    """The product with its instructions and bytes of code; None where there are too many, unless the schedule is given.

    Raises:
        CodeBudgetError: the schedule is given and its code exceeds the budget.
    """
    chosen = _schedule(task, found, schedule)
    kernel = matmul.generate(task, chosen, found)
    code = assemble(kernel.program, found.isa)
    if len(code.code) > budget:
        if schedule is None and found.loops:
            return None
        raise CodeBudgetError(
            f"the code takes {len(code.code)} bytes, {budget} are permitted",
            where="max_code_bytes",
            hint="Raise the budget, leave the schedule out, or use target='reference'.",
        )
    return NativeProduct(task, chosen, found, kernel, Executable(code.code)), code.instructions, len(code.code)


def _task(
    matrix: SparseMatrix, bias: Any, activation: Any, residual: str | None, precision: str, layout: str
) -> tuple[Task, Array | None]:
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise UnsupportedError(
            f"unknown precision {precision!r}", where="precision", hint=f"Known: {', '.join(PRECISIONS)}."
        )
    if not (residual is None or (isinstance(residual, str) and residual in ("before", "after"))):
        raise UnsupportedError(
            f"residual={residual!r}", where="residual", hint="Use None, 'before' or 'after' (the activation)."
        )
    rows, columns = matrix.shape
    b = None
    if bias is not None:
        b = np.ascontiguousarray(as_input(bias, "bias"))
        if b.shape != (rows,):
            raise ShapeError(f"shape {b.shape} is not (M={rows},)", where="bias", hint="One bias per output row.")
        require_finite(b, "bias")
        b = b.copy()
    found, parameters = activations.parse(activation)
    if layout == "transposed" and min(rows, columns) < 4:
        layout = "row_major"
    return Task(matrix.pattern, b is not None, found.name if found else None, parameters, residual, layout), b


def _schedule(task: Task, target: Target, given: Schedule | None) -> Schedule:
    spare = matmul.spare(task, target)
    if given is None:
        return cost.choose(task, target, spare)
    given.check(target, spare)
    return given if task.layout == "row_major" else replace(given, packing="none")


def _check_schedule(given: Any) -> None:
    if given is not None and not isinstance(given, Schedule):
        raise ScheduleError(
            f"{type(given).__name__} is not a Schedule", where="schedule", hint="Use sparsert.Schedule(rows=...)."
        )


def _threads(threads: int | None) -> int:
    if threads is None:
        return host.default_threads()
    if not isinstance(threads, (int, np.integer)) or isinstance(threads, bool) or threads < 1:
        raise ValueRangeError(
            f"{threads!r} is not a positive number of threads", where="threads", hint="Use None or an int from 1 on."
        )
    return int(threads)


def _budget(given: int | None) -> int:
    budget = MAX_CODE_BYTES if given is None else given
    if not isinstance(budget, (int, np.integer)) or isinstance(budget, bool) or budget < 0:
        raise ValueRangeError(
            f"{given!r} is not a number of bytes", where="max_code_bytes", hint="Use None or an int from 0 on."
        )
    return min(int(budget), MAX_CODE_BYTES)


def _hopeful(budget: int, nnz: int, or_looped: bool) -> int | None:
    """The budget, or None where unrolled code has no hope to keep it and a loop may do."""
    least = nnz * _LEAST_BYTES
    if least <= budget:
        return budget
    if or_looped:
        return None
    raise CodeBudgetError(
        f"{nnz} nonzeros take at least {least} bytes of code, {budget} are permitted",
        where="max_code_bytes",
        hint="Raise the budget, leave the schedule out, split or prune the layer further, or use target='reference'.",
    )


def _no_listing() -> str:
    return "the reference target runs NumPy: there is no machine code to list\n"
