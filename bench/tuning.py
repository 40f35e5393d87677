#!/usr/bin/env python3
"""How much faster a tuned schedule is than the cost model's, and what tuning takes.

    python bench/tuning.py --problems mobilenet_v1 --seconds 90     measure what is missing, for at most 90 s
    python bench/tuning.py --chains --seconds 60                    nine layers of one shape called in turn
    python bench/tuning.py --summary                                the tables of what has been measured

Every problem is tuned in both layouts, "full" to know the best and "fast" as users would, by warm samples; then the
three operators are timed in turns on the same arrays (docs/benchmarks.md) and compared by the median of quotients of
one round. For chains the first layer is tuned, by cold samples and by warm ones, and all nine get its schedule: that is
what a network meets. Results are kept in bench/results/tuning.json; a run goes on where the last one stopped. Real
weights: SPARSERT_TEST_DATA.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

import sparsert
from sparsert.benchmarks import environment, measure, problems
from sparsert.benchmarks.problems import Problem
from sparsert.compiler import tune_layer
from sparsert.runtime import host
from sparsert.runtime.memory import aligned_empty
from sparsert.schedule.schedule import Schedule

RESULTS = Path(__file__).resolve().parent / "results" / "tuning.json"
SETS = ("mobilenet_v1", "resnet50_1x1", "transformer", "dlmc", "uniform_conv", "uniform_tokens")
SPARSITIES = (0.80, 0.90, 0.95)
LAYOUTS = ("row_major", "tile_major")
DENSITIES = ((0.0, 0.07, "about 95 %"), (0.07, 0.15, "about 90 %"), (0.15, 1.0, "80 % and less"))
CHAINS = ((512, 512, 196), (768, 768, 128), (1024, 1024, 49), (1024, 1024, 196))
CHAIN_LENGTH, CHAIN_ROUNDS = 9, 11
GOAL = "goal: geometric mean <= 1.15 (stretch 1.08), 90th percentile <= 1.4"


def cases(names: str) -> Iterator[tuple[Problem, str]]:
    """Every distinct pattern and number of columns, in both layouts."""
    seen = set()
    for problem in problems.select(names, SPARSITIES):
        key = (problem.weight.pattern.digest, problem.columns)
        if key not in seen:
            seen.add(key)
            for layout in LAYOUTS:
                yield problem, layout


def case_name(problem: Problem, layout: str) -> str:
    return f"{problem.weight.pattern.digest} {problem.columns} {layout}"


def run(problem: Problem, layout: str, rounds: int) -> dict[str, Any]:
    """Tune one case, time untuned, fast and full in turns, and take down all that was tried."""
    m, k, n = problem.shape
    target = host.resolve("native")
    runs: dict[str, Any] = {}
    schedules: dict[str, Schedule | None] = {"untuned": None}
    for effort in ("full", "fast"):
        start = time.perf_counter()
        result = tune_layer(problem.weight, layout=layout, tune=f"{effort}-warm", tuning="off", columns=n)
        seconds = time.perf_counter() - start
        schedules[effort] = result.best.schedule if result else None
        runs[effort] = {
            "seconds": round(seconds, 4),
            "candidates": len(result.trials) if result else 1,
            "skipped": result.skipped if result else 0,
        }
        if effort == "full" and result:
            runs["trials"] = [
                {**asdict(t.schedule), "us": round(1e6 * t.seconds, 3), "samples": t.samples} for t in result.trials
            ]
    x, y = np.ascontiguousarray(problem.input()), np.empty((m, n), np.float32)
    if layout == "tile_major":
        tiles = -(-n // target.lanes)
        x, y = (aligned_empty(tiles * e * target.lanes).reshape(tiles, e, target.lanes) for e in (k, m))
        x[...] = np.random.default_rng(0).standard_normal(x.shape)
    distinct: dict[Schedule | None, Any] = {}
    calls: dict[str, Any] = {}
    results: dict[str, Any] = {}
    for name, schedule in schedules.items():
        op = sparsert.compile_matmul(problem.weight, layout=layout, schedule=schedule, threads=1)
        op = distinct.setdefault(op.schedule, op)  # one operator for one schedule: its place in memory is the same
        calls[name] = op.bind(x, y)
        results[name] = (str(op.schedule), calls[name]().copy())
    same = all(np.array_equal(results["untuned"][1], r) for _, r in results.values())
    samples = measure.interleave(calls, rounds, 2e-3)
    return {
        "name": problem.name, "group": problem.group, "layout": layout, "shape": [m, k, n], "nnz": problem.nnz,
        "density": problem.weight.pattern.density, "bit_identical": bool(same),
        "us": {name: round(1e6 * samples.time(name).median, 3) for name in calls},
        "untuned_over": {
            name: [round(v, 4) for v in samples.speedup(name, "untuned")] if results[name][0] != results["untuned"][0]
            else [1.0, 1.0, 1.0] for name in ("fast", "full")
        },
        "schedules": {name: text for name, (text, _) in results.items()}, "tuning": runs,
    }  # fmt: skip


def chain(shape: tuple[int, int, int], sparsity: float, layout: str) -> dict[str, Any]:
    """Time chains of layers with the cost model's schedule, and with what cold and warm samples find."""
    m, k, n = shape
    tiles, lanes = -(-n // host.resolve("native").lanes), host.resolve("native").lanes
    layers = [problems.uniform(m, k, sparsity, seed, (k * (1 - sparsity)) ** -0.5) for seed in range(CHAIN_LENGTH)]
    schedules: dict[str, Schedule | None] = {"untuned": None}
    seconds = {}
    for name, effort in (("cold", "fast"), ("warm", "fast-warm")):
        start = time.perf_counter()
        result = tune_layer(layers[0], layout=layout, tune=effort, tuning="off", columns=n)
        seconds[name] = round(time.perf_counter() - start, 3)
        schedules[name] = result.best.schedule if result else None
    shape_of = (tiles, m, lanes) if layout == "tile_major" else (m, n)
    arrays = [aligned_empty(m * tiles * lanes)[: int(np.prod(shape_of))].reshape(shape_of) for _ in range(3)]
    arrays[0][...] = np.random.default_rng(0).standard_normal(shape_of)
    made: dict[str, list[Any]] = {}
    results, words = {}, {}
    for name, schedule in schedules.items():
        ops = [sparsert.compile_matmul(w, layout=layout, schedule=schedule, threads=1) for w in layers]
        words[name] = str(ops[0].schedule)
        same = next((other for other in made if words[other] == words[name]), None)
        places = [0, *(1 + i % 2 for i in range(CHAIN_LENGTH))]
        made[name] = made[same] if same else [
            op.bind(arrays[a], arrays[b]) for op, (a, b) in zip(ops, pairwise(places), strict=True)]  # fmt: skip
        results[name] = [bound().copy() for bound in made[name]][-1]
    calls = {name: partial(_in_turn, bound) for name, bound in made.items()}
    samples = measure.interleave(calls, CHAIN_ROUNDS, 4e-3)
    return {
        "shape": list(shape), "sparsity": sparsity, "layout": layout, "nnz": layers[0].pattern.nnz,
        "bit_identical": all(np.array_equal(results["untuned"], r) for r in results.values()),
        "us_per_layer": {name: round(1e6 * samples.time(name).median / CHAIN_LENGTH, 2) for name in calls},
        "untuned_over": {name: [round(v, 4) for v in samples.speedup(name, "untuned")]
                         if made[name] is not made["untuned"] else [1.0, 1.0, 1.0] for name in ("cold", "warm")},
        "schedules": words, "tuning_seconds": seconds,
    }  # fmt: skip


def _in_turn(bound: list[Any]) -> None:
    for call in bound:
        call()


def chain_summary(rows: list[dict[str, Any]]) -> str:
    """The table of chains: above 1, what is tuned is faster."""
    lines = ["| chain of nine | untuned, us a layer | untuned over tuned by cold samples | by warm ones |",
             "|---|---|---|---|"]  # fmt: skip
    for r in rows:
        name = f"{'x'.join(map(str, r['shape']))}, {100 * r['sparsity']:.0f} %, {r['layout']}"
        shown = " | ".join(f"{m:.3f} ({low:.2f} to {high:.2f})" for m, low, high in r["untuned_over"].values())
        lines.append(f"| {name} | {r['us_per_layer']['untuned']:.1f} | {shown} |")
    for name in ("cold", "warm"):
        ratios = [r["untuned_over"][name][0] for r in rows]
        if ratios:
            longest = max(r["tuning_seconds"][name] * min(1, 5e4 / r["nnz"]) for r in rows)
            lines.append(f"\n{name}: geometric mean {measure.geometric_mean(ratios):.3f}, least {min(ratios):.3f}, "
                         f"most {max(ratios):.3f}; {longest:.2f} s a layer or 50,000 nonzeros at most")  # fmt: skip
    differ = [r["shape"] for r in rows if not r["bit_identical"]]
    return "\n".join([*lines, f"\nchains that are not bit-identical: {differ or 'none'}"])


def spread(values: list[float]) -> str:
    return f"{measure.geometric_mean(values):.3f} | {np.percentile(values, 90):.3f} | {max(values):.3f}"


def summary(rows: list[dict[str, Any]]) -> str:
    """The tables of the design note."""
    lines = [f"{len(rows)} cases ({GOAL})", "",
             "| cases | n | untuned over full: mean | p90 | max | over fast: mean | p90 | max |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    groups = {"all": rows} | {layout: [r for r in rows if r["layout"] == layout] for layout in LAYOUTS}
    groups |= {name: [r for r in rows if low <= r["density"] < high] for low, high, name in DENSITIES}
    for name, group in groups.items():
        if group:
            full, fast = ([r["untuned_over"][e][0] for r in group] for e in ("full", "fast"))
            lines.append(f"| {name} | {len(group)} | {spread(full)} | {spread(fast)} |")
    lines += ["", "| effort | candidates: median, least | seconds per 50,000 nonzeros, layers of more: median, most | "
              "seconds, smaller layers: median, most |", "|---|---|---|---|"]  # fmt: skip
    for effort in ("fast", "full"):
        tried = [r["tuning"][effort]["candidates"] for r in rows]
        large = [5e4 * r["tuning"][effort]["seconds"] / r["nnz"] for r in rows if r["nnz"] >= 50_000] or [0.0]
        small = [r["tuning"][effort]["seconds"] for r in rows if r["nnz"] < 50_000] or [0.0]
        lines.append(f"| {effort} | {np.median(tried):.0f}, {min(tried)} | {np.median(large):.2f}, {max(large):.2f} | "
                     f"{np.median(small):.2f}, {max(small):.2f} |")  # fmt: skip
    lines += ["", "Best with a field as by default over best of all (1: the field is worth nothing):", "",
              "| field | default | median | p90 | most | cases above 1.02 |", "|---|---|---|---|---|---|"]  # fmt: skip
    for field, plain in (("k_segment", 0), ("blocks", 1), ("tiles", 0), ("packing", "none"), ("order", "natural"),
                         ("prefetch", False)):  # fmt: skip
        worth = []
        for row in rows:
            trials = row["tuning"].get("trials", [])
            without = [t["us"] for t in trials if t[field] == plain]
            if without and len(without) < len(trials):
                worth.append(min(without) / min(t["us"] for t in trials))
        if worth:
            many = sum(w > 1.02 for w in worth)
            lines.append(f"| {field} | {plain or 'all' if field != 'prefetch' else 'no'} | {np.median(worth):.3f} | "
                         f"{np.percentile(worth, 90):.3f} | {max(worth):.3f} | {many} of {len(worth)} |")  # fmt: skip
    differ = [r["name"] for r in rows if not r["bit_identical"]]
    lines += ["", f"results that are not bit-identical: {differ or 'none'}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--problems", default=",".join(SETS))
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case after so long")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--chains", action="store_true", help="measure chains instead of single layers")
    parser.add_argument("--summary", action="store_true", help="measure nothing")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    started = time.monotonic()
    report: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {"rows": {}}
    left = 0
    chains = report.setdefault("chains", {})
    if args.chains and not args.summary:
        for shape, sparsity, layout in product(CHAINS, SPARSITIES, LAYOUTS):
            name = f"{shape} {sparsity} {layout}"
            if name not in chains and time.monotonic() - started <= args.seconds:
                chains[name] = chain(shape, sparsity, layout)
            left += name not in chains
    elif not args.summary:
        report["head"] = environment.describe(1, host.resolve("native").name, "python bench/tuning.py")
        for problem, layout in cases(args.problems):
            name = case_name(problem, layout)
            if name in report["rows"]:
                continue
            if time.monotonic() - started > args.seconds:
                left += 1
                continue
            report["rows"][name] = run(problem, layout, args.rounds)
    if not args.summary:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    if not args.chains:
        print(summary(list(report["rows"].values())), end="\n\n")
    if chains:
        print(chain_summary(list(chains.values())))
    if left:
        print(f"\n{left} cases are left for another run")


if __name__ == "__main__":
    main()
