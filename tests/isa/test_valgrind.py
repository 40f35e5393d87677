"""Generated code under valgrind's memcheck: no byte outside an array is touched, no uninitialised one decides anything.

Memcheck knows AVX2, not AVX-512. Python and the loader have findings of their own; those of generated code are told
apart by their innermost frame, which belongs to no file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = [pytest.mark.full, pytest.mark.tools("valgrind"), pytest.mark.isa("x86-avx2")]
WORKLOAD = Path(__file__).with_name("valgrind_workload.py")


def findings(folder: Path, *arguments: str) -> list[str]:
    """What memcheck says of generated code."""
    out = folder / "memcheck.xml"
    command = [
        "valgrind",
        "--xml=yes",
        f"--xml-file={out}",
        "--error-limit=no",
        "--partial-loads-ok=no",
        sys.executable,
        str(WORKLOAD),
    ]
    environment = os.environ | {"PYTHONMALLOC": "malloc", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = []
    for error in ElementTree.parse(out).iter("error"):
        frame = error.find("stack/frame")
        if frame is not None and frame.find("obj") is None and frame.find("fn") is None:
            found.append(error.findtext("xwhat/text") or error.findtext("what") or error.findtext("kind") or "?")
    return found


def test_generated_code_stays_within_its_arrays(tmp_path: Path) -> None:
    assert findings(tmp_path, "60") == []


def test_an_overrun_by_one_float_is_found(tmp_path: Path) -> None:
    assert any("Invalid read" in text for text in findings(tmp_path, "0", "--overrun"))
