"""The chain from a pruned layer to machine code."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from .codegen.assemble import assemble, listing
from .codegen.vector import Program
from .errors import CodeBudgetError, ScheduleError, ShapeError, UnsupportedError, ValueRangeError
from .kernels import activations, matmul
from .operators import tuned
from .operators.arrays import Array, as_input
from .operators.dense import DenseProduct
from .operators.matmul import Compiled, CompiledLinear, CompiledMatmul, Product, Stats
from .operators.native import NativeProduct
from .operators.product import CompiledProduct, ProductSpec
from .operators.reference import ReferenceProduct
from .operators.trials import Built
from .runtime import host
from .runtime.cpu import Executable
from .schedule import cost
from .schedule.dense import DenseSchedule
from .schedule.schedule import Schedule
from .schedule.task import LAYOUTS, Task
from .schedule.tuner import Tuning
from .sparsity.pattern import SparseMatrix, as_sparse, require_finite
from .target import Target

PRECISIONS = ("f32",)
MAX_CODE_BYTES = 1 << 30  # branches reach 2 GiB
_LEAST_BYTES = 5  # per nonzero: what refuses a hopeless budget before any work is done

_Kind = TypeVar("_Kind", CompiledMatmul, CompiledLinear)


def compile_matmul(
    weight: Any, bias: Any = None, activation: Any = None, *, residual: str | None = None, precision: str = "f32",
    target: str = "native", threads: int | None = None, layout: str = "row_major", schedule: Schedule | None = None,
    max_code_bytes: int | None = None, form: str | None = None, tune: str | None = None,
    tuning: str | os.PathLike[str] | None = None, columns: int | None = None,
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
        schedule: how to block the product, in the sparse form; None leaves it to the cost model.
        max_code_bytes: refuse to generate more code than this.
        form: "sparse" (unrolled over the nonzeros), "dense" (looped over all elements: one code for every shape, but
            where W has zeros they are factors too, and 0 * inf is NaN) or None: dense where nothing is zero and W is
            large enough for it. ``explain()`` says what was chosen, and where "dense" would be faster.
        tune: None leaves the schedule to the cost model; "fast" and "full" measure some (8, or up to 96) schedules and
            take the fastest, unless it is recorded already. "fast" takes up to 0.5 s per 50,000 nonzeros. Results are
            the same bits whatever the schedule.
        tuning: the file of records, or "off". By default what the variable SPARSERT_TUNING says, or a file in the
            user's cache folder, if ``tune`` is given; without ``tune`` records are used where ``tuning`` names them.
        columns: N to tune for, and to look up; 196 by default. Any N can be computed.

    Raises:
        ShapeError, DTypeError, FormatError, ValueRangeError, UnsupportedError: what is wrong with an argument.
        TargetUnavailableError: this machine cannot execute ``target``. ScheduleError: ``schedule`` does not fit it.
        CodeBudgetError: the code would exceed ``max_code_bytes``.
        ExecutableMemoryError: the system's policy forbids generated code.
    """
    if not isinstance(layout, str) or layout not in LAYOUTS[:2]:
        raise UnsupportedError(f"unknown layout {layout!r}", where="layout", hint=f"Known: {', '.join(LAYOUTS[:2])}.")
    return _compile(
        CompiledMatmul, weight, bias, activation, residual, precision, target, threads, layout, schedule,
        max_code_bytes, form, tune, tuning, columns,
    )  # fmt: skip


def compile_linear(
    weight: Any, bias: Any = None, activation: Any = None, *, residual: str | None = None, precision: str = "f32",
    target: str = "native", threads: int | None = None, schedule: Schedule | None = None,
    max_code_bytes: int | None = None, form: str | None = None, tune: str | None = None,
    tuning: str | os.PathLike[str] | None = None, columns: int | None = None,
) -> CompiledLinear:  # fmt: skip
    """Compile ``y = act(x @ W.T + b)`` for a sparse W (M, K): x (..., K) to y (..., M), as ``torch.nn.Linear``.

    Arguments and errors are those of :func:`compile_matmul`.
    """
    return _compile(
        CompiledLinear, weight, bias, activation, residual, precision, target, threads, "transposed", schedule,
        max_code_bytes, form, tune, tuning, columns,
    )  # fmt: skip


