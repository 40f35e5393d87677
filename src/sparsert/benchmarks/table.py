"""The report for people: one table of medians, spreads and ratios, geometric means, and the fine print."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .baselines import BASELINES
from .report import DENSE, Report, Row, Timed

WIDTH = 190  # where the output is no terminal


def console() -> Console:
    """A console that does not fold the table where output goes to a file."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=WIDTH)


def show(report: Report, out: Console) -> None:
    """Print the whole report."""
    out.print(rows_table(report))
    out.print(means_table(report))
    for line in fine_print(report):
        out.print(escape(line), style="dim")
    if report.crippled_by:
        out.print(
            f"[bold red]{', '.join(report.crippled_by)} is set: crippled NumPy; no figure here is the best dense.[/]"
        )


def rows_table(report: Report) -> Table:
    title = (
        f"milliseconds: median of {report.rounds} rounds ± half the range from 10th to 90th percentile; x: times faster"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    columns, peers = report.columns(), report.peers()
    extra = any(row.fastest("extra") for row in report.rows)
    table.add_column("problem MxKxN", overflow="fold")
    table.add_column("zeros", justify="right", no_wrap=True)
    for column in (*columns, report.dense_label):
        table.add_column(column, justify="right", no_wrap=column in columns)
    table.add_column("winner", overflow="fold")
    for column in columns:
        table.add_column(f"x {_short(column, columns)}", justify="right", style="bold")
    for peer in peers:
        table.add_column(f"x over {BASELINES[peer].title}", justify="right")
    if extra:
        table.add_column("OpenVINO default", justify="right", style="dim")
    for row in report.rows:
        table.add_row(*_cells(row, columns, peers, extra), end_section=row is _last_of_group(report, row))
    return table


def _cells(row: Row, columns: list[str], peers: list[str], extra: bool) -> Iterable[str]:
    ours = {candidate.key: candidate for candidate in row.ours()}
    dense = row.fastest_dense
    yield escape(row.name + ("*" if row.note else ""))
    yield f"{100 * row.sparsity:.1f} %"
    for column in columns:
        yield _time(ours.get(column))
    yield _time(dense)
    yield escape(f"{_title(dense)} {dense.form}") if dense else "-"
    for column in columns:
        yield _ratio(row, column, DENSE)
    for peer in peers:
        yield " / ".join(_ratio(row, column, peer) for column in columns) or "-"
    if extra:
        yield _time(row.fastest("extra"))


def means_table(report: Report) -> Table:
    """Geometric means of the rows' median ratios: a line per group and column, sparse peers over dense included."""
    columns, peers = report.columns(), report.peers()
    table = Table(title="geometric means: how many times faster", title_justify="left", box=SIMPLE_HEAD)
    for header in ("group", "of"):
        table.add_column(header)
    table.add_column("problems", justify="right")
    for over in (DENSE, *peers):
        table.add_column(f"over {report.dense_label if over == DENSE else BASELINES[over].title}", justify="right")
    means = {(mean.group, mean.of, mean.over): mean for mean in report.means()}
    for group in dict.fromkeys(group for group, _, _ in means):
        for of in (*columns, *peers):
            found = [means.get((group, of, over)) for over in (DENSE, *peers)]
            if any(found):
                count = max(mean.rows for mean in found if mean)
                cells = (f"{mean.value:.2f}" if mean else "-" for mean in found)
                title = BASELINES[of].title if of in peers else of
                style = "bold" if of in columns else "dim"
                table.add_row(escape(group), title, str(count), *cells, style=style)
        table.add_section()
    return table


def fine_print(report: Report) -> list[str]:
    """Machine, versions, notes of rows, and what was skipped or dropped."""
    head = report.environment
    versions = ", ".join(f"{name} {number}" for name, number in head.get("versions", {}).items())
    lines = [f"{head.get('cpu', '')}; {head.get('threads')} thread(s); target {head.get('target')}; {versions}"]
    if any(row.note for row in report.rows):
        lines.append("* " + "; ".join(dict.fromkeys(row.note for row in report.rows if row.note)))
    lines += [f"{name} skipped: {reason}" for name, reason in report.skipped.items()]
    lines += [f"{row.name}: {sentence}" for row in report.rows for sentence in row.dropped]
    return lines


def _time(timed: Timed | None) -> str:
    """Milliseconds with three digits or more, and the spread in per cent."""
    if timed is None:
        return "-"
    milliseconds = 1e3 * timed.median
    digits = 4 if milliseconds < 0.1 else 3 if milliseconds < 10 else 1
    return f"{milliseconds:.{digits}f} ±{50 * (timed.high - timed.low) / timed.median:.0f} %"


def _ratio(row: Row, of: str, over: str) -> str:
    ratio = row.ratio(of, over)
    return f"{ratio.median:.2f}" if ratio else "-"


def _title(timed: Timed) -> str:
    return BASELINES[timed.baseline].title if timed.baseline in BASELINES else timed.baseline


def _short(column: str, columns: list[str]) -> str:
    return column if len(columns) == 1 else column.removeprefix("sparsert ") if " " in column else "row-major"


def _last_of_group(report: Report, row: Row) -> Row:
    return [other for other in report.rows if other.group == row.group][-1]
