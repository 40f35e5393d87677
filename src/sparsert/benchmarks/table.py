"""The report for people: one table of medians, spreads and ratios, geometric means, and the fine print.

The table takes the width there is: where it does not fit, spreads go first, then the columns that least belong to the
result, and a line says which.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from .baselines import BASELINES
from .report import DENSE, Report, Row, Timed

WIDTH = 190  # where the output is no terminal and COLUMNS is not set
KEEP = 99


@dataclass(frozen=True)
class Column:
    """A column of the table of rows. The one of the lowest ``rank`` gives way first; those of rank ``KEEP`` never do.

    ``title`` is what a column is called where it is left out.
    """

    head: str
    cells: tuple[str, ...]
    rank: int
    title: str = ""
    justify: Literal["left", "right"] = "right"
    style: str = ""


Counted = list[tuple[Row, int]]
"""Rows, and how many problems each stands for."""


def console() -> Console:
    """A console that does not fold tables where output goes to a file."""
    wide = not sys.stdout.isatty() and not os.environ.get("COLUMNS")
    return Console(highlight=False, width=WIDTH if wide else None)


def show(report: Report, out: Console, by_shape: bool = False) -> None:
    """Print the whole report, with a row for every problem or, ``by_shape``, for every distinct shape of a group."""
    rows = report.by_shape() if by_shape else [(row, 1) for row in report.rows]
    table, left_out = rows_table(report, rows, out)
    out.print(table)
    if left_out:
        out.print(f"left out at this width: {escape(', '.join(left_out))}", style="dim")
    out.print(means_table(report))
    for line in fine_print(report):
        out.print(escape(line), style="dim")
    if report.crippled_by:
        out.print(
            f"[bold red]{', '.join(report.crippled_by)} is set: crippled NumPy; no figure here is the best dense.[/]"
        )


def rows_table(report: Report, rows: Counted, out: Console) -> tuple[Table, list[str]]:
    """The table of ``rows`` as wide as ``out`` allows, and what was left out for that."""
    columns = _columns(report, rows, spread=True)
    for padding in (1, 0):
        if _fits(table := _table(report, rows, columns, True, padding), out):
            return table, []
    columns, left_out = _columns(report, rows, spread=False), ["spreads"]
    while not _fits(table := _table(report, rows, columns, False, 0), out):
        least = min(columns, key=lambda column: column.rank)
        if least.rank == KEEP:
            break
        columns.remove(least)
        left_out.append(least.title)
    return table, left_out


def _fits(table: Table, out: Console) -> bool:
    return Measurement.get(out, out.options.update(max_width=1000), table).maximum <= out.width


def _table(report: Report, rows: Counted, columns: list[Column], spread: bool, padding: int) -> Table:
    title = f"milliseconds: median of {report.rounds} rounds"
    title += (" ± half the range from 10th to 90th percentile" if spread else "") + "; x: times faster"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, padding))
    for column in columns:
        table.add_column(column.head, justify=column.justify, style=column.style, vertical="bottom")
    last = {row.group: index for index, (row, _) in enumerate(rows)}
    for index, (row, _) in enumerate(rows):
        table.add_row(*(column.cells[index] for column in columns), end_section=index == last[row.group])
    return table


def _columns(report: Report, counted: Counted, spread: bool) -> list[Column]:
    rows, ours = [row for row, _ in counted], report.columns()
    names = tuple(escape(row.name + ("*" if row.note else "")) for row in rows)
    found = [Column("problem\nMxKxN", names, KEEP, justify="left")]
    if any(count > 1 for _, count in counted):
        found.append(Column("layers", tuple(str(count) for _, count in counted), KEEP))
    found.append(Column("zeros\n%", tuple(f"{100 * row.sparsity:.1f}" for row in rows), 60, "zeros"))
    for index, name in enumerate(ours):
        cells = tuple(_time(_candidate(row, name), spread) for row in rows)
        found.append(Column(_head(name, "ms"), cells, 40 - index if index else KEEP, f"ms of {name}"))
    found += [
        Column(_head(report.dense_head, "ms"), tuple(_time(row.fastest_dense, spread) for row in rows), KEEP),
        Column("winner", tuple(_winner(row.fastest_dense) for row in rows), 70, "winner", "left"),
        Column("form", tuple(_form(row.fastest_dense) for row in rows), 30, "form of the winner", "left"),
    ]
    for index, name in enumerate(ours):
        cells = tuple(_ratio(row, name, DENSE) for row in rows)
        rank = 80 - index if index else KEEP
        found.append(Column(_head("x", _short(name, ours)), cells, rank, f"x of {name}", style="bold"))
    for index, peer in enumerate(report.peers()):
        shown = ours if spread else ours[:1]
        cells = tuple(" / ".join(_ratio(row, name, peer) for name in shown) for row in rows)
        title = BASELINES[peer].title
        found.append(Column(_head("x over", title), cells, 50 - index, f"x over {title}"))
    if any(row.fastest("extra") for row in rows):
        cells = tuple(_time(row.fastest("extra"), spread) for row in rows)
        found.append(Column("OpenVINO\ndefault\nms", cells, 20, "OpenVINO default", style="dim"))
    return found


def _head(*words: str) -> str:
    """A word per line: figures are narrow."""
    return "\n".join(words).replace(" ", "\n").replace("-", "-\n")


def _candidate(row: Row, key: str) -> Timed | None:
    return next((candidate for candidate in row.candidates if candidate.key == key), None)


def means_table(report: Report) -> Table:
    """Geometric means of the rows' median ratios: a line per group and column, sparse peers over dense included."""
    columns, peers = report.columns(), report.peers()
    table = Table(title="geometric means: times faster", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("group\n  column", vertical="bottom", overflow="fold")
    table.add_column("problems", vertical="bottom", justify="right")
    for over in (DENSE, *peers):
        title = report.dense_head if over == DENSE else BASELINES[over].title
        table.add_column(_head("over", title), vertical="bottom", justify="right")
    means = {(mean.group, mean.of, mean.over): mean for mean in report.means()}
    for group in dict.fromkeys(group for group, _, _ in means):
        count = max(mean.rows for mean in means.values() if mean.group == group)
        table.add_row(escape(group), str(count))
        for of in (*columns, *peers):
            found = [means.get((group, of, over)) for over in (DENSE, *peers)]
            if any(found):
                cells = (f"{mean.value:.2f}" if mean else "-" for mean in found)
                title = BASELINES[of].title if of in peers else of
                table.add_row(f"  {title}", "", *cells, style="bold" if of in columns else "dim")
        table.add_section()
    return table


def fine_print(report: Report) -> list[str]:
    """Machine, versions, notes of rows, and what was skipped or dropped."""
    head = report.environment
    versions = ", ".join(f"{name} {number}" for name, number in head.get("versions", {}).items())
    lines = [f"{head.get('cpu', '')}; {head.get('threads')} thread(s); target {head.get('target')}; {versions}"]
    if report.dense_head != report.dense_label:
        lines.append(f"fastest dense: {report.dense_label}")
    if any(row.note for row in report.rows):
        lines.append("* " + "; ".join(dict.fromkeys(row.note for row in report.rows if row.note)))
    lines += [f"{name} skipped: {reason}" for name, reason in report.skipped.items()]
    lines += [f"{row.name}: {sentence}" for row in report.rows for sentence in row.dropped]
    return lines


def _time(timed: Timed | None, spread: bool) -> str:
    """Milliseconds with three digits or more, and the spread in per cent."""
    if timed is None:
        return "-"
    milliseconds = 1e3 * timed.median
    digits = 4 if milliseconds < 0.1 else 3 if milliseconds < 10 else 1
    return f"{milliseconds:.{digits}f}" + (f" ±{50 * (timed.high - timed.low) / timed.median:.0f} %" if spread else "")


def _ratio(row: Row, of: str, over: str) -> str:
    ratio = row.ratio(of, over)
    return f"{ratio.median:.2f}" if ratio else "-"


def _winner(timed: Timed | None) -> str:
    if timed is None:
        return "-"
    return BASELINES[timed.baseline].title if timed.baseline in BASELINES else escape(timed.baseline)


def _form(timed: Timed | None) -> str:
    return escape(timed.form) if timed else "-"


def _short(column: str, columns: list[str]) -> str:
    return column if len(columns) == 1 else column.removeprefix("sparsert ") if " " in column else "row-major"
