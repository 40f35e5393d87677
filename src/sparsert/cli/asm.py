"""``sparsert asm FILE --layer NAME``: the machine code of one layer of a weight file, as a listing for people.

Nothing is executed, so the code of another machine can be read here: ``--target`` names it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import convolution

TARGETS = ("native", "x86-avx512", "x86-avx2", "aarch64-neon")
LAYOUTS = ("row_major", "tile_major", "transposed")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "asm", help="list the code generated for a layer of a file", description=__doc__.replace("``", "")
    )
    option = parser.add_argument
    option("file", metavar="FILE", help=".tflite, .npz, .npy, .smtx, .zip or ARCHIVE.zip:MEMBER")
    option("--layer", metavar="NAME", help="which layer; not needed where the file has just one")
    option("--target", choices=TARGETS, default="native", help="default: what this machine executes")
    option("--layout", choices=LAYOUTS, default="row_major", help="of the activations (default row_major)")
    option("--form", choices=("sparse", "dense"), help="default: what compile_matmul would choose")
    option("--max-code-bytes", type=int, metavar="N", help="list a loop over the pattern where code would be larger")
    option("-o", "--output", type=Path, metavar="OUT", help="write the listing to OUT instead of printing it")
    convolution.add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..errors import UnsupportedError
    from ..frontend.container import some
    from ..frontend.weights import load_layers, pick

    geometry, layers = convolution.options(args), load_layers(args.file)
    if args.layer is None and len(layers) > 1:
        raise UnsupportedError(f"the file has {len(layers)} layers; name one with --layer", where=args.file,
                               hint=f"They are {some([layer.name for layer in layers], 60)}.")  # fmt: skip
    from ..listings import compile_listing
    from ..runtime.host import lookup

    layer = layers[0] if args.layer is None else pick(layers, args.layer, args.file)
    pattern = layer.weight.pattern
    listing = compile_listing(
        layer.weight, layer.bias, layer.activation, target=args.target, layout=args.layout, form=args.form,
        max_code_bytes=args.max_code_bytes, **geometry,
    )  # fmt: skip
    head = [f"{layer.name}: {pattern.rows}x{pattern.cols}, {pattern.nnz} nonzeros"]
    head += ["bias"] if layer.bias is not None else []
    head += [] if layer.activation is None else [str(layer.activation)]
    kind = ", ".join(f"{name} {value}" for name, value in geometry.items() if value) if geometry else args.layout
    text = f"; {', '.join([*head, kind, lookup(args.target).name])}\n{listing}"
    if args.output:
        args.output.write_text(text)
    else:
        sys.stdout.write(text)
    return 0
