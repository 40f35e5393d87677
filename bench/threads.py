#!/usr/bin/env python3
"""How operators scale over threads, beside a loop of multiply-adds that scales as well as the machine lets.

    python bench/threads.py [--threads 2] [--json bench/results/threads.json]

Every round times, one after the other, the loop on one thread and on all (through the same pool) and a layer on one
thread and on all. The two speed-ups of a round are compared: what clock, neighbours and hypervisor take in those
milliseconds they take from both. Reported are medians over the rounds, with the 10th and 90th percentile.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import sparsert
from sparsert.benchmarks import environment
from sparsert.benchmarks.measure import Samples, interleave, spread
from sparsert.codegen.assemble import assemble
from sparsert.codegen.vector import Builder, S
from sparsert.crew import shared_pool
from sparsert.errors import ValueRangeError
from sparsert.runtime import host
from sparsert.runtime.cpu import Executable, address_of
from sparsert.runtime.memory import aligned_empty
from sparsert.runtime.workers import job

# rows, columns, N, sparsity; the first ones have 20 MFLOP of nonzero work or more, the last is there for information
LAYERS = (
    (1024, 1024, 196, 0.8), (4096, 1024, 512, 0.9), (3072, 768, 512, 0.9), (2048, 2048, 128, 0.9), (512, 512, 196, 0.9),
)  # fmt: skip
LAYOUTS = ("row_major", "linear")
GOAL = 0.93  # of the loop's scaling
LEAST_MFLOP = 20.0
LOOP_SECONDS = 5e-4  # one run of the loop on one thread: about what a layer takes
_CHAINS, _TURNS = 12, 8  # accumulators that do not wait for each other; multiply-adds of each in the loop's body


def multiply_adds() -> Any:
    """A program that runs its body as often as its first argument says."""
    b = Builder()
    top = b.label("loop")
    b.emit("enter")
    b.emit_many("zero", _CHAINS + 1, d=np.arange(_CHAINS + 1))
    b.emit("s_arg", d=S.T, disp=0)
    b.emit("align", disp=16)
    b.place(top)
    b.emit_many("fma_acc", _CHAINS * _TURNS, d=np.tile(np.arange(_CHAINS), _TURNS), a=_CHAINS, b=_CHAINS)
    b.emit("loop", a=S.T, disp=top)
    b.emit("leave")
    return b.finish()


class Loop:
    """The loop on one thread and, cut into equal parts, on several."""

    def __init__(self, threads: int) -> None:
        target = host.resolve("native")
        self.code = Executable(assemble(multiply_adds(), target.isa).code)
        self.pool, self.blocks = shared_pool(target), [aligned_empty(16, np.int64) for _ in range(threads + 1)]
        if not self.pool.ensure(threads - 1):
            raise ValueRangeError(self.pool.trouble, where="--threads")
        turns = 1000
        while self._run_once(turns) < LOOP_SECONDS:
            turns *= 2
        turns -= turns % threads
        for block, count in zip(self.blocks, [turns] + threads * [turns // threads], strict=True):
            block[0] = count
        self.job = job(self.pool.address, [(self.code.address, address_of(block)) for block in self.blocks[1:]])

    def _run_once(self, turns: int) -> float:
        self.blocks[0][0] = turns
        return float(interleave({"": self.alone}, 3, 1e-4).time("").median)

    def alone(self) -> None:
        self.code.call(address_of(self.blocks[0]))

    def shared(self) -> None:
        self.pool.dispatch(address_of(self.job))


def operator(layout: str, weight: Any, columns: int, threads: int, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    compile_layer: Callable[..., Any] = sparsert.compile_linear if layout == "linear" else sparsert.compile_matmul
    op = compile_layer(weight, threads=threads)
    shape = (columns, weight.shape[1]) if layout == "linear" else (weight.shape[1], columns)
    x = rng.standard_normal(shape).astype(np.float32)
    return op, x, op.bind(x)


def measure(layer: tuple[int, int, int, float], layout: str, loop: Loop, threads: int, rounds: int) -> dict[str, Any]:
    rows, inner, columns, sparsity = layer
    rng = np.random.default_rng(0)
    mask = rng.random((rows, inner)) >= sparsity
    weight = np.where(mask, rng.standard_normal((rows, inner)), 0).astype(np.float32)
    one, x, alone = operator(layout, weight, columns, 1, rng)
    op, _, _ = operator(layout, weight, columns, threads, rng)
    together = op.bind(x)
    if not np.array_equal(alone(), together()):
        raise ValueRangeError("the number of threads changes results", where=f"{layer}")
    calls = {"loop 1": loop.alone, "loop n": loop.shared, "layer 1": alone, "layer n": together}
    samples = interleave(calls, rounds, 4e-3)
    loop_scaling = samples.seconds["loop 1"] / samples.seconds["loop n"]
    scaling = samples.seconds["layer 1"] / samples.seconds["layer n"]
    mflop = 2e-6 * one.stats.nnz * columns
    return {
        "layer": f"{rows}x{inner}x{columns}", "sparsity": sparsity, "layout": layout, "mflop": round(mflop, 1),
        "microseconds": {name: round(1e6 * samples.time(name).median, 1) for name in calls},
        "gflops": round(1e-3 * mflop / samples.time("layer n").median, 1),
        "scaling": rounded(scaling), "loop_scaling": rounded(loop_scaling), "of_loop": rounded(scaling / loop_scaling),
        "split": op.explain().splitlines()[-2].removeprefix("threads").strip(), "judged": mflop >= LEAST_MFLOP,
    }  # fmt: skip


def rounded(samples: Any) -> dict[str, float]:
    return {name: round(value, 3) for name, value in spread(samples)._asdict().items()}


def break_even(loop: Loop, threads: int, rounds: int) -> list[dict[str, float]]:
    """The loop at growing lengths, alone and shared: from which length on sharing pays."""
    found = []
    for micro in (2.5, 5, 10, 20, 40, 80):
        turns = max(threads, int(loop.blocks[0][0] * micro * 1e-6 / LOOP_SECONDS)) // threads * threads
        short = object.__new__(Loop)
        short.code, short.pool = loop.code, loop.pool
        short.blocks = [aligned_empty(16, np.int64) for _ in loop.blocks]
        for block, count in zip(short.blocks, [turns] + threads * [turns // threads], strict=True):
            block[0] = count
        short.job = job(short.pool.address, [(short.code.address, address_of(b)) for b in short.blocks[1:]])
        samples: Samples = interleave({"1": short.alone, "n": short.shared}, rounds, 1e-3)
        found.append({"microseconds": round(1e6 * samples.time("1").median, 2), **rounded(
            samples.seconds["1"] / samples.seconds["n"])})  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    loop = Loop(args.threads)
    rows = [measure(layer, layout, loop, args.threads, args.rounds) for layout in args.layouts for layer in LAYERS]
    for row in rows:
        s, f, r = row["scaling"], row["loop_scaling"], row["of_loop"]
        verdict = "-" if not row["judged"] else "met" if r["median"] >= GOAL else "missed"
        parts = [f"{name} {v['median']:.3f} [{v['low']:.2f} {v['high']:.2f}]" for name, v in (
            ("x", s), ("loop x", f), ("of it", r))]  # fmt: skip
        took = " to ".join(f"{row['microseconds'][name]:.1f}" for name in ("layer 1", "layer n"))
        print(f"{row['layer']:>13} {row['layout']:<9} {row['mflop']:6.1f} MFLOP {took:>17} us  {'  '.join(parts)} "
              f"{verdict}; {row['split']}")  # fmt: skip
    steps = break_even(loop, args.threads, args.rounds)
    print("sharing a loop of so many us:", ", ".join(f"{s['microseconds']}: x{s['median']:.2f}" for s in steps))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        head = environment.describe(args.threads, host.resolve("native").name, "python bench/threads.py")
        report = {**head, "goal": GOAL, "rounds": args.rounds, "rows": rows, "break_even": steps}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
