"""``sparsert COMMAND ...``: finds the command's module, runs it, and turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import SparseRTError

COMMANDS = {
    "info": "sparsert.cli.info",
    "asm": "sparsert.cli.asm",
    "bench": "sparsert.cli.bench",
    "tune": "sparsert.cli.tune",
    "demo": "sparsert.cli.demo",
}

EXIT_ERROR = 2  # as argparse exits on a wrong command line
EXIT_INTERRUPT = 130  # 128 + SIGINT, as shells report it
EXIT_PIPE = 141  # 128 + SIGPIPE


def build_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for ``argv``: of the command that it names, or of all of them where it names none (``--help``)."""
    parser = argparse.ArgumentParser(
        prog="sparsert", description="Machine code for pruned neural networks, generated from their sparsity pattern."
    )
    parser.add_argument("--version", action="version", version=f"sparsert {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    named = next((word for word in argv if not word.startswith("-")), None)
    for name in [named] if named in COMMANDS else COMMANDS:
        importlib.import_module(COMMANDS[name]).add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 an error with a message, 130 interrupted."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        args = build_parser(words).parse_args(words)
        status: int = args.run(args)
        sys.stdout.flush()  # here, so that a reader gone early is met inside this try
        return status
    except SparseRTError as error:
        print(f"sparsert: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit: let that go nowhere instead of into a second error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except OSError as error:
        if error.filename is None:
            raise
        print(f"sparsert: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("sparsert: interrupted", file=sys.stderr)
        return EXIT_INTERRUPT


if __name__ == "__main__":
    sys.exit(main())
