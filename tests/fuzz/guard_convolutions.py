"""Drawn convolutions on guarded arrays: ``python tests/fuzz/guard_convolutions.py SEED COUNT``, a child process."""

from __future__ import annotations

import faulthandler
import sys

import numpy as np

import sparsert
from fuzz.guard import Buffers, guarded
from sparsert.runtime.host import host_report
from unit.test_convolution import close, convolve, drawn, pruned


def main() -> int:
    faulthandler.enable()
    seed, count = int(sys.argv[1]), int(sys.argv[2])
    targets = [t for t, reason in host_report()["targets"].items() if reason is None and t != "reference"]
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        c = drawn(rng)
        g = c["groups"]
        w = pruned(rng, (c["outputs"], c["inputs"] // g, *c["kernel"]), c["density"])
        spans = [(k - 1) * d + 1 for k, d in zip(c["kernel"], c["dilation"], strict=True)]
        if any(n + sum(p) < span for n, p, span in zip(c["size"], c["pads"], spans, strict=True)):
            continue
        buffers = Buffers()
        target = str(rng.choice(targets))
        print(f"case {number} {target} {c}", file=sys.stderr, flush=True)
        with guarded(buffers):
            op = sparsert.compile_conv2d(
                w, stride=c["stride"], padding=c["pads"], dilation=c["dilation"], groups=g, residual=c["residual"],
                target=target,
            )  # fmt: skip
            shape = (max(c["images"], 1), c["inputs"], *c["size"])

            def place(name: str, shape: tuple[int, ...], rng: np.random.Generator = rng) -> np.ndarray:
                gap = int(rng.choice([0, 0, 4, 12]))
                row = 4 * shape[3] + gap
                channel = row * shape[2] + int(rng.choice([0, 0, 8]))
                strides = (channel * shape[1], channel, row, 4)
                return buffers.array(name, shape, strides, at_end=bool(rng.random() < 0.6))  # noqa: B023

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
                    print(f"case {number} is wrong: {target} {c}")
                    return 1
        complaints = buffers.complaints()
        if not buffers.internal():
            complaints.append("no buffer of the package's own was guarded")
        if complaints:
            print(f"case {number}, {target} {c}: {complaints}")
            return 1
    print(f"{count} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
