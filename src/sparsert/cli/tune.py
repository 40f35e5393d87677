"""``sparsert tune FILE``: measures schedules for the layers of a weight file and records the best.

A compile function that is given ``tune=`` or ``tuning=`` finds the records.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import convolution

if TYPE_CHECKING:
    from rich.table import Table

    from ..schedule.tuner import Tuning

TARGETS = ("native", "x86-avx512", "x86-avx2")
LAYOUTS = ("row_major", "tile_major", "transposed")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "tune", help="measure schedules for the layers of a file and record the best",
        description=__doc__.replace("``", ""),
    )  # fmt: skip
    option = parser.add_argument
    option("file", metavar="FILE", help=".tflite, .npz, .npy, .smtx, .zip or ARCHIVE.zip:MEMBER")
    option("--layer", metavar="NAME", help="which layer; default: all of them")
    option("--columns", type=int, metavar="N", help="columns to tune for; default: as the file says, or 196")
    option("--full", action="store_true", help="try up to 96 schedules instead of 8")
    option("--warm", action="store_true", help="measure calls in a row, not a layer as a network calls it")
    option("--target", choices=TARGETS, default="native", help="default: the best that this machine executes")
    option("--layout", choices=LAYOUTS, default="row_major", help="of the activations (default row_major)")
    option(
        "--records", metavar="PATH", help="the file of records, or off; default: SPARSERT_TUNING or the user's cache"
    )
    option("--top", type=int, default=8, metavar="N", help="rows of a layer's table (default 8)")
    convolution.add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from rich.markup import escape

    from ..benchmarks.table import console
    from ..compiler import tune_layer
    from ..convolution import tune_convolution
    from ..errors import ValueRangeError
    from ..frontend.weights import load_layers, pick
    from ..operators import tuned

    if args.top < 1:
        raise ValueRangeError("--top is at least 1", where="tune")
    effort = ("full" if args.full else "fast") + (tuned.WARM if args.warm else "")
    geometry = convolution.options(args)
    wanted = tuned.request(effort, args.records, args.columns)
    layers, out = load_layers(args.file), console()
    for layer in layers if args.layer is None else [pick(layers, args.layer, args.file)]:
        pattern = layer.weight.pattern
        head = f"{layer.name}: {pattern.rows}x{pattern.cols}"
        settings: dict[str, Any] = {"target": args.target, "tune": effort, "tuning": args.records}
        results: list[tuple[str, Tuning | None]]
        if geometry:
            tuned_layers = tune_convolution(layer.weight, layer.bias, layer.activation, **geometry, **settings)
            results = [
                (f"{head}, {part.task.pattern.nnz} nonzeros, {part.describe(geometry.get('size'))}", result)
                for part, result in tuned_layers
            ]
        else:
            columns = args.columns or layer.columns or tuned.DEFAULT_COLUMNS
            result = tune_layer(
                layer.weight, layer.bias, layer.activation, layout=args.layout, columns=columns, **settings
            )
            results = [(f"{head}x{columns}, {pattern.nnz} nonzeros, {args.layout}", result)]
        for title, result in results:
            if result is None:
                out.print(f"{escape(title)}: no two schedules would differ\n")
            else:
                out.print(_table(escape(title), result, args.top))
    place = wanted.database.path if wanted and wanted.database else None
    out.print(f"records: {escape(str(place))}" if place else "nothing is recorded", soft_wrap=True)
    return 0


def _table(title: str, result: Tuning, top: int) -> Table:
    """The fastest schedules, and in any case the chosen one and the cost model's."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("us", justify="right")
    table.add_column("over cost model", justify="right")
    table.add_column("schedule", overflow="fold")
    table.add_column("")
    for place, trial in enumerate(result.trials):
        said = ["chosen"] if trial is result.best else []
        said += ["cost model"] if trial is result.first else []
        if place < top or said:
            ratio = trial.seconds / result.first.seconds
            table.add_row(f"{1e6 * trial.seconds:.1f}", f"{ratio:.3f}", str(trial.schedule), ", ".join(said))
    left = f", no time for {result.skipped} more" if result.skipped else ""
    table.caption = f"{len(result.trials)} schedules in {result.elapsed:.2f} s{left}"
    return table
