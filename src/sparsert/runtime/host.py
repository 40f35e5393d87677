"""The machine at hand: which targets it can execute, its caches, how many threads we may use."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ExecutableMemoryError, TargetUnavailableError, UnsupportedError
from ..target import NATIVE_ORDER, TARGETS, Target
from . import cpuid


@cache
def cpu_features() -> frozenset[str]:
    """Features of this CPU that the operating system has enabled, from CPUID and XCR0; empty if it is not x86-64."""
    if not on_linux_x86():
        return frozenset()
    return cpuid.features()


def on_linux_x86() -> bool:
    """Whether generated code can execute here at all."""
    return (
        sys.platform.startswith("linux")
        and platform.machine() in ("x86_64", "AMD64")
        and ctypes.sizeof(ctypes.c_void_p) == 8
    )


def unavailable(name: str) -> str | None:
    """Why code for target ``name`` cannot run here, or None where it can."""
    target = TARGETS[name]
    if target.isa == "reference":
        return None
    if not on_linux_x86():
        return f"generated code runs on Linux x86-64, and this is {platform.system()} {platform.machine()}"
    try:
        missing = [f for f in target.needs if f not in cpu_features()]
    except (TargetUnavailableError, ExecutableMemoryError) as error:
        return error.what
    return f"this CPU, or its operating system, lacks {', '.join(missing)}" if missing else None


def lookup(name: str) -> Target:
    """The target called ``name``; ``native`` is the best one this machine can execute.

    Raises:
        UnsupportedError: no such target. TargetUnavailableError: ``native``, and no compiled target can run here.
    """
    if name == "native":
        reasons = {n: unavailable(n) for n in NATIVE_ORDER}
        for candidate, reason in reasons.items():
            if reason is None:
                return with_host_caches(TARGETS[candidate])
        raise TargetUnavailableError("; ".join(f"{n}: {r}" for n, r in reasons.items()), where="target='native'",
                                     hint="Use target='reference' (NumPy) for correct, slow results.")  # fmt: skip
    if name not in TARGETS:
        raise UnsupportedError(f"unknown target {name!r}", where="target", hint=f"Known: native, {', '.join(TARGETS)}.")
    return with_host_caches(TARGETS[name])


def resolve(name: str) -> Target:
    """As :func:`lookup`, and this machine can execute it.

    Raises:
        TargetUnavailableError: with the reason.
    """
    target = lookup(name)
    reason = unavailable(target.name)
    if reason:
        raise TargetUnavailableError(
            reason,
            where=f"target={name!r}",
            hint="Use target='native' for the best available one, or target='reference' (NumPy).",
        )
    return target


@cache
def host_caches() -> dict[str, int]:
    """Bytes of this machine's caches per core, as far as the system tells: keys l1i, l1d, l2, l3."""
    found: dict[str, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / f).read_text().strip() for f in ("level", "type", "size"))
            unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1:], 1)
            name = f"l{level}" + ({"Instruction": "i", "Data": "d"}.get(kind, "") if level == "1" else "")
            found[name] = int(size.rstrip("KM")) * unit
        except (OSError, ValueError):
            continue
    return found


def with_host_caches(target: Target) -> Target:
    """``target`` with the cache sizes of this machine."""
    sizes = {k: v for k, v in host_caches().items() if k in ("l1i", "l1d", "l2") and v > 0}
    return replace(target, **sizes) if sizes else target  # type: ignore[arg-type]


def default_threads() -> int:
    """What the affinity mask and the cgroup quota allow, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota()))


@cache
def _quota() -> int:
    """Whole cores that the cgroup grants (version 2, then 1); a large number where it sets no limit."""
    for quota_file, period_file in (
        ("/sys/fs/cgroup/cpu.max", ""),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    ):
        try:
            text = Path(quota_file).read_text().split()
            quota, period = (text[0], text[1]) if not period_file else (text[0], Path(period_file).read_text().strip())
            return 1 << 20 if quota in ("max", "-1") else max(1, int(quota) // max(1, int(period)))
        except (OSError, ValueError, IndexError):
            continue
    return 1 << 20


def cpu_name() -> str:
    """The processor's name as the system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def host_report() -> dict[str, Any]:
    """What ``sparsert info`` prints: cpu, features, targets with the reason where unavailable, caches, threads."""
    targets = {name: unavailable(name) for name in TARGETS}
    try:
        features = sorted(cpu_features())
    except ExecutableMemoryError:  # CPUID is read by generated code; the targets' reasons say so
        features = []
    native = next((n for n in NATIVE_ORDER if targets[n] is None), None)
    return {
        "cpu": cpu_name(),
        "features": features,
        "targets": targets,
        "native": native,
        "caches": dict(host_caches()),
        "threads": default_threads(),
    }
