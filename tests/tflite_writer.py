"""Small .tflite files for tests: a FlatBuffer writer, a sparse encoder in plain Python, networks of given layers."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

DTYPE_CODES = {"float32": 0, "float16": 1, "int32": 2, "uint8": 3, "int8": 9}
VECTOR_CODES = {"int32": 1, "uint16": 2, "uint8": 3}
CONV_2D, DEQUANTIZE, FULLY_CONNECTED, DENSIFY = 3, 6, 9, 124


class Number(NamedTuple):
    """An inline field: struct letter and value."""

    code: str
    value: int


class Raw(NamedTuple):
    """A field that is an offset to whatever; ``value`` is written as it is (for damaged files)."""

    value: int


Fields = dict[int, Any]  # field id -> Number, Raw, str, bytes, ndarray, Fields (a table) or list[Fields]


def flatbuffer(root: Fields, mark: bytes = b"TFL3") -> bytes:
    """A FlatBuffer: parents come before children, so all offsets point forward."""
    out = bytearray(struct.pack("<I", 0) + mark)
    struct.pack_into("<I", out, 0, _table(out, root))
    return bytes(out)


def _pad(out: bytearray, size: int) -> None:
    out.extend(bytes(-len(out) % size))


def _table(out: bytearray, fields: Fields) -> int:
    count = max(fields, default=-1) + 1
    body, places = bytearray(4), {}
    for field, value in fields.items():
        code = value.code if isinstance(value, Number) else "I"
        _pad(body, struct.calcsize(code))
        places[field] = len(body)
        body += struct.pack("<" + code, value.value if isinstance(value, (Number, Raw)) else 0)
    _pad(out, 8)
    vtable = len(out)
    out += struct.pack("<HH", 4 + 2 * count, len(body))
    out += b"".join(struct.pack("<H", places.get(field, 0)) for field in range(count))
    _pad(out, 8)
    start = len(out)
    struct.pack_into("<i", body, 0, start - vtable)
    out += body
    for field, value in fields.items():
        if not isinstance(value, (Number, Raw)):
            place = start + places[field]
            struct.pack_into("<I", out, place, _child(out, value) - place)
    return start


def _child(out: bytearray, value: Any) -> int:
    if isinstance(value, dict):
        return _table(out, value)
    _pad(out, 8)
    out += bytes(4)  # the elements after the count lie at multiples of eight
    start = len(out)
    if isinstance(value, list):
        out += struct.pack("<I", len(value)) + bytes(4 * len(value))
        written: dict[int, int] = {}  # an object that is listed twice is stored once
        for number, entry in enumerate(value):
            place = start + 4 + 4 * number
            if id(entry) not in written:
                written[id(entry)] = _table(out, entry)
            struct.pack_into("<I", out, place, written[id(entry)] - place)
    else:
        data = value.encode() if isinstance(value, str) else value
        length = len(data) if isinstance(data, bytes) else data.size
        out += struct.pack("<I", length) + (data if isinstance(data, bytes) else data.tobytes()) + b"\0"
    return start


def encode(
    dense: np.ndarray,
    mask: np.ndarray,
    order: Sequence[int],
    sparse: Sequence[bool],
    blocks: Sequence[tuple[int, int]] = (),
    index_type: str = "int32",
) -> tuple[Fields, np.ndarray]:
    """``SparsityParameters`` and stored values of ``dense`` where ``mask``, level by level in plain Python.

    Args:
        order: traversal order over the dimensions, blocked ones counted after the others.
        sparse: for each level whether it is SPARSE_CSR.
        blocks: (dimension, block size) pairs.
    """
    rank, sizes = dense.ndim, dict(blocks)
    split: list[int] = []
    axes: list[int] = []  # in dimension order, then blocks: which axis of the split array
    for dimension, extent in enumerate(dense.shape):
        axes.append(len(split))
        split += [extent // sizes[dimension], sizes[dimension]] if dimension in sizes else [extent]
    axes += [axes[dimension] + 1 for dimension, _ in blocks]
    turned = [axes[n] for n in order]
    values, stored = dense.reshape(split).transpose(turned), mask.reshape(split).transpose(turned)
    nodes: list[tuple[int, ...]] = [()]
    levels: list[Fields] = []
    for level, extent in enumerate(values.shape):
        if not sparse[level]:
            levels.append({0: Number("b", 0), 1: Number("i", extent)})
            nodes = [(*node, i) for node in nodes for i in range(extent)]
            continue
        segments, below = [0], []
        for node in nodes:
            below += [(*node, i) for i in range(extent) if stored[(*node, i)].any()]
            segments.append(len(below))
        kinds = [{0: np.array(v, index_type)} for v in (segments, [node[-1] for node in below])]
        code = Number("B", VECTOR_CODES[index_type])

        levels.append({0: Number("b", 1), 1: Number("i", extent), 2: code, 3: kinds[0], 4: code, 5: kinds[1]})
        nodes = below
    assert len(order) == rank + len(blocks)
    parameters: Fields = {0: np.array(order, "int32"), 2: levels}
    if blocks:
        parameters[1] = np.array([dimension for dimension, _ in blocks], "int32")
    return parameters, np.array([values[node] for node in nodes], dense.dtype)


class Network:
    """A model of one subgraph, grown tensor by tensor and operator by operator."""

    def __init__(self) -> None:
        self.tensors: list[Fields] = []
        self.operators: list[Fields] = []
        self.buffers: list[Fields] = [{}]
        self.codes = [CONV_2D, DEQUANTIZE, FULLY_CONNECTED, DENSIFY, 4]

    def tensor(
        self, name: str, shape: Sequence[int], dtype: str = "float32", data: np.ndarray | None = None,
        sparsity: Fields | None = None,
    ) -> int:  # fmt: skip
        buffer = 0
        if data is not None:
            buffer = len(self.buffers)
            self.buffers.append({0: data.tobytes()})
        fields: Fields = {
            0: np.array(shape, "int32"),
            1: Number("b", DTYPE_CODES[dtype]),
            2: Number("I", buffer),
            3: name,
        }
        if sparsity is not None:
            fields[6] = sparsity
        self.tensors.append(fields)
        return len(self.tensors) - 1

    def operator(
        self, code: int, inputs: Sequence[int], outputs: Sequence[int], options: tuple[int, Fields] | None = None
    ) -> None:
        fields: Fields = {
            0: Number("I", self.codes.index(code)),
            1: np.array(inputs, "int32"),
            2: np.array(outputs, "int32"),
        }
        if options is not None:
            fields[3], fields[4] = Number("B", options[0]), options[1]
        self.operators.append(fields)

    def through(self, code: int, tensor: int) -> int:
        """The output of a DENSIFY or DEQUANTIZE."""
        shape = self.tensors[tensor][0]
        made = self.tensor(f"{self.tensors[tensor][3]}_{code}", shape, "float32" if code == DEQUANTIZE else "float16")
        self.operator(code, [tensor], [made])
        return made

    def conv(
        self, name: str, weight: np.ndarray, mask: np.ndarray, bias: np.ndarray | None = None, *, size: int = 4,
        stride: int = 1, activation: int = 0, index_type: str = "uint8",
    ) -> None:  # fmt: skip
        """A 1x1 convolution with weights (O, I), stored sparsely (order O, ky, kx, I; the last level compressed)."""
        rows, cols = weight.shape
        parameters, values = encode(
            weight.reshape(rows, 1, 1, cols), mask.reshape(rows, 1, 1, cols), range(4), [False] * 3 + [True],
            index_type=index_type,
        )  # fmt: skip
        stored = self.tensor(f"fused;{name}_dequantize", (rows, 1, 1, cols), str(weight.dtype), values, parameters)
        chain = self.through(DENSIFY, stored)
        if weight.dtype == np.float16:
            chain = self.through(DEQUANTIZE, chain)
        inputs = [self.tensor("x", (1, size * stride, size * stride, cols)), chain]
        if bias is not None:
            made = self.tensor("b", (rows,), str(bias.dtype), bias)
            inputs.append(self.through(DEQUANTIZE, made) if bias.dtype == np.float16 else made)
        options = {1: Number("i", stride), 2: Number("i", stride), 3: Number("b", activation)}
        self.operator(CONV_2D, inputs, [self.tensor("y", (1, size, size, rows))], (1, options))

    def fields(self) -> Fields:
        graph = {0: self.tensors, 3: self.operators}
        codes = [{0: Number("b", code), 3: Number("i", code)} for code in self.codes]
        return {0: Number("I", 3), 1: codes, 2: [graph], 4: self.buffers}

    def pack(self) -> bytes:
        return flatbuffer(self.fields())
