#!/usr/bin/env python3
"""Convolutions beside dense engines: ResNet-50's 3x3 layers, MobileNetV1's depthwise ones, one image, one thread.

    SPARSERT_TEST_DATA=... python bench/conv.py [--json bench/results/conv.json] [--group resnet50|depthwise|chains]

Best dense is the fastest of oneDNN (through PyTorch, NCHW and NHWC, weights packed), ONNX Runtime and OpenVINO in
float32, each with the algorithm that it chooses itself, Winograd's included. All are timed in the same rounds; figures
are medians of ratios within a round. The 512@7 layers have the pattern of another pruned ResNet-50, and random values:
the published weights lack them. Chains are three 3x3 layers in a row, on ``Planes`` and on arrays.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import sparsert
from sparsert.benchmarks import testdata
from sparsert.benchmarks.environment import describe
from sparsert.benchmarks.measure import geometric_mean, interleave
from sparsert.sparsity.pattern import from_csr

Call = Callable[[], Any]
GOALS = {"ResNet-50 3x3, 91 %": (7.3, 8.0), "ResNet-50 3x3, 96 %": (12.0, 13.5), "512@7, 91 %": (6.0, 6.0),
         "MobileNetV1 depthwise": (2.0, 2.5)}  # fmt: skip


class Problem(NamedTuple):
    name: str
    groups: tuple[str, ...]
    weight: Any
    size: int
    stride: int
    channels: int  # groups of the convolution
    pad: int | None = None  # zeros on every side; None pads as "same_upper" does


def resnet50() -> list[Problem]:
    found = []
    with np.load(testdata.root() / "weights" / "resnet50_3x3.npz") as z:
        for percent, key in ((91, "90"), (96, "95")):
            group = f"ResNet-50 3x3, {percent} %"
            for k, (channels, size) in enumerate(((64, 56), (128, 28), (256, 14)), 1):
                data, indices, indptr = (z[f"rn50_{key}_bg{k}.{part}"] for part in ("data", "indices", "indptr"))
                m = from_csr(data.astype(np.float32), indices, indptr, (channels, channels * 9))
                weight = m.to_dense().reshape(channels, channels, 3, 3)
                found.append(Problem(f"{channels}@{size}", (group,), weight, size, 1, 1))
            found.append(Problem("512@7 (DLMC)", (group, f"512@7, {percent} %"), dlmc(percent), 7, 1, 1))
    return found


def dlmc(percent: int) -> Any:
    """512 filters of a ResNet-50 pruned by magnitude: a real pattern, with columns (ky, kx, ic), and random values."""
    collection = {91: "rn50__extended_magnitude_pruning__0.91", 96: "rn50__magnitude_pruning__0.95"}[percent]
    entry = next(e for e in testdata.dlmc_index() if (e.collection, e.rows, e.cols) == (collection, 512, 9 * 512))
    return np.ascontiguousarray(testdata.read_dlmc(entry).to_dense().reshape(512, 3, 3, 512).transpose(0, 3, 1, 2))


def depthwise() -> list[Problem]:
    found, size = [], 112
    with np.load(testdata.root() / "weights" / "mobilenet_v1_1.0_90.npz") as z:
        for k, stride in enumerate((1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)):
            weight = np.ascontiguousarray(z[f"dw{k}.w"].reshape(-1, 1, 3, 3), np.float32)
            if k not in (7, 8, 9, 10):  # the same shape as dw6
                found.append(Problem(f"dw{k} {len(weight)}@{size} s{stride}", ("MobileNetV1 depthwise",), weight, size,
                                     stride, len(weight)))  # fmt: skip
            size //= stride
    return found


def peers(p: Problem, x: Any) -> dict[str, Call]:
    """Every dense form of the layer; each keeps what it reads and writes."""
    torch: Any = import_module("torch")
    onnx: Any = import_module("onnx")
    ort: Any = import_module("onnxruntime")
    openvino: Any = import_module("openvino")
    operators: Any = import_module("openvino.opset13")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    begin = p.pad if p.pad is not None else 1 if p.stride == 1 else 0  # TensorFlow's "SAME" for even sizes
    end = 1 if p.pad is None else p.pad
    stride, calls = [p.stride] * 2, dict[str, Call]()
    tw, padded = torch.from_numpy(p.weight), torch.from_numpy(x)
    pad = [begin, begin]
    if begin != end:  # PyTorch pads alike on both sides: give it the padded image
        padded, pad = torch.nn.functional.pad(padded, (0, 1, 0, 1)), [0, 0]
    nhwc = padded.to(memory_format=torch.channels_last)
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
        tw.to_mkldnn(), pad, stride, [1, 1], p.channels, list(padded.shape)
    )
    apply = torch.ops.mkldnn._convolution_pointwise.default
    for name, image in (("oneDNN NCHW", padded), ("oneDNN NHWC", nhwc)):
        calls[name] = lambda image=image: apply(image, packed, None, pad, stride, [1, 1], p.channels, "none", [], "")
    helper, value = onnx.helper, onnx.helper.make_tensor_value_info
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=stride, pads=[begin, begin, end, end], group=p.channels)
    graph = helper.make_graph([node], "layer", [value("x", 1, x.shape)], [value("y", 1, None)],
                              [onnx.numpy_helper.from_array(p.weight, "w")])  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    y = session.run(None, {"x": x})[0]
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, x.shape, x.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    calls["ONNX Runtime"] = lambda kept=(x, y): session.run_with_iobinding(binding)
    parameter = operators.parameter(x.shape, np.float32, name="x")
    if p.channels == 1:
        result = operators.convolution(parameter, operators.constant(p.weight), stride, [begin] * 2, [end] * 2, [1, 1])
    else:
        by_group = operators.constant(p.weight[:, None])
        result = operators.group_convolution(parameter, by_group, stride, [begin] * 2, [end] * 2, [1, 1])
    config = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
              "INFERENCE_PRECISION_HINT": "f32"}  # fmt: skip
    compiled = openvino.Core().compile_model(openvino.Model([result], [parameter], "layer"), "CPU", config)
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
    calls["OpenVINO"] = lambda kept=compiled: request.infer(share_outputs=True)
    return calls


def measure(p: Problem, rounds: int) -> dict[str, Any]:
    x = np.random.default_rng(0).standard_normal((1, len(p.weight), p.size, p.size)).astype(np.float32)
    calls = peers(p, x)
    op = sparsert.compile_conv2d(p.weight, padding="same_upper", stride=p.stride, groups=p.channels, threads=1)
    bound = op.bind(x)
    torch: Any = import_module("torch")
    begin = 1 if p.stride == 1 else 0
    wide = torch.nn.functional.pad(torch.from_numpy(x).double(), (begin, 1, begin, 1))
    want = torch.nn.functional.conv2d(
        wide, torch.from_numpy(p.weight).double(), None, p.stride, 0, 1, p.channels
    ).numpy()
    error = float(np.abs(bound() - want).max() / np.abs(want).max())
    if error > 1e-5:
        raise SystemExit(f"{p.name}: relative error {error:.2g}")
    samples = interleave({**calls, "sparsert": bound}, rounds, 3e-3)
    best = min(calls, key=lambda name: samples.time(name).median)
    ratio = samples.speedup("sparsert", best)
    ms = {name: round(1e3 * samples.time(name).median, 4) for name in samples.seconds}
    return {"problem": p.name, "groups": p.groups, "nnz": op.stats.nnz, "ms": ms, "best_dense": best,
            "speedup": round(ratio.median, 2), "spread": [round(ratio.low, 2), round(ratio.high, 2)],
            "relative_error": error, "schedule": str(op.schedule)}  # fmt: skip


def chain(p: Problem, rounds: int, layers: int = 3) -> dict[str, Any]:
    """The layer, with a ReLU, several times in a row: on arrays, and on planes that need no copies."""
    x = np.random.default_rng(0).standard_normal((1, len(p.weight), p.size, p.size)).astype(np.float32)
    ops = [sparsert.compile_conv2d(p.weight, activation="relu", padding=1, threads=1) for _ in range(layers)]
    forms: dict[str, list[Any]] = {
        "arrays": [x] + [np.empty_like(x) for _ in ops],
        "planes": [sparsert.Planes.of(x)] + [sparsert.Planes(x.shape) for _ in ops],
    }
    calls: dict[str, Call] = {}
    for name, arrays in forms.items():
        bound = [op.bind(source, out=out) for op, source, out in zip(ops, arrays, arrays[1:], strict=False)]
        calls[name] = lambda bound=bound: [call() for call in bound]
        calls[name]()
    if not np.array_equal(forms["arrays"][-1], forms["planes"][-1].images):
        raise SystemExit(f"{p.name}: planes give other bits")
    samples = interleave(calls, rounds, 3e-3)
    ratio = samples.speedup("planes", "arrays")
    ms = {name: round(1e3 * samples.time(name).median, 4) for name in samples.seconds}
    return {"problem": p.name, "group": p.groups[0], "layers": layers, "ms": ms, "speedup": round(ratio.median, 3),
            "spread": [round(ratio.low, 3), round(ratio.high, 3)]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--group", choices=["resnet50", "depthwise", "chains"])
    args = parser.parse_args()
    sets = {"resnet50": resnet50, "depthwise": depthwise}
    rows = []
    for name, problems in sets.items():
        for problem in problems() if args.group in (None, name) else ():
            rows.append(measure(problem, args.rounds))
            shown = ("problem", "groups", "speedup", "spread", "best_dense", "ms")
            print({key: rows[-1][key] for key in shown},
                  flush=True)  # fmt: skip
    chains = []
    for problem in resnet50() if args.group in (None, "chains") else ():
        chains.append(chain(problem, args.rounds))
        print(chains[-1], flush=True)
    means = {}
    for goal, (target, stretch) in GOALS.items():
        values = [row["speedup"] for row in rows if goal in row["groups"]]
        if values:
            means[goal] = round(geometric_mean(values), 2)
            print(f"{goal}: {means[goal]} over best dense (target {target}, stretch {stretch})")
    if args.json:
        args.json.write_text(
            json.dumps({"environment": describe(1, "native"), "rows": rows, "chains": chains, "means": means}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
