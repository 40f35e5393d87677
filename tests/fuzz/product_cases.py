"""Drawn products of two activations on guarded arrays; as a script, a child of ``test_guard_pages.py``."""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import sparsert
from fuzz.guard import Buffers, guarded
from fuzz.guard_cases import SPECIAL, extent
from oracle import same_bits
from sparsert.runtime.host import host_report

Array = NDArray[np.float32]


def placed(buffers: Buffers, name: str, plain: Array, rng: np.random.Generator) -> Array:
    """A guarded array with the elements of ``plain``, drawn strides at a drawn place."""
    swapped = bool(rng.random() < 0.3) and name != "out"
    inner = int(rng.choice([4, 8], p=[0.9, 0.1]))
    stored = plain.swapaxes(-1, -2) if swapped else plain
    pitch = inner * stored.shape[-1] + int(rng.choice([0, 0, 4, 60, rng.integers(1, 80)]))
    matrix = pitch * stored.shape[-2] + int(rng.choice([0, 0, 20]))
    steps = [matrix * int(np.prod(plain.shape[axis + 1 : -2])) for axis in range(plain.ndim - 2)]
    array = buffers.array(name, stored.shape, (*steps, pitch, inner), at_end=bool(rng.random() < 0.6))
    array[...] = stored
    return array.swapaxes(-1, -2) if swapped else array


def run_case(seed: int, number: int, targets: list[str]) -> tuple[list[str], str]:
    """What went wrong, in sentences; empty if nothing."""
    rng = np.random.default_rng([seed, number, 1])
    target = str(rng.choice(targets))
    m, k, n = (extent(rng) for _ in range(3))
    batch = tuple(int(v) for v in rng.integers(1, 4, rng.integers(0, 3)))
    a, b = rng.standard_normal((*batch, m, k), np.float32), rng.standard_normal((*batch, k, n), np.float32)
    if special := bool(rng.random() < 0.3):
        a[rng.random(a.shape) < 0.01] = rng.choice(SPECIAL)
    buffers, problems = Buffers(), list[str]()
    with guarded(buffers):
        op = sparsert.compile_product(scale=float(rng.choice([1.0, 0.25])), target=target)
        x, w = placed(buffers, "a", a, rng), placed(buffers, "b", b, rng)
        out = placed(buffers, "out", np.full((*batch, m, n), -7e33, np.float32), rng)
        op(x, w, out=out)
        first = out.copy()
        out[...] = -7e33
        op(x, w, out=out)
    if not same_bits(first, np.array(out)):
        problems.append("a second call gives other bits")
    if not (same_bits(np.array(x), a) and same_bits(np.array(w), b)):
        problems.append("an operand was changed")
    if not special:
        want = np.matmul(a, b, dtype=np.float64) * op.spec.scale
        bound = 1e-6 * np.sqrt(max(k, 1)) * np.matmul(np.abs(a, dtype=np.float64), np.abs(b, dtype=np.float64)) + 1e-40
        if not (np.abs(first - want) <= bound).all():
            problems.append("wrong product")
    return problems + buffers.complaints(), target


def main() -> int:
    parser = argparse.ArgumentParser(description="run guarded cases; stops at the first that goes wrong")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--log", type=Path, help="where each case is written before it runs")
    args = parser.parse_args()
    faulthandler.enable()
    targets = [name for name, reason in host_report()["targets"].items() if reason is None and name != "reference"]
    seen: Counter[str] = Counter()
    with (args.log or Path("/dev/null")).open("w") as log:
        for number in range(args.first, args.first + args.count):
            print(json.dumps({"seed": args.seed, "number": number}), file=log, flush=True)
            problems, target = run_case(args.seed, number, targets)
            if problems:
                print(f"seed {args.seed}, number {number}:\n  " + "\n  ".join(problems))
                return 1
            seen[target] += 1
    print(f"{args.count} cases: " + ", ".join(f"{count} {name}" for name, count in sorted(seen.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
