"""Drawn convolutions on guarded arrays: ``python tests/fuzz/guard_convolutions.py SEED COUNT``, a child process."""

from __future__ import annotations

import faulthandler
import sys
from typing import Any

import numpy as np

import sparsert
from fuzz.guard import Buffers, guarded
from sparsert.runtime.host import host_report
from unit.test_convolution import close, convolve, drawn, pruned

FIXED = ({
    "groups": 20, "inputs": 20, "outputs": 20, "kernel": (3, 3), "stride": (3, 2), "dilation": (1, 1),
    "pads": ((1, 1), (1, 1)), "size": (28, 4), "images": 3, "residual": "before", "density": 2.0,
},)  # fmt: skip
"""Run before those that are drawn: a residual behind whose last rows a vector reaches beyond the array."""


def run_case(c: dict[str, Any], target: str, rng: np.random.Generator) -> list[str]:
    """What went wrong, in sentences; empty if nothing."""
    g = c["groups"]
    w = pruned(rng, (c["outputs"], c["inputs"] // g, *c["kernel"]), c["density"])
    buffers = Buffers()
    with guarded(buffers):
        op = sparsert.compile_conv2d(
            w, stride=c["stride"], padding=c["pads"], dilation=c["dilation"], groups=g, residual=c["residual"],
            target=target,
        )  # fmt: skip
        shape = (max(c["images"], 1), c["inputs"], *c["size"])

        def place(name: str, shape: tuple[int, ...]) -> np.ndarray:
            gap = int(rng.choice([0, 0, 4, 12]))
            row = 4 * shape[3] + gap
            channel = row * shape[2] + int(rng.choice([0, 0, 8]))
            strides = (channel * shape[1], channel, row, 4)
            return buffers.array(name, shape, strides, at_end=bool(rng.random() < 0.6))

        x = place("x", shape)
        x[...] = rng.standard_normal(shape)
        want, magnitude = convolve(x, w, c["stride"], c["pads"], c["dilation"], g)
        out, r = place("out", want.shape), None
        out[...] = -7e33
        if c["residual"]:
            r = place("residual", want.shape)
            r[...] = rng.standard_normal(want.shape)
            want, magnitude = want + r, magnitude + np.abs(r)
        for _ in range(2):
            op(x, out=out, residual=r)
            if not close(out, want, magnitude, int(np.prod(w.shape[1:])) + 2):
                return ["wrong"]
    complaints = buffers.complaints()
    if not buffers.internal():
        complaints.append("no buffer of the package's own was guarded")
    return complaints


def fits(c: dict[str, Any]) -> bool:
    """Whether the padded image is as large as the kernel."""
    spans = [(k - 1) * d + 1 for k, d in zip(c["kernel"], c["dilation"], strict=True)]
    return all(n + sum(p) >= span for n, p, span in zip(c["size"], c["pads"], spans, strict=True))


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
        if not fits(c):
            continue
        print(f"case {number} {target} {c}", file=sys.stderr, flush=True)
        if problems := run_case(c, target, rng):
            print(f"case {number}, {target} {c}: {problems}")
            return 1
    print(f"{count} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
