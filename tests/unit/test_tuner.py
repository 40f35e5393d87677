"""The tuner with a measure of its own time: it finds the best within noise, and keeps to its budget."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from sparsert import Schedule
from sparsert.errors import ScheduleError
from sparsert.schedule import tuner
from sparsert.schedule.task import Task
from sparsert.sparsity.pattern import as_sparse

TASK = Task(as_sparse(np.ones((2, 2), np.float32)).pattern)


class Machine:
    """A clock, and schedules that take ``seconds[i]`` (rows = i + 1) with noise, drift and hiccups."""

    def __init__(self, seconds: list[float], noise: float = 0.0, compile_seconds: float = 0.01, seed: int = 0,
                 drift: float = 0.0, hiccups: float = 0.0) -> None:  # fmt: skip
        self.seconds, self.noise, self.compile_seconds = seconds, noise, compile_seconds
        self.rng, self.drift, self.hiccups = np.random.default_rng(seed), drift, hiccups
        self.now, self.samples = 100.0, Counter[int]()

    def clock(self) -> float:
        return self.now

    def measure(self, task: Task, schedule: Schedule) -> float:
        assert task is TASK
        index = schedule.rows - 1
        if not self.samples[index]:
            self.now += self.compile_seconds
        self.samples[index] += 1
        taken = self.seconds[index] * math.exp(self.rng.normal(0, self.noise))
        taken *= 1 + self.drift * math.sin(20 * self.now)  # the clock of the machine goes up and down
        if self.rng.random() < self.hiccups:
            taken *= 3
        self.now += 1e-3
        return taken

    def tune(self, budget: float = 10.0, seed: int = 0) -> tuner.Tuning:
        candidates = [Schedule(rows=i + 1) for i in range(len(self.seconds))]
        return tuner.tune(TASK, candidates, self.measure, budget, seed=seed, clock=self.clock)


def index_of(trial: tuner.Trial) -> int:
    return trial.schedule.rows - 1


@pytest.mark.parametrize("best", [0, 1, 5, 11])
def test_the_best_is_found_without_noise(best: int) -> None:
    seconds = [1.0 + 0.02 * i for i in range(12)]
    seconds[best] = 0.9
    result = Machine(seconds).tune()
    assert index_of(result.best) == best
    assert index_of(result.first) == 0
    assert result.best.seconds == pytest.approx(0.9)
    assert result.runner_up is not None
    assert result.runner_up.seconds == min(t.seconds for t in result.trials if t is not result.best)
    assert [t.seconds for t in result.trials] == sorted(t.seconds for t in result.trials)
    assert result.skipped == 0


@pytest.mark.parametrize("seed", range(20))
def test_the_best_within_noise(seed: int) -> None:
    """4 % of noise, a drift of 20 %, every twentieth sample thrice as long: what is chosen is nearly the best."""
    seconds = [1.0, 1.1, 0.85, 0.84, 1.4, 2.0, 0.95, 1.05]
    result = Machine(seconds, noise=0.04, seed=seed, drift=0.2, hiccups=0.05).tune(seed=seed)
    assert seconds[index_of(result.best)] <= 0.95
    assert result.best.seconds <= result.first.seconds


def test_mostly_the_very_best() -> None:
    seconds = [1.0, 1.1, 0.97, 0.85, 1.4, 2.0, 0.95, 1.05]
    found = [index_of(Machine(seconds, 0.03, seed=s, drift=0.2, hiccups=0.03).tune(seed=s).best) for s in range(40)]
    assert found.count(3) >= 36


@pytest.mark.parametrize("seed", range(10))
def test_noise_alone_seldom_replaces_the_first(seed: int) -> None:
    """Whatever wins is faster than candidate 0 by the tuner's own measure, and by more than its threshold."""
    result = Machine([1.0] * 8, noise=0.02, seed=seed).tune(seed=seed)
    assert result.best is result.first or result.best.seconds <= (1 - tuner.GAIN) * result.first.seconds


def test_nothing_better_means_the_first() -> None:
    for worse in ([1.0], [1.0, 1.0], [1.0, 0.995, 1.0], [1.0, 1.2, 3.0, 1.01]):
        result = Machine(worse).tune()
        assert result.best is result.first


def test_losers_get_few_samples() -> None:
    machine = Machine([1.0, 5.0, 5.0, 0.9, 1.3, 1.3, 1.3, 1.3])
    machine.tune()
    assert machine.samples[1] == machine.samples[2] == 2  # the first and a second chance
    assert max(machine.samples[i] for i in (4, 5, 6, 7)) < machine.samples[3] == machine.samples[0]


def test_the_budget_holds() -> None:
    """A sample and a compilation more than the budget at most; at least four candidates however small it is."""
    for budget in (0.1, 0.3, 1.0):
        machine = Machine([1.0] * 50, compile_seconds=0.02)
        result = machine.tune(budget)
        assert machine.now - 100 == pytest.approx(result.elapsed)
        assert result.elapsed <= budget + 0.021 + 0.001 * len(result.trials)
        assert len(result.trials) + result.skipped == 50
        assert len(result.trials) >= tuner.LEAST
    starved = Machine([1.0, 2.0, 0.8, 0.9, 0.1], compile_seconds=5.0)
    result = starved.tune(0.01)
    assert len(result.trials) == tuner.LEAST
    assert result.skipped == 1
    assert index_of(result.best) == 2


def test_equal_seeds_give_equal_runs() -> None:
    first, second, other = (Machine([1.0, 0.9, 0.95, 1.1], 0.05, seed=3) for _ in range(3))
    assert first.tune(seed=1) == second.tune(seed=1)
    assert first.samples == second.samples
    assert other.tune(seed=2) != first.tune(seed=1)


def test_what_cannot_be_measured_is_left_out() -> None:
    result = Machine([1.0, math.inf, 0.9, math.inf]).tune()
    assert index_of(result.best) == 2
    assert not math.isfinite(result.trials[-1].seconds)
    with pytest.raises(ScheduleError, match="cannot be measured"):
        Machine([math.inf, 1.0]).tune()
    with pytest.raises(ScheduleError, match="no candidates"):
        Machine([]).tune()


def test_budgets_grow_with_nonzeros() -> None:
    fast, full = tuner.EFFORTS["fast"], tuner.EFFORTS["full"]
    assert fast.budget(10) == fast.budget(50_000) <= 0.5
    assert fast.budget(200_000) == pytest.approx(4 * fast.budget(50_000))
    assert fast.candidates >= 4
    assert full.candidates > fast.candidates
