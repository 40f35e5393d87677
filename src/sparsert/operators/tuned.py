"""Where a schedule comes from when the caller gives none: records of tuning, a tuning run, or the cost model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ScheduleError, UnsupportedError, ValueRangeError
from ..kernels import matmul
from ..runtime import host
from ..schedule import cost, database, space, tuner
from ..schedule.database import Database, Record
from ..schedule.schedule import Schedule
from ..schedule.task import Task
from ..target import Target
from .trials import CHAIN_CACHES, Built, Shapes, Trials

DEFAULT_COLUMNS = 196
"""What is tuned for where nobody says: an image of 14x14, or as many tokens."""


class Choice(NamedTuple):
    """A schedule, where it comes from, the code if it is compiled already, and the tuning run if there was one."""

    schedule: Schedule
    reason: str
    built: Built | None = None
    tuning: tuner.Tuning | None = None


class Tuning(NamedTuple):
    """What a compile function was asked to do about tuning.

    Attributes:
        shapes: of a convolution's x and y, whose positions are the columns; None for a product.
    """

    effort: str | None
    columns: int
    database: Database | None
    cold: bool = True
    shapes: Shapes | None = None

    def on(self, shapes: Shapes) -> Tuning:
        """The same for a convolution of such arrays."""
        return self._replace(columns=int(np.prod(shapes[1][2:])), shapes=shapes)


WARM = "-warm"
"""Behind an effort: samples of calls in a row, instead of samples as a network calls a layer."""
ASKED = (*tuner.EFFORTS, *(effort + WARM for effort in tuner.EFFORTS))


def request(tune: Any, tuning: Any, columns: Any) -> Tuning | None:
    """The checked arguments of a compile function; None where the cost model is to decide alone.

    Raises:
        UnsupportedError: an unknown effort, or a path that is none. ValueRangeError: ``columns`` is not positive.
    """
    if tune is not None and (not isinstance(tune, str) or tune not in ASKED):
        raise UnsupportedError(f"tune={tune!r}", where="tune", hint=f"Use None, {', '.join(map(repr, ASKED))}.")
    if columns is not None and (
        not isinstance(columns, (int, np.integer)) or isinstance(columns, bool) or not 1 <= columns <= _MOST_COLUMNS
    ):
        raise ValueRangeError(
            f"{columns!r} is no number of columns",
            where="columns",
            hint=f"Use None or an int from 1 to {_MOST_COLUMNS}.",
        )
    if tuning is not None and (not isinstance(tuning, (str, os.PathLike)) or not str(tuning) or "\0" in str(tuning)):
        raise UnsupportedError(f"tuning={tuning!r} is no path", where="tuning", hint="Name a file, or use 'off'.")
    if tune is None and tuning is None:
        return None
    if tuning is None:
        path = database.default_path()
    else:
        path = None if str(tuning) == database.OFF else Path(tuning).expanduser()
    wide = DEFAULT_COLUMNS if columns is None else int(columns)
    cold = tune is None or not tune.endswith(WARM)
    return Tuning(tune and tune.removesuffix(WARM), wide, None if path is None else Database(path), cold)


_MOST_COLUMNS = 1 << 31
_MEMORY = 1 << 30  # bytes that candidates may take together,
_BYTES = 80  # of which each nonzero takes so many: code, values, and where each value lies


def choose(task: Task, target: Target, wanted: Tuning, build: Callable[[Schedule], Built]) -> Choice:
    """The schedule of the record that counts; else, if tuning is wanted, of a tuning run, which is then recorded; else
    the cost model's."""
    spare = matmul.spare(task, target)
    if wanted.database is not None:
        efforts = ("full",) if wanted.effort == "full" else tuple(tuner.EFFORTS)
        record = wanted.database.find(*_identity(task, target, wanted), efforts)
        if record is None and wanted.effort is None:
            record = wanted.database.find(*_identity(task, target, wanted._replace(cold=False)), efforts)
        schedule = None if record is None else _legal(record, task, target, spare)
        if record is not None and schedule is not None:
            return Choice(schedule, f"recorded in {wanted.database.path} on {record.date[:10]}: {_words(record)}")
    if wanted.effort is None:
        schedule = cost.choose(task, target, spare)
        return Choice(schedule, f"no record of it; {cost.reason(task, target, schedule)}")
    return run(task, target, wanted, build)


