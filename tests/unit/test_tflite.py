"""Sparse tensors and pruned layers of .tflite files: an encoder in plain Python, the schema package, ONNX twins."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsert.errors import FormatError, SparseRTError, ValueRangeError
from sparsert.frontend import tflite as reader
from sparsert.frontend.flatbuffer import Table
from sparsert.frontend.tflite import TfliteLayer, decode, read_layers
from sparsert.frontend.weights import load_layers, pick
from tflite_writer import CONV_2D, DENSIFY, FULLY_CONNECTED, Fields, Network, Number, Raw, encode, flatbuffer

# name in the data folder: its ONNX twin, layers stored sparsely, all 1x1 layers, sparsity of the large ones
NETS = {
    "pose_detection.tflite": ("pose_detection_75.onnx", 38, 44, 0.75),
    "face_detection_full_range_sparse.tflite": ("face_detection_full_range_70.onnx", 46, 48, 0.70),
}


def densify(parameters: Fields, values: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """What ``decode`` makes of encoded parameters: the dense tensor, and the mask of stored places."""
    entries = decode(Table.root(flatbuffer(parameters), "test"), shape, 2**20)
    assert entries.stored == values.size
    dense, mask = np.zeros(shape, values.dtype), np.zeros(shape, bool)
    dense[tuple(entries.places)] = values
    mask[tuple(entries.places)] = True
    return dense, mask


def pruned(rng: np.random.Generator, shape: tuple[int, ...], density: float = 0.3, dtype: str = "float32") -> Any:
    mask = rng.random(shape) < density
    return np.where(mask, rng.standard_normal(shape), 0).astype(dtype), mask


# -- the sparse encoding


@given(st.data())
def test_decode_any_order_blocks_and_levels(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 4), label="rank")
    blocked = data.draw(st.lists(st.integers(0, rank - 1), unique=True, max_size=2), label="blocked")
    blocks = [(dimension, data.draw(st.integers(1, 3))) for dimension in blocked]
    shape = tuple(data.draw(st.integers(1, 4)) * dict(blocks).get(n, 1) for n in range(rank))
    order = data.draw(st.permutations(range(rank + len(blocks))), label="order")
    sparse = data.draw(st.lists(st.booleans(), min_size=len(order), max_size=len(order)), label="sparse levels")
    index_type = data.draw(st.sampled_from(["int32", "uint16"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    dense, mask = pruned(rng, shape)
    parameters, values = encode(dense, mask, order, sparse, blocks, index_type)
    got, stored = densify(parameters, values, shape)
    np.testing.assert_array_equal(got, dense)
    assert not np.any(mask & ~stored)
    if sparse[-1]:  # nothing but what the mask asks for is a leaf
        np.testing.assert_array_equal(stored, mask)


def test_index_vectors_of_every_type(rng: np.random.Generator) -> None:
    for index_type in ("int32", "uint16", "uint8"):
        dense, mask = pruned(rng, (6, 40))
        parameters, values = encode(dense, mask, [0, 1], [False, True], index_type=index_type)
        np.testing.assert_array_equal(densify(parameters, values, dense.shape)[0], dense)


def test_explicit_zeros_belong_to_the_pattern() -> None:
    net = Network()
    weight = np.array([[0.0, 2.0], [0.0, 0.0]], np.float32)
    net.conv("conv", weight, np.array([[True, True], [False, True]]))
    (layer,), _ = read_layers(net.pack(), "net.tflite")
    assert layer.weight.pattern.indices.tolist() == [0, 1, 1]
    assert layer.weight.values.tolist() == [0.0, 2.0, 0.0]


# -- layers


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("index_type", ["uint8", "uint16", "int32"])
def test_conv_layer(rng: np.random.Generator, dtype: str, index_type: str, tmp_path: Path) -> None:
    net = Network()
    weight, mask = pruned(rng, (12, 20), dtype=dtype)
    bias = rng.standard_normal(12).astype(dtype)
    net.conv("block/conv_1/Conv2D", weight, mask, bias, size=5, stride=2, activation=3, index_type=index_type)
    net.conv("block/conv_1/Conv2D", weight, mask, size=3)
    (layer, again), skipped = read_layers(net.pack(), "net.tflite")
    assert not skipped
    assert (layer.name, again.name) == ("block/conv_1/Conv2D", "block/conv_1/Conv2D#2")
    assert (layer.kind, layer.stride, layer.columns, layer.activation) == ("conv 1x1", (2, 2), 25, "relu6")
    assert layer.encoded
    assert layer.bias is not None
    assert layer.bias.dtype == np.float32
    np.testing.assert_array_equal(layer.bias, bias.astype(np.float32))
    np.testing.assert_array_equal(layer.weight.to_dense(), weight.astype(np.float32))
    assert layer.weight.pattern.nnz == mask.sum()
    assert again.bias is None
    assert again.columns == 9
    path = tmp_path / "net.tflite"
    path.write_bytes(net.pack())
    first, second = load_layers(path)
    assert (first.note, first.columns, first.activation) == ("stride 2x2", 25, ("clip", 0.0, 6.0))
    assert (second.note, second.columns, second.activation) == ("", 9, None)


def test_fully_connected_and_dense_storage(rng: np.random.Generator, tmp_path: Path) -> None:
    net = Network()
    weight, _ = pruned(rng, (6, 9))
    for name, matrix in (("half", weight), ("full", weight + 1)):
        stored = net.tensor(name, matrix.shape, "float32", matrix)
        net.operator(FULLY_CONNECTED, [net.tensor("x", (3, 9)), stored, -1], [net.tensor("y", (3, 6))])
    layers, _ = read_layers(net.pack(), "net.tflite")
    assert [(c.name, c.kind, c.columns, c.encoded) for c in layers] == [
        ("half", "fully connected", 3, False),
        ("full", "fully connected", 3, False),
    ]
    path = tmp_path / "net.tflite"
    path.write_bytes(net.pack())
    (loaded,) = load_layers(path)  # the one that is pruned
    assert (loaded.name, loaded.note) == ("half", "fully connected")
    np.testing.assert_array_equal(loaded.weight.to_dense(), weight)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["net/a/Conv2D", "net/b/Conv2D1"], ["a", "b"]),
        (["net/a/Conv2D", "net/a/Conv2D1"], ["net/a/Conv2D", "net/a/Conv2D1"]),
        (["net/a/x", "net/b/MatMul", "other"], ["net/a/x", "net/b", "other"]),
        (["a", "a#2"], ["a", "a#2"]),
        (["net/only"], ["net/only"]),
    ],
)
def test_names_are_short_and_unique(names: list[str], short: list[str], tmp_path: Path) -> None:
    net = Network()
    for name in names:
        net.conv(name, np.eye(2, dtype=np.float32), np.eye(2, dtype=bool))
    path = tmp_path / "net.tflite"
    path.write_bytes(net.pack())
    assert [layer.name for layer in load_layers(path)] == short


def test_what_is_left_out_is_listed(rng: np.random.Generator) -> None:
    net = Network()
    kernel = rng.standard_normal((4, 3, 3, 2)).astype(np.float32)
    net.operator(CONV_2D, [net.tensor("x", (1, 8, 8, 2)), net.tensor("three", kernel.shape, "float32", kernel)], [])
    group = rng.standard_normal((4, 1, 1, 2)).astype(np.float32)
    net.operator(CONV_2D, [net.tensor("x", (1, 8, 8, 4)), net.tensor("group", group.shape, "float32", group)], [])
    net.operator(FULLY_CONNECTED, [net.tensor("x", (1, 2)), net.tensor("int8", (4, 2), "int8", np.ones(8, "int8"))], [])
    net.operator(FULLY_CONNECTED, [net.tensor("x", (1, 2)), net.tensor("computed", (4, 2))], [])
    layers, skipped = read_layers(net.pack(), "net.tflite")
    assert not layers
    assert [text.split(":")[0] for text in skipped] == ["three", "group", "int8", "computed"]
    assert "3x3" in skipped[0]
    assert "grouped" in skipped[1]


def test_buffer_outside_the_flatbuffer(rng: np.random.Generator) -> None:
    """Files over 2 GiB keep data behind the FlatBuffer, at an offset from the file's start."""
    net = Network()
    weight = rng.standard_normal((4, 2)).astype(np.float32)
    stored = net.tensor("w", weight.shape, "float32", weight)
    net.operator(FULLY_CONNECTED, [net.tensor("x", (1, 2)), stored], [net.tensor("y", (1, 4))])
    size = len(net.pack()) + 64
    net.buffers[1] = {1: Number("Q", size), 2: Number("Q", weight.nbytes)}
    packed = net.pack().ljust(size, b"\0")
    (layer,), _ = read_layers(packed + weight.tobytes(), "net.tflite")
    np.testing.assert_array_equal(layer.weight.to_dense(), weight)
    with pytest.raises(FormatError, match="buffer 1"):
        read_layers(packed + weight.tobytes()[:-1], "net.tflite")


