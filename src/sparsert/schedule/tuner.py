"""Which of several schedules is fastest: rounds of short interleaved samples, from which losers drop out.

The tuner compiles and times nothing itself: it is handed ``measure(task, schedule) -> seconds``, one sample a call. The
clock of a machine and its neighbours drift by more than schedules differ, so candidates are compared by the ratio of
samples *of one round*, and by the median of such ratios. (Successive halving: Jamieson and Talwalkar,
arXiv 1502.07943.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ScheduleError
from .schedule import Schedule
from .task import Task

Measure = Callable[[Task, Schedule], float]
"""One sample, in seconds, of one call. The first one of a schedule may compile it; infinity refuses the schedule."""


@dataclass(frozen=True)
class Effort:
    """How much a tuner may spend.

    Attributes:
        candidates: schedules tried at most.
        seconds: budget up to 50,000 nonzeros; beyond, it grows with them.
        rounds: in which the last candidates meet.
    """

    candidates: int
    seconds: float
    rounds: int

    def budget(self, nnz: int) -> float:
        """Seconds for a task of ``nnz`` nonzeros."""
        return self.seconds * max(1.0, nnz / _NONZEROS)


_NONZEROS = 50_000
EFFORTS = {"fast": Effort(8, 0.35, 9), "full": Effort(96, 6.0, 21)}
LEAST = 4  # candidates that are tried whatever the budget
GAIN = 0.01  # a candidate that is not faster by so much does not replace the cost model's
_EXPLORE = 0.6  # the share of the budget after which no further candidate is begun
_HOPELESS = 1.5  # times the fastest: not worth a second sample


@dataclass(frozen=True)
class Trial:
    """A schedule that was tried; ``seconds`` of a call: the median of candidate 0 times the median ratio to it."""

    schedule: Schedule
    seconds: float
    samples: int


@dataclass(frozen=True)
class Tuning:
    """What a tuner found.

    Attributes:
        best: the schedule to use: candidate 0 unless another one was measured faster by more than the noise.
        first: candidate 0, the cost model's choice.
        trials: all that were tried, fastest first.
        skipped: candidates for which the budget left no time.
        elapsed: seconds the tuner took, compiling included.
    """

    best: Trial
    first: Trial
    trials: tuple[Trial, ...]
    skipped: int
    elapsed: float

    @property
    def runner_up(self) -> Trial | None:
        """The fastest of the others."""
        return next((trial for trial in self.trials if trial is not self.best), None)


def tune(
    task: Task, candidates: Sequence[Schedule], measure: Measure, budget: float, *, rounds: int = 9, seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuning:  # fmt: skip
    """Try ``candidates``, the best guess first, for about ``budget`` seconds.

    All are sampled once, as far as the budget goes but at least four; from round to round the slower half drops out
    until a few are left, which meet in ``rounds`` rounds. Candidate 0 takes part in all of them, and only a candidate
    that beats it replaces it. ``seed`` decides the order within rounds.

    Raises:
        ScheduleError: there are no candidates, or the first cannot be measured.
    """
    if not candidates:
        raise ScheduleError("there are no candidates to tune", where="candidates")
    started = clock()
    race = _Race(task, candidates, measure)
    race.explore(started + budget * _EXPLORE, clock)
    if not math.isfinite(race.samples[0][0]):
        raise ScheduleError("the cost model's choice cannot be measured", where="candidates")
    race.halve(started + budget, clock, rounds, np.random.default_rng(seed))
    return race.result(len(candidates), clock() - started)


class _Race:
    """Samples by candidate; those of equal index in the lists of two candidates are of the same round."""

    def __init__(self, task: Task, candidates: Sequence[Schedule], measure: Measure) -> None:
        self.task, self.candidates, self.measure = task, candidates, measure
        self.samples: list[list[float]] = []

    def sample(self, index: int) -> float:
        return self.measure(self.task, self.candidates[index])

    def explore(self, deadline: float, clock: Callable[[], float]) -> None:
        """A first sample of each, until the next one would pass the deadline."""
        longest = 0.0
        for index in range(len(self.candidates)):
            begin = clock()
            if index >= LEAST and begin + longest > deadline:
                break
            self.samples.append([self.sample(index)])
            longest = max(longest, clock() - begin)

    def halve(self, deadline: float, clock: Callable[[], float], rounds: int, rng: np.random.Generator) -> None:
        """Rounds of samples. The first samples followed compilations, on caches full of other things: they only
        exclude what is hopeless."""
        fastest = min(samples[0] for samples in self.samples)
        limit = _HOPELESS * fastest
        alive = [0] + [i for i in range(1, len(self.samples)) if self.samples[i][0] <= limit or self.again(i) <= limit]
        for number in range(rounds):
            if len(alive) == 1 and number:
                break
            for index in rng.permutation(alive).tolist():
                self.samples[index].append(self.sample(index))
            if number >= 1:
                others = sorted(alive[1:], key=self.ratio)
                keep = len(others) if len(others) <= _LAST else max(_LAST, -(-len(others) // 2))
                best = self.ratio(others[0]) if others else 1.0
                near = min(best, 1.0) + _BAND / math.sqrt(number)
                alive = [0] + [i for i in others[:keep] if self.ratio(i) <= near]
            if clock() >= deadline and number >= 2:
                break

    def again(self, index: int) -> float:
        """A second chance for one that may have met a hiccup."""
        return self.sample(index) if math.isfinite(self.samples[index][0]) else math.inf

    def ratio(self, index: int) -> float:
        """Median time of a candidate over candidate 0, within rounds; the first samples do not count."""
        mine, base = self.samples[index], self.samples[0]
        if len(mine) == 1:
            return mine[0] / base[0] if math.isfinite(mine[0]) else math.inf
        n = len(mine)
        return float(np.median(np.array(mine[1:n]) / np.array(base[1:n])))

    def result(self, offered: int, elapsed: float) -> Tuning:
        base = float(np.median(self.samples[0][1:]))
        trials = [
            Trial(self.candidates[i], base * self.ratio(i), len(self.samples[i])) for i in range(len(self.samples))
        ]
        first = trials[0]
        # One that dropped out early was judged by few samples: it stays in the list, but cannot win.
        most = max(trial.samples for trial in trials[1:]) if len(trials) > 1 else 0
        best = min((trial for trial in trials[1:] if trial.samples == most), key=_seconds, default=first)
        if best.seconds > first.seconds * (1 - GAIN):
            best = first
        return Tuning(best, first, tuple(sorted(trials, key=_seconds)), offered - len(trials), elapsed)


_LAST = 3  # beside candidate 0, so many stay until the last round
_BAND = 0.10  # further behind the best than this, narrowing from round to round, and a candidate drops out


def _seconds(trial: Trial) -> float:
    return trial.seconds
