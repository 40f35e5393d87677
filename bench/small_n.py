#!/usr/bin/env python3
"""Products with few columns against the best dense peer, warm and with layers that come from memory.

    python bench/small_n.py                       the lines of the table, results in bench/results/small_n.json
    python bench/small_n.py --sparsity 90 --columns 1 --json ''

*hot*: one layer over and over. *cold*: layers of one shape in turn, more than 128 MB of them on both sides, so that
nothing is left of a layer in the caches when its turn comes again; the fastest three dense forms of the hot round take
part. Ratios are medians of ratios within a round.

Lines of *bf16* storage: the same pattern with weights that are exact in bf16, which operators then store in two bytes;
the dense forms are those of the same rounds, in fp32.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sparsert.benchmarks import baselines, environment
from sparsert.benchmarks.measure import Samples, interleave
from sparsert.benchmarks.ours import sparsert_forms
from sparsert.benchmarks.peers import Candidate, Prepared, bind
from sparsert.benchmarks.problems import Problem, uniform
from sparsert.benchmarks.table import console
from sparsert.operators.bf16 import rounded

DENSE = ("numpy", "torch", "onnxruntime", "openvino")
SIZE = 4096
COLD_BYTES = 160 << 20
BYTES_PER_NONZERO = {"f32": 5, "bf16": 3}


@dataclass(frozen=True)
class Goal:
    """What a speed-up over best dense is to reach."""

    sparsity: int
    columns: int
    mode: str
    target: float
    stretch: float


GOALS = (
    Goal(90, 1, "cold", 5, 6), Goal(80, 1, "cold", 2.6, 3), Goal(50, 1, "cold", 1.4, 1.6),
    Goal(90, 1, "hot", 7, 7), Goal(80, 1, "hot", 3, 3), Goal(50, 1, "hot", 1.4, 1.4),
    Goal(90, 4, "hot", 6, 6), Goal(90, 8, "hot", 6, 6),
)  # fmt: skip


def prepared(sparsity: int, columns: int, layers: int, storage: str = "f32") -> Prepared:
    """``layers`` copies of one problem: each is bound for itself and has packed weights of its own."""
    weight = uniform(SIZE, SIZE, sparsity / 100)
    if storage == "bf16":
        weight = replace(weight, values=rounded(weight.values))
    one = Prepared.of(Problem(f"{SIZE}x{SIZE}x{columns}, {sparsity} %", "small N", weight, columns))
    problem = Problem(one.problem.name, "small N", weight, columns, successors=(weight,) * (layers - 1))
    dense = tuple(one.dense[0].copy() for _ in range(layers))
    return Prepared(problem, one.x, dense, one.references * layers)


def candidates(selection: baselines.Selection, data: Prepared, only: tuple[str, ...] = ()) -> list[Candidate]:
    """Every dense form, or those named."""
    found = []
    for name, forms in selection.forms.items():
        wanted = [f for f in forms if f.role == "dense" and (not only or f"{name} {f.name}".strip() in only)]
        found += baselines.prepare(name, wanted, data)[0]
    return found


def ours(data: Prepared, threads: int) -> Candidate:
    """W @ x; with one column, x @ W.T is the same call."""
    return bind(sparsert_forms(threads)[0], "sparsert", data)


def line(samples: Samples, mine: str, dense: dict[str, int], layers: int) -> dict[str, Any]:
    """Times per layer, and the ratio over the fastest dense form."""
    best = min(dense, key=lambda key: samples.time(key).median / dense[key])
    ratio = samples.seconds[best] / dense[best] / (samples.seconds[mine] / layers)
    low, median, high = np.percentile(ratio, (10, 50, 90)).round(3).tolist()
    return {
        "ms": 1e3 * samples.time(mine).median / layers,
        "speedup": {"median": median, "p10": low, "p90": high},
        "best_dense": best,
        "dense_ms": {key: 1e3 * samples.time(key).median / n for key, n in dense.items()},
    }


def measure(
    sparsity: int, columns: int, storages: tuple[str, ...], modes: tuple[str, ...], rounds: int, threads: int
) -> list[dict[str, Any]]:
    selection = baselines.select([n for n in DENSE if not baselines.obstacle(baselines.BASELINES[n], threads)], threads)
    lines = []
    dense = candidates(selection, prepared(sparsity, columns, 1))
    mine = {storage: ours(prepared(sparsity, columns, 1, storage), threads) for storage in storages}
    facts = {storage: one.facts for storage, one in mine.items()}
    hot = interleave({c.key: c.call for c in dense} | {storage: one.call for storage, one in mine.items()}, rounds)
    lines += [{"storage": storage, "mode": "hot"} | line(hot, storage, {c.key: 1 for c in dense}, 1)
              for storage in storages]  # fmt: skip
    fastest = tuple(sorted((c.key for c in dense), key=lambda key: hot.time(key).median)[:3])
    if "cold" in modes:
        few = -(-COLD_BYTES // (4 * SIZE * SIZE))
        nonzeros = SIZE * SIZE * (100 - sparsity) // 100
        many = {storage: -(-COLD_BYTES // (BYTES_PER_NONZERO[storage] * nonzeros)) for storage in storages}
        dense = candidates(selection, prepared(sparsity, columns, few), fastest)
        mine = {storage: ours(prepared(sparsity, columns, n, storage), threads) for storage, n in many.items()}
        cold = interleave({c.key: c.call for c in dense} | {storage: one.call for storage, one in mine.items()}, rounds)
        layers = {c.key: few for c in dense}
        lines += [{"storage": storage, "mode": "cold", "layers": many[storage], "dense_layers": few}
                  | line(cold, storage, layers, many[storage]) for storage in storages]  # fmt: skip
    head = {"sparsity": sparsity, "columns": columns}
    return [head | {"facts": facts[one["storage"]]} | one for one in lines if one["mode"] in modes]


def _name(one: dict[str, Any]) -> tuple[Any, ...]:
    return -one["sparsity"], one["columns"], one.get("storage", "f32"), one["mode"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sparsity", default="90,80,50", help="in percent")
    parser.add_argument("--columns", default="1,4,8")
    parser.add_argument("--storages", default="f32,bf16")
    parser.add_argument("--modes", default="hot,cold")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", default="bench/results/small_n.json", help="added to what is there; '' for none")
    args = parser.parse_args()
    if bad := environment.crippled():
        parser.error(f"{', '.join(bad)} is set: no dense figure may be called best then")
    rows = Table("sparsity", "N", "storage", "mode", "ms", "best dense", "ms", "speed-up", "p10..p90", "goal")
    results = []
    for sparsity in map(int, args.sparsity.split(",")):
        for columns in map(int, args.columns.split(",")):
            modes = tuple(m for m in args.modes.split(",") if columns == 1 or m == "hot")
            for one in measure(sparsity, columns, tuple(args.storages.split(",")), modes, args.rounds, 1):
                results.append(one)
                s, best = one["speedup"], one["best_dense"]
                goal = next((g for g in GOALS if (g.sparsity, g.columns, g.mode) == (sparsity, columns, one["mode"])),
                            None)  # fmt: skip
                met = "-" if goal is None else f"{goal.target:g} {'met' if s['median'] >= goal.target else 'missed'}"
                rows.add_row(f"{sparsity} %", str(columns), one["storage"], one["mode"], f"{one['ms']:.3f}", best,
                             f"{one['dense_ms'][best]:.2f}", f"{s['median']:.2f}", f"{s['p10']:.2f}..{s['p90']:.2f}",
                             met)  # fmt: skip
    console().print(rows)
    if args.json:
        path = Path(args.json)
        known = json.loads(path.read_text())["lines"] if path.is_file() else []
        names = {_name(one) for one in results}
        lines = sorted([one for one in known if _name(one) not in names] + results, key=_name)
        report = {"environment": environment.describe(1, "native", shlex.join(sys.argv)), "lines": lines}
        path.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
