"""What is benchmarked: named sets of pruned layers, real where data exists and seeded where it does not.

A problem is a constant sparse matrix W (M, K) and a number of columns N; its name is written MxKxN: M rows (outputs),
K inputs.  ``select`` turns the text of ``--problems`` into problems.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedError, ValueRangeError
from ..frontend.weights import READERS, load_layers
from ..sparsity.pattern import SparseMatrix, from_csr
from . import testdata

DEFAULT_SPARSITIES = (0.80, 0.90, 0.95, 0.98)
FILE_SUFFIXES = tuple(READERS)
CHAIN_LENGTH = 9
DEFAULT_COLUMNS = 196
ORDINARY = ("conv 1x1", "fully connected")  # layers of a file that need no note

TOKEN_SHAPES = ((768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (1024, 4096))
TOKEN_COLUMNS = (128, 256, 512)
CONV_SHAPES = ((512, 512, 196), (1024, 1024, 196), (2048, 512, 49), (512, 2048, 49))
CHAIN_SHAPES = ((512, 512, 196), (768, 768, 128), (1024, 1024, 49), (2048, 2048, 128))
LINEAR_SHAPES = ((768, 768), (3072, 768))
LINEAR_TOKENS = 128

Kind = Literal["matmul", "linear"]


@dataclass(frozen=True, eq=False)
class Problem:
    """One layer, or a chain of square layers of one shape that are called in turn.

    Attributes:
        name: unique within its set; the shape comes last.
        group: problems of a group share a geometric mean.
        weight: W (M, K) of the (first) layer.
        columns: N, the columns of x (K, N).
        note: what a reader of the row must know, such as a stand-in for unpublished weights.
        kind: "linear" for x (N, K) -> (N, M) as in ``compile_linear``.
        successors: further layers of a chain, (M, M) each.
    """

    name: str
    group: str
    weight: SparseMatrix
    columns: int
    note: str = ""
    kind: Kind = "matmul"
    successors: tuple[SparseMatrix, ...] = ()

    @property
    def layers(self) -> tuple[SparseMatrix, ...]:
        return (self.weight, *self.successors)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, K, N)."""
        return *self.weight.shape, self.columns

    @property
    def nnz(self) -> int:
        return sum(layer.pattern.nnz for layer in self.layers)

    @property
    def sparsity(self) -> float:
        rows, cols = self.weight.shape
        size = rows * cols * len(self.layers)
        return 1.0 - self.nnz / size if size else 0.0

    def input(self) -> NDArray[np.float32]:
        """x (K, N), standard normal, seeded by the problem's name and shape."""
        _, inputs, columns = self.shape
        return generator(self.name, self.shape).standard_normal((inputs, columns), np.float32)


def generator(*key: object) -> np.random.Generator:
    """A generator seeded by what it is for: the same numbers in every process, other numbers for every key."""
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def uniform(rows: int, cols: int, sparsity: float, seed: int = 0, scale: float = 1.0) -> SparseMatrix:
    """Exactly ``round(rows * cols * (1 - sparsity))`` nonzeros at uniform random places, values N(0, scale^2)."""
    if not 0.0 <= sparsity <= 1.0:
        raise ValueRangeError(f"{sparsity} is no sparsity", where="sparsity", hint="Give fractions such as 0.9.")
    rng = generator("uniform", rows, cols, sparsity, seed)
    flat = np.sort(rng.permutation(rows * cols)[: round(rows * cols * (1.0 - sparsity))])
    values = (rng.standard_normal(flat.size) * scale).astype(np.float32)
    indptr = np.searchsorted(flat, np.arange(rows + 1) * cols)
    return from_csr(values, flat % max(cols, 1), indptr, (rows, cols))


def percent(sparsity: float) -> str:
    return f"{100 * sparsity:g} %"


