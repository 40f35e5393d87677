"""The same layers in PyTorch and ONNX Runtime: what users would compare with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sparsert
from oracle import ACTIVATIONS, COMPILED, Expected, activation_of, complaint, dense_matrix, expected
from sparsert import Clip
from sparsert.sparsity.pattern import as_sparse

LAYERS = [(64, 32, 0.1, 100), (96, 200, 0.05, 49), (33, 65, 0.5, 7), (256, 256, 0.1, 196)]
EVERY = [name for name in ACTIVATIONS if name is not None] + [None, Clip(-1.0, 0.5)]


def layer(rng: np.random.Generator, shape: tuple[int, int, float, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, cols, density, columns = shape
    return (dense_matrix(rng, rows, cols, density), rng.standard_normal(rows).astype(np.float32),
            rng.standard_normal((cols, columns)).astype(np.float32))  # fmt: skip


def torch_function(torch: Any, activation: Any) -> Any:
    f = torch.nn.functional
    if isinstance(activation, Clip):
        return lambda x: torch.clamp(x, activation.lo, activation.hi)
    known = {
        None: lambda x: x,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "gelu_tanh": lambda x: f.gelu(x, approximate="tanh"),
    }
    return known.get(activation) or getattr(f, activation)


def agree(got: np.ndarray, peer: np.ndarray, want: Expected, slack: float) -> None:
    """Ours lies within the bound around float64, the peer's (summed in its order) within ``slack`` times it."""
    wrong = complaint(got, want)
    assert not wrong, f"SparseRT: {wrong}"
    wrong = complaint(peer, want._replace(bound=want.bound * slack + 1e-6))
    assert not wrong, f"the peer: {wrong}"


@pytest.mark.peers("torch")
@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("activation", EVERY, ids=str)
def test_torch_in_float64(target: str, activation: Any, rng: np.random.Generator) -> None:
    """Linear and 1x1 convolution with PyTorch's activations, both in float64."""
    import torch

    function = torch_function(torch, activation)
    for shape in LAYERS:
        weight, bias, x = layer(rng, shape)
        x *= 3  # into the tails
        w64, b64, x64 = (torch.from_numpy(a.astype(np.float64)) for a in (weight, bias, x))
        want = expected(as_sparse(weight), x, bias, activation)
        # where an activation is near zero, PyTorch's own rounding in float64 is what is left of it
        want = want._replace(bound=want.bound + 1e-14)
        y = function(torch.nn.functional.linear(x64.T, w64, b64)).numpy()
        wrong = complaint(sparsert.compile_linear(weight, bias, activation, target=target)(x.T).T, want._replace(y=y.T))
        assert not wrong, wrong
        conv = function(torch.nn.functional.conv2d(x64[None, :, :, None], w64[:, :, None, None], b64))[
            0, :, :, 0
        ].numpy()
        wrong = complaint(sparsert.compile_matmul(weight, bias, activation, target=target)(x), want._replace(y=conv))
        assert not wrong, wrong


@pytest.mark.peers("torch")
@pytest.mark.parametrize("target", COMPILED)
def test_torch_tensors_in_float32(target: str, rng: np.random.Generator) -> None:
    """A module's own tensors go in as they are, its result lies within rounding of ours."""
    import torch

    for shape in LAYERS:
        weight, bias, x = layer(rng, shape)
        module = torch.nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(weight))
            module.bias.copy_(torch.from_numpy(bias))
            peer = torch.nn.functional.silu(module(torch.from_numpy(np.ascontiguousarray(x.T)))).numpy()
        op = sparsert.compile_linear(module.weight.detach(), module.bias.detach(), "silu", target=target)
        got = op(torch.from_numpy(np.ascontiguousarray(x.T)))
        agree(got.T, peer.T, expected(as_sparse(weight), x, bias, "silu"), 4)


@pytest.mark.peers("torch")
def test_a_parameter_must_be_detached(rng: np.random.Generator) -> None:
    import torch

    module = torch.nn.Linear(8, 6)
    for arguments in ((module.weight,), (module.weight.detach(), module.bias)):
        with pytest.raises(sparsert.errors.DTypeError) as caught:
            sparsert.compile_linear(*arguments)
        assert "etach" in caught.value.hint


ONNX_NAMES = {
    None: None,
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "hardswish": "HardSwish",
    "gelu": "Gelu",
}


def onnx_session(form: str, weight: np.ndarray, bias: np.ndarray, activation: Any) -> Any:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rows, cols = weight.shape
    name = ONNX_NAMES[activation]
    if form == "Gemm":
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["s"], transB=1)]
        shapes, stored = (["n", cols], ["n", rows]), weight
    else:
        nodes = [helper.make_node("Conv", ["x", "w", "b"], ["s"])]
        shapes, stored = ([1, cols, "h", "v"], [1, rows, "h", "v"]), weight[:, :, None, None]
    nodes.append(helper.make_node(name or "Identity", ["s"], ["y"]))
    graph = helper.make_graph(
        nodes, "layer", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shapes[0])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes[1])],
        [numpy_helper.from_array(np.ascontiguousarray(stored), "w"), numpy_helper.from_array(bias, "b")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.peers("onnx", "onnxruntime")
@pytest.mark.parametrize("target", COMPILED)
@pytest.mark.parametrize("activation", ONNX_NAMES)
def test_onnxruntime(target: str, activation: str | None, rng: np.random.Generator) -> None:
    for shape in LAYERS:
        weight, bias, x = layer(rng, shape)
        want = expected(as_sparse(weight), x, bias, activation)
        rows = np.ascontiguousarray(x.T)
        peer = onnx_session("Gemm", weight, bias, activation).run(None, {"x": rows})[0]
        agree(sparsert.compile_linear(weight, bias, activation, target=target)(rows).T, peer.T, want, 8)
        peer = onnx_session("Conv", weight, bias, activation).run(None, {"x": x[None, :, :, None]})[0][0, :, :, 0]
        agree(sparsert.compile_matmul(weight, bias, activation, target=target)(x), peer, want, 8)


@pytest.mark.peers("torch")
@pytest.mark.parametrize("target", COMPILED)
def test_weights_rounded_to_bf16_are_those_of_torch(target: str, rng: np.random.Generator) -> None:
    """One column of a diagonal matrix times one is the weight as it is stored; for many columns the same."""
    import torch

    values = (rng.standard_normal(512) * 10.0 ** rng.integers(-42, 38, 512)).astype(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3.3e38) & (values != 0)]
    want = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    op = sparsert.compile_matmul(np.diag(values), target=target, storage="bf16")
    for n in (1, 3, 8, 40):
        assert np.array_equal(op(np.ones((values.size, n), np.float32)), np.tile(want[:, None], n))


def test_every_activation_is_compared() -> None:
    """Whatever the compiler knows by name is in the list above."""
    from sparsert.kernels.activations import ACTIVATIONS as KNOWN

    assert {name for name in EVERY if isinstance(name, str)} >= {name for name, a in KNOWN.items() if not a.parameters}
    assert activation_of("relu").slope == 1
