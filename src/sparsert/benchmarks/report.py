"""The result of a benchmark as plain data: rows, ratios, geometric means, and JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from ..errors import FormatError
from .baselines import BASELINES
from .measure import geometric_mean

SCHEMA = 1
DENSE = "dense"  # as a ratio's denominator: the fastest dense candidate of the row
DENSE_BASELINES = ("numpy", "torch", "onnxruntime", "openvino")
ALL_GROUPS = "all"


@dataclass(frozen=True)
class Timed:
    """A candidate's time per call in seconds: median, 10th and 90th percentile over the rounds."""

    baseline: str
    form: str
    role: str
    median: float
    low: float
    high: float
    repetitions: int = 1
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.baseline} {self.form}".strip()


@dataclass(frozen=True)
class Ratio:
    """How many times faster ``of`` is than ``over``: median and percentiles of the rounds' ratios."""

    of: str
    over: str
    median: float
    low: float
    high: float


class Mean(NamedTuple):
    """A geometric mean of medians over a group's rows."""

    group: str
    of: str
    over: str
    value: float
    rows: int


@dataclass(frozen=True)
class Row:
    """One problem: all candidates, the ratios between columns, and what was dropped."""

    name: str
    group: str
    rows: int
    inputs: int
    columns: int
    layers: int
    nnz: int
    sparsity: float
    kind: str
    note: str
    candidates: tuple[Timed, ...]
    ratios: tuple[Ratio, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def shape(self) -> str:
        """MxKxN."""
        return f"{self.rows}x{self.inputs}x{self.columns}"

    @property
    def fastest_dense(self) -> Timed | None:
        return self.fastest(role="dense")

    def fastest(self, role: str, baseline: str | None = None) -> Timed | None:
        """The candidate with the lowest median among a role's, or among a baseline's of that role."""
        found = [c for c in self.candidates if c.role == role and baseline in (None, c.baseline)]
        return min(found, key=lambda candidate: candidate.median, default=None)

    def ours(self) -> list[Timed]:
        return [candidate for candidate in self.candidates if candidate.role == "ours"]

    def ratio(self, of: str, over: str) -> Ratio | None:
        return next((ratio for ratio in self.ratios if (ratio.of, ratio.over) == (of, over)), None)


@dataclass(frozen=True)
class Report:
    """A whole run.

    Attributes:
        environment: see :func:`sparsert.benchmarks.environment.describe`.
        rounds: timing rounds per problem.
        allowed: what each measured baseline was allowed to do.
        skipped: a sentence for every baseline that did not take part.
        rows: the problems in order.
    """

    environment: dict[str, Any]
    rounds: int
    allowed: dict[str, str]
    skipped: dict[str, str]
    rows: tuple[Row, ...]

    @property
    def crippled_by(self) -> list[str]:
        return list(self.environment.get("crippled_by", ()))

    @property
    def dense_label(self) -> str:
        """What the fastest dense figure may be called. "best dense" takes all four engines and an unhindered NumPy."""
        if self.crippled_by:
            return "crippled NumPy"
        present = {candidate.baseline for row in self.rows for candidate in row.candidates if candidate.role == "dense"}
        if present == set(DENSE_BASELINES):
            return "best dense"
        return "fastest of " + (
            ", ".join(BASELINES[name].title for name in DENSE_BASELINES if name in present) or "none"
        )

    @property
    def dense_head(self) -> str:
        """The same in two words, for axes and heads of columns."""
        return "fastest dense" if self.dense_label.startswith("fastest") else self.dense_label

    def columns(self) -> list[str]:
        """Our columns in order of appearance, as ratios name them."""
        return list(dict.fromkeys(candidate.key for row in self.rows for candidate in row.ours()))

    def peers(self) -> list[str]:
        """The sparse baselines that were measured."""
        present = {
            candidate.baseline for row in self.rows for candidate in row.candidates if candidate.role == "sparse"
        }
        return [name for name in BASELINES if name in present]

    def groups(self) -> list[str]:
        return list(dict.fromkeys(row.group for row in self.rows))

    def by_shape(self) -> list[tuple[Row, int]]:
        """Rows of one group, kind and shape as one row, with their number: what is shown where there are too many.

        Times and ratios are geometric means over such rows. The means over a group remain those of its single rows.
        """
        found: dict[tuple[object, ...], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row.group, row.kind, row.shape, row.layers, round(row.sparsity, 2)), []).append(row)
        return [(_merged(rows), len(rows)) for rows in found.values()]

    def means(self) -> list[Mean]:
        """Geometric means of every ratio over each group, and over all rows where there are several groups."""
        groups = {group: [row for row in self.rows if row.group == group] for group in self.groups()}
        if len(groups) > 1:
            groups[ALL_GROUPS] = list(self.rows)
        return [mean for group, rows in groups.items() for mean in _means(group, rows)]

    def mean(self, group: str, of: str, over: str = DENSE) -> Mean | None:
        return next((mean for mean in self.means() if (mean.group, mean.of, mean.over) == (group, of, over)), None)

    def to_json(self) -> str:
        """The report as text, with the derived figures beside the raw ones for readers without this package."""
        plain = asdict(self)
        for row, data in zip(self.rows, plain["rows"], strict=True):
            dense = row.fastest_dense
            data["fastest_dense"] = dense.key if dense else None
        derived = {"geometric_means": [mean._asdict() for mean in self.means()]}
        head = {"schema": SCHEMA, "dense_label": self.dense_label, **_notice(self)}
        return json.dumps({**head, **derived, **plain}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "report") -> Report:
        """The inverse of :meth:`to_json`.

        Raises:
            FormatError: the text is no report of this schema.
        """
        try:
            plain = json.loads(text)
            if plain["schema"] != SCHEMA:
                raise FormatError(
                    f"schema {plain['schema']} instead of {SCHEMA}", where=where, hint="Run the benchmark again."
                )
            return cls(plain["environment"], plain["rounds"], plain["allowed"], plain["skipped"],
                       tuple(_row(data) for data in plain["rows"]))  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"no benchmark report ({type(error).__name__}: {error})", where=where) from None


