"""Drawn convolutions on guarded arrays: ``python tests/fuzz/guard_convolutions.py SEED COUNT``, a child process."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sparsert
from fuzz.guard import Buffers, guarded
from oracle import ACTIVATIONS, F64, same_bits
from sparsert.runtime.host import host_report
from unit.test_convolution import close, convolve, drawn, pruned

FIXED = ({
    "groups": 20, "inputs": 20, "outputs": 20, "kernel": (3, 3), "stride": (3, 2), "dilation": (1, 1),
    "pads": ((1, 1), (1, 1)), "size": (28, 4), "images": 3, "residual": "before", "density": 2.0, "bias": False,
}, *({
    "groups": 1, "inputs": 9, "outputs": 40, "kernel": (k, k), "stride": (1, 1), "dilation": (1, 1),
    "pads": ((k // 2, k // 2),) * 2, "size": size, "images": 2, "residual": residual, "density": 0.08, "bias": True,
} for k, size, residual in ((3, (14, 14), None), (3, (7, 7), None), (3, (5, 28), "before"), (5, (6, 11), "after"),
                            (3, (3, 5), "before"))))  # fmt: skip
"""Run before those that are drawn: a residual behind whose last rows a vector reaches beyond the array, and layers
whose sizes get code of their own."""


def run_case(c: dict[str, Any], rng: np.random.Generator, targets: Sequence[str]) -> list[str]:
    """What goes wrong with a drawn convolution; all of ``targets`` must give the same bits."""
    g = c["groups"]
    w = pruned(rng, (c["outputs"], c["inputs"] // g, *c["kernel"]), c["density"])
    bias = rng.standard_normal(c["outputs"]).astype(np.float32) if c["bias"] else None
    spans = [(k - 1) * d + 1 for k, d in zip(c["kernel"], c["dilation"], strict=True)]
    if any(n + sum(p) < span for n, p, span in zip(c["size"], c["pads"], spans, strict=True)):
        return []
    buffers, problems, results = Buffers(), list[str](), list[NDArray[np.float32]]()
    with guarded(buffers):
        shape = (max(c["images"], 1), c["inputs"], *c["size"])

        def place(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
            gap = int(rng.choice([0, 0, 4, 12]))
            row = 4 * shape[3] + gap
            channel = row * shape[2] + int(rng.choice([0, 0, 8]))
            strides = (channel * shape[1], channel, row, 4)
            return buffers.array(name, shape, strides, at_end=bool(rng.random() < 0.6))

        x = place("x", shape)
        x[...] = rng.standard_normal(shape)
        want, magnitude = convolve(x, w, c["stride"], c["pads"], c["dilation"], g)
        out, r = place("out", want.shape), None
        if c["residual"]:
            r = place("residual", want.shape)
            r[...] = rng.standard_normal(want.shape)
        want, magnitude = finished(want, magnitude, bias, c.get("activation"), c["residual"], r)
        for target in targets:
            op = sparsert.compile_conv2d(
                w, bias, c.get("activation"), stride=c["stride"], padding=c["pads"], dilation=c["dilation"], groups=g,
                residual=c["residual"], target=target, form=c.get("form"),
            )  # fmt: skip
            out[...] = -7e33
            for _ in range(2):
                op(x, out=out, residual=r)
                if not close(out, want, magnitude, int(np.prod(w.shape[1:])) + 2):
                    problems.append(f"{target}: wrong")
                results.append(np.array(out))
            around = sparsert.Planes.of(x, max(map(max, c["pads"])))
            results.append(np.array(op(around, out=sparsert.Planes(want.shape), residual=r)))
    problems += ["other bits"] * (not all(same_bits(y, results[0]) for y in results[1:]))
    problems += buffers.complaints()
    return problems if buffers.internal() else [*problems, "no buffer of the package's own was guarded"]


def finished(
    y: F64, magnitude: F64, bias: NDArray[np.float32] | None, activation: str | None, residual: str | None,
    r: NDArray[np.float32] | None,
) -> tuple[F64, F64]:  # fmt: skip
    """Bias, residual and activation in float64, and what the magnitude of the terms then is."""
    known = ACTIVATIONS[activation]
    if bias is not None:
        y, magnitude = y + bias[:, None, None], magnitude + np.abs(bias[:, None, None])
    if r is not None and residual == "before":
        y, magnitude = y + r, magnitude + np.abs(r)
    y, magnitude = known.of(y), known.slope * magnitude + 1e6 * known.absolute
    return (y + r, magnitude + np.abs(r)) if r is not None and residual == "after" else (y, magnitude)


def main() -> int:
    faulthandler.enable()
    seed, count = int(sys.argv[1]), int(sys.argv[2])
    targets = [t for t, reason in host_report()["targets"].items() if reason is None and t != "reference"]
    fixed = [(np.random.default_rng([seed, at]), c, target) for c in FIXED for target in targets for at in range(8)]
    for number in range(-len(fixed), count):
        if number < 0:
            rng, c, target = fixed[number]
        else:
            rng = np.random.default_rng([seed, number])
            c, target = drawn(rng), str(rng.choice(targets))
            if rng.random() < 0.4:
                c |= {"form": "dense", "outputs": c["outputs"] + 20 * (c["groups"] == 1)}
        print(f"case {number} {target} {c}", file=sys.stderr, flush=True)
        problems = run_case(c, rng, [target])
        if problems:
            print(f"case {number}, {target} {c}: {problems}")
            return 1
    print(f"{count} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
