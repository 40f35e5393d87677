#!/usr/bin/env python3
"""Dense layers beside the best dense engine: convolutions of ResNet-50, BERT-base's linear layers and attention.

    python bench/dense.py [--target x86-avx2] [--only resnet50_3x3] [--json bench/results/dense.json]

All candidates of a problem are timed in turn in one process: every peer in all its forms first, then the three fastest
of them beside ours in more rounds. Ratios are medians over rounds, with the 10th and 90th percentile. Engines choose
their algorithms themselves; what oneDNN chose, ONEDNN_VERBOSE=1 names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import sparsert
from sparsert.benchmarks import baselines, environment, problems
from sparsert.benchmarks.measure import geometric_mean, interleave
from sparsert.benchmarks.peers import Prepared
from sparsert.benchmarks.problems import Problem
from sparsert.runtime import host

RESNET = (
    (64, 64, 3136), (256, 64, 3136), (64, 256, 3136), (128, 256, 3136), (512, 128, 784), (128, 512, 784),
    (256, 512, 784), (512, 256, 784), (1024, 256, 196), (256, 1024, 196), (512, 1024, 196), (1024, 512, 196),
    (2048, 512, 49), (512, 2048, 49), (2048, 1024, 49),
)  # fmt: skip
CONVOLUTIONS = (  # outputs, inputs, kernel, size, stride
    (64, 64, 3, 56, 1), (128, 128, 3, 28, 1), (256, 256, 3, 14, 1), (512, 512, 3, 7, 1), (128, 128, 3, 56, 2),
    (256, 256, 3, 28, 2), (512, 512, 3, 14, 2), (64, 3, 7, 224, 2),
)  # fmt: skip
LINEAR = ((768, 768), (3072, 768), (768, 3072))
TOKENS = (128, 384)
HEADS, WIDTH = 12, 64
PEERS = ("numpy", "torch", "onnxruntime", "openvino")
FINALISTS = 3
Calls = dict[str, Callable[[], Any]]


def weights(selection: baselines.Selection, problem: Problem, target: str) -> tuple[Calls, Calls, list[Any]]:
    """Ours and the peers' calls on one layer with constant weights, and what they need to stay alive."""
    prepared, keep, peers = Prepared.of(problem), list[Any](), Calls()
    for name, forms in selection.forms.items():
        found, lost = baselines.prepare(name, [form for form in forms if form.role == "dense"], prepared)
        keep += found
        peers |= {candidate.key: candidate.call for candidate in found}
        for sentence in lost:
            print(f"  {sentence}")
    w, x = prepared.dense[0], prepared.x
    if problem.kind == "linear":
        given = np.ascontiguousarray(x.T)
        op: Any = sparsert.compile_linear(w, target=target, threads=1)
    else:
        given, op = x, sparsert.compile_matmul(w, target=target, threads=1)
    step = op.bind(given, op(given))
    error = prepared.references[0].error(step.out.T if problem.kind == "linear" else step.out)
    if error > 1e-5:
        raise SystemExit(f"{problem.name}: relative error {error:.2g}")
    return {"sparsert": step}, peers, keep


def convolution(shape: tuple[int, int, int, int, int], target: str) -> tuple[Calls, Calls, list[Any]]:
    """One image, weights packed outside of the timed region."""
    conv, torch = import_module("conv"), import_module("torch")
    outputs, inputs, kernel, size, stride = shape
    rng = np.random.default_rng(0)
    w = rng.standard_normal((outputs, inputs, kernel, kernel), np.float32)
    x, pad = rng.standard_normal((1, inputs, size, size), np.float32), kernel // 2
    peers: Calls = conv.peers(conv.Problem("", (), w, size, stride, 1, pad), x)
    step = sparsert.compile_conv2d(w, stride=stride, padding=pad, target=target, threads=1, form="dense").bind(x)
    double = torch.from_numpy(x).double(), torch.from_numpy(w).double()
    want = torch.nn.functional.conv2d(*double, None, stride, pad).numpy()
    if np.abs(step() - want).max() > 1e-5 * np.abs(want).max():
        raise SystemExit("wrong convolution")
    return {"sparsert": step}, peers, [x, w]


