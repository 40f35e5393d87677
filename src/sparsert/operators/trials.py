"""What a tuner measures with: schedules compiled as they are asked for, on arrays of the caller's kind."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from ..errors import CodeBudgetError
from ..kernels.matmul import Kernel
from ..runtime.cpu import address_of
from ..runtime.memory import aligned_empty
from ..schedule.schedule import Schedule
from ..schedule.task import Task
from ..target import Target
from .arrays import Array, empty
from .bands import column_phases
from .native import NativeProduct

SAMPLE_SECONDS = 4e-4  # of calls in a row, twice, of which the faster counts: an interrupt spoils one of them
MOST_CALLS = 1000
CHAIN = 9  # layers of a network that are called in turn, at most,
CHAIN_CACHES = 8  # until their code and values are so many times the second-level cache
MOST_BYTES = 512 << 20  # of x, of y and of a residual; where more columns are asked for, these tell as much


Shapes = tuple[tuple[int, ...], tuple[int, ...]]
"""Of x and y of a convolution."""


class Built(NamedTuple):
    """A task under a schedule, as machine code with its values."""

    kernel: Kernel
    product: NativeProduct
    code_bytes: int
    instructions: int


@dataclass
class _Ready:
    run: Callable[[], None]
    calls: int
    products: int = 1  # that a call runs


class Trials:
    """``measure(task, schedule)`` for :func:`sparsert.schedule.tuner.tune`; ``built`` keeps what was compiled.

    Samples are ``cold``, of a layer as a network calls it: copies of its code and values at other addresses are called
    in turn, so that each has been pushed out of the near caches since its last turn. (Walking through memory between
    two calls instead predicts chains no better than warm samples do.) Or they are warm, of calls in a row.
    """

    def __init__(
        self, task: Task, target: Target, build: Callable[[Schedule], Built], columns: int,
        shapes: Shapes | None = None, cold: bool = True, clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self.build, self.clock, self.cold = build, clock, cold
        self.room = CHAIN_CACHES * target.l2
        self.built: dict[Schedule, Built] = {}
        self._ready: dict[Schedule, _Ready] = {}
        if shapes is not None:
            self.columns, self._bound = columns, shapes[0][3]
            self.x, self.y, self.r = _images(task, shapes)
            return
        columns = min(columns, MOST_BYTES // (4 * max(1, *task.pattern.shape)))
        whole = -(-columns // target.lanes) * target.lanes
        self.columns = self._bound = whole if task.layout == "tile_major" else max(columns, target.lanes)
        self.x, self.y, self.r = _arrays(task, target, self.columns)

    def __call__(self, task: Task, schedule: Schedule) -> float:
        """Seconds of a call; infinity where the code would exceed the budget."""
        ready = self._ready.get(schedule)
        if ready is None:
            try:
                ready = self._ready[schedule] = self._prepare(schedule)
            except CodeBudgetError:
                if not self.built:  # the first one is the cost model's: without tuning it would not fit either
                    raise
                return math.inf
        run, calls = ready.run, ready.calls
        for _ in range(calls // 3 if self.cold else max(1, calls // 3)):  # a turn of many copies is a long sample
            run()
        samples = []
        for _ in range(1 if self.cold and calls == 1 else 2):
            start = self.clock()
            for _ in range(calls):
                run()
            samples.append(self.clock() - start)
        return max(min(samples), 1e-9) / (calls * ready.products)

    def _prepare(self, schedule: Schedule) -> _Ready:
        built = self.built[schedule] = self.build(schedule)
        products = [built.product]
        if self.cold:
            size = max(1, built.code_bytes + 4 * built.kernel.plan.slots)
            products += [built.product.copy() for _ in range(min(CHAIN, max(1, -(-self.room // size))) - 1)]
        addresses = [0 if array is None else address_of(array) for array in (self.x, self.y, self.r)]
        turns = [p.bind(self.x, self.y, self.r, self._bound).fixed(*addresses) for p in products]
        run = turns[0] if len(turns) == 1 else partial(_in_turn, turns)
        run()  # the first call allocates and faults in what the second finds
        start = self.clock()
        run()
        once = max(self.clock() - start, 1e-7)
        return _Ready(run, min(MOST_CALLS, math.ceil(SAMPLE_SECONDS / once)), len(turns))


def _in_turn(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _arrays(task: Task, target: Target, columns: int) -> tuple[Array, Array, Array | None]:
    """x, y and the residual, in the layout of the task."""
    m, k = task.pattern.shape
    tiles = -(-columns // target.lanes)
    noise = np.random.default_rng(0).standard_normal(1 << 14, np.float32)

    def filled(extent: int) -> Array:
        shapes = {
            "row_major": (extent, columns),
            "transposed": (columns, extent),
            "tile_major": (tiles, extent, target.lanes),
        }
        shape = shapes[task.layout]
        if task.layout == "tile_major":  # as inside a network; others lie where NumPy puts them
            array = aligned_empty(math.prod(shape)).reshape(shape)
        else:
            array = empty(shape)
        array[...] = np.resize(noise, array.shape)
        return array

    return filled(k), filled(m), filled(m) if task.residual else None


def _images(task: Task, shapes: Shapes) -> tuple[Array, Array, Array | None]:
    """x, y and the residual of a convolution, columns of x phase by phase where strides have no shuffle."""
    (images, channels, height, width), out = shapes[0], shapes[1]
    window = task.window
    if window is not None and window.stride[1] > 2:
        stride = window.stride[1]
        x = empty((images, channels, height, len(column_phases(window)), -(-width // stride)))
    else:
        x = empty((images, channels, height, width))
    noise = np.random.default_rng(0).standard_normal(1 << 14, np.float32)
    arrays = [x, empty(out), *([empty(out)] if task.residual else [])]
    for array in arrays:
        array[...] = np.resize(noise, array.shape)
    return arrays[0], arrays[1], arrays[2] if task.residual else None
