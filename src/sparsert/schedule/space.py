"""Candidates for a tuner: schedules that are legal, differ in what they do, and might win; the best guess first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from ..sparsity.partition import row_blocks
from ..target import Target
from . import cost
from .schedule import PACKING, Schedule, most_rows
from .task import Task

MOST_SEGMENTS = 64  # carrying sums more often than that never pays


def candidates(task: Task, target: Target, spare: int, columns: int, most: int) -> list[Schedule]:
    """At most ``most`` schedules for ``task`` on ``columns`` columns, the cost model's choice first.

    Behind it come schedules that differ from it in what was seen to matter, in the order in which they won most in
    sweeps (docs/design/0013); then combinations of everything. All are legal with ``spare`` registers taken, and no
    two do the same on so many columns.
    """
    found: dict[Schedule, Schedule] = {}
    for schedule in _all(task, target, spare):
        found.setdefault(canonical(task, schedule, target, columns), schedule)
        if len(found) >= most:
            break
    return list(found.values())


def plausible(task: Task, schedule: Schedule) -> bool:
    """Whether the code of ``schedule`` stays in proportion: a schedule that someone wrote down may be absurd."""
    return not schedule.k_segment or task.extent <= MOST_SEGMENTS * schedule.k_segment


def _all(task: Task, target: Target, spare: int) -> Iterator[Schedule]:
    base = cost.choose(task, target, spare)
    yield base
    if task.window:
        yield from _convolutions(task, base, most_rows(target, spare))
    elif task.pattern.nnz:
        yield from _neighbours(task, target, base)
        yield from _combinations(task, target, base, most_rows(target, spare))


def _neighbours(task: Task, target: Target, base: Schedule) -> Iterator[Schedule]:
    """One or two steps from ``base``."""
    near = _segments(task, target)[-1:]  # whose x fits half of L1
    whole = replace(base, k_segment=0, prefetch=False)
    if cost.load_bound(task, target, base.rows):
        for k in near:
            yield replace(base, k_segment=k, blocks=0, tiles=8, order="natural", prefetch=False)
            yield replace(base, k_segment=k, blocks=0, tiles=0, order="natural", prefetch=False)
            yield replace(base, k_segment=2 * k, blocks=2, tiles=0, order="natural", prefetch=False)
            yield replace(base, k_segment=k, blocks=0, tiles=8, order="overlap", prefetch=False)
        yield replace(whole, blocks=1, tiles=0, order="count")
        yield replace(whole, blocks=0, tiles=0, order="natural")
        yield replace(whole, blocks=1, tiles=0, order="overlap", packing="none")
        yield replace(whole, blocks=0, tiles=0, order="overlap")
        yield replace(whole, blocks=1, tiles=0, order="overlap", prefetch=True)
        yield replace(whole, blocks=2, tiles=0, order="natural")
        yield replace(whole, blocks=1, tiles=8, order="overlap")
    elif cost.code_bytes(task, target) > target.l2:  # and x competes with code for L2
        segments = _segments(task, target)
        yield replace(base, tiles=4)
        for segment in segments[1:2] or segments[:1]:
            yield replace(base, k_segment=segment, tiles=4)
        yield replace(whole, blocks=0, tiles=0)
        yield replace(base, order="count")
        yield replace(base, rows=max(1, 3 * base.rows // 4))
        for segment in segments[:1]:
            yield replace(base, k_segment=segment)
        yield replace(whole, blocks=2, tiles=0)
        yield replace(whole, prefetch=base.prefetch)
    else:
        other = "beside" if base.packing == "none" else "none"
        yield replace(whole, blocks=2, tiles=0)
        if task.layout == "row_major":
            yield replace(whole, blocks=2, tiles=0, packing=other)
        yield replace(base, tiles=8, blocks=1)
        yield replace(whole, blocks=4, tiles=0)
        if task.layout == "row_major":
            yield replace(base, packing=other)
        for segment in _segments(task, target)[:1]:
            yield replace(base, k_segment=0 if base.k_segment else segment, blocks=1)
        yield replace(base, tiles=16, blocks=1)
        yield replace(base, order="count")
        yield replace(whole, blocks=0, tiles=8)
        yield replace(whole, blocks=1, tiles=0)
    yield replace(base, blocks=1, prefetch=not base.prefetch)


def _combinations(task: Task, target: Target, base: Schedule, most: int) -> Iterator[Schedule]:
    """Everything with everything, the likelier values of each field first."""
    packing = [base.packing, *(p for p in PACKING if p != base.packing)] if task.layout == "row_major" else ["none"]
    segments = [0, *_segments(task, target)]
    loops = ((1, 0, False), (0, 0, False), (1, 0, True), (2, 0, False), (1, 8, False), (0, 8, False), (4, 0, False),
             (1, 16, False), (1, 4, True))  # fmt: skip
    orders = ["natural", *(["overlap"] if task.pattern.density < _GROUPED else []), "count"]
    for order, where, segment, (blocks, tiles, prefetch) in product(orders[:1], packing, segments, loops):
        yield Schedule(most, segment, tiles, blocks, where, order, prefetch)
    for order, segment, (blocks, tiles, prefetch) in product(orders[1:], segments, loops[:6]):
        yield Schedule(most, segment, tiles, blocks, base.packing, order, prefetch)
    for rows in (3 * most // 4, most // 2):
        if rows:
            yield replace(base, rows=rows)


def _convolutions(task: Task, base: Schedule, most: int) -> Iterator[Schedule]:
    """Convolutions load x unaligned and often: what groups rows, and what segments x, matters most."""
    if not task.pattern.nnz:
        return
    segments = [-(-task.extent // n) for n in (-(-task.extent // each) for each in _CONV_SEGMENTS) if n > 1]
    lengths = list(dict.fromkeys([base.k_segment, 0, *segments]))
    one_group = task.window is not None and task.window.groups == 1
    orders = [
        base.order,
        *(o for o in ("overlap", "natural", "count") if o != base.order and (one_group or o != "overlap")),
    ]
    for order in orders[1:]:
        yield replace(base, order=order)
    for length in lengths[1:]:
        yield replace(base, k_segment=length)
    yield replace(base, packing="beside")
    yield replace(base, tiles=8, blocks=0)
    yield replace(base, rows=max(1, 3 * most // 4))
    yield replace(base, prefetch=not base.prefetch)
    yield replace(base, tiles=8)
    yield replace(base, blocks=2)
    for length, order, packing in product(lengths, orders, ("none", "beside")):
        for blocks, tiles in ((1, 0), (0, 8), (1, 8), (0, 0), (2, 0), (1, 16)):
            yield Schedule(most, length, tiles, blocks, packing, order)


_CONV_SEGMENTS = (768, 384, 1536)  # displacements
_GROUPED = 0.11  # above this density, grouping rows by overlap saves too little to be tried


def _segments(task: Task, target: Target) -> list[int]:
    """Rows per segment worth trying, the longest first: x of the last fits half of L1."""
    k, least = task.pattern.cols, max(16, target.l1d // 2 // target.tile_bytes)
    found = [-(-k // n) for n in (2, 4, 8) if k // n > least]
    return [*found, least] if k > least else []


def canonical(task: Task, schedule: Schedule, target: Target, columns: int) -> Schedule:
    """The plainest schedule that does the same to ``task`` on ``columns`` columns."""
    m, k = task.pattern.rows, task.extent
    fours = task.layout == "transposed" and m % 4 == 0 and schedule.order == "natural" and schedule.rows >= 4
    unit = 4 if fours else 1  # rows that are transposed in registers come in fours
    blocks = max(1, row_blocks(m, schedule.rows, unit).size - 1)
    rows = min(schedule.rows, unit * -(-m // (unit * blocks))) if m else schedule.rows
    segment = schedule.k_segment if schedule.k_segment < k else 0
    packing = schedule.packing if task.layout == "row_major" else "none"
    together = schedule.blocks if schedule.blocks < blocks else 0
    if blocks == 1:
        together = 1
    plain = replace(
        schedule, rows=rows, k_segment=segment, packing=packing, blocks=together,
        order=schedule.order if blocks > 1 else "natural",
        prefetch=schedule.prefetch and together == 1 and (blocks > 1 or segment > 0),
    )  # fmt: skip
    tiles = max(1, -(-columns // target.lanes))
    group = cost.tiles_per_group(task, plain, target, tiles)
    once = blocks == 1 or not together  # all code passes over a tile: groups only bound what is scratch
    if once and not segment and packing == "none" and task.layout != "transposed":
        return replace(plain, tiles=0)
    whole = cost.tiles_per_group(task, replace(plain, tiles=0), target, tiles)
    return replace(plain, tiles=0 if group == whole else group)
