"""Drawn products of two activations on guarded arrays; as a script, a child of ``test_guard_pages.py``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sparsert
from fuzz.guard import Buffers, Outcome, campaign, guarded
from fuzz.guard_cases import SPECIAL, extent
from oracle import same_bits

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


def run(seed: int, number: int, targets: list[str], note: Callable[[Any], None]) -> Outcome:
    note({"seed": seed, "number": number})
    problems, target = run_case(seed, number, targets)
    return Outcome(problems, f"seed {seed}, number {number}", [target])


if __name__ == "__main__":
    sys.exit(campaign(run))
