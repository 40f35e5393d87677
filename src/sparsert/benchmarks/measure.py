"""Interleaved timing in one process: what is compared is timed in the same seconds, round by round.

Clock frequency, neighbours on the machine and memory layout drift over seconds; a ratio of two samples of one round
hardly does.  Ratios are therefore taken per round, and their median and spread are reported.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import ValueRangeError

ROUNDS = 15
SAMPLE_SECONDS = 6e-3
MAX_REPETITIONS = 1 << 20

Call = Callable[[], object]
Clock = Callable[[], float]


class Spread(NamedTuple):
    """Median with the 10th and 90th percentile."""

    median: float
    low: float
    high: float


def spread(samples: NDArray[np.float64]) -> Spread:
    low, median, high = np.percentile(samples, (10, 50, 90))
    return Spread(float(median), float(low), float(high))


@dataclass(frozen=True, eq=False)
class Samples:
    """Seconds per call, (rounds,) for every name; equal indices are of the same round."""

    seconds: dict[str, NDArray[np.float64]]
    repetitions: dict[str, int]

    def time(self, name: str) -> Spread:
        return spread(self.seconds[name])

    def speedup(self, name: str, over: str) -> Spread:
        """How many times faster ``name`` is than ``over``."""
        return spread(self.seconds[over] / self.seconds[name])


def calibrate(call: Call, sample_seconds: float = SAMPLE_SECONDS, clock: Clock = time.perf_counter) -> int:
    """How many calls fill a sample. The first call, which may allocate or compile, is not counted."""
    call()
    repetitions = 1
    while repetitions < MAX_REPETITIONS:
        elapsed = _time(call, repetitions, clock)
        if elapsed >= sample_seconds:
            break
        grow = 1.2 * sample_seconds / elapsed if elapsed > 0 else 8.0
        repetitions = min(MAX_REPETITIONS, max(repetitions + 1, int(repetitions * min(grow, 8.0))))
    return repetitions


def interleave(calls: Mapping[str, Call], rounds: int = ROUNDS, sample_seconds: float = SAMPLE_SECONDS,
               clock: Clock = time.perf_counter) -> Samples:  # fmt: skip
    """Time all ``calls`` in ``rounds`` rounds whose order rotates and, every other round, is reversed.

    Every sample follows untimed calls, a third as many, which bring the candidate's own data back into the caches: a
    product larger than the second-level cache needs some ten calls until its time settles. Chains measure what cold
    code costs.
    """
    if rounds < 1:
        raise ValueRangeError(f"{rounds} rounds measure nothing", where="rounds", hint="15 is the default.")
    names = list(calls)
    repetitions = {name: calibrate(calls[name], sample_seconds, clock) for name in names}
    seconds = {name: np.zeros(rounds) for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            for name in _order(names, index):
                for _ in range(max(1, repetitions[name] // 3)):
                    calls[name]()
                seconds[name][index] = _time(calls[name], repetitions[name], clock) / repetitions[name]
    finally:
        if collecting:
            gc.enable()
    return Samples(seconds, repetitions)


def _order(names: list[str], index: int) -> list[str]:
    """The order of a round: each name meets every place and different neighbours."""
    start = index % len(names) if names else 0
    order = names[start:] + names[:start]
    return order[::-1] if index % 2 else order


def _time(call: Call, repetitions: int, clock: Clock) -> float:
    start = clock()
    for _ in range(repetitions):
        call()
    return clock() - start


def geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values)))) if values else float("nan")
