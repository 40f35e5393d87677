"""Check a built wheel: ``python check_wheel.py dist/sparsert-*.whl``.

Name and tag, size, contents, and that it installs into an empty environment, imports quickly, and runs.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

SIZE_LIMIT = 1_000_000  # bytes
IMPORT_GOAL = 0.15  # seconds beyond NumPy; the goal is printed beside the figure
IMPORT_LIMIT = 0.60  # what fails the check: a busy machine must not

TIME_IMPORT = """
import time, numpy
start = time.perf_counter()
import sparsert
print(time.perf_counter() - start)
"""


def check_file(wheel: Path) -> None:
    require(re.fullmatch(r"sparsert-[0-9][0-9a-z.]*-py3-none-any\.whl", wheel.name), f"unexpected name {wheel.name}")
    size = wheel.stat().st_size
    require(size < SIZE_LIMIT, f"{wheel.name} has {size} bytes, the limit is {SIZE_LIMIT}")
    names = zipfile.ZipFile(wheel).namelist()
    require("sparsert/py.typed" in names, "py.typed is missing")
    require(any(name.endswith("licenses/LICENSE") for name in names), "LICENSE is missing")
    foreign = [n for n in names if not n.startswith("sparsert/") and not re.match(r"sparsert-[^/]+\.dist-info/", n)]
    require(not foreign, f"files outside the package: {foreign}")
    binary = [n for n in names if n.endswith((".so", ".pyd", ".dll", ".dylib", ".a", ".o"))]
    require(not binary, f"binaries in a pure Python wheel: {binary}")
    print(f"{wheel.name}: {size} bytes, {len(names)} files")


def check_install(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder, "bin", "python"))
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel.resolve()), cwd=folder)
        seconds = min(float(run(python, "-c", TIME_IMPORT, cwd=folder)) for _ in range(5))
        print(f"import sparsert: {seconds:.3f} s beyond NumPy (goal {IMPORT_GOAL} s)")
        require(seconds < IMPORT_LIMIT, f"import takes {seconds:.3f} s, the limit is {IMPORT_LIMIT} s")
        print("sparsert --version:", run(str(Path(folder, "bin", "sparsert")), "--version", cwd=folder).strip())
        run(str(Path(folder, "bin", "sparsert")), "info", "--json", cwd=folder)


def run(*command: str, cwd: str) -> str:
    return subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True).stdout


def require(condition: object, message: str) -> None:
    if not condition:
        sys.exit(f"check_wheel: {message}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    check_file(Path(sys.argv[1]))
    check_install(Path(sys.argv[1]))
