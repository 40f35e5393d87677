"""Pruned layers of TensorFlow Lite files, read from their sparse encoding without densifying.

A sparse tensor is stored as a tree with one level per dimension in *traversal order*: a DENSE level has every index, a
SPARSE_CSR level lists the indices below each parent node between two *segments*; blocked dimensions have two levels.
(``SparsityParameters`` in TensorFlow's ``schema.fbs``; the idea is TACO's format abstraction, Chou et al., 2018.)
The leaves, in order, are the stored values, so a layer's pattern is what its file stores, explicit zeros included.

Only schema field ids are used here; :mod:`.flatbuffer` checks every offset.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError, SparseRTError
from ..sparsity.pattern import SparseMatrix, as_sparse, from_csr, require_finite
from .flatbuffer import Table, Tables

# BuiltinOperator, BuiltinOptions, TensorType and ActivationFunctionType of schema.fbs, as far as they matter here.
CONV_2D, DEQUANTIZE, FULLY_CONNECTED, DENSIFY = 3, 6, 9, 124
CONV_2D_OPTIONS, FULLY_CONNECTED_OPTIONS = 1, 8
FLOATS: dict[int, str] = {0: "<f4", 1: "<f2"}
ACTIVATIONS: dict[int, str] = {0: "", 1: "relu", 2: "relu_n1_to_1", 3: "relu6", 4: "tanh", 5: "sign_bit"}
INDEX_TYPES: dict[int, str] = {1: "<i4", 2: "<u2", 3: "u1"}
SPARSE_CSR = 1
MAX_HOPS = 4  # a stored weight reaches its layer through at most DENSIFY and DEQUANTIZE
# Decoded entries per byte of file over all layers, and the entries that an operator counts for. A file that needs more
# refers to the same bytes again and again, which could take memory and time out of all proportion to its size.
BUDGET, OPERATOR_COST = 8, 64
MAX_NAME, MAX_SKIPPED = 200, 100


@dataclass(frozen=True)
class TfliteLayer:
    """A 1x1 convolution or fully connected layer: y = act(W @ x + b) with W of shape (O, I).

    ``columns`` is the number of output positions of one image (or of input rows, for a fully connected layer), None
    where the file leaves it open.  ``encoded`` says that the file stores the weights sparsely.
    """

    name: str
    kind: str
    weight: SparseMatrix
    bias: NDArray[np.float32] | None
    stride: tuple[int, int]
    columns: int | None
    activation: str
    encoded: bool


@dataclass(frozen=True, eq=False)
class Entries:
    """The stored entries of a tensor: one index array per dimension, in the order in which values are stored.

    ``nodes`` counts the tree's nodes at all levels, which is what decoding costs.
    """

    places: list[NDArray[np.int64]]
    stored: int
    nodes: int


def read_layers(data: bytes, where: str) -> tuple[list[TfliteLayer], list[str]]:
    """Every 1x1 convolution and fully connected layer with constant float weights, in execution order.

    Also returns why each layer that looks like one was left out (grouped, quantised, not constant).

    Raises:
        FormatError, ValueRangeError: the file is damaged; ``where`` and the layer's name are in the message.
    """
    root = Table.root(data, where)
    if data[4:8] not in (b"TFL3", b"\0\0\0\0"):
        raise FormatError("this is not a TensorFlow Lite file (no TFL3 mark)", where=where)
    reader = _Reader(root, where)
    layers: list[TfliteLayer] = []
    for graph in root.tables(2):
        layers += _Graph(reader, graph).layers()
    return layers, reader.skipped


class _Skip(Exception):
    """This operator is not a layer that can be read; the argument says why."""


class _Reader:
    """What all subgraphs of a file share: operator codes, buffers, names already given, and the budget of entries."""

    def __init__(self, root: Table, where: str) -> None:
        self.where = where
        self.buffers: Tables = root.tables(4)
        # Old files have a signed byte (field 0), new ones a 32-bit code (field 3); the larger of the two is meant.
        self.codes = [max(code.scalar(0, "b"), code.scalar(3, "i")) for code in root.tables(1)]
        self.size = len(root.data)
        self.budget = BUDGET * self.size
        self.names: dict[str, int] = {}
        self.skipped: list[str] = []

    def spend(self, entries: int) -> None:
        self.budget -= entries
        if self.budget < 0:
            raise FormatError(f"operators and weights claim more than {BUDGET} entries per byte", where=self.where,
                              hint="The file is damaged or made to exhaust memory.")  # fmt: skip

    def skip(self, name: str, reason: str) -> None:
        if len(self.skipped) < MAX_SKIPPED:
            self.skipped.append(f"{name or 'a layer'}: {reason}")

    def unique(self, name: str) -> str:
        """``name``, with a counter appended when an earlier layer has it."""
        count = self.names[name] = self.names.get(name, 0) + 1
        return name if count == 1 else f"{name}#{count}"

    def buffer(self, index: int) -> memoryview:
        """The bytes of a buffer: inside the FlatBuffer, or (files over 2 GiB) at an offset from the file's start."""
        table = self.buffers[index]
        inline = table.array(0, "u1")
        if inline.size:
            return inline.data
        offset, size = table.scalar(1, "Q"), table.scalar(2, "Q")
        if offset > 1 and (offset > self.size or size > self.size - offset):
            raise FormatError(f"buffer {index} has {size} bytes at {offset} of {self.size}", where=self.where)
        return memoryview(table.data)[offset : offset + size] if offset > 1 else memoryview(b"")