def _notice(report: Report) -> dict[str, str]:
    if not report.crippled_by:
        return {}
    return {"notice": f"{', '.join(report.crippled_by)} set: NumPy is hindered, no dense figure here is the best one"}


def _row(data: dict[str, Any]) -> Row:
    known = {key: value for key, value in data.items() if key != "fastest_dense"}
    known["candidates"] = tuple(Timed(**candidate) for candidate in data["candidates"])
    known["ratios"] = tuple(Ratio(**ratio) for ratio in data["ratios"])
    known["dropped"] = tuple(data["dropped"])
    return Row(**known)


def _merged(rows: list[Row]) -> Row:
    """One row for several of one shape: geometric means of what all of them have."""
    first = rows[0]
    name = first.shape if first.layers == 1 else first.name  # a chain's name says that it is one
    if len(rows) == 1:
        return replace(first, name=name)
    timed = []
    for candidate in first.candidates:
        same = [other for row in rows for other in row.candidates if other.key == candidate.key]
        if len(same) == len(rows):
            timed.append(replace(candidate, repetitions=1, facts={}, **_averages(same)))
    ratios = []
    for ratio in first.ratios:
        found = [other for row in rows if (other := row.ratio(ratio.of, ratio.over))]
        if len(found) == len(rows):
            ratios.append(replace(ratio, **_averages(found)))
    return replace(
        first, name=name, nnz=sum(row.nnz for row in rows), candidates=tuple(timed), ratios=tuple(ratios),
        note="; ".join(dict.fromkeys(row.note for row in rows if row.note)),
        dropped=tuple(dict.fromkeys(sentence for row in rows for sentence in row.dropped)),
    )  # fmt: skip


def _averages(found: Sequence[Timed | Ratio]) -> dict[str, Any]:
    return {name: geometric_mean([getattr(one, name) for one in found]) for name in ("median", "low", "high")}


def _means(group: str, rows: Iterable[Row]) -> list[Mean]:
    collected: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        for ratio in row.ratios:
            collected.setdefault((ratio.of, ratio.over), []).append(ratio.median)
    return [Mean(group, of, over, geometric_mean(values), len(values)) for (of, over), values in collected.items()]
