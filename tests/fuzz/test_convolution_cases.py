"""Drawn convolutions of every kind on guarded pages, in child processes: a fault would end this one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fuzz import convolution_cases
from fuzz.test_guard_pages import campaign
from sparsert.operators import looped_conv

CASES = "convolution_cases.py"


@pytest.mark.isa("x86-avx2")
def test_some_cases(tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    campaign(request.config.getoption("--seed"), 80, tmp_path, CASES)
    said = capsys.readouterr().out
    for kind in ("images", "line", "transposed", "looped", "threads", "schedule", "refused"):
        assert f" {kind}" in said


@pytest.mark.full
@pytest.mark.isa("x86-avx2")
@pytest.mark.parametrize("part", range(4))
def test_many_cases(part: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    campaign(request.config.getoption("--seed") + 2000 + part, 400, tmp_path, CASES)


@pytest.mark.isa("x86-avx2")
def test_what_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A displacement that is off by one column shows."""
    made = looped_conv.LoopedConv.__init__

    def wrong(self: looped_conv.LoopedConv, *arguments: object) -> None:
        made(self, *arguments)  # type: ignore[arg-type]
        plane, row, column = self.places
        self.places = plane, row, np.maximum(column - 1, 0)

    monkeypatch.setattr(looped_conv.LoopedConv, "__init__", wrong)
    outcomes = [convolution_cases.run_case(0, number, ["x86-avx2"]) for number in range(40)]
    assert any("looped: other bits" in outcome.problems for outcome in outcomes)
    assert not any(outcome.problems for outcome in outcomes if "looped" not in outcome.counted)
