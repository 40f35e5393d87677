"""What a figure depends on besides the code: machine, versions, threads, and variables that cripple a peer."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CRIPPLING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
RECORDED_PREFIXES = ("OPENBLAS_", "OMP_", "MKL_", "KMP_", "ONEDNN_", "DNNL_", "OV_", "ORT_", "SPARSERT_DEBUG")
PACKAGES = ("sparsert", "numpy", "torch", "onnxruntime", "onnx", "openvino", "scipy", "mkl", "threadpoolctl")


def crippled(variables: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The set variables that force another OpenBLAS kernel or blocking: then no dense figure may be called best."""
    source = os.environ if variables is None else variables
    return tuple(name for name in CRIPPLING if source.get(name))


def can_pin_blas(threads: int) -> bool:
    """Whether NumPy's BLAS runs, or can be made to run, on ``threads`` threads."""
    if find_spec("threadpoolctl") is not None:
        return True
    return any(os.environ.get(name) == str(threads) for name in THREAD_VARIABLES[:2])


def pin_threads(threads: int) -> None:
    """Limit the BLAS and OpenMP pools that are loaded now; peers loaded later are told by their own interfaces."""
    if find_spec("threadpoolctl") is not None:
        threadpoolctl: Any = import_module("threadpoolctl")
        threadpoolctl.threadpool_limits(limits=threads)


def describe(threads: int, target: str, command: str = "") -> dict[str, Any]:
    """The head of a report; plain JSON values."""
    blas: list[str] = []
    if find_spec("threadpoolctl") is not None:
        threadpoolctl: Any = import_module("threadpoolctl")
        fields = ("internal_api", "version", "architecture", "num_threads")
        pools = threadpoolctl.threadpool_info()
        blas = [" ".join(str(pool[field]) for field in fields if pool.get(field)) for pool in pools]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "cpu": cpu_model(),
        "logical_cpus": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "threads": threads,
        "target": target,
        "thread_pools": blas,
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(RECORDED_PREFIXES)},
        "crippled_by": list(crippled()),
    }


def cpu_model() -> str:
    """The processor's name with family, model and stepping where Linux tells them."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields.get('model')}, stepping {fields.get('stepping')})"
    return name


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
