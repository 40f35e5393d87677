"""``sparsert bench kernels``: pruned layers beside dense and sparse peers, checked, timed interleaved, drawn."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ValueRangeError

if TYPE_CHECKING:
    from rich.console import Console

    from ..benchmarks.report import Report

PROBLEMS = (
    "comma-separated: mobilenet_v1, resnet50_1x1, transformer, uniform (both uniform_tokens and uniform_conv), chain, "
    "linear, dlmc, dlmc:WORDS, or weight files (.tflite, .npz, .npy, .smtx)"
)
PEERS = "numpy, torch, onnxruntime, openvino, scipy, torch_csr, mkl"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("bench", help="benchmarks against dense and sparse peers")
    kinds = parser.add_subparsers(title="benchmarks", metavar="WHAT", required=True)
    kernels = kinds.add_parser("kernels", help="single layers", description=__doc__.replace("``", ""))
    option = kernels.add_argument
    option("--problems", default="uniform_conv", metavar="LIST", help=PROBLEMS)
    option("--sparsity", metavar="LIST", help="such as 0.9 or 80,90,95; default: what each set is known for")
    option("--columns", type=int, metavar="N", help="columns of layers from files; default: as the file says")
    option("--baseline", metavar="LIST", help=f"of {PEERS}; default: all that are installed")
    option("--threads", type=int, default=1, metavar="N", help="threads of every candidate (default 1)")
    option("--target", default="native", metavar="T", help="native, x86-avx512, x86-avx2, aarch64-neon or reference")
    option("--rounds", type=int, default=15, metavar="N", help="timing rounds per problem (default 15)")
    option("--by-shape", action="store_true", help="a row of the table for each shape, geometric means of its layers")
    option("--json", type=Path, metavar="OUT", help="write all figures to OUT")
    option("--figure", type=Path, metavar="OUT", help="draw the speed-ups: .png, .svg, or no suffix for both")
    kernels.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from rich.markup import escape

    from ..benchmarks import chart
    from ..benchmarks.table import console, show

    if args.threads < 1 or args.rounds < 1 or (args.columns is not None and args.columns < 1):
        raise ValueRangeError("--threads, --rounds and --columns are at least 1", where="bench")
    if args.figure:
        chart.outputs(args.figure)  # before minutes of work: is the format known, is matplotlib there
    for path in (args.json, args.figure):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    out = console()
    report = _measure(args, out)
    show(report, out, args.by_shape)
    if args.json:
        args.json.write_text(report.to_json())
        out.print(f"figures: {escape(str(args.json))}", soft_wrap=True)
    if args.figure:
        files = ", ".join(map(str, chart.draw(report, args.figure)))
        out.print(f"chart: {escape(files)}", soft_wrap=True)
    return 0


def _measure(args: argparse.Namespace, out: Console) -> Report:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ..benchmarks import baselines, environment, problems, runner
    from ..benchmarks.ours import sparsert_forms
    from ..runtime.host import lookup

    found = problems.select(args.problems, parse_sparsities(args.sparsity), args.columns)
    names = None if args.baseline is None else [name.strip() for name in args.baseline.split(",")]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("loading peers", total=len(found))
        selection = baselines.select(names, args.threads)
        ours = sparsert_forms(args.threads, args.target)

        def advance(done: int, following: str) -> None:
            bar.update(task, completed=done, description=following)

        command = "sparsert " + shlex.join(sys.argv[1:])
        head = environment.describe(args.threads, lookup(args.target).name, command)
        return runner.run(found, selection, ours, threads=args.threads, rounds=args.rounds, head=head, progress=advance)


def parse_sparsities(text: str | None) -> list[float] | None:
    """ "80,0.9,95%" as fractions; values above 1 are per cent.

    Raises:
        ValueRangeError: an item is no number from 0 up to, but excluding, 100 %.
    """
    if text is None:
        return None
    values = []
    for item in text.split(","):
        try:
            value = float(item.strip().removesuffix("%"))
        except ValueError:
            value = -1.0
        value = round(value / 100, 6) if value >= 1 else value
        if not 0.0 <= value < 1.0:
            raise ValueRangeError(
                f"{item.strip()!r} is no sparsity", where="sparsity", hint="Give 0.9 or 90, separated by commas."
            )
        values.append(value)
    return values
