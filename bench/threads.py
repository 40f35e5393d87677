#!/usr/bin/env python3
"""How operators scale over threads, beside a loop of multiply-adds that scales as well as the machine lets.

    python bench/threads.py [--threads 2] [--rounds 60] [--json bench/results/threads.json]

All layers are compiled first. A round then visits each of them in turn: the loop on one thread and on all (through the
same pool), the layer on one thread and on all, the loop again, and two threads that hand a word back and forth. The
speed-ups of a visit are compared: what clock, neighbours and hypervisor take in those milliseconds they take from both.
Where one of the two loops did not scale, another process had a core, and the visit tells nothing about two threads: it
is counted and left out. Since every layer is met in every round, what disturbs for some seconds falls on all of them
alike. Reported are medians over the visits, with the 10th and 90th percentile.

The word says where the threads are: cores that share a last-level cache hand it over in 50 to 100 ns. A hypervisor may
move them apart at any time, which takes two to five times as long; a layer, whose threads share x and y, is slower then
while the loop is not. Medians count both; those of visits with near and with far cores are given beside them.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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

# rows, columns, N, sparsity; all but one, there for information, have 20 MFLOP of nonzero work or more
LAYERS = (
    (1024, 1024, 196, 0.8), (4096, 1024, 512, 0.9), (3072, 768, 512, 0.9), (2048, 2048, 128, 0.9), (512, 512, 196, 0.9),
    (512, 256, 784, 0.0), (3072, 768, 128, 0.0),
)  # fmt: skip
LAYOUTS = ("row_major", "linear")
CONVOLUTION = (64, 64, 56, 0.9)  # 3x3: outputs, inputs, side of an image, sparsity; batch 1
GOAL = 0.93  # of the loop's scaling
LEAST_MFLOP = 20.0
LOOP_SECONDS = 5e-4  # one run of the loop on one thread: about what a layer takes
SAMPLE_SECONDS = 4e-3
SCALES = 0.9  # times the threads: a loop that scales less has shared a core with another process
NEAR = 70.0  # nanoseconds: a word that takes no longer is handed over within a cache
_CHAINS, _TURNS = 12, 8  # accumulators that do not wait for each other; multiply-adds of each in the loop's body
_EXCHANGES, _PATIENCE = 200, 1 << 14  # of a word, and turns to wait for it: the threads may have one core only


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


def catch() -> Any:
    """A program that, so many times, waits until a word is its own number and then makes it the other one."""
    b = Builder()
    again, wait, mine, out = b.label("again"), b.label("wait"), b.label("mine"), b.label()
    b.emit("enter")
    for register, slot in ((S.PX5, 0), (S.Y, 1), (S.PY, 2), (S.TMP, 3)):
        b.emit("s_arg", d=register, disp=slot)
    b.place(again)
    b.emit("s_set", d=S.T, disp=_PATIENCE)
    b.place(wait)
    b.emit("s_load", d=S.K, ptr=S.PX5, disp=0)
    b.emit("jump_equal", a=S.K, b=S.Y, disp=mine)
    b.emit("loop", a=S.T, disp=wait)
    b.emit("jump", disp=out)
    b.place(mine)
    b.emit("s_store", a=S.PY, ptr=S.PX5, disp=0)
    b.emit("loop", a=S.TMP, disp=again)
    b.place(out)
    b.emit("leave")
    return b.finish()


class Handover:
    """How long a word takes from one thread to another."""

    def __init__(self, loop: Loop) -> None:
        self.pool = loop.pool
        self.code = Executable(assemble(catch(), host.resolve("native").isa).code)
        self.word, self.blocks = aligned_empty(32, np.int64, 128), [aligned_empty(16, np.int64, 128) for _ in range(2)]
        for number, block in enumerate(self.blocks):
            block[:4] = address_of(self.word), number, 1 - number, _EXCHANGES
        self.job = job(self.pool.address, [(self.code.address, address_of(block)) for block in self.blocks])

    def nanoseconds(self) -> float:
        """One way."""
        times = []
        for _ in range(5):
            self.word[0] = 0
            start = time.perf_counter()
            self.pool.dispatch(address_of(self.job))
            times.append(time.perf_counter() - start)
        return 1e9 * float(np.median(times)) / (2 * _EXCHANGES)


@dataclass
class Line:
    """A layer on one thread and on all, and what was measured of it, in seconds by name."""

    layer: str
    layout: str
    sparsity: float
    mflop: float
    calls: dict[str, Callable[[], object]]
    explain: Callable[[], str]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    handover: list[float] = field(default_factory=list)


def lines(layouts: list[str], threads: int) -> Iterator[Line]:
    rng = np.random.default_rng(0)

    def sparse(shape: tuple[int, ...], sparsity: float) -> Any:
        return np.where(rng.random(shape) >= sparsity, rng.standard_normal(shape), 0).astype(np.float32)

    def line(name: str, layout: str, sparsity: float, columns: int, x: Any, compiled: Callable[[int], Any]) -> Line:
        one, op = compiled(1), compiled(threads)
        alone, together = one.bind(x), op.bind(x)
        if not np.array_equal(alone(), together()):
            raise ValueRangeError("the number of threads changes results", where=name)
        mflop = 2e-6 * one.stats.nnz * columns
        return Line(name, layout, sparsity, mflop, {"layer 1": alone, "layer n": together}, op.explain)

    for layout in layouts:
        compile_layer: Callable[..., Any] = sparsert.compile_linear if layout == "linear" else sparsert.compile_matmul
        for rows, inner, columns, sparsity in LAYERS:
            weight = sparse((rows, inner), sparsity)
            x = rng.standard_normal((columns, inner) if layout == "linear" else (inner, columns)).astype(np.float32)
            name = f"{rows}x{inner}x{columns}"
            yield line(name, layout, sparsity, columns, x, lambda n, w=weight, c=compile_layer: c(w, threads=n))
    outputs, inputs, side, sparsity = CONVOLUTION
    weight = sparse((outputs, inputs, 3, 3), sparsity)
    x = rng.standard_normal((1, inputs, side, side)).astype(np.float32)
    yield line(f"3x3 {outputs}@{side}", "images", sparsity, side * side, x,
               lambda n: sparsert.compile_conv2d(weight, padding=1, threads=n))  # fmt: skip


def measure(found: list[Line], loop: Loop, handover: Handover, rounds: int) -> None:
    """All lines in every round; what comes first, one thread or all, changes from round to round."""
    loops = {"loop 1": loop.alone, "loop n": loop.shared}
    for number in range(rounds):
        for line in found:
            line.handover.append(handover.nanoseconds())
            for kind, calls in (("", loops), ("", line.calls), (" again", loops)):
                for name in sorted(calls, reverse=number % 2 > 0):
                    line.seconds.setdefault(name + kind, []).append(sample(calls[name]))


def sample(call: Callable[[], object]) -> float:
    """Seconds of a call, of at least three in a row, after one or more that warm the caches up."""
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    count = max(3, int(SAMPLE_SECONDS / max(once, 1e-7)))
    for _ in range(count // 3):
        call()
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def report(line: Line, threads: int) -> dict[str, Any]:
    """What a line's visits amount to."""
    seconds = {name: np.array(values) for name, values in line.seconds.items()}
    before, after = (seconds["loop 1" + kind] / seconds["loop n" + kind] for kind in ("", " again"))
    fair = np.minimum(before, after) >= SCALES * threads
    if not fair.any():
        raise ValueRangeError(f"no visit of {line.layer} had {threads} cores to itself", where="--threads")
    scaling, loop_scaling = (seconds["layer 1"] / seconds["layer n"])[fair], np.sqrt(before * after)[fair]
    of_loop, near = scaling / loop_scaling, np.array(line.handover)[fair] <= NEAR
    micro = {name: round(1e6 * float(np.median(seconds[name][fair])), 1) for name in ("loop 1", "loop n", *line.calls)}
    return {
        "layer": line.layer, "sparsity": line.sparsity, "layout": line.layout, "mflop": round(line.mflop, 1),
        "microseconds": micro, "gflops": round(1e3 * line.mflop / micro["layer n"], 1),
        "scaling": rounded(scaling), "loop_scaling": rounded(loop_scaling), "of_loop": rounded(of_loop),
        "visits": int(fair.sum()), "left_out": int((~fair).sum()), "near": int(near.sum()),
        "of_loop_near": rounded(of_loop[near]) if near.any() else None,
        "of_loop_far": rounded(of_loop[~near]) if not near.all() else None,
        "split": line.explain().splitlines()[-2].removeprefix("threads").strip(), "judged": line.mflop >= LEAST_MFLOP,
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
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    loop = Loop(args.threads)
    handover, found = Handover(loop), list(lines(args.layouts, args.threads))
    gc.collect()
    gc.disable()
    measure(found, loop, handover, args.rounds)
    gc.enable()
    rows = [report(line, args.threads) for line in found]
    for row in rows:
        verdict = "-" if not row["judged"] else "met" if row["of_loop"]["median"] >= GOAL else "missed"
        parts = [f"{name} {v['median']:.3f} [{v['low']:.2f} {v['high']:.2f}]" for name, v in (
            ("x", row["scaling"]), ("loop x", row["loop_scaling"]), ("of it", row["of_loop"])) ]  # fmt: skip
        counts = {"near": row["near"], "far": row["visits"] - row["near"]}
        parts += [f"{name} {row[f'of_loop_{name}']['median']:.3f} ({n})" for name, n in counts.items() if n]
        took = " to ".join(f"{row['microseconds'][name]:.1f}" for name in ("layer 1", "layer n"))
        print(f"{row['layer']:>13} {row['layout']:<9} {row['mflop']:6.1f} MFLOP {took:>17} us  {'  '.join(parts)} "
              f"{row['left_out']} left out; {verdict}; {row['split']}")  # fmt: skip
    steps = break_even(loop, args.threads, 25)
    print("sharing a loop of so many us:", ", ".join(f"{s['microseconds']}: x{s['median']:.2f}" for s in steps))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        word = rounded(np.array([ns for line in found for ns in line.handover]))
        head = environment.describe(args.threads, host.resolve("native").name, "python bench/threads.py")
        whole = {**head, "goal": GOAL, "rounds": args.rounds, "handover_ns": word, "rows": rows,
                 "break_even": steps}  # fmt: skip
        args.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