def run(task: Task, target: Target, wanted: Tuning, build: Callable[[Schedule], Built]) -> Choice:
    """Tune, whatever is recorded, and record what is found."""
    effort, spare = tuner.EFFORTS[wanted.effort or "fast"], matmul.spare(task, target)
    each = _BYTES * max(1, task.pattern.nnz) + (2 * CHAIN_CACHES * target.l2 if wanted.cold else 0)
    room = max(tuner.LEAST, _MEMORY // each)
    found = space.candidates(task, target, spare, wanted.columns, min(effort.candidates, room))
    if len(found) == 1:
        return Choice(found[0], "by the cost model: no other schedule would differ")
    measure = Trials(task, target, build, wanted.columns, wanted.shapes, wanted.cold)
    result = tuner.tune(task, found, measure, effort.budget(task.pattern.nnz), rounds=effort.rounds)
    record = _record(task, target, wanted, result)
    if wanted.database is not None:
        wanted.database.add(record)
    over = f"{len(result.trials)} schedules in {1e3 * result.elapsed:.0f} ms on {measure.columns} columns"
    return Choice(
        result.best.schedule, f"tuned now: {_words(record)}; {over}", measure.built[result.best.schedule], result
    )


def _legal(record: Record, task: Task, target: Target, spare: int) -> Schedule | None:
    """The record's schedule, None where it does not fit the task: then the record is as good as none."""
    try:
        schedule = Schedule.parse(record.schedule)
        schedule.check(target, spare)
    except ScheduleError:
        return None
    return schedule if space.plausible(task, schedule) else None


def _identity(task: Task, target: Target, wanted: Tuning) -> tuple[str, str, str]:
    """What a record is found by: the task with its number of columns, target, CPU."""
    key = database.key(task, database.columns_class(wanted.columns, target), wanted.cold)
    return key, target.name, database.machine(host.cpu_identity())


def _record(task: Task, target: Target, wanted: Tuning, result: tuner.Tuning) -> Record:
    m, k = task.pattern.shape
    extras = [word for word in (task.activation, "bias" if task.bias else None, task.residual) if word]
    form, size = task.layout, f"{wanted.columns} columns"
    if wanted.shapes is not None:
        form, size = "convolution", "x".join(map(str, wanted.shapes[0][2:]))
    remark = ", ".join([f"{m}x{k}", f"{task.pattern.nnz} nonzeros", form, size, *extras,
                        "cold" if wanted.cold else "warm"])  # fmt: skip
    second = result.runner_up
    return Record(
        *_identity(task, target, wanted), wanted.effort or "fast", result.best.seconds, result.first.seconds,
        str(result.best.schedule), str(second.schedule) if second else "", second.seconds if second else 0.0,
        remark=remark,
    )  # fmt: skip


def _words(record: Record) -> str:
    """What was measured, for people."""
    if record.seconds == record.first:
        words = f"{record.effort} tuning found nothing better than the cost model's choice, {1e6 * record.first:.1f} us"
    else:
        gain = f"{1e6 * record.first:.1f} us with the cost model's choice"
        words = f"{record.effort} tuning measured {1e6 * record.seconds:.1f} us, {gain}"
    if record.runner_up:
        words += f"; next best, {1e6 * record.runner_up_seconds:.1f} us: {record.runner_up}"
    if (how := record.remark.rpartition(", ")[2]) in ("cold", "warm"):
        words += f"; {how} samples"
    return words
