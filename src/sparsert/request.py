"""What a caller asked for, checked: tasks, targets, budgets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .errors import CodeBudgetError, ScheduleError, ShapeError, UnsupportedError, ValueRangeError
from .kernels import activations, matmul
from .operators import tuned
from .operators.arrays import Array, as_input
from .operators.matmul import stored
from .runtime import host
from .schedule import cost
from .schedule.schedule import Schedule
from .schedule.task import Task
from .sparsity.pattern import SparseMatrix, as_sparse, require_finite
from .target import Target

PRECISIONS = ("f32",)
STORAGES = ("bf16",)
MAX_CODE_BYTES = 1 << 30  # branches reach 2 GiB
_LEAST_BYTES = 5  # per nonzero: what refuses a hopeless budget before any work is done


class Request(NamedTuple):
    """What a caller asked for beside the task, checked."""

    target: Target
    threads: int
    schedule: Schedule | None
    budget: int
    tuning: tuned.Tuning | None = None


def make_request(
    target: str, threads: int | None, schedule: Schedule | None, max_code_bytes: int | None,
    tuning: tuned.Tuning | None = None,
) -> Request:  # fmt: skip
    """The arguments that all compile functions share.

    Raises:
        ValueRangeError, ScheduleError, UnsupportedError, TargetUnavailableError: what is wrong with one.
    """
    permitted, found = _threads(threads), host.resolve(target)
    check_schedule(schedule)
    return Request(found, permitted, schedule, budget_of(max_code_bytes), tuning)


def weights(weight: Any, storage: str | None) -> SparseMatrix:
    """A weight in any of its forms, rounded as ``storage`` says.

    Raises:
        UnsupportedError: there is no such storage. ValueRangeError: a value is not finite, or not when it is rounded.
        ShapeError, DTypeError, FormatError: what is wrong with the weight.
    """
    if not (storage is None or (isinstance(storage, str) and storage in STORAGES)):
        raise UnsupportedError(f"unknown storage {storage!r}", where="storage", hint=f"None, or {STORAGES[0]!r}.")
    matrix = as_sparse(weight)
    if storage is not None:
        matrix = replace(matrix, values=stored(matrix.values, storage))
        require_finite(matrix.values, "weight")
    return matrix


def make_task(
    matrix: SparseMatrix, bias: Any, activation: Any, residual: str | None, precision: str, layout: str
) -> tuple[Task, Array | None]:
    """The task that arguments of the compile functions describe, and its bias.

    Raises:
        ShapeError, DTypeError, ValueRangeError, UnsupportedError: what is wrong with an argument.
    """
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


def schedule_for(task: Task, target: Target, given: Schedule | None) -> Schedule:
    spare = matmul.spare(task, target)
    if given is None:
        return cost.choose(task, target, spare)
    given.check(target, spare)
    return given if task.layout == "row_major" else replace(given, packing="none")


def check_schedule(given: Any) -> None:
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


def budget_of(given: int | None) -> int:
    budget = MAX_CODE_BYTES if given is None else given
    if not isinstance(budget, (int, np.integer)) or isinstance(budget, bool) or budget < 0:
        raise ValueRangeError(
            f"{given!r} is not a number of bytes", where="max_code_bytes", hint="Use None or an int from 0 on."
        )
    return min(int(budget), MAX_CODE_BYTES)


def within(size: int, budget: int) -> None:
    if size > budget:
        raise CodeBudgetError(
            f"the code takes {size} bytes, {budget} are permitted",
            where="max_code_bytes",
            hint="Raise the budget, or use target='reference'.",
        )


def loop_within(size: int, budget: int) -> None:
    if size > budget:
        raise CodeBudgetError(
            f"even a loop over the pattern takes {size} bytes of code, {budget} are permitted",
            where="max_code_bytes",
            hint="Raise the budget, or use target='reference'.",
        )


def why_dense(form: Any, task: Task, target: Target, schedule: Schedule | None) -> str:
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


def hopeful(budget: int, nnz: int) -> int:
    least = nnz * _LEAST_BYTES
    if least > budget:
        raise CodeBudgetError(
            f"{nnz} nonzeros take at least {least} bytes of code, {budget} are permitted",
            where="max_code_bytes",
            hint="Raise the budget, leave schedule and form out, or use target='reference'.",
        )
    return budget
