"""Generated code touches no byte outside its arrays: drawn layers on arrays that touch inaccessible pages."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sparsert
from fuzz.guard import CANARY, Buffers, Region, span_of

pytestmark = pytest.mark.isa("x86-avx2")

QUICK, FULL = 400, 6000  # cases; the variable SPARSERT_FUZZ_CASES sets another number for the full tier
ATTEMPT = 1800  # seconds after which a child is given up: far beyond what any machine needs


def child(arguments: list[str], log: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sparsert.__file__).parents[1]), str(Path(__file__).parents[1])])
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=ATTEMPT, check=False,
                          env={**os.environ, "PYTHONPATH": path}, cwd=log.parent)  # fmt: skip


def verdict(done: subprocess.CompletedProcess[str], log: Path) -> str:
    """What the child says, or what it was doing when it died; empty if all is well."""
    if done.returncode == 0:
        return ""
    cases = log.read_text().splitlines() if log.exists() else []
    how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit {done.returncode}"
    last = cases[-1] if cases else "nothing yet"
    return f"{how} after {max(len(cases) - 1, 0)} good cases in {last}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def campaign(seed: int, count: int, folder: Path, cases: str = "guard_cases.py") -> None:
    log = folder / "cases.jsonl"
    script = Path(__file__).with_name(cases)
    done = child([str(script), "--seed", str(seed), "--count", str(count), "--log", str(log)], log)
    wrong = verdict(done, log)
    assert not wrong, wrong
    print(done.stdout)
    assert done.stdout.startswith(f"{count} cases")


def test_drawn_layers(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    campaign(request.config.getoption("--seed"), QUICK, tmp_path)


def test_drawn_products(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    campaign(request.config.getoption("--seed"), QUICK, tmp_path, "product_cases.py")


@pytest.mark.full
def test_many_drawn_layers(tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    count = int(os.environ.get("SPARSERT_FUZZ_CASES", FULL))
    with capsys.disabled():  # the count is part of the report
        campaign(request.config.getoption("--seed") + 1, count, tmp_path)
        campaign(request.config.getoption("--seed") + 1, count, tmp_path, "product_cases.py")


@pytest.mark.parametrize(("at_end", "offset"), [(True, 4 * 100), (False, -1)])
@pytest.mark.parametrize("write", [False, True])
def test_one_byte_outside_kills(tmp_path: Path, at_end: bool, offset: int, write: bool) -> None:
    action = f"ctypes.memset({{}} + {offset}, 0, 1)" if write else f"ctypes.string_at({{}} + {offset}, 1)"
    code = f"""
import ctypes
from fuzz.guard import Region
a = Region(400, at_end={at_end}).array((100,), (4,))
a[...] = 1
address = a.__array_interface__["data"][0]
print(ctypes.string_at(address, 400) == a.tobytes(), flush=True)
{action.format("address")}
print("alive")
"""
    log = tmp_path / "log"
    log.write_text('{"number": 0}\n{"number": 1}\n')
    done = child(["-c", code], log)
    assert done.stdout == "True\n"
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS)
    assert 'after 1 good cases in {"number": 1}' in verdict(done, log)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("strides", [(44, 4), (-44, 4), (41, 4), (44, -4), (-81, -8)])
def test_canaries_between_elements(strides: tuple[int, int], at_end: bool) -> None:
    region = Region(span_of((3, 10), strides), at_end=at_end)
    array = region.array((3, 10), strides)
    array[...] = 5.0
    assert region.owned.sum() == array.nbytes
    assert not region.stray().size
    outside = np.flatnonzero(~region.owned)
    for place in (outside[0], outside[outside > region.start][0], outside[-1]):
        region.bytes[place] = 0
        assert list(region.stray()) == [place - region.start]
        region.bytes[place] = CANARY


def test_complaints_name_the_array() -> None:
    buffers = Buffers()
    buffers.array("x", (4, 4), (16, 4), at_end=True)
    internal = buffers.aligned_empty(10)
    assert buffers.complaints() == []
    assert buffers.internal() == 1
    assert internal.__array_interface__["data"][0] % 64 == 0
    ctypes.memset(internal.__array_interface__["data"][0] + 40, 0, 3)
    assert buffers.complaints() == ["internal buffer of 10 float32: 3 bytes outside were written, from offset 40 on"]


def test_arrays_touch_the_inaccessible_page() -> None:
    region = Region(50 * 4, at_end=True)
    assert (region.start + 200) % 4096 == 0
    assert Region(50 * 4, at_end=False).start == 0
    aligned = Region(50 * 4, at_end=True, alignment=64)
    assert aligned.start % 64 == 0
    assert aligned.bytes.size - aligned.start - 200 < 64
    assert Region(64 * 4, at_end=True, alignment=64).start + 256 == region.bytes.size