class _Graph:
    """One subgraph: its tensors, and which operators made them out of which."""

    def __init__(self, reader: _Reader, table: Table) -> None:
        self.reader = reader
        self.tensors = table.tables(0)
        self.operators = table.tables(3)
        self._weights: dict[int, tuple[SparseMatrix, bool]] = {}

    def layers(self) -> Iterator[TfliteLayer]:
        for code, operator in self._coded:
            if code in (CONV_2D, FULLY_CONNECTED):
                name = ""
                try:
                    name = self._name(operator)
                    layer = self._layer(code, operator, name)
                except _Skip as reason:
                    self.reader.skip(name, str(reason))
                except SparseRTError as error:
                    place = f"{self.reader.where}: {name}"
                    if not name or error.where.startswith(place):
                        raise
                    raise type(error)(error.what, where=place, hint=error.hint) from None
                else:
                    yield layer

    @cached_property
    def _coded(self) -> list[tuple[int, Table]]:
        codes = self.reader.codes
        coded = []
        for operator in self.operators:
            self.reader.spend(OPERATOR_COST)
            index = operator.scalar(0, "I")
            if index >= len(codes):
                raise FormatError(f"operator code {index} of {len(codes)} is referred to", where=self.reader.where)
            coded.append((codes[index], operator))
        return coded

    @cached_property
    def _source(self) -> dict[int, int]:
        """Output tensor -> input tensor of every DENSIFY and DEQUANTIZE."""
        source = {}
        for code, operator in self._coded:
            if code in (DENSIFY, DEQUANTIZE):
                inputs, outputs = operator.array(1, "<i4"), operator.array(2, "<i4")
                if inputs.size and outputs.size:
                    source[int(outputs[0])] = int(inputs[0])
        return source

    def _name(self, operator: Table) -> str:
        """A layer goes by its stored weight tensor: ``block/conv2d_3/Conv2D``."""
        inputs = operator.array(1, "<i4")
        if inputs.size < 2:
            raise _Skip("it has no weight input")
        text = self._stored(int(inputs[1])).text(3)
        return re.sub(r"_dequantize\d*$", "", text.rsplit(";", 1)[-1])[-MAX_NAME:] or "layer"

    def _stored(self, index: int) -> Table:
        """The stored tensor behind ``index``, through DENSIFY and DEQUANTIZE."""
        for _ in range(MAX_HOPS):
            if index not in self._source:
                return self.tensors[index]
            index = self._source[index]
        raise FormatError("a DENSIFY or DEQUANTIZE operator feeds itself", where=self.reader.where)

    def _layer(self, code: int, operator: Table, name: str) -> TfliteLayer:
        inputs, outputs = operator.array(1, "<i4"), operator.array(2, "<i4")
        stored = self._stored(int(inputs[1]))
        shape = _shape(stored)
        options = operator.table(4) if operator.scalar(3, "B") in (CONV_2D_OPTIONS, FULLY_CONNECTED_OPTIONS) else None
        stride, activation = (1, 1), options.scalar(0, "b") if options else 0
        if code == CONV_2D:
            if len(shape) != 4 or shape[1:3] != (1, 1):
                raise _Skip(f"its filter is {'x'.join(map(str, shape[1:3]))}, not 1x1")
            if options:
                stride, activation = (options.scalar(2, "i", 1), options.scalar(1, "i", 1)), options.scalar(3, "b")
            channels = _shape(self.tensors[int(inputs[0])])
            if len(channels) == 4 and channels[3] > 0 and channels[3] != shape[3]:
                raise _Skip("it is a grouped convolution")
        elif len(shape) != 2 or (options is not None and options.scalar(1, "b") != 0):
            raise _Skip("its weights are shuffled or not a matrix")
        where = f"{self.reader.where}: {name}"
        weight, encoded = self._weight(stored, (shape[0], shape[-1]), shape, where)
        result = _shape(self.tensors[int(outputs[0])]) if outputs.size else ()
        places = result[1:-1] if code == CONV_2D else result[:-1]
        return TfliteLayer(
            self.reader.unique(name), "conv 1x1" if code == CONV_2D else "fully connected", weight,
            self._bias(int(inputs[2]), shape[0], where) if inputs.size > 2 and inputs[2] >= 0 else None,
            stride, math.prod(places) if places and min(places) > 0 else None,
            ACTIVATIONS.get(activation, f"activation {activation}"), encoded,
        )  # fmt: skip

    def _bias(self, index: int, rows: int, where: str) -> NDArray[np.float32] | None:
        values = self._floats(self._stored(index))
        if values is None:
            raise _Skip("its bias is not a float constant")
        if values.size != rows:
            raise FormatError(f"{values.size} bias values for {rows} outputs")
        self.reader.spend(rows)
        bias = values.astype(np.float32)
        require_finite(bias, f"{where}: bias")
        return bias

    def _floats(self, tensor: Table) -> NDArray[Any] | None:
        """The stored numbers of a tensor, flat; None when it is no constant or no float tensor."""
        dtype = FLOATS.get(tensor.scalar(1, "b"))
        raw = self.reader.buffer(tensor.scalar(2, "I"))
        if dtype is None or not len(raw):
            return None
        if len(raw) % np.dtype(dtype).itemsize:
            raise FormatError(f"{len(raw)} bytes are not a whole number of {dtype[1:]} values")
        return np.frombuffer(raw, dtype)

    def _weight(
        self, tensor: Table, extents: tuple[int, int], shape: tuple[int, ...], where: str
    ) -> tuple[SparseMatrix, bool]:
        """The (O, I) matrix of a stored tensor, and whether it is stored sparsely."""
        key = tensor.position
        if key in self._weights:
            return self._weights[key]
        values = self._floats(tensor)
        if values is None:
            raise _Skip("its weights are quantised or not constant")
        if min(shape) < 0 or max(shape) > self.reader.size:
            raise FormatError(f"shape {shape} in a file of {self.reader.size} bytes", where=where)
        sparsity = tensor.table(6)
        if sparsity is None:
            if values.size != math.prod(shape):
                raise FormatError(f"{values.size} values for shape {shape}", where=where)
            self.reader.spend(values.size + extents[0])
            matrix = as_sparse(values.reshape(extents), where)
        else:
            entries = decode(sparsity, shape, self.reader.size)
            if entries.stored != values.size:
                raise FormatError(f"{values.size} values for {entries.stored} stored places", where=where)
            self.reader.spend(entries.nodes + extents[0])
            matrix = _matrix(entries, values, extents, where)
        self._weights[key] = matrix, sparsity is not None
        return self._weights[key]


