#!/usr/bin/env python3
"""Runs the lines of the target table, one process each, and says which goals are met.

    python bench/targets.py                     every line, results in bench/results/LINE.json, .png and .svg
    python bench/targets.py mobilenet_v1 chain  these lines only
    python bench/targets.py --summary           no run: judge the results that are there
    python bench/targets.py --list              print the command of every line

Lines with real weights need SPARSERT_TEST_DATA. Every line is also one ``sparsert bench kernels`` command by itself.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from sparsert.benchmarks.report import DENSE, Report
from sparsert.benchmarks.table import console

RESULTS = Path("bench") / "results"
ROOT = Path(__file__).resolve().parent.parent
ROW_MAJOR, TILE_MAJOR = "sparsert", "sparsert tile-major"


@dataclass(frozen=True)
class Goal:
    """A geometric mean over best dense that a group of problems is to reach, by one of our columns."""

    group: str
    column: str
    target: float
    stretch: float


@dataclass(frozen=True)
class Line:
    """A line of the table: the arguments of ``sparsert bench kernels`` and the goals it is judged by."""

    name: str
    arguments: tuple[str, ...]
    goals: tuple[Goal, ...]

    def command(self, extra: tuple[str, ...] = ()) -> list[str]:
        out = RESULTS / self.name
        return ["bench", "kernels", *self.arguments, *extra, "--json", f"{out}.json", "--figure", str(out)]


def both(group: str, target: float, stretch: float) -> tuple[Goal, Goal]:
    """A goal that names no layout is shown for both."""
    return Goal(group, ROW_MAJOR, target, stretch), Goal(group, TILE_MAJOR, target, stretch)


LINES = (
    Line("mobilenet_v1", ("--problems", "mobilenet_v1"),
         (Goal("MobileNetV1", ROW_MAJOR, 7.5, 8.0), Goal("MobileNetV1", TILE_MAJOR, 8.7, 9.0))),
    Line("uniform_tokens", ("--problems", "uniform_tokens", "--sparsity", "90"),
         both("uniform 90 %, tokens", 8.5, 9.5)),
    Line("uniform_conv", ("--problems", "uniform_conv", "--sparsity", "80,95,98"),
         (*both("uniform 80 %", 4.2, 4.4), *both("uniform 95 %", 12.5, 14.0), *both("uniform 98 %", 20.0, 25.0))),
    Line("low_sparsity", ("--problems", "uniform_conv", "--sparsity", "50,30"),
         (*both("uniform 50 %", 1.6, 1.8), *both("uniform 30 %", 0.95, 1.1))),
    Line("chain", ("--problems", "chain", "--sparsity", "90"),
         (*both("chain 512x512x196", 8.5, 9.0), *both("chain 768x768x128", 8.5, 9.0),
          *both("chain 1024x1024x49", 6.5, 7.5), *both("chain 2048x2048x128", 6.5, 8.0))),
    Line("linear", ("--problems", "linear", "--sparsity", "90"),
         (Goal("compile_linear 90 %", ROW_MAJOR, 7.5, 8.5),)),
    Line("mobilenet_v1_avx2", ("--problems", "mobilenet_v1", "--target", "x86-avx2"),
         both("MobileNetV1", 4.5, 5.5)),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("lines", nargs="*", metavar="LINE", help=f"of {', '.join(line.name for line in LINES)}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--summary", action="store_true", help="judge the results that are there, run nothing")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    args = parser.parse_args()
    known = {line.name for line in LINES}
    if unknown := [name for name in args.lines if name not in known]:
        parser.error(f"unknown line {unknown[0]!r}")
    chosen = [line for line in LINES if not args.lines or line.name in args.lines]
    extra = () if args.rounds == 15 else ("--rounds", str(args.rounds))
    if args.list:
        for line in chosen:
            print(shlex.join(["sparsert", *line.command(extra)]))
        return 0
    failed = []
    if not args.summary:
        for line in chosen:
            print(f"== {line.name}: sparsert {shlex.join(line.command(extra))}", flush=True)
            if subprocess.run([sys.executable, "-m", "sparsert.cli.main", *line.command(extra)], cwd=ROOT).returncode:
                failed.append(line.name)
    console().print(verdicts(chosen))
    if failed:
        print(f"did not run: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def verdicts(lines: list[Line]) -> Table:
    """What every goal asks for and what the results on disk reach."""
    table = Table("line", "group", "column", "target", "stretch", "reached", "over", "verdict")
    for line in lines:
        path = ROOT / RESULTS / f"{line.name}.json"
        report = Report.from_json(path.read_text(), str(path)) if path.is_file() else None
        for goal in line.goals:
            value, over = reached(report, goal)
            verdict = "-" if value is None else judge(value, goal)
            shown = "-" if value is None else f"{value:.2f}"
            table.add_row(
                line.name, goal.group, goal.column, f"{goal.target:g}", f"{goal.stretch:g}", shown, over, verdict
            )
    return table


def reached(report: Report | None, goal: Goal) -> tuple[float | None, str]:
    """The goal's geometric mean in a report, and what it is a ratio over."""
    mean = report.mean(goal.group, goal.column, DENSE) if report else None
    return (mean.value, report.dense_label) if report and mean else (None, "-")


def judge(value: float, goal: Goal) -> str:
    return "stretch" if value >= goal.stretch else "met" if value >= goal.target else "missed"


if __name__ == "__main__":
    sys.exit(main())