def attention(tokens: int, scores: bool, target: str) -> tuple[Calls, Calls, list[Any]]:
    """(T, 64) @ (64, T) or (T, T) @ (T, 64) for twelve heads of one sequence; contiguous operands for everyone."""
    torch: Any = import_module("torch")
    rng = np.random.default_rng(tokens)
    a = rng.standard_normal((HEADS, tokens, WIDTH if scores else tokens), np.float32)
    b = rng.standard_normal((HEADS, tokens, WIDTH), np.float32)
    right = b.swapaxes(1, 2) if scores else b
    y = np.zeros((HEADS, tokens, tokens if scores else WIDTH), np.float32)
    op = sparsert.compile_product(transpose_b=scores, target=target, threads=1)
    want = np.matmul(a.astype(np.float64), right)
    if np.abs(op(a, b) - want).max() > 1e-5 * np.abs(want).max():
        raise SystemExit("wrong product")
    ta, tb, ty = torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(y.copy())
    tb = tb.transpose(1, 2) if scores else tb
    peers: Calls = {
        "numpy matmul": lambda: np.matmul(a, right, out=y),
        "torch bmm": lambda: torch.bmm(ta, tb, out=ty),
    }
    keep: list[Any] = [a, b, y, ta, tb, ty]
    ort: Any = import_module("onnxruntime")
    helper: Any = import_module("onnx.helper")
    for swapped in (False, True) if scores else (False,):  # ONNX has no transposed product: given as K^T, or a node
        value, shape = helper.make_tensor_value_info, list(np.shape(b if swapped or not scores else right))
        nodes = [helper.make_node("Transpose", ["b"], ["t"], perm=[0, 2, 1])] if swapped else []
        nodes.append(helper.make_node("MatMul", ["a", "t" if swapped else "b"], ["y"]))
        graph = helper.make_graph(nodes, "g", [value("a", 1, list(a.shape)), value("b", 1, shape)],
                                  [value("y", 1, list(y.shape))])  # fmt: skip
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = ort.InferenceSession(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString(),
            options, providers=["CPUExecutionProvider"],
        )  # fmt: skip
        binding, second = session.io_binding(), np.ascontiguousarray(b if swapped else right)
        out = np.zeros_like(y)
        binding.bind_input("a", "cpu", 0, np.float32, a.shape, a.ctypes.data)
        binding.bind_input("b", "cpu", 0, np.float32, second.shape, second.ctypes.data)
        binding.bind_output("y", "cpu", 0, np.float32, y.shape, out.ctypes.data)
        peers[f"onnxruntime MatMul{' of Transpose' * swapped}"] = lambda s=session, b=binding: s.run_with_iobinding(b)
        keep += [session, binding, second, out]
    openvino: Any = import_module("openvino")
    operators: Any = import_module("openvino.opset13")
    pa, pb = operators.parameter(a.shape, np.float32), operators.parameter(b.shape, np.float32)
    model = openvino.Model([operators.matmul(pa, pb, False, scores)], [pa, pb], "product")
    config = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
              "INFERENCE_PRECISION_HINT": "f32"}  # fmt: skip
    request = openvino.Core().compile_model(model, "CPU", config).create_infer_request()
    for i, array in enumerate((a, b)):
        request.set_input_tensor(i, openvino.Tensor(array, shared_memory=True))
    ours = np.zeros_like(y)
    peers["openvino MatMul"] = lambda: request.infer(share_outputs=True)
    return {"sparsert": op.bind(a, b, ours)}, peers, [*keep, request, ours]


def compare(ours: Calls, peers: Calls, flops: float, rounds: int) -> dict[str, Any]:
    """All peers in few rounds; ours and the fastest of them in more."""
    heats = interleave(peers, 3, 2e-3)
    finalists = sorted(peers, key=lambda name: heats.time(name).median)[:FINALISTS]
    samples = interleave(ours | {name: peers[name] for name in finalists}, rounds, 4e-3)
    best = min(finalists, key=lambda name: samples.time(name).median)
    ratio = samples.speedup("sparsert", best)
    rate = {name: round(flops / samples.time(name).median / 1e9, 1) for name in ("sparsert", *finalists)}
    return {"ratio": [round(v, 3) for v in ratio], "best": best, "gflops": rate,
            "milliseconds": round(1e3 * samples.time("sparsert").median, 4)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--target", default="native")
    parser.add_argument("--only", default="", help="part of the names of the problems to run")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    selection = baselines.select(PEERS, 1)
    cases: list[tuple[str, str, Callable[[], tuple[Calls, Calls, list[Any]]], float]] = []
    shapes = [("ResNet-50 1x1", "matmul", (m, k, n)) for m, k, n in RESNET]
    shapes += [("BERT linear", "linear", (m, k, t)) for t in TOKENS for m, k in LINEAR]
    for group, kind, (m, k, n) in shapes:
        problem = Problem(f"{m}x{k}x{n}", group, problems.uniform(m, k, 0.0), n, kind=kind)  # type: ignore[arg-type]
        cases.append((group, problem.name, lambda p=problem: weights(selection, p, args.target), 2.0 * m * k * n))
    for shape in CONVOLUTIONS:
        o, c, k, size, stride = shape
        name = f"{c}->{o} {k}x{k} @{size}" + f"/{stride}" * (stride > 1)
        flops = 2.0 * o * c * k * k * ((size - 1) // stride + 1) ** 2
        cases.append(("resnet50_3x3", name, lambda s=shape: convolution(s, args.target), flops))
    for t in TOKENS:
        for scores in (True, False):
            name = f"12 x ({t}x{WIDTH})({WIDTH}x{t})" if scores else f"12 x ({t}x{t})({t}x{WIDTH})"
            cases.append(("BERT attention", name, lambda t=t, s=scores: attention(t, s, args.target),
                          2.0 * HEADS * t * t * WIDTH))  # fmt: skip
    rows: list[dict[str, Any]] = []
    for group, name, prepare, flops in cases:
        if args.only.lower() in f"{group} {name}".lower():
            ours, peers, keep = prepare()
            environment.pin_threads(1)
            row = {"group": group, "problem": name} | compare(ours, peers, flops, args.rounds)
            del keep
            rows.append(row)
            middle, low, high = row["ratio"]
            print(f"{group:<15} {name:<24} {middle:.2f} [{low:.2f}, {high:.2f}] x {row['best']:<28} "
                  f"{', '.join(f'{k} {v}' for k, v in row['gflops'].items())} GFLOP/s", flush=True)  # fmt: skip
    for group in dict.fromkeys(row["group"] for row in rows):
        print(f"{group}: geometric mean {geometric_mean([r['ratio'][0] for r in rows if r['group'] == group]):.3f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        head = environment.describe(1, host.lookup(args.target).name, "bench/dense.py")
        args.json.write_text(json.dumps({"environment": head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