def compile_product(
    *, transpose_a: bool = False, transpose_b: bool = False, scale: float = 1.0, activation: Any = None,
    target: str = "native",
) -> CompiledProduct:  # fmt: skip
    """Compile ``y = act(scale * a @ b)`` for two activations, as in attention: a (..., M, K), b (..., K, N).

    M, K, N and the leading axes, which broadcast, are those of each call; one piece of code serves them all.

    Args:
        transpose_a: a is (..., K, M).
        transpose_b: b is (..., N, K).
        scale: the sums are multiplied by this, rounded to float32.
        activation, target: as in :func:`compile_matmul`.

    Raises:
        UnsupportedError: an unknown activation or target. ValueRangeError: ``scale`` is no finite number.
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
    return CompiledProduct(spec, host.resolve(target))


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
    task, b = _task(matrix, bias, activation, residual, "f32", layout)
    budget = _hopeful(MAX_CODE_BYTES, matrix.pattern.nnz)
    return tuned.run(task, found, wanted, lambda s: _build(task, s, found, budget, matrix.values, b)).tuning


def _compile(
    kind: type[_Kind], weight: Any, bias: Any, activation: Any, residual: str | None, precision: str, target: str,
    threads: int | None, layout: str, schedule: Schedule | None, max_code_bytes: int | None, form: str | None,
    tune: str | None, tuning: str | os.PathLike[str] | None, columns: int | None,
) -> _Kind:  # fmt: skip
    started = time.perf_counter()
    permitted = _threads(threads)
    found = host.resolve(target)
    matrix = as_sparse(weight)
    task, b = _task(matrix, bias, activation, residual, precision, layout)
    _check_schedule(schedule)
    wanted = tuned.request(tune, tuning, columns)
    if schedule is not None and tune is not None:
        raise UnsupportedError("a given schedule leaves nothing to tune", where="tune", hint="Give one of the two.")
    permitted_bytes = _budget(max_code_bytes)
    chosen: Schedule | DenseSchedule | None
    dense_reason = _dense(form, task, found, schedule)
    if found.isa == "reference":
        product: Product = ReferenceProduct(task)
        product.load(matrix.values, b)
        chosen, reason, code_bytes, instructions, reuse, list_code = None, "", 0, 0, 0.0, _no_listing
    elif dense_reason:
        task = replace(task, layout="transposed" if kind is CompiledLinear else task.layout)
        dense = product = DenseProduct(task, found)
        product.load(matrix.values, b)
        chosen, reason, reuse = dense.schedule, dense_reason, float(dense.code.rows)
        code_bytes, instructions, list_code = dense.code.size, dense.code.instructions, dense.listing
        _within(code_bytes, permitted_bytes)
    else:
        budget = _hopeful(permitted_bytes, matrix.pattern.nnz)

        def build(candidate: Schedule) -> Built:
            return _build(task, candidate, found, budget, matrix.values, b)

        built: Built | None = None
        if schedule is None and wanted is not None:
            fixed, reason, built, _ = tuned.choose(task, found, wanted, build)
        else:
            fixed = _schedule(task, found, schedule)
            reason = "given by the caller" if schedule else cost.reason(task, found, fixed)
        chosen = fixed
        kernel, product, code_bytes, instructions = built or build(fixed)
        reuse = matrix.pattern.nnz / max(1, kernel.x_loads)

        def list_code() -> str:
            return listing(matmul.generate(task, fixed, found).program, found.isa)

    nnz = matrix.pattern.nnz
    value_bytes = 4 * (nnz + (task.pattern.rows if task.bias else 0))
    per_nonzero = (code_bytes + value_bytes) / max(1, nnz) if code_bytes else 0.0
    seconds = time.perf_counter() - started
    stats = Stats(nnz, matrix.pattern.density, code_bytes, value_bytes, per_nonzero, reuse, instructions, seconds)
    return kind(Compiled(task, found, product, stats, chosen, reason, permitted, list_code), b)


def _build(task: Task, schedule: Schedule, target: Target, budget: int, values: Array, bias: Array | None) -> Built:
    """Machine code with its values, ready to be called."""
    kernel = matmul.generate(task, schedule, target)
    code = assemble(kernel.program, target.isa)
    _within(len(code.code), budget)
    kernel = replace(kernel, program=Program({}, (), 0, {}))  # twice as large as the code, and not needed any more
    product = NativeProduct(task, schedule, target, kernel, Executable(code.code))
    product.load(values, bias)
    return Built(kernel, product, len(code.code), code.instructions)


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


def _within(size: int, budget: int) -> None:
    if size > budget:
        raise CodeBudgetError(
            f"the code takes {size} bytes, {budget} are permitted",
            where="max_code_bytes",
            hint="Raise the budget, or use target='reference'.",
        )


def _dense(form: Any, task: Task, target: Target, schedule: Schedule | None) -> str:
    """Why the dense form is used, or an empty string where it is not."""
    if not (form is None or (isinstance(form, str) and form in ("sparse", "dense"))):
        raise UnsupportedError(f"unknown form {form!r}", where="form", hint="Use None, 'sparse' or 'dense'.")
    if form == "dense" and schedule is not None:
        raise ScheduleError("a schedule is of the sparse form", where="schedule", hint="Leave it out, or form='dense'.")
    if form == "dense" and task.layout == "tile_major":
        raise UnsupportedError("the dense form takes no tile-major arrays", where="layout", hint="Use 'row_major'.")
    if form == "sparse" or schedule is not None or task.layout == "tile_major" or not task.pattern.nnz:
        return ""
    if form == "dense":
        return "given by the caller"
    return cost.dense_reason(task, target)


def _hopeful(budget: int, nnz: int) -> int:
    least = nnz * _LEAST_BYTES
    if least > budget:
        raise CodeBudgetError(
            f"{nnz} nonzeros take at least {least} bytes of code, {budget} are permitted",
            where="max_code_bytes",
            hint="Raise the budget, split or prune the layer further, or use target='reference'.",
        )
    return budget


def _no_listing() -> str:
    return "the reference target runs NumPy: there is no machine code to list\n"