def decode(sparsity: Table, shape: tuple[int, ...], limit: int) -> Entries:
    """The index of every stored entry of a sparse tensor.

    Args:
        sparsity: the tensor's ``SparsityParameters``.
        shape: the dense shape.
        limit: the most tree nodes worth having at a level (the size of the file: each needs a byte of it).
    """
    order = [int(n) for n in sparsity.array(0, "<i4")[:64]]
    block_map = [int(n) for n in sparsity.array(1, "<i4")[:64]]
    levels = sparsity.tables(2)
    rank = len(shape)
    if sorted(order) != list(range(rank + len(block_map))) or len(levels) != len(order):
        raise FormatError(f"traversal order {order} with {len(block_map)} blocked dimensions and {len(levels)} levels "
                          f"does not fit a tensor of rank {rank}")  # fmt: skip
    if any(not 0 <= n < rank for n in block_map) or len(set(block_map)) != len(block_map):
        raise FormatError(f"block map {block_map} does not name dimensions of a tensor of rank {rank}")
    extent = list(shape) + [1] * len(block_map)  # of each level's index, blocked dimensions counted in blocks
    for block, dimension in enumerate(block_map):
        size = levels[order.index(rank + block)].scalar(1, "i")
        if size < 1 or shape[dimension] % size:
            raise FormatError(f"blocks of {size} do not tile {shape[dimension]}")
        extent[rank + block], extent[dimension] = size, shape[dimension] // size
    index: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * len(order)  # by dimension, of the nodes so far
    nodes, total = 1, 0
    done: list[int] = []
    for dimension, level in zip(order, levels, strict=True):
        if level.scalar(0, "b") == SPARSE_CSR:
            counts, below = _sparse_level(level, nodes, extent[dimension])
        else:
            size = level.scalar(1, "i")
            if size != extent[dimension]:
                raise FormatError(f"a dense level of {size} for an extent of {extent[dimension]}")
            if nodes * size > limit:
                raise FormatError(f"{nodes * size} entries are claimed in a file of {limit} bytes")
            counts, below = np.full(nodes, size), np.tile(np.arange(size, dtype=np.int64), nodes)
        for earlier in done:
            index[earlier] = np.repeat(index[earlier], counts)
        index[dimension], nodes, total = below, below.size, total + below.size
        done.append(dimension)
    for block, dimension in enumerate(block_map):
        index[dimension] = index[dimension] * extent[rank + block] + index[rank + block]
    return Entries(index[:rank], nodes, total)