# -- damaged files


def small_net(change: Callable[[Network, Fields], None]) -> bytes:
    """A net of one layer (2, 4) after ``change`` of it and of its sparsity parameters."""
    net = Network()
    net.conv("conv", np.arange(8, dtype=np.float32).reshape(2, 4), np.arange(8).reshape(2, 4) % 3 == 1)
    change(net, net.tensors[0][6])
    return net.pack()


def set_level(number: int, field: int, value: Any) -> Callable[[Network, Fields], None]:
    def change(net: Network, sparsity: Fields) -> None:
        sparsity[2][number][field] = value

    return change


def set_sparsity(field: int, value: Any) -> Callable[[Network, Fields], None]:
    def change(net: Network, sparsity: Fields) -> None:
        sparsity[field] = value

    return change


def set_tensor(field: int, value: Any) -> Callable[[Network, Fields], None]:
    def change(net: Network, sparsity: Fields) -> None:
        net.tensors[0][field] = value

    return change


def add_bias(net: Network, size: int) -> None:
    net.operators[-1][1] = int32(2, 1, net.tensor("b", (size,), "float32", np.ones(size, np.float32)))


def int32(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


DAMAGE: dict[str, tuple[Callable[[Network, Fields], None], str]] = {
    "column outside": (set_level(3, 5, {0: np.array([1, 4, 3], "uint8")}), "outside 0..3"),
    "segments shrink": (set_level(3, 3, {0: np.array([0, 3, 2], "uint8")}), "segments"),
    "segments too few": (set_level(3, 3, {0: np.array([0, 3], "uint8")}), "segments"),
    "segments absent": (set_level(3, 3, {}), "segments"),
    "index type unknown": (set_level(3, 4, Number("B", 9)), "type 9"),
    "dense level too large": (set_level(0, 1, Number("i", 2**30)), "extent of 2"),
    "dense level negative": (set_level(0, 1, Number("i", -1)), "extent of 2"),
    "order repeats": (set_sparsity(0, int32(0, 1, 1, 3)), "traversal order"),
    "order too long": (set_sparsity(0, int32(0, 1, 2, 3, 4)), "traversal order"),
    "levels missing": (set_sparsity(2, []), "traversal order"),
    "block map outside": (set_sparsity(1, int32(7)), "traversal order"),
    "values missing": (lambda net, _: net.buffers.__setitem__(1, {0: bytes(8)}), "2 values for 3"),
    "values cut": (lambda net, _: net.buffers.__setitem__(1, {0: bytes(11)}), "whole number"),
    "shape huge": (set_tensor(0, int32(2**31 - 1, 1, 1, 4)), "shape"),
    "shape negative": (set_tensor(0, int32(-2, 1, 1, 4)), "shape"),
    "entry twice": (set_level(3, 5, {0: np.array([1, 3, 3], "uint8")}), "stored twice"),
    "buffer unknown": (set_tensor(2, Number("I", 99)), "entry 99"),
    "offset outside": (set_tensor(6, Raw(2**31)), "points to byte"),
    "offset wraps": (set_tensor(6, Raw(2**32 - 1)), "points to byte"),
    "operator code unknown": (lambda net, _: net.operators[0].__setitem__(0, Number("I", 77)), "operator code 77"),
    "weight tensor unknown": (lambda net, _: net.operators[-1].__setitem__(1, int32(0, 1000)), "entry 1000"),
    "densify cycle": (lambda net, _: net.operator(DENSIFY, [1], [0]), "feeds itself"),
    "bias too long": (lambda net, _: add_bias(net, 3), "3 bias values for 2"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_a_format_error_with_place(kind: str, tmp_path: Path) -> None:
    change, words = DAMAGE[kind]
    path = tmp_path / "net.tflite"
    path.write_bytes(small_net(lambda *_: None))
    load_layers(path)
    path.write_bytes(small_net(change))
    with pytest.raises(FormatError, match=words) as caught:
        load_layers(path)
    assert str(path) in caught.value.where


def test_the_layer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "net.tflite"
    path.write_bytes(small_net(set_level(3, 5, {0: np.array([1, 4, 3], "uint8")})))
    with pytest.raises(FormatError) as caught:
        load_layers(path)
    assert caught.value.where == f"{path}: conv"


def test_blocks_must_tile() -> None:
    dense, mask = np.ones((4, 4), np.float32), np.ones((4, 4), bool)
    parameters, _ = encode(dense, mask, [0, 1, 2], [False] * 3, [(0, 2)])
    parameters[2][2][1] = Number("i", 3)
    with pytest.raises(FormatError, match="blocks of 3"):
        decode(Table.root(flatbuffer(parameters), "test"), (4, 4), 1000)
    parameters[1] = int32(5)
    with pytest.raises(FormatError, match="block map"):
        decode(Table.root(flatbuffer(parameters), "test"), (4, 4), 1000)


def test_non_finite_weights_name_their_layer() -> None:
    net = Network()
    net.conv("nan", np.full((2, 2), np.nan, np.float32), np.ones((2, 2), bool))
    with pytest.raises(ValueRangeError) as caught:
        read_layers(net.pack(), "net.tflite")
    assert caught.value.where == "net.tflite: nan"
    net = Network()
    net.conv("net", np.ones((2, 2), np.float32), np.ones((2, 2), bool), np.array([1, np.inf], np.float32))
    with pytest.raises(ValueRangeError) as caught:
        read_layers(net.pack(), "net.tflite")
    assert caught.value.where == "net.tflite: net: bias"


@pytest.mark.parametrize("part", ["operators", "graphs"])
def test_the_same_bytes_may_not_be_claimed_again_and_again(part: str) -> None:
    """Thousands of list entries that lead to one table would cost memory and time out of proportion to the file."""
    net = Network()
    net.conv("conv", np.ones((8, 8), np.float32), np.ones((8, 8), bool))
    fields = net.fields()
    read_layers(flatbuffer(fields), "net.tflite")
    if part == "operators":
        net.operators += net.operators[-1:] * 50_000
    else:
        fields[2] *= 10_000
    with pytest.raises(FormatError, match="entries per byte"):
        read_layers(flatbuffer(fields), "net.tflite")


@pytest.mark.parametrize("text", [b"", b"TFL3", b"\0" * 64, b"PK\x03\x04" + b"\0" * 60, b"\xff" * 64])
def test_no_flatbuffer(text: bytes) -> None:
    with pytest.raises(FormatError):
        read_layers(text, "net.tflite")


# -- beside other readers


def test_schema_numbers_are_those_of_the_schema_package() -> None:
    tflite = pytest.importorskip("tflite")
    operators, options, types = tflite.BuiltinOperator, tflite.BuiltinOptions, tflite.TensorType
    assert (reader.CONV_2D, reader.DEQUANTIZE) == (operators.CONV_2D, operators.DEQUANTIZE)
    assert (reader.FULLY_CONNECTED, reader.DENSIFY) == (operators.FULLY_CONNECTED, operators.DENSIFY)
    assert reader.CONV_2D_OPTIONS == options.Conv2DOptions
    assert reader.FULLY_CONNECTED_OPTIONS == options.FullyConnectedOptions
    assert {types.FLOAT32: "<f4", types.FLOAT16: "<f2"} == reader.FLOATS
    vectors = tflite.SparseIndexVector
    assert {vectors.Int32Vector: "<i4", vectors.Uint16Vector: "<u2", vectors.Uint8Vector: "u1"} == reader.INDEX_TYPES
    assert tflite.DimensionType.SPARSE_CSR == reader.SPARSE_CSR
    names = {code: name.upper() for code, name in reader.ACTIVATIONS.items() if name}
    named = {getattr(tflite.ActivationFunctionType, name): name for name in names.values() if name != "SIGN_BIT"}
    assert named.items() <= names.items()


def test_our_files_read_back_through_the_schema_package(rng: np.random.Generator) -> None:
    """The writer of these tests and the reader agree with the generated classes on every field they use."""
    tflite = pytest.importorskip("tflite")
    net = Network()
    weight, mask = pruned(rng, (5, 7), dtype="float16")
    net.conv("conv", weight, mask, size=3, stride=2, activation=1)
    model = tflite.Model.GetRootAs(net.pack(), 0)
    graph = model.Subgraphs(0)
    operator = graph.Operators(graph.OperatorsLength() - 1)
    assert model.OperatorCodes(operator.OpcodeIndex()).BuiltinCode() == CONV_2D
    options = tflite.Conv2DOptions()
    options.Init(operator.BuiltinOptions().Bytes, operator.BuiltinOptions().Pos)
    assert (options.StrideH(), options.StrideW(), options.FusedActivationFunction()) == (2, 2, 1)
    tensor = graph.Tensors(0)
    assert (tensor.Name(), tensor.ShapeAsNumpy().tolist()) == (b"fused;conv_dequantize", [5, 1, 1, 7])
    sparsity = tensor.Sparsity()
    assert sparsity.TraversalOrderAsNumpy().tolist() == [0, 1, 2, 3]
    assert [sparsity.DimMetadata(n).Format() for n in range(4)] == [0, 0, 0, 1]
    values = np.frombuffer(model.Buffers(tensor.Buffer()).DataAsNumpy().tobytes(), np.float16)
    np.testing.assert_array_equal(values, weight[mask])


def layers_of(path: Path) -> list[TfliteLayer]:
    return read_layers(path.read_bytes(), path.name)[0]


@pytest.mark.parametrize("name", NETS)
def test_published_nets(test_data: Path, name: str) -> None:
    _, encoded, everything, sparsity = NETS[name]
    layers = layers_of(test_data / "models" / name)
    assert len(layers) == everything
    assert sum(layer.encoded for layer in layers) == encoded
    assert all(layer.columns and layer.bias is not None for layer in layers)
    for layer in layers:
        density = layer.weight.pattern.density
        assert density == pytest.approx(1 - sparsity if layer.encoded else 1, abs=2 / layer.weight.to_dense().size)
    loaded = load_layers(test_data / "models" / name)
    assert len(loaded) == encoded
    assert all(len(pick(loaded, c.name, name).name) < len(c.name) for c in layers if c.encoded)
    assert loaded[0].columns == {0.75: 112 * 112, 0.70: 96 * 96}[sparsity]


@pytest.mark.parametrize("name", NETS)
def test_published_nets_equal_their_onnx_twins(test_data: Path, name: str) -> None:
    """The twin was converted by other means: the same float32 weights and biases, layer by layer."""
    onnx = pytest.importorskip("onnx")
    from onnx import numpy_helper

    graph = onnx.load(str(test_data / "models" / NETS[name][0])).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    twins = [tuple(arrays[key] for key in node.input[1:]) for node in graph.node if node.op_type == "Conv"]
    twins = [pair for pair in twins if pair[0].shape[2:] == (1, 1)]
    layers = layers_of(test_data / "models" / name)
    assert len(twins) == len(layers)
    left = dict(enumerate(layers))
    for weight, bias in twins:
        matches = [
            n
            for n, layer in left.items()
            if layer.weight.shape == weight.shape[:2]
            and np.array_equal(layer.weight.to_dense(), weight[:, :, 0, 0])
            and np.array_equal(np.asarray(layer.bias), bias)
        ]
        assert matches
        del left[matches[0]]
    assert not left


@pytest.mark.parametrize("name", NETS)
def test_truncated_nets(test_data: Path, name: str) -> None:
    raw = (test_data / "models" / name).read_bytes()
    for part in itertools.chain(range(0, 64, 7), np.linspace(64, len(raw) - 1, 40).astype(int)):
        try:
            layers, _ = read_layers(raw[:part], name)
        except SparseRTError:
            continue
        assert all(np.isfinite(layer.weight.values).all() for layer in layers)  # only unused bytes were cut off
