"""Convolutions on arrays, scratch and values that lie against inaccessible pages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent


def run(seed: int, count: int) -> None:
    child = subprocess.run(
        [sys.executable, str(TESTS / "fuzz" / "guard_convolutions.py"), str(seed), str(count)],
        capture_output=True, text=True, timeout=600, env={"PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS}"}, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-3000:]
    assert f"{count} cases" in child.stdout


def test_some_guarded_convolutions(request: pytest.FixtureRequest) -> None:
    run(int(request.config.getoption("--seed") or 0), 60)


@pytest.mark.full
def test_many_guarded_convolutions() -> None:
    run(1000, 1500)
