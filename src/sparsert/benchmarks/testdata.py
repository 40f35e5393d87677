"""Real pruned layers for benchmarks, found through the environment variable SPARSERT_TEST_DATA."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedError
from ..frontend.weights import load_layers
from ..sparsity.pattern import SparseMatrix, from_csr

VARIABLE = "SPARSERT_TEST_DATA"
MOBILENET_COLUMNS = (
    12544,
    3136,
    3136,
    784,
    784,
    196,
    196,
    196,
    196,
    196,
    196,
    49,
    49,
)  # N of pw0 .. pw12 for one image
MOBILENET_UNPUBLISHED = (1024, 1024)  # pw12: only its bias was published
TRANSFORMER_COLUMNS = 128  # tokens; the collection does not say


class PointwiseLayer(NamedTuple):
    """A 1x1 convolution; ``weight`` is None where it was not published."""

    name: str
    weight: SparseMatrix | None
    bias: NDArray[np.float32]
    columns: int


class DlmcEntry(NamedTuple):
    """A row of the Deep Learning Matrix Collection's index (Gale et al., arXiv 2006.10901)."""

    collection: str
    name: str
    rows: int
    cols: int
    nominal: float
    columns: int

    @property
    def is_resnet(self) -> bool:
        return self.collection.startswith("rn50")

    @property
    def is_pointwise(self) -> bool:
        """A product with a matrix of reasonable size: no 3x3 or 7x7 convolution, no classifier, no embedding."""
        if self.is_resnet:
            return self.name.startswith(("bottleneck_1_", "bottleneck_3_", "bottleneck_projection_"))
        return not self.name.startswith("symbol_modality")

    @property
    def short_name(self) -> str:
        name = self.name.removesuffix("_fully_connected").removeprefix("body_")
        for long, short in (("bottleneck_projection_block_group_projection_block_group", "proj.g"),
                            ("bottleneck_", "b"), ("_block_group_projection_block_group", ".proj.g"),
                            ("_block_group", ".g"), ("encoder_layer_", "enc"), ("decoder_layer_", "dec"),
                            ("_multihead_attention", ""), ("self_attention", "self"),
                            ("encdec_attention", "cross"), ("_transform", "")):  # fmt: skip
            name = name.replace(long, short)
        return name


def root() -> Path:
    """The folder of the test data.

    Raises:
        UnsupportedError: the variable is unset or names no folder.
    """
    value = os.environ.get(VARIABLE, "")
    hint = (
        f"Set {VARIABLE} to the folder that holds weights/ and dlmc/, or use the problem sets uniform, chain or linear."
    )
    if not value:
        raise UnsupportedError("this problem set needs real weights, which are not part of the package",
                               where="problems", hint=hint)  # fmt: skip
    folder = Path(value)
    if not folder.is_dir():
        raise UnsupportedError(f"{VARIABLE} names {value!r}, which is no folder", where="problems", hint=hint)
    return folder


def _existing(relative: str) -> Path:
    path = root() / relative
    if not path.is_file():
        raise UnsupportedError(f"{relative} is missing from the test data", where="problems",
                               hint=f"Check the folder that {VARIABLE} names.")  # fmt: skip
    return path


def mobilenet_v1_pointwise() -> Iterator[PointwiseLayer]:
    """The 13 1x1 layers of the sparse MobileNetV1 1.0 (90 %), batch norms folded, in order."""
    with np.load(_existing("weights/mobilenet_v1_1.0_90.npz")) as arrays:
        for k, columns in enumerate(MOBILENET_COLUMNS):
            weight = None
            if f"pw{k}.data" in arrays:
                parts = (arrays[f"pw{k}.{part}"] for part in ("data", "indices", "indptr", "shape"))
                data, indices, indptr, shape = parts
                weight = from_csr(data.astype(np.float32), indices, indptr, shape, f"pw{k}")
            yield PointwiseLayer(f"pw{k}", weight, arrays[f"pw{k}.b"].astype(np.float32), columns)


def dlmc_index() -> Iterator[DlmcEntry]:
    """The patterns whose archive is there, in the index's order."""
    index = _existing("dlmc/index.csv")
    present = {path.stem for path in index.parent.glob("*.zip")}
    with index.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["group"] in present:
                columns = int(row["N_outputs_one_image"] or TRANSFORMER_COLUMNS)
                nominal = float(row["group"].rpartition("__")[2])
                yield DlmcEntry(row["group"], row["name"], int(row["nrows"]), int(row["ncols"]), nominal, columns)


def read_dlmc(entry: DlmcEntry) -> SparseMatrix:
    """The entry's pattern with standard normal values that depend on nothing but the pattern."""
    archive = _existing(f"dlmc/{entry.collection}.zip")
    return load_layers(f"{archive}:{entry.collection.replace('__', '/')}/{entry.name}.smtx")[0].weight
