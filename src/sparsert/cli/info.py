"""``sparsert info``: what this machine is, what SparseRT can execute on it and why not, and which peers are there."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import numpy as np

from .. import __version__
from ..runtime.host import host_report

# Optional packages: the module that is imported, and what SparseRT does with it. Distributions have the same name.
PEERS = {
    "scipy": "sparse matrices in; CSR product as a baseline",
    "tflite": "a second reader in tests: .tflite files need no package",
    "torch": "dense and CSR baselines",
    "onnx": "builds the models of the onnxruntime baseline",
    "onnxruntime": "dense baseline",
    "openvino": "dense baseline",
    "mkl": "sparse and dense baselines",
    "threadpoolctl": "holds baselines to the number of threads asked for",
    "matplotlib": "charts",
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "info", help="this machine, its targets, the installed peers", description=__doc__.replace("``", "")
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    report = collect()
    if args.json:
        print(json.dumps(report, indent=2, default=str))
    else:
        _print_tables(report)
    return 0


def collect() -> dict[str, Any]:
    """Everything that ``sparsert info`` shows; plain data for JSON."""
    return {
        "sparsert": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "numpy": np.__version__,
        "platform": platform.platform(),
        **host_report(),
        "peers": {name: installed_version(name) for name in PEERS},
    }


def installed_version(module: str) -> str | None:
    """The version of an optional package, found without importing it; None where it is not installed."""
    try:
        return version(module)
    except PackageNotFoundError:
        return "unknown" if find_spec(module) is not None else None


def _print_tables(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    shown = {**report, "caches": {name: f"{size >> 10} KiB" for name, size in report["caches"].items()}}
    machine = Table("", "", show_header=False, title="This machine", title_justify="left")
    for label, key in [("SparseRT", "sparsert"), ("Python", "python"), ("NumPy", "numpy"), ("platform", "platform"),
                       ("CPU", "cpu"), ("features", "features"), ("caches", "caches"), ("native target", "native"),
                       ("usable threads", "threads")]:  # fmt: skip
        machine.add_row(label, _flat(shown.get(key)))
    targets = Table("target", "runs here", title="Targets", title_justify="left")
    for name, reason in report["targets"].items():
        targets.add_row(name, f"[yellow]no:[/] {reason}" if reason else "[green]yes[/]")
    peers = Table("package", "version", "used for", title="Optional packages", title_justify="left")
    for name, found in report["peers"].items():
        peers.add_row(name, found or "[dim]not installed[/]", PEERS[name])
    for table in (machine, targets, peers):
        console.print(table)
    for note in report["notes"]:
        console.print(f"Note: {note}")


def _flat(value: Any) -> str:
    """A report's value on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return " ".join(str(item) for item in value)
    return "-" if value is None else str(value)
