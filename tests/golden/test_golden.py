"""Listings of tiny tasks, byte for byte: a change that means to leave the code alone leaves these files alone.

``pytest tests/golden --update-golden`` rewrites them; the difference belongs in the review.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from sparsert import Clip, Schedule
from sparsert.codegen.assemble import ISAS, listing
from sparsert.kernels import activations, matmul
from sparsert.schedule.task import Task
from sparsert.sparsity.pattern import as_sparse
from sparsert.sparsity.taps import Window
from sparsert.target import TARGETS

HERE = Path(__file__).parent
FEW = ("x..x.", ".x...", "x.x..", "....x")
PLAIN = Schedule(rows=4)


class Golden(NamedTuple):
    """A task and its schedule; ``pattern`` has a string per row, an x per nonzero."""

    pattern: tuple[str, ...] = FEW
    schedule: Schedule = PLAIN
    layout: str = "row_major"
    bias: bool = False
    activation: Any = None
    residual: str | None = None
    window: Window | None = None


TASKS = {
    "plain": Golden(),
    "empty": Golden(("....", "....")),
    "no_columns": Golden(("", ""), bias=True),
    "one": Golden(("x",), Schedule(1)),
    "dense": Golden(("xxx", "xxx")),
    "bias": Golden(bias=True),
    "far_columns": Golden(("x" + 70 * "." + "x" + 200 * "." + "x",), Schedule(1)),
    "blocks": Golden(schedule=Schedule(2)),
    "by_count": Golden(schedule=Schedule(2, order="count")),
    "by_overlap": Golden(("xx..", "..xx", "xx..", "..xx"), Schedule(2, order="overlap")),
    "input_stationary": Golden(schedule=Schedule(2, blocks=0)),
    "packed": Golden(("x........x", "...x......"), Schedule(1, packing="beside")),
    "packed_ahead": Golden(("x..x", "..x."), Schedule(1, packing="ahead")),
    "packed_few_columns": Golden(schedule=Schedule(4, packing="beside")),
    "segments": Golden(schedule=Schedule(2, k_segment=3), bias=True),
    "prefetch": Golden(("xxxxxxxx",) * 6, Schedule(3, prefetch=True)),
    "tile_major": Golden(layout="tile_major"),
    "tile_major_far_columns": Golden((200 * "." + "x" + 100 * "." + "x",), Schedule(1), "tile_major"),
    "transposed": Golden(layout="transposed"),
    "residual_before": Golden(residual="before", activation="relu"),
    "residual_after": Golden(layout="tile_major", bias=True, residual="after"),
    "transposed_residual": Golden(layout="transposed", residual="before"),
    "clip": Golden(activation=Clip(-1.0, 2.5)),
    "hardswish": Golden(("x.", ".x"), Schedule(1), "tile_major", activation="hardswish"),
    "silu": Golden(("x.", ".x"), Schedule(2), "tile_major", activation="silu"),
    "gelu": Golden(("x",), Schedule(1), "tile_major", activation="gelu"),
    "conv": Golden(("x........x....x...", "...x............x."), Schedule(2), window=Window((3, 3))),
    "conv_masked": Golden(("x.......x", ".x....x.."), Schedule(2), window=Window((3, 3), masked=True)),
    "conv_tailored": Golden(
        ("xx......x", ".x....x.x"), Schedule(2), window=Window((3, 3), masked=True, pitch=10, shift=5)
    ),
    "conv_strided": Golden(("x...x...x",), Schedule(1), bias=True, window=Window((3, 3), (2, 2))),
    "conv_packed": Golden(
        ("x...x...x", "x.......x"), Schedule(1, packing="beside"), residual="after", window=Window((3, 3))
    ),
    "gelu_tanh": Golden(("x",), Schedule(1), "tile_major", activation="gelu_tanh"),
}


def listed(golden: Golden, isa: str) -> str:
    rows = [[float(mark == "x") for mark in row] for row in golden.pattern]
    pattern = as_sparse(np.array(rows, np.float32).reshape(len(rows), -1)).pattern
    found, parameters = activations.parse(golden.activation)
    task = Task(pattern, golden.bias, found.name if found else None, parameters, golden.residual, golden.layout,
                golden.window)  # fmt: skip
    if golden.window and golden.window.masks > TARGETS[isa].masks:
        task = replace(task, window=replace(golden.window, masked=False, pitch=0, shift=0))
    head = [f"# {pattern.rows}x{pattern.cols}, {golden.layout}, {golden.schedule}"]
    head += [f"#   {row}" for row in golden.pattern if len(row) < 40]
    return "\n".join(head) + "\n" + listing(matmul.generate(task, golden.schedule, TARGETS[isa]).program, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", TASKS)
def test_listing(name: str, isa: str, update_golden: bool) -> None:
    path, got = HERE / isa / f"{name}.txt", listed(TASKS[name], isa)
    if update_golden:
        path.parent.mkdir(exist_ok=True)
        path.write_text(got)
    want = path.read_text() if path.exists() else ""
    if got != want:
        changed = difflib.unified_diff(want.splitlines(), got.splitlines(), f"{isa}/{name}.txt", "now", lineterm="")
        pytest.fail("\n".join(["the listing changed; if it was meant to: --update-golden", *list(changed)[:60]]))


@pytest.mark.parametrize("isa", ISAS)
def test_no_golden_file_is_left_over(isa: str) -> None:
    assert {path.stem for path in (HERE / isa).glob("*")} == set(TASKS)