def _sparse_level(level: Table, nodes: int, extent: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many entries each of ``nodes`` parents has at a SPARSE_CSR level, and their indices."""
    segments, indices = _index_vector(level, 2), _index_vector(level, 4)
    counts = np.diff(segments)
    if segments.size != nodes + 1 or segments[0] != 0 or np.any(counts < 0) or segments[-1] != indices.size:
        raise FormatError(f"{segments.size} segments do not divide {indices.size} indices among {nodes} parents")
    if indices.size and (indices.min() < 0 or indices.max() >= extent):
        raise FormatError(f"indices reach outside 0..{extent - 1}")
    return counts, indices


def _index_vector(level: Table, field: int) -> NDArray[np.int64]:
    """The vector of a union of Int32Vector, Uint16Vector and Uint8Vector."""
    kind, table = level.scalar(field, "B"), level.table(field + 1)
    if kind not in INDEX_TYPES or table is None:
        raise FormatError(f"a sparse level has no index vector of a known type (type {kind})")
    return table.array(0, INDEX_TYPES[kind]).astype(np.int64)


def _matrix(entries: Entries, values: NDArray[Any], extents: tuple[int, int], where: str) -> SparseMatrix:
    """Entries in storage order as a CSR matrix."""
    rows, cols = extents
    key = entries.places[0] * max(cols, 1) + entries.places[-1]
    if np.any(np.diff(key) <= 0):  # a traversal order that is not by rows, or blocks
        order = np.argsort(key, kind="stable")
        key, values = key[order], values[order]
        if np.any(np.diff(key) == 0):
            raise FormatError("an entry is stored twice", where=where)
    row_of, columns = np.divmod(key, max(cols, 1))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))]).astype(np.int64)
    return from_csr(values, columns, indptr, extents, where)


def _shape(tensor: Table) -> tuple[int, ...]:
    return tuple(int(n) for n in tensor.array(0, "<i4")[:8])