# ---------------------------------------------------------------------------------------------------------------- sets
def uniform_tokens(sparsities: Sequence[float] | None) -> Iterator[Problem]:
    """Linear layers of transformers, W @ X with 128 to 512 columns; 90 % unless told otherwise."""
    for sparsity in sparsities or (0.90,):
        for rows, cols in TOKEN_SHAPES:
            weight = uniform(rows, cols, sparsity)
            for columns in TOKEN_COLUMNS:
                yield Problem(f"{rows}x{cols}x{columns}", f"uniform {percent(sparsity)}, tokens", weight, columns)


def uniform_conv(sparsities: Sequence[float] | None) -> Iterator[Problem]:
    """Late 1x1 convolutions at 80, 90, 95 and 98 % unless told otherwise."""
    for sparsity in sparsities or DEFAULT_SPARSITIES:
        for rows, cols, columns in CONV_SHAPES:
            yield Problem(f"{rows}x{cols}x{columns} {percent(sparsity)}", f"uniform {percent(sparsity)}",
                          uniform(rows, cols, sparsity), columns)  # fmt: skip


def uniform_all(sparsities: Sequence[float] | None) -> Iterator[Problem]:
    yield from uniform_tokens(sparsities)
    yield from uniform_conv(sparsities)


def chain(sparsities: Sequence[float] | None) -> Iterator[Problem]:
    """Nine layers of one shape with nine patterns, each reading what the one before wrote: cold code."""
    for sparsity in sparsities or (0.90,):
        for rows, cols, columns in CHAIN_SHAPES:
            scale = 1.0 / max(cols * (1.0 - sparsity), 1.0) ** 0.5  # keeps the activations' variance over the layers
            layers = [uniform(rows, cols, sparsity, seed, scale) for seed in range(CHAIN_LENGTH)]
            name = f"{CHAIN_LENGTH} x {rows}x{cols}x{columns}"
            group = f"chain {rows}x{cols}x{columns}" + ("" if sparsity == 0.90 else f" {percent(sparsity)}")
            yield Problem(name, group, layers[0], columns, "cold code; times are of the whole chain",
                          successors=tuple(layers[1:]))  # fmt: skip


def linear(sparsities: Sequence[float] | None) -> Iterator[Problem]:
    """``compile_linear`` on 128 tokens: x (128, K) -> (128, M)."""
    for sparsity in sparsities or (0.90,):
        for rows, cols in LINEAR_SHAPES:
            yield Problem(f"linear {rows}x{cols}x{LINEAR_TOKENS}", f"compile_linear {percent(sparsity)}",
                          uniform(rows, cols, sparsity), LINEAR_TOKENS, kind="linear")  # fmt: skip


def mobilenet_v1(sparsities: Sequence[float] | None) -> Iterator[Problem]:
    """The 13 pointwise layers of the published 90 % sparse MobileNetV1 (``sparsities`` is ignored)."""
    for layer in testdata.mobilenet_v1_pointwise():
        weight, note = layer.weight, ""
        if weight is None:
            rows, cols = testdata.MOBILENET_UNPUBLISHED
            weight, note = uniform(rows, cols, 0.90), f"{layer.name}: uniform random stand-in"
        shape = f"{weight.shape[0]}x{weight.shape[1]}x{layer.columns}"
        yield Problem(f"{layer.name} {shape}", "MobileNetV1", weight, layer.columns, note)


def resnet50_1x1(sparsities: Sequence[float] | None) -> Iterator[Problem]:
    """Every distinct 1x1 shape of a pruned ResNet-50, real patterns, random values."""
    yield from _dlmc("rn50__magnitude_pruning", sparsities, "ResNet-50 1x1", distinct=True)


def transformer(sparsities: Sequence[float] | None) -> Iterator[Problem]:
    """Six layers of a pruned translation transformer: attention and both feed-forward layers, first and last block."""
    chosen = ("encoder_layer_0_self_attention_multihead_attention_q", "encoder_layer_0_ffn_conv1",
              "encoder_layer_0_ffn_conv2", "decoder_layer_5_encdec_attention_multihead_attention_k",
              "decoder_layer_5_ffn_conv1", "decoder_layer_5_ffn_conv2")  # fmt: skip
    yield from _dlmc("transformer__magnitude_pruning", sparsities, "transformer", names=chosen)


