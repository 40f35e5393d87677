"""The chain from a pruned layer to machine code."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from .codegen.assemble import assemble, listing
from .codegen.parking import PoolCode
from .errors import CodeBudgetError, ExecutableMemoryError, ScheduleError, ShapeError, UnsupportedError, ValueRangeError
from .kernels import activations, matmul, worker
from .operators.arrays import Array, as_input
from .operators.compact import CompactProduct, SmallProducts, looped_code_bytes
from .operators.dense import DenseProduct
from .operators.matmul import Compiled, CompiledLinear, CompiledMatmul, Product, Stats
from .operators.native import Crew, NativeProduct
from .operators.product import CompiledProduct, ProductSpec
from .operators.reference import ReferenceProduct
from .runtime import host, workers
from .runtime.cpu import Executable
from .schedule import cost
from .schedule.dense import DenseSchedule
from .schedule.schedule import Schedule, most_rows
from .schedule.task import LAYOUTS, Task
from .sparsity.partition import balanced
from .sparsity.pattern import Pattern, SparseMatrix, as_sparse, require_finite
from .target import Target

PRECISIONS = ("f32",)
MAX_CODE_BYTES = 1 << 30  # branches reach 2 GiB
_LEAST_BYTES = 5  # per nonzero: what refuses a hopeless budget before any work is done

_Kind = TypeVar("_Kind", CompiledMatmul, CompiledLinear)


def compile_matmul(
    weight: Any, bias: Any = None, activation: Any = None, *, residual: str | None = None, precision: str = "f32",
    target: str = "native", threads: int | None = None, layout: str = "row_major", schedule: Schedule | None = None,
    max_code_bytes: int | None = None, form: str | None = None,
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
        max_code_bytes, form,
    )  # fmt: skip


def compile_linear(
    weight: Any, bias: Any = None, activation: Any = None, *, residual: str | None = None, precision: str = "f32",
    target: str = "native", threads: int | None = None, schedule: Schedule | None = None,
    max_code_bytes: int | None = None, form: str | None = None,
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
        form,
    )


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


def _compile(
    kind: type[_Kind], weight: Any, bias: Any, activation: Any, residual: str | None, precision: str, target: str,
    threads: int | None, layout: str, schedule: Schedule | None, max_code_bytes: int | None, form: str | None,
) -> _Kind:  # fmt: skip
    started = time.perf_counter()
    permitted = _threads(threads)
    found = host.resolve(target)
    matrix = as_sparse(weight)
    task, b = _task(matrix, bias, activation, residual, precision, layout)
    _check_schedule(schedule)
    permitted_bytes = _budget(max_code_bytes)
    chosen: Schedule | DenseSchedule | None
    note: Callable[[], str]
    dense_reason = _dense(form, task, found, schedule)
    if found.isa == "reference":
        product: Product = ReferenceProduct(task)
        chosen, reason, code_bytes, instructions, reuse, list_code = None, "", 0, 0, 0.0, _no_listing
        small: SmallProducts | None = None
        note = partial(_one_thread, "the reference target")
    elif dense_reason:
        task = replace(task, layout="transposed" if kind is CompiledLinear else task.layout)
        dense = product = DenseProduct(task, found)
        chosen, reason, reuse = dense.schedule, dense_reason, float(dense.code.rows)
        code_bytes, instructions, list_code = dense.code.size, dense.code.instructions, dense.listing
        small = None
        _within(code_bytes, permitted_bytes)
        note = partial(_one_thread, "the dense form")
    else:
        may_loop = schedule is None and form is None and found.loops
        made = _unrolled(task, found, schedule, permitted, permitted_bytes, may_loop)
        if made is None:
            if (needed := looped_code_bytes(task, found)) > permitted_bytes:
                raise CodeBudgetError(
                    f"even a loop over the pattern takes {needed} bytes of code, {permitted_bytes} are permitted",
                    where="max_code_bytes",
                    hint="Raise the budget, or use target='reference'.",
                )
            product = compact = CompactProduct(task, found, by_lookup=False)
            chosen, list_code = None, compact.listing
            reason = f"unrolled code would take more than the {permitted_bytes} bytes that are permitted"
            code_bytes, instructions, reuse = compact.code_bytes, 0, 1.0
            note = partial(_one_thread, "a loop over the pattern")
            small = SmallProducts(task, found, lambda: (compact.unpack(), b))
        else:
            product = native = made[0]
            code_bytes, instructions = made[1:]
            chosen = fixed = native.schedule
            reason = "given by the caller" if schedule else cost.reason(task, found, fixed)
            reuse = matrix.pattern.nnz / max(1, native.kernel.x_loads)
            note = native.threads_note
            small = SmallProducts(task, found, native.current)

            def list_code() -> str:
                return listing(matmul.generate(task, fixed, found).program, found.isa)

    product.load(matrix.values, b)
    nnz = matrix.pattern.nnz
    value_bytes = 4 * (nnz + (task.pattern.rows if task.bias else 0))
    per_nonzero = (code_bytes + value_bytes) / max(1, nnz) if code_bytes else 0.0
    seconds = time.perf_counter() - started
    stats = Stats(nnz, matrix.pattern.density, code_bytes, value_bytes, per_nonzero, reuse, instructions, seconds)
    return kind(Compiled(task, found, product, stats, chosen, reason, permitted, list_code, note, small), b)


def _unrolled(
    task: Task, found: Target, schedule: Schedule | None, threads: int, budget: int, may_loop: bool
) -> tuple[NativeProduct, int, int] | None:
    """The unrolled product, its bytes of code and instructions; None where that is too much and ``may_loop``.

    Raises:
        CodeBudgetError: it is too much.
    """
    if may_loop and task.pattern.nnz * _LEAST_BYTES > budget:
        return None
    _hopeful(budget, task.pattern.nnz)
    chosen = _schedule(task, found, schedule)
    kernel = matmul.generate(task, chosen, found)
    code = assemble(kernel.program, found.isa)
    if may_loop and len(code.code) > budget:
        return None
    _within(len(code.code), budget)
    several = threads > 1 and workers.supported()
    crew = _crew(task, found, schedule, threads, budget - len(code.code)) if several else None
    product = NativeProduct(task, chosen, found, kernel, Executable(code.code), crew)
    return product, len(code.code), code.instructions


def _crew(task: Task, target: Target, schedule: Schedule | None, threads: int, budget: int) -> Crew:
    """What an operator on several threads needs: the pool, and how to compile parts by rows in ``budget`` bytes."""

    def rows(parts: int) -> list[tuple[int, NativeProduct]]:
        if cost.code_bytes(task, target) > budget:
            return []
        try:
            return [(first, _part(task, target, schedule, first, last)) for first, last in _row_ranges(task, parts)]
        except ExecutableMemoryError:  # no more room for code: columns will do
            return []

    return Crew(lambda: shared_pool(target), threads, rows)


def shared_pool(target: Target) -> workers.Pool:
    """The threads of this process, whose programs are generated when they are first asked for."""

    def code() -> PoolCode:
        return PoolCode(*(assemble(make(), target.isa).code for make in (worker.worker, worker.dispatch, worker.claim)))

    return workers.shared(code)


def _row_ranges(task: Task, parts: int) -> list[tuple[int, int]]:
    """Ranges of rows with nearly equal numbers of nonzeros; of transposed products at least four, all but the last in
    fours."""
    unit = 4 if task.layout == "transposed" else 1
    starts = np.arange(task.pattern.rows // unit) * unit
    cuts = np.unique(balanced(np.add.reduceat(task.pattern.row_counts, starts), parts)) * unit
    cuts[-1] = task.pattern.rows
    return list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))


def _part(task: Task, target: Target, schedule: Schedule | None, first: int, last: int) -> NativeProduct:
    """The product of rows ``first`` to ``last`` alone, for arrays of the whole."""
    p = task.pattern
    low, high = int(p.indptr[first]), int(p.indptr[last])
    pattern = Pattern(last - first, p.cols, p.indptr[first : last + 1] - low, p.indices[low:high].copy())
    part = replace(task, pattern=pattern, height=p.rows)
    if schedule:  # a part whose rows come in fours may need registers that the whole does not (layout.scatter)
        schedule = replace(schedule, rows=min(schedule.rows, most_rows(target, matmul.spare(part, target))))
    chosen = _schedule(part, target, schedule)
    kernel = matmul.generate(part, chosen, target)
    return NativeProduct(part, chosen, target, kernel, Executable(assemble(kernel.program, target.isa).code))


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


def _hopeful(budget: int, nnz: int) -> None:
    least = nnz * _LEAST_BYTES
    if least > budget:
        raise CodeBudgetError(
            f"{nnz} nonzeros take at least {least} bytes of code, {budget} are permitted",
            where="max_code_bytes",
            hint="Raise the budget, leave schedule and form out, or use target='reference'.",
        )


def _one_thread(what: str) -> str:
    return f"1, whatever is permitted: {what} uses no others"


def _no_listing() -> str:
    return "the reference target runs NumPy: there is no machine code to list\n"
