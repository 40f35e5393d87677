#!/usr/bin/env python3
"""How long it takes to compile a layer, and how many instructions a second the code generator makes.

    python bench/compile_time.py [--json bench/results/compile_time.json]

Compiles uniform random layers many times and reports the median and the 10th percentile. "instructions a second" counts
everything between the vector program and the finished bytes: lowering with addressing, encoding, flattening, labels.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import sparsert
from sparsert.codegen.assemble import assemble
from sparsert.kernels import matmul
from sparsert.runtime import host
from sparsert.schedule import cost
from sparsert.schedule.task import Task
from sparsert.sparsity.pattern import as_sparse

SHAPES = ((512, 512, 0.9), (768, 768, 0.9), (3072, 768, 0.9), (2048, 2048, 0.9))


def timed(call: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median and 10th percentile in milliseconds."""
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        samples.append(1e3 * (time.perf_counter() - start))
    return float(np.median(samples)), float(np.percentile(samples, 10))


def measure(rows: int, columns: int, sparsity: float, layout: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((rows, columns)) * (rng.random((rows, columns)) >= sparsity)).astype(np.float32)
    rounds = max(10, 50_000_000 // weight.size // 2)
    compile_ms, fastest = timed(lambda: sparsert.compile_matmul(weight, layout=layout), rounds)
    target = host.resolve("native")
    task = Task(as_sparse(weight).pattern, layout=layout)
    schedule = cost.choose(task, target, matmul.spare(task, target))
    program = matmul.generate(task, schedule, target).program
    assemble_ms, _ = timed(lambda: assemble(program, target.isa), rounds)
    code = assemble(program, target.isa)
    stats = sparsert.compile_matmul(weight, layout=layout).stats
    return {
        "shape": f"{rows}x{columns}",
        "sparsity": sparsity,
        "layout": layout,
        "nnz": stats.nnz,
        "compile_ms": round(compile_ms, 3),
        "compile_ms_p10": round(fastest, 3),
        "instructions": code.instructions,
        "million_instructions_per_second": round(code.instructions / assemble_ms / 1e3, 2),
        "bytes_per_nonzero": round(stats.bytes_per_nonzero, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [measure(*shape, layout) for shape in SHAPES for layout in ("tile_major", "row_major")]
    for row in rows:
        print(
            f"{row['shape']:>10} {row['layout']:<10} {row['nnz']:>7} nonzeros  compile {row['compile_ms']:7.2f} ms "
            f"(10th percentile {row['compile_ms_p10']:.2f})  "
            f"{row['million_instructions_per_second']:5.1f} M instructions/s  "
            f"{row['bytes_per_nonzero']:.1f} bytes per nonzero"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"cpu": host.cpu_name(), "numpy": np.__version__, "date": time.strftime("%Y-%m-%d"), "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