def dlmc(sparsities: Sequence[float] | None, words: str = "") -> Iterator[Problem]:
    """Every pattern whose "collection/name" contains ``words``; without words one pattern per distinct shape."""
    found = list(_dlmc("", sparsities, "DLMC", distinct=not words, words=words))
    if not found:
        raise UnsupportedError(f"no pattern of the collection matches {words!r}", where="problems",
                               hint="Names look like rn50__magnitude_pruning__0.9/bottleneck_1_block_group3_1_1; "
                                    "--sparsity restricts them too.")  # fmt: skip
    yield from found


def _dlmc(collection: str, sparsities: Sequence[float] | None, group: str, *, names: Iterable[str] = (),
          distinct: bool = False, words: str = "") -> Iterator[Problem]:  # fmt: skip
    wanted, seen = tuple(names), set()
    for entry in testdata.dlmc_index():
        if not entry.collection.startswith(collection) or words not in f"{entry.collection}/{entry.name}":
            continue
        if entry.nominal not in (sparsities or (0.90,)) and not (words and sparsities is None):
            continue
        if not entry.is_pointwise or (wanted and not any(name in entry.name for name in wanted)):
            continue
        key = (entry.collection, entry.rows, entry.cols, entry.columns)
        if distinct and key in seen:
            continue
        seen.add(key)
        note = "real pattern, random values" + ("; 3x3 patterns excluded" if entry.is_resnet else "")
        yield Problem(f"{entry.short_name} {entry.rows}x{entry.cols}x{entry.columns}",
                      f"{group} {percent(entry.nominal)}", testdata.read_dlmc(entry), entry.columns, note)  # fmt: skip


SETS: dict[str, Callable[[Sequence[float] | None], Iterator[Problem]]] = {
    "mobilenet_v1": mobilenet_v1,
    "resnet50_1x1": resnet50_1x1,
    "transformer": transformer,
    "uniform": uniform_all,
    "uniform_tokens": uniform_tokens,
    "uniform_conv": uniform_conv,
    "chain": chain,
    "linear": linear,
    "dlmc": dlmc,
}


def from_file(path: str, columns: int | None = None) -> Iterator[Problem]:
    """Every layer of a weight file; ``columns`` is N where the file does not say (196, a 14x14 image, by default)."""
    stem = Path(path.partition(".zip:")[0]).stem
    layers = load_layers(path)
    tails = [layer.name.rpartition("/")[2] for layer in layers]
    speaking = len(set(tails)) == len(tails)  # else the layers' numbers: whole paths would swamp the table
    for index, layer in enumerate(layers):
        count = columns or layer.columns or DEFAULT_COLUMNS
        rows, cols = layer.weight.shape
        name = tails[index] if speaking else f"#{index}"
        note = "" if layer.note.startswith(ORDINARY) else layer.note
        yield Problem(f"{name} {rows}x{cols}x{count}", stem, layer.weight, count, note)


def select(
    names: str | Sequence[str], sparsities: Sequence[float] | None = None, columns: int | None = None
) -> list[Problem]:
    """The problems of a comma-separated list of set names, ``dlmc:WORDS`` and weight files.

    Raises:
        UnsupportedError: a name is unknown, or a set needs data that is not there.
    """
    wanted = [part.strip() for part in names.split(",")] if isinstance(names, str) else names
    for name in wanted:  # all of them before the first is built
        if not (name in SETS or name.startswith("dlmc:") or _is_file(name)):
            known = ", ".join((*SETS, "dlmc:WORDS", *(f"FILE{suffix}" for suffix in FILE_SUFFIXES)))
            raise UnsupportedError(f"unknown problem set {name!r}", where="problems", hint=f"Known: {known}.")
    found: list[Problem] = []
    for name in wanted:
        if name in SETS:
            found += SETS[name](sparsities)
        elif name.startswith("dlmc:"):
            found += dlmc(sparsities, name.removeprefix("dlmc:"))
        else:
            found += from_file(name, columns)
    return found


def _is_file(name: str) -> bool:
    return name.lower().endswith(FILE_SUFFIXES) or ".zip:" in name
