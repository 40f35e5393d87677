"""The bar chart of speed-ups over the problems, as PNG or SVG (matplotlib is imported on use)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any

from ..errors import MissingDependencyError, UnsupportedError
from .baselines import BASELINES
from .report import ALL_GROUPS, DENSE, Report, Row

SUFFIXES = (".png", ".svg")
LINE_SLOTS = 32  # problems and means side by side before a chart gets a second line
LETTERS = 14  # of the title to an inch
MOST_ROWS = 40  # problems, each with bars of its own; beyond that, those of one shape share theirs
# Falling luminance tells the bars apart in grey; hatches tell peers from ours.
OURS = (("#0b3c5d", ""), ("#5b9bd5", ""), ("#2a7f62", ""))
PEERS = {"mkl": ("#a9b1ba", ""), "torch_csr": ("#cdd3d9", "///"), "scipy": ("#f0f2f4", "...")}


@dataclass(frozen=True)
class Slot:
    """A place on the x axis: a problem, a shape or a geometric mean, with a value for each series."""

    group: str
    label: str
    sub: str
    values: dict[str, float]
    is_mean: bool


def outputs(path: Path) -> list[Path]:
    """The files a ``--figure`` argument stands for: itself, or both formats where it has no suffix.

    Raises:
        UnsupportedError: the suffix is neither .png nor .svg.
        MissingDependencyError: matplotlib is not installed.
    """
    if path.suffix and path.suffix not in SUFFIXES:
        raise UnsupportedError(f"a chart cannot be written as {path.suffix}", where=str(path),
                               hint="Use .png, .svg, or no suffix for both.")  # fmt: skip
    if find_spec("matplotlib") is None:
        raise MissingDependencyError("charts need matplotlib", where="figure", hint="pip install matplotlib")
    return [path] if path.suffix else [path.with_name(path.name + suffix) for suffix in SUFFIXES]


def draw(report: Report, path: Path) -> list[Path]:
    """Write the chart and return the files.

    Raises:
        UnsupportedError: the report has no dense figure to compare with, or an unknown suffix is asked for.
        MissingDependencyError: matplotlib is not installed.
    """
    files = outputs(path)
    series = [*report.columns(), *(name for name in PEERS if name in report.peers())]
    groups = slots(report, series)
    if not any(slot.values for group in groups for slot in group):
        raise UnsupportedError("there is no dense figure to draw speed-ups over", where="figure",
                               hint="Measure a dense baseline too, such as --baseline numpy.")  # fmt: skip
    matplotlib: Any = import_module("matplotlib")
    figure_class: Any = import_module("matplotlib.figure").Figure
    with matplotlib.rc_context(
        {"svg.hashsalt": "sparsert", "svg.fonttype": "none", "font.size": 9, "hatch.linewidth": 0.5}
    ):
        figure = _figure(figure_class, report, series, groups)
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"Date": None} if file.suffix == ".svg" else {}
            figure.savefig(file, dpi=150, metadata=metadata)
    return files


def slots(report: Report, series: list[str]) -> list[list[Slot]]:
    """The bars of every group, its geometric mean last; lone problems share one mean over all."""
    merge = len(report.rows) > MOST_ROWS
    counted = report.by_shape() if merge else [(row, 1) for row in report.rows]
    groups = []
    for name in report.groups():
        group = [_slot(row, count, series) for row, count in counted if row.group == name]
        if sum(row.group == name for row in report.rows) > 1:
            group.append(_mean(report, name, series))
        groups.append(group)
    if len(groups) > 1:
        groups.append([_mean(report, ALL_GROUPS, series)])
    return groups


def _slot(row: Row, count: int, series: list[str]) -> Slot:
    dense = row.fastest_dense
    winner = f"{BASELINES[dense.baseline].title} {dense.form}" if dense and dense.baseline in BASELINES else ""
    ratios = {name: row.ratio(name, DENSE) for name in series}
    label = row.name + ("*" if row.note else "") + (f", {count} layers" if count > 1 else "")
    return Slot(row.group, label, winner, {name: ratio.median for name, ratio in ratios.items() if ratio}, False)


def _mean(report: Report, group: str, series: list[str]) -> Slot:
    means = {name: report.mean(group, name) for name in series}
    values = {name: mean.value for name, mean in means.items() if mean}
    problems = sum(group in (row.group, ALL_GROUPS) for row in report.rows)
    return Slot(group, "geometric mean", f"of {'all ' * (group == ALL_GROUPS)}{problems}", values, True)


def lines(groups: list[list[Slot]], limit: int = LINE_SLOTS) -> list[list[list[Slot]]]:
    """Groups packed into lines of at most ``limit`` slots; a group is never split, the mean of all never alone."""
    found: list[list[list[Slot]]] = [[]]
    for group in groups:
        used = sum(len(other) for other in found[-1])
        if used and used + len(group) > limit and len(group) > 1:
            found.append([])
        found[-1].append(group)
    return found


def _figure(figure_class: Any, report: Report, series: list[str], groups: list[list[Slot]]) -> Any:
    packed = lines(groups)
    count = max(sum(len(group) for group in line) for line in packed)
    crowded = count > 16
    width = max(7.0, count * (0.3 + 0.07 * len(series)) * (0.85 if crowded else 1.1) + 2.0)
    figure = figure_class(figsize=(width, 0.8 + 4.4 * len(packed)), layout="constrained")
    column = figure.subplots(len(packed), sharey=True, squeeze=False)[:, 0]
    extent = max(_draw_line(axes, report, series, line, crowded) for axes, line in zip(column, packed, strict=True))
    highest = max(value for group in groups for slot in group for value in slot.values.values())
    for axes in column:
        axes.set_xlim(-0.8, extent + 0.8)
        axes.set_ylim(0, 1.15 * max(highest, 1.0))  # where all is slower than dense, 1 is still to be seen
        _style(axes, report)
    handles: dict[str, Any] = {}
    for handle, label in zip(*column[0].get_legend_handles_labels(), strict=True):
        handles.setdefault(label, handle)
    title = _title(report, int(width * LETTERS))
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=len(handles), frameon=False,
                  fontsize=8, title=title, title_fontsize=8.5, alignment="left")  # fmt: skip
    return figure


def _draw_line(axes: Any, report: Report, series: list[str], line: list[list[Slot]], crowded: bool) -> float:
    """The bars and labels of one line; returns where the last slot lies."""
    ours, width = report.columns(), 0.82 / len(series)
    position, ticks, labels = 0.0, [], []
    named = len(report.groups()) > 1 and any(len(group) > 1 and group[0].group != ALL_GROUPS for group in line)
    for group in line:
        if named and len(group) > 1:
            axes.annotate(group[0].group, (position - 0.4, 1.0), (0, 3), textcoords="offset points", fontweight="bold",
                          xycoords=axes.get_xaxis_transform(), fontsize=8.5, annotation_clip=False)  # fmt: skip
        for slot in group:
            position += 0.35 if slot.is_mean else 0.0
            for index, name in enumerate(series):
                if name in slot.values:
                    place = position + (index - (len(series) - 1) / 2) * width
                    _bar(axes, place, width, slot, name, ours, crowded)
            ticks.append(position)
            labels.append(slot)
            position += 1.0
        position += 0.6
    turned = len(labels) > 4
    axes.set_xticks(ticks, [f"{slot.label}\n{slot.sub}" if slot.sub else slot.label for slot in labels],
                    rotation=60 if turned else 0, ha="right" if turned else "center", linespacing=1.1,
                    rotation_mode="anchor" if turned else "default", fontsize=7 if crowded else 8)  # fmt: skip
    for text, slot in zip(axes.get_xticklabels(), labels, strict=True):
        text.set_fontweight("bold" if slot.is_mean else "normal")
    return ticks[-1]


def _bar(axes: Any, x: float, width: float, slot: Slot, name: str, ours: list[str], crowded: bool) -> None:
    mine = name in ours
    color, hatch = OURS[ours.index(name) % len(OURS)] if mine else PEERS[name]
    label = name if mine else BASELINES[name].title
    value = slot.values[name]
    axes.bar(x, value, 0.94 * width, color=color, hatch=hatch, edgecolor="#30363c", zorder=2, label=label,
             linewidth=0.9 if slot.is_mean else 0.4)  # fmt: skip
    if mine:
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5} if value < 1 else None  # hides the line at 1
        axes.annotate(f"{value:.1f}", (x, value), (0, 2), textcoords="offset points", ha="center", va="bottom",
                      rotation=90 if crowded or width < 0.3 else 0, fontsize=6.5 if crowded else 7.5, zorder=4,
                      fontweight="bold" if slot.is_mean else "normal", bbox=behind)  # fmt: skip


def _style(axes: Any, report: Report) -> None:
    axes.axhline(1.0, color="black", linewidth=1.0, zorder=3)
    axes.annotate("1x: " + report.dense_head.replace(" ", "\n"), (1.0, 1.0), (3, 0), textcoords="offset points",
                  xycoords=axes.get_yaxis_transform(), va="center", fontsize=8)  # fmt: skip
    axes.set_ylabel(f"speed-up over {report.dense_head}")
    axes.grid(axis="y", color="#d9d9d9", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _title(report: Report, width: int) -> str:
    head = report.environment
    threads = head.get("threads", 1)
    words = (
        f"fp32, {threads} thread{'s' if threads != 1 else ''}, {head.get('cpu', '')}, target {head.get('target', '')}"
    )
    found = [words]
    if report.dense_head != report.dense_label:
        found.append(f"{report.dense_head}: {report.dense_label}")
    notes = "; ".join(dict.fromkeys(row.note for row in report.rows if row.note))
    return "\n".join(fill(line, width) for line in [*found, *([f"* {notes}"] if notes else [])])
