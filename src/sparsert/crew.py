"""What an operator on several threads needs: the pool, and parts by rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .codegen.assemble import assemble
from .codegen.parking import PoolCode
from .errors import ExecutableMemoryError
from .kernels import matmul, worker
from .operators.native import NativeProduct
from .operators.team import Crew
from .request import schedule_for
from .runtime import workers
from .runtime.cpu import Executable
from .schedule import cost
from .schedule.schedule import Schedule, most_rows
from .schedule.task import Task
from .sparsity.partition import balanced
from .sparsity.pattern import Pattern
from .target import Target


def crew(task: Task, target: Target, schedule: Schedule | None, threads: int, budget: int) -> Crew:
    """What an operator on several threads needs: the pool, and how to compile parts by rows in ``budget`` bytes."""

    def rows(parts: int) -> list[tuple[int, NativeProduct]]:
        if cost.code_bytes(task, target) > budget:
            return []
        try:
            return [(first, _part(task, target, schedule, first, last)) for first, last in row_ranges(task, parts)]
        except ExecutableMemoryError:  # no more room for code: columns will do
            return []

    return Crew(lambda: shared_pool(target), threads, rows)


def ranges(target: Target, threads: int) -> Crew | None:
    """What products need whose parts share their code, for several threads; None where there are none."""
    if threads < 2 or not workers.supported() or target.isa == "reference":
        return None
    return Crew(lambda: shared_pool(target), threads)


def shared_pool(target: Target) -> workers.Pool:
    """The threads of this process, whose programs are generated when they are first asked for."""

    def code() -> PoolCode:
        return PoolCode(*(assemble(make(), target.isa).code for make in worker.PROGRAMS))

    return workers.shared(code)


def row_ranges(task: Task, parts: int) -> list[tuple[int, int]]:
    """Ranges of rows with nearly equal numbers of nonzeros.

    Those of transposed products have at least four rows, and all but the last come in fours.
    """
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
    chosen = schedule_for(part, target, schedule)
    kernel = matmul.generate(part, chosen, target)
    return NativeProduct(part, chosen, target, kernel, Executable(assemble(kernel.program, target.isa).code))
