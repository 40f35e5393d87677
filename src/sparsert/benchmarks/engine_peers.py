"""Dense peers that are inference engines: ONNX Runtime and OpenVINO, each with the same three one-node graphs."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

import numpy as np

from .peers import Array, Bound, Form, Layer, Layout, Role, image

Graph = Literal["W@X", "X^T@W^T", "conv 1x1"]
LAYOUTS: dict[Graph, Layout] = {"W@X": "kn", "X^T@W^T": "nk", "conv 1x1": "kn"}


def onnxruntime_forms(threads: int) -> list[Form]:
    """Constant weights, all graph optimisations, inputs and outputs bound to the caller's buffers."""
    ort: Any = import_module("onnxruntime")
    import_module("onnx")

    def bind(graph: Graph, layer: Layer) -> Bound:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        session = ort.InferenceSession(_onnx_model(graph, layer), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        x_shape, y_shape = _shapes(graph, layer)
        binding.bind_input("x", "cpu", 0, np.float32, x_shape, layer.x.ctypes.data)
        binding.bind_output("y", "cpu", 0, np.float32, y_shape, layer.y.ctypes.data)
        run = session.run_with_iobinding
        return Bound(lambda: run(binding))

    return [Form(graph, layout, _with_graph(bind, graph)) for graph, layout in LAYOUTS.items()]


def _onnx_model(graph: Graph, layer: Layer) -> bytes:
    onnx: Any = import_module("onnx")
    helper: Any = import_module("onnx.helper")
    numpy_helper: Any = import_module("onnx.numpy_helper")
    x_shape, y_shape = _shapes(graph, layer)
    weight = numpy_helper.from_array(_weight(graph, layer), "w")
    inputs = ["w", "x"] if graph == "W@X" else ["x", "w"]
    node = helper.make_node("Conv" if graph == "conv 1x1" else "MatMul", inputs, ["y"])
    value = helper.make_tensor_value_info
    body = helper.make_graph([node], "layer", [value("x", onnx.TensorProto.FLOAT, x_shape)],
                             [value("y", onnx.TensorProto.FLOAT, y_shape)], [weight])  # fmt: skip
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def openvino_forms(threads: int) -> list[Form]:
    """float32 by request, and the default precision (bf16 on CPUs that have it) as an extra that is never "best"."""
    openvino: Any = import_module("openvino")
    operators: Any = import_module("openvino.opset13")
    core = openvino.Core()
    base = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}

    def bind(graph: Graph, layer: Layer, config: dict[str, Any]) -> Bound:
        x_shape, _ = _shapes(graph, layer)
        x = operators.parameter(x_shape, np.float32, name="x")
        w = operators.constant(_weight(graph, layer))
        if graph == "conv 1x1":
            y = operators.convolution(x, w, [1, 1], [0, 0], [0, 0], [1, 1])
        else:
            y = operators.matmul(w, x, False, False) if graph == "W@X" else operators.matmul(x, w, False, False)
        compiled = core.compile_model(openvino.Model([y], [x], "layer"), "CPU", config)
        request = compiled.create_infer_request()
        x_shape, y_shape = _shapes(graph, layer)
        request.set_input_tensor(openvino.Tensor(layer.x.reshape(x_shape), shared_memory=True))
        request.set_output_tensor(openvino.Tensor(layer.y.reshape(y_shape), shared_memory=True))
        infer = request.infer  # start_async() and wait() cost 13 us more: another thread runs them

        def call() -> None:
            infer(share_outputs=True)

        return Bound(call, {"precision": compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()})

    def forms(suffix: str, config: dict[str, Any], role: Role, tolerance: float) -> list[Form]:
        return [
            Form(graph + suffix, layout, _with_graph(lambda g, layer: bind(g, layer, config), graph), role, tolerance)
            for graph, layout in LAYOUTS.items()
        ]

    exact = forms("", {**base, "INFERENCE_PRECISION_HINT": "f32"}, "dense", 1e-5)
    return exact + forms(", default precision", base, "extra", 3e-2)


def _with_graph(bind: Any, graph: Graph) -> Any:
    return lambda layer: bind(graph, layer)


def _shapes(graph: Graph, layer: Layer) -> tuple[list[int], list[int]]:
    rows, inputs = layer.dense.shape
    if graph == "W@X":
        return [inputs, layer.columns], [rows, layer.columns]
    if graph == "X^T@W^T":
        return [layer.columns, inputs], [layer.columns, rows]
    height, width = image(layer.columns)
    return [1, inputs, height, width], [1, rows, height, width]


def _weight(graph: Graph, layer: Layer) -> Array:
    if graph == "X^T@W^T":
        return np.ascontiguousarray(layer.dense.T)
    return layer.dense.reshape(*layer.dense.shape, 1, 1) if graph == "conv 1x1" else layer.dense
