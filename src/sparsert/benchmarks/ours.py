"""SparseRT's own columns of a benchmark: row-major, tile-major and linear, on one target."""

from __future__ import annotations

import time
from typing import Any

from ..runtime.host import lookup
from .peers import Bound, Form, Layer

ROW_MAJOR = ""  # the plain column is just "sparsert"
TILE_MAJOR = "tile-major"


def sparsert_forms(threads: int, target: str = "native", tune: str | None = None) -> list[Form]:
    """The operator bound to the user's own NumPy memory, and to tile-major buffers as inside a network.

    ``tune`` is that of the compile functions, for the columns of each layer.
    """

    def matmul(layer: Layer, layout: str) -> Bound:
        from .. import compile_matmul

        start = time.perf_counter()
        columns = max(1, layer.columns) if tune else None
        op = compile_matmul(layer.sparse, target=target, threads=threads, layout=layout, tune=tune, columns=columns)
        return _bound(op, layer, time.perf_counter() - start)

    def linear(layer: Layer) -> Bound:
        from .. import compile_linear

        start = time.perf_counter()
        columns = max(1, layer.columns) if tune else None
        op = compile_linear(layer.sparse, target=target, threads=threads, tune=tune, columns=columns)
        return _bound(op, layer, time.perf_counter() - start)

    return [
        Form(
            ROW_MAJOR,
            "kn",
            lambda layer: matmul(layer, "row_major"),
            "ours",
            aligned=False,
            kinds=("matmul",),
        ),
        Form(
            TILE_MAJOR,
            "tiles",
            lambda layer: matmul(layer, "tile_major"),
            "ours",
            kinds=("matmul",),
            tile=lookup(target).lanes,
        ),
        Form(ROW_MAJOR, "nk", linear, "ours", aligned=False, kinds=("linear",)),
    ]


def _bound(op: Any, layer: Layer, compile_seconds: float) -> Bound:
    x, y = layer.x, layer.y
    stats = op.stats
    facts = {"compile_seconds": round(compile_seconds, 6), "schedule": str(op.schedule)}
    for name in ("code_bytes", "value_bytes", "bytes_per_nonzero", "fmas_per_load"):
        value = getattr(stats, name, None)
        if value is not None:
            facts[name] = float(value)
    return Bound(op.bind(x, y), facts)
