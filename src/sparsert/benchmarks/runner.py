"""Problems and forms in, a report out: prepare, check, time interleaved, compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import baselines, environment, measure
from .baselines import BASELINES, Selection
from .peers import Candidate, Form, Prepared
from .problems import Problem
from .report import DENSE, Ratio, Report, Row, Timed

OURS = "sparsert"
EXTRA = "openvino default"

Progress = Callable[[int, str], None]


def run(problems: Sequence[Problem], selection: Selection, ours: Sequence[Form], *, threads: int = 1,
        rounds: int = measure.ROUNDS, sample_seconds: float = measure.SAMPLE_SECONDS,
        head: Mapping[str, Any] | None = None, progress: Progress | None = None) -> Report:  # fmt: skip
    """Benchmark every problem with all forms.

    Args:
        problems: see :func:`sparsert.benchmarks.problems.select`.
        selection: the peers, see :func:`sparsert.benchmarks.baselines.select`.
        ours: SparseRT's own forms.
        threads: for every candidate.
        rounds: timing rounds; a ratio is a median over them.
        sample_seconds: the least duration of a timing sample.
        head: the report's environment; described here where absent.
        progress: called with the number of finished problems and the name of the next one.
    """
    rows = []
    for index, problem in enumerate(problems):
        if progress:
            progress(index, problem.name)
        rows.append(run_one(problem, selection.forms, ours, threads, rounds, sample_seconds))
    if progress:
        progress(len(problems), "")
    allowed = {name: BASELINES[name].allowed for name in selection.forms if name in BASELINES}
    return Report(
        dict(head or environment.describe(threads, "")), rounds, allowed, dict(selection.skipped), tuple(rows)
    )


def run_one(problem: Problem, peers: Mapping[str, Sequence[Form]], ours: Sequence[Form], threads: int,
            rounds: int, sample_seconds: float) -> Row:  # fmt: skip
    """One row: candidates are checked against the float64 product, then timed in turn."""
    prepared = Prepared.of(problem)
    candidates: list[Candidate] = []
    dropped: list[str] = []
    for name, forms in {OURS: ours, **peers}.items():
        found, lost = baselines.prepare(name, forms, prepared)
        candidates += found
        dropped += lost
    environment.pin_threads(threads)  # again: a peer may have loaded its pool only now
    samples = measure.interleave({c.key: c.call for c in candidates}, rounds, sample_seconds)
    timed = tuple(
        Timed(c.baseline, c.form, c.role, *samples.time(c.key), samples.repetitions[c.key], c.facts) for c in candidates
    )
    rows, inputs, columns = problem.shape
    row = Row(problem.name, problem.group, rows, inputs, columns, len(problem.layers), problem.nnz,
              round(problem.sparsity, 6), problem.kind, problem.note, timed, dropped=tuple(dropped))  # fmt: skip
    return Row(**{**vars(row), "ratios": tuple(_ratios(row, samples))})


def _ratios(row: Row, samples: measure.Samples) -> list[Ratio]:
    """Our columns over the fastest dense and every sparse peer's fastest form; those peers over the fastest dense."""
    rivals = {name: row.fastest("sparse", name) for name in BASELINES}
    ours = {candidate.key: candidate for candidate in row.ours()}
    columns = {**ours, **rivals, EXTRA: row.fastest("extra")}
    over = {DENSE: row.fastest_dense, **rivals}
    return [
        Ratio(of, name, *samples.speedup(candidate.key, other.key))
        for of, candidate in columns.items()
        for name, other in over.items()
        if candidate and other and (name == DENSE or of in ours)
    ]
