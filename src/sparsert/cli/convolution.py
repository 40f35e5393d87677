"""Options that say that the layers of a file are convolutions, whose weights it holds as matrices."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import UnsupportedError, ValueRangeError

_GIVEN = ("stride", "padding", "dilation", "groups", "output_padding", "size")


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "convolutions", "rows and columns are written 3x3, or as one number if they are the same"
    )
    option = group.add_argument
    option("--kernel", metavar="KHxKW", help="a layer's matrix is (O, C / groups * KH * KW): it is a convolution")
    option("--stride", metavar="S", help="default 1")
    option("--padding", metavar="P", help="P, ROWSxCOLUMNS, TOP,BOTTOM,LEFT,RIGHT, same_upper or same_lower; default 0")
    option("--dilation", metavar="D", help="default 1")
    option("--groups", metavar="G", type=int, help="default 1")
    option("--transposed", action="store_true", help="a transposed convolution, of (C, O / groups * KH * KW)")
    option("--output-padding", metavar="P", help="of a transposed convolution; default 0")
    option("--size", metavar="HxW", help="of the images: what is tuned for, and what depthwise code depends on")


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a convolution, as the compile functions take them; none where the layers are products.

    Raises:
        ValueRangeError: a number cannot be read. UnsupportedError: something is said of a kernel, but not which.
    """
    said = {name: getattr(args, name) for name in _GIVEN if getattr(args, name) is not None}
    if args.kernel is None:
        if said or args.transposed:
            name = next(iter(said), "transposed").replace("_", "-")
            raise UnsupportedError(f"--{name} is of a convolution", where="kernel", hint="Say --kernel, too.")
        return {}
    found: dict[str, Any] = {name: _numbers(name, str(text)) for name, text in said.items()}
    return {"kernel": _numbers("kernel", args.kernel), "transposed": args.transposed, **found}


def _numbers(name: str, text: str) -> Any:
    """``3``, ``3x3`` or, of padding, ``0,1,0,1`` or a rule."""
    if name == "padding" and text.startswith("same"):
        return text
    parts = text.split("," if "," in text else "x")
    if not all(part.strip().isdecimal() for part in parts) or len(parts) not in (
        (1, 2, 4) if name == "padding" else (1, 2)
    ):
        raise ValueRangeError(f"{text!r} is neither a number nor ROWSxCOLUMNS", where=f"--{name.replace('_', '-')}")
    numbers = [int(part) for part in parts]
    if len(numbers) == 4:
        return tuple(numbers[:2]), tuple(numbers[2:])
    return numbers[0] if len(numbers) == 1 else tuple(numbers)
